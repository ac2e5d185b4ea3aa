"""`tastemaker studio`: look at a data folder in the browser, decide and rate; with a model, draw as well."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass

from pipelines.options import Result, argument, option
from pipelines.runtime.progress import redirect_output
from pipelines.serving import ServingOptions, check_serving, serve, take_address


@dataclass(frozen=True, kw_only=True)
class StudioOptions(ServingOptions):
    data: str = argument("DATA", "the data folder")
    read_only: bool = option("write nothing: to show the data to others", default=False)


def run(options: StudioOptions) -> Result:
    """Serve until Ctrl-C or SIGTERM."""
    check_serving(options)
    from curate.store.ownership import open_data
    from pipelines.recipe import recipe_of
    from studio.app import new_app
    from studio.data import StudioData

    data = open_data(options.data)
    recipe = recipe_of(data, None, ()).select
    with take_address(options) as address, redirect_output(data.logs / "studio.log") as terminal:

        def log(line: str) -> None:
            terminal.write(f"{time.strftime('%H:%M:%S')}  {line}\n")

        folder = StudioData(
            data, recipe=recipe, read_only=options.read_only, log=log, on_fault=traceback.print_exception
        )
        app = new_app(data=folder, hosts=address.hosts, token=address.token)
        serve(address, app, folder.close, log, "the studio is at {url}   (Ctrl-C ends)")
    return Result()
