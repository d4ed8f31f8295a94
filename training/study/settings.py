"""What a run of the study is made of, read from a YAML file: `cpu.yaml` or `accelerator.yaml`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_llava.training.study.drawing import Layout
from adaptive_llava.training.tiny_model import Shape


@dataclass(frozen=True)
class Settings:
    """A run of the study.

    Args:
        name: Of the results.
        seeds: One repetition each: weights, pictures and their order.
        grid: Cells per side of a picture.
        cell: Pixels per side of a cell, and of a patch.
        width: Hidden size of tower and language model.
        heads: Attention heads of both.
        vision_layers: Layers of the tower.
        text_layers: Layers of the language model.
        factors: Pooling factors.
        counts: Tokens of the query resampler.
        training_pictures: Pictures to train on, of all families.
        router_pictures: Pictures whose cheapest right count the classifier learns.
        calibration_pictures: Pictures on which families are admitted, and policies set to the target.
        test_pictures: Pictures of every result, in fonts and rulings of their own.
        batch_size: Pictures per step.
        base_steps: Steps at the largest count, before any compressor is trained.
        base_learning_rate: Their peak.
        arm_steps: Further steps of an arm that sees several counts. Joint training has fewer: each of its steps sees
            every count.
        separate_steps: Further steps of an arm that sees one count.
        arm_learning_rate: Peak of both.
        marks: Steps at which separately trained arms are tested.
        target_mean: Tokens per picture that policies are set to spend.
        admitted_from: Accuracy at the largest count that admits a family.
        told_apart_up_to: Share of the pictures of two families that look alike for which a linear probe on an
            untrained tower may name the right one; if it names more, both are left out.
        minimum_effect: Smallest gain in macro accuracy that is called one.
        draws: Of the bootstrap.
        device: `"cpu"` or `"cuda"`.
        real_images: Folder with a folder of images per kind, relative to where the command runs. The routers are asked
            about them too; nothing is answered, and a folder that is not there is left out.
    """

    name: str
    seeds: tuple[int, ...]
    grid: int
    cell: int
    width: int
    heads: int
    vision_layers: int
    text_layers: int
    factors: tuple[int, ...]
    counts: tuple[int, ...]
    training_pictures: int
    router_pictures: int
    calibration_pictures: int
    test_pictures: int
    batch_size: int
    base_steps: int
    base_learning_rate: float
    arm_steps: int
    separate_steps: int
    arm_learning_rate: float
    marks: tuple[int, ...]
    target_mean: float
    admitted_from: float
    told_apart_up_to: float
    minimum_effect: float
    draws: int
    device: str = "cpu"
    real_images: str | None = None

    @property
    def layout(self) -> Layout:
        return Layout(self.grid, self.cell)

    @property
    def shape(self) -> Shape:
        return Shape(
            image_size=self.layout.size,
            patch_size=self.cell,
            width=self.width,
            heads=self.heads,
            vision_layers=self.vision_layers,
            text_layers=self.text_layers,
        )

    def scaled(self, scale: float) -> Settings:
        """The same run with fewer steps and pictures, to try it out."""
        numbers = {
            field: max(36, round(getattr(self, field) * scale))
            for field in ("training_pictures", "router_pictures", "calibration_pictures", "test_pictures")
        }
        steps = {
            field: max(2, round(getattr(self, field) * scale))
            for field in ("base_steps", "arm_steps", "separate_steps")
        }
        marks = tuple(sorted({max(1, round(mark * scale)) for mark in self.marks}))
        changed: dict[str, Any] = {**numbers, **steps, "marks": marks}
        return dataclasses.replace(self, **changed)


def read_settings(path: str | Path) -> Settings:
    """Settings from a YAML file.

    Raises:
        ValueError: A field that does not exist, or one that is missing.
    """
    import yaml

    read: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    unknown, missing = sorted(set(read) - set(fields)), sorted(required - set(read))
    if unknown or missing:
        raise ValueError(
            f"`config={str(path)!r}` has unknown fields {unknown} and lacks {missing}. Its fields are those of "
            "`adaptive_llava.training.study.settings.Settings`."
        )
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in read.items()}
    return Settings(**values)
