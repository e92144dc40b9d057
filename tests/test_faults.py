"""Every fault of a file, of a loading process and of the run itself: what it costs, and that nothing hangs or stays.

`make test-faults` prints what each kind of bad file did.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import av
import clips
import pytest
import torch
from clips import encode, encode_list
from test_loader import clips_of
from test_pretrain import ENVIRONMENT, command, log, model_of
from test_reader_process import is_gone

from video_convmae import masking
from video_convmae.data.datasets import ClipDataset, SampleKey
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.loader import BatchPlan, ResumableBatchSampler, iter_batches
from video_convmae.data.records import read_list
from video_convmae.data.sampling import Sampling
from video_convmae.data.workers import LoaderError
from video_convmae.engine import checkpoint
from video_convmae.engine.log import BadRecordLog

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc and makes FIFOs")

START_METHODS = ["fork", "spawn", "forkserver"]
TIMEOUT = 2.0  # data.decode_timeout
PROMPT = 20.0  # seconds in which a run must end; most of them go into the machine's other work


# ---- faults: name -> how the file is made, and what is said of it (a pattern; "": frames are shown) ------------------

_FASTSTART = {"movflags": "faststart"}
_B = {"bf": "3", "b_strategy": "0", "g": "12"}


def _cut(path: Path, fraction: float, **kind: object) -> None:
    clips.cut(encode(path, **kind), fraction)


def _cut_at(path: Path, mark: bytes, after: int, **kind: object) -> None:
    data = encode(path, **kind).read_bytes()
    path.write_bytes(data[: data.index(mark) + after])


def _audio(path: Path) -> None:
    with av.open(str(path), "w") as file:
        clips._write_silence(file)


def _damaged(path: Path) -> None:
    clips.blank(encode(path, 90, options={"g": "30", "bf": "0"}, size=(120, 160)), 0.03, 0.97)


def _forbidden(path: Path) -> None:
    encode(path, 20).chmod(0)


_FRAGMENTS = {"container": {"movflags": "frag_keyframe+empty_moov"}}
_VP9 = {"codec": "libvpx-vp9", "options": {"g": "12"}}

FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.mp4": (lambda path: None, "No such file"),
    "empty.mp4": (Path.touch, r"is empty \(0 bytes\)"),
    "text.mp4": (lambda path: path.write_text("no video\n" * 200), "Invalid data"),
    "directory.mp4": (Path.mkdir, "Is a directory"),
    "no permission.mp4": (_forbidden, "Permission denied"),
    "audio only.mp4": (_audio, "holds no video stream"),
    "stream of zero length.mp4": (partial(_cut_at, mark=b"moof", after=-4, **_FRAGMENTS), "holds no keyframe"),
    "mpeg-ts.mp4": (partial(encode, count=20, format="mpegts"), "is an MPEG transport stream"),
    "never returns.mp4": (os.mkfifo, "the reader did not return within 2 s and was killed"),
    "moov at the end, cut at 10%.mp4": (partial(_cut, fraction=0.1), "Invalid data"),
    "moov at the end, cut at 60%.mp4": (partial(_cut, fraction=0.6), "Invalid data"),
    "moov at the end, cut at 98%.mp4": (partial(_cut, fraction=0.98), "Invalid data"),
    "faststart, cut in its header.mp4": (
        partial(_cut_at, mark=b"stbl", after=100, container=_FASTSTART),
        "End of file|Invalid data",
    ),
    "faststart, cut in its first frame.mp4": (
        partial(_cut_at, mark=b"mdat", after=100, container=_FASTSTART),
        "holds no keyframe",
    ),
    "faststart, cut at 60%.mp4": (partial(_cut, fraction=0.6, container=_FASTSTART, options=_B), ""),
    "cut in its header.webm": (partial(_cut_at, mark=b"webm", after=20, **_VP9), "End of file|Invalid data"),
    "cut at 60%.webm": (partial(_cut, fraction=0.6, **_VP9), ""),
    "damaged middle.mp4": (_damaged, "Invalid data|is damaged|does not decode"),
}
REPORTED = [name for name, (_, error) in FAULTS.items() if error]


def _permissions_bind() -> None:
    """Programs that this process starts may no longer read what permissions forbid, not even as root."""
    drop_from_bounding_set, override, read_search = 24, 1, 2
    for capability in (override, read_search):
        ctypes.CDLL(None).prctl(drop_from_bounding_set, capability, 0, 0, 0)


def _binds(path: Path) -> bool:
    """Return whether `_permissions_bind` has that effect on this machine."""
    reader = subprocess.run(["cat", path], capture_output=True, preexec_fn=_permissions_bind)
    return reader.returncode != 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten good files; every fault; lists of 90% good rows, where the others are faults, good, or commented out."""
    folder = tmp_path_factory.mktemp("faults")
    good = [f"good {i}.{'mp4' if i < 7 else 'webm'}" for i in range(10)]
    for i, name in enumerate(good):
        encode(folder / name, 20 + 3 * i, "libx264" if i < 7 else "libvpx-vp9")
    for name, (make, _) in FAULTS.items():
        make(folder / name)
    bad_rows = {10 * place + 3 * place % 10: name for place, name in enumerate(FAULTS)}
    lists: dict[str, list[str]] = {"mixed": [], "mended": [], "commented": []}
    for row in range(10 * len(FAULTS)):
        fine = f"{good[row % 10]} {row}"
        lists["mixed"].append(f"{bad_rows[row]} {row}" if row in bad_rows else fine)
        lists["mended"].append(fine)
        lists["commented"].append(f"# {fine}" if row in bad_rows else fine)
    lists["list"] = lists["mixed"]  # which `command` looks for
    for name, rows in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(rows))
    return folder


def data(folder: Path, name: str, **changes: object) -> ClipDataset:
    reader = ReaderProcess("pyav", timeout=TIMEOUT)
    return clips_of(read_list(folder / f"{name}.txt", root=folder), **{"reader": reader, **changes})


# ---- 1. what each fault does ----------------------------------------------------------------------------------------


def _what_happens(folder: Path, names: list[str]) -> dict[str, str]:
    """Error of each file as a run reports it, or the frames that it shows. In a process that may be restricted."""
    torch.set_num_threads(1)
    _permissions_bind()
    happened = {}
    reader = ReaderProcess("pyav", timeout=TIMEOUT)
    for name in names:
        (folder / "one.txt").write_text(f"{name}\ngood 0.mp4")
        samples = [
            data(folder, "one", reader=reader)[SampleKey(epoch, 0)] for epoch in range(1 if "never" in name else 4)
        ]
        errors = [fault.error for sample in samples for fault in sample.bad_records[:1]]
        happened[name] = errors[0].removeprefix(f"{folder}/") if errors else "shown, as far as it goes"
    return happened


@pytest.mark.faults
def test_what_each_fault_does(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Each is reported by a line that names the file and says what is wrong, or shows the frames that it still has."""
    names = [name for name in FAULTS if name != "no permission.mp4" or _binds(folder / name)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking while another library has threads
        with multiprocessing.get_context("fork").Pool(1) as pool:
            happened = pool.apply(_what_happens, (folder, names))
    with capsys.disabled():
        print("\n\nfault -> what happened")
        for name in FAULTS:
            print(f"  {name:38} -> {happened.get(name, 'not tried: here, root may read everything')}")
    for name in names:
        error = FAULTS[name][1]
        assert re.search(error or "shown", happened[name]), name
        assert not error or happened[name].startswith(f"{name}: ")


def test_good_samples_do_not_feel_bad_rows_anywhere(folder: Path) -> None:
    """Bit-equal whether the other rows are bad, good or commented out."""
    rows = range(20)
    mended, commented = data(folder, "mended"), data(folder, "commented")
    places = {int(label): index for index, label in enumerate(commented.records.labels)}
    assert not set(rows) <= set(places)
    assert list(data(folder, "mixed").records.lines) == list(range(len(mended)))
    for row in set(rows) & set(places):
        ours, theirs = commented[SampleKey(2, places[row])], mended[SampleKey(2, row)]
        assert ours.index == places[row]
        assert ours.label == theirs.label == row
        assert torch.equal(ours.clips, theirs.clips)
        assert torch.equal(ours.visible, theirs.visible)


# ---- 2. an epoch over a list with bad files -------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("start_method", START_METHODS)
def test_an_epoch_over_a_list_with_bad_files(start_method: str, workers: int, folder: Path, tmp_path: Path) -> None:
    """Each bad one is reported once; the good samples are those of the lists in which no row is bad."""
    mixed, commented = data(folder, "mixed"), data(folder, "commented")
    share, count = BatchPlan(10), len(mixed)
    batches = ResumableBatchSampler(count, share, seed=1, first_step=0, last_step=count // 10)
    bad_records = BadRecordLog(tmp_path / "bad_records.jsonl", count, max_fraction=0.2)
    compared, files = 0, len(os.listdir("/proc/self/fd"))
    places = {int(label): index for index, label in enumerate(commented.records.labels)}
    with contextlib.closing(iter_batches(mixed, batches, workers, start_method=start_method)) as loaded:
        for draws, batch in zip(batches, loaded, strict=True):
            bad_records.add(batch.bad_records, write=True)
            for place, draw in enumerate(draws):
                if draw.index in places:  # a good one
                    alone = commented[SampleKey(0, places[draw.index])]
                    assert int(batch.records[place]) == draw.index
                    assert torch.equal(batch.clips[place], alone.clips[0])
                    assert torch.equal(batch.visible[place], alone.visible[0])
                    compared += 1
    assert compared == 0.9 * count
    assert reported_in(bad_records.path) == reported_of(not os.access(folder / "no permission.mp4", os.R_OK))
    commented.reader.close()
    assert not decoding(descendants(os.getpid()))
    assert len(os.listdir("/proc/self/fd")) <= files + 6  # of the fork server and the resource tracker, which stay


@pytest.mark.faults
def test_a_file_that_vanishes_during_the_run(folder: Path, tmp_path: Path) -> None:
    """Shown in the first epoch, removed, reported in the second."""
    for i in range(8):
        encode(tmp_path / f"{i}.mp4", 20)
    (tmp_path / "some.txt").write_text("\n".join(f"{i}.mp4" for i in range(8)))
    some = data(tmp_path, "some")
    batches = ResumableBatchSampler(8, BatchPlan(1), seed=0, first_step=0, last_step=16)
    last = list(batches)[-1][0].index
    shown, faults = [], []
    for step, batch in enumerate(iter_batches(some, batches, 2)):
        shown.append(int(batch.records))
        faults += batch.bad_records
        if step == 7:
            (tmp_path / f"{last}.mp4").unlink()
    assert last in shown[:8]
    assert last not in shown[8:]
    assert {fault.index for fault in faults} == {last}
    assert "No such file" in faults[0].error


@pytest.mark.faults
def test_a_run_over_a_list_with_bad_files(folder: Path, tmp_path: Path) -> None:
    """tools/pretrain.py: `bad_records.jsonl` and the log's counter; two start methods give the same losses."""
    expected = reported_of(_binds(folder / "no permission.mp4"))
    losses = []
    for start_method, workers in (("fork", 2), ("spawn", 2)):
        output = tmp_path / start_method
        edits = ("--train.epochs=1", "--train.batch_size=10", f"--data.workers={workers}")
        with started(folder, output, f"--data.start_method={start_method}", *edits) as process:
            assert process.wait(120) == 0, said(output)
        lines = log(output)
        assert reported_in(output / "bad_records.jsonl") == expected
        assert lines[-1]["bad_records"] == len(expected)
        assert len(lines) == len(FAULTS)
        losses.append([line["loss"] for line in lines])
    assert losses[0] == losses[1]


@pytest.mark.faults
def test_too_many_bad_files_end_a_run_at_once(folder: Path, tmp_path: Path) -> None:
    edits = ("--data.max_bad_fraction=0.015", "--data.workers=2")
    with started(folder, tmp_path, *edits) as process:
        wait_until(lambda: (tmp_path / "bad_records.jsonl").exists(), process)
        family = descendants(process.pid)
        wait_until(lambda: len(reported_in(tmp_path / "bad_records.jsonl")) > 2, process)
        assert process.wait(PROMPT) not in (0, None)
        assert all(is_gone(pid) for pid in family)
    names = reported_in(tmp_path / "bad_records.jsonl")
    assert f"{len(names)} of 180 records cannot be read, more than data.max_bad_fraction 0.015" in said(tmp_path)
    assert sum(name in said(tmp_path).split("the first:")[1] for name in names) == 3


# ---- 3. processes that are killed -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    with started(good, output) as process:
        assert process.wait(120) == 0, said(output)
    return output


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of good files and of one bad one."""
    return encode_list(tmp_path_factory.mktemp("good"), 16, bad="3.mp4 3")


@pytest.mark.faults
@pytest.mark.parametrize(("start_method", "ranks"), [("fork", 1), ("forkserver", 1), ("fork", 2)])
def test_a_killed_worker_ends_the_run(
    start_method: str, ranks: int, good: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """With an error that says what to do, and a checkpoint; resumed, the run ends with the undisturbed one's weights.

    No other checkpoint is written before the end, so the step that is resumed from is the last that was done.
    """
    edits = (f"--data.start_method={start_method}", "--train.save_every=99")
    edits += ("--train.batch_size=1",) if ranks == 2 else ("--train.accumulate=1",)
    with started(good, tmp_path, *edits, ranks=ranks) as process:
        wait_until(lambda: (tmp_path / "log.jsonl").exists() and len(log(tmp_path)) >= 5, process)
        victim = max(workers_of(process.pid))
        os.kill(victim, signal.SIGKILL)
        assert process.wait(PROMPT) not in (0, None)
    steps = [line["step"] for line in log(tmp_path)]
    assert f"error: loading process {victim} (worker" in said(tmp_path)
    assert "was ended by SIGKILL: the system does this when memory runs out; set fewer data.workers" in said(tmp_path)
    assert f"The state after step {steps[-1]} is saved; the same command resumes from there" in said(tmp_path)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == [f"step_{steps[-1]:08d}"]
    with started(good, tmp_path, *edits, ranks=ranks) as process:
        assert process.wait(120) == 0, said(tmp_path)
    assert f"resumes from step {steps[-1]}" in said(tmp_path)
    losses, theirs = ([line["loss"] for line in log(output)] for output in (tmp_path, undisturbed))
    assert len(losses) == len(theirs)
    if ranks == 1:
        assert losses == theirs
        ours, theirs = model_of(tmp_path), model_of(undisturbed)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert reported_in(tmp_path / "bad_records.jsonl") == ["3.mp4"]


@pytest.mark.faults
@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_worker_that_dies_is_an_error_of_the_loader(start_method: str, good: Path) -> None:
    """Not one that is raised wherever the main process happens to be: only where it asks for a batch."""
    batches = ResumableBatchSampler(16, BatchPlan(1), 0, 0, 160)
    loaded = iter_batches(data(good, "list"), batches, 2, start_method=start_method)
    next(loaded)
    victim = max(workers_of(os.getpid()))
    os.kill(victim, signal.SIGBUS)
    end = time.monotonic() + 1
    while time.monotonic() < end:  # PyTorch's own signal handler would raise here
        time.sleep(0.01)
    with pytest.raises(LoaderError, match=rf"process {victim} \(worker \d of 2\) was ended by SIGBUS: .*--shm-size"):
        list(loaded)
    assert not workers_of(os.getpid())


@pytest.mark.faults
def test_a_killed_decoding_process_costs_one_record(good: Path, tmp_path: Path) -> None:
    """All of them are killed while one waits for a file that never comes; the others are idle by then."""
    folder = tmp_path / "videos"
    folder.mkdir()
    os.mkfifo(folder / "fifo.mp4")
    names = [*(str(good / f"{i}.mp4") for i in range(4, 16)), "fifo.mp4", *(str(good / f"{i}.mp4") for i in range(3))]
    (folder / "list.txt").write_text("\n".join(names))
    output = tmp_path / "run"
    with started(folder, output, "--data.decode_timeout=100", "--train.epochs=1") as process:
        wait_until(lambda: (output / "log.jsonl").exists(), process)
        done, since = -1, time.monotonic()
        while time.monotonic() - since < 3:  # until the run stands still
            if len(log(output)) != done:
                done, since = len(log(output)), time.monotonic()
            assert process.poll() is None
            time.sleep(0.1)
        for pid in decoding(descendants(process.pid)):
            os.kill(pid, signal.SIGKILL)
        assert process.wait(PROMPT) == 0, said(output)
    assert reported_in(output / "bad_records.jsonl") == ["fifo.mp4"]
    assert "the reader process was ended by SIGKILL (out of memory?)" in (output / "bad_records.jsonl").read_text()


@pytest.mark.faults
@pytest.mark.parametrize("start_method", START_METHODS)
def test_nothing_outlives_a_killed_run(start_method: str, folder: Path, tmp_path: Path) -> None:
    """One decoding process hangs at that moment or soon."""
    edits = (f"--data.start_method={start_method}", "--data.workers=2")
    with started(folder, tmp_path, *edits) as process:
        wait_until(lambda: (tmp_path / "log.jsonl").exists() and len(log(tmp_path)) >= 3, process)
        family = descendants(process.pid)
        assert len(workers_of(process.pid)) == 2
        process.kill()
        process.wait(PROMPT)
        assert all(is_gone(pid, PROMPT) for pid in family)


# ---- 4. ends of a run -----------------------------------------------------------------------------------------------

ENDS = ["success", "error", "SIGTERM to the main process", "Ctrl-C"]
WAYS = [(end, "fork", workers) for end in ENDS for workers in (0, 1, 2)]
WAYS += [(end, start_method, workers) for start_method in START_METHODS[1:] for end in ENDS for workers in (1, 2)]
QUICK = {("success", "spawn", 1), ("error", "forkserver", 1), ("Ctrl-C", "forkserver", 1), ("Ctrl-C", "fork", 0)}
QUICK |= {("SIGTERM to the main process", "spawn", 1), ("SIGTERM to the main process", "fork", 2)}


@pytest.mark.parametrize(
    ("end", "start_method", "workers"),
    [pytest.param(*way, marks=pytest.mark.faults if way in QUICK else pytest.mark.slow) for way in WAYS],
)
def test_a_run_ends_at_once(
    end: str, start_method: str, workers: int, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    edits = {"success": "--train.epochs=0.75", "error": "--data.max_bad_fraction=0"}
    options = (edits.get(end, "--train.epochs=99"), f"--data.start_method={start_method}", f"--data.workers={workers}")
    with started(good, tmp_path, *options) as process:
        wait_until(lambda: (tmp_path / "log.jsonl").exists() and (len(log(tmp_path)) >= 3 or end == "error"), process)
        family = descendants(process.pid)
        if end == "Ctrl-C":  # a terminal sends it to all
            os.killpg(process.pid, signal.SIGINT)
        elif end == "error":
            wait_until(lambda: (tmp_path / "bad_records.jsonl").exists(), process)
        elif end == "success":
            wait_until(lambda: len(log(tmp_path)) == 6, process)
        else:
            process.terminate()
        asked = time.monotonic()
        code = process.wait(PROMPT)
        with capsys.disabled():
            print(f"\n  {end}, {start_method}, {workers} workers: ended in {time.monotonic() - asked:.1f} s", end="")
        assert (code == 0) == (end != "error"), said(tmp_path)
        assert all(is_gone(pid) for pid in family)
    assert ("more than data.max_bad_fraction" in said(tmp_path)) == (end == "error")
    assert ("stopped by a signal after step" in said(tmp_path)) == (end not in edits)


@pytest.mark.faults
@pytest.mark.parametrize(("start_method", "ending"), [("forkserver", ""), ("fork", "raise KeyError")])
def test_a_program_that_closes_nothing_ends(start_method: str, ending: str, good: Path, tmp_path: Path) -> None:
    """A loader that is not closed, or that a traceback holds, does not keep the program; nor does a hanging reader."""
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "list.txt").write_text(f"{good / '1.mp4'}\n" * 15 + "fifo.mp4")
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from pathlib import Path\n"
        "from test_faults import *\n"
        "if __name__ == '__main__':\n"
        f"    mine = data(Path({str(tmp_path)!r}), 'list', reader=ReaderProcess('pyav', 100))\n"
        "    batches = ResumableBatchSampler(16, BatchPlan(1), 0, 0, 160)\n"
        f"    loaded = iter_batches(mine, batches, 2, start_method={start_method!r})\n"
        "    print(next(loaded).records, flush=True)\n"
        f"    {ending}\n"
    )
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert result.stdout.startswith("tensor")
    assert (result.returncode, "KeyError" in result.stderr) == ((1, True) if ending else (0, False))


# ---- 5. memory ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_and_files_stay_flat(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """20,000 clips from two workers, with bad files and a reader that hangs in every epoch; the clips of `make demo`
    where there are some. Growth after the first 4,000 is less than 15 MB a process."""
    demo = Path(__file__).parent.parent / "runs" / "demo" / "data"
    if (demo / "train.txt").exists():
        rows = [f"{demo}/{row}" for row in (demo / "train.txt").read_text().splitlines()]
    else:
        rows = [f"{folder}/good {i % 10}.{'mp4' if i % 10 < 7 else 'webm'} {i}" for i in range(320)]
    faults = [name for name in REPORTED if name != "no permission.mp4"] + ["cut at 60%.webm"]
    (tmp_path / "list.txt").write_text("\n".join([*rows, *(f"{folder / name} 0" for name in faults)]))
    draw_mask = partial(masking.draw, "tube", (8, 4, 4), 0.75, None)
    mixed = data(tmp_path, "list", sampling=Sampling("dense", 16, 2), size=(64, 64), draw_mask=draw_mask)
    batches = ResumableBatchSampler(len(mixed), BatchPlan(10), seed=0, first_step=0, last_step=2000)
    table = []
    for step, batch in enumerate(iter_batches(mixed, batches, 2), start=1):
        assert len(batch.clips) == 10
        if step % 50 == 0:
            workers = workers_of(os.getpid())
            groups = [os.getpid()], sorted(workers), sorted(decoding(descendants(os.getpid())))
            table.append((10 * step, *(part for group in groups for part in _resident_and_files(group))))
    with capsys.disabled():
        print("\n\n  clips |  main MB files | workers MB files | decoders MB files (the largest of each)")
        for row in table:
            print("  {:5} | {:8.1f} {:5} | {:10.1f} {:5} | {:11.1f} {:5}".format(*row))
    warm = next(row for row in table if row[0] == 4000)
    for place in (1, 3, 5):
        assert statistics.median(row[place] for row in table[-10:]) - warm[place] < 15
        assert max(row[place + 1] for row in table[-10:]) - warm[place + 1] <= 8  # batches on their way


def _resident_and_files(pids: list[int]) -> tuple[float, int]:
    """Megabytes and open files of the largest process; one may end while it is looked at."""
    memory, files = 0.0, 0
    for pid in pids:
        with contextlib.suppress(OSError):
            memory = max(
                memory, int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
            )
            files = max(files, len(os.listdir(f"/proc/{pid}/fd")))
    return memory, files


# ---- runs and processes ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(videos: Path, output: Path, *edits: str, ranks: int = 1) -> Iterator[subprocess.Popen]:
    """A run that was just started; what it writes goes to a file beside its folder. All of it is gone at the end."""
    output.mkdir(parents=True, exist_ok=True)
    options = (f"--data.decode_timeout={TIMEOUT:g}", *edits)
    with open(output / "said.txt", "a") as file:
        process = subprocess.Popen(
            command(videos, output, *options, processes=ranks),
            env=ENVIRONMENT,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=_permissions_bind,
        )
    try:
        yield process
    finally:
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def said(output: Path) -> str:
    return (output / "said.txt").read_text()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None or condition(), f"the run ended with exit code {process.poll()}"
        assert time.monotonic() < end
        time.sleep(0.02)


def reported_in(path: Path) -> list[str]:
    """The names of the files in a bad_records.jsonl, once for each line."""
    return sorted(Path(json.loads(line)["path"]).name for line in path.read_text().splitlines())


def reported_of(permissions_bind: bool) -> list[str]:
    return sorted(name for name in REPORTED if name != "no permission.mp4" or permissions_bind)


def descendants(pid: int) -> set[int]:
    found = set()
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, children.read_text().split()):
                found |= {child} | descendants(child)
    return found


def decoding(pids: set[int]) -> set[int]:
    """Those of them that are decoding processes."""
    return {pid for pid in pids if "video_convmae.data.decoding.process" in _read(pid, "cmdline")}


def workers_of(pid: int) -> set[int]:
    """The loading processes of a run: those that have a decoding process."""
    parents = {int(_read(child, "stat").rsplit(")", 1)[-1].split()[1]) for child in decoding(descendants(pid))}
    return parents - {pid}


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return "() ? 0" if name == "stat" else ""
