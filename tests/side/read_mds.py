"""Reads an export as MDS with MosaicML's StreamingDataset, its shards fetched from a "remote"; prints it as JSON.

python read_mds.py FOLDER    ->    {"version", "samples": {key: [sha256, caption, the row's key]}}
"""

import hashlib
import importlib.metadata
import json
import sys
import tempfile

from streaming import StreamingDataset


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        dataset = StreamingDataset(remote=sys.argv[1], local=cache, shuffle=False, batch_size=1, validate_hash="sha1")
        samples = {
            s["key"]: [hashlib.sha256(s["image"]).hexdigest(), s["caption"], s["json"]["key"]]
            for s in (dataset[i] for i in range(len(dataset)))
        }
    print(json.dumps({"version": importlib.metadata.version("mosaicml-streaming"), "samples": samples}))


if __name__ == "__main__":
    main()
