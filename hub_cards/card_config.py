"""The config that a card describes: the model's own, or that of the base of an adapter."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from adaptive_llava.hub_cards.card_facts import has_chat_template, read_adapter
from adaptive_llava.hub_cards.hub_errors import tell_hub_failures
from adaptive_llava.hub_cards.upload_plan import CONFIG
from adaptive_llava.modeling.configuration_adaptive_llava import AdaptiveLlavaConfig


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to.

    Attributes:
        config: Its config.
        chat: Whether it has a chat template.
        commit: Its commit; `None` if it is a folder.
    """

    config: AdaptiveLlavaConfig
    chat: bool
    commit: str | None = None


def read_config(folder: Path) -> AdaptiveLlavaConfig:
    """The config of the folder's model.

    Raises:
        ValueError: There is none, or it is that of another kind of model.
    """
    return _read(folder / CONFIG, str(folder / CONFIG))


def read_base(name: str, *, revision: str | None = None, token: str | None = None) -> Base:
    """What a card says of an adapter's base.

    Args:
        name: Folder or Hub id.
        revision: Branch, tag or commit of the Hub; by default the newest commit of `main`.
        token: Access token; by default that of `hf auth login`, or HF_TOKEN.

    Raises:
        ValueError: It is another kind of model.
        HubFailure: It could not be read.
    """
    if Path(name).is_dir():
        return Base(read_config(Path(name)), has_chat_template(Path(name)))
    api = HfApi(token=token)
    with tell_hub_failures(name or "The adapter's base", "was not read"):
        info = api.model_info(name, revision=revision)
        path = Path(api.hf_hub_download(name, CONFIG, revision=info.sha))
    files = {file.rfilename for file in info.siblings or ()}
    return Base(_read(path, f"{CONFIG} of {name}"), "chat_template.jinja" in files, info.sha)


def base_of(folder: Path, name: str | None = None, token: str | None = None) -> Base:
    """The base of a folder's adapter, at the revision that the adapter was trained on if it names one.

    Args:
        folder: Holds the adapter.
        name: Folder or Hub id; by default what the adapter says.
        token: As of `read_base`.
    """
    adapter = read_adapter(folder) or {}
    return read_base(name or adapter["base_model_name_or_path"], revision=adapter.get("revision"), token=token)


def _read(path: Path, shown: str) -> AdaptiveLlavaConfig:
    kind = json.loads(path.read_text(encoding="utf-8")).get("model_type") if path.is_file() else None
    if kind != AdaptiveLlavaConfig.model_type:
        raise ValueError(
            f"{shown} has `model_type={kind!r}`. Pass the folder of an {AdaptiveLlavaConfig.model_type!r} model, or "
            "of an adapter of one."
        )
    return AdaptiveLlavaConfig.from_pretrained(str(path.parent))
