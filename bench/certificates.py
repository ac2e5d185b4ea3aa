"""A certificate authority of our own and a certificate per few hosts, so that clients verify as they do on the web."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

PER_CERTIFICATE = 10
"""Host names that share a certificate, as on shared hosting."""


def make(folder: Path, names: Sequence[str]) -> tuple[Path, list[tuple[list[str], Path]]]:
    """Make an authority and its certificates in `folder`, with the `openssl` command.

    Returns the authority's certificate, for SSL_CERT_FILE, and (names, file of certificate and key) for each group.
    Elliptic keys: the server and its clients share the cores, and RSA would cost the server many times more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = folder / "root.pem"
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    root_only = ["-subj", "/CN=bench", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]  # Python 3.13 asks for it
    _openssl(folder, "req", "-x509", *key, "-keyout", "root.key", "-out", "root.pem", *root_only, "-days", "30")
    groups = []
    for at in range(0, len(names), PER_CERTIFICATE):
        group, stem = list(names[at : at + PER_CERTIFICATE]), f"leaf{at:05d}"
        (folder / "extensions").write_text(
            f"subjectAltName={','.join(f'DNS:{n}' for n in group)}\nauthorityKeyIdentifier=keyid\n"
        )
        _openssl(folder, "req", *key, "-keyout", f"{stem}.key", "-out", "request", "-subj", f"/CN={group[0]}")
        sign = ["-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial", "-extfile", "extensions", "-days", "30"]
        _openssl(folder, "x509", "-req", "-in", "request", "-out", f"{stem}.crt", *sign)
        both = folder / f"{stem}.pem"
        both.write_bytes((folder / f"{stem}.crt").read_bytes() + (folder / f"{stem}.key").read_bytes())
        groups.append((group, both))
    return root, groups


def _openssl(folder: Path, *words: str) -> None:
    done = subprocess.run(["openssl", *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"openssl {words[0]}: {done.stderr[-500:]}")
