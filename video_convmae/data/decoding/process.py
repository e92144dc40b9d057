"""Decoding in a child process that can be killed: a hang or a crash of a codec library costs one record, not the run.

    decoder = IsolatedDecoder("pyav", timeout=60.0)
    with decoder.open(record) as reader:
        frames = reader.read([0, 4, 8])

The child is a fresh interpreter (no fork), so this works inside daemonic DataLoader workers under every start method.
It ends with its parent, however that ends and whatever the child does at that moment.

Measured (2 cores, Python 3.11): a child starts in 0.3 s and takes 60 MB (27 of them its own) with PyAV, 0.3 s and 76 MB
with decord, but 4.6 s and 690 MB (370 its own) with torchcodec, which loads torch. Sixteen 340x256 frames (4.2 MB) come
back through the socket in 1.0 to 1.4 ms: about 1% of decoding them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Any, get_args

import numpy as np

from video_convmae.data.decoding import DecodeError, FrameReader, open_frames, resolve_reader
from video_convmae.data.options import ReaderName
from video_convmae.data.records import Record

_START_SECONDS = 300.0  # to import the decoder, from a slow disk if need be; no record is to blame for it
_KILL_SECONDS = 5.0  # a killed process that waits for a dead file server goes only when that answers
_LENGTH = struct.Struct("!Q")


class DecodeTimeout(DecodeError):
    """A record whose decoder did not return in time. The decoding process was killed."""


class ReaderProcess:
    """`open_frames` in a child process, which is started when first needed and again after it was lost.

    One record is open at a time; opening the next closes the one before. Not for use by several threads at once. May be
    pickled, and copied by a fork: the copy starts a child of its own.

    Args:
        decoder: a name that `decoding.resolve` takes.
        timeout: seconds that one open or one read may take.
    """

    def __init__(self, decoder: str = "auto", timeout: float = 60.0) -> None:
        if decoder not in get_args(ReaderName):
            raise ValueError(f"data.decoder is {decoder!r}; expected one of {', '.join(get_args(ReaderName))}")
        self.decoder = decoder
        self.timeout = timeout
        self._child: _Child | None = None
        self._open = 0  # the number of the record that is open; 0: none
        self._opened = 0  # how many were opened before it, and it

    def open(self, record: Record) -> FrameReader:
        """A reader of `record`, as `open_frames` returns it; it also raises the errors below when it reads.

        Raises:
            DecodeTimeout: the decoder did not return in time.
            DecodeError: the record cannot be read, or the decoder crashed on it.
            ImportError, RuntimeError: the decoder is not installed; the child does not start. No record is to blame.
        """
        if self._child is not None and not self._child.is_usable():
            self.close()
        if self._child is None:
            self._child = _Child(self.decoder)
        self._open = 0
        count, decoder = self._ask(("open", record), record.path)
        self._opened += 1
        self._open = self._opened
        return _Reader(self, self._open, record.path, count, decoder)

    def close(self) -> None:
        """End the child process. The next `open` starts another."""
        child, self._child, self._open = self._child, None, 0
        if child is not None:
            child.end()

    def _read(self, reader: _Reader, indices: np.ndarray) -> np.ndarray:
        if reader.number != self._open:
            raise DecodeError(f"{reader.path}: is no longer open for reading")
        frames, reader.decoder = self._ask(("read", indices), reader.path)
        return frames

    def _ask(self, request: tuple[str, Any], path: str) -> Any:
        """Send a request and return the reply. Whatever goes wrong, the child is never left with a reply to give."""
        deadline = time.monotonic() + self.timeout
        try:
            send(self._child.line, request, deadline)
            kind, reply = receive(self._child.line, deadline)
        except TimeoutError:
            self.close()
            raise DecodeTimeout(
                f"{path}: the decoder did not return within {self.timeout:g} s and was killed"
            ) from None
        except (EOFError, OSError):
            fate = self._child.fate()
            self.close()
            raise DecodeError(f"{path}: the decoding process {fate}") from None
        except BaseException:  # an interrupt while waiting
            self.close()
            raise
        if kind == "error":
            raise DecodeError(reply)
        return reply

    def __enter__(self) -> ReaderProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half-made, or the interpreter is going
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"decoder": self.decoder, "timeout": self.timeout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class _Reader(FrameReader):
    """The parent's side of a record that is open in the child."""

    def __init__(self, owner: ReaderProcess, number: int, path: str, count: int, decoder: str) -> None:
        self.number = number
        self.path = path
        self.decoder = decoder
        self._owner = owner
        self._count = count

    def __len__(self) -> int:
        return self._count

    def _read_ascending(self, indices: np.ndarray) -> np.ndarray:
        return self._owner._read(self, indices)

    def close(self) -> None:
        if self._owner._open == self.number:
            self._owner._open = 0


# ---- the child, seen from the parent --------------------------------------------------------------------------------


class _Child:
    """A running decoding process and the line to it (a socket pair: the child sees its end when the parent dies)."""

    def __init__(self, decoder: str) -> None:
        self.owner = os.getpid()
        self.line, theirs = socket.socketpair()
        program = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from {__name__} import serve; serve({theirs.fileno()}, {self.owner}, {decoder!r})"
        )
        one_thread = dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "1")
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | one_thread,
            )
        try:
            missing = receive(self.line, time.monotonic() + _START_SECONDS)
            if missing:
                raise ImportError(missing)
        except (EOFError, OSError) as error:
            fate = f"did not start in {_START_SECONDS:g} s" if isinstance(error, TimeoutError) else self.fate()
            self.end()
            raise RuntimeError(f"the process for data.decoder {decoder!r} {fate} ({sys.executable})") from error
        except BaseException:
            self.end()
            raise

    def is_usable(self) -> bool:
        """Whether it lives and is ours: not that of the process we were forked from.

        It may have died while idle: the kernel ends it with the thread that started it, and that may be gone.
        """
        return self.owner == os.getpid() and self.process.poll() is None

    def fate(self) -> str:
        """How it ended, after its end of the line was closed."""
        try:
            code = self.process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its line"
        if code >= 0:
            return f"ended with exit code {code}"
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{hint}"

    def end(self) -> None:
        """Kill and reap it, unless it belongs to the process that we were forked from."""
        self.line.close()
        if self.owner == os.getpid():
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # subprocess reaps it later, when another is started
                self.process.wait(_KILL_SECONDS)
        else:
            self.process.returncode = 0  # not ours to wait for


# ---- messages: a pickled object; arrays follow it as they are --------------------------------------------------------


def send(line: socket.socket, message: Any, deadline: float | None = None) -> None:
    """Send an object. Raises TimeoutError after `deadline` (of the monotonic clock), OSError if nobody reads."""
    arrays: list[pickle.PickleBuffer] = []
    body = pickle.dumps(message, protocol=5, buffer_callback=arrays.append)
    parts = [memoryview(body), *[array.raw() for array in arrays]]
    for part in [_LENGTH.pack(len(parts)), *[_LENGTH.pack(len(part)) for part in parts], *parts]:
        _set_timeout(line, deadline)
        line.sendall(part)


def receive(line: socket.socket, deadline: float | None = None) -> Any:
    """Receive an object. Raises TimeoutError after `deadline`, EOFError or OSError if the other side is gone."""
    (count,) = _LENGTH.unpack(_receive_bytes(line, _LENGTH.size, deadline))
    sizes = [_LENGTH.unpack(_receive_bytes(line, _LENGTH.size, deadline))[0] for _ in range(count)]
    body, *arrays = [_receive_bytes(line, size, deadline) for size in sizes]
    return pickle.loads(body, buffers=arrays)


def _receive_bytes(line: socket.socket, size: int, deadline: float | None) -> np.ndarray:
    data = np.empty(size, dtype=np.uint8)  # unlike a bytearray it is not zeroed first
    view = memoryview(data)
    while len(view):
        _set_timeout(line, deadline)
        received = line.recv_into(view)
        if not received:
            raise EOFError
        view = view[received:]
    return data


def _set_timeout(line: socket.socket, deadline: float | None) -> None:
    if deadline is not None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        line.settimeout(left)


# ---- the child ------------------------------------------------------------------------------------------------------


def serve(descriptor: int, parent: int, decoder: str) -> None:
    """What the child process does: open and read as it is asked to, until the parent is gone."""
    _end_with(parent)
    # What a terminal or a scheduler sends to all processes of a run is for the run to answer.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    reader: FrameReader | None = None
    with socket.socket(fileno=descriptor) as line, contextlib.suppress(EOFError, OSError):
        try:
            decoder = resolve_reader(decoder)
        except ImportError as error:
            send(line, str(error))
            return
        send(line, "")
        while True:
            action, argument = receive(line)
            try:
                if action == "open":
                    if reader is not None:
                        reader.close()
                    reader = None
                    reader = open_frames(argument, decoder)
                    reply = "opened", (len(reader), reader.decoder)
                else:
                    reply = "frames", (np.ascontiguousarray(reader.read(argument)), reader.decoder)
            except DecodeError as error:
                reply = "error", str(error)
            send(line, reply)
            del reply  # not held while the next clip is decoded


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, in whatever state it is (Linux; elsewhere: at EOF)."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before
            os._exit(0)
