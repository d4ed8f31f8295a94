"""The demo on a Hub: everything it needs goes up, and runs from there without this package."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from typing import Any

import pytest
from huggingface_hub import RepoCard

from adaptive_llava.hub_cards.push_space import space_card, space_files
from adaptive_llava.training.readme_figures import ROOT
from tests.fresh_process import run_without_package


FILES = space_files()
CARD = FILES["README.md"].read_text(encoding="utf-8")

# The package is the folder that was uploaded. Without its page, since gradio need not be installed here.
FROM_THE_SPACE = """
sys.path.insert(0, sys.argv[1])
import adaptive_llava
assert adaptive_llava.__file__.startswith(sys.argv[1]), adaptive_llava.__file__
from adaptive_llava.hub_cards.space.chat_turn import prepare, run_both, user_message
from adaptive_llava.hub_cards.space.model_choice import example_pictures, load
from adaptive_llava.hub_cards.space.token_overlay import overlays
model, processor = load(None)
image, question = example_pictures()[0]
chosen, full = run_both(model, processor, [user_message(question, [image])], "auto")
inputs = prepare(processor, [user_message(question, [image])])
print(question, "|", full.answer, "|", overlays(model, processor, [image], inputs, chosen.rungs)[0][1])
heavy = {"trl", "peft", "datasets", "evaluate"} & set(sys.modules)
print("trainers' libraries:", sorted(heavy))
"""


def laid_out(folder):
    """The files of the Space, as the Hub lays them out."""
    for name, path in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())
    return folder


def test_the_files_of_a_space_answer_without_an_installed_package(tmp_path):
    space = laid_out(tmp_path / "space")
    said = run_without_package(FROM_THE_SPACE, space, folder=tmp_path).splitlines()
    assert re.fullmatch(r"which height at bar2 \| height\d \| image 1: 36 queries", said[-2])
    assert said[-1] == "trainers' libraries: []"


def test_only_code_the_page_and_the_small_model_go_up():
    assert {name for name in FILES if "/" not in name} == {"app.py", "README.md", "requirements.txt"}
    assert {name.split("/")[0] for name in FILES if "/" in name} == {"adaptive_llava"}
    others = [name for name in FILES if not name.endswith(".py") and "/" in name]
    assert others and all(name.startswith("adaptive_llava/training/study/checkpoint/") for name in others)
    assert not any("__pycache__" in name or "test" in name.split("/")[0] for name in FILES)
    assert sum(path.stat().st_size for path in FILES.values()) < 20 * 2**20


def test_its_requirements_are_those_of_the_package():
    package = configparser.ConfigParser()
    package.read(ROOT / "setup.cfg")
    core = package["options"]["install_requires"].split("\n")
    lines = FILES["requirements.txt"].read_text().splitlines()
    assert {line for line in core if line} <= set(lines)
    card: Any = RepoCard(CARD).data
    assert (card.sdk, card.app_file) == ("gradio", "app.py")
    pinned = re.search(r"^gradio==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned.group(1) == card.sdk_version


def test_the_card_names_the_model():
    assert space_card(CARD, None) == CARD
    data: Any = RepoCard(space_card(CARD, "ada/model")).data
    assert data.models == data.preload_from_hub == ["ada/model"]
    with pytest.raises(ValueError, match="is no id of a repository"):
        space_card(CARD, "some/local/folder")


def test_a_dry_run_lists_the_files():
    command = [sys.executable, "-m", "adaptive_llava", "push-space", "ada/demo", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"bytes in {len(FILES)} files would go up to ada/demo; nothing was sent" in done.stdout


def test_a_push_is_one_commit_that_removes_what_an_older_one_left(hub, tmp_path):
    with hub.client(tmp_path / "user") as user:
        first, again = (user.command("push-space", "ada/demo") for _ in range(2))
    assert (first.status, again.status) == (0, 0), first.err + again.err
    assert "pushed in one commit" in first.out and "has all of it already" in again.out
    assert set(FILES) <= (files := files_of(hub)) and "adaptive_llava/old.py" not in files
    assert len(hub.call("/api/spaces/ada/demo/commits/main")) == 2  # the Hub's own first one, and ours
    done = hub.run("-c", OLDER, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"adaptive_llava/old.py", "notes.md"} <= files_of(hub)
    with hub.client(tmp_path / "user") as user:
        named = user.command("push-space", "ada/demo", "--model", "ada/model")
    assert named.status == 0, named.err
    assert "adaptive_llava/old.py" not in (files := files_of(hub)) and "notes.md" in files


OLDER = """
from huggingface_hub import HfApi
for name in ("adaptive_llava/old.py", "notes.md"):
    HfApi().upload_file(path_or_fileobj=b"1", path_in_repo=name, repo_id="ada/demo", repo_type="space")
"""


def files_of(hub) -> set[str]:
    tree = hub.call("/api/spaces/ada/demo/tree/main?recursive=true")
    return {entry["path"] for entry in tree if entry["type"] == "file"}
