"""What passes between vision tower, router and compressor, and the one place where counts become known on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .view_geometry import ImageViews
from .visual_token_geometry import ImageCost, decide_rungs


@dataclass(frozen=True, eq=False)
class VisionFeatures:
    """Features of `V` views; the views of one image are adjacent.

    Attributes:
        patches: Selected layer without prefix tokens, `(V, height * width, dim)`, rows first.
        grid: Patches per side, `(height, width)`.
        cls: Final [CLS] state after the tower's last norm, `(V, tower_dim)`; `None` where the tower has none.
        layer_cls: [CLS] state of the selected layer, `(V, dim of the selected layers)`; `None` like `cls`.
        blocks: Hidden states asked for by a router's or fusion's `needs_blocks`.
        pixels: Images the tower saw, `(V, 3, height, width)`, as precise as they were given.
        views_per_image: Views of each image, as host integers.
        overview: Patches of the whole image, `(V, patches, dim)`, beside a mosaic of its tiles; pre-fusion reads both.
        image_views: How AnyRes cut each image; `None` without it.
        tower_outputs: All that the tower gave, where it was asked for: `last_hidden_state (V, tokens, tower_dim)`,
            `hidden_states` and `attentions`.
    """

    patches: Tensor
    grid: tuple[int, int]
    cls: Tensor | None
    pixels: Tensor
    views_per_image: tuple[int, ...]
    blocks: Mapping[int, Tensor] = field(default_factory=dict)
    layer_cls: Tensor | None = None
    overview: Tensor | None = None
    image_views: tuple[ImageViews, ...] | None = None
    tower_outputs: Mapping[str, Any] | None = None

    @property
    def images(self) -> tuple[ImageViews, ...]:
        """How each image was cut; without AnyRes every image is one view."""
        return (ImageViews(),) * len(self.views_per_image) if self.image_views is None else self.image_views

    def select(self, views: Sequence[int]) -> VisionFeatures:
        """The given views alone, each as an image of its own; adjacent ones are not copied."""
        first, end = views[0], views[0] + len(views)
        adjacent = list(views) == list(range(first, end))
        index = None if adjacent else torch.tensor(views).to(self.patches.device, non_blocking=True)

        def chosen(states: Tensor | None) -> Tensor | None:
            if states is None:
                return None
            return states[first:end] if index is None else states.index_select(0, index)

        return VisionFeatures(
            patches=chosen(self.patches),
            grid=self.grid,
            cls=chosen(self.cls),
            pixels=chosen(self.pixels),
            views_per_image=(1,) * len(views),
            blocks={layer: chosen(states) for layer, states in self.blocks.items()},
            layer_cls=chosen(self.layer_cls),
            overview=chosen(self.overview),
        )


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """Visual tokens of several views (after arrangement: images), packed without padding.

    Attributes:
        values: `(sum(lengths), dim)`.
        lengths: Tokens per view, as host integers.
    """

    values: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Routing:
    """A router's choice for `V` views.

    Attributes:
        rungs: Chosen rung per view, `(V,)` long; 0 is the fewest tokens.
        scores: `(V,)` fp32; a higher score deserves more tokens.
        logits: `(V, num_rungs)` if the router is learned.
    """

    rungs: Tensor
    scores: Tensor
    logits: Tensor | None = None


Budget = int | Sequence[int] | Mapping[str, int] | str | None


def resolve_rungs(
    routing: Routing,
    images: Sequence[ImageCost],
    *,
    images_per_prompt: Sequence[int] | None = None,
    budget: Budget = None,
    rungs: Sequence[int] | Tensor | None = None,
) -> list[int]:
    """Who decides: the rung of every view, from the router, a budget, or an exact replay.

    This reads device values on the host only where the router has a say. Views that share a unit share its largest
    rung.

    Args:
        routing: The router's choice for all views.
        images: Cost of each image.
        images_per_prompt: Images of each prompt (for `{"total": n}`); `None` takes all as one prompt.
        budget: `None` or `"auto"`, an int or one int per image, `{"ceiling": n}`, or `{"total": n}`.
        rungs: One rung per view, replayed exactly; not together with a budget.

    Raises:
        ValueError: Both `budget` and `rungs`, an unknown form of budget, or one that no rung fits.
    """
    return decide_rungs(
        images,
        lambda: (routing.rungs.tolist(), routing.scores.tolist()),
        budget=budget,
        rungs=rungs,
        images_per_prompt=images_per_prompt,
    )


def check_no_images(budget: Budget, rungs: Sequence[int] | Tensor | None) -> None:
    """Refuse decisions about single images where there are none; a budget for any image may stand.

    Raises:
        ValueError: `rungs`, or a list of budgets, that is not empty.
    """
    for name, given in (("visual_rungs", rungs), ("visual_token_budget", budget)):
        value = given.tolist() if hasattr(given, "tolist") else given  # a tensor without axes is one number for all
        if isinstance(value, (str, Mapping)) or not hasattr(value, "__len__") or len(value) == 0:
            continue
        raise ValueError(
            f"`{name}` was given for {len(value)} images, but there are none. Pass `pixel_values` or "
            f"`encoded_images` with it, or leave `{name}` out."
        )


def joined_runs(starts: Tensor, lengths: Tensor) -> Tensor:
    """Indices of several runs, one run behind another, without a loop over them.

    Args:
        starts: First index of each run, `(runs,)` on the host.
        lengths: Length of each run, `(runs,)`.

    Returns:
        `(sum(lengths),)`.
    """
    own = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths)
    return own + torch.arange(len(own))


def to_host(*tensors: Any) -> list[Any]:
    """CPU copies of several integer or fp32 tensors through a single device-to-host transfer."""
    present = [tensor for tensor in tensors if tensor is not None]
    if all(tensor.device.type == "cpu" for tensor in present):
        return list(tensors)
    packed = torch.cat([tensor.detach().flatten().double() for tensor in present]).cpu()
    pieces = iter(packed.split([tensor.numel() for tensor in present]))
    return [None if tensor is None else next(pieces).to(tensor.dtype).view(tensor.shape) for tensor in tensors]
