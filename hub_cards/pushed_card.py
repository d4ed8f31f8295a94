"""The card that `model.push_to_hub` sends along: what the model knows of itself, where nobody has written one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adaptive_llava.hub_cards.card_facts import CardFacts
from adaptive_llava.hub_cards.card_text import is_as_rendered, render_card
from adaptive_llava.hub_cards.stock_card import is_stock
from adaptive_llava.hub_cards.upload_plan import CARD, UNTRAINED_NOTE, untrained_card


def complete_card(model: Any, folder: Path, name: str) -> None:
    """Bring the card in a folder that is about to be pushed up to what the model is.

    transformers' empty form becomes a rendered card. A card that is there stays, and says whether parts are untrained.

    Args:
        model: What is pushed.
        folder: Holds its files and the card, as transformers wrote them.
        name: Hub id of the repository.
    """
    card = (folder / CARD).read_text(encoding="utf-8")
    untrained = not model.config.compressor_trained
    if is_stock(card) or (is_as_rendered(card) and untrained != (UNTRAINED_NOTE.strip() in card)):
        card = render_card([], model.config, CardFacts(name=name, weights=model.num_parameters()))
    elif untrained:
        card = untrained_card(card)
    (folder / CARD).write_text(card, encoding="utf-8")
