"""One branch of a repository as it stands before a push: what differs there, and the commit that changes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from adaptive_llava.hub_cards.card_text import pinned_revision
from adaptive_llava.hub_cards.hub_errors import tell_hub_failures
from adaptive_llava.hub_cards.upload_plan import CARD, UploadPlan
from adaptive_llava.modeling.code_files import MANIFEST_NAME


WHOLE = "Nothing half-uploaded is visible there: all of it, or nothing new."


@dataclass(frozen=True)
class Pushed:
    """A push that ended well.

    Attributes:
        commit: Commit id that has everything.
        url: Page of the commit, or of the pull request.
        changed: False if everything was there already, and no commit was made.
        removed: Names of files of an earlier push that the commit removed.
        card: Commit of the card that names `commit`, if one had to be made.
    """

    commit: str
    url: str
    changed: bool
    removed: tuple[str, ...] = ()
    card: str | None = None


@dataclass(frozen=True)
class Branch:
    """A branch before a push.

    Attributes:
        api: Client with the token.
        name: Hub id of the repository.
        head: Its newest commit.
        entries: Files there, by path.
        revision: Its name; `None`: `main`.
        create_pr: Whether commits go to a pull request.
    """

    api: HfApi
    name: str
    head: str
    entries: Mapping[str, RepoFile]
    revision: str | None = None
    create_pr: bool = False

    def changed(self, files: Mapping[str, Path]) -> list[str]:
        """Names of the files that are not there, or not with this content."""
        return [path for path in sorted(files) if not _is_same(self.entries.get(path), files[path])]

    def outdated(self, plan: UploadPlan) -> set[str]:
        """Weights and code of an earlier push that a new one does not have."""
        return self.outdated_code(plan.files) | (plan.weights_in(self.entries) - set(plan.files))

    def outdated_code(self, files: Iterable[str]) -> set[str]:
        """The code of an earlier push, by its manifest, and the manifest, without what is pushed again."""
        left = set(self.entries) - set(files)
        if MANIFEST_NAME not in self.entries or not any(
            file.endswith(".py") or file == MANIFEST_NAME for file in left
        ):
            return set()
        manifest = json.loads(self._read(MANIFEST_NAME))
        return {MANIFEST_NAME, *manifest["sha256"]} & left

    def newest(self, name: str) -> str:
        """The newest commit of another repository."""
        with tell_hub_failures(name, "was not read"):
            return self.api.repo_info(name).sha

    def standing_pin(self, plan: UploadPlan) -> str | None:
        """The commit that the card there names, if it has all that a plan has, the card aside."""
        if CARD not in self.entries or self.changed(plan.files) not in ([], [CARD]) or self.outdated(plan):
            return None
        pinned = pinned_revision(self._read(CARD))
        if pinned is None:
            return None
        with tell_hub_failures(self.name, "was not read"):
            try:
                found = _entries(self.api, self.name, pinned)
            except RevisionNotFoundError:
                return None
        then, now = ({path: one.blob_id for path, one in each.items()} for each in (found, self.entries))
        return pinned if then | {CARD: None} == now | {CARD: None} else None

    def commit(self, files: Mapping[str, Path], message: str, removed: Iterable[str] = ()) -> Pushed:
        """Send what differs, in one commit; none is made if nothing does.

        Raises:
            HubFailure: The Hub refused, could not be reached, or has a newer commit than `head`.
        """
        # clients differ in whether they leave out files that are there already
        added = [CommitOperationAdd(path, str(files[path])) for path in self.changed(files)]
        gone = sorted(removed)
        if not added and not gone:
            return Pushed(self.head, f"{self.api.endpoint}/{self.name}", changed=False)
        with tell_hub_failures(self.name, "was not pushed", WHOLE):
            done = self.api.create_commit(
                self.name,
                [*added, *map(CommitOperationDelete, gone)],
                commit_message=message,
                revision=self.revision,
                create_pr=self.create_pr,
                parent_commit=self.head,
            )
        return Pushed(done.oid, done.pr_url or done.commit_url, done.oid != self.head, tuple(gone))

    def pin(self, card: Path, commit: str) -> str:
        """Commit a card on top of the commit that it names."""
        state = "All of it is there but for its card's pin, which the same command adds."
        with tell_hub_failures(self.name, "was not pinned in its card", state):
            done = self.api.create_commit(
                self.name,
                [CommitOperationAdd(CARD, str(card))],
                commit_message=f"Pin {commit[:8]} in the card",
                revision=self.revision,
                parent_commit=commit,
            )
        return done.oid

    def _read(self, path: str) -> str:
        with tell_hub_failures(self.name, "was not read"):
            return Path(self.api.hf_hub_download(self.name, path, revision=self.head)).read_text(encoding="utf-8")


def open_branch(
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> Branch:
    """A branch that can be committed to; repository and branch are made if there are none.

    Raises:
        ValueError: `private`, and the repository is public.
        HubFailure: The Hub refused, or could not be reached.
    """
    api = HfApi(token=token)
    with tell_hub_failures(name, "was not pushed", WHOLE):
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise ValueError(f"{name} is public already. Make it private in its settings, or leave --private out.")
        if revision is not None and not revision.startswith("refs/") and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        head = api.repo_info(name, revision=revision).sha
        return Branch(api, name, head, _entries(api, name, head), revision, create_pr)


def code_at(name: str, token: str | None = None) -> Branch | None:
    """The `main` of a repository, of which nothing is made; `None`: there is none."""
    api = HfApi(token=token)
    with tell_hub_failures(name, "was not read"):
        if not api.repo_exists(name):
            return None
        head = api.repo_info(name).sha
        return Branch(api, name, head, _entries(api, name, head))


def _entries(api: HfApi, name: str, revision: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(name, revision=revision, recursive=True)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _is_same(entry: RepoFile | None, path: Path) -> bool:
    """Whether a file of the Hub has the content of one here; it knows large ones by sha256, others as git does."""
    if entry is None or entry.size != path.stat().st_size:
        return False
    if entry.lfs is not None:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.lfs.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == entry.blob_id
