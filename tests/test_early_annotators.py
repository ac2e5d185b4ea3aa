"""Early rules on what annotators and the encoder say: dear ones run for the images that are left, and for no other."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from aesthetic.errors import UserError
from curate import verify
from curate.annotators.order import ENCODER, early_of, first_pass, made_late, passes, set_early, steps
from curate.annotators.quality import Quality
from curate.annotators.registry import make_annotators
from curate.encoders.bundled import BundledEncoder
from curate.layout import Data
from curate.ledger.select import select
from curate.ledger.view import open_ledger
from curate.store.files import read_json, sweep
from pipelines.checks import check_selection
from pipelines.recipe import Recipe, load_recipe
from tests.real_data import image_files
from tests.stages import embed_shards
from tests.test_annotators import copy_of

COLUMNS = "columns={lang: language, quality: quality, aesthetic: bundled-aesthetic, open_nsfw: open-nsfw}"
RULES = "select.rules={english: \"lang in ('en', 'und')\", sharp: quality_sharpness > 60, liked: aesthetic > 4.5}"


def recipe_of(*settings: str) -> Recipe:
    return load_recipe("bundled", [COLUMNS, RULES, *settings])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How many images the encoder and `quality` saw, and how often one was decoded."""
    from curate.annotators import stage

    seen = Counter[str]()
    encode, quality, decode = BundledEncoder.encode_prepared, Quality.preprocess, stage.decode

    def encoded(self: BundledEncoder, batch: np.ndarray) -> np.ndarray:
        seen["encoded"] += len(batch)
        return encode(self, batch)

    def looked_at(self: Quality, image: np.ndarray) -> Any:
        seen["quality"] += 1
        return quality(self, image)

    def decoded(data: bytes) -> np.ndarray:
        seen["decoded"] += 1
        return decode(data)

    monkeypatch.setattr(BundledEncoder, "encode_prepared", encoded)
    monkeypatch.setattr(Quality, "preprocess", looked_at)
    monkeypatch.setattr(stage, "decode", decoded)
    yield seen


def embed(data: Data, recipe: Recipe, seen: Counter[str]) -> dict[str, int]:
    seen.clear()
    reported = embed_shards(data, recipe)
    did = dict(seen)
    seen["reported"] = reported
    return did


def vectors(data: Data) -> dict[str, np.ndarray]:
    """Key -> vector; as clip-retrieval reads them, row by row beside their metadata."""
    found = {}
    for shard in (s.shard for s in data.plan.shards):
        keys = pq.read_table(data.metadata(shard))["image_path"].to_pylist()
        images, texts = np.load(data.image_vectors(shard)), np.load(data.text_vectors(shard))
        assert len(keys) == len(images) == len(texts) == read_json(data.embedded_record(shard))["sample_count"]
        found |= dict(zip(keys, images, strict=True))
    return found


def columns(data: Data, *names: str) -> dict[str, tuple[Any, ...]]:
    ledger = Data(data.root).ledger.filter("status = 'success'").order("key")
    places = [ledger.columns.index(name) for name in ("key", *names)]
    return {row[places[0]]: tuple(row[i] for i in places[1:]) for row in ledger.fetchall()}


def kept(data: Data, recipe: Recipe) -> set[str]:
    select(Data(data.root), recipe.select)
    verdicts = pq.read_table(data.verdicts(recipe.select.name)).to_pylist()
    return {row["key"] for row in verdicts if row["verdict"] == "kept"}


@pytest.fixture(scope="module")
def everything(real_data: Data, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A data folder with all vectors and columns, of a run without early rules."""
    data = copy_of(real_data, tmp_path_factory.mktemp("everything") / "data")
    embed_shards(data, recipe_of())
    return data


def unembedded(real_data: Data, root: Path) -> Data:
    data = copy_of(real_data, root)
    for record in data.records("embedded"):
        if record != data.space_record:
            record.unlink()
    return data


# --------------------------------------------------------------------------------------------------------------- order


def test_dear_ones_wait_for_early_rules_and_cheap_ones_run_first() -> None:
    specs = {
        "lang": "language",
        "quality": "quality",
        "faces": {"use": "faces", "where": "quality_sharpness > 3"},
        "pdq": "pdq",
        "taste": "bundled-aesthetic",
        "text": "text",
        "dup": {"use": "near-duplicates", "phash": 4},
    }
    rules = {"english": "lang = 'en'", "few": "faces_count < 2 or faces_count is null", "good": "taste > 4"}

    def order(*names: str) -> list[set[str]]:
        made = make_annotators(specs)
        early = set_early(made, {name: rules[name] for name in names})
        first = first_pass(made, early[ENCODER])
        assert passes(made, early[ENCODER])[0] == first
        return [set(step) for step in steps({name: made[name] for name in first}, early[ENCODER])]

    everything = {"lang", "quality", "pdq", "text", ENCODER}
    assert order() == [everything, {"taste"}]
    assert order("english") == [{"lang"}, everything - {"lang"}, {"taste"}]
    assert order("english", "few") == [{"lang"}, {"quality"}, {"faces"}, {"pdq", "text", ENCODER}, {"taste"}]
    assert order("few", "good") == [{"quality"}, {"faces"}, {ENCODER}, {"taste"}, {"lang", "pdq", "text"}]

    made = make_annotators(specs)
    found = early_of(made, rules)
    assert found["lang"] == found["taste"] == found["dup"] == {}
    assert [*found["quality"]] == [*found["faces"]] == ["english"]
    assert [*found[ENCODER]] == ["english", "few"] and [*found["text"]] == ["english", "few", "good"]
    assert made_late(made) == {"dup", "dup_size", "dup_nearest", "dup_of"}


def test_what_must_not_be_seen_is_looked_for_in_every_image(tmp_path: Path) -> None:
    (tmp_path / "never.txt").write_text("f" * 64 + "\n")
    never = {"use": "near", "against": str(tmp_path / "never.txt"), "deny": True}
    made = make_annotators({"lang": "language", "never": never, "pdq": "pdq", "text": "text"})
    found = early_of(made, {"english": "lang = 'en'"})
    assert found["never"] == found["pdq"] == {} and found["text"]


def test_what_can_not_be_early_is_refused(real_data: Data) -> None:
    dup = "columns.dup={use: near-duplicates, phash: 4}"
    late = "columns.late={use: quality, where: dup is null}"
    for condition, words in (("dup is null", "dup is made when all"), ("late_sharpness > 3", "late_sharpness is made")):
        settings = [dup, late, f"select.rules.once={condition}", "select.early=[once]"]
        recipe = recipe_of(*settings)
        with pytest.raises(UserError, match=words):
            check_selection(
                real_data, recipe, real_data.plan.extra_columns, make_annotators({**recipe.columns, "pdq": "pdq"})
            )


# ---------------------------------------------------------------------------------------------------------- embedding


def test_only_what_is_left_is_embedded_and_the_rest_comes_when_it_is_wanted(
    real_data: Data, everything: Data, tmp_path: Path, counted: Counter[str]
) -> None:
    data, whole = unembedded(real_data, tmp_path / "data"), vectors(everything)
    early, lang = recipe_of("select.early=[english]"), columns(everything, "lang")
    left = {key for key, (language,) in lang.items() if language in ("en", "und")}
    assert 15 < len(left) < len(lang) == len(image_files())

    assert embed(data, early, counted) == dict.fromkeys(("encoded", "quality", "decoded"), len(left))
    some = vectors(data)
    assert some.keys() == left and all(np.array_equal(some[key], whole[key]) for key in left)  # bit for bit
    full, part = (columns(d, "aesthetic", "open_nsfw", "quality_sharpness") for d in (everything, data))
    assert part == {key: values if key in left else (None, None, None) for key, values in full.items()}
    cosines, theirs = (columns(d, "similarity") for d in (data, everything))
    assert all(cosines[key][0] is None for key in lang.keys() - left)
    np.testing.assert_allclose([cosines[k][0] for k in left], [theirs[k][0] for k in left], atol=1e-5)
    record = read_json(data.embedded_record(0))
    assert record["early"] == {"english": "lang in ('en', 'und')"}
    assert read_json(data.annotations_record("aesthetic", 0))["early"] == record["early"]
    assert not any(verify.verify(data))
    with open_ledger(data) as con:  # joined by position where all images have a row, else by key
        assert con.execute("SELECT count(*), bool_and(aligned) FROM _aligned").fetchall() == [(len(lang), True)]
    assert kept(data, early) == kept(everything, early) == kept(everything, recipe_of())
    assert embed(data, early, counted) == {}

    # as if there had been none; and back: nothing is computed, nothing is thrown away
    files = {p: p.stat().st_mtime_ns for p in (data.root / "embedded").rglob("*.npy")}
    assert embed(data, recipe_of(), counted)["encoded"] == len(lang) - len(left)
    now = vectors(data)
    assert now.keys() == whole.keys() and all(np.array_equal(now[key], whole[key]) for key in whole)
    assert columns(data, "aesthetic", "open_nsfw") == columns(everything, "aesthetic", "open_nsfw")
    assert "early" not in read_json(data.embedded_record(0)) and kept(data, recipe_of()) == kept(
        everything, recipe_of()
    )
    files = {p: p.stat().st_mtime_ns for p in (data.root / "embedded").rglob("*.npy")}
    assert embed(data, early, counted) == {}
    assert files == {p: p.stat().st_mtime_ns for p in (data.root / "embedded").rglob("*.npy")}
    assert kept(data, early) == kept(everything, early) and vectors(data).keys() == whole.keys()


def test_pixels_that_are_asked_early_are_asked_of_what_captions_leave(
    real_data: Data, everything: Data, tmp_path: Path, counted: Counter[str]
) -> None:
    data, early = unembedded(real_data, tmp_path / "data"), recipe_of("select.early=[sharp, english]")
    facts = columns(everything, "lang", "quality_sharpness")
    readable = {key for key, (lang, _) in facts.items() if lang in ("en", "und")}
    left = {key for key in readable if facts[key][1] > 60}
    assert 5 < len(left) < len(readable)
    did = embed(data, early, counted)
    assert did == {"quality": len(readable), "encoded": len(left), "decoded": len(readable) + len(left)}
    assert counted["reported"] == len(facts)  # each once, also what was left out
    assert vectors(data).keys() == left and kept(data, early) == kept(everything, early)
    # wider by one rule: only what that one left out
    did = embed(data, recipe_of("select.early=[english]"), counted)
    assert did == {"encoded": len(readable) - len(left), "decoded": len(readable) - len(left)}
    assert vectors(data).keys() == readable


def test_an_early_rule_on_vectors_spares_what_comes_after_them(
    real_data: Data, everything: Data, tmp_path: Path, counted: Counter[str]
) -> None:
    data, early = unembedded(real_data, tmp_path / "data"), recipe_of("select.early=[liked]")
    liked = {key for key, (score,) in columns(everything, "aesthetic").items() if score > 4.5}
    assert 0 < len(liked) < len(vectors(everything))
    did = embed(data, early, counted)
    assert did["encoded"] == len(vectors(everything)) and did["quality"] == len(liked)
    assert kept(data, early) == kept(everything, early)


def test_functions_of_all_rows_see_what_early_rules_leave_whenever_these_came(
    real_data: Data, everything: Data, tmp_path: Path
) -> None:
    data, rules = unembedded(real_data, tmp_path / "data"), "select.rules={english: \"lang in ('en', 'und')\", "
    rules += 'nice: "top(aesthetic, 0.4)", one: "at_most(2, width, aesthetic)"}'
    early = recipe_of(rules, "select.early=[english]")
    embed_shards(data, early)
    left = vectors(data).keys()
    chosen = kept(data, early)
    assert chosen == kept(everything, early) and 0 < len(chosen) <= round(0.4 * len(left))
    nice = recipe_of(rules, "select.early=[english]", "select.rules.one=")
    assert len(kept(data, nice)) == round(0.4 * len(left)) and kept(data, nice) == kept(everything, nice)


def test_a_later_selection_says_what_it_can_not_judge(real_data: Data, everything: Data, tmp_path: Path) -> None:
    data = unembedded(real_data, tmp_path / "data")
    embed_shards(data, recipe_of("select.early=[english]"))
    later = recipe_of("select.rules.english=", "select.rules.sharp=").select  # liked: aesthetic
    selection = select(data, later)
    images, left = len(vectors(everything)), len(vectors(data))
    assert selection.unjudged == images - left > 0
    assert any("can't be judged" in w and "retry" in w and "--early" in w for w in selection.warnings)
    stricter = select(data, replace(later, rules={"english": "lang in ('en', 'und')", **later.rules}))
    assert stricter.unjudged == 0 and not any("judged" in w for w in stricter.warnings)


def test_duplicates_and_clusters_are_looked_for_among_what_has_vectors(
    real_data: Data, everything: Data, tmp_path: Path
) -> None:
    data, early = unembedded(real_data, tmp_path / "data"), recipe_of("select.early=[english]")
    early = replace(
        early,
        columns={
            **early.columns,
            "dup": {"use": "near-duplicates", "cosine": 0.9},
            "kind": {"use": "clusters", "k": 3},
        },
    )
    embed_shards(data, early)
    left = vectors(data).keys()
    found = columns(data, "dup", "kind", "kind_cosine")
    assert all(found[key] == (None, None, None) for key in found.keys() - left)
    assert all(found[key][1] in range(3) for key in left)
    given = vectors(data)
    groups = {key: found[key][0] for key in left if found[key][0] is not None}
    near = {
        a
        for a in left
        for b in left
        if a != b and float(given[a].astype(np.float32) @ given[b].astype(np.float32)) > 0.9
    }
    assert groups.keys() == near and near


# ---------------------------------------------------------------------------------------------------------------- kills


def _embed_until(root: Path, kill_at: int) -> None:
    """In a child: embed, and be killed before the n-th file gets its name."""
    done, rename = 0, os.replace

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal done
        done += 1
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*args, **kwargs)

    os.replace = counted
    embed_shards(Data(root), recipe_of("select.early=[english, sharp]"))


@pytest.mark.long
def test_killed_in_either_pass_it_goes_on_where_it_was(real_data: Data, tmp_path: Path) -> None:
    early = recipe_of("select.early=[english, sharp]")
    fresh = unembedded(real_data, tmp_path / "fresh")
    embed_shards(fresh, early)
    data, context = unembedded(real_data, tmp_path / "data"), multiprocessing.get_context("spawn")
    killed = 0
    for kill_at in (2, 3, 6, 0):  # after language; after quality; amid the vectors; and not at all
        child = context.Process(target=_embed_until, args=(data.root, kill_at))
        child.start()
        child.join(120)
        sweep(data.root)  # as a run begins
        killed += child.exitcode == -signal.SIGKILL
    assert killed == 3 and child.exitcode == 0
    assert vectors(data).keys() == vectors(fresh).keys()
    for path in sorted(p for stage in ("embedded", "annotated") for p in (fresh.root / stage).rglob("*")):
        if path.suffix in (".npy", ".parquet"):
            assert (data.root / path.relative_to(fresh.root)).read_bytes() == path.read_bytes(), path
    assert kept(data, early) == kept(fresh, early)
