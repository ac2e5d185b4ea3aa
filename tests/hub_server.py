"""The Hugging Face hub on loopback, as far as huggingface_hub asks it for datasets: real files, commits, branches.

Large files come by git-lfs (the hub's other way, xet, is closed: HF_HUB_DISABLE_XET=1). What was received is noted.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_write": True, "hf_read": False}
"""Token -> whether it may write."""

_LFS = (".tar", ".parquet")  # what .gitattributes names; larger files than _REGULAR are large whatever they are called
_REGULAR = 100_000
_PAGE = 20  # files a page of a tree


@dataclass
class Repository:
    """Commits -> their files, branches -> commits. A file is its kind (blob, lfs), its digest and its size."""

    private: bool
    commits: dict[str, dict[str, tuple[str, str, int]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, tuple[str, str, int]], message: str) -> str:
        """A commit's name, as git would give one."""
        parent = self.branches.get(branch, "")
        name = hashlib.sha1(json.dumps([parent, files, message], sort_keys=True).encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        self.messages.append(message)
        return name


@dataclass
class Hub:
    """Such a server; contents lie in `folder`, by their digests."""

    folder: Path
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)  # method and path
    uploaded: list[str] = field(default_factory=list)  # sha256 of each large file that came whole
    refuse: dict[str, int] = field(default_factory=dict)  # part of a path -> the status that it is refused with
    begun: list[str] = field(default_factory=list)  # sha256 of each large file whose upload began, some at a time
    hang_at: int = -1  # the number of the upload that is not read on, and the event that then is set
    hangs: threading.Event = field(default_factory=threading.Event)

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        repository = self.repositories[name]
        found = repository.commits[repository.branches[branch]]
        return {path: self.content(digest) for path, (_, digest, _) in found.items() if path != ".gitattributes"}

    def write(self, name: str, to: Path) -> Path:
        """The files of the branch main, as a clone has them."""
        for path, content in self.files(name).items():
            (to / path).parent.mkdir(parents=True, exist_ok=True)
            (to / path).write_bytes(content)
        return to

    def content(self, digest: str) -> bytes:
        """The bytes of a file, by its digest."""
        return (self.folder / digest).read_bytes()

    def keep(self, content: bytes) -> tuple[str, str, int]:
        """Keep a small file."""
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (self.folder / digest).write_bytes(content)
        return "blob", digest, len(content)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query, parts = parse_qs(url.query), [unquote(p) for p in url.path.strip("/").split("/")]
        self.hub.asked.append((self.command, url.path))
        length = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT":
            return self._upload(parts[-1], length)
        body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        for path, status in self.hub.refuse.items():
            if path in url.path:
                return self._json({"error": "refused by a test"}, status)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.known, self.writes = token in TOKENS, TOKENS.get(token, False)
        if token and not self.known:
            return self._json({"error": "Invalid credentials in Authorization header"}, 401)
        if parts[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts[:2] == ["api", "validate-yaml"]:
            card = json.loads(body)["content"]
            wrong = [line for line in card.splitlines() if line.startswith("license: ") and line != line.lower()]
            errors = [{"message": f'"license" must be one of [apache-2.0, mit, ...]: {line}'} for line in wrong]
            return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)
        if parts[0] == "verify":
            return self._json({}) if (self.hub.folder / json.loads(body)["oid"]).is_file() else self._json({}, 404)
        where = parts[1:] if parts[0] == "api" else parts
        if where[0] != "datasets" or len(where) < 3:
            return self._json({}, 200 if parts == [""] else 404)
        self.name = f"{where[1]}/{where[2]}".removesuffix(".git")
        found = self.hub.repositories.get(self.name)
        if found is None or (found.private and not self.known):
            return self._refuse("RepoNotFound", 401 if not self.known else 404)
        self.repository = found
        if self.command == "POST" and "paths-info" not in where and not self.writes:
            return self._json({"error": "You don't have the rights"}, 403 if self.known else 401)
        rest = where[3:]
        if rest[:1] == ["info"]:
            return self._batch(json.loads(body))
        if rest[:1] == ["branch"]:
            found.branches[rest[1]] = found.branches["main"]
            return self._json({})
        revision = rest[1] if len(rest) > 1 else "main"
        commit = found.branches.get(revision, revision)
        if commit not in found.commits:
            return self._refuse("RevisionNotFound")
        files = found.commits[commit]
        kind = rest[0] if rest else "revision"
        if kind == "preupload":
            return self._preupload(json.loads(body)["files"], files)
        if kind == "commit":
            return self._commit(revision, body.decode().splitlines())
        if kind == "resolve":
            return self._resolve("/".join(rest[2:]), files, commit)
        if kind in ("tree", "paths-info"):
            wanted = parse_qs(body.decode()).get("paths", []) if kind == "paths-info" else [*files]
            return self._tree(commit, {p: files[p] for p in wanted if p in files})
        siblings = [{"rfilename": path} for path in files]
        return self._json({"id": self.name, "sha": commit, "private": found.private, "siblings": siblings, "tags": []})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if not self.writes:
            return self._json({"error": "You don't have the rights"}, 403 if self.known else 401)
        if name in self.hub.repositories:
            return self._json({"error": "You already created this dataset repo"}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private=bool(private))
        first = {".gitattributes": self.hub.keep(b"*.tar filter=lfs\n*.parquet filter=lfs\n")}
        self.hub.repositories[name].commit("main", first, "initial commit")
        return self._json({"url": f"{self.hub.url}/datasets/{name}", "name": name})

    def _preupload(self, asked: list[dict[str, Any]], files: dict[str, tuple[str, str, int]]) -> None:
        answers = []
        for one in asked:
            large = one["size"] > _REGULAR or one["path"].endswith(_LFS)
            there = files.get(one["path"])
            answer = {"path": one["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append({**answer, **({"oid": there[1]} if there else {})})
        self._json({"files": answers})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}?X-Signature=secret"}}
            actions["verify"] = {"href": f"{self.hub.url}/verify"}
            objects.append(one if (self.hub.folder / one["oid"]).is_file() else {**one, "actions": actions})
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, name: str, length: int) -> None:
        self.hub.begun.append(name)
        if self.hub.begun.index(name) == self.hub.hang_at:
            self.rfile.read(length // 2)
            self.hub.hangs.set()
            while self.rfile.read(1):  # until the other end is gone
                pass
            self.close_connection = True
            return None
        content = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if status := next((s for path, s in self.hub.refuse.items() if path in self.path), None):
            return self._json({"error": "refused by a test"}, status)
        if hashlib.sha256(content).hexdigest() != name:
            return self._json({"error": "other bytes"}, 400)
        (self.hub.folder / name).write_bytes(content)
        self.hub.uploaded.append(name)
        return self._json({})

    def _commit(self, branch: str, lines: list[str]) -> None:
        head, *operations = map(json.loads, lines)
        parent = head["value"].get("parentCommit")
        if parent and parent != self.repository.branches[branch]:
            return self._json({"error": "A commit has happened since. Please refresh and try again."}, 412)
        files = dict(self.repository.commits[self.repository.branches[branch]])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                del files[value["path"]]
            elif operation["key"] == "file":
                files[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
            elif (self.hub.folder / value["oid"]).is_file():
                files[value["path"]] = ("lfs", value["oid"], value["size"])
            else:
                return self._json({"error": f"{value['path']} was not uploaded"}, 400)
        name = self.repository.commit(branch, files, head["value"]["summary"])
        return self._json(
            {"success": True, "commitOid": name, "commitUrl": f"{self.hub.url}/{self.name}/commit/{name}"}
        )

    def _tree(self, commit: str, files: dict[str, tuple[str, str, int]]) -> None:
        start = int(self.query.get("cursor", ["0"])[0])
        entries = []
        for path, (kind, digest, size) in sorted(files.items())[start : start + _PAGE]:
            entry = {"type": "file", "path": path, "size": size, "oid": digest}
            if kind == "lfs":
                entry |= {"oid": digest[:40], "lfs": {"oid": digest, "size": size, "pointerSize": 130}}
            entries.append(entry)
        more = {}
        if start + _PAGE < len(files):
            again = f"{self.hub.url}/api/datasets/{self.name}/tree/{commit}?recursive=true&cursor={start + _PAGE}"
            more = {"Link": f'<{again}>; rel="next"'}
        self._json(entries, 200, more)

    def _resolve(self, path: str, files: dict[str, tuple[str, str, int]], commit: str) -> None:
        if path not in files:
            return self._refuse("EntryNotFound", headers={"X-Repo-Commit": commit})
        content, digest = self.hub.content(files[path][1]), files[path][1]
        status, headers = 200, {"X-Repo-Commit": commit, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            status, content = 206, content[int(first) : end]
        return self._answer(content, status, headers)

    def _refuse(self, code: str, status: int = 404, headers: dict[str, str] | None = None) -> None:
        self._json({"error": code}, status, {"X-Error-Code": code, **(headers or {})})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _chunked(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found


@contextlib.contextmanager
def serve_datasets(folder: Path) -> Iterator[Hub]:
    """Such a server, with its contents in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
