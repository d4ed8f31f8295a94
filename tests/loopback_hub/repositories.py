"""What the loopback Hub keeps: objects by their sha256; of each repository its commits and refs.

A commit becomes visible in one step, by the assignment of a ref; objects that no commit names are never shown.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


KINDS = ("models", "datasets", "spaces")
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".parquet", ".arrow", ".zip", ".gz", ".npz")
_LFS_FROM_BYTES = 10 * 1024 * 1024


class HubError(Exception):
    """An answer with an error status.

    Args:
        status: HTTP status.
        message: For people; goes into the body and `X-Error-Message`.
        code: `X-Error-Code`, by which clients choose the exception.
        headers: Further headers.
        body: Further fields of the JSON body.
    """

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None, **body: Any):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers, self.body = headers or {}, body


@dataclass(frozen=True)
class StoredFile:
    """One version of a file. `oid` is its git blob sha1, `sha256` the name of its object, `lfs` how it came."""

    size: int
    oid: str
    sha256: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """A state of all files; never changed once made."""

    id: str
    parent: str | None
    title: str
    message: str
    user: str
    date: str
    files: dict[str, StoredFile]


@dataclass
class Repository:
    """Commits and refs (`refs/heads/...`, `refs/tags/...`, `refs/pr/N`) of one repository, and its large objects."""

    kind: str
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[dict[str, Any]] = field(default_factory=list)
    received: set[str] = field(default_factory=set)

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, tag, full ref or commit id (at least 7 digits of it)."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        found = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        if len(found) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found[0]]

    def branch_ref(self, revision: str) -> str:
        """The ref that a commit to `revision` moves."""
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if ref not in self.refs:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return ref

    def commit(
        self,
        ref: str,
        files: dict[str, StoredFile],
        title: str,
        user: str,
        message: str = "",
        parent: str | None = None,
    ) -> Commit:
        """Make a commit and move `ref` onto it."""
        date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        known = json.dumps(
            [parent, title, user, date, len(self.commits), sorted((p, f.etag) for p, f in files.items())]
        )
        new = Commit(hashlib.sha1(known.encode()).hexdigest(), parent, title, message, user, date, files)
        self.commits[new.id] = new
        self.refs[ref] = new.id
        return new

    def history(self, commit: Commit) -> list[Commit]:
        """The commit and those before it, newest first."""
        found = [commit]
        while found[-1].parent is not None:
            found.append(self.commits[found[-1].parent])
        return found


class Store:
    """All repositories, and a folder of objects.

    Args:
        folder: Empty folder; objects are written to a temporary name first.
        tokens: By access token: `{"user": name, "role": "read" | "write", "orgs": [names]}`.

    `before_commit(repository, sha256, size)` is called for each large file that a commit names.
    """

    def __init__(self, folder: Path, tokens: dict[str, dict[str, Any]]):
        self.objects = folder / "objects"
        self.objects.mkdir(parents=True)
        self.tokens = tokens
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.before_commit: Callable[[Repository, str, int], None] = lambda repository, sha256, size: None

    def create(self, kind: str, name: str, private: bool, user: dict[str, Any]) -> Repository:
        """A new repository with an initial commit, as the Hub makes it."""
        if not re.fullmatch(r"[\w.-]+/[\w.-]{1,96}", name):
            raise HubError(400, f"Invalid repository name: {name}")
        self._check_writer(name, user)
        repository = Repository(kind, name, private)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS_SUFFIXES)
        first = {".gitattributes": self.add(attributes.encode(), lfs=False)}
        repository.commit("refs/heads/main", first, "initial commit", user["user"])
        self.repositories[kind, name] = repository
        return repository

    def find(self, kind: str, name: str, user: dict[str, Any] | None, write: bool = False) -> Repository:
        """The repository, if this user may see it (and change it).

        Raises:
            HubError: 401 for an anonymous caller or 404 for another, if there is none to be seen; 403 without the
                right to write.
        """
        repository = self.repositories.get((kind, name))
        if repository is None or (repository.private and not _belongs(name, user)):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self._check_writer(name, user)
        return repository

    def _check_writer(self, name: str, user: dict[str, Any] | None) -> None:
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user["role"] != "write" or not _belongs(name, user):
            raise HubError(403, f"Forbidden: you must use a write token of {name.split('/')[0]}.")

    def add(self, content: bytes, lfs: bool) -> StoredFile:
        """Keep the content of a small file."""
        sha256 = hashlib.sha256(content).hexdigest()
        path = self.objects / sha256
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_bytes(content)
            partial.replace(path)
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return StoredFile(len(content), blob, sha256, lfs)

    def stored(self, repository: Repository, sha256: str) -> StoredFile:
        """A large file that was uploaded for this repository.

        Raises:
            HubError: 400, its content never came.
        """
        if sha256 not in repository.received:
            raise HubError(400, f"LFS object {sha256} does not exist in the storage")
        path = self.objects / sha256
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {path.stat().st_size}\n"
        blob = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer.encode()).hexdigest()
        return StoredFile(path.stat().st_size, blob, sha256, lfs=True)


def _belongs(name: str, user: dict[str, Any] | None) -> bool:
    return user is not None and name.split("/")[0] in (user["user"], *user.get("orgs", ()))


def goes_to_lfs(path: str, size: int, sample: bytes) -> bool:
    """The Hub's rule for how a file is uploaded."""
    return path.endswith(_LFS_SUFFIXES) or size >= _LFS_FROM_BYTES or b"\0" in sample


def tree_entries(files: dict[str, StoredFile], below: str, recursive: bool) -> Iterable[dict[str, Any]]:
    """Entries of `/tree`: files and folders under `below` (`""`: all).

    Raises:
        HubError: 404, there is nothing of that name.
    """
    prefix = f"{below.strip('/')}/" if below.strip("/") else ""
    inside = {path: file for path, file in files.items() if path.startswith(prefix)}
    if prefix and not inside:
        raise HubError(404, f"{below} does not exist on this revision", "EntryNotFound")
    folders: set[str] = set()
    entries = []
    for path, file in sorted(inside.items()):
        parts = path[len(prefix) :].split("/")
        folders.update(prefix + "/".join(parts[:depth]) for depth in range(1, len(parts)))
        if recursive or len(parts) == 1:
            entries.append(file_entry(path, file))
    shown = (folder for folder in sorted(folders) if recursive or "/" not in folder[len(prefix) :])
    return [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in shown] + entries


def file_entry(path: str, file: StoredFile) -> dict[str, Any]:
    """What `/tree` and `/paths-info` say of a file."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return entry
