"""Images as the language model reads them, kept for reuse across prompts and turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .visual_tokens import joined_runs


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Visual tokens of several images in prompt order, with the decisions that led to them.

    Attributes:
        values: `(sum(lengths), text_dim)`, packed.
        lengths: Tokens per image.
        rungs: Rung per view.
        scores: Router score per view, `(num_views,)` fp32.
        views_per_image: Views per image.
        patches: What pre-fusion reads, `(sum(patch_lengths), text_dim)`, packed; `None` without pre-fusion.
        patch_lengths: Patches per image; empty without pre-fusion.
    """

    values: Tensor
    lengths: tuple[int, ...]
    rungs: tuple[int, ...]
    scores: Tensor
    views_per_image: tuple[int, ...]
    patches: Tensor | None = None
    patch_lengths: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, images: Sequence[int]) -> EncodedImages:
        """The given images in the given order; one image may be asked for several times.

        Raises:
            ValueError: An index is out of range.
        """
        if any(not 0 <= image < len(self) for image in images):
            raise ValueError(f"`images={list(images)}` must be indices from 0 to {len(self) - 1}.")
        patches, patch_lengths = self.patches, self.patch_lengths
        if patches is not None:
            patches = _chosen(patches, patch_lengths, images)
            patch_lengths = tuple(patch_lengths[image] for image in images)
        views = torch.arange(len(self.rungs)).split(self.views_per_image)
        chosen = torch.cat([views[image] for image in images]) if images else torch.empty(0, dtype=torch.long)
        return EncodedImages(
            values=_chosen(self.values, self.lengths, images),
            lengths=tuple(self.lengths[image] for image in images),
            rungs=tuple(self.rungs[view] for view in chosen.tolist()),
            scores=self.scores.index_select(0, chosen.to(self.scores.device, non_blocking=True)),
            views_per_image=tuple(self.views_per_image[image] for image in images),
            patches=patches,
            patch_lengths=patch_lengths,
        )

    def counts(self) -> dict[str, Tensor]:
        """`num_visual_tokens (num_images,)`, `visual_rungs (num_views,)` and `visual_router_scores (num_views,)`."""
        device = self.scores.device
        return {
            "num_visual_tokens": torch.tensor(self.lengths).to(device, non_blocking=True),
            "visual_rungs": torch.tensor(self.rungs).to(device, non_blocking=True),
            "visual_router_scores": self.scores,
        }


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """A batch of prompts on the host beside its encoded images.

    Attributes:
        input_ids: `(B, L)`.
        attention_mask: As given, or `None`.
        position_ids: `(B, L)`, or `None`.
        encoded: Images in order of their placeholders.
        compact: True with one placeholder per image, False with one per visual token.
        instruction_mask: Text that pre-fusion takes in, `(B, L)`; `None` is all that is attended.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    encoded: EncodedImages
    compact: bool
    instruction_mask: Tensor | None = None


def _chosen(packed: Tensor, lengths: tuple[int, ...], images: Sequence[int]) -> Tensor:
    counts, chosen = torch.tensor(lengths, dtype=torch.long), torch.tensor(images, dtype=torch.long)
    index = joined_runs((counts.cumsum(0) - counts)[chosen], counts[chosen])
    return packed.index_select(0, index.to(packed.device, non_blocking=True))
