"""A recipe: one YAML file -> validated, frozen configuration. Each stage defines its own part, beside its code."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from curate.embed import EmbedConfig
from curate.fetch import FetchConfig
from curate.images import ImagesConfig
from curate.pack import PackConfig
from curate.select import SelectConfig
from curate.source import SourceConfig
from curate.store import UserError, digest

DEFAULT = "laion-aesthetics-5"
_RECIPES = resources.files("pipelines") / "recipes"


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """What Ray gives the workers. Zero workers means: as many as the machine or cluster can carry."""

    fetch_workers: int = 0
    fetch_cpus: float = 1
    embed_workers: int = 0
    embed_cpus: float = 1
    embed_gpus: float = 0  # 1 where the machine has CUDA, unless set
    wave: int = 1000  # shards submitted at a time


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is asked for, stage by stage. `score` maps a column to a head or detector, by name or file."""

    source: SourceConfig = field(default_factory=SourceConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    score: dict[str, str] = field(default_factory=dict)
    select: SelectConfig = field(default_factory=SelectConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    ray: RayConfig = field(default_factory=RayConfig)

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
        fetch = {k: whole["fetch"][k] for k in ("engine", "max_bytes", "respect", "allow")}
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
        return (_RECIPES / f"{name}.yaml").read_text()
    path = Path(name).expanduser()
    if path.is_file():
        return path.read_text()
    raise UserError(
        f"no recipe {name!r}: it is neither a file nor one of {', '.join(shipped())}{_nearest(name, shipped())}"
    )


def load_recipe(name: str = DEFAULT, settings: Sequence[str] = ()) -> Recipe:
    """A recipe by name or file, with `a.b=c` settings laid over it. UserError names a wrong key and the nearest one."""
    return parse_recipe(recipe_text(name), settings, what=name)


def parse_recipe(text: str, settings: Sequence[str] = (), what: str = "recipe") -> Recipe:
    """As load_recipe, from YAML text."""
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as e:
        raise UserError(f"{what} is not valid YAML: {e}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{what} is not a recipe: a mapping of stages is expected, as `tastemaker recipe` prints")
    for setting in settings:
        _lay_over(tree, setting)
    return _build(Recipe, tree, "")


def _lay_over(tree: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise UserError(f"--set {setting}: expected KEY.KEY=VALUE, for example --set images.size=256")
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {setting}: {name} is a value, not a group of keys")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text  # an SQL rule may be no YAML
    if len(names) > 1 and names[-2] == "rules" and value is not None:
        value = text
    if value is None and len(names) > 1 and names[-2] in ("rules", "score"):
        tree.pop(names[-1], None)  # `--set select.rules.large=` takes the rule away
    else:
        tree[names[-1]] = value


def _build(kind: Any, value: Any, where: str) -> Any:
    """A value of the YAML tree as the type that the dataclass field names."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _build_part(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        choices = typing.get_args(kind)
        if value is None and type(None) in choices:
            return None
        return _build(next(c for c in choices if c is not type(None)), value, where)
    if origin is typing.Literal:
        words = typing.get_args(kind)
        if value is False and "no" in words:
            value = "no"  # YAML 1.1 reads a bare `no` as false
        if value not in words:
            raise UserError(f"{where}: {value!r} is none of {', '.join(map(str, words))}{_nearest(str(value), words)}")
        return value
    if origin is tuple:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple):
            raise UserError(f"{where}: a list is expected, not {value!r}")
        return tuple(_build(typing.get_args(kind)[0], v, where) for v in values)
    if origin is dict:
        if not isinstance(value or {}, Mapping):
            raise UserError(f"{where}: a mapping of names is expected, not {value!r}")
        inner = typing.get_args(kind)[1]
        return {str(k): _build(inner, v, f"{where}.{k}") for k, v in (value or {}).items()}
    return _scalar(kind, value, where)


def _build_part(kind: Any, value: Any, where: str) -> Any:
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise UserError(f"{where or 'recipe'}: a mapping of keys is expected, not {value!r}")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    for key in value:
        if key not in names:
            full = f"{where}.{key}" if where else str(key)
            raise UserError(f"unknown key {full}{_nearest(str(key), names)}. Known here: {', '.join(names)}")
    return kind(**{k: _build(hints[k], v, f"{where}.{k}" if where else k) for k, v in value.items()})


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is int and not isinstance(value, bool):
        if isinstance(value, int):
            return value
        if isinstance(value, str) and (size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B", value)):
            return int(float(size[1]) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[size[2]])
    raise UserError(f"{where}: {kind.__name__} is expected, not {value!r}")


def _nearest(word: str, words: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {found[0]}?)" if found else ""


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
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True, width=120)
