"""accelerate's configs: each names settings that exist, and two processes of a real training end where one does.

DDP runs as a user would run it. FSDP2 too, but for one thing: accelerate shards on GPUs alone and takes DDP on CPU
without a word, so the processes tell it that they are GPU processes whose device is the CPU and whose backend is gloo.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.training.sft import RECIPES
from tests.conftest import leave_together, tiny_model
from tests.test_pretrain import captions
from tests.test_sft import message_dataset, save


ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
STEPS = 4
# command, recipe, preset of the tiny model
WAYS = {
    "sft": ("sft", "full", "dfmr"),
    "lora": ("sft", "lora", "dfmr"),
    "pretrain": ("pretrain", "llava_pretrain", "dfmr"),
    "joint_routing": ("joint_routing", "joint_routing", "dynamic-resampler"),
}
SCRIPT = """
import sys
from tests.test_distributed_configs import as_one_of_two
as_one_of_two(sys.argv[1])
"""


# ---- the files


def path_of(name: str) -> str:
    return str(RECIPES / "accelerate" / f"{name}.yaml")


def test_every_config_is_in_the_table_and_in_a_wheel():
    folder = RECIPES / "accelerate"
    assert {path.stem for path in folder.iterdir()} == set(CONFIGS)
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    patterns = settings["options.package_data"]["adaptive_llava.training"].split(",")
    shipped = {path for pattern in patterns for path in (ROOT / "training").glob(pattern.strip())}
    assert set(RECIPES.rglob("*.yaml")) <= shipped


@pytest.mark.compat
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_read_by_accelerate_and_names_options_of_its_launcher(name):
    config = load_config_from_file(path_of(name))  # refuses unknown keys
    assert config.distributed_type == DistributedType(CONFIGS[name]) and config.mixed_precision == "bf16"
    assert config.num_processes > 1 and not config.use_cpu
    options = {action.dest for action in launch_command_parser()._actions}
    inner = config.fsdp_config | config.deepspeed_config
    assert inner.keys() <= options and bool(inner) == (name != "ddp")
    text = Path(path_of(name)).read_text()
    assert (
        f"accelerate launch --config_file training/recipes/accelerate/{name}.yaml -m adaptive_llava.training" in text
    )
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1]) and "\n# Not run here" in text


# ---- the layers that are sharded one by one


@pytest.mark.compat
@pytest.mark.parametrize("text, layer", [("qwen2", "Qwen2DecoderLayer"), ("llama", "LlamaDecoderLayer")])
@pytest.mark.parametrize(
    "vision, layers", [("clip", {"CLIPEncoderLayer"}), ("siglip", {"SiglipEncoderLayer"})], ids=["clip", "siglip"]
)
def test_the_wrap_policy_finds_the_layers_of_language_model_and_tower(vision, layers, text, layer):
    model = tiny_model(vision=vision, text=text)
    for part in (model, model.model):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        plugin.set_auto_wrap_policy(part)  # refuses a class that is not there
        found = {kind.__name__ for kind in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}
        assert {*layers, layer} <= found == set(part._no_split_modules)


# ---- trainings


class Witness(TrainerCallback):
    """Notes which forward passes of this process had images, and the gradients of the first two steps."""

    def __init__(self):
        self.had_images: list[bool] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, model=None, **_):
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, model, arguments, inputs):
        self.had_images.append("pixel_values" in inputs)

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and state.global_step < 2:
                self.gradients[f"{state.global_step} {name}"] = whole(parameter.grad).clone()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def options_of(folder: Path, way: str, output: Path, rows_per_process: int) -> list[str]:
    """Command line of a short training; plain SGD, so that a difference in gradients is one in weights."""
    command, recipe, preset = WAYS[way]
    options = {
        "config": RECIPES / f"{recipe}.yaml", "model_name_or_path": folder / preset, "output_dir": output,
        "dataset_name": folder / ("captions.parquet" if command == "pretrain" else "conversations.parquet"),
        "max_steps": STEPS, "per_device_train_batch_size": rows_per_process, "gradient_accumulation_steps": 1,
        "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "logging_steps": 1,
        "dataloader_num_workers": 0, "save_strategy": "no",
    }  # fmt: skip
    options |= {"warmup_share": 0} if command == "pretrain" else {"warmup_steps": 0}
    options |= {"lora_dropout": 0} if recipe in ("lora", "joint_routing") else {}
    return [str(part) for option, value in options.items() for part in (f"--{option}", value)]


def train(way: str, arguments: list[str]):
    """The command's `main` with a witness; trainer, witness and losses."""
    witness = Witness()
    transformers.trainer.DEFAULT_CALLBACKS.append(witness)
    try:
        trainer = import_module(f"adaptive_llava.training.{WAYS[way][0]}").main(arguments)
    finally:
        transformers.trainer.DEFAULT_CALLBACKS.remove(witness)
    return trainer, witness, losses_of(trainer.state.log_history)


def losses_of(history: list[dict]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


def as_one_of_two(folder: str) -> None:
    """What each process of the FSDP2 run does."""
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    saving = ["--save_strategy", "steps", "--save_steps", "2"]
    for way in WAYS:
        output = Path(folder, f"two-{way}")
        trainer, witness, losses = train(way, [*options_of(Path(folder), way, output, 1), *saving])
        rank, parameters = trainer.accelerator.process_index, list(trainer.model.parameters())
        facts = {
            "pid": os.getpid(), "rank": rank, "processes": trainer.accelerator.num_processes, "losses": losses,
            "engine": str(trainer.accelerator.distributed_type), "had_images": witness.had_images,
            "sharded": sum(isinstance(parameter, DTensor) for parameter in parameters),
            "parameters": len(parameters),
            "held": sum(parameter.to_local().numel() for parameter in parameters),
            "units": [type(module).__name__ for module in trainer.model.modules() if hasattr(module, "unshard")],
            "numel": sum(parameter.numel() for parameter in parameters),
        }  # fmt: skip
        # one process sees text alone, the other an image
        batch = batch_of(trainer, 2 if rank == 0 else 0)
        with torch.no_grad():
            logits = trainer.model.eval()(**batch).logits
        save_file({"logits": logits.contiguous()}, output / f"logits-{rank}.safetensors")
        if rank == 0:
            save_file(witness.gradients, output / "gradients.safetensors")
        Path(output, f"{rank}.json").write_text(json.dumps(facts))
        trainer.accelerator.wait_for_everyone()
    for name, more in (("unbroken", []), ("resumed", ["--resume_from_checkpoint", "last"])):
        output = Path(folder, name)
        if more and rank == 0:
            shutil.copytree(Path(folder, "unbroken", "checkpoint-2"), output / "checkpoint-2")
        trainer.accelerator.wait_for_everyone()
        options = [*options_of(Path(folder), "sft", output, 1), "--optim", "adamw_torch", "--learning_rate", "1e-3"]
        trainer, witness, _ = train("sft", [*options, *saving, *more])
        Path(output, f"passes-{rank}.json").write_text(json.dumps(len(witness.had_images)))
    leave_together()


def batch_of(trainer, row: int) -> dict:
    rows = captions(4) if trainer.data_collator.plain_captions else message_dataset(4)
    batch = trainer.data_collator(list(rows.select([row])))
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in batch}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    save(folder / "dfmr", "dfmr", compressor_trained=False)
    save(folder / "dynamic-resampler", "dynamic-resampler", compressor_trained=True, prefusion_layers=1)
    message_dataset(16).to_parquet(str(folder / "conversations.parquet"))
    captions(16).to_parquet(str(folder / "captions.parquet"))
    return folder


@pytest.fixture(scope="module")
def one_process(folder):
    """Way -> losses, gradients and trainer of one process with the rows of two."""
    results = {}

    def run(way: str):
        if way not in results:
            arguments = [*options_of(folder, way, folder / f"one-{way}", 2), "--use_cpu", "true"]
            results[way] = train(way, arguments)
        return results[way]

    return run


def launch(name: str, *command: str) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path_of(name)]
    launcher += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_TORCH_DEVICE": "cpu"} if name == "fsdp2" else {}
    done = subprocess.run(
        [*launcher, *command], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def sharded(folder):
    script = folder / "two_processes.py"
    script.write_text(SCRIPT)
    launch("fsdp2", str(script), str(folder))
    return folder


def state_of(output: Path) -> dict:
    return json.loads((output / "trainer_state.json").read_text())


def facts_of(folder: Path, way: str) -> list[dict]:
    return [json.loads((folder / f"two-{way}" / f"{rank}.json").read_text()) for rank in range(2)]


def test_ddp_through_the_command_ends_where_one_process_does(folder, one_process):
    output = folder / "ddp"
    options = [*options_of(folder, "sft", output, 1), "--use_cpu", "true", "--save_strategy", "steps"]
    launch("ddp", "-m", "adaptive_llava.training.sft", *options, "--save_steps", str(STEPS))
    # two processes: each left its random state, and an epoch of 16 rows had 8 steps of 1 row
    last = output / f"checkpoint-{STEPS}"
    assert {path.name for path in last.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    state = state_of(output)
    assert state["global_step"] == STEPS and state["epoch"] == pytest.approx(STEPS / 8)
    losses = one_process("sft")[2]
    assert losses_of(state["log_history"]) == pytest.approx(losses, abs=1e-5)
    saved = load_file(output / "model.safetensors")
    for name, expected in load_file(folder / "one-sft" / "model.safetensors").items():
        assert (saved[name] - expected).abs().max() <= 1e-5, name


@pytest.mark.parametrize("way", WAYS)
def test_fsdp2_halves_what_each_process_holds(sharded, way):
    facts = facts_of(sharded, way)
    assert len({fact["pid"] for fact in facts} | {os.getpid()}) == 3
    assert [(fact["rank"], fact["processes"]) for fact in facts] == [(0, 2), (1, 2)]
    for fact in facts:
        assert fact["engine"] == "DistributedType.FSDP" and fact["sharded"] == fact["parameters"]
        assert 0.48 <= fact["held"] / fact["numel"] <= 0.52
        layers = [unit for unit in fact["units"] if unit.endswith("Layer")]
        decoder_layers = 4 if way == "joint_routing" else 2  # two of pre-fusion: PEFT trains a copy
        assert layers == ["FSDPCLIPEncoderLayer"] * 3 + ["FSDPQwen2DecoderLayer"] * decoder_layers
    assert sum(fact["held"] for fact in facts) == facts[0]["numel"]


@pytest.mark.parametrize("way", WAYS)
def test_fsdp2_ends_where_one_process_does_with_text_alone_on_either(sharded, way, one_process):
    facts = facts_of(sharded, way)
    if way != "pretrain":
        steps = set(zip(*(fact["had_images"][:STEPS] for fact in facts), strict=True))
        assert len(steps) > 1 and steps & {(True, False), (False, True)}
    _, witness, losses = one_process(way)
    for fact in facts:
        assert fact["losses"] == pytest.approx(losses, rel=1e-5)
    found = load_file(sharded / f"two-{way}" / "gradients.safetensors")
    assert found.keys() == witness.gradients.keys()
    for name, expected in witness.gradients.items():
        assert (found[name] - expected).abs().max() <= 1e-5 * max(1, expected.abs().max()), name


@pytest.mark.parametrize("way", ["sft", "pretrain"])
def test_what_fsdp2_saved_loads_and_answers_as_it_did_in_training(sharded, way, one_process):
    output = sharded / f"two-{way}"
    model, info = AdaptiveLlavaForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    trainer = one_process(way)[0]
    for rank, row in enumerate((2, 0)):
        batch = batch_of(trainer, row)
        with torch.no_grad():
            logits = model.eval()(**batch).logits
        expected = load_file(output / f"logits-{rank}.safetensors")["logits"]
        assert (logits - expected).abs().max() <= 1e-5


def test_a_sharded_training_goes_on_from_its_checkpoint(sharded):
    resumed, unbroken = (load_file(sharded / name / "model.safetensors") for name in ("resumed", "unbroken"))
    for name, steps in (("unbroken", STEPS), ("resumed", STEPS - 2)):
        assert state_of(sharded / name)["global_step"] == STEPS
        assert [json.loads((sharded / name / f"passes-{rank}.json").read_text()) for rank in range(2)] == [steps] * 2
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], weight) for name, weight in unbroken.items())
