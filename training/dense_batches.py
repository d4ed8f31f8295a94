"""`SFTTrainer` that wastes few of the language model's slots on padding, and logs how many.

Images cost 1 to 576 tokens, so that a batch of random rows, padded to the longest, is often mostly padding. Two ways
out, of which the second needs an attention that skips what is masked to be the faster one:

* `train_sampling_strategy="group_by_length"` (transformers 4: `group_by_length=True`): rows of like length share a
  batch. transformers' own sampler; the lengths, visual tokens included, come from `row_lengths.py`, or from a column
  named `length_column_name` if the dataset has one.
* `pack_batches=True`: the rows of a batch stand one behind another in one row; see `packing.py`. Evaluation is padded.

Logs `padding_share`, and at the end `train_padding_share`; see `padding_share.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from adaptive_llava.training.packing import PackingCollator, check_packing
from adaptive_llava.training.padding_share import PaddingShare, language_model_of
from adaptive_llava.training.row_lengths import row_lengths
from adaptive_llava.training.threshold_schedule import ThresholdSchedule
from adaptive_llava.training.whole_checkpoints import WholeCheckpointTrainer


# The option that groups rows by length, by this version's name.
GROUP_BY_LENGTH: dict[str, Any] = (
    {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" in TrainingArguments.__dataclass_fields__
    else {"group_by_length": True}
)


def groups_by_length(training: TrainingArguments) -> bool:
    """Whether rows of like length are to share a batch."""
    return all(getattr(training, name) == value for name, value in GROUP_BY_LENGTH.items())


class SeededLengthSampler(LengthGroupedSampler):
    """transformers' sampler with an order that follows from seed and epoch, so that a resumed run goes on with it.

    Args:
        batch_size: Rows of one step of one process.
        lengths: Of all rows.
        seed: Of the order.
        epoch: Says which epoch begins.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], *, seed: int, epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


class DenseBatchTrainer(WholeCheckpointTrainer):
    """Takes the arguments of `SFTTrainer`; its checkpoints are whole or absent.

    Args:
        pack_batches: Train on packed batches.

    Raises:
        ValueError: Rows that cannot be grouped by length, or a language model that packing would confuse.
    """

    data_collator: Any

    def __init__(self, *arguments: Any, pack_batches: bool = False, **options: Any):
        super().__init__(*arguments, **options)
        self.pack_batches = pack_batches
        if pack_batches:
            check_packing(language_model_of(self.model))
        if groups_by_length(self.args):
            self._check_grouping()
        self.padding_share = PaddingShare(self.args.device)
        self.add_callback(self.padding_share)

    def get_train_dataloader(self) -> DataLoader:
        padded = self.data_collator
        if self.pack_batches:
            self.data_collator = PackingCollator(padded)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = padded

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name, count in (("loss", self.padding_share.recent), ("train_loss", self.padding_share.whole)):
            if name in logs:
                padding, slots = self._sum_over_processes(count())
                prefix = name.removesuffix("loss")
                logs[f"{prefix}padding_share"] = padding / max(slots, 1)
        super().log(logs, start_time)

    def _sum_over_processes(self, counts: torch.Tensor) -> list[int]:
        summed: Any = self.accelerator.reduce(counts, "sum")
        return summed.tolist()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if not groups_by_length(self.args):
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset  # what is passed in has lost its column of lengths
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        column = self.args.length_column_name
        if column in rows.column_names:
            lengths = list(rows[column])
        else:
            collator = self.data_collator
            padded = collator.collate if isinstance(collator, PackingCollator) else collator
            with self.args.main_process_first(desc="row lengths"):
                lengths = row_lengths(rows, padded, self.model)
        return SeededLengthSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            lengths,
            seed=seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        if not groups_by_length(self.args):
            return super()._get_eval_sampler(eval_dataset)
        # not by length, which it would look for among the ids of rows that have none yet
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _check_grouping(self) -> None:
        rows: Any = self.train_dataset
        if not isinstance(rows, Dataset):
            raise ValueError(
                f"Rows are to be grouped by length, but the dataset is a {type(rows).__name__}, whose rows are not "
                "known beforehand. Load it without `dataset_streaming`, or use `pack_batches=True` against padding."
            )
        if any(isinstance(callback, ThresholdSchedule) for callback in self.callback_handler.callbacks):
            raise ValueError(
                "`threshold_schedule` changes the token counts of a row in the course of training, so rows cannot be "
                "grouped by length. Use `pack_batches=True` against padding."
            )
