"""The commands: NAME.py holds the options of one, NameOptions, and `run(options)`, which does it.

fetch, embed and retry are in curate.py, pack is in select.py: `run_NAME` does them.

A command's file is imported when the command is asked for, and imports what is heavy where that is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

COMMANDS = {
    "curate": "turn a list of image URLs (or a folder of images or shards) into curated shards",
    "fetch": "only download and resize",
    "embed": "embed and annotate what is fetched",
    "retry": "fetch again what failed for transient reasons, and only that",
    "annotate": "compute columns: of heads, detectors, prompts, tables; what is there stays",
    "select": "apply rules to the ledger: a verdict per row, no image opened",
    "pack": "copy the chosen images into even, shuffled shards",
    "publish": "give shards or the list of them to others, with card, Croissant and datasheet",
    "plan": "say what a list takes on which machines: hours, money, disk, requests",
    "status": "say where a run stands",
    "verify": "read every file again and compare it with the records",
    "export": "copy packed shards into the form that another trainer reads",
    "why": "say all that is known of a row, by its key, its URL or an image file",
    "diff": "say what two selections, or two data folders of one list, keep differently",
    "merge": "make one data folder of several, without downloading or embedding again",
    "remove": "take images out, byte for byte, so that nothing brings them back",
    "check-opt-outs": "ask the origins of what was kept again who has opted out since",
    "query": "ask the whole ledger, as one table",
    "fit": "train a head from ratings, labels or comparisons",
    "heads": "list and show heads, import one, or make one from words",
    "train": "train a text-to-image diffusion model on captioned images",
    "sample": "draw images with a model: from words, from an image, into one, or enlarged",
    "studio": "look at a data folder in the browser: histograms, rules, images; rate and decide",
    "serve": "draw with a model on a page in the browser, alone or with others",
    "evaluate": "measure a model beside chance, real images and noise",
    "recipe": "print a recipe, resolved; without a name, list them",
    "doctor": "say what this machine has, and what is missing",
}
"""Every command, in the order of --help, and what it does."""


_FILES = {"fetch": "curate", "embed": "curate", "retry": "curate", "pack": "select"}


def find(command: str) -> tuple[type[Any], Any]:
    """The options of a command and the function that does it."""
    module = import_module(f"pipelines.commands.{_FILES.get(command, command).replace('-', '_')}")
    name = "".join(word.capitalize() for word in command.split("-"))
    return getattr(module, f"{name}Options"), getattr(module, f"run_{command}", module.run)
