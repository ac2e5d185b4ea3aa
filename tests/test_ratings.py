"""Rating files of every kind give one table; mistakes in them are named; and names find their images."""

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aesthetic.heads import HeadError
from aesthetic.join import join
from aesthetic.ratings import read_ratings, restated_columns
from aesthetic.votes import without_raters


def write(folder: Path, text: str, name: str = "r.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def columns(table: pd.DataFrame) -> dict:
    """The table as lists, in which what is missing is None."""
    return {c: [None if pd.isna(v) else v for v in table[c]] for c in table}


# Scores --------------------------------------------------------------------------------------------------------------


def test_csv_tsv_and_parquet_give_one_table(tmp_path):
    table = pd.DataFrame(
        {
            "path": ["a b.jpg", "ü,.jpg", 'c\n"d".jpg'],
            "score": [1.5, 7.0, -2.0],
            "n": [3, 4, 9],
            "theme": ["x", "y", "x"],
            "width": [640, 0, 80],
            "note": ["0012", None, "7"],
        }
    )
    table.to_csv(tmp_path / "r.csv", index=False, encoding="utf-8-sig")
    table.to_csv(tmp_path / "r.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "r.parquet")
    for kind in ("csv", "tsv", "parquet"):
        got = read_ratings(tmp_path / f"r.{kind}", group="theme")
        assert (got.kind, got.by, got.scale) == ("scores", "image", None)
        assert columns(got.table) == {
            "image": ["a b.jpg", "ü,.jpg", 'c\n"d".jpg'],
            "score": [1.5, 7.0, -2.0],
            "n": [3.0, 4.0, 9.0],
            "group": ["x", "y", "x"],
            "width": [640, 0, 80],
            "note": ["0012", None, "7"],  # a number with a leading zero is a name
        }
        assert got.table["width"].dtype == np.int64


def test_the_spread_beside_a_named_score_is_taken(tmp_path):
    path = write(tmp_path, "Image,beauty_mean,beauty_sd,valence_sd,n\na,3.5,1.25,9,4\nb,4,,9,1\n")
    table = read_ratings(path, score="beauty_mean").table
    assert columns(table) == {
        "image": ["a", "b"],
        "score": [3.5, 4.0],
        "n": [4.0, 1.0],
        "sd": [1.25, None],
        "valence_sd": [9, 9],
    }
    table = read_ratings(write(tmp_path, "image,MOS,score_std,SD\na,3.5,9,1\n")).table
    assert columns(table) == {"image": ["a"], "score": [3.5], "sd": [1.0], "score_std": [9]}


def test_what_a_column_of_images_is_called_says_what_names_them(tmp_path):
    digest = "AB" * 32
    for name, value, by in [
        ("key", "000012", "image"),
        ("URL", "https://a.b/c.jpg", "url"),
        ("sha256", digest, "sha256"),
        ("id", "7", "image"),
    ]:
        got = read_ratings(write(tmp_path, f"{name},score\n{value},1\n"))
        assert (got.by, got.table["image"][0]) == (by, value.lower() if by == "sha256" else value)
    got = read_ratings(write(tmp_path, "id,url,score\n1,http://a/b,3\n"))
    assert (got.by, columns(got.table)) == ("url", {"image": ["http://a/b"], "score": [3.0], "id": [1]})
    got = read_ratings(write(tmp_path, "id,url,score\n1,http://a/b,3\n"), image="id")
    assert (got.by, got.table["image"][0]) == ("image", "1")


def test_whole_numbers_of_a_parquet_name_images_without_a_point(tmp_path):
    table = pd.DataFrame(
        {"image_id": [12.0, 7.0], "rating": np.array([1, 2], np.int8), "raw": [b"x", b"y"], "l": [[1], []]}
    )
    table.to_parquet(tmp_path / "r.parquet")
    got = read_ratings(tmp_path / "r.parquet")
    assert columns(got.table) == {"image": ["12", "7"], "score": [1.0, 2.0]}


def test_names_of_columns_may_have_blanks_and_capitals(tmp_path):
    table = read_ratings(write(tmp_path, "Image name,MOS,Brightness\na,55.5,3\nb,40,2\n")).table  # SPAQ's
    assert columns(table) == {"image": ["a", "b"], "score": [55.5, 40.0], "Brightness": [3, 2]}


@pytest.mark.parametrize(
    ("text", "asked", "message"),
    [
        ("image,beauty\na,1\n", {}, r"no column for the score .*Columns: image, beauty"),
        (
            "image,beauty\na,1\n",
            {"score": "beuty"},
            r"no column 'beuty'. Columns: image, beauty; did you mean 'beauty'",
        ),
        ("image,score\na,1\n", {"group": "theme"}, r"no column 'theme'. Columns: image, score$"),
        ("photo,score\na,1\n", {}, r"no column for the image .*Columns: photo, score.*--key COLUMN"),
        ("image,score\na,1\nb,good\n", {}, "line 3: score is 'good'"),
        ("image,score\na,\n\nb,x\n", {}, "line 4: score is 'x'"),
        ("image,score\na,nan\nb,\nc,NA\n", {}, "no score is filled in"),
        ("image,score\na,1e999\n", {}, "line 2: score is '1e999'"),
        ('image,score\n"a\nb",1\nc,x\n', {}, "line 4: score is 'x'"),
        ("image,score\n\n\na,1\n\nc,x\n", {}, "line 6: score is 'x'"),
        ("image,score\na,1\nb\n", {}, "r.csv, line 3: 1 fields, the header has 2"),
        ("image,score\na,1,2\n", {}, "r.csv, line 2: 3 fields, the header has 2"),
        ("image,score\na,1\na,2\n", {}, r"line 3: 'a' was rated before \(line 2\); .* column rater"),
        ("image,score\n ,1\n", {}, "line 2: image is empty"),
        ("image,score,group\na,1,x\nb,1,\n", {}, "line 3: group is empty"),
        ("image,score,n\na,1,0\n", {}, "line 2: n is '0', not a number of votes"),
        ("image,score,sd\na,1,\nb,1,-1\n", {}, "line 3: sd is '-1', not a spread of votes"),
        ("image,score,sd\na,1,\nb,1,?\n", {}, "line 3: sd is '\\?', not a spread of votes"),
        ("sha256,score\nabc,1\n", {}, "line 2: sha256 is 'abc', not a sha256"),
        ("image,score,score\n", {}, "occurs twice"),
        ("image,score\n", {}, "no ratings"),
        ("", {}, "is empty; a header line"),
        ("image,path,score\na,b,1\n", {"image": "path"}, "has a column 'image' of its own; rename"),
        ("image,beauty,score\na,1,2\n", {"score": "beauty"}, "has a column 'score' of its own; rename"),
    ],
)
def test_a_rating_file_with_a_mistake_says_where(tmp_path, text, asked, message):
    with pytest.raises(HeadError, match=message):
        read_ratings(write(tmp_path, text), **asked)


def test_a_mistake_in_a_parquet_file_is_named_by_its_row(tmp_path):
    pd.DataFrame({"image": ["a", None], "score": [1.0, 2.0]}).to_parquet(tmp_path / "r.parquet")
    with pytest.raises(HeadError, match="row 1: image is empty"):
        read_ratings(tmp_path / "r.parquet")
    pd.DataFrame({"image": ["a", "b", "c"], "score": [1.0, None, 1e999]}).to_parquet(tmp_path / "r.parquet")
    with pytest.raises(HeadError, match="row 2: score is inf"):
        read_ratings(tmp_path / "r.parquet")


def test_a_file_that_is_no_rating_file_is_refused(tmp_path):
    (tmp_path / "r.parquet").write_bytes(b"PAR1")
    (tmp_path / "r.csv").write_bytes(b"image,score\n\xff\xfe,1\n")
    (tmp_path / "q.csv").write_bytes(b'image,score\n"a,1\n')
    for name, message in [
        ("r.parquet", "not a parquet"),
        ("r.csv", "UTF-8"),
        ("q.csv", "not CSV"),
        ("r.xlsx", "is .csv"),
        ("x.csv", "no such file"),
    ]:
        with pytest.raises(HeadError, match=message):
            read_ratings(tmp_path / name)
    with pytest.raises(HeadError, match="no rating file"):
        read_ratings()


# Histograms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "score_", "votes_", "Rating ", "c"])
def test_votes_of_a_histogram_are_counted(tmp_path, prefix):
    rng = np.random.default_rng(0)
    votes = [rng.integers(1, 8, n) for n in (2, 9, 1, 40)]
    names = [f"{prefix}{k}" for k in (2, 1, 3, 4, 7, 6, 5)]
    rows = [[str(i), *((v == int(n.removeprefix(prefix))).sum() for n in names)] for i, v in enumerate(votes)]
    pd.DataFrame(rows, columns=["image", *names]).to_csv(tmp_path / "r.csv", index=False)
    got = read_ratings(tmp_path / "r.csv")
    assert (got.kind, got.scale, list(got.table)) == ("scores", (1.0, 7.0), ["image", "score", "n", "sd"])
    np.testing.assert_allclose(got.table["score"], [v.mean() for v in votes])
    np.testing.assert_array_equal(got.table["n"], [2, 9, 1, 40])
    np.testing.assert_allclose(got.table["sd"], [v.std(ddof=1) if len(v) > 1 else math.nan for v in votes])


def test_shares_of_votes_have_a_mean_but_no_number(tmp_path):
    got = read_ratings(write(tmp_path, "image,1,2,3\na,.25,.5,.25\nb,0,.33,.66\n"))
    assert list(got.table) == ["image", "score", "sd"]
    np.testing.assert_allclose(got.table["score"], [2, (2 * 0.33 + 3 * 0.66) / 0.99])
    np.testing.assert_allclose(got.table["sd"][0], math.sqrt(0.5))
    got = read_ratings(write(tmp_path, "image,1,2,3,n\na,.25,.5,.25,4\n"))
    assert columns(got.table) == {"image": ["a"], "score": [2.0], "n": [4.0], "sd": [math.sqrt(0.5 * 4 / 3)]}


def test_a_mean_beside_its_histogram_is_no_metadata(tmp_path):
    got = read_ratings(write(tmp_path, "image,c1,c2,c3,MOS,SD,camera\na,1,2,1,2.0,.8,x\nb,0,0,3,3,0,y\n"))
    assert columns(got.table) == {
        "image": ["a", "b"],
        "score": [2.0, 3.0],
        "n": [4.0, 3.0],
        "sd": [math.sqrt(2 / 3), 0.0],
        "camera": ["x", "y"],
    }
    named = read_ratings(tmp_path / "r.csv", score="MOS")
    assert (named.scale, list(named.table)) == (None, ["image", "score", "sd", "camera"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,1,2,3\na,1,2,3\nb,0,0,0\n", "line 3: no votes: 1 to 3 are all 0"),
        ("image,1,2,3\na,1,-2,3\n", "line 2: 2 is '-2', not a number of votes"),
        ("image,1,2,3\na,1,,3\n", "line 2: 2 is '', not a number of votes"),
        ("image,1,2,3\na,1,2,3\nb,1.5,2,3\n", "line 2: 1 to 3 sum to 6; votes are whole numbers, or shares"),
        ("image,1,2,3,c1,c2,c3\na,1,2,3,1,2,3\n", "1 to 3 and c1 to c3 may both be votes"),
        ("image,score,c1,c2,c3\na,3,1,0,0\n", "line 2: score is 3, and the mean of c1 to c3 is 1"),
        ("image,score_1,score_2,score_4\na,1,2,3\n", "no column for the score"),
    ],
)
def test_a_histogram_with_a_mistake_says_where(tmp_path, text, message):
    with pytest.raises(HeadError, match=message):
        read_ratings(write(tmp_path, text))


AVA = (
    "1 953619 0 1 5 17 38 36 15 6 5 1 1 22 1396\n2 953958 10 7 15 26 26 21 10 8 1 2 15 21 1396\n"
    "\n3 954184 0 0 4 8 41 56 10 3 4 0 0 0 1397\n"
)


def test_ava_is_read_with_its_challenges_as_groups(tmp_path):
    got = read_ratings(write(tmp_path, AVA, "AVA.txt"))
    assert (got.kind, got.by, got.scale) == ("scores", "image", (1.0, 10.0))
    votes = np.repeat(np.arange(1, 11), [0, 1, 5, 17, 38, 36, 15, 6, 5, 1])
    assert got.table["score"][0] == pytest.approx(votes.mean())
    assert got.table["sd"][0] == pytest.approx(votes.std(ddof=1))
    assert columns(got.table.drop(columns=["score", "sd"])) == {
        "image": ["953619", "953958", "954184"],
        "n": [124.0, 126.0, 126.0],
        "group": ["1396", "1396", "1397"],
        "tag1": ["1", "15", "0"],  # names of tags, no quantities
        "tag2": ["22", "21", "0"],
    }
    other = read_ratings(tmp_path / "AVA.txt", group="tag1").table
    assert list(other["group"]) == ["1", "15", "0"] and list(other["challenge"]) == ["1396", "1396", "1397"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("4 9 1 1", "line 5: '4 9 1 1'; a line of AVA.txt is 15 whole numbers"),
        ("4 9 0 0 4 8 41 56 10 3 4 0 0 0 1397 5", "line 5: .* 15 whole numbers"),
        ("4 9 0 0 4 8 41 5.5 10 3 4 0 0 0 1397", "line 5: .* 15 whole numbers"),
        ("4 9 0 0 0 0 0 0 0 0 0 0 0 0 1397", "line 5: no votes"),
        ("4 9 0 0 -1 0 0 0 0 0 0 2 0 0 1397", "line 5: 3 is -1, not a number of votes"),
        ("4 953958 0 0 1 0 0 0 0 0 0 2 0 0 1397", r"line 5: '953958' was rated before \(line 2\)"),
    ],
)
def test_a_bad_line_of_ava_is_named(tmp_path, line, message):
    with pytest.raises(HeadError, match=message):
        read_ratings(write(tmp_path, AVA + line + "\n", "AVA.txt"))


def test_text_that_is_not_ava_is_refused(tmp_path):
    for text, message in [("image,score\na,1\n", "line 1: .*15 whole numbers"), ("\n", "no ratings")]:
        with pytest.raises(HeadError, match=message):
            read_ratings(write(tmp_path, text, "r.txt"))


# Other forms of the score, and rows without one ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "restated", "metadata"),
    [
        (
            "MOS",
            ["c_total", "SD", "MOS_zscore", "mosNorm", "quality.score", "vote count"],
            ["camera", "year", "colour"],
        ),
        ("aestheticScore_mean", ["aestheticScore_std", "qualityScore_mean", "lightPreference_mean"], ["semantic"]),
        ("beauty_mean", ["beauty_n", "valence_mean", "valence_n", "valence_SD", "arousal_mean"], ["theme", "n_faces"]),
        ("label", ["label_id", "label_name"], ["category", "width"]),
    ],
)
def test_columns_called_after_judging_are_restated_columns_the_score(score, restated, metadata):
    few = pd.Series([1, 2])
    assert restated_columns(score, dict.fromkeys((*restated, *metadata), few), None, ["c"]) == restated


def test_numbers_that_go_with_the_score_are_a_form_of_it(tmp_path):
    """KonIQ: a mean opinion score, its votes and spread, a z-score; whatever it is called, and a rank, upside down."""
    rng = np.random.default_rng(0)
    votes = rng.multinomial(100, [0.1, 0.2, 0.4, 0.2, 0.1], 60)
    mos = votes @ np.arange(1, 6) / 100
    koniq = pd.DataFrame({"image_name": [f"{i}.jpg" for i in range(60)]})
    koniq[[f"c{k}" for k in range(1, 6)]] = votes
    koniq = koniq.assign(c_total=100, MOS=mos, SD=0.9, MOS_zscore=mos * 21 + rng.normal(0, 0.1, 60), place=-mos)
    koniq = koniq.assign(width=rng.integers(300, 900, 60), near=mos + rng.normal(0, 1, 60))
    koniq.to_csv(tmp_path / "r.csv", index=False)
    got = read_ratings(tmp_path / "r.csv")
    assert got.restated == ("c_total", "MOS_zscore", "place") and got.scale == (1.0, 5.0)
    got = read_ratings(tmp_path / "r.csv", score="MOS_zscore")
    assert got.restated == ("c1 to c5", "c_total", "MOS", "place", "SD")
    assert "sd" not in got.table  # that of the MOS, in other units
    koniq.assign(label=(mos > 3).astype(int), bright=mos > 3).drop(columns="MOS").to_csv(
        tmp_path / "r.csv", index=False
    )
    assert (
        "bright" not in read_ratings(tmp_path / "r.csv", score="label").restated
    )  # of labels it may be the leak itself


@pytest.mark.parametrize(
    ("text", "asked", "rows"),
    [
        ("image,score,group\na,,\nb,2,x\nc,NA,\nd,4,y\n", {}, {"b": 2, "d": 4}),
        ("image,label\na,cat\nb,\nc,na\n", {"positive": "cat"}, {"a": 1, "c": 0}),
        ("image,rater,score\na,x,1\na,y,\na,z,3\nb,x,\n", {}, {"a": 2}),
        ("image,1,2,3\na,,,\nb,0,0,4\n", {}, {"b": 3}),
    ],
)
def test_rows_without_a_score_are_left_out_and_counted(tmp_path, text, asked, rows):
    got = read_ratings(write(tmp_path, text), **asked)
    assert dict(zip(got.table["image"], got.table["score"], strict=True)) == rows
    assert got.unrated == 2 if len(text.splitlines()) > 4 else 1
    got = read_ratings(write(tmp_path, "left,right,choice\na,b,a\nc,d,\n"))
    assert (got.kind, len(got.table), got.unrated) == ("pairs", 1, 1)
    with pytest.raises(HeadError, match="line 4: score is 'x'"):
        read_ratings(write(tmp_path, "image,score\na,\nb,2\nc,x\n"))


# What files may look like -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("r.csv", b"image;score;width\na;7,5;1024\nb;-5;,5\n"),
        ("r.csv", b"\xef\xbb\xbfimage\tscore\twidth\r\na\t7.5\t1024\r\nb\t-5\t.5\r\n"),
        ("r.tsv", "image;score;width\na;7,5;1024\nb;-5;0,5\n".encode("utf-16")),
        ("r.csv", "sep=;\r\nimage;score;width\r\na;7,5;1024\r\nb;-5;0,5\r\n".encode("utf-8-sig")),
        ("r.csv", b'sep=,\nimage,score,width\n"a",7.5,1024\nb,-5,0.5\n'),
    ],
)
def test_tables_of_other_countries_and_programs_are_read(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    got = read_ratings(tmp_path / name)
    assert columns(got.table) == {"image": ["a", "b"], "score": [7.5, -5.0], "width": [1024.0, 0.5]}


def test_a_mistake_in_such_a_table_has_its_line(tmp_path):
    (tmp_path / "r.csv").write_bytes("sep=;\nimage;score\na;7,5\nb;gut\n".encode("utf-16"))
    with pytest.raises(HeadError, match="line 4: score is 'gut'"):
        read_ratings(tmp_path / "r.csv")
    (tmp_path / "r.tsv").write_text('image\tscore\na\t1\n"b\t2\nc"\t3\n')
    with pytest.raises(HeadError, match=r"up to line 4: a quotation mark that is not closed"):
        read_ratings(tmp_path / "r.tsv")
    (tmp_path / "r.csv").write_text('image,score\na,"7,5"\n')
    with pytest.raises(HeadError, match="line 2: score is '7,5'"):
        read_ratings(tmp_path / "r.csv")


def test_hostile_rating_files_are_named(tmp_path, monkeypatch):
    import os

    import pyarrow as pa
    import pyarrow.parquet as pq

    os.mkfifo(tmp_path / "fifo.csv")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    (tmp_path / "gone.parquet").symlink_to("nowhere")
    (tmp_path / "round.txt").symlink_to("round.txt")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "zip.csv").write_bytes(b"PK\x03\x04" + bytes(50))
    (tmp_path / "packed.csv").write_bytes(b"\x1f\x8b\x08" + bytes(50))
    (tmp_path / "binary.csv").write_bytes(b"image,score\n" + bytes(range(256)) * 9)
    (tmp_path / "long.csv").write_text(f"image,score\na,{'9' * 5000}\n")
    (tmp_path / "high.csv").write_text("image,score\na,1e400\n")
    (tmp_path / "bins.csv").write_text(f"image,c{'1' * 5000},score\na,1,x\n")
    (tmp_path / "digits.txt").write_text(AVA + "4 9 0 0 4 8 41 56 10 3 4 0 0 0 " + "9" * 5000)
    lone = pa.array([b"\xed\xa0\x80", b"b"]).view(pa.string())
    pq.write_table(pa.table({"image": lone, "score": [1.0, 2.0]}), tmp_path / "lone.parquet")
    monkeypatch.setattr("aesthetic.rating_files.LARGEST", 10 << 20)
    for name, text in (("bomb", pa.string()), ("category", pa.dictionary(pa.int32(), pa.string()))):
        image = pa.DictionaryArray.from_arrays(np.zeros(3000, np.int32), ["x" * 5000]).cast(text)  # 15 MB
        pq.write_table(pa.table({"image": image, "score": np.ones(3000)}), tmp_path / f"{name}.parquet")
        assert (tmp_path / f"{name}.parquet").stat().st_size < 20_000
    pq.write_table(pa.table({"image": pa.nulls(10 << 20, pa.int8())}), tmp_path / "rows.parquet")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert len(names) == 16
    for name in names:
        with pytest.raises(HeadError, match=re.escape(str(tmp_path / name))):
            read_ratings(tmp_path / name)


# One row a vote ------------------------------------------------------------------------------------------------------


def panel(seed: int, images: int = 200, raters: int = 30, per_image: int = 4, spread: float = 1.5):
    """Votes of a few of many raters for each image, whose offsets are far larger than their noise."""
    rng = np.random.default_rng(seed)
    truth, offset = rng.normal(5, 1, images), rng.normal(0, spread, raters)
    image = np.repeat(np.arange(images), per_image)
    rater = np.concatenate([rng.choice(raters, per_image, replace=False) for _ in range(images)])
    rater[: raters * 2 : 2] = np.arange(raters)  # all of them vote
    keep = ~pd.DataFrame({"i": image, "r": rater}).duplicated().to_numpy()
    image, rater = image[keep], rater[keep]
    return truth, offset, image, rater, truth[image] + offset[rater] + rng.normal(0, 0.5, len(image))


def mixed_model(y, image, rater):
    """Offsets by the same model, from its likelihood as the textbook writes it: with all its matrices, and searched."""
    from scipy.optimize import minimize

    x, z = np.eye(image.max() + 1)[image], np.eye(rater.max() + 1)[rater]

    def parts(log_variances):
        noise, between = np.exp(log_variances)
        v = noise * np.eye(len(y)) + between * z @ z.T
        vx, vy = np.linalg.solve(v, x), np.linalg.solve(v, y)
        rest = y - x @ np.linalg.solve(x.T @ vx, x.T @ vy)
        return between, v, x.T @ vx, np.linalg.solve(v, rest), rest

    def cost(log_variances):
        _, v, information, weighted, rest = parts(log_variances)
        return np.linalg.slogdet(v)[1] + np.linalg.slogdet(information)[1] + rest @ weighted

    found = minimize(cost, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9})
    between, _, _, weighted, _ = parts(found.x)
    return between * z.T @ weighted


@pytest.mark.parametrize("sizes", [(40, 10, 4), (30, 6, 2), (40, 35, 2)])
def test_offsets_of_raters_are_those_of_the_mixed_model(sizes):
    _, _, image, rater, y = panel(0, *sizes)
    moved = y - without_raters(y, image, rater)
    assert np.ptp(moved) > 1
    np.testing.assert_allclose(moved, mixed_model(y, image, rater)[rater], atol=1e-4)


@pytest.mark.parametrize("sizes", [(200, 30, 4), (4000, 1500, 3)])
def test_means_without_offsets_are_nearer_to_the_truth(sizes):
    truth, offset, image, rater, y = panel(0, *sizes)
    got = without_raters(y, image, rater)
    before, after = (np.corrcoef(truth, np.bincount(image, v) / np.bincount(image))[0, 1] for v in (y, got))
    assert after > 0.9 > before
    assert np.corrcoef(offset[rater], y - got)[0, 1] > 0.95


def test_many_raters_are_told_from_noise_by_moments():
    """The two quadratic forms, and the offsets for their ratio, against dense matrices."""
    _, _, image, rater, y = panel(0, 1500, 1100, 2, spread=0.7)
    x, z = np.eye(image.max() + 1)[image], np.eye(rater.max() + 1)[rater]
    mean = (x / x.sum(0)).T
    k, r = z.T @ (z - x @ (mean @ z)), y - x @ (mean @ y)
    # E[r'r] = (s + t) tr k and E[r'zz'r] = s tr k + t tr k^2
    s, t = np.linalg.solve([[np.trace(k)] * 2, [np.trace(k), (k**2).sum()]], [r @ r, (z.T @ r) @ (z.T @ r)])
    assert (s, t) == pytest.approx((0.25, 0.49), rel=0.3)
    b = np.linalg.solve(k + s / t * np.eye(len(k)), z.T @ r)
    np.testing.assert_allclose(y - without_raters(y, image, rater), b[rater], atol=1e-6)


def test_a_rater_with_few_votes_is_drawn_to_none():
    _, _, image, rater, y = panel(0, spread=0.3)
    lone = np.r_[image, 0], np.r_[rater, rater.max() + 1]
    votes = np.r_[y, y[image == 0].mean() + 3]
    moved = votes - without_raters(votes, *lone)
    assert 0 < moved[-1] < 2


def test_nothing_is_subtracted_where_offsets_cannot_be_told():
    y = np.array([1.0, 5.0, 2.0, 7.0])
    for image, rater in [
        ([0, 1, 2, 3], [0, 0, 1, 1]),  # no image in common
        ([0, 0, 1, 1], [0, 1, 2, 3]),  # two images of two raters each, none of whom rated both
        ([0, 0, 1, 1], [0, 0, 0, 0]),  # one rater
    ]:
        np.testing.assert_array_equal(without_raters(y, np.array(image), np.array(rater)), y)
    rng = np.random.default_rng(0)
    image, rater = np.repeat(np.arange(400), 5), np.tile(np.arange(5), 400)
    noise = rng.normal(0, 1, 2000)
    moved = noise - without_raters(noise, image, rater)
    assert np.abs(moved).max() < 0.06


def test_raters_that_nothing_links_are_not_compared():
    """Two crowds, each of its own images: the mean of each crowd stays where it is."""
    _, _, image, rater, y = panel(1, images=80, raters=8)
    both = np.r_[y, y + 10], np.r_[image, image + 80], np.r_[rater, rater + 8]
    got = without_raters(*both)
    np.testing.assert_allclose(got[: len(y)] + 10, got[len(y) :], atol=1e-6)


def rated(folder: Path, seed: int = 0, **further: object) -> pd.DataFrame:
    _, _, image, rater, y = panel(seed)
    table = pd.DataFrame({"image": [f"i{v}.jpg" for v in image], "user_id": [f"u{v}" for v in rater], "score": y})
    return table.assign(theme=[f"t{v % 7}" for v in image], seconds=np.arange(len(y)), **further)


def test_one_row_a_vote_becomes_one_row_an_image(tmp_path):
    votes = rated(tmp_path)
    votes.to_csv(tmp_path / "r.csv", index=False)
    got = read_ratings(tmp_path / "r.csv")
    _, _, image, rater, y = panel(0)
    assert (got.kind, list(got.table)) == ("scores", ["image", "score", "n", "sd", "theme"])
    assert got.scale == pytest.approx((y.min(), y.max()))  # of the votes: their means reach less far
    clean = pd.Series(without_raters(y, image, rater)).groupby(image)
    np.testing.assert_array_equal(got.table["image"], [f"i{v}.jpg" for v in range(200)])
    np.testing.assert_allclose(got.table["score"], clean.mean().clip(y.min(), y.max()), atol=1e-8)
    np.testing.assert_allclose(got.table["sd"], clean.std(ddof=1), atol=1e-8)
    np.testing.assert_array_equal(got.table["n"], np.bincount(image))
    np.testing.assert_array_equal(got.table["theme"], [f"t{v % 7}" for v in range(200)])
    grouped = read_ratings(tmp_path / "r.csv", group="theme").table
    assert list(grouped) == ["image", "score", "n", "sd", "group"]


def test_the_order_of_votes_changes_nothing(tmp_path):
    votes = rated(tmp_path)
    votes.to_csv(tmp_path / "a.csv", index=False)
    votes.sample(frac=1, random_state=1).to_csv(tmp_path / "b.csv", index=False)
    a, b = (read_ratings(tmp_path / f"{name}.csv").table.set_index("image") for name in "ab")
    assert list(a.index) != list(b.index)
    pd.testing.assert_frame_equal(a, b.loc[a.index], check_exact=True)


def test_a_rater_counts_once_an_image(tmp_path):
    got = read_ratings(write(tmp_path, "image,rater,score\na,x,1\na,x,2\na,y,4.5\nb,x,3\n")).table
    assert columns(got[["image", "n"]]) == {"image": ["a", "b"], "n": [2.0, 1.0]}
    assert got["score"][0] == pytest.approx(3)
    assert np.isnan(got["sd"][1])


def test_scores_stay_within_the_range_of_the_votes(tmp_path):
    """A harsh rater's best vote alone would come out above the scale."""
    rows = [f"i{i},{r},{v}" for i in range(30) for r, v in (("kind", 7 - i % 3), ("harsh", 5 - i % 3))]
    got = read_ratings(write(tmp_path, "image,rater,score\n" + "\n".join([*rows, "best,harsh,7"]) + "\n")).table
    assert got["score"].iloc[-1] == 7.0
    assert got["score"].between(3, 7).all()


def test_columns_of_a_vote_are_left_out_and_those_of_an_image_kept(tmp_path):
    text = (
        "image,rater,score,camera,place,mood\na,x,1,nikon,rome,2\na,y,2,nikon,paris,3\nb,x,3,,rome,1\nb,y,4,,rome,4\n"
    )
    got = read_ratings(write(tmp_path, text)).table
    assert columns(got[["camera", "place"]]) == {"camera": ["nikon", None], "place": [None, "rome"]}
    assert "mood" not in got


def test_an_image_in_two_groups_is_refused(tmp_path):
    text = "image,rater,score,group\na,x,1,g\nb,x,1,g\na,y,2,h\n"
    with pytest.raises(HeadError, match=r"line 4: 'a' is in the group 'h', and in 'g' before \(line 2\)"):
        read_ratings(write(tmp_path, text))


def test_a_rater_column_alone_is_metadata(tmp_path):
    got = read_ratings(write(tmp_path, "image,user_id,score\na,x,1\nb,y,2\n")).table
    assert columns(got) == {"image": ["a", "b"], "score": [1.0, 2.0], "user_id": ["x", "y"]}


def test_a_histogram_is_not_mistaken_for_what_a_rater_ticked(tmp_path):
    got = read_ratings(write(tmp_path, "image,rater,score,1,2,3\na,x,5,0,1,0\na,y,7,1,0,0\n"))
    assert columns(got.table[["image", "score", "n"]]) == {"image": ["a"], "score": [6.0], "n": [2.0]}


# Labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("0", "1"), ("false", "True"), ("No", "yes"), ("0.0", "1.0")])
def test_labels_are_read_in_their_usual_words(tmp_path, words):
    no, yes = words
    for column, asked in (("label", {}), ("is_nsfw", {"score": "is_nsfw"}), ("score", {})):
        got = read_ratings(write(tmp_path, f"image,{column},x\na,{yes},5\nb,{no},6\n"), **asked)
        assert (got.kind, got.scale) == ("labels", (0.0, 1.0))
        assert columns(got.table) == {"image": ["a", "b"], "score": [1.0, 0.0], "x": [5, 6]}
    pd.DataFrame({"image": ["a", "b"], "label": [True, False]}).to_parquet(tmp_path / "r.parquet")
    assert list(read_ratings(tmp_path / "r.parquet").table["score"]) == [1.0, 0.0]


def test_other_labels_need_to_be_told(tmp_path):
    path = write(tmp_path, "image,label\na,neutral\nb,nsfw\nc,drawing\n")
    with pytest.raises(HeadError, match=r"line 2: label is 'neutral'; .*Values: 'drawing', 'neutral', 'nsfw'"):
        read_ratings(path)
    with pytest.raises(HeadError, match=r"no label is 'nfsw'\. Values: .*did you mean 'nsfw'"):
        read_ratings(path, positive="nfsw")
    got = read_ratings(path, positive="nsfw")
    assert (got.kind, list(got.table["score"])) == ("labels", [0.0, 1.0, 0.0])


def test_a_score_beside_a_label_is_the_score(tmp_path):
    path = write(tmp_path, "image,label,score\na,cat,3\nb,dog,5\n")
    assert columns(read_ratings(path).table) == {"image": ["a", "b"], "score": [3.0, 5.0], "label": ["cat", "dog"]}


def test_scores_of_one_value_are_scores(tmp_path):
    assert read_ratings(write(tmp_path, "image,score\na,1\nb,1\n")).kind == "scores"


def test_labels_of_several_raters_become_a_share(tmp_path):
    got = read_ratings(write(tmp_path, "image,rater,label\na,x,yes\na,y,yes\nb,x,yes\nb,y,no\nc,x,no\nc,y,no\n"))
    assert (got.kind, got.scale) == ("scores", (0.0, 1.0))
    assert columns(got.table[["image", "score", "n"]]) == {
        "image": ["a", "b", "c"],
        "score": [1.0, 0.5, 0.0],
        "n": [2.0, 2.0, 2.0],
    }


# Pairs ---------------------------------------------------------------------------------------------------------------


def test_winners_and_losers(tmp_path):
    got = read_ratings(write(tmp_path, "winner,loser,prompt,rater\na,b,fox,x\na,b,fox,y\nc,a,cat,x\n"), group="prompt")
    assert (got.kind, got.by, got.scale) == ("pairs", "image", None)
    assert columns(got.table) == {
        "winner": ["a", "a", "c"],
        "loser": ["b", "b", "a"],
        "group": ["fox", "fox", "cat"],
        "rater": ["x", "y", "x"],
    }


@pytest.mark.parametrize(
    ("header", "choices"),
    [
        ("image_a,image_b,choice", ("a", "B", "tie")),
        ("image_a,image_b,winner", ("image_a", "image_b", "draw")),
        ("image_1,image_2,label", ("1", "2", "same")),
        ("left,right,preference", ("left", "Right", "equal")),
        ("image_left,image_right,winner", ("left", "right", "both")),
        ("image_a,image_b,winner", ("p.jpg", "r.jpg", "neither")),
    ],
)
def test_two_sides_and_a_choice(tmp_path, header, choices):
    ids = [("p.jpg", "q.jpg"), ("p.jpg", "r.jpg"), ("q.jpg", "r.jpg")]
    rows = [f"{a},{b},{c},{i}" for i, ((a, b), c) in enumerate(zip(ids, choices, strict=True))]
    got = read_ratings(write(tmp_path, f"{header},row\n" + "\n".join(rows) + "\n"))
    assert columns(got.table) == {
        "winner": ["p.jpg", "r.jpg", "q.jpg", "r.jpg"],
        "loser": ["q.jpg", "p.jpg", "r.jpg", "q.jpg"],
        "n": [1.0, 1.0, 0.5, 0.5],
        "row": [0, 1, 2, 2],
    }


def test_votes_for_a_pair_are_halved_by_a_tie(tmp_path):
    got = read_ratings(write(tmp_path, "left,right,result,votes,group\np,q,tie,6,g\np,r,left,3,h\n"), score="result")
    assert columns(got.table) == {
        "winner": ["p", "q", "p"],
        "loser": ["q", "p", "r"],
        "n": [3.0, 3.0, 3.0],
        "group": ["g", "g", "h"],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_a,image_b,choice\np,q,c\n", "line 2: choice is 'c'; it must be a, b, tie, or the id"),
        ("image_1,image_2,choice\np,q,0\n", "line 2: choice is '0'; it must be 1, 2, tie, or the id"),
        ("image_a,image_b,choice\np,q,\n", "no choice is filled in"),
        ("image_1,image_2,choice\n2,1,1\n", "line 2: choice is '1': a side, or the image .* Write image_1 or image_2"),
        ("image_a,image_b,choice\np,q,a\np,p,a\n", "line 3: 'p' is compared with itself"),
        ("winner,loser\np,p\n", "line 2: 'p' is compared with itself"),
        ("image_a,image_b,who\np,q,a\n", r"no column for the choice .*Columns: image_a, image_b, who"),
        ("winner,loser,n\np,q,x\n", "line 2: n is 'x', not a number of votes"),
        ("winner,loser\n", "no ratings"),
    ],
)
def test_a_comparison_with_a_mistake_says_where(tmp_path, text, message):
    with pytest.raises(HeadError, match=message):
        read_ratings(write(tmp_path, text))


def test_left_and_right_beside_an_image_are_no_pair(tmp_path):
    got = read_ratings(write(tmp_path, "image,left,right,label\na,3,9,1\nb,4,5,0\n"))
    assert got.kind == "labels" and list(got.table) == ["image", "score", "left", "right"]


# Several files -------------------------------------------------------------------------------------------------------


def test_each_of_several_files_is_a_source(tmp_path):
    a = write(tmp_path, "image,score,n,theme\nx,1,5,sky\ny,2,6,sea\n", "mine.csv")
    b = write(tmp_path, "url,score,group\nhttp://e/x,9,g\n", "theirs.csv")
    got = read_ratings(a, b)
    assert (got.kind, got.by, got.scale) == ("scores", "image", None)
    assert columns(got.table) == {
        "image": ["x", "y", "http://e/x"],
        "score": [1.0, 2.0, 9.0],
        "n": [5.0, 6.0, None],
        "group": [None, None, "g"],
        "source": ["mine", "mine", "theirs"],
        "theme": ["sky", "sea", None],
    }
    bins = write(tmp_path, "image,1,2,3\nx,1,0,0\n", "bins.csv")
    assert read_ratings(bins).scale == (1.0, 3.0) and read_ratings(a, bins).scale is None


def test_an_image_may_be_in_two_sources_but_not_twice_in_one(tmp_path):
    one = write(tmp_path, "image,score,source\nx,1,s\nx,2,t\n", "one.csv")
    assert columns(read_ratings(one).table)["source"] == ["s", "t"]
    two = write(tmp_path, "image,score,source\nx,1,s\n", "two.csv")
    with pytest.raises(HeadError, match="'x' of the source 's' is in two of"):
        read_ratings(one, two)
    with pytest.raises(HeadError, match=r"line 3: 'x' was rated before \(line 2\)"):
        read_ratings(write(tmp_path, "image,score,source\nx,1,s\nx,2,s\n"))
    with pytest.raises(HeadError, match="given twice"):
        read_ratings(one, one)


def test_files_of_one_name_stay_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "image,score\nx,1\n")
    got = read_ratings(tmp_path / "a" / "r.csv", tmp_path / "b" / "r.csv")
    assert [s.rsplit("/", 2)[-2:] for s in got.table["source"]] == [["a", "r"], ["b", "r"]]


def test_raters_of_two_sources_are_different_people(tmp_path):
    votes = rated(tmp_path)
    both = pd.concat([votes.assign(source="a"), votes.assign(source="b", score=votes["score"] * 10)])
    both.to_csv(tmp_path / "r.csv", index=False)
    table = read_ratings(tmp_path / "r.csv").table
    a, b = (table[table["source"] == s]["score"].to_numpy() for s in "ab")
    np.testing.assert_allclose(10 * a, b, rtol=1e-8)
    votes.to_csv(tmp_path / "alone.csv", index=False)
    np.testing.assert_allclose(a, read_ratings(tmp_path / "alone.csv").table["score"], rtol=1e-8)


def test_files_of_different_kinds_are_refused(tmp_path):
    a = write(tmp_path, "image,score\nx,3\n", "a.csv")
    b = write(tmp_path, "winner,loser\nx,y\n", "b.csv")
    with pytest.raises(HeadError, match=r"a.csv holds scores, .*b.csv holds pairs"):
        read_ratings(a, b)


def test_the_oasis_ratings(shared):
    got = read_ratings(shared / "oasis" / "ratings.csv", score="beauty_mean", group="theme")
    assert (got.kind, got.by, len(got.table)) == ("scores", "image", 317)
    assert list(got.table) == ["image", "score", "n", "sd", "group", "caption", "category"]
    assert got.table["group"].nunique() == 104
    assert got.table["sd"].between(0.5, 2.5).all() and got.table["n"].between(104, 368).all()
    files = sorted(f"images/{p.name}" for p in (shared / "oasis" / "images").iterdir())
    rows, reasons = join(got.table["image"], got.by, {"path": files})
    assert set(reasons) == {""} and [files[i] for i in rows] == list(got.table["image"])


# Joining -------------------------------------------------------------------------------------------------------------


IMAGES = {
    "key": ["0001", "0002", "0003", "0004", "0005"],
    "path": ["p/a.jpg", "p/b.JPG", "q/a.jpg", "q/c.d.webp", "e.png"],
    "url": ["http://h/1.jpg", "http://h/2.jpg", "http://h/1.jpg", "http://h/4.jpg", "http://h/5.jpg"],
    "sha256": ["aa" * 32, "bb" * 32, "aa" * 32, "dd" * 32, None],
}
DIFFERENT = IMAGES | {"sha256": [f"{i:064d}" for i in range(5)]}


@pytest.mark.parametrize(
    ("ids", "rows"),
    [
        (["0002", "0004", "0009"], [1, 3, -1]),
        (["./p\\a.jpg", "q//./a.jpg", "q/c.d.webp"], [0, 2, 3]),
        (["x/b.JPG", "x/c.d.webp", "e.png", "e.jpg"], [1, 3, 4, -1]),
        (["c.d", "b", "e", "z"], [3, 1, 4, -1]),
        (["e", "e", "b"], [4, 4, 1]),
        (["0001", "0002", "b.JPG"], [0, 1, -1]),  # the way of most, for all
        (["0001", "e.png"], [0, -1]),  # the earlier way, where two find as many
        (["0001", "http://h/2.jpg", "DD" * 32], [0, 1, 3]),
        ([], []),
    ],
)
def test_an_image_is_found_by_key_path_name_or_stem(ids, rows):
    for images in (IMAGES, pd.DataFrame(IMAGES)):
        got, reasons = join(ids, "image", images)
        assert got.tolist() == rows
        assert reasons == ["" if r >= 0 else "not found" for r in rows]


def test_an_id_that_fits_several_images_is_ambiguous():
    rows, reasons = join(["a.jpg", "e.png", "c.d.webp"], "image", DIFFERENT)
    assert (rows.tolist(), reasons) == ([-1, 4, 3], ["ambiguous", "", ""])
    rows, _ = join(["a.jpg", "e.png", "c.d.webp"], "image", IMAGES)  # the same bytes: the first will do
    assert rows.tolist() == [0, 4, 3]
    rows, reasons = join(["a.jpg"], "image", {"path": IMAGES["path"]})
    assert (rows.tolist(), reasons) == ([-1], ["ambiguous"])


def test_an_image_of_another_folder_is_not_taken_for_a_missing_one():
    paths = {"path": ["x/1.jpg", "x/2.jpg", "x/3.jpg"]}
    rows, reasons = join(["x/1.jpg", "x/2.jpg", "y/2.jpg"], "image", paths)
    assert (rows.tolist(), reasons) == ([0, 1, -1], ["", "", "not found"])
    rows, reasons = join(["other/1.jpg", "other/2.jpg", "y/2.jpg"], "image", paths)
    assert (rows.tolist(), reasons) == ([0, -1, -1], ["", "ambiguous", "ambiguous"])
    rows, reasons = join(["1.png", "1.jpeg", "2"], "image", paths)
    assert (rows.tolist(), reasons) == ([-1, -1, 1], ["ambiguous", "ambiguous", ""])
    rows, _ = join(["1", "1.jpg", "z/1.jpg", "2"], "image", paths)
    assert rows.tolist() == [0, 0, 0, 1]


def test_urls_and_hashes_are_found():
    rows, reasons = join(["http://h/2.jpg", "http://h/1.jpg", "http://h/9.jpg"], "url", DIFFERENT)
    assert (rows.tolist(), reasons) == ([1, -1, -1], ["", "ambiguous", "not found"])
    assert join(["http://h/1.jpg"], "url", IMAGES)[0].tolist() == [0]
    assert join(["BB" * 32, "cc" * 32], "sha256", IMAGES)[0].tolist() == [1, -1]
    assert join(["http://far/e.png"], "image", IMAGES)[0].tolist() == [-1]  # a URL's last part is no name
    assert join(["http://h/4.jpg"], "image", {"url": IMAGES["url"]})[0].tolist() == [3]


def test_images_without_what_they_are_joined_by_are_refused():
    for by, images, message in [
        ("url", {"key": ["a"]}, "name images by url cannot be joined to key"),
        ("image", {}, "cannot be joined to no column"),
        ("name", {"key": ["a"]}, "not by 'name'"),
        ("image", {"key": ["a"], "path": []}, "unequal length: key 1, path 0"),
    ]:
        with pytest.raises(HeadError, match=re.escape(message)):
            join(["a"], by, images)
