"""Answers about pages at several token budgets, each page's features extracted once for all of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from adaptive_llava.training.document_pages import DocumentPage
from adaptive_llava.training.evaluation import answer_batch
from adaptive_llava.training.question_samples import Sample
from adaptive_llava.training.token_budgets import adaptive_config, named_budgets, read_budgets


FULL = "full"
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
    config = adaptive_config(model)
    numbers, routed = read_budgets(text, config)
    tiled = config.tiling["type"] == "anyres"
    below = [number for number in numbers if tiled or number < config.visual_token_counts[-1]]
    return {**named_budgets(below, routed), FULL: FULL}


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
    named = {name: MOST_TOKENS if budget == FULL else budget for name, budget in budgets.items()}
    others = [exchanged] if exchanged else []
    named |= dict.fromkeys(others, MOST_TOKENS)
    answers = {name: Answers() for name in named}
    with tqdm(total=len(pages), unit="page", desc="ask") as bar:
        for chosen in np.array_split(np.arange(len(pages)), max(1, len(pages) // max(batch_size, 2))):
            samples = [_sample(pages[index]) for index in chosen]
            said = answer_batch(model, processor, samples, named, max_new_tokens=max_new_tokens, exchanged=others)
            for name, answer in answers.items():
                answer.texts += said.texts[name]
                answer.tokens += [tokens for (tokens,) in said.tokens[name]]
                answer.seconds += said.seconds[name]
            bar.update(len(samples))
    return answers


def _sample(page: DocumentPage) -> Sample:
    return Sample(page.file, page.prompt, (page.answer,), [page.path], {})


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
