"""Published heads: the real files score as published, and files that are programs never run."""

import hashlib
import http.server
import io
import json
import pickle
import struct
import threading
import zipfile
from collections import OrderedDict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from aesthetic import imports as module
from aesthetic.catalog import SHIPPED, keras_files, load_head, published_heads
from aesthetic.head_files import save_head
from aesthetic.heads import HeadError
from aesthetic.imports import build_published, collapse, download, fetch_head, import_head
from aesthetic.pth import read_pth
from pipelines.cli import main

DATA = Path(__file__).parents[2] / "shared" / "data" / "heads"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published files are not here")

GOLDEN = {
    "laion-v1-b32": "-1.47 .27 1.99 3.61 5.09 6.39 7.67 8.92 9.92 11.01",
    "laion-v1-l14": "-2.46 -.14 1.90 3.58 5.10 6.47 7.79 9.05 10.23 11.30",
    "laion-v2": "1.66 2.36 3.07 3.67 4.24 4.70 5.07 5.37 5.58 5.75",
}


def examples(name):
    folder = DATA / ("vit_b_32_ratings" if name.endswith("b32") else "vit_l_14_ratings")
    return np.concatenate([np.load(folder / f"rating{i}.npy") for i in range(10)])


def published(name):
    return next(p for p in published_heads() if p.name == name)


@needs_data
@pytest.mark.parametrize("name", GOLDEN)
def test_scores_are_the_published_ones(name):
    expected = np.array(GOLDEN[name].split(), float)
    for head in (import_head(DATA / published(name).file), load_head(name)):
        np.testing.assert_allclose(head(examples(name)), expected, atol=0.006)
        assert head.affine


@needs_data
@pytest.mark.parametrize("name", GOLDEN)
def test_the_shipped_heads_are_the_published_files_converted(name, tmp_path):
    """Tensors and texts, bit for bit; the collapsed v2 may differ in last bits where another BLAS multiplied it out."""
    save_head(import_head(DATA / published(name).file), tmp_path)
    if name == "laion-v2":
        ours, shipped = load_head(tmp_path), load_head(name)
        np.testing.assert_allclose(ours.layers[0][0], shipped.layers[0][0], atol=1e-6)
        assert (ours.card, ours.scale, ours.space.fingerprint) == (
            shipped.card,
            shipped.scale,
            shipped.space.fingerprint,
        )
    else:
        for file in ("head.safetensors", "head.json", "MODEL_CARD.md"):
            assert (tmp_path / file).read_bytes() == (SHIPPED / name / file).read_bytes()


@needs_data
def test_reading_without_torch_gives_what_torch_gives():
    import torch

    for file in sorted(DATA.glob("*.pth")):
        ours = read_pth(file.read_bytes(), file.name)
        theirs = torch.load(file, map_location="cpu", weights_only=True)
        assert list(ours) == list(theirs)
        assert all(np.array_equal(ours[k], theirs[k].numpy()) for k in ours)


@needs_data
def test_the_relu_head_agrees_with_torch(tmp_path):
    import torch

    known = published("laion-v2-relu")
    head = load_head(save_head(import_head(DATA / known.file), tmp_path / "relu"))
    assert not head.affine
    state = torch.load(DATA / known.file, map_location="cpu", weights_only=True)
    x = torch.from_numpy(examples("laion-v2-relu"))
    for i in (0, 3, 6, 9):
        x = torch.relu(torch.nn.functional.linear(x, state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]))
    x = torch.nn.functional.linear(x, state["layers.11.weight"], state["layers.11.bias"])
    np.testing.assert_allclose(head(examples("laion-v2-relu")), x[:, 0].numpy(), atol=1e-5)


@needs_data
def test_a_published_file_is_known_by_its_content_not_by_its_name(tmp_path):
    (tmp_path / "download.bin").write_bytes((DATA / "sa_0_4_vit_b_32_linear.pth").read_bytes())
    assert import_head(tmp_path / "download.bin").name == "laion-v1-b32"
    assert import_head(tmp_path / "download.bin", "mine").name == "mine"


def test_collapse_is_exact_and_refuses_what_it_cannot_do():
    rng = np.random.default_rng(0)
    layers = tuple(
        ((rng.standard_normal((b, a)) / a).astype(np.float32), rng.standard_normal(b).astype(np.float32))
        for a, b in ((768, 64), (64, 16), (16, 1))
    )
    weight, bias = collapse(layers)
    x = rng.standard_normal((5, 768))
    chained = x
    for w, b in layers:
        chained = chained @ w.T + b
    np.testing.assert_allclose(x @ weight.T + bias, chained, atol=1e-4)
    huge = ((layers[0][0] * 1e6, layers[0][1] * 1e6), *layers[1:])
    with pytest.raises(HeadError, match="differ by"):
        collapse(huge)


# Files that are no published head: one linear layer, and somebody who knows what it reads -----------------------------

L14 = "open_clip:ViT-L-14-quickgelu/openai"
SAC = "sac_public_2022_06_29_vit_l_14_linear.pth"


def unit(n, dim=768, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def linear(dim=768, seed=0, prefix="linear."):
    """Tensors of a ridge head as simulacra's are: for vectors of norm sqrt(d), scores about 6 with a spread of 2."""
    weight = np.random.default_rng(seed).standard_normal((1, dim)).astype(np.float32) * np.float32(2 / dim**0.5)
    return OrderedDict({f"{prefix}weight": weight, f"{prefix}bias": np.array([6.0], np.float32)})


def saved_by_torch(path, tensors):
    import torch

    torch.save(OrderedDict((k, torch.from_numpy(v)) for k, v in tensors.items()), path)
    return path


def saved_as_safetensors(path, tensors):
    from safetensors.numpy import save_file

    save_file(dict(tensors), path)
    return path


def test_simulacras_ridge_scores_unit_vectors_as_it_scores_theirs(tmp_path):
    import torch

    tensors = linear()
    path = saved_by_torch(tmp_path / SAC, tensors)
    head = import_head(path, encoder=L14, norm="l2_sqrt_d", scale=(1, 10))
    module = torch.nn.Linear(768, 1)
    module.load_state_dict({k.removeprefix("linear."): torch.from_numpy(v) for k, v in tensors.items()})
    x = np.concatenate([unit(500), examples("laion-v2")]) if DATA.is_dir() else unit(500)
    with torch.inference_mode():
        theirs = module(torch.nn.functional.normalize(torch.from_numpy(x), dim=-1) * 768**0.5)[:, 0].numpy()
    np.testing.assert_allclose(head(x), theirs, atol=1e-5)
    assert np.ptp(theirs) > 5  # what is compared varies
    with pytest.raises(HeadError, match="takes unit vectors"):
        head(x * np.float32(768**0.5))
    assert (head.space.encoder, head.space.norm, head.space.probes) == (L14, "l2", None)
    assert (head.name, head.scale, head.task) == (SAC.removesuffix(".pth"), (1, 10), "aesthetic")
    assert "sqrt(d)" in head.card["source"] and hashlib.sha256(path.read_bytes()).hexdigest() in head.card["source"]
    assert load_head(save_head(head, tmp_path / "head")).digest == head.digest


@pytest.mark.parametrize("save", [saved_by_torch, saved_as_safetensors])
@pytest.mark.parametrize("prefix", ["", "linear.", "model.head.0."])
def test_one_linear_layer_is_taken_whatever_it_is_called(tmp_path, save, prefix):
    tensors = linear(48, prefix=prefix)
    path = save(tmp_path / "taste.file", tensors)
    head = import_head(path, "mine", encoder="bundled", scale=(0, 5), task="sharpness")
    x = unit(20, 48)
    np.testing.assert_allclose(head(x), x @ tensors[f"{prefix}weight"][0] + 6, atol=1e-5)
    assert (head.name, head.task, head.scale) == ("mine", "sharpness", (0, 5))
    assert "values unchanged" in head.card["source"]


def test_what_must_be_declared_is_told(tmp_path):
    path = saved_by_torch(tmp_path / SAC, linear())
    hint = r"none of the published heads.*--encoder open_clip:ViT-L-14-quickgelu/openai --norm l2_sqrt_d --scale 1 10"
    with pytest.raises(HeadError, match=hint):
        import_head(path)
    with pytest.raises(HeadError, match=r"--encoder ENCODER --norm l2 --scale LO HI"):
        import_head(saved_by_torch(tmp_path / "other.pth", linear()))
    with pytest.raises(HeadError, match="--scale LO HI"):
        import_head(path, encoder=L14)
    with pytest.raises(HeadError, match="scale"):
        import_head(path, encoder=L14, scale=(10, 1))
    with pytest.raises(HeadError, match="one of l2, l2_sqrt_d"):
        import_head(path, encoder=L14, scale=(1, 10), norm="none")
    with pytest.raises(HeadError, match="laion-v2 is the name of a published head"):
        import_head(path, "laion-v2", encoder=L14, scale=(1, 10))


@needs_data
def test_what_is_known_of_a_published_head_cannot_be_declared_otherwise():
    for declared in ({"encoder": L14}, {"scale": (0, 5)}, {"norm": "l2_sqrt_d"}):
        with pytest.raises(HeadError, match="is laion-v1-b32, a published head: its encoder"):
            import_head(DATA / published("laion-v1-b32").file, **declared)


# Heads of today: several layers, in bfloat16 ------------------------------------------------------------------------

SIGLIP = "open_clip:ViT-SO400M-14-SigLIP-384/webli"
V25 = "aesthetic-predictor-v2.5"


def predictor_like_v25(seed=0, activation=None):
    """Random weights in bfloat16 of the published architecture: its own module, its dropout switched off."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = []
        for inputs, outputs in pairwise((1152, 1024, 128, 64, 16, 1)):
            modules += [torch.nn.Linear(inputs, outputs), activation() if activation else torch.nn.Dropout(0.5)]
        for linear in modules[::2]:  # as lively as the published one, whose weight has a length of 25
            linear.weight.data *= 3.3
        predictor = torch.nn.Module()
        predictor.scoring_head = torch.nn.Sequential(*modules[:-1])
    return predictor.bfloat16().eval()


def scores_of_module(predictor, x):
    import torch

    with torch.inference_mode():
        return predictor.double().scoring_head(torch.from_numpy(x).double())[:, 0].numpy()


def test_aesthetic_predictor_v25_is_one_affine_map_of_its_layers(tmp_path):
    """The published file is known by its sha256; here its format and its layers, with other numbers."""
    import torch

    predictor = predictor_like_v25()
    torch.save(predictor.state_dict(), tmp_path / "aesthetic_predictor_v2_5.pth")
    known = published(V25)
    head = build_published(known, read_pth((tmp_path / known.file).read_bytes(), known.file), known.name)
    x = unit(500, 1152)
    theirs = scores_of_module(predictor, x)
    assert np.ptp(theirs) > 1  # what is compared varies
    np.testing.assert_allclose(head(x), theirs, atol=1e-5)
    assert head.affine and (head.space.encoder, head.space.dim, head.scale) == (SIGLIP, 1152, (1, 10))
    assert "AGPL-3.0" in head.card["licence"] and ">= 5.5" in head.card["thresholds"]
    assert load_head(save_head(head, tmp_path / "head")).digest == head.digest
    assert not (SHIPPED / V25).exists()
    with pytest.raises(
        HeadError,
        match=r"heads import aesthetic-predictor-v2.5` fetches it.*download .*heads import aesthetic_predictor_v2_5",
    ):
        load_head(V25)
    with pytest.raises(HeadError, match="sha256 is"):  # other numbers are not the published file
        import_head(tmp_path / known.file)


def test_layers_are_multiplied_out_where_it_is_said_that_nothing_stands_between_them(tmp_path):
    import torch
    from safetensors.torch import save_file

    predictor, x = predictor_like_v25(), unit(500, 1152)
    torch.save(predictor.state_dict(), tmp_path / "mine.pth")
    save_file(predictor.state_dict(), tmp_path / "mine.safetensors")
    for file in ("mine.pth", "mine.safetensors"):
        declared = {"encoder": SIGLIP, "scale": (1, 10)}
        with pytest.raises(
            HeadError, match=r"5 linear layers \(1152-1024-128-64-16-1\).*--activation none.*--activation"
        ):
            import_head(tmp_path / file, **declared)
        head = import_head(tmp_path / file, activation="none", **declared)
        assert head.affine and "declared without activation" in head.card["source"]
        np.testing.assert_allclose(head(x), scores_of_module(predictor, x), atol=1e-5)
        scaled = import_head(tmp_path / file, activation="none", norm="l2_sqrt_d", **declared)
        np.testing.assert_allclose(scaled(x), scores_of_module(predictor, x * 1152**0.5), atol=2e-4)


def test_layers_with_relu_stay_layers(tmp_path):
    import torch

    predictor, x = predictor_like_v25(activation=torch.nn.ReLU), unit(500, 1152)
    torch.save(predictor.state_dict(), tmp_path / "mine.pth")
    head = import_head(tmp_path / "mine.pth", encoder=SIGLIP, scale=(1, 10), activation="relu")
    assert not head.affine and load_head(save_head(head, tmp_path / "head")).digest == head.digest
    np.testing.assert_allclose(head(x), scores_of_module(predictor, x), atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "names", "message"),
    [
        ((8, 4, 4, 1), ("fc1", "fc2", "out"), None),
        ((8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 1), tuple(f"layers.{i}" for i in range(11)), None),  # 10 comes after 9
        ((8, 4, 2, 1), ("input", "hidden", "output"), None),  # in the order in which the file has them
        ((8, 4, 4, 4, 1), ("in", "b", "a", "out"), "whose names don't say which comes first"),
        ((8, 4, 2), ("0", "1"), "the last gives one number"),
    ],
)
def test_the_order_of_layers_is_that_of_their_numbers_and_shapes(tmp_path, sizes, names, message):
    rng = np.random.default_rng(0)
    layers = [((rng.standard_normal((b, a)) / a**0.5).astype("f4"), np.ones(b, "f4")) for a, b in pairwise(sizes)]
    tensors = OrderedDict()
    for name, (weight, bias) in zip(names, layers, strict=True):
        tensors |= {f"{name}.weight": weight, f"{name}.bias": bias}
    path, declared = saved_by_torch(tmp_path / "x.pth", tensors), {"encoder": SIGLIP, "scale": (0, 1)}
    if message:
        with pytest.raises(HeadError, match=message):
            import_head(path, activation="none", **declared)
        return
    x = chained = unit(20, sizes[0])
    for weight, bias in layers:
        chained = chained @ weight.T + bias
    np.testing.assert_allclose(import_head(path, activation="none", **declared)(x), chained[:, 0], atol=1e-5)


WEIGHT, BIAS = np.zeros((1, 4), np.float32), np.zeros(1, np.float32)


@pytest.mark.parametrize("save", [saved_by_torch, saved_as_safetensors])
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": WEIGHT}, r"it holds weight \[1, 4\]"),
        ({"weight": WEIGHT, "bias": BIAS, "more": BIAS}, "not linear layers alone"),
        ({"0.weight": WEIGHT, "1.bias": BIAS}, "not linear layers alone"),
        ({"weight": WEIGHT.T.copy(), "bias": BIAS}, r"weight \[4, 1\]"),
        ({"weight": WEIGHT[0], "bias": BIAS}, "not linear layers alone"),
        ({"weight": np.zeros((2, 4), np.float32), "bias": np.zeros(2, np.float32)}, "the last gives one number"),
        ({"weight": WEIGHT, "bias": np.zeros((1, 1), np.float32)}, "not linear layers alone"),
        ({"weight": np.full((1, 4), np.nan, np.float32), "bias": BIAS}, "weight holds values that are not finite"),
        ({"weight": WEIGHT, "bias": np.full(1, np.inf, np.float32)}, "bias holds values that are not finite"),
    ],
)
def test_what_is_not_linear_layers_is_refused(tmp_path, save, tensors, message):
    path = save(tmp_path / "x.file", OrderedDict(tensors))
    with pytest.raises(HeadError, match=message):
        import_head(path, encoder=L14, scale=(1, 10))


def container(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


GOOD = {"weight": entry([1, 4], 0, 16), "bias": entry([1], 16, 20)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (container(GOOD, bytes(20)), None),
        (struct.pack("<Q", 1 << 60) + b"{}", "claims a header"),
        (struct.pack("<Q", 200 << 10) + b"{" + b" " * (200 << 10), "claims a header"),
        (container(b"{" * 5000, bytes(20)), "invalid JSON in header"),
        (container(b'{"weight": 1, "weight": 2}', bytes(20)), "invalid JSON in header"),
        (container(json.dumps(GOOD)[:-1].encode() + b", " + json.dumps(GOOD)[1:].encode(), bytes(20)), "occurs twice"),
        (container(GOOD, bytes(19)), "not fully covered"),
        (container(GOOD, bytes(21)), "not fully covered"),
        (container({}, b""), "it holds no tensors"),
        (container(GOOD | {"weight": 7}, bytes(20)), "invalid JSON in header"),
        (container(GOOD | {"weight": entry([1, "4"], 0, 16)}, bytes(20)), "invalid JSON in header"),
        (container({"weight": entry([1, 0], 0, 0), "bias": entry([1], 0, 4)}, bytes(4)), "not linear layers alone"),
        (container(GOOD | {"weight": entry([1, -4], 0, 16)}, bytes(20)), "invalid JSON in header"),
        (container(GOOD | {"weight": entry([1, 10**12], 0, 16)}, bytes(20)), "invalid shape"),
        (container(GOOD | {"weight": entry([1, 10**12], 0, 4 * 10**12)}, bytes(20)), "invalid offset"),
        (container(GOOD | {"weight": entry([1, 4], 0, 16, "I32")}, bytes(20)), "weight is I32, not float32"),
        (container(GOOD | {"bias": entry([1], 0, 4)}, bytes(20)), "invalid offset"),
        (bytes(17 << 20), "at most 16,777,216"),
    ],
)
def test_a_safetensors_file_is_believed_no_more_than_a_pickle(tmp_path, data, message):
    (tmp_path / "x.safetensors").write_bytes(data)
    if message is None:
        assert import_head(tmp_path / "x.safetensors", encoder=L14, scale=(1, 10)).space.dim == 4
        return
    with pytest.raises(HeadError, match=message):
        import_head(tmp_path / "x.safetensors", encoder=L14, scale=(1, 10))


@pytest.mark.parametrize("member", ["clip_nsfw/saved_model.pb", "keras_metadata.pb", "model.weights.h5"])
def test_keras_models_are_known_and_refused(tmp_path, member, monkeypatch):
    path = tmp_path / "nsfw.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, b"\x08\x01")
    for declared in ({}, {"encoder": L14, "scale": (0, 1)}):
        with pytest.raises(HeadError, match=r"is a Keras model: a program.*heads prompt.*open-nsfw"):
            import_head(path, **declared)
    assert len(keras_files()) == 2
    known = {hashlib.sha256(path.read_bytes()).hexdigest(): "LAION's CLIP NSFW head on X"}
    monkeypatch.setattr(module, "keras_files", lambda: known)
    with pytest.raises(HeadError, match="is a Keras model, LAION's CLIP NSFW head on X: a program"):
        import_head(path)


def test_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TASTEMAKER_HEADS", str(tmp_path / "heads"))
    path = saved_by_torch(tmp_path / SAC, linear())
    assert main(["heads", "import", str(path)]) == 2
    assert "--norm l2_sqrt_d --scale 1 10" in capsys.readouterr().err
    words = ["--norm", "l2_sqrt_d", "--scale", "1", "10"]
    assert main(["heads", "import", str(path), "--encoder", "ViT-L-14", *words]) == 2
    assert "open_clip:ARCH/PRETRAINED" in capsys.readouterr().err
    assert main(["heads", "import", str(path), "--encoder", "open_clip:ViT-L-14-quickgelu/OpenAI", *words]) == 0
    out = capsys.readouterr().out
    assert L14 in out  # by its canonical name
    assert "not measured" in out
    name = SAC.removesuffix(".pth")
    assert load_head(name).scale == (1, 10)
    assert main(["heads"]) == 0
    assert name in capsys.readouterr().out
    assert main(["heads", "show", name]) == 0
    out = capsys.readouterr().out
    assert "Encoder, norm and scale are as declared" in out
    assert f"next: tastemaker annotate DATA {name}={name}" in out
    assert main(["heads", "show", "open-nsfw"]) == 0
    assert "it reads pixels" in capsys.readouterr().out
    assert main(["heads", "show", name, "--norm", "l2"]) == 2
    assert "heads show takes no --norm" in capsys.readouterr().err
    assert main(["heads", "import", "nothing.pth"]) == 2
    assert "no file here, and no published head" in capsys.readouterr().err
    assert main(["heads", "import", "nothing.pth", "--encoder", L14]) == 2
    assert "there is no file nothing.pth" in capsys.readouterr().err


def test_a_damaged_head_hides_no_other_in_the_list(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TASTEMAKER_HEADS", str(tmp_path))
    save_head(import_head(saved_by_torch(tmp_path / "a.pth", linear()), encoder=L14, scale=(1, 10)), tmp_path / "a")
    (tmp_path / "a" / "head.safetensors").write_bytes(b"")
    assert main(["heads"]) == 0
    out = capsys.readouterr().out
    assert "a " in out and "damaged" in out and "laion-v2" in out


# Files that torch itself writes, and files that nobody should open ---------------------------------------------------


def test_other_float_types_and_todays_torch_files_are_read():
    import torch

    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        value = torch.randn(3, 5).to(dtype)
        file = io.BytesIO()
        torch.save(OrderedDict(weight=value, bias=torch.randn(3)), file)
        ours = read_pth(file.getvalue(), "x.pth")
        assert np.array_equal(ours["weight"], value.float().numpy())


class Canary:
    """A pickle that would write a file; what a hostile checkpoint would do worse."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def checkpoint(program, storages=(), compression=zipfile.ZIP_STORED, **more):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        for i, numbers in enumerate(storages):
            archive.writestr(f"archive/data/{i}", np.asarray(numbers, np.float32).tobytes())
        archive.writestr("archive/version", "3\n")
        for name, data in more.items():
            archive.writestr(name, data)
    return file.getvalue()


def state(shape=(1, 4), stride=None, offset=0, length=4, key="0", kind="FloatStorage"):
    """The pickle of an OrderedDict with one tensor, assembled by hand in protocol 2."""
    stride = stride or (shape[1], 1)

    def number(v):
        return b"J" + int(v).to_bytes(4, "little", signed=True)

    def text(v):
        return b"X" + len(v).to_bytes(4, "little") + v.encode()

    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(length) + b"tQ"
    ordered = b"ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset)
    tensor += number(shape[0]) + number(shape[1]) + b"\x86" + number(stride[0]) + number(stride[1]) + b"\x86"
    tensor += b"\x89" + ordered + b"tR"
    return b"\x80\x02" + ordered + text("weight") + tensor + b"s."


def test_the_hand_made_checkpoint_is_good_before_it_is_spoilt():
    tensors = read_pth(checkpoint(state(), [[1, 2, 3, 4]]), "x")
    assert tensors["weight"].tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", ["alone", "in a dict"])
def test_a_hostile_pickle_never_runs(tmp_path, protocol, where):
    import os

    mark = tmp_path / "ran"
    for canary in (
        Canary(os.system, f"touch {mark}"),
        Canary(eval, f"open({str(mark)!r}, 'w')"),
        Canary(exec, f"open({str(mark)!r}, 'w')"),
        Canary(open, str(mark), "w"),
    ):
        program = OrderedDict(weight=canary) if where == "in a dict" else canary
        data = checkpoint(pickle.dumps(program, protocol))
        with pytest.raises(HeadError, match="refused"):
            read_pth(data, "evil.pth")
        (tmp_path / "evil.pth").write_bytes(data)
        with pytest.raises(HeadError, match="none of the published heads"):
            import_head(tmp_path / "evil.pth")
        with pytest.raises(HeadError, match="refused"):
            import_head(tmp_path / "evil.pth", encoder=L14, scale=(1, 10))
        assert not mark.exists()
    pickle.loads(pickle.dumps(Canary(eval, f"open({str(mark)!r}, 'w')")))
    assert mark.exists()  # the canary is alive


def test_the_unpickler_refuses_on_its_own(tmp_path):
    """The scan comes first; this is what stands behind it."""
    from aesthetic.pth import RestrictedUnpickler

    mark = tmp_path / "ran"
    for protocol in (0, 2, 4):
        with pytest.raises(HeadError, match="nothing was run"):
            RestrictedUnpickler(io.BytesIO(pickle.dumps(Canary(eval, f"open({str(mark)!r}, 'w')"), protocol))).load()
    assert not mark.exists()


FOUR = [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a whole checkpoint"),
        (b"not a zip", "not a whole checkpoint"),
        (checkpoint(state(), FOUR)[:-30], "not a whole checkpoint"),
        (checkpoint(state(), FOUR)[50:], "not a whole checkpoint"),
        (checkpoint(state()[:-9], FOUR), "damaged"),
        (checkpoint(b""), "damaged"),
        (checkpoint(pickle.dumps([1], 2)), "uses EMPTY_LIST"),
        (checkpoint(b"\x80\x02K\x01."), "not a state dict"),
        (checkpoint(b"\x80\x02)R."), "does not hold a state dict"),
        (checkpoint(b"\x80\x02)" + b"\x85" * 60_000 + b"Q."), "no storage"),
        (checkpoint(b"\x80\x02)r\xff\xff\xff\x7f."), "would take all memory"),
        (checkpoint(b"\x80\x02" + b"(" * (70 << 10)), "a pickle of"),
        (checkpoint(state(), FOUR, zipfile.ZIP_DEFLATED), "compressed"),
        (checkpoint(state(), FOUR, **{"archive/code.py": "x"}), "does not belong"),
        (checkpoint(state(), FOUR, **{"archive/../../x": "x"}), "does not belong"),
        (checkpoint(state(), FOUR, **{"other/version": "3"}), "several folders"),
        (checkpoint(state(), FOUR, **{"archive/byteorder": "big"}), "little-endian"),
        (checkpoint(state(), []), "is missing"),
        (checkpoint(state(key="../x"), FOUR), "is missing"),
        (checkpoint(state(), [[1, 2]]), "not 4 numbers long"),
        (checkpoint(state(length=10**9), FOUR), "not 1000000000 numbers long"),
        (checkpoint(state(shape=(1, 5)), FOUR), "beyond its storage"),
        (checkpoint(state(shape=(2**30, 2**30)), FOUR), "beyond its storage"),
        (checkpoint(state(offset=1), FOUR), "beyond its storage"),
        (checkpoint(state(offset=-1), FOUR), "beyond its storage"),
        (checkpoint(state(shape=(-1, 4)), FOUR), "not described"),
        (checkpoint(state(shape=(2**20, 2**20), stride=(0, 0)), FOUR), "not contiguous"),
        (checkpoint(state(kind="LongStorage"), FOUR), "torch.LongStorage: refused"),
        (checkpoint(state(key="9999"), FOUR), "is missing"),
        (bytes(17 << 20), "more than"),
    ],
)
def test_a_file_that_is_no_plain_checkpoint_is_refused(data, message):
    """Among them a tuple nested 60,000 deep, and one that would make a memo of 16 GB."""
    with pytest.raises(HeadError, match=message):
        read_pth(data, "x.pth")


def test_a_pickle_that_hides_the_items_of_its_dictionary_is_read_as_one():
    assert read_pth(checkpoint(b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x01sb."), "x.pth") == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.zeros((1, 768), np.float32)}, "of another shape: weight"),
        ({"weight": np.full((1, 512), np.nan, np.float32)}, "not finite"),
        ({"bias": np.full(1, np.inf, np.float32)}, "not finite"),
        ({"more": np.zeros(1, np.float32)}, "unknown or of another shape: more"),
    ],
)
def test_tensors_that_are_not_the_published_ones_are_refused(change, message):
    tensors = {"weight": np.zeros((1, 512), np.float32), "bias": np.zeros(1, np.float32)}
    known = published("laion-v1-b32")
    assert build_published(known, tensors, "x").affine
    with pytest.raises(HeadError, match=message):
        build_published(known, tensors | change, "x")


def test_fetching_takes_the_known_bytes_only_and_says_what_to_do():
    data = checkpoint(state(), FOUR)

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = {"/good.pth": data, "/other.pth": data + b"x"}.get(self.path)
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    known = replace(published("laion-v1-b32"), sha256=hashlib.sha256(data).hexdigest())
    try:
        assert download(replace(known, url=f"{address}/good.pth")) == data
        with pytest.raises(HeadError, match="not the published file"):
            download(replace(known, url=f"{address}/other.pth"))
        with pytest.raises(HeadError, match=r"404.*tastemaker heads import"):
            download(replace(known, url=f"{address}/absent.pth"))
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(HeadError, match=r"could not be fetched.*tastemaker heads import good.pth"):
        download(replace(known, url=f"{address}/good.pth"))
    with pytest.raises(HeadError, match="no published head"):
        fetch_head("laion-v9")
