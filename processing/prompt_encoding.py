"""From chats and prompts to token ids: messages in one form, user text kept apart from control tokens, expansion."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .prompt_media import PromptMedia, placeholder_pattern


# A noncharacter, which Unicode keeps for internal use. Written into a control token it makes ordinary text of it;
# the processor takes it out again between tokenisation and padding.
TEXT_MARK = "\ufdd0"


def control_token_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
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


def check_encodable(text: str, name: str) -> None:
    """Refuse half a character, as JSON can write it, which no tokenizer reads.

    Args:
        text: Any text.
        name: What it is, for the error.

    Raises:
        ValueError: It has a surrogate without its partner.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a character at position {error.start} (a lone surrogate, {text[error.start]!r}), and is "
            "no Unicode text. Remove it, or send the whole character."
        ) from error


def check_messages(messages: Any) -> None:
    """Refuse what is no chat.

    Raises:
        ValueError: No list of messages, a message without a role, or content that is neither text nor a list of parts.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(
            f"`conversation={messages!r:.80}` must be a non-empty list of messages, or a list of such lists."
        )
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"A message is {message!r:.80}. Write {{'role': 'user', 'content': ...}}, the role a string."
            )
        content = message.get("content")
        listed = isinstance(content, (list, tuple)) and all(isinstance(part, Mapping) for part in content)
        if not (content is None or isinstance(content, str) or listed):
            raise ValueError(f"A message has the content {content!r:.80}. Write a string, or a list of parts.")


def normalise_messages(
    messages: Sequence[Mapping[str, Any]], control_tokens: re.Pattern[str] | None
) -> tuple[list[dict[str, Any]], list[Any], list[Any]]:
    """One chat as lists of text, image and video parts, its images and its videos, both in prompt order.

    Args:
        messages: `{"role": ..., "content": ...}`, the content a string or a list of parts: `{"type": "text", "text":
            ...}`, `{"type": "image", "image" | "path" | "url" | "base64": ...}`, OpenAI's `image_url`, or
            `{"type": "video", "video" | "path" | "url": ...}`.
        control_tokens: What text parts must not write; `None` leaves text as it is.

    Raises:
        ValueError: A part that is neither text, image nor video.
    """
    normalised: list[dict[str, Any]] = []
    images: list[Any] = []
    videos: list[Any] = []
    written = ""  # since the last image: a control token may be written in pieces
    for message in messages:
        content = message.get("content")
        if content is not None:
            parts = []
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                kind = part.get("type")
                if kind in ("image", "image_url", "video"):
                    written = ""
                if kind in ("image", "image_url"):
                    image = _image_of(part)
                    images += [] if image is None else [image]
                    parts.append({"type": "image"})
                elif kind == "video":
                    videos += [part[key] for key in ("video", "path", "url") if part.get(key) is not None][:1]
                    parts.append({"type": "video"})
                elif kind == "text" and isinstance(part.get("text"), str):
                    text = part["text"]
                    if control_tokens is not None:
                        text = as_plain_text(text, control_tokens)
                        text = TEXT_MARK + text if control_tokens.search(written + text) else text
                        written += text
                    parts.append({"type": "text", "text": text})
                else:
                    raise ValueError(
                        f"A message has a part of type {kind!r} with keys {list(part)}. Write "
                        "{'type': 'text', 'text': ...}, {'type': 'image', 'image': ...} or {'type': 'video', "
                        "'video': ...}."
                    )
            content = parts
        normalised.append({**{key: value for key, value in message.items() if value is not None}, "content": content})
    return normalised, images, videos


def encode_prompts(
    tokenizer: Any,
    texts: list[str],
    media: PromptMedia,
    counts: Sequence[int] | None,
    image_token: str,
    text_kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Token ids and masks, lists of `(batch, length)`; offsets refer to `texts` as given.

    Args:
        tokenizer: Knows `image_token` as one token.
        texts: Prompts with one placeholder per image or video.
        media: What stands behind the placeholders.
        counts: Placeholders to write for each image or frame; `None` writes one.
        image_token: Placeholder of an image.
        text_kwargs: Call options of the tokenizer.

    Raises:
        ValueError: Truncation would cut placeholders.
    """
    remaining = iter([1] * len(media.sources) if counts is None else counts)
    slots = [sum(next(remaining) for _ in range(shown)) for shown in media.per_placeholder]
    pattern = placeholder_pattern(image_token, videos=any(media.frames))
    expanded, shifts = expand_placeholders(texts, pattern, image_token, slots)
    data = tokenize(tokenizer, expanded, {**text_kwargs, "return_token_type_ids": False})
    image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    for row, (ids, prompt) in enumerate(zip(data["input_ids"], expanded, strict=True)):
        kept, expected = list(ids).count(image_token_id), prompt.count(image_token)
        if kept != expected:
            specials = text_kwargs.get("add_special_tokens", True)
            full = len(tokenizer(prompt, add_special_tokens=specials)["input_ids"])
            limit = text_kwargs.get("max_length") or tokenizer.model_max_length
            raise ValueError(
                f"`max_length={limit}` cuts {expected - kept} of the {expected} {image_token!r} placeholders of row "
                f"{row}, and an image without its placeholder cannot be read. Pass at least {full} for this row, or "
                "`truncation=False` (in TRL: `max_length=None`)."
            )
    data["text_replacement_offsets"] = [
        replacement_offsets(prompt, row, image_token) for prompt, row in zip(texts, shifts, strict=True)
    ]
    if "offset_mapping" in data:
        data["offset_mapping"] = [
            [original_span(span, row_shifts) for span in row]
            for row, row_shifts in zip(data["offset_mapping"], shifts, strict=True)
        ]
    return data


def expand_placeholders(
    texts: Sequence[str], pattern: re.Pattern[str], image_token: str, counts: Sequence[int]
) -> tuple[list[str], list[list[tuple[int, int, int]]]]:
    """Write as many image placeholders for each placeholder as it has visual tokens (compact: images).

    Args:
        texts: Prompts with one placeholder per image or video.
        pattern: Matches a placeholder.
        image_token: What is written in its place.
        counts: How often, for each placeholder, in prompt order.

    Returns:
        The expanded prompts, and for each placeholder of each prompt its position and its length before and after.
    """
    remaining = iter(counts)
    expanded, shifts = [], []
    for prompt in texts:
        result, row_shifts, position = "", [], 0
        for match in pattern.finditer(prompt):
            placeholders = image_token * next(remaining)
            row_shifts.append((match.start(), len(match.group()), len(placeholders)))
            result += prompt[position : match.start()] + placeholders
            position = match.end()
        expanded.append(result + prompt[position:])
        shifts.append(row_shifts)
    return expanded, shifts


def replacement_offsets(prompt: str, shifts: Sequence[tuple[int, int, int]], image_token: str) -> list[dict[str, Any]]:
    """The images and videos of one prompt as transformers 5 tells of them in `text_replacement_offsets`.

    Args:
        prompt: Before expansion.
        shifts: Position and length before and after of each placeholder, as `expand_placeholders` gives them.
        image_token: What was written in their place.
    """
    offsets, gained = [], 0
    for position, before, after in shifts:
        offsets.append(
            {
                "type": "image" if prompt[position : position + before] == image_token else "video",
                "span": (position, position + before),
                "new_span": (position + gained, position + gained + after),
                "text": prompt[position : position + before],
                "replacement": image_token * (after // len(image_token)),
            }
        )
        gained += after - before
    return offsets


def original_span(span: Sequence[int], shifts: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """Where a token of an expanded prompt stands in the prompt before expansion."""
    start, end = int(span[0]), int(span[1])
    gained = 0
    for position, before, after in shifts:
        if start < position + gained:
            break
        if start < position + gained + after:  # one of this image's placeholders
            return position, position + before
        gained += after - before
    return start - gained, end - gained


def span_mask(offsets: Any, spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each token that shares a character with a span; padding and added specials, of no width, never do."""
    return [int(any(start < stop and end > begin for begin, stop in spans)) for start, end in offsets]


def tokenize(tokenizer: Any, texts: list[str], text_kwargs: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's call, with the marks of `as_plain_text` taken out between tokenisation and padding."""
    if not any(TEXT_MARK in prompt for prompt in texts):
        return dict(tokenizer(texts, **text_kwargs))
    if not tokenizer.is_fast:  # no offsets: a space stays behind
        return dict(tokenizer([prompt.replace(TEXT_MARK, " ") for prompt in texts], **text_kwargs))
    padding = {key: text_kwargs.get(key) for key in ("padding_side", "pad_to_multiple_of")}
    encoded = tokenizer(texts, **{**text_kwargs, "padding": False, "return_offsets_mapping": True})
    keep = [
        [index for index, (start, end) in enumerate(spans) if prompt[start:end] != TEXT_MARK]
        for prompt, spans in zip(texts, encoded["offset_mapping"], strict=True)
    ]
    data = {
        key: [[row[index] for index in kept] for row, kept in zip(rows, keep, strict=True)]
        for key, rows in encoded.items()
    }
    offsets = data.pop("offset_mapping")
    strategy, max_length = text_kwargs.get("padding") or False, text_kwargs.get("max_length")
    padded = dict(tokenizer.pad(data, padding=strategy, max_length=max_length, **padding)) if strategy else data
    if text_kwargs.get("return_offsets_mapping"):
        left = (padding["padding_side"] or tokenizer.padding_side) == "left"
        fills = [[(0, 0)] * (len(ids) - len(row)) for ids, row in zip(padded["input_ids"], offsets, strict=True)]
        padded["offset_mapping"] = [
            fill + row if left else row + fill for row, fill in zip(offsets, fills, strict=True)
        ]
    return padded


def holds_video(message: Mapping[str, Any]) -> bool:
    """Whether a chat message has a video part."""
    content = message.get("content")
    return not isinstance(content, str) and any(part.get("type") == "video" for part in content or ())


def _image_of(part: Mapping[str, Any]) -> Any:
    url = part.get("image_url")
    if url is not None:
        return url.get("url") if isinstance(url, Mapping) else url
    if part.get("base64") is not None:
        try:
            return base64.b64decode(str(part["base64"]).rpartition(",")[2], validate=True)
        except ValueError as error:  # binascii's own, or letters beyond ASCII
            raise ValueError(
                f"An image part's `base64` is not valid base64: {error}. Encode the file's bytes."
            ) from error
    return next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
