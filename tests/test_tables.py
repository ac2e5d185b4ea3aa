"""What a table of text looks like from its first bytes."""

from __future__ import annotations

import gzip

import pytest

from aesthetic.errors import UserError
from aesthetic.tables import HEAD, table_shape
from aesthetic.untrusted import caption_of


@pytest.mark.parametrize(
    ("text", "encoding", "delimiter", "names"),
    [
        ("url,caption\na,b\n", "utf-8", ",", ("url", "caption")),
        ("url;caption\na;b, c\n", "utf-8", ";", ("url", "caption")),
        ("image;score\na;7,5\nb;5,1\n", "utf-8", ";", ("image", "score")),
        ("url\tcaption\na\tb\n", "utf-8", "\t", ("url", "caption")),
        ("url|caption\na|b\n", "utf-8", "|", ("url", "caption")),
        ("url\nhttp://a/1,2\nhttp://a/;\n", "utf-8", ",", ("url",)),
        ("\ufeff\r\nsep=;\r\nurl;a,b\r\nx;y\r\n", "utf-8", ";", ("url", "a,b")),
        ('"sep=,"\nurl,caption\n', "utf-8", ",", ("url", "caption")),
        ("\ufeffURL, TEXT ,\xa0n\r\n", "utf-8", ",", ("URL", "TEXT", "n")),
        ('"url","two\nlines"\na,b\n', "utf-8", ",", ("url", "two\nlines")),
        ("url;caption\rx;y\r", "utf-8", ";", ("url", "caption")),
        ("\ufeffurl;caption\nx;é\n", "utf-16-le", ";", ("url", "caption")),
        ("\ufeffsep=\t\nurl\tcaption\nx\té\n", "utf-16-be", "\t", ("url", "caption")),
        ("\ufeffurl\nx\n", "utf-32-le", ",", ("url",)),
    ],
)
def test_shapes(text: str, encoding: str, delimiter: str, names: tuple[str, ...]) -> None:
    data = text.encode(encoding)
    shape = table_shape(data, ",", "l.csv")
    assert (shape.encoding, shape.delimiter, shape.names) == (encoding, delimiter, names)
    assert data[shape.start :].decode(encoding).lstrip('"').startswith(names[0])
    assert table_shape(data + "x\n".encode(encoding) * HEAD, ",", "l").start == shape.start


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (gzip.compress(b"url\n", mtime=0), "is a gzip file"),
        (b"PK\x03\x04...", "is a zip file"),
        (b"\x28\xb5\x2f\xfd", "Zstandard.*zstd -d"),
        (b"PAR1", "is a parquet file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\n <!DOCTYPE html><html>", "a web page"),
        ("url,caption\n".encode("utf-16-le"), "UTF-16LE without a byte order mark.*iconv -f UTF-16LE"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf\r\n\r\n", "is empty"),
        (b"sep=;\n", "is empty"),
    ],
)
def test_what_is_no_table_is_named(data: bytes, match: str) -> None:
    with pytest.raises(UserError, match=f"^l.csv: .*{match}"):
        table_shape(data, ",", "l.csv")


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        *[("a fox", "a fox"), (" a ", " a "), (2020, "2020"), (1.5, "1.5"), ("\ud800x", "\ufffdx")],
        *[(["", None, "a", "b"], "a"), ([7], "7"), ([["a"]], None), ({"en": "a"}, None), ([{"raw": "a"}, "b"], "b")],
        *[(None, None), ("", None), (" \n", None), (True, None), (float("nan"), None), ([], None)],
    ],
)
def test_captions_in_json(value: object, caption: str | None) -> None:
    assert caption_of(value) == caption


def test_the_delimiter_of_eva() -> None:
    shape = table_shape(b'image_id=user_id=score\n"a"="1"="7"\n"b"="1"="5"\n', ",", "votes.csv")
    assert (shape.delimiter, shape.names) == ("=", ("image_id", "user_id", "score"))
    one = table_shape(b"url\nhttp://a.test/?x=1\nhttp://a.test/?x=2\n", ",", "list.csv")
    assert (one.delimiter, one.names) == (",", ("url",))
