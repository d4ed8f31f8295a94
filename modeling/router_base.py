"""The interface of a router: which of a compressor's token counts a view gets."""

from __future__ import annotations

from torch import nn

from .compressor_base import Compressor
from .option_schema import resolved_options
from .visual_tokens import Routing, VisionFeatures


class Router(nn.Module):
    """Chooses one rung of the compressor's ladder per view.

    A router never looks across views and never waits for the device. A subclass gives `type_name`, its options as
    keyword-only constructor arguments (kept as attributes of the same name) and `forward`.

    Attributes:
        type_name: Name in the registry and in `AdaptiveLlavaConfig.router`.
        needs_blocks: Indices of the tower's hidden states it reads besides the selected layer.
        needs_class_token: Whether it reads a [CLS] state.

    Args:
        dim: Width of one hidden state of the vision tower.
        compressor: The compressor whose rungs are chosen.
    """

    type_name: str
    needs_blocks: tuple[int, ...] = ()
    needs_class_token: bool = False

    def __init__(self, dim: int, compressor: Compressor):
        super().__init__()
        self.num_rungs = compressor.num_rungs

    @property
    def options(self) -> dict:
        """All options with defaults filled in, as the config writes them."""
        return resolved_options(self.type_name, self)

    def initialise(self) -> None:
        """Start values of new weights; without any, or where PyTorch's own are right, nothing to do."""

    def check_grid(self, grid: tuple[int, int], image_size: tuple[int, int] | None = None) -> None:
        """Refuse a patch grid that this router cannot judge.

        Args:
            grid: Patches per side of a view, `(height, width)`.
            image_size: Pixels per side of what the tower reads, if its config tells.

        Raises:
            ValueError: An option does not fit the grid.
        """

    def forward(self, features: VisionFeatures) -> Routing:
        """Rung and score of every view."""
        raise NotImplementedError
