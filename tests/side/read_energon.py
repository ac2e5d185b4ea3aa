"""Reads packed shards with Megatron-Energon's loader; prints what it saw as JSON.

python read_energon.py SHARDS    ->    {"version", "samples": {key: [caption, [channels, height, width]]}}
"""

import importlib.metadata
import json
import sys

from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset


def main() -> None:
    dataset = get_train_dataset(
        sys.argv[1],
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
    )
    samples = {s.__key__: [s.caption, list(s.image.shape)] for s in get_savable_loader(dataset)}
    print(json.dumps({"version": importlib.metadata.version("megatron-energon"), "samples": samples}))


if __name__ == "__main__":
    main()
