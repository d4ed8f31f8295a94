"""Recipes: each is read by its command's own parser, says what its source says, and trains a tiny model."""

import math
import re
from importlib import import_module

import pytest
import torch
import transformers
from datasets import concatenate_datasets
from packaging.version import Version

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.training.joint_routing import JointRoutingConfig
from adaptive_llava.training.sft import RECIPES, parse_arguments
from tests.conftest import tiny_model
from tests.test_pretrain import captions
from tests.test_sft import message_dataset, save


NEW_ENOUGH = Version(transformers.__version__) >= Version("5.18")
# command, preset of the tiny model, learning rate, epochs, rows per step on the GPUs named
PAPERS = {
    "llava_pretrain": ("pretrain", "dfmr", 1e-3, 1, 256),
    "llava_finetune": ("sft", "dfmr", 2e-5, 1, 128),
    "llava_lora": ("sft", "dfmr", 2e-4, 1, 128),
    "llava_stf_pretrain": ("pretrain", "stf-mbtf", 1e-3, 1, 256),
    "llava_stf_finetune": ("sft", "stf-mbtf", 2e-5, 1, 128),
    "llava_mini_stage1": ("pretrain", "llava", 1e-3, 1, 256),
    "llava_mini_stage2": ("sft", "llava-mini", 1e-4, 2, 16),
    "dynamic_resampler_pretrain": ("pretrain", "dynamic-resampler", 1e-3, 1, 256),
    "dynamic_resampler_finetune": ("sft", "dynamic-resampler", 2e-5, 1, 128),
}
OTHERS = {
    "full": ("sft", "dfmr"),
    "lora": ("sft", "dfmr"),
    "documents_qlora": ("sft", "dfmr"),
    "documents_small": ("sft", "dfmr"),
    "joint_routing": ("joint_routing", "dynamic-resampler"),
}
COMMANDS = {name: row[:2] for name, row in PAPERS.items()} | OTHERS


def text_of(name):
    return (RECIPES / f"{name}.yaml").read_text()


def parse(name, folder):
    config = {"config_class": JointRoutingConfig} if COMMANDS[name][0] == "joint_routing" else {}
    return parse_arguments(["--config", f"{name}.yaml", "--output_dir", str(folder)], **config)


def test_every_recipe_is_in_a_table():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(COMMANDS)


@pytest.mark.compat
@pytest.mark.parametrize("name", COMMANDS)
def test_a_recipe_names_the_command_that_reads_it(name, tmp_path):
    parse(name, tmp_path)
    assert f"python -m adaptive_llava.training.{COMMANDS[name][0]} --config training/recipes/{name}.yaml" in text_of(
        name
    )


@pytest.mark.compat
@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_s_figures_are_what_the_trainer_gets(name, tmp_path):
    _, _, rate, epochs, batch = PAPERS[name]
    script, training, model = parse(name, tmp_path)
    assert (training.learning_rate, training.num_train_epochs) == (rate, epochs)
    assert training.lr_scheduler_type == "cosine" and training.optim == "adamw_torch" and training.weight_decay == 0
    assert training.get_warmup_steps(1000) == 30
    assert training.gradient_checkpointing and training.max_length is None and script.freeze_vision_tower
    gpus = int(re.search(r"x (\d+) GPUs", text_of(name))[1])
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * gpus == batch
    assert f"Batch of {batch} =" in text_of(name)
    assert training.assistant_only_loss == (COMMANDS[name][0] == "sft")
    assert model.use_peft == (name == "llava_lora")
    if model.use_peft:
        assert (model.lora_r, model.lora_alpha, script.learning_rates) == (128, 256, {"projector": 2e-5})
    assert training.max_grad_norm == (0.5 if name == "llava_mini_stage2" else 1.0)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Saved tiny models by preset, and rows to train on, with a row of text alone among the conversations."""
    folder = tmp_path_factory.mktemp("recipes")
    captions(8).to_parquet(str(folder / "captions.parquet"))
    concatenate_datasets([message_dataset(8)] * 2).to_parquet(str(folder / "instructions.parquet"))
    return folder


def base_of(places, preset):
    folder = places / preset
    return str(folder) if folder.exists() else save(folder, preset, compressor_trained=preset == "dynamic-resampler")


@pytest.mark.compat
@pytest.mark.parametrize("name", COMMANDS)
def test_a_recipe_trains_two_steps(name, places, tmp_path):
    command, preset = COMMANDS[name]
    data = places / ("captions.parquet" if command == "pretrain" else "instructions.parquet")
    overrides = {
        "config": f"{name}.yaml", "model_name_or_path": base_of(places, preset), "dataset_name": data,
        "output_dir": tmp_path / "out", "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": "true",
        "gradient_accumulation_steps": 1, "dataloader_num_workers": 0, "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    if name == "documents_qlora":
        overrides |= {"load_in_4bit": "false", "dtype": "float32"}  # as its comment says for a CPU
    if not NEW_ENOUGH and "assistant_only_loss: true" in text_of(name):
        overrides["assistant_only_loss"] = "false"  # refused before transformers 5.18
    main = import_module(f"adaptive_llava.training.{command}").main
    trainer = main([str(part) for option, value in overrides.items() for part in (f"--{option}", value)])
    assert trainer.state.global_step == 2
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2 and all(0 < float(loss) < math.inf for loss in losses)
    if command == "pretrain":
        again = AdaptiveLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
        before = AdaptiveLlavaForConditionalGeneration.from_pretrained(base_of(places, preset))
        assert again.config.compressor_trained and torch.equal(again.lm_head.weight, before.lm_head.weight)


@pytest.mark.compat
def test_the_projector_of_llava_mini_s_first_stage_fits_the_second():
    first, second = tiny_model("llava").model, tiny_model("llava-mini", seed=1).model
    second.multi_modal_projector.load_state_dict(first.multi_modal_projector.state_dict())
    assert torch.equal(second.multi_modal_projector.linear_1.weight, first.multi_modal_projector.linear_1.weight)


def test_a_warm_up_is_a_share_or_a_number_of_steps(tmp_path):
    start = ["--output_dir", str(tmp_path), "--warmup_share"]
    assert parse_arguments([*start, "0.1"])[1].get_warmup_steps(50) == 5
    for rest in (["1.5"], ["0.1", "--warmup_steps", "3"]):
        with pytest.raises(
            ValueError, match="`warmup_share=.*pass a share of all steps below 1, or a number of steps"
        ):
            parse_arguments([*start, *rest])
