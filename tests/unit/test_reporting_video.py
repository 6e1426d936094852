"""Videos: what is written is what comes back, and every bad input has its sentence."""

import importlib.util

import imageio.v2 as imageio
import numpy as np
import pytest

from starling.errors import MissingExtraError, UserError
from starling.reporting.video import check_video, write_video


def gray_frames(levels, shape=(50, 70)):
    return (np.full((*shape, 3), level, np.uint8) for level in levels)


@pytest.mark.parametrize("ending", [".mp4", ".gif"])
def test_frames_come_back_in_order(tmp_path, ending):
    levels = [0, 40, 80, 120, 160, 200]
    path = tmp_path / "videos" / f"episode{ending}"
    assert write_video(gray_frames(levels), path, fps=10) == path
    with imageio.get_reader(path) as reader:
        got = list(reader.iter_data())
        duration = reader.get_meta_data()["duration"]
    assert len(got) == len(levels)
    np.testing.assert_allclose([np.mean(frame) for frame in got], levels, atol=4)
    assert got[0].shape[:2] == (50, 70)
    assert duration == pytest.approx(0.6 if ending == ".mp4" else 100)  # in all, per frame in ms
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_odd_sizes_are_padded_not_scaled(tmp_path):
    frame = np.zeros((51, 71, 3), np.uint8)
    frame[:, 35:] = 255
    path = write_video([frame] * 3, tmp_path / "odd.mp4")
    got = np.asarray(imageio.mimread(path)[0])
    assert got.shape == (52, 72, 3)
    assert got[:, :34].max() < 30
    assert got[:, 37:].min() > 225


RED = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("frames", "name", "fps", "message"),
    [
        ([], "a.mp4", 30, "no frames"),
        ([None], "a.mp4", 30, "render_mode='rgb_array'"),
        ([RED, RED[:, :, 0]], "a.mp4", 30, r"frame 1 is uint8 \[8, 8\]"),
        ([RED / 255], "a.gif", 30, "float64"),
        ([RED, RED[:6]], "a.mp4", 30, r"frame 1 is \[6, 8, 3\], the first was \[8, 8, 3\]"),
        ([RED], "a.avi", 30, r"end it in \.mp4 or \.gif"),
        ([RED], "a", 30, r"end it in \.mp4 or \.gif"),
        ([RED], "a.mp4", 0, "fps must be above 0"),
    ],
)
def test_bad_input_leaves_what_was_there(tmp_path, frames, name, fps, message):
    path = tmp_path / name
    path.write_text("the older video")
    with pytest.raises(UserError, match=message):
        write_video(iter(frames), path, fps)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert path.read_text() == "the older video"


def test_a_folder_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_video([RED], tmp_path / "file" / "a.mp4")


@pytest.mark.parametrize("ending", [".mp4", ".gif"])
def test_what_the_frames_raise_passes_through(tmp_path, ending):
    def frames():
        yield RED
        raise TimeoutError("the environment hangs")

    with pytest.raises(TimeoutError, match="the environment hangs"):
        write_video(frames(), tmp_path / f"a{ending}")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"starling-rl\[render\]"):
        check_video("a.mp4")
