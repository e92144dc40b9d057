"""One video packed: decoded, scaled, encoded as the settings say, and compared with what it was made from.

What makes a video slow to read at random places is that its frames lean on each other: here no chain of them is longer
than the distance of two keyframes, three of four frames have no other lean on them (the loader leaves those undecoded
that it does not need), and the costly parts of the codec, arithmetic coding and deblocking, are off. The table over
these settings: `python tools/benchmark.py packing`. The tool that packs a list is pack_videos.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from video_convmae.data.decoding import DecodeError, open_frames
from video_convmae.data.decoding.pyav_reader import PyAVReader
from video_convmae.data.records import Record

PSNR_FRAMES = 32  # of each video, spread over it
PROGRESS_FRAMES = 25  # progress is reported every so many frames: it extends the deadline of a packing process
LOWEST_MSE = 1e-4  # no difference at all is given as 88 dB
ENCODERS = {"h264": "libx264", "hevc": "libx265"}


@dataclass(frozen=True)
class Settings:
    """How a video is packed."""

    short_side: int = 256
    """Pixels; smaller videos are not enlarged."""
    fps: float | None = None
    """Frames a second, of videos that have more; none: all frames."""
    keyframe_every: int = 16
    """Frames."""
    codec: Literal["h264", "hevc"] = "h264"
    tune: Literal["fastdecode", "none"] = "fastdecode"
    """fastdecode: no arithmetic coding, no deblocking, no weighted prediction."""
    crf: int = 22
    """The encoder's quality: 6 more are half of the bytes."""
    b_frames: int = 3
    """Frames in a row that no other leans on."""
    speed: str = "medium"
    """The encoder's preset."""

    def __post_init__(self) -> None:
        for name, least in (("short_side", 16), ("keyframe_every", 1), ("crf", 0), ("b_frames", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {least} or more")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps is {self.fps}; expected more than 0")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the packed video: even numbers, as its pixel format wants."""
        scale = min(1.0, self.short_side / min(width, height))
        return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))

    def encoder_options(self) -> dict[str, str]:
        """Options of libx264 and libx265; they differ in how they are spelled."""
        tune = {} if self.tune == "none" else {"tune": self.tune}
        common = {"preset": self.speed, "crf": str(self.crf), "g": str(self.keyframe_every), **tune}
        if self.codec == "hevc":
            frames = f"keyint={self.keyframe_every}:bframes={self.b_frames}:b-adapt=0:b-pyramid=0:open-gop=0"
            return common | {"x265-params": f"log-level=none:pools=1:frame-threads=1:{frames}"}
        # mbtree would give other bytes in every second run (0.5 dB for it); packed again, a video stays the same.
        return common | {"bf": str(self.b_frames), "b_strategy": "0", "mbtree": "0", "x264-params": "b-pyramid=none"}


PRESETS = {
    "fast": Settings(),
    "fastest": Settings(short_side=192),
    "small": Settings(tune="none", crf=23),
    "uniform": Settings(keyframe_every=8),
    "keyframes": Settings(keyframe_every=1, b_frames=0),
}


@dataclass(frozen=True)
class Packed:
    """A packed video and what became of it."""

    data: bytes
    frames: int
    width: int
    height: int
    psnr: float


def pack(record: Record, settings: Settings, progress: Callable[[], None] = lambda: None) -> tuple[Packed, int]:
    """Pack a video.

    Args:
        record: the video.
        settings: how.
        progress: called every `PROGRESS_FRAMES` frames.

    Returns:
        The packed video, and how many frames the source has.

    Raises:
        DecodeError: the source does not decode, from first to last frame, or the packed one does not hold its frames.
    """
    with open_frames(record, "pyav") as reader:
        assert isinstance(reader, PyAVReader)  # of a video
        times, rate = frame_times(reader.scan, len(reader))
        kept, ticks, tick, rate = resample(times, reader.scan.tick, rate, settings.fps)
        compared = set(np.unique(np.linspace(0, len(kept) - 1, PSNR_FRAMES).astype(int)).tolist())
        wanted = {int(index): place for place, index in enumerate(kept)}
        buffer, references, converter = io.BytesIO(), {}, None
        with av.open(buffer, "w", format="mp4") as container:
            for index, frame in enumerate(reader.pictures()):
                if index % PROGRESS_FRAMES == 0:
                    progress()
                if converter is None:
                    first_size, converter = (frame.width, frame.height), _Converter(frame, settings)
                    stream = _stream(container, converter.size, settings, tick, rate)
                if (frame.width, frame.height) != first_size:
                    raise DecodeError(f"{record.path}: the size of the picture changes at frame {index}")
                place = wanted.get(index)
                if place is not None:
                    picture = converter(frame, "yuv420p")
                    if place in compared:
                        references[place] = converter(frame, "rgb24").to_ndarray()
                    picture.pts, picture.time_base = int(ticks[place]), tick
                    picture.pict_type = 0  # else the encoder would copy the source's keyframes
                    container.mux(stream.encode(picture))
            container.mux(stream.encode())
        source_frames = len(reader)
    data = buffer.getvalue()
    psnr = _compare(record.path, data, references, len(kept), progress)
    return Packed(data, len(kept), *converter.size, psnr), source_frames


def frame_times(scan: Any, count: int) -> tuple[np.ndarray, Fraction]:
    """When each frame is shown in ticks from the first one on, and the frame rate (25 where nothing says it)."""
    rate = Fraction(scan.rate or 25)
    if scan.timed:
        return scan.times - scan.times[0], rate
    return np.round(np.arange(count) / float(rate * scan.tick)).astype(np.int64), rate


def resample(
    times: np.ndarray, tick: Fraction, rate: Fraction, fps: float | None
) -> tuple[np.ndarray, np.ndarray, Fraction, Fraction]:
    """Which frames are kept.

    Returns:
        Their indices, their times in ticks, the tick and the frame rate of the packed video.
    """
    if fps is None or rate <= fps:
        return np.arange(len(times)), times, tick, rate
    rate = Fraction(fps).limit_denominator(1001)
    seconds = times * float(tick)
    count = max(1, round(len(times) / float(len(times) - 1) * seconds[-1] * float(rate))) if len(times) > 1 else 1
    asked = np.arange(count) / float(rate)
    kept = np.clip(np.searchsorted(seconds, asked + 1e-6, side="right") - 1, 0, None)
    return kept[np.r_[True, np.diff(kept) > 0]], np.flatnonzero(np.r_[True, np.diff(kept) > 0]), 1 / rate, rate


class _Converter:
    """Decoded frames, scaled and upright, in another pixel format; colours as BT.601 in limited range, which is what
    untagged files are read as."""

    def __init__(self, frame: Any, settings: Settings) -> None:
        self.turns = frame.rotation // 90 % 4
        width, height = (frame.height, frame.width) if self.turns % 2 else (frame.width, frame.height)
        self.size = settings.size(width, height)
        self._scaler, self._turner = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: Any, format: str) -> Any:
        if self.turns:
            upright = np.rot90(self._turner.reformat(frame, format="rgb24", threads=1).to_ndarray(), self.turns)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(upright), format="rgb24")
        target = {} if format == "rgb24" else {"dst_colorspace": Colorspace.ITU601, "dst_color_range": ColorRange.MPEG}
        return self._scaler.reformat(
            frame, *self.size, format=format, interpolation=Interpolation.BICUBIC, threads=1, **target
        )


def _stream(container: Any, size: tuple[int, int], settings: Settings, tick: Fraction, rate: Fraction) -> Any:
    stream = container.add_stream(ENCODERS[settings.codec], rate=rate, options=settings.encoder_options())
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = tick
    stream.codec_context.thread_count = 1
    stream.codec_context.gop_size = settings.keyframe_every
    return stream


def _compare(
    path: str, data: bytes, references: dict[int, np.ndarray], count: int, progress: Callable[[], None]
) -> float:
    """PSNR in dB over the reference frames; raises DecodeError unless the video holds `count` frames."""
    errors, place = [], -1
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_type = "NONE"
        for place, frame in enumerate(container.decode(video=0)):
            if place % PROGRESS_FRAMES == 0:
                progress()
            if place in references:
                difference = frame.to_ndarray(format="rgb24").astype(np.float32) - references[place]
                errors.append(float(np.square(difference).mean()))
    if place + 1 != count:
        raise DecodeError(f"{path}: packed, it holds {place + 1} frames of {count}")
    return float(10 * np.log10(255**2 / max(LOWEST_MSE, np.mean(errors))))
