"""The remote code that travels with a checkpoint is whole, flat and fingerprinted."""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from adaptive_llava.modeling.code_files import AUTO_MAP, MANIFEST_NAME, auto_map, code_files, copy_code


pytestmark = pytest.mark.compat

FILES = {path.stem: path.read_text() for path in code_files()}
NAMED = {name: set(re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE)) for name, text in FILES.items()}


def everything_behind(name: str) -> set[str]:
    found, open_names = set(), {name}
    while open_names:
        found |= open_names
        open_names = set().union(*(NAMED[module] for module in open_names)) - found
    return found


@pytest.mark.parametrize("entry", sorted({reference.split(".")[0] for reference in AUTO_MAP.values()}))
def test_entry_files_name_every_file_behind_them(entry):
    # transformers 4.57 follows the names in the entry file of a local folder, but not those in the files it copies
    assert everything_behind(entry) - {entry} == NAMED[entry] - {entry}


def test_every_file_is_reached_from_an_entry():
    entries = {reference.split(".")[0] for reference in AUTO_MAP.values()}
    assert set().union(*map(everything_behind, entries)) == set(FILES)


def test_copied_code_matches_its_manifest(tmp_path):
    names = copy_code(tmp_path)
    sums = json.loads((tmp_path / MANIFEST_NAME).read_text())["sha256"]
    assert sorted(sums) == names == sorted(path.name for path in tmp_path.glob("*.py"))
    for name, expected in sums.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == expected


def test_a_file_that_was_changed_is_written_again(tmp_path):
    copy_code(tmp_path)
    changed = tmp_path / "compressor_base.py"
    changed.write_text("broken")
    copy_code(tmp_path)
    assert changed.read_text() == FILES["compressor_base"]
    assert not list(tmp_path.glob("*.partial"))


def test_code_of_another_repository_is_named_in_front():
    assert auto_map("org/code")["AutoConfig"] == "org/code--configuration_adaptive_llava.AdaptiveLlavaConfig"
