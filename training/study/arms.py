"""The models of one seed: a base that sees every token, and arms that go on from its weights.

Arms that see several counts train for equal steps, and so do those that see one, for more: they are to be converged.

| arm | compressor | rungs in training |
|---|---|---|
| `pool`, `resampler`, `mini` | pooling; query resampler; the same with LLaVA-Mini's pre-fusion | random |
| `pool joint`, `resampler joint` | as above | every one, jointly with a classifier router |
| `pool dfmr` | pooling | those that DFMR's rule picks at the target mean |
| `pool fixed N`, `resampler fixed N` | as above, N the fewest and the most | that one |
| `fusion` | spatial token fusion on multi-block fusion, 2 x 2 windows: one count | that one |

All policies are compared on the same weights: those of one elastic arm. An arm leaves a file of evidence behind
(`answers`, and what the routers read and say), from which everything else is computed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from adaptive_llava.modeling.router_classifier import ClassifierRouter
from adaptive_llava.modeling.router_feature_std import FeatureStdRouter
from adaptive_llava.modeling.router_pixel_std import PixelStdRouter
from adaptive_llava.training.image_source import open_images
from adaptive_llava.training.router_fit import fit_router, split_images
from adaptive_llava.training.study.appearance import told_apart
from adaptive_llava.training.study.families import FAMILIES, PAIRS, SINGLE, Picture, render
from adaptive_llava.training.study.settings import Settings
from adaptive_llava.training.study.small_model import (
    Rungs,
    answers,
    build_model,
    fixed_rung,
    random_rungs,
    take_weights,
    train,
)
from adaptive_llava.training.threshold_search import thresholds_for_mean
from adaptive_llava.training.tiny_model import pixels_of


ANSWERED = ("calibration", "test")
CLASSIFIERS = ("classifier", "classifier_cls", "untrained_tower", "joint")

_REAL_IMAGES = 120  # of a kind, at most
_QUESTIONS_OF_A_LABEL = 3
_RETUNED_EVERY = 100  # steps after which DFMR's thresholds follow the features
_RETUNED_ON = 280  # pictures
# Sets that share no random numbers, apart from each other by the seeds of the study.
_TRAINING, _ROUTER, _CALIBRATION, _TEST = 10_000, 20_000, 30_000, 40_000


@dataclass(frozen=True)
class Arm:
    """One model of a seed.

    Args:
        name: As in the table above.
        fields: Config fields.
        rungs: `"random"`, `"joint"`, `"dfmr"`, or the rung that all get.
    """

    name: str
    fields: dict[str, Any] = field(hash=False)
    rungs: str | int


def arms_of(settings: Settings) -> list[Arm]:
    """All arms, in the order in which they are trained."""
    pool = {"compressor": {"type": "average_pool", "factors": list(settings.factors)}}
    resampler = {"compressor": {"type": "query_resampler", "counts": list(settings.counts)}}
    fusion = {
        "compressor": {"type": "spatial_fusion", "window": 2},
        "fusion_blocks": list(range(settings.vision_layers)),
    }
    tokens = pool_counts(settings)
    return [
        Arm("pool", pool, "random"),
        Arm("resampler", resampler, "random"),
        Arm("pool joint", pool, "joint"),
        Arm("resampler joint", resampler, "joint"),
        Arm("mini", {**resampler, "prefusion_layers": 1}, "random"),
        Arm("pool dfmr", pool, "dfmr"),
        *(Arm(f"pool fixed {tokens[rung]}", pool, rung) for rung in (0, len(tokens) - 1)),
        *(Arm(f"resampler fixed {settings.counts[rung]}", resampler, rung) for rung in (0, len(settings.counts) - 1)),
        Arm("fusion", fusion, 0),
    ]


def pool_counts(settings: Settings) -> list[int]:
    """Tokens of the pooling arms, fewest first."""
    return sorted((settings.grid // factor) ** 2 for factor in settings.factors)


@functools.cache
def real_images(folder: str) -> tuple[list[str], list[Image.Image]]:
    """Kinds and images of a folder that has a folder of images per kind."""
    kinds, images = [], []
    for kind in sorted(path.name for path in Path(folder).iterdir() if path.is_dir()):
        found = [image for _, image in open_images(Path(folder) / kind, limit=_REAL_IMAGES)]
        kinds += [kind] * len(found)
        images += found
    return kinds, images


def _splits(settings: Settings) -> tuple[str, ...]:
    """Images that the routers are asked about."""
    real = settings.real_images is not None and Path(settings.real_images).is_dir()
    return (*ANSWERED, "real") if real else ANSWERED


@functools.lru_cache(maxsize=4)  # the four splits of a seed
def pictures_of(settings: Settings, split: str, seed: int) -> list[Picture]:
    """The pictures of a split; those of the test in fonts and rulings of their own."""
    number, offset = {
        "training": (settings.training_pictures, _TRAINING),
        "router": (settings.router_pictures, _ROUTER),
        "calibration": (settings.calibration_pictures, _CALIBRATION),
        "test": (settings.test_pictures, _TEST),
    }[split]
    # where each picture has only one thing to ask about, it takes more of them to learn it
    families = [*FAMILIES, *SINGLE, *SINGLE] if split == "training" else None
    return render(number, seed=offset + seed, layout=settings.layout, test=split == "test", families=families)


def new_model(settings: Settings, seed: int, fields: dict[str, Any]) -> tuple[Any, Any]:
    """An untrained model with these config fields."""
    router = {"type": "classifier", "features": "mean"}
    model, processor = build_model(seed, settings.layout, settings.shape, router=router, **fields)
    return model.to(settings.device), processor


def train_base(settings: Settings, seed: int, folder: Path, deadline: float) -> None:
    """Train the base of a seed; its weights are `base.pt` in its folder."""
    model, processor = new_model(settings, seed, arms_of(settings)[0].fields)
    train(
        model,
        processor,
        pictures_of(settings, "training", seed),
        steps=settings.base_steps,
        seed=seed,
        rungs=fixed_rung(len(settings.factors) - 1),
        learning_rate=settings.base_learning_rate,
        batch_size=settings.batch_size,
        unlearned_first=True,
        checkpoint=folder / "base.checkpoint",
        deadline=deadline,
    )
    _save_weights(model, folder / "base.pt")


def train_arm(settings: Settings, seed: int, arm: Arm, folder: Path, deadline: float) -> None:
    """Train an arm from the base's weights; its evidence is `<arm>.npz`, its weights `<arm>.pt`, in the folder."""
    model, processor = new_model(settings, seed, arm.fields)
    take_weights(model, torch.load(folder / "base.pt", weights_only=True))
    test = pictures_of(settings, "test", seed)
    evidence: dict[str, np.ndarray] = {}

    def watch(step: int) -> None:
        if isinstance(arm.rungs, int) and step in settings.marks:
            model.eval()
            evidence[f"right_after_{step}"] = answers(model, processor, test, seed=seed, rungs=[arm.rungs])[:, 0]
            model.train()

    steps = settings.separate_steps if isinstance(arm.rungs, int) else settings.arm_steps
    if arm.rungs == "joint":
        steps = max(2, steps // model.model.compressor.num_rungs)
    train(
        model,
        processor,
        pictures_of(settings, "training", seed),
        steps=steps,
        seed=1000 + seed,
        rungs=_rungs(settings, seed, arm, model, processor),
        learning_rate=settings.arm_learning_rate,
        batch_size=settings.batch_size,
        watch=watch,
        checkpoint=folder / f"{arm.name}.checkpoint",
        deadline=deadline,
    )
    for split in ANSWERED:
        evidence[f"right_{split}"] = answers(model, processor, pictures_of(settings, split, seed), seed=seed)
    if arm.rungs == "joint":
        for split in _splits(settings):
            evidence[f"joint_{split}"] = _router_says(
                model.model.router, _read(settings, model, processor, seed, split)
            )
    if arm.rungs == "dfmr":
        evidence |= _statistics(settings, seed, model, processor)
    if arm.rungs == "random":
        evidence |= _statistics(settings, seed, model, processor)
        evidence |= _classifiers(settings, seed, model, processor, arm)
    _save_weights(model, folder / f"{arm.name}.pt")
    if "real" in _splits(settings):
        evidence["kinds_real"] = np.array(real_images(settings.real_images)[0])
    partial = folder / f"{arm.name}.partial.npz"
    np.savez_compressed(partial, **cast(dict[str, Any], evidence))
    os.replace(partial, folder / f"{arm.name}.npz")


def window_sides(settings: Settings, counts: tuple[int, ...]) -> list[int]:
    """Side of the window that becomes one token, for every count but the largest, in patches."""
    return [settings.grid // round(count**0.5) for count in counts[:-1]]


def _rungs(settings: Settings, seed: int, arm: Arm, model: Any, processor: Any) -> Rungs | None:
    if arm.rungs == "joint":
        return None
    if arm.rungs == "random":
        return random_rungs
    if isinstance(arm.rungs, int):
        return fixed_rung(arm.rungs)
    sample = pictures_of(settings, "calibration", seed)[:_RETUNED_ON]
    pixels = pixels_of(processor, [picture.pixels for picture in sample]).to(model.device)
    counts = model.config.visual_token_counts
    router = FeatureStdRouter(settings.width, model.model.compressor, windows=window_sides(settings, counts))
    calls = 0
    thresholds: list[float] = []

    @torch.no_grad()
    def by_dfmr(model: Any, images: torch.Tensor, rng: np.random.Generator) -> list[int]:
        nonlocal calls, thresholds
        if calls % _RETUNED_EVERY == 0:
            spread = router.window_spread(model.model.extract_features(pixels)).cpu().numpy()
            thresholds, _ = thresholds_for_mean(spread, counts, settings.target_mean)
            router.thresholds = tuple(thresholds)
        calls += 1
        return router(model.model.extract_features(images)).rungs.tolist()

    return by_dfmr


def _classifiers(settings: Settings, seed: int, model: Any, processor: Any, arm: Arm) -> dict[str, np.ndarray]:
    """What classifiers say about the images of both splits, trained on this arm's cheapest right counts."""
    labels = cheapest_right_rungs(settings, seed, model, processor)
    untrained, _ = new_model(settings, seed + 500, arm.fields)
    towers = {"classifier": (model, "mean"), "classifier_cls": (model, "cls"), "untrained_tower": (untrained, "mean")}
    found = {"told_apart": _told_apart(settings, seed, untrained, processor)}
    for name, (reader, features) in towers.items():
        router = ClassifierRouter(settings.width, model.model.compressor, features=features)
        train_classifier(router, settings, seed, reader, processor, labels)
        for split in _splits(settings):
            found[f"{name}_{split}"] = _router_says(router, _read(settings, reader, processor, seed, split))
    return found


def _told_apart(settings: Settings, seed: int, untrained: Any, processor: Any) -> np.ndarray:
    """How well a linear probe on an untrained tower tells the families of each of `PAIRS` apart, `(P,)`."""
    read = {split: _read(settings, untrained, processor, seed, split)["mean"] for split in ("router", "test")}
    families = {split: np.array([p.family for p in pictures_of(settings, split, seed)]) for split in read}
    return np.array(
        [told_apart(read["router"], families["router"], read["test"], families["test"], pair) for pair in PAIRS]
    )


def cheapest_right_rungs(settings: Settings, seed: int, model: Any, processor: Any) -> np.ndarray:
    """Of the rungs that answer most of a router picture's questions, the lowest, `(N,)`."""
    pictures = pictures_of(settings, "router", seed)
    turns = range(_QUESTIONS_OF_A_LABEL)
    return np.mean([answers(model, processor, pictures, seed=seed + 100 * turn) for turn in turns], axis=0).argmax(1)


def train_classifier(
    router: ClassifierRouter, settings: Settings, seed: int, reader: Any, processor: Any, labels: np.ndarray
) -> None:
    """Train a classifier in place, on what it reads of the router pictures through a model's tower."""
    values = _read(settings, reader, processor, seed, "router")[router.features]
    parts = split_images(labels, validation=0.2, holdout=0.0, seed=seed)
    train, stop = parts["train"], parts["validation"]
    fit_router(router, values[train], labels[train], values[stop], labels[stop], balanced=False, seed=seed)


def _statistics(settings: Settings, seed: int, model: Any, processor: Any) -> dict[str, np.ndarray]:
    """What DFMR's rule cuts, of features and of pixels, for the images of both splits."""
    found: dict[str, np.ndarray] = {}
    for split in _splits(settings):
        read = _read(settings, model, processor, seed, split)
        found |= {f"dfmr_{split}": read["feature_spread"], f"pixel_{split}": read["pixel_spread"]}
    return found


@torch.no_grad()
def _router_says(router: ClassifierRouter, read: dict[str, np.ndarray]) -> np.ndarray:
    """Log-probability of each rung, `(N, R)`."""
    values = torch.from_numpy(read[router.features]).to(router.linear_1.weight.device)
    return router.logits(values).log_softmax(-1).cpu().numpy()


@torch.no_grad()
def _read(settings: Settings, model: Any, processor: Any, seed: int, split: str) -> dict[str, np.ndarray]:
    """What routers read of a split's images: mean and [CLS] of the features, and both statistics of DFMR's rule."""
    compressor = model.model.compressor
    counts = model.config.visual_token_counts
    windows = window_sides(settings, counts)
    readers = {name: ClassifierRouter(settings.width, compressor, features=name) for name in ("mean", "cls")}
    spreads = {
        "feature_spread": FeatureStdRouter(settings.width, compressor, windows=windows),
        "pixel_spread": PixelStdRouter(settings.width, compressor, windows=windows),
    }
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*readers, *spreads)}
    for pixels in _pixels(settings, processor, seed, split):
        features = model.model.extract_features(pixels.to(model.device))
        for name, reader in readers.items():
            parts[name].append(reader.inputs(features).cpu().numpy())
        for name, router in spreads.items():
            parts[name].append(router.window_spread(features).cpu().numpy())
    return {name: np.concatenate(values) for name, values in parts.items()}


def _pixels(settings: Settings, processor: Any, seed: int, split: str) -> Iterator[torch.Tensor]:
    """A split's images, a hundred at a time."""
    if split == "real":
        _, images = real_images(settings.real_images)
        for start in range(0, len(images), 100):
            yield processor(images=images[start : start + 100], return_tensors="pt")["pixel_values"]
        return
    pictures = pictures_of(settings, split, seed)
    for start in range(0, len(pictures), 100):
        yield pixels_of(processor, [picture.pixels for picture in pictures[start : start + 100]])


def _save_weights(model: Any, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(model.state_dict(), partial)
    os.replace(partial, path)
