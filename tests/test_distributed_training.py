"""Two processes with unlike batches: no part makes one wait for the other, and both end where one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from adaptive_llava.training.lora_targets import freeze_vision_tower, fully_trained_modules, language_model_targets
from tests.conftest import IMAGE_TOKEN, TINY_COMPRESSORS, TINY_ROUTERS, leave_together, tiny_model
from tests.test_anyres_models import pixels_of


pytestmark = pytest.mark.compat

ROOT = Path(__file__).resolve().parents[1]
STEPS = 3
SCRIPT = """
import sys
from tests.test_distributed_training import as_one_of_two
as_one_of_two(sys.argv[1])
"""


def model_of(way: str):
    """Every part that learns; the router and the tower wait, as in fine-tuning."""
    model = tiny_model(
        "llava",
        compressor=TINY_COMPRESSORS["query_resampler"],
        router=TINY_ROUTERS["classifier"],
        fusion_blocks="default",
        prefusion_layers=1,
        tiling={"type": "anyres"},
    )
    with torch.no_grad():  # small weights: a few steps must not overflow
        for parameter in model.parameters():
            parameter.mul_(0.8)
    if way == "lora":
        torch.manual_seed(0)
        model = get_peft_model(
            model,
            LoraConfig(
                r=2, target_modules=language_model_targets(model), modules_to_save=fully_trained_modules(model)
            ),
        )
    else:
        freeze_vision_tower(model)
    return model.train()


def share(tiling: dict, step: int, rank: int) -> dict:
    """What a process sees: text alone, or images all at one rung; the two change places with every step."""
    if rank == step % 2:
        ids = torch.tensor([[5 + step, 6, 7], [8, 9, 10]])
        return {"input_ids": ids, "labels": ids}
    pixels, sizes, cuts = pixels_of(tiling, [(20, 80), (24, 24)], seed=step)
    ids = torch.tensor([[5, IMAGE_TOKEN, 6, 7], [8, 9, IMAGE_TOKEN, 10 + step]])
    rungs = [step // 2 % 2] * sum(image.views for image in cuts)
    labels = torch.where(torch.arange(4) < 2, -100, ids)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "image_sizes": sizes, "visual_rungs": rungs}


def gradients_of(model, tiling: dict, ranks: list[int], backward) -> dict[str, torch.Tensor]:
    """Train with plain SGD on what these ranks see; gradients of all steps by name."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, found = torch.optim.SGD(trained, lr=0.05), {}
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(sum(model(**share(tiling, step, rank)).loss for rank in ranks) / len(ranks))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found[f"{step} {name.removeprefix('module.')}"] = parameter.grad.clone()
        optimizer.step()
    return found


def as_one_of_two(folder: str) -> None:
    """What each process runs. A parameter that a process left out would stop the next step: DDP waits for all."""
    for way in ("full", "lora"):
        strict = DistributedDataParallelKwargs(find_unused_parameters=False)
        patience = InitProcessGroupKwargs(timeout=timedelta(seconds=60))
        accelerator = Accelerator(cpu=True, kwargs_handlers=[strict, patience])
        plain = model_of(way)
        model, rank = accelerator.prepare(plain), accelerator.process_index
        gradients = gradients_of(model, plain.config.tiling, [rank], accelerator.backward)
        save_file(gradients, f"{folder}/{way}-{rank}.safetensors")
    facts = {"pid": os.getpid(), "processes": accelerator.num_processes, "wrapped": type(model).__name__}
    Path(folder, f"{rank}.json").write_text(json.dumps(facts))
    leave_together()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    script = folder / "two_processes.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, str(folder)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_processes_ran_and_waited_for_every_parameter(two_processes):
    facts = [json.loads((two_processes / f"{rank}.json").read_text()) for rank in range(2)]
    assert len({fact["pid"] for fact in facts} | {os.getpid()}) == 3
    assert [fact["processes"] for fact in facts] == [2, 2]
    assert [fact["wrapped"] for fact in facts] == ["DistributedDataParallel"] * 2


@pytest.mark.parametrize("way", ["full", "lora"])
def test_text_on_one_and_images_of_one_rung_on_the_other_give_the_gradients_of_one_process(two_processes, way):
    model = model_of(way)
    expected = gradients_of(model, model.config.tiling, [0, 1], torch.Tensor.backward)
    for rank in range(2):
        found = load_file(two_processes / f"{way}-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-6, name
    # of the two query sets, a step uses the one of its rung
    for step, used, idle in ((0, "query_1", "query_4"), (2, "query_4", "query_1")):
        largest = {
            query: max(g.abs().max() for name, g in expected.items() if name.startswith(f"{step} ") and query in name)
            for query in (used, idle)
        }
        assert largest[used] > 1e-6 and largest[idle] == 0
    parts = (
        "compressor.",
        "multi_block_fusion.",
        "modality_prefusion.",
        "view_arrangement.",
        "multi_modal_projector.",
    )
    for part in parts:
        assert any(g.abs().max() > 1e-6 for name, g in expected.items() if name.startswith("2 ") and part in name)
