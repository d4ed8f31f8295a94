"""From lmms-eval's options to this package's: budgets, batch sizes, and the generation options of tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from adaptive_llava.training.budget_sweep import FULL, MOST_TOKENS


MOST_NEW_TOKENS = 1024  # of tasks that set no bound


def parse_budget(given: str | int) -> int | str | dict[str, int]:
    """`visual_token_budget` of `--model_args budget=...`.

    Args:
        given: `auto`, `full`, a whole number of tokens, or JSON, `{"ceiling": n}` or `{"total": n}`. lmms-eval has
            made numbers of what looks like one.

    Raises:
        ValueError: None of these.
    """
    if given == "auto" or (isinstance(given, int) and not isinstance(given, bool)):
        return given
    if given == FULL:
        return MOST_TOKENS
    try:
        budget = json.loads(given) if isinstance(given, str) else None
    except json.JSONDecodeError:
        budget = None
    if not isinstance(budget, dict):
        raise ValueError(
            f"`budget={given}` is no budget. Pass `auto`, `full`, a whole number of tokens per image, or JSON: "
            '`budget={"ceiling": 144}` or `budget={"total": 700}`.'
        )
    return budget


def parse_batch_size(given: int | str) -> int:
    """`--batch_size`, which lmms-eval hands on as it was typed.

    Raises:
        ValueError: No whole number from 1 up; `auto` is not there.
    """
    if not str(given).isdecimal() or int(given) < 1:
        raise ValueError(f"`--batch_size {given}` must be a whole number of samples, at least 1.")
    return int(given)


def generation_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` from a task's `generation_kwargs`; what only other models know is left out."""
    temperature = options.get("temperature")
    samples = bool(options.get("do_sample", temperature)) and temperature != 0
    names = ["max_new_tokens", "num_beams", *(["temperature", "top_p", "top_k"] if samples else [])]
    given = {name: options[name] for name in names if options.get(name) is not None}
    return {"max_new_tokens": MOST_NEW_TOKENS, "do_sample": samples, **given}


def until_stop(text: str, stops: str | Sequence[str] | None) -> str:
    """An answer without outer blanks, up to the first of the task's stop strings."""
    text = text.strip()
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.split(stop)[0] if stop else text
    return text.strip()
