"""A pretrained convolutional vision tower: ImageNet's MobileNetV2 1.0 as transformers' `MobileNetV2Model`.

Reads weights whose batch norm is already folded into the convolutions: an `.npz` with `00.w, 00.b, 01.w, ...` in
execution order. The batch norms of the model become the identity plus that bias.
Paper: MobileNetV2, https://arxiv.org/abs/1801.04381.
Shapes: (V, 3, S, S) in [-1, 1] -> hidden state 11 `(V, 96, S / 16, S / 16)`: 24 x 24 at 384 pixels, LLaVA-1.5's grid.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import MobileNetV2Config, MobileNetV2Model


STRIDE_16_LAYER = 11  # the last hidden state before the map shrinks to stride 32
PAD_COLOUR = (127, 127, 127)  # grey, 0 after normalisation, as LLaVA pads with the tower's mean


def load_mobilenet_tower(weights: str | os.PathLike, *, image_size: int = 384) -> MobileNetV2Model:
    """The tower with its weights, in evaluation mode.

    Args:
        weights: The `.npz` file.
        image_size: Side of the images it will see, in pixels, a multiple of 32.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file holds other convolutions than MobileNetV2 1.0, or `image_size` is no multiple of 32.
    """
    if image_size < 32 or image_size % 32:
        raise ValueError(f"`image_size={image_size}` must be a multiple of 32 pixels, the tower's largest stride.")
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"`weights={path}`: there is no such file.")
    model = MobileNetV2Model(
        MobileNetV2Config(image_size=image_size, tf_padding=True, hidden_act="relu6", layer_norm_eps=1e-12)
    ).eval()
    layers = [module for module in model.modules() if hasattr(module, "convolution")]
    with np.load(path) as arrays, torch.no_grad():
        for index, layer in enumerate(layers):
            _fill(layer, arrays, f"{index:02d}", path)
    return model


def _fill(layer: Any, arrays: np.lib.npyio.NpzFile, key: str, path: Path) -> None:
    convolution, norm = layer.convolution, layer.normalization
    if f"{key}.w" not in arrays or arrays[f"{key}.w"].shape != tuple(convolution.weight.shape):
        found = arrays[f"{key}.w"].shape if f"{key}.w" in arrays else "nothing"
        raise ValueError(f"{path} has {found} as '{key}.w', MobileNetV2 1.0 needs {tuple(convolution.weight.shape)}.")
    convolution.weight.copy_(torch.from_numpy(arrays[f"{key}.w"].astype(np.float32)))
    norm.bias.copy_(torch.from_numpy(arrays[f"{key}.b"].astype(np.float32)))
    norm.weight.fill_(1.0)
    norm.running_mean.zero_()
    norm.running_var.fill_(1.0)  # the config's eps is below fp32's resolution at 1


def mobilenet_pixels(images: Sequence[Image.Image], *, image_size: int = 384, fit: str = "pad") -> Tensor:
    """RGB images as the tower takes them, `(V, 3, image_size, image_size)` in [-1, 1].

    Args:
        images: Images of any size.
        image_size: Side of the result, in pixels.
        fit: `"pad"`: scaled to fit and centred on a grey square, proportions kept; `"stretch"`: to the square.

    Raises:
        ValueError: Unknown `fit`.
    """
    if fit not in ("pad", "stretch"):
        raise ValueError(f"`fit={fit!r}` is unknown. Pass 'pad' or 'stretch'.")
    squares = []
    for image in images:
        width, height = image.size
        scale = image_size / max(width, height)
        target = (max(1, round(width * scale)), max(1, round(height * scale))) if fit == "pad" else (image_size,) * 2
        square = Image.new("RGB", (image_size, image_size), PAD_COLOUR)
        resized = image.convert("RGB").resize(target, Image.Resampling.BILINEAR)
        square.paste(resized, ((image_size - target[0]) // 2, (image_size - target[1]) // 2))
        squares.append(np.asarray(square, dtype=np.float32))
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous() / 127.5 - 1.0
