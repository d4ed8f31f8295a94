"""Peak memory of one task on a benchmark's model in this process, as a line of JSON; the benchmark's rows call it.

python -m adaptive_llava.training.peak_memory identity generate --shape siglip-b-224+qwen2.5-0.5b
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adaptive_llava.training.benchmark_shapes import SHAPES
from adaptive_llava.training.benchmark_workload import Workload


_PROCESS = Path("/proc/self")


def main(arguments: list[str] | None = None) -> int:
    """Measure one side of one task."""
    parser = argparse.ArgumentParser(prog="python -m adaptive_llava.training.peak_memory", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("side", choices=["identity", "stock"])
    parser.add_argument("task", choices=sorted(_TASKS))
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    work = Workload(options.shape, options.device, options.dtype)
    model: Any = getattr(work, options.side)
    run = _TASKS[options.task](work, model, options.side == "identity")
    work.__dict__.pop("stock", None)  # ours has taken over its parts; only what a user would hold counts
    gc.collect()
    before = _start_peak(options.device)
    run()
    peak = _peak(options.device)
    print(json.dumps({"peak_mb": peak / 1e6, "above_model_mb": (peak - before) / 1e6}))
    return 0


def _generate(work: Workload, model: Any, ours: bool) -> Callable[[], object]:
    prompt, pixels = work.prompt(placeholders=1 if ours else work.patches), work.pixels(1)
    return lambda: model.generate(**prompt, pixel_values=pixels, max_new_tokens=2, do_sample=False)


def _train(work: Workload, model: Any, ours: bool) -> Callable[[], object]:
    """A step of pretraining, in which the projector alone learns, on an image of the full count."""
    full = work.shape.prefill_tokens[0]
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    patches = work.features(1).patches[0]
    patches = patches.repeat(-(-full // len(patches)), 1)[:full]
    prompt = work.prompt(placeholders=1 if ours else full)
    ids = prompt["input_ids"]
    labels = ids.masked_fill(ids == work.image_token, -100)

    def step() -> None:
        values = projector(patches)
        if ours:
            encoded = work.encoded(full, values=values)
            loss = model(**prompt, encoded_images=encoded, labels=labels, use_cache=False).loss
        else:
            embeds = model.get_input_embeddings()(ids)
            embeds = embeds.masked_scatter((ids == work.image_token).unsqueeze(-1), values)
            loss = model(inputs_embeds=embeds, labels=labels, use_cache=False).loss
        loss.backward()

    return step


_TASKS = {"generate": _generate, "train": _train}


def _start_peak(device: str) -> int:
    # bytes in use now; the peak counts from here, so that building the model does not hide what running it takes
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if _PROCESS.is_dir():
        (_PROCESS / "clear_refs").write_text("5")
    return _peak(device)


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if _PROCESS.is_dir():  # not `ru_maxrss`, which on Linux starts at what the parent process had
        lines = (_PROCESS / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())
