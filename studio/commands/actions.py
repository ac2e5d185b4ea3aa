"""What a page can have the command line do: a closed list, each with typed fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from studio.rate.files import NAME as RATINGS_NAME

MAX_RULES = 200
MAX_CONDITION = 20_000  # characters
NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"

SelectionName = Annotated[str, Field(min_length=1, max_length=100, pattern=NAME, description="of a selection")]
RatingsName = Annotated[str, Field(pattern=f"^{RATINGS_NAME}$", description="of a set of ratings")]
ColumnName = Annotated[str, Field(max_length=100, pattern="^[A-Za-z_][A-Za-z0-9_]*$")]


class RuleOfPage(BaseModel):
    """A rule as a page has it."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=200)]
    condition: Annotated[str, Field(max_length=MAX_CONDITION, description="SQL over the ledger, or top(column, 0.1)")]
    on: Annotated[bool, Field(description="one that is switched off is no part of the selection")] = True


Rules = Annotated[list[RuleOfPage], Field(max_length=MAX_RULES)]


class _Action(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SelectAction(_Action):
    """Make a selection of these rules."""

    action: Literal["select"]
    name: SelectionName
    rules: Rules


class PackAction(_Action):
    """Copy the images of a selection into shards."""

    action: Literal["pack"]
    name: SelectionName


class SheetAction(_Action):
    """Draw the contact sheet of a selection."""

    action: Literal["sheet"]
    name: SelectionName


class AnnotateAction(_Action):
    """Compute a column: of a head or an annotator that has a name here."""

    action: Literal["annotate"]
    column: ColumnName
    spec: Annotated[str, Field(max_length=200, pattern=NAME, description="the head's or annotator's name")]


class FitAction(_Action):
    """Fit the head of a set of ratings."""

    action: Literal["fit"]
    name: RatingsName


class ApplyAction(_Action):
    """Score every image by the head of a set of ratings: a column of the set's name."""

    action: Literal["apply"]
    name: RatingsName


class RecipeAction(_Action):
    """The data folder's recipe with these rules; printed, so there is nothing to run."""

    action: Literal["recipe"]
    name: SelectionName
    rules: Rules


_Run = SelectAction | PackAction | SheetAction | AnnotateAction | FitAction | ApplyAction
Action = Annotated[_Run, Field(discriminator="action")]
"""What can be run."""
Preview = Annotated[_Run | RecipeAction, Field(discriminator="action")]
"""What can be shown."""


class CommandLine(Protocol):
    """The command line, as whoever starts a studio hands it over."""

    @property
    def given(self) -> str:
        """The data folder, as it was named when the studio was started."""

    @property
    def program(self) -> Sequence[str]:
        """What starts it: the beginning of an argv."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What its environment has beside ours."""

    def words(self, action: Preview) -> list[str]:
        """What stands after `tastemaker` in the command that does this. Raises UserError where there is none."""

    def text(self, action: Preview) -> str:
        """The YAML that belongs to it: the rules of a selection, or a recipe; else nothing."""
