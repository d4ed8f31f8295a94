"""Sine-cosine positions in two dimensions, at any coordinates.

Paper: the 2-D form of https://arxiv.org/abs/1706.03762, section 3.5, laid out as in MAE's and LLaVA-Mini's code.
Shapes: rows (H), columns (W) -> (H * W, dim), row-major
The first half of the channels tells the column, the second the row; each half holds `dim / 4` sines, then as many
cosines, of waves from 1 radian per patch down to nearly 1/10000.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor


Wave = TypeVar("Wave", float, Tensor)


def wave_frequency(wave: Wave, dim: int) -> Wave:
    """Frequency of waves 0, 1, ... `dim / 4 - 1`, falling, in radians per patch."""
    return 10000.0 ** (-wave / (dim // 4))


def sincos_positions(rows: Tensor, columns: Tensor, dim: int, *, spread: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Positions of every row and column pair, `(H * W, dim)`, always fp32.

    Args:
        rows: Vertical coordinates, `(H,)`, in patches; whole numbers are the centres of patches.
        columns: Horizontal coordinates, `(W,)`, in patches.
        dim: Width of a position, divisible by 4.
        spread: Standard deviation of a place that is not a point, vertical and horizontal, in patches. Its position is
            the mean over a normal distribution: waves shorter than the place fade, `exp(-(frequency * spread)^2 / 2)`
            of them is left. `inf` leaves nothing.
    """
    down, across = _waves(rows, dim, spread[0]), _waves(columns, dim, spread[1])
    shape = (len(rows), len(columns), dim // 2)
    return torch.cat([across.expand(shape), down.unsqueeze(1).expand(shape)], dim=-1).flatten(0, 1)


def enlarged_positions(table: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """A table for `side x side` places resized to a patch grid, bicubically as LLaVA-Mini does: `(H * W, dim)`.

    Args:
        table: `(side * side, dim)`.
        side: Places per side of the table.
        grid: Patches per side, `(height, width)`.
    """
    if grid == (side, side):
        return table
    picture = table.unflatten(0, (1, side, side)).permute(0, 3, 1, 2)
    return F.interpolate(picture, size=grid, mode="bicubic", align_corners=False).flatten(2)[0].T


def _waves(coordinates: Tensor, dim: int, spread: float) -> Tensor:
    """One axis: sines, then cosines, `(len(coordinates), dim / 2)`."""
    waves = torch.arange(dim // 4, dtype=torch.float32, device=coordinates.device)
    frequencies = wave_frequency(waves, dim)
    angles = coordinates.float().unsqueeze(1) * frequencies
    left = torch.exp(-0.5 * (frequencies * spread).square())
    return torch.cat([angles.sin() * left, angles.cos() * left], dim=-1)
