"""YAML 1.2's plain values, read in time and memory that their length bounds, and written for 1.1 and 1.2."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from typing import Any

import yaml

from aesthetic.errors import UserError
from aesthetic.untrusted import printable

LARGEST = 1 << 18
"""Characters of a recipe, which holds a few dozen lines."""

_DEEPEST = 20  # lists and mappings in each other; a recipe needs four


class _Loader(yaml.SafeLoader):
    """Only true and false are booleans (`mode: no`), and 1e-3 is a number. No key twice."""

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


def read_yaml(text: str, where: str) -> Any:
    """The value of YAML text. UserError, beginning with `where`, for none."""
    if len(text) > LARGEST:
        raise UserError(f"{where}: it is longer than {LARGEST:,} characters")
    depth, groups = 0, set[str]()
    try:
        # lists and mappings that lie too deep for the loader, or one that is used in several places: a hundred bytes
        # of those can stand for a billion values
        for event in yaml.parse(text, _Loader):
            mark: Any = event.start_mark
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if event.anchor is not None:
                    groups.add(event.anchor)
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            elif isinstance(event, yaml.AliasEvent) and event.anchor in groups:
                problem = (
                    f"*{event.anchor} stands for a list or a mapping: write that out, in a recipe it has one place"
                )
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
            if depth > _DEEPEST:
                raise yaml.MarkedYAMLError(problem="nested too deep for a recipe", problem_mark=mark)
        return yaml.load(text, _Loader)  # a SafeLoader: it makes plain values only
    except yaml.YAMLError as e:
        raise UserError(f"{where}: {e}") from None
    except (ValueError, KeyError, AttributeError) as e:  # `!!int abc`, `!!bool abc`, `!!timestamp abc`, 5,000 digits
        why = f": {printable(e, 200)}" if isinstance(e, ValueError) else ""
        raise UserError(f"{where}: a value is not what its tag (such as !!int) says{why}") from None


def write_yaml(value: Any) -> str:
    """Plain values as YAML, in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def write_flow(value: Any) -> str:
    """Plain values as YAML on one line, as `--set` takes it."""
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf, default_flow_style=True
    ).rstrip("\n")
