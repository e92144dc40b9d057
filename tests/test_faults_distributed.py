"""Machines, processes, links and disks that fail: what a run of several processes loses (nothing), and what it says.

Each test starts real runs under torchrun, as a user does. `make test-faults` prints what each did and found.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from states import load_state
from test_faults import descendants
from test_pretrain import ENVIRONMENT, command, log, model_of
from test_reader_process import is_gone

from video_convmae.engine import checkpoint
from video_convmae.engine.checkpoint import CheckpointError, Saver
from video_convmae.engine.distributed import Watchdog

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc, mounts, makes network namespaces"),
]
STEPS = 16
EDITS = ("--train.epochs=4", "--train.batch_size=2", "--train.save_every=0.25", "--data.workers=1")


class Run:
    """A run that was started under torchrun, in a process group of its own; what it says goes to a file."""

    def __init__(self, videos: Path, output: Path, *edits: str, torchrun: tuple[str, ...] = (), ranks: int = 2) -> None:
        program = command(videos, output, *EDITS, *edits)[1:]
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *(torchrun or ("--standalone",))]
        output.mkdir(parents=True, exist_ok=True)
        self.output = output
        self.said_before = len(self.said) if (output / "said.txt").exists() else 0
        with open(output / "said.txt", "a") as file:
            arguments = [sys.executable, *(launcher if ranks > 1 else []), *program]
            self.process = subprocess.Popen(
                arguments, env=ENVIRONMENT, stdout=file, stderr=file, start_new_session=True
            )

    @property
    def said(self) -> str:
        """All that it wrote."""
        return (self.output / "said.txt").read_text()

    def until(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        """Wait for something while it runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None or condition(), self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.02)

    def until_step(self, step: int) -> None:
        """Wait until a step is logged."""
        self.until(lambda: steps_in(self.output) >= step)

    def wait(self, seconds: float = 240) -> int:
        """Its exit code; torchrun's own is 1 whatever its workers' was."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s: {self.said}")

    def ranks(self) -> dict[int, int]:
        """Rank -> process, as each said in its own log when it began."""
        found = {}
        for path in sorted((self.output / "logs").glob("rank_*.jsonl")):
            begun = [line for line in map(json.loads, path.read_text().splitlines()) if "pid" in line]
            found[int(path.stem[-4:])] = begun[-1]["pid"]
        return found

    def kill(self) -> None:
        """All of it, at once."""
        family = [self.process.pid, *descendants(self.process.pid)]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        assert all(is_gone(pid, 20) for pid in family)


@contextlib.contextmanager
def started(*arguments: object, **options: object) -> Iterator[Run]:
    run = Run(*arguments, **options)
    try:
        yield run
    finally:
        run.kill()


def kill_after(videos: Path, output: Path, step: int) -> None:
    """Run until a step is logged and kill everything."""
    with started(videos, output) as run:
        run.until_step(step)
        run.kill()


def finish(videos: Path, output: Path, *edits: str, ranks: int = 2) -> None:
    """The same command again, to the end."""
    with started(videos, output, *edits, ranks=ranks) as run:
        assert run.wait() == 0, run.said


def steps_in(output: Path) -> int:
    with contextlib.suppress(OSError, json.JSONDecodeError, IndexError):
        return log(output)[-1]["step"]
    return 0


@pytest.fixture(scope="module")
def undisturbed(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two processes, which nothing happened to."""
    output = tmp_path_factory.mktemp("undisturbed")
    finish(videos, output)
    return output


def check_equal(output: Path, undisturbed: Path) -> None:
    """After a kill, the losses of several processes agree to 1e-5, as docs/pretraining.md says; the weights do too."""
    ours, theirs = log(output), log(undisturbed)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)
    ours, theirs = model_of(output), model_of(undisturbed)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


def tell(capsys: pytest.CaptureFixture, text: str) -> None:
    with capsys.disabled():
        print(f"\n  {text}", end="")


# ---- processes that are killed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_killed_rank_is_started_again(
    parallel: str, videos: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """SIGKILL of one worker at a random step: torchrun restarts all, and the run resumes from its newest checkpoint."""
    torchrun, step = ("--standalone", "--max-restarts=1"), random.Random(parallel).randint(3, 12)
    with started(videos, tmp_path, f"--train.parallel={parallel}", torchrun=torchrun) as run:
        run.until_step(step)
        rank = step % 2
        os.kill(run.ranks()[rank], signal.SIGKILL)
        assert run.wait() == 0, run.said
        begun = [line for line in run.said.splitlines() if line.startswith("resumes from step")]
    check_equal(tmp_path, undisturbed)
    tell(capsys, f"{parallel}: SIGKILL of rank {rank} after step {step} -> {begun[0].split(',')[0]}, losses equal")


def test_all_processes_are_killed(
    videos: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """SIGKILL of torchrun and all that it started; the same command resumes."""
    kill_after(videos, tmp_path, 6)
    finish(videos, tmp_path)
    check_equal(tmp_path, undisturbed)
    newest = [line for line in (tmp_path / "said.txt").read_text().splitlines() if "resumes from" in line]
    tell(capsys, f"SIGKILL of all after step 6 -> {newest[0].split(',')[0]}, losses equal")


def test_a_kill_while_a_checkpoint_is_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """At ten moments from its beginning to its end: the newest checkpoint is whole, only the last step is lost."""
    program = (
        "import sys, itertools, pathlib, torch\n"
        "from video_convmae.engine.checkpoint import Saver\n"
        "saver = Saver(pathlib.Path(sys.argv[1]), keep=2)\n"
        "for step in itertools.count(1):\n"
        "    tensors = {str(i): torch.full((1 << 20,), float(step)) for i in range(12)}\n"
        "    saver.save(step, {'model': tensors, 'config': {}})\n"
        "    saver.wait()\n"
        "    print(step, flush=True)\n"
    )
    seen = []
    for moment in range(10):
        folder = tmp_path / str(moment)
        arguments = [sys.executable, "-c", program, str(folder)]
        with subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            started_at = time.monotonic()
            process.stdout.readline()  # how long one takes
            taken = time.monotonic() - started_at
            while not list(folder.glob("*.partial")):
                time.sleep(0.0005)
            time.sleep(taken * moment / 10)
            process.kill()
            done = 2 + len(process.stdout.readlines())
        left = [path.name for path in folder.glob("*.partial/*")]
        newest, complaints = checkpoint.find_latest(folder)
        assert newest is not None
        state = load_state(newest.path)
        assert not complaints
        assert state["step"] >= done  # what was announced is there
        assert all((tensor == state["step"]).all() for tensor in state["model"].values())
        seen.append(f"{moment}/10: {'writing ' + str(left) if left else 'between two'}, newest whole {state['step']}")
        saver = Saver(folder, keep=1)  # the next attempt is not in the way of what was left
        saver.save(state["step"] + 1, {"model": {"0": torch.zeros(3)}})
        saver.wait()
        assert [path.name for path in checkpoint.list_checkpoints(folder)] == [f"step_{state['step'] + 1:08d}"]
    tell(capsys, "kill during a checkpoint write\n    " + "\n    ".join(seen))


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_a_run_and_it_goes_on(
    number: signal.Signals, videos: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """To torchrun, which passes it on: a checkpoint after the same step on all ranks, then the end.

    No other checkpoint is written, so the step that is gone on from is the one after which they stopped.
    """
    edits = ("--train.save_every=99",)
    torchrun = ("--standalone", "--signals-to-handle=SIGTERM,SIGUSR1")
    with started(videos, tmp_path, *edits, torchrun=torchrun) as run:
        run.until_step(5)
        asked = time.monotonic()
        run.process.send_signal(number)
        run.wait(60)
        seconds = time.monotonic() - asked
        last = steps_in(tmp_path)
        assert f"stopped by a signal after step {last}; the same command resumes from there" in run.said
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == [f"step_{last:08d}"]
    finish(videos, tmp_path, *edits)
    check_equal(tmp_path, undisturbed)
    tell(
        capsys, f"{number.name} to torchrun after step 5 -> stopped after step {last} in {seconds:.1f} s, losses equal"
    )


def test_a_signal_to_one_rank_stops_all(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As where each rank is a scheduler's own task: torchrun ends with success."""
    with started(videos, tmp_path) as run:
        run.until_step(4)
        os.kill(run.ranks()[1], signal.SIGUSR1)
        assert run.wait(60) == 0, run.said
        assert f"stopped by a signal after step {steps_in(tmp_path)}" in run.said
    tell(capsys, f"SIGUSR1 to rank 1 after step 4 -> both stopped after step {steps_in(tmp_path)}, exit code 0")


# ---- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many MB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(megabytes: int) -> Path:
        options = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(options, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs root")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def test_a_disk_fills_up_between_two_checkpoints(
    small_disk: Callable[[int], Path], videos: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A clear error, the last checkpoint whole; with room again the same command resumes."""
    output = small_disk(150) / "run"
    with started(videos, output, "--train.keep=1") as run:
        run.until_step(4)
        with open(output.parent / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
        os.truncate(output.parent / "ballast", max(0, (output.parent / "ballast").stat().st_size - (5 << 20)))
        assert run.wait() != 0
        said = next(line for line in run.said.splitlines() if "earlier checkpoints are whole" in line)
    kept, complaints = checkpoint.find_latest(output / "checkpoints")
    assert kept is not None
    assert not complaints
    (output.parent / "ballast").unlink()
    finish(videos, output, "--train.keep=1")
    check_equal(output, undisturbed)
    tell(capsys, f"full disk -> {said.strip()}; {kept.path.name} was whole")


def test_a_disk_fills_up_while_a_checkpoint_is_written(
    small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = small_disk(6)
    saver = Saver(folder)
    saver.save(1, {"model": {"w": torch.ones(1 << 18)}, "config": {}})
    saver.wait()
    plenty = shutil.disk_usage("/")._replace(free=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: plenty)  # another program takes the room meanwhile
    saver.save(2, {"model": {"w": torch.ones(1 << 21)}})
    with pytest.raises(CheckpointError, match="No space left on device") as error:
        saver.wait()
    kept, _ = checkpoint.find_latest(folder)
    assert kept is not None
    assert kept.path.name == "step_00000001"
    assert [path.name for path in folder.iterdir()] == ["step_00000001"]  # what was begun does not take room
    tell(capsys, f"disk full while writing -> {error.value}")


def test_a_damaged_newest_checkpoint_is_passed_over_by_a_run(
    videos: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    kill_after(videos, tmp_path, 8)
    newest = checkpoint.list_checkpoints(tmp_path / "checkpoints")[-1]
    file = next(newest.glob("shard-00002*.safetensors"))  # rank 1's
    os.truncate(file, file.stat().st_size - 100)
    finish(videos, tmp_path)
    said = (tmp_path / "said.txt").read_text()
    passed_over = next(line for line in said.splitlines() if line.startswith("skipped: "))
    assert str(newest) in passed_over
    assert f"resumes from step {checkpoint.step_of(newest) - 1}," in said
    check_equal(tmp_path, undisturbed)
    tell(capsys, passed_over.replace(f"{tmp_path}/", ""))


# ---- what hangs ------------------------------------------------------------------------------------------------------


def test_a_rank_that_hangs_is_named_and_the_run_goes_on(
    videos: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One process stands still; the other says within the stated time whom it waits for, and torchrun starts anew."""
    torchrun = ("--standalone", "--max-restarts=1")
    with started(videos, tmp_path, "--hang_timeout=15", torchrun=torchrun) as run:
        run.until_step(5)
        os.kill(run.ranks()[1], signal.SIGSTOP)
        asked = time.monotonic()
        run.until(lambda: "rank 0 of 2 has made no progress for" in run.said, 40)
        seconds = time.monotonic() - asked
        assert run.wait() == 0, run.said  # torchrun kills the process that stands still after 30 s
        lines = run.said.splitlines()
    place = next(number for number, line in enumerate(lines) if "rank 0 of 2 has made no progress" in line)
    said = lines[place : place + 3]
    assert "last heard of" in said[2]
    assert float(said[2].rsplit("last heard of ", 1)[1].split()[0]) >= 10  # it is rank 1 that was silent
    assert said[2].strip().startswith("rank 1: ")
    check_equal(tmp_path, undisturbed)
    tell(capsys, f"SIGSTOP of rank 1 -> after {seconds:.0f} s:\n    " + "\n    ".join(said))


@pytest.mark.parametrize("ranks", [1, 2])
def test_data_that_never_come_are_named(
    ranks: int, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A file that hangs for longer than the watchdog waits (data.decode_timeout is longer here): no silent hang."""
    folder = tmp_path / "videos"
    folder.mkdir()
    os.mkfifo(folder / "fifo.mp4")
    (folder / "list.txt").write_text("".join(f"{videos / f'{i}.mp4'}\n" for i in range(15)) + "fifo.mp4\n")
    output = tmp_path / "run"
    with started(folder, output, "--data.decode_timeout=1000", "--hang_timeout=10", ranks=ranks) as run:
        code = run.wait(120)
        family = descendants(run.process.pid)
        assert code == (Watchdog.EXIT_CODE if ranks == 1 else 1), run.said
    said = next(line for line in run.said.splitlines() if "has made no progress" in line)
    assert "(hang_timeout 10): waiting for the data of step" in run.said
    assert all(is_gone(pid, 20) for pid in family)
    tell(capsys, f"a hanging file, {ranks} rank(s) -> {said.strip()}")


def test_a_stopped_process_has_not_hung() -> None:
    """Ctrl-Z or a laptop that sleeps: the watchdog counts what it has waited, not what a clock says."""
    program = (
        "import time\nfrom video_convmae.engine.watchdog import Watchdog\nwith Watchdog(0, 1, SECONDS, ''):\n"
        "    print('watched', flush=True)\n    time.sleep(2)\n"
    )
    for seconds, expected in ((4, 0), (1, Watchdog.EXIT_CODE)):
        code = program.replace("SECONDS", str(seconds))
        with subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"watched\n"
            if expected == 0:
                process.send_signal(signal.SIGSTOP)
                time.sleep(6)
                process.send_signal(signal.SIGCONT)
            assert process.wait(30) == expected


# ---- two nodes -------------------------------------------------------------------------------------------------------


class Nodes:
    """Two network namespaces with a link between them: two hosts that share a file system."""

    def __init__(self) -> None:
        self.names = [f"vcm{os.getpid() % 10000}{letter}" for letter in "ab"]
        self.devices = [f"v{name}" for name in self.names]
        self.addresses = ["10.77.5.1", "10.77.5.2"]

    def __enter__(self) -> Nodes:
        for name in self.names:
            self._ip("netns", "add", name)
        self._ip("link", "add", self.devices[0], "type", "veth", "peer", "name", self.devices[1])
        for name, device, address in zip(self.names, self.devices, self.addresses):
            self._ip("link", "set", device, "netns", name)
            self._ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            self._ip("-n", name, "link", "set", device, "up")
            self._ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def cut(self) -> None:
        """The cable is pulled: packets are lost, and nobody is told."""
        self._ip("-n", self.names[1], "link", "set", self.devices[1], "down")

    def mend(self) -> None:
        """And plugged in again."""
        self._ip("-n", self.names[1], "link", "set", self.devices[1], "up")

    def start(self, node: int, videos: Path, output: Path, *edits: str) -> subprocess.Popen:
        """A node's torchrun, as docs/many_nodes.md says: the first node's address is the meeting point."""
        launcher = [
            *("ip", "netns", "exec", self.names[node], sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=test"),
            *(f"--rdzv-endpoint={self.addresses[0]}:29400", f"--local-addr={self.addresses[node]}"),
            f"--rdzv-conf=join_timeout=60,last_call_timeout=1,is_host={int(node == 0)}",
        ]
        output.mkdir(parents=True, exist_ok=True)
        environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": self.devices[node]}
        with open(output / f"node_{node}.txt", "a") as file:
            return subprocess.Popen(
                [*launcher, *command(videos, output, *EDITS, *edits)[1:]],
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2's `ip`")
    with Nodes() as nodes:
        yield nodes


@pytest.mark.parametrize(("seconds", "hang_timeout"), [(4, 60), (30, 12)])
def test_two_nodes_whose_link_is_cut(
    seconds: float,
    hang_timeout: float,
    nodes: Nodes,
    videos: Path,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """Train over a link, cut it, restore it, finish. A short cut costs time; a long one ends the processes, with a
    message on each node, and torchrun, or the same command once more, resumes."""
    edits = (f"--hang_timeout={hang_timeout}",)
    processes = [nodes.start(node, videos, tmp_path, *edits) for node in (0, 1)]
    attempts = 1
    try:
        _until(lambda: steps_in(tmp_path) >= 5, processes, tmp_path)
        nodes.cut()
        at_cut = steps_in(tmp_path)
        time.sleep(seconds)
        during = steps_in(tmp_path)
        nodes.mend()
        while True:
            codes = [process.wait(240) for process in processes]
            if codes == [0, 0]:
                break
            attempts += 1
            assert attempts <= 3, _said(tmp_path)
            processes = [nodes.start(node, videos, tmp_path, *edits) for node in (0, 1)]  # as a scheduler would
    finally:
        for process in processes:
            for pid in [process.pid, *descendants(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    check_equal(tmp_path, undisturbed)
    assert during <= at_cut + 1  # nothing is trained without the other node
    said = _said(tmp_path)
    resumed = [line.split(",")[0] for line in said.splitlines() if line.startswith("resumes from")]
    if seconds > hang_timeout:
        for node in (0, 1):
            assert f"rank {node} of 2 has made no progress for" in said
    else:
        assert (attempts, resumed) == (1, [])
    tell(
        capsys,
        f"link cut for {seconds} s after step {at_cut}, hang_timeout {hang_timeout}: "
        f"{attempts} start(s), {resumed or 'no restart'}, losses equal",
    )


def _until(condition: Callable[[], bool], processes: list[subprocess.Popen], output: Path) -> None:
    end = time.monotonic() + 180
    while not condition():
        assert all(process.poll() is None for process in processes), _said(output)
        assert time.monotonic() < end, _said(output)
        time.sleep(0.02)


def _said(output: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(output.glob("node_*.txt")))
