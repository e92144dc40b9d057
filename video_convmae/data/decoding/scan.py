"""Walk the packets of a video file once, without decoding.

The scan is the one authority on the frames of a file, so that all readers agree: the frames are those that FFmpeg shows
from first to last, in display order. A frame hidden by an edit list, or in a packet that a truncation cut off, is not
counted; frame i is the i-th of the others, however long each is shown. What a container says of its packets is a claim:
keyframes and pictures are counted by the packets' own bytes (bitstream.py) where their codec is known there.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from video_convmae.data import shards

from .bitstream import NO_START, RECOVERY, START, Look, examiner
from .errors import DecodeError

MPEG_TS = "is an MPEG transport stream, which no library reads reliably (decord hangs); put it into mp4 or mkv first"


@dataclass(frozen=True)
class Scan:
    """Facts of a video stream that its packets give without being decoded. Times are in the stream's own ticks."""

    container: str  # as FFmpeg names it: "matroska,webm"
    video_streams: int
    stream: int  # index of the stream that is read, among all streams of the file
    tick: Fraction  # seconds
    rate: Fraction | None  # frames a second, as far as the file says
    count: int  # frames that can be shown
    times: np.ndarray  # display times of the frames that can be shown, ascending
    keyframes: np.ndarray  # (K, 2): display time and decoding time of the frames that decoding can begin at, ascending
    proven: bool  # their own bytes say so; if not, the container does, and each is checked when it is decoded
    false_keys: bool  # the container calls frames keyframes that decoding cannot begin at
    blank: bool  # some packets hold no picture
    resized: bool  # the size of the pictures changes
    timed: bool  # display times are known; if not, frames are found by decoding from the start
    b_frames: bool  # decoding order may differ from display order
    open_gop: bool  # some frames are stored behind a keyframe and shown before it
    edited: bool  # an edit list hides frames
    repairs: bool  # some keyframes of H.264 need frames before them (intra refresh, open GOP)
    seeks_late: bool  # a seek to a keyframe may land on the next one
    cut_off: str | None  # how the file shows that its end is missing
    droppable: bool  # its packets mark the frames that no other refers to, so that those can be skipped
    one_rgb: bool  # every reader turns its pixels into the same RGB values

    def key_indices(self) -> np.ndarray:
        """Return the indices of the frames that decoding can begin at."""
        return np.flatnonzero(np.isin(self.times, self.keyframes[:, 0]))

    def seconds(self) -> np.ndarray | None:
        """Return the seconds at which each frame is shown, `(count,)` from 0.

        Frames of a file that has no times are spread evenly, at the rate that it says; None: it says none.
        """
        if self.timed:
            return (self.times - self.times[0]) * float(self.tick)
        return np.arange(self.count) / float(self.rate) if self.rate else None


def check_first_bytes(path: str) -> None:
    """Raise DecodeError for an empty file or an MPEG transport stream, on which libraries hang or report nonsense."""
    head = _first_bytes(path, 1024)
    if not head:
        raise DecodeError(f"{path}: is empty (0 bytes)")
    for first, size in ((0, 188), (4, 192), (0, 204)):  # plain, with time codes (.m2ts), with error correction
        if len(head) > first + size and set(head[first::size]) == {0x47}:
            raise DecodeError(f"{path}: {MPEG_TS}")


def is_fragmented(path: str) -> bool:
    """Return whether a file is an mp4 in fragments (DASH, MediaRecorder): its header holds the box mvex."""
    return b"mvex" in _first_bytes(path, 2**16)


def _first_bytes(path: str, count: int) -> bytes:
    source = shards.path_or_bytes(path)
    with open(source, "rb") if isinstance(source, str) else source as file:
        return file.read(count)


def scan_packets(path: str, container: Any, stream: Any) -> Scan:
    """Walk all packets of a stream once.

    With opening this takes 2 to 6 ms; decoding 16 frames of a Kinetics clip takes 75 to 110 ms.

    Args:
        path: path of the record, for messages.
        container: av.container.InputContainer.
        stream: av.video.stream.VideoStream of it.

    Raises:
        DecodeError: the stream is a picture, an MPEG transport stream, or holds no keyframe.
    """
    from av.stream import Disposition

    if container.format.name == "mpegts":
        raise DecodeError(f"{path}: {MPEG_TS}")
    if container.format.name.endswith("_pipe") or stream.disposition & Disposition.attached_pic:
        raise DecodeError(f"{path}: is a picture, not a video (lists of pictures have data.format: image)")
    codec = stream.codec_context
    look = examiner(codec.codec.canonical_name, codec.extradata)
    rows, sizes, end, own_end = [], set(), 0.0, 0
    incomplete = new_setup = False
    ticks = {each.index: float(each.time_base) for each in container.streams if each.time_base}
    of_all = container.format.name in _STATE_THE_LONGEST
    for packet in container.demux() if of_all else container.demux(stream):
        if packet.stream_index != stream.index:
            end = max(end, _end(packet) * ticks[packet.stream_index])
        elif packet.is_corrupt:
            incomplete = True
        elif packet.size:
            seen = look(bytes(packet)) if look else Look(1, START if packet.is_keyframe else NO_START)
            stamps = (_NEVER if packet.pts is None else packet.pts, _NEVER if packet.dts is None else packet.dts)
            rows.append((*stamps, packet.is_keyframe, packet.is_discard, seen.pictures, seen.start, seen.ends))
            own_end = max(own_end, _end(packet))
            if packet.is_keyframe:
                new_setup = new_setup or packet.has_sidedata("new_extradata")
            if seen.size is not None:
                sizes.add(seen.size)
    table = np.array(rows, dtype=np.int64).reshape(-1, 7)
    held, ends = table[:, 4], table[:, 6]
    shown, decoded, claimed, hidden, _, starts, _ = table[held > 0].T
    claimed, hidden = claimed.astype(bool), hidden.astype(bool)
    found = bool(((starts == START) | (starts == RECOVERY)).any())
    proven = found and (look is not None or codec.codec.intra_only)
    is_key = (starts == START) | (claimed & (starts != NO_START)) if proven else claimed
    if not is_key.any():
        raise DecodeError(f"{path}: holds no keyframe to decode from")
    reordered = bool((np.diff(shown) < 0).any())
    # AVI and ASF have no display times, and FFmpeg's guess is wrong where frames are stored out of order (HMDB51).
    no_times = container.format.name in ("avi", "asf") or codec.name == "mpeg4"
    guessed = codec.has_b_frames and not reordered and no_times
    keyframes = np.stack([shown[is_key], decoded[is_key]], axis=1)
    times = np.sort(shown[~hidden])
    times = times[times >= keyframes[0, 0]]  # those before cannot be decoded
    # Packets are in decoding order: one that is shown before the newest keyframe so far makes the GOP an open one.
    newest_keyframe = np.maximum.accumulate(np.where(is_key, shown, _NEVER))
    keyframes = keyframes[np.argsort(keyframes[:, 0], kind="stable")]
    # What comes out is seen only by decoding: a stream that begins in the middle of a GOP, two pictures in a packet, an
    # end of sequence in the middle, pictures of MPEG-4 that are not coded among B-frames; where the size changes,
    # MPEG-1 and -2 withhold a picture, and MJPEG that is begun at a picture of half the height takes it for a field.
    resized = new_setup or len(sizes) > 1
    not_coded = codec.name == "mpeg4" and codec.has_b_frames and (held == 0).any()
    depends = resized and codec.name in ("mpeg1video", "mpeg2video", "mjpeg")
    countable = (
        (not proven or is_key[0])
        and held.max() == 1
        and not ends[: held.nonzero()[0][-1]].any()
        and not not_coded
        and not depends
    )
    shifts = container.format.name == "mpeg"  # a program stream: behind a seek FFmpeg gives packets other times
    timed = bool(countable and not guessed and not shifts and _NEVER not in shown and (np.diff(times) > 0).all())
    repairs = codec.name == "h264" and not (proven and (starts[is_key] == START).all())
    return Scan(
        container=container.format.name,
        video_streams=len(container.streams.video),
        stream=stream.index,
        tick=stream.time_base,
        rate=stream.average_rate or stream.guessed_rate,
        count=len(times),
        times=times,
        keyframes=keyframes,
        proven=proven,
        false_keys=proven and bool((claimed & (starts == NO_START)).any()),
        blank=bool((held == 0).any()),
        resized=resized,
        timed=timed,
        b_frames=bool(codec.has_b_frames),
        open_gop=bool((shown < newest_keyframe).any()),
        edited=bool(hidden.any()),
        repairs=repairs,
        seeks_late=timed and _seeks_late(container, stream, keyframes),
        cut_off=_cut_off(container, stream, times[times > _NEVER], max(end, own_end * ticks[stream.index]), incomplete),
        # HEVC marks frames too, but by layer: those of a higher layer may still refer to them.
        droppable=codec.name == "h264" and timed and not repairs,
        one_rgb=_has_one_rgb(codec.format, codec.height),
    )


_NEVER = np.iinfo(np.int64).min
_ONE_RGB = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "gbrp"}


def _has_one_rgb(pixels: Any, height: int) -> bool:
    """Return whether FFmpeg has a single conversion to RGB for this pixel format.

    For those, all readers agree in every bit, with every colour matrix and range tag. For others FFmpeg interpolates,
    and each library asks for another kind: means differ by 1 to 3 of 255.
    """
    return pixels is not None and pixels.name in _ONE_RGB and (height % 2 == 0 or pixels.chroma_height(2) == 2)


_STATE_THE_LONGEST = ("matroska,webm", "flv")  # their headers say how long the longest of all streams is


def _cut_off(container: Any, stream: Any, times: np.ndarray, end: float, incomplete: bool) -> str | None:
    """Return how a file shows that its end is missing (half of a download), or None.

    Headers say the length a little wrong, and nobody how long the last frame is shown: it counts as missing from half
    a second, a twentieth of the length and two of the longest pauses between frames on.

    Args:
        times: display times of the frames, ascending.
        end: seconds at which the last packet ends; of all streams, where the header speaks of the longest.
        incomplete: a packet is.
    """
    stated = _stated_end(container, stream)
    pause = float(np.diff(times).max(initial=0)) * float(stream.time_base)
    if stated is not None and stated - end > max(0.5, stated / 20, 2 * pause):
        return f"its header says {stated:.1f} seconds, and it ends at {end:.1f}"
    return "its last packet is incomplete" if incomplete else None


def _stated_end(container: Any, stream: Any) -> float | None:
    """Return the seconds at which a file ends, as its header says; None: that says nothing, or FFmpeg guesses it."""
    if container.format.name in _STATE_THE_LONGEST:
        return container.duration / 1e6 if container.duration else None
    if container.format.name == "avi":
        return stream.frames / float(stream.average_rate) if stream.average_rate else None
    if "mp4" in container.format.name and stream.duration:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    return None


def _end(packet: Any) -> int:
    """Return the tick at which a packet ends to be shown; 0: it does not say when it begins."""
    begins = packet.dts if packet.pts is None else packet.pts
    return 0 if begins is None else begins + (packet.duration or 0)


def _seeks_late(container: Any, stream: Any, keyframes: np.ndarray) -> bool:
    """Return whether a seek to a keyframe lands behind it.

    Tried where that can happen: the next keyframe is decoded before this one is shown, and seeks go by decoding time.
    """
    for shown in keyframes[:-1][keyframes[1:, 1] <= keyframes[:-1, 0], 0][:1]:
        container.seek(int(shown), stream=stream)
        landed = next(container.demux(stream)).pts
        return landed is None or bool(landed > shown)
    return False


def is_decodable(packet: Any) -> bool:
    """Return whether a packet is whole and may be decoded.

    An empty packet tells the codec that the video ends; only the last one, which has no time, may.
    """
    return not packet.is_corrupt and (packet.size > 0 or packet.pts is None)
