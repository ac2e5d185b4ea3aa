"""Loads a published dataset by its croissant.json with mlcroissant; prints what it saw as JSON.

python read_croissant.py FOLDER    ->    {"errors", "rows": [[key, url, sha256]], "samples": [[key, w, h, caption]]}
"""

import json
import sys
from pathlib import Path

import mlcroissant


def text(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value


def main() -> None:
    dataset = mlcroissant.Dataset(jsonld=Path(sys.argv[1]) / "croissant.json")
    issues = dataset.metadata.issues
    sets = [s.name for s in dataset.metadata.record_sets]
    tables = [name for name in sets if name.startswith("rows")]
    columns = ("key", "url", "sha256")
    rows = [[text(r[f"{t}/{column}"]) for column in columns] for t in tables for r in dataset.records(t)]
    samples = []
    for name in sets:
        if name.startswith("samples-"):
            for r in dataset.records(name):
                image = r[f"{name}/image"]
                samples.append([text(r[f"{name}/key"]), image.width, image.height, text(r.get(f"{name}/caption"))])
    print(json.dumps({"errors": [*issues.errors], "rows": rows, "samples": samples}))


if __name__ == "__main__":
    main()
