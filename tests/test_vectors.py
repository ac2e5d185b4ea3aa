"""Files of vectors that somebody made up: named, whatever their header says."""

import os

import numpy as np
import pytest

from aesthetic.errors import UserError
from aesthetic.untrusted import open_vectors


def npy(header: str, body: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def described(descr: str = "'<f4'", order: str = "False", shape: str = "(4, 4)") -> bytes:
    return npy(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}", bytes(64))


def test_rows_are_mapped(tmp_path):
    (tmp_path / "x.npy").write_bytes(described())
    assert open_vectors(tmp_path / "x.npy").tolist() == np.zeros((4, 4)).tolist()


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\x93NUMPY", b"PK\x03\x04 no zip", npy("'" * 3, bytes(64)), npy("(" * 5000, bytes(64))),
        npy("{" + "[" * 3000 + "]" * 3000 + "}", bytes(64)),
        npy("{'descr': '<f4', 'shape': __import__('os')}", bytes(64)),
        *(described(shape=s) for s in ("(1000000000000, 512)", "(-1, 4)", "(10**30, 4)", f"({'9' * 300}, 4)", "(16,)")),
        *(described(d) for d in ("'|O'", "'<i4'", "'>f4'", "[('a', 3)]", "None", "'x' * 99", "[[]]")),
        described(order="1"),
    ],
    ids=range(20),
)
def test_a_header_that_makes_no_sense_is_a_file_that_is_named(tmp_path, data):
    path = tmp_path / "img_emb_0.npy"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"img_emb_0\.npy"):
        open_vectors(path)


def test_what_is_no_file_holds_no_vectors(tmp_path):
    np.savez(tmp_path / "z.npz", x=np.eye(3))
    (tmp_path / "z.npz").rename(tmp_path / "zip.npy")
    os.mkfifo(tmp_path / "fifo.npy")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "zero.npy").symlink_to("/dev/zero")
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=path.name):
            open_vectors(path)
