"""The shape of the code: the map in CONTRIBUTING.md and the tree agree, and packages import each other one way only."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {  # each may import those that are named
    "aesthetic": set[str](),
    "curate": {"aesthetic"},
    "train": {"aesthetic", "curate"},
    "studio": {"aesthetic", "curate", "train"},
    "pipelines": {"aesthetic", "curate", "train", "studio"},
}


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that a file imports, also inside functions; imports for types alone are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in known:
                    yield full
                elif node.module in known:
                    yield node.module


def test_packages_import_each_other_one_way_only() -> None:
    known = modules()
    wrong = [
        f"{name} imports {other}"
        for name, path in known.items()
        for other in imported(path, known)
        if (here := name.split(".")[0]) != (there := other.split(".")[0]) and there not in PACKAGES[here]
    ]
    assert not wrong, wrong
    for package in ("aesthetic", "curate", "train", "studio"):
        for path in (ROOT / package).rglob("*.py"):
            assert not re.search(r"^\s*(import|from) ray\b", path.read_text(encoding="utf-8"), re.M), path


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    # a package's __init__ offers names of its modules on demand, which is no circle of theirs
    edges = {n: {o for o in imported(p, known) if o != n} for n, p in known.items() if p.name != "__init__.py"}
    while edges:
        last = [n for n, others in edges.items() if not others & edges.keys()]
        assert last, f"these import each other: {sorted(edges)}"
        for name in last:
            del edges[name]


def test_the_map_in_contributing_names_every_file_and_nothing_else() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    named: dict[str, set[str]] = {}
    package = folder = ""
    for line in lines:
        depth, words = len(line) - len(line.lstrip()), line.split()
        if depth == 4:
            package = folder = words[0].rstrip("/")
        elif depth == 6:
            folder = f"{package}/{words[0].rstrip('/')}" if words[0].endswith("/") else package
        if package in PACKAGES:
            named.setdefault(folder, set()).update(re.findall(r"[a-z0-9_]+", line))
    for name, path in modules().items():
        if path.name == "__init__.py":
            continue
        where = str(path.parent.relative_to(ROOT))
        assert path.stem in named.get(where, set()), f"CONTRIBUTING.md does not name {name} under {where}/"
    assert PACKAGES.keys() <= {folder.split("/")[0] for folder in named}
    for where in named:
        assert (ROOT / where).is_dir(), f"CONTRIBUTING.md names {where}/, which is not there"


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(name for name, path in modules().items() if path.name == "__init__.py")


def test_a_class_name_means_one_thing() -> None:
    seen: dict[str, list[str]] = {}
    for name, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                seen.setdefault(node.name, []).append(name)
    twice = {name: where for name, where in seen.items() if len(where) > 1}
    assert not twice, twice


def test_every_import_of_ours_finds_what_it_names() -> None:
    """Also those inside functions, and in benchmarks and examples, which no other test runs."""
    missing = []
    for folder in (*PACKAGES, "bench", "demo", "examples", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES):
                    continue
                for name in (alias.name for alias in node.names):
                    try:
                        if not hasattr(importlib.import_module(node.module), name):
                            importlib.import_module(f"{node.module}.{name}")
                    except ImportError as e:
                        missing.append(f"{path.relative_to(ROOT)}:{node.lineno}: {e}")
    assert not missing, missing
