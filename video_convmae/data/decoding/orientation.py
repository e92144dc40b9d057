"""How a decoded picture is to be shown: its display matrix (phones, front cameras), as the ffmpeg program applies it.

The matrix (a, b; c, d) puts the pixel at column x, row y to column ax + cy, row bx + dy. Within a degree of a quarter
turn it is one of eight: picture or transpose, mirrored or not in each direction. At any other angle ffmpeg turns the
picture within its frame, corners black.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import numpy as np


class Orientation(NamedTuple):
    """Change from the stored to the shown picture, in this order.

    Attributes:
        angle: degrees clockwise within the frame; 0 but for cameras that were held askew.
        transposed: rows become columns.
        up_down, left_right: mirrored in this direction.
        exact: the matrix says just that; not so 89.95 degrees.
    """

    angle: int = 0
    transposed: bool = False
    up_down: bool = False
    left_right: bool = False
    exact: bool = True

    @property
    def mirrored(self) -> bool:
        """Whether text in the picture would be reversed without it."""
        return self.transposed ^ self.up_down ^ self.left_right


UPRIGHT = Orientation()


def orientation(frame: Any) -> Orientation:
    """Return the orientation of an av.VideoFrame."""
    from av.sidedata import sidedata

    # The property frame.side_data would keep each frame until the garbage collector comes: frame and container refer to
    # one another. Ten frames of 8K held 0.5 GB.
    make_container: Any = sidedata.SideDataContainer
    data = make_container(frame).get(sidedata.Type.DISPLAYMATRIX)
    if data is None:
        return UPRIGHT
    a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
    scales = math.hypot(a, c), math.hypot(b, d)
    if not all(scales):
        return UPRIGHT
    angle = math.degrees(math.atan2(b / scales[1], a / scales[0])) % 360
    turns = round(angle / 90)
    if abs(angle - 90 * turns) > 1:
        return Orientation(angle=round(angle), exact=False)
    if turns % 2:
        return Orientation(transposed=True, up_down=b < 0, left_right=c < 0, exact=a == d == 0)
    return Orientation(up_down=d < 0, left_right=a < 0, exact=b == c == 0)


def upright(image: np.ndarray, shown: Orientation) -> np.ndarray:
    """Return a view of an image `(H, W, C)` as it is to be shown, but for its `angle` (see `Turner`)."""
    if shown.transposed:
        image = image.swapaxes(0, 1)
    return image[:: -1 if shown.up_down else 1, :: -1 if shown.left_right else 1]


class Turner:
    """FFmpeg's filter `rotate`, for angles that are no quarter turn; keeps its graph between frames."""

    def __init__(self) -> None:
        self._graph: Any = None
        self._made_for: Any = None

    def __call__(self, frame: Any, angle: int) -> Any:
        """Return an av.VideoFrame turned clockwise by `angle` degrees within its frame."""
        import av

        if self._made_for != (made_for := (angle, frame.width, frame.height, frame.format.name)):
            self._graph = av.filter.Graph()
            source = self._graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format.name, time_base=frame.time_base
            )
            turn, sink = self._graph.add("rotate", f"{angle}*PI/180"), self._graph.add("buffersink")
            source.link_to(turn)
            turn.link_to(sink)
            self._graph.configure()
            self._made_for = made_for
        self._graph.push(frame)
        return self._graph.pull()
