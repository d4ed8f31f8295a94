"""The command: results, files that are whole or absent, interruptions, several processes, errors, the plot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adaptive_llava import AdaptiveLlavaConfig
from adaptive_llava.__main__ import main as command_line
from adaptive_llava.training import evaluate
from adaptive_llava.training.evaluation_results import PromptFlops
from adaptive_llava.training.flop_counts import count_flops, decoder_flops, kv_cache_bytes
from adaptive_llava.training.metric_table import METRICS
from adaptive_llava.training.study.families import render
from adaptive_llava.training.study.ship import SHIPPED
from tests.conftest import tiny_model
from tests.test_evaluation import write_pictures


ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
BUDGETS = ["1", "9", "36", "auto"]
COUNT = 30


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    return write_pictures(render(COUNT, seed=5, test=True), tmp_path_factory.mktemp("rendered"))


def arguments(rendered, output, **options):
    given = {"model": SHIPPED, "data": rendered, "metric": "gqa", "output": output, "budgets": ",".join(BUDGETS)}
    given |= {"max-new-tokens": 4, "batch-size": 2} | options
    return [str(part) for name, value in given.items() if value is not None for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def finished(rendered, tmp_path_factory):
    """Output folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("out") / "run"
    assert evaluate.main(arguments(rendered, output, plot=output.with_suffix(".png"))) == 0
    return output


def rows_of(output):
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def unfinished(output):
    return output.with_name(f".{output.name}.unfinished")


def test_every_question_is_in_the_file_once_with_its_answers(finished, rendered):
    rows = rows_of(finished)
    asked = [json.loads(line) for line in (rendered / "metadata.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(number) for number in range(COUNT)]
    assert [row["question"] for row in rows] == [row["question"] for row in asked]
    for row in rows:
        assert list(row["answered"]) == BUDGETS and row["image_sizes"] == [[48, 48]]
        for name, said in row["answered"].items():
            assert name == "auto" or said["visual_tokens"] == [int(name)]
            assert said["score"] == (said["prediction"] == row["answers"][0])
    assert np.mean([row["answered"]["36"]["score"] for row in rows]) > 0.5


def test_results_follow_from_the_answers(finished):
    rows, results = rows_of(finished), json.loads((finished / "results.json").read_text())
    config = AdaptiveLlavaConfig.from_pretrained(SHIPPED)
    assert results["model"] == "checkpoint" and results["token_counts"] == [1, 4, 9, 36]
    assert results["questions"] == results["images"] == COUNT and results["largest"] == "36"
    text = [row["text_tokens"] for row in rows]
    assert results["text_tokens"] == pytest.approx(np.mean(text), abs=1e-3)
    assert results["vision_tower_ms_per_image"] > 0 and results["dtype"] == "float32"
    assert [row["budget"] for row in results["budgets"]] == BUDGETS
    for row in results["budgets"]:
        said = [each["answered"][row["budget"]] for each in rows]
        tokens = [each["visual_tokens"][0] for each in said]
        value, (low, high) = row["score"]["value"], row["score"]["interval"]
        assert value == pytest.approx(np.mean([each["score"] for each in said]), abs=1e-4) and low <= value <= high
        assert row["figures"]["accuracy"] == pytest.approx(value, abs=1e-4)
        assert row["mean_tokens"] == pytest.approx(np.mean(tokens), abs=1e-3)
        assert row["histogram"] == {str(count): tokens.count(count) for count in sorted(set(tokens))}
        pairs = list(zip(tokens, text, strict=True))
        counts = [count_flops(config, *pair) for pair in pairs]
        assert row["prefill_flops"]["visual_only"] == round(np.mean([each.visual_only for each in counts]))
        assert row["prefill_flops"]["end_to_end"] == round(np.mean([each.end_to_end for each in counts]))
        cached = [kv_cache_bytes(config.text_config, sum(pair), bytes_per_value=4) for pair in pairs]
        assert row["kv_cache_bytes"] == round(np.mean(cached)) and row["ms_per_image"] > 0
    against = {row["budget"]: row["against_largest"] for row in results["budgets"]}
    assert against["36"] == {"value": 0, "interval": [0, 0]} and against["1"]["value"] < 0


def test_the_curve_is_a_picture_of_one_or_several_files(finished, rendered, tmp_path, capsys):
    assert Image.open(finished.with_suffix(".png")).size == (770, 462)
    other = json.loads((finished / "results.json").read_text()) | {"model": "other"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    files = [str(finished / "results.json"), str(tmp_path / "other.json")]
    assert command_line(["evaluate", "--plot", str(tmp_path / "two.png"), *files]) == 0
    two = np.asarray(Image.open(tmp_path / "two.png").convert("RGB"), dtype=int)
    one = np.asarray(Image.open(finished.with_suffix(".png")).convert("RGB"), dtype=int)
    assert (two != one).any()
    (tmp_path / "other.json").write_text(json.dumps(other | {"metric": "anls"}))
    assert command_line(["evaluate", "--plot", str(tmp_path / "none.png"), *files]) == 2
    assert "have the metrics anls, gqa. Draw those of one metric together" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"question": 1}')
    assert command_line(["evaluate", "--plot", str(tmp_path / "none.png"), *files]) == 2
    assert "A file to draw holds question: pass `results.json` of `evaluate`" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


def kill_in_the_midst(rendered, output):
    """Start a run and kill it with SIGKILL when some batches are answered, but not all."""
    command = [sys.executable, "-m", "adaptive_llava", "evaluate", *arguments(rendered, output)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while len(list(unfinished(output).glob("0*.json"))) < 3:
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    process.stderr.close()


def test_a_killed_run_goes_on_where_it_was(finished, rendered, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    kill_in_the_midst(rendered, output)
    answered = len(list(unfinished(output).glob("0*.json")))
    assert 3 <= answered < COUNT // 2 and not output.exists()
    (unfinished(output) / "00000014.partial").write_text('{"rows": [{"id"')  # the file it was about to write
    assert command_line(["evaluate", *arguments(rendered, output, **{"batch-size": 3})]) == 2
    assert "belongs to an interrupted run that differs in batch_size: batch_size=2" in capsys.readouterr().err

    asked = []
    answer_batch = evaluate.answer_batch

    def counted(*parts, **options):
        asked.append([sample.id for sample in parts[2]])
        return answer_batch(*parts, **options)

    monkeypatch.setattr(evaluate, "answer_batch", counted)
    assert evaluate.main(arguments(rendered, output)) == 0
    assert len(asked) == COUNT // 2 - answered
    assert (output / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()
    assert not unfinished(output).exists() and {path.name for path in output.iterdir()} == {
        "results.json",
        "samples.jsonl",
    }
    assert command_line(["evaluate", *arguments(rendered, output)]) == 2
    assert "is already there, and nothing is overwritten" in capsys.readouterr().err


LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node 2",
    "accelerate": "accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0",
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_take_up_what_one_began_and_say_the_same(finished, rendered, tmp_path, launcher):
    output = tmp_path / "run"
    kill_in_the_midst(rendered, output)
    launch = ["-m", *LAUNCHERS[launcher].split(), "-m", "adaptive_llava"]
    command = [sys.executable, *launch, "evaluate", *arguments(rendered, output)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written: ") == 1
    assert (output / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()
    alone, together = (json.loads((folder / "results.json").read_text()) for folder in (finished, output))
    timed = ("ms_per_image", "vision_tower_ms_per_image")
    for results in (alone, together):
        for row in (results, *results["budgets"]):
            for name in timed:
                row.pop(name, None)
    assert alone == together and not unfinished(output).exists()


UPLOAD = """
from datasets import load_dataset
load_dataset("imagefolder", data_dir={folder!r}, split="train").push_to_hub("ada/pictures", split="validation")
"""


def test_a_model_and_a_dataset_of_the_hub(finished, rendered, hub, tmp_path):
    with hub.client(tmp_path / "user") as user:
        assert user.command("push", SHIPPED, "ada/small").status == 0
        uploaded = user.code(UPLOAD.format(folder=str(rendered)))
        assert uploaded.status == 0, uploaded.err[-2000:]
        asked = {"model": "ada/small", "data": "ada/pictures", "split": "validation"}
        done = user.command("evaluate", *arguments(rendered, tmp_path / "run", **asked))
    assert done.status == 0, done.err[-2000:]
    predicted = [[answer["prediction"] for answer in row["answered"].values()] for row in rows_of(tmp_path / "run")]
    expected = [[answer["prediction"] for answer in row["answered"].values()] for row in rows_of(finished)]
    assert sorted(predicted) == sorted(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "bleu"}, "`metric='bleu'` is unknown. Known: anls, "),
        ({"metric": "vqa_accuracy"}, "'vqa_accuracy' cannot judge question 0: `references` holds 1 answers"),
        ({"metric": None}, "`--model` without --metric: pass what to ask"),
        ({"budgets": "0,4"}, "`--budgets 0,4`: this model spends at least 1 tokens (counts: [1, 4, 9, 36])"),
        ({"budgets": "many"}, "must be whole numbers of tokens and 'auto'"),
        ({"image-field": "photo"}, "has no field 'photo', but: file_name, question, answer, category. Name it with"),
        ({"question-field": "ask"}, "has no field 'ask'"),
        ({"answer-field": "gold"}, "has no field 'gold'"),
        ({"prompt": "Say it"}, "`prompt='Say it'` lacks {question}"),
        ({"max-new-tokens": 0}, "`--max-new-tokens 0` must be at least 1"),
        ({"batch-size": 0}, "`batch_size=0` must be at least 1 question"),
        ({"limit": 0}, "`limit=0` must be at least 1 question"),
        ({"model": None}, "Pass `--model` to ask one, or `--plot PICTURE` and results files"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(rendered, tmp_path, capsys, options, message):
    assert command_line(["evaluate", *arguments(rendered, tmp_path / "out", **options)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_models_of_another_kind_are_refused(rendered, tmp_path, capsys):
    tiny_model("llava").config.text_config.save_pretrained(tmp_path / "text")
    assert command_line(["evaluate", *arguments(rendered, tmp_path / "out", model=tmp_path / "text")]) == 2
    assert "is of type 'qwen2'. Give it a compressor and a router first" in capsys.readouterr().err


def test_flops_of_images_at_several_counts_lie_between_those_at_one():
    config = AdaptiveLlavaConfig.from_pretrained(SHIPPED)
    low, mixed, high = (PromptFlops(config)(counts, 7) for counts in ((1, 1), (1, 36), (36, 36)))
    assert low[0] < mixed[0] < high[0] and low[1] < mixed[1] < high[1]
    assert mixed[0] == decoder_flops(config.text_config, 37)
    alone = [count_flops(config, tokens, 7) for tokens in (1, 36)]
    both = count_flops(config, 36, 7, images=2)
    # the language model reads both images in one prompt
    prefill = decoder_flops(config.text_config, 44) + both.head
    assert mixed[1] == sum(each.encoding for each in alone) + prefill
    assert high == (both.visual_only, both.end_to_end) and PromptFlops(config)((), 7)[0] == 0


def test_pre_fusion_reads_the_patches_of_all_images():
    config = tiny_model("llava-mini").config
    tokens = config.visual_token_counts[0]
    assert PromptFlops(config)((tokens, tokens), 7)[1] == count_flops(config, tokens, 7, images=2).end_to_end


def test_images_whose_flops_are_unknown_are_told_so():
    config = tiny_model("dfmr", tiling={"type": "anyres"}).config
    with pytest.raises(ValueError, match="unlike tiles: their FLOPs are not known"):
        PromptFlops(config)((9, 18), 7, ((24, 24), (24, 48)))


def test_every_metric_can_be_asked_for():
    told = evaluate._parser().format_help().replace("\n", " ")
    assert all(name in told for name in METRICS)
