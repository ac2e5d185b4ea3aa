"""A command's options as one frozen dataclass, from which its parser and its `--json` line are made; its result.

@dataclass(frozen=True, kw_only=True)
class GreetOptions(Options):
    name: str = argument("NAME", "whom to greet")
    times: int = option("how often", default=1, metavar="N", type=positive_int)
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from aesthetic.errors import UserError
from aesthetic.untrusted import read_text
from curate.store.mirror import here
from curate.store.objects import is_url

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


def input_file(text: str) -> Path:
    """A file to read, or the copy here of one on an object store."""
    return here(text) if is_url(text) else Path(text)


def local_file(text: str) -> Path:
    """A file to write on a disk. UserError where the text names another place."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: a file on a disk is expected here")
    return Path(text)


def read_prompts(path: Path) -> list[str]:
    """The lines of a file of prompts that are not blank. A byte order mark decides the encoding, else it is UTF-8.

    Raises UserError where there are none, or no text file of at most 16 MB.
    """
    try:
        text = read_text(path)
    except UserError as e:
        raise UserError(f"--prompts {e}") from e
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"--prompts {path} is empty: a prompt on each line is expected")
    return lines


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
    """What a command did: a text for people, facts for --json, the paths it wrote, the command that shows what was made
    and the one that goes on with it, the exit code."""

    text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    own_json: bool = False  # the command has printed the JSON that was asked for
    paths: dict[str, Any] = field(default_factory=dict)
    look: str = ""
    next: str = ""
    code: int = 0


AnyOptions = TypeVar("AnyOptions", bound=Options)


def add_arguments(parser: argparse.ArgumentParser, kind: type[Options]) -> None:
    """Have a parser take what the fields of a dataclass of options describe."""
    for f, keywords in _described(kind):
        if _is_positional(f):
            parser.add_argument(f.name, **keywords)
        else:
            parser.add_argument(_flag(f), dest=f.name, required=f.default is REQUIRED, **keywords)


def from_parsed(kind: type[AnyOptions], parsed: argparse.Namespace) -> AnyOptions:
    """The options that were given; the dataclass's defaults stand for the others."""
    given: dict[str, Any] = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(kind)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return kind(**{k: v for k, v in given.items() if v is not None and v != ()})


def flags_of(kind: type[Options]) -> list[str]:
    """The flags of a command."""
    return [_flag(f) for f in dataclasses.fields(kind) if not _is_positional(f)]


def facts_of(options: Options) -> dict[str, Any]:
    """The options as --json says them, but for secrets and those that are left open."""
    secret = ("verbose", "json", *(f.name for f in dataclasses.fields(options) if f.metadata.get("secret")))
    values = {f.name: getattr(options, f.name) for f, _ in _described(type(options)) if f.name not in secret}
    return {name: value for name, value in values.items() if value is not None}


def command_line(name: str, options: Options, *without: str) -> str:
    """The command to type that gives these options."""
    places, flags = list[object](), list[object]()
    for f, keywords in _described(type(options)):
        value = getattr(options, f.name)
        if f.name in without or value == f.default:
            continue
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        if _is_positional(f):
            places += values
        elif keywords.get("action") == "append":
            flags += [word for v in values for word in (_flag(f), v)]
        else:
            flags += [_flag(f), *values]
    return command(name, *places, *flags)


def _described(kind: type[Options]) -> list[tuple[dataclasses.Field[Any], dict[str, Any]]]:
    """Each field with its keywords for add_argument; a class's own come before those of its bases."""
    hints = typing.get_type_hints(kind)
    depth = {
        name: i for i, base in reversed([*enumerate(kind.__mro__)]) for name in vars(base).get("__annotations__", ())
    }
    described = []
    for f in sorted(dataclasses.fields(kind), key=lambda f: depth[f.name]):
        keywords = {**_from_type(hints[f.name]), **f.metadata}
        if "nargs" in keywords or _is_positional(f):
            keywords.pop("action", None)  # each value in its place, instead of one at a time
        described.append((f, {k: v for k, v in keywords.items() if k not in ("flag", "positional", "secret")}))
    return described


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


def _is_positional(f: dataclasses.Field[Any]) -> bool:
    return "positional" in f.metadata


def _flag(f: dataclasses.Field[Any]) -> str:
    return f.metadata["flag"] or f"--{f.name.replace('_', '-')}"


def command(*words: object) -> str:
    """A command to type, quoted as a shell reads it."""
    return shlex.join(["tastemaker", *map(from_here, words)])


def from_here(path: object) -> str:
    """A path as one would type it: from the working folder where it lies below that. Any other word as it is."""
    text = str(path)
    rest = text.removeprefix(f"{os.getcwd()}/")
    return text if rest.startswith("-") or not rest else rest
