"""Frames at indices: a record and integers in, uint8 `(T, H, W, 3)` RGB out.

    with open_frames(record, "pyav") as reader:
        frames = reader.read([0, 4, 8, 8])  # any of the len(reader) frames, in any order

Whatever decoder is chosen, PyAV first walks the packets of the file once (nothing is decoded). This scan is the one
authority on which frames a file has, so that all decoders agree:

* the frames are those that FFmpeg shows from first to last, in display order. What an edit list hides, and a packet
  that a truncation cut off, is not counted; frame i is the i-th of the others, however long each is shown;
* of several video streams the one that FFmpeg calls the best (the largest) is read, turned as its rotation tag says;
* a path may point into a tar archive (shards.py): `shard-000.tar#name.mp4`;
* a file that the chosen decoder would read wrong (`misread`) is read by PyAV instead: `reader.decoder` tells;
* every failure is a `DecodeError` that names the file.

torch is not imported here (torchcodec imports it when chosen): a decoding process of isolation.py stays small.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, compress, islice
from typing import Any, get_args

import numpy as np

from video_convmae.data import shards
from video_convmae.data.options import IMAGE_SUFFIXES, ReaderName
from video_convmae.data.records import Record
from video_convmae.errors import UserError

_IN_ORDER_OF_CHOICE = ("torchcodec", "pyav", "decord")
_MODULES = {"torchcodec": "torchcodec.decoders", "pyav": "av", "decord": "decord"}
_MODULES["torchcodec_cuda"] = _MODULES["torchcodec"]
_INSTALL = {
    "torchcodec": "`pip install torchcodec` (the version that matches torch) and FFmpeg's shared libraries",
    "pyav": "`pip install av`",
    "decord": "`pip install decord` (Linux on x86-64)",
    "torchcodec_cuda": "an NVIDIA GPU with NVDEC, torchcodec built for CUDA, and FFmpeg's shared libraries",
}


class DecodeError(UserError, RuntimeError):
    """A record that cannot be decoded. The message names its path and what is wrong."""


def resolve_reader(decoder: str) -> str:
    """The decoder that will be used: for "auto" torchcodec if it works here, else pyav, else decord.

    To find out, "auto" imports torchcodec and with it torch: do it once, and hand the answer to workers.

    Raises:
        ValueError: no decoder has this name.
        ImportError: it is not installed or does not load (torchcodec without FFmpeg); the message says what to install.
    """
    if decoder not in get_args(ReaderName):
        raise ValueError(f"data.reader is {decoder!r}; expected one of {', '.join(get_args(ReaderName))}")
    failures = []
    for name in _IN_ORDER_OF_CHOICE if decoder == "auto" else (decoder,):
        try:
            _load(name)
        except Exception as error:  # a library that does not load raises OSError or RuntimeError
            failures.append(f"{name} needs {_INSTALL[name]}: {_summary(error)}")
            continue
        if not _has_pyav():
            warnings.warn(
                f"PyAV is not installed ({_INSTALL['pyav']}): files that {name} reads wrong are not recognised, and "
                "their frames are wrong (open GOP, B-frames in AVI, edit lists)",
                stacklevel=2,
            )
        return name
    raise ImportError(f"data.reader {decoder!r} does not work here: {'; '.join(failures)}")


def _load(decoder: str) -> None:
    """Import a decoder, whatever that raises. torchcodec 0.16 imports without FFmpeg and fails at the first file."""
    importlib.import_module(_MODULES[decoder])
    if decoder.startswith("torchcodec") and getattr(sys.modules["torchcodec"], "ffmpeg_major_version", 0) is None:
        raise ImportError("it finds no FFmpeg")
    if decoder == "torchcodec_cuda":
        _check_cuda()


def _check_cuda() -> None:
    """Raises where torch sees no GPU. Whether its torchcodec decodes there shows at the first file."""
    import torch

    if not torch.cuda.is_available():
        raise ImportError("torch finds no CUDA device")


class DecodeTimeout(DecodeError):
    """A record whose reader did not return in time. Its process was killed."""


class FrameReader(ABC):
    """The frames of one open record; a context manager.

    Attributes:
        path: of the record.
        decoder: what decodes: "torchcodec", "pyav", "decord", or "pillow" for images. Not always the one asked for.
    """

    path: str
    name: str

    @abstractmethod
    def __len__(self) -> int:
        """How many frames can be read: those the file holds, whatever its header says."""

    @abstractmethod
    def _read_ascending(self, indices: np.ndarray) -> np.ndarray:
        """The frames at ascending indices without repeats, uint8 (T, H, W, 3)."""

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The frames at `indices`, in that order, repeats allowed: uint8 (T, H, W, 3), RGB.

        Raises:
            DecodeError: an index is not in [0, len(self)), or the part of the file that is needed is damaged.
        """
        with _one_error(self.path):
            wanted, places = np.unique(np.asarray(indices, dtype=np.int64).reshape(-1), return_inverse=True)
            if not len(wanted):
                raise DecodeError(f"{self.path}: no frames were asked for")
            if wanted[0] < 0 or wanted[-1] >= len(self):
                bad = wanted[0] if wanted[0] < 0 else wanted[-1]
                raise DecodeError(f"{self.path}: frame {bad} was asked for; there are {len(self)}, counted from 0")
            frames = self._read_ascending(wanted)
            return frames if np.array_equal(places, np.arange(len(wanted))) else frames[places]

    def close(self) -> None:
        """Release the file. Reading afterwards is an error."""
        return  # pictures are not kept open

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_frames(record: Record, decoder: str = "auto") -> FrameReader:
    """Open a record (video, folder of frames or image, as its `format` says) for reading frames by index.

    Args:
        record: what to open.
        decoder: a name that `resolve` takes; for videos only.

    Raises:
        DecodeError: the record cannot be read.
        ValueError, ImportError: of `resolve`; no record is to blame.
    """
    if record.format == "video":
        decoder = resolve_reader(decoder)
    with _one_error(record.path):
        if record.format == "frames":
            return _FolderReader(record.path, record.num_frames)
        if record.format == "image":
            return _ImageReader(record.path)
        _check_first_bytes(record.path)
        return _open_video(record.path, decoder)


def read_record(record: Record, indices: Sequence[int] | np.ndarray, decoder: str = "auto") -> np.ndarray:
    """Open, read, close: the frames of `record` at `indices`, uint8 (T, H, W, 3). Raises DecodeError."""
    with open_frames(record, decoder) as reader:
        return reader.read(indices)


# ---- video ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """What the packets of a video stream tell without being decoded. Times are in the stream's own ticks."""

    container: str  # as FFmpeg names it: "matroska,webm"
    video_streams: int
    stream: int  # which of all streams of the file is read
    tick: Fraction  # seconds
    rate: Fraction | None  # frames a second, as far as the file says
    times: np.ndarray  # when each frame that can be shown is shown, ascending
    keyframes: np.ndarray  # (K, 2): display time and decoding time of the keyframes, ascending
    timed: bool  # the file says when each frame is shown; if not, frames are found by decoding from the start
    b_frames: bool  # the codec stores frames in another order than they are shown in
    open_gop: bool  # frames follow a keyframe in the file that are shown before it
    edited: bool  # an edit list hides frames
    repairs: bool  # some keyframes of H.264 need frames before them (intra refresh, open GOP)
    seeks_late: bool  # a seek to a keyframe may land on the next one
    cut_off: bool  # a packet is incomplete
    droppable: bool  # its packets tell which frames no other refers to, so that those can be left undecoded
    one_rgb: bool  # every decoder turns its pixels into the same RGB values


def misread(decoder: str, scan: Scan) -> str | None:
    """Why `decoder` would return wrong frames of such a file, or None. Measured: data_lists/README.md."""
    if decoder == "pyav":
        return None
    if not scan.timed:
        return "the file does not say when its frames are shown"
    if scan.cut_off:
        return "the file is cut off within a frame"
    if scan.seeks_late:
        return "seeks land behind the keyframe (fragmented mp4 with B-frames)"
    if scan.repairs:
        return "H.264 keyframes that need the frames before them (intra refresh, open GOP)"
    if not scan.one_rgb:
        return "10 bits, or an odd height: its colours differ from the other decoders'"
    if decoder.startswith("torchcodec") and scan.container == "avi" and scan.b_frames:
        return "B-frames in AVI: it is off by 1 or 2 frames"
    if decoder == "decord":
        return _misread_by_decord(scan)
    return None


def _misread_by_decord(scan: Scan) -> str | None:
    if scan.container not in ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"):
        return "a container in which it seeks wrong (WMV), or was not tried"
    if scan.video_streams > 1:
        return "several video streams: it may choose another one"
    if scan.open_gop:
        return "open GOP: it is off by 2 or 3 frames"
    if scan.edited:
        return "it ignores edit lists"
    return None


def _open_video(path: str, decoder: str) -> FrameReader:
    """PyAV's reader, whose opening is the scan; the decoder's own in its place if it will read this file right."""
    if not _has_pyav():
        return _READERS[decoder](path, None)
    ours = _PyAVReader(path)
    if decoder == "pyav" or misread(decoder, ours.scan):
        return ours
    try:
        theirs = _READERS[decoder](path, ours.scan)
    except Exception:  # it cannot decode this (decord: AV1); PyAV says more clearly what is wrong, if something is
        return ours
    if len(theirs) != len(ours):
        theirs.close()
        return ours
    ours.close()
    return theirs


class _PyAVReader(FrameReader):
    """Seeks once for each group of pictures that is needed, to its keyframe, and decodes to the last frame needed.

    One thread, of type NONE: a parent that decoded with others and left a file open deadlocks its forked workers.
    """

    name = "pyav"

    def __init__(self, path: str) -> None:
        self.path = path
        self._open()
        try:
            self.scan = _scan(path, self._container, self._stream)
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
        """Every frame in display order as PyAV decodes it, neither converted nor turned. Raises DecodeError."""
        place = -1
        with _one_error(self.path):
            for place, frame in enumerate(self._frames_at(np.arange(len(self)))):
                if frame.is_corrupt:
                    raise DecodeError(f"{self.path}: frame {place} is damaged")
                yield frame
            if place + 1 < len(self):
                raise DecodeError(f"{self.path}: {len(self) - place - 1} of {len(self)} frames do not decode")

    def _open(self) -> None:
        import av

        # Tags that are not UTF-8 are no fault.
        self._container = av.open(shards.source(self.path), metadata_errors="ignore")
        self._stream = self._container.streams.best("video")
        if self._stream is None:
            self._container.close()
            raise DecodeError(f"{self.path}: holds no video stream")
        self._stream.thread_type = "NONE"
        self._stream.codec_context.thread_count = 1

    def _read_ascending(self, indices: np.ndarray) -> np.ndarray:
        to_rgb = _rgb_converter()
        clip = None
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
        if place + 1 < len(indices):
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
        """The frames shown at `times` (ascending), which the file says can be decoded from keyframe `group` on.

        If they cannot, from the first one on (H.264 with intra refresh: its keyframes only begin a repair).
        """
        attempts = [(group, None), (0, None)]
        if self.scan.droppable:
            attempts.insert(0, (group, set(times)))
        for start, only in attempts:
            for frame in self._frames_from(start, only):
                if only and (frame.interlaced_frame or frame.pts > times[0]):
                    break  # fields may be referred to apart; a frame was lost: the codec had to guess their order
                if frame.pts == times[0]:
                    yield frame
                    times = times[1:]
                    if not times:
                        return

    def _frames_from(self, keyframe: int, only: set[int] | None = None) -> Iterator[Any]:
        """Frames from a keyframe on; of those that no frame refers to just the ones shown at the times of `only`.

        With 3 B-frames that leaves 60% of a clip's frames to decode: 1.2 to 1.4 times as fast, the same bits.
        """
        codec = self._stream.codec_context
        for packet in self._packets_from(*self.scan.keyframes[keyframe].tolist()):
            drop = only is not None and packet.pts is not None and packet.pts not in only
            codec.skip_frame = "NONREF" if drop else "DEFAULT"
            yield from packet.decode()

    def _packets_from(self, shown: int, decoded: int) -> Iterator[Any]:
        """Packets from the keyframe with these times on (or from an earlier one, where the file's index says so)."""
        for position in (shown, decoded):  # some containers seek by the one, some by the other
            self._container.seek(position, stream=self._stream)
            packets = self._container.demux(self._stream)
            first = next(packets)
            if first.pts is not None and first.pts <= shown:
                return (packet for packet in chain([first], packets) if _is_decodable(packet))
        raise DecodeError(f"{self.path}: cannot seek to the keyframe at {shown} x {self._stream.time_base} s")

    def _frames_from_the_start(self) -> Iterator[Any]:
        self._container.close()
        self._open()
        for packet in self._container.demux(self._stream):
            if _is_decodable(packet):
                yield from packet.decode()


def _scan(path: str, container: Any, stream: Any) -> Scan:
    """Walk all packets of the stream once. With opening 2 to 6 ms; 16 frames of a Kinetics clip take 75 to 110 ms."""
    from av.stream import Disposition

    if container.format.name == "mpegts":
        raise DecodeError(f"{path}: {_MPEG_TS}")
    if container.format.name.endswith("_pipe") or stream.disposition & Disposition.attached_pic:
        raise DecodeError(f"{path}: is a picture, not a video (lists of pictures have data.format: image)")
    codec = stream.codec_context
    rows = []
    cut_off = repairs = False
    for packet in container.demux(stream):
        if packet.is_corrupt:
            cut_off = True
        elif packet.size and not (codec.name == "vp8" and _is_hidden_vp8(packet)):
            rows.append((packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
            if codec.name == "h264" and packet.is_keyframe and not _begins_afresh(packet, codec.extradata):
                repairs = True
    table = np.array([[_NEVER if value is None else value for value in row] for row in rows], dtype=np.int64)
    shown, decoded, is_key, hidden = table.reshape(-1, 4).T
    is_key, hidden = is_key.astype(bool), hidden.astype(bool)
    if not is_key.any():
        raise DecodeError(f"{path}: holds no keyframe to decode from")
    reordered = bool((np.diff(shown) < 0).any())
    # AVI has no display times, and FFmpeg's guess is wrong where frames are stored out of order (HMDB51).
    guessed = codec.has_b_frames and not reordered and ("avi" in container.format.name or codec.name == "mpeg4")
    keyframes = np.stack([shown[is_key], decoded[is_key]], axis=1)
    times = np.sort(shown[~hidden])
    times = times[times >= keyframes[0, 0]]  # no keyframe for those before
    newest_keyframe = np.maximum.accumulate(np.where(is_key, shown, _NEVER))
    keyframes = keyframes[np.argsort(keyframes[:, 0], kind="stable")]
    timed = not guessed and _NEVER not in shown and len(np.unique(times)) == len(times)
    return Scan(
        container=container.format.name,
        video_streams=len(container.streams.video),
        stream=stream.index,
        tick=stream.time_base,
        rate=stream.average_rate or stream.guessed_rate,
        times=times,
        keyframes=keyframes,
        timed=timed,
        b_frames=bool(codec.has_b_frames),
        open_gop=bool((shown < newest_keyframe).any()),
        edited=bool(hidden.any()),
        repairs=repairs,
        seeks_late=timed and _seeks_late(container, stream, keyframes),
        cut_off=cut_off,
        # HEVC says it too, but of a layer of frames: those of a higher layer may refer to them.
        droppable=codec.name == "h264" and timed and not repairs,
        one_rgb=_has_one_rgb(codec.format, codec.height),
    )


_NEVER = np.iinfo(np.int64).min
_ONE_RGB = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "gbrp"}


def _has_one_rgb(pixels: Any, height: int) -> bool:
    """For these FFmpeg has one conversion to RGB (bit-equal in all decoders, with every colour matrix and range tag);
    for others it interpolates, and each decoder asks for another kind: means differ by 1 to 3 of 255."""
    return pixels is not None and pixels.name in _ONE_RGB and (height % 2 == 0 or pixels.chroma_height(2) == 2)


def _seeks_late(container: Any, stream: Any, keyframes: np.ndarray) -> bool:
    """Tried where it can happen: the next keyframe is decoded before this one is shown, and seeks go by that time."""
    for shown in keyframes[:-1][keyframes[1:, 1] <= keyframes[:-1, 0], 0][:1]:
        container.seek(int(shown), stream=stream)
        landed = next(container.demux(stream)).pts
        return landed is None or landed > shown
    return False


def _begins_afresh(packet: Any, setup: bytes | None) -> bool:
    """Whether an H.264 packet holds an IDR slice (unit type 5), behind which nothing before it is needed.

    `setup` is the codec's extradata: if it begins with 1, units are preceded by their size, else by the bytes 0 0 1.
    """
    data = bytes(packet)
    if not setup or setup[0] != 1:
        return any(unit[:1] and unit[0] & 31 == 5 for unit in data.split(b"\0\0\1")[1:])
    digits = (setup[4] & 3) + 1
    place = 0
    while place + digits < len(data):
        if data[place + digits] & 31 == 5:
            return True
        place += digits + int.from_bytes(data[place : place + digits], "big")
    return False


def _is_hidden_vp8(packet: Any) -> bool:
    """A frame that is only there for others to refer to. (VP9 and AV1 put these into one packet with a shown frame.)"""
    return not memoryview(packet)[0] & 0b10000


def _is_decodable(packet: Any) -> bool:
    """Whole, and not empty: to the decoder an empty packet means the end of the video, which only the last one does."""
    return not packet.is_corrupt and (packet.size > 0 or packet.pts is None)


def _rgb_converter() -> Any:
    """A function from a PyAV frame to uint8 (H, W, 3), turned upright. Keeps its tables from one frame to the next."""
    import av
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()
    # Since 17.0 PyAV converts with a thread for every core unless told otherwise; cores belong to the workers.
    options = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}

    def convert(frame: Any) -> np.ndarray:
        if frame.interlaced_frame:  # PyAV since 17.0 reads its colours by fields; ffmpeg and the other decoders do not
            fields, frame = frame, av.VideoFrame.from_ndarray(frame.to_ndarray(), format=frame.format.name)
            frame.colorspace, frame.color_range = fields.colorspace, fields.color_range
            turn = fields.rotation
        else:
            turn = frame.rotation
        image = reformatter.reformat(frame, format="rgb24", **options).to_ndarray()
        return np.rot90(image, turn // 90 % 4)

    return convert


class _OtherReader(FrameReader):
    """Another library's reader. From its first failure on PyAV reads the file instead, or says what is wrong with it.

    decord fails on some good files (a rotated picture whose rows are not a multiple of 64 bytes); after a failure in a
    damaged part, torchcodec would read on behind it and return damaged frames.
    """

    def __init__(self, path: str, video: Any) -> None:
        self.path = path
        self._video = video
        self._instead: _PyAVReader | None = None

    def __len__(self) -> int:
        return len(self._video if self._instead is None else self._instead)

    @abstractmethod
    def _decode(self, indices: list[int]) -> np.ndarray:
        """The frames at ascending indices without repeats, by the library."""

    def _read_ascending(self, indices: np.ndarray) -> np.ndarray:
        if self._instead is None:
            try:
                return self._decode(indices.tolist())
            except Exception:
                if not _has_pyav():
                    raise
                self._instead = _PyAVReader(self.path)
                self.name = self._instead.name
        return self._instead._read_ascending(indices)

    def close(self) -> None:
        self._video = None
        if self._instead is not None:
            self._instead.close()


class _DecordReader(_OtherReader):
    """One thread: with more, decord fails on every Something-Something webm (decord issue 246)."""

    name = "decord"

    def __init__(self, path: str, scan: Scan | None) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        super().__init__(path, decord.VideoReader(shards.source(path), ctx=decord.cpu(0), num_threads=1))

    def _decode(self, indices: list[int]) -> np.ndarray:
        return self._video.get_batch(indices).asnumpy()


class _TorchcodecReader(_OtherReader):
    """Seek mode "exact": "approximate" returns wrong frames where the frame rate varies, and is no faster."""

    name = "torchcodec"

    def __init__(self, path: str, scan: Scan | None, **options: str) -> None:
        from torchcodec.decoders import VideoDecoder

        stream = None if scan is None else scan.stream
        options |= {"dimension_order": "NHWC", "num_ffmpeg_threads": 1, "seek_mode": "exact"}
        super().__init__(path, VideoDecoder(shards.source(path), stream_index=stream, **options))

    def _decode(self, indices: list[int]) -> np.ndarray:
        return self._video.get_frames_at(indices).data.cpu().numpy()


class _CudaReader(_TorchcodecReader):
    """torchcodec on the GPU that belongs to this rank; PyAV reads what that cannot decode.

    The frames come back to the CPU, as all decoders' do: what is spared is the CPU's decoding. Each decoding process
    holds a CUDA context (some 500 MB of the GPU's memory). Not tried on a GPU yet.
    """

    name = "torchcodec_cuda"

    def __init__(self, path: str, scan: Scan | None) -> None:
        super().__init__(path, scan, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}")


_READERS = {"torchcodec": _TorchcodecReader, "decord": _DecordReader, "torchcodec_cuda": _CudaReader}

_MPEG_TS = "is an MPEG transport stream, which no decoder reads reliably (decord hangs); put it into mp4 or mkv first"


def _check_first_bytes(path: str) -> None:
    """Refuse what needs no decoder to be refused, and in plain words."""
    source = shards.source(path)
    with source if shards.split(path) else open(source, "rb") as file:
        head = file.read(1024)
    if not head:
        raise DecodeError(f"{path}: is empty (0 bytes)")
    for first, size in ((0, 188), (4, 192), (0, 204)):  # plain, with time codes (.m2ts), with error correction
        if len(head) > first + size and set(head[first::size]) == {0x47}:
            raise DecodeError(f"{path}: {_MPEG_TS}")


# ---- pictures -------------------------------------------------------------------------------------------------------


class _FolderReader(FrameReader):
    """A folder with a picture for every frame, in the natural order of their names (frame9 before frame10)."""

    name = "pillow"

    def __init__(self, path: str, num_frames: int | None) -> None:
        self.path = path
        names = [name for name in os.listdir(path) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
        if not names:
            raise DecodeError(f"{path}: holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
        if num_frames is not None and len(names) < num_frames:
            raise DecodeError(f"{path}: holds {len(names)} pictures; the list says {num_frames}")
        self._names = sorted(names, key=_natural)[:num_frames]

    def __len__(self) -> int:
        return len(self._names)

    def _read_ascending(self, indices: np.ndarray) -> np.ndarray:
        images = [_read_image(os.path.join(self.path, self._names[index])) for index in indices]
        for index, image in zip(indices, images, strict=True):
            if image.shape != images[0].shape:
                sizes = f"{image.shape[1]}x{image.shape[0]}, not {images[0].shape[1]}x{images[0].shape[0]}"
                raise DecodeError(f"{self.path}: {self._names[index]} is {sizes} like {self._names[indices[0]]}")
        return np.stack(images)


class _ImageReader(FrameReader):
    """A picture: a video of one frame."""

    name = "pillow"

    def __init__(self, path: str) -> None:
        self.path = path
        self._image = _read_image(path)

    def __len__(self) -> int:
        return 1

    def _read_ascending(self, indices: np.ndarray) -> np.ndarray:
        return self._image[None]


def _read_image(path: str) -> np.ndarray:
    """A picture, upright as its EXIF orientation says: uint8 (H, W, 3)."""
    from PIL import Image, ImageOps

    with _one_error(path), Image.open(shards.source(path)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key in which numbers count as numbers; of equal numbers the one with fewer zeros comes first."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


# ---- errors ---------------------------------------------------------------------------------------------------------


@contextmanager
def _one_error(path: str) -> Iterator[None]:
    """Turn whatever a library raises (MemoryError of damaged sizes included) into a DecodeError that names the path."""
    try:
        yield
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(f"{path}: {_summary(error)}") from error


def _summary(error: BaseException) -> str:
    """An error in one line: its kind and the first line of what it says."""
    text = (getattr(error, "strerror", None) or str(error)).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def _has_pyav() -> bool:
    try:
        importlib.import_module("av")
    except Exception:
        return False
    return True
