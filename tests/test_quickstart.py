"""`make quickstart`: the whole story in small, and what it says to bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adaptive_llava.training import quickstart, quickstart_report
from adaptive_llava.training.new_document import NEW_DOCUMENT, render_blueprints
from adaptive_llava.training.process_without_package import link_libraries
from adaptive_llava.training.quickstart_tuning import read, teach_router
from adaptive_llava.training.readme_figures import ROOT
from adaptive_llava.training.study.families import FAMILIES, render
from adaptive_llava.training.study.ship import load_shipped


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
    arguments = ["--output", str(output), "--images", str(own_images), "--steps-scale", "0.04"]
    assert quickstart.main([*arguments, "--trust-remote-code"]) == 0
    shown = capfd.readouterr().out
    results = json.loads((output / "quickstart_results.json").read_text())

    assert "import adaptive_llava -> ModuleNotFoundError" in shown
    assert results["package_importable_in_fresh_process"] is False
    assert results["model_class_in_fresh_process"].startswith("transformers_modules.")
    assert (output / "model" / "modeling_adaptive_llava.py").is_file()
    with Image.open(output / "quickstart.png") as picture:
        assert picture.width > 800

    counts = results["token_counts"]
    assert results["seconds"]["total"] == pytest.approx(
        sum(seconds for phase, seconds in results["seconds"].items() if phase != "total"), abs=0.1
    )
    assert list(results["shipped"]["auto"]) == [*FAMILIES, "all"]
    for kind in FAMILIES:
        assert results["shipped"]["smallest"][kind]["mean_tokens"] == counts[0]
        assert counts[0] <= results["shipped"]["auto"][kind]["mean_tokens"] <= counts[-1]
        assert re.search(rf"  {kind} +{results['shipped']['auto'][kind]['mean_tokens']:.1f} ", shown)

    scores = results["scores"]
    assert list(scores) == ["before_largest", "before_auto", "smallest", "auto", "largest"]
    for kind in (NEW_DOCUMENT, quickstart.KNOWN):
        assert scores["smallest"][kind]["mean_tokens"] == counts[0]
        assert scores["largest"][kind]["mean_tokens"] == scores["before_largest"][kind]["mean_tokens"] == counts[-1]
        assert f"{scores['auto'][kind]['accuracy']:.1%}" in shown
    # the saved model answers elsewhere as the shipped one did here
    assert scores["before_auto"][NEW_DOCUMENT] == results["new_document_before"]["auto"]["all"]
    assert scores["before_auto"][quickstart.KNOWN] == results["shipped"]["auto"]["all"]
    assert scores["auto"][NEW_DOCUMENT]["mean_tokens"] > scores["auto"][quickstart.KNOWN]["mean_tokens"]
    for image in results["own_images"]:
        assert image["tokens"] in counts
        assert f"{image['tokens']} token" in shown and Path(image["image"]).name in shown

    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"image": Image.new("RGB", (64, 64), "white")}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        # what needs neither a download nor a model of the reader's own must run, one block after the other; the
        # block on preferences has a test in test_preference_training.py
        if "llava-hf/" not in block and "my_model" not in block:
            exec(block, scope)
    assert scope["output"].num_visual_tokens.tolist()[0] in counts
    assert scope["expanded"]["input_ids"][0].count(scope["processor"].image_token_id) == counts[-1]

    # nobody has to trust the saved code: with the package, the same answers
    entries = quickstart.write_pictures(render_blueprints(4, seed=3, test=True), tmp_path / "asked", seed=3)
    answered = [quickstart.answer_in_fresh_process(output, entries, [], trusted) for trusted in (False, True)]
    assert [found["package_importable"] for found in answered] == [True, False]
    assert answered[0]["model_class"].startswith("adaptive_llava.")
    assert answered[0]["answers"] == answered[1]["answers"]

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
    assert list(table) == ["scene", "collage", "document", "all"]
    assert table["scene"] == {"accuracy": 0.5, "mean_tokens": 2.5, "questions": 2}
    assert table["all"] == {"accuracy": 0.75, "mean_tokens": 6.25, "questions": 4}
    grouped = quickstart_report.score({"auto": rows}, lambda kind: "pages" if kind == "document" else "pictures")
    assert grouped["auto"]["pictures"] == {"accuracy": 2 / 3, "mean_tokens": 3, "questions": 3}
    assert list(grouped["auto"]) == ["pictures", "pages", "all"]


def test_examples_are_the_next_of_each_kind_whether_right_or_wrong():
    images = [("scene", i) for i in range(6)] + [("table", i) for i in range(2)] + [("chart", i) for i in range(5)]
    rows = [{"kind": kind, "image": f"{kind}{i}", "turn": turn} for kind, i in images for turn in (0, 1)]
    shown = quickstart_report.pick_examples(rows, ["chart", "scene", "table", "table", "table", "scene", "mosaic"])
    assert [row["image"] for row in shown] == ["chart0", "scene0", "table0", "table1", "scene1"]
    assert all(row["turn"] == 0 for row in shown)


def test_pictures_are_written_as_they_are_with_one_question_each(tmp_path):
    pictures = render_blueprints(40, seed=1)
    entries = quickstart.write_pictures(pictures, tmp_path, seed=2)
    for picture, entry in zip(pictures, entries, strict=True):
        with Image.open(entry["path"]) as written:
            assert np.array_equal(np.asarray(written), picture.pixels)
        assert entry["kind"] == NEW_DOCUMENT and entry["questions"][0] in picture.questions
    assert len({entry["questions"][0][0] for entry in entries}) > 20  # not always the same cells


@pytest.mark.slow
def test_the_router_learns_the_new_kind_and_keeps_the_others():
    model, processor = load_shipped()
    known, new = render(420, seed=1), render_blueprints(140, seed=1)
    _, rungs = read(model, processor, [*known, *new])
    rungs[len(known) :] = model.model.compressor.num_rungs - 1
    teach_router(model, processor, [*known, *new], rungs)
    unseen, unseen_new = render(140, seed=2, test=True), render_blueprints(40, seed=2, test=True)
    before, _ = load_shipped()
    assert (read(model, processor, unseen_new)[1] == model.model.compressor.num_rungs - 1).mean() > 0.9
    assert (read(model, processor, unseen)[1] == read(before, processor, unseen)[1]).mean() > 0.8
    assert model.config.router_training["images"] == 560


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
