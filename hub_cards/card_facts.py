"""What a card says that neither the config nor the results tell: licence, origin, data, in a file beside the model."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from adaptive_llava.hub_cards.upload_plan import ADAPTER, ADAPTER_WEIGHTS, CONFIG, HUB_ID, MODEL_WEIGHTS


FACTS = "card.yaml"
FROM_SCRATCH = "none"
RELATIONS = ("finetune", "merge", "quantized", "adapter")
OF_ADAPTERS = "adapter"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LISTS = ("datasets", "language")


@dataclass(frozen=True)
class CardFacts:
    """What people state about a model. `None`: not stated yet.

    Attributes:
        name: Hub id, or name of the folder.
        license: Identifier of the Hub, such as `apache-2.0`; `other` needs the next two.
        license_name: Short name of a licence that the Hub does not list.
        license_link: Its address, or a file of the repository.
        base_model: Hub id of what the model was made from; `"none"`: trained from nothing.
        base_model_relation: One of `RELATIONS`.
        datasets: Training data: Hub ids, and names of data that are not on the Hub.
        language: ISO 639 codes.
        summary: Markdown: what it is and what it is for, in a paragraph.
        training_data: Markdown: what the model was trained on.
        limits: Markdown: what it cannot do, beside what follows from its config.
        revision: Commit to pin, 40 hexadecimal digits.
        code_revision: The same of the repository that holds the code, if that is another one.
        base_revision: The same of an adapter's base.
        loading: Markdown in place of the loading snippets, for a model that is not on the Hub. Its Python makes the
            `model`, its `processor` and `inputs`.
        chat: Whether there is a chat template. Read from the folder, as are the next two.
        weights: Number of weights.
        adapter: What kind of adapter it is; `None`: a whole model.

    Raises:
        ValueError: A revision that is no commit id, or an unknown relation.
    """

    name: str = "user/name"
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None
    base_model_relation: str = "finetune"
    datasets: tuple[str, ...] | None = None
    language: tuple[str, ...] | None = None
    summary: str | None = None
    training_data: str | None = None
    limits: str | None = None
    revision: str | None = None
    code_revision: str | None = None
    base_revision: str | None = None
    loading: str | None = None
    chat: bool = True
    weights: int | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        for name in ("revision", "code_revision", "base_revision"):
            value = getattr(self, name)
            if value is not None and not _COMMIT.fullmatch(value):
                raise ValueError(
                    f"`{name}={value!r}` is no commit id, and branches and tags can be moved. Pass its 40 hexadecimal "
                    "digits; `python -m adaptive_llava verify user/name` prints them."
                )
        if self.base_model_relation not in RELATIONS:
            raise ValueError(f"`base_model_relation={self.base_model_relation!r}` must be one of: {RELATIONS}.")

    @property
    def from_scratch(self) -> bool:
        return self.base_model == FROM_SCRATCH


_READ = ("chat", "weights", "adapter")
STATED = tuple(field.name for field in dataclasses.fields(CardFacts) if field.name not in _READ)


def read_facts(folder: Path, options: Mapping[str, Any] | None = None) -> CardFacts:
    """The facts of a folder. An adapter's base is the one that it names.

    Args:
        folder: Holds the model or adapter and, if anything has been stated, `card.yaml`.
        options: What is stated now; `None` values state nothing.

    Raises:
        ValueError: `card.yaml` has unknown fields, or values of a wrong type.
    """
    stated = _stated(folder / FACTS) | {name: value for name, value in (options or {}).items() if value is not None}
    adapter = read_adapter(folder)
    if adapter is not None:
        stated = {"base_model": adapter["base_model_name_or_path"]} | stated | {"base_model_relation": OF_ADAPTERS}
    for name, value in stated.items():
        listed = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        if not (listed if name in _LISTS else isinstance(value, str)):
            kind = "a list of texts" if name in _LISTS else "a text"
            raise ValueError(f"`{name}={value!r}` in {folder / FACTS} must be {kind}.")
    found: dict[str, Any] = {name: tuple(value) if name in _LISTS else value for name, value in stated.items()}
    facts = CardFacts(**({"name": folder.resolve().name} | found))
    kind = None if adapter is None else _kind_of(adapter)
    return replace(facts, chat=has_chat_template(folder), weights=_number_of_weights(folder), adapter=kind)


def read_adapter(folder: Path) -> dict[str, Any] | None:
    """The config of the folder's adapter; `None`: it holds a whole model."""
    path = folder / ADAPTER
    if not path.is_file() or (folder / CONFIG).is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found | {"base_model_name_or_path": found.get("base_model_name_or_path") or ""}


def note_training(folder: Path, base_model: str | None, dataset: str | None) -> None:
    """State what a training knows, unless somebody stated it already.

    Args:
        folder: Where `card.yaml` is, or is to be.
        base_model: What the training started from; a folder states nothing.
        dataset: Hub id, or path, of which only the name is stated.
    """
    stated = _stated(folder / FACTS)
    known: dict[str, Any] = {}
    if base_model and HUB_ID.fullmatch(base_model) and not Path(base_model).exists():
        known["base_model"] = base_model
    if dataset:
        known["datasets"] = [dataset if HUB_ID.fullmatch(dataset) else Path(dataset).name]
    write_facts(folder, read_facts(folder, known | stated))


def write_facts(folder: Path, facts: CardFacts) -> None:
    """Keep what was stated for the next time."""
    stated = {name: getattr(facts, name) for name in STATED if getattr(facts, name) is not None}
    adapter = read_adapter(folder) or {}
    of_the_folder = {  # it may be renamed, and the adapter may get another base
        "name": folder.resolve().name,
        "base_model": adapter.get("base_model_name_or_path"),
        "base_model_relation": OF_ADAPTERS,
    }
    stated = {name: value for name, value in stated.items() if of_the_folder.get(name) != value}
    stated |= {name: list(stated[name]) for name in _LISTS if name in stated}
    (folder / FACTS).write_text(yaml.safe_dump(stated, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _stated(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}.") from error
    unknown = sorted(set(map(str, found)) - set(STATED)) if isinstance(found, dict) else [type(found).__name__]
    if unknown:
        raise ValueError(f"{path} has {', '.join(unknown)}. Known fields: {', '.join(STATED)}.")
    return found


def has_chat_template(folder: Path) -> bool:
    """Whether a folder has a processor's chat template."""
    config = folder / "tokenizer_config.json"
    written = config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    return written or (folder / "chat_template.jinja").is_file()


def _number_of_weights(folder: Path) -> int | None:
    patterns = MODEL_WEIGHTS if read_adapter(folder) is None else ADAPTER_WEIGHTS
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.suffix == ".safetensors"}
    total = 0
    for path in sorted(paths):
        with safe_open(str(path), "pt") as file:
            total += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())
    return total or None


def _kind_of(adapter: Mapping[str, Any]) -> str:
    kind = str(adapter.get("peft_type") or "adapter")
    rank = adapter.get("r")
    name = {"LORA": "LoRA adapter"}.get(kind, kind)
    return f"{name} of rank {rank}" if isinstance(rank, int) else name
