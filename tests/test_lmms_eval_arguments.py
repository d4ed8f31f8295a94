"""Options of lmms-eval's command line and of its tasks, as this package understands them."""

from __future__ import annotations

import pytest

from adaptive_llava.training.budget_sweep import MOST_TOKENS
from adaptive_llava.training.lmms_eval_plugin.model_arguments import (
    generation_arguments,
    parse_batch_size,
    parse_budget,
    until_stop,
)


@pytest.mark.parametrize(
    ("given", "budget"),
    [("auto", "auto"), (144, 144), ("full", MOST_TOKENS), ('{"ceiling": 9}', {"ceiling": 9})],
)
def test_budgets_of_the_command_line(given, budget):
    assert parse_budget(given) == budget


@pytest.mark.parametrize("given", ["some", 1.5, True, "[4, 9]", "{4}"])
def test_unknown_budgets_are_refused(given):
    with pytest.raises(ValueError, match="is no budget. Pass `auto`, `full`"):
        parse_budget(given)


@pytest.mark.parametrize("given", ["auto", "auto:2", 0, "-1"])
def test_batch_sizes_that_are_no_number_are_refused(given):
    with pytest.raises(ValueError, match="must be a whole number of samples"):
        parse_batch_size(given)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"temperature": 0, "do_sample": True, "top_p": 1.0}, {"do_sample": False, "max_new_tokens": 1024}),
        ({"max_new_tokens": 8, "until": ["x"]}, {"do_sample": False, "max_new_tokens": 8}),
        ({"temperature": 0.7, "top_p": None}, {"do_sample": True, "max_new_tokens": 1024, "temperature": 0.7}),
        ({"temperature": 0.7, "do_sample": False}, {"do_sample": False, "max_new_tokens": 1024}),
        ({"num_beams": 3, "image_aspect_ratio": "pad"}, {"do_sample": False, "max_new_tokens": 1024, "num_beams": 3}),
    ],
)
def test_generation_options_of_tasks(options, arguments):
    assert generation_arguments(options) == arguments


def test_answers_end_at_the_first_stop():
    assert until_stop(" \n\nyes, it is\n\nUSER: more", ["\n\n", ""]) == "yes, it is"
    assert until_stop("yes.", None) == "yes."
    assert until_stop("a;b", ";") == "a"
