"""What a page can ask for, as commands of the command line: those that one would type."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from aesthetic.errors import UserError
from curate.layout import Data
from pipelines.options import from_here
from pipelines.recipe import DEFAULT, Recipe, recipe_of, to_yaml
from pipelines.runtime.progress import LINE_SECONDS
from pipelines.yaml12 import write_flow, write_yaml
from studio.commands.actions import (
    AnnotateAction,
    ApplyAction,
    FitAction,
    PackAction,
    Preview,
    RecipeAction,
    RuleOfPage,
    SelectAction,
)
from studio.rate.commands import apply_words, fit_words
from studio.rate.files import read_set

MAX_BYTES = 100_000
"""Of a command's words: the kernel takes 128 kB for one of them."""


class DataCommands:
    """The commands over one data folder, which is named as it was when the studio was started."""

    program = (sys.executable, "-P", "-m", "pipelines.cli")
    environment = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", LINE_SECONDS: "1"}  # noqa: RUF012

    def __init__(self, data: Data, given: str) -> None:
        self._data, self.given = data, from_here(given)

    def words(self, action: Preview) -> list[str]:
        """What stands after `tastemaker`."""
        match action:
            case SelectAction():
                words = ["select", self.given, "--name", action.name, *self._settings(action)]
            case RecipeAction():
                words = ["recipe", self._recipe_name(), "--set", f"select.name={action.name}", *self._settings(action)]
            case PackAction():
                words = ["pack", self.given, "--name", action.name]
            case AnnotateAction():
                words = ["annotate", self.given, f"{action.column}={action.spec}"]
            case FitAction():
                about = read_set(self._data, action.name)
                if about is None:
                    raise UserError(f"there are no ratings called {action.name}")
                words = fit_words(self._data, about, self.given)
            case ApplyAction():
                words = apply_words(self._data, action.name, self.given)
            case _:
                words = ["select", self.given, "--name", action.name, "--sheet"]
        if (size := sum(len(word.encode("utf-8", "replace")) for word in words)) > MAX_BYTES:
            raise UserError(f"the rules make a command of {size:,} bytes: at most {MAX_BYTES:,}. Write a recipe file.")
        return words

    def text(self, action: Preview) -> str:
        """The rules as they stand in a recipe, or the data folder's recipe with these rules."""
        if isinstance(action, RecipeAction):
            return to_yaml(self._recipe(action))
        if isinstance(action, SelectAction):
            recipe = self._recipe(action)
            early = {"early": list(recipe.select.early)} if recipe.select.early else {}
            return write_yaml({"select": {"name": action.name, "rules": rules_of(action.rules), **early}})
        return ""

    def _recipe_name(self) -> str:
        """The recipe that `recipe_of` takes."""
        its_own = self._data.exists(self._data.recipe) and self._data.exists(self._data.plan_record)
        return f"{self.given.rstrip('/')}/{self._data.recipe.name}" if its_own else DEFAULT

    def _recipe(self, action: SelectAction | RecipeAction) -> Recipe:
        """The data folder's recipe with these rules; those of them that are early in it stay so."""
        recipe, rules = recipe_of(self._data, None, ()), rules_of(action.rules)
        early = tuple(name for name in recipe.select.early if name in rules)
        return replace(recipe, select=replace(recipe.select, name=action.name, rules=rules, early=early))

    def _settings(self, action: SelectAction | RecipeAction) -> list[str]:
        """The `--set` that make the data folder's rules these: a short one for each that differs, where the command
        line reads that as it is meant, and else one for all."""
        wanted = [*rules_of(action.rules).items()]
        now = recipe_of(self._data, None, ()).select.rules
        differing = [f"{name}={condition}" for name, condition in wanted if now.get(name) != condition]
        short = [
            f"select.rules.{setting}" for setting in [*(f"{n}=" for n in now if n not in dict(wanted)), *differing]
        ]
        if not short and wanted:  # something has to be given, or those of a selection of this name would be taken
            short = [f"select.rules.{wanted[-1][0]}={wanted[-1][1]}"]
        whole = [f"select.rules={write_flow(dict(wanted))}"]
        chosen = short if len(short) <= len(wanted) and self._reads(short, wanted) else whole
        return [word for setting in chosen for word in ("--set", setting)]

    def _reads(self, settings: Sequence[str], wanted: Sequence[tuple[str, str]]) -> bool:
        """Whether the command line makes exactly these rules of these settings."""
        if not settings or any("\0" in setting for setting in settings):
            return False
        try:
            return [*recipe_of(self._data, None, settings).select.rules.items()] == [*wanted]
        except UserError:
            return False


def rules_of(rules: Sequence[RuleOfPage]) -> dict[str, str]:
    """Name -> condition of those that are on. Raises UserError where two of them have one name."""
    found: dict[str, str] = {}
    for rule in rules:
        if rule.on:
            if rule.name in found:
                raise UserError(f"two rules are called {rule.name!r}: each needs a name of its own")
            found[rule.name] = rule.condition
    return found
