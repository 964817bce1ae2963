"""A decoded picture becomes an RGB array as a player shows it: upright, in its true proportions."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from av import VideoFrame
from av.sidedata.sidedata import Type
from numpy.typing import NDArray
from PIL import Image

ORIENTATION = 0x0112  # the EXIF tag
# FFmpeg's scaler starts threads of its own for each frame, and waits for all of them: 5 ms where
# the cores are busy, as while a model loads. Older releases of PyAV have no such argument.
ALONE: dict[str, Any] = {"threads": 1} if "threads" in str(VideoFrame.reformat.__doc__) else {}
STRANGEST = 10  # pixels that are longer than this by their width are taken for a fault


class Turn(NamedTuple):
    """Rows become columns or not; then left and right, and top and bottom change places or not."""

    transpose: bool = False
    mirror: bool = False
    flip: bool = False


# By EXIF orientation, from 1.
TURNS = (
    Turn(),
    Turn(mirror=True),
    Turn(mirror=True, flip=True),
    Turn(flip=True),
    Turn(transpose=True),
    Turn(transpose=True, mirror=True),
    Turn(transpose=True, mirror=True, flip=True),
    Turn(transpose=True, flip=True),
)


def turn_of(frame: VideoFrame) -> Turn:
    """The turn that a frame's display matrix asks for; any other angle is the nearest quarter's."""
    try:
        data = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]
    except ValueError:  # PyAV fails where one of the others is of a type that it does not know
        return (TURNS[0], TURNS[7], TURNS[2], TURNS[5])[round(frame.rotation / 90) % 4]
    if data is None:
        return TURNS[0]
    # A point (x, y) is shown at (a x + c y, b x + d y), with y downwards.
    a, b, _, c, d, *_ = struct.unpack("9i", bytes(data))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Turn(False, a < 0, d < 0)
    return Turn(True, c < 0, b < 0)


def turn_of_image(file: str) -> Turn | None:
    """The turn that an image's EXIF asks for, which FFmpeg knows of some kinds; None without."""
    try:
        with Image.open(file) as image:
            orientation: int | None = image.getexif().get(ORIENTATION)
    except Exception:  # Pillow raises many kinds; whether the file is sound, its decoder tells
        return None
    return TURNS[orientation - 1] if orientation and 1 <= orientation <= 8 else None


def shown_size(
    width: int, height: int, aspect: Fraction | None, turn: Turn, most: int
) -> tuple[int, int]:
    """Height and width of a picture as it is shown, scaled down to at most so many pixels.

    Parameters
    ----------
    width, height : as it is stored.
    aspect : width of a stored pixel over its height; None where nothing is said.
    turn : as it is stored to as it is shown.
    most : at least 1.
    """
    across, down = float(width), float(height)
    if aspect is not None and 1 / STRANGEST <= aspect <= STRANGEST:
        across, down = (
            across * max(1.0, float(aspect)),
            down / min(1.0, float(aspect)),
        )  # loses none
    shrink = min(1.0, math.sqrt(most / (across * down)))
    # Down, so that the limit holds; the little more makes up for the rounding of floats.
    wide, high = (max(1, math.floor(side * shrink + 1e-6)) for side in (across, down))
    wide, high = min(wide, most), min(high, most)
    return (wide, high) if turn.transpose else (high, wide)


def to_rgb(frame: VideoFrame, turn: Turn, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The picture of shape (height, width, 3), turned, of this size (height, width)."""
    height, width = size[::-1] if turn.transpose else size
    image = np.asarray(
        frame.to_ndarray(format="rgb24", width=width, height=height, **ALONE), np.uint8
    )
    if turn.transpose:
        image = image.swapaxes(0, 1)
    return image[:: -1 if turn.flip else 1, :: -1 if turn.mirror else 1]
