"""Which real images get many visual tokens from DFMR's router, once it is calibrated to a mean? And from a classifier?

    python -m adaptive_llava.training.routing_study --data-root ../shared/data \
        --weights ../shared/weights/mobilenet_v2_1.0_224_float.npz --target-mean 200 --output results/

An ImageNet-trained MobileNetV2 is the vision tower of a `dfmr` model: its stride-16 map at 384 pixels is 24 x 24, as
many patches as LLaVA-1.5's. The thresholds are calibrated on all kinds of images together, without their labels; then
each kind's counts are reported, and how well the statistic separates pages from pictures beside that of the pixels and
beside trained classifiers (`classifier_study.py`). Images are padded to a square and, as a check, stretched to one.
Writes `routing_real_images.json` and `.png`; no image is copied.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from adaptive_llava import AdaptiveLlavaForConditionalGeneration
from adaptive_llava.training.calibrate import calibrate_thresholds
from adaptive_llava.training.classification_metrics import area_under_curve
from adaptive_llava.training.classifier_study import compare_scores, draw_scores, pooled_states, rendered_inputs
from adaptive_llava.training.image_source import ImageSource, open_images
from adaptive_llava.training.mobilenet_tower import STRIDE_16_LAYER, load_mobilenet_tower, mobilenet_pixels
from adaptive_llava.training.threshold_search import rungs_at


KINDS = ("charts", "documents", "photos", "nlvr")
PAGES = ("documents", "charts")  # must be read; compared with photos
FITS = ("pad", "stretch")
NAME = "routing_real_images"
_BATCH = 8


def mobilenet_dfmr(weights: str | Path, *, image_size: int = 384) -> AdaptiveLlavaForConditionalGeneration:
    """A `dfmr` model on the pretrained tower; its language model is tiny and random, since routing never asks it."""
    torch.manual_seed(0)
    text = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=128)
    )
    tower = load_mobilenet_tower(weights, image_size=image_size)
    return AdaptiveLlavaForConditionalGeneration.from_backbones(
        tower, text, "dfmr", image_token_id=100, vision_feature_layer=STRIDE_16_LAYER
    )


def conclusion(tokens: dict[str, np.ndarray]) -> str:
    """A plain sentence on whether the kinds that must be read get more tokens than photos.

    Args:
        tokens: Visual tokens of every image, per kind.
    """
    photos, parts = tokens["photos"], []
    for kind in PAGES:
        difference = tokens[kind].mean() - photos.mean()
        half = 1.96 * np.hypot(_standard_error(tokens[kind]), _standard_error(photos))
        verdict = "about as many" if abs(difference) <= half else ("MORE" if difference > 0 else "FEWER")
        parts.append(
            f"{kind} get {verdict} tokens {'as' if verdict.startswith('about') else 'than'} photos "
            f"({tokens[kind].mean():.0f} against {photos.mean():.0f}; difference {difference:+.0f} +- {half:.0f})"
        )
    return "; ".join(parts) + "."


def study(
    model: AdaptiveLlavaForConditionalGeneration,
    sources: dict[str, ImageSource],
    *,
    target_mean: float,
    fit: str,
    rendered: int = 600,
    seed: int = 0,
) -> dict[str, Any]:
    """Calibrate on all kinds together, then report per kind. Changes the model's thresholds.

    Args:
        model: A `dfmr` model on the MobileNetV2 tower.
        sources: Images of each kind of `KINDS`.
        target_mean: Mean tokens to calibrate to.
        fit: How an image becomes a square; see `mobilenet_pixels`.
        rendered: Pictures to draw for the classifiers.
        seed: Seed of the split and the bootstrap.
    """
    size = model.config.vision_config.image_size
    pixel_statistic: list[np.ndarray] = []
    kinds: list[str] = []
    first: dict[str, Tensor] = {}

    def batches() -> Iterator[Tensor]:
        for kind, source in sources.items():
            for images in _batched(source, f"{fit}: {kind}"):
                pixels = mobilenet_pixels(images, image_size=size, fit=fit)
                first.setdefault(kind, pixels)
                pixel_statistic.append(_pixel_spread(pixels, size // model.config.vision_grid[0]))
                kinds.extend([kind] * len(images))
                yield pixels

    with pooled_states(model.model.vision_tower) as pooled:
        calibration = calibrate_thresholds(model, batches(), target_mean=target_mean, seed=seed)
    calibration.apply(model)
    rungs = rungs_at(calibration.spread, calibration.thresholds)
    with torch.no_grad():
        live = {kind: model.encode_images(pixels).rungs for kind, pixels in first.items()}

    masks = {kind: np.asarray(kinds) == kind for kind in sources}
    counts = np.asarray(calibration.counts)
    tokens = {kind: counts[rungs[mask]] for kind, mask in masks.items()}
    scores = {"router": calibration.spread.mean(axis=1), "pixels": np.concatenate(pixel_statistic)}
    agreeing = [list(live[kind]) == rungs[mask][: len(live[kind])].tolist() for kind, mask in masks.items()]
    return {
        "fit": fit,
        "thresholds": [_rounded(threshold, 5) for threshold in calibration.thresholds],
        **{key: calibration.provenance()[key] for key in ("num_images", "quantile", "held_out")},
        "within_target": calibration.within_target,
        "model_routes_as_calibrated": all(agreeing),
        "kinds": {
            kind: {
                "num_images": int(mask.sum()),
                "mean_tokens": _rounded(tokens[kind].mean(), 1),
                "interval": [
                    _rounded(tokens[kind].mean() + s * _standard_error(tokens[kind]), 1) for s in (-1.96, 1.96)
                ],
                "shares": {str(count): _rounded((tokens[kind] == count).mean(), 4) for count in calibration.counts},
                "router_score": _rounded(scores["router"][mask].mean(), 4),
                "pixel_score": _rounded(scores["pixels"][mask].mean(), 4),
            }
            for kind, mask in masks.items()
        },
        "auc": {
            f"{kind} > photos": {
                name: area_under_curve(score[masks[kind]], score[masks["photos"]], seed=seed)
                for name, score in scores.items()
            }
            for kind in PAGES
        },
        "classifier": compare_scores(
            np.asarray(kinds),
            {"DFMR": scores["router"], "pixels": scores["pixels"]},
            np.concatenate(pooled),
            rendered_inputs(model, rendered, image_size=size, fit=fit),
            pages=PAGES,
            counts=(calibration.counts[0], calibration.counts[-1]),
            target_mean=target_mean,
            seed=seed,
        ),
        "pairs_with_photos": {kind: _pairs(tokens[kind], tokens["photos"]) for kind in PAGES},
        "conclusion": conclusion(tokens),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Mean tokens and share of images per count, by kind, one row per way to make an image square; then all scores."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2 * len(result["fits"]) + 4), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=[3.2 * len(result["fits"]), 4])
    upper, lower = parts
    draw_scores(lower, result["fits"][FITS[0]]["classifier"])
    rows = upper.subplots(len(result["fits"]), 2, squeeze=False)
    for (left, right), found in zip(rows, result["fits"].values(), strict=True):
        kinds = found["kinds"]
        means = [kinds[kind]["mean_tokens"] for kind in kinds]
        error = [
            [abs(kinds[kind]["interval"][side] - kinds[kind]["mean_tokens"]) for kind in kinds] for side in (0, 1)
        ]
        left.bar(list(kinds), means, yerr=error, capsize=4, color="#7a9cc6")
        left.axhline(result["target_mean"], color="#c0392b", linewidth=1, linestyle="--")
        left.set(ylabel="mean visual tokens", title=f"{found['fit']}: mean with 95 % interval", ylim=(0, None))
        bottom = np.zeros(len(kinds))
        for count, colour in zip(result["counts"], ("#d5e1ee", "#7a9cc6", "#2c4a6e"), strict=True):
            shares = np.array([kinds[kind]["shares"][str(count)] for kind in kinds])
            right.bar(list(kinds), shares, bottom=bottom, color=colour, label=f"{count} tokens")
            bottom += shares
        right.set(ylabel="share of images", title="share of images per count", ylim=(0, 1))
        right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Tokens that DFMR's router gives to real images, by kind.")
    parser.add_argument("--data-root", type=Path, required=True, help=f"folder with the folders {', '.join(KINDS)}")
    parser.add_argument("--weights", type=Path, required=True, help="MobileNetV2 weights, *.npz")
    parser.add_argument("--target-mean", type=float, default=200, help="mean tokens to calibrate to (%(default)s)")
    parser.add_argument("--image-size", type=int, default=384, help="side of the square, in pixels (%(default)s)")
    parser.add_argument("--rendered", type=int, default=600, help="pictures drawn for classifiers (%(default)s)")
    parser.add_argument("--limit", type=int, help="images per kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder to write (%(default)s)")
    options = parser.parse_args(arguments)

    sources = {kind: open_images(options.data_root / kind, limit=options.limit) for kind in KINDS}
    model = mobilenet_dfmr(options.weights, image_size=options.image_size)
    chosen = {"target_mean": options.target_mean, "rendered": options.rendered, "seed": options.seed}
    fits = {fit: study(model, sources, fit=fit, **chosen) for fit in FITS}
    result = {
        "tower": "MobileNetV2 1.0, ImageNet, stride-16 map",
        "image_size": options.image_size,
        "grid": model.config.vision_grid,
        "counts": list(model.config.visual_token_counts),
        "target_mean": options.target_mean,
        "seed": options.seed,
        "fits": fits,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{NAME}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(result, options.output / f"{NAME}.png")
    for found in fits.values():
        _print(found, result["counts"])
    return 0


def _print(found: dict[str, Any], counts: Sequence[int]) -> None:
    held_out = found["held_out"]
    print(f"\n{found['fit']}: held-out mean {held_out['mean']:.1f}, standard error {held_out['standard_error']:.1f}")
    print(
        f"{'kind':<11}{'images':>7}{'tokens':>8}  {'95 % interval':<16}" + "".join(f"{count:>8}" for count in counts)
    )
    for kind, row in found["kinds"].items():
        low, high = row["interval"]
        shares = "".join(f"{share:>8.1%}" for share in row["shares"].values())
        print(f"{kind:<11}{row['num_images']:>7}{row['mean_tokens']:>8.1f}  {low:>6.1f} to {high:<6.1f}{shares}")
    for pair, by_score in found["auc"].items():
        print(f"AUC({pair}): " + ", ".join(f"{name} {value['auc']:.3f}" for name, value in by_score.items()))
    print(found["conclusion"])
    for name, row in found["classifier"]["scores"].items():
        areas = ", ".join(f"{pair} {value['auc']:.3f}" for pair, value in row["auc"].items())
        spent = ", ".join(f"{kind} {mean:.0f}" for kind, mean in row["mean_tokens"].items())
        print(f"{name} ({row['images']} images): AUC {areas}; tokens at equal mean: {spent}")


def _batched(source: ImageSource, what: str) -> Iterator[list]:
    from tqdm import tqdm

    images: list = []
    for _, image in tqdm(source, total=source.count, desc=what, unit="image"):
        images.append(image)
        if len(images) == _BATCH:
            yield images
            images = []
    if images:
        yield images


def _pixel_spread(pixels: Tensor, window: int) -> np.ndarray:
    # (V, 3, H * w, W * w) -> (V, 3, H, w, W, w); the pixels of one patch are one window
    windows = pixels.unflatten(3, (-1, window)).unflatten(2, (-1, window))
    return windows.std(dim=(3, 5), correction=0).mean(dim=(1, 2, 3)).numpy()


def _pairs(pages: np.ndarray, photos: np.ndarray) -> dict[str, float]:
    difference = pages[:, None] - photos[None]
    compared = {"more": difference > 0, "equal": difference == 0, "fewer": difference < 0}
    return {name: _rounded(pairs.mean(), 4) for name, pairs in compared.items()}


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5)


def _rounded(value: Any, digits: int) -> float:
    return round(float(value), digits)


if __name__ == "__main__":
    raise SystemExit(main())
