"""Submit a run to Slurm, on one node or many; with --cluster local the same job runs here, without Slurm.

    python tools/submit.py --nodes 4 --gpus-per-node 8 --time 24:00:00 -- tools/pretrain.py --config ... --output DIR
    python tools/submit.py --cluster local --gpus-per-node 2 -- tools/pretrain.py --config ... --output DIR

One task a node starts torchrun, and torchrun one process a GPU. A job that is preempted or reaches its time limit saves
a checkpoint, leaves and is queued again, and the same command goes on with the run, as it always does. With --cluster
local this command waits for the end, and ends with 1 where the job failed; Ctrl-C lets the run save and leave.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

try:
    import submitit
except ImportError as error:
    raise SystemExit('tools/submit.py needs submitit: pip install -e ".[slurm]" -c constraints.txt') from error

# What submitit has Slurm send before the end: USR2, or what SUBMITIT_PREEMPT_SIGNAL names.
LEAVE = getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}")
MARGIN = 20  # seconds of the grace that stay for torchrun to end and for Slurm to queue the job again
PORTS = 10_000  # the rendezvous' port is 20000 + job id % PORTS, below the ports that Linux gives to clients (32768)


@dataclass
class Launch:
    """What each node's task does: run torchrun with the script, and when the job has to leave, have it save and leave.

    submitit pickles it at submission, calls it in each task, and calls `checkpoint` in the first task's handler of
    LEAVE. Slurm's signals reach every process of a job, torchrun and its workers too (slurmstepd's proctrack_g_signal;
    seen with 22.05). So those ignore LEAVE, and Slurm's SIGTERM is not passed on to torchrun a second time.

    script: the script and its arguments.
    nodes, processes: how many nodes, and processes on each.
    restarts: times that torchrun starts the processes again after one failed.
    grace: seconds between LEAVE and the end.
    devices: CUDA_VISIBLE_DEVICES for the processes; None: as the cluster sets it.
    """

    script: tuple[str, ...]
    nodes: int
    processes: int
    restarts: int
    grace: int
    devices: str | None = None
    _torchrun: subprocess.Popen | None = field(default=None, init=False, repr=False)
    _is_told: bool = field(default=False, init=False, repr=False)
    _is_terminated: bool = field(default=False, init=False, repr=False)

    def command(self, job_id: str, first_node: str = "FIRST_NODE", is_first: bool = True) -> list[str]:
        """torchrun's command line.

        Args:
            job_id: the scheduler's.
            first_node: name of the node where the rendezvous' store lives; not needed for a single node.
            is_first: whether this is that node. Left to itself torchrun compares host names, which fails for aliases.
        """
        command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={self.nodes}"]
        command += [f"--nproc-per-node={self.processes}", f"--max-restarts={self.restarts}"]
        if self.nodes == 1:
            return [*command, "--standalone", *self.script]
        port = 20_000 + int(re.sub(r"\D", "", job_id)) % PORTS
        command += ["--rdzv-backend=c10d", f"--rdzv-id={job_id}", f"--rdzv-endpoint={first_node}:{port}"]
        return [*command, f"--rdzv-conf=is_host={int(is_first)}", *self.script]

    def __call__(self) -> None:
        """Run torchrun to its end.

        Raises:
            RuntimeError: it failed, or was told to stop and the job is not to be queued again.
        """
        job = submitit.JobEnvironment()
        command = self.command(job.job_id, job.hostnames[0], job.node == 0)
        print(f"node {job.node} of {self.nodes}, {job.hostname}: {shlex.join(command)}", flush=True)
        on_slurm = job.cluster == "slurm"

        def stop(*_: object) -> None:
            self._is_terminated = True
            self._is_told = self._is_told or on_slurm
            self._tell()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        self._torchrun = subprocess.Popen(
            command, env=self._environment(), start_new_session=True, preexec_fn=_ignore_leave
        )
        code = self._wait()
        if self._is_terminated and on_slurm and is_running(job.job_id):
            # Preempted by SIGTERM alone. A job that then ends by itself is not queued again (seen with 22.05: Slurm
            # counts it as completed), so do as if LEAVE had been sent.
            signal.raise_signal(LEAVE)
            while True:  # not the first task: it queues the job again, which ends this one
                time.sleep(1)
        if code:
            reason = "was told to stop" if self._is_terminated else "failed"
            raise RuntimeError(f"torchrun {reason} (exit code {code}); the same command goes on with the run")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Have the run save and leave; returns what is queued again. submitit calls it in a signal's handler."""
        self._tell()
        self._wait()
        return submitit.helpers.DelayedSubmission(replace(self))

    def _environment(self) -> dict[str, str]:
        # How long torchrun waits for its processes after SIGTERM before it kills them; 30 s otherwise.
        environment = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.grace - MARGIN)}
        return environment if self.devices is None else environment | {"CUDA_VISIBLE_DEVICES": self.devices}

    def _tell(self) -> None:
        """Send torchrun one SIGTERM, which it passes on; more would break into its wait for the processes."""
        if self._torchrun is not None and not self._is_told:
            self._is_told = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._torchrun.pid, signal.SIGTERM)

    def _wait(self) -> int | None:
        """torchrun's exit code. Not by Popen.wait: it holds a lock, and `checkpoint` may interrupt it and wait too."""
        if self._torchrun is None:
            return None
        with contextlib.suppress(ChildProcessError):  # ended and taken in the call that was interrupted
            _, status = os.waitpid(self._torchrun.pid, 0)
            self._torchrun.returncode = os.waitstatus_to_exitcode(status)
        return self._torchrun.returncode


def _ignore_leave() -> None:
    signal.signal(LEAVE, signal.SIG_IGN)  # what is ignored stays so in the programs that are started


def is_running(job_id: str) -> bool:
    """Whether Slurm counts a job as running: a preempted one yes, one that scancel ends no."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return answer.stdout.strip() == "RUNNING"


def minutes(text: str) -> int:
    """Slurm's forms of a time, in minutes, rounded up: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises:
        argparse.ArgumentTypeError: the text is none of them, or no time at all.
    """
    days, dash, rest = text.rpartition("-")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        raise argparse.ArgumentTypeError(f"time is {text!r}; expected minutes, 24:00:00 or 2-12:00:00")
    parts = [int(part) for part in rest.split(":")]
    if not dash:
        parts = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    hours, mins, seconds = [*parts, 0, 0][:3]
    total = ((int(days or 0) * 24 + hours) * 60 + mins) + -(-seconds // 60)
    if total == 0:
        raise argparse.ArgumentTypeError(f"time is {text!r}; expected at least a minute")
    return total


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, checked, and what stands behind "--": the script and its arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] -- SCRIPT [arguments]",
    )
    parser.add_argument("--cluster", default="slurm", choices=["slurm", "local"], help="local: this machine, no Slurm")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=0, help="0: on the CPU")
    parser.add_argument("--processes-per-node", type=int, help="default: one a GPU")
    parser.add_argument("--cpus-per-gpu", type=int, default=9, help="cores a process; default %(default)s: 8 load data")
    parser.add_argument("--mem", help="memory of a node, as sbatch takes it: 480G; 0 is all")
    parser.add_argument("--time", type=minutes, default="24:00:00", help="limit of a job, default %(default)s")
    parser.add_argument("--partition")
    parser.add_argument("--name", default="video-convmae")
    parser.add_argument("--logs", type=Path, default=Path("runs/jobs"), help="folder that every node sees, for logs")
    parser.add_argument(
        "--grace", type=int, default=300, help="seconds before the limit at which the run saves (default %(default)s)"
    )
    parser.add_argument(
        "--requeues", type=int, default=100, help="time limits after which the job is queued again (%(default)s)"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=3, help="new starts in a job after a process failed (default %(default)s)"
    )
    parser.add_argument(
        "--slurm", nargs="+", default=[], metavar="KEY[=VALUE]", help="more of sbatch's options: account=A exclusive"
    )
    arguments = list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    given, script = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
    for complaint in complaints(given, script):
        parser.error(complaint)
    return given, script


def complaints(given: argparse.Namespace, script: list[str]) -> list[str]:
    """What is wrong with a command line."""
    found = []
    if not script:
        found.append("no script; expected it behind --: submit.py --nodes 4 ... -- tools/pretrain.py --config ...")
    elif not Path(script[0]).is_file():
        found.append(f"{script[0]}: there is no such script; paths are relative to {Path.cwd()}")
    if given.nodes < 1 or (given.cluster == "local" and given.nodes > 1):
        found.append(f"--nodes is {given.nodes}; expected at least 1, and 1 with --cluster local")
    if given.gpus_per_node == 0 and not given.processes_per_node:
        found.append("--gpus-per-node is 0; give the GPUs of a node, or --processes-per-node to run on the CPU")
    if given.grace <= MARGIN or given.grace >= given.time * 60:
        found.append(f"--grace is {given.grace} s; expected more than {MARGIN} s and less than --time")
    return found


def build_executor(given: argparse.Namespace) -> submitit.LocalExecutor | submitit.SlurmExecutor:
    """submitit's executor with one task a node.

    Raises:
        RuntimeError: there is no Slurm on this machine.
    """
    shared = {"nodes": given.nodes, "signal_delay_s": given.grace}
    if given.cluster == "local":
        local = submitit.LocalExecutor(given.logs, max_num_timeout=given.requeues)
        local.update_parameters(timeout_min=given.time, gpus_per_node=given.gpus_per_node, tasks_per_node=1, **shared)
        return local
    slurm = submitit.SlurmExecutor(given.logs, max_num_timeout=given.requeues)
    cores = given.cpus_per_gpu * (given.processes_per_node or given.gpus_per_node)
    more = {"requeue": True} | ({"mem": given.mem} if given.mem else {})
    for option in given.slurm:
        key, is_set, value = option.partition("=")
        more[key] = value if is_set else True
    slurm.update_parameters(
        job_name=given.name,
        partition=given.partition,
        time=given.time,
        ntasks_per_node=1,
        gpus_per_node=given.gpus_per_node or None,
        cpus_per_task=cores,
        # Since 22.05 srun does not take the cores over from sbatch. Without the other, one failed node leaves the rest
        # waiting for it.
        srun_args=[f"--cpus-per-task={cores}", "--kill-on-bad-exit=1"],
        additional_parameters=more,
        **shared,
    )
    return slurm


def submit(given: argparse.Namespace, script: list[str]) -> submitit.Job:
    """Submit a job and say what it is."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES") if given.cluster == "local" and given.gpus_per_node else None
    processes = given.processes_per_node or given.gpus_per_node
    launch = Launch(tuple(script), given.nodes, processes, given.max_restarts, given.grace, devices)
    job = build_executor(given).submit(launch)
    where = "" if given.nodes == 1 else "on the first node, FIRST_NODE (is_host=0 on the others): "
    print(f"job {job.job_id}, logs {job.paths.folder}/{job.job_id}_*_log.out and .err")
    print(f"{where}{shlex.join(launch.command(job.job_id))}", flush=True)
    return job


def wait(job: submitit.LocalJob) -> int:
    """Wait for a local job; its exit code, 0 or 1. SIGTERM and Ctrl-C are passed on: the run saves and leaves."""

    def stop(*_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job.job_id), signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    error = job.exception()
    if error is None:
        print(f"job {job.job_id} ended")
        return 0
    lines = (job.stderr() or "").splitlines()
    print(
        f"job {job.job_id} did not end well; the last of {job.paths.stderr}:", *lines[-15:], sep="\n", file=sys.stderr
    )
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and submit; with --cluster local, wait for the end."""
    given, script = read(sys.argv[1:] if arguments is None else arguments)
    if given.cluster == "slurm":
        try:
            submit(given, script)
        except RuntimeError as error:
            raise SystemExit(f"{error} Without Slurm, --cluster local runs the job on this machine.") from error
        return 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for submitit's controller: Ctrl-C shall end the job in order
    return wait(submit(given, script))
