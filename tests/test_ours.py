"""What is not ours stays as it is, byte for byte: whatever the command, wherever --out leads."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aesthetic.errors import UserError
from curate.layout import Data
from curate.shards.pack import _check_folder
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.store.files import open_log, sweep
from curate.store.lock import Lock, hold_worker_lock
from curate.store.ownership import MARK, check_free, kind_of, taken
from pipelines import curation
from pipelines.cli import main
from pipelines.recipe import load_recipe, store_recipe
from pipelines.runtime.progress import redirect_output

Tree = dict[str, tuple[str, bytes]]


def tree(root: Path) -> Tree:
    """Everything below a folder: kind and bytes, or where a link leads."""
    found: Tree = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path).encode())
        else:
            found[name] = ("folder", b"") if path.is_dir() else ("file", path.read_bytes())
    return found


def write(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {name}\n")


def home(root: Path) -> None:
    write(root, ".bashrc", "Documents/thesis.txt", ".cache/x", ".lock", "logs/ray.log", "report/r.txt")


def checkout(root: Path) -> None:
    write(root, ".git/HEAD", "README.md", "recipe.yaml", "plan/notes.txt", "train.json", "evaluation.json", "head.json")


def lookalike(root: Path) -> None:
    write(root, "recipe.yaml", "plan/notes.txt", "plan/00000.parquet", "fetched/00000.tar", "shards/mine/00000.tar")
    write(root, "embedded/space.json", "annotated/a/00000.json", "selected/s.json", "logs/train.log", "start/notes.txt")
    write(root, ".something.tmp", ".x.4194305-0123abcd.tmp", ".spill-4194305-0123abcd/x", ".probe", ".nonce")
    write(root, "unet/mine", "checkpoints/.x.4194305-0123abcd.tmp", "unjoined.csv", "report.json", "model_index.json")


def only_scratch(root: Path) -> None:
    write(root, ".something.tmp", ".lock")


def a_report(root: Path) -> None:
    write(root, "report.json", "unjoined.csv")


def only_logs(root: Path) -> None:
    write(root, "logs/train.log", "logs/evaluate.log", "logs/ray.log")


def links(root: Path) -> None:
    write(root.parent / "elsewhere", "precious", "logs/ray.log", "plan/notes.txt", "plan/plan.json")
    root.mkdir()
    for name in (".lock", ".workers", MARK, "recipe.yaml", "train.json"):
        (root / name).symlink_to("../elsewhere/precious")
    for name in ("logs", "plan"):
        (root / name).symlink_to(f"../elsewhere/{name}")


COMMANDS: dict[str, list[str]] = {
    "curate": ["curate", "{list}", "--out", "{out}", "--recipe", "bundled"],
    "curate nothing": ["curate", "nosuch.parquet", "--out", "{out}", "--recipe", "bundled"],
    "curate, its recipe": ["curate", "nosuch.parquet", "--out", "{out}", "--recipe", "{out}/recipe.yaml"],
    "curate again": ["curate", "{list}", "--out", "{out}", "--recipe", "bundled", "--restart-from", "source"],
    "dry run": ["curate", "{list}", "--out", "{out}", "--recipe", "bundled", "--dry-run"],
    "fetch": ["fetch", "{list}", "--out", "{out}", "--recipe", "bundled"],
    "embed": ["embed", "{out}", "--recipe", "bundled"],
    "embed again": ["embed", "{out}", "--recipe", "bundled", "--restart-from", "embed"],
    "retry": ["retry", "{out}", "--recipe", "bundled"],
    "score": ["score", "{out}", "--recipe", "bundled"],
    "select": ["select", "{out}", "--recipe", "bundled"],
    "pack": ["pack", "{out}", "--recipe", "bundled", "--name", "mine"],
    "status": ["status", "{out}"],
    "verify": ["verify", "{out}", "--repair"],
    "query": ["query", "{out}", "select 1"],
    "fit": ["fit", "{ratings}", "--images", "{images}", "--out", "{out}"],
    "heads import": ["heads", "import", "{weights}", "--encoder", "bundled", "--out", "{out}"],
    "heads prompt": [
        *("heads", "prompt", "cat", "--encoder", "bundled", "--wanted", "a", "--against", "b", "--out", "{out}")
    ],
    "train": ["train", "{images}", "--out", "{out}", "--preset", "debug", "--steps", "1"],
    "train nothing": ["train", "nosuch", "--out", "{out}"],
    "evaluate": ["evaluate", "nosuch-model", "{images}", "--out", "{out}"],
    "sample": ["sample", "nosuch-model", "a fox", "--out", "{out}"],
    "serve": ["serve", "nosuch-model", "--out", "{out}", "--port", "0"],
}


@pytest.mark.parametrize("foreign", [home, checkout, lookalike, only_scratch, only_logs, a_report, links])
def test_a_folder_of_somebodys_is_refused_and_stays_as_it_is(
    foreign: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out"
    foreign(out)
    write(tmp_path, "images/a.jpg", "weights")
    (tmp_path / "list.csv").write_text("url,caption\nhttp://127.0.0.1:9/a.jpg,a dog\n")
    (tmp_path / "ratings.csv").write_text("image,score\na.jpg,1\n")
    names = {"list": "list.csv", "ratings": "ratings.csv", "images": "images", "weights": "weights"}
    before = tree(tmp_path)
    for what, words in COMMANDS.items():
        for place in (str(out), "linked"):
            if place == "linked" and what not in ("curate", "train", "evaluate"):
                continue
            if place == "linked":
                (tmp_path / "linked").symlink_to("out")
            code = main([word.format(**{**names, "out": place}) for word in words])
            err = capsys.readouterr().err
            assert code == 2, (what, err)
            assert "error of tastemaker's" not in err
            if what in ("curate", "dry run", "fetch", "train", "evaluate", "heads import", "heads prompt"):
                assert "holds something else" in err, (what, err)
            if place == "linked":
                (tmp_path / "linked").unlink()
        assert tree(tmp_path) == before, what


def test_a_data_folder_may_begin_beside_its_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write(tmp_path, "list.csv", "more.parquet")
    before = tree(tmp_path)
    with taken(tmp_path, "data") as folder:
        assert kind_of(tmp_path) == "data"
        write(tmp_path, "plan/plan.json")
        folder.undo(["plan"])
    assert tree(tmp_path) == before
    for other in ("recipe.yaml", "notes.md", "x.json", "plan/x", ".hidden.csv"):
        write(tmp_path, other)
        with pytest.raises(UserError, match="holds something else"):
            check_free(tmp_path, "data")
        shutil.rmtree(tmp_path / "plan", ignore_errors=True)
        (tmp_path / other).unlink(missing_ok=True)
    with pytest.raises(UserError, match="holds something else"):
        check_free(tmp_path, "model")


def test_the_root_folder_and_what_is_no_folder(tmp_path: Path) -> None:
    write(tmp_path, "file")
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "round").symlink_to("round")
    before = tree(tmp_path)
    for out, told in (
        (Path("/"), "holds something else"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "nowhere", "leads nowhere"),
        (tmp_path / "round", "leads nowhere"),
        (tmp_path / "file" / "below", "cannot be written"),
    ):
        for kind in ("data", "model", "evaluation"):
            with pytest.raises(UserError, match=told), taken(out, kind):
                raise AssertionError
    assert tree(tmp_path) == before


@pytest.mark.parametrize("there", ["absent", "empty"])
@pytest.mark.parametrize(
    "words",
    [
        ["curate", "nosuch.parquet", "--recipe", "bundled"],
        ["curate", "list.csv", "--recipe", "bundled", "--set", "select.rules.x=sim > 1"],
        ["curate", "list.csv", "--recipe", "bundled", "--restart-from", "source", "--set", "source.url=none"],
        ["fetch", "list.csv", "--recipe", "bundled", "--ray-address", "127.0.0.1:9", "--set", "source.where=no = 1"],
    ],
)
def test_what_a_refused_run_made_is_gone_and_nothing_else(
    words: list[str], there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.csv").write_text("url,caption\nhttp://127.0.0.1:9/a.jpg,a dog\n")
    if there == "empty":
        (tmp_path / "a" / "b" / "data").mkdir(parents=True)
    before = tree(tmp_path)
    assert main([*words, "--out", "a/b/data"]) == 2
    assert tree(tmp_path) == before


# --------------------------------------------------------------------------------------------------- a folder of ours


def plan_in(root: Path) -> Data:
    (root.parent / "list.csv").write_text("url,caption\nhttp://127.0.0.1:9/a.jpg,a dog\n")
    make_plan(str(root.parent / "list.csv"), Data(root), SourceConfig())
    return Data(root)


def test_a_folder_says_what_it_is(tmp_path: Path) -> None:
    for kind in ("data", "model", "evaluation"):
        with taken(tmp_path / "a" / kind, kind) as folder:
            assert kind_of(folder.root) == kind
        with taken(tmp_path / "a" / kind, kind):
            pass
        other = "model" if kind == "data" else "data"
        with pytest.raises(UserError, match=r"holds (a data folder|a model|an evaluation), not"):
            check_free(tmp_path / "a" / kind, other)
    old = tmp_path / "first edition"  # which wrote no mark
    plan_in(old)
    assert kind_of(old) == "data"
    store_recipe(Data(old), load_recipe("bundled"))
    (old / "plan" / "plan.json").write_text("damaged")
    assert kind_of(old) == "data"
    for name, text, says in (
        ("train.json", '{"settings": {}}', "model"),
        ("evaluation.json", '{"asked": {}}', "evaluation"),
        ("train.json", "[1]", None),
        ("evaluation.json", '{"asked": 3}', None),
    ):
        folder_of = tmp_path / f"{name} {says}"
        folder_of.mkdir()
        (folder_of / name).write_text(text)
        assert kind_of(folder_of) == says


def test_the_list_is_read_anew_and_what_others_put_into_the_folder_stays(tmp_path: Path) -> None:
    data = plan_in(tmp_path / "data")
    recipe = load_recipe("bundled")
    made = [
        *(data.tar(0), data.table(0), data.fetched_record(0), data.starts(0), data.image_vectors(0)),
        *(data.text_vectors(0), data.metadata(0), data.embedded_record(0), data.space, data.space_record),
        *(data.annotations("s", 0), data.annotations_record("s", 0), data.root / "plan" / "list-00000-x.csv"),
    ]
    write(data.root, *(str(p.relative_to(data.root)) for p in made))
    foreign = [
        "plan/notes.txt",
        "fetched/notes.txt",
        "fetched/mine.tar",
        "embedded/img_emb/mine.npy",
        "annotated/s/n.txt",
    ]
    foreign += ["embedded/notes/00000.json", "annotated/notes.txt"]
    write(data.root, *foreign)
    curation.restart(data, recipe, "source", ())
    assert sorted(name for name, (kind, _) in tree(data.root).items() if kind == "file") == sorted(foreign)
    for name in foreign:
        (data.root / name).unlink()
    curation.restart(data, recipe, "source", ())
    clean = plan_in(tmp_path / "clean")
    curation.restart(clean, recipe, "source", ())
    assert not (clean.root / "plan").exists()


def test_packed_shards_are_replaced_only_where_all_of_them_is_ours(tmp_path: Path) -> None:
    folder = tmp_path / "shards" / "s"
    _check_folder(Data(tmp_path), folder)
    write(folder, "notes.txt")
    with pytest.raises(UserError, match=r"holds notes\.txt, which was not packed"):
        _check_folder(Data(tmp_path), folder)
    (folder / "notes.txt").unlink()
    _check_folder(Data(tmp_path), folder)
    write(folder, "00000.tar")  # somebody's: no record says that we packed it
    with pytest.raises(UserError, match=r"holds 00000\.tar"):
        _check_folder(Data(tmp_path), folder)
    (folder / "manifest.json").write_text('{"self": ""}')
    write(folder, "sizes.json", "00000.parquet", "README.md")
    _check_folder(Data(tmp_path), folder)
    write(folder, "notes.txt")
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        _check_folder(Data(tmp_path), folder)
    (tmp_path / "shards" / "linked").symlink_to("s")
    with pytest.raises(UserError, match="is a link"):
        _check_folder(Data(tmp_path), tmp_path / "shards" / "linked")


@pytest.mark.parametrize("name", [".lock", ".workers"])
@pytest.mark.parametrize("what", ["link", "dangling", "fifo", "folder"])
def test_what_is_written_in_place_is_no_link(name: str, what: str, tmp_path: Path) -> None:
    data = plan_in(tmp_path / "data")
    (tmp_path / "precious").write_text("mine")
    place = data.root / name
    if what == "fifo":
        os.mkfifo(place)
    elif what == "folder":
        place.mkdir()
    else:
        place.symlink_to(tmp_path / ("precious" if what == "link" else "new"))
    with pytest.raises(UserError, match=f"{name} is "), Lock(data.root):
        raise AssertionError
    if name == ".workers":
        with pytest.raises(UserError, match=f"{name} is "):
            hold_worker_lock(data.root)
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "new").exists()


def test_logs_are_no_links(tmp_path: Path) -> None:
    write(tmp_path, "theirs/ray.log", "precious", "a/x")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "logs").symlink_to("../theirs")
    (tmp_path / "a" / "logs").mkdir()
    (tmp_path / "a" / "logs" / "ray.log").symlink_to("../../precious")
    before = tree(tmp_path)
    for root in ("data", "a"):
        with pytest.raises(UserError, match="is a link"), redirect_output(tmp_path / root / "logs" / "ray.log"):
            raise AssertionError
        with pytest.raises(UserError, match="is a link"):
            open_log(tmp_path / root / "logs" / "ray.log")
    assert tree(tmp_path) == before


def test_what_another_run_finished_before_the_lock_was_had_is_kept(tmp_path: Path) -> None:
    """The last worker of another run holds up the lock; meanwhile the folder gets what is not ours."""
    root = tmp_path / "model"
    root.mkdir()
    fd = os.open(root / ".workers", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_SH)

    def fill() -> None:
        time.sleep(0.3)
        write(root, "thesis.txt", "start/x")
        os.close(fd)

    thread = threading.Thread(target=fill)
    thread.start()
    with pytest.raises(UserError, match="holds something else"), taken(root, "model"):
        raise AssertionError
    thread.join()
    assert set(tree(root)) == {".workers", "thesis.txt", "start", "start/x"}


def test_undo_takes_back_what_was_made_and_puts_back_what_was_replaced(tmp_path: Path) -> None:
    root = tmp_path / "a" / "model"
    with taken(root, "model") as folder:
        write(root, "train.json", "logs/train.log")
        folder.undo(["train.json", "logs"])
    assert tree(tmp_path) == {}
    with taken(root, "model"):
        write(root, "train.json", "notes.txt")
    before = tree(root)
    with taken(root, "model", replaces=["train.json", "data.json"]) as folder:
        (root / "train.json").write_text("other")
        write(root, "data.json", "logs/train.log", "start/x")
        folder.undo(["train.json", "data.json", "logs", "start"])
    after = tree(root)
    assert {n: v for n, v in after.items() if n != ".lock"} == {n: v for n, v in before.items() if n != ".lock"}


def test_a_lock_that_was_taken_away_is_not_held(tmp_path: Path) -> None:
    """Of a run that was refused and removed its folder: whoever waited for its lock has none."""
    for _ in range(20):
        errors: list[BaseException] = []

        def once(errors: list[BaseException] = errors) -> None:
            with contextlib.suppress(UserError):
                try:
                    with taken(tmp_path / "data", "data") as folder:
                        (tmp_path / "data" / "alone").mkdir()
                        (tmp_path / "data" / "alone").rmdir()
                        folder.undo([])
                except OSError as e:
                    errors.append(e)

        threads = [threading.Thread(target=once) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors


def test_a_sweep_stays_within_the_folder(tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/.x.4194305-0123abcd.tmp", "data/.x.4194305-0123abcd.tmp")
    (tmp_path / "data" / "fetched").symlink_to("../elsewhere")
    (tmp_path / "data" / ".y.4194305-0123abcd.tmp").symlink_to("../elsewhere")
    sweep(tmp_path / "data")
    assert set(tree(tmp_path)) == {"elsewhere", "elsewhere/.x.4194305-0123abcd.tmp", "data", "data/fetched"}


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library under which flock answers with the error number in $FLOCK, as the kernel does on some mounts."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("there is no C compiler")
    source, library = (tmp_path_factory.mktemp("flock") / name for name in ("flock.c", "flock.so"))
    source.write_text(
        "#include <errno.h>\n#include <stdlib.h>\n"
        'int flock(int fd, int kind) { errno = atoi(getenv("FLOCK")); return -1; }\n'
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


_TAKE = "import sys; from curate.store.lock import {0}; from pathlib import Path; {0}(Path(sys.argv[1])){1}"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EWOULDBLOCK, errno.EIO])
def test_a_file_system_without_locks_is_no_other_process(number: int, refusing: Path, tmp_path: Path) -> None:
    """NFS without a lock manager, Lustre without -o flock; beside them a folder in use, and a server that fails."""
    told = {errno.EWOULDBLOCK: "is in use by another process", errno.EIO: "OSError: [Errno 5] Input/output error"}
    for name, enter in (("Lock", ".__enter__()"), ("hold_worker_lock", "")):
        if number == errno.EWOULDBLOCK and not enter:
            continue  # it waits
        command = [sys.executable, "-c", _TAKE.format(name, enter), str(tmp_path)]
        environment = {**os.environ, "LD_PRELOAD": str(refusing), "FLOCK": str(number)}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 1
        expected = told.get(number, f"cannot lock files ({os.strerror(number)})")
        assert expected in ended.stderr, ended.stderr
