"""`tastemaker serve`: one model, and a page in the browser to draw with it.

OUT/000000.png ...      every image, with how it was generated in it: the page's history
    logs/serve.log      what libraries say, and the tracebacks of errors
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from aesthetic.errors import UserError
from curate.store.files import local_path
from curate.store.objects import is_url
from pipelines.options import Options, Result, argument, input_file, option, positive_int
from pipelines.runtime.progress import redirect_output

MIN_TOKEN = 16
"""Characters of a token that somebody chose: whoever reaches the port may guess, a few a second."""


def _folder(text: str) -> Path:
    if is_url(text):
        raise UserError(f"--out {text}: a page keeps its images on a disk, where it looks at them again")
    return local_path(text)


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
    model: str = argument("MODEL", "a diffusers folder (Stable Diffusion type) or hub id")
    out: Path = option(
        "images get its next free numbers (default: samples)",
        default=Path("samples"),
        metavar="FOLDER",
        type=_folder,
    )
    host: str = option(
        "default: 127.0.0.1, this machine alone; any other needs a token", default="127.0.0.1", metavar="H"
    )
    port: int = option("default: 7860; 0: any that is free", default=7860, metavar="N")
    token: str | None = option(
        "what people must know to draw (default: one is made where needed)", metavar="T", secret=True
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
    token = options.token
    if token is not None and (len(token) < MIN_TOKEN or not (token.isascii() and token.isprintable()) or " " in token):
        raise UserError(f"--token: {MIN_TOKEN} characters at least, of ASCII, without spaces")
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port {options.port}: 0 to 65535 are there")
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
    from studio.app import LOOPBACK, new_app
    from studio.server import StudioServer, listen

    at = listen(options.host, options.port)
    try:
        address, port = at.getsockname()[:2]
        ip = ipaddress.ip_address(address.partition("%")[0])
        if not ip.is_loopback and token is None:
            token = secrets.token_urlsafe(24)
        options.out.mkdir(parents=True, exist_ok=True)
        with redirect_output(options.out / "logs" / "serve.log") as terminal:

            def log(line: str) -> None:
                terminal.write(f"{time.strftime('%H:%M:%S')}  {line}\n")

            from studio.service import GenerationService
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
            app = new_app(service, None if token else LOOPBACK | {options.host.lower()}, token)

            def ready() -> None:
                name = socket.gethostname() if ip.is_unspecified else options.host  # all addresses are none to go to
                url = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
                log(f"draw at {url}   (Ctrl-C ends; images go to {options.out})")
                if token is not None:
                    log(f"token: {token}")

            with contextlib.suppress(KeyboardInterrupt):  # how it is meant to end
                StudioServer(app, service.queue.stop, ready).run(sockets=[at])
            log("ended")
    finally:
        at.close()
    return Result(paths={"pictures": options.out})
