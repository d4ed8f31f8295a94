"""What a calibration chose and measured, how it is put into a model, and its picture."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from torch import nn

from adaptive_llava.modeling.option_schema import option_names
from adaptive_llava.modeling.router_registry import ROUTERS


@dataclass(frozen=True, eq=False)
class Calibration:
    """Chosen thresholds, and what they do to images that were not used to choose them.

    Attributes:
        thresholds: One per token count but the largest, in units of the router's statistic.
        counts: Token counts the model can spend, fewest first.
        target_mean: Wanted mean, in tokens; with target shares, the mean that follows from them.
        target_shares: Wanted share of images per count, if those were given.
        quantile: Share of images that each threshold alone accepts, if a mean was given.
        mean: Mean tokens on the held-out images.
        standard_error: Of `mean`, in tokens.
        shares: Share of held-out images per count.
        num_images: Images in all.
        num_held_out: Images left out of the choice.
        seed: Seed of the split.
        spread: The router's statistic of every image, `(num_images, len(counts) - 1)`.
        data_name: Name of the images' folder or dataset.
        counted: What all numbers above are of: "images", or with AnyRes "views".
    """

    thresholds: tuple[float, ...]
    counts: tuple[int, ...]
    target_mean: float
    target_shares: tuple[float, ...] | None
    quantile: float | None
    mean: float
    standard_error: float
    shares: tuple[float, ...]
    num_images: int
    num_held_out: int
    seed: int
    spread: np.ndarray = field(repr=False)
    data_name: str | None = None
    counted: str = "images"

    @property
    def within_target(self) -> bool:
        """Whether the held-out mean is within 5 % or two standard errors of the target."""
        return abs(self.mean - self.target_mean) <= max(0.05 * self.target_mean, 2 * self.standard_error)

    def provenance(self) -> dict[str, Any]:
        """What `config.calibration` records."""
        return {
            "kind": "tokens",
            "data": self.data_name,
            "num_images": self.num_images,
            "counted": self.counted,
            "statistics_sha256": hashlib.sha256(np.ascontiguousarray(self.spread, dtype="<f4").tobytes()).hexdigest(),
            "counts": list(self.counts),
            "target_mean": self.target_mean,
            "target_shares": None if self.target_shares is None else list(self.target_shares),
            "quantile": self.quantile,
            "held_out": {
                "num_images": self.num_held_out,
                "mean": round(self.mean, 3),
                "standard_error": round(self.standard_error, 3),
                "shares": [round(share, 4) for share in self.shares],
            },
            "seed": self.seed,
            "date": datetime.now(UTC).date().isoformat(),
        }

    def apply(self, model: nn.Module, processor: Any = None) -> None:
        """Let the model route by these thresholds from now on; write them into its config and its processor's copy."""
        routed_model(model).router.thresholds = self.thresholds
        record_calibration(model, processor, self.provenance())

    def summary(self) -> str:
        """The held-out figures in a few lines."""
        each = "" if self.counted == "images" else " per view, the whole image and each tile being one"
        within = "is within" if self.within_target else "is NOT within"
        allowed = max(0.05 * self.target_mean, 2 * self.standard_error)
        thresholds = ", ".join(f"{threshold:.5g}" for threshold in self.thresholds)
        spent = ", ".join(f"{count}: {share:.1%}" for count, share in zip(self.counts, self.shares, strict=True))
        return (
            f"thresholds            {thresholds}\n"
            f"chosen on             {self.num_images - self.num_held_out} of {self.num_images} {self.counted}\n"
            f"held-out mean         {self.mean:.1f} tokens{each}, standard error {self.standard_error:.1f} "
            f"({self.num_held_out} {self.counted})\n"
            f"held-out distribution {spent}\n"
            f"The held-out mean {within} {allowed:.1f} tokens (5 % or 2 standard errors) of the target, "
            f"{self.target_mean:.1f}."
        )

    def save_histogram(self, path: str | os.PathLike) -> None:
        """Draw the statistic of all images with the thresholds, one panel per threshold, as a PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        panels = len(self.thresholds)
        figure = Figure(figsize=(4.5 * panels, 3.2), layout="constrained")
        FigureCanvasAgg(figure)
        for index, axes in enumerate(np.atleast_1d(figure.subplots(1, panels))):
            axes.hist(self.spread[:, index], bins=40, color="#7a9cc6")
            axes.axvline(self.thresholds[index], color="#c0392b")
            axes.set(xlabel=f"statistic for {self.counts[index]} tokens", ylabel=self.counted)
            axes.set_title(f"at most {self.thresholds[index]:.4g}: {self.counts[index]} tokens", fontsize=10)
        figure.savefig(path, dpi=110)


def inner_model(model: nn.Module) -> Any:
    """The part of a model that has the vision tower and the router, under any head or adapter.

    Raises:
        ValueError: There is no router.
    """
    found = (part for part in model.modules() if hasattr(part, "extract_features") and hasattr(part, "router"))
    inner = next(found, None)
    if inner is None:
        raise ValueError(f"`model` is a {type(model).__name__}, which has no router. Pass an adaptive LLaVA model.")
    return inner


def routed_model(model: nn.Module) -> Any:
    """The same, if its router cuts a statistic at thresholds.

    Raises:
        ValueError: No router, or one without thresholds; the routers that have some are named.
    """
    inner = inner_model(model)
    router: Any = inner.router
    if not hasattr(router, "window_spread") or not router.thresholds:
        known = sorted(name for name, router_class in ROUTERS.items() if "thresholds" in option_names(router_class))
        raise ValueError(
            f"The model's router of type {router.type_name!r} has no thresholds to calibrate. Routers that have, on a "
            f"compressor with several token counts: {', '.join(known)}."
        )
    return inner


def record_calibration(model: nn.Module, processor: Any, record: Mapping[str, Any]) -> None:
    """Write the options that a model's router now has, and their provenance, into its config and its processor."""
    inner = inner_model(model)
    owners: list[Any] = [
        module.config for module in (model, inner) if hasattr(getattr(module, "config", None), "router")
    ]
    for config in owners:
        config.router = dict(inner.router.options)
        config.calibration = dict(record)
    if processor is not None:
        processor.router = dict(owners[0].router)


def calibration_text(record: Mapping[str, Any]) -> str:
    """What `config.calibration` says, in sentences for a model card."""
    if record.get("kind") != "accuracy":
        held_out = record["held_out"]
        return (
            f"The router's thresholds were set for a mean of {record['target_mean']:g} tokens on "
            f"{record['num_images']} {record['counted']} of `{record['data']}`. Left out of the choice, "
            f"{held_out['num_images']} of them have a mean of {held_out['mean']:.1f} tokens (standard error "
            f"{held_out['standard_error']:.1f})."
        )
    tokens, score, confidence = record["mean_tokens"], record["score"], 100 * record["confidence"]
    return (
        f"Certified with {confidence:g} % confidence: on images drawn like those of `{record['data']}`, routing "
        f"lowers the mean `{record['metric']}` by at most {record['bound']:.4g} against always spending "
        f"{tokens['full']:g} tokens (Learn then Test over {record['num_settings']} settings of the router). On "
        f"n = {record['num_tested']} images that had no part in placing these settings, {tokens['chosen']:.1f} tokens "
        f"on average gave {score['chosen']:.4f}, and {tokens['full']:g} gave {score['full']:.4f}. Data (sha256): "
        f"`{record['data_sha256']}`."
    )
