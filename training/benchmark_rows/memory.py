"""Rows of memory: peaks of processes of their own, and bytes that are counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from adaptive_llava.training.benchmark_rows.measurement import Measurement
from adaptive_llava.training.benchmark_workload import TEXT_TOKENS, Workload
from adaptive_llava.training.flop_counts import kv_cache_bytes


_PAIRS = 3  # memory hardly varies between processes
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}  # freed memory goes back


def identity_memory(work: Workload) -> Measurement:
    """Peak memory of `generate` with the model in it, each side in fresh processes."""
    peaks, above = _peaks(work, "generate", _PAIRS)
    what = "peak memory of generate, identity / stock"
    return Measurement(what, peaks, "MB", 1.0, 1.02, notes={"above_loaded_model_mb": above})


def training_memory(work: Workload) -> Measurement:
    """Peak memory above the loaded model of a step that trains the projector."""
    peaks, above = _peaks(work, "train", 1)
    full = work.shape.prefill_tokens[0]
    what = f"peak memory of a training step above the model, {full} tokens + {TEXT_TOKENS} text, identity / stock"
    return Measurement(what, above, "MB", notes={"with_the_model_mb": peaks})


def logits_memory(work: Workload) -> Measurement:
    """Bytes of the logits of a training step: ours are scored at the input ids, one per image."""
    full = work.shape.prefill_tokens[0]
    compact, expanded = work.prompt(), work.prompt(placeholders=full)
    with torch.no_grad():
        ours = work.identity(**compact, encoded_images=work.encoded(full), labels=compact["input_ids"]).logits
        embeds = work.stock.get_input_embeddings()(expanded["input_ids"])
        peer = work.stock(inputs_embeds=embeds, labels=expanded["input_ids"]).logits
    pair = tuple(logits.numel() * logits.element_size() / 1e6 for logits in (ours, peer))
    what = f"logits in training at {full} tokens + {TEXT_TOKENS} text, identity / stock"
    limit = (TEXT_TOKENS + 1) / (TEXT_TOKENS + full)
    return Measurement(what, [(pair[0], pair[1])], "MB", limit, 1 / 3)


def cache_bytes(work: Workload) -> Measurement:
    """What an image takes in the cache at each count, over the formula."""
    pairs = []
    for tokens in work.shape.prefill_tokens:
        with torch.no_grad():
            outputs = work.identity(
                **work.prompt(), encoded_images=work.encoded(tokens), logits_to_keep=1, use_cache=True
            )
        layers = [(layer.keys, layer.values) for layer in outputs.past_key_values.layers]
        held = sum(state.numel() * state.element_size() for states in layers for state in states)
        width = getattr(torch, work.dtype).itemsize
        text = kv_cache_bytes(work.text, TEXT_TOKENS, bytes_per_value=width)
        pairs.append((float(held - text), float(kv_cache_bytes(work.text, tokens, bytes_per_value=width))))
    counts = ", ".join(map(str, work.shape.prefill_tokens))
    return Measurement(f"cache of an image of {counts} tokens / formula", pairs, "bytes", 1.0, 1.0, exact=True)


def _peaks(work: Workload, task: str, pairs: int) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    reports = []
    for done in range(min(pairs, work.pairs)):
        reports.append((_measured_apart(work, "identity", task), _measured_apart(work, "stock", task)))
        work.progress(done + 1)
    return (
        [(ours["peak_mb"], peer["peak_mb"]) for ours, peer in reports],
        [(ours["above_model_mb"], peer["above_model_mb"]) for ours, peer in reports],
    )


def _measured_apart(work: Workload, side: str, task: str) -> dict[str, float]:
    command = [sys.executable, "-m", "adaptive_llava.training.peak_memory", side, task, "--shape", work.name]
    command += ["--device", work.device, "--dtype", work.dtype, "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, env=os.environ | _ALLOCATOR, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
