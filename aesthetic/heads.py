"""A head: vector of one space -> number with a scale. Loading, saving and applying.

On disk a head is a folder of three files. `head.safetensors` holds the weights (float32), `head.json` says everything
else and is the authority on the weights' names, shapes and sha256, `MODEL_CARD.md` is written from it for people. A
head that someone else made is read without trusting it: no file is a program, and a file that does not agree with
head.json is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from aesthetic.chunks import blocks, thread_map
from aesthetic.errors import UserError, nearest
from aesthetic.files import write_atomic
from aesthetic.space import Space, SpaceError
from aesthetic.untrusted import parse_json, printable, read_bytes, read_json_file

if TYPE_CHECKING:
    from aesthetic.head_json import HeadFields

FORMAT = "tastemaker-head/1"
SHIPPED = Path(__file__).parent / "shipped"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_MAX_JSON = 4 << 20  # bytes of head.json
_MAX_WEIGHTS = 64 << 20  # bytes of head.safetensors; the largest head known (768-1024-128-64-16-1) has 3.7 MB
_MAX_HEADER = 64 << 10  # bytes of the header of head.safetensors; ours are below 2 KB
_MAX_LAYERS = 16
_MAX_DEPTH = 30  # of what a card may nest; ours nest four deep
_COLUMNS = 100  # of a terminal, for `describe`
_CHUNK = 16384  # rows that a thread takes at a time
_UNIT = 0.01  # how far a vector's norm may lie from what it should be, as a share; float16 moves it by less than 0.001
_PROBES = "space.probes"

LINKS = ("identity", "sigmoid")

Layer = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


class HeadError(UserError):
    """A head, a file of one, or input to one is not usable; the message names it and what to do."""


def check_name(name: str) -> None:
    """Raise HeadError where a head cannot be called so."""
    if not _NAME.fullmatch(name):
        raise HeadError(f"{name!r} cannot name a head: use letters, digits and . _ + - (up to 100)")


def check_scale(what: str, scale: tuple[float, float]) -> None:
    """Raise HeadError, beginning with `what`, where these are not the lowest and the highest rating of a scale."""
    low, high = scale
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise HeadError(f"{what}: scale is {low} to {high}; it must be two finite numbers, the lower one first")


def check_norms(name: str, space: Space, squares: npt.NDArray[np.floating], first: int = 0) -> None:
    """Raise HeadError where rows of these squared lengths (n,), the first of them row `first`, have another norm than
    the space's vectors: 1 for "l2", the square root of dim for "l2_sqrt_d". A NaN is let pass."""
    length = {"l2": 1.0, "l2_sqrt_d": math.sqrt(space.dim)}.get(space.norm)
    if length is None:
        return
    norms = np.sqrt(squares)
    wrong = np.abs(norms / np.float32(length) - 1) > _UNIT
    if wrong.any():
        row = int(wrong.argmax())
        takes = "unit vectors" if length == 1 else f"vectors of norm {length:.4g} ({space.norm})"
        raise HeadError(f"{name} takes {takes}; row {first + row} has norm {norms[row]:.4g}: scale the rows to that")


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """Affine maps with ReLU between them, from the vectors of one space to one number, and a link at the end.

    A head without a non-linearity is one layer. `link` says what becomes of the last layer's number z: "identity"
    leaves it, "sigmoid" gives 1 / (1 + exp(-z)), the probability of a logistic classifier. `card` is JSON for people
    and for `heads show`: `about`, `licence`, `source`, `data`, `metrics`, `quantiles`, `thresholds`, `limits`, all
    optional. Scores of the identity may leave `scale`: it is the scale of the ratings that the head was fitted to, and
    nothing clips. A sigmoid's scale is 0 to 1.
    """

    name: str
    task: str  # "aesthetic", "nsfw", or whatever the ratings were about
    space: Space
    scale: tuple[float, float]  # lowest and highest possible rating
    layers: tuple[Layer, ...]  # (weight (out, in), bias (out,)) float32, the last with out = 1
    link: str = "identity"  # or "sigmoid"
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what could not be applied or written: raises HeadError."""
        check_name(self.name)
        if not self.task:
            raise HeadError(f"{self.name}: the task is empty")
        check_scale(self.name, self.scale)
        low, high = self.scale
        if self.link not in LINKS:
            raise HeadError(f"{self.name}: the link is {self.link!r}; it is one of {', '.join(LINKS)}")
        if self.link == "sigmoid" and (low, high) != (0, 1):
            raise HeadError(f"{self.name}: scale is {low:g} to {high:g}; a sigmoid's scores are on a scale of 0 to 1")
        if not 1 <= len(self.layers) <= _MAX_LAYERS:
            raise HeadError(f"{self.name}: {len(self.layers)} layers; a head has 1 to {_MAX_LAYERS}")
        width = self.space.dim
        for i, (weight, bias) in enumerate(self.layers):
            if weight.dtype != np.float32 or bias.dtype != np.float32:
                raise HeadError(f"{self.name}: layer {i} is {weight.dtype} and {bias.dtype}; both must be float32")
            if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
                raise HeadError(f"{self.name}: layer {i} is {weight.shape} and {bias.shape}, its input has {width}")
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise HeadError(f"{self.name}: layer {i} holds values that are not finite")
            width = weight.shape[0]
        if width != 1:
            raise HeadError(f"{self.name}: the last layer gives {width} numbers; a head gives one")

    @property
    def affine(self) -> bool:
        """Whether the number that the link gets is a weighted sum of the vector and a constant."""
        return len(self.layers) == 1

    @cached_property
    def digest(self) -> str:
        """16 hex digits that change with anything that a score depends on or is recorded with: not with the card."""
        what = hashlib.sha256()
        space = [self.space.encoder, self.space.norm, self.space.fingerprint]
        link = [] if self.link == "identity" else [self.link]  # heads from before there were links keep their digest
        what.update(json.dumps([FORMAT, self.name, self.task, *map(float, self.scale), *space, *link]).encode())
        for weight, bias in self.layers:
            what.update(json.dumps(weight.shape).encode())
            what.update(weight.tobytes() + bias.tobytes())
        return what.hexdigest()[:16]

    def __call__(self, vectors: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Score vectors (n, dim) of any float type -> (n,) float32, in the units of `scale`.

        A row with a NaN scores NaN. Raises HeadError where the dimension is wrong, or where a row has another norm than
        the space's vectors (1 for "l2", the square root of dim for "l2_sqrt_d"). It cannot see whether they come from
        the right encoder: compare spaces first (`aesthetic.space.require_same`).
        """
        vectors = np.asanyarray(vectors)
        if vectors.ndim != 2 or vectors.shape[1] != self.space.dim:
            raise HeadError(f"{self.name} takes vectors of shape (n, {self.space.dim}), not {vectors.shape}")
        if not np.issubdtype(vectors.dtype, np.floating):
            raise HeadError(f"{self.name} takes vectors of a float type, not {vectors.dtype}")
        scores = np.empty(len(vectors), np.float32)

        def score(start: int) -> None:
            for place, x, squares in blocks(vectors[start : start + _CHUNK]):
                first = start + place
                check_norms(self.name, self.space, squares, first)
                scores[first : first + len(x)] = self._apply(x)

        starts = range(0, len(vectors), _CHUNK)
        for _ in thread_map(score, starts) if len(starts) > 2 else map(score, starts):
            pass
        return scores

    def _apply(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        for weight, bias in self.layers[:-1]:
            x = np.maximum(x @ weight.T + bias, 0)
        weight, bias = self.layers[-1]
        z = x @ weight[0] + bias[0]
        if self.link == "identity":
            return z
        with np.errstate(invalid="ignore"):  # a NaN stays one
            return np.exp(-np.logaddexp(np.float32(0), -z))  # 1 / (1 + exp(-z)), where exp(-z) may be beyond float32


def save_head(head: Head, folder: Path | str) -> Path:
    """Write a head as a folder; the same head gives the same bytes. Returns the folder.

    Each file appears whole or not at all; head.json comes after the weights, and names their sha256, so a writer that
    was killed in between leaves a head that is refused, never one that mixes two.
    """
    from safetensors.numpy import save

    folder = Path(folder)
    tensors = {}
    for i, (weight, bias) in enumerate(head.layers):
        tensors[f"layers.{i}.weight"] = np.ascontiguousarray(weight)
        tensors[f"layers.{i}.bias"] = np.ascontiguousarray(bias)
    if head.space.probes is not None:
        tensors[_PROBES] = np.ascontiguousarray(head.space.probes, np.float32)
    weights = save(tensors)
    about = {
        "format": FORMAT,
        "name": head.name,
        "task": head.task,
        "scale": [float(v) for v in head.scale],
        "space": {
            "encoder": head.space.encoder,
            "dim": head.space.dim,
            "norm": head.space.norm,
            "details": head.space.details,
            "fingerprint": head.space.fingerprint,
            "probes": None if head.space.probes is None else len(head.space.probes),
        },
        "layers": [head.space.dim, *(len(bias) for _, bias in head.layers)],
        "activation": None if head.affine else "relu",
        **({} if head.link == "identity" else {"link": head.link}),
        "card": head.card,
        "sha256": {"head.safetensors": hashlib.sha256(weights).hexdigest()},
    }
    try:
        text = json.dumps(about, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as e:
        raise HeadError(f"{head.name}: its card or space cannot be written as JSON: {e}") from e
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "head.safetensors", weights)
    write_atomic(folder / "head.json", text.encode())
    write_atomic(folder / "MODEL_CARD.md", model_card(head).encode())
    return folder


def check_free(folder: Path) -> None:
    """Raise HeadError where a folder holds something else than a head, before one is written to it."""
    if folder.exists() and not folder.is_dir():
        raise HeadError(f"{folder} is a file; a head is a folder: give another name")
    others = sorted(os.listdir(folder)) if folder.is_dir() else []
    if not others:
        return
    try:
        about = read_json_file(folder / "head.json", _MAX_JSON)
    except UserError:
        about = None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise HeadError(f"{folder} holds something else ({printable(others[0], 80)}): give a folder of its own")


def check_replaces(folder: Path, head: Head) -> None:
    """Raise HeadError where a folder holds another head, which `save_head` would write over; a damaged one is none."""
    if not os.path.exists(folder / "head.json"):
        return
    try:
        there = read_head(folder)
    except HeadError:
        return
    if there.digest != head.digest or there.card != json.loads(json.dumps(head.card)):
        raise HeadError(f"{folder} holds another head already: give another name, or remove that folder")


def heads_folder() -> Path:
    """Where imported heads lie: the folder that TASTEMAKER_HEADS names, else ~/.cache/tastemaker/heads."""
    return Path(os.environ.get("TASTEMAKER_HEADS") or "~/.cache/tastemaker/heads").expanduser()


def list_heads() -> list[str]:
    """The names that `load_head` knows here: the shipped heads, then the imported ones."""
    shipped = _names_in(SHIPPED)
    return shipped + [name for name in _names_in(heads_folder()) if name not in shipped]


def _names_in(folder: Path) -> list[str]:
    return sorted(p.parent.name for p in folder.glob("*/head.json"))


def load_head(name_or_folder: str | Path) -> Head:
    """A head by the name of a shipped or an imported one, or by its folder; a shipped name goes before a folder's.

    Raises HeadError where there is no such head (with the nearest name) or where its files do not agree.
    """
    return read_head(find_head(name_or_folder))


def find_head(name_or_folder: str | Path) -> Path:
    """The folder of a head; raises HeadError where there is none."""
    text = str(name_or_folder)
    if isinstance(name_or_folder, str) and _NAME.fullmatch(text):
        for place in (SHIPPED / text, heads_folder() / text):
            if os.path.isfile(place / "head.json"):
                return place
    folder = Path(os.path.expanduser(name_or_folder))
    if os.path.isfile(folder / "head.json"):  # unlike Path's, it takes any text for a path
        return folder
    if os.path.isdir(folder):
        raise HeadError(f"{folder} is a folder without head.json: not a head")
    if os.path.isfile(folder):
        raise HeadError(
            f"{folder} is a file; a head is a folder. A published .pth file: tastemaker heads import {folder}"
        )
    from aesthetic.catalog import how_to_get

    if hint := how_to_get(text):
        raise HeadError(f"{text} is not here yet. {hint}")
    names = list_heads()
    near = nearest(text, names)
    raise HeadError(
        f"no head {printable(text, 200)}: neither a folder nor a name."
        + (f" Did you mean {near}?" if near else "")
        + f" Known: {', '.join(names)}"
    )


def read_head(folder: Path) -> Head:
    """Read a head's folder; raises HeadError where a file is missing, damaged, or not what head.json says."""
    path = folder / "head.json"
    about = _json(_read(path, _MAX_JSON), str(path))
    if about.get("format") != FORMAT:
        other = printable(repr(about.get("format")), 60)
        raise HeadError(f"{path}: format is {other}; this version reads {FORMAT!r}")
    told = _checked(about, path)
    space, sizes, probes, dim = told.space, told.layers, told.space.probes, told.space.dim
    sha256 = told.sha256.weights
    layers = len(sizes) - 1
    if (
        not 1 <= layers <= _MAX_LAYERS
        or min(sizes) < 1
        or sizes[0] != dim
        or (told.activation is not None) != (layers > 1)
    ):
        raise HeadError(
            f"{path}: layers {sizes} with activation {told.activation} do not make a head for {dim} numbers"
        )
    expected: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        expected[f"layers.{i}.weight"] = (sizes[i + 1], sizes[i])
        expected[f"layers.{i}.bias"] = (sizes[i + 1],)
    if probes is not None:
        expected[_PROBES] = (probes, dim)
    tensors = _tensors(folder / "head.safetensors", expected, sha256)
    try:
        its_space = Space(
            encoder=space.encoder, dim=dim, norm=space.norm, probes=tensors.get(_PROBES), details=space.details
        )
    except SpaceError as e:
        raise HeadError(f"{path}: its space is not one: {e}") from e
    if its_space.fingerprint != space.fingerprint:
        raise HeadError(
            f"{path}: its space is {its_space.fingerprint}, not {space.fingerprint} as written: edited by hand?"
        )
    return Head(
        name=told.name,
        task=told.task,
        space=its_space,
        scale=(told.scale[0], told.scale[1]),
        layers=tuple((tensors[f"layers.{i}.weight"], tensors[f"layers.{i}.bias"]) for i in range(layers)),
        link=told.link,
        card=told.card,
    )


def _checked(about: dict[str, Any], path: Path) -> HeadFields:
    """What head.json says, by its schema; raises HeadError naming the field that does not fit."""
    from pydantic import ValidationError

    from aesthetic.head_json import HeadFields, wrong_field

    try:
        told = HeadFields.model_validate(about)
    except ValidationError as e:
        raise HeadError(f"{path}: a field is missing or of the wrong type: {wrong_field(e)}") from e
    if _depth(told.card) > _MAX_DEPTH or _depth(told.space.details) > _MAX_DEPTH:
        raise HeadError(f"{path}: its card or space is nested more than {_MAX_DEPTH} deep")
    return told


def _depth(value: Any) -> int:
    """How deep lists and objects of a JSON value are nested."""
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        level = [w for v in level for w in (v.values() if isinstance(v, dict) else v)]
    return depth


def _read(path: Path, limit: int) -> bytes:
    try:
        return read_bytes(path, limit)
    except UserError as e:
        raise HeadError(str(e)) from e


def _json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no key occurs twice."""
    try:
        value = parse_json(data, what, unique=True)
    except UserError as e:
        raise HeadError(re.sub(": not (JSON|read):", ": not a JSON object:", str(e))) from e
    if not isinstance(value, dict):
        raise HeadError(f"{what}: not a JSON object")
    return value


def _tensors(path: Path, expected: dict[str, tuple[int, ...]], sha256: Any) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors of a safetensors file; it must have that sha256 and hold exactly the expected ones, as float32."""
    data = _read(path, _MAX_WEIGHTS)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise HeadError(f"{path} is not the file that head.json describes (sha256): written in part, or edited")
    return unpack(data, str(path), expected)


def unpack(data: bytes, what: str, expected: dict[str, tuple[int, ...]]) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors in the bytes of a safetensors file, which must hold exactly the expected ones, as float32.

    Raises HeadError, beginning with `what`, where it does not: nothing is built of what its header claims before that
    agrees with `expected` and with the bytes that are there.
    """
    header, body = safetensors_header(data, what)
    if unknown := sorted(header.keys() ^ expected.keys()):
        raise HeadError(f"{what}: tensors missing or unknown: {', '.join(unknown)}")
    claims = sorted(_claim(what, name, header[name], shape) for name, shape in expected.items())
    end = 0
    for start, stop, name in claims:
        if start != end:
            raise HeadError(f"{what}: {name} starts at {start}, expected {end}: overlap or gap")
        end = stop
    if end != len(body):
        raise HeadError(f"{what}: {len(body):,} bytes of tensors, {end:,} expected")
    return {n: np.frombuffer(body[a:b], "<f4").reshape(expected[n]).astype(np.float32) for a, b, n in claims}


def safetensors_header(data: bytes, what: str) -> tuple[dict[str, Any], memoryview]:
    """What a safetensors file claims of each tensor, unchecked, and the bytes behind; HeadError where it is none."""
    if len(data) < 8:
        raise HeadError(f"{what}: ends inside its header")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(_MAX_HEADER, len(data) - 8):
        raise HeadError(f"{what}: claims a header of {length:,} bytes")
    header = _json(data[8 : 8 + length], f"{what}, header")
    header.pop("__metadata__", None)
    return header, memoryview(data)[8 + length :]


def _claim(what: str, name: str, entry: Any, shape: tuple[int, ...]) -> tuple[int, int, str]:
    """(start, stop, name) of a tensor's bytes, once its header entry is found to say what head.json says."""
    size = 4 * math.prod(shape)
    match entry:
        case {"dtype": "F32", "shape": [*dims], "data_offsets": [int(start), int(stop)]} if (
            tuple(dims) == shape and start >= 0 and stop - start == size
        ):
            return start, stop, name
    raise HeadError(f"{what}: {name} is not float32 of shape {shape}: {str(entry)[:200]}")


# What people read ----------------------------------------------------------------------------------------------------

_SECTIONS = {
    "data": "Data",
    "ratings": "Ratings it was fitted to",
    "verdict": "Verdict",
    "metrics": "How good it is",
    "baselines": "What it was compared with",
    "network": "A network, tried beside it",
    "noise": "The ratings' own noise",
    "sources": "Scales of the sources",
    "calibration": "Calibration",
    "learning_curve": "Learning curve",
    "quantiles": "Quantiles of its scores",
    "thresholds": "Thresholds in use",
    "unit": "Unit",
    "limits": "Limits",
    "source": "Source",
}


def model_card(head: Head) -> str:
    """MODEL_CARD.md, written from what head.json says."""
    return "\n".join(_card_lines(head))


def _card_lines(head: Head) -> Iterator[str]:
    card = head.card
    if "licence" in card:
        yield from ("---", f"license: {str(card['licence']).lower()}", "---", "")
    yield from (f"# {head.name}", "")
    if "about" in card:
        yield from (str(card["about"]), "")
    yield from (f"- {key}: {value}" for key, value in _facts(head).items())
    yield ""
    for key, title in _SECTIONS.items():
        if key in card:
            yield from (f"## {title}", "", *_section(card[key]), "")
    yield from (
        "## Use",
        "",
        "    from aesthetic import load_head",
        f'    scores = load_head("{head.name}")(vectors)  # or this folder\'s path; (n, {head.space.dim}) -> (n,)',
        "",
    )


def _facts(head: Head) -> dict[str, str]:
    kind = "affine" if head.affine else "ReLU network " + "-".join(str(len(b)) for _, b in head.layers)
    kind += "" if head.link == "identity" else f", then a {head.link}"
    clipped = " (not clipped)" if head.link == "identity" else ""
    norm = "unit norm" if head.space.norm == "l2" else f"norm {head.space.norm}"
    declared = " (declared, no probes)" if head.space.probes is None else ""
    facts = {
        "scores": f"{head.task}, on a scale of {head.scale[0]:g} to {head.scale[1]:g}{clipped}",
        "reads": f"vectors of `{head.space.encoder}`, {head.space.dim} numbers, {norm}",
        "space": f"`{head.space.fingerprint}`{declared}",
        "kind": kind,
    }
    return facts | ({"licence": str(head.card["licence"])} if "licence" in head.card else {})


def describe(head: Head) -> str:
    """What the model card says, as plain text for a terminal; what a head should tell and its card lacks is said too.

    >>> describe(load_head("laion-v2")).splitlines()[0]
    'laion-v2'
    """
    lacking = {
        "metrics": "not measured, as far as its card says: look at its best and worst pictures before you trust it",
        "quantiles": "not known: rules of the form top(COLUMN, 0.1) need none",
    }
    lines = [head.name, *_wrapped(str(head.card.get("about", "")), ""), ""]
    for key, fact in _facts(head).items():
        lines += _wrapped(fact.replace("`", ""), "", f"{key:10}")
    for key in (
        "verdict",
        "metrics",
        "baselines",
        "noise",
        "quantiles",
        "thresholds",
        "unit",
        "limits",
        "data",
        "source",
    ):
        if (value := head.card.get(key, lacking.get(key))) is None:
            continue
        lines += ["", _SECTIONS[key]]
        if isinstance(value, dict):
            width = min(24, max(map(len, value), default=0)) + 2
            # what was measured with an interval goes first
            for name in sorted(value, key=lambda n: (not isinstance(value[n], dict), _by_number(n))):
                lines += _wrapped(_cell(value[name]), "  ", f"{name:{width}}")
        else:
            for item in value if isinstance(value, list) else [value]:
                lines += _wrapped(_cell(item), "  ", "- " if isinstance(value, list) else "")
    return "\n".join(lines)


def _wrapped(text: str, indent: str, head: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        _COLUMNS,
        initial_indent=indent + head,
        subsequent_indent=indent + " " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _section(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from ("| | |", "|---|---|")
        yield from (f"| {key} | {_cell(value[key])} |" for key in sorted(value, key=_by_number))
    elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        columns = sorted(set().union(*value))
        yield from (f"| {' | '.join(columns)} |", "|" + "---|" * len(columns))
        yield from (f"| {' | '.join(_cell(row.get(c)) for c in columns)} |" for row in value)
    elif isinstance(value, list):
        yield from (f"- {_cell(v)}" for v in value)
    else:
        yield _cell(value)


def _by_number(key: str) -> tuple[float, str]:
    """Orders "10%" after "5%", and words before both; head.json sorts keys as text."""
    number = re.search(r"\d+(\.\d+)?", key)
    return (float(number[0]) if number else -1.0, key)


def _cell(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict) and value.keys() == {"value", "low", "high"}:
        if value["low"] is None:
            return _cell(value["value"])
        return f"{_cell(value['value'])} [{_cell(value['low'])}, {_cell(value['high'])}]"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_cell(value[k])}" for k in sorted(value, key=_by_number))
    if isinstance(value, list):
        return ", ".join(_cell(v) for v in value)
    return str(value)
