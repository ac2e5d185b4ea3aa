"""`tastemaker serve`: one model, and a page in the browser to draw with it.

OUT/000000.png ...      every image, with how it was generated in it: the page's history
    logs/serve.log      what libraries say, and the tracebacks of errors
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from pipelines.drawing import DrawingOptions, check_drawing
from pipelines.options import Result, argument, input_file, option, positive_int
from pipelines.runtime.progress import redirect_output
from pipelines.serving import check_serving, serve, take_address


@dataclass(frozen=True, kw_only=True)
class ServeOptions(DrawingOptions):
    model: str = argument("MODEL", "a folder of any text-to-image model of diffusers, a .safetensors file, or a hub id")
    batch: int = option("images of a job drawn at once", default=1, metavar="N", type=positive_int)
    upscaler: Path | None = option(
        "enlarge with ESRGAN-type weights (extra `upscale`)", metavar="FILE", type=input_file
    )
    faces: Path | None = option(
        "restore faces with GFPGAN's weights (extra `upscale`)", metavar="FILE", type=input_file
    )


def run(options: ServeOptions) -> Result:
    """Serve until Ctrl-C or SIGTERM. Raises UserError before the model loads where something does not fit."""
    check_serving(options)
    from train.generate.upscale import check_network

    more = {"upscaler": options.upscaler, "faces": options.faces}
    load = check_drawing(options, options.model, batch=options.batch, **more)
    for name, path in more.items():
        if path is not None:
            check_network(path, f"--{name} {path}")
    from studio.app import new_app

    with take_address(options) as address:
        options.out.mkdir(parents=True, exist_ok=True)
        with redirect_output(options.out / "logs" / "serve.log") as terminal:

            def log(line: str) -> None:
                terminal.write(f"{time.strftime('%H:%M:%S')}  {line}\n")

            service = load(log)
            app = new_app(draw=service, hosts=address.hosts, token=address.token)
            ready = f"draw at {{url}}   (Ctrl-C ends; images go to {options.out})"
            serve(address, app, service.queue.stop, log, ready)
    return Result(paths={"pictures": options.out})
