"""Pack one video: decode, scale, encode as the settings say, and compare the result with its source.

Reading a video at random places is slow because its frames refer to each other. Here no chain of references is longer
than the distance between keyframes; three of four frames are referred to by no other, so the loader need not decode
those that it does not show; and the expensive parts of the codec, arithmetic coding and deblocking, are off.
`video-convmae benchmark packing` measures the settings. pack.py packs a list.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from video_convmae.data.decoding import DecodeError, open_frames
from video_convmae.data.decoding.orientation import UPRIGHT, orientation
from video_convmae.data.decoding.pyav_reader import PyAVReader, rgb_converter, without_fields
from video_convmae.data.records import Record
from video_convmae.prepare.options import ENCODERS, PackSettings

PSNR_FRAMES = 32  # of each video, spread over its length
HEARTBEAT_EVERY = 25  # frames
MIN_MSE = 1e-4  # limits the PSNR of identical frames to 88 dB
DEFAULT_RATE = 25  # frames per second, FFmpeg's default, of a file that states no frame rate


@dataclass(frozen=True)
class PackedVideo:
    """A packed video.

    Attributes:
        data: the mp4 file.
        frames: number of frames in it.
        source_frames: number of frames in the source.
        width, height: pixels.
        psnr: dB against the decoded and scaled source, in RGB.
        note: `FrameReader.note` of the source.
    """

    data: bytes
    frames: int
    source_frames: int
    width: int
    height: int
    psnr: float
    note: str | None = None


def pack_video(record: Record, settings: PackSettings, progress: Callable[[], None] = lambda: None) -> PackedVideo:
    """Pack a video; where the size of its picture changes, every frame is scaled to that of the first, as for training.

    Args:
        record: the video.
        settings: size, frame rate and codec.
        progress: called every `HEARTBEAT_EVERY` frames.

    Raises:
        DecodeError: the source does not decode from first to last frame, or the packed video lacks frames.
    """
    with open_frames(record, "pyav") as reader:
        assert isinstance(reader, PyAVReader)
        times, rate = frame_times(reader.scan, len(reader))
        kept, ticks, tick, rate = resample(times, reader.scan.tick, rate, settings.fps)
        compared = set(np.unique(np.linspace(0, len(kept) - 1, PSNR_FRAMES).astype(int)).tolist())
        place_of = {int(index): place for place, index in enumerate(kept)}
        buffer, references, converter = io.BytesIO(), {}, None
        with av.open(buffer, "w", format="mp4") as container:
            for index, frame in enumerate(reader.pictures()):
                if index % HEARTBEAT_EVERY == 0:
                    progress()
                if converter is None:
                    converter = _Converter(frame, settings)
                    stream = _add_stream(container, converter.size, settings, tick, rate)
                place = place_of.get(index)
                if place is not None:
                    picture = converter(frame, "yuv420p")
                    if place in compared:
                        references[place] = converter(frame, "rgb24").to_ndarray()
                    picture.pts, picture.time_base = int(ticks[place]), tick
                    picture.pict_type = 0  # else the encoder would copy the source's keyframes
                    container.mux(stream.encode(picture))
            if converter is None:
                raise DecodeError(f"{record.path}: no frame was decoded")
            container.mux(stream.encode())
        source_frames, note = len(reader), reader.note
    data = buffer.getvalue()
    psnr = _measure_psnr(record.path, data, references, len(kept), progress)
    return PackedVideo(data, len(kept), source_frames, *converter.size, psnr, note)


def frame_times(scan: Any, count: int) -> tuple[np.ndarray, Fraction]:
    """Return the display time of each frame and the frame rate.

    Args:
        scan: `PyAVReader.scan` of the video.
        count: number of frames.

    Returns:
        `(count,)` int64 ticks of `scan.tick` seconds, from 0; frames per second. Frames of a file without reliable
        times are spread evenly: frame i is shown at i / rate seconds.
    """
    rate = Fraction(scan.rate or DEFAULT_RATE)
    if scan.timed:
        return scan.times - scan.times[0], rate
    return np.round(np.arange(count) / float(rate * scan.tick)).astype(np.int64), rate


def resample(
    times: np.ndarray, tick: Fraction, rate: Fraction, fps: float | None
) -> tuple[np.ndarray, np.ndarray, Fraction, Fraction]:
    """Choose the frames to keep.

    At a lower frame rate the k-th output frame is the one on screen k / fps seconds after the first. 5 frames at 5 per
    second reduced to 2 per second:

        source frame    0    1    2    3    4
        shown at        0.0  0.2  0.4  0.6  0.8
        asked at        0.0       0.5              duration 5 / 5 = 1 s, so 1 s x 2 per second = 2 frames
        kept            0         2

    Args:
        times: `(N,)` int64 display times in ticks, ascending from 0.
        tick: seconds.
        rate: frames per second.
        fps: highest frame rate of the output; None keeps every frame, as does a source that is not faster.

    Returns:
        `(n,)` indices of the kept frames, their times in ticks of the output, its tick in seconds and its frame rate.
    """
    if fps is None or rate <= fps:
        return np.arange(len(times)), times, tick, rate
    rate = Fraction(fps).limit_denominator(1001)  # a float's own denominator is up to 2**52; NTSC's rates have 1001
    seconds = times * float(tick)
    # The last frame is shown for as long as the others on average, so N frames last N / (N - 1) times the time from
    # the first to the last.
    duration = seconds[-1] * len(times) / (len(times) - 1) if len(times) > 1 else 0.0
    asked = np.arange(max(1, round(duration * float(rate)))) / float(rate)
    # The last frame that is shown at or before each time asked for; 1e-6 s for rounding.
    shown = np.clip(np.searchsorted(seconds, asked + 1e-6, side="right") - 1, 0, None)
    # A frame that stays on screen for several of them (a variable frame rate) is kept once, at the first: the output's
    # tick is 1 / rate, so its time is the position of that.
    first = np.flatnonzero(np.diff(shown, prepend=-1))
    return shown[first], first, 1 / rate, rate


class _Converter:
    """Conversion of decoded frames: upright, scaled, in another pixel format.

    YUV of any matrix and range is converted to BT.601 in limited range ("MPEG": luma 16 to 235). The packed file has no
    colour tags, and readers interpret untagged YUV as exactly that, so they show the RGB of the source. For the PSNR,
    frames are converted to RGB by the tags of the source.
    """

    def __init__(self, frame: Any, settings: PackSettings) -> None:
        self.shown = orientation(frame)
        width, height = (frame.height, frame.width) if self.shown.transposed else (frame.width, frame.height)
        self.size = settings.size(width, height)
        # A reformatter keeps the tables of its last conversion: one for each size.
        self._scaler, self._to_rgb = VideoReformatter(), rgb_converter()

    def __call__(self, frame: Any, format: str) -> Any:
        """Return a new frame in the pixel format "yuv420p" or "rgb24"."""
        frame = without_fields(frame)
        if self.shown != UPRIGHT:  # in RGB, one array; the planes of YUV 4:2:0 have two sizes
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(self._to_rgb(frame)), format="rgb24")
        target = {} if format == "rgb24" else {"dst_colorspace": Colorspace.ITU601, "dst_color_range": ColorRange.MPEG}
        return self._scaler.reformat(
            frame, *self.size, format=format, interpolation=Interpolation.BICUBIC, threads=1, **target
        )


def _add_stream(container: Any, size: tuple[int, int], settings: PackSettings, tick: Fraction, rate: Fraction) -> Any:
    stream = container.add_stream(ENCODERS[settings.codec], rate=rate, options=settings.encoder_options())
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = tick
    stream.codec_context.thread_count = 1
    stream.codec_context.gop_size = settings.keyframe_every
    return stream


def _measure_psnr(
    path: str, data: bytes, references: dict[int, np.ndarray], count: int, progress: Callable[[], None]
) -> float:
    """Decode a packed video; returns the PSNR over its reference frames.

    Raises:
        DecodeError: it does not hold `count` frames.
    """
    errors: list[float] = []
    decoded = 0
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_type = "NONE"
        for place, frame in enumerate(container.decode(video=0)):
            if place % HEARTBEAT_EVERY == 0:
                progress()
            if place in references:
                difference = frame.to_ndarray(format="rgb24").astype(np.float32) - references[place]
                errors.append(float(np.square(difference).mean()))
            decoded += 1
    if decoded != count:
        raise DecodeError(f"{path}: the packed video holds {decoded} frames; expected {count}")
    return 10 * math.log10(255**2 / max(MIN_MSE, sum(errors) / len(errors)))
