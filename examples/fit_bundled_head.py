"""How the shipped head `bundled-aesthetic` was made and measured: OASIS photographs, their beauty ratings, the bundled
encoder.

    python examples/fit_bundled_head.py DATA_FOLDER [HEAD_FOLDER]

DATA_FOLDER holds ratings.csv (columns image, theme, category, beauty_mean, beauty_sd, n) and the images that it names.
The head is written to HEAD_FOLDER, by default where the package looks for it. What is printed is a table for
docs/taste.md: the head beside what it must beat, over all photographs and in each category, every predictor in the
same nested cross-validation by theme.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from aesthetic.catalog import SHIPPED
from aesthetic.examples import Examples
from aesthetic.fit import fit_head
from aesthetic.head_files import save_head
from aesthetic.metrics import difference, estimate, spearman_of
from aesthetic.space import Space
from curate.encoders.registry import load_encoder
from curate.images.decode import decode
from curate.images.process import perceptual_hash
from curate.store.files import sha256_file

BATCH = 16
NAME = "bundled-aesthetic"
SCALE = (1.0, 7.0)
SHUFFLES = 20
TEXT = 384  # of the bundled vector: the part that is shared with texts; features of the network come after it

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
    ratings = pd.read_csv(file)
    encoder = load_encoder("bundled")
    images = [decode((asked.data / name).read_bytes()) for name in ratings["image"]]
    batches = [encoder.encode_images(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    examples = Examples(
        vectors=np.concatenate(batches),
        scores=ratings["beauty_mean"].to_numpy(),
        ids=ratings["image"].to_list(),
        groups=ratings["theme"].to_list(),
        votes=ratings["n"].to_numpy(np.float64),
        sd=ratings["beauty_sd"].to_numpy(),
        metadata={"category": ratings["category"].to_list()},
        sha256=[sha256_file(asked.data / name) for name in ratings["image"]],
        phash=[perceptual_hash(image) for image in images],
    )
    wanted, against = encoder.encode_texts(["a beautiful photograph", "an ugly photograph"])
    made = fit_head(
        examples,
        encoder.space(),
        name=NAME,
        scale=SCALE,
        prompts=(wanted - against).astype(np.float64),
        card=CARD | {"ratings": {"rows": len(ratings), "sha256": sha256_file(file)}},
    )
    print(f"{save_head(made.head, asked.head)}: {made.report['verdict']}")
    noise = made.report["noise"]
    print(f"worth {noise['worth_raters']:.1f} raters, noise ceiling {noise['ceiling']:.3f}")
    for what, found in made.report["metrics"].items():
        print(f"{what}: {_cell(found)}")
    _compare(examples, made.held_out, ratings)


def _compare(examples: Examples, held_out: np.ndarray, ratings: pd.DataFrame) -> None:
    """Print Spearman of each predictor with its interval, and how much the head is ahead, paired."""
    features = examples.vectors[:, TEXT:]
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    declared = Space(encoder="bundled features", dim=features.shape[1])
    rated = ratings["beauty_mean"].to_numpy()
    mean = np.empty(len(ratings))
    for theme, rows in ratings.groupby("theme").groups.items():
        others = ratings[ratings["theme"] != theme].groupby("category")["beauty_mean"].mean()
        mean[rows] = others.reindex(ratings["category"].iloc[rows]).to_numpy()
    again = fit_head(replace(examples, vectors=features), declared, name="features", scale=SCALE)
    chance = []
    for seed in range(SHUFFLES):
        order = np.random.default_rng(seed).permutation(len(ratings))
        mixed = replace(examples, scores=rated[order], votes=None, sd=None)
        dealt = fit_head(mixed, Space(encoder="bundled", dim=examples.vectors.shape[1]), name="shuffled", scale=SCALE)
        chance.append(dealt.report["metrics"]["spearman"]["value"])

    predictors = {"head": held_out, "features only": again.held_out, "category mean": mean}
    print("| | n | " + " | ".join(predictors) + " | head - features | head - category mean |")
    parts = {"all": np.ones(len(ratings), bool)}
    parts |= {str(c): (ratings["category"] == c).to_numpy() for c in sorted(ratings["category"].unique())}
    for name, rows in parts.items():
        statistics = {k: spearman_of(v[rows], rated[rows]) for k, v in predictors.items()}
        statistics |= {
            f"ahead of {k}": difference(statistics["head"], statistics[k]) for k in ("features only", "category mean")
        }
        found = estimate(statistics, ratings["theme"][rows].to_list())
        if name != "all":  # a constant there, but for the theme that is left out
            found["category mean"] = found["ahead of category mean"] = dict.fromkeys(("value", "low", "high"))
        print(f"| {name} | {rows.sum()} | " + " | ".join(_cell(v) for v in found.values()) + " |")
    print(f"shuffled ratings, {SHUFFLES} times: Spearman {np.mean(chance):.2f} in the mean, sd {np.std(chance):.2f}")


def _cell(found: dict[str, float | None]) -> str:
    if found["value"] is None:
        return "none"
    if found["low"] is None:
        return f"{found['value']:.2f}"
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


if __name__ == "__main__":
    main()
