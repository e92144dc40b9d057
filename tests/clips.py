"""Small video files made at test time with PyAV: good ones of many kinds (`make`), and ways to spoil them.

Pictures are 48 rows by 64 columns unless the kind asks for others; no two frames of a file are alike.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

FAST = {"libx264": {"preset": "veryfast"}, "libx265": {"preset": "ultrafast"}, "libsvtav1": {"preset": "12"}}
FAST |= {"mpeg4": {}, "mjpeg": {}, "mpeg2video": {"bf": "2"}}
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
    seed: int = 0,
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
        seed: of the pictures.
    """
    times = range(count) if times is None else times
    with av.open(str(path), "w", format=format, options=container or {}) as file:
        streams = [_video_stream(file, codec, each, pix_fmt, tick, options or {}) for each in (*others, size)]
        if audio:
            _write_silence(file)
        clips = [pictures(count, *each, seed=seed + place) for place, each in enumerate((*others, size))]
        for place, time in enumerate(times):
            for stream, clip in zip(streams, clips, strict=True):
                frame = av.VideoFrame.from_ndarray(clip[place], format="rgb24").reformat(format=pix_fmt)
                frame.pts, frame.time_base = time, tick
                file.mux(stream.encode(frame))
        for stream in streams:
            file.mux(stream.encode())
    if codec == "libsvtav1" and hasattr(os, "sched_setscheduler"):
        # The AV1 encoder gives root's process real-time priority: its children would starve all others of the machine.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


def save_series(folder: Path, count: int, *patterns: str, size: tuple[int, int] = (48, 80)) -> Path:
    """Save `count` pictures of each series (`img_*.png`) into a folder, each series with a seed of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, pattern in enumerate(patterns):
        for number, image in enumerate(pictures(count, *size, seed=seed), start=1):
            Image.fromarray(image).save(folder / pattern.replace("*", f"{number:05}"))
    return folder


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


# ---- changes that encoders do not offer, made to the finished file ---------------------------------------------------


def rotate(path: Path, degrees: int) -> None:
    """Set the display matrix of an mp4, as phones do: the player turns the picture clockwise by 90, 180 or 270."""
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    set_matrix(path, (cos, sin, -sin, cos))


def set_matrix(path: Path, matrix: tuple[float, float, float, float]) -> None:
    """Set the display matrix of an mp4: the pixel at (x, y) is shown at (ax + cy, bx + dy)."""
    a, b, c, d = (round(value * 65536) for value in matrix)
    data = bytearray(path.read_bytes())
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def edit(path: Path, first: int, shown: int) -> None:
    """Change the edit list of an mp4 (25 frames/s): a player skips `first` frames and shows the next `shown`."""
    data = bytearray(path.read_bytes())
    start = data.index(b"elst") + 12
    _, media_time = struct.unpack_from(">Ii", data, start)
    struct.pack_into(">Ii", data, start, 40 * shown, media_time + first * 512)  # milliseconds, 1/12800 s
    path.write_bytes(data)


def hide_vp8(path: Path, place: int) -> None:
    """Clear the flag `show_frame` of one VP8 packet, as encoders do for frames that only others refer to."""
    copy = path.with_name("copy of " + path.name)
    with av.open(str(path)) as source, av.open(str(copy), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                if number == place:
                    memoryview(packet)[0] &= 0b11101111
                packet.stream = stream
                target.mux(packet)
    copy.replace(path)


def copy_packets(
    source: Path, target: Path, change: Callable[[int, av.Packet], Iterable[av.Packet]], **options: str
) -> Path:
    """Write a stream's packets into another container, each (with its number) as `change` returns it."""
    with av.open(str(source)) as given, av.open(str(target), "w", options=options) as file:
        stream = file.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(given.demux(video=0)):
            for changed in change(number, packet) if packet.size else ():
                changed.stream = stream
                file.mux(changed)
    return target


def call_keys(source: Path, target: Path, every: int = 1, **options: str) -> Path:
    """Copy a stream into a container that calls every n-th frame a keyframe, beside those that are."""

    def call(number: int, packet: av.Packet) -> list[av.Packet]:
        packet.is_keyframe = packet.is_keyframe or number % every == 0
        return [packet]

    return copy_packets(source, target, call, **options)


def without_stss(path: Path) -> None:
    """Take the list of keyframes from an mp4: then every frame counts as one."""
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))


def insert_units(source: Path, target: Path, unit: bytes) -> Path:
    """Put a packet with this NAL unit, which holds no picture, behind every fifth packet of H.264 or HEVC."""

    def insert(number: int, packet: av.Packet) -> list[av.Packet]:
        if number % 5 != 4:
            return [packet]
        blank = av.Packet(len(unit).to_bytes(4, "big") + unit)
        blank.time_base = packet.time_base
        half = packet.duration // 2
        blank.pts, blank.dts, blank.duration = packet.pts + half, packet.dts + half, half
        return [packet, blank]

    return copy_packets(source, target, insert)


def leave_uncoded(source: Path, target: Path, places: Sequence[int]) -> Path:
    """Make P-VOPs of MPEG-4 (at 25 frames/s: 5 bits of time) into VOPs that are not coded."""

    def change(number: int, packet: av.Packet) -> list[av.Packet]:
        if number not in places:
            return [packet]
        data = bytes(packet)
        place = data.index(b"\0\0\1\xb6")
        head = f"{int.from_bytes(data[place + 4 : place + 12], 'big'):064b}"
        ones = len(head[2:]) - len(head[2:].lstrip("1"))
        bits = head[: 2 + ones + 2 + 5 + 1] + "0"  # type, seconds, marker, time, marker, not coded
        bits += "0".ljust(8 - len(bits) % 8, "1")
        empty = av.Packet(data[: place + 4] + int(bits, 2).to_bytes(len(bits) // 8, "big"))
        empty.time_base, empty.pts, empty.dts, empty.duration = (
            packet.time_base,
            packet.pts,
            packet.dts,
            packet.duration,
        )
        return [empty]

    return copy_packets(source, target, change)


def encode_sizes(path: Path, codec: str, sizes: Sequence[tuple[int, int]], count: int = 12) -> Path:
    """Encode `count` pictures of each size (height, width) into one stream, as WebRTC does."""
    options = FAST[codec] | ({"bf": "0"} if codec == "libx264" else {})
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    with av.open(str(path), "w") as file:
        stream = _video_stream(file, codec, sizes[0], pix_fmt, Fraction(1, 25), options)
        file.start_encoding()
        for place, size in enumerate(sizes):
            encoder = av.CodecContext.create(codec, "w")
            encoder.height, encoder.width, encoder.pix_fmt = *size, pix_fmt
            encoder.time_base, encoder.thread_count, encoder.options = Fraction(1, 25), 1, options
            frames: list[av.VideoFrame | None] = []
            for number, picture in enumerate(pictures(count, *size)):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
                frame.pts, frame.time_base = place * count + number, Fraction(1, 25)
                frames.append(frame)
            for frame in [*frames, None]:
                for packet in encoder.encode(frame):
                    packet.stream, packet.time_base = stream, Fraction(1, 25)
                    file.mux(packet)
    return path


def cut(path: Path, fraction: float) -> None:
    """Keep only this part of the file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])


def blank(path: Path, first: float, last: float) -> None:
    """Overwrite the bytes between these two fractions of the file with zeros."""
    data = bytearray(path.read_bytes())
    begin, end = int(first * len(data)), int(last * len(data))
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)


# ---- the kinds: name -> arguments of `encode`, and a change to the finished file -------------------------------------

# b_strategy 0: as many B-frames as are allowed, whatever is shown.
_B = {"bf": "3", "b_strategy": "0", "g": "20"}
_SAME = _B | {"mbtree": "0"}  # else tiny clips differ from one encoding to the next; these are held against each other
_OPEN = {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=12:min-keyint=12:scenecut=0"}
_HEVC_OPEN = {"x265-params": "log-level=none:open-gop=1:keyint=12:min-keyint=12:bframes=3"}
_HEVC_CLOSED = {"x265-params": "log-level=none:open-gop=0:keyint=12:min-keyint=12:bframes=3"}
_ALT_REF = {"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "16"}
_VARIABLE = {
    "times": np.cumsum(np.random.default_rng(0).integers(1, 90, 60)).tolist(),
    "tick": Fraction(1, 1000),
    "options": _B,
}
_STREAMS = {"size": (96, 128), "others": [(48, 64)], "audio": True, "options": _B}

GOOD: dict[str, dict[str, Any]] = {
    "h264.mp4": {"options": _SAME},
    "h264.mkv": {"options": _B},
    "h264.mov": {"options": _B},
    "h264 without B-frames.mp4": {"options": {"bf": "0", "g": "20"}},
    "h264 keyframes only.mp4": {"options": {"bf": "0", "g": "1"}},
    "h264 keyframe every 4.mp4": {"options": _B | {"g": "4"}},
    "h264 keyframe every 2.mp4": {"options": _B | {"g": "2"}},
    "h264 422.mp4": {"options": _B, "pix_fmt": "yuv422p"},
    "h264 444 odd size.mp4": {"options": _B, "pix_fmt": "yuv444p", "size": (49, 65)},
    "h264 full range.mp4": {"options": _B, "pix_fmt": "yuvj420p"},
    "h264 10 bits.mp4": {"options": _B, "pix_fmt": "yuv420p10le"},
    "h264 fragmented.mp4": {"options": _B, "container": {"movflags": "frag_keyframe+empty_moov"}},
    "h264 interlaced.mp4": {"options": _B | {"x264-params": "tff=1"}, "size": (64, 64)},
    "h264 intra refresh.mkv": {"options": {"g": "20", "x264-params": "intra-refresh=1"}},
    "h264 raw.h264": {"options": _B},
    "h264 B-frames.avi": {"options": _B},
    "open GOP.mp4": {"options": _OPEN},
    "open GOP.mkv": {"options": _OPEN},
    "hevc.mp4": {"codec": "libx265", "count": 40, "options": _HEVC_CLOSED},
    "hevc open GOP.mp4": {"codec": "libx265", "count": 40, "options": _HEVC_OPEN},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "20"}},
    "vp9 alt-ref.webm": {"codec": "libvpx-vp9", "options": _ALT_REF},
    "vp9 odd width.webm": {"codec": "libvpx-vp9", "size": (48, 65)},
    "vp9 odd height.webm": {"codec": "libvpx-vp9", "size": (49, 64)},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "20"}},
    "vp8 hidden frame.webm": {"codec": "libvpx", "options": {"g": "20"}, "change": (hide_vp8, 29)},
    "av1.mp4": {"codec": "libsvtav1", "count": 30, "size": (64, 64)},
    "av1.webm": {"codec": "libsvtav1", "count": 30, "size": (64, 64)},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12"}},
    "mpeg4 B-frames.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mpeg4 B-frames.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj422p"},
    "mpeg2.mkv": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
    "wmv.wmv": {"codec": "wmv2", "options": {"g": "12"}},
    "flv.flv": {"codec": "flv", "options": {"g": "12"}},
    "variable rate.mp4": _VARIABLE,
    "variable rate.mkv": _VARIABLE,
    "start offset.mp4": {"options": _B, "times": range(75, 135)},
    "start offset.mkv": {"options": _B, "times": range(75, 135)},
    "edit list.mp4": {"options": _SAME, "change": (edit, 25, 20)},
    "edit list in one GOP.mp4": {"options": _B | {"g": "60"}, "change": (edit, 7, 41)},
    "rotated 90.mp4": {"options": _SAME, "change": (rotate, 90)},
    "rotated 180.mp4": {"options": _SAME, "change": (rotate, 180)},
    "rotated 270.mp4": {"options": _SAME, "change": (rotate, 270)},
    "rotated 90, 64 wide.mp4": {"options": _B, "size": (64, 80), "change": (rotate, 90)},
    "several streams.mp4": _STREAMS,
    "several streams.mkv": _STREAMS,
    "one frame.mp4": {"count": 1},
    "one frame.webm": {"count": 1, "codec": "libvpx-vp9"},
    "two frames.mp4": {"count": 2, "options": _B},
    "five frames.webm": {"count": 5, "codec": "libvpx-vp9"},
    "a:name, with 'quotes' and \u00fc%d.mp4": {"options": _B},
}


def make(name: str, folder: Path) -> Path:
    """Write the file of this name in `GOOD` into a folder."""
    kind = dict(GOOD[name])
    change, *arguments = kind.pop("change", (None,))
    path = encode(folder / name, **kind)
    if change is not None:
        change(path, *arguments)
    return path


def encode_list(folder: Path, count: int, bad: str) -> Path:
    """Encode `count` short videos and a file that is none, and write list.txt: each is a class; `bad` is its line."""
    for i in range(count):
        encode(folder / f"{i}.mp4", 20 + i)
    (folder / bad.split()[0]).write_text("no video")
    lines = [f"{i}.mp4 {i}" for i in range(count)]
    (folder / "list.txt").write_text("\n".join(lines if bad in lines else [*lines, bad]))
    return folder
