"""A command's options as one frozen dataclass, from which its parser and its `--json` line are made; its result.

@dataclass(frozen=True, kw_only=True)
class GreetOptions(Options):
    name: str = argument("NAME", "whom to greet")
    times: int = option("how often", default=1, metavar="N", type=positive_int)
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

REQUIRED: Any = dataclasses.MISSING
"""The default of an option that must be given."""


def option(help: str | None = None, *, flag: str | None = None, default: Any = None, **keywords: Any) -> Any:
    """A field that is given as `--name`, or by another flag. Keywords are those of add_argument, and `secret`.

    A field's type says how it is read: a bool is a switch, and a tuple[str, ...] without nargs can be repeated.
    """
    return field(default=default, metadata={"flag": flag, "help": help, **keywords})


def argument(metavar: str | None, help: str | None = None, *, default: Any = REQUIRED, **keywords: Any) -> Any:
    """A field that is given by its place."""
    return field(default=default, metadata={"positional": True, "metavar": metavar, "help": help, **keywords})


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text.replace("_", "").replace(",", ""))
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1 is expected")
    return value


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command takes."""

    verbose: bool = option("show tracebacks and libraries' warnings", default=False)
    json: bool = option("make the last line machine-readable", default=False)


@dataclass(frozen=True, kw_only=True)
class WithRecipe(Options):
    """Of commands that go by a recipe."""

    recipe: str | None = option(
        "a shipped recipe or a YAML file (default: DATA's own, else laion-aesthetics-5)", metavar="R"
    )
    set: tuple[str, ...] = option("lay a value over the recipe (repeatable)", default=(), metavar="A.B=C")


@dataclass(frozen=True, kw_only=True)
class StageOptions(WithRecipe):
    """Of commands that run stages on Ray."""

    ray_address: str | None = option(
        "run on this Ray cluster (`auto` finds it); default: Ray in this process", metavar="ADDRESS"
    )
    restart_from: str | None = option(
        "make this stage and those after it again", choices=("source", "fetch", "images", "embed")
    )


@dataclass(kw_only=True)
class Result:
    """What a command did: a text for people, facts for --json, the paths it wrote, the next command, the exit code."""

    text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    own_json: bool = False  # the command has printed the JSON that was asked for
    paths: dict[str, Any] = field(default_factory=dict)
    next: str = ""
    code: int = 0


AnyOptions = TypeVar("AnyOptions", bound=Options)


def add_arguments(parser: argparse.ArgumentParser, kind: type[Options]) -> None:
    """Have a parser take what the fields of a dataclass of options describe."""
    hints = typing.get_type_hints(kind)
    for f in _ordered(kind):
        keywords = {**_from_type(hints[f.name]), **f.metadata}
        keywords.pop("secret", None)
        if "nargs" in keywords or "positional" in keywords:
            keywords.pop("action", None)  # each value in its place, instead of one at a time
        flag = keywords.pop("flag", None)
        if keywords.pop("positional", False):
            parser.add_argument(f.name, **keywords)
        else:
            parser.add_argument(flag or _flag(f.name), dest=f.name, required=f.default is REQUIRED, **keywords)


def _ordered(kind: type[Options]) -> list[dataclasses.Field[Any]]:
    """The fields, a class's own before those of its bases."""
    depth = {
        name: i for i, base in reversed([*enumerate(kind.__mro__)]) for name in vars(base).get("__annotations__", ())
    }
    return sorted(dataclasses.fields(kind), key=lambda f: depth[f.name])


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _from_type(hint: Any) -> dict[str, Any]:
    """The keywords of add_argument that a field's type implies."""
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    if typing.get_origin(hint) is tuple:
        first, *others = typing.get_args(hint)
        return {**_from_type(first), **({"action": "append"} if others == [...] else {"nargs": 1 + len(others)})}
    if hint is bool:
        return {"action": "store_true", "default": None}
    return {} if hint is str else {"type": hint}


def from_parsed(kind: type[AnyOptions], parsed: argparse.Namespace) -> AnyOptions:
    """The options that were given; the dataclass's defaults stand for the others."""
    given: dict[str, Any] = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(kind)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return kind(**{k: v for k, v in given.items() if v is not None and v != ()})


def facts_of(options: Options) -> dict[str, Any]:
    """The options as --json says them, but for secrets and those that are left open."""
    values = ((f, getattr(options, f.name)) for f in _ordered(type(options)) if f.name not in ("verbose", "json"))
    return {f.name: value for f, value in values if value is not None and not f.metadata.get("secret")}


def command(*words: object) -> str:
    """A command to type, quoted as a shell reads it."""
    return shlex.join(["tastemaker", *map(str, words)])


def command_line(command: str, options: Options, *without: str) -> str:
    """The command to type that gives these options, as a shell reads it."""
    places, words = [command], list[str]()
    for f in _ordered(type(options)):
        value = getattr(options, f.name)
        if f.name in without or value == f.default:
            continue
        values = [str(v) for v in value] if isinstance(value, tuple) else [] if value is True else [str(value)]
        if f.metadata.get("positional"):
            places += values
        elif isinstance(value, tuple) and "nargs" not in f.metadata:
            words += [word for v in values for word in (f.metadata["flag"] or _flag(f.name), v)]
        else:
            words += [f.metadata["flag"] or _flag(f.name), *values]
    return shlex.join(["tastemaker", *places, *words])
