"""How many slots each row of a dataset will take in the language model, before training has seen it.

A row takes its text tokens and the visual tokens of its images. With a budget, or a router that is `fixed` or reads
pixels, the processor counts them without the vision tower. Any other router is asked once, image by image, with the
model as it is when training begins. Lengths lie in a file named after all that they depend on: the rows, how they are
written and cut, and, where the router is asked, the weights of tower, fusion and router. They are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from torch import nn
from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages

from adaptive_llava.processing.prompt_encoding import tokenize
from adaptive_llava.training.collator import ConversationCollator
from adaptive_llava.training.padding_share import inner_model
from adaptive_llava.training.router_inputs import default_cache, fingerprint


_ROWS_PER_STEP = 16


def row_lengths(
    rows: Dataset, collator: ConversationCollator, model: nn.Module, *, cache: Path | None = None
) -> list[int]:
    """Slots of each row, in order.

    Args:
        rows: As `load_conversations` gives them.
        collator: What makes batches of them, padded.
        model: The model under any head or adapter.
        cache: Folder of the file, by default beside the Hub's own cache.

    Raises:
        ValueError: The router is `random`, or there are several budgets, so that a row's length changes from one epoch
            to the next.
    """
    inner, processor, budget = inner_model(model), collator.processor, collator.visual_token_budget
    known = _known_beforehand(inner.config, budget)
    settings = {
        "rows": rows._fingerprint,
        "config": inner.config.to_dict(),
        "processor": processor.to_dict(),
        "vocabulary": sorted(processor.tokenizer.get_vocab().items()),
        "budget": budget,
        "plain_captions": collator.plain_captions,
        "collate": [getattr(collator.collate, name, None) for name in ("max_length", "chat_template")],
    }
    key = fingerprint(settings, *(() if known else (inner.vision_tower, inner.multi_block_fusion, inner.router)))
    folder = default_cache("row_lengths") if cache is None else cache
    folder.mkdir(parents=True, exist_ok=True)
    counter = _RowCounter(collator, None if known else inner)
    measured = _undecoded(rows).map(
        counter.lengths,
        batched=True,
        batch_size=_ROWS_PER_STEP,
        remove_columns=rows.column_names,
        cache_file_name=str(folder / f"{key}.arrow"),
        load_from_cache_file=True,
        new_fingerprint=key,
        desc="Counting the tokens of rows",
    )
    return list(measured["length"])


class _RowCounter:
    def __init__(self, collator: ConversationCollator, model: Any):
        self.collator, self.processor, self.model = collator, collator.processor, model

    def lengths(self, batch: dict[str, list[Any]]) -> dict[str, list[int]]:
        examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        read = [self.collator.read(example) for example in examples]
        images = [example["images"] for example in read]
        visual = iter(self._visual(images))
        return {
            "length": [
                self._text(example) + sum(next(visual) - 1 for _ in own)  # one placeholder each is among the text
                for example, own in zip(read, images, strict=True)
            ]
        }

    def _text(self, example: dict[str, Any]) -> int:
        """Ids of a row as the collator writes it, one placeholder per image."""
        collate = self.collator.collate
        stand_ins = [""] * len(example["images"])  # only written, not looked at
        if "messages" in example:
            messages = prepare_multimodal_messages(example["messages"], images=stand_ins)
            template = getattr(collate, "chat_template", None)
            texts = [self.processor.apply_chat_template(messages, chat_template=template, tokenize=False)]
        else:
            if is_conversational(example):
                example = {
                    "prompt": prepare_multimodal_messages(example["prompt"], images=stand_ins),
                    "completion": prepare_multimodal_messages(example["completion"]),
                }
                example = apply_chat_template(example, self.processor)
            texts = [example["prompt"], example["completion"]]
        written = tokenize(self.processor.tokenizer, texts, {"add_special_tokens": False})["input_ids"]
        ids = [token for part in written for token in part]
        limit = getattr(collate, "max_length", None)
        ids = ids if limit is None else ids[:limit]
        bos = self.collator.bos_token_id
        return len(ids) + (bos is not None and ids[:1] != [bos])

    def _visual(self, images: list[list[Any]]) -> list[int]:
        """Visual tokens of each image, row after row."""
        if not any(images):
            return []
        if self.model is None:
            return self.processor.count_tokens(images, visual_token_budget=self.collator.visual_token_budget)
        prompts = [self.processor.image_token * len(own) for own in images]
        inputs = self.processor(images=images, text=prompts, padding=True, layout="compact", return_tensors="pt")
        training = self.model.training
        try:
            with torch.no_grad():
                encoded = self.model.eval().encode_images(inputs["pixel_values"], inputs.get("image_sizes"))
        finally:
            self.model.train(training)
        return list(encoded.lengths)


def _known_beforehand(config: Any, budget: int | Sequence[int] | None) -> bool:
    if budget is not None and not isinstance(budget, int):
        raise ValueError(
            f"`visual_token_budget={list(budget)}` draws one whenever an image is seen, so rows cannot be grouped "
            "by length. Pass one budget, or use `pack_batches=True` against padding."
        )
    if budget is not None or config.router["type"] in ("fixed", "pixel_std"):
        return True
    if config.router["type"] == "random":
        raise ValueError(
            "`router.type='random'` draws new token counts whenever a row is seen, so rows cannot be grouped by "
            "length. Pass `visual_token_budget`, or use `pack_batches=True` against padding."
        )
    return False


def _undecoded(rows: Dataset) -> Dataset:
    """The rows with images as files or bytes, of which many a count reads no pixel."""
    for name in {"images", "image"} & set(rows.column_names):
        feature = rows.features[name]
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            rows = rows.cast_column(name, type(feature)(Image(decode=False)))
    return rows
