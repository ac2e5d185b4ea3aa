"""Reads packed shards with SimpleTuner's own data backend, buckets and sampler; prints what it saw as JSON.

python read_simpletuner.py SHARDS    ->    {"version", "samples": {member: [sha256, width, height, caption]}}

Its `MultiAspectSampler`, as its trainer makes it, draws batches of one until each image has come.
"""

import hashlib
import importlib.metadata
import json
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from accelerate import Accelerator
from simpletuner.helpers.data_backend.builders import build_backend_from_config
from simpletuner.helpers.data_backend.config import create_backend_config
from simpletuner.helpers.multiaspect.dataset import MultiAspectDataset
from simpletuner.helpers.multiaspect.sampler import MultiAspectSampler
from simpletuner.helpers.training.state_tracker import StateTracker


def options(cache: str) -> dict:
    """Of its command line, those that its data backends ask for."""
    return {
        "model_family": "sdxl",
        "model_type": "lora",
        "output_dir": cache,
        "cache_dir": cache,
        "resolution": 64,
        "resolution_type": "pixel",
        "minimum_image_size": None,
        "maximum_image_size": None,
        "target_downsample_size": None,
        "train_batch_size": 1,
        "metadata_update_interval": 60,
        "delete_problematic_images": False,
        "delete_unwanted_images": False,
        "aspect_bucket_rounding": 2,
        "aspect_bucket_alignment": 8,
        "compress_disk_cache": False,
        "caption_strategy": None,
        "controlnet": False,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        asked = options(cache)
        StateTracker.set_args(Namespace(**asked))
        spec = {  # as docs/dataset.md has it
            "id": "packed",
            "type": "webshart",
            "dataset_type": "image",
            "source": sys.argv[1],
            "metadata_backend": "webshart",
            "caption_strategy": "webshart",
            "resolution": 64,
            "resolution_type": "pixel",
            "webshart": {"cache_dir": f"{cache}/webshart", "shard_cache_gb": 1},
        }
        accelerator = Accelerator(cpu=True)
        backend = build_backend_from_config(create_backend_config(spec, asked), accelerator, asked)
        StateTracker.register_data_backend(backend)
        StateTracker.set_data_backend_config("packed", backend["config"])
        buckets = backend["metadata_backend"]
        buckets.refresh_buckets()
        sampler = MultiAspectSampler(
            id="packed",
            metadata_backend=buckets,
            data_backend=backend["data_backend"],
            model=None,
            accelerator=accelerator,
            batch_size=1,
            resolution=64,
            caption_strategy="webshart",
        )
        dataset, samples = MultiAspectDataset(id="packed", datasets=[buckets]), {}
        count = sum(len(bucket) for bucket in buckets.aspect_ratio_bucket_indices.values())
        for _, batch in zip(range(20 * count), sampler, strict=False):  # a bucket that is used up begins anew
            (one,) = dataset[batch]["training_samples"]
            data = backend["data_backend"].read(one["image_path"])
            image = backend["data_backend"].read_image(one["image_path"])
            name = Path(one["image_path"]).name
            samples[name] = [hashlib.sha256(data).hexdigest(), *image.size, one["instance_prompt_text"]]
            if len(samples) == count:
                break
    print(json.dumps({"version": importlib.metadata.version("simpletuner"), "samples": samples}))


if __name__ == "__main__":
    main()
