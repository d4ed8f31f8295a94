"""Frames of real videos: files written by the test, folders, arrays and lists."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from adaptive_llava.processing.image_loading import load_image
from adaptive_llava.processing.video_frames import DEFAULT_FRAMES, FrameSampling, flatten_videos, load_frames


pytestmark = pytest.mark.compat

LENGTH, RATE = 20, 10


def grey_frames(count: int = LENGTH) -> list[Image.Image]:
    """Frame i is grey of brightness 10 * i, so that it can be told which ones were taken."""
    return [Image.new("RGB", (32, 16), (10 * frame,) * 3) for frame in range(count)]


def taken(frames: list) -> list[int]:
    """Which frames of `grey_frames` these are."""
    return [round(np.asarray(load_image(frame)).mean() / 10) for frame in frames]


@pytest.fixture
def gif(tmp_path):
    first, *rest = grey_frames()
    first.save(tmp_path / "clip.gif", save_all=True, append_images=rest, duration=1000 // RATE)
    return tmp_path / "clip.gif"


@pytest.fixture
def mp4(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for image in grey_frames():
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return tmp_path / "clip.mp4"


@pytest.mark.parametrize(
    ("total", "wanted", "expected"),
    [(8, 2, [2, 6]), (10, 5, [1, 3, 5, 7, 9]), (3, 8, [0, 1, 2]), (7, 1, [3]), (100, 4, [12, 37, 62, 87])],
)
def test_frames_are_the_middles_of_equal_segments(total, wanted, expected):
    assert FrameSampling(num_frames=wanted).indices(total, None, "Video 0") == expected


def test_every_source_of_one_clip_gives_the_same_frames(gif, mp4, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for position, image in enumerate(grey_frames()):
        image.save(folder / f"{position:03d}.png")
    (folder / "notes.txt").write_text("no frame")
    array = np.stack([np.asarray(image) for image in grey_frames()])
    for source in (gif, mp4, str(folder), grey_frames(), array, array.transpose(0, 3, 1, 2)):
        assert taken(load_frames(source, FrameSampling(num_frames=4))) == [2, 7, 12, 17]


def test_files_give_eight_frames_and_lists_give_all_unless_a_number_is_asked_for(gif, mp4):
    for file in (gif, mp4):
        assert len(load_frames(file, FrameSampling())) == DEFAULT_FRAMES
    assert len(load_frames(grey_frames(), FrameSampling())) == LENGTH


def test_a_rate_counts_the_files_seconds(gif, mp4):
    for file in (gif, mp4):  # two seconds
        assert taken(load_frames(file, FrameSampling(fps=2))) == [2, 7, 12, 17]
        assert len(load_frames(file, FrameSampling(fps=0.1))) == 1


def test_a_matroska_file_that_does_not_count_its_frames_is_read_too(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for image in grey_frames():
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "clip.mkv")) as container:
        assert container.streams.video[0].frames == 0
    assert taken(load_frames(tmp_path / "clip.mkv", FrameSampling(num_frames=4))) == [2, 7, 12, 17]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "`num_frames=0` must be a whole number from 1"),
        ({"num_frames": True}, "`num_frames=True` must be"),
        ({"fps": -1}, "`fps=-1` must be a positive number"),
        ({"num_frames": 2, "fps": 1}, "both given"),
    ],
)
def test_impossible_samplings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FrameSampling(**options)


def test_what_is_no_video_is_refused_by_name(tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video at all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="Video 3 .*there is no such file or folder"):
        load_frames(tmp_path / "absent.mp4", FrameSampling(), index=3)
    with pytest.raises(ValueError, match="has no frames"):
        load_frames(tmp_path / "empty", FrameSampling())
    with pytest.raises(ValueError, match="has no frames"):
        load_frames([], FrameSampling())
    with pytest.raises(ValueError, match="is a int"):
        load_frames(5, FrameSampling())
    with pytest.raises(ValueError, match="does not tell its length in seconds"):
        load_frames(grey_frames(), FrameSampling(fps=1))
    pytest.importorskip("av", reason="PyAV is not installed")
    with pytest.raises(ValueError, match="is no video that can be read"):
        load_frames(broken, FrameSampling())


def test_videos_come_alone_in_a_list_or_in_one_list_per_prompt():
    clip = grey_frames(3)
    array = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    assert flatten_videos(None) == ([], None)
    assert flatten_videos("clip.mp4") == (["clip.mp4"], None)
    assert flatten_videos(clip) == ([clip], None)
    assert flatten_videos([clip, "clip.mp4"]) == ([clip, "clip.mp4"], None)
    assert flatten_videos([[clip], None, ["a.mp4", "b.mp4"]]) == ([clip, "a.mp4", "b.mp4"], [1, 0, 2])
    videos, rows = flatten_videos(array)
    assert rows is None and videos[0] is array
    with pytest.raises(ValueError, match="Pass a list of videos"):
        flatten_videos(7)
