"""Frames of a video: each becomes an image of its own, with its own number of visual tokens.

Without a rate, frames are the middles of equal segments, as LLaVA-Mini samples them (`llavamini/mm_utils.py`); at a
rate, as many as the video's length in seconds asks for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence

from .image_loading import FORMATS


DEFAULT_FRAMES = 8  # what LLaVA-Mini trains with
MAX_FRAMES = 10_000

_ANIMATED = (".gif", ".webp", ".apng", ".png")


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are looked at.

    Attributes:
        num_frames: Frames per video, evenly spread; a shorter video gives all it has.
        fps: Frames per second of the video, in place of `num_frames`; needs a file that knows its own rate.

    Raises:
        ValueError: Both are given, or one is not positive.
    """

    num_frames: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.fps is not None:
            raise ValueError(
                f"`num_frames={self.num_frames}` and `fps={self.fps}` were both given. Pass one of them: a number of "
                "frames, or a rate."
            )
        whole = isinstance(self.num_frames, int) and not isinstance(self.num_frames, bool)
        if self.num_frames is not None and (not whole or not 1 <= self.num_frames <= MAX_FRAMES):
            raise ValueError(f"`num_frames={self.num_frames!r}` must be a whole number from 1 to {MAX_FRAMES:,}.")
        if self.fps is not None and not (isinstance(self.fps, (int, float)) and self.fps > 0):
            raise ValueError(f"`fps={self.fps!r}` must be a positive number of frames per second.")

    def indices(self, total: int, seconds: float | None, name: str) -> list[int]:
        """Indices of the chosen frames, rising.

        Args:
            total: Frames of the video.
            seconds: Its length, if known.
            name: What the video is called in an error.
        """
        wanted = self.num_frames
        if self.fps is not None:
            if not seconds:
                raise ValueError(
                    f"{name} does not tell its length in seconds, so `fps={self.fps}` means nothing for it. Pass "
                    "`num_frames`, or a video file."
                )
            wanted = max(1, round(seconds * self.fps))
        chosen = min(total, DEFAULT_FRAMES if wanted is None else wanted)
        return [(2 * segment + 1) * total // (2 * chosen) for segment in range(chosen)]


def load_frames(source: Any, sampling: FrameSampling, *, index: int = 0) -> list[Any]:
    """The sampled frames of one video, each in a form that `load_image` reads.

    Args:
        source: A list of images; an array or tensor `(frames, height, width, 3)` or `(frames, 3, height, width)`; a
            folder of images, in order of their names; an animated GIF, WebP or PNG; or any other video file, for which
            PyAV must be installed (`pip install av`).
        sampling: Which frames to take. Of a list, array or folder all are taken unless a number is asked for.
        index: Position of the video in the call, for the errors.

    Raises:
        ValueError: No frames, a file that is no video, an address, or a rate for frames that have none.
        FileNotFoundError: No such file or folder.
        ImportError: A video file without PyAV.
    """
    name = f"Video {index}"
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ValueError(
            f"{name} is a URL ({source:.80}), and videos are not fetched. Download it, and pass its path."
        )
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        name = f"{name} ({path})"
        if path.is_file():
            return _frames_of_file(path, sampling, name)
        if not path.is_dir():
            raise FileNotFoundError(f"{name}: there is no such file or folder. Check the path.")
        endings = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
        source = sorted(file for file in path.iterdir() if file.suffix.lower() in endings)
    if not isinstance(source, Sequence) and not hasattr(source, "ndim"):
        raise ValueError(
            f"{name} is a {type(source).__name__}. Pass a list of images, an array (frames, height, width, 3), a "
            "folder of images, or a video file."
        )
    if len(source) == 0:
        raise ValueError(f"{name} has no frames. Leave it out.")
    if sampling.num_frames is None and sampling.fps is None:
        return list(source)
    return [source[frame] for frame in sampling.indices(len(source), None, name)]


def flatten_videos(videos: Any) -> tuple[list[Any], list[int] | None]:
    """All videos in one list, and how many each prompt has.

    Args:
        videos: One video (a path, or an array with four axes), a list of these, or a list with one list (or `None`)
            per prompt. Frames given one by one are a list of their own: `[[frame, frame, ...], ...]` is a list of
            videos, and one level more a list per prompt.

    Returns:
        The videos in order, and the number per prompt: `None` if the list was flat.
    """
    if videos is None:
        return [], None
    if _is_video(videos):
        return [videos], None
    if not isinstance(videos, (list, tuple)):
        raise ValueError(
            f"`videos` is a {type(videos).__name__}. Pass a list of videos: paths, arrays or frame lists."
        )
    if all(_is_video(item) for item in videos):
        return list(videos), None
    wrong = [row for row in videos if not (row is None or isinstance(row, (list, tuple)) or _is_video(row))]
    if wrong:
        raise ValueError(
            f"`videos` holds a {type(wrong[0]).__name__}. Pass a list of videos (paths, arrays, frame lists), or one "
            "such list per prompt."
        )
    rows = [[] if row is None else [row] if _is_video(row) else list(row) for row in videos]
    return [video for row in rows for video in row], [len(row) for row in rows]


def _is_video(item: Any) -> bool:
    if isinstance(item, (str, os.PathLike)) or getattr(item, "ndim", 0) == 4:
        return True
    # a list of frames: images in any form but paths, which may be videos themselves
    return isinstance(item, (list, tuple)) and len(item) > 0 and all(_is_frame(frame) for frame in item)


def _is_frame(item: Any) -> bool:
    return isinstance(item, (Image.Image, bytes, dict)) or getattr(item, "ndim", 0) in (2, 3)


def _frames_of_file(path: Path, sampling: FrameSampling, name: str) -> list[Image.Image]:
    if path.suffix.lower() in _ANIMATED:
        with Image.open(path) as animation:
            total = getattr(animation, "n_frames", 1)
            milliseconds = sum(frame.info.get("duration", 0) for frame in ImageSequence.Iterator(animation))
            wanted = set(sampling.indices(total, milliseconds / 1000, name))
            return [
                frame.convert("RGBA" if "transparency" in frame.info else "RGB")
                for position, frame in enumerate(ImageSequence.Iterator(animation))
                if position in wanted
            ]
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{name}: reading video files needs PyAV. Run `pip install av`, or pass frames.") from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{name} holds no video. Check the file.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            seconds = float(container.duration) / av.time_base if container.duration else None
            total = stream.frames or sum(1 for _ in container.decode(stream))  # some containers do not say
            container.seek(0)
            positions = sampling.indices(total, seconds, name)
            chosen, last = set(positions), positions[-1] if positions else -1
            frames: list[Image.Image] = []
            for position, frame in enumerate(container.decode(stream)):
                if position in chosen:
                    frames.append(frame.to_image())
                if position >= last:
                    break
    except av.FFmpegError as error:
        raise ValueError(f"{name} is no video that can be read: {error}. Check the file.") from error
    if not frames:
        raise ValueError(f"{name} has no frames. Leave it out.")
    return frames
