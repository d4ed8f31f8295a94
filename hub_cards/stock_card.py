"""Cards that transformers or PEFT wrote by themselves and nobody edited: forms with nothing filled in."""

from __future__ import annotations

import re
from functools import cache

from huggingface_hub import ModelCard, ModelCardData


_VERSIONS = re.compile(r"### Framework versions\n.*", re.DOTALL)
_SENTENCE = (  # transformers' own
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)


def is_stock(card: str) -> bool:
    """Whether the text of a card is the empty form, whatever its front matter says."""
    return _text(ModelCard(card, ignore_metadata_errors=True)) in _forms()


@cache
def _forms() -> frozenset[str]:
    cards = (
        ModelCard.from_template(ModelCardData()),
        ModelCard.from_template(ModelCardData(), model_description=_SENTENCE),
    )
    return frozenset(map(_text, cards))


def _text(card: ModelCard) -> str:
    """Without the versions that PEFT adds."""
    lines = _VERSIONS.sub("", card.text).splitlines()
    return "\n".join(stripped for line in lines if (stripped := line.strip()))
