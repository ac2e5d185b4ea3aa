"""How the shipped head `bundled-aesthetic` was made: OASIS photographs, their beauty ratings, the bundled encoder.

    python examples/fit_bundled_head.py DATA_FOLDER [HEAD_FOLDER]

DATA_FOLDER holds ratings.csv (columns image, theme, beauty_mean, beauty_sd, n) and the images that it names. The head
is written to HEAD_FOLDER, by default where the package looks for it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from aesthetic.fit import fit_head
from aesthetic.heads import SHIPPED, save_head
from aesthetic.ratings import read_ratings
from curate.encoders import load_encoder
from curate.images import decode
from curate.store import sha256_file

BATCH = 16
NAME = "bundled-aesthetic"

CARD = {
    "about": "Predicts how beautiful people find a photograph, from vectors of the bundled encoder. It makes a first "
    "run possible where no CLIP weights can be had.",
    "licence": "other",
    "source": "made by examples/fit_bundled_head.py of this project",
    "data": [
        "OASIS, photographs of objects, animals and scenes; free for use in research (Kurdi, Lozano and Banaji 2017)",
        "beauty ratings of them, 1-7, the mean of 104 to 368 people each (Brielmann and Pelli 2019)",
    ],
    "limits": [
        "For research and demonstration: OASIS is for research use, and this head is made of its ratings.",
        "Made from 317 photographs of objects, animals and scenes; good for ranking, not for absolute cuts.",
        "Drawings, logos and text are unlike anything that it has seen.",
    ],
}


def main() -> None:
    """Embed the rated images, fit, save, and print how good the head is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("head", type=Path, nargs="?", default=SHIPPED / NAME)
    asked = parser.parse_args()

    file = asked.data / "ratings.csv"
    ratings = read_ratings(file, score="beauty_mean", sd="beauty_sd", group="theme")
    encoder = load_encoder("bundled")
    images = [decode((asked.data / key).read_bytes()) for key in ratings["key"]]
    batches = [encoder.encode_images(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    head, report = fit_head(
        np.concatenate(batches),
        ratings["score"].to_numpy(),
        ratings["group"].to_list(),
        encoder.space(),
        name=NAME,
        scale=(1.0, 7.0),
        card=CARD | {"ratings": {"rows": len(ratings), "sha256": sha256_file(file)}},
    )
    print(f"{save_head(head, asked.head)}: Spearman {report['spearman']}, RMSE {report['rmse']:.3f}")


if __name__ == "__main__":
    main()
