"""`python -m adaptive_llava`: commands are found, and bad input ends in one line."""

from __future__ import annotations

import pytest
import transformers
from PIL import Image

from adaptive_llava import AdaptiveLlavaProcessor
from adaptive_llava.__main__ import COMMANDS, main
from tests.conftest import tiny_model
from tests.test_convert import character_tokenizer


def save(folder):
    model = tiny_model("dfmr")
    model.save_pretrained(folder)
    AdaptiveLlavaProcessor.from_config(model.config, character_tokenizer()).save_pretrained(folder)


def test_without_a_command_all_are_listed(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


def test_an_unknown_command_names_the_known_ones(capsys):
    assert main(["train"]) == 2
    assert "unknown command 'train'; known: calibrate, train-router, convert" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrate", "--model", ".", "--data", "no/such/place", "--target-mean", "9"],
        ["train-router", "--model", "{model}", "--output", "routed", "--positive", "no/such/place", "--negative", "x"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_data_that_are_not_there_are_told_in_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "model")
    assert main([text.format(model=tmp_path / "model") for text in arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"python -m adaptive_llava {arguments[0]}: error: no/such/place: there is no such file")


def test_a_value_that_cannot_work_is_told_in_one_line(tmp_path, capsys):
    save(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for index in range(10):
        Image.new("RGB", (24, 24), (index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    arguments = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "images"), "--target-mean", "99"]
    assert main(["calibrate", *arguments]) == 2
    assert "calibrate: error: `target_mean=99` cannot be reached" in capsys.readouterr().err


@pytest.mark.compat
@pytest.mark.skipif(transformers.__version__ >= "5", reason="transformers 5 has the server")
def test_without_its_server_transformers_4_is_told_in_one_line(tmp_path, capsys):
    save(tmp_path / "model")
    assert main(["serve", str(tmp_path / "model")]) == 2
    assert "The server" in capsys.readouterr().err.splitlines()[-1]
