"""Files by URL: `s3://bucket/a.mp4` and whatever else fsspec opens, copied into a folder of bounded size.

A copy is made once: a file is downloaded beside its place and renamed, by one process of the machine at a time. Those
that were not used for longest are removed when the folder is larger than it may be; a copy that a process reads is not.
An object counts as one that never changes: where it does, remove the folder. `file://` is read where it lies.

Credentials and endpoints are those of fsspec's own configuration (environment, ~/.config/fsspec).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from video_convmae.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: copies are not locked there
    fcntl = None  # type: ignore[assignment]

ATTEMPTS = 3
PAUSE = 0.5  # seconds before the second attempt; four times as long before each further one
PART, WHOLE = "lock", "lock-whole"  # files in a folder of copies
ABANDONED = 3600.0  # seconds after which a part of a download is nobody's
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class RemoteError(OSError):
    """Object that cannot be read; the message says why."""


class FileSystemMissing(UserError, ImportError):
    """A URL whose library is not installed."""


@dataclass(frozen=True)
class ObjectCache:
    """Folder of copies. folder: None: `video-convmae/objects` under $XDG_CACHE_HOME or ~/.cache. gigabytes: 2**30."""

    folder: str | None = None
    gigabytes: float = 100.0

    @property
    def path(self) -> Path:
        """The folder."""
        if self.folder is not None:
            return Path(self.folder)
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return Path(home, "video-convmae", "objects")


class _State:
    """What this process knows.

    Attributes:
        cache: its folder of copies.
        progress: called while it works on a download.
        unseen: bytes that it has added since it measured the folder.
        held: open files with a shared lock: the copy that is read, and the one before.
    """

    def __init__(self) -> None:
        self.cache = ObjectCache()
        self.progress: Callable[[], None] | None = None
        self.unseen = math.inf
        self.held: deque[BinaryIO] = deque(maxlen=2)


_state = _State()


def use_cache(cache: ObjectCache, progress: Callable[[], None] | None = None) -> None:
    """Set the folder of this process's copies; `progress` is called while an object is downloaded."""
    _state.cache, _state.progress, _state.unseen = cache, progress, math.inf


# Names


def is_url(path: str | os.PathLike) -> bool:
    """Return whether a path is a URL."""
    return isinstance(path, str) and _URL.match(path) is not None


def join(root: str | os.PathLike, path: str) -> str:
    """Join a listed path to its root: either may be a URL."""
    return path if is_url(path) else os.path.join(root, path)


def check_url(url: str) -> None:
    """Raise FileSystemMissing unless the library that opens a URL is installed, UserError if there is none."""
    _filesystem(url)


def read_bytes(url: str) -> bytes:
    """Return a small file, as it is now. Raises RemoteError."""
    return _attempt(url, lambda files, path: files.cat_file(path))


def exists(url: str) -> bool:
    """Return whether there is an object or a folder of this URL."""
    try:
        return bool(_attempt(url, lambda files, path: files.exists(path)))
    except OSError:
        return False


def list_names(folder: str) -> list[str]:
    """Return the names in a folder, which may be a URL. Raises OSError."""
    if not is_url(folder):
        return os.listdir(folder)
    found = _attempt(folder, lambda files, path: files.ls(path, detail=False))
    return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in found]


# Copies


def local_copy(url: str) -> str:
    """Return the path of an object's copy, which is made if there is none; it stays while this process reads it.

    Raises:
        RemoteError: there is no such object, or it could not be downloaded whole in three attempts.
    """
    files, path = _filesystem(url)
    if _is_local(files):
        return path
    return keep(url, lambda partial: _attempt(url, lambda files, path: _download(files, path, partial)), WHOLE)


def place(url: str) -> str:
    """Return where the copy of an object lies, or would."""
    files, path = _filesystem(url)
    if _is_local(files):
        return path
    name = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:40]
    suffix = re.search(r"\.[A-Za-z0-9]{1,8}$", url)
    return str(_state.cache.path / name[:2] / f"{name}{suffix[0].lower() if suffix else ''}")


def keep(url: str, make: Callable[[str], None], lock: str = PART) -> str:
    """Return the copy of a URL, or of a part of one, made by a function that writes the file that it is given.

    To make a part may take the whole, so the two have locks of their own, and a part's always comes first.
    """
    target = place(url)
    while not _hold(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with _lock(os.path.join(os.path.dirname(target), lock)):
            if not os.path.exists(target):
                partial = f"{target}.partial{os.getpid()}"
                try:
                    make(partial)
                    _state.unseen += os.path.getsize(partial)
                    os.replace(partial, target)
                finally:
                    with suppress(OSError):
                        os.unlink(partial)
    _remove_oldest()
    return target


def read_range(url: str, start: int, size: int) -> bytes | None:
    """Return a part of an object; None: its server gives only whole files. Raises RemoteError: it cannot be read."""

    def read(files: Any, path: str) -> bytes | None:
        data = files.cat_file(path, start=start, end=start + size)
        if len(data) < size:
            raise RemoteError(f"{len(data)} of {size} bytes came")
        return data if len(data) == size else None

    return _attempt(url, read)


def open_seekable(url: str) -> Any:
    """Open an object for reading here and there; None: its server gives only whole files. Raises RemoteError."""

    def read(files: Any, path: str) -> Any:
        file = files.open(path, "rb", block_size=2**16)
        return file if file.seekable() and getattr(file, "size", 1) is not None else None

    return _attempt(url, read)


def report_progress() -> None:
    """Say that this process still works."""
    if _state.progress is not None:
        _state.progress()


def _download(files: Any, path: str, partial: str) -> None:
    from fsspec.callbacks import Callback

    class Report(Callback):
        def relative_update(self, inc: int = 1) -> None:
            report_progress()

    files.get_file(path, partial, callback=Report())
    if not os.path.isfile(partial):
        raise RemoteError("it is a folder, not an object")
    expected, size = files.info(path).get("size"), os.path.getsize(partial)
    if expected is not None and expected != size:
        raise RemoteError(f"{size} of {expected} bytes came")


def _filesystem(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        raise FileSystemMissing(
            f"{url} cannot be opened: {error}; s3:// and http:// come with pip install 'video-convmae[remote]'"
        ) from error
    except ValueError as error:
        raise UserError(f"{url} cannot be opened: {error}; expected a URL that fsspec knows") from error


def _is_local(files: Any) -> bool:
    return "file" in ((files.protocol,) if isinstance(files.protocol, str) else files.protocol)


def _attempt(url: str, work: Callable[[Any, str], Any]) -> Any:
    """Do something with an object, again if that fails for another reason than that it is not there."""
    files, path = _filesystem(url)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work(files, path)
        except FileNotFoundError as error:
            raise RemoteError("no such object") from error
        except PermissionError as error:
            raise RemoteError(f"access denied: {error}") from error
        except Exception as error:  # of whatever library
            if attempt == ATTEMPTS:
                text = str(error).strip().splitlines() or [type(error).__name__]
                raise RemoteError(f"not read in {ATTEMPTS} attempts: {text[0]:.200}") from error
        report_progress()
        time.sleep(PAUSE * 4 ** (attempt - 1))
    raise AssertionError


def _hold(target: str) -> bool:
    """Take a copy into use, so that no process removes it; False: there is none."""
    try:
        file = open(target, "rb")  # noqa: SIM115  # closed when it is no longer held
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_SH)
        if not _is_still(target, file):
            return False
    except FileNotFoundError:
        return False
    _state.held.append(file)
    with suppress(OSError):  # another's file
        os.utime(target, (time.time(), os.fstat(file.fileno()).st_mtime))  # the time of its last use
    return True


def _is_still(path: str | Path, file: Any) -> bool:
    """Return whether a path leads to an open file: it may have been removed, and made again, while we waited."""
    return os.path.samestat(os.stat(path), os.fstat(file.fileno()))


@contextmanager
def _lock(path: str) -> Iterator[None]:
    """Hold a lock of the machine's processes, telling meanwhile that this one still works."""
    with open(path, "w") as file:
        while fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                report_progress()
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield


def _remove_oldest() -> None:
    """Remove copies, the longest unused first, until the folder holds nine tenths of what it may.

    The folder is measured when this process has added a sixty-fourth of that.
    """
    bound, folder = _state.cache.gigabytes * 2**30, _state.cache.path
    if _state.unseen < bound / 64:
        return
    _state.unseen = 0.0
    found = []
    for path in folder.glob("??/*"):
        with suppress(OSError):
            status = path.stat()
            if ".partial" in path.name:
                if status.st_mtime < time.time() - ABANDONED:
                    path.unlink()
            elif path.name not in (PART, WHOLE):
                found.append((status.st_atime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    if total <= bound:
        return
    for _, size, path in sorted(found):
        if total <= 0.9 * bound:
            break
        if _remove(path):
            total -= size


def _remove(path: Path) -> bool:
    """Remove a copy, unless a process reads it."""
    try:
        with open(path, "rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_still(path, file):
                return False
            path.unlink()
    except OSError:  # read by a process, or removed by another
        return False
    return True
