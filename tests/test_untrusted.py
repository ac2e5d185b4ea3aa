"""What others' files and text may be, and what becomes of it."""

from __future__ import annotations

import math
import os
import socket
import time

import pytest

from aesthetic.errors import UserError
from aesthetic.untrusted import (
    decode_text,
    markdown,
    markdown_code,
    open_regular,
    parse_json,
    printable,
    read_bytes,
    read_json_file,
    read_text,
)


def _unusual(folder):
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "circle").symlink_to(folder / "circle")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(folder / "socket"))
    big = folder / "sparse"
    with open(big, "wb") as f:
        f.truncate(1 << 40)
    return {
        folder / "folder": "a folder",
        folder / "fifo": "a pipe",
        folder / "dangling": "a link to a file that is not there",
        folder / "circle": "leads back to itself",
        folder / "socket": "a pipe",
        "/dev/zero": "a device",
        folder / "absent": "no such file",
        big: "bytes",
        folder / ("x" * 300): "cannot be read",
        "nul\0": "no file can be called so",
    }


def test_what_is_no_file_of_reasonable_size_is_refused_at_once_by_name(tmp_path):
    for path, why in _unusual(tmp_path).items():
        began = time.monotonic()
        with pytest.raises(UserError) as refused:
            read_bytes(path, 1000)
        assert why in str(refused.value) and str(path) in str(refused.value)
        assert time.monotonic() - began < 0.5
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "there").write_bytes(b"x")
    with open_regular(tmp_path / "link") as f:
        assert f.read() == b"x"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_with_a_byte_order_mark_is_decoded(encoding, tmp_path):
    data = "a fox, à la carte\n猫".encode(encoding)
    if encoding.endswith("e"):
        data = "\ufeff".encode(encoding) + data
    assert decode_text(data).text == "a fox, à la carte\n猫" and decode_text(data).certain
    (tmp_path / "t").write_bytes(data)
    assert read_text(tmp_path / "t") == "a fox, à la carte\n猫"


def test_text_of_another_encoding_is_not_guessed(tmp_path):
    assert not decode_text("café".encode("cp1252")).certain
    assert not decode_text(b"\xff\xfea").certain  # half a character
    (tmp_path / "t").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="iconv"):
        read_text(tmp_path / "t")


@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"1e400", b"-1e999", b"NaN", b"Infinity", b'"\xe9"', b"", b"{"],
)
def test_json_that_nothing_can_hold_is_refused_by_name(data):
    with pytest.raises(UserError, match=r"^x\.json: not"):
        parse_json(data, "x.json")


def test_json_is_read_whatever_its_encoding_and_its_text_can_be_encoded(tmp_path):
    assert parse_json(b'\xef\xbb\xbf{"a\\ud800": ["\\udfff"]}', "x") == {"a\ufffd": ["\ufffd"]}
    (tmp_path / "j").write_bytes('{"a": "é"}'.encode("utf-16"))
    assert read_json_file(tmp_path / "j") == {"a": "é"}


def test_foreign_text_is_shown_on_one_line_without_controls():
    assert printable("a\x1b]0;x\x07\r\nb\u202ec\x9b31m\ud800") == "a\\x1b]0;x\\x07\\r\\nb\\u202ec\\x9b31m\\ud800"
    assert printable("日本語 é") == "日本語 é"
    assert printable("x" * 50, 10) == "x" * 9 + "…"


def test_numbers_that_json_has_not_are_read_from_a_file_where_that_is_asked(tmp_path):
    (tmp_path / "x.json").write_text("[-Infinity, 1]")
    with pytest.raises(UserError, match="-Infinity is no number"):
        read_json_file(tmp_path / "x.json")
    assert read_json_file(tmp_path / "x.json", finite=False) == [-math.inf, 1]


def test_foreign_text_in_markdown_stays_text() -> None:
    assert markdown("a|b `c` <img src=x> ![p](http://x) [l][m]\n# h") == (
        "a\\|b \\`c\\` &lt;img src=x> ![p]\\(http://x) [l]\\[m]\\\\n# h"
    )
    assert markdown("0.49 [0.03, 0.78] is ± 1") == "0.49 [0.03, 0.78] is ± 1"
    assert markdown_code("a`b|c\x1b[2J\n") == "`a'b\\|c\\x1b[2J\\n`"
