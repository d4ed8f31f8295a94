"""Answers about pages at several token budgets, each page's features extracted once for all of them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from adaptive_llava import AdaptiveLlavaConfig
from adaptive_llava.training.document_pages import DocumentPage


FULL = "full"
AUTO = "auto"
MOST_TOKENS = sys.maxsize  # a budget that every count fits


@dataclass
class Answers:
    """What was said at one budget, page by page.

    Attributes:
        texts: Answers.
        tokens: Visual tokens of each page.
        seconds: Time to route, compress and generate, without the vision tower.
    """

    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0


def chosen_budgets(text: str | None, model: str) -> dict[str, int | str]:
    """Budgets by name, cheapest first, with `auto` and all tokens at the end.

    Args:
        text: Numbers and `auto`, separated by commas; all counts of the model and `auto` by default.
        model: Folder or Hub id of the model.

    Raises:
        ValueError: Another kind of model; no numbers, numbers below the smallest count, or none for a model that cuts
            images into tiles.
    """
    kind = AdaptiveLlavaConfig.get_config_dict(model)[0].get("model_type")
    if kind != AdaptiveLlavaConfig.model_type:
        raise ValueError(
            f"`--model {model}` is of type {kind!r}. Give it a compressor and a router first: `python -m "
            "adaptive_llava convert --from MODEL --to FOLDER --preset dfmr`."
        )
    config = AdaptiveLlavaConfig.from_pretrained(model)
    counts = list(config.visual_token_counts)
    tiled = config.tiling["type"] == "anyres"
    if text is None:
        if tiled:
            raise ValueError(
                "`--budgets` is missing: this model cuts images into tiles, and budgets are for whole images. Pass "
                "some, such as `--budgets 300,600,auto`."
            )
        numbers, routed = counts, True
    else:
        parts = [part.strip() for part in text.split(",")]
        if not all(part == AUTO or part.isdecimal() for part in parts):
            raise ValueError(f"`--budgets {text}` must be whole numbers of tokens and 'auto', separated by commas.")
        numbers, routed = sorted({int(part) for part in parts if part != AUTO}), AUTO in parts
        if numbers and numbers[0] < counts[0]:
            raise ValueError(f"`--budgets {text}`: this model spends at least {counts[0]} tokens (counts: {counts}).")
    below = [number for number in numbers if tiled or number < counts[-1]]
    return {**{str(number): number for number in below}, **({AUTO: AUTO} if routed else {}), FULL: FULL}


@torch.no_grad()
def answer_at_budgets(
    model: Any,
    processor: Any,
    pages: Sequence[DocumentPage],
    budgets: Mapping[str, int | str],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    exchanged: str | None = None,
) -> dict[str, Answers]:
    """Greedy answers to every page's prompt at every budget.

    Args:
        model: The model; is put into evaluation mode.
        processor: Its processor.
        pages: At least two pages.
        budgets: `visual_token_budget` by name; `FULL` stands for all tokens.
        max_new_tokens: Length at which an answer is cut.
        batch_size: Pages per step; the last ones may be spread over the other steps.
        exchanged: Also answer at full tokens with the pages of a step exchanged, under this name.

    Raises:
        ValueError: A budget that no count fits.
    """
    model.eval()
    answers = {name: Answers() for name in (*budgets, *([exchanged] if exchanged else []))}
    bar = tqdm(total=len(pages), unit="page", desc="ask")
    for chosen in np.array_split(np.arange(len(pages)), max(1, len(pages) // max(batch_size, 2))):
        batch = [pages[index] for index in chosen]
        inputs = processor.apply_chat_template(
            [_conversation(page) for page in batch],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(model.device)
        pixels = inputs["pixel_values"], inputs.get("image_sizes")
        features = model.model.extract_features(*pixels)
        for name, answer in answers.items():
            start = time.perf_counter()
            budget = MOST_TOKENS if name == exchanged else budgets[name]
            budget = MOST_TOKENS if budget == FULL else budget
            images = model.encode_images(*pixels, visual_token_budget=budget, features=features)
            if name == exchanged:
                images = images.select(np.roll(np.arange(len(batch)), 1).tolist())
            said = model.generate(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                encoded_images=images,
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )[:, inputs["input_ids"].shape[1] :]
            answer.texts += processor.batch_decode(said, skip_special_tokens=True)
            answer.tokens += images.lengths
            answer.seconds += time.perf_counter() - start
        bar.update(len(batch))
    bar.close()
    return answers


def _conversation(page: DocumentPage) -> list[dict[str, Any]]:
    content = [{"type": "image", "path": page.path}, {"type": "text", "text": page.prompt}]
    return [{"role": "user", "content": content}]


def write_answers(answers: Mapping[str, Answers], pages: Sequence[DocumentPage], path: Path) -> None:
    """One line per page: its fields, and tokens and answer at every budget."""
    with path.open("w", encoding="utf-8") as file:
        for index, page in enumerate(pages):
            given = {
                name: {"tokens": answer.tokens[index], "answer": answer.texts[index]}
                for name, answer in answers.items()
            }
            row = {"file": page.file, "fields": page.fields, "answers": given}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
