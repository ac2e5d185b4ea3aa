"""The command line: exit codes, messages, what it imports, and the loop of rating, fitting, scoring and selecting."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from real_data import BUNDLED, SCORE, embed_all, fetch_all
from small_web import small_web

from curate.layout import Data
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from pipelines.cli import build_parser, main
from pipelines.commands import COMMANDS, find
from pipelines.options import Options, command_line, facts_of, from_parsed
from pipelines.recipe import load_recipe, store_recipe

ROOT = Path(__file__).parents[1]


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pipelines.cli", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def data(real_data: Data, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A copy of the real data folder that may be changed, with the recipe that made it."""
    copy = Data(tmp_path_factory.mktemp("cli") / "data")
    shutil.copytree(real_data.root, copy.root)
    settings = [f"source.shard_size={copy.plan.shard_size}", "images.size=96"]
    settings += [f"select.rules.{name}=" for name in load_recipe("bundled").select.rules]
    store_recipe(copy, load_recipe("bundled", [*settings, "select.rules.seen=width > 0"]))
    return copy


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A list of one URL that nobody answers."""
    path = tmp_path / "list.csv"
    path.write_text("url,caption,WIDTH\nhttp://127.0.0.1:9/a.jpg,a dog,512\n")
    return path


# ---------------------------------------------------------------------------------------------------- light and quick


@pytest.mark.parametrize(
    "words",
    [
        *(["--help"], ["curate", "--help"], ["recipe"], ["recipe", "bundled"], ["status"], ["query"], ["select"]),
        *(["heads"], ["heads", "show", "laion-v2"]),
    ],
)
def test_light_commands_load_neither_torch_nor_ray(words: list[str], data: Data) -> None:
    if words[0] in ("status", "query", "select") and len(words) == 1:
        words = [words[0], str(data.root), *(["select count(*) from ledger"] if words[0] == "query" else [])]
    code = f"""
import os, sys
from pipelines.cli import main
try:
    main({words!r})
except SystemExit as e:
    assert not e.code
heavy = {{"torch", "ray", "faiss", "open_clip", "onnxruntime", "transformers", "sklearn", "matplotlib"}}
heavy &= sys.modules.keys()
print(heavy or "none", file=sys.stderr, flush=True)
sys.stdout.flush()
os._exit(bool(heavy))  # as the console script ends
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert time.monotonic() - began < 10  # a quiet machine takes 0.1 to 1.5 s


def test_help_is_quick() -> None:
    """Of every command: what is large is imported by what it does, not by its options."""
    code = f"""
import contextlib, io, sys
from pipelines.cli import main
for command in {[*COMMANDS]!r}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main([command, "--help"])
heavy = "torch ray pyarrow duckdb pandas pydantic cv2 PIL aiohttp open_clip transformers sklearn matplotlib faiss"
heavy = [*heavy.split(), "safetensors"]
print([name for name in heavy if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"curate", "fetch", "embed", "annotate", "select", "pack", "retry", "status", "query"} < COMMANDS.keys()
    for command in COMMANDS:
        with pytest.raises(SystemExit) as e:
            main([command, "--help"])
        assert e.value.code == 0
        out = capsys.readouterr().out
        assert f"usage: tastemaker {command}" in out and "--verbose" in out and "--json" in out
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(re.search(rf"^ +{command}(?: |$)", out, re.M) for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["selct", "data"], "invalid choice: 'selct' (choose from curate, fetch, .*). Did you mean select[?]"),
        (["select", "data", "--nam", "x", "--uid"], "expected one argument"),
        (["select", "data", "--nmae=x"], "unrecognized arguments: --nmae=x. Did you mean --name[?]"),
        (["train", "shards", "--out", "m", "--form", "x"], "unrecognized arguments: --form. Did you mean --from[?]"),
        (["curate", "list.csv", "--otu", "data"], "unrecognized arguments: --otu. Did you mean --out[?]"),
        (["curate", "list.csv", "--out", "data", "--limit", "0"], "argument --limit: at least 1 is expected"),
        (["fit", "ratings.csv"], "the following arguments are required: --out"),
    ],
)
def test_words_that_are_no_options(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(words)
    assert e.value.code == 2
    assert re.search(told.replace("(choose", "[(]choose").replace(".*)", ".*[)]"), capsys.readouterr().err)


def test_options_are_a_dataclass() -> None:
    """Defaults stand in it alone; what is not a secret is in the line of --json."""

    def read(*words: str) -> Options:
        return from_parsed(find(words[0])[0], build_parser(words[0]).parse_args(words))

    train = read("train", "shards", "--out", "m", "--from", "start", "--lora", "--lr", "1e-4")
    assert (train.start, train.lora, train.lr, train.batch, train.seed) == ("start", 8, 1e-4, None, 0)  # type: ignore[attr-defined]
    assert train == read(*shlex.split(command_line("train", train))[1:])
    fit = read("fit", "a.csv", "b.csv", "--out", "h", "--scale", "1", "7", "--suggest", "1_000")
    assert facts_of(fit) == {
        "ratings": (Path("a.csv"), Path("b.csv")),
        "out": Path("h"),
        "scale": (1.0, 7.0),
        "network": False,
        "suggest": 1000,
    }
    assert fit == read(*shlex.split(command_line("fit", fit))[1:])
    serve = read("serve", "model", "--token", "a secret", "--lora", "a", "--lora", "b:2")
    assert "a secret" not in str(facts_of(serve)) and facts_of(serve)["lora"] == ("a", "b:2")


def test_no_command_at_all_shows_help_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: tastemaker" in capsys.readouterr().out


def test_whoever_has_read_enough_is_no_error() -> None:
    shell = f"{sys.executable} -m pipelines.cli recipe bundled | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("source:")


# ------------------------------------------------------------------------------------------------------ bad input: 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["curate", "nowhere.parquet"], r"nowhere\.parquet: there is no such file or folder"),
        (["curate", "empty.csv"], r"empty\.csv: is empty"),
        (["curate", "header.csv"], r"header\.csv: has no rows"),
        (["curate", "nourl.csv"], r"no column of URLs.*source\.url.*Columns: caption, foo"),
        (["curate", "junk.parquet"], r"junk\.parquet"),
        (["curate", "list.csv", "--set", "source.url=link"], "link"),
        (["curate", "list.csv", "--set", "source.where=lang = 'en'"], r"source\.where.*'lang'"),
        (["curate", "list.csv", "--recipe", "bundld"], r"no recipe 'bundld'.*did you mean bundled"),
        (["curate", "list.csv", "--set", "images.sise=3"], r"unknown key images\.sise \(did you mean size\?\)"),
        (["curate", "list.csv", "--set", "select.rules.x=sim > 1"], "rule x .*no column sim"),
        (["curate", "list.csv", "--set", "select.rules.x=similarty > 0"], "Did you mean similarity"),
        (
            ["curate", "list.csv", "--set", "select.rules.x=WIDTH > 0"],
            r"WIDTH may mean two columns: write source\.WIDTH",
        ),
        (["curate", "list.csv", "--set", "select.rules.x=aesthetic > 50"], "aesthetic goes from 1 to 7, and 50"),
        (["curate", "list.csv", "--set", "select.rules.x=1 +"], "rule x .*syntax"),
        (["curate", "list.csv", "--set", "columns.l=laion-v2"], "laion-v2 reads vectors of open_clip:ViT-L-14-quick"),
        (["curate", "list.csv", "--set", "columns.l=laion-v3"], "no head laion-v3.*Did you mean laion-v2"),
        (["curate", "list.csv", "--set", "embed.encoder=clip"], "no encoder 'clip'|embed.encoder is clip"),
        (["curate", "list.csv", "--set", "fetch.engine=curl"], "fetch.engine: 'curl'"),
        (["curate", "list.csv", "--set", "select.name=a/b"], "can't be a selection's name"),
        (["fetch", "nowhere.parquet"], "no such file"),
        (["curate", "list.csv", "--set", "fetch.verify=md5"], "fetch.verify.*md5"),
        (["curate", "list.csv", "--set", "fetch.deny=[no.txt]"], r"no\.txt"),
        (["curate", "list.csv", "--ray-address", "127.0.0.1:9"], "--ray-address 127.0.0.1:9: .*Connection refused"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    words: list[str], told: str, tmp_path: Path, listed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.csv").touch()
    (tmp_path / "header.csv").write_text("url,caption\n")
    (tmp_path / "nourl.csv").write_text("caption,foo\na,b\n")
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 no parquet at all")
    before = sorted(tmp_path.iterdir())
    recipe = [] if "--recipe" in words else ["--recipe", "bundled"]
    words = [words[0], str(tmp_path / words[1]), *words[2:], *recipe, "--out", str(tmp_path / "data")]
    for dry in ([], ["--dry-run"]):  # which accepts nothing that the run refuses
        code = main([*words, *dry])
        out, err = capsys.readouterr()
        assert code == 2
        assert re.search(told, err, re.S), err
        assert err.startswith("tastemaker: ") and "Traceback" not in err and "next:" not in out
        assert sorted(tmp_path.iterdir()) == before or ("--ray-address" in words and not dry)


@pytest.mark.parametrize("command", ["status", "verify", "select", "pack", "annotate", "embed", "retry", "query"])
def test_a_folder_that_is_no_data_folder(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path), *(["select 1"] if command == "query" else [])]) == 2
    assert f"{tmp_path} is not a data folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_names_that_are_near_a_data_folder(listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    make_plan(str(listed), Data(root), SourceConfig())
    (tmp_path / "file").touch()
    for name, told in (
        ("", "the name of a folder is empty"),
        (str(tmp_path / "nosuch"), "nosuch is not a data folder: it is not there"),
        (str(tmp_path / "file"), "file is not a data folder: it is a file"),
        (str(root / "fetched"), f"lies in one. Did you mean {root}?"),
    ):
        assert main(["status", name]) == 2
        assert told in capsys.readouterr().err


def test_an_object_store_without_credentials(
    listed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path))
    assert main(["curate", str(listed), "--out", "s3://bucket/data"]) == 2
    assert "s3://bucket/data: no credentials for it are here: set AWS_ACCESS_KEY_ID" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["select", "--set", "select.rules.x=foo > 1"], "rule x .*no column foo"),
        (["select", "--set", "select.rules.x=aesthetic >= 9"], "aesthetic goes from 1 to 7, and 9 is outside"),
        (["select", "--set", "select.rules.x=open_nsfw < 20"], "open_nsfw goes from 0 to 1"),
        (["select", "--name", "../x"], "can't be a selection's name"),
        (["pack", "--name", "unknown"], "no selection unknown.*There are"),
        (["annotate", "taste"], "expected NAME=SPEC"),
        (["annotate", "taste=nothing"], "no head nothing"),
        (["annotate", "taste=laion-v2"], "laion-v2.*bundled|bundled.*laion-v2"),
        (["annotate", "width=bundled-aesthetic"], "width"),
        (
            ["score", "--head", "taste=taste.head"],
            "is called `annotate` now: tastemaker annotate .* taste=taste.head",
        ),
        (["query", "select nothing from ledger"], "nothing"),
        (["query", "drop view ledger"], "one SELECT"),
        (["query", "select * from '/etc/passwd'"], "passwd"),
        (["embed", "--restart-from", "fetch"], "--restart-from fetch needs the list"),
    ],
)
def test_a_wrong_question_about_data(
    words: list[str], told: str, data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([words[0], str(data.root), *words[1:]])
    err = capsys.readouterr().err
    assert code == 2, err
    assert re.search(told, err, re.S), err
    assert "Traceback" not in err
    assert not (data.root / "annotated" / "width").exists()


REFUSED = [
    ([], "open_clip:ViT-L-14-quickgelu/openai are not on this machine.*embed.weights: FILE.*--recipe bundled"),
    (["--dry-run"], "open_clip:ViT-L-14-quickgelu/openai are not on this machine"),
    (["--set", "embed.encoder=open_clip:ViT-L-14/openai", "--set", "columns={}"], "write open_clip:ViT-L-14-quickgelu"),
    (
        ["--set", "embed.encoder=open_clip:ViT-L-15/openai", "--set", "columns={}"],
        "no architecture ViT-L-15; near: ViT-L",
    ),
    (
        ["--set", "embed.encoder=open_clip:ViT-L-14/own", "--set", "columns={}"],
        "no published weights called own.*it has o",
    ),
    (["--set", "embed.weights=list.csv"], r"list\.csv holds no weights: it begins with"),
]


def test_an_encoder_that_cannot_be_had_is_refused_before_anything_is_loaded(listed: Path) -> None:
    code = f"""
import contextlib, io, json, sys
from pipelines.cli import main
told = []
for words, _ in {REFUSED!r}:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(err):
        status = main(["curate", "list.csv", "--out", "data", *words])
    told.append((status, err.getvalue()))
heavy = {{"torch", "ray", "open_clip", "onnxruntime", "transformers"}} & sys.modules.keys()
print(json.dumps([told, sorted(heavy)]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(listed.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=listed.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told, heavy = json.loads(done.stdout)
    assert heavy == []
    for (status, err), (words, expected) in zip(told, REFUSED, strict=True):
        assert status == 2 and re.search(expected, err, re.S), (words, err)
    assert [p.name for p in listed.parent.iterdir()] == ["list.csv"]


def test_weights_that_are_not_where_they_should_be(
    listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["curate", str(listed), "--out", str(tmp_path / "data"), "--set", f"embed.weights={tmp_path / 'no.pt'}"]
    assert main(words) == 2
    assert "embed.weights: there is no file" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_verbose_shows_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path), "--verbose"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("tastemaker: ")


def test_an_error_of_ours_is_1_and_says_so(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table that was replaced by a folder: nothing that a user does by mistake."""
    copy = tmp_path / "data"
    shutil.copytree(data.root, copy)
    path = copy / "annotated" / "aesthetic" / "00000.parquet"
    path.unlink()
    path.mkdir()
    assert main(["verify", str(copy)]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err


# ------------------------------------------------------------------------------------------------------------ dry run


def test_a_dry_run_contacts_nothing_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_web(12, failing=()) as web:
        listed = web.write_list(tmp_path / "list.parquet")
        words = ["curate", str(listed), "--out", str(tmp_path / "data"), "--recipe", "bundled", "--dry-run"]
        words += [word for s in web.settings(5) for word in ("--set", s)]
        assert main([*words, "--json"]) == 0
        assert main([*words, "--limit", "7"]) == 0
        assert web.web.counts().requests.total() == 0
    out = capsys.readouterr().out
    assert "select:\n  name: bundled" in out and "shard_size: 5" in out
    assert "rows 12 of 12 listed · shards 3 · stages fetch, embed, select, pack" in out
    assert "rows 7 of 12 listed · shards 2" in out
    facts = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    assert facts["rows"] == 12 and facts["carried"] == ["WIDTH", "LICENSE"]
    assert not (tmp_path / "data").exists()


def test_the_command_that_a_dry_run_ends_with_is_the_one_that_was_asked_about(
    tmp_path: Path, listed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "a list.csv"
    listed.rename(copy)
    words = ["fetch", str(copy), "--out", str(tmp_path / "my data"), "--recipe", "bundled", "--limit", "7"]
    words += ["--set", "select.rules.x=caption != 'it''s $HOME'", "--set", "fetch.retries=0"]
    assert main([*words, "--dry-run"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    given = shlex.split(line.removeprefix("next: tastemaker "))
    options = vars(build_parser(words[0]).parse_args(words))
    assert vars(build_parser(given[0]).parse_args(given)) == options


def test_data_is_curated_by_its_own_recipe(
    data: Data, real_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --recipe. And a recipe.yaml where no data are is somebody else's."""
    words = ["curate", real_data.plan.list, "--out", str(data.root)]
    assert main([*words, "--dry-run", "--json"]) == 0
    out = capsys.readouterr().out
    facts = json.loads(out.splitlines()[-1])
    assert "seen: width > 0" in out and facts["shards"] == len(real_data.plan.shards)
    assert main([*words, "--dry-run", "--set", "images.size=97"]) == 2
    assert "images.size: 96 there, 97 asked for" in capsys.readouterr().err
    assert main([*words, "--dry-run", "--limit", "3"]) == 2
    assert "--limit 3 is fewer" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text("select: {name: theirs}\n")
    command = ["curate", real_data.plan.list, "--out", str(tmp_path), "--recipe", "everything", "--dry-run"]
    assert main(command) == 2
    assert "holds something else (recipe.yaml)" in capsys.readouterr().err


def test_a_dry_run_finds_a_full_disk(listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["curate", str(listed), "--out", str(tmp_path / "a" / "b"), "--recipe", "bundled", "--dry-run"]
    assert main([*words, "--set", "images.size=1000000000"]) == 1
    assert "MB are needed" in capsys.readouterr().err


def test_doctor_says_which_recipes_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imported_v25: Path) -> None:
    """With the hub out of reach; a copy of the weights in the hub's cache is enough."""
    import huggingface_hub.constants

    from pipelines.commands.doctor import examine

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    said: list[str] = []
    assert examine(said.append)
    text = "\n".join(said)
    assert "ok       recipe bundled\n" in text and "ok       recipe everything\n" in text
    assert "note     recipe laion-aesthetics-5 (the default) cannot run: the weights of open_clip:ViT-L-14" in text
    assert said[-1].startswith("note     run with `--recipe bundled`")
    for repository in ("vit_large_patch14_clip_224.openai", "ViT-SO400M-14-SigLIP-384"):
        snapshot = tmp_path / f"models--timm--{repository}" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
        (snapshot / "open_clip_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}      ")
    said.clear()
    assert examine(said.append)
    assert "ok       recipe laion-aesthetics-5 (the default)" in said
    assert any("siglip-aesthetics cannot run: the tokenizer of ViT-SO400M-14-SigLIP-384" in line for line in said)
    tokenizer = tmp_path / "models--timm--ViT-B-16-SigLIP"
    shutil.copytree(snapshot.parents[1], tokenizer)
    (tokenizer / "snapshots" / ("0" * 40) / "tokenizer_config.json").write_text("{}")
    said.clear()
    assert examine(said.append)
    assert "ok       recipe laion-aesthetics-5 (the default)" in said and not any("cannot run" in line for line in said)


# ------------------------------------------------------------------------------------------------- what the answers are


@pytest.mark.parametrize(
    "words",
    [
        ["status", "DATA"],
        ["verify", "DATA"],
        ["select", "DATA", "--name", "answers"],
        ["pack", "DATA", "--name", "answers"],
        ["annotate", "DATA"],
        ["query", "DATA", "select reason, count(*) n from ledger group by all"],
        ["heads"],
        ["heads", "show", "bundled-aesthetic"],
        ["recipe"],
        ["recipe", "everything"],
        ["doctor"],
    ],
)
def test_jsons_last_line_parses(words: list[str], data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([str(data.root) if w == "DATA" else w for w in words] + ["--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])


def test_status_and_query_agree(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    main(["status", str(data.root), "--json"])
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    main(
        [
            "query",
            str(data.root),
            "select coalesce(reason, 'success') as r, count(*) n from ledger group by all",
            "--json",
        ]
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["r"]: row["n"] for row in found} == facts["outcomes"]
    assert (facts["rows"], facts["shards"], facts["fetched"], facts["embedded"]) == (40, 3, 3, 3)


def test_a_selection_that_keeps_nothing_is_3(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["select", str(data.root), "--name", "none", "--set", "select.rules.x=similarity > 0.9"]) in (0, 3)
    out = capsys.readouterr().out
    assert re.search(r"^kept +0 ", out, re.M)
    assert main(["pack", str(data.root), "--name", "none"]) == 3
    err = capsys.readouterr().err
    assert "x" in err and "Traceback" not in err
    assert not (data.root / "shards" / "none").exists()


def test_select_and_pack_under_a_new_name(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["select", str(data.root), "--name", "stricter", "--set", "select.rules.best=top(aesthetic, 0.25)"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"next: tastemaker pack {data.root} --name stricter" in out
    assert re.search(r"^best +27 .*best 25% of aesthetic   \(median", out, re.M), out
    assert main(["pack", str(data.root), "--name", "stricter"]) == 0
    packed = pq.read_table(data.root / "shards" / "stricter" / "00000.parquet")
    assert packed.num_rows == 9
    assert (data.root / "report" / "stricter" / "sheet.png").exists()


def test_a_selection_is_made_again_by_its_own_rules(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(data.root)
    words = ["select", root, "--name", "own"]
    assert main([*words, "--set", "select.rules.best=top(aesthetic, 0.2)"]) == 0
    before = (data.root / "selected" / "own.parquet").read_bytes()
    assert main(["pack", root, "--name", "own"]) == 0
    capsys.readouterr()

    def status() -> tuple[str, dict[str, Any], str]:
        assert main(["status", root, "--json"]) == 0
        out = capsys.readouterr().out
        facts = json.loads(out.splitlines()[-1])
        following = next((line for line in out.splitlines() if line.startswith("next: ")), "")
        return next(line for line in out.splitlines() if line.startswith("selected  own:")), facts, following

    line, facts, _ = status()
    assert line.endswith("kept, packed") and facts["selected"]["own"]["stale"] == []
    (data.root / "selected" / "own.json").rename(data.root / "own.json")  # as after any change of the ledger
    record = json.loads((data.root / "own.json").read_text())
    record["inputs"]["fetched"] = "0" * 16
    (data.root / "selected" / "own.json").write_text(json.dumps(record))
    line, facts, following = status()
    assert ", stale: fetched changed since, packed" in line
    assert following == f"next: tastemaker select {root} --name own"
    assert main(["pack", root, "--name", "own"]) == 2
    hint = capsys.readouterr().err.split("`")[1].split()
    assert hint == ["tastemaker", *words]
    assert main(hint[1:]) == 0
    assert f"by the rules that own was made by (the recipe's: --recipe {data.recipe})" in capsys.readouterr().out
    assert (data.root / "selected" / "own.parquet").read_bytes() == before
    assert status()[0].endswith("kept, packed")

    assert main([*words, "--set", "select.rules.best=top(aesthetic, 0.1)"]) == 0
    capsys.readouterr()
    line, _, following = status()
    assert line.endswith(", packed before it was made anew") and following == f"next: tastemaker pack {root} --name own"
    assert main(following.split()[2:]) == 0 and capsys.readouterr()
    assert status()[0].endswith("kept, packed")
    assert main([*words, "--recipe", str(data.recipe)]) == 0  # whoever asks for the recipe's gets the recipe's
    assert "best" not in capsys.readouterr().out


def test_status_of_a_folder_that_is_made_again(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["select", str(data.root)]) == 0
    root = shutil.copytree(data.root, tmp_path / "data")
    for record in root.glob("fetched/*_stats.json"):
        record.unlink()
    capsys.readouterr()
    assert main(["status", str(root)]) == 0
    out = capsys.readouterr().out
    assert "stale: fetched changed since" in out and f"--out {root} --recipe {root}/recipe.yaml" in out


def test_the_next_command_can_be_typed(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each that is printed, as a shell reads it; also of a folder with a blank in its name."""
    root = shutil.copytree(data.root, tmp_path / "a folder")
    for name in ("selected", "shards", "report"):
        shutil.rmtree(root / name, ignore_errors=True)
    words = ["select", str(root), "--name", "x", "--set", "select.rules.best=top(aesthetic, 0.5)"]
    for expected in ("pack", "select", "pack", "train"):
        assert main(words) == 0
        out = capsys.readouterr().out
        words = shlex.split(next(line for line in out.splitlines() if line.startswith("next: ")))[2:]
        assert words[0] == expected, words
    assert main(["annotate", str(root)]) == 0
    words = shlex.split(capsys.readouterr().out.rpartition("next: ")[2])[1:]
    assert words[:2] == ["select", str(root)] and main(words) == 0


# ------------------------------------------------------------------------------------------- ratings to a selection


def test_the_loop(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Photographs with ratings: fit -> score -> select -> pack. 60 of OASIS, every fifth."""
    rated = list(csv.DictReader((shared / "oasis" / "ratings.csv").open()))[::5][:60]
    folder = tmp_path / "photographs"
    folder.mkdir()
    for row in rated:
        shutil.copy(shared / "oasis" / row["image"], folder / Path(row["image"]).name)
    data = Data(tmp_path / "data")
    make_plan(str(folder), data, SourceConfig(shard_size=25))
    fetch_all(data)
    embed_all(data, BUNDLED, {"aesthetic": SCORE["aesthetic"]})
    settings = ["source.shard_size=25", "images.size=96", "select.rules={}", "columns.open_nsfw="]
    store_recipe(data, load_recipe("bundled", settings))

    assert main(["query", str(data.root), "select key, url from ledger", "--json"]) == 0
    keys = {Path(r["url"]).name: r["key"] for r in json.loads(capsys.readouterr().out)}
    assert len(keys) == 60
    lines = [f"{keys[Path(r['image']).name]},{r['beauty_mean']},{r['theme']}" for r in rated]
    (tmp_path / "ratings.csv").write_text("key,score,theme\n" + "\n".join([*lines, "999999999,4,nowhere"]) + "\n")

    head = tmp_path / "taste.head"
    fit = ["fit", str(tmp_path / "ratings.csv"), "--data", str(data.root), "--group", "theme", "--out", str(head)]
    assert main([*fit, "--scale", "1", "7", "--json"]) == 0
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert report["n"] == 60 and "61 ratings, 60 joined (1 listed in" in out
    assert "999999999" in (head / "unjoined.csv").read_text()
    assert report["metrics"]["spearman"]["value"] > 0  # few ratings: only the sign is asked for

    assert main(["annotate", str(data.root), f"taste={head}"]) == 0
    assert "taste: 3 of 3 shards annotated" in capsys.readouterr().out
    assert main(["annotate", str(data.root), f"taste={head}"]) == 0
    assert "taste: 0 of 3 shards annotated (all were)" in capsys.readouterr().out

    mine = ["select", str(data.root), "--name", "mine", "--set", "select.rules.nice=top(taste, 0.25)", "--json"]
    assert main(mine) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["kept"] == 15 and sum(facts["funnel"].values()) == 60
    assert main(["pack", str(data.root), "--name", "mine"]) == 0
    packed = pq.read_table(data.root / "shards" / "mine" / "00000.parquet")
    assert packed.num_rows == 15
    by_key = {keys[Path(r["image"]).name]: float(r["beauty_mean"]) for r in rated}
    mean = np.mean(list(by_key.values()))
    kept = capsys.readouterr() and pq.read_table(data.root / "selected" / "mine.parquet").to_pylist()
    assert np.mean([by_key[r["key"]] for r in kept if r["verdict"] == "kept"]) > mean  # it learned from these

    assert main(["heads", "show", str(head)]) == 0
    assert "taste" in capsys.readouterr().out


@pytest.mark.long
def test_fit_from_a_folder_of_images(real_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from real_data import image_files

    for i, image in enumerate(image_files()[:12]):
        (tmp_path / f"{i}.jpg").write_bytes(image)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    rows = [f"{i}.jpg,{i % 7 + 1}" for i in range(12)] + ["broken.jpg,3", "absent.jpg,4"]
    (tmp_path / "ratings.tsv").write_text("image\tscore\n" + "\n".join(r.replace(",", "\t") for r in rows))
    out = tmp_path / "h.head"
    words = ["fit", str(tmp_path / "ratings.tsv"), "--images", str(tmp_path), "--out", str(out)]
    assert main(words) == 0
    assert "14 ratings, 12 joined (2 listed in" in capsys.readouterr().out
    assert (out / "head.json").exists()
    (tmp_path / "none.csv").write_text("key,score\nx,1\ny,2\n")
    none = ["fit", str(tmp_path / "none.csv"), "--data", str(real_data.root), "--out"]
    assert main([*none, str(out)]) == 2
    assert "holds a head already, and not of this command" in capsys.readouterr().err
    assert main([*none, str(tmp_path / "other.head")]) == 2
    assert "none of the 2 images rated is in" in capsys.readouterr().err
    assert main(["fit", str(tmp_path / "none.csv"), "--out", str(out)]) == 2


def test_heads_are_listed_shown_and_imported(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASTEMAKER_HEADS", str(tmp_path / "heads"))
    published = next((shared / "heads").rglob("sac+logos+ava1-l14-linearMSE*"))
    assert main(["heads", "import", str(published)]) == 0
    out = capsys.readouterr().out
    folder = re.search(r"^head  (.*)$", out, re.M)
    assert folder and (Path(folder[1]) / "head.json").exists()
    assert main(["heads"]) == 0
    listed = capsys.readouterr().out
    assert "laion-v2" in listed and "open-nsfw" in listed
    assert main(["heads", "show"]) == 2
    assert main(["heads", "show", "laion-v9"]) == 2
    assert "Did you mean" in capsys.readouterr().err
    (tmp_path / "bad.pth").write_bytes(b"\x80\x04cos\nsystem\n")
    assert main(["heads", "import", str(tmp_path / "bad.pth")]) == 2
