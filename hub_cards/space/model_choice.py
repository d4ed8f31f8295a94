"""Which model the demo runs: one that is named, or the small one that comes with the package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from PIL import Image

from adaptive_llava import AdaptiveLlavaForConditionalGeneration, AdaptiveLlavaProcessor


# One test picture and one question of each; all in the words that the small model knows.
_EXAMPLES = {
    "chart": "which height at bar2",
    "scene": "which colour",
    "mosaic": "which colour at square-1-1",
    "big_digit": "which digit",
}


def chosen_model(argument: str | None, environment: Mapping[str, str], card: Path) -> str | None:
    """Hub id or folder of the model; `None` for the one that comes with the package.

    Args:
        argument: What the command line says; it comes first.
        environment: Variables, of which `MODEL` comes second.
        card: README.md of the Space; the first of its `models` comes last.
    """
    named = argument or environment.get("MODEL")
    if named:
        return named
    metadata = (metadata_load(card) if card.is_file() else None) or {}
    return next(iter(metadata.get("models") or ()), None)


def load(name: str | None) -> tuple[Any, Any]:
    """A model, ready to answer, and its processor; no code of a repository is run.

    Args:
        name: Hub id or folder; `None` for the model that comes with the package.
    """
    source = str(shipped_folder()) if name is None else name
    model = AdaptiveLlavaForConditionalGeneration.from_pretrained(source, dtype="auto")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), AdaptiveLlavaProcessor.from_pretrained(source)


def shipped_folder() -> Path:
    """Folder of the model that comes with the package."""
    return Path(os.fspath(files("adaptive_llava.training.study") / "checkpoint"))  # type: ignore[call-overload]


def example_pictures() -> list[tuple[Image.Image, str]]:
    """Pictures that the small model has not seen in training, each with a question it can read."""
    from adaptive_llava.training.study.families import render

    pictures = render(len(_EXAMPLES), seed=11, test=True, families=list(_EXAMPLES))
    return [(picture.image, _EXAMPLES[picture.family]) for picture in pictures]
