"""Trained classifiers beside untrained statistics: which score puts pages before pictures? Part of `routing_study.py`.

A classifier reads the mean of the tower's stride-16 map, or of all three hidden states of that width. It is trained on
rendered pictures, where its labels are free, and tested on real images; or trained on half of the real images and
tested on the other half, which shows what these features hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from adaptive_llava.modeling.compressor_average_pool import AveragePoolCompressor
from adaptive_llava.modeling.router_classifier import ClassifierRouter
from adaptive_llava.training.classification_metrics import area_under_curve
from adaptive_llava.training.mobilenet_tower import STRIDE_16_LAYER, mobilenet_pixels
from adaptive_llava.training.rendered_pages import READ, render_pictures
from adaptive_llava.training.router_fit import fit_router, split_images


BLOCKS = (9, 10)  # hidden states as wide as the stride-16 map, before it
_SEED_OF_PICTURES = 7
_BATCH = 8


@contextmanager
def pooled_states(tower: nn.Module) -> Iterator[list[np.ndarray]]:
    """Collects what a classifier reads of every image that the tower sees: `(batch, 3 * dim)` per call.

    The selected layer comes first, then `BLOCKS`, so the first third is the input of a classifier without blocks.
    """
    seen: list[np.ndarray] = []

    def keep(module: nn.Module, arguments: tuple, output: Any) -> None:
        states = [output.hidden_states[layer] for layer in (STRIDE_16_LAYER, *BLOCKS)]
        seen.append(torch.cat([state.flatten(2).mean(2) for state in states], dim=1).numpy())

    handle = tower.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def rendered_inputs(model: nn.Module, count: int, *, image_size: int, fit: str) -> tuple[np.ndarray, np.ndarray]:
    """What classifiers read of rendered pictures, `(count, 3 * dim)`, and whether each must be read, `(count,)`."""
    from tqdm import tqdm

    inner: Any = model
    labels: list[int] = []
    with pooled_states(inner.model.vision_tower) as seen:
        for start in tqdm(range(0, count, _BATCH), desc=f"{fit}: rendered", unit="batch"):
            drawn = render_pictures(min(_BATCH, count - start), seed=_SEED_OF_PICTURES, start=start)
            images: list[Image.Image] = [image for image, _ in drawn]
            labels += [int(kind in READ) for _, kind in drawn]
            inner.model.extract_features(mobilenet_pixels(images, image_size=image_size, fit=fit))
    return np.concatenate(seen), np.array(labels)


def compare_scores(
    kinds: np.ndarray,
    statistics: Mapping[str, np.ndarray],
    values: np.ndarray,
    rendered: tuple[np.ndarray, np.ndarray],
    *,
    pages: Sequence[str],
    counts: tuple[int, int],
    target_mean: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of untrained statistics and of trained classifiers for the same real images.

    Args:
        kinds: Kind of each image, `(n,)`.
        statistics: Untrained scores by name, each `(n,)`.
        values: Result of `pooled_states` for the images, `(n, 3 * dim)`.
        rendered: Result of `rendered_inputs`.
        pages: Kinds that must be read.
        counts: Fewest and most tokens.
        target_mean: Mean tokens at which the kinds' counts are compared.
        seed: Seed of splits, training and bootstrap.

    Returns:
        Per score: the images it was tested on, the area under the curve of each kind of page against photos and of all
        pages against all others, each kind's mean tokens if the highest scores get the most tokens so that the overall
        mean is `target_mean`, and, for classifiers, the means by their own threshold.
    """
    must_read = np.isin(kinds, pages).astype(np.int64)
    everywhere = np.arange(len(kinds))
    half = _halves(kinds, seed)
    rows = {name: _row(score, kinds, pages, counts, target_mean, seed) for name, score in statistics.items()}
    known = {
        "rendered": (*rendered, everywhere),
        "half of the real images": (values[half], must_read[half], np.setdiff1d(everywhere, half)),
    }
    dim = values.shape[1] // (1 + len(BLOCKS))
    for reads, width in (("mean", dim), ("mean of 3 layers", values.shape[1])):
        for name, (seen, labels, tested) in known.items():
            logits, held_out = _trained_logits(seen[:, :width], labels, values[tested, :width], dim, seed)
            row = _row(logits, kinds[tested], pages, counts, target_mean, seed)
            tokens = np.where(logits > 0, counts[1], counts[0])
            rows[f"classifier, {reads}, trained on {name}"] = row | {
                "auc_where_it_learned": held_out,
                "mean_tokens_by_its_threshold": _means(tokens, kinds[tested]),
            }
    return {
        "counts": list(counts),
        "target_mean": target_mean,
        "rendered_images": len(rendered[1]),
        "scores": rows,
    }


def draw_scores(figure: Any, compared: Mapping[str, Any]) -> None:
    """Areas under the curve with their intervals, and mean tokens by kind at the same overall mean, score by score.

    Args:
        figure: Matplotlib figure or part of one.
        compared: Result of `compare_scores`.
    """
    left, right = figure.subplots(1, 2, sharey=True)
    scores = compared["scores"]
    places = np.arange(len(scores), 0.0, -1.0)
    pairs = list(next(iter(scores.values()))["auc"])
    for index, (pair, colour) in enumerate(zip(pairs, ("#2c4a6e", "#7a9cc6", "#c0392b"), strict=True)):
        areas = np.array([row["auc"][pair]["auc"] for row in scores.values()])
        ends = np.array([row["auc"][pair]["interval"] for row in scores.values()]).T
        error = np.maximum(np.stack([areas - ends[0], ends[1] - areas]), 0)
        left.errorbar(areas, places + 0.2 * (1 - index), xerr=error, fmt="o", color=colour, markersize=4, label=pair)
    left.axvline(0.5, color="#999999", linewidth=1, linestyle="--")
    left.set_yticks(places, [name.replace(", trained", ",\ntrained") for name in scores], fontsize=8)
    left.set(xlim=(-0.02, 1.02), title="pad: area under the curve, 95 % interval")
    left.legend(fontsize=7, loc="center left")
    kinds = [kind for kind in next(iter(scores.values()))["mean_tokens"] if kind != "all"]
    for index, (kind, colour) in enumerate(zip(kinds, ("#7a9cc6", "#2c4a6e", "#e0a458", "#bbbbbb"), strict=True)):
        means = [row["mean_tokens"][kind] for row in scores.values()]
        right.barh(places + 0.2 * (1.5 - index), means, height=0.18, color=colour, label=kind)
    right.set(xlabel=f"mean visual tokens at a mean of {compared['target_mean']:.0f}", title="pad: tokens by kind")
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _halves(kinds: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    own = [rng.permutation(np.flatnonzero(kinds == kind)) for kind in sorted(set(kinds.tolist()))]
    return np.sort(np.concatenate([order[: len(order) // 2] for order in own]))


def _trained_logits(
    seen: np.ndarray, labels: np.ndarray, asked: np.ndarray, dim: int, seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    blocks = BLOCKS if seen.shape[1] > dim else ()
    router = ClassifierRouter(dim, AveragePoolCompressor(dim, dim, factors=(1, 3)), features="mean", blocks=blocks)
    parts = split_images(labels, validation=0.15, holdout=0.15, seed=seed)
    train, stop, held = (parts[name] for name in ("train", "validation", "held_out"))
    fit_router(router, seen[train], labels[train], seen[stop], labels[stop], seed=seed)
    with torch.no_grad():
        # logits, not probabilities: those of sure cases are all 1
        asked_logits, own = (router.logits(torch.from_numpy(x))[:, 1].numpy() for x in (asked, seen[held]))
    return asked_logits, area_under_curve(own[labels[held] == 1], own[labels[held] == 0], seed=seed)


def _row(
    score: np.ndarray,
    kinds: np.ndarray,
    pages: Sequence[str],
    counts: tuple[int, int],
    target_mean: float,
    seed: int,
) -> dict[str, Any]:
    raised = round(len(score) * (target_mean - counts[0]) / (counts[1] - counts[0]))
    tokens = np.full(len(score), counts[0])
    tokens[np.argsort(-score, kind="stable")[:raised]] = counts[1]
    is_page = np.isin(kinds, pages)
    photos = score[kinds == "photos"]
    return {
        "images": len(score),
        "auc": {f"{kind} > photos": area_under_curve(score[kinds == kind], photos, seed=seed) for kind in pages}
        | {"pages > others": area_under_curve(score[is_page], score[~is_page], seed=seed)},
        "mean_tokens": _means(tokens, kinds),
    }


def _means(tokens: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    by_kind = {str(kind): round(float(tokens[kinds == kind].mean()), 1) for kind in dict.fromkeys(kinds.tolist())}
    return by_kind | {"all": round(float(tokens.mean()), 1)}
