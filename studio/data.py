"""A data folder in the studio: all that its pages ask."""

from __future__ import annotations

from collections.abc import Callable

from curate.layout import Data
from curate.ledger.select import SelectConfig
from studio.explore.explorer import Explorer
from studio.images.service import ImageService
from studio.search.service import SearchService


class StudioData:
    """A data folder that people look at.

    Args:
        recipe: the selection of the recipe in effect: its early rules, and what it calls unsafe.
        read_only: nothing may be written: no ratings, no selections, no deny-list.
        log: called with a line about what was done.
        on_fault: called with exceptions that are nobody's fault but ours.
    """

    def __init__(
        self,
        data: Data,
        *,
        recipe: SelectConfig | None = None,
        read_only: bool = False,
        log: Callable[[str], None] = lambda line: None,
        on_fault: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.data, self.read_only, self.log, self.on_fault = data, read_only, log, on_fault
        self.explorer = Explorer(data, recipe, log=log, on_fault=on_fault)
        self.images = ImageService(data, keep=not read_only, log=log)
        self.search = SearchService(data, self.explorer, data.search_index, on_fault)

    def close(self) -> None:
        """End what runs."""
        self.search.close()
        self.explorer.close()
        self.images.close()
