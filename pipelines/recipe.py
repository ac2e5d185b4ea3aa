"""A recipe: one YAML file -> validated, frozen configuration. Each stage defines its own part, beside its code."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from aesthetic.errors import UserError, nearest
from aesthetic.untrusted import clean, printable, read_text
from curate.annotators.registry import Spec
from curate.encoders.embed import EmbedConfig
from curate.fetch.config import FetchConfig
from curate.images.process import ImagesConfig
from curate.ledger.schema import EMBEDDED_COLUMNS, RESERVED
from curate.ledger.select import SelectConfig
from curate.shards.pack import PackConfig
from curate.sources.plan import SourceConfig
from curate.store.files import digest
from curate.store.ownership import RECIPE_HEADER

DEFAULT = "laion-aesthetics-5"
_RECIPES = resources.files("pipelines") / "recipes"

LARGEST = 1 << 18
"""Bytes of a recipe file, which holds a few dozen lines."""

_DEEPEST = 20  # lists and mappings in each other; a recipe needs four


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """What Ray gives the workers. Zero means: what the machine or cluster can carry."""

    fetch_workers: int = 0
    fetch_cpus: float = 1.0
    embed_workers: int = 0
    embed_cpus: float = 0.0  # of a worker; decoding for a GPU takes many
    embed_gpus: float = 0.0  # 1 where the machine has CUDA, unless set
    wave: int = 1000  # shards submitted at a time

    def __post_init__(self) -> None:
        for key in ("fetch_workers", "fetch_cpus", "embed_workers", "embed_cpus", "embed_gpus"):
            if not getattr(self, key) >= 0:
                raise UserError(f"ray.{key}: {getattr(self, key)} must be at least 0")
            if getattr(self, key) > 1_000_000:
                raise UserError(f"ray.{key}: {getattr(self, key)} is more than any cluster has")
        if self.wave < 1:
            raise UserError(f"ray.wave: {self.wave} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is asked for, stage by stage. `columns` maps a column to an annotator, or to a head by name or folder."""

    source: SourceConfig = field(default_factory=SourceConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    columns: dict[str, Spec] = field(default_factory=dict)
    select: SelectConfig = field(default_factory=SelectConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        columns, verify = self.source.columns, self.fetch.verify
        if columns is not None and verify is not None and verify not in columns:  # what is compared is kept
            object.__setattr__(self, "source", dataclasses.replace(self.source, columns=(*columns, verify)))
        taken = {name.lower(): name for name in (*RESERVED, *(n for n, _ in EMBEDDED_COLUMNS), "source")}
        for column in self.columns:  # it will name a folder, and a column in SQL
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", column):
                raise UserError(f"columns.{column}: a column's name is letters, digits and _, and begins with no digit")
            if column.lower() in taken:
                raise UserError(f"columns.{column}: there is a column {taken[column.lower()]} (SQL ignores case)")
            taken[column.lower()] = column

    def stage_hashes(self) -> dict[str, str]:
        """A hash per stage over the keys that its files depend on; speed and patience are not among them."""
        return {stage: digest(keys) for stage, keys in self.identity().items()}

    def hashes(self) -> tuple[str, str]:
        """The configuration hashes that fetched and embedded records carry."""
        stages = self.stage_hashes()
        return stages["fetch"] + stages["images"], stages["embed"]

    def identity(self) -> dict[str, dict[str, Any]]:
        """The keys of each stage that decide what its files hold."""
        whole = to_dict(self)
        fetch = {k: whole["fetch"][k] for k in ("engine", "max_bytes", "respect", "allow", "verify")}
        embed = {k: whole["embed"][k] for k in ("encoder", "precision", "embeddings")}
        return {
            "source": whole["source"],
            "fetch": fetch,
            "images": whole["images"],
            "embed": embed,
        }


def shipped() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _RECIPES.iterdir() if p.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The text of a shipped recipe or of a recipe file; UserError where there is neither."""
    if name in shipped():
        return (_RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        path = Path(name).expanduser()
    except RuntimeError as e:  # ~nobody
        raise UserError(f"--recipe {printable(name, 200)}: {e}") from None
    if not os.path.lexists(path):
        raise UserError(
            f"no recipe {printable(name, 200)!r}: it is neither a file nor one of {', '.join(shipped())}"
            f"{_nearest(name, shipped())}"
        )
    return read_recipe(path)


def read_recipe(path: Path) -> str:
    """The text of a recipe file; UserError where it is none."""
    try:
        return read_text(path, LARGEST)
    except UserError as e:
        raise UserError(f"{path} can't be read as a recipe: {e}") from None


def load_recipe(name: str = DEFAULT, settings: Sequence[str] = ()) -> Recipe:
    """A recipe by name or file, with `a.b=c` settings laid over it. UserError names a wrong key and the nearest one."""
    return parse_recipe(recipe_text(name), settings, what=name)


def parse_recipe(text: str, settings: Sequence[str] = (), what: str = "recipe") -> Recipe:
    """As load_recipe, from YAML text."""
    tree = _yaml(text, f"{what} is not valid YAML") or {}
    if not isinstance(tree, dict):
        raise UserError(f"{what} is not a recipe: a mapping of stages is expected, as `tastemaker recipe` prints")
    if text.startswith(RECIPE_HEADER) and "score" in tree:  # of a data folder of before there was `columns`
        tree["columns"] = tree.pop("score")
    own = copy.deepcopy(tree)
    for setting in settings:
        _lay_over(tree, setting)
    _leave_quality(own, tree, settings)
    try:
        return _build(Recipe, tree, "")
    except UserError as e:
        if settings and not _fails(own, str(e)):
            raise
        raise UserError(f"{what}: {e}") from None


def _fails(tree: dict[str, Any], how: str) -> bool:
    """Whether a recipe is refused with these words by itself, whatever is laid over it."""
    try:
        _build(Recipe, tree, "")
    except UserError as e:
        return str(e) == how
    return False


def _leave_quality(own: dict[str, Any], tree: dict[str, Any], settings: Sequence[str]) -> None:
    """Where `--set` names another kind of format and no quality, the recipe's quality does not go with it.

    It is 1 to 100 for jpg and webp, and a compression level of 0 to 9 for png: what holds is the format's default.
    """
    named = {setting.partition("=")[0].strip() for setting in settings}
    before, now = own.get("images"), tree.get("images")
    if "images.format" in named and "images.quality" not in named and isinstance(now, dict):
        was = before.get("format", "jpg") if isinstance(before, dict) else "jpg"
        if (was == "png") != (now.get("format") == "png"):
            now.pop("quality", None)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: only true and false are booleans (`mode: no`), and 1e-3 is a number. No key twice."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own way: a class variable, filled below

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in keys.items() if count > 1]:
            raise yaml.MarkedYAMLError(problem=f"{min(twice)} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what both YAML 1.1 and _Loader read back as it was: a text that either takes for a number is quoted."""

    yaml_implicit_resolvers = copy.deepcopy(yaml.SafeDumper.yaml_implicit_resolvers)


_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _form, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_form})$"), _first)


def _yaml(text: str, what: str) -> Any:
    """The value of YAML text, in time and memory that its length bounds; UserError, beginning with `what`, for none."""
    if len(text) > LARGEST:
        raise UserError(f"{what}: it is longer than {LARGEST:,} characters")
    try:
        _require_plain(text)
        return yaml.load(text, _Loader)  # a SafeLoader: it makes plain values only
    except yaml.YAMLError as e:
        raise UserError(f"{what}: {e}") from None
    except (ValueError, KeyError, AttributeError) as e:  # `!!int abc`, `!!bool abc`, `!!timestamp abc`, 5,000 digits
        why = f": {printable(e, 200)}" if isinstance(e, ValueError) else ""
        raise UserError(f"{what}: a value is not what its tag (such as !!int) says{why}") from None


def _require_plain(text: str) -> None:
    """YAMLError where lists and mappings lie too deep for the loader, or one is used in several places: a hundred
    bytes of those can stand for a billion values."""
    depth, groups = 0, set[str]()
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if event.anchor is not None:
                groups.add(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent) and event.anchor in groups:
            problem = f"*{event.anchor} stands for a list or a mapping: write that out, in a recipe it has one place"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=_mark(event))
        if depth > _DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deep for a recipe", problem_mark=_mark(event))


def _mark(event: Any) -> Any:  # PyYAML's types know two classes of marks
    return event.start_mark


def _lay_over(tree: dict[str, Any], setting: str) -> None:
    """Put one `a.b=c` into the tree. A key that holds text takes it as it is written, SQL with its quotes; others YAML.

    An empty value is null; in `select.rules` and `columns` it takes the name away.
    """
    path, equals, text = setting.partition("=")
    names, shown = path.strip().split("."), printable(setting, 200)
    if not equals or not all(names):
        raise UserError(f"--set {shown}: expected KEY.KEY=VALUE, for example --set images.size=256")
    if names[0] == "score":
        raise UserError(f"--set {shown}: `score` is called `columns` now: --set columns{setting.strip()[5:]}")
    for name in names[:-1]:
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise UserError(f"--set {shown}: {printable(name, 200)} is a value, not a group of keys")
    holds_text, may_go = _text_at(names)
    plain = holds_text and text.strip() not in ("", "~", "null")
    if names[0] == "columns" and text.strip().startswith("{"):  # {use: ANNOTATOR, ...}
        plain = False
    value = text.strip() if plain else _yaml(text, f"--set {shown}: the value is not valid YAML")
    if value is None and may_go:
        tree.pop(names[-1], None)
    else:
        tree[names[-1]] = value


def _text_at(names: Sequence[str]) -> tuple[bool, bool]:
    """Whether the key at this path holds text, and whether it is an entry that can be taken away."""
    kind: Any = Recipe
    for i, name in enumerate(names):
        if typing.get_origin(kind) is dict:
            return i == len(names) - 1, i == len(names) - 1
        kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return str in (kind, *(typing.get_args(kind) if isinstance(kind, types.UnionType) else ())), False


def _build(kind: Any, value: Any, where: str) -> Any:
    """A value of the YAML tree as the type that the dataclass field names."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _build_part(kind, value, where)
    if kind == Spec:
        return _build_spec(value, where)
    if origin in (typing.Union, types.UnionType):
        choices = typing.get_args(kind)
        if value is None and type(None) in choices:
            return None
        return _build(next(c for c in choices if c is not type(None)), value, where)
    if origin is tuple:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple):
            raise UserError(f"{where}: a list is expected ([] for none), not {_shown(value)}")
        return tuple(_build(typing.get_args(kind)[0], v, where) for v in values)
    if origin is dict:
        if not isinstance(value or {}, Mapping):
            raise UserError(f"{where}: a mapping of names is expected, not {_shown(value)}")
        inner, found = typing.get_args(kind)[1], dict[str, Any]()
        for k, v in (value or {}).items():
            name = f"{where}.{printable(k, 200)}"
            found[_scalar(str, str(k), name)] = _build(inner, v, name)
        return found
    return _scalar(kind, value, where)


def parse_columns(words: Sequence[str]) -> dict[str, Spec]:
    """NAME=SPEC as entries of `columns`: a name or folder as it is written, {use: ...} as YAML."""
    tree: dict[str, Any] = {}
    for word in words:
        name, equals, spec = word.partition("=")
        if not equals or "." in name or not spec.strip():
            raise UserError(f"{printable(word, 200)}: expected NAME=SPEC, for example taste=taste.head")
        _lay_over(tree, f"columns.{word}")
    return _build(dict[str, Spec], tree.get("columns"), "columns")


def _build_spec(value: Any, where: str) -> Spec:
    """An entry of `columns`; the annotator looks at its options."""
    if isinstance(value, str):
        return _scalar(str, value, where)
    if isinstance(value, Mapping) and isinstance(value.get("use"), str) and all(isinstance(k, str) for k in value):
        return dict(value)
    raise UserError(
        f"{where}: the name of a head or an annotator, or {{use: ANNOTATOR, ...}}, is expected, not {_shown(value)}"
    )


def _build_part(kind: Any, value: Any, where: str) -> Any:
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise UserError(f"{where or 'recipe'}: a mapping of keys is expected, not {_shown(value)}")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    for key in value:
        if key == "score" and kind is Recipe:
            raise UserError(
                "`score` is called `columns` now, and may name any annotator. Write in its place:\n"
                + yaml.dump({"columns": value[key]}, Dumper=_Dumper, sort_keys=False, allow_unicode=True).rstrip()
            )
        if key not in names:
            full = printable(f"{where}.{key}" if where else key, 200)
            raise UserError(f"unknown key {full}{_nearest(str(key), names)}. Known here: {', '.join(names)}")
    return kind(**{k: _build(hints[k], v, f"{where}.{k}" if where else k) for k, v in value.items()})


_LARGEST_NUMBER = 2**63
_WORDS = {str: "text", bool: "true or false", float: "a number", int: "a whole number"}
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def _shown(value: Any) -> str:
    """A value of a recipe for a message about it."""
    return printable(repr(value), 200)


def _scalar(kind: type, value: Any, where: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and value not in (0, 1) and not abs(value) < _LARGEST_NUMBER and value == value:
        raise UserError(f"{where}: {_shown(value)} is too large a number")
    if kind is str and isinstance(value, str):
        if clean(value) != value:
            raise UserError(f"{where}: {_shown(value)} is no text: UTF-8 can't hold half of a surrogate pair")
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is float and number:
        return float(value)
    if kind is int and number and value == value // 1:  # 32e6 is a whole number too
        return int(value)
    if kind is int and isinstance(value, str):
        size = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([kMGT]?|[KMGT]i)B", value)
        if size and float(size[1]) * _UNITS[size[2]] % 1 == 0:
            return int(float(size[1]) * _UNITS[size[2]])
        raise UserError(f"{where}: a whole number or a size such as 32MB is expected, not {_shown(value)}")
    hint = "; put it in quotes" if kind is str and number else ""
    raise UserError(f"{where}: {_WORDS[kind]} is expected, not {_shown(value)}{hint}")


def _nearest(word: str, words: Sequence[str]) -> str:
    near = nearest(word, words)
    return f" (did you mean {near}?)" if near else ""


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, as YAML holds them."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value

    return plain(dataclasses.asdict(recipe))


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, readable again by load_recipe."""
    return yaml.dump(to_dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
