"""`make quickstart`: the whole story in small, and what it says to bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adaptive_llava.training import quickstart, quickstart_report
from adaptive_llava.training.process_without_package import link_libraries
from adaptive_llava.training.readme_figures import ROOT
from adaptive_llava.training.rendered_images import KINDS, render_images


@pytest.fixture
def own_images(tmp_path):
    folder = tmp_path / "own images"
    folder.mkdir()
    Image.new("RGB", (90, 60), "white").save(folder / "blank.png")
    Image.effect_noise((70, 120), 90).save(folder / "noise.jpg")
    return folder


@pytest.mark.slow
def test_quickstart_runs_end_to_end(tmp_path, own_images, capfd, monkeypatch):
    output = tmp_path / "quickstart_output"
    arguments = ["--output", str(output), "--images", str(own_images), "--steps-scale", "0.03"]
    assert quickstart.main(arguments) == 0
    shown = capfd.readouterr().out
    results = json.loads((output / "quickstart_results.json").read_text())

    assert "import adaptive_llava -> ModuleNotFoundError" in shown
    assert results["package_importable_in_fresh_process"] is False
    assert results["model_class_in_fresh_process"].startswith("transformers_modules.")
    assert (output / "model" / "modeling_adaptive_llava.py").is_file()
    with Image.open(output / "quickstart.png") as picture:
        assert picture.width > 800

    assert results["token_counts"] == [1, 4, 16]
    assert len(results["thresholds"]) == 2
    assert results["seconds"]["total"] == pytest.approx(
        sum(seconds for phase, seconds in results["seconds"].items() if phase != "total"), abs=0.1
    )
    scores = results["scores"]
    assert list(scores) == ["before_largest", "before_auto", "smallest", "auto", "largest"]
    for kind in (*KINDS, "all"):
        assert scores["smallest"][kind]["mean_tokens"] == 1
        assert scores["largest"][kind]["mean_tokens"] == scores["before_largest"][kind]["mean_tokens"] == 16
        assert scores["auto"][kind]["mean_tokens"] == scores["before_auto"][kind]["mean_tokens"]
        assert f"{scores['auto'][kind]['accuracy']:.1%}" in shown
    assert scores["auto"]["all"]["mean_tokens"] == pytest.approx(7, abs=1.5)
    assert scores["auto"]["all"]["questions"] == 2 * quickstart.HELD_OUT_IMAGES
    for image in results["own_images"]:
        assert image["tokens"] in (1, 4, 16)
        assert f"{image['tokens']} token" in shown and Path(image["image"]).name in shown

    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"image": Image.new("RGB", (64, 64), "white")}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        # what needs neither a download nor a model of the reader's own must run, one block after the other; the
        # block on preferences has a test in test_preference_training.py
        if "llava-hf/" not in block and "my_model" not in block:
            exec(block, scope)
    assert scope["output"].num_visual_tokens.tolist()[0] in (1, 4, 16)
    assert scope["expanded"]["input_ids"][0].count(scope["processor"].image_token_id) == 16

    assert quickstart.prepare_output(output) == output  # a second run may use the folder again
    assert not (output / "model").exists()


def test_scores_count_right_answers_and_tokens_by_kind():
    rows = [
        {"kind": kind, "right": right, "tokens": tokens}
        for kind, right, tokens in [
            ("scene", True, 1),
            ("scene", False, 4),
            ("collage", True, 4),
            ("document", True, 16),
        ]
    ]
    table = quickstart_report.score({"auto": rows})["auto"]
    assert table["scene"] == {"accuracy": 0.5, "mean_tokens": 2.5, "questions": 2}
    assert table["all"] == {"accuracy": 0.75, "mean_tokens": 6.25, "questions": 4}


def test_examples_are_the_first_of_each_kind_whether_right_or_wrong():
    images = (
        [("scene", i) for i in range(6)] + [("document", i) for i in range(2)] + [("collage", i) for i in range(5)]
    )
    rows = [{"kind": kind, "image": f"{kind}{i}", "turn": turn} for kind, i in images for turn in (0, 1)]
    names = [row["image"] for row in quickstart_report.pick_examples(rows)]
    assert names == [f"{kind}{i}" for kind, shown in zip(KINDS, (4, 4, 2), strict=True) for i in range(shown)]


def test_all_cells_of_documents_are_asked_about(tmp_path):
    entries = quickstart.write_images(render_images(60, seed=0), tmp_path)
    asked = {question for entry in entries if entry["kind"] == "document" for question, _ in entry["questions"]}
    assert len(asked) == 16
    assert all(len(entry["questions"]) == 2 and Path(entry["path"]).is_file() for entry in entries)


def test_the_linked_libraries_hold_everything_but_this_package(tmp_path):
    libraries = tmp_path / "libraries"
    link_libraries(libraries)
    code = f"import sys; sys.path.append({str(libraries)!r}); import torch; print(torch.__name__)"
    for module, works in (("torch", True), ("adaptive_llava", False)):
        command = [sys.executable, "-I", "-S", "-c", code.replace("torch", module)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode == 0) is works, done.stderr
    assert "No module named 'adaptive_llava'" in done.stderr


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "there is no such folder. Pass a folder with image files"),
        (lambda folder: folder.mkdir(), "holds no images"),
        (lambda folder: (folder.mkdir(), (folder / "notes.txt").write_text("no image")), "holds no images"),
        (lambda folder: folder.write_text("a file"), "there is no such folder"),
        (
            lambda folder: (folder.mkdir(), (folder / "broken.png").write_bytes(b"not a picture")),
            "broken.png.*Put readable image files into the folder, or take this one out",
        ),
    ],
    ids=["missing", "empty", "no images", "a file", "unreadable"],
)
def test_bad_image_folders_are_refused_before_training(tmp_path, prepare, message):
    folder = tmp_path / "mine"
    prepare(folder)
    with pytest.raises(ValueError, match=f"(?s)--images {folder}.*{message}"):
        quickstart.find_images(folder)


def test_a_bad_image_ends_the_command_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        quickstart.main(["--images", str(tmp_path / "missing"), "--output", str(tmp_path / "out")])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "missing" in error
    assert not (tmp_path / "out").exists()


def test_folders_with_other_things_in_them_are_left_alone(tmp_path):
    kept = tmp_path / "out" / "model" / "precious.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    with pytest.raises(ValueError, match="the folder is not empty, and not of an earlier quickstart"):
        quickstart.prepare_output(tmp_path / "out")
    with pytest.raises(ValueError, match="is a file. Pass a folder"):
        quickstart.prepare_output(kept)
    assert kept.read_text() == "mine"


def test_steps_scale_must_be_positive(tmp_path, capsys):
    with pytest.raises(SystemExit):
        quickstart.main(["--steps-scale", "0", "--output", str(tmp_path / "out")])
    assert "`--steps-scale 0.0` must be above 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
