"""The interface of a compressor: how visual tokens are made from an image's features."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .option_schema import resolved_options
from .visual_token_geometry import visual_token_ladder
from .visual_tokens import VisionFeatures, VisualTokens, joined_runs


class Compressor(nn.Module):
    """Makes visual tokens from patches, at one of a few counts.

    The counts form a ladder, fewest first; rung 0 is the cheapest. A subclass gives `type_name`, its options as
    keyword-only constructor arguments (kept as attributes of the same name) and `compress`.

    Attributes:
        type_name: Name in the registry and in `AdaptiveLlavaConfig.compressor`.
        num_rungs: Length of the ladder, from the options alone.
        output_dim: Width of the tokens it makes.
        projects: True if its tokens are already as wide as the language model, so that no projector is built.
        pool_factors: Side of the pooling window of each rung, in patches; `None` where rungs are no windows.
        input_dim: Width of the patches it reads.

    Args:
        dim: Width of the vision features.
        text_dim: Width of the language model.
    """

    type_name: str
    num_rungs: int = 1
    projects: bool = False
    pool_factors: tuple[int, ...] | None = None

    def __init__(self, dim: int, text_dim: int):
        super().__init__()
        self.input_dim = dim
        self.output_dim = text_dim if self.projects else dim

    @property
    def options(self) -> dict:
        """All options with defaults filled in, as the config writes them."""
        return resolved_options(self.type_name, self)

    def ladder(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """Token counts of one view with this patch grid, fewest first."""
        return visual_token_ladder(self.options, grid)

    def grid_after(self, grid: tuple[int, int], rung: int) -> tuple[int, int] | None:
        """Grid of the tokens of a rung, `(height, width)`, or `None` if they form none."""
        raise NotImplementedError

    def compress(self, features: VisionFeatures, rung: int) -> Tensor:
        """Tokens of all given views at one rung, `(V, ladder[rung], output_dim)`."""
        raise NotImplementedError

    def initialise(self) -> None:
        """Start values of new weights; without any, or where PyTorch's own are right, nothing to do."""

    def warm_start(self, projector: nn.Module) -> bool:
        """Take over the weights of a LLaVA projector, if this compressor has layers of that kind.

        Args:
            projector: Trained, with `linear_1` and `linear_2`.

        Returns:
            Whether its tokens now equal those of pooled patches behind that projector.
        """
        return False

    def idle_parameters(self, rungs: Collection[int]) -> Iterable[nn.Parameter]:
        """Parameters that `compress` does not touch at any of these rungs."""
        return ()

    def forward(self, features: VisionFeatures, rungs: Sequence[int]) -> VisualTokens:
        """Tokens of every view at its own rung; views that share a rung are compressed together.

        Args:
            features: Features of `V` views.
            rungs: One rung per view, as host integers.
        """
        ladder = self.ladder(features.grid)
        lengths = tuple(ladder[rung] for rung in rungs)
        used = sorted(set(rungs)) or [0]
        values = self._compress_by_rung(features, rungs, used, lengths)
        if self.training and torch.is_grad_enabled():
            # what no view needed joins with weight 0, so that distributed ranks stay in step
            idle = [(parameter * 0).sum() for parameter in self.idle_parameters(used) if parameter.requires_grad]
            values = values + sum(idle) if idle else values
        return VisualTokens(values, lengths)

    def _compress_by_rung(
        self, features: VisionFeatures, rungs: Sequence[int], used: Sequence[int], lengths: Sequence[int]
    ) -> Tensor:
        if len(used) == 1:
            return self.compress(features, used[0]).flatten(0, 1)
        groups = [[view for view, chosen in enumerate(rungs) if chosen == rung] for rung in used]
        packed = torch.cat(
            [
                self.compress(features.select(views), rung).flatten(0, 1)
                for rung, views in zip(used, groups, strict=True)
            ]
        )
        # The packed rows stand group by group; put the views back into their own order.
        order, counts = torch.tensor([view for views in groups for view in views]), torch.tensor(lengths)
        starts = torch.empty_like(counts)
        starts[order] = counts[order].cumsum(0) - counts[order]
        index = joined_runs(starts, counts)
        return packed.index_select(0, index.to(packed.device, non_blocking=True))


def patch_windows(patches: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """View patches as whole square windows; trailing rows and columns are dropped.

    Args:
        patches: `(V, height * width, dim)`.
        grid: Patches per side, `(height, width)`.
        window: Side of a window, in patches.

    Returns:
        `(V, height // window, window, width // window, window, dim)`, a view.
    """
    rows, columns = grid[0] // window, grid[1] // window
    patch_map = patches.view(patches.shape[0], *grid, patches.shape[-1])[:, : rows * window, : columns * window]
    if torch.compiler.is_compiling() and (rows * window, columns * window) != tuple(grid):
        # dividing the sides of a part of a tensor asks, compiled, whether there is one image; of a copy it does not
        patch_map = patch_map.clone(memory_format=torch.contiguous_format)
    return patch_map.unflatten(2, (columns, window)).unflatten(1, (rows, window))


def joined_windows(patches: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Patches of whole square windows joined along the channels, channel slowest, then rows, then columns.

    Args:
        patches: `(V, height * width, dim)`.
        grid: Patches per side, `(height, width)`.
        window: Side of a window, in patches.

    Returns:
        `(V, rows * columns, dim * window * window)`.
    """
    # (V, rows, w, columns, w, dim) -> (V, rows, columns, dim, w, w) -> (V, rows * columns, dim * w * w)
    return patch_windows(patches, grid, window).permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)


def averaging_weight(weight: Tensor, positions: int) -> Tensor:
    """Weight on joined windows that gives what `weight` gives on their means: each position gets its share.

    Args:
        weight: `(out, dim)`.
        positions: Patches of a window.

    Returns:
        `(out, dim * positions)`.
    """
    return weight.repeat_interleave(positions, dim=1) / positions


def window_means(windows: Tensor) -> Tensor:
    """Mean of every window: `(V, rows, window, columns, window, dim)` -> `(V, rows, columns, dim)`."""
    # as a channels-last picture, which pooling reads in one pass; `mean` over two split axes is many times slower
    picture = windows.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    return F.avg_pool2d(picture, windows.shape[2]).permute(0, 2, 3, 1)
