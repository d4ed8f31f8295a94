"""Chat templates of the LLaVA family, and chats brought into the one form that they read."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any


# An image part stands on its own line: "<image>\nWhat is this?". Text parts are joined as they are.
_CONTENT = """
{%- macro content(message) -%}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- set last = namespace(type=none) -%}
{%- for part in message.content or [] -%}
{%- if last.type and (part.type == 'image' or last.type == 'image') -%}{{ '\\n' }}{%- endif -%}
{%- if part.type == 'image' -%}{{ image_token | default('<image>') }}{%- else -%}{{ part.text }}{%- endif -%}
{%- set last.type = part.type -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

VICUNA_CHAT_TEMPLATE = (
    _CONTENT
    + """
{%- if messages[0].role == 'system' -%}
{{ content(messages[0]) + ' ' }}
{%- else -%}
{{ "A chat between a curious user and an artificial intelligence assistant. " }}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ 'USER: ' + content(message) + ' ' }}
{%- elif message.role == 'assistant' -%}{{ 'ASSISTANT:' }}
{%- generation -%}{{ ' ' + content(message) + (eos_token or '') }}{%- endgeneration -%}
{%- elif message.role != 'system' or not loop.first -%}
{{ raise_exception('Role ' + message.role + ' has no place here. Use user, assistant, or system first.') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""
)

CHATML_CHAT_TEMPLATE = (
    _CONTENT
    + """
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
{{ raise_exception('Role ' + message.role + ' is unknown. Use system, user, assistant or tool.') }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ content(message) + '<|im_end|>' }}{%- endgeneration -%}
{%- else -%}{{ content(message) + '<|im_end|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
)

CHAT_TEMPLATES = {"vicuna": VICUNA_CHAT_TEMPLATE, "chatml": CHATML_CHAT_TEMPLATE}

# A noncharacter, which Unicode keeps for internal use. Written into a control token it makes ordinary text of it;
# the processor takes it out again between tokenisation and padding.
TEXT_MARK = "\ufdd0"


def control_token_pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches any of a tokenizer's control tokens, the longest first."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token) or "(?!)")


def as_plain_text(text: str, control_tokens: re.Pattern[str]) -> str:
    """The same text with every control token broken by a mark after its first character."""
    text = text.replace(TEXT_MARK, "")
    start = 0
    while match := control_tokens.search(text, start):
        # from the next character on: a token may begin inside another
        start = match.start() + 1
        text = text[:start] + TEXT_MARK + text[start:]
    return text


def normalise_messages(
    messages: Sequence[Mapping[str, Any]], control_tokens: re.Pattern[str] | None
) -> tuple[list[dict[str, Any]], list[Any]]:
    """One chat as lists of text and image parts, and its images in prompt order.

    Args:
        messages: `{"role": ..., "content": ...}`, the content a string or a list of parts: `{"type": "text", "text":
            ...}`, `{"type": "image", "image" | "path" | "url" | "base64": ...}`, or OpenAI's `image_url`.
        control_tokens: What text parts must not write; `None` leaves text as it is.

    Raises:
        ValueError: A part that is neither text nor image.
    """
    if not messages:
        raise ValueError("`conversation` is empty. Pass at least one message.")
    normalised, images = [], []
    for message in messages:
        content = message.get("content")
        if content is not None:
            parts = []
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                kind = part.get("type")
                if kind in ("image", "image_url"):
                    image = _image_of(part)
                    images += [] if image is None else [image]
                    parts.append({"type": "image"})
                elif kind == "text" and isinstance(part.get("text"), str):
                    text = part["text"] if control_tokens is None else as_plain_text(part["text"], control_tokens)
                    parts.append({"type": "text", "text": text})
                else:
                    raise ValueError(
                        f"A message has a part of type {kind!r} with keys {sorted(part)}. Write "
                        "{'type': 'text', 'text': ...} or {'type': 'image', 'image': ...}."
                    )
            content = parts
        normalised.append({**{key: value for key, value in message.items() if value is not None}, "content": content})
    return normalised, images


def _image_of(part: Mapping[str, Any]) -> Any:
    url = part.get("image_url")
    if url is not None:
        return url["url"] if isinstance(url, Mapping) else url
    if part.get("base64") is not None:
        try:
            return base64.b64decode(part["base64"].rpartition(",")[2], validate=True)
        except binascii.Error as error:
            raise ValueError(f"An image part's `base64` is not valid base64: {error}.") from error
    return next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
