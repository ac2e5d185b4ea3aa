"""A dataset repository of the Hugging Face hub as a place: files are uploaded, and appear there by commits."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from aesthetic.errors import UserError
from aesthetic.untrusted import printable
from curate.hub import unreachable

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^@\s?#]+))?/?")
_SMALL = 10 << 20  # bytes up to which the hub may want a file in the commit itself, and never above
_HELD = 64 << 20  # bytes of small files that are in memory before they are uploaded
_A_COMMIT = 500  # files; hf's own uploads take 20 to 1,000 to a commit, which is to be done within a minute


class HubPlace:
    """A branch of a repository (`hf://datasets/OWNER/NAME@BRANCH`, else main), both made where they are missing.

    What huggingface_hub is told by its environment holds: token (`hf auth login`, HF_TOKEN), HF_ENDPOINT. Up to 500
    files appear together; of more, some earlier than others.
    """

    def __init__(self, url: str) -> None:
        match = _ADDRESS.fullmatch(url)
        if match is None:
            raise UserError(f"{url}: hf://datasets/OWNER/NAME is expected, or hf://datasets/OWNER/NAME@BRANCH")
        from huggingface_hub import HfApi, constants

        self._url, self._repo, self._branch = url, match[1], unquote(match[2] or "main")
        if why := unreachable(constants.ENDPOINT, hub=True):
            raise UserError(f"{url} can't be reached: {why}")
        self._api = HfApi()
        self._found: dict[str, str] | None = None  # name -> sha256 of a large file, git's name of a small one
        self._commit: str | None = None  # that the files which were found are of
        self._private = True
        self._missing: str | None = None  # the repository or the branch, until something is sent
        self._pending: dict[str, CommitOperationAdd | CommitOperationDelete] = {}  # of the next commit
        self._held = 0  # bytes of them that are in memory

    def _all(self) -> dict[str, str]:
        if self._found is None:
            from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
            from huggingface_hub.hf_api import RepoFile

            def info(**of: Any) -> Any:
                return self._api.dataset_info(self._repo, expand=["sha", "private"], **of)

            self._found, told = {}, None
            with self._asking():
                try:
                    told = info(revision=self._branch)
                except RepositoryNotFoundError:
                    self._missing = "repository"
                except RevisionNotFoundError:
                    self._missing, told = "branch", info()  # where a new branch begins
                if told is not None and told.sha:
                    self._private, self._commit = bool(told.private), told.sha
                    of = {"recursive": True, "repo_type": "dataset", "revision": told.sha}
                    tree = [f for f in self._api.list_repo_tree(self._repo, **of) if isinstance(f, RepoFile)]
                    self._found = {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in tree}
        return self._found

    def names(self) -> set[str]:
        """The files of the branch, but for the one that the hub itself makes."""
        return {*self._all()} - {".gitattributes"}

    def read(self, name: str) -> bytes | None:
        """A small file's bytes."""
        if name not in self._all():
            return None
        with tempfile.TemporaryDirectory() as folder, self._asking():
            path = self._api.hf_hub_download(
                self._repo, name, repo_type="dataset", revision=self._commit, local_dir=folder
            )
            return Path(path).read_bytes()

    def holds(self, name: str, path: Path, sha256: str, stamp: str) -> bool:
        """By the name that its content has there."""
        there = self._all().get(name)
        return there is not None and there == (sha256 if len(there) == 64 else _git_name(path))

    def send(self, path: Path, name: str, sha256: str) -> str:
        """Upload a large one now; small ones go together."""
        from huggingface_hub import CommitOperationAdd

        if first := not self._pending:
            self._make()
        self._pending.pop(name, None)
        if self.holds(name, path, sha256, ""):
            return ""
        size = path.stat().st_size
        operation = CommitOperationAdd(name, path.read_bytes() if size <= _SMALL else str(path))
        operation.upload_info.sha256 = bytes.fromhex(sha256)  # else it is computed again
        self._pending[name] = operation
        self._held += size if size <= _SMALL else 0
        if first or size > _SMALL or self._held > _HELD:  # the first, as that is refused to who may not write
            self._upload()
        if len(self._pending) >= _A_COMMIT or self._held > _HELD or isinstance(operation.path_or_fileobj, str):
            self._send_commit(f"on its way: {len(self._pending):,} files")
        return ""

    def delete(self, names: Iterable[str]) -> None:
        """Files that go with the next commit."""
        from huggingface_hub import CommitOperationDelete

        self._pending |= {name: CommitOperationDelete(name, is_folder=False) for name in names if name in self._all()}

    def finish(self, message: str) -> str:
        """The last commit; where it can be seen."""
        if self._pending:
            self._send_commit(message)
        at = "" if self._branch == "main" else f"/tree/{self._branch}"
        private = ", which is private: its settings there open it to others" if self._private else ""
        return f"{self._api.endpoint}/datasets/{self._repo}{at}{private}"

    def _make(self) -> None:
        """Make the repository or the branch, where it is missing. A new repository is private: its owner opens it."""
        from huggingface_hub import get_token

        self._all()
        if get_token() is None:
            raise UserError(f"{self._url}: the hub wants a token that may write: `hf auth login`, or HF_TOKEN")
        made = self._missing
        with self._asking():
            if made == "repository":
                self._api.create_repo(self._repo, repo_type="dataset", private=True, exist_ok=True)
            if made and self._branch != "main":
                if self._branch.startswith("refs/"):
                    raise UserError(f"{self._url}: there is no such revision, and only branches are made")
                self._api.create_branch(self._repo, repo_type="dataset", branch=self._branch, exist_ok=True)
        self._missing = None

    def _upload(self) -> None:
        """Upload what is pending and large to the hub's mind; it is forgotten here."""
        from huggingface_hub import CommitOperationAdd

        adds = [o for o in self._pending.values() if isinstance(o, CommitOperationAdd)]
        with self._asking():
            self._api.preupload_lfs_files(self._repo, adds, repo_type="dataset", revision=self._branch)
        self._held = sum(len(o.path_or_fileobj) for o in adds if isinstance(o.path_or_fileobj, bytes))

    def _send_commit(self, message: str) -> None:
        """Commit what is pending; refused where somebody else has committed since the files were listed."""
        from huggingface_hub import CommitOperationAdd

        self._upload()
        with self._asking():
            done = self._api.create_commit(
                self._repo,
                [*self._pending.values()],
                commit_message=message,
                repo_type="dataset",
                revision=self._branch,
                parent_commit=self._commit,
            )
        self._commit, found = done.oid, self._all()
        for name, operation in self._pending.items():
            if isinstance(operation, CommitOperationAdd):
                found[name] = operation.upload_info.sha256.hex()
            else:
                found.pop(name, None)
        self._pending, self._held = {}, 0

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Without huggingface_hub's progress bars, and with what the hub refuses as a UserError."""
        from huggingface_hub import errors, utils

        shown = not utils.are_progress_bars_disabled()
        if shown:
            utils.disable_progress_bars()
        try:
            yield
        except (errors.HTTPError, OSError, RuntimeError, ValueError) as e:  # ValueError: names, and what the card says
            if isinstance(e, OSError) and e.filename is not None:  # a file of ours
                raise
            # a failed upload is wrapped into a RuntimeError without its reason
            cause = e.__cause__ if isinstance(e, RuntimeError) and isinstance(e.__cause__, Exception) else e
            raise UserError(f"{self._url}: {_said(cause)}.{_hint(cause)}") from e
        finally:
            if shown:
                utils.enable_progress_bars()


def _said(error: Exception) -> str:
    """What the hub, or the way there, said, in a line; signed addresses lose their signatures."""
    lines = [getattr(error, "server_message", None) or "", *str(error).splitlines(), type(error).__name__]
    line = next(line.strip() for line in lines if line.strip())
    if isinstance(error, ValueError):  # what is wrong comes in further lines
        line = " ".join(str(error).split())
    return printable(re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", line), 300).rstrip(".")


def _hint(error: Exception) -> str:
    """What helps against a refusal."""
    if isinstance(error, ValueError):
        return ""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return " The token is missing or not valid: `hf auth login`, or HF_TOKEN"
    if status == 403:
        return " The token may not write there: `hf auth whoami` says whose it is, the hub's settings what it may"
    if status == 404:
        return " It is not there, or the token may not see it"
    if status in (409, 412):
        return " Was something else committed there meanwhile? The same command looks again what is there"
    return " The same command goes on where this one stopped"


def _git_name(path: Path) -> str:
    """The name that git gives a file's content."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
