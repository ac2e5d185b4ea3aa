"""Reads packed shards with webshart (what SimpleTuner loads tars with); prints what it saw as JSON.

python read_webshart.py SHARDS    ->    {"version", "shards", "samples": {member: [sha256, caption]}, "buckets"}
"""

import hashlib
import importlib.metadata
import json
import sys

import webshart


def main() -> None:
    dataset = webshart.discover_dataset(source=sys.argv[1])
    loader = webshart.TarDataLoader(dataset)
    seen = {}
    for shard in range(dataset.num_shards):
        for number in range(dataset.get_shard_sample_count(shard)):
            entry = loader.load_sample(shard, number)
            seen[entry.path] = [hashlib.sha256(bytes(entry.data)).hexdigest(), entry.captions]
    shards = list(range(dataset.num_shards))
    found = loader.list_shard_sample_aspect_buckets(shards, key="aspect")
    buckets = sum(len(entries) for shard in found for entries in shard["buckets"].values())
    version = importlib.metadata.version("webshart")
    print(json.dumps({"version": version, "shards": dataset.num_shards, "samples": seen, "buckets": buckets}))


if __name__ == "__main__":
    main()
