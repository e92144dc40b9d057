"""Small video files made at test time with PyAV: good ones of many kinds, and ones that break careless readers.

`GOOD` maps a name to a function that writes such a file into a folder and returns its path; `BAD` likewise. Pictures are
64 x 48 unless the kind asks for others; no two frames of a file are alike.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

FAST = {"libx264": {"preset": "veryfast"}, "libx265": {"preset": "ultrafast"}, "libsvtav1": {"preset": "12"}}
FAST |= {"libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}, "libvpx": {"deadline": "realtime", "cpu-used": "8"}}
os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder: errors only


def pictures(count: int, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """`count` pictures, uint8 (count, height, width, 3): coloured squares that move, different in every picture."""
    rng = np.random.default_rng(seed)
    squares = np.kron(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((height // 8 + 1, width // 8 + 1, 1)))
    images = np.stack([np.roll(squares[:height, :width], 3 * place, axis=1) for place in range(count)])
    return (images + 40 * np.sin(np.arange(count) * 1.7)[:, None, None, None]).clip(0, 255).astype(np.uint8)


def encode(
    path: Path,
    count: int = 60,
    codec: str = "libx264",
    *,
    size: tuple[int, int] = (48, 64),
    pix_fmt: str = "yuv420p",
    times: Sequence[int] | None = None,
    tick: Fraction = Fraction(1, 25),
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    format: str | None = None,
    others: Sequence[tuple[int, int]] = (),
    audio: bool = False,
) -> Path:
    """Encode `pictures` into a file.

    Args:
        count: frames of each video stream.
        size: height and width.
        times: when each frame is shown, in `tick`s (default: 0, 1, 2, ...).
        options: of the encoder, beside the fast ones of `FAST`.
        container: options of the container.
        others: sizes of further video streams, written before the first.
        audio: add a second of silence.
    """
    times = range(count) if times is None else times
    with av.open(str(path), "w", format=format, options=container or {}) as file:
        streams = [_video_stream(file, codec, each, pix_fmt, tick, options or {}) for each in (*others, size)]
        if audio:
            _write_silence(file)
        clips = [pictures(count, *each, seed=place) for place, each in enumerate((*others, size))]
        for place, time in enumerate(times):
            for stream, clip in zip(streams, clips, strict=True):
                frame = av.VideoFrame.from_ndarray(clip[place], format="rgb24").reformat(format=pix_fmt)
                frame.pts, frame.time_base = time, tick
                file.mux(stream.encode(frame))
        for stream in streams:
            file.mux(stream.encode())
    return path


def _video_stream(file: Any, codec: str, size: tuple[int, int], pix_fmt: str, tick: Fraction, options: dict) -> Any:
    stream = file.add_stream(codec, rate=25, options=FAST.get(codec, {}) | options)
    stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
    stream.codec_context.time_base = tick
    stream.codec_context.thread_count = 1
    if "g" in options:
        stream.codec_context.gop_size = int(options["g"])
    return stream


def _write_silence(file: Any) -> None:
    codec = "libopus" if "webm" in file.format.name or "matroska" in file.format.name else "aac"
    stream = file.add_stream(codec, rate=48000)
    silence = av.AudioFrame.from_ndarray(np.zeros((2, 48000), dtype=np.float32), format="fltp", layout="stereo")
    silence.sample_rate, silence.pts = 48000, 0
    file.mux(stream.encode(silence))
    file.mux(stream.encode())


# ---- what encoders do not offer: written into the boxes of an mp4 ----------------------------------------------------


def rotate(path: Path, degrees: int) -> Path:
    """Set the display matrix of an mp4, as phones do: the player turns the picture clockwise by 90, 180 or 270."""
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = [cos, sin, 0, -sin, cos, 0, 0, 0]
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # version 0: the matrix is 40 bytes behind the name
    struct.pack_into(">8i", data, start, *[value * 65536 for value in matrix])
    path.write_bytes(data)
    return path


def hide(path: Path, first: int, shown: int, frame_ticks: int = 512) -> Path:
    """Change the edit list of an mp4 (25 frames/s) so that a player skips `first` frames and shows `shown` of the rest."""
    data = bytearray(path.read_bytes())
    start = data.index(b"elst") + 4 + 8
    duration, media_time = struct.unpack_from(">Ii", data, start)
    assert duration > 40 * shown, "the edit list counts milliseconds"
    struct.pack_into(">Ii", data, start, 40 * shown, media_time + first * frame_ticks)
    path.write_bytes(data)
    return path


def cut(path: Path, fraction: float) -> Path:
    """Keep only this part of the file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    return path


def blank(path: Path, first: float, last: float) -> Path:
    """Overwrite the bytes between these two fractions of the file with zeros."""
    data = bytearray(path.read_bytes())
    begin, end = int(first * len(data)), int(last * len(data))
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    return path


# ---- the kinds ------------------------------------------------------------------------------------------------------

_B = {"bf": "3", "b_strategy": "0", "g": "20"}  # strategy 0: as many B-frames as allowed, whatever is shown
_OPEN = {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=12:min-keyint=12:scenecut=0"}
_OPEN_HEVC = {"x265-params": "log-level=none:open-gop=1:keyint=12:min-keyint=12:bframes=3"}
_VARIABLE = np.cumsum(np.random.default_rng(0).integers(1, 90, 60)).tolist()
_FAST_START = {"movflags": "+faststart"}

GOOD: dict[str, Callable[[Path], Path]] = {
    "h264.mp4": lambda at: encode(at / "h264.mp4", options=_B),
    "h264_no_b.mp4": lambda at: encode(at / "h264_no_b.mp4", options={"bf": "0", "g": "20"}),
    "h264_keyframes_only.mp4": lambda at: encode(at / "h264_keyframes_only.mp4", options={"bf": "0", "g": "1"}),
    "h264_short_gop.mp4": lambda at: encode(at / "h264_short_gop.mp4", options=_B | {"g": "4"}),
    "h264.mkv": lambda at: encode(at / "h264.mkv", options=_B),
    "h264.mov": lambda at: encode(at / "h264.mov", options=_B),
    "h264_422.mp4": lambda at: encode(at / "h264_422.mp4", options=_B, pix_fmt="yuv422p"),
    "h264_444.mp4": lambda at: encode(at / "h264_444.mp4", options=_B, pix_fmt="yuv444p", size=(49, 65)),
    "h264_full_range.mp4": lambda at: encode(at / "h264_full_range.mp4", options=_B, pix_fmt="yuvj420p"),
    "h264_10_bits.mp4": lambda at: encode(at / "h264_10_bits.mp4", options=_B, pix_fmt="yuv420p10le"),
    "h264_refresh.mkv": lambda at: encode(
        at / "h264_refresh.mkv", options={"g": "20", "x264-params": "intra-refresh=1"}
    ),
    "h264_interlaced.mp4": lambda at: encode(
        at / "h264_interlaced.mp4", size=(64, 64), options=_B | {"x264-params": "tff=1"}
    ),
    "open_gop.mp4": lambda at: encode(at / "open_gop.mp4", options=_OPEN),
    "open_gop.mkv": lambda at: encode(at / "open_gop.mkv", options=_OPEN),
    "hevc.mp4": lambda at: encode(at / "hevc.mp4", 30, "libx265", options={"x265-params": "log-level=none:open-gop=0"}),
    "hevc_open_gop.mp4": lambda at: encode(at / "hevc_open_gop.mp4", 40, "libx265", options=_OPEN_HEVC),
    "vp9.webm": lambda at: encode(at / "vp9.webm", codec="libvpx-vp9", options={"g": "20"}),
    "vp9_alt_ref.webm": lambda at: encode(
        at / "vp9_alt_ref.webm",
        codec="libvpx-vp9",
        options={"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "16"},
    ),
    "vp9_odd.webm": lambda at: encode(at / "vp9_odd.webm", codec="libvpx-vp9", options={"g": "20"}, size=(48, 65)),
    "vp9_odd_height.webm": lambda at: encode(at / "vp9_odd_height.webm", codec="libvpx-vp9", size=(49, 64)),
    "vp8.webm": lambda at: encode(at / "vp8.webm", codec="libvpx", options={"g": "20"}),
    "vp8_alt_ref.webm": lambda at: encode(
        at / "vp8_alt_ref.webm",
        codec="libvpx",
        options={"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "16"},
    ),
    "av1.mp4": lambda at: encode(at / "av1.mp4", 30, "libsvtav1", size=(64, 64)),
    "av1.webm": lambda at: encode(at / "av1.webm", 30, "libsvtav1", size=(64, 64)),
    "mpeg4.avi": lambda at: encode(at / "mpeg4.avi", codec="mpeg4", options={"g": "12"}),
    "mpeg4_b.avi": lambda at: encode(at / "mpeg4_b.avi", codec="mpeg4", options={"g": "12", "bf": "2"}),
    "mpeg4_b.mp4": lambda at: encode(at / "mpeg4_b.mp4", codec="mpeg4", options={"g": "12", "bf": "2"}),
    "h264_b.avi": lambda at: encode(at / "h264_b.avi", options=_B),
    "mjpeg.avi": lambda at: encode(at / "mjpeg.avi", codec="mjpeg", pix_fmt="yuvj422p"),
    "mpeg2.mkv": lambda at: encode(at / "mpeg2.mkv", codec="mpeg2video", options={"bf": "2", "g": "12"}),
    "mpeg2.mpg": lambda at: encode(at / "mpeg2.mpg", codec="mpeg2video", options={"bf": "2", "g": "12"}),
    "wmv.wmv": lambda at: encode(at / "wmv.wmv", codec="wmv2", options={"g": "12"}),
    "flv.flv": lambda at: encode(at / "flv.flv", codec="flv", options={"g": "12"}, tick=Fraction(1, 25)),
    "variable_rate.mp4": lambda at: encode(
        at / "variable_rate.mp4", options=_B, times=_VARIABLE, tick=Fraction(1, 1000)
    ),
    "variable_rate.mkv": lambda at: encode(
        at / "variable_rate.mkv", options=_B, times=_VARIABLE, tick=Fraction(1, 1000)
    ),
    "start_offset.mp4": lambda at: encode(at / "start_offset.mp4", options=_B, times=range(75, 135)),
    "start_offset.mkv": lambda at: encode(at / "start_offset.mkv", options=_B, times=range(75, 135)),
    "edit_list.mp4": lambda at: hide(encode(at / "edit_list.mp4", options=_B), 25, 20),
    "edit_list_in_gop.mp4": lambda at: hide(encode(at / "edit_list_in_gop.mp4", options=_B | {"g": "60"}), 7, 41),
    "rotate_90.mp4": lambda at: rotate(encode(at / "rotate_90.mp4", options=_B), 90),
    "rotate_180.mp4": lambda at: rotate(encode(at / "rotate_180.mp4", options=_B), 180),
    "rotate_270.mp4": lambda at: rotate(encode(at / "rotate_270.mp4", options=_B), 270),
    "streams.mp4": lambda at: encode(at / "streams.mp4", options=_B, size=(96, 128), others=[(48, 64)], audio=True),
    "streams.mkv": lambda at: encode(at / "streams.mkv", options=_B, size=(96, 128), others=[(48, 64)], audio=True),
    "fragmented.mp4": lambda at: encode(
        at / "fragmented.mp4", options=_B, container={"movflags": "frag_keyframe+empty_moov"}
    ),
    "one_frame.mp4": lambda at: encode(at / "one_frame.mp4", 1),
    "one_frame.webm": lambda at: encode(at / "one_frame.webm", 1, "libvpx-vp9"),
    "two_frames.mp4": lambda at: encode(at / "two_frames.mp4", 2, options=_B),
    "five_frames.webm": lambda at: encode(at / "five_frames.webm", 5, "libvpx-vp9"),
    "raw.h264": lambda at: encode(at / "raw.h264", options=_B),
    "a name: with, 'quotes' and ü%d.mp4": lambda at: encode(at / "a name: with, 'quotes' and ü%d.mp4", options=_B),
}
