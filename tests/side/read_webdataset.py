"""Reads a data folder's tars with whatever webdataset is installed here; prints what it saw as JSON.

python read_webdataset.py DATA    ->    {"version": ..., "fetched": {key: [width, height, caption, the row's key]}, ...}
"""

import importlib.metadata
import io
import json
import sys
from pathlib import Path

import webdataset
from PIL import Image


def read(tars: list) -> dict:
    """What each sample holds, through webdataset's own pipeline and grouping."""
    pipeline = webdataset.DataPipeline(webdataset.SimpleShardList(tars), webdataset.tarfile_to_samples())
    seen = {}
    for sample in pipeline:
        row = json.loads(sample["json"])
        width, height = Image.open(io.BytesIO(sample["jpg"])).size
        assert sample["__key__"] not in seen
        seen[sample["__key__"]] = [width, height, sample["txt"].decode(), row["key"]]
    return seen


def main() -> None:
    data = Path(sys.argv[1])
    folders = {"fetched": data / "fetched", **{f"shards/{p.name}": p for p in sorted((data / "shards").iterdir())}}
    seen = {name: read(sorted(str(p) for p in folder.glob("*.tar"))) for name, folder in folders.items()}
    print(json.dumps({"version": importlib.metadata.version("webdataset"), **seen}))


if __name__ == "__main__":
    main()
