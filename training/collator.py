"""Batches for fine-tuning: TRL's vision collators, with what they leave out for models like ours.

Shapes: rows -> `input_ids (B, L)`, `attention_mask (B, L)`, `labels (B, L)`, `pixel_values (N, 3, S, S)`, padded
right. Preferences give `completion_mask (2B, L)` in place of labels: all chosen answers, then all rejected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from adaptive_llava.training.conversation_data import read_caption, read_example


logger = logging.get_logger(__name__)


class ConversationCollator:
    """Wraps the collator that `SFTTrainer` or `DPOTrainer` has built, and changes five things.

    * Image placeholders are no labels. TRL scores the backbone's outputs itself, past the masking in our `forward`,
      and would train the model to write one `<image>` per image.
    * Rows begin as they do in generation: TRL never writes the BOS token that LLaMA's tokenizers add.
    * A plain-text `completion`, `chosen` or `rejected` ends with the EOS token, as TRL does for text-only datasets.
    * `<image>` in a user's string stands for an image; see `read_example`.
    * For pre-fusion, `instruction_mask (B, L)` marks the text that is not scored; TRL keeps the labels to itself.

    Args:
        collate: TRL's collator.
        processor: The model's processor.
        visual_token_budget: Visual tokens per image in place of the router's choice; of several, each image gets one
            at random.
        marks_instruction: Whether the model has pre-fusion, which must not see the answers.
        plain_captions: Write rows in the plain format of pretraining; see `read_caption`.
    """

    def __init__(
        self,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        processor: Any,
        *,
        visual_token_budget: int | Sequence[int] | None = None,
        marks_instruction: bool = False,
        plain_captions: bool = False,
    ):
        self.collate = collate
        self.processor = processor
        self.visual_token_budget = visual_token_budget
        self.marks_instruction = marks_instruction
        self.plain_captions = plain_captions
        tokenizer = processor.tokenizer
        ids = tokenizer("a")["input_ids"]
        self.bos_token_id = tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate([self.read(example) for example in examples])
        if self.bos_token_id is not None and not (batch["input_ids"][:, 0] == self.bos_token_id).all():
            for name, value in {
                "input_ids": self.bos_token_id,
                "attention_mask": 1,
                "labels": -100,
                "completion_mask": 0,
                "mm_token_type_ids": 0,
            }.items():
                if name in batch:
                    batch[name] = _prepend(batch[name], value)
        if "labels" in batch:
            batch["labels"] = batch["labels"].masked_fill(batch["input_ids"] == self.processor.image_token_id, -100)
        if self.marks_instruction:
            unscored = batch["labels"] == -100 if "labels" in batch else batch["completion_mask"] == 0
            instruction = unscored & (batch["attention_mask"] != 0)
            batch["instruction_mask"] = instruction & (batch["input_ids"] != self.processor.image_token_id)
            if not self.plain_captions and not batch["instruction_mask"].any():
                logger.warning_once(
                    "All text of a batch is scored, so pre-fusion has no instruction to fuse. Train on answers alone: "
                    "`assistant_only_loss=True`, or a dataset with `prompt` and `completion`."
                )
        if self.visual_token_budget is not None and "pixel_values" in batch:
            batch["visual_token_budget"] = self._budgets(len(batch["pixel_values"]))
        return batch

    def _budgets(self, images: int) -> int | list[int]:
        if isinstance(self.visual_token_budget, int):
            return self.visual_token_budget
        drawn = torch.randint(len(self.visual_token_budget), (images,)).tolist()
        return [self.visual_token_budget[index] for index in drawn]

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of the dataset as TRL's collator gets it."""
        if self.plain_captions:
            return read_caption(row)
        example, eos = read_example(row), self.processor.tokenizer.eos_token
        for name in ("completion", "chosen", "rejected"):
            answer = example.get(name)
            if isinstance(answer, str) and eos and not answer.endswith(eos):
                example[name] = answer + eos
        return example


def _prepend(rows: Tensor, value: int) -> Tensor:
    return torch.cat([rows.new_full((rows.shape[0], 1), value), rows], dim=1)
