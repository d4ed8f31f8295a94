"""Push a saved model, or an adapter, with its code, processor, card and results, as one commit.

    python -m adaptive_llava push my_model user/name
    python -m adaptive_llava push my_model user/name --dry-run
    python -m adaptive_llava push my_model user/name --code user/code
    python -m adaptive_llava push my_adapter user/adapter --base user/name

Large files go first, and nobody sees them; the commit then shows everything at once. What an interruption leaves is
used by the next run: only files that are missing or that changed are sent. Weights and code of an earlier push that
are no longer among the files are removed by the same commit. The token is that of `hf auth login`, or HF_TOKEN.

Models and adapters get a card (see `card`) unless they have one that a person wrote. The commit is complete with it; a
second one puts the id of the first into the card's loading snippets.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from adaptive_llava.hub_cards.card import add_card, describe_upload, may_write, pin_card
from adaptive_llava.hub_cards.hub_branch import Pushed, code_at, open_branch
from adaptive_llava.hub_cards.hub_errors import check_reachable
from adaptive_llava.hub_cards.upload_plan import CARD, UploadPlan, plan_upload
from adaptive_llava.modeling.code_files import MANIFEST_NAME, copy_code


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
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as place:
        staging = Path(place)
        plan = plan_upload(
            folder, staging, code_repository=code_repository, base=base, untrained=untrained, results=results
        )
        described = describe_upload(plan, folder, name, token) if may_write(folder) else None
        code = None
        if code_repository is not None:
            code = push_code(code_repository, private=private, update=update_code, token=token).commit
        branch = open_branch(name, private=private, revision=revision, create_pr=create_pr, token=token)
        plan.check_kind(name, set(branch.entries))
        message = message or f"Upload {'adapter' if plan.is_adapter else 'model'}"
        if described is None:
            return branch.commit(plan.files, message, removed=branch.outdated(plan))
        config, facts = described
        if config.code_repository is not None:
            same = code is not None and config.code_repository == code_repository
            facts = replace(facts, code_revision=code if same else branch.newest(config.code_repository))
        add_card(plan, staging, config, facts)
        standing = branch.standing_pin(plan)
        if standing is not None:
            pin_card(plan, staging, config, replace(facts, revision=standing))
            return branch.commit(plan.files, message)
        # Two commits, since none can hold its own id, and a tag, which could be named before, can be moved after.
        done = branch.commit(plan.files, message, removed=branch.outdated(plan))
        if create_pr:
            return done
        pin_card(plan, staging, config, replace(facts, revision=done.commit))
        return replace(done, card=branch.pin(plan.files[CARD], done.commit))


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
        found = code_at(name, token)
        changed = found is None or found.changed(files)
        if not changed:  # then no right to write is needed
            return Pushed(found.head, f"{found.api.endpoint}/{name}", changed=False)
        if found is not None and any(file.endswith(".py") for file in found.entries) and not update:
            raise ValueError(
                f"{name} holds other code than this package, and every checkpoint that points there would get it. "
                "Pass --update-code if that is meant, or name another repository."
            )
        branch = open_branch(name, private=private, token=token)
        return branch.commit(files, "Upload code", removed=branch.outdated_code(files))


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
            if may_write(folder):
                add_card(plan, Path(staging), *describe_upload(plan, folder, name))
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
