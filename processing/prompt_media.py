"""Images and videos of prompts, in the order of their placeholders.

To the model a frame of a video is an image of its own; it differs in that AnyRes does not tile it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .image_loading import flatten_images
from .video_frames import FrameSampling, flatten_videos, load_frames


VIDEO_TOKEN = "<video>"


@dataclass(frozen=True)
class PromptMedia:
    """All images and frames of several prompts.

    Attributes:
        sources: Images and frames in prompt order, in any form that `load_image` reads.
        frames: Whether each is a frame of a video.
        per_placeholder: Images behind each placeholder: 1, or the frames of a video.
        per_prompt: Images and frames of each prompt; `None` if there are no prompts to tell.
    """

    sources: list[Any]
    frames: list[bool]
    per_placeholder: list[int]
    per_prompt: list[int] | None


def placeholder_pattern(image_token: str, *, videos: bool) -> re.Pattern[str]:
    """Matches the placeholders of a prompt: those of images, and of videos where there are any."""
    return re.compile("|".join(map(re.escape, [image_token, VIDEO_TOKEN] if videos else [image_token])))


def media_of_prompts(
    texts: Sequence[str] | None, image_token: str, images: Any, videos: Any, sampling: FrameSampling
) -> PromptMedia:
    """Deal images and videos out to the placeholders of the prompts.

    Args:
        texts: Prompts; `None` takes images and then frames as they come.
        image_token: Placeholder of an image; that of a video is `<video>`.
        images: As in a call of the processor.
        videos: As in a call of the processor.
        sampling: Which frames to take of each video.

    Raises:
        ValueError: The placeholders of a row and what is given for it disagree.
    """
    pictures, picture_rows = flatten_images(images)
    clips, clip_rows = flatten_videos(videos)
    if texts is None:
        frames = [frame for index, clip in enumerate(clips) for frame in load_frames(clip, sampling, index=index)]
        of_frames = [False] * len(pictures) + [True] * len(frames)
        return PromptMedia([*pictures, *frames], of_frames, [1] * len(of_frames), picture_rows)
    _check_rows(texts, image_token, "image", len(pictures), picture_rows)
    if clips:
        _check_rows(texts, VIDEO_TOKEN, "video", len(clips), clip_rows)
    pattern = placeholder_pattern(image_token, videos=bool(clips))
    next_picture: Iterator[Any] = iter(pictures)
    next_clip = iter(enumerate(clips))
    per_prompt: list[int] = []
    media = PromptMedia([], [], [], per_prompt)
    for prompt in texts:
        before = len(media.sources)
        for placeholder in pattern.findall(prompt):
            if placeholder == image_token:
                shown, is_frame = [next(next_picture)], False
            else:
                index, clip = next(next_clip)
                shown, is_frame = load_frames(clip, sampling, index=index), True
            media.sources.extend(shown)
            media.frames.extend([is_frame] * len(shown))
            media.per_placeholder.append(len(shown))
        per_prompt.append(len(media.sources) - before)
    return media


def _check_rows(texts: Sequence[str], placeholder: str, kind: str, number: int, rows: list[int] | None) -> None:
    if rows is not None and len(rows) != len(texts):
        raise ValueError(
            f"`{kind}s` has {len(rows)} rows for {len(texts)} prompts. Pass one list of {kind}s per prompt, "
            f"empty for a prompt without {kind}s."
        )
    left = number
    for row, prompt in enumerate(texts):
        found = prompt.count(placeholder)
        given = min(found, left) if row + 1 < len(texts) else left
        left -= given
        given = rows[row] if rows is not None else given
        if found != given:
            raise ValueError(
                f"Row {row} of `text` has {found} {placeholder!r} placeholder(s), but {given} {kind}(s) are "
                f"given for it. Write one {placeholder!r} per {kind} (`apply_chat_template` does so for "
                f"{kind} parts), or pass as many {kind}s as there are placeholders."
            )
