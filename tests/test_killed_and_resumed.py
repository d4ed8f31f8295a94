"""Runs that are killed, or run out of disk or of finite numbers: what is left is whole, and they end as if unbroken.

Every run is a process of its own, and SIGKILL is real: from outside after a random step, or from inside before a
random one of its changes to the disk. Processes are forked from one that has imported the trainers and done nothing.
`ADAPTIVE_LLAVA_KILL_SEED` repeats the choices of a run of the tests, which print theirs.
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

from adaptive_llava.training.resume_point import UNFINISHED, checkpoint_fault, checkpoints, newest_whole, resume_point
from adaptive_llava.training.whole_folder import move_into, replace_folder
from tests.conftest import TINY_ROUTERS
from tests.test_pretrain import captions
from tests.test_sft import FULL, LORA, message_dataset, save
from tests.test_train_router import save_model


pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")

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
    [f"adaptive_llava.training.{name}" for name in ("sft", "pretrain", "joint_routing", "train_router")] + [__name__]
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

    def __init__(self, command, folder, *, kill_at=None):
        module, arguments = command
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


@pytest.mark.parametrize("name", [pytest.param("lora", marks=pytest.mark.compat), *list(RUNS)[1:]])
def test_a_run_that_is_killed_twice_ends_bit_for_bit_as_an_unbroken_one(name, inputs, tmp_path):
    seed = int(os.environ.get("ADAPTIVE_LLAVA_KILL_SEED") or random.SystemRandom().randrange(10**6))
    chance = random.Random(seed)
    unbroken = Run(command(name, inputs, tmp_path / "unbroken"), tmp_path / "unbroken")
    assert unbroken.end() == 0, unbroken.said[-3000:]
    changes = int(unbroken.said.rsplit("changes: ", 1)[1])
    saves = -(-STEPS // EVERY) + 1
    step, change = chance.randrange(1, STEPS), chance.randrange(1, changes // saves)
    print(f"seed {seed}: killed after step {step}, and before change {change} to the disk of the resumed run")

    output = tmp_path / "killed"
    first = Run(command(name, inputs, output), output)
    first.wait_until(lambda: first.said.count("'loss'") >= step)
    first.kill()
    assert_nothing_is_half_written(output)
    assert not loadable(output)
    newest = newest_whole(output)
    second = Run(command(name, inputs, output), output, kill_at=change)
    assert second.end() == -signal.SIGKILL, second.said[-3000:]
    assert newest is None or f"Goes on from {newest}" in second.said
    assert_nothing_is_half_written(output)
    third = Run(command(name, inputs, output), output)
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


# ---- what is on the disk


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """The folder of a run with checkpoints 4, 6 and 7."""
    output = tmp_path_factory.mktemp("finished") / "out"
    run = Run(command("lora", inputs, output, "--save_total_limit", "3"), output)
    assert run.end() == 0, run.said[-3000:]
    assert [path.name for path in checkpoints(output)] == ["checkpoint-4", "checkpoint-6", "checkpoint-7"]
    return output


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_checkpoint_cut_short_by_another_program_is_passed_over_by_name(name, share, finished, tmp_path, caplog):
    output = shutil.copytree(finished, tmp_path / "out")
    path = output / "checkpoint-7" / name
    os.truncate(path, int(share * path.stat().st_size))
    (output / UNFINISHED / "checkpoint-9").mkdir(parents=True)
    assert resume_point(output, "last") == str(output / "checkpoint-6")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all(f"goes on from {output / 'checkpoint-6'}" in line for line in said)
    assert f"{output / 'checkpoint-7'} is not whole" in said[0] and name in said[0]
    assert "checkpoint-9 is not whole and is passed over: it was being written when the run ended" in said[1]
    with pytest.raises(ValueError, match=rf"checkpoint-7.* is no whole checkpoint: {name}.*Pass 'last'"):
        resume_point(output, str(output / "checkpoint-7"))


@pytest.mark.compat
def test_a_checkpoint_without_weights_optimizer_or_folder_is_none(finished, tmp_path):
    output = shutil.copytree(finished, tmp_path / "out")
    (output / "checkpoint-7" / "optimizer.pt").unlink()
    assert "save_only_model" in checkpoint_fault(output / "checkpoint-7")
    (output / "checkpoint-6" / "adapter_model.safetensors").unlink()
    assert checkpoint_fault(output / "checkpoint-6") == "it has no weights"
    assert newest_whole(output) == output / "checkpoint-4"
    assert checkpoint_fault(output / "checkpoint-5") == "there is no such folder"


def test_a_shard_that_the_index_names_must_be_there(finished, tmp_path):
    folder = shutil.copytree(finished / "checkpoint-7", tmp_path / "checkpoint-7")
    (folder / "adapter_model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert checkpoint_fault(folder).startswith("model-00002-of-00002.safetensors, which model.safetensors.index.json")
    shutil.copy(folder / shards["a"], folder / shards["b"])
    assert checkpoint_fault(folder) is None


def test_a_new_run_in_the_folder_of_another_is_refused_and_one_without_checkpoints_starts(finished, tmp_path):
    with pytest.raises(ValueError, match="holds checkpoint-7 of an earlier run. Pass --resume_from_checkpoint last"):
        resume_point(finished, None)
    assert resume_point(tmp_path, None) is None
    assert resume_point(tmp_path / "absent", "last") is None
    assert resume_point(finished, str(finished / "checkpoint-4")) == str(finished / "checkpoint-4")


def test_the_best_checkpoint_is_kept_under_its_own_name_and_loaded_at_the_end(inputs, tmp_path):
    output = tmp_path / "out"
    more = ["--eval_strategy", "steps", "--eval_steps", 2, "--eval_dataset_name", inputs["lora"][1], "--max_steps", 4]
    more += ["--dataset_test_split", "train", "--load_best_model_at_end", "true", "--save_total_limit", 1]
    more += ["--metric_for_best_model", "num_tokens", "--greater_is_better", "false"]  # which only grows
    run = Run(command("lora", inputs, output, *more), output)
    assert run.end() == 0, run.said[-3000:]
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(output / "checkpoint-2")
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2"]  # the trainer removes the last at its end
    saved = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(output / "checkpoint-2")
    best, final = final_weights(output / "checkpoint-2"), final_weights(output)
    assert all(torch.equal(value, final[key]) for key, value in best.items())


def write_model(folder, text):
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(text)


def change_folders(folder, kill_at):
    """In the process: new models take the place of old ones, until it is killed."""
    changes = [0]

    def count(event, details):
        if event not in CHANGES - {"open"}:
            return
        changes[0] += 1
        if changes[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    replace_folder(folder / "stage" / "a", folder / "checkpoint")
    move_into(folder / "stage" / "b", folder)


def test_at_every_moment_a_folder_is_old_or_new_or_cannot_be_loaded(tmp_path):
    seen, kill_at, ended = set(), 0, None
    while ended != 0:
        kill_at += 1
        folder = tmp_path / str(kill_at)
        write_model(folder, "old")
        write_model(folder / "checkpoint", "old")
        write_model(folder / "stage" / "a", "new")
        write_model(folder / "stage" / "b", "new")
        process = _FORK.Process(target=change_folders, args=(folder, kill_at))
        process.start()
        process.join(60)
        ended = process.exitcode
        assert ended in (0, -signal.SIGKILL)
        states = []
        for place in (folder / "checkpoint", folder):
            texts = {path.read_text() for path in place.glob("*.*")} if (place / "config.json").is_file() else {"none"}
            assert len(texts) == 1, (kill_at, place)
            states.append(texts.pop())
        seen.add(tuple(states))
    assert seen == {("old", "old"), ("none", "old"), ("new", "old"), ("new", "none"), ("new", "new")}


# ---- no room, and no numbers


def assert_stopped(run_said, output, step, last):
    """One message, the last good checkpoint, nothing half-written."""
    message = run_said.strip().split("\n")[-1]
    assert message.startswith(f"Training stopped at step {step}"), run_said[-3000:]
    assert "Traceback" not in run_said
    assert (str(last) if last else "There is no checkpoint yet") in message
    assert newest_whole(output) == last
    assert_nothing_is_half_written(output)
    assert not loadable(output) and not (output / UNFINISHED).exists()
    return message


def test_a_limit_on_files_stops_a_run_which_goes_on_where_there_is_room(inputs, tmp_path):
    output = tmp_path / "out"
    run = Run(command("random counts", inputs, output), output)
    run.wait_until(lambda: (output / "checkpoint-2").is_dir())
    size = (output / "checkpoint-2" / "model.safetensors").stat().st_size
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
    assert run.end() == 1
    message = assert_stopped(run.said, output, 4, output / "checkpoint-2")
    assert "checkpoint-4 could not be written" in message and "File too large" in message and "Make room" in message
    again = Run(command("random counts", inputs, output), output)
    assert again.end() == 0, again.said[-3000:]
    assert f"Goes on from {output / 'checkpoint-2'}" in again.said


def test_a_full_disk_stops_the_command(inputs, finished, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # as much as a checkpoint and a half take
    size = sum(path.stat().st_size for path in (finished / "checkpoint-7").rglob("*") if path.is_file())
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    lead = f"mount -t tmpfs -o size={int(1.5 * size) // 1024}k tmpfs {disk}"
    if shutil.which("unshare") is None or subprocess.run([*mount, lead], check=False, capture_output=True).returncode:
        pytest.skip("a small file system of one's own cannot be mounted here")
    module, arguments = command("lora", inputs, disk / "out")
    after = f'"$@"; status=$?; cp -r {disk}/out {tmp_path}/left; exit $status'
    line = [*mount, f"{lead} && {{ {after}; }}", "sh", sys.executable, "-m", f"adaptive_llava.training.{module}"]
    done = subprocess.run([*line, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    left = tmp_path / "left"
    message = done.stderr.strip().split("\n")[-1]
    assert message.startswith("Training stopped at step 4") and "checkpoint-4 could not be written" in message
    assert "No space left on device" in message or "as on a full disk" in message
    assert str(disk / "out" / "checkpoint-2") in message and "Traceback" not in done.stderr
    assert [path.name for path in checkpoints(left)] == ["checkpoint-2"] and not (left / UNFINISHED).exists()
    assert_nothing_is_half_written(left)


@pytest.mark.parametrize(
    ("name", "rate", "what"),
    [
        ("random counts", "1e30", "the loss became NaN or infinite"),  # weights of 1e30 are still finite
        ("joint", "1e39", "a weight or the optimizer's memory of it became NaN or infinite"),
    ],
)
def test_numbers_that_are_not_finite_stop_a_run_before_they_are_saved(name, rate, what, inputs, tmp_path):
    output = tmp_path / "out"
    # the rate rises from 0, so that the first step's checkpoint is good; nothing is logged before the end
    more = ["--learning_rate", rate, "--save_steps", 1, "--logging_steps", 100, "--max_grad_norm", 0]
    run = Run(command(name, inputs, output, *more), output)
    assert run.end() == 1, run.said[-3000:]
    good = newest_whole(output)
    step = 2 if rate == "1e39" else 3
    message = assert_stopped(run.said, output, step, good)
    assert what in message and "`learning_rate=1e+3" in message
    assert good.name == f"checkpoint-{step - 1}"
    assert all(value.isfinite().all() for value in final_weights(good).values())


# ---- a router


def test_a_router_training_that_is_killed_among_its_images_goes_on_from_those_it_has_read(tmp_path):
    from adaptive_llava.training.rendered_images import render_images

    for kind in ("scene", "document"):
        (tmp_path / kind).mkdir()
        for index, rendered in enumerate(render_images(48, seed=0, kinds=[kind])):
            rendered.image.save(tmp_path / kind / f"{index:02d}.png")
    model = save_model(tmp_path / "model")

    def start(name, *more):
        arguments = ["--model", model, "--output", tmp_path / name, "--cache", tmp_path / f"{name}-cache"]
        arguments += ["--positive", tmp_path / "document", "--negative", tmp_path / "scene", "--batch-size", 2, *more]
        return Run(("train_router", [str(argument) for argument in arguments]), tmp_path / name)

    unbroken = start("unbroken")
    assert unbroken.end() == 0, unbroken.said[-3000:]
    killed = start("killed")
    killed.wait_until(lambda: any((tmp_path / "killed-cache").glob("*.safetensors")))
    killed.kill()
    assert not (tmp_path / "killed").exists()
    again = start("killed")
    assert again.end() == 0, again.said[-3000:]
    read = int(again.said.split("of which ")[1].split()[0])
    assert 0 < read < 96
    expected, weights = final_weights(tmp_path / "unbroken"), final_weights(tmp_path / "killed")
    assert all(torch.equal(value, weights[key]) for key, value in expected.items())

    diverged = start("diverged", "--learning-rate", "1e30")
    assert diverged.end() == 1
    assert "`learning_rate=1e+30`: after epoch" in diverged.said and not (tmp_path / "diverged").exists()
