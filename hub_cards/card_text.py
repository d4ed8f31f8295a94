"""The text of a model card, from results files, a config and what people state. Pure: it reads no clock and no disk.

render_card([json.loads(path.read_text())], model.config, CardFacts(name="user/name", license="apache-2.0"))
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from adaptive_llava import __version__
from adaptive_llava.hub_cards.card_facts import CardFacts
from adaptive_llava.hub_cards.card_metadata import (
    Results,
    check_results,
    data_label,
    front_matter,
    is_untrained,
    one_line,
    wholes,
)
from adaptive_llava.hub_cards.card_pictures import histograms, picture_names
from adaptive_llava.hub_cards.papers import bibtex, first_sentence, part_modules
from adaptive_llava.hub_cards.upload_plan import HUB_ID, UNTRAINED_NOTE
from adaptive_llava.modeling.preset_table import PRESETS
from adaptive_llava.training.calibration_record import calibration_text
from adaptive_llava.training.token_budgets import AUTO


TEMPLATES = Path(__file__).resolve().parent / "templates"
SECTIONS = (
    "Tokens it spends",
    "Accuracy against tokens",
    "Load it",
    "Choose the budget",
    "Fine-tune it",
    "Limits",
    "Training data",
    "Citation",
)

_EVALUATE = "python -m adaptive_llava evaluate"
_MARK = re.compile(r"\n<!-- written by adaptive-llava card; sha256 of the text above: ([0-9a-f]{64}) -->\n$")
_PIN = re.compile(r'^repo, revision = ".*", "([0-9a-f]{40})"', re.MULTILINE)


class Verbatim(str):
    """Text that stands in a card as it is; all other text is escaped."""

    __slots__ = ()


def render_card(
    results: Results | Sequence[Results],
    config: Any,
    facts: CardFacts = CardFacts(),  # noqa: B008, it is frozen
    *,
    pictures: bool = True,
) -> str:
    """The whole `README.md`. Its pictures are those of `draw_pictures`.

    Args:
        results: What `evaluate` wrote, one file or several; of another program, with its command as `measured_by`.
            Subsets of a dataset (`options.subset`) that stands here whole are in the tables alone.
        config: `AdaptiveLlavaConfig` of the model, or of the base of an adapter.
        facts: What people state; what they did not state is left out, and `lint_card` names it.
        pictures: Whether to show pictures.

    Raises:
        ValueError: Results of another kind.
    """
    listed = [results] if isinstance(results, Mapping) else list(results)
    for result in listed:
        check_results(result)
    tokens_picture, score_pictures = picture_names(listed) if pictures else (None, {})
    budgets = _budgets(listed)
    costs = [_costs(wholes(listed), budget) for budget in budgets]
    commands = dict.fromkeys(_plain({"measured_by": _EVALUATE} | result)["measured_by"] for result in listed)
    text = _template().render(
        facts=facts,
        config=config,
        untrained_note=Verbatim(UNTRAINED_NOTE.strip()) if is_untrained(config, facts) else None,
        counts=list(config.visual_token_counts),
        preset=preset_name(config),
        parts=[Verbatim(first_sentence(module)) for module in part_modules(config)],
        histograms=histograms(listed),
        base_on_hub=HUB_ID.fullmatch(facts.base_model or "") is not None,
        tokens_picture=tokens_picture,
        score_pictures=score_pictures,
        results=listed,
        budgets=budgets,
        tried=[AUTO] if config.tiling["type"] == "anyres" else [AUTO, *config.visual_token_counts],
        costs=costs,
        costed=any(cost[kind] is not None for cost in costs for kind in cost if kind not in ("budget", "tokens")),
        measured_by=Verbatim("`, `".join(commands)),
        calibration=None if config.calibration is None else Verbatim(calibration_text(_plain(config.calibration))),
        bibtex=[Verbatim(entry) for entry in bibtex(config)],
        version=__version__,
    )
    whole = f"---\n{front_matter(listed, config, facts)}\n---\n\n{text.strip()}\n"
    return f"{whole}\n<!-- written by adaptive-llava card; sha256 of the text above: {_sum(whole)} -->\n"


def is_as_rendered(card: str) -> bool:
    """Whether `render_card` wrote a card, and nobody has edited it since."""
    found = _MARK.search(card)
    return found is not None and found[1] == _sum(card[: found.start()])


def pinned_revision(card: str) -> str | None:
    """The commit that the loading snippets pin."""
    found = _PIN.search(card)
    return None if found is None else found[1]


def preset_name(config: Any) -> str | None:
    """The published system that a config is, if it is one; the options it leaves open do not count."""
    for name, fields in PRESETS.items():
        options = {"fusion_blocks": None, "prefusion_layers": 0} | fields
        same = all(
            option.items() <= getattr(config, field).items()
            if isinstance(option, dict)
            else getattr(config, field) == option or (option == "default" and getattr(config, field) is not None)
            for field, option in options.items()
        )
        if same:
            return name
    return None


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _budgets(results: Sequence[Results]) -> list[str]:
    """All budgets that were asked, cheapest first, the router's choice last."""
    found = {row["budget"]: row["mean_tokens"] for result in results for row in result["budgets"]}
    return sorted(found, key=lambda name: (name == AUTO, found[name]))


def _costs(results: Sequence[Results], budget: str) -> dict[str, Any]:
    """Means over the questions of all results; `None` where one does not tell."""
    rows = [(result["questions"], row) for result in results for row in result["budgets"] if row["budget"] == budget]

    def mean(find: Any) -> float | None:
        values = [(weight, find(row)) for weight, row in rows]
        if any(value is None for _, value in values):
            return None
        return sum(weight * value for weight, value in values) / sum(weight for weight, _ in values)

    flops = [
        lambda row, kind=kind: (row.get("prefill_flops") or {}).get(kind) for kind in ("visual_only", "end_to_end")
    ]
    return {
        "budget": budget,
        "tokens": mean(lambda row: row["mean_tokens"]),
        "visual_only": mean(flops[0]),
        "end_to_end": mean(flops[1]),
        "cache": mean(lambda row: row.get("kv_cache_bytes")),
        "milliseconds": mean(lambda row: row.get("ms_per_image")),
    }


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        finalize=_escaped,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters |= {
        "python": lambda value: Verbatim(json.dumps(value, ensure_ascii=False)),
        "shell": lambda value: Verbatim(shlex.quote(one_line(value))),
        "markdown": lambda value: Verbatim(value.strip()),
        "number": lambda value, unit=1.0: Verbatim("-" if value is None else f"{value / unit:.4g}"),
        "score": _score,
        "label": data_label,
        "row_of": lambda result, budget: next((row for row in result["budgets"] if row["budget"] == budget), None),
    }
    return environment.get_template("model_card.md")


def _escaped(value: Any) -> Any:
    """Names as Markdown shows them; what stands at the start of a line cannot become a heading, a list or a rule."""
    if not isinstance(value, str) or isinstance(value, Verbatim):
        return value
    text = re.sub(r"([\\`*\[\]<>|~$&{}]|(?<!\w)_|_(?!\w))", r"\\\1", one_line(value))
    return re.sub(r"^([#+=:-])", r"\\\1", text)


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record whose names can stand between backticks."""
    return {
        key: one_line(value).replace("`", "'") if isinstance(value, str) else value for key, value in record.items()
    }


def _score(row: Mapping[str, Any] | None) -> Verbatim:
    if row is None:
        return Verbatim("-")
    value, interval = row["score"]["value"], row["score"].get("interval")
    written = f"{value:.3f}" if abs(value) <= 1 else f"{value:.1f}"
    if interval is None:
        return Verbatim(written)
    low, high = (f"{limit:.3f}" if abs(value) <= 1 else f"{limit:.1f}" for limit in interval)
    return Verbatim(f"{written} ({low} to {high})")
