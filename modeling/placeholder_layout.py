"""Where each visual token stands: one placeholder per image outside, one slot per visual token inside.

A batch arrives *compact* (one placeholder per image) or *expanded* (one per visual token). The language model always
sees expanded rows. A layout is built on the host from ids and counts; applying it is indexing on the device.

Shapes: input_ids (B, L), lengths per image -> expanded rows (B, T); hidden states (B, T, D) -> aligned (B, L, D)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PlaceholderLayout:
    """Index tensors between compact rows of length `L` and expanded rows of length `T`, on the host.

    Attributes:
        source: For each expanded slot the row it comes from, `(B, T)`: an index into the `B * L` input ids followed
            by all visual tokens; unused slots point at 0.
        aligned: For each input id its last expanded slot, `(B, L)`; -1 for dropped padding.
        attention_mask: `(B, T)`, or `None` if every slot is attended.
        position_ids: `(B, T)`, or `None` if they count up from 0 in every row.
        drops_padding: Whether an input id has no slot.
    """

    source: Tensor
    aligned: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    drops_padding: bool

    @property
    def surplus(self) -> int:
        """Slots by which an expanded row is longer than a compact one."""
        return self.source.shape[1] - self.aligned.shape[1]

    def splice(self, text: Tensor, visual: Tensor) -> Tensor:
        """Rows for the language model: text `(B, L, D)` and visual tokens `(sum(lengths), D)` -> `(B, T, D)`."""
        rows = torch.cat([text.flatten(0, 1), visual.to(text)])
        index = self.source.to(text.device, non_blocking=True)
        return rows.index_select(0, index.flatten()).view(*self.source.shape, text.shape[-1])

    def gather(self, states: Tensor) -> Tensor:
        """States at the input ids: `(B, T, D)` -> `(B, L, D)`, zero where padding was dropped."""
        columns = self.aligned.clamp(min=0).to(states.device, non_blocking=True)
        gathered = states.gather(1, columns.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        if self.drops_padding:
            dropped = (self.aligned < 0).to(states.device, non_blocking=True)
            gathered = gathered.masked_fill(dropped.unsqueeze(-1), 0)
        return gathered

    def expand_ids(self, input_ids: Tensor, image_token_id: int, pad_token_id: int) -> Tensor:
        """Ids with one placeholder per visual token, `(B, T)` on the host."""
        flat = input_ids.flatten()
        ids = torch.where(self._is_visual, image_token_id, flat[self.source.clamp(max=flat.numel() - 1)])
        # interior tokens that are masked keep their id; only slots that nothing stands in are padding
        return torch.where(self._is_unused, pad_token_id, ids)

    def prefix(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Visual tokens by row with their absolute slots, for decoding.

        Returns:
            Embeddings `(B, K, D)` on the device of `visual`, and positions `(B, K)`, -1 where a row has fewer than K.
        """
        visual_slots = self._is_visual
        counted = visual_slots.cumsum(1)
        width = max([1, *counted[:, -1].tolist()])
        positions = torch.full((len(counted), width), -1)
        index = torch.zeros(len(counted), width, dtype=torch.long)
        row, column = visual_slots.nonzero(as_tuple=True)
        place = counted[row, column] - 1
        positions[row, place] = column
        index[row, place] = self.source[row, column] - self.aligned.numel()
        if len(visual) == 0:  # a batch without images: one column that no slot takes
            visual = visual.new_zeros(1, visual.shape[-1])
        return visual[index.to(visual.device, non_blocking=True)], positions.to(visual.device, non_blocking=True)

    def whole_prefix(self, text: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """All of every row for decoding, where text too differs from the embeddings of its ids.

        Returns:
            Embeddings `(B, T, D)`, and their absolute slots, `(B, T)`.
        """
        rows = self.splice(text, visual)
        return rows, torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[0], -1)

    @property
    def _is_visual(self) -> Tensor:
        return self.source >= self.aligned.numel()

    @property
    def _is_unused(self) -> Tensor:
        # only id 0 may stand at source 0, in the slot that `aligned` names; other slots at 0 are filling
        unused = self.source == 0
        if int(self.aligned[0, 0]) >= 0:
            unused[0, self.aligned[0, 0]] = False
        return unused


def build_layout(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    lengths: Sequence[int],
    image_token_id: int,
    past_mask: Tensor | None = None,
) -> PlaceholderLayout:
    """Lay out compact rows; padding at their ends is dropped, then rows are padded again to the longest.

    Args:
        input_ids: `(B, L)` on the host, one placeholder per image.
        attention_mask: `(B, L)`, or `None` if all ids are attended.
        position_ids: Placeholder-aligned positions, `(B, L)`; each image's surplus is added to what follows it in its
            segment. A segment starts where positions do not rise. `None` counts attended slots.
        lengths: Tokens of each image, in order of their placeholders.
        image_token_id: Id of the placeholder.
        past_mask: Attention mask of cached slots before these rows, `(B, P)`.
    """
    batch, length = input_ids.shape
    is_image = input_ids == image_token_id
    kept = torch.ones_like(is_image) if attention_mask is None else _without_edges(attention_mask != 0)
    per_image = torch.tensor(lengths, dtype=torch.long)
    width = kept.long()
    width[is_image] = torch.where(kept[is_image], per_image, 0)
    ends = width.cumsum(1)
    starts, totals = ends - width, ends[:, -1]
    total = max(1, int(totals.max()))
    # several segments in a row are told apart by their positions, without a mask
    packed = attention_mask is None and holds_segments(position_ids)
    pad_left = bool(kept[:, -1].all()) and not packed
    offset = (total - totals).unsqueeze(1) if pad_left else torch.zeros(batch, 1, dtype=torch.long)

    # One entry per slot: the input id it belongs to, and its place among that id's slots.
    owner = torch.repeat_interleave(torch.arange(batch * length), width.flatten())
    row = owner // length
    within = torch.arange(len(owner)) - (width.flatten().cumsum(0) - width.flatten())[owner]
    column = within + (starts + offset).flatten()[owner]
    visual_start = torch.zeros(batch * length, dtype=torch.long)
    visual_start[is_image.flatten()] = per_image.cumsum(0) - per_image
    visual = batch * length + visual_start[owner] + within
    source = torch.zeros(batch, total, dtype=torch.long)
    source[row, column] = torch.where(is_image.flatten()[owner], visual, owner)

    mask = torch.zeros(batch, total, dtype=torch.long)
    mask[row, column] = 1 if attention_mask is None else (attention_mask.flatten()[owner] != 0).long()
    aligned = torch.where(width > 0, ends - 1 + offset, -1)
    if position_ids is not None:
        positions = torch.arange(total).expand(batch, -1) - totals.unsqueeze(1)  # filling is a segment of its own
        positions = positions.clamp(min=0).clone()
        before = starts - (kept.cumsum(1) - kept.long())  # surplus of the images before each id
        first = segment_starts(position_ids)
        shifted = position_ids + before - before.gather(1, first)
        positions[row, column] = shifted.flatten()[owner] + within
    elif past_mask is None and bool(mask.all()):
        positions = None
    else:
        whole = mask if past_mask is None else torch.cat([past_mask, mask], dim=1)
        positions = (whole.cumsum(1) - 1).clamp(min=0)[:, -total:]
    open_mask = packed or (bool(mask.all()) and past_mask is None)
    if past_mask is not None:
        mask = torch.cat([past_mask, mask], dim=1)
    return PlaceholderLayout(source, aligned, None if open_mask else mask, positions, bool((width == 0).any()))


def _without_edges(attended: Tensor) -> Tensor:
    # drop padding at both ends, keep masked ids in between
    after_first = attended.long().cumsum(1) > 0
    before_last = attended.flip(1).long().cumsum(1).flip(1) > 0
    return after_first & before_last


def prompt_starts(shape: torch.Size, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """Place of the first id of each id's prompt among all ids, `(B, L)`: a row's, or that of a segment in packed rows.

    Args:
        shape: Of the ids, `(B, L)`.
        attention_mask: As for `build_layout`.
        position_ids: As for `build_layout`.
    """
    rows = (torch.arange(shape[0]).unsqueeze(1) * shape[1]).expand(shape)
    packed = attention_mask is None and holds_segments(position_ids)
    return rows + segment_starts(position_ids) if packed else rows


def segment_starts(position_ids: Tensor) -> Tensor:
    """Column of the first id of each id's segment, `(B, L)`."""
    columns = torch.arange(position_ids.shape[1]).expand_as(position_ids)
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    return torch.where(starts, columns, 0).cummax(1).values


def holds_segments(position_ids: Tensor | None) -> bool:
    """Whether positions `(B, L)` start again somewhere inside a row, as in packed rows."""
    return position_ids is not None and bool((position_ids[..., 1:] <= position_ids[..., :-1]).any())
