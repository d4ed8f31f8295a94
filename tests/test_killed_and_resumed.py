"""Runs that are killed, or run out of disk or of finite numbers: what is left is whole, and they end as if unbroken.

Every run is a process of its own, and SIGKILL is real: from outside after a random step, or from inside before a random
one of its changes to the disk. Processes are forked from one that has imported the trainers and done nothing else.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.training.finite_training import all_finite
from adaptive_llava.training.resume_point import UNFINISHED, checkpoint_fault, checkpoints, newest_whole, resume_point
from adaptive_llava.training.router_inputs import RouterInputs
from adaptive_llava.training.whole_folder import move_into, replace_folder, whole_folder
from tests.conftest import TINY_ROUTERS
from tests.test_pretrain import captions
from tests.test_sft import FULL, LORA, message_dataset, save
from tests.test_train_router import save_model


pytestmark = [pytest.mark.compat, pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")]

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 7, 2
JOINT = str(ROOT / "training" / "recipes" / "joint_routing.yaml")
# Trainer, recipe, and what makes a run hard to go on with: random counts, dropout, thresholds that follow the learning
# rate, groups of the optimizer, rows accumulated across the end of an epoch.
RUNS = {
    "lora": ("sft", LORA, ["--threshold_schedule", "learning_rate", "--projector_learning_rate", "1e-3"]),
    "random counts": ("sft", FULL, ["--gradient_accumulation_steps", "2"]),
    "pretrain": ("pretrain", FULL, []),
    "joint": ("joint_routing", JOINT, ["--router_learning_rate", "1e-3"]),
}
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(
    [f"adaptive_llava.training.{name}" for name in ("sft", "pretrain", "joint_routing", "train_router")]
)


def work(module, arguments, log, folder, kill_at):
    """In the process: run a command; SIGKILL before change number `kill_at` to `folder`, whose changes are counted."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    changes = [0]

    def count(event, details):
        if event not in CHANGES or not str(details[0]).startswith(str(folder)):
            return
        if event == "open" and not (details[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        changes[0] += 1
        if changes[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    sys.modules[f"adaptive_llava.training.{module}"].main(arguments)
    print(f"changes: {changes[0]}")


class Run:
    """A process that runs a command, and its log."""

    def __init__(self, module, arguments, folder, *, kill_at=None):
        self.log = Path(f"{folder}.log")
        self.log.write_text("")
        self.process = _FORK.Process(target=work, args=(module, arguments, self.log, folder, kill_at))
        self.process.start()

    def wait_until(self, condition):
        end = time.monotonic() + 120
        while self.process.is_alive() and not condition():
            assert time.monotonic() < end, self.said
            time.sleep(0.002)

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.end() == -signal.SIGKILL

    def end(self):
        self.process.join(120)
        return self.process.exitcode

    @property
    def said(self):
        return self.log.read_text(errors="replace")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Models and data by name of a run."""
    root = tmp_path_factory.mktemp("inputs")
    message_dataset(12).to_parquet(str(root / "rows.parquet"))
    captions(12).to_parquet(str(root / "captions.parquet"))
    rows, captioned = str(root / "rows.parquet"), str(root / "captions.parquet")
    warm = {"router": TINY_ROUTERS["classifier"], "compressor_trained": True}
    return {
        "lora": (save(root / "dfmr"), rows),
        "random counts": (save(root / "random", router={"type": "random"}), rows),
        "pretrain": (save(root / "resampler", "stf-mbtf"), captioned),
        "joint": (save(root / "joint", **warm), rows),
    }


def command(name, inputs, output, *more):
    module, recipe, options = RUNS[name]
    model, data = inputs[name]
    settings = {
        "config": recipe, "model_name_or_path": model, "dataset_name": data, "output_dir": output, "use_cpu": "true",
        "max_steps": STEPS, "save_steps": EVERY, "save_total_limit": 2, "logging_steps": 1, "warmup_steps": 2,
        "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1, "disable_tqdm": "true", "resume_from_checkpoint": "last",
    }  # fmt: skip
    arguments = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    return module, [*arguments, *options, *map(str, more)]


def final_weights(folder):
    return load_file(next(path for path in folder.iterdir() if path.suffix == ".safetensors"))


def loadable(folder):
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def assert_nothing_is_half_written(output):
    for path in checkpoints(output):
        assert checkpoint_fault(path) is None, path
        torch.load(path / "optimizer.pt", weights_only=True)
        assert final_weights(path)
    if loadable(output):
        assert final_weights(output)
    for path in output.glob("*.json"):
        json.loads(path.read_text())


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_killed_twice_ends_bit_for_bit_as_an_unbroken_one(name, inputs, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    unbroken = Run(*command(name, inputs, tmp_path / "unbroken"), tmp_path / "unbroken")
    assert unbroken.end() == 0, unbroken.said[-3000:]
    changes = int(unbroken.said.rsplit("changes: ", 1)[1])
    saves = -(-STEPS // EVERY) + 1
    step, change = chance.randrange(1, STEPS), chance.randrange(1, changes // saves)
    print(f"seed {seed}: killed after step {step}, and before change {change} to the disk of the resumed run")

    output = tmp_path / "killed"
    first = Run(*command(name, inputs, output), output)
    first.wait_until(lambda: first.said.count("'loss'") >= step)
    first.kill()
    assert_nothing_is_half_written(output)
    assert not loadable(output)
    newest = newest_whole(output)
    second = Run(*command(name, inputs, output), output, kill_at=change)
    assert second.end() == -signal.SIGKILL, second.said[-3000:]
    assert newest is None or f"Goes on from {newest}" in second.said
    assert_nothing_is_half_written(output)
    third = Run(*command(name, inputs, output), output)
    assert third.end() == 0, third.said[-3000:]

    expected, weights = final_weights(tmp_path / "unbroken"), final_weights(output)
    assert expected.keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in expected.items())
    logs = [
        [(log["step"], log["loss"]) for log in json.loads((path / "trainer_state.json").read_text())["log_history"]
         if "loss" in log]
        for path in (tmp_path / "unbroken", output)
    ]  # fmt: skip
    assert logs[0] == logs[1] and len(logs[0]) == STEPS
    assert_nothing_is_half_written(output)
    assert [path.name for path in checkpoints(output)] == [path.name for path in checkpoints(tmp_path / "unbroken")]
    assert not (output / UNFINISHED).exists()
