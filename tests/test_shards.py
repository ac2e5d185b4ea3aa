"""The tars that we write and read: deterministic, USTAR, and never trusted."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from curate.shards.tar import CorruptShard, TarWriter, index_tar, read_images, read_range


def written(samples: list[tuple[str, bytes, str | None]]) -> bytes:
    file = io.BytesIO()
    tar = TarWriter(file)
    for key, image, caption in samples:
        tar.add_sample(key, image, "jpg", caption, {"key": key, "url": "http://x/ü", "width": 3})
    tar.close()
    return file.getvalue()


SAMPLES: list[tuple[str, bytes, str | None]] = [
    ("000000000", b"\xff\xd8" + b"a" * 700, "a cat"),
    ("000000002", b"\xff\xd8b", None),
    ("000000003", b"", "NUL \x00 and 漢字"),
]


def test_python_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    path.write_bytes(written(SAMPLES))
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [
            *("000000000.jpg", "000000000.json", "000000000.txt"),
            *("000000002.jpg", "000000002.json", "000000002.txt"),
            *("000000003.jpg", "000000003.json", "000000003.txt"),
        ]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
        none = tar.extractfile("000000002.txt")
        assert none is not None and none.read() == b""
        caption = tar.extractfile("000000003.txt")
        assert caption is not None and caption.read().decode() == "NUL \x00 and 漢字"
    assert path.stat().st_size % tarfile.RECORDSIZE == 0
    assert [(k, e, d) for k, e, d in read_images(path)] == [(k, "jpg", d) for k, d, _ in SAMPLES]


def test_the_same_samples_give_the_same_bytes() -> None:
    assert written(SAMPLES) == written(list(SAMPLES))


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = written(SAMPLES)
    path = tmp_path / "cut.tar"
    last = max(o + s for m in _index(tmp_path, whole).values() for o, s in m.values())
    for length in [100, 512, 1024, 1700, 2048, 3000, last, last + 100, last + 512]:
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptShard, match=r"cut\.tar"):
            index_tar(path)


def _index(folder: Path, data: bytes) -> dict[str, dict[str, tuple[int, int]]]:
    path = folder / "whole.tar"
    path.write_bytes(data)
    return index_tar(path)


def test_members_are_ranges_and_links_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("000.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name in ("../../evil.jpg", "a.b.jpg", "001.JPG", "noextension"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    index = index_tar(path)
    assert "000" not in index
    assert index["001"] == {"jpg": index["001"]["jpg"]}
    assert index["a"].keys() == {"b.jpg"}  # webdataset's rule: a key ends at the first dot
    with open(path, "rb") as f:
        assert read_range(f, index["001"]["jpg"]) == b"abc"
    assert not (tmp_path.parent.parent / "evil.jpg").exists()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_others_read_as_tarfile_reads_them(tmp_path: Path, form: int) -> None:
    path = tmp_path / "others.tar"
    names = ["000.jpg", "folder/" * 14 + "001.jpg", "ü.txt"] + (
        ["x" * 120 + ".png"] if form != tarfile.USTAR_FORMAT else []
    )
    with tarfile.open(path, "w", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 600 * number + 1
            info.mtime, info.uname = 1e9 + 0.5, "bigdata"
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
    found = [place for members in index_tar(path).values() for place in members.values()]
    with tarfile.open(path) as tar:
        assert found == [(m.offset_data, m.size) for m in tar if m.isfile()]
        assert ["/".join((n.rpartition("/")[0], "x")) for n in index_tar(path)] == [
            "/".join((m.name.rpartition("/")[0], "x")) for m in tar if m.isfile()
        ]


def test_a_flipped_bit_in_a_header_is_found(tmp_path: Path) -> None:
    whole = bytearray(written(SAMPLES))
    path = tmp_path / "flipped.tar"
    for at in (0, 50, 100, 124, 130, 148, 257, 400):
        flipped = bytearray(whole)
        flipped[at] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(CorruptShard, match=r"flipped\.tar"):
            index_tar(path)
