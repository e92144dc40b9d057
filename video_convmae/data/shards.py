"""Files in tar archives: `folder/shard-000.tar#name.mp4` is the member name.mp4 of that archive.

The layout is webdataset's (`pack-videos --tar` writes it). For file systems that are slow with a million small files:
an archive is one file, and a member is one read at a known offset. The offsets of an archive's members are read once in
each process (about 50 MB for the shards of Kinetics-400) and again when the archive has changed.

Of an archive by URL (remote.py) a member is one read of a part of it, and a file of its own among the copies; its index
is read once, and kept there too. So an epoch in random order downloads no more than the videos that it shows.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import re
import tarfile
from functools import cache
from typing import Any, BinaryIO, NamedTuple

from . import remote

_MARK = ".tar#"
_OTHER_MARK = re.compile(r"(\.tar\.\w+|\.tgz|\.tbz2?|\.txz|\.zip|\.7z|\.rar)#", re.IGNORECASE)


class ShardError(OSError):
    """Member of an archive that cannot be read; the message says why."""


def split_path(path: str) -> tuple[str, str] | None:
    """Split `a/shard.tar#name.mp4` into (`a/shard.tar`, `name.mp4`); None for the path of a plain file."""
    shard, mark, member = path.partition(_MARK)
    return (shard + _MARK[:-1], member) if mark else None


def file_of(path: str) -> str:
    """Return the file that holds a record: the archive, or the path itself; of a URL its copy, if there is one."""
    if remote.is_url(path):
        return remote.place(path)
    parts = split_path(path)
    return path if parts is None else parts[0]


def holds(shard: str, member: str) -> bool:
    """Return whether an archive can be read and has a member of this name."""
    try:
        if remote.is_url(shard):
            _remote_place(shard, member)
        else:
            with open(shard, "rb") as file:
                _find(file, member)
    except OSError:
        return False
    return True


def members(shard: str) -> list[str]:
    """Return the names of the files of an archive, in its order.

    Raises:
        ShardError: the file is an archive of another kind, or damaged.
        OSError: it cannot be read.
    """
    if remote.is_url(shard):
        index = _remote_index(shard)
    else:
        status = os.stat(shard)
        index = _index(shard, status.st_size, status.st_mtime_ns)
    if not index.whole:
        raise ShardError(f"the archive is damaged or cut off behind its {len(index.files)} files")
    return list(index.files)


def path_or_bytes(path: str) -> str | io.BytesIO:
    """Return an argument that libraries can open: an absolute path, that of a URL's copy, or a member's bytes.

    Absolute because FFmpeg takes the text before a colon in a relative path for a protocol.

    Raises:
        ShardError: the archive has no such member, or ends before it does.
        OSError: the archive cannot be read.
    """
    parts = split_path(path)
    if remote.is_url(path):
        return remote.local_copy(path) if parts is None else _remote_copy(*parts)
    if parts is not None:
        return io.BytesIO(read_member(*parts))
    if (other := _OTHER_MARK.search(path)) and not os.path.exists(path):
        raise ShardError(f"no such file, and members are read from tar archives without compression, not {other[1]}")
    return os.path.abspath(path)


def read_member(shard: str, member: str) -> bytes:
    """Return the bytes of a member; raises as `path_or_bytes` does."""
    if remote.is_url(shard):
        with open(_remote_copy(shard, member), "rb") as file:
            return file.read()
    with open(shard, "rb") as file:
        start, size, sparse = _find(file, member)
        if sparse is not None:
            return _fill(file, start, size, sparse)
        file.seek(start)
        data = file.read(size)
    if len(data) < size:
        raise ShardError(f"the archive ends after {len(data)} of the file's {size} bytes")
    return data


class _Index(NamedTuple):
    """Members of an archive by name.

    Attributes:
        files: start of the data, and size of the file.
        links: the name that a link leads to.
        sparse: of files with holes, the (offset, size) of each part that is stored; the parts follow each other.
        whole: the archive could be read to its end.
    """

    files: dict[str, tuple[int, int]]
    links: dict[str, str]
    sparse: dict[str, list[tuple[int, int]]]
    whole: bool


def _find(file: BinaryIO, member: str) -> tuple[int, int, list[tuple[int, int]] | None]:
    """Return a member's start and size, and its parts if it has holes; a link leads to the member that it names."""
    status = os.fstat(file.fileno())
    return _look_up(_index(file.name, status.st_size, status.st_mtime_ns), member)


def _look_up(index: _Index, member: str) -> tuple[int, int, list[tuple[int, int]] | None]:
    name = posixpath.normpath(member)
    followed: set[str] = set()
    while name in index.links and name not in followed:
        followed.add(name)
        name = index.links[name]
    if name not in index.files:
        link = f" (a link to {name!r})" if followed else ""
        cut = "" if index.whole else "; the archive is damaged or cut off behind them"
        raise ShardError(f"no {member!r}{link} among the {len(index.files)} files of the archive{cut}")
    return *index.files[name], index.sparse.get(name)


@cache
def _index(shard: str, size: int, changed: int) -> _Index:
    """Return the index of an archive. Names are normalised: `./a.mp4` is `a.mp4`.

    `size` and `changed` (modification time, ns) are only keys of the cache: a file that was replaced is read again.

    Raises:
        ShardError: the file is an archive of another kind.
    """
    index = _read_index(shard)
    if not index.whole and not index.files:
        _refuse_other_archive(shard)
    return index


def _read_index(path: str | None, file: Any = None) -> _Index:
    """Walk through the headers of an archive, at a path or open."""
    files: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    sparse: dict[str, list[tuple[int, int]]] = {}
    whole = True
    try:
        with tarfile.open(path, "r:", file) as archive:
            for entry in archive:
                name = posixpath.normpath(entry.name)
                for kept in (files, links, sparse):  # of several files of one name, tar leaves the last
                    kept.pop(name, None)
                if entry.issym():
                    links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), entry.linkname))
                elif entry.islnk():
                    links[name] = posixpath.normpath(entry.linkname)
                elif entry.isreg():
                    files[name] = entry.offset_data, entry.size
                    parts: Any = entry.sparse  # undocumented
                    if parts is not None:
                        sparse[name] = parts
                archive.members = []  # type: ignore[attr-defined]  # private; it would keep 1 kB for each member
                remote.report_progress()
    except tarfile.TarError:
        whole = False
    return _Index(files, links, sparse, whole)


def _fill(file: BinaryIO, start: int, size: int, sparse: list[tuple[int, int]]) -> bytes:
    """Return a file with holes: zeros where nothing is stored."""
    data = bytearray(size)
    file.seek(start)
    for offset, length in sparse:
        part = file.read(length)
        if len(part) < length:
            raise ShardError(f"the archive ends within a file of {size} bytes")
        data[offset : offset + length] = part
    return bytes(data)


_OTHER_ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}


def _refuse_other_archive(shard: str) -> None:
    """Raise a ShardError for an archive of another kind that is named .tar: its members have no place to read from."""
    with open(shard, "rb") as file:
        head = file.read(8)
    for magic, kind in _OTHER_ARCHIVES.items():
        if head.startswith(magic):
            raise ShardError(f"the archive is {kind}, not tar: store its files as a tar without compression")


# Archives by URL


def _remote_copy(shard: str, member: str) -> str:
    """Return the path of a copy of a member: one read of a part of the archive, where its server can do that."""
    start, size, sparse = _remote_place(shard, member)

    def make(partial: str) -> None:
        data = None if sparse is not None else remote.read_range(shard, start, size)
        _write(partial, read_member(remote.local_copy(shard), member) if data is None else data)

    return remote.keep(f"{shard}#{member}", make)


def _remote_place(shard: str, member: str) -> tuple[int, int, list[tuple[int, int]] | None]:
    return _look_up(_remote_index(shard), member)


@cache
def _remote_index(shard: str) -> _Index:
    """Return the index of an archive, which is kept beside the copies.

    Making one reads the header of every member, each with a request; the whole archive, where its server gives no
    parts.
    """

    def make(partial: str) -> None:
        file = remote.open_seekable(shard)
        index = _read_index(None if file else remote.local_copy(shard), file)
        if not index.files:
            raise ShardError("no files in it: expected a tar archive without compression")
        _write(partial, json.dumps(index).encode())

    with open(remote.keep(f"{shard}#index", make), "rb") as kept:
        files, links, sparse, whole = json.load(kept)
    return _Index({name: (start, size) for name, (start, size) in files.items()}, links, sparse, whole)


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
