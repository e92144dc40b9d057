"""PyAV: reads every kind of file, and scans each file for the other readers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from itertools import chain, compress, islice, pairwise, takewhile
from typing import Any

import numpy as np

from video_convmae.data import shards

from .bitstream import NO_START, START, Look, examiner
from .errors import DecodeError, decode_errors
from .kept import KEEP_FRAMES, keep_scan, kept_scan
from .orientation import Turner, orientation, upright
from .reader import FrameReader, smaller_size
from .scan import Scan, is_decodable, scan_packets


class PyAVReader(FrameReader):
    """PyAV's frames: for each group of pictures needed, one seek to its keyframe and decoding to the last frame needed.

    Decodes with one thread, of type NONE: with more, a parent that left a file open deadlocks its forked workers, and
    each thread would hold a picture of its own. No picture is kept while the next is decoded (47 MiB each at 8K), so
    beside the clip, memory holds those that the codec refers to.

    Args:
        path: the file.
        max_side: longest side of the pictures returned (`smaller_size`).
    """

    name = "pyav"

    def __init__(self, path: str, max_side: int | None = None) -> None:
        self.path = path
        self.max_side = max_side
        self._open()
        codec = self._stream.codec_context
        self._size: tuple[int, int] = codec.width, codec.height  # of the first picture; from its header, until it lies
        self._size_is_seen = self._size_is_noted = False
        self._start_of: dict[int, int] = {}  # keyframe -> the one before it that decoding had to begin at
        self._look: Callable[[bytes], Look] | None = None
        try:
            self.scan = kept_scan(path) or self._scan()
            if not self.scan.count:
                raise DecodeError(f"{path}: holds no frame that can be decoded")
            if self.scan.cut_off:
                self.damaged = True
                self.note = f"is cut off, {len(self)} frames are left ({self.scan.cut_off}): download or copy it again"
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return self.scan.count

    @property
    def times(self) -> np.ndarray | None:  # type: ignore[override]  # computed where it is asked for
        """Seconds at which each frame is shown; None: the file does not say, not even a rate."""
        return self.scan.seconds()

    @property
    def rate(self) -> float | None:  # type: ignore[override]  # as `times`
        """Frames a second; None: the file does not say."""
        return float(self.scan.rate) if self.scan.rate else None

    def close(self) -> None:
        self._container.close()

    def pictures(self) -> Iterator[Any]:
        """Yield every frame (av.VideoFrame) in display order, neither converted nor turned. Raises DecodeError."""
        with decode_errors(self.path):
            for index, frame in enumerate(self._frames_at(np.arange(len(self)))):
                self._compare_size(frame, index)
                yield frame

    def is_too_large(self) -> bool:
        """Return whether the pictures have a side above `max_side`, as far as the file's header says."""
        return smaller_size(self._size, self.max_side) != self._size

    def first_picture(self) -> Any:
        """Return the first frame (av.VideoFrame)."""
        return next(self._frames_at(np.arange(1)))

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

    def _scan(self) -> Scan:
        """Scan the file; where packets do not tell the number of frames, they are counted by decoding."""
        self.scan = scan_packets(self.path, self._container, self._stream)
        if not self.scan.timed:
            self.scan = replace(self.scan, count=sum(1 for _ in self._frames_from_the_start()))
        if self.scan.count > KEEP_FRAMES:
            keep_scan(self.path, self.scan)
        return self.scan

    def _read_ascending(self, indices: np.ndarray) -> np.ndarray:
        clip: np.ndarray | None = None
        place = 0
        for image in self._stream_ascending(indices):
            if clip is None:
                clip = np.empty((len(indices), *image.shape), dtype=np.uint8)
            clip[place] = image
            place += 1  # noqa: SIM113  # enumerate would keep a picture while the next is decoded
            del image
        assert clip is not None  # `read` refuses no indices
        return clip

    def _stream_ascending(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        to_rgb = rgb_converter()
        shape: tuple[int, ...] | None = None
        frames = self._frames_at(indices)
        for index in indices.tolist():
            frame = next(frames)
            self._compare_size(frame, index)
            image = to_rgb(frame, smaller_size(self._size, self.max_side))
            del frame
            shape = shape or image.shape
            if image.shape != shape:
                raise DecodeError(f"{self.path}: frame {index} is turned otherwise than the first")
            yield image
            del image
        next(frames, None)  # it ends

    def _frames_at(self, indices: np.ndarray) -> Iterator[Any]:
        """Yield the frames at ascending indices; raise DecodeError for the first that is missing or damaged."""
        frames = self._timed_frames_at(indices) if self.scan.timed else self._counted_frames_at(indices)
        for index in indices.tolist():
            frame = next(frames, None)
            if frame is None:
                raise DecodeError(f"{self.path}: frame {index} of {len(self)} does not decode")
            if frame.is_corrupt:
                raise DecodeError(f"{self.path}: frame {index} is damaged")
            yield frame
            del frame

    def _compare_size(self, frame: Any, index: int) -> None:
        """Note the size of the first picture, to which those of another size are scaled, as the ffmpeg program does."""
        if (frame.width, frame.height) == self._size and (self._size_is_seen or not self.scan.resized):
            return
        if not self._size_is_seen:
            with closing(PyAVReader(self.path)) as again:  # this one is in the middle of decoding
                first = again.first_picture()
                self._size, self._size_is_seen = (first.width, first.height), True
        if (frame.width, frame.height) != self._size and not self._size_is_noted:
            sizes = "{}x{} to {}x{}".format(*self._size, frame.width, frame.height)
            note = (
                f"the size of the picture changes, from {sizes} at frame {index} or before; every frame is scaled to "
                "the first one's size"
            )
            warnings.warn(f"{self.path}: {note}", stacklevel=2)
            self.note = f"{self.note}; {note}" if self.damaged else note
            self._size_is_noted = True

    def _counted_frames_at(self, indices: np.ndarray) -> Iterator[Any]:
        frames = islice(self._frames_from_the_start(), int(indices[-1]) + 1)
        return compress(frames, np.isin(np.arange(indices[-1] + 1), indices))

    def _timed_frames_at(self, indices: np.ndarray) -> Iterator[Any]:
        times = self.scan.times[indices]
        groups = np.searchsorted(self.scan.keyframes[:, 0], times, side="right") - 1
        for first, last in pairwise([0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]):
            yield from self._frames_of_group(int(groups[first]), times[first:last].tolist())

    def _frames_of_group(self, group: int, times: list[int]) -> Iterator[Any]:
        """Yield the frames shown at `times` (ascending), decoded from keyframe `group` on; None for one that is lost.

        Where that is no place to begin at, they are decoded from earlier keyframes, and at last from the first packet
        on: a container may call any frame a keyframe, and H.264's pictures may be complete only some frames later.
        """
        start = self._start_of.get(group, group)
        attempts: list[tuple[int, set[int] | None]] = [(start, set(times))] if self.scan.droppable else []
        attempts += [(earlier, None) for earlier in _starts(start)]
        for start, only in attempts:
            late = 0
            with suppress(_NoStart):
                for frame in self._frames_from(start, only):
                    if only and (frame.interlaced_frame or frame.pts > times[0]):
                        break  # of interlaced frames one field may be needed; a frame was lost: their order is a guess
                    if frame.pts == times[0]:
                        yield frame
                        times, late = times[1:], 0
                        if not times:
                            self._start_of[group] = start
                            return
                    elif frame.pts is not None and frame.pts > times[0]:
                        late += 1
                        if late > _MOST_REORDERED and start != _FIRST_PACKET:
                            break
                    del frame
                if only is None and self.scan.proven and not self.scan.repairs:
                    break  # it is a place to begin at: the frame is damaged
        yield None

    def _frames_from(self, start: int, only: set[int] | None = None) -> Iterator[Any]:
        """Decode from a keyframe on; of the frames that no other refers to, only those shown at the times in `only`.

        With 3 B-frames 60% of a clip's frames remain to decode: 1.2 to 1.4 times as fast, the same bits.

        Raises:
            _NoStart: no seek finds the keyframe, or its picture is none.
        """
        if start == _FIRST_PACKET:
            yield from self._frames_from_the_start()
            return
        import av

        codec = self._stream.codec_context
        shown = self.scan.keyframes[start, 0]
        # H.264's decoder itself withholds the pictures before those that are complete.
        unseen = start > 0 and codec.name != "h264" and not codec.codec.intra_only
        for packet in self._packets_from(start):
            drop = only is not None and packet.pts is not None and packet.pts not in only
            codec.skip_frame = "NONREF" if drop else "DEFAULT"
            try:
                frames = self._decode(packet)
            except av.error.FFmpegError:
                if unseen:
                    raise _NoStart from None
                raise
            while frames:
                frame = frames.pop(0)
                if unseen and frame.pts is not None and frame.pts >= shown:
                    if not frame.key_frame:
                        raise _NoStart
                    unseen = False
                yield frame
                del frame

    def _packets_from(self, start: int) -> Iterator[Any]:
        """Return the packets from a keyframe on. Raises _NoStart: no seek lands at it or before it."""
        import av

        shown, decoded = self.scan.keyframes[start].tolist()
        for position in (shown, decoded):  # some containers seek by display time, some by decoding time
            with suppress(av.error.FFmpegError):
                self._container.seek(position, stream=self._stream)
                packets = self._container.demux(self._stream)
                headers: list[Any] = []
                for packet in packets:
                    if packet.pts == shown:
                        if not self._may_begin(packet):
                            break  # behind a seek its container says other times
                        return (packet for packet in chain(headers, [packet], packets) if is_decodable(packet))
                    if packet.pts is None or packet.pts > shown:
                        break
                    if self._is_blank(packet):
                        headers.append(packet)
        raise _NoStart

    def _frames_from_the_start(self) -> Iterator[Any]:
        self._container.close()
        self._open()
        for packet in self._container.demux(self._stream):
            if is_decodable(packet):
                yield from self._decode(packet)

    def _decode(self, packet: Any) -> list[Any]:
        if not self._is_blank(packet):
            return packet.decode()
        import av

        with suppress(av.error.FFmpegError):  # H.264's decoder calls it invalid, once it has read the headers in it
            return packet.decode()
        return []

    def _is_blank(self, packet: Any) -> bool:
        """Return whether a packet holds no picture."""
        if not self.scan.blank or not packet.size:
            return False
        seen = self._look_at(packet)
        return seen is not None and not seen.pictures

    def _may_begin(self, packet: Any) -> bool:
        """Return whether a packet is a keyframe to its scan, as far as bytes are known to say."""
        seen = self._look_at(packet) if self.scan.proven else None
        return seen is None or seen.start == START or bool(packet.is_keyframe and seen.start != NO_START)

    def _look_at(self, packet: Any) -> Look | None:
        if self._look is None:
            codec = self._stream.codec_context
            self._look = examiner(codec.codec.canonical_name, codec.extradata)
        return None if self._look is None else self._look(bytes(packet))


class _NoStart(Exception):
    """Decoding cannot begin at a keyframe."""


_FIRST_PACKET = -1  # in place of a keyframe's number
_MOST_REORDERED = 16  # frames that H.264 and HEVC may show before one that is stored before them


def _starts(keyframe: int) -> list[int]:
    """Return keyframes to begin at, for a frame behind `keyframe`: 9 -> 9, 8, 7, 5, 1, the first packet."""
    steps = chain([0], (2**power for power in range(64)))
    return [*(keyframe - step for step in takewhile(lambda step: step < keyframe, steps)), _FIRST_PACKET]


def without_fields(frame: Any) -> Any:
    """Return a copy of an interlaced frame (av.VideoFrame) that is not marked as one; any other frame as it is.

    PyAV since 17.0 converts and scales interlaced frames by fields; ffmpeg and the other readers do not.
    """
    import av

    if not frame.interlaced_frame:
        return frame
    whole = av.VideoFrame.from_ndarray(frame.to_ndarray(), format=frame.format.name)
    whole.colorspace, whole.color_range = frame.colorspace, frame.color_range
    return whole


def rgb_converter() -> Any:
    """Return a function from av.VideoFrame to upright uint8 `(H, W, 3)`, which keeps its tables between frames.

    Its second argument is the width and height (before turning) that pictures of another size are scaled to, bicubic.
    """
    import av
    from av.video.reformatter import Interpolation, VideoReformatter

    reformatter, turner = VideoReformatter(), Turner()
    # Since 17.0 PyAV converts with a thread for every core by default; the other cores belong to the other workers.
    options = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}

    def convert(frame: Any, size: tuple[int, int] | None = None) -> np.ndarray:
        shown = orientation(frame)
        frame = without_fields(frame)
        if shown.angle:
            frame = turner(frame, shown.angle)
        scale = {}
        if size is not None and size != (frame.width, frame.height):
            scale = {"width": size[0], "height": size[1], "interpolation": Interpolation.BICUBIC}
        image = reformatter.reformat(frame, format="rgb24", **scale, **options)
        plane: Any = image.planes[0]
        rows = np.frombuffer(plane, dtype=np.uint8).reshape(image.height, -1)  # padded; not copied
        return upright(rows[:, : 3 * image.width].reshape(image.height, image.width, 3), shown)

    return convert
