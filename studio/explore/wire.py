"""Schemas of the JSON of the page to explore."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Condition = Annotated[str, StringConstraints(max_length=20_000)]
SelectionId = Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")]


class IndexView(BaseModel):
    """The index that answers come from, made once and again when the data changed."""

    state: Literal["ready", "building", "none"]
    done: int = Field(description="steps that are done")
    of: int = Field(description="steps in all")
    seconds: float
    error: str = Field(default="", description="why there is none")


class ColumnView(BaseModel):
    """A column of the data folder, as rules name it."""

    name: str = Field(description="`similarity`, `source.WIDTH`")
    kind: Literal["number", "category", "flag", "text"] = Field(description="those of text have no histogram")
    type: str = Field(description="what DuckDB calls it")
    meaning: str
    unit: str
    scale: tuple[float, float] | None = Field(description="the lowest and the highest value of what made it")
    unsafe: bool = Field(description="whether high values say that an image is unsafe to look at")
    made_by: str = Field(description="the annotator, `embed`, `list` or `fetch`")
    count: int | None = Field(description="rows with a value; null where nobody counted")
    low: float | None
    high: float | None
    log_possible: bool
    sortable: bool


class StoredRule(BaseModel):
    """A rule."""

    name: str
    condition: str


class StoredSelection(BaseModel):
    """A selection that was saved."""

    name: str
    rules: list[StoredRule]
    kept: int
    stale: bool = Field(description="whether the data changed since")


class RecipeRule(BaseModel):
    """A rule of the recipe that the data folder was made by."""

    name: str
    condition: str
    early: bool


class SearchAbility(BaseModel):
    """What can be searched by."""

    words: bool = Field(description="words, and images that are not in the data")
    why: str = Field(description="why not by words; else what there is to know of them")
    images: bool = Field(description="images of the data")


class DataView(BaseModel):
    """A data folder."""

    name: str
    place: str = Field(description="its path or URL")
    read_only: bool
    images: int = Field(description="rows that can be looked at: those with an image that is not hidden")
    rows: int = Field(description="rows of the list")
    version: int = Field(description="goes up when the index is made anew")
    index: IndexView
    stale: bool = Field(description="whether the data changed and the index is being made anew")
    columns: list[ColumnView]
    selections: list[StoredSelection]
    recipe_rules: list[RecipeRule]
    recipe_name: str
    packs: list[str]
    search: SearchAbility
    unsafe: list[str] = Field(description="columns that say how unsafe an image is")


class HistogramView(BaseModel):
    """A column over all rows."""

    column: str
    kind: Literal["number", "category", "flag"]
    log: bool
    edges: list[float] = Field(default=[], description="of numbers, one more than there are bins")
    values: list[str] = Field(default=[], description="of others, the commonest first")
    counts: list[int]
    others: int = Field(default=0, description="rows with other values than these")
    nulls: int = Field(description="rows without a value")


class RuleRequest(BaseModel):
    """A rule that is tried."""

    model_config = ConfigDict(extra="forbid")
    name: Name
    condition: Condition
    on: bool = True


class SelectionRequest(BaseModel):
    """Rules that are tried, in their order; columns whose histograms over the rows kept are wanted."""

    model_config = ConfigDict(extra="forbid")
    rules: list[RuleRequest] = Field(max_length=100)
    columns: list[Name] = Field(default=[], max_length=100)
    log: list[Name] = Field(default=[], max_length=100, description="those of them that are wanted logarithmic")


class CutView(BaseModel):
    """A comparison of a column with a constant."""

    column: str
    sign: Literal["<", "<=", ">", ">="]
    value: float


class TopView(BaseModel):
    """A rule that is `top(column, fraction)`: the best part of all rows."""

    column: str
    fraction: float
    value: float | None = Field(description="the least value that it keeps; null where it keeps nothing")


class LiveRule(BaseModel):
    """What a rule does."""

    name: str
    condition: str
    on: bool
    rejected: int = Field(description="rows that no earlier rule rejected; 0 where it is off")
    marginal: int = Field(description="rows that it rejects by itself")
    nulls: int = Field(description="those of `marginal` where a column that it names has no value")
    unknown: int = Field(description="rows that an early rule left before its columns were known")
    columns: list[str]
    cuts: list[CutView]
    top: TopView | None
    error: str = Field(default="", description="what is wrong with a rule that is off; one that is on is a 422")


class LiveView(BaseModel):
    """A selection that is tried: rows = not fetched + denied + rejected by each rule that is on + unjudged + kept."""

    id: str = Field(description="names it for other addresses")
    rules: list[LiveRule]
    rows: int
    not_fetched: dict[str, int] = Field(description="by reason")
    denied: dict[str, int] = Field(description="by the column that hides them")
    early: dict[str, int] = Field(
        description="rows that early rules left without an image, by rule; they are counted in others"
    )
    unjudged: int
    kept: int
    warnings: list[str]
    kept_histograms: dict[str, list[int]] = Field(
        description="in the bins of GET /api/histogram; of values and flags with one more count, of all others"
    )
    seconds: float


class RowView(BaseModel):
    """An image of the grid."""

    key: str
    width: int | None
    height: int | None
    caption: str | None = Field(description="its first 300 characters")
    value: float | str | bool | None = Field(description="of the column that is sorted by, or the score of a search")
    verdict: str | None = Field(description="kept, unjudged, or the rule that rejects it")
    blurred: bool


class RowsView(BaseModel):
    """Rows in an order."""

    total: int
    offset: int
    rows: list[RowView]


class PlaceView(BaseModel):
    """Where the column that is sorted by crosses a value."""

    offset: int
    total: int


class CompareRequest(BaseModel):
    """Two selections."""

    model_config = ConfigDict(extra="forbid")
    a: SelectionId
    b: SelectionId


class CompareView(BaseModel):
    """What two selections keep."""

    a_kept: int
    b_kept: int
    both: int
    only_a: int
    only_b: int
    command: str | None = Field(description="what says the same in a terminal; null where one of them is not saved")
