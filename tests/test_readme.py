"""What README.md says is there, works, and is measured."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from adaptive_llava import PRESETS
from adaptive_llava.__main__ import COMMANDS
from adaptive_llava.training.readme_blocks import BLOCKS
from adaptive_llava.training.readme_figures import ROOT, fill, main
from tests.conftest import PRESETS_HERE


README = (ROOT / "README.md").read_text()
MODULES = sorted(set(re.findall(rf"python -m (adaptive_llava(?:\.\w+)*(?: (?:{'|'.join(COMMANDS)}))?)", README)))


def test_figures_are_those_of_the_result_files(capsys):
    assert main(["--check"]) == 0, "run python -m adaptive_llava.training.readme_figures"
    assert "up to date" in capsys.readouterr().out


def test_a_missing_result_file_names_the_command_that_writes_it(tmp_path):
    filled = fill("<!-- figures: benchmark_cpu -->\nold\n<!-- end figures -->", tmp_path)
    assert "not measured yet: `python -m adaptive_llava.training.benchmark`" in filled
    assert "old" not in filled


def test_an_unknown_block_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'speed' is unknown"):
        fill("<!-- figures: speed -->\n<!-- end figures -->", tmp_path)


def test_every_result_block_has_been_measured():
    assert set(BLOCKS) == set(re.findall(r"<!-- figures: (\w+) -->", README))
    assert "not measured yet" not in README


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_linked_files_exist(target):
    assert target.startswith("https://") or (ROOT / target).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|training|modeling)/[\w./]+)`", README))))
def test_named_files_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", MODULES)
def test_commands_exist(command, monkeypatch, capsys):
    module, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [module, *arguments, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not ended.value.code and "usage" in capsys.readouterr().out


def test_the_table_of_presets_is_complete():
    named = re.findall(r"^\| `([\w-]+)`", README.split("| preset |")[1].split("\n\n")[0], re.MULTILINE)
    assert sorted(named) == sorted(PRESETS_HERE) == sorted(PRESETS)


def test_recipes_named_exist():
    recipes = re.findall(r"training/recipes/\w+\.yaml", README)
    assert recipes and all(Path(ROOT, recipe).exists() for recipe in recipes)
