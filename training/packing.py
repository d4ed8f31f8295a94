"""Batches without padding: the rows of a batch one behind another in a single row.

`--pack_batches true` for `training.sft` and what builds on it. TRL packs text, and refuses to where there are images.
Here each row keeps its own images, positions and attention: positions start again at 0 with every row, and there is no
attention mask, which is how transformers tells packed rows apart. Loss and gradients are those of the padded batch.

Shapes: `input_ids (B, L)`, `attention_mask (B, L)` -> `input_ids (1, S)`, `position_ids (1, S)`; S counts what is
attended.
Attention that skips what is masked (`flash_attention_2`) is made for such rows. `sdpa` and `eager` compare every token
with all of the packed row, only to mask it: there, batches grouped by length are faster (`padding_study.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


# What a collator gives per token; `pixel_values` and the like are per image and stay as they are.
_PER_TOKEN = ("input_ids", "labels", "completion_mask", "instruction_mask", "mm_token_type_ids", "token_type_ids")
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


class PackingCollator:
    """Packs what another collator has padded.

    Args:
        collate: Makes padded batches, such as `ConversationCollator`.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collate: Any = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.collate(examples))
        attended = batch.pop("attention_mask") != 0
        positions = (attended.long().cumsum(1) - 1)[attended].unsqueeze(0)
        packed = {name: batch[name][attended].unsqueeze(0) for name in _PER_TOKEN if name in batch}
        if "labels" in packed:  # a row's first id follows nothing: the row before it must not predict it
            packed["labels"] = packed["labels"].masked_fill(positions == 0, -100)
        return batch | packed | {"position_ids": positions}


def check_packing(language_model: nn.Module) -> None:
    """Refuse a language model that carries something from one packed row into the next.

    Raises:
        ValueError: It has recurrent layers, which know no positions.
    """
    config: Any = language_model.config
    others = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if others or getattr(language_model, "_is_stateful", False):
        raise ValueError(
            f"`pack_batches=True`, but the language model ({config.model_type}) has layers other than attention "
            f"({', '.join(sorted(others)) or 'recurrent'}): they would carry the state of one row into the next. "
            "Leave it out, and use `train_sampling_strategy='group_by_length'` against padding."
        )
