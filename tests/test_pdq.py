"""PDQ against hashes that Meta's code gave for the same pixels, and the annotator of it."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from aesthetic.errors import UserError
from curate.annotators.base import ImageBatch
from curate.annotators.registry import load_annotator, make_annotator
from curate.duplicates.pdq import MIN_QUALITY, from_hex, pdq, pdq_mirrored, symmetries, to_hex
from curate.images.process import perceptual_hash


def drawn(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    channels = [(x * x // 97 + y * 5) % 256, (x * 3 + y * y // 41) % 256, (x * y // 53) % 256]
    return np.stack(channels, -1).astype(np.uint8)


GOLDEN = [  # by the package pdqhash 0.2.8, which wraps Meta's C++
    ("china.jpg", "bf18cef3407e8678e6833b1937d14066988e5cd2046eac5f783103f157abf50e", 100),
    ("flower.jpg", "673966dcb772a66499a69a666196a9476599a21b9649a659596624b3e58ea693", 100),
    ((90, 300), "7c1cc0ff8fd41ea0bc8f51ffe7805c21ee1f98f835c4c02b95df29384261cb90", 100),
    ((700, 333), "a78086f1afa09f80bcc3f7a2a782878a0faabf2abdaaf528252a2fa83f28bf20", 100),
    ((40, 50), "fde8c9e9555a49f941a14d99d680ff812ba9fa05e205d5152046355721a7577f", 6),
]


@pytest.mark.parametrize(("source", "text", "quality"), GOLDEN)
def test_hashes_are_those_of_the_reference(source: str | tuple[int, int], text: str, quality: int) -> None:
    image = load_sample_image(source) if isinstance(source, str) else drawn(*source)
    own, seen = pdq(image)
    assert to_hex(own) == [text] and seen == quality
    assert own.dtype == np.uint64 and (from_hex([text]) == own).all()


def test_in_strips_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = symmetries(drawn(211, 307))
    monkeypatch.setattr("curate.duplicates.pdq._STRIP", 5_000)
    assert (symmetries(drawn(211, 307)) == whole).all()


@pytest.mark.parametrize("shape", [(427, 640), (200, 90)])
def test_symmetries_are_the_hashes_of_turned_and_mirrored_images(shape: tuple[int, int]) -> None:
    image = load_sample_image("china.jpg")[: shape[0], : shape[1]]
    views = [image, image[:, ::-1], image[::-1], image[::-1, ::-1]]
    views += [view.transpose(1, 0, 2) for view in views]
    found = symmetries(image)
    assert (found == [pdq(view)[0] for view in views]).all()
    assert (pdq_mirrored(image) == found[1]).all()
    assert np.bitwise_count(found[1:] ^ found[0]).sum(1).min() > 60


def test_copies_are_near_and_others_are_not() -> None:
    china, flower = load_sample_image("china.jpg"), load_sample_image("flower.jpg")
    file = io.BytesIO()
    Image.fromarray(china).resize((320, 213)).convert("L").save(file, "JPEG", quality=50)
    copy = np.asarray(Image.open(file).convert("RGB"))
    assert np.bitwise_count(pdq(copy)[0] ^ pdq(china)[0]).sum() <= 31
    assert np.bitwise_count(pdq(flower)[0] ^ pdq(china)[0]).sum() > 80


def test_what_does_not_differ_gives_no_bits_by_chance() -> None:
    rng = np.random.default_rng(0)
    half = rng.integers(0, 256, (64, 32, 1), np.uint8).repeat(3, 2)
    symmetric = np.concatenate([half, half[:, ::-1]], 1)  # every other frequency is zero
    assert (pdq(symmetric)[0] == pdq(symmetric[:, ::-1])[0]).all()


def test_texts_that_are_no_hashes() -> None:
    assert from_hex([]).shape == (0, 4) and to_hex(np.zeros((0, 4), np.uint64)) == []
    for text in ("", "0" * 63, "0" * 65, "x" * 64, " " * 64, "0" * 64 + "\n"):
        with pytest.raises(ValueError):
            from_hex(["1" * 64, text])


def test_the_annotator() -> None:
    images = [load_sample_image("china.jpg"), np.full((512, 512, 3), 255, np.uint8), drawn(40, 50)]
    images.append(np.uint8([[[1, 2, 3]]]))
    for mirror in (False, True):
        annotator = load_annotator({"use": "pdq", "mirror": mirror})
        inputs = [annotator.preprocess(image) for image in images]
        found = annotator.annotate(ImageBatch(rows=pa.table({"key": ["a", "b", "c", "d"]}), inputs=inputs))
        assert found["hash"].to_pylist() == [GOLDEN[0][1], None, None, None]
        assert found["quality"].to_pylist() == [100, 0, 6, 0] and MIN_QUALITY == 50
        assert {name: value.type for name, value in found.items()} == {n: c.type for n, c in annotator.columns.items()}
        assert (
            annotator.annotate(ImageBatch(rows=pa.table({"key": pa.array([], pa.string())})))["hash"].to_pylist() == []
        )
    mirrored = np.ascontiguousarray(images[0][:, ::-1])
    assert found["mirror_hash"].to_pylist() == [to_hex(pdq(mirrored)[0])[0], None, None, None]
    assert found["mirror_phash"][0].as_py() == perceptual_hash(mirrored)


def test_its_options() -> None:
    assert make_annotator("x", "pdq").digest != make_annotator("x", {"use": "pdq", "mirror": True}).digest
    with pytest.raises(UserError, match="pdq has no option miror; did you mean mirror"):
        make_annotator("x", {"use": "pdq", "miror": True})
