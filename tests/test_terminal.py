"""What people are shown, and what becomes of a command whose output, memory or files are short."""

from __future__ import annotations

import errno
import io
import logging
import os
import pty
import pwd
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aesthetic.errors import UserError
from curate.annotators.stage import EndsItsProcess
from pipelines.cli import main
from pipelines.faults import check_limits, ensure_home, explain
from pipelines.runtime.channel import log_to_file
from pipelines.runtime.progress import ProgressBar, ProgressDisplay
from pipelines.terminal import CLEAR, RETURN, SafeStream, escape_controls, safe_stream, safe_streams

ROOT = Path(__file__).parents[1]
EVIL = "a\x1b[2J\x1b]0;title\x07b\rc\x9b31m\u202ed\x00\x7f\x08"
TAME = r"a\x1b[2J\x1b]0;title\x07b\rc\x9b31m\u202ed\x00\x7f\x08"


def tame(text: str) -> bool:
    return not any(c in text for c in set(EVIL) - set("a[2J]0;titlebc31md"))


# ---------------------------------------------------------------------------------------------------- what is shown


def test_foreign_controls_are_escapes_and_our_own_are_not() -> None:
    assert escape_controls(f"{EVIL}\n\t{EVIL}") == f"{TAME}\n\t{TAME}"
    out = io.StringIO()
    stream = SafeStream(out)
    print("warning:", EVIL, file=stream)
    stream.write("\r\033[Kno sequence of ours, but a text that looks like one\n")
    for control in (CLEAR, RETURN):
        stream.write(control)
    assert (
        out.getvalue() == f"warning: {TAME}\n\\r\\x1b[Kno sequence of ours, but a text that looks like one\n\r\x1b[K\r"
    )


def test_a_lists_hosts_and_names_do_not_reach_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = pty.openpty()
    stream = safe_stream(theirs, sys.stderr)
    screen = ProgressDisplay(stream, 10, 0, True)  # type: ignore[arg-type]
    screen.show({("fetch", "dns"): 10}, [(EVIL, 10)], end=True)
    count = ProgressBar(stream, EVIL, 10)  # type: ignore[arg-type]
    count.end(EVIL)
    stream.close()
    said = b""
    try:
        while piece := os.read(ours, 10_000):
            said += piece
    except OSError as e:
        assert e.errno == errno.EIO  # the other end is closed
    os.close(ours)
    text = said.decode().replace("\r\n", "\n").replace("\r\x1b[K", "").replace("\r", "")
    assert TAME in text and tame(text.replace("\n", ""))
    code = main(
        ["curate", str(tmp_path / EVIL.replace("\x00", "")), "--out", str(tmp_path / "d"), "--recipe", "bundled"]
    )
    err = capsys.readouterr().err
    assert code == 2 and tame(err.replace("\n", "")) and "title" in err


def test_logs_hold_no_controls(tmp_path: Path) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        (tmp_path / "logs").mkdir()
        log_to_file(tmp_path / "logs", "fetch")
        try:
            raise ValueError(EVIL)
        except ValueError:
            logging.getLogger("x").exception("host %s", EVIL)
        for handler in root.handlers:
            handler.flush()
    finally:
        root.handlers[:], root.level = before, level
    log = (tmp_path / "logs" / "fetch.log").read_text("utf-8")
    assert log.count(TAME) == 2 and tame(log.replace("\n", "")) and "Traceback" in log


@pytest.mark.parametrize(("encoding", "expected"), [("ascii", "1 - 2 +- \\xfc ..."), ("latin-1", "1 · 2 ± ü ...")])
def test_what_a_terminal_cannot_show_is_written_otherwise(encoding: str, expected: str) -> None:
    file = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(file, encoding))
    stream.write("1 · 2 ± ü …")
    stream.flush()
    assert file.getvalue().decode(encoding) == expected
    assert stream.output_lost is None


# ------------------------------------------------------------------------------------------------- who does not read


def test_a_reader_who_leaves_and_a_full_disk(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    gone, full = safe_stream(writer, None), safe_stream(os.open("/dev/full", os.O_WRONLY), None)
    for stream in (gone, full):
        for _ in range(3):
            print("x" * 100_000, file=stream)
        stream.flush()
    assert isinstance(gone.write_error, BrokenPipeError) and gone.output_lost is None
    assert full.output_lost is not None and full.output_lost.errno == errno.ENOSPC
    gone.close()
    full.close()


@pytest.mark.parametrize(
    ("words", "where", "code", "said"),
    [
        ("recipe bundled", ">/dev/full", 1, "could not be written: No space left on device"),
        ("--help", ">/dev/full", 1, "could not be written"),
        ("status /", ">/dev/full 2>&1", 2, ""),
        ("recipe bundled", ">&- 2>&- <&-", 0, ""),
        ("status /", "2>&-", 2, ""),
        ("recipe bundled", "| true; exit ${PIPESTATUS[0]}", 0, ""),
        ("status nosuch-é", "2>&1", 2, "nosuch-"),
    ],
)
def test_the_exit_code_says_what_became_of_the_work(words: str, where: str, code: int, said: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    shell = f"{sys.executable} -m pipelines.cli {words} {where}"
    done = subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, timeout=60)
    text = (done.stdout + done.stderr).decode("ascii")
    assert (done.returncode, "Traceback" in text, "Exception" in text) == (code, False, False), text
    assert said in text


def test_libraries_may_print_where_nobody_reads(tmp_path: Path) -> None:
    """A run goes on without its reader, and what libraries say is in its log all the same."""
    code = f"""
import os, sys
from pathlib import Path
from pipelines.runtime.progress import redirect_output
from pipelines.terminal import open_descriptors, safe_streams
open_descriptors()
with safe_streams() as (out, err):
    print("lost"); out.flush(); err.flush()
    print("lost", file=err); err.flush()
    with redirect_output(Path({str(tmp_path)!r}) / "logs" / "ray.log") as ours:
        print("ours", file=ours)
        print("a library warns", file=sys.stderr)
        os.write(1, b"C writes to 1\\n")
(Path({str(tmp_path)!r}) / "done").touch()
"""
    (tmp_path / "run.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for number, where in enumerate((">&- 2>&-", "2>&1 | true", ">/dev/full 2>&1")):
        (tmp_path / "done").unlink(missing_ok=True)
        shell = f"{sys.executable} {tmp_path}/run.py {where}"
        subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, timeout=60)
        assert (tmp_path / "done").exists(), where
        log = (tmp_path / "logs" / "ray.log").read_text()
        assert log.count("a library warns") == log.count("C writes to 1") == number + 1


def test_streams_are_given_back() -> None:
    before = sys.stdout, sys.stderr
    with safe_streams():
        assert isinstance(sys.stdout, SafeStream) and sys.stdout.encoding
    assert (sys.stdout, sys.stderr) == before


# ---------------------------------------------------------------------------------------------------- what it means


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


class RayError(Exception):
    """As Ray calls the root of its own."""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError(), 1, "more memory than there is"),
        (OutOfMemoryError("CUDA out of memory"), 1, "more memory than there is"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1, "more memory"),
        (RuntimeError("can't start new thread"), 1, "more memory than there is"),
        (ImportError("libtorch.so: failed to map segment from shared object"), 1, "more memory than there is"),
        (OSError(errno.EMFILE, "Too many open files", "/x"), 1, "ulimit -n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, "/x/y is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "/x/y: Permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", b"/x\xff"), 2, "/x\ufffd: Is a directory"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a", None, "b"), 2, "a and b: No such file"),
        (OSError(errno.EIO, "Input/output error", "/x"), 1, "the disk"),
        (RecursionError("maximum recursion depth"), 1, "nested too deep"),
        (type("ActorDiedError", (RayError,), {})("The actor died.\nmore"), 1, "ActorDiedError: The actor died."),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "an error of tastemaker's"),
        (KeyError("x"), 1, "an error of tastemaker's"),
        (UserError("no"), 2, "no"),
        (FileExistsError(errno.EEXIST, "File exists", "/x"), 2, "/x: File exists"),
        (EndsItsProcess("shard 7, three times: out of memory, or a crash"), 1, "shard 7, three times"),
    ],
)
def test_what_ended_a_command_is_explained(error: Exception, code: int, said: str) -> None:
    found, text = explain(error)
    assert found == code and said in text
    assert ("tastemaker's" in text) == (said == "an error of tastemaker's")


def test_few_files_and_little_memory_are_said_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, files[1]))
    try:
        for command in ("curate", "fetch", "embed", "retry"):
            with pytest.raises(UserError, match=r"needs 128 open files.*may have 100 \(`ulimit -n`\)"):
                check_limits(command)
        check_limits("status")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
    shell = f"ulimit -v 1500000; exec {sys.executable} -m pipelines.cli query {tmp_path} 'select 1'"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "needs 2 GB of address space" in done.stderr, done.stderr


def test_a_user_without_home_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USER", "")
    ensure_home()
    home = Path(os.environ["HOME"])
    assert home == tmp_path / f"tastemaker-{os.getuid()}" and home.stat().st_mode & 0o777 == 0o700
    assert os.environ["USER"] == f"user-{os.getuid()}"
    home.chmod(0o777)  # somebody else's, who waits for our caches: not taken
    monkeypatch.delenv("HOME")
    ensure_home()
    assert Path(os.environ["HOME"]) != home and Path(os.environ["HOME"]).parent == tmp_path
    monkeypatch.setenv("HOME", "/somewhere")
    ensure_home()
    assert os.environ["HOME"] == "/somewhere"
