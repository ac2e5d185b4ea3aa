"""Reads packed shards through open_clip's own data pipeline for training; prints what it saw as JSON.

python read_open_clip.py SHARDS    ->    {"size", "num_samples", "train": [captions], "valid": [captions], "shapes"}

open_clip's training asks for webdataset <= 0.2.86 (its extra `training`).
"""

import json
import sys
from argparse import Namespace

import torch
from open_clip_train.data import get_dataset_size, get_wds_dataset
from torchvision.transforms.v2 import functional


def preprocess(image) -> torch.Tensor:
    return functional.resize(functional.to_image(image), [32, 32])


def tokenizer(text: str) -> list:
    return [text]


def main() -> None:
    shards = sys.argv[1]
    size, count = get_dataset_size(shards)
    options = Namespace(
        train_data=shards,
        val_data=shards,
        dataset_resampled=False,
        train_num_samples=None,  # it reads sizes.json
        val_num_samples=size,
        train_data_upsampling_factors=None,
        seed=0,
        batch_size=4,
        workers=0,
        world_size=1,
    )
    train = get_wds_dataset(options, preprocess, is_train=True, tokenizer=tokenizer)
    valid = get_wds_dataset(options, preprocess, is_train=False, tokenizer=tokenizer)
    batches = list(train.dataloader)
    seen = {
        "size": [size, count],
        "num_samples": train.dataloader.num_samples,
        "train": [text for _, texts in batches for text in texts],
        "valid": [text for _, texts in valid.dataloader for text in texts],
        "shapes": sorted({tuple(images.shape) for images, _ in batches}),
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
