"""Videos of rendered frames."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starling.errors import MissingExtraError, UserError


def write_video(frames: Iterable[NDArray[np.uint8]], path: Path | str, fps: float = 30.0) -> Path:
    """Write frames as an MP4 (H.264) or an animated GIF, by the ending of the path.

    Frames are written as they come, so that a long video need not fit in memory. A file that is
    already there is replaced once the video is complete.

    Args:
        frames: RGB images, uint8 ``[H, W, 3]``, all of one size, as ``render`` returns them.
        path: File to write, ``.mp4`` or ``.gif``.
        fps: Frames per second.

    Returns:
        The path.

    Raises:
        MissingExtraError: The extra ``render`` is not installed.
        UserError: Another ending, no frames, or something that is no image.
    """
    path = Path(path)
    check_video(path)
    if not fps > 0:
        raise UserError(f"fps must be above 0, not {fps}")
    images = _checked(frames)
    first = next(images, None)
    if first is None:
        raise UserError(f"there are no frames to write to {path}: run at least one step")
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _explained(path):
            writer = _writer(unfinished, fps)
        try:
            for image in itertools.chain([first], images):
                with _explained(path):  # not around the frames: what they raise is not of the file
                    writer.append_data(image)
        finally:
            with _explained(path):
                writer.close()
        with _explained(path):
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}): choose another file") from error


def check_video(path: Path | str) -> None:
    """Check that a video can be written, before any work is done for it.

    Args:
        path: File to write.

    Raises:
        MissingExtraError: The extra ``render`` is not installed.
        UserError: The file does not end in ``.mp4`` or ``.gif``.
    """
    path = Path(path)
    if path.suffix.lower() not in (".mp4", ".gif"):
        raise UserError(f"{path} is no video that can be written: end it in .mp4 or .gif")
    for package in ("imageio", "imageio_ffmpeg"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"writing videos needs the package {package}: pip install 'starling-rl[render]'"
            )


def _writer(path: Path, fps: float) -> Any:
    import imageio.v2 as imageio

    if path.suffix.lower() == ".gif":
        return imageio.get_writer(path, mode="I", duration=1000 / fps, loop=0)
    # Frames are padded here; left to itself imageio would scale them to multiples of 16.
    return imageio.get_writer(path, mode="I", fps=fps, codec="libx264", macro_block_size=1)


def _checked(frames: Iterable[Any]) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames, padded to an even size as H.264 wants it."""
    shape = None
    for number, frame in enumerate(frames):
        image = np.asarray(frame)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            what = "None" if frame is None else f"{image.dtype} {list(image.shape)}"
            raise UserError(
                f"frame {number} is {what}, not an image of uint8 [H, W, 3]: "
                "make the environment with render_mode='rgb_array'"
            )
        if image.shape != (shape := shape or image.shape):
            raise UserError(
                f"frame {number} is {list(image.shape)}, the first was {list(shape)}: "
                "frames must be of one size"
            )
        height, width, _ = shape
        yield np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
