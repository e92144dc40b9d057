"""Reading in a child process that can be killed: a hang or a crash of a codec library costs one record, not the run.

    process = ReaderProcess("pyav", timeout=60.0)
    with process.open(record) as reader:
        frames = reader.read([0, 4, 8])

`ChildProcess` is the general part; packing (prepare/pack.py) uses it too. A child is a fresh interpreter (no fork), so
it can be started inside daemonic DataLoader workers under every start method. It ends with its parent, however that
ends and whatever the child does at that moment.

Measured (2 cores, Python 3.11): a child starts in 0.3 s and takes 60 MB (27 of them its own) with PyAV, 0.3 s and 76 MB
with decord, but 4.6 s and 690 MB (370 its own) with torchcodec, which loads torch. Sixteen 340x256 frames (4.2 MB) come
back through the socket in 1.0 to 1.4 ms, about 1% of decoding them. With the switches between the two processes a clip
costs 3 to 5 ms more than in one process: the 5% "between processes" of docs/performance.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple, get_args

import numpy as np

from video_convmae.data.decoding import DecodeError, DecodeTimeout, FrameReader, open_frames, resolve_reader
from video_convmae.data.options import ReaderName
from video_convmae.data.records import Record
from video_convmae.data.remote import ObjectCache, use_cache
from video_convmae.errors import UserError

_START_SECONDS = 300.0  # to import the libraries, perhaps from a slow disk; no record is to blame for it
_KILL_SECONDS = 5.0  # a killed process that waits for a dead file server ends only when that answers

STREAM_BYTES = 2**24  # of decoded frames that are sent together; at least one frame

_TIMES, _NEXT = "times", "next frames"  # requests

Handler = Callable[[Any], Any]  # from a request to its reply


class ReaderProcess:
    """`open_frames` in a child process, which is started when first needed and again after it was lost.

    One record is open at a time; opening the next closes the one before. Not for use by several threads at once. May be
    pickled, and copied by a fork: the copy starts a child of its own.

    Args:
        reader: a name that `resolve_reader` takes.
        timeout: seconds that one open or one read may take.
        max_side: as in `open_frames`.
        cache: where files that are named by URL are copied to.
    """

    def __init__(
        self,
        reader: ReaderName = "auto",
        timeout: float = 60.0,
        max_side: int | None = 4096,
        cache: ObjectCache = ObjectCache(),  # noqa: B008  # frozen
    ) -> None:
        if reader not in get_args(ReaderName):
            raise ValueError(f"data.reader is {reader!r}; expected one of {', '.join(get_args(ReaderName))}")
        if max_side is not None and max_side < 1:
            raise ValueError(f"data.max_side is {max_side}; expected 1 pixel or more")
        self.reader = reader
        self.timeout = timeout
        self.max_side = max_side
        self.cache = cache
        self._child: ChildProcess | None = None
        self._opened: RemoteReader | None = None

    def open(self, record: Record) -> RemoteReader:
        """Open a record in the child, as `open_frames` does.

        Raises:
            DecodeTimeout: the reader did not return in time.
            DecodeError: the record cannot be read, or the reader crashed on it.
            ImportError, RuntimeError: the reader is not installed; the child does not start. No record is to blame.
        """
        if self._opened is not None:
            self._opened.close()
        if self._child is None or not self._child.is_alive():
            self._child = ChildProcess(serve_frames, self.reader, self.max_side, self.cache)
        self._opened = RemoteReader(self._child, record, self.timeout)
        return self._opened

    def close(self) -> None:
        """End the child process. The next `open` starts another."""
        if self._opened is not None:
            self._opened.close()
        if self._child is not None:
            self._child.kill()
        self._child = self._opened = None

    def __enter__(self) -> ReaderProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[ReaderProcess], tuple[str, float, int | None, ObjectCache]]:
        return ReaderProcess, (self.reader, self.timeout, self.max_side, self.cache)


class RemoteReader(contextlib.AbstractContextManager["RemoteReader"]):
    """The parent's side of a record that is open in the child; used like a `FrameReader`.

    Attributes:
        path: path of the record.
        name: library that decodes, as in `FrameReader`.
        note, damaged: as in `FrameReader`.
    """

    def __init__(self, child: ChildProcess, record: Record, timeout: float) -> None:
        self.path = record.path
        self._child: ChildProcess | None = child
        self._timeout = timeout
        (self._length, self.damaged), self.name, self.note = self._ask(record)

    def __len__(self) -> int:
        return self._length

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return frames as `FrameReader.read` does, whose checks run in the child; also raises DecodeTimeout."""
        frames, self.name, self.note = self._ask(indices)
        return frames

    @property
    def times(self) -> np.ndarray | None:
        """As in `FrameReader`; sent by the child when first asked for."""
        return self._timing[0]

    @property
    def rate(self) -> float | None:
        """As in `FrameReader`; sent with the times."""
        return self._timing[1]

    @cached_property
    def _timing(self) -> tuple[np.ndarray | None, float | None]:
        timing, self.name, self.note = self._ask(_TIMES)
        return timing

    def stream(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Yield frames as `FrameReader.stream` does; each process holds some `STREAM_BYTES` of them."""
        self._ask(_Stream(np.asarray(indices)))
        taken = 0
        while taken < len(indices):
            frames, self.name, self.note = self._ask(_NEXT)
            taken += len(frames)
            yield from frames

    def close(self, *exception: object) -> None:
        """Forbid further reads. The child closes the file when the next record is opened."""
        self._child = None

    __exit__ = close

    def _ask(self, request: Any) -> Any:
        if self._child is None:
            raise DecodeError(f"{self.path}: is no longer open for reading")
        try:
            return self._child.ask(request, self._timeout)
        except ChildTimeout:
            self._child = None
            message = f"{self.path}: the reader did not return within {self._timeout:g} s and was killed"
            raise DecodeTimeout(message) from None
        except ChildDied as error:
            self._child = None
            raise DecodeError(f"{self.path}: the reader process {error}") from None


class _Stream(NamedTuple):
    """Request: begin a stream of the frames at these indices."""

    indices: np.ndarray


class FrameStream:
    """A reader's stream, taken a few frames at a time; an error comes after the frames before it."""

    def __init__(self, opened: FrameReader, indices: np.ndarray) -> None:
        self._frames = opened.stream(indices)
        self._error: DecodeError | None = None

    def take(self) -> np.ndarray:
        """Return the next frames, `(n, H, W, 3)` uint8, of `STREAM_BYTES` or more, the last of fewer.

        Raises:
            DecodeError: as `FrameReader.stream`; `next` past the end is the caller's mistake.
        """
        if self._error is not None:
            raise self._error
        frames: list[np.ndarray] = []
        size = 0
        try:
            for frame in self._frames:
                frames.append(frame)
                size += frame.nbytes
                if size >= STREAM_BYTES:
                    break
        except DecodeError as error:
            if not frames:
                raise
            self._error = error
        return np.stack(frames)


def serve_frames(
    progress: Callable[[], None],
    reader: ReaderName,
    max_side: int | None = None,
    cache: ObjectCache = ObjectCache(),  # noqa: B008  # frozen
) -> Handler:
    """Return the handler of a reader process: a record opens it, anything else is asked of the one that is open."""
    reader = resolve_reader(reader)
    use_cache(cache, progress)  # a download that goes on is no hang
    opened: FrameReader | None = None
    stream: FrameStream | None = None

    def handle(request: Any) -> tuple[Any, str, str | None]:
        nonlocal opened, stream
        if isinstance(request, Record):
            if opened is not None:
                opened.close()
                opened = stream = None  # opening the next may fail
            opened = open_frames(request, reader, max_side)
            return (len(opened), opened.damaged), opened.name, opened.note
        assert opened is not None  # the parent reads only what it has opened
        if isinstance(request, _Stream):
            stream = FrameStream(opened, request.indices)
            return None, opened.name, opened.note
        if isinstance(request, str):
            if request == _TIMES:
                return (opened.times, opened.rate), opened.name, opened.note
            assert stream is not None  # the parent takes frames only of a stream that it has begun
            return stream.take(), opened.name, opened.note
        frames = np.ascontiguousarray(opened.read(request))  # first: a failure of its library changes the name
        return frames, opened.name, opened.note

    return handle


# ---- any child, seen from the parent --------------------------------------------------------------------------------


class ChildTimeout(Exception):
    """Nothing came from the child in time; it was killed."""


class ChildDied(Exception):
    """The child ended instead of replying. The message says how: "was ended by SIGSEGV"."""


class ChildProcess:
    """A fresh interpreter that answers requests, one at a time; started here, and not again once it has ended.

    The two are connected by a socket pair, so the child sees the end of its parent. A fork's copy of this object is not
    alive and leaves the child to the process that started it.

    Args:
        make_handler: a module's function, called in the child with `progress` and the arguments: returns a function
            from a request to its reply. `progress()` tells the parent that the child still works.
        arguments: picklable, as are requests and replies. Arrays are sent without a copy and arrive writeable.

    Raises:
        ImportError: raised by `make_handler`.
        RuntimeError: the child did not start.
    """

    def __init__(self, make_handler: Callable[..., Handler], *arguments: Any) -> None:
        self._owner = os.getpid()
        self._line, theirs = socket.socketpair()
        self._replies = self._line.makefile("rb")
        program = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from {__name__} import serve_requests; serve_requests({theirs.fileno()}, {self._owner})"
        )
        one_thread = dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "1")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | one_thread,
            )
        try:
            self.ask((make_handler, arguments), _START_SECONDS)
        except (ChildTimeout, ChildDied) as error:
            fate = f"did not start within {_START_SECONDS:g} s" if isinstance(error, ChildTimeout) else error
            raise RuntimeError(
                f"the process for {make_handler.__module__}.{make_handler.__name__}{arguments} {fate} "
                f"({sys.executable}); its own error messages are above"
            ) from error
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Process ID of the child."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Return whether it can be asked: it runs, and was started by this process, not by the one that forked it.

        A child may die while idle: the kernel ends it with the thread that started it, which may be gone.
        """
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, request: Any, timeout: float) -> Any:
        """Send a request and return the reply. On any failure but the handler's own, the child is killed.

        Args:
            request: passed to the child's handler.
            timeout: seconds to wait for the reply, or for the next report of progress.

        Raises:
            ChildTimeout: nothing came in time.
            ChildDied: the child has ended.
            UserError: raised by the handler.
        """
        try:
            self._line.settimeout(timeout)
            send(self._line, request)
            while (message := receive(self._replies)) is None:  # progress
                pass
        except TimeoutError:
            self.kill()
            raise ChildTimeout(f"no reply within {timeout:g} s") from None
        except (EOFError, OSError):
            fate = self._fate()
            self.kill()
            raise ChildDied(fate) from None
        except BaseException:  # an interrupt: a late reply must not be taken for that to the next request
            self.kill()
            raise
        succeeded, reply = message
        if not succeeded:
            raise reply
        return reply

    def kill(self) -> None:
        """Kill and reap the child, unless it belongs to the process that forked this one."""
        if self._owner == os.getpid():
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # subprocess reaps it later, when another is started
                self._process.wait(_KILL_SECONDS)
        else:
            self._process.returncode = 0  # not ours to wait for
        with contextlib.suppress(OSError):  # closed before
            os.close(self._line.detach())  # closing `_replies` would wait for a thread that still reads from it

    def _fate(self) -> str:
        """Say how the child ended, after it closed its end of the line."""
        try:
            code = self._process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its line"
        if code >= 0:
            return f"ended with exit code {code}"
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{hint}"

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half-made, or the interpreter is ending
            self.kill()


# ---- messages: a pickled object; its arrays follow as they are in memory ---------------------------------------------


def send(line: socket.socket, message: Any) -> None:
    """Send an object. Raises TimeoutError after the socket's timeout, OSError if the other side has ended."""
    arrays: list[pickle.PickleBuffer] = []
    body = pickle.dumps(message, protocol=5, buffer_callback=arrays.append)
    parts = [array.raw() for array in arrays]
    line.sendall(pickle.dumps((body, [len(part) for part in parts])))
    for part in parts:
        line.sendall(part)


def receive(file: BinaryIO) -> Any:
    """Receive an object from a socket's file. Raises TimeoutError, EOFError or OSError (the other side has ended)."""
    try:
        body, sizes = pickle.load(file)
    except pickle.UnpicklingError as error:
        raise EOFError("the message is cut off") from error
    arrays = [np.empty(size, dtype=np.uint8) for size in sizes]  # unlike bytearrays they are not zeroed first
    for array in arrays:
        if file.readinto(array) < len(array):  # type: ignore[attr-defined]  # BinaryIO lacks it; buffered files have it
            raise EOFError("the message is cut off")
    return pickle.loads(body, buffers=arrays)


# ---- any child, its own side ----------------------------------------------------------------------------------------


def serve_requests(descriptor: int, parent: int) -> None:
    """Run the child: answer requests until the parent ends. None is progress; a pair is (succeeded, reply or error)."""
    _end_with(parent)
    # A terminal or a scheduler signals all processes of a run; the parent alone answers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with (
        socket.socket(fileno=descriptor) as line,
        line.makefile("rb") as requests,
        contextlib.suppress(EOFError, OSError),
    ):
        make_handler, arguments = receive(requests)
        try:
            handle = make_handler(lambda: send(line, None), *arguments)
        except ImportError as error:
            send(line, (False, error))
            return
        send(line, (True, None))
        while True:
            request = receive(requests)
            try:
                message = True, handle(request)
            except UserError as error:
                message = False, error
            send(line, message)
            del request, message  # not held while the next clip is decoded


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, in whatever state it is (Linux; elsewhere: at EOF)."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before
            os._exit(0)
