"""Reads a data folder's vectors as clip-retrieval does, with its package embedding-reader; prints what it saw as JSON.

python read_embeddings.py DATA    ->    {"count", "dimension", "keys", "captions", "norms": [lowest, highest], "sum"}
"""

import json
import sys
from pathlib import Path

import numpy as np
from embedding_reader import EmbeddingReader


def main() -> None:
    embedded = Path(sys.argv[1]) / "embedded"
    reader = EmbeddingReader(
        embeddings_folder=str(embedded / "img_emb"),
        metadata_folder=str(embedded / "metadata"),
        meta_columns=["image_path", "caption"],
        file_format="parquet_npy",
    )
    keys, captions, vectors = [], [], []
    for batch, meta in reader(batch_size=7, show_progress=False):
        vectors.append(np.array(batch, np.float64))
        keys += meta["image_path"].tolist()
        captions += meta["caption"].tolist()
    whole = np.concatenate(vectors)
    norms = np.linalg.norm(whole, axis=1)
    seen = {
        "count": int(reader.count),
        "dimension": int(reader.dimension),
        "keys": keys,
        "captions": captions,
        "norms": [float(norms.min()), float(norms.max())],
        "sum": float(whole.sum()),
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
