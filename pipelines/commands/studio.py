"""`tastemaker studio`: look at a data folder in the browser, decide and rate; with a model, draw as well.

DATA/logs/studio.log    what libraries say, and the tracebacks of errors
"""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from dataclasses import dataclass
from typing import IO

from aesthetic.errors import UserError
from curate.layout import Data
from pipelines.drawing import DrawingOptions, check_drawing
from pipelines.options import Result, argument, option
from pipelines.runtime.progress import redirect_output
from pipelines.serving import check_serving, serve, take_address


@dataclass(frozen=True, kw_only=True)
class StudioOptions(DrawingOptions):
    data: str = argument("DATA", "the data folder")
    model: str | None = option("draw with this model too: a diffusers folder or hub id", metavar="MODEL")
    read_only: bool = option("write nothing: to show the data to others", default=False)


def run(options: StudioOptions) -> Result:
    """Serve until Ctrl-C or SIGTERM. Raises UserError before anything loads where something does not fit.

    A model is loaded while the other pages are there already.
    """
    check_serving(options)
    if options.model is not None and options.read_only:
        raise UserError("--model draws, and --read-only writes nothing: give one of them")
    if options.model is None and (options.lora or options.embedding or options.show_flagged):
        raise UserError("--lora, --embedding and --show-flagged are for drawing: give a --model too")
    from curate.store.ownership import open_data

    data = open_data(options.data)
    load = None if options.model is None else check_drawing(options, options.model)
    from pipelines.actions import DataCommands
    from pipelines.recipe import recipe_of
    from studio.app import new_app
    from studio.data import StudioData
    from studio.draw.loading import LoadingModel

    recipe = recipe_of(data, None, ())
    with take_address(options) as address, _terminal(options, data) as terminal:

        def log(line: str) -> None:
            terminal.write(f"{time.strftime('%H:%M:%S')}  {line}\n")

        fault = traceback.print_exception
        line = DataCommands(data, options.data)
        folder = StudioData(
            data,
            recipe=recipe.select,
            embed=recipe.embed,
            stored=recipe.images,
            read_only=options.read_only,
            command_line=line,
            log=log,
            on_fault=fault,
        )
        draw = None if load is None else LoadingModel(lambda: load(log), log=log, on_fault=fault)

        def stop() -> None:
            folder.stop()
            if draw is not None:
                draw.stop()

        app = new_app(data=folder, draw=draw, hosts=address.hosts, token=address.token)
        serve(address, app, stop, log, "the studio is at {url}   (Ctrl-C ends)")
    return Result()


def _terminal(options: StudioOptions, data: Data) -> contextlib.AbstractContextManager[IO[str]]:
    """Where people read; what libraries say goes to a log, unless nothing may be written."""
    return contextlib.nullcontext(sys.stderr) if options.read_only else redirect_output(data.logs / "studio.log")
