"""Files inside of tar archives: `folder/shard-000.tar#name.mp4` is the member name.mp4 of that archive.

The layout is webdataset's (tools/pack_videos.py --tar writes it). For file systems that dislike a million small files:
an archive is one file, and a member is one read at a known place. The places of an archive's members are read once in
each process (a Kinetics-sized set of shards: about 50 MB) and again when the archive has changed.
"""

from __future__ import annotations

import io
import os
import tarfile
from functools import cache

_MARK = ".tar#"


class ShardError(OSError):
    """A member that cannot be read; the message says why."""


def split(path: str) -> tuple[str, str] | None:
    """`a/shard.tar#name.mp4` -> (`a/shard.tar`, `name.mp4`); None for a path that points into no archive."""
    shard, mark, member = path.partition(_MARK)
    return (shard + _MARK[:-1], member) if mark else None


def file_of(path: str) -> str:
    """The file that holds a record: the archive, or the path itself."""
    parts = split(path)
    return path if parts is None else parts[0]


def source(path: str) -> str | io.BytesIO:
    """What libraries open: the absolute path (before a colon FFmpeg would see a protocol), or a member's bytes.

    Raises:
        ShardError: the archive has no such member, or ends before it does.
        OSError: the archive cannot be read.
    """
    parts = split(path)
    return os.path.abspath(path) if parts is None else io.BytesIO(read_member(*parts))


def read_member(shard: str, member: str) -> bytes:
    """The bytes of a member; raises as `source` does."""
    with open(shard, "rb") as file:
        status = os.fstat(file.fileno())
        members, whole = _index(shard, status.st_size, status.st_mtime_ns)
        if member not in members:
            cut = "" if whole else "; the archive is damaged or cut off behind them"
            raise ShardError(f"no {member!r} among the {len(members)} files of the archive{cut}")
        start, size = members[member]
        file.seek(start)
        data = file.read(size)
    if len(data) < size:
        raise ShardError(f"the archive ends after {len(data)} of the file's {size} bytes")
    return data


@cache
def _index(shard: str, size: int, changed: int) -> tuple[dict[str, tuple[int, int]], bool]:
    """Where the data of each member begins and how long it is; whether the archive could be read to its end.

    `size` and `changed` are part of the key: another file of this name is another archive.
    """
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                if entry.isreg():
                    members[entry.name] = entry.offset_data, entry.size
                archive.members = []  # else it keeps an object of 1 kB for each
    except tarfile.TarError:
        return members, False
    return members, True
