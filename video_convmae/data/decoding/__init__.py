"""Frames at indices: a record and integers in, uint8 `(T, H, W, 3)` RGB out.

    with open_frames(record, "pyav") as reader:
        frames = reader.read([0, 4, 8, 8])  # any of the len(reader) frames, in any order

    scan.py         the frames that a file holds, found without decoding: all readers agree on them
    bitstream.py    what the bytes of a packet say, whatever its container claims
    kept.py         scans of long files, kept between openings
    rules.py        the choice of the reader; files that a reader would read wrong are read by PyAV instead
    *_reader.py     one library each; fallback.py: PyAV in place of a library that fails; pictures.py: images
    orientation.py  the display matrix: mirrors and turns
    process.py      reading in a process that can be killed: the way that training reads

Of several video streams the one that FFmpeg calls the best (the largest) is read, shown as its display matrix says. A
path may point into a tar archive (shards.py): `shard-000.tar#name.mp4`. Every failure is a `DecodeError` that names the
file. Only torchcodec imports torch, and only when it is chosen: a reader process stays small.
"""

from .errors import DecodeError, DecodeTimeout
from .reader import FrameReader
from .rules import count_frames, open_frames, read_frames, read_record, record_at, resolve_reader

__all__ = [
    "DecodeError",
    "DecodeTimeout",
    "FrameReader",
    "count_frames",
    "open_frames",
    "read_frames",
    "read_record",
    "record_at",
    "resolve_reader",
]
