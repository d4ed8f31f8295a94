"""The profile of a model: FLOPs from the config, cache bytes, and times beside what a matrix product takes."""

from __future__ import annotations

import json
import time

import pytest
import torch

from adaptive_llava import AdaptiveLlavaProcessor
from adaptive_llava.__main__ import main
from adaptive_llava.training.flop_counts import count_flops
from adaptive_llava.training.paired_timing import timed_pairs
from adaptive_llava.training.part_timing import PARTS, Prompt, time_parts
from adaptive_llava.training.published_figures import flops_beside_published, published_figures
from tests.conftest import PRESETS_HERE, tiny_model
from tests.test_convert import character_tokenizer


TILE = {"type": "anyres", "pinpoints": [[24, 48], [48, 24], [48, 48]]}


def run(output, *arguments):
    assert main(["profile", *arguments, "--output", str(output)]) == 0
    return json.loads(output.read_text())


def test_presets_of_a_shape_are_timed_at_every_count(tmp_path, capsys):
    presets = ["dfmr", "stf-mbtf", "llava-mini"]
    options = ["--shape", "tiny", "--pairs", "2", "--threads", "1", "--text-tokens", "9", "--cpu-seconds"]
    report = run(tmp_path / "deep" / "profile.json", *options, "--presets", *presets)
    assert list(report["systems"]) == presets and report["seconds"] == "of the CPU"
    assert report["command"].startswith("python -m adaptive_llava profile --shape tiny --pairs 2")
    assert [row["visual_tokens"] for row in report["systems"]["dfmr"]] == [16, 36, 144]
    for name, rows in report["systems"].items():
        for row in rows:
            flops, times = row["flops"], row["times"]
            assert flops["end_to_end"] == sum(flops[part] for part in PARTS) == sum(row["parts"].values())
            assert times["end_to_end"]["seconds"] > 0 and times["language_model"]["low"] > 0
            assert ("projector" in times) == (name != "stf-mbtf")
            assert ("modality_prefusion" in times) == (name == "llava-mini")
            for part, timed in times.items():
                assert ("measured_over_predicted" in timed) == (flops[part] > 0)
    printed = capsys.readouterr().out
    assert "pre-fusion" in printed and all(name in printed for name in presets)


@pytest.mark.parametrize("tiling, size, tokens", [(TILE, (48, 48), 5 * 9 + 2), ({"type": "mosaic", "n": 2}, None, 36)])
def test_a_saved_model_is_profiled_with_its_tiles(tiling, size, tokens, tmp_path):
    model = tiny_model("dfmr", tiling=tiling)
    model.save_pretrained(tmp_path / "model")
    AdaptiveLlavaProcessor.from_config(model.config, character_tokenizer()).save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--images", "2", "--text-tokens", "6", "--pairs", "1"]
    report = run(tmp_path / "profile.json", *options)
    (rows,) = report["systems"].values()
    row = next(row for row in rows if row["visual_tokens"] == tokens)
    counts = count_flops(model.config, tokens, 6, images=2, image_size=size)
    assert row["parts"] == counts.parts and row["flops"]["llm_visual_only"] == counts.visual_only
    assert row["kv_bytes_per_image"] == 2 * 2 * 16 * tokens * 4  # two layers, two heads of eight, float32
    assert row["times"]["vision_tower"]["seconds"] > 0


@pytest.mark.parametrize("preset", PRESETS_HERE)
def test_each_part_of_a_preset_can_be_called_alone(preset):
    model = tiny_model(preset)
    timed = time_parts(model, Prompt(text_tokens=7), 0, pairs=1, device="cpu")
    assert set(timed) >= {"vision_tower", "compressor", "language_model", "end_to_end"}
    assert all(part["seconds"] > 0 for part in timed.values())


def test_seconds_of_the_cpu_leave_out_what_the_process_waits():
    pairs = timed_pairs(lambda: time.sleep(0.05), lambda: None, pairs=1, warm_up=0, clock=time.process_time)
    assert pairs[0][0] < 0.04


def test_the_papers_figures_stand_beside_ours_at_7b(tmp_path, capsys):
    report = run(tmp_path / "flops.json", "--shape", "llava-1.5-7b", "--count-only", "--presets", "llava", "stf")
    assert [row["visual_tokens"] for row in report["systems"]["stf"]] == [144]
    assert "times" not in report["systems"]["llava"][0]
    stf = [row for row in report["published_flops"] if row["counts"] == "visual_only"]
    assert [(row["published_tflops"], round(row["tflops"], 3)) for row in stf] == [
        (7.6, 7.634),
        (3.8, 3.774),
        (1.9, 1.876),
    ]
    assert all(row["source"].startswith("https://arxiv.org/abs/2506.07138") for row in stf)
    assert "8.5837     8.55  1.004  llava at 576, end_to_end" in capsys.readouterr().out


def test_published_flops_are_met_within_a_tenth():
    rows = flops_beside_published(40)
    assert all(abs(row["ours_over_published"] - 1) < 0.1 for row in rows)
    figures = published_figures()
    used = {entry["source"] for part in ("flops", "cache") for entry in figures[part]}
    used |= {row["source"] for row in figures["accuracy"].values()}
    assert used == set(figures["sources"])


def test_options_that_do_not_go_together_are_refused(capsys):
    for arguments, message in (
        (["--images", "0"], "--images and --text-tokens must be at least 1"),
        (["--device", "cuda"], "this torch sees no GPU" if not torch.cuda.is_available() else "--cpu-seconds"),
    ):
        with pytest.raises(SystemExit):
            main(["profile", *arguments, "--cpu-seconds"])
        assert message in capsys.readouterr().err
    assert main(["profile", "--presets", "zip"]) == 2
    assert "`preset='zip'` is unknown" in capsys.readouterr().err
