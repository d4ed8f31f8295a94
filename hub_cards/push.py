"""Push a saved model, or an adapter, with its code, processor, card and results, as one commit.

    python -m adaptive_llava push my_model user/name
    python -m adaptive_llava push my_model user/name --dry-run
    python -m adaptive_llava push my_model user/name --code user/code
    python -m adaptive_llava push my_adapter user/adapter --base user/name

Large files go first, and nobody sees them; the commit then shows everything at once. What an interruption leaves is
used by the next run: only files that are missing or that changed are sent. Weights and code of an earlier push that
are no longer among the files are removed by the same commit. The token is that of `hf auth login`, or HF_TOKEN.

A model gets a card (see `card`) unless it has one that a person wrote. No commit can name itself: a second one puts
the id of the first into the card's loading snippets.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RevisionNotFoundError

from adaptive_llava.hub_cards.card import add_card, gets_card
from adaptive_llava.hub_cards.card_text import pinned_revision
from adaptive_llava.hub_cards.hub_errors import check_reachable, tell_hub_failures
from adaptive_llava.hub_cards.upload_plan import CARD, UploadPlan, plan_upload
from adaptive_llava.modeling.code_files import MANIFEST_NAME, copy_code


WHOLE = "Nothing half-uploaded is visible there: all of it, or nothing new."
_SMALL = 10 * 1024 * 1024  # bytes; what is larger the Hub never keeps in git itself


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


def push(
    folder: str | Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    code_repository: str | None = None,
    update_code: bool = False,
    base: str | None = None,
    untrained: bool = False,
    results: Iterable[str | Path] = (),
    message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Upload a folder as one commit, and let a rendered card name it.

    Args:
        folder: What `save_pretrained` of a model or adapter, and of its processor, wrote.
        name: Hub id of the repository; it is made if there is none.
        private: Whether it is to be private.
        revision: Branch, made if there is none; by default `main`.
        create_pr: Open a pull request in place of committing.
        code_repository: Hub id of a repository for the code; it gets the code if it has none.
        update_code: Whether other code there may be replaced, for every checkpoint that points to it.
        base: Hub id of the model that an adapter belongs to.
        untrained: Whether a checkpoint with untrained parts is meant.
        results: Files of evaluations that stand elsewhere, as `evaluate` writes them.
        message: Commit message.
        token: Access token; by default that of `hf auth login`, or HF_TOKEN.

    Raises:
        ValueError: The folder cannot be pushed, or the options do not fit.
        HubFailure: The Hub refused, or could not be reached.
    """
    check_reachable("push", name, needs_login=token is None)
    with tempfile.TemporaryDirectory() as staging:
        plan = plan_upload(
            Path(folder),
            Path(staging),
            code_repository=code_repository,
            base=base,
            untrained=untrained,
            results=results,
        )
        code = None
        if code_repository is not None:
            code = push_code(code_repository, private=private, update=update_code, token=token).commit
        pins = _Pins(HfApi(token=token), name, revision)
        rendered = gets_card(plan, Path(folder))
        standing = pins.standing() if rendered else None
        if rendered:
            if plan.code_repository is not None and code is None:
                code = pins.newest(plan.code_repository)
            add_card(plan, Path(folder), Path(staging), name, revision=standing, code_revision=code)
        done = _commit(
            name,
            plan.files,
            message or f"Upload {'adapter' if plan.is_adapter else 'model'}",
            private=private,
            plan=plan,
            revision=revision,
            create_pr=create_pr,
            token=token,
        )
        if not rendered or create_pr or (standing is not None and pins.has_all(standing, done.commit)):
            return done
        add_card(plan, Path(folder), Path(staging), name, revision=done.commit, code_revision=code)
        return replace(done, card=pins.pin(plan.files[CARD], done.commit))


@dataclass(frozen=True)
class _Pins:
    """The commit that a rendered card names, in one branch of a repository."""

    api: HfApi
    name: str
    revision: str | None

    def newest(self, name: str) -> str:
        """The newest commit of a repository."""
        with tell_hub_failures(name, "was not read"):
            return self.api.repo_info(name).sha

    def standing(self) -> str | None:
        """What the card that is there names."""
        with tell_hub_failures(self.name, "was not read"):
            if not self.api.file_exists(self.name, CARD, revision=self.revision):
                return None
            path = Path(self.api.hf_hub_download(self.name, CARD, revision=self.revision))
        return pinned_revision(path.read_text(encoding="utf-8"))

    def has_all(self, old: str, new: str) -> bool:
        """Whether an old commit has the files of a new one, the card aside."""
        with tell_hub_failures(self.name, "was not read"):
            try:
                found = [_file_ids(self.api, self.name, commit) for commit in (old, new)]
            except RevisionNotFoundError:
                return False
        return found[0] | {CARD: None} == found[1] | {CARD: None}

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


def push_code(name: str, *, private: bool = False, update: bool = False, token: str | None = None) -> Pushed:
    """Put the code into a repository of its own, unless it is there already.

    Args:
        name: Hub id; the repository is made if there is none.
        private: Whether a new one is to be private.
        update: Whether other code there may be replaced.
        token: As of `push`.

    Raises:
        ValueError: It holds other code, and `update` is False.
        HubFailure: The Hub refused, or could not be reached.
    """
    check_reachable("--code", name, needs_login=token is None)
    with tempfile.TemporaryDirectory() as staging:
        files = {file: Path(staging, file) for file in (*copy_code(staging), MANIFEST_NAME)}
        api = HfApi(token=token)
        with tell_hub_failures(name, "was not read"):
            found = _file_ids(api, name, "main") if api.repo_exists(name) else {}
        here = {file: _blob_id(path) for file, path in files.items()}
        code_there = {file: oid for file, oid in found.items() if file.endswith(".py")}
        if code_there and not update and any(found.get(file) != oid for file, oid in here.items()):
            raise ValueError(
                f"{name} holds other code than this package, and every checkpoint that points there would get it. "
                "Pass --update-code if that is meant, or name another repository."
            )
        if all(found.get(file) == oid for file, oid in here.items()):  # then no right to write is needed
            with tell_hub_failures(name, "was not read"):
                return Pushed(api.repo_info(name).sha, f"{api.endpoint}/{name}", changed=False)
        return _commit(name, files, "Upload code", private=private, token=token)


def _commit(
    name: str,
    files: Mapping[str, Path],
    message: str,
    *,
    private: bool,
    plan: UploadPlan | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> Pushed:
    api = HfApi(token=token)
    with tell_hub_failures(name, "was not pushed", WHOLE):
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise ValueError(f"{name} is public already. Make it private in its settings, or leave --private out.")
        if revision is not None and not revision.startswith("refs/") and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        head = api.repo_info(name, revision=revision).sha
        ids = _file_ids(api, name, head)
        there = set(ids)
        removed = _code_there(api, name, head, there) if _has_code(there - set(files)) else set()
        if plan is not None:
            plan.check_kind(name, there)
            removed |= plan.weights_in(there)
        removed = (removed & there) - set(files)
        # clients differ in whether they leave out small files that are there already; large ones they all ask about
        new = [path for path in sorted(files) if path not in ids or ids[path] != _blob_id(files[path])]
        operations = [CommitOperationAdd(path, str(files[path])) for path in new]
        done = api.create_commit(
            name,
            [*operations, *(CommitOperationDelete(path) for path in sorted(removed))],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
    return Pushed(done.oid, done.pr_url or done.commit_url, done.oid != head, tuple(sorted(removed)))


def _has_code(names: set[str]) -> bool:
    return any(name.endswith(".py") or name == MANIFEST_NAME for name in names)


def _code_there(api: HfApi, name: str, revision: str, there: set[str]) -> set[str]:
    """The code of an earlier push, by its manifest, and the manifest."""
    if MANIFEST_NAME not in there:
        return set()
    manifest = Path(api.hf_hub_download(name, MANIFEST_NAME, revision=revision))
    return {MANIFEST_NAME, *json.loads(manifest.read_text(encoding="utf-8"))["sha256"]}


def _file_ids(api: HfApi, name: str, revision: str) -> dict[str, str]:
    """Git blob ids of all files, by path; of a large one, which the Hub keeps elsewhere, that of its pointer."""
    entries = api.list_repo_tree(name, revision=revision, recursive=True)
    return {entry.path: entry.blob_id for entry in entries if hasattr(entry, "blob_id")}


def _blob_id(path: Path) -> str | None:
    """Git's id of a small file; `None` for one that the Hub keeps elsewhere."""
    if path.stat().st_size > _SMALL:
        return None
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """`python -m adaptive_llava push`."""
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what `save_pretrained` of a model or adapter and processor wrote")
    parser.add_argument("name", help="repository, as user/name; made if there is none")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--revision", help="branch, made if there is none (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request in place of committing")
    parser.add_argument("--dry-run", action="store_true", help="list what would go up, and end")
    parser.add_argument("--code", metavar="USER/NAME", help="repository for the code, which many models may share")
    parser.add_argument("--update-code", action="store_true", help="replace other code in the repository of --code")
    parser.add_argument("--base", metavar="USER/NAME", help="the model on the Hub that an adapter belongs to")
    parser.add_argument("--untrained", action="store_true", help="push a checkpoint with untrained parts")
    parser.add_argument("--results", metavar="FILE", nargs="+", type=Path, default=[], help="results to send along")
    parser.add_argument("--message", help="commit message")
    options = vars(parser.parse_args(arguments))
    folder, name = options.pop("folder"), options.pop("name")
    options["code_repository"] = options.pop("code")
    if options.pop("dry_run"):
        chosen = {key: options[key] for key in ("code_repository", "base", "untrained", "results")}
        with tempfile.TemporaryDirectory() as staging:
            plan = plan_upload(folder, Path(staging), **chosen)
            if gets_card(plan, folder):
                add_card(plan, folder, Path(staging), name)
            print(listing(plan, name))
        return 0
    done = push(folder, name, **options)
    if not done.changed:
        print(f"{name} has all of it already, at commit {done.commit}")
        if done.card is not None:
            print(f"its card now names that commit, by commit {done.card}")
        return 0
    print(f"pushed in one commit: {done.url}")
    if done.card is not None:
        print(f"its card names that commit, by one more: {done.card}")
    if done.removed:
        print(f"removed, from an earlier push: {', '.join(done.removed)}")
    print(f"Check what others will run: python -m adaptive_llava verify {name}@{done.commit}")
    return 0


def listing(plan: UploadPlan, name: str) -> str:
    """What would go up, one line a file, and what would not."""
    lines = [f"{path.stat().st_size:>13,}  {file}" for file, path in sorted(plan.files.items())]
    lines.append(f"{plan.bytes:>13,}  bytes in {len(plan.files)} files would go up to {name}; nothing was sent")
    if plan.left_out:
        lines.append(f"stays here: {', '.join(plan.left_out)}")
    if plan.code_repository:
        lines.append(f"code: {plan.code_repository}")
    return "\n".join([*lines, *plan.notes])
