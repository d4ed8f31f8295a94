"""The 7B reproduction: its commands are ones our parsers take, its steps fit together, and they run in order."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from adaptive_llava import PRESETS, AdaptiveLlavaConfig
from adaptive_llava.__main__ import COMMANDS
from adaptive_llava.training.published_figures import published_figures
from adaptive_llava.training.reproduce_7b import BASE, TABLE, comparison, main
from adaptive_llava.training.reproduction_steps import Step, describe_steps, read_steps, run_steps
from adaptive_llava.training.sft import parse_arguments
from tests.test_convert import llava  # noqa: F401, a fixture


METRICS = {name: row["metric"] for name, row in published_figures()["benchmarks"].items() if "metric" in row}


class Parsed(Exception):
    """What a command's own parser made of its arguments."""


def steps_of(work, *systems, base=BASE):
    return read_steps(TABLE, METRICS, base=base, work=Path(work), data=Path("data"), systems=systems or None)


def parsed(words, monkeypatch):
    """Options of a command, read by its own parser; nothing else of the command runs."""
    program, *rest = words
    if program == "accelerate":
        launch = launch_command_parser().parse_args(rest[1:])
        assert launch.module and Path(launch.config_file).is_file()
        importlib.import_module(launch.training_script)
        command = launch.training_script.rsplit(".", 1)[1]
        return parse_arguments(launch.training_script_args, command=command)
    assert words[:2] == ["python", "-m"]
    module, arguments = words[2], words[3:]
    if module == "adaptive_llava":
        module, arguments = COMMANDS[words[3]][0], words[4:]
    read = argparse.ArgumentParser.parse_args

    def stop(parser, given=None, namespace=None):
        raise Parsed(read(parser, given, namespace))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as caught:
            importlib.import_module(module).main(arguments)
    return caught.value.args[0]


def printed_commands(capsys, *presets):
    assert main(["--dry-run", "--data", "my data", "--presets", *presets]) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_printed_command_is_one_its_parser_takes(preset, monkeypatch, capsys):
    commands = printed_commands(capsys, preset)
    for words in commands:
        if "evaluate" not in words:
            assert parsed(words, monkeypatch)
    (convert,) = (parsed(words, monkeypatch) for words in commands if "convert" in words)
    assert convert.preset == preset
    routers = [parsed(words, monkeypatch) for words in commands if "train-router" in words]
    assert all("my data/router/docvqa" in options.positive for options in routers)
    trainings = [words for words in commands if words[0] == "accelerate"]
    assert bool(trainings) == (preset != "llava")
    for words in trainings:
        script, training, model = parsed(words, monkeypatch)
        assert script.dataset_name.endswith(".parquet") and training.resume_from_checkpoint == "last"
        assert model.model_name_or_path.startswith(f"out/reproduce-7b/{preset}/")
        # the batch of the paper: as many GPUs as its recipe says
        processes = int(words[words.index("--num_processes") + 1])
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
        assert f"Batch of {rows} =" in Path(words[words.index("--config") + 1]).read_text()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_evaluation_is_one_its_parser_takes(preset, monkeypatch, capsys):
    commands = [words for words in printed_commands(capsys, preset) if "evaluate" in words]
    assert len(commands) == len(METRICS)
    if "evaluate" not in COMMANDS:
        pytest.skip("the command `evaluate` is not in this version")
    counts = AdaptiveLlavaConfig.from_preset(preset).visual_token_counts
    for words in commands:
        options = parsed(words, monkeypatch)
        assert options.metric in METRICS.values() and options.data.startswith("my data/eval/")
        budgets = options.budgets.split(",")
        assert [int(budget) for budget in budgets if budget != "auto"] == list(counts)


def test_a_renamed_option_would_be_noticed(monkeypatch, capsys):
    words = next(words for words in printed_commands(capsys, "stf") if "convert" in words)
    words[words.index("--preset")] = "--system"
    with pytest.raises(SystemExit):
        parsed(words, monkeypatch)


def test_steps_fit_together(tmp_path):
    steps = steps_of(tmp_path)
    assert {step.name.split("/")[0] for step in steps} == {"captions", "instructions", *PRESETS}
    outputs = [path for step in steps for path in step.outputs]
    assert len(outputs) == len(set(outputs)) and all(step.outputs for step in steps)
    made: set[Path] = set()
    for step in steps:
        for path in step.inputs:
            own = path.is_relative_to(tmp_path)
            assert path in made if own else path.exists() or path.parts[0] == "data", f"{step.name}: {path}"
            assert any(str(path) in word or str(path.parent) in word for word in step.command), f"{step.name}: {path}"
        made.update(step.outputs)
    assert len(describe_steps(steps)) == 2 * len(steps)


def test_data_are_prepared_for_those_who_train_on_them(tmp_path):
    names = {system: [step.name for step in steps_of(tmp_path, system)][:2] for system in ("llava", "dfmr", "stf")}
    assert names == {
        "llava": ["llava/convert", "llava/evaluate/gqa"],
        "dfmr": ["instructions", "dfmr/convert"],
        "stf": ["captions", "instructions"],
    }


def test_nothing_starts_while_data_are_missing(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--work", str(tmp_path / "work"), "--data", str(tmp_path / "none"), "--presets", "llava-mini"])
    message = capsys.readouterr().err
    assert f"{tmp_path / 'none' / 'LLaVA-Tuning' / 'ocr_vqa'} (for instructions)" in message
    assert "gqa.parquet (for llava-mini/evaluate/gqa)" in message and not (tmp_path / "work").exists()


def test_what_is_there_is_skipped_and_what_is_not_is_really_run(llava, tmp_path, capfd):  # noqa: F811
    work = tmp_path / "the work"
    steps = {step.name: step for step in steps_of(work, "llava", "dfmr", base=str(llava))}
    chosen = [steps["llava/convert"], steps["dfmr/convert"]]
    chosen[0].outputs[0].parent.mkdir(parents=True)
    chosen[0].outputs[0].touch()
    run_steps(chosen)
    printed = capfd.readouterr().out
    assert "# llava/convert: done" in printed and "preset 'dfmr', torch.float32" in printed
    converted = AdaptiveLlavaConfig.from_pretrained(work / "dfmr" / "converted")
    assert converted.router["type"] == "feature_std"
    assert describe_steps(chosen)[2] == "# dfmr/convert: done"
    run_steps(chosen)
    assert "# dfmr/convert: done" in capfd.readouterr().out


def test_a_step_that_fails_or_makes_nothing_ends_the_run(tmp_path):
    there, made = tmp_path / "there", tmp_path / "made"
    there.touch()
    code = f"import pathlib; pathlib.Path({str(made)!r}).touch()"
    write = Step("write", ("python", "-c", code), (there,), (made,))
    fail = Step("fail", ("python", "-c", "raise SystemExit(3)"), (made,), (tmp_path / "never",))
    idle = Step("idle", ("python", "-c", ""), (made,), (tmp_path / "never",))
    with pytest.raises(SystemExit, match="The step 'fail' ended with status 3"):
        run_steps([write, fail])
    assert made.exists()
    with pytest.raises(ValueError, match=r"The step 'idle' has not made .*never, which is not there"):
        run_steps([write, idle])
    lost = Step("lost", ("python", "-c", ""), (tmp_path / "gone",), (tmp_path / "never",))
    with pytest.raises(ValueError, match=r"inputs are missing: .*gone \(for lost\)"):
        run_steps([lost])


def test_an_unknown_preset_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="`systems=.'zip'.` are not in steps_7b.yaml. Known: llava, avg-pool"):
        steps_of(tmp_path, "zip")


def test_the_table_has_the_papers_figures_and_ours_where_there_are_some(tmp_path):
    folder = tmp_path / "stf-mbtf" / "scores" / "gqa"
    folder.mkdir(parents=True)
    rows = [{"budget": "144", "figures": {"accuracy": 0.5}}, {"budget": "auto", "figures": {"accuracy": 0.25}}]
    (folder / "results.json").write_text(json.dumps({"budgets": rows}))
    lines = comparison(tmp_path)
    cells = {tuple(line.split(" | ")[:2]): line.split(" | ")[2:] for line in lines if line.startswith("| ")}
    assert cells["| stf-mbtf", "144"][:2] == ["78.1 / -", "61.9 / 50.0"]
    assert cells["| stf-mbtf", "auto"][:2] == ["- / -", "- / 25.0"]
    assert cells["| llava", "576"][6] == "1510.7 / -" and cells["| dfmr", "-"][0] == "- / -"
    assert any("visresearch/LLaVA-STF" in line for line in lines)


MINIMAL = {
    "gqa": (["cat"], ["cat"]),
    "vqa_accuracy": (["cat"], [["cat"] * 10]),
    "seed_bench": (["A"], ["A"]),
    "scienceqa": (["A"], [{"answer": 0, "choices": ["cat", "dog"]}]),
    "pope": (["Yes"], [{"category": "random", "answer": "yes"}]),
    "mme": (["Yes", "No"], [{"category": "count", "question_id": "1", "answer": text} for text in ("Yes", "No")]),
    "mmbench": (["A"], [{"index": 1, "answer": "A", "options": ["cat", "dog"]}]),
}


@pytest.mark.parametrize("benchmark", METRICS)
def test_a_published_figure_is_one_of_its_metric(benchmark):
    row = published_figures()["benchmarks"][benchmark]
    module = importlib.import_module(f"adaptive_llava.training.metrics.{row['metric']}.{row['metric']}")
    (metric,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "_compute")
    )
    predictions, references = MINIMAL[row["metric"]]
    found = metric()._compute(predictions=predictions, references=references)
    best = found[row["figure"]] * row["scale"]
    assert best == (200 if benchmark == "mme" else 100)


def test_the_launcher_is_found_beside_this_interpreter():
    assert Path(sys.executable).with_name("accelerate").is_file()
