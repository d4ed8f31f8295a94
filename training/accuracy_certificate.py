"""What a calibration to accuracy certified, and how it is put into a model."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from torch import nn

from adaptive_llava.training.calibration_record import calibration_text, inner_model, record_calibration
from adaptive_llava.training.threshold_family import Setting, threshold_family


@dataclass(frozen=True)
class Certificate:
    """A router's setting, and the bound on what it costs.

    Attributes:
        setting: Numbers of the setting, as its family names them.
        family: Name of what these numbers are.
        counts: Token counts the model can spend, fewest first.
        metric: What is bounded: the mean over images of this score, 0 to 1.
        max_drop: Largest mean drop that was to be accepted, against the largest count.
        confidence: Probability with which the bound holds for images drawn like these.
        bound: Upper confidence bound on the mean drop; at most `max_drop`. See `learn_then_test.Verdict`.
        drop: Mean drop on the tested images.
        scores: Mean score of the tested images at the largest count, and at the counts chosen.
        mean_tokens: Mean tokens of the tested images, then and now.
        num_tested: Images that were tested.
        num_images: All images; the others placed the settings.
        num_questions: Questions about all of them.
        num_settings: Settings in the sequence.
        seed: Seed of the split.
        data_name: Name of the data.
        data_sha256: Of images, questions and answers.
    """

    setting: Setting
    family: str
    counts: tuple[int, ...]
    metric: str
    max_drop: float
    confidence: float
    bound: float
    drop: float
    scores: tuple[float, float]
    mean_tokens: tuple[float, float]
    num_tested: int
    num_images: int
    num_questions: int
    num_settings: int
    seed: int
    data_name: str | None
    data_sha256: str | None

    def provenance(self) -> dict[str, Any]:
        """What `config.calibration` records."""
        return {
            "kind": "accuracy",
            "metric": self.metric,
            "data": self.data_name,
            "data_sha256": self.data_sha256,
            "num_images": self.num_images,
            "num_questions": self.num_questions,
            "num_tested": self.num_tested,
            "num_settings": self.num_settings,
            "max_drop": self.max_drop,
            "confidence": self.confidence,
            "bound": round(self.bound, 6),
            "drop": round(self.drop, 6),
            "score": {"full": round(self.scores[0], 6), "chosen": round(self.scores[1], 6)},
            "mean_tokens": {"full": round(self.mean_tokens[0], 3), "chosen": round(self.mean_tokens[1], 3)},
            "counts": list(self.counts),
            "setting": {"of": self.family, "values": list(self.setting)},
            "seed": self.seed,
            "date": datetime.now(UTC).date().isoformat(),
        }

    def apply(self, model: nn.Module, processor: Any = None) -> None:
        """Let the model route by this setting from now on; write it into its config and its processor's copy."""
        inner = inner_model(model)
        threshold_family(inner.router, self.counts).put_into(inner.router, self.setting)
        record_calibration(model, processor, self.provenance())

    def summary(self) -> str:
        """The figures in a few lines."""
        full, chosen = self.mean_tokens
        values = ", ".join(f"{value:.5g}" for value in self.setting)
        return (
            f"{self.family + ' ':<22}{values}\n"
            f"mean tokens saved     {full - chosen:.1f} of {full:.1f} ({(full - chosen) / full:.1%})\n"
            f"mean drop of {self.metric:<9}{self.drop:+.4f} (from {self.scores[0]:.4f} to {self.scores[1]:.4f})\n"
            f"bound on the drop     {self.bound:.4f}, with {100 * self.confidence:g} % confidence\n"
            f"n                     {self.num_tested} images, besides {self.num_images - self.num_tested} that placed "
            f"{self.num_settings} settings\n"
            f"{calibration_text(self.provenance())}"
        )
