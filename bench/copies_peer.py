"""Another tool's near-duplicates in a folder of images, by its defaults, in a Python of its own; imports none of ours.

    python bench/copies_peer.py imagededup FOLDER OUT.json
    python bench/copies_peer.py fastdup FOLDER OUT.json

OUT.json: method -> pairs of file names.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def imagededup(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Its four hashes, each within 10 of 64 bits. Its CNN needs weights from the network."""
    from imagededup import methods

    found = {}
    for name in ("PHash", "DHash", "WHash", "AHash"):
        near: dict[str, list[str]] = getattr(methods, name)().find_duplicates(image_dir=str(folder))
        found[f"imagededup {name}, 10 bits"] = [(a, b) for a, others in near.items() for b in others if a < b]
    return found


def fastdup(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Its own model, the two nearest of each image from a cosine of 0.9 on."""
    import fastdup as package

    with tempfile.TemporaryDirectory() as scratch:
        dataset: Any = package.create(work_dir=scratch, input_dir=str(folder))
        dataset.run(overwrite=True)
        table = dataset.similarity()
        names = [[Path(p).name for p in table[c]] for c in ("filename_from", "filename_to")]
        both = zip(*names, table["distance"], strict=True)
        return {"fastdup, 0.9": sorted({(min(a, b), max(a, b)) for a, b, cosine in both if cosine >= 0.9})}


if __name__ == "__main__":
    tool = {"imagededup": imagededup, "fastdup": fastdup}[sys.argv[1]]
    Path(sys.argv[3]).write_text(json.dumps(tool(Path(sys.argv[2]))))
