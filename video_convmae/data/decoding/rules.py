"""Choice of the reader: by name, and for each file.

PyAV scans every video first (scan.py). A file that the reader asked for would read wrong (`misread`) is read by PyAV
instead; `FrameReader.name` says so.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from video_convmae.data.options import IMAGE_SUFFIXES, ReaderName
from video_convmae.data.records import Record
from video_convmae.errors import Note, UserError

from .decord_reader import DecordReader
from .errors import DecodeError, decode_errors, error_line
from .fallback import has_pyav
from .orientation import orientation
from .pictures import FolderReader, ImageReader, split_pattern
from .pyav_reader import PyAVReader
from .reader import FrameReader, smaller_size
from .scan import Scan, check_first_bytes, is_fragmented
from .torchcodec_reader import TorchcodecCudaReader, TorchcodecReader

LONG = 15_000  # frames, ten minutes at 25 a second: the other libraries read all packets at each opening

_IN_ORDER_OF_CHOICE: tuple[ReaderName, ...] = ("torchcodec", "pyav", "decord")
_MODULES = {"torchcodec": "torchcodec.decoders", "pyav": "av", "decord": "decord"}
_MODULES["torchcodec_cuda"] = _MODULES["torchcodec"]
_READERS: dict[str, Callable[[str, Scan | None], FrameReader]] = {
    "torchcodec": TorchcodecReader,
    "decord": DecordReader,
    "torchcodec_cuda": TorchcodecCudaReader,
}
_INSTALL = {
    "torchcodec": "`pip install torchcodec` (the version that matches torch) and FFmpeg's shared libraries",
    "pyav": "`pip install av`",
    "decord": "`pip install decord` (Linux on x86-64)",
    "torchcodec_cuda": "an NVIDIA GPU with NVDEC, torchcodec built for CUDA, and FFmpeg's shared libraries",
}


class ReaderMissing(UserError, ImportError):
    """A reader that is not installed or does not load."""


def resolve_reader(reader: ReaderName) -> ReaderName:
    """Return the name of the reader to use: for "auto" torchcodec if it works here, else pyav, else decord.

    "auto" imports torchcodec and with it torch: call this once, and pass the result to workers.

    Raises:
        ValueError: no reader has this name.
        ReaderMissing: it is not installed or does not load (torchcodec without FFmpeg); the message says what to
            install.
    """
    if reader not in get_args(ReaderName):
        raise ValueError(f"data.reader is {reader!r}; expected one of {', '.join(get_args(ReaderName))}")
    failures = []
    for name in _IN_ORDER_OF_CHOICE if reader == "auto" else (reader,):
        try:
            _import_library(name)
        except Exception as error:  # a library that does not load raises OSError or RuntimeError
            failures.append(f"{name} needs {_INSTALL[name]}: {error_line(error)}")
            continue
        if not has_pyav():
            warnings.warn(
                f"PyAV is not installed ({_INSTALL['pyav']}): files that {name} reads wrong are not recognised, and "
                "their frames are wrong (open GOP, B-frames in AVI, edit lists)",
                Note,
                stacklevel=2,
            )
        return name
    hint = "" if reader == "auto" else ", or take data.reader auto"
    raise ReaderMissing(f"data.reader {reader!r} does not work here: {'; '.join(failures)}: install that{hint}")


def _import_library(reader: str) -> None:
    """Import the library of a reader. Raises ImportError, or any other exception of the library."""
    importlib.import_module(_MODULES[reader])
    # torchcodec 0.16 imports without FFmpeg and fails at the first file.
    if reader.startswith("torchcodec") and getattr(sys.modules["torchcodec"], "ffmpeg_major_version", 0) is None:
        raise ImportError("it finds no FFmpeg")
    if reader == "torchcodec_cuda":
        import torch

        if not torch.cuda.is_available():  # a torchcodec that was built without NVDEC fails at the first file
            raise ImportError("torch finds no CUDA device")


def open_frames(record: Record, reader: ReaderName = "auto", max_side: int | None = None) -> FrameReader:
    """Open a record (video, folder of frames or image, as its `format` says) for reading frames by index.

    Args:
        record: the record.
        reader: a name that `resolve_reader` takes; for videos only.
        max_side: pictures with a longer side are divided by a whole number until they have none: 8K to 4K by 4096. It
            bounds the memory of a clip. None: no bound.

    Raises:
        DecodeError: the record cannot be read.
        ValueError, ImportError: the reader is unknown or does not work here; no record is to blame.
    """
    if record.format == "video":
        reader = resolve_reader(reader)
    with decode_errors(record.path):
        if record.format == "frames":
            return FolderReader(record.path, record.num_frames, max_side)
        if record.format == "image":
            return ImageReader(record.path, max_side)
        check_first_bytes(record.path)
        return _open_video(record.path, reader, max_side)


def read_frames(
    path: str | Path, indices: Sequence[int] | np.ndarray | None = None, *, reader: ReaderName = "auto"
) -> np.ndarray:
    """Return frames of a video file, a folder of pictures or a picture as ffmpeg shows them: uint8 RGB `(T, H, W, 3)`.

    Args:
        path: the file or folder; `folder/img_*.jpg` reads one of several series of pictures, `a.tar#b.mp4` a member
            of an archive.
        indices: of the frames, in any order, repeats allowed, counted from 0; None: every frame.
        reader: "auto", "pyav", "torchcodec" or "decord", for videos. All return the same frames.

    Raises:
        DecodeError: the file cannot be read, or has no frame of such an index; the message names it.
        ValueError, ImportError: the reader is unknown or does not work here.
    """
    with open_frames(record_at(path), reader) as opened:
        return opened.read(np.arange(len(opened)) if indices is None else indices)


def count_frames(path: str | Path) -> int:
    """Return the number of frames that `read_frames` returns of a file or folder. Raises DecodeError."""
    with open_frames(record_at(path), "pyav" if has_pyav() else "auto") as opened:
        return len(opened)


def record_at(path: str | Path) -> Record:
    """Return the record of a path that is in no list: a folder, or one series in it (`folder/img_*`), a picture or a
    video, by its name."""
    path = os.path.expanduser(path)
    folder, pattern = split_pattern(path)
    if pattern is not None or os.path.isdir(folder):
        return Record(path, format="frames")
    return Record(path, format="image" if path.lower().endswith(IMAGE_SUFFIXES) else "video")


def read_record(record: Record, indices: Sequence[int] | np.ndarray, reader: ReaderName = "auto") -> np.ndarray:
    """Open a record, read its frames at `indices` and close it: uint8 `(T, H, W, 3)`. Raises as `open_frames`."""
    with open_frames(record, reader) as opened:
        return opened.read(indices)


def _open_video(path: str, reader: str, max_side: int | None) -> FrameReader:
    """Open with PyAV, which scans the file; then with the reader asked for, if it will read this file right."""
    if not has_pyav():
        return _refuse_large(_READERS[reader](path, None), max_side)
    pyav = PyAVReader(path, max_side)
    if reader == "pyav" or misread(reader, pyav.scan):
        return pyav
    if pyav.is_too_large():
        pyav.note = f"pictures above data.max_side ({max_side}) are divided; PyAV reads them in place of {reader}"
        return pyav
    try:
        if is_fragmented(path) or misshown(pyav.first_picture()):  # in fragments (DASH, MediaRecorder) they seek wrong
            return pyav
        other = _READERS[reader](path, pyav.scan)
    except Exception:  # it cannot decode this (decord: AV1), or the file is damaged: PyAV's message is clearer
        return pyav
    if len(other) != len(pyav):
        other.close()
        return pyav
    pyav.close()
    other.times, other.rate = pyav.times, pyav.rate
    return other


def _refuse_large(opened: FrameReader, max_side: int | None) -> FrameReader:
    """Return a reader that divides no pictures, if the first is within `max_side`."""
    height, width = opened.read([0]).shape[1:3]
    if smaller_size((width, height), max_side) != (width, height):
        opened.close()
        raise DecodeError(
            f"{opened.path}: pictures of {width}x{height} are above data.max_side ({max_side}), and {opened.name} "
            "divides none; expected PyAV: pip install av"
        )
    return opened


def misread(reader: str, scan: Scan) -> str | None:
    """Return the reason for which a reader would return wrong frames of a file, or None.

    Measured on files of every kind: data_lists/README.md.
    """
    if reader == "pyav":
        return None
    if not scan.timed:
        return "the file does not say when its frames are shown"
    if scan.count > LONG:
        return "a long file: it would walk all packets at each opening"
    if not scan.proven:
        return "a codec whose keyframes only decoding can tell"
    if scan.false_keys:
        return "frames that are called keyframes and are none"
    if scan.blank:
        return "packets without a picture"
    if scan.resized:
        return "the size of the picture changes"
    if scan.cut_off:
        return "the file is cut off"
    if scan.seeks_late:
        return "seeks land behind the keyframe (fragmented mp4 with B-frames)"
    if scan.repairs:
        return "H.264 keyframes that need the frames before them (intra refresh, open GOP)"
    if not scan.one_rgb:
        return "10 bits, or an odd height: its colours differ from the other readers'"
    if reader.startswith("torchcodec") and scan.container == "avi" and scan.b_frames:
        return "B-frames in AVI: it is off by 1 or 2 frames"
    if reader == "decord":
        return _misread_by_decord(scan)
    return None


def misshown(first_picture: Any) -> str | None:
    """Return the reason for which the other readers would show a file's pictures (av.VideoFrame) wrong, or None."""
    if (shown := orientation(first_picture)).mirrored or not shown.exact:
        return "mirrored, or turned by no exact quarter"
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
