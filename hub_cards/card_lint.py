"""Refuse a card in which something is missing, and say what to do about each point."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

from adaptive_llava.hub_cards.card_facts import OF_ADAPTERS, RELATIONS
from adaptive_llava.hub_cards.card_metadata import ADAPTER_LIBRARY, FROM_SCRATCH_TAG, LIBRARY, PIPELINE, TAG
from adaptive_llava.hub_cards.card_text import SECTIONS
from adaptive_llava.hub_cards.upload_plan import HUB_ID, UNTRAINED_NOTE, UNTRAINED_TAG


_FRONT = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
_UNFILLED = ("[More Information Needed]", "[optional]", "Not stated.")

Data = dict[str, Any]


def lint_card(card: str, folder: Path | None = None, *, untrained: bool = False) -> list[str]:
    """What is missing or wrong, one sentence each that begins with the name of the field or section.

    Args:
        card: The whole `README.md`.
        folder: Where its pictures are; `None`: not looked for.
        untrained: Whether parts of the model were never trained, so that the card must say so.
    """
    found = _FRONT.match(card)
    if found is None:
        return ["front matter: there is none. Write a card with `python -m adaptive_llava card`."]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"front matter: it is no YAML ({error})."]
    if not isinstance(data, dict):
        return ["front matter: it is no mapping of fields."]
    problems = [f"{name}: {said}" for name, check in FIELDS.items() if (said := check(data)) is not None]
    text = card[found.end() :]
    problems += _missing_sections(text)
    problems += [f"text: it has {unfilled!r}. Write what belongs there." for unfilled in _UNFILLED if unfilled in text]
    if untrained and (UNTRAINED_TAG not in _listed(data, "tags") or UNTRAINED_NOTE.strip() not in text):
        problems.append(
            "untrained: the config has `compressor_trained: false`, and the card does not say so. Render it again."
        )
    if folder is not None:
        pictures = [name for name in _PICTURE.findall(text) if "://" not in name]
        problems += [f"picture: {name} is not in {folder}." for name in pictures if not (folder / name).is_file()]
    return problems


def _licence(data: Data) -> str | None:
    if not _text(data, "license"):
        return "missing. Pass --license apache-2.0, or another identifier of the Hub."
    if data["license"] == "other" and not (_text(data, "license_name") and _text(data, "license_link")):
        return "'other' needs `license_name` and `license_link`. Write them into card.yaml."
    return None


def _base_model(data: Data) -> str | None:
    names = [data["base_model"]] if _text(data, "base_model") else _listed(data, "base_model")
    if not names and FROM_SCRATCH_TAG not in _listed(data, "tags"):
        return "missing. Pass --base-model user/name, or --base-model none if it was trained from nothing."
    if not all(HUB_ID.fullmatch(name) for name in names):
        return f"{', '.join(names)} is no id on the Hub. Pass --base-model user/name."
    return None


def _relation(data: Data) -> str | None:
    if data.get("base_model") is not None and data.get("base_model_relation") not in RELATIONS:
        return f"must be one of {', '.join(RELATIONS)}. Pass --relation."
    return None


def _datasets(data: Data) -> str | None:
    if not isinstance(data.get("datasets"), list):
        return "missing. Pass --dataset for each, also for those that are not on the Hub."
    wrong = [str(name) for name in data["datasets"] if not HUB_ID.fullmatch(str(name))]
    return f"{', '.join(wrong)} is no id on the Hub. Name it in the text alone." if wrong else None


def _metrics(data: Data) -> str | None:
    if not _listed(data, "metrics") and UNTRAINED_TAG not in _listed(data, "tags"):
        return "missing. Evaluate the model, and pass --results results.json."
    return None


def _model_index(data: Data) -> str | None:
    if "model-index" not in data:
        return (
            None if UNTRAINED_TAG in _listed(data, "tags") else "missing. Pass --results results.json of `evaluate`."
        )
    try:
        name, results = model_index_to_eval_results(data["model-index"])
    except (KeyError, TypeError, ValueError) as error:
        return f"huggingface_hub cannot read it ({type(error).__name__}: {error}). Render the card again."
    unnamed = [result.metric_type for result in results if result.metric_type not in _listed(data, "metrics")]
    if not name or not results:
        return "it has no name, or no results. Pass --results results.json of `evaluate`."
    return f"`metrics` lacks {', '.join(sorted(set(unnamed)))}. Render the card again." if unnamed else None


def _library(data: Data) -> str | None:
    expected = ADAPTER_LIBRARY if data.get("base_model_relation") == OF_ADAPTERS else LIBRARY
    return None if data.get("library_name") == expected else f"must be {expected}. Render the card again."


def _pipeline(data: Data) -> str | None:
    return None if data.get("pipeline_tag") == PIPELINE else f"must be {PIPELINE}. Render the card again."


def _language(data: Data) -> str | None:
    if _text(data, "language") or _listed(data, "language"):
        return None
    return "missing. Pass --language en, or another ISO 639 code."


def _tags(data: Data) -> str | None:
    return None if TAG in _listed(data, "tags") else f"{TAG} is not among them. Render the card again."


# In the order in which the card has them.
FIELDS: dict[str, Callable[[Data], str | None]] = {
    "license": _licence,
    "library_name": _library,
    "pipeline_tag": _pipeline,
    "base_model": _base_model,
    "base_model_relation": _relation,
    "datasets": _datasets,
    "language": _language,
    "tags": _tags,
    "metrics": _metrics,
    "model-index": _model_index,
}


def _missing_sections(text: str) -> list[str]:
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    problems = [f"section {name!r}: missing or empty." for name in SECTIONS if not sections.get(name, "").strip()]
    loading = sections.get("Load it", "")
    if "from_pretrained(" in loading and "revision=" not in loading:
        problems.append("section 'Load it': no snippet has `revision=`, which pins the code that is run.")
    return problems


def _text(data: Data, name: str) -> bool:
    return isinstance(data.get(name), str) and bool(data[name].strip())


def _listed(data: Data, name: str) -> list[str]:
    return [item for item in data[name] if isinstance(item, str)] if isinstance(data.get(name), list) else []
