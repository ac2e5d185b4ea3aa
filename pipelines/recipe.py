"""A recipe: one YAML file -> validated, frozen configuration. Each stage defines its own part, beside its code.

A data folder keeps the recipe that it was made with, resolved, in `recipe.yaml`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import operator
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import pydantic

from aesthetic.errors import UserError, nearest
from aesthetic.files import write_atomic
from aesthetic.untrusted import clean, printable, read_text
from curate.annotators.registry import Spec
from curate.encoders.embed import EmbedConfig
from curate.fetch.config import FetchConfig
from curate.images.config import ImagesConfig
from curate.layout import Data
from curate.ledger.early import split_early
from curate.ledger.schema import EMBEDDED_COLUMNS, RESERVED
from curate.ledger.select import SelectConfig
from curate.shards.pack import PackConfig
from curate.sources.plan import SourceConfig
from curate.store.files import digest
from curate.store.mirror import here
from curate.store.objects import is_url
from curate.store.ownership import RECIPE_HEADER
from pipelines.yaml12 import LARGEST, read_yaml, write_yaml

DEFAULT = "laion-aesthetics-5"
_RECIPES = resources.files("pipelines") / "recipes"


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """What Ray gives the workers. Zero means: what the machine or cluster can carry."""

    fetch_workers: int = 0
    fetch_cpus: float = 1.0
    embed_workers: int = 0
    embed_cpus: float = 0.0  # of a worker; decoding for a GPU takes many
    embed_gpus: float = 0.0  # 1 where the machine has CUDA, unless set

    def __post_init__(self) -> None:
        for key in ("fetch_workers", "fetch_cpus", "embed_workers", "embed_cpus", "embed_gpus"):
            if not getattr(self, key) >= 0:
                raise UserError(f"ray.{key}: {getattr(self, key)} must be at least 0")
            if getattr(self, key) > 1_000_000:
                raise UserError(f"ray.{key}: {getattr(self, key)} is more than any cluster has")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is asked for, stage by stage. `columns` maps a column to an annotator, or to a head by name or folder."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # no key that nothing reads

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
            object.__setattr__(self, "source", replace(self.source, columns=(*columns, verify)))
        taken = {name.lower(): name for name in (*RESERVED, *(n for n, _ in EMBEDDED_COLUMNS), "source")}
        for column in self.columns:  # it will name a folder, and a column in SQL
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", column):
                raise UserError(f"columns.{column}: a column's name is letters, digits and _, and begins with no digit")
            if column.lower() in taken:
                raise UserError(f"columns.{column}: there is a column {taken[column.lower()]} (SQL ignores case)")
            taken[column.lower()] = column
            spec = self.columns[column]
            if not isinstance(spec, str) and not isinstance(spec.get("use"), str):
                raise UserError(_not_a_column(column, dict(spec)))

    def stage_hashes(self) -> dict[str, str]:
        """A hash per stage over the keys that its files depend on; speed and patience are not among them."""
        identity = self.identity()
        if not identity["images"]["blur_faces"]:  # which there was not when the first data folders were made
            del identity["images"]["blur_faces"]
        return {stage: digest(keys) for stage, keys in identity.items()}

    def hashes(self) -> tuple[str, str]:
        """The configuration hashes that fetched and embedded records carry."""
        stages = self.stage_hashes()
        return stages["fetch"] + stages["images"], stages["embed"]

    def early_fetch(self) -> dict[str, str]:
        """The early rules that are judged while rows are fetched, name -> condition."""
        early = split_early(self.select.rules, self.select.early)
        return {**early["list"], **early["header"]}

    def identity(self) -> dict[str, dict[str, Any]]:
        """The keys of each stage that decide what its files hold."""
        whole = to_dict(self)
        fetch = {k: whole["fetch"][k] for k in ("engine", "max_bytes", "respect", "allow", "verify")}
        embed = {k: whole["embed"][k] for k in ("encoder", "precision", "embeddings")}
        return {"source": whole["source"], "fetch": fetch, "images": whole["images"], "embed": embed}


def shipped() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _RECIPES.iterdir() if p.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The text of a shipped recipe or of a recipe file; UserError where there is neither."""
    if name in shipped():
        return (_RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        path = here(name)
    except RuntimeError as e:  # ~nobody
        raise UserError(f"--recipe {printable(name, 200)}: {e}") from None
    if not os.path.lexists(path):
        raise UserError(
            f"no recipe {printable(name, 200)!r}: it is neither a file nor one of {', '.join(shipped())}"
            f"{_did_you_mean(name, shipped())}"
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
    tree = read_yaml(text, f"{what} is not valid YAML") or {}
    if not isinstance(tree, dict):
        raise UserError(f"{what} is not a recipe: a mapping of stages is expected, as `tastemaker recipe` prints")
    if text.startswith(RECIPE_HEADER) and "score" in tree:  # of a data folder of before there was `columns`
        tree["columns"] = tree.pop("score")
    if text.startswith(RECIPE_HEADER) and isinstance(tree.get("ray"), dict):
        tree["ray"].pop("wave", None)  # which there is no more
    own = copy.deepcopy(tree)
    for setting in settings:
        _lay_over(tree, setting)

    # a quality is 1 to 100 for jpg and webp, and a compression level of 0 to 9 for png: where `--set` names another
    # kind of format and no quality, the recipe's does not go with it, and the format's default holds
    named = {setting.partition("=")[0].strip() for setting in settings}
    before, now = own.get("images"), tree.get("images")
    if "images.format" in named and "images.quality" not in named and isinstance(now, dict):
        was = before.get("format", "jpg") if isinstance(before, dict) else "jpg"
        if (was == "png") != (now.get("format") == "png"):
            now.pop("quality", None)

    try:
        _refuse_urls(tree)
        return _validate(tree)
    except UserError as e:
        if settings and not _is_refused(own, str(e)):
            raise
        raise UserError(f"{what}: {e}") from None


def _refuse_urls(tree: dict[str, Any]) -> None:
    """UserError where a file that every node reads where it lies is named by a URL; heads and deny-lists may lie
    anywhere."""

    def look(value: Any, at: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if not (at.startswith("columns.") and key == "head") and (at, key) != ("fetch", "deny"):
                    look(inner, f"{at}.{key}" if at else str(key))
        elif isinstance(value, list):
            for inner in value:
                look(inner, at)
        elif isinstance(value, str) and is_url(value) and at.count(".") - at.startswith("columns."):
            raise UserError(f"{at}: {printable(value, 200)}: a file or folder on a disk is expected, on every node")

    look(tree, "")


def _is_refused(tree: dict[str, Any], message: str) -> bool:
    """Whether a recipe is refused with these words by itself, whatever is laid over it."""
    try:
        _validate(tree)
    except UserError as e:
        return str(e) == message
    return False


def parse_columns(words: Sequence[str]) -> dict[str, Spec]:
    """NAME=SPEC as entries of `columns`: a name or folder as it is written, {use: ...} as YAML."""
    tree: dict[str, Any] = {}
    for word in words:
        name, equals, spec = word.partition("=")
        if not equals or "." in name or not spec.strip():
            raise UserError(f"{printable(word, 200)}: expected NAME=SPEC, for example taste=taste.head")
        _lay_over(tree, f"columns.{word}")
    return _validate(tree).columns


# ------------------------------------------------------------------------------------------------- values laid over it


def _lay_over(tree: dict[str, Any], setting: str) -> None:
    """Put one `a.b=c` into the tree. A key that holds text takes it as it is written, SQL with its quotes; others YAML.

    An empty value is null; in `select.rules` and `columns` it takes the name away.
    """
    path, equals, text = setting.partition("=")
    names, quoted = path.strip().split("."), printable(setting, 200)
    if not equals or not all(names):
        raise UserError(f"--set {quoted}: expected KEY.KEY=VALUE, for example --set images.size=256")
    if names[0] == "score":
        raise UserError(f"--set {quoted}: `score` is called `columns` now: --set columns{setting.strip()[5:]}")
    for name in names[:-1]:
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise UserError(f"--set {quoted}: {printable(name, 200)} is a value, not a group of keys")

    kind, text = _type_at(names), text.strip()
    holds_text = kind is str or (isinstance(kind, types.UnionType) and str in typing.get_args(kind))
    if names[0] == "columns" and text.startswith("{"):  # {use: ANNOTATOR, ...}
        holds_text = False
    if holds_text and text not in ("", "~", "null"):
        tree[names[-1]] = text
        return
    value = read_yaml(text, f"--set {quoted}: the value is not valid YAML")
    if value is None and typing.get_origin(_type_at(names[:-1])) is dict:
        tree.pop(names[-1], None)
    else:
        tree[names[-1]] = value


def _type_at(names: Sequence[str]) -> Any:
    """The type of the key at this path; None where there is no such key."""
    kind: Any = Recipe
    for name in names:
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        else:
            kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return kind


# ---------------------------------------------------------------------------------------------------------- validation


@functools.cache
def _adapter() -> pydantic.TypeAdapter[Recipe]:
    return pydantic.TypeAdapter(Recipe)


def _validate(tree: dict[str, Any]) -> Recipe:
    """The recipe that YAML values describe. UserError names the key that is unknown or holds something else."""
    if "score" in tree:
        raise UserError(
            "`score` is called `columns` now, and may name any annotator. Write in its place:\n"
            + write_yaml({"columns": tree["score"]}).rstrip()
        )
    tree = _as_json(tree, "")
    while True:
        try:  # as JSON, since strict Python would refuse lists for tuples and mappings for dataclasses
            return _adapter().validate_json(json.dumps(tree), strict=True)
        except pydantic.ValidationError as e:
            errors = e.errors(include_url=False)
            error = next((e for e in errors if e["type"] == "unexpected_keyword_argument"), errors[0])
        kind, value = error["type"], error["input"]
        converted = _converted(kind, value)
        if converted is None:
            break
        *groups, name = error["loc"]
        functools.reduce(operator.getitem, groups, tree)[name] = converted  # type: ignore[arg-type, index]

    names = [name for name in error["loc"] if isinstance(name, str)]  # without places in a list
    where = printable(".".join(names), 200)
    if kind == "unexpected_keyword_argument":
        known = [f.name for f in dataclasses.fields(_type_at(names[:-1]))]
        raise UserError(f"unknown key {where}{_did_you_mean(names[-1], known)}. Known here: {', '.join(known)}")
    if names[0] == "columns" and len(names) > 1:
        raise UserError(_not_a_column(names[1], value))
    expected, hint = _EXPECTED[kind], ""
    if kind == "int_type" and isinstance(value, str):
        expected = "a whole number or a size such as 32MB is expected"
    if kind == "string_type" and isinstance(value, int | float) and not isinstance(value, bool):
        hint = "; put it in quotes"
    raise UserError(f"{where}: {expected}, not {_repr(value)}{hint}")


def _as_json(value: Any, where: str) -> Any:
    """YAML values as JSON has them: a key is text, and a number one that a file or a process can hold."""
    if isinstance(value, Mapping):
        found = {}
        for key, inner in value.items():
            name = printable(f"{where}.{key}" if where else key, 200)
            if clean(str(key)) != str(key):
                raise UserError(f"unknown key {name}: UTF-8 can't hold half of a surrogate pair")
            found[str(key)] = _as_json(inner, name)
        return found
    if isinstance(value, list):
        return [_as_json(inner, where) for inner in value]
    if isinstance(value, int | float) and value not in (0, 1) and not abs(value) < _LARGEST_NUMBER and value == value:
        raise UserError(f"{where}: {_repr(value)} is too large a number")
    if isinstance(value, str) and clean(value) != value:
        raise UserError(f"{where}: {_repr(value)} is no text: UTF-8 can't hold half of a surrogate pair")
    if value is not None and not isinstance(value, str | int | float):
        raise UserError(f"{where}: a plain value is expected, not {_repr(value)}")
    return value


_LARGEST_NUMBER = 2**63
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_EXPECTED = {
    "string_type": "text is expected",
    "bool_type": "true or false is expected",
    "float_type": "a number is expected",
    "int_type": "a whole number is expected",
    "tuple_type": "a list is expected ([] for none)",
    "dict_type": "a mapping of names is expected",
    "dataclass_type": "a mapping of keys is expected",
}
"""pydantic's kinds of errors in our words."""


def _converted(kind: str, value: Any) -> Any:
    """What stands for a value of another type in YAML: 32MB and 32e6 for a number, one text for a list of one, nothing
    for an empty mapping. None: it stands for nothing."""
    if kind == "int_type" and isinstance(value, float) and value == value // 1:
        return int(value)
    if kind == "int_type" and isinstance(value, str):
        size = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([kMGT]?|[KMGT]i)B", value)
        if size and float(size[1]) * _UNITS[size[2]] % 1 == 0:
            return int(float(size[1]) * _UNITS[size[2]])
    if kind == "tuple_type" and isinstance(value, str):
        return [value]
    if (kind in ("dict_type", "dataclass_type") and value is None) or (kind == "dict_type" and value == []):
        return {}
    return None


def _not_a_column(name: str, value: Any) -> str:
    return (
        f"columns.{printable(name, 200)}: the name of a head or an annotator, or {{use: ANNOTATOR, ...}}, is expected, "
        f"not {_repr(value)}"
    )


def _repr(value: Any) -> str:
    """A value of a recipe for a message about it."""
    return printable(repr(value), 200)


def _did_you_mean(word: str, words: Sequence[str]) -> str:
    near = nearest(word, words)
    return f" (did you mean {near}?)" if near else ""


# ------------------------------------------------------------------------------------------------------------- writing


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, as YAML holds them."""
    found: dict[str, Any] = _adapter().dump_python(recipe, mode="json")
    return found


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, readable again by load_recipe."""
    return write_yaml(to_dict(recipe))


# ------------------------------------------------------------------------------------------------ that of a data folder


def stored_recipe(data: Data) -> Recipe | None:
    """The recipe that a data folder was made with."""
    if not data.exists(data.recipe):
        return None
    return parse_recipe(read_recipe(data.local(data.recipe)), what=data.shown(data.recipe))


def store_recipe(data: Data, recipe: Recipe) -> None:
    """Write the resolved recipe beside the data, with a hash per stage as comments."""
    lines = [f"{RECIPE_HEADER}; a hash per stage over the keys that its files depend on"]
    lines += [f"# {stage}: {value}" for stage, value in recipe.stage_hashes().items()]
    write_atomic(data.recipe, "\n".join([*lines, to_yaml(recipe)]).encode())
    data.push(data.recipe)


def recipe_of(data: Data, name: str | None, settings: Sequence[str], select: str | None = None) -> Recipe:
    """The recipe that a data folder was made with, or another one, with settings laid over it.

    A recipe.yaml where no plan is belongs to somebody else.
    """
    if name is None and data.exists(data.recipe) and data.exists(data.plan_record):
        recipe = parse_recipe(read_recipe(data.local(data.recipe)), settings, what=data.shown(data.recipe))
    else:
        recipe = load_recipe(name or DEFAULT, settings)
    return recipe if select is None else replace(recipe, select=replace(recipe.select, name=select))
