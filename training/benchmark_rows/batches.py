"""Rows of ragged batches: images of unlike token counts, padded to the longest, bucketed by length, or packed.

The same prompts in as many batches on either side. Padded batches hold every count; bucketed ones hold prompts of one
length. The limit is the share of slots that is no padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptive_llava import EncodedImages
from adaptive_llava.training.benchmark_rows.measurement import Measurement
from adaptive_llava.training.benchmark_workload import TEXT_TOKENS, Workload
from adaptive_llava.training.packing import PackingCollator
from adaptive_llava.training.paired_timing import ratio_of_medians


_REACHED = 0.85  # of what the limit allows


@dataclass(frozen=True)
class Batch:
    """Prompts with one image each.

    Attributes:
        inputs: `input_ids (B, L)` and `attention_mask (B, L)`.
        encoded: Their images.
    """

    inputs: dict[str, Tensor]
    encoded: EncodedImages


def ragged_generate(work: Workload, batch: int) -> Measurement:
    """`generate` of the language model over bucketed batches, over padded ones; with the tower in the notes."""
    padded, bucketed, limit = ragged_batches(work, batch)

    def generate(batches: list[Batch]) -> None:
        for each in batches:
            work.identity.generate(
                **each.inputs,
                encoded_images=each.encoded,
                max_new_tokens=work.shape.new_tokens,
                do_sample=False,
            )

    pairs = work.time(lambda: generate(bucketed), lambda: generate(padded))
    ratio, tower = ratio_of_medians(pairs), work.tower_seconds(1) * batch * len(padded)
    end_to_end = (ratio.median + tower) / (ratio.peer_median + tower)
    what = (
        f"generate, {len(padded)} batches of {batch}, bucketed / padded, {_counts(work)} tokens, language model "
        f"({end_to_end:.2f} with the tower)"
    )
    notes = {"tower_s": tower, "end_to_end_ratio": end_to_end}
    return Measurement(what, pairs, "s", limit, limit / _REACHED, notes=notes)


def ragged_training(work: Workload) -> Measurement:
    """Forward and backward over bucketed batches, over padded ones."""
    batch = 4
    padded, bucketed, limit = ragged_batches(work, batch)
    pairs = work.time(_training(work, bucketed), _training(work, padded))
    what = f"training step, {len(padded)} batches of {batch}, bucketed / padded, {_counts(work)} tokens"
    return Measurement(what, pairs, "s", limit, limit / _REACHED)


def packed_training(work: Workload) -> Measurement:
    """Forward and backward over rows packed into one, over padded ones."""
    batch = 4
    padded, _, limit = ragged_batches(work, batch)
    packed = [Batch(_packed(each), each.encoded) for each in padded]
    pairs = work.time(_training(work, packed), _training(work, padded))
    what = f"training step, {len(padded)} batches of {batch}, packed / padded, {_counts(work)} tokens"
    return Measurement(what, pairs, "s", limit, None if work.device == "cpu" else 1.0)


def _counts(work: Workload) -> str:
    return "/".join(map(str, work.shape.ragged_tokens))


def ragged_batches(work: Workload, batch: int) -> tuple[list[Batch], list[Batch], float]:
    """Padded batches, bucketed batches, and the share of slots that holds a token in the padded ones."""
    counts = work.shape.ragged_tokens  # most first, so that every padded batch has one of the most
    prompts = [count for count in counts for _ in range(batch)]
    padded = [_batch(work, prompts[first :: len(counts)]) for first in range(len(counts))]
    bucketed = [_batch(work, [count] * batch) for count in counts]
    return padded, bucketed, (sum(counts) / len(counts) + TEXT_TOKENS) / (max(counts) + TEXT_TOKENS)


def _batch(work: Workload, lengths: list[int]) -> Batch:
    return Batch(work.prompt(len(lengths)), work.encoded(*lengths))


def _packed(batch: Batch) -> dict[str, Tensor]:
    return PackingCollator(lambda rows: rows[0])([batch.inputs])


def _training(work: Workload, batches: list[Batch]) -> Callable[[], None]:
    model: Any = work.identity

    def step() -> None:
        with torch.enable_grad():
            for each in batches:
                labels = each.inputs["input_ids"].masked_fill(each.inputs["input_ids"] == work.image_token, -100)
                model(**each.inputs, encoded_images=each.encoded, labels=labels, use_cache=False).loss.backward()
        model.zero_grad()

    return step
