"""Papers' figures of systems on LLaVA-1.5-7B, each with its source, and our counts beside them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from transformers import LlamaConfig, PretrainedConfig

from adaptive_llava import AdaptiveLlavaConfig
from adaptive_llava.training.flop_counts import count_flops, kv_cache_bytes


FIGURES = Path(__file__).resolve().parent / "recipes" / "reproduction" / "published_figures.yaml"


@cache
def published_figures() -> dict[str, Any]:
    """The file of figures, see its comments."""
    return yaml.safe_load(FIGURES.read_text(encoding="utf-8"))


def llama_7b() -> PretrainedConfig:
    """The language model of LLaVA-1.5-7B, with its 64 more words."""
    return LlamaConfig(vocab_size=32064)


def flops_beside_published(text_tokens: int) -> list[dict[str, Any]]:
    """Published FLOPs of 7B systems and ours by the same convention, as rows with `ours_over_published`.

    Args:
        text_tokens: Text ids of our prompt; the papers do not say theirs.
    """
    figures = published_figures()
    rows = []
    for entry in figures["flops"]:
        config = AdaptiveLlavaConfig.from_preset(entry["preset"], text_config=llama_7b(), **entry.get("fields", {}))
        counts = count_flops(config, entry["visual_tokens"], text_tokens)
        ours = getattr(counts, entry["counts"]) / 1e12
        rows.append(
            {name: entry[name] for name in ("preset", "visual_tokens", "counts")}
            | {"fields": entry.get("fields", {}), "published_tflops": entry["teraflops"], "tflops": round(ours, 5)}
            | {"ours_over_published": round(ours / entry["teraflops"], 3)}
            | {"source": figures["sources"][entry["source"]]}
        )
    return rows


def cache_beside_published() -> list[dict[str, Any]]:
    """Published memory per image of 7B systems, and the bytes of its keys and values in bfloat16, in megabytes."""
    figures = published_figures()
    return [
        {name: entry[name] for name in ("preset", "visual_tokens")}
        | {"published_mb": entry["megabytes"], "kv_mb": kv_cache_bytes(llama_7b(), entry["visual_tokens"]) / 1e6}
        | {"source": figures["sources"][entry["source"]]}
        for entry in figures["cache"]
    ]
