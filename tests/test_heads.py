"""Heads: what is written is read back, what is damaged or foreign is refused, and scores are what the layers say."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from aesthetic.catalog import list_heads, load_head
from aesthetic.errors import UserError
from aesthetic.head_files import check_replaces, save_head
from aesthetic.heads import Head, HeadError
from aesthetic.model_card import describe, model_card
from aesthetic.space import Space, SpaceError

DIM = 24


def unit(n, dim=DIM, seed=0, dtype=np.float32):
    x = np.random.default_rng(seed).standard_normal((n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)


def make_head(sizes=(DIM, 1), probes=True, **more):
    rng = np.random.default_rng(1)
    layers = tuple(
        (rng.standard_normal((b, a)).astype(np.float32), rng.standard_normal(b).astype(np.float32))
        for a, b in pairwise(sizes)
    )
    space = Space(
        encoder="test", dim=sizes[0], norm="l2", probes=unit(16, sizes[0]) if probes else None, details={"a": 1}
    )
    return Head(
        **({"name": "taste", "task": "aesthetic", "space": space, "scale": (1.0, 7.0), "layers": layers} | more)
    )


def test_scores_are_what_the_layers_say():
    affine, deep = make_head(), make_head((DIM, 32, 8, 1))
    x = unit(40_000)  # more than a chunk
    (w, b) = affine.layers[0]
    np.testing.assert_allclose(affine(x), (x.astype(np.float64) @ w.T + b)[:, 0], atol=1e-5)
    y = x.astype(np.float64)
    for w, b in deep.layers[:-1]:
        y = np.maximum(y @ w.T + b, 0)
    w, b = deep.layers[-1]
    np.testing.assert_allclose(deep(x), (y @ w.T + b)[:, 0], atol=2e-4)
    assert affine(x).dtype == np.float32
    assert affine(x[:0]).shape == (0,)


def test_float16_and_float64_vectors_score_alike():
    head, x = make_head(), unit(100, dtype=np.float64)
    np.testing.assert_allclose(head(x.astype(np.float16)), head(x), atol=0.02)
    np.testing.assert_allclose(head(x.astype(np.float32)), head(x), atol=1e-6)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (unit(3, DIM + 1), rf"shape \(n, {DIM}\)"),
        (unit(3)[0], rf"shape \(n, {DIM}\)"),
        (np.ones((2, DIM), np.int64), "float type"),
        (np.concatenate([unit(2), 3 * unit(1)]), "row 2 has norm 3"),
    ],
)
def test_vectors_that_cannot_be_scored_are_refused(vectors, message):
    with pytest.raises(HeadError, match=message):
        make_head()(vectors)


def test_a_head_of_longer_vectors_refuses_unit_ones():
    """Simulacra's heads as they were fitted: on unit vectors they would give 6.5 to 7.1 for everything."""
    head = make_head(space=Space(encoder="test", dim=DIM, norm="l2_sqrt_d"))
    x = unit(5)
    long = x * np.float32(DIM**0.5)
    (w, b) = head.layers[0]
    np.testing.assert_allclose(head(long), long @ w[0] + b[0], atol=1e-5)
    with pytest.raises(HeadError, match=r"takes vectors of norm 4\.899 \(l2_sqrt_d\); row 0 has norm 1"):
        head(x)
    any_norm = make_head(space=Space(encoder="test", dim=DIM, norm="none"))
    assert np.isfinite(any_norm(3 * x)).all()


def test_a_row_with_nan_scores_nan_and_harms_no_other():
    x = unit(3)
    x[1, 5] = np.nan
    assert np.isnan(make_head()(x)).tolist() == [False, True, False]


@pytest.mark.parametrize("probes", [True, False])
@pytest.mark.parametrize("sizes", [(DIM, 1), (DIM, 32, 8, 1)])
def test_a_head_comes_back_as_it_was(tmp_path, sizes, probes):
    card = {"licence": "MIT", "about": "Bäume", "metrics": {"spearman": {"value": 0.5}}, "limits": ["few images"]}
    head = make_head(sizes, probes, card=card)
    folder = save_head(head, tmp_path / "taste.head")
    again = load_head(folder)
    x = unit(50)
    assert np.array_equal(again(x), head(x))
    assert (again.name, again.task, again.scale, again.card) == (head.name, head.task, head.scale, head.card)
    assert again.space.fingerprint == head.space.fingerprint
    assert again.digest == head.digest
    assert sorted(p.name for p in folder.iterdir()) == ["MODEL_CARD.md", "head.json", "head.safetensors"]
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    save_head(again, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert load_head(str(folder)).digest == head.digest
    text = (folder / "MODEL_CARD.md").read_text()
    assert "license: mit" in text
    assert "scale of 1 to 7" in text
    assert "few images" in text


def test_a_sigmoid_at_the_end_gives_probabilities(tmp_path):
    plain, classifier = make_head(), make_head(link="sigmoid", scale=(0.0, 1.0))
    x = unit(50)
    np.testing.assert_allclose(classifier(x), 1 / (1 + np.exp(-plain(x).astype(np.float64))), atol=1e-6)
    x[1, 5] = np.nan
    assert np.isnan(classifier(x)).sum() == 1
    with np.errstate(all="raise", under="ignore"):
        for sign in (-1, 1):
            steep = make_head(link="sigmoid", scale=(0, 1), layers=((sign * 1e6 * unit(1), np.zeros(1, np.float32)),))
            assert steep(unit(1)).tolist() == [max(sign, 0)]

    again = load_head(save_head(classifier, tmp_path))
    assert again.link == "sigmoid"
    assert again.digest == classifier.digest
    text = (tmp_path / "MODEL_CARD.md").read_text()
    assert "then a sigmoid" in text
    assert "not clipped" not in text


DIGESTS = {  # computed before there were links
    "laion-v1-b32": "4e194ead59cecd60",
    "laion-v1-l14": "d8b2731ea3a08ed4",
    "laion-v2": "fcc1a7f81dd4e7b3",
}


def test_heads_from_before_there_were_links_are_read_and_keep_their_digest(tmp_path):
    head = make_head()
    about = json.loads((save_head(head, tmp_path) / "head.json").read_text())
    assert "link" not in about
    assert load_head(tmp_path).link == "identity"
    assert make_head(scale=(0.0, 1.0)).digest != make_head(scale=(0.0, 1.0), link="sigmoid").digest
    assert {name: load_head(name).digest for name in DIGESTS} == DIGESTS


def test_safetensors_reads_our_files_too(tmp_path):
    from safetensors.numpy import load_file

    head = make_head()
    tensors = load_file(save_head(head, tmp_path / "h") / "head.safetensors")
    assert np.array_equal(tensors["layers.0.weight"], head.layers[0][0])


def test_the_digest_changes_with_what_a_score_depends_on():
    head = make_head()
    w, b = head.layers[0]
    others = [
        make_head(layers=((w, b + 1),)),
        make_head(scale=(0.0, 7.0)),
        make_head(probes=False),
        make_head(name="x"),
    ]
    assert len({head.digest, *(h.digest for h in others)}) == 5
    assert make_head(card={"about": "other"}).digest == head.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../x"}, "cannot name a head"),
        ({"scale": (7.0, 1.0)}, "scale"),
        ({"scale": (0.0, float("inf"))}, "scale"),
        ({"layers": ()}, "0 layers"),
        ({"layers": ((np.zeros((2, DIM), np.float32), np.zeros(2, np.float32)),)}, "gives 2 numbers"),
        ({"layers": ((np.zeros((1, 5), np.float32), np.zeros(1, np.float32)),)}, f"its input has {DIM}"),
        ({"layers": ((np.zeros((1, DIM)), np.zeros(1)),)}, "must be float32"),
        ({"layers": ((np.full((1, DIM), np.nan, np.float32), np.zeros(1, np.float32)),)}, "not finite"),
        ({"link": "softplus"}, "the link is 'softplus'; it is one of identity, sigmoid"),
        ({"link": "sigmoid"}, "scale is 1 to 7; a sigmoid's scores are on a scale of 0 to 1"),
    ],
)
def test_a_head_that_makes_no_sense_cannot_be_built(change, message):
    with pytest.raises(HeadError, match=message):
        make_head(**change)


def container(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


SIZE = 4 * DIM
GOOD = {"layers.0.weight": entry([1, DIM], 0, SIZE), "layers.0.bias": entry([1], SIZE, SIZE + 4)}
BODY = bytes(SIZE + 4)
NAN = np.full(DIM + 1, np.nan, np.float32).tobytes()


def test_the_hand_made_container_is_good_before_it_is_spoilt(tmp_path):
    put_weights(tmp_path, container(GOOD, BODY))
    assert load_head(tmp_path)(unit(2)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (b"", "header too small"),
        (container(GOOD, BODY)[:40], "claims a header"),
        (struct.pack("<Q", 1 << 60) + b"{}", "claims a header"),
        (struct.pack("<Q", 100 << 10) + b" " * (200 << 10), "claims a header"),
        (container(b"[1]", BODY), "invalid JSON in header"),
        (container(b"{" * 5000, BODY), "invalid JSON in header"),
        (container(b'{"a": 1, "a": 2}', BODY), "invalid JSON in header"),
        (container(json.dumps(GOOD)[:-1].encode() + b", " + json.dumps(GOOD)[1:].encode(), BODY), "occurs twice"),
        (container(GOOD, BODY[:-1]), "not fully covered"),
        (container(GOOD, BODY + b"x"), "not fully covered"),
        (container(GOOD | {"more": entry([0], SIZE + 4, SIZE + 4)}, BODY), "unknown: more"),
        (container({"layers.0.weight": entry([1, DIM], 0, SIZE)}, BODY[:-4]), "missing or unknown: layers.0.bias"),
        (
            container(GOOD | {"layers.0.weight": entry([DIM, 1], 0, SIZE)}, BODY),
            r"layers.0.weight is of shape \(24, 1\)",
        ),
        (container(GOOD | {"layers.0.weight": entry([1, DIM], 0, SIZE, "I32")}, BODY), "layers.0.weight is I32"),
        (container(GOOD | {"layers.0.weight": entry([1, 2 * DIM], 0, SIZE, "F16")}, BODY), "is F16, not float32"),
        (container(GOOD | {"layers.0.weight": entry([1, DIM], -SIZE, 0)}, BODY), "invalid JSON in header"),
        (container(GOOD | {"layers.0.bias": entry([1], 0, 4)}, BODY), "invalid offset"),
        (container(GOOD | {"layers.0.bias": entry([1], SIZE + 4, SIZE + 8)}, BODY + bytes(4)), "invalid offset"),
        (container(GOOD, NAN), "not finite"),
    ],
)
def test_weights_that_do_not_say_what_head_json_says_are_refused(tmp_path, weights, message):
    put_weights(tmp_path, weights)
    with pytest.raises(HeadError, match=message):
        load_head(tmp_path)


def put_weights(folder, weights):
    """A head whose head.json vouches for these bytes: the sha256 alone would refuse them all."""
    save_head(make_head(probes=False), folder)
    (folder / "head.safetensors").write_bytes(weights)
    about = json.loads((folder / "head.json").read_text())
    about["sha256"]["head.safetensors"] = hashlib.sha256(weights).hexdigest()
    (folder / "head.json").write_text(json.dumps(about))


def test_what_people_read_says_how_good_it_is_and_what_is_not_known():
    card = {
        "about": "Beauty. " * 40,
        "metrics": {"spearman": {"value": 0.6, "low": 0.5, "high": 0.7}, "n": 317},
        "quantiles": {"of": "somewhere", "5%": 3.1, "50%": 4.7, "99%": 5.8},
        "thresholds": {">= 5": "some recipe"},
        "limits": ["few images " * 20, "no drawings"],
    }
    text = describe(make_head(card=card))
    assert max(map(len, text.splitlines())) <= 100
    for words in ("scale of 1 to 7", "0.6 [0.5, 0.7]", "some recipe", "- few images", "- no drawings", "test"):
        assert words in text
    places = [text.index(words) for words in ("spearman", "n    ", "5%", "50%", "99%", ">= 5", "- few")]
    assert places == sorted(places)
    assert "`" not in text
    bare = describe(make_head())
    assert "not measured" in bare
    assert "top(COLUMN, 0.1)" in bare
    for name in list_heads():
        assert max(map(len, describe(load_head(name)).splitlines())) <= 200  # addresses are not broken


def test_a_changed_byte_is_found(tmp_path):
    save_head(make_head(), tmp_path)
    data = bytearray((tmp_path / "head.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "head.safetensors").write_bytes(data)
    with pytest.raises(HeadError, match="sha256"):
        load_head(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "tastemaker-head/9"}, "tastemaker-head/9"),
        ({"scale": [1]}, "missing or of the wrong type"),
        ({"scale": [9, 1]}, "scale"),
        ({"space": None}, "missing or of the wrong type"),
        ({"layers": [DIM]}, "do not make a head"),
        ({"layers": [DIM, 10**9, 1], "activation": "relu"}, "missing or unknown"),
        ({"activation": "tanh"}, "missing or of the wrong type"),
        ({"activation": "relu"}, "do not make a head"),
        ({"name": "../../x"}, "cannot name a head"),
        ({"sha256": {}}, "missing or of the wrong type"),
        ({"link": "exp"}, "the link is 'exp'"),
        ({"link": None}, "wrong type: link"),
    ],
)
def test_a_head_json_that_makes_no_sense_is_refused(tmp_path, change, message):
    save_head(make_head(), tmp_path)
    about = json.loads((tmp_path / "head.json").read_text())
    (tmp_path / "head.json").write_text(json.dumps(about | change))
    with pytest.raises(HeadError, match=message):
        load_head(tmp_path)


def test_a_space_edited_by_hand_is_refused(tmp_path):
    save_head(make_head(), tmp_path)
    about = json.loads((tmp_path / "head.json").read_text())
    about["space"]["fingerprint"] = "0" * len(about["space"]["fingerprint"])
    (tmp_path / "head.json").write_text(json.dumps(about))
    with pytest.raises(HeadError, match="edited by hand"):
        load_head(tmp_path)


def test_names_are_found_or_the_nearest_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TASTEMAKER_HEADS", str(tmp_path / "mine"))
    with pytest.raises(HeadError, match="Did you mean laion-v2"):
        load_head("laion_v2")
    with pytest.raises(HeadError, match=r"heads import ava\+logos-l14-reluMSE\.pth"):
        load_head("laion-v2-relu")
    (tmp_path / "x.pth").write_bytes(b"")
    with pytest.raises(HeadError, match="tastemaker heads import"):
        load_head(tmp_path / "x.pth")
    with pytest.raises(HeadError, match=r"without head\.json"):
        load_head(tmp_path)
    save_head(make_head(), tmp_path / "mine" / "taste")
    assert "taste" in list_heads()
    assert load_head("taste").name == "taste"


def test_shipped_heads_load_and_their_cards_are_current():
    from aesthetic.catalog import SHIPPED
    from aesthetic.model_card import model_card

    assert {"laion-v1-l14", "laion-v1-b32", "laion-v2"} <= set(list_heads())
    for path in SHIPPED.glob("*/head.json"):
        folder = path.parent
        head = load_head(folder.name)
        assert head.name == folder.name
        assert head.card["licence"]
        assert (folder / "MODEL_CARD.md").read_text() == model_card(head)


def test_importing_the_package_is_light():
    code = """
import sys, aesthetic, aesthetic.heads
assert "safetensors" not in sys.modules  # which reads weights, without torch
aesthetic.load_head('laion-v2')
print(*sys.modules)
"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "pandas", "scipy", "sklearn", "pyarrow", "cv2", "onnxruntime"} & set(loaded)


WEIRD = [
    *(None, True, 0, -1, 10**30, 10**400, 1e308, float("inf"), "", "x", "~nobody", "\ud800", [], [1], {}, {"a": 1}),
    *([[]], [{"a": 1}, 2], {"value": 1, "low": None, "high": 2}, "9" * 5000),
]


def places(value, above=()):
    yield above
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*above, key))


def changed(value, place, to):
    if not place:
        return to
    value = json.loads(json.dumps(value))
    at = value
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = to
    return value


def use(folder):
    """All that is done with a head that was read."""
    head = load_head(folder)
    assert json.dumps([describe(head), model_card(head), head.digest, head.card], allow_nan=False).encode()
    with np.errstate(over="ignore", invalid="ignore"):
        head(unit(2))


def test_whatever_a_head_json_or_a_space_holds_is_read_or_refused(tmp_path):
    """Each field in turn replaced by each of the values above."""
    card = {"metrics": {"spearman": {"value": 0.5, "low": 0.4, "high": 0.6}}, "limits": ["a"], "about": "b"}
    path = save_head(make_head(card=card), tmp_path / "h") / "head.json"
    make_head().space.save(tmp_path / "space.json")
    head, space = json.loads(path.read_text()), json.loads((tmp_path / "space.json").read_text())
    refused = 0
    for file, value, read in ((path, head, use), (tmp_path / "space.json", space, Space.load)):
        changes = [(place, to) for place in places(value) for to in WEIRD]
        for place, to in changes:
            file.write_text(json.dumps(changed(value, place, to)))
            try:
                read(file.parent if read is use else file)
            except UserError as e:
                refused += 1
                assert str(tmp_path) in str(e) or isinstance(e, HeadError | SpaceError), e
    assert refused > 400


def test_nesting_of_any_depth_is_refused(tmp_path):
    path = save_head(make_head(card={"limits": []}), tmp_path / "h") / "head.json"
    inside = path.read_text().replace('"limits": []', f'"limits": {"[" * 500}{"]" * 500}')
    for deep in ("[" * 100_000, '{"card":' + "[" * 100_000, inside):
        path.write_text(deep)
        with pytest.raises(HeadError, match=r"head\.json"):
            use(tmp_path / "h")
    (tmp_path / "space.json").write_text("[" * 100_000)
    with pytest.raises(SpaceError, match="nested too deep"):
        Space.load(tmp_path / "space.json")


def test_what_is_no_file_is_no_head(tmp_path):
    folder = save_head(make_head(), tmp_path / "h")
    (folder / "head.safetensors").unlink()
    os.mkfifo(folder / "head.safetensors")  # who opens it waits for ever
    with pytest.raises(HeadError, match="is a pipe, not a file"):
        load_head(folder)
    for name in ("~nobody/x", "a\0b", "x" * 5000, tmp_path / "nowhere"):
        with pytest.raises(HeadError, match="no head"):
            load_head(name)


def test_another_head_is_not_written_over(tmp_path):
    folder = save_head(make_head(), tmp_path / "h")
    check_replaces(folder, make_head())
    check_replaces(tmp_path / "free", make_head())
    for other in (make_head(card={"about": "another"}), make_head(scale=(0.0, 7.0))):
        with pytest.raises(HeadError, match="holds another head already"):
            check_replaces(folder, other)
    (folder / "head.safetensors").write_bytes(b"cut")
    check_replaces(folder, make_head())  # a damaged one can be made anew
