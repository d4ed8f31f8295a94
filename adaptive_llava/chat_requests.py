"""Requests of OpenAI's chat protocol, checked whole before the model sees them.

Images come as `data:` URLs only: nothing is fetched, and no path is opened, on the word of a message. What a request
asks for and this server cannot do is refused, never left out in silence.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from PIL import Image

from adaptive_llava.image_bytes import MAX_BYTES, check_byte_count, check_image_count, read_image_bytes
from adaptive_llava.processing.prompt_encoding import check_encodable


# What the server acts on, and what asks for nothing: names for the caller's own books, and usage, which always comes.
FIELDS = (
    "model", "messages", "stream", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed",
    "stop", "visual_token_budget", "n", "stream_options", "user", "metadata", "store",
)  # fmt: skip
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_LONGEST_BASE64 = 4 * (MAX_BYTES // 3 + 2)


def check_request(body: Any, *, max_new_tokens: int) -> dict[str, Any]:
    """The fields of a request that are set.

    Args:
        body: The request as it was sent.
        max_new_tokens: Longest answer that may be asked for, in tokens.

    Raises:
        ValueError: A field that this server does not know, or a value out of its range.
    """
    if not isinstance(body, Mapping):
        raise ValueError(f"The request is a {type(body).__name__}. Send a JSON object with `model` and `messages`.")
    fields = {key: value for key, value in body.items() if value is not None}
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise ValueError(f"`{unknown[0]}` is not supported here. Leave it out; supported: {', '.join(FIELDS)}.")
    _check_whole(fields, "n", 1, 1)
    for name in ("max_tokens", "max_completion_tokens"):
        _check_whole(fields, name, 1, max_new_tokens)
    _check_whole(fields, "seed", 0, 2**32 - 1)
    _check_number(fields, "temperature", 0, 2)
    _check_number(fields, "top_p", 0, 1)
    stop = fields.get("stop", "")
    if not isinstance(stop, str) and not (isinstance(stop, list) and all(isinstance(text, str) for text in stop)):
        raise ValueError(f"`stop={stop!r}` must be a string or a list of strings.")
    if not isinstance(fields.get("stream", False), bool):
        raise ValueError(f"`stream={fields['stream']!r}` must be true or false.")
    return fields


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages of OpenAI's form as the processor's chat: text parts and decoded images, in their order.

    Args:
        messages: `{"role": ..., "content": ...}`, the content a string or a list of `{"type": "text", "text": ...}`
            and `{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}`.

    Raises:
        ValueError: Another role or part, an image that is no data URL, too many images, or one that
            `read_image_bytes` refuses.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("`messages` must be a non-empty list of {'role': ..., 'content': ...}.")
    chat = [_message(message) for message in messages]
    image_parts = [part for message in chat for part in message["content"] if part["type"] == "image"]
    check_image_count(len(image_parts))
    for index, part in enumerate(image_parts):
        part["image"] = read_data_url(part["image"], index)
    return chat


def images_of(chat: list[dict[str, Any]]) -> list[Image.Image]:
    """All images of what `read_messages` returns, in prompt order."""
    return [part["image"] for message in chat for part in message["content"] if part["type"] == "image"]


def read_data_url(url: Any, index: int = 0) -> Image.Image:
    """The image of a `data:` URL; its bytes tell the format, not the URL's media type.

    Args:
        url: `data:image/...;base64,...`.
        index: Position in the request, for the errors.

    Raises:
        ValueError: Any other address, a path, no base64, or an image that `read_image_bytes` refuses.
    """
    head, comma, content = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not head.startswith("data:") or not comma:
        raise ValueError(
            f"Image {index + 1} is no data URL ({str(url)[:80]!r}), and no address is fetched and no file is opened "
            "here. Send its bytes: 'data:image/png;base64,...'."
        )
    if len(content) > _LONGEST_BASE64:  # before a copy of it is made
        check_byte_count(3 * len(content) // 4, index)
    try:
        decoded = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"Image {index + 1} is no valid base64: {error}. Encode the file's bytes anew.") from error
    return read_image_bytes(decoded, index)


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or message.get("role") not in tuple(ROLES):
        role = message.get("role") if isinstance(message, Mapping) else message
        raise ValueError(f"A message has the role {str(role)[:80]!r}. Use one of: {', '.join(ROLES)}.")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts or message.get("tool_calls"):
        raise ValueError(
            f"A message of the role {message['role']!r} has no content, or calls tools, which are not supported here. "
            "Send a string or a list of parts."
        )
    return {"role": ROLES[message["role"]], "content": [_part(part) for part in parts]}


def _part(part: Any) -> dict[str, Any]:
    fields = part if isinstance(part, Mapping) else {}
    kind = fields.get("type")
    if kind == "text" and isinstance(fields.get("text"), str):
        check_encodable(fields["text"], "A message's text")
        return {"type": "text", "text": fields["text"]}
    if kind == "image_url":
        address = fields.get("image_url")
        return {"type": "image", "image": address.get("url") if isinstance(address, Mapping) else address}
    raise ValueError(
        f"A message has a part of type {str(kind if fields else part)[:80]!r}. Send {{'type': 'text', 'text': ...}} "
        "or {'type': 'image_url', 'image_url': {'url': 'data:image/png;base64,...'}}."
    )


def _check_whole(fields: Mapping[str, Any], name: str, least: int, most: int) -> None:
    value = fields.get(name, least)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"`{name}={value!r}` must be a whole number from {least} to {most}.")


def _check_number(fields: Mapping[str, Any], name: str, least: float, most: float) -> None:
    value = fields.get(name, least)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"`{name}={value!r}` must be a number from {least} to {most}.")
