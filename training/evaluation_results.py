"""From answers to one results file: scores with intervals, tokens, FLOPs, cache bytes and times at each budget.

`prefill_flops` has both conventions of `flop_counts.py`: `visual_only`, as the STF paper counts, and `end_to_end`.
Intervals are of 95 %, from questions drawn with replacement (`metric_table.py`); budgets are compared on the same
draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from adaptive_llava.training.evaluation import TOWER
from adaptive_llava.training.flop_counts import (
    count_flops,
    decoder_flops,
    kv_cache_bytes,
    prefill_flops,
    prefusion_flops,
)
from adaptive_llava.training.metric_table import Metric
from adaptive_llava.training.token_need import with_interval


def results_of(
    rows: Sequence[Mapping[str, Any]],
    seconds: Sequence[Mapping[str, float]],
    references: Sequence[Any],
    metric: Metric,
    config: Any,
    *,
    bytes_per_value: int,
    seed: int = 0,
) -> dict[str, Any]:
    """What the results file says about a dataset.

    Args:
        rows: One per question, as `samples.jsonl` has them.
        seconds: By budget and of the tower, and the number of `images`, per batch.
        references: What each question's answers are compared with.
        metric: The metric.
        config: Of the model.
        bytes_per_value: Of the model's precision, for the cache.
        seed: Of the draws.
    """
    names = list(rows[0]["answered"])
    said = {name: [row["answered"][name]["prediction"] for row in rows] for name in names}
    headlines = {name: metric.compute(texts, references) for name, texts in said.items()}
    drawn = {name: metric.resampled(texts, references, seed=seed) for name, texts in said.items()}
    largest = max(names, key=lambda name: _mean_tokens(rows, name))
    values = {name: metric.headline(headlines[name]) for name in names}
    return {
        "metric": metric.name,
        "questions": len(rows),
        "images": sum(len(row["image_sizes"]) for row in rows),
        "text_tokens": _rounded(np.mean([row["text_tokens"] for row in rows])),
        "vision_tower_ms_per_image": _milliseconds(seconds, TOWER),
        "largest": largest,
        "budgets": [
            {
                "budget": name,
                "score": with_interval(values[name], drawn[name]),
                "against_largest": with_interval(values[name] - values[largest], drawn[name] - drawn[largest]),
                "figures": headlines[name],
                "mean_tokens": _rounded(_mean_tokens(rows, name)),
                "histogram": _histogram(rows, name),
                "prefill_flops": _mean_flops(rows, name, config),
                "kv_cache_bytes": round(
                    float(np.mean([_cache_bytes(row, name, config, bytes_per_value) for row in rows]))
                ),
                "ms_per_image": _milliseconds(seconds, name),
            }
            for name in names
        ],
    }


class PromptFlops:
    """FLOPs of prompts of one model, whose images may have several counts.

    Args:
        config: Of the model.
    """

    def __init__(self, config: Any):
        self.config = config
        self._encoding = cache(lambda tokens, images: count_flops(config, tokens, 1, images=images).encoding)

    def __call__(
        self, visual_tokens: Sequence[int], text_tokens: int, image_sizes: Sequence[Sequence[int]] = ()
    ) -> tuple[int, int]:
        """FLOPs of one prompt, visual tokens only and end to end.

        Args:
            visual_tokens: Of each image.
            text_tokens: Text ids, without placeholders.
            image_sizes: Height and width of each image, in pixels; only AnyRes looks at them.

        Raises:
            ValueError: A part whose FLOPs are not known, or several images of unlike tiles.
        """
        config, text, total = self.config, self.config.text_config, sum(visual_tokens)
        if config.tiling["type"] == "anyres" and visual_tokens:
            if len(set(visual_tokens)) > 1 or len(set(map(tuple, image_sizes))) > 1:
                raise ValueError("Images of one prompt are cut into unlike tiles: their FLOPs are not known.")
            size = (image_sizes[0][0], image_sizes[0][1])
            found = count_flops(config, visual_tokens[0], text_tokens, images=len(visual_tokens), image_size=size)
            return found.visual_only, found.end_to_end
        # images of one count go through the compressor together
        encoding = sum(self._encoding(*group) for group in Counter(visual_tokens).items())
        height, width = config.vision_grid
        fused = text_tokens + (total if config.prefusion_variant == "released" else 0)
        prefusion = prefusion_flops(text, config.prefusion_layers, len(visual_tokens) * height * width, fused)
        return decoder_flops(text, total), encoding + prefusion + prefill_flops(text, total + text_tokens)


def table_of(results: Mapping[str, Any]) -> str:
    """One line per budget."""
    head = f"{results['metric']} (95 %)"
    lines = [f"{'budget':<10}{'tokens':>8}{head:>34}{'GFLOPs':>12}{'end to end':>12}{'cache MB':>10}{'ms/image':>10}"]
    for row in results["budgets"]:
        low, high = row["score"]["interval"]
        flops = [row["prefill_flops"][name] for name in ("visual_only", "end_to_end")]
        written = [f"{'-' if value is None else f'{value / 1e9:.4g}':>12}" for value in flops]
        score = f"{row['score']['value']:.3f} ({low:.3f} to {high:.3f})"
        lines.append(
            f"{row['budget']:<10}{row['mean_tokens']:>8.1f}{score:>34}{''.join(written)}"
            f"{row['kv_cache_bytes'] / 1e6:>10.3g}{row['ms_per_image'] or 0:>10.1f}"
        )
    return "\n".join(lines)


def _tokens(rows: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    return [tokens for row in rows for tokens in row["answered"][name]["visual_tokens"]]


def _mean_tokens(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean(_tokens(rows, name) or [0]))


def _histogram(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, int]:
    return {str(tokens): number for tokens, number in sorted(Counter(_tokens(rows, name)).items())}


def _mean_flops(rows: Sequence[Mapping[str, Any]], name: str, config: Any) -> dict[str, int | str | None]:
    count = PromptFlops(config)
    try:
        found = [count(row["answered"][name]["visual_tokens"], row["text_tokens"], row["image_sizes"]) for row in rows]
    except ValueError as error:
        return {"visual_only": None, "end_to_end": None, "why_unknown": str(error)}
    visual_only, end_to_end = (round(float(column)) for column in np.mean(np.array(found, dtype=float), axis=0))
    return {"visual_only": visual_only, "end_to_end": end_to_end}


def _cache_bytes(row: Mapping[str, Any], name: str, config: Any, bytes_per_value: int) -> int:
    tokens = sum(row["answered"][name]["visual_tokens"]) + row["text_tokens"]
    return kv_cache_bytes(config.text_config, tokens, bytes_per_value=bytes_per_value)


def _milliseconds(seconds: Sequence[Mapping[str, float]], name: str) -> float | None:
    """Median over the batches, so that the first one, which warms up, does not count."""
    found = [batch[name] / batch["images"] for batch in seconds if batch["images"]]
    return _rounded(1000 * np.median(found)) if found else None


def _rounded(value: Any) -> float:
    return round(float(value), 3)
