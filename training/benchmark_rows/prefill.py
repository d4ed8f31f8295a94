"""Rows of the language model at fewer visual tokens, and how its cost grows with batch, images and frames.

The limit of fewer tokens is the larger of two ratios. FLOPs say what the arithmetic takes. Below some length the time
goes into reading the weights, which a run with the model's own linear layers alone, on as many rows, tells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

from adaptive_llava.training.benchmark_rows.measurement import Measurement
from adaptive_llava.training.benchmark_workload import TEXT_TOKENS, Workload
from adaptive_llava.training.flop_counts import prefill_flops
from adaptive_llava.training.paired_timing import ratio_of_medians


def fewer_tokens(work: Workload, tokens: int) -> Measurement:
    """Prefill given encoded images of `tokens` visual tokens, over that of the full count."""
    full, rows = work.shape.prefill_tokens[0], work.batch
    pairs = work.time(_prefill(work, (tokens,) * rows), _prefill(work, (full,) * rows))
    flops = prefill_flops(work.text, tokens + TEXT_TOKENS) / prefill_flops(work.text, full + TEXT_TOKENS)
    floor = ratio_of_medians(work.time(BareLayers(work, tokens), BareLayers(work, full), share=1 / 2)).ratio
    limit = max(flops, floor)
    what = f"prefill of the language model, {tokens} / {full} tokens + {TEXT_TOKENS} text, batch {rows}"
    share = 1.15 if work.device == "cpu" else 1.10
    bar = limit * share if tokens >= 64 else None
    return Measurement(what, pairs, "s", limit, bar, notes={"flops_ratio": flops, "linear_layers_ratio": floor})


class BareLayers:
    """The language model's linear layers one after another, each on as many rows as in the model, and nothing else.

    Args:
        work: Has the weights.
        tokens: Visual tokens of each prompt of the batch.
    """

    def __init__(self, work: Workload, tokens: int):
        rows = work.batch * (tokens + TEXT_TOKENS)
        decoder, head = work.identity.get_decoder(), work.identity.get_output_embeddings()
        weights: list[tuple[Any, int]] = [
            (layer.weight, rows) for layer in decoder.modules() if isinstance(layer, nn.Linear)
        ]
        weights.append((head.weight, work.batch))  # scores one position of each prompt
        ones = {size: weight.new_ones(size) for weight, number in weights for size in [(number, weight.shape[1])]}
        self.layers = [(weight, ones[number, weight.shape[1]]) for weight, number in weights]

    def __call__(self) -> None:
        for weight, rows in self.layers:
            F.linear(rows, weight)


def per_batch(work: Workload) -> Measurement:
    """A batch of prompts at once, over the same prompts one by one."""
    batch, tokens = 4, work.shape.ragged_tokens[0]
    one = _prefill(work, (tokens,))
    pairs = work.time(_prefill(work, (tokens,) * batch), lambda: [one() for _ in range(batch)])
    return Measurement(f"prefill of a batch of {batch} / one by one, {tokens} tokens", pairs, "s", 1.0)


def per_image(work: Workload) -> Measurement:
    """Eight images in a prompt, over one image of as many tokens."""
    images, tokens = 8, work.shape.ragged_tokens[-1]
    pairs = work.time(_one_prompt(work, (tokens,) * images), _one_prompt(work, (tokens * images,)))
    return Measurement(f"prefill of {images} images of {tokens} tokens / one of {images * tokens}", pairs, "s", 1.0)


def per_frame(work: Workload) -> Measurement:
    """A video's one-token frames in a prompt, over one image of as many tokens."""
    frames = work.shape.frames
    pairs = work.time(_one_prompt(work, (1,) * frames), _one_prompt(work, (frames,)))
    return Measurement(f"prefill of {frames} frames of one token / one image of {frames}", pairs, "s", 1.0)


def encode_once(work: Workload) -> Measurement:
    """Four prompts about one image that is encoded once, over encoding it for each."""
    prompts, model, pixels = 4, work.dfmr, work.pixels(1)
    prompt = work.prompt()

    def once() -> None:
        encoded = model.encode_images(pixels, visual_rungs=[0])
        for _ in range(prompts):
            model(**prompt, encoded_images=encoded, logits_to_keep=1)

    def each_time() -> None:
        for _ in range(prompts):
            model(**prompt, pixel_values=pixels, visual_rungs=[0], logits_to_keep=1)

    pairs = work.time(once, each_time)
    counts = work.counts(model, 0)
    limit = (counts.encoding + prompts * counts.prefill) / (prompts * counts.end_to_end)
    return Measurement(f"{prompts} prompts on one image, encoded once / every time", pairs, "s", limit)


def end_to_end(work: Workload, preset: str, rung: int) -> Measurement:
    """From pixels to the first token, tower included, at a rung of a preset, over all patches."""
    model, rows = work.model(preset), work.batch
    prompt, pixels = work.prompt(rows), work.pixels(rows)
    pairs = work.time(
        lambda: model(**prompt, pixel_values=pixels, visual_rungs=[rung] * rows, logits_to_keep=1),
        lambda: work.identity(**prompt, pixel_values=pixels, logits_to_keep=1),
    )
    ratio, tower = ratio_of_medians(pairs), work.tower_seconds(rows)
    few, many = work.counts(model, rung), work.counts(work.identity, 0)
    shares = {"of_time": [tower / ratio.median, tower / ratio.peer_median]}
    shares["of_flops"] = [counts.vision_tower / counts.end_to_end for counts in (few, many)]
    what = (
        f"{preset}: first token with the tower ({shares['of_time'][0]:.0%} of it), "
        f"{model.config.visual_token_counts[rung]} / {work.patches} tokens + {TEXT_TOKENS} text, batch {rows}"
    )
    return Measurement(what, pairs, "s", few.end_to_end / many.end_to_end, notes={"tower_share": shares})


def _prefill(work: Workload, lengths: tuple[int, ...]) -> Callable[[], object]:
    prompt, encoded = work.prompt(len(lengths)), work.encoded(*lengths)
    return lambda: work.identity(**prompt, encoded_images=encoded, logits_to_keep=1)


def _one_prompt(work: Workload, lengths: tuple[int, ...]) -> Callable[[], object]:
    prompt, encoded = work.prompt(placeholders=len(lengths)), work.encoded(*lengths)
    return lambda: work.identity(**prompt, encoded_images=encoded, logits_to_keep=1)
