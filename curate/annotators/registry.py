"""Annotators by name: one for each class in a module of this package, and those that installed packages bring along.

Another package adds one with an entry point, and nothing else here knows its name:

    [project.entry-points."tastemaker.annotators"]
    sharpness = "my_package:Sharpness"
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pydantic

from aesthetic.chunks import cpus
from aesthetic.errors import UserError, nearest
from aesthetic.space import Space
from aesthetic.untrusted import printable
from curate import annotators as package
from curate.annotators.base import Annotator, Resources, Spec, column_specs
from curate.annotators.order import read_where, resolve_needs
from curate.encoders.base import Encoder
from curate.encoders.registry import canonical_name

GROUP = "tastemaker.annotators"
DETECTOR: Spec = "open-nsfw"
"""What looks at images that were generated, unless another is named: the one place that says it."""


@functools.cache
def _own() -> dict[str, type[Annotator]]:
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    found = [v for m in modules for v in vars(m).values() if inspect.isclass(v) and v.__module__ == m.__name__]
    return {c.name: c for c in found if issubclass(c, Annotator) and not inspect.isabstract(c)}


def known_annotators() -> list[str]:
    """The names that `use:` may have here; loads no model."""
    return sorted({*_own(), *(point.name for point in metadata.entry_points(group=GROUP))})


def find_annotator(name: str) -> type[Annotator]:
    """The annotator of this name; one of ours goes before another package's. UserError where there is none."""
    if name in _own():
        return _own()[name]
    for point in metadata.entry_points(group=GROUP, name=name):
        try:
            found = point.load()
        except Exception as e:  # whatever happens while somebody else's module is imported
            raise UserError(f"the annotator {name} ({point.value}) can't be imported: {e!r}") from e
        if not (inspect.isclass(found) and issubclass(found, Annotator)):
            raise UserError(f"the annotator {name} ({point.value}) is no subclass of {Annotator.__module__}.Annotator")
        return found
    known = known_annotators()
    near = nearest(name, known)
    raise UserError(
        f"there is no annotator {printable(name, 200)}"
        + (f"; did you mean {near}?" if near else f"; there are {', '.join(known)}")
    )


def describe_annotator(name: str) -> dict[str, Any]:
    """What an annotator of this name reads, its options, and lines about it."""
    kind = find_annotator(name)
    lines = (inspect.getdoc(kind) or "").splitlines()
    return {"name": name, "reads": kind.reads, "options": list(kind.Options.model_fields), "about": lines}


def make_annotator(name: str, spec: Spec) -> Annotator:
    """The annotator that an entry NAME of a recipe's `columns` asks for; loads no model.

    UserError where there is none such, and where an option is unknown, missing or wrong.
    """
    where = f"columns.{printable(name, 200)}"
    if isinstance(spec, str):
        spec = {"use": spec} if spec in known_annotators() else {"use": "head", "head": spec}
    options = dict(spec)
    use, condition = options.pop("use", None), options.pop("where", None)
    if not isinstance(use, str):
        raise UserError(
            f"{where}: a head's or an annotator's name, or {{use: ANNOTATOR, ...}}, is expected; there are "
            f"{', '.join(known_annotators())}"
        )
    if use == "table":  # as it was called before
        new = {"path" if k == "file" else "on" if k == "by" else k: v for k, v in options.items()}
        line = ", ".join(f"{k}: {v}" for k, v in {"path": "FILE", "on": "url", **new}.items())
        raise UserError(
            f"{where}: `table` is called `file` now, and `on` says what names images: key, url, sha256 or uid. "
            f"Write in its place:\n  {printable(name, 200)}: {{use: file, {printable(line, 500)}}}"
        )
    try:
        kind = find_annotator(use)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    try:
        annotator = kind.make(kind.Options.model_validate(options))
        annotator.where = read_where(condition, annotator)
        return annotator
    except pydantic.ValidationError as e:
        errors = e.errors(include_url=False)
        wrong = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])  # a misspelt one is missing, too
        option, known = ".".join(map(str, wrong["loc"])), list(kind.Options.model_fields)
        why = f"{option or kind.name}: {wrong['msg'].removeprefix('Value error, ')}"
        if wrong["type"] == "extra_forbidden":
            near = nearest(option, known)
            has = f"did you mean {near}?" if near else f"it has {', '.join(known) or 'none'}"
            why = f"{kind.name} has no option {printable(option, 200)}; {has}"
        elif wrong["type"] == "missing":
            why = f"{kind.name} needs {option}: {{use: {kind.name}, {option}: ...}}"
        raise UserError(f"{where}: {why}") from None
    except UserError as e:
        near = nearest(options["head"], known_annotators()) if use == "head" else None
        raise type(e)(f"{where}: {e}" + (f"; or the annotator {near}?" if near else "")) from None


def load_annotator(spec: Spec, threads: int = 0) -> Annotator:
    """An annotator that needs no vectors, with its models loaded. `threads`: by default every core that we may use."""

    def no_encoder() -> Encoder:
        raise UserError("there are no vectors here")

    annotator = make_annotator("NAME", spec)
    annotator.load(Resources(threads=threads or cpus(), space=None, encoder=no_encoder))
    return annotator


def make_annotators(columns: Mapping[str, Spec], space: Space | str | None = None) -> dict[str, Annotator]:
    """The annotators of a recipe's `columns`, for vectors of a space or an encoder; reads heads' cards, loads no model.

    UserError where one is wrong, or two columns have one name; SpaceMismatch where one reads other vectors.
    """
    made = {name: make_annotator(name, spec) for name, spec in columns.items()}
    space = canonical_name(space) if isinstance(space, str) else space
    seen: dict[str, str] = {}
    for name, annotator in made.items():
        for column in column_specs({name: annotator}):
            if column.lower() in seen:
                raise UserError(f"columns.{name}: {seen[column.lower()]} has a column {column} too (SQL ignores case)")
            seen[column.lower()] = f"columns.{name}"
        if space is not None:
            try:
                annotator.check(space)
            except UserError as e:
                raise type(e)(f"columns.{name}: {e}") from None
    return made


def fetch_annotators(annotators: Mapping[str, Annotator], tables: bool) -> None:
    """Have on this machine what a recipe's annotators load. UserError, which names the entry, where it can't be had.

    Those that read whole tables are asked with `tables` alone: they see to it themselves where something is missing.
    """
    for name, annotator in annotators.items():
        if tables or annotator.reads != "table":
            try:
                annotator.fetch_weights()
            except UserError as e:
                raise type(e)(f"columns.{name}: {e}") from None


def add_needs(columns: Mapping[str, Spec]) -> dict[str, Spec]:
    """A recipe's `columns` with the entries that others of them need and that are not there.

    UserError where the name of such an entry is taken.
    """
    made = {name: make_annotator(name, spec) for name, spec in columns.items()}
    added = dict[str, Spec]()
    for name, annotator in list(made.items()):
        for need, entry in resolve_needs(made, name).items():
            if entry is not None:
                continue
            if need in columns:
                wanted = f"{need}: {annotator.needs[need]}"
                raise UserError(f"columns.{need}: columns.{name} needs {wanted}; give this one another name")
            before, spec = added.get(need, {}), annotator.needs[need]  # of two, all that they ask for
            added[need] = spec if isinstance(before, str) or isinstance(spec, str) else {**before, **spec}
            made[need] = make_annotator(need, added[need])
    return {**columns, **added}


def absolute(name: str, spec: Spec) -> Spec:
    """An entry NAME of `columns` with whole paths and pinned revisions, so that a command given in another folder or on
    another day means the same files. UserError where a server has to be asked for a revision, and can't be."""
    if isinstance(spec, str):
        folder = Path(spec).expanduser()
        return str(folder.absolute()) if spec not in known_annotators() and folder.is_dir() else spec
    annotator = make_annotator(name, spec)
    paths = {k: str(v.expanduser().absolute()) for k, v in annotator.options if isinstance(v, Path)}
    try:
        return {**spec, **paths, **annotator.pinned()}
    except UserError as e:
        raise type(e)(f"columns.{printable(name, 200)}: {e}") from None
