"""`video-convmae submit`: its requests to Slurm, and local jobs: run to the end, preempted and queued again."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_pretrain import ENVIRONMENT, ROOT, command, log

pytest.importorskip("submitit", reason='submitit is not installed: pip install -e ".[slurm]"')

import submitit

from video_convmae.cli.submit import PREEMPTION, Launch, build_executor, main, minutes, parse_options
from video_convmae.errors import UserError

SCRIPT = str(ROOT / "tools" / "pretrain.py")
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in Linux's /proc")


# ---- what is asked of Slurm and of torchrun -------------------------------------------------------------------------


def sbatch_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str) -> list[str]:
    """The lines of the file that sbatch would get."""
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))  # as if srun were here
    options, _ = parse_options([*options, f"--logs={tmp_path}", "--", SCRIPT])
    return build_executor(options)._make_submission_file_text("COMMAND", "uid").splitlines()


def test_the_sbatch_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shape = ["--nodes=4", "--gpus-per-node=8", "--cpus-per-gpu=12", "--mem=900G", "--time=1-12:00:00", "--grace=400"]
    where = ["--partition=gpu", "--name=k400", "--slurm", "account=vision", "exclusive"]
    lines = sbatch_lines(monkeypatch, tmp_path, *shape, *where)
    expected = {
        *("nodes=4", "ntasks-per-node=1", "gpus-per-node=8", "cpus-per-task=96", "mem=900G", "time=2160"),
        *("partition=gpu", "job-name=k400", "account=vision", "exclusive"),
        *("signal=USR2@400", "requeue", "open-mode=append"),
    }
    assert expected <= {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    (srun,) = (shlex.split(line) for line in lines if line.startswith("srun"))
    assert {"--cpus-per-task=96", "--kill-on-bad-exit=1"} <= set(srun)


def test_the_sbatch_file_of_a_job_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = sbatch_lines(monkeypatch, tmp_path, "--processes-per-node=3", "--cpus-per-gpu=2")
    assert "#SBATCH --cpus-per-task=6" in lines
    assert not [line for line in lines if "gpus" in line or "mem" in line]


def test_torchruns_command() -> None:
    one = Launch((SCRIPT, "--output=x"), nodes=1, processes=8, restarts=3, grace=300)
    assert one.command("5")[1:] == [
        *("-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=8", "--max-restarts=3", "--standalone"),
        *(SCRIPT, "--output=x"),
    ]
    four = Launch((SCRIPT,), nodes=4, processes=8, restarts=0, grace=300)
    assert four.command("1234567", "node17", is_first=False)[3:] == [
        *("--nnodes=4", "--nproc-per-node=8", "--max-restarts=0", "--rdzv-backend=c10d", "--rdzv-id=1234567"),
        *("--rdzv-endpoint=node17:24567", "--rdzv-conf=is_host=0", SCRIPT),
    ]


def test_a_command_runs_as_a_module_and_a_script_as_a_file() -> None:
    _, command = parse_options(["--gpus-per-node=8", "--", "pretrain", "--config", "debug/pretrain"])
    assert command == ["-m", "video_convmae", "pretrain", "--config", "debug/pretrain"]
    assert parse_options(["--gpus-per-node=8", "--", SCRIPT, "--x"])[1] == [SCRIPT, "--x"]
    launch = Launch(tuple(command), nodes=1, processes=8, restarts=0, grace=300)
    assert launch.command("5")[-6:] == ["--standalone", *command]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("1:30", 2), ("24:00:00", 1440), ("0:0:1", 1), ("2-12", 3600), ("1-0:5", 1445), ("1-0:0:30", 1441)],
)
def test_times_are_slurms(text: str, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "0", "1-"])
def test_no_times(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        minutes(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus-per-node=8"], "no command; expected it after --"),
        (["--gpus-per-node=8", "--", "tools/pretrian.py"], "tools/pretrian.py: no such command, and no such script"),
        (["--cluster=local", "--nodes=2", "--gpus-per-node=1", "--", SCRIPT], "--nodes is 2; expected"),
        (["--", SCRIPT], "--gpus-per-node is 0; give"),
        (["--gpus-per-node=8", "--time=5", "--", SCRIPT], "--grace is 300 s; expected"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_options(arguments)
    assert message in capsys.readouterr().err


def test_no_slurm_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--cluster local"):
        main(["--gpus-per-node=8", f"--logs={tmp_path}", "--", SCRIPT])


# ---- jobs that run ---------------------------------------------------------------------------------------------------


def family(process: int) -> list[int]:
    """A process and all that it started, each before its own."""
    found = [process]
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        found += [one for child in children.read_text().split() for one in family(int(child))]
    return found


def wait_until(condition: Callable[[], bool], processes: list[subprocess.Popen], seconds: float = 120) -> None:
    """Wait while the processes run; a condition or an end that does not come fails the test."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def has_steps(output: Path, number: int) -> Callable[[], bool]:
    return lambda: (output / "log.jsonl").exists() and len(log(output)) >= number


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a process; what it leaves behind is killed at the end."""
    started: list[subprocess.Popen] = []

    def start(*arguments: object, **options: object) -> subprocess.Popen:
        started.append(subprocess.Popen(*arguments, text=True, **options))
        return started[-1]

    yield start
    for process in started:
        for one in family(process.pid) if process.poll() is None else []:
            os.kill(one, signal.SIGKILL)
        process.wait(10)


def local(videos: Path, folder: Path, *edits: str) -> list[str]:
    """submit.py's command line for the debug run on two CPU processes."""
    submit = [sys.executable, str(ROOT / "tools" / "submit.py"), "--cluster=local", "--processes-per-node=2"]
    _, *script = command(videos, folder / "run", *edits)
    return [*submit, f"--logs={folder / 'logs'}", "--max-restarts=0", "--", *script]


def test_a_local_job_runs_to_its_end(videos: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        local(videos, tmp_path, "--train.epochs=1"), env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    job, torchrun, end = done.stdout.splitlines()
    number = job.split()[1].rstrip(",")
    assert f"{tmp_path / 'logs'}/{number}" in job
    assert torchrun in (tmp_path / "logs" / f"{number}_0_log.out").read_text()
    assert end == f"job {number} ended"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["step"] == 4


def test_a_local_job_that_fails(videos: Path, tmp_path: Path) -> None:
    arguments = local(videos, tmp_path, "--train.epoch_count=1")
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if "video-convmae submit: error: job" in line]
    assert re.search(r"failed: video-convmae \w+: error: there is no field train\.epoch_count", error)
    assert str(tmp_path / "logs") in error


@needs_proc
@pytest.mark.faults
def test_a_local_job_is_preempted_and_goes_on(videos: Path, tmp_path: Path, start: Callable) -> None:
    """The signal goes to every process of the job, as Slurm sends it."""
    job = start(local(videos, tmp_path, "--train.epochs=6"), env=ENVIRONMENT, stdout=subprocess.PIPE)
    controller = int(job.stdout.readline().split()[1].rstrip(","))
    wait_until(has_steps(tmp_path / "run", 3), [job])
    for process in family(controller)[1:]:
        os.kill(process, PREEMPTION)
    assert job.wait(300) == 0
    output = (tmp_path / "logs" / f"{controller}_0_log.out").read_text()
    assert output.count("stopped by a signal after step") == 1
    assert output.count("resumes from step") == 1
    assert [line["step"] for line in log(tmp_path / "run")] == list(range(1, 25))


@needs_proc
@pytest.mark.faults
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_local_job_that_is_stopped_saves(
    ending: signal.Signals,
    videos: Path,
    tmp_path: Path,
    start: Callable,
) -> None:
    """SIGTERM to submit.py, or Ctrl-C, which its whole group gets; the job is not started again."""
    arguments = local(videos, tmp_path, "--train.epochs=100")
    job = start(arguments, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    controller = int(job.stdout.readline().split()[1].rstrip(","))
    wait_until(has_steps(tmp_path / "run", 3), [job])
    (os.killpg if ending == signal.SIGINT else os.kill)(job.pid, ending)
    assert job.wait(60) == 1
    assert "torchrun was stopped" in job.stderr.read()
    assert "stopped by a signal after step" in (tmp_path / "logs" / f"{controller}_0_log.out").read_text()


class Slurm:
    """Stands in for Slurm, with two nodes that are both this machine: its variables, and its commands as scripts.

    scontrol notes what it is asked; squeue says what `state` is.
    """

    def __init__(self, folder: Path, start: Callable, launch: Launch) -> None:
        self._folder, self._start = folder, start
        self._job = str(os.getpid())  # and so the rendezvous' port: another session's test may run beside
        self.requeues, self.state = folder / "requeues", folder / "state"
        self.state.write_text("RUNNING\n")
        for name, line in (("scontrol", f'echo "$@" >> "{self.requeues}"'), ("squeue", f'cat "{self.state}"')):
            (folder / name).write_text(f"#!/bin/sh\n{line}\n")
            (folder / name).chmod(0o755)
        submission = submitit.helpers.DelayedSubmission(launch)
        submission.set_timeout(60, 3)
        submission.dump(folder / f"{self._job}_submitted.pkl")

    @property
    def is_requeued(self) -> bool:
        return self.requeues.exists() and self.requeues.read_text() == f"requeue {self._job}\n"

    def run(self) -> list[subprocess.Popen]:
        """Start the job's tasks, one a node."""
        return [self._task(node) for node in range(2)]

    def _task(self, node: int) -> subprocess.Popen:
        variables = {"JOB_ID": self._job, "JOB_NUM_NODES": 2, "NTASKS": 2, "NODEID": node, "PROCID": node, "LOCALID": 0}
        environment = ENVIRONMENT | {f"SLURM_{name}": str(value) for name, value in variables.items()}
        environment |= {"SLURM_JOB_NODELIST": "localhost,localhost", "SUBMITIT_EXECUTOR": "slurm"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
        environment["PATH"] = os.pathsep.join([str(self._folder), environment["PATH"]])
        with (self._folder / f"log_{node}").open("a") as file:
            arguments = [sys.executable, "-u", "-m", "submitit.core._submit", str(self._folder)]
            return self._start(arguments, env=environment, stdout=file, stderr=subprocess.STDOUT)


def signal_all(tasks: list[subprocess.Popen], number: signal.Signals) -> None:
    for process in [one for task in tasks if task.poll() is None for one in family(task.pid)]:
        os.kill(process, number)


@needs_proc
@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "state"), [(PREEMPTION, "RUNNING"), (signal.SIGTERM, "RUNNING"), (signal.SIGTERM, "COMPLETING")]
)
def test_a_job_on_two_nodes_saves_and_is_queued_again_unless_it_was_cancelled(
    number: signal.Signals,
    state: str,
    videos: Path,
    tmp_path: Path,
    start: Callable,
) -> None:
    """Preempted with the signal that was asked for, preempted by SIGTERM alone, ended by scancel; then run again."""
    output = tmp_path / "run"
    _, *script = command(videos, output, "--train.epochs=3", "--train.batch_size=1", "--data.workers=1")
    slurm = Slurm(tmp_path, start, Launch(tuple(script), nodes=2, processes=1, restarts=0, grace=120))
    tasks = slurm.run()
    wait_until(has_steps(output, 3), tasks)
    slurm.state.write_text(f"{state}\n")
    signal_all(tasks, number)
    assert tasks[0].wait(60) != 0
    assert slurm.is_requeued == (state == "RUNNING")
    stopped = len(log(output))
    assert stopped < 24
    signal_all(tasks, signal.SIGKILL)  # as Slurm does to what is left
    assert [task.wait(60) for task in slurm.run()] == [0, 0]
    assert f"resumes from step {stopped}" in "".join((tmp_path / f"log_{node}").read_text() for node in range(2))
    assert [line["step"] for line in log(output)] == list(range(1, 25))
