"""Files in tar archives: `folder/shard-000.tar#name.mp4` is the member name.mp4 of that archive.

The layout is webdataset's (`pack-videos --tar` writes it). For file systems that are slow with a million small files:
an archive is one file, and a member is one read at a known offset. The offsets of an archive's members are read once in
each process (about 50 MB for the shards of Kinetics-400) and again when the archive has changed.
"""

from __future__ import annotations

import io
import os
import tarfile
from functools import cache

_MARK = ".tar#"


class ShardError(OSError):
    """Member of an archive that cannot be read; the message says why."""


def split_path(path: str) -> tuple[str, str] | None:
    """Split `a/shard.tar#name.mp4` into (`a/shard.tar`, `name.mp4`); None for the path of a plain file."""
    shard, mark, member = path.partition(_MARK)
    return (shard + _MARK[:-1], member) if mark else None


def file_of(path: str) -> str:
    """Return the file that holds a record: the archive, or the path itself."""
    parts = split_path(path)
    return path if parts is None else parts[0]


def path_or_bytes(path: str) -> str | io.BytesIO:
    """Return an argument that libraries can open: an absolute path, or a member's bytes.

    Absolute because FFmpeg takes the text before a colon in a relative path for a protocol.

    Raises:
        ShardError: the archive has no such member, or ends before it does.
        OSError: the archive cannot be read.
    """
    parts = split_path(path)
    return os.path.abspath(path) if parts is None else io.BytesIO(read_member(*parts))


def read_member(shard: str, member: str) -> bytes:
    """Return the bytes of a member; raises as `path_or_bytes` does."""
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
    """Return the offset and size of each member's data, and whether the archive could be read to its end.

    `size` and `changed` (modification time, ns) are only keys of the cache: a file that was replaced is read again.
    """
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                if entry.isreg():
                    members[entry.name] = entry.offset_data, entry.size
                archive.members = []  # type: ignore[attr-defined]  # private; it would keep 1 kB for each member
    except tarfile.TarError:
        return members, False
    return members, True
