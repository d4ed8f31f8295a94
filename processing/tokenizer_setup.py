"""What a language model's tokenizer needs beside a vision tower: a placeholder, a padding token, readable files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AddedToken


def is_one_token(tokenizer: Any, token: str) -> bool:
    """Whether the tokenizer knows `token` as a token of its own, also inside text."""
    token_id = tokenizer.convert_tokens_to_ids(token)  # None or the unknown token's if there is none
    if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != token:
        return False
    return tokenizer.encode(token, add_special_tokens=False) == [token_id]


def add_placeholder(tokenizer: Any, image_token: str, image_token_id: int) -> None:
    """Add the placeholder, and a padding token, to a tokenizer that lacks them; changed in place.

    Args:
        tokenizer: The language model's.
        image_token: Placeholder of an image.
        image_token_id: Its id in the model's config.

    Raises:
        ValueError: The tokenizer gives it another id.
    """
    if not is_one_token(tokenizer, image_token):
        tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
    token_id = tokenizer.convert_tokens_to_ids(image_token)
    if image_token_id != token_id:
        raise ValueError(
            f"`config.image_token_id={image_token_id}`, but {image_token!r} is token {token_id} of the "
            f"tokenizer. Set `config.image_token_id = {token_id}` before the model is built."
        )
    if tokenizer.pad_token is None:
        # not the end token where there is a choice: collators mask the padding token in the labels
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def make_tokenizer_config_portable(path: Path) -> None:
    """Rewrite what transformers 5 writes into `tokenizer_config.json` and 4.57 cannot read."""
    if not path.is_file():
        return
    options = json.loads(path.read_text(encoding="utf-8"))
    if options.get("tokenizer_class") == "TokenizersBackend":
        options["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(options.get("extra_special_tokens"), list):
        options["additional_special_tokens"] = options.pop("extra_special_tokens")
    # a generic fast tokenizer would emit token_type_ids, which generate() refuses
    options["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(options, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
