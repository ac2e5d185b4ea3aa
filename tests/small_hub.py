"""A tiny classifier in the hub's format, and a server that speaks what downloads need of its protocol."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40


def save_classifier(folder: Path, labels: list[str], *, several: bool = False, seed: int = 0, side: int = 32) -> Path:
    """A ViT of random weights with its image processor, as transformers saves them; with `several` labels at once."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=side,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.5,  # else all images look alike to it
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type="multi_label_classification" if several else None,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def serve_hub(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Repositories of the hub, ORG/NAME -> folder, at the commit COMMIT of their branch main: the server's address, and
    the paths that it is asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            parts = path.strip("/").split("/")
            name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
            folder = repositories.get(name)
            if folder is None:
                return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            if parts[:2] == ["api", "models"]:
                kind, revision = parts[4:6]
                if revision not in ("main", COMMIT):
                    return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                listed = [
                    {"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size, "oid": _sha1(p)}
                    for p in files
                ]
                info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": e["path"]} for e in listed]}
                return self._answer(200, json.dumps(listed if kind == "tree" else info).encode(), {})
            revision, file = parts[3], folder.joinpath(*parts[4:])
            known = {"X-Repo-Commit": COMMIT}
            if revision not in ("main", COMMIT):
                return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            if not file.is_file():
                return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", **known})
            return self._answer(200, file.read_bytes(), {"ETag": f'"{_sha1(file)}"', **known})

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def _sha1(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
