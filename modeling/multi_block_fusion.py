"""Patches of several vision-tower blocks fused into one, position by position.

Paper: Multi-Block Token Fusion of LLaVA-STF, https://arxiv.org/abs/2506.07138, section 3.2: two 1x1 convolutions over
the joined blocks, widths 8C -> 4C -> C for 8 blocks. Such a convolution is a linear layer on each patch.
Shapes: num_blocks x (V, height * width, dim) -> (V, height * width, dim)
At the start the fused features are the first block's own: gelu(x) - gelu(-x) = x passes it through.
Differs from the paper, as the authors' code does (`variant="released"`): no activation after the second layer, and the
first block is the selected layer, 23 of 24, where the paper has 24 (`vision_feature_layer=-1` gives the paper's list).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


VARIANTS = ("released", "paper")


class MultiBlockFusion(nn.Module):
    """Fuse hidden states of the vision tower, given by index, into features of the same width.

    Args:
        dim: Width of one hidden state.
        blocks: Indices of the hidden states (0 is the embedding output), in the order they are joined.
        variant: `"released"`: GELU between the layers, as in the authors' code and weights; `"paper"`: after both.

    Raises:
        ValueError: Unknown `variant`.
    """

    def __init__(self, dim: int, *, blocks: Sequence[int], variant: str = "released"):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"`fusion_variant={variant!r}` is unknown. Pass one of: {', '.join(VARIANTS)}.")
        self.blocks = tuple(blocks)
        self.variant = variant
        joined = len(self.blocks) * dim
        hidden = max(joined // 2, 2 * dim)  # the start needs two per channel; from four blocks on, half has them
        self.linear_1 = nn.Linear(joined, hidden)
        self.linear_2 = nn.Linear(hidden, dim)
        self.activation = nn.GELU()
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Start as the first block; the paper's last activation leaves no such start, so that variant starts anew."""
        if self.variant == "paper":
            return
        dim = self.linear_2.out_features
        for layer in (self.linear_1, self.linear_2):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_1.weight[: 2 * dim])
        for sign, rows in ((1.0, slice(0, dim)), (-1.0, slice(dim, 2 * dim))):
            self.linear_1.weight[rows, :dim].fill_diagonal_(sign)
            self.linear_2.weight[:, rows].fill_diagonal_(sign)

    def forward(self, states: Mapping[int, Tensor]) -> Tensor:
        """Fused patches.

        Args:
            states: Hidden states without prefix tokens by index, each `(V, height * width, dim)`.
        """
        joined = torch.cat([states[block] for block in self.blocks], dim=-1)
        fused = self.linear_2(self.activation(self.linear_1(joined)))
        return self.activation(fused) if self.variant == "paper" else fused


def block_index(block: int, num_layers: int) -> int:
    """Index of a hidden state counted from the embedding output, for one that may be counted from the end."""
    return block + num_layers + 1 if block < 0 else block


def default_fusion_blocks(num_layers: int, selected: int = -2) -> list[int]:
    """The blocks to fuse in a tower of `num_layers`: the selected layer, then every eighth part, deep to shallow.

    For layer -2 of 24 these are the authors' own: 23, 21, 18, 15, 12, 9, 6, 3.
    """
    eighths = [round(part * num_layers / 8) for part in range(7, 0, -1)]
    return list(dict.fromkeys([block_index(selected, num_layers), *(block for block in eighths if block > 0)]))


def check_fusion_blocks(blocks: Sequence[int], num_layers: int) -> list[int]:
    """The blocks as non-negative indices.

    Raises:
        ValueError: Not a non-empty list of distinct hidden states 0 to `num_layers`.
    """
    listed = isinstance(blocks, (list, tuple)) and len(blocks) > 0
    if not listed or any(isinstance(b, bool) or not isinstance(b, int) for b in blocks):
        raise ValueError(f"`fusion_blocks={blocks!r}` must be 'default' or a non-empty list of hidden-state indices.")
    counted = [block_index(block, num_layers) for block in blocks]
    if len(set(counted)) < len(counted) or any(not 0 <= block <= num_layers for block in counted):
        raise ValueError(
            f"`fusion_blocks={list(blocks)!r}` must be distinct hidden states of a tower with {num_layers} layers: 0 "
            f"to {num_layers}, or -1 to -{num_layers + 1} from the end."
        )
    return counted
