"""A data folder in the studio: all that its pages ask."""

from __future__ import annotations

from collections.abc import Callable

from curate.encoders.embed import EmbedConfig
from curate.images.config import ImagesConfig
from curate.layout import Data
from curate.ledger.select import SelectConfig
from studio.commands.actions import CommandLine
from studio.commands.service import CommandService
from studio.explore.explorer import Explorer
from studio.images.service import ImageService
from studio.rate.service import RatingService
from studio.search.service import SearchService
from studio.search.words import DataEncoder


class StudioData:
    """A data folder that people look at.

    Args:
        recipe: the selection of the recipe in effect: its early rules, and what it calls unsafe.
        embed, stored: how the recipe makes vectors, and images before that; what is searched for is made likewise.
        read_only: nothing may be written: no ratings, no selections, no deny-list.
        command_line: what runs commands; without it a page can run none.
        log: called with a line about what was done.
        on_fault: called with exceptions that are nobody's fault but ours.
    """

    def __init__(
        self,
        data: Data,
        *,
        recipe: SelectConfig | None = None,
        embed: EmbedConfig | None = None,
        stored: ImagesConfig | None = None,
        read_only: bool = False,
        command_line: CommandLine | None = None,
        log: Callable[[str], None] = lambda line: None,
        on_fault: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.data, self.read_only, self.log, self.on_fault = data, read_only, log, on_fault
        self.explorer = Explorer(data, recipe, keep=not read_only, log=log, on_fault=on_fault)
        self.images = ImageService(data, self.explorer.recipe.rules, keep=not read_only, log=log)
        encoder, codes = DataEncoder(data, embed, stored), None if read_only else data.search_index
        self.search = SearchService(data, self.explorer, encoder, codes, on_fault)
        self.ratings = RatingService(self)
        self.commands = CommandService(command_line, after=self.look, log=log, on_fault=on_fault)

    def look(self) -> None:
        """A command has run: look whether the data folder has changed."""
        self.explorer.look()
        self.ratings.look()

    def stop(self) -> None:
        """Begin nothing more, and let streams of events end."""
        self.commands.stop()
        self.ratings.stop()
        self.search.stop()
        self.explorer.stop()

    def close(self) -> None:
        """Stop, and wait for what runs to end."""
        self.stop()
        self.commands.close()
        self.search.close()
        self.explorer.close()
        self.images.close()
