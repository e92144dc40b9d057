"""A reader that hangs, crashes or is orphaned costs one record and leaves nothing behind.

A FIFO named .mp4 is the hang: opening it waits for a writer that never comes, whatever the reader.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import clips
import numpy as np
import pytest

from video_convmae.data.decoding import DecodeError, DecodeTimeout, open_frames, read_record
from video_convmae.data.decoding.process import ChildDied, ChildProcess, ChildTimeout, ReaderProcess, receive, send
from video_convmae.data.records import Record
from video_convmae.errors import UserError

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with FIFOs")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return Record(str(clips.make("h264.mp4", tmp_path_factory.mktemp("clips"))))


@pytest.fixture
def hang(tmp_path: Path) -> Record:
    os.mkfifo(tmp_path / "hang.mp4")
    return Record(str(tmp_path / "hang.mp4"))


@pytest.fixture
def process() -> Iterator[ReaderProcess]:
    with ReaderProcess("pyav", timeout=30.0) as process:
        yield process


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_gone(pid: int, seconds: float = 10.0) -> bool:
    """Return whether a process ends within this time; a zombie of another parent counts as ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        status = Path(f"/proc/{pid}/stat")
        if not exists(pid) or (status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z"):
            return True
        time.sleep(0.02)
    return False


def in_half_a_second(action: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(0.5, action)
    timer.start()
    return timer


# ---- the same frames and errors as without --------------------------------------------------------------------------


def test_frames_are_the_same(clip: Record, process: ReaderProcess) -> None:
    with open_frames(clip, "pyav") as direct, process.open(clip) as reader:
        assert len(reader) == len(direct) == 60
        assert reader.name == "pyav"
        for indices in ([0], [59, 3, 3, 17], np.arange(60)):
            frames = reader.read(indices)
            assert (frames == direct.read(indices)).all()
            assert frames.dtype == np.uint8
            assert frames.flags.writeable


def test_errors_pass_through(clip: Record, process: ReaderProcess, tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match=r"gone.mp4: .*No such file"):
        process.open(Record(str(tmp_path / "gone.mp4")))
    child = process._child.pid
    with process.open(clip) as reader:
        with pytest.raises(DecodeError, match="frame 60 was asked for"):
            reader.read([60])
        assert reader.read([59]).shape == (1, 48, 64, 3)
    assert process._child.pid == child  # an error is no reason for a new one


def test_pictures_and_odd_names(process: ReaderProcess, tmp_path: Path) -> None:
    from PIL import Image

    image = clips.pictures(1)[0]
    path = os.fsdecode(os.fsencode(tmp_path) + b"/a caf\xe9, '1' \xff.png")
    Image.fromarray(image).save(path)
    with process.open(Record(path, format="image")) as reader:
        assert (reader.read([0, 0]) == image).all()


def test_only_the_latest_record_is_open(clip: Record, process: ReaderProcess) -> None:
    first = process.open(clip)
    second = process.open(clip)
    with pytest.raises(DecodeError, match="no longer open"):
        first.read([0])
    first.close()
    assert second.read([1]).shape == (1, 48, 64, 3)
    second.close()
    with pytest.raises(DecodeError, match="no longer open"):
        second.read([1])


def test_unknown_and_missing_readers(clip: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected one of auto"):
        ReaderProcess("opencv")
    (tmp_path / "decord.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="pip install decord"):
        ReaderProcess("decord").open(clip)


def test_a_child_that_does_not_start(clip: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with exit code 1") as caught:
        ReaderProcess("pyav").open(clip)
    assert not isinstance(caught.value, DecodeError)  # no record is to blame


# ---- hangs and crashes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pyav", "decord"])
def test_a_hang_is_ended(name: str, clip: Record, hang: Record) -> None:
    pytest.importorskip({"pyav": "av"}.get(name, name))
    with ReaderProcess(name, timeout=0.5) as process:
        assert process.open(clip).read([0]).shape == (1, 48, 64, 3)
        child = process._child.pid
        start = time.monotonic()
        with pytest.raises(DecodeTimeout, match=r"hang.mp4: the reader did not return within 0.5 s and was killed"):
            process.open(hang)
        assert 0.4 < time.monotonic() - start < 3
        assert not exists(child)  # ended and reaped
        process.timeout = 30.0
        assert process.open(clip).read([0]).shape == (1, 48, 64, 3)


def test_a_hang_while_reading(clip: Record, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "1.png")
    with ReaderProcess("pyav", timeout=0.5) as process:
        reader = process.open(Record(str(folder), 0, 1, "frames"))
        with pytest.raises(DecodeTimeout, match="folder: "):
            reader.read([0])
        with pytest.raises(DecodeError, match="folder: is no longer open"):
            reader.read([0])


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_is_named(number: signal.Signals, clip: Record, hang: Record, process: ReaderProcess) -> None:
    process.open(clip)
    child = process._child.pid
    in_half_a_second(lambda: os.kill(child, number))
    with pytest.raises(DecodeError, match=f"hang.mp4: the reader process was ended by {number.name}") as caught:
        process.open(hang)
    assert ("out of memory?" in str(caught.value)) == (number == signal.SIGKILL)
    assert not exists(child)
    assert len(process.open(clip)) == 60


def test_death_while_idle_costs_nothing(clip: Record, process: ReaderProcess) -> None:
    process.open(clip).close()
    os.kill(process._child.pid, signal.SIGKILL)
    process._child._process.wait()
    assert process.open(clip).read([7]).shape == (1, 48, 64, 3)


def test_a_child_outlives_the_signals_of_a_scheduler(clip: Record, process: ReaderProcess) -> None:
    process.open(clip)
    child = process._child.pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(child, number)
    assert len(process.open(clip)) == 60
    assert process._child.pid == child


def test_an_interrupt_while_waiting(clip: Record, hang: Record, process: ReaderProcess) -> None:
    """The reply that comes too late must not be taken for that to the next request."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a background job Python starts with it ignored
    process.open(clip)
    child = process._child.pid
    in_half_a_second(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        process.open(hang)
    assert not exists(child)
    assert len(process.open(clip)) == 60


# ---- the parent's end -----------------------------------------------------------------------------------------------

PARENT = """
import sys
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.records import Record
good, last = sys.argv[1:]
process = ReaderProcess("pyav", 600.0)
process.open(Record(good))
print(process._child.pid, flush=True)
process.open(Record(last)) if last else sys.stdin.read()
"""


@pytest.mark.parametrize("busy", [True, False], ids=["hanging", "idle"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_ends_with_its_parent(number: signal.Signals, busy: bool, clip: Record, hang: Record) -> None:
    program = f"import sys; sys.path[:] = {sys.path!r}\n{PARENT}"
    command = [sys.executable, "-c", program, clip.path, hang.path if busy else ""]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert exists(child)
        if busy:
            time.sleep(0.2)
        parent.send_signal(number)
        parent.wait(10)
    assert is_gone(child)


def test_a_normal_exit_leaves_no_child(clip: Record) -> None:
    program = f"import sys; sys.path[:] = {sys.path!r}\n{PARENT}"
    command = [sys.executable, "-c", program, clip.path, clip.path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr == ""
    assert is_gone(int(result.stdout))


# ---- in workers -----------------------------------------------------------------------------------------------------


def _work(process: ReaderProcess, record: Record, results: multiprocessing.SimpleQueue) -> None:
    child = process._child.pid if process._child else None
    frames = process.open(record).read([3, 40])
    results.put((frames, child, process._child.pid))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_in_a_daemonic_worker(method: str, clip: Record) -> None:
    """Also with a reader process that the parent has used: a forked copy leaves the parent's child alone."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    with ReaderProcess("pyav", 30.0) as process, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking while another library has threads
        ours = process.open(clip)
        worker = context.Process(target=_work, args=(process, clip, results), daemon=True)
        worker.start()
        frames, inherited, theirs = results.get()
        worker.join(30)
        assert worker.exitcode == 0
        assert (frames == read_record(clip, [3, 40], "pyav")).all()
        assert inherited == (process._child.pid if method == "fork" else None)
        assert theirs != process._child.pid
        assert is_gone(theirs)
        assert (ours.read([3, 40]) == frames).all()


def test_a_pickled_copy_starts_anew(clip: Record, process: ReaderProcess) -> None:
    process.open(clip)
    copy = pickle.loads(pickle.dumps(process))
    assert (copy.reader, copy.timeout, copy._child) == ("pyav", 30.0, None)
    with copy:
        assert len(copy.open(clip)) == 60


# ---- nothing is left behind -----------------------------------------------------------------------------------------


def _children() -> list[str]:
    tasks = Path("/proc/self/task").glob("*/children")
    return [pid for task in tasks for pid in task.read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("opens", "hangs"), [(100, 3), pytest.param(3000, 60, marks=pytest.mark.slow)])
def test_no_files_and_no_zombies_are_left(opens: int, hangs: int, clip: Record, hang: Record) -> None:
    before, files = _children(), len(os.listdir("/proc/self/fd"))
    process = ReaderProcess("pyav", timeout=30.0)
    for number in range(opens):
        assert process.open(clip).read([number % 60]).shape == (1, 48, 64, 3)
    assert len(os.listdir(f"/proc/{process._child.pid}/fd")) < 12
    process.timeout = 0.05
    for _ in range(hangs):
        with pytest.raises(DecodeTimeout):
            process.open(hang)
    process.open(clip)
    del process
    assert _children() == before
    assert len(os.listdir("/proc/self/fd")) == files


def test_messages_may_be_large_and_the_line_may_break() -> None:
    line, other = socket.socketpair()
    sent = {"frames": np.arange(3_000_000, dtype=np.uint8).reshape(100, 100, 300), "text": "x" * 10}
    with other, line, line.makefile("rb") as file:
        writer = threading.Thread(target=send, args=(other, sent))
        writer.start()
        got = receive(file)
        writer.join()
        assert (got["frames"] == sent["frames"]).all()
        assert got["text"] == sent["text"]
    for length in (10, 100):  # within the pickled object; within the array behind it
        line, other = socket.socketpair()
        with line, line.makefile("rb") as file:
            send(other, np.zeros(50, dtype=np.uint8))
            whole = line.recv(1000, socket.MSG_PEEK)
            assert len(whole) > 110
            line.recv(1000)
            other.sendall(whole[: len(whole) - length])
            other.close()
            with pytest.raises(EOFError):
                receive(file)


# ---- any child ------------------------------------------------------------------------------------------------------


def _make_sleeper(progress: Callable[[], None], share: float) -> Callable[[int], np.ndarray]:
    """Handler that sleeps for `share` seconds a count of the request, with progress behind each, then counts them."""

    def handle(count: int) -> np.ndarray:
        if count == 0:
            raise UserError("nothing to count")
        if count < 0:
            os._exit(7)
        for _ in range(count):
            time.sleep(share)
            progress()
        return np.arange(count)

    return handle


def test_progress_extends_the_deadline() -> None:
    child = ChildProcess(_make_sleeper, 0.2)
    assert child.ask(4, timeout=0.5).tolist() == [0, 1, 2, 3]  # 0.8 s in all
    with pytest.raises(ChildTimeout, match=r"no reply within 0.1 s"):
        child.ask(4, timeout=0.1)
    assert not child.is_alive()


def test_a_child_passes_errors_on_and_its_end_is_named() -> None:
    child = ChildProcess(_make_sleeper, 0.0)
    with pytest.raises(UserError, match="nothing to count"):
        child.ask(0, timeout=5)
    assert child.ask(1, timeout=5).tolist() == [0]
    with pytest.raises(ChildDied, match="ended with exit code 7"):
        child.ask(-1, timeout=5)
    assert not child.is_alive()


def test_a_child_that_another_thread_kills_ends_the_wait() -> None:
    """Tools kill their children when they are interrupted, while threads wait for them."""
    child = ChildProcess(_make_sleeper, 60.0)
    in_half_a_second(child.kill)
    start = time.monotonic()
    with pytest.raises(ChildDied, match="SIGKILL"):
        child.ask(1, timeout=50)
    assert time.monotonic() - start < 5
