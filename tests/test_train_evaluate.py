"""What an evaluation's figures mean: each is fed something whose true value is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from aesthetic.errors import UserError
from curate.store.files import write_json
from tests.small_train import make_images, small_run
from train.data import ImageDataset, open_samples
from train.evaluate.evaluation import encode_images
from train.evaluate.figures import (
    MIN_FRECHET,
    InDomainSpace,
    clip_score,
    clip_score_of,
    difference,
    frechet,
    kernel,
    kid,
    kid_floor,
    mean,
    memorisation,
    mmd2,
    nearest_training,
    retrieval,
    scaled,
    share,
)
from train.evaluate.heldout import distinct_captions, find_held_out, in_hash_order, losses
from train.models.family import load_model, tokenize
from train.models.presets import PRESETS
from train.split import split

RNG = np.random.default_rng(0)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# ---------------------------------------------------------------------------------------------------------------- loss


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_images(tmp_path_factory.mktemp("evaluate") / "discs")


def test_the_loss_by_image_and_time_averages_to_what_training_measures(discs: Path, tmp_path: Path) -> None:
    record = list(small_run(discs, tmp_path, steps=1))[-1]
    pipeline = load_model(Path(record["checkpoint"]) / "pipeline")
    samples = open_samples(discs)
    _, held = split(samples, 0.2)
    images = ImageDataset(samples, lambda c: tokenize(pipeline, c), PRESETS["debug"].size)
    told: list[int] = []
    found = losses(pipeline, images, held[::-1].copy(), seed=0, on_done=told.append)
    assert found.shape == (len(held), 8) and sum(told) == len(held)
    assert found.mean() == pytest.approx(record["held_out"]["ema"], rel=1e-6)
    assert np.ptp(found.mean(0)) > 0.05  # times differ
    one = losses(pipeline, images, held[:1], seed=0)
    np.testing.assert_allclose(one[0], found[-1], rtol=1e-4)  # whatever it is measured with
    assert not np.allclose(losses(pipeline, images, held[:1], seed=1), one)  # other noise


@pytest.mark.long
def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    found = [mean(rng.gamma(2.0, 1.0, 60), seed=i) for i in range(120)]
    inside = np.mean([e["low"] < 2 < e["high"] for e in found])
    assert 0.88 < inside <= 1
    gaps = [difference(rng.normal(1, 1, 40), rng.normal(0, 2, 50), paired=False, seed=i) for i in range(100)]
    assert 0.86 < np.mean([e["low"] < 1 < e["high"] for e in gaps]) <= 1
    a = rng.normal(0, 5, 50)
    paired = difference(a + 1 + rng.normal(0, 0.1, 50), a, paired=True)
    assert paired["high"] - paired["low"] < 0.1 < abs(paired["value"])  # what both share cancels out


def test_the_interval_of_a_share_is_wilsons() -> None:
    from scipy.stats import binomtest

    for hits, n in ((0, 16), (3, 20), (20, 20)):
        found = share(np.arange(n) < hits)
        theirs = binomtest(hits, n).proportion_ci(method="wilson")
        assert found["value"] == hits / n
        np.testing.assert_allclose([found["low"], found["high"]], theirs, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ retrieval


def test_retrieval_tells_images_that_follow_their_captions_from_those_that_do_not() -> None:
    rng = np.random.default_rng(2)
    texts = unit(rng.normal(size=(40, 64)))
    good = retrieval(unit(texts + 0.5 * unit(rng.normal(size=(40, 64)))), texts)
    assert good["recall_at_1"]["value"] > 0.9 > 0.2 > good["recall_at_1"]["shuffled"]["high"]
    deaf = retrieval(unit(rng.normal(size=(40, 64))), texts)
    for name, chance in (("recall_at_1", 1 / 40), ("recall_at_5", 5 / 40), ("similarity", 0)):
        shuffled = deaf[name]["shuffled"]
        assert shuffled["low"] <= deaf[name]["value"] <= shuffled["high"]  # seeded; true of 95 in 100
        assert shuffled["value"] == pytest.approx(chance, abs=0.01)
    assert retrieval(texts, texts, seed=3) == retrieval(texts, texts, seed=3)


def test_recall_is_what_a_loop_counts_and_ties_count_as_often_as_order_decides() -> None:
    rng = np.random.default_rng(3)
    images, texts = unit(rng.normal(size=(12, 8))), unit(rng.normal(size=(12, 8)))
    hits = [sum(p @ t > p @ texts[i] for t in texts) < 5 for i, p in enumerate(images)]
    assert retrieval(images, texts)["recall_at_5"]["value"] == pytest.approx(np.mean(hits))
    same = np.repeat(texts[:1], 12, axis=0)  # an encoder that can't tell captions apart gets what chance gets
    assert retrieval(images, same)["recall_at_1"]["value"] == pytest.approx(1 / 12)
    one = np.repeat(images[:1], 12, axis=0)  # so does a model that draws one image for all of them
    assert retrieval(one, texts)["recall_at_1"]["value"] == pytest.approx(1 / 12)


def test_the_in_domain_space_finds_what_images_and_captions_share() -> None:
    rng = np.random.default_rng(4)
    hidden, seen, said = rng.normal(size=(400, 6)), rng.normal(size=(6, 30)), rng.normal(size=(6, 20))
    images = unit(hidden @ seen + 0.3 * rng.normal(size=(400, 30)))
    texts = np.hstack([unit(hidden @ said + 3), np.zeros((400, 4))])
    space = InDomainSpace(images[:350], texts[:350])
    mapped, words = space.images(images[350:]), space.texts(texts[350:])
    assert mapped.shape == words.shape == (50, 20)
    found = retrieval(mapped, words)["recall_at_1"]
    assert found["value"] > 0.5 > found["shuffled"]["high"]
    shuffled = InDomainSpace(images[:350], texts[rng.permutation(350)])  # nothing to be found
    found = retrieval(shuffled.images(images[350:]), shuffled.texts(texts[350:]))["recall_at_1"]
    assert found["value"] <= 0.1


def test_clip_score_is_that_of_its_paper_and_only_of_its_models() -> None:
    images, texts = np.eye(3), unit(np.array([[1.0, 0, 0], [1, 1, 0], [0, 0, -1]]))
    np.testing.assert_allclose(clip_score(images, texts), [2.5, 2.5 / np.sqrt(2), 0])
    assert clip_score_of("open_clip:ViT-B-32-quickgelu/openai") == "ViT-B/32"
    assert clip_score_of("open_clip:ViT-L-14/openai") == "ViT-L/14"
    assert clip_score_of("open_clip:ViT-L-14/laion2b_s32b_b82k") is None and clip_score_of("bundled") is None


# --------------------------------------------------------------------------------------------------------- memorisation


def test_a_model_that_replays_training_images_is_found_and_one_that_does_not_is_not(discs: Path) -> None:
    """Real images through the function that looks at them; the space is what they are at 4 x 4."""
    samples = open_samples(discs)

    class Small:
        """The least encoder: an image's own pixels."""

        def encode_images(self, images: list[np.ndarray]) -> np.ndarray:
            small = np.stack([image[::4, ::4].astype(np.float32).ravel() for image in images])
            return unit(small - 255 + RNG.normal(0, 1e-3, (len(small), 1)))

    def decoded(numbers: range, noise: int = 0) -> list[np.ndarray]:
        from train.data import decode_sample

        rng = np.random.default_rng(5)
        found = [decode_sample(samples[i], 24) for i in numbers]
        return [np.clip(p + rng.normal(0, noise, p.shape), 0, 255).astype(np.uint8) for p in found]

    def seen(images: list[np.ndarray]) -> dict[str, np.ndarray]:
        return encode_images(images, {"vectors": Small()})  # type: ignore[dict-item]

    training, held = seen(decoded(range(36))), seen(decoded(range(36, 64)))
    real = nearest_training(held, training)
    replayed = memorisation(nearest_training(seen(decoded(range(20), noise=2)), training), real)
    assert replayed["close"]["value"] > 0.9 and replayed["close"]["low"] > 0.5
    assert replayed["copies"] >= 15 and replayed["median"] > 0.99
    near = nearest_training(seen(decoded(range(3))), training)
    assert near.indices[:, 0].tolist() == [0, 1, 2] and near.bits[:, 0].tolist() == [0, 0, 0]
    assert (np.diff(near.cosines, axis=1) <= 0).all()
    honest = memorisation(real, real)
    assert honest["close"]["value"] == pytest.approx(0.05, abs=0.04) and honest["close"]["low"] < 0.05
    assert honest["close"]["expected"] == pytest.approx(0.05)
    few = {name: values[:10] for name, values in held.items()}
    assert memorisation(real, nearest_training(few, training))["close"] is None


# ------------------------------------------------------------------------------------------------------------ distances


def test_kid_is_what_loops_over_pairs_give() -> None:
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(9, 5)), rng.normal(1, 1, size=(7, 5))

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((np.dot(a, b) / 5 + 1) ** 3)

    xx = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    assert mmd2(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)
    assert kernel(x, y).shape == (9, 7)
    np.testing.assert_allclose(np.linalg.norm(scaled(x), axis=1), np.sqrt(5))
    whole = kid(x, y, subset=7, subsets=3)
    assert whole.subset == 7 and whole.subsets == 3
    assert kid(x[:7], y, subset=7, subsets=2).mean == pytest.approx(mmd2(scaled(x[:7]), scaled(y)))


def test_kid_of_two_halves_is_unbiased_and_grows_with_what_differs() -> None:
    rng = np.random.default_rng(7)
    found = [kid(*rng.normal(size=(2, 12, 6)), subset=10, subsets=4, seed=i).mean for i in range(60)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * error and min(found) < 0 < max(found)
    one, other = rng.normal(size=(2, 300, 6))
    floor = kid_floor(one, subset=100)
    assert abs(floor.mean) < 3 * floor.sd
    apart = [kid(one, other + shift, subset=100).mean for shift in (0.3, 1.0, 3.0)]
    assert 3 * floor.sd < apart[0] < apart[1] < apart[2]
    assert kid(one, other, subset=50, seed=1) == kid(one, other, subset=50, seed=1)
    with pytest.raises(ValueError, match="subsets of 400"):
        kid(one, other, subset=400)
    with pytest.raises(ValueError, match="two subsets of 151"):
        kid_floor(one, subset=151)


def test_the_frechet_distance_is_right_and_never_given_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(MIN_FRECHET, 4)) @ rng.normal(size=(4, 4)), rng.normal(0.5, 1, size=(MIN_FRECHET, 4))
    a, b = scaled(x), scaled(y)
    cross = sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    theirs = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * cross)
    assert frechet(x, y) == pytest.approx(theirs, rel=1e-6)
    assert frechet(x, x) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="at least 10000"):
        frechet(x[:-1], y)


# ------------------------------------------------------------------------------------------- what it was not trained on


def record(folder: Path, samples: Path, **more: object) -> Path:
    """A model's folder that says it was trained on these."""
    there = open_samples(samples)
    facts = {"settings": {"data": there.fingerprint, "seed": 0}, "data": {"folder": str(samples)}, **more}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "train.json", facts)
    return folder


def test_a_models_own_held_out_images_are_measured_on(discs: Path, tmp_path: Path) -> None:
    samples, model = open_samples(discs), record(tmp_path / "model", discs)
    chosen, held = split(samples)
    found = find_held_out(model, samples)  # split again: data.json is gone
    assert found.indices.tolist() == held.tolist() and found.trained_on.tolist() == chosen.tolist()
    write_json(model / "data.json", {"data": samples.fingerprint, "held_out": [3, 5], "unreadable": {"7": "broken"}})
    checkpoint = model / "checkpoints" / "000010" / "pipeline"
    for place in (model, checkpoint):
        found = find_held_out(place, samples)
        assert found.indices.tolist() == [3, 5] and found.unreadable == 1 and len(found.trained_on) == 61
        assert found.training is samples and "held out by the training run" in found.note


def test_of_other_images_near_duplicates_of_training_images_are_taken_out(discs: Path, tmp_path: Path) -> None:
    others = make_images(tmp_path / "others", 40)  # the first forty of them again, but for the colours below
    rng = np.random.default_rng(9)
    import cv2

    for i in range(10):
        fresh = cv2.resize(rng.integers(0, 256, (6, 6, 3), np.uint8), (24, 24), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(others / f"{i:03d}.png"), fresh)
    model = record(tmp_path / "model", discs)
    write_json(model / "data.json", {"data": open_samples(discs).fingerprint, "held_out": [], "unreadable": {}})
    found = find_held_out(model, open_samples(others))
    assert set(range(10)) == set(found.indices.tolist()), found.note
    assert "30 more are left out as near-duplicates" in found.note
    with pytest.raises(UserError, match="no image to measure on"):
        find_held_out(model, replace_folder(open_samples(discs), tmp_path))
    gone = find_held_out(
        record(tmp_path / "gone", discs, data={"folder": str(tmp_path / "nowhere")}), open_samples(others)
    )
    assert len(gone.indices) == 40 and gone.training is None and "no longer in nowhere" in gone.note
    nothing = find_held_out(tmp_path, open_samples(others))
    assert len(nothing.indices) == 40 and nothing.training is None and "may have seen" in nothing.note


def replace_folder(samples: object, folder: Path) -> object:
    """The same images under another name: other samples, all of them near-duplicates."""
    import shutil

    copied = folder / "copied"
    shutil.copytree(samples.folder, copied)  # type: ignore[attr-defined]
    (copied / "000.txt").write_text("another caption")
    return open_samples(copied)


def test_captions_differ_and_their_order_is_that_of_keys_alone(discs: Path) -> None:
    samples = open_samples(discs)
    order = in_hash_order(samples, np.arange(64))
    assert sorted(order.tolist()) == list(range(64)) and order.tolist() != list(range(64))
    assert in_hash_order(samples, order).tolist() == order.tolist()
    chosen = distinct_captions(samples, order, 10)
    assert len(chosen) == 4 and len({samples.facts(i)["caption"] for i in chosen}) == 4
    assert distinct_captions(samples, order, 2) == chosen[:2]
