"""What a classifier router reads of many images, computed once and kept in a file.

The file is named after all that the values depend on: the tower's weights, the image processor and the router's
inputs. Inside, each row belongs to the digest of one decoded image. So another model gets another file, a changed
image is computed anew, and an image that lies in two places is known. The file is also written in the midst of a
source, each time that computing has taken 20 times as long as writing, so that a killed run loses little.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from adaptive_llava.modeling.router_classifier import ClassifierRouter
from adaptive_llava.training.image_source import ImageSource
from adaptive_llava.training.whole_folder import tell_what_is_not_written


_WRITING_SHARE = 0.05  # of the time, at most


@dataclass(frozen=True, eq=False)
class SourceInputs:
    """The images of one source, in its order.

    Attributes:
        names: Relative names.
        digests: sha256 of each decoded image, in hex.
        values: `(n, input_dim)` fp32.
    """

    names: list[str]
    digests: list[str]
    values: np.ndarray


def default_cache(kind: str = "router_inputs") -> Path:
    """Folder for the files of a kind if none is named: beside the Hub's own cache."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "adaptive_llava" / kind


class RouterInputs:
    """Reads images through a model's tower, or from the file where they were read before.

    Args:
        model: The inner model: it has `extract_features`.
        router: A classifier, whose `inputs` are wanted.
        processor: Makes pixels of images.
        cache: Folder of the file.
        batch_size: Images per step.
    """

    def __init__(
        self, model: nn.Module, router: ClassifierRouter, processor: Any, *, cache: Path, batch_size: int = 16
    ):
        self.model: Any = model
        self.router = router
        self.processor = processor
        self.batch_size = batch_size
        self.path = cache / f"{_fingerprint(self.model, router, processor)}.safetensors"
        self.computed = 0
        self._rows = _stored(self.path)
        self._next_store = 0.0  # as `time.monotonic` tells it

    def read(self, source: ImageSource, label: str) -> SourceInputs:
        """Inputs of all images of a source; new ones are computed and stored.

        Args:
            source: The images.
            label: What to call them on the progress bar.

        Raises:
            ValueError: An image cannot be read, or its features are not finite.
        """
        from tqdm import tqdm

        names, digests = [], []
        waiting: dict[str, Image.Image] = {}
        stored = self.computed
        for name, image in tqdm(source, total=source.count, desc=label, unit="image"):
            digest = hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
            names.append(name)
            digests.append(digest)
            if digest not in self._rows:
                waiting[digest] = image
            if len(waiting) == self.batch_size:
                self._compute(waiting)
                waiting = {}
                if time.monotonic() >= self._next_store:
                    self._store()
                    stored = self.computed
        if waiting:
            self._compute(waiting)
        if self.computed > stored:
            self._store()
        values = [self._rows[digest] for digest in digests]
        return SourceInputs(names, digests, np.stack(values) if values else np.zeros((0, self.router.input_dim)))

    @torch.no_grad()
    def _compute(self, images: dict[str, Image.Image]) -> None:
        pixels = self.processor(images=list(images.values()), return_tensors="pt")["pixel_values"]
        if self.model.config.tiling["type"] == "anyres":
            pixels = pixels[:, 0]  # the whole image, which its label is about: a tile of a page may be empty
        values = self.router.inputs(self.model.extract_features(pixels)).cpu().numpy()
        if not np.isfinite(values).all():
            raise ValueError("The vision tower's features are not finite for some images. Load the model in float32.")
        self._rows |= dict(zip(images, values, strict=True))
        self.computed += len(images)

    def _store(self) -> None:
        start = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".partial-{os.getpid()}")
        digests = np.array([list(bytes.fromhex(digest)) for digest in self._rows], dtype=np.uint8)
        try:
            with tell_what_is_not_written(self.path, self.path.parent):
                save_file({"digests": digests, "values": np.stack(list(self._rows.values()))}, partial)
                os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)
        end = time.monotonic()
        self._next_store = end + (end - start) / _WRITING_SHARE


def _stored(path: Path) -> dict[str, np.ndarray]:
    try:
        found = load_file(path)
        return {bytes(digest).hex(): row for digest, row in zip(found["digests"], found["values"], strict=True)}
    except (FileNotFoundError, SafetensorError, KeyError):  # none yet, or one that is cut short: compute anew
        return {}


def _fingerprint(model: Any, router: ClassifierRouter, processor: Any) -> str:
    settings = {
        "image_processor": processor.image_processor.to_dict(),
        "vision_config": model.config.vision_config.to_dict(),
        "vision_feature_layer": model.config.vision_feature_layer,
        "fusion": [model.config.fusion_blocks, model.config.fusion_variant],
        "tiling": model.config.tiling,
        "features": router.features,
        "blocks": router.blocks,
    }
    return fingerprint(settings, model.vision_tower, model.multi_block_fusion)


def fingerprint(settings: Mapping[str, Any], *parts: nn.Module | None) -> str:
    """A name for a file of values that depend on these settings and on the weights of these parts."""
    digest = hashlib.sha256()
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in _tensors(*parts):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _tensors(*parts: nn.Module | None) -> Iterator[tuple[str, torch.Tensor]]:
    for part in parts:
        if part is not None:
            yield from sorted(part.state_dict().items())
