"""`tastemaker fit` from end to end: ratings, labels and comparisons of real images, in a folder or a data folder."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter

from aesthetic.catalog import load_head
from aesthetic.space import Space
from curate.sources.rated import pair_groups
from pipelines.cli import main

COUNT = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images that are sharp and bright, or blurred and dark: how much is in `light`."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    light = rng.random(COUNT)
    for i in range(COUNT):
        coarse = rng.integers(0, 255, (12, 16, 3)).astype(np.uint8)
        image = Image.fromarray(coarse).resize((320, 240), Image.Resampling.NEAREST)
        image = image.filter(ImageFilter.GaussianBlur(float(12 * (1 - light[i]))))
        image = Image.fromarray((np.asarray(image) * (0.2 + 0.8 * light[i])).astype(np.uint8))
        (root / "sub").mkdir(exist_ok=True)
        image.save(root / ("sub" if i % 2 else ".") / f"{i:02d}.png")
    Image.open(root / "00.png").save(root / "copy.jpg", quality=95)
    (root / "broken.jpg").write_bytes(b"no picture")
    return root, light


def names(count=COUNT):
    return [f"{'sub/' if i % 2 else ''}{i:02d}.png" for i in range(count)]


def run(capsys, *words):
    code = main([str(w) for w in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_from_a_folder_of_images_to_a_head_in_one_command(folder, tmp_path, capsys):
    root, light = folder
    table = pd.DataFrame({"image": names(), "score": np.round(1 + 9 * light, 2), "n": 20, "sd": 1.5})
    table.loc[COUNT] = ["copy.jpg", 1 + 9 * light[0], 20, 1.5]
    table.loc[COUNT + 1] = ["broken.jpg", 5, 20, 1.5]
    table.loc[COUNT + 2] = ["absent.jpg", 5, 20, 1.5]
    table.to_csv(tmp_path / "r.csv", index=False)
    out = tmp_path / "light.head"
    code, text, _ = run(capsys, "fit", tmp_path / "r.csv", "--images", root, "--out", out, "--scale", 1, 10, "--json")
    assert code == 0, text
    report = json.loads(text.splitlines()[-1])
    lines = text.splitlines()
    assert lines[0].startswith(f"{COUNT + 3} ratings, {COUNT + 1} joined (2 listed in {out / 'unjoined.csv'}) · ")
    assert "near-duplicates kept together" in lines[0]
    assert lines[1].startswith("Spearman 0.")
    assert "zero-shot" in lines[2] and "10 nearest" in lines[2] and "guessing the mean" in lines[2]
    assert lines[3].startswith("worth ")
    assert "about 183 more ratings would halve the interval" in lines[4]
    assert report["metrics"]["spearman"]["value"] > 0.5
    left = pd.read_csv(out / "unjoined.csv").set_index("image")["why"]
    assert left["absent.jpg"] == "not found"
    assert "decoded" in left["broken.jpg"]
    for plot in ("scatter.png", "calibration.png", "learning_curve.png", "extremes.png"):
        with Image.open(out / plot) as image:
            assert image.width > 600
    held_out = pd.read_csv(out / "held_out.csv")
    assert held_out["predicted"].notna().all() and len(held_out) == COUNT + 1
    assert load_head(out).card["verdict"] == report["verdict"]


@pytest.mark.long
def test_what_to_rate_next_is_listed_and_shown(folder, tmp_path, capsys):
    root, light = folder
    table = {"photo": names(40), "beauty_mean": light[:40], "theme": range(40)}
    pd.DataFrame(table).to_csv(tmp_path / "r.csv", index=False)
    out = tmp_path / "h.head"
    words = ["--images", root, "--key", "photo", "--score", "beauty_mean", "--group", "theme"]
    code, text, _ = run(capsys, "fit", tmp_path / "r.csv", *words, "--out", out, "--suggest", 5)
    assert code == 0
    assert "suggest.csv" in text
    listed = pd.read_csv(out / "suggest.csv")
    assert len(listed) == 5
    assert set(listed["photo"]) <= set(names()[40:])  # neither a rated one, nor the copy of one, nor the broken one
    with Image.open(out / "suggest.png") as sheet:
        assert sheet.width > 600
    assert "worth how many raters: unknown" in text
    listed.loc[:2, ["beauty_mean", "theme"]] = [[0.2, 90], [0.5, 91], [0.7, 92]]  # and the same options read it
    listed.to_csv(out / "suggest.csv", index=False)
    files = [tmp_path / "r.csv", out / "suggest.csv"]
    code, _, err = run(capsys, "fit", *files, *words, "--out", out, "--suggest", 5)
    assert code == 2 and "has scores filled in" in err
    code, text, _ = run(capsys, "fit", *files, *words, "--out", tmp_path / "more.head")
    assert code == 0 and "43 ratings, 43 joined" in text


def test_labels_make_a_classifier(folder, tmp_path, capsys):
    root, light = folder
    dark = np.where(light < 0.5, "dark", "bright")
    pd.DataFrame({"file": names(), "label": dark}).iloc[:50].to_csv(tmp_path / "l.csv", index=False)
    out = tmp_path / "dark.head"
    words = ["fit", tmp_path / "l.csv", "--images", root, "--out", out]
    code, _, err = run(capsys, *words)
    assert code == 2 and "positive" in err and "bright" in err
    code, text, err = run(
        capsys, *words, "--positive", "dark", "--prevalence", 0.2, "--task", "darkness", "--suggest", 1
    )
    assert code == 0, err
    assert "AUROC 0.9" in text or "AUROC 1.0" in text
    assert "of the 'dark' where 1% of the other images are taken in" in text
    assert "where 20.0% are 'dark', misses" in text and "clean" not in text
    head = load_head(out)
    assert (head.task, head.link, head.scale) == ("darkness", "sigmoid", (0.0, 1.0))


@pytest.mark.long
def test_comparisons_make_a_head(folder, tmp_path, capsys):
    root, light = folder
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, COUNT, (2, 600))
    a, b = a[a != b], b[a != b]
    first = light[a] > light[b]
    of = np.array(names())
    pairs = pd.DataFrame({"winner": of[np.where(first, a, b)], "loser": of[np.where(first, b, a)]})
    pairs.loc[len(pairs)] = ["absent.png", names()[0]]
    pairs.to_csv(tmp_path / "p.csv", index=False)
    out = tmp_path / "p.head"
    code, text, _ = run(capsys, "fit", tmp_path / "p.csv", "--images", root, "--out", out)
    assert code == 0, text
    assert f"{len(pairs)} comparisons, {len(pairs) - 1} joined (1 listed" in text
    assert "picks the preferred image in 0." in text


def test_what_cannot_be_fitted_is_said_and_nothing_is_written(folder, tmp_path, capsys):
    root, _ = folder
    (tmp_path / "none.csv").write_text("key,score\nx,1\ny,2\n")
    out = tmp_path / "h.head"
    for words, message in (
        (("--images", root), "none of the 2 images rated is in"),
        ((), "from one place: --data DATA"),
        (("--images", root, "--data", "x"), "from one place"),
        (("--images", root / "nowhere"), "there is no such folder"),
        (("--images", tmp_path), "there is no image in it"),
    ):
        code, _, err = run(capsys, "fit", tmp_path / "none.csv", "--out", out, *words)
        assert code == 2 and message in err
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prevalence", 0), "--prevalence 0: it is a share between 0 and 1"),
        (("--prevalence", "nan"), "--prevalence nan: it is a share"),
        (("--scale", 10, 1), "--scale: scale is 10.0 to 1.0"),
        (("--suggest", 2, "--network"), "--suggest asks what would teach a straight line most"),
        (("--data", "x", "--encoder", "bundled"), "--encoder: x says itself"),
        (("--out", "a head"), "'a head' cannot name a head"),
    ],
)
def test_a_mistake_in_the_request_is_told_before_a_file_is_read(words, message, tmp_path, capsys):
    places = () if "--data" in words else ("--images", tmp_path / "nowhere")
    code, _, err = run(capsys, "fit", tmp_path / "nothing.csv", "--out", tmp_path / "h.head", *places, *words)
    assert code == 2 and message in err


SCORES, LABELS, PAIRS = "image,score\na,1\nb,2\n", "image,label\na,1\nb,0\n", "winner,loser\na,b\nb,c\n"


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (SCORES, ("--prevalence", 0.1), "--prevalence is for labels, and r.csv holds scores"),
        (LABELS, ("--network",), "--network is for scores, and r.csv holds labels (each 0 or 1)"),
        (LABELS, ("--scale", 0, 1), "--scale is for scores"),
        (PAIRS, ("--ray-address", "auto"), "--ray-address is for scores, and r.csv holds comparisons"),
        (PAIRS, ("--suggest", 1), "--suggest is for scores and labels, and r.csv holds comparisons"),
        ("image,score\na,1\nb,two\n", (), "line 3: score is 'two', not a number"),
    ],
)
def test_a_mistake_about_the_ratings_is_told_before_an_image_is_looked_for(text, words, message, tmp_path, capsys):
    (tmp_path / "r.csv").write_text(text)
    places = ("--images", tmp_path / "nowhere", "--out", tmp_path / "h.head")
    code, _, err = run(capsys, "fit", tmp_path / "r.csv", *places, *words)
    assert code == 2 and message in err
    assert not (tmp_path / "h.head").exists()


def test_a_head_and_scores_that_were_filled_in_are_not_written_over(tmp_path, capsys):
    out = tmp_path / "h.head"
    words = ["fit", tmp_path / "r.csv", "--images", tmp_path, "--out", out, "--suggest", 3]
    out.write_text("a file")
    code, _, err = run(capsys, *words)
    assert code == 2 and "is a file; a head is a folder" in err
    out.unlink()
    out.mkdir()
    (out / "suggest.csv").write_text("image,score,predicted\na,,1\nb,4,2\n")
    code, _, err = run(capsys, *words)
    assert code == 2 and "has scores filled in" in err
    (out / "suggest.csv").write_text("image,score,predicted\na,,1\nb,,2\n")
    code, _, err = run(capsys, *words)
    assert code == 2 and "r.csv: there is no such file" in err


def test_a_head_is_made_anew_by_its_own_command_alone(tmp_path, capsys):
    """More ratings in the same file: yes. Another command, another's folder, a folder that is not a head's: no."""
    x = np.random.default_rng(0).standard_normal((60, 16)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    vectors_folder(tmp_path / "v", x, Space(encoder="test", dim=16, norm="l2"))
    table = pd.DataFrame({"image": [f"{i:05d}" for i in range(60)], "score": x[:, 0], "mos": x[:, 0] * 2})
    out = tmp_path / "h.head"
    words = ["fit", tmp_path / "r.csv", "--embeddings", tmp_path / "v", "--out", out]
    table[:50].to_csv(tmp_path / "r.csv", index=False)
    code, text, _ = run(capsys, *words)
    assert code == 0 and "left aside, as it tells the score again: mos" in text
    first = (out / "head.json").read_bytes()
    table.assign(score=[None] * 3 + list(table["score"][3:])).to_csv(tmp_path / "r.csv", index=False)
    code, text, err = run(capsys, *words)
    assert code == 0 and "57 ratings, 57 joined" in text and "left out: 3 without a score" in text
    assert f"{out} holds a head of this command, which the new one will replace" in err
    assert (out / "head.json").read_bytes() != first
    there = {p.name: p.read_bytes() for p in out.iterdir()}
    for other, message in (
        (["--scale", "-50", "50"], "holds a head already, and not of this command"),
        (["--out", tmp_path / "v"], "holds something else (img_emb): give a folder of its own"),
        (["--out", "/proc/h.head"], "/proc/h.head cannot be written"),
        (["--encoder", "nosuch"], "--encoder nosuch: no encoder is called that"),
    ):
        code, _, err = run(capsys, *words, *other)
        assert code == 2 and message in err, err
    (out / "report.json").unlink()
    code, _, err = run(capsys, *words)
    assert code == 2 and "holds a head already" in err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {n: d for n, d in there.items() if n != "report.json"}


def test_too_few_are_told_before_an_image_is_embedded(tmp_path, capsys):
    for i in range(40):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    rng = np.random.default_rng(0)
    pairs = [f"{a:02d},{b:02d}" for a, b in rng.integers(0, 40, (100, 2)) if a != b]
    for text, message in (
        (
            "winner,loser\n" + "\n".join(pairs),
            r"(9\d|100) comparisons, of which [12]\d can .* at least 30 .* About \d\d\d compar",
        ),
        ("image,score\n01,1\n02,2\n", "2 ratings; at least 10 are needed"),
        ("image,score\n" + "".join(f"{i:02d},3\n" for i in range(20)), "every score is 3"),
        ("image,label\n" + "".join(f"{i:02d},{int(i < 5)}\n" for i in range(40)), "5 positive and 35 negative labels"),
    ):
        (tmp_path / "r.csv").write_text(text)
        code, _, err = run(capsys, "fit", tmp_path / "r.csv", "--images", tmp_path, "--out", tmp_path / "h.head")
        assert code == 2 and re.search(message, err), err
        assert "embedded" not in err and not (tmp_path / "h.head").exists()


def test_images_compared_without_a_group_are_groups_of_their_own():
    table = pd.DataFrame({"group": ["p", None, float("nan")]})
    assert pair_groups(table, np.array([0, 2, 3]), np.array([1, 3, 4]), 5) == ["p", "p", None, None, None]


def vectors_folder(folder, x, space=None):
    """Vectors as clip-retrieval stores them, in two partitions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for part, rows in enumerate(np.array_split(np.arange(len(x)), [len(x) * 3 // 5])):
        (folder / "img_emb").mkdir(parents=True, exist_ok=True)
        (folder / "metadata").mkdir(exist_ok=True)
        np.save(folder / "img_emb" / f"img_emb_{part}.npy", x[rows].astype(np.float16))
        paths = [f"/elsewhere/{i:05d}.jpg" for i in rows]
        pq.write_table(pa.table({"image_path": paths}), folder / "metadata" / f"metadata_{part}.parquet")
    if space is not None:
        space.save(folder / "space.json")


def test_vectors_as_clip_retrieval_stores_them(tmp_path, capsys):
    """No image at hand: by key in a folder that says its space, by path in one whose encoder must be named."""
    from aesthetic.space import require_same
    from curate.encoders.registry import load_encoder

    space = load_encoder("bundled").space()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, space.dim)).astype(np.float32)
    x[:, 0] *= 20
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    folder = tmp_path / "vectors"
    vectors_folder(folder, x)
    named = pd.DataFrame({"image": [f"{i:05d}" for i in range(150)], "score": 5 + 4 * x[:150, 0]})
    named["predicted"] = named["score"]  # as suggest.csv has it
    named.to_csv(tmp_path / "r.csv", index=False)
    out = tmp_path / "v-1.head"
    words = ["fit", tmp_path / "r.csv", "--embeddings", folder, "--out", out]
    code, _, err = run(capsys, *words)
    assert code == 2 and "--encoder" in err
    space.save(folder / "space.json")
    out.mkdir()
    (out / "unjoined.csv").write_text("of a fit before")
    code, text, err = run(capsys, *words, "--suggest", 2)
    assert code == 0, err
    assert not (out / "unjoined.csv").exists()
    assert " v_1=" in text
    assert "metadata" not in json.loads((out / "report.json").read_text())["baselines"]
    assert text.startswith("150 ratings, 150 joined") and "zero-shot" in text
    head = load_head(out)
    require_same(head.space, space)
    assert np.corrcoef(head(x), x[:, 0])[0, 1] > 0.9
    assert set(pd.read_csv(out / "suggest.csv")["image"]) <= {f"/elsewhere/{i:05d}.jpg" for i in range(150, 200)}

    everything = pd.DataFrame({"image": [f"{i:05d}" for i in range(200)], "score": 5 + 4 * x[:, 0]})
    everything.to_csv(tmp_path / "r.csv", index=False)
    code, _, err = run(capsys, *words[:-1], tmp_path / "w.head", "--suggest", 2)
    assert code == 2 and "every image of" in err
    assert not (tmp_path / "w.head").exists()
