"""`tastemaker doctor`: what this machine has for the job, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from pipelines.options import Options, Result
from pipelines.terminal import counted


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(Options):
    pass


def run(options: DoctorOptions) -> Result:
    """Say what is here and what is not; exit code 1 where the main job can't run."""
    findings: list[str] = []

    def say(line: str) -> None:
        findings.append(line)
        print(line)

    ready = examine(say)
    return Result(facts={"ready": ready, "findings": findings}, code=0 if ready else 1)


def examine(say: Callable[[str], None]) -> bool:
    """Print a line per finding; returns whether the main job can run here."""
    say(f"ok       Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    good = _packages(say)
    from pipelines.runtime.cluster import local_gpus  # brings the store

    gpus = local_gpus()
    found = f"ok       {counted(gpus, 'NVIDIA GPU')}"
    say(found if gpus else "note     no NVIDIA GPU: encoders run on the CPU")
    free = shutil.disk_usage(Path.cwd()).free
    say(f"{'ok' if free > 5e9 else 'note'}       {free / 1e9:,.0f} GB free here")
    if importlib.util.find_spec("img2dataset") is None:
        why = (
            "it cannot be imported on Python 3.13"
            if sys.version_info >= (3, 13)
            else "pip install 'tastemaker[img2dataset]'"
        )
        say(f"note     img2dataset, the second download engine, is not installed ({why})")
    address, mode = os.environ.get("RAY_ADDRESS"), os.environ.get("RAY_AUTH_MODE", "token")
    if address and mode != "token":  # whoever reaches an open cluster runs code on it
        say(f"warning  RAY_ADDRESS={address} with RAY_AUTH_MODE={mode}: anyone who reaches it can run code")
        good = False
    else:
        say("ok       Ray starts in this process, on the loopback interface, without a dashboard")
    good &= _recipes(say)
    return good


def _recipes(say: Callable[[str], None]) -> bool:
    """Say of each shipped recipe whether it can run here; returns whether one can. Asks the hub whether it answers."""
    from aesthetic.errors import UserError
    from curate.annotators.registry import make_annotators
    from pipelines.checks import has_encoder
    from pipelines.recipe import DEFAULT, load_recipe, shipped

    able, why = list[str](), dict[str, str]()
    known: dict[str, bool | UserError] = {}
    for name in sorted(shipped(), key=lambda name: name != DEFAULT):
        recipe = load_recipe(name)
        try:
            make_annotators(recipe.columns, recipe.embed.encoder)
            encoder = recipe.embed.encoder
            if encoder not in known:  # where nothing answers, finding that out takes seconds
                try:
                    known[encoder] = has_encoder(recipe)
                except UserError as e:
                    known[encoder] = e
            found = known[encoder]
            if isinstance(found, UserError):
                raise found
        except UserError as e:
            why[name] = str(e).split(". Two ways on", 1)[0]
            continue
        able.append(name)
        default = " (the default)" if name == DEFAULT else ""
        say(f"ok       recipe {name}{default}{'' if found else ': the first run fetches its weights from the hub'}")
    for name, reason in why.items():
        default = " (the default)" if name == DEFAULT else ""
        say(f"note     recipe {name}{default} cannot run: {reason}")
    if not able:
        say("missing  no recipe can run here")
    elif DEFAULT in why:
        say(f"note     run with `--recipe {able[0]}`, or give a copy of the weights: `--set embed.weights=FILE`")
    return bool(able)


def _packages(say: Callable[[str], None]) -> bool:
    """Whether the packages that tastemaker requires are here, in versions that will do."""
    try:
        needed = [Requirement(text) for text in requires("tastemaker") or []]
    except PackageNotFoundError:
        say("note     tastemaker runs from its folder and is not installed, so its packages were not checked")
        return True
    good = True
    for package in needed:
        if package.marker is not None and not package.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(package.name)
        except PackageNotFoundError:
            found = "none"
        if found != "none" and package.specifier.contains(found, prereleases=True):
            say(f"ok       {package.name} {found}")
        else:
            good = False
            say(f"missing  {package.name}{package.specifier} (here: {found}): install tastemaker again")
    return good
