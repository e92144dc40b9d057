"""PyAV: reads every kind of file, and scans each file for the other readers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, compress, islice
from typing import Any

import numpy as np

from video_convmae.data import shards

from .errors import DecodeError, decode_errors
from .reader import FrameReader
from .scan import is_decodable, scan_packets


class PyAVReader(FrameReader):
    """PyAV's frames: for each group of pictures needed, one seek to its keyframe and decoding to the last frame needed.

    Decodes with one thread, of type NONE: with more, a parent that left a file open deadlocks its forked workers.
    """

    name = "pyav"

    def __init__(self, path: str) -> None:
        self.path = path
        self._open()
        try:
            self.scan = scan_packets(path, self._container, self._stream)
            self._count = len(self.scan.times) if self.scan.timed else sum(1 for _ in self._frames_from_the_start())
            if not self._count:
                raise DecodeError(f"{path}: holds no frame that can be decoded")
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        self._container.close()

    def pictures(self) -> Iterator[Any]:
        """Yield every frame (av.VideoFrame) in display order, neither converted nor rotated. Raises DecodeError."""
        place = -1
        with decode_errors(self.path):
            for place, frame in enumerate(self._frames_at(np.arange(len(self)))):
                if frame.is_corrupt:
                    raise DecodeError(f"{self.path}: frame {place} is damaged")
                yield frame
            if place + 1 < len(self):
                raise DecodeError(f"{self.path}: {len(self) - place - 1} of {len(self)} frames do not decode")

    def _open(self) -> None:
        import av

        # metadata_errors: a title that is not UTF-8 does no harm.
        self._container: Any = av.open(shards.path_or_bytes(self.path), metadata_errors="ignore")
        self._stream: Any = self._container.streams.best("video")
        if self._stream is None:
            self._container.close()
            raise DecodeError(f"{self.path}: holds no video stream")
        self._stream.codec_context.thread_type = "NONE"
        self._stream.codec_context.thread_count = 1

    def _read_ascending(self, indices: np.ndarray) -> np.ndarray:
        to_rgb = rgb_converter()
        clip: np.ndarray | None = None
        place = -1
        for place, frame in enumerate(self._frames_at(indices)):
            if frame.is_corrupt:
                raise DecodeError(f"{self.path}: frame {indices[place]} is damaged")
            image = to_rgb(frame)
            if clip is None:
                clip = np.empty((len(indices), *image.shape), dtype=np.uint8)
            if image.shape != clip.shape[1:]:
                raise DecodeError(
                    f"{self.path}: the size of the picture changes from {clip.shape[1:]} to {image.shape}"
                )
            clip[place] = image
        if clip is None or place + 1 < len(indices):
            raise DecodeError(f"{self.path}: frame {indices[place + 1]} of {len(self)} does not decode")
        return clip

    def _frames_at(self, indices: np.ndarray) -> Iterator[Any]:
        if not self.scan.timed:
            frames = islice(self._frames_from_the_start(), int(indices[-1]) + 1)
            yield from compress(frames, np.isin(np.arange(indices[-1] + 1), indices))
            return
        times = self.scan.times[indices]
        groups = np.searchsorted(self.scan.keyframes[:, 0], times, side="right") - 1
        for group in np.unique(groups):
            yield from self._frames_of_group(group, times[groups == group].tolist())

    def _frames_of_group(self, group: int, times: list[int]) -> Iterator[Any]:
        """Yield the frames shown at `times` (ascending), decoded from keyframe `group` on.

        Frames that do not come out are decoded from the first keyframe on (H.264 with intra refresh: a picture is
        complete only some frames behind its keyframe).
        """
        attempts: list[tuple[int, set[int] | None]] = [(group, None), (0, None)]
        if self.scan.droppable:
            attempts.insert(0, (group, set(times)))
        for start, only in attempts:
            for frame in self._frames_from(start, only):
                if only and (frame.interlaced_frame or frame.pts > times[0]):
                    break  # of interlaced frames one field may be needed; a frame was lost: their order is a guess
                if frame.pts == times[0]:
                    yield frame
                    times = times[1:]
                    if not times:
                        return

    def _frames_from(self, keyframe: int, only: set[int] | None = None) -> Iterator[Any]:
        """Decode from a keyframe on; of the frames that no other refers to, only those shown at the times in `only`.

        With 3 B-frames 60% of a clip's frames remain to decode: 1.2 to 1.4 times as fast, the same bits.
        """
        codec = self._stream.codec_context
        for packet in self._packets_from(*self.scan.keyframes[keyframe].tolist()):
            drop = only is not None and packet.pts is not None and packet.pts not in only
            codec.skip_frame = "NONREF" if drop else "DEFAULT"
            yield from packet.decode()

    def _packets_from(self, shown: int, decoded: int) -> Iterator[Any]:
        """Seek to a keyframe by its times and return the packets from it, or from an earlier keyframe, on."""
        for position in (shown, decoded):  # some containers seek by display time, some by decoding time
            self._container.seek(position, stream=self._stream)
            packets = self._container.demux(self._stream)
            first = next(packets)
            if first.pts is not None and first.pts <= shown:
                return (packet for packet in chain([first], packets) if is_decodable(packet))
        raise DecodeError(f"{self.path}: cannot seek to the keyframe at {shown} x {self._stream.time_base} s")

    def _frames_from_the_start(self) -> Iterator[Any]:
        self._container.close()
        self._open()
        for packet in self._container.demux(self._stream):
            if is_decodable(packet):
                yield from packet.decode()


def rgb_converter() -> Any:
    """Return a function from av.VideoFrame to upright uint8 `(H, W, 3)`, which keeps its tables between frames."""
    import av
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()
    # Since 17.0 PyAV converts with a thread for every core by default; the other cores belong to the other workers.
    options = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}

    def convert(frame: Any) -> np.ndarray:
        if frame.interlaced_frame:  # PyAV since 17.0 reads its colours by fields; ffmpeg and the other readers do not
            fields, frame = frame, av.VideoFrame.from_ndarray(frame.to_ndarray(), format=frame.format.name)
            frame.colorspace, frame.color_range = fields.colorspace, fields.color_range
            turn = fields.rotation
        else:
            turn = frame.rotation
        image = reformatter.reformat(frame, format="rgb24", **options).to_ndarray()
        return np.rot90(image, turn // 90 % 4)

    return convert
