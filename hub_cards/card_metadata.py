"""What the Hub reads of a card: the front matter with its `model-index`, and the entries of `.eval_results`.

Both come from the results files of `evaluate`, and both are short: of each dataset, what the router chooses and the
most tokens. The other budgets are in the card's table, and in the results files themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import yaml_dump

from adaptive_llava.hub_cards.card_facts import CardFacts
from adaptive_llava.hub_cards.upload_plan import HUB_ID, UNTRAINED_TAG
from adaptive_llava.training.token_budgets import AUTO


LIBRARY, PIPELINE, TAG = "transformers", "image-text-to-text", "adaptive-llava"
ADAPTER_LIBRARY = "peft"
FROM_SCRATCH_TAG = "trained-from-scratch"
EVAL_RESULTS = ".eval_results"

Results = Mapping[str, Any]


def one_line(text: str) -> str:
    """Without line breaks, runs of blanks and control characters, none of which belong into a name."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def slug(text: str) -> str:
    """A part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "data"


def check_results(results: Results, origin: str = "results") -> Results:
    """The same, if a card can be written from them.

    Raises:
        ValueError: They are no results of `evaluate`; what is missing is named.
    """
    missing = [name for name in ("data", "metric", "questions", "budgets") if name not in results]
    for row in results.get("budgets", ()):
        missing += [f"budgets.{name}" for name in ("budget", "score", "mean_tokens") if name not in row]
    if missing:
        raise ValueError(f"{origin} lacks {', '.join(missing)}. Pass `results.json` of `evaluate`.")
    return results


def is_untrained(config: Any, facts: CardFacts) -> bool:
    """Whether the card must say that parts were never trained; an adapter has none of its own that were not."""
    return facts.adapter is None and not config.compressor_trained


def data_label(result: Results) -> str:
    """A dataset's name, with the subset that was asked."""
    subset = option_of(result, "subset")
    return one_line(result["data"]) + ("" if subset is None else f", {subset}")


def wholes(results: Sequence[Results]) -> list[Results]:
    """The results that are not of a subset of another one's dataset."""

    def told(result: Results) -> tuple[Any, ...]:
        return result["data"], result["metric"], option_of(result, "split")

    whole = {told(result) for result in results if option_of(result, "subset") is None}
    return [result for result in results if option_of(result, "subset") is None or told(result) not in whole]


def shown_to_the_hub(results: Sequence[Results]) -> list[tuple[Results, Mapping[str, Any]]]:
    """Of each dataset the most tokens that were asked for, then what the router chose."""
    shown = []
    for result in wholes(results):
        fixed = [row for row in result["budgets"] if row["budget"] != AUTO]
        largest = [max(fixed, key=lambda row: row["mean_tokens"])] if fixed else []
        shown += [(result, row) for row in [*largest, *(row for row in result["budgets"] if row["budget"] == AUTO)]]
    return shown


def front_matter(results: Sequence[Results], config: Any, facts: CardFacts) -> str:
    """YAML of the card's head, without the lines of dashes. What was not stated is left out.

    Args:
        results: Of `evaluate`, one per dataset.
        config: Of the model.
        facts: What people state.
    """
    tags = {TAG, "visual-token-compression", config.compressor["type"], config.router["type"]}
    if is_untrained(config, facts):
        tags.add(UNTRAINED_TAG)
    if facts.from_scratch:
        tags.add(FROM_SCRATCH_TAG)
    if facts.adapter is not None:
        tags.add(facts.adapter.split()[0].lower())
    licence = {name: getattr(facts, name) for name in ("license", "license_name", "license_link")}
    stated: dict[str, Any] = {name: one_line(value) for name, value in licence.items() if value is not None}
    if facts.base_model and not facts.from_scratch:
        stated |= {"base_model": one_line(facts.base_model), "base_model_relation": facts.base_model_relation}
    data = ModelCardData(
        **stated,
        library_name=LIBRARY if facts.adapter is None else ADAPTER_LIBRARY,
        pipeline_tag=PIPELINE,
        datasets=None if facts.datasets is None else [name for name in facts.datasets if HUB_ID.fullmatch(name)],
        language=None if facts.language is None else [one_line(code) for code in facts.language],
        tags=sorted(tags),
        metrics=sorted({one_line(result["metric"]) for result in results}) or None,
        model_name=one_line(facts.name),
        eval_results=eval_results(results) or None,
    )
    if not results:
        data.model_name = None
    return data.to_yaml()


def eval_results(results: Sequence[Results]) -> list[EvalResult]:
    """What `model-index` says; the Hub tells datasets apart by their type, so that this is their name here."""
    return [
        EvalResult(
            task_type=PIPELINE,
            dataset_type=one_line(result["data"]),
            dataset_name=one_line(result["data"]),
            dataset_config=option_of(result, "subset"),
            dataset_split=option_of(result, "split"),
            metric_type=one_line(result["metric"]),
            metric_name=f"{one_line(result['metric'])}, {budget_text(row)}",
            metric_value=row["score"]["value"],
            metric_args={"visual_token_budget": row["budget"], "mean_visual_tokens": row["mean_tokens"]},
        )
        for result, row in shown_to_the_hub(results)
    ]


def eval_result_files(results: Sequence[Results]) -> dict[str, str]:
    """YAML of `.eval_results` by name, for datasets that are on the Hub; each variant of a task has its own file.

    huggingface_hub < 1 has no parser for them, so they are written without its classes.
    """
    files = {}
    for result, row in shown_to_the_hub(results):
        if not HUB_ID.fullmatch(result["data"]):
            continue
        task = option_of(result, "subset") or "default"
        entry = {
            "dataset": {"id": result["data"], "task_id": task},
            "value": row["score"]["value"],
            "notes": f"{one_line(result['metric'])}, {budget_text(row)}",
        }
        name = f"{slug(result['data'])}_{slug(task)}_{slug(result['metric'])}_{slug(row['budget'])}"
        files[f"{EVAL_RESULTS}/{name}.yaml"] = yaml_dump([entry], sort_keys=False)
    return files


def budget_text(row: Mapping[str, Any]) -> str:
    """A budget and what it costs, in a few words."""
    if row["budget"] == AUTO:
        return f"tokens chosen per image, {row['mean_tokens']:g} on average"
    return f"at most {row['budget']} visual tokens per image, {row['mean_tokens']:g} on average"


def option_of(result: Results, name: str) -> str | None:
    """An option of `evaluate`, if it was given."""
    value = (result.get("options") or {}).get(name)
    return None if value is None else one_line(str(value))
