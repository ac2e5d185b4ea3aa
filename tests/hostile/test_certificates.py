"""Certificates that prove nothing (N14), each with nothing else wrong: its authority is one that we trust."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from pathlib import Path

import pytest

from curate.fetch import client as fetch_module
from curate.fetch.client import Body, Fetcher
from curate.fetch.config import FetchConfig
from curate.ledger.schema import Reason, RowError

CONFIG = """
[ca]
default_ca = own
[own]
database = index.txt
new_certs_dir = .
serial = serial
default_md = sha256
policy = any
copy_extensions = copy
unique_subject = no
[any]
commonName = supplied
"""
CASES = {  # subject's alternative name, from, until, signed by the authority
    "good": ("DNS:a.test", "20200101000000Z", "20400101000000Z", True),
    "expired": ("DNS:a.test", "20200101000000Z", "20210101000000Z", True),
    "not yet": ("DNS:a.test", "20390101000000Z", "20400101000000Z", True),
    "of another name": ("DNS:b.test", "20200101000000Z", "20400101000000Z", True),
    "of its address only": ("IP:127.0.0.1", "20200101000000Z", "20400101000000Z", True),
    "of a name below": ("DNS:*.a.test", "20200101000000Z", "20400101000000Z", True),
    "self-signed": ("DNS:a.test", "20200101000000Z", "20400101000000Z", False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and a certificate of it for each case, all with one key."""
    here = tmp_path_factory.mktemp("authority")

    def openssl(*words: str) -> None:
        done = subprocess.run(["openssl", *words], cwd=here, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    (here / "ca.cnf").write_text(CONFIG)
    (here / "index.txt").write_text("")
    (here / "serial").write_text("01\n")
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    usage = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    openssl("req", "-x509", *new, "-days", "30", "-subj", "/CN=root", *usage, "-keyout", "root.key", "-out", "root.pem")
    for name, (subject, start, end, signed) in CASES.items():
        file = name.replace(" ", "-")
        request = [*new, "-subj", "/CN=x", "-addext", f"subjectAltName={subject}", "-keyout", f"{file}.key"]
        if signed:
            openssl("req", "-new", *request, "-out", f"{file}.csr")
            authority = ["-config", "ca.cnf", "-batch", "-notext", "-cert", "root.pem", "-keyfile", "root.key"]
            openssl("ca", *authority, "-startdate", start, "-enddate", end, "-in", f"{file}.csr", "-out", f"{file}.pem")
        else:
            openssl("req", "-x509", *request, "-days", "30", "-out", f"{file}.pem")
    return here


@pytest.mark.parametrize("name", CASES)
def test_certificates(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    file = name.replace(" ", "-")
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "root.pem"))
    fetch_module._tls.cache_clear()

    async def main() -> Body | RowError:
        asked = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc")
            writer.close()

        async def at_home(_: str) -> list[str]:
            return ["127.0.0.1"]

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / f"{file}.pem", folder / f"{file}.key")
        listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        port = listener.sockets[0].getsockname()[1]
        fetcher = Fetcher(FetchConfig(allow=(f"127.0.0.1:{port}",), retries=0, timeout=5, respect=()), lookup=at_home)
        try:
            result: Body | RowError = await fetcher.get(f"https://a.test:{port}/")
        except RowError as e:
            result = e
        await fetcher.close()
        listener.close()
        assert len(asked) == (1 if name == "good" else 0)  # nothing is said to who cannot prove a name
        return result

    try:
        result = asyncio.run(main())
    finally:
        fetch_module._tls.cache_clear()
    if name == "good":
        assert isinstance(result, Body)
    else:
        assert isinstance(result, RowError) and result.reason is Reason.TLS, result
