"""Push the demo to a Space: its page, and this package as a folder beside it, as one commit.

    python -m adaptive_llava push-space user/name
    python -m adaptive_llava push-space user/name --model user/model
    python -m adaptive_llava push-space user/name --dry-run

The Space runs on a CPU with the small model that comes with the package, or with `--model`. What an earlier push left
in the package's folder goes with the same commit. The token is that of `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard

import adaptive_llava
from adaptive_llava.hub_cards.hub_branch import WHOLE, Pushed
from adaptive_llava.hub_cards.hub_errors import check_reachable, tell_hub_failures
from adaptive_llava.hub_cards.upload_plan import CARD, HUB_ID


PACKAGE = "adaptive_llava"
PAGE = ("app.py", CARD, "requirements.txt")
_PARTS = ("modeling", "processing", "training", "hub_cards")


def space_files() -> dict[str, Path]:
    """What a Space needs, by path in its repository: the page at the top, and the package as a wheel lays it out."""
    page = Path(import_module(f"{PACKAGE}.hub_cards.space").__file__).parent
    files = {name: page / name for name in PAGE}
    own = Path(adaptive_llava.__file__).parent
    files |= {f"{PACKAGE}/{path.name}": path for path in own.glob("*.py")}
    for part in _PARTS:
        folder = Path(import_module(f"{PACKAGE}.{part}").__file__).parent
        files |= {f"{PACKAGE}/{part}/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*.py")}
    shipped = Path(import_module(f"{PACKAGE}.training.study").__file__).parent / "checkpoint"
    files |= {f"{PACKAGE}/training/study/checkpoint/{path.name}": path for path in shipped.iterdir()}
    return dict(sorted(files.items()))


def space_card(card: str, model: str | None) -> str:
    """The Space's README.md for a model; the page reads the name there.

    Args:
        card: The README.md of the page.
        model: Hub id; `None` for the model that comes with the package.

    Raises:
        ValueError: `model` is no Hub id.
    """
    if model is None:
        return card
    if not HUB_ID.fullmatch(model):
        raise ValueError(f"`--model {model}` is no id of a repository. Push the model first, then pass `user/model`.")
    found = RepoCard(card)
    data: Any = found.data
    data.models = data.preload_from_hub = [model]
    return str(found)


def push_space(name: str, *, model: str | None = None, private: bool = False) -> Pushed:
    """Upload the demo as one commit.

    Args:
        name: Hub id of the Space; it is made if there is none.
        model: Hub id of the model it runs; by default the one that comes with the package.
        private: Whether a new Space is to be private.

    Raises:
        ValueError: A name is no Hub id.
        HubFailure: The Hub refused, or could not be reached.
    """
    check_reachable("push-space", name)
    api, files = HfApi(), space_files()
    with tempfile.TemporaryDirectory() as staging, tell_hub_failures(name, "was not pushed", WHOLE):
        card = Path(staging, CARD)
        card.write_text(space_card(files[CARD].read_text(encoding="utf-8"), model), encoding="utf-8")
        files[CARD] = card
        api.create_repo(name, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
        head = api.repo_info(name, repo_type="space").sha
        there = api.list_repo_files(name, repo_type="space", revision=head)
        removed = tuple(file for file in there if file.startswith(f"{PACKAGE}/") and file not in files)
        done = api.create_commit(
            name,
            [CommitOperationAdd(path, str(source)) for path, source in files.items()]
            + [CommitOperationDelete(path) for path in removed],
            commit_message="Upload the demo",
            repo_type="space",
            parent_commit=head,
        )
    return Pushed(done.oid, done.commit_url, done.oid != head, removed)


def main(arguments: list[str] | None = None) -> int:
    """`python -m adaptive_llava push-space`."""
    parser = argparse.ArgumentParser(
        prog="python -m adaptive_llava push-space",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="Space, as user/name; made if there is none")
    parser.add_argument("--model", metavar="USER/NAME", help="the model it runs (default: the package's small one)")
    parser.add_argument("--private", action="store_true", help="make a private Space")
    parser.add_argument("--dry-run", action="store_true", help="list what would go up, and end")
    options = parser.parse_args(arguments)
    if options.dry_run:
        files = space_files()
        for file, path in files.items():
            print(f"{path.stat().st_size:>13,}  {file}")
        size = sum(path.stat().st_size for path in files.values())
        print(f"{size:>13,}  bytes in {len(files)} files would go up to {options.name}; nothing was sent")
        return 0
    done = push_space(options.name, model=options.model, private=options.private)
    print(f"pushed in one commit: {done.url}" if done.changed else f"{options.name} has all of it already")
    return 0
