"""Rows against `LlavaForConditionalGeneration` with the same weights: what our way of doing the same costs."""

from __future__ import annotations

from adaptive_llava.training.benchmark_rows.measurement import Measurement
from adaptive_llava.training.benchmark_workload import Workload


_BAR, _INTERVAL_BAR = 1.02, 1.05


def identity_prefill(work: Workload) -> Measurement:
    """Forward of tower and language model, one placeholder per image, against stock LLaVA."""
    pixels = work.pixels(1)
    compact, expanded = work.prompt(), work.prompt(placeholders=work.patches)
    pairs = work.time(
        lambda: work.identity(**compact, pixel_values=pixels, logits_to_keep=1),
        lambda: work.stock(**expanded, pixel_values=pixels, logits_to_keep=1),
        all_pairs=True,
    )
    what = "prefill, identity / LlavaForConditionalGeneration, one placeholder"
    return Measurement(what, pairs, "s", 1.0, _BAR, _INTERVAL_BAR)


def identity_first_token(work: Workload) -> Measurement:
    """`generate` up to the first scored position, against stock LLaVA."""
    what = "time to first token in generate, identity / stock"
    return Measurement(what, work.generation_pairs[0], "s", 1.0, _BAR, _INTERVAL_BAR)


def identity_decode(work: Workload) -> Measurement:
    """Every further token of `generate`, against stock LLaVA."""
    what = f"decode per token ({work.shape.new_tokens - 1} steps), identity / stock"
    return Measurement(what, work.generation_pairs[1], "s", 1.0, _BAR, _INTERVAL_BAR)


def expanded_layout(work: Workload) -> Measurement:
    """Our forward with one placeholder per visual token, as serving engines write it, against one per image."""
    full = work.shape.prefill_tokens[0]
    encoded, compact, expanded = work.encoded(full), work.prompt(), work.prompt(placeholders=full)
    pairs = work.time(
        lambda: work.identity(**expanded, encoded_images=encoded, logits_to_keep=1),
        lambda: work.identity(**compact, encoded_images=encoded, logits_to_keep=1),
    )
    return Measurement(f"prefill, {full} placeholders / one, {full} visual tokens", pairs, "s", 1.0)
