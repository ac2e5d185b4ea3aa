"""Tars of others (T4, T5): read as ranges of a file, never extracted, and no member is ever run."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fetched import fetch_list
from hostile_web import good_image
from in_a_child import forget_peak, memory, peak, run
from watched import watched

from curate.fetch.config import FetchConfig
from curate.shards.tar import CorruptShard, TarWriter, image_member, index_tar, read_images

JPEG = good_image()


def member(
    name: str, data: bytes = JPEG, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, data


def tar(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as file:
        for info, data in members:
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


GOOD = (member("000.jpg"), member("000.txt", b"a cat"))


def with_header(change: Callable[[bytearray], None], valid: bool = True) -> bytes:
    """A good tar whose first header is changed; the checksum is made right again, or not."""
    data = bytearray(tar(*GOOD))
    change(data)
    if valid:
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


def set_field(at: int, value: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[at : at + len(value)] = value

    return change


def pax(**fields: str) -> bytes:
    info, data = member("001.jpg")
    info.pax_headers = fields
    return tar(*GOOD, (info, data), form=tarfile.PAX_FORMAT)


# What each holds: the keys with an image, or None where it is refused.
TARS: dict[str, tuple[Callable[[], bytes], list[str] | None]] = {
    "a parent's name": (lambda: tar(*GOOD, member("../../evil.jpg")), ["000", "../../evil"]),
    "an absolute name": (lambda: tar(*GOOD, member("/tmp/evil.jpg")), ["000", "/tmp/evil"]),
    "a name with NUL": (lambda: with_header(set_field(0, b"000.jpg\0.exe")), ["000"]),
    "a name of other bytes": (lambda: with_header(set_field(0, b"\xff\xfe.jpg\0")), ["\ufffd\ufffd"]),
    "a name of 5,000": (lambda: tar(*GOOD, member("x" * 5000 + ".jpg")), ["000", "x" * 5000]),
    "a symbolic link": (lambda: tar(*GOOD, member("001.jpg", b"", tarfile.SYMTYPE, "/etc/passwd")), ["000"]),
    "a hard link": (lambda: tar(*GOOD, member("001.jpg", b"", tarfile.LNKTYPE, "000.jpg")), ["000"]),
    "a device": (lambda: tar(*GOOD, member("001.jpg", b"", tarfile.CHRTYPE)), ["000"]),
    "a block device": (lambda: tar(*GOOD, member("001.jpg", b"", tarfile.BLKTYPE)), ["000"]),
    "a FIFO": (lambda: tar(*GOOD, member("001.jpg", b"", tarfile.FIFOTYPE)), ["000"]),
    "a folder": (lambda: tar(*GOOD, member("001.jpg", b"", tarfile.DIRTYPE)), ["000"]),
    "an unknown type": (lambda: tar(*GOOD, member("001.jpg", JPEG, b"Z")), ["000"]),
    "a sparse file": (lambda: tar(*GOOD, member("001.jpg", b"", tarfile.GNUTYPE_SPARSE)), ["000"]),
    "a name by PAX": (lambda: pax(path="../../evil.jpg"), ["000", "../../evil"]),
    "a size by PAX": (lambda: pax(size="99999999999"), None),
    "a negative size by PAX": (lambda: pax(size="-1"), None),
    "a size by PAX of words": (lambda: pax(size="many"), ["000", "001"]),  # of no bytes
    "PAX that is none": (lambda: tar(*GOOD, member("x", b"9" * 4000, tarfile.XHDTYPE)), None),
    "the same name twice": (lambda: tar(*GOOD, member("000.jpg", b"second")), ["000"]),
    "a key that comes back": (lambda: tar(member("0.jpg"), member("1.jpg"), member("0.txt", b"late")), ["0", "1"]),
    "a size beyond the end": (lambda: with_header(set_field(124, b"77777777777\0")), None),
    "a negative size": (lambda: with_header(set_field(124, b"\xff" * 12)), None),
    "a size of 2^90": (lambda: with_header(set_field(124, b"\x80\x04" + bytes(10))), None),
    "a size of words": (lambda: with_header(set_field(124, b"lots of it\0\0")), None),
    "a wrong checksum": (lambda: with_header(set_field(0, b"9"), valid=False), None),
    "cut in a member": (lambda: tar(*GOOD)[:700], None),
    "cut between members": (lambda: tar(*GOOD)[: 512 + -(-len(JPEG) // 512) * 512], None),
    "cut before the end": (lambda: tar(*GOOD)[: 1024 + -(-len(JPEG) // 512) * 512 + 512], None),
    "nothing": (lambda: b"", None),
    "no tar": (lambda: JPEG * 10, None),
    "only an end": (lambda: bytes(10_240), []),
    "more behind the end": (lambda: tar(*GOOD) + tar(member("hidden.jpg")), ["000"]),
}


@pytest.mark.parametrize("name", TARS)
def test_hostile_tars(tmp_path: Path, name: str) -> None:
    make, keys = TARS[name]
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    path = folder / "hostile.tar"
    path.write_bytes(make())
    with watched() as seen:
        if keys is None:
            with pytest.raises(CorruptShard, match=r"hostile\.tar"):
                list(read_images(path))
        else:
            index = index_tar(path)
            assert [key for key, members in index.items() if image_member(members)] == keys
            images = list(read_images(path))
            assert [key for key, _, _ in images] == keys
            others = {"the same name twice": b"second", "a size by PAX of words": b""}
            assert {data for _, _, data in images} <= {JPEG, others.get(name, JPEG)}
    assert {p for p in seen.opened if not p.startswith(("/usr", "/proc"))} <= {str(path)} | {
        p for p in seen.opened if ".py" in p
    }
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path] and not Path("/tmp/evil.jpg").exists()


def index_header(path: str) -> tuple[str, int]:
    """In the child: what becomes of the tar, and the memory that takes."""
    forget_peak()
    before = memory()
    try:
        index_tar(Path(path))
        said = "read"
    except CorruptShard:
        said = "corrupt"
    except MemoryError:
        said = "no memory"
    return said, peak() - before


def hole(path: Path, kind: bytes) -> None:
    """A tar whose first header says 2 GB, in a file that is a hole, so that it costs its maker nothing."""
    size = 2 << 30
    with open(path, "wb") as f:
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, size
        f.write(info.tobuf(tarfile.GNU_FORMAT))
        f.truncate(512 + size + 10_240)


HEADERS: dict[str, Callable[[Path], object]] = {
    "PAX of 2 GB": lambda path: hole(path, tarfile.XHDTYPE),
    "long name of 2 GB": lambda path: hole(path, tarfile.GNUTYPE_LONGNAME),
    "PAX of a million digits": lambda path: path.write_bytes(tar(*GOOD, member("x", b"9" * 10**6, tarfile.XHDTYPE))),
}


@pytest.mark.long
@pytest.mark.parametrize("name", HEADERS)
def test_headers_without_measure_are_not_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / "header.tar"
    HEADERS[name](path)
    report = run(index_header, [str(path)])
    assert not report.deaths and not report.hangs
    said, growth = report.outcomes[str(path)]
    assert growth < 64e6 and said == "corrupt"


@pytest.mark.long
def test_a_million_members(tmp_path: Path) -> None:
    path = tmp_path / "many.tar"
    with open(path, "wb") as f:
        writer = TarWriter(f)
        for number in range(1_000_000):
            writer.add(f"{number // 2:06d}.{'jpg' if number % 2 else 'txt'}", b"x")
        writer.close()
    index = index_tar(path)
    assert len(index) == 500_000 and index["499999"].keys() == {"jpg", "txt"}


# --------------------------------------------------------------------------------------------------- members that run


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def as_npy(payload: Canary) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([payload], dtype=object), allow_pickle=True)
    return out.getvalue()


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "ten"])
def test_members_that_would_run_are_never_loaded(tmp_path: Path, extension: str) -> None:
    """Through the plan and the images stage: the image is taken, the payload beside it is left alone."""
    canary = tmp_path / "ran"
    payload = as_npy(Canary(canary)) if extension in ("npy", "npz") else pickle.dumps(Canary(canary))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "00000.tar").write_bytes(
        tar(member(f"0.{extension}", payload), member("0.jpg"), member("0.txt", b"a"))
    )
    rows = fetch_list(tmp_path / "in", tmp_path / "data", FetchConfig())
    assert [(row["status"], row["caption"]) for row in rows] == [("success", "a")]
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # it does run, where it is let
