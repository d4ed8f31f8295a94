"""How often do pixels and features give a real image the same token count, both calibrated to one mean?

    python -m adaptive_llava.training.pixel_agreement --data-root ../shared/data \
        --weights ../shared/weights/mobilenet_v2_1.0_224_float.npz --target-mean 200 --output results/

`feature_std` reads the stride-16 map of an ImageNet-trained MobileNetV2, `pixel_std` the pixels that this tower gets.
The thresholds of each are chosen on all images together, without the labels of their kinds. Writes
`pixel_agreement.json`; no image is copied.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.modeling.router_feature_std import FeatureStdRouter
from adaptive_llava.modeling.router_pixel_std import PixelStdRouter
from adaptive_llava.training.classification_metrics import confusion
from adaptive_llava.training.image_source import ImageSource, open_images
from adaptive_llava.training.mobilenet_tower import mobilenet_pixels
from adaptive_llava.training.routing_study import FITS, KINDS, mobilenet_dfmr
from adaptive_llava.training.threshold_search import rungs_at, thresholds_for_mean


NAME = "pixel_agreement"
ROUTERS = {"features": FeatureStdRouter, "pixels": PixelStdRouter}
_BATCH = 8


def cohens_kappa(first: np.ndarray, second: np.ndarray, categories: int) -> float:
    """Agreement beyond chance of two choices per image: 1 is full, 0 what their shares alone would give."""
    table = np.array(confusion(first, second, categories)) / len(first)
    agreed, chance = np.trace(table), float(table.sum(axis=1) @ table.sum(axis=0))
    return 1.0 if chance > 1 - 1e-12 else float((agreed - chance) / (1 - chance))


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's, equal values sharing their mean rank; 0 where one of them does not vary."""
    ranks = [_ranks(values) - _ranks(values).mean() for values in (first, second)]
    scale = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float(ranks[0] @ ranks[1] / scale) if scale else 0.0


@torch.no_grad()
def compare(
    model: AdaptiveLlavaForConditionalGeneration, sources: dict[str, ImageSource], *, target_mean: float, fit: str
) -> dict[str, Any]:
    """Route all images both ways and count where the two agree.

    Args:
        model: A model on the MobileNetV2 tower whose compressor has several counts.
        sources: Images of each kind.
        target_mean: Mean tokens that both are calibrated to.
        fit: How an image becomes a square; see `mobilenet_pixels`.
    """
    from tqdm import tqdm

    inner = model.model.eval()
    routers = {name: router(inner.config.vision_feature_dim, inner.compressor) for name, router in ROUTERS.items()}
    measured: dict[str, list[np.ndarray]] = {name: [] for name in routers}
    kinds: list[str] = []
    for kind, source in sources.items():
        images = [image for _, image in source]
        for start in tqdm(range(0, len(images), _BATCH), desc=f"{fit}: {kind}", unit="batch"):
            batch = images[start : start + _BATCH]
            pixels = mobilenet_pixels(batch, image_size=model.config.vision_config.image_size, fit=fit)
            features = inner.extract_features(pixels)
            for name, router in routers.items():
                measured[name].append(router.window_spread(features).numpy())
            kinds += [kind] * len(batch)
    spread = {name: np.concatenate(parts) for name, parts in measured.items()}
    counts = model.config.visual_token_counts
    thresholds = {name: thresholds_for_mean(values, counts, target_mean)[0] for name, values in spread.items()}
    rungs = {name: rungs_at(values, thresholds[name]) for name, values in spread.items()}
    scores = {name: values.mean(axis=1) for name, values in spread.items()}
    tokens = {name: np.asarray(counts)[chosen] for name, chosen in rungs.items()}

    def figures(chosen: np.ndarray) -> dict[str, Any]:
        first, second = (rungs[name][chosen] for name in ROUTERS)
        return {
            "num_images": int(chosen.sum()),
            "mean_tokens": {name: round(float(tokens[name][chosen].mean()), 1) for name in ROUTERS},
            "agreement": round(float((first == second).mean()), 4),
            "kappa": round(cohens_kappa(first, second, len(counts)), 4),
            "rank_correlation": round(rank_correlation(*(scores[name][chosen] for name in ROUTERS)), 4),
            "images_by_rung": confusion(first, second, len(counts)),
        }

    return {
        "thresholds": {name: [round(value, 5) for value in values] for name, values in thresholds.items()},
        "all": figures(np.ones(len(kinds), dtype=bool)),
        "kinds": {kind: figures(np.asarray(kinds) == kind) for kind in sources},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="How often pixels and features give an image the same token count.")
    parser.add_argument("--data-root", type=Path, required=True, help=f"folder with the folders {', '.join(KINDS)}")
    parser.add_argument("--weights", type=Path, required=True, help="MobileNetV2 weights, *.npz")
    parser.add_argument("--target-mean", type=float, default=200, help="mean tokens of both (%(default)s)")
    parser.add_argument("--image-size", type=int, default=384, help="side of the square, in pixels (%(default)s)")
    parser.add_argument("--limit", type=int, help="images per kind")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder to write (%(default)s)")
    options = parser.parse_args(arguments)

    sources = {kind: open_images(options.data_root / kind, limit=options.limit) for kind in KINDS}
    model = mobilenet_dfmr(options.weights, image_size=options.image_size)
    result = {
        "tower": "MobileNetV2 1.0, ImageNet, stride-16 map",
        "image_size": options.image_size,
        "counts": list(model.config.visual_token_counts),
        "target_mean": options.target_mean,
        "fits": {fit: compare(model, sources, target_mean=options.target_mean, fit=fit) for fit in FITS},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{NAME}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for fit, found in result["fits"].items():
        print(f"\n{fit:<11}{'images':>7}{'features':>10}{'pixels':>8}  same count   kappa  rank correlation")
        for kind, row in {**found["kinds"], "all": found["all"]}.items():
            means = row["mean_tokens"]
            print(
                f"{kind:<11}{row['num_images']:>7}{means['features']:>10.1f}{means['pixels']:>8.1f}"
                f"{row['agreement']:>12.1%}{row['kappa']:>8.2f}{row['rank_correlation']:>18.2f}"
            )
    return 0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, where, number = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(number) - (number - 1) / 2)[where]


if __name__ == "__main__":
    raise SystemExit(main())
