"""What a trained router does to images that had no part in its training, in numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptive_llava.modeling.router_classifier import ClassifierRouter
from adaptive_llava.training.classification_metrics import area_under_curve, confusion, reliability
from adaptive_llava.training.labelled_images import LabelledImages
from adaptive_llava.training.router_fit import class_weights, route


def held_out_report(
    router: ClassifierRouter,
    images: LabelledImages,
    held_out: np.ndarray,
    names: Sequence[str],
    counts: Sequence[int],
    *,
    balanced: bool,
    seed: int,
) -> dict[str, Any]:
    """What the router does to images that had no part in its training.

    For each number of tokens above the fewest: how well "at least this many" is told apart (AUC) and how far its
    probability can be believed. With `balanced`, each rung has the same say in the latter, as in the training.

    Args:
        router: The trained router, as it will be saved.
        images: All images.
        held_out: Indices of those to measure.
        names: Names of the sources.
        counts: Token counts of the rungs.
        balanced: Whether the training was balanced.
        seed: Seed of the bootstrap.
    """
    rungs, sources = images.rungs[held_out], images.sources[held_out]
    chosen, scores, probabilities = route(router, images.values[held_out])
    tokens = np.asarray(counts)[chosen]
    weights = class_weights(rungs, router.num_rungs, balanced=balanced)[rungs]
    separation = {}
    for rung in sorted(set(rungs.tolist()))[1:]:
        above = rungs >= rung
        forecast = probabilities[:, rung:].sum(1).clip(0, 1)
        separation[f"at least {counts[rung]} tokens"] = {
            **area_under_curve(forecast[above], forecast[~above], seed=seed),
            "images": [int(above.sum()), int((~above).sum())],
            **reliability(forecast, above, weights),
        }
    by_source = {}
    for index, name in enumerate(names):
        own = tokens[sources == index]
        by_source[name] = {
            "images": len(own),
            "mean_tokens": round(float(own.mean()), 2) if len(own) else None,
            "standard_error": round(float(own.std(ddof=1) / len(own) ** 0.5), 2) if len(own) > 1 else None,
        }
    return {
        "images": len(held_out),
        "accuracy": round(float((chosen == rungs).mean()), 4),
        "mean_tokens": round(float(tokens.mean()), 2),
        "separation": separation,
        "confusion": confusion(rungs, chosen, router.num_rungs),
        "sources": by_source,
        "choices": [
            {"source": names[source], "image": images.names[image], "rung": int(rung), "score": float(score)}
            for image, source, rung, score in zip(held_out, sources, chosen, scores, strict=True)
        ],
    }


def summary(result: dict[str, Any], computed: int) -> str:
    """The result in lines to print; `computed` images were new to the cache."""
    held_out, counts = result["held_out"], result["counts"]
    images = sum(source["images"] for source in result["sources"])
    used = result["images"]
    lines = [
        f"images       {images}, of which {computed} were read by the tower now",
        f"trained on   {used['train']}, stopped by {used['validation']} after {result['epochs']} epochs, temperature "
        f"{result['temperature']:.2f}",
        f"measured on  {used['held_out']}: accuracy {held_out['accuracy']:.1%}, {held_out['mean_tokens']:.1f} tokens",
    ]
    for name, row in held_out["separation"].items():
        low, high = row["interval"]
        lines.append(
            f"{name}: AUC {row['auc']:.4f} ({low:.4f} to {high:.4f}; {row['images'][0]} against {row['images'][1]} "
            f"images), ECE {row['ece']:.3f}, Brier {row['brier']:.3f}"
        )
    lines.append("wanted (rows) and chosen (columns) " + "".join(f"{count:>7}" for count in counts))
    for count, row in zip(counts, held_out["confusion"], strict=True):
        lines.append(f"{count:>34} " + "".join(f"{number:>7}" for number in row))
    for name, row in held_out["sources"].items():
        mean = "-" if row["mean_tokens"] is None else f"{row['mean_tokens']:.1f}"
        error = "" if row["standard_error"] is None else f" +- {1.96 * row['standard_error']:.1f}"
        lines.append(f"{name:<24} {row['images']:>6} images {mean:>8} tokens{error}")
    missing = [count for count, row in zip(counts, held_out["confusion"], strict=True) if not sum(row)]
    if missing:
        wanted = ", ".join(map(str, missing))
        lines.append(f"No image wanted {wanted} tokens: the router has not learned to choose that.")
    return "\n".join(lines)
