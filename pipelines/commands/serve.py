"""`tastemaker serve`: one model, and a page in the browser to draw with it.

OUT/000000.png ...      every image, with how it was generated in it: the page's history
    logs/serve.log      what libraries say, and the tracebacks of errors
"""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from aesthetic.errors import UserError
from curate.store.files import local_path
from curate.store.objects import is_url
from pipelines.options import Result, argument, input_file, option, positive_int
from pipelines.runtime.progress import redirect_output
from pipelines.serving import ServingOptions, check_serving, serve, take_address


def _folder(text: str) -> Path:
    if is_url(text):
        raise UserError(f"--out {text}: a page keeps its images on a disk, where it looks at them again")
    return local_path(text)


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ServingOptions):
    model: str = argument("MODEL", "a diffusers folder (Stable Diffusion type) or hub id")
    out: Path = option(
        "images get its next free numbers (default: samples)",
        default=Path("samples"),
        metavar="FOLDER",
        type=_folder,
    )
    batch: int = option("images of a job drawn at once", default=1, metavar="N", type=positive_int)
    upscaler: Path | None = option(
        "enlarge with ESRGAN-type weights (extra `upscale`)", metavar="FILE", type=input_file
    )
    faces: Path | None = option(
        "restore faces with GFPGAN's weights (extra `upscale`)", metavar="FILE", type=input_file
    )
    lora: tuple[str, ...] = option("repeatable", default=(), metavar="PATH[:WEIGHT]")
    show_flagged: bool = option("do not blur what the NSFW detector flags", default=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", self.out.absolute())


def run(options: ServeOptions) -> Result:
    """Serve until Ctrl-C or SIGTERM. Raises UserError before the model loads where something does not fit."""
    check_serving(options)
    from train.generate.files import check_out
    from train.generate.upscale import check_network
    from train.models.info import read_model_info
    from train.models.lora import check_lora, parse_lora

    info = read_model_info(options.model)
    loras = [parse_lora(text) for text in options.lora]
    for lora in loras:
        check_lora(info, lora)
    for name, path in (("upscaler", options.upscaler), ("faces", options.faces)):
        if path is not None:
            check_network(path, f"--{name} {path}")
    check_out(options.out)
    from studio.app import new_app

    with take_address(options) as address:
        options.out.mkdir(parents=True, exist_ok=True)
        with redirect_output(options.out / "logs" / "serve.log") as terminal:

            def log(line: str) -> None:
                terminal.write(f"{time.strftime('%H:%M:%S')}  {line}\n")

            from studio.draw.service import GenerationService
            from train.generate.sampler import Sampler

            log(f"loading {options.model}")
            sampler = Sampler(
                info,
                loras=loras,
                upscaler=options.upscaler,
                faces=options.faces,
                batch=options.batch,
                blur=not options.show_flagged,
            )
            for line in (str(sampler), *sampler.notes):
                log(line)
            service = GenerationService(sampler, options.out, log=log, on_fault=traceback.print_exception)
            app = new_app(draw=service, hosts=address.hosts, token=address.token)
            ready = f"draw at {{url}}   (Ctrl-C ends; images go to {options.out})"
            serve(address, app, service.queue.stop, log, ready)
    return Result(paths={"pictures": options.out})
