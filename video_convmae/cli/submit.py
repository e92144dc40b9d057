"""Submit a run to Slurm, on one node or many; with --cluster local the same job runs on this machine, without Slurm.

    video-convmae submit --nodes 4 --gpus-per-node 8 --time 24:00:00 -- pretrain --config ... --output DIR
    video-convmae submit --cluster local --gpus-per-node 2 -- pretrain --config ... --output DIR

The options are followed by -- and a command of video-convmae, or a script, with its arguments. One task a node starts
torchrun, and torchrun one process a GPU. A job that is preempted or reaches its time limit saves a checkpoint, exits
and is queued again; the run then resumes. With --cluster local this command waits for the job and exits with 1 if it
failed; after Ctrl-C the run saves and exits.
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
from typing import TYPE_CHECKING

from video_convmae.cli import COMMANDS
from video_convmae.cli.parser import CommandLine, within
from video_convmae.errors import UserError

if TYPE_CHECKING:  # an optional dependency, imported where it is used: --help works without it
    import submitit

# Signal that submitit has Slurm send before the time limit, read from the same variable.
PREEMPTION = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}")
MARGIN = 20  # seconds of the grace period kept for torchrun to end and for Slurm to queue the job again
PORTS = 10_000  # the rendezvous' port is 20000 + job id % PORTS, below the ports that Linux gives to clients (32768)


@dataclass
class Launch:
    """Task of each node: run torchrun, and stop it in time for the run to save when the job is preempted.

    submitit pickles it at submission, calls it in each task, and calls `checkpoint` in the first task's handler of
    PREEMPTION. Slurm's signals reach every process of a job, torchrun and its workers too (slurmstepd's
    proctrack_g_signal; seen with 22.05). So those ignore PREEMPTION, and Slurm's SIGTERM is not passed on to torchrun
    a second time.

    script: arguments of torchrun after its own: a script or `-m video_convmae COMMAND`, and the arguments of that.
    nodes, processes: number of nodes, and of processes on each.
    restarts: times that torchrun starts the processes again after one failed.
    grace: seconds between PREEMPTION and the end of the job.
    devices: CUDA_VISIBLE_DEVICES of the processes; None: as the cluster sets it.
    """

    script: tuple[str, ...]
    nodes: int
    processes: int
    restarts: int
    grace: int
    devices: str | None = None
    _torchrun: subprocess.Popen | None = field(default=None, init=False, repr=False)
    _is_stopping: bool = field(default=False, init=False, repr=False)
    _is_terminated: bool = field(default=False, init=False, repr=False)

    def command(self, job_id: str, first_node: str = "FIRST_NODE", is_first: bool = True) -> list[str]:
        """Return torchrun's command line.

        Args:
            job_id: number that the scheduler gave the job.
            first_node: name of the node that holds the rendezvous' store; not needed for a single node.
            is_first: this is that node. By default torchrun compares host names, which fails for aliases.
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
            RuntimeError: it failed, or was stopped and the job is not queued again.
        """
        import submitit

        job = submitit.JobEnvironment()
        command = self.command(job.job_id, job.hostnames[0], job.node == 0)
        print(f"node {job.node} of {self.nodes}, {job.hostname}: {shlex.join(command)}", flush=True)
        on_slurm = job.cluster == "slurm"

        def stop(*_: object) -> None:
            self._is_terminated = True
            self._is_stopping = self._is_stopping or on_slurm
            self._stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        self._torchrun = subprocess.Popen(
            command, env=self._environment(), start_new_session=True, preexec_fn=_ignore_preemption
        )
        code = self._wait()
        if self._is_terminated and on_slurm and is_running(job.job_id):
            # Preempted by SIGTERM alone. Slurm 22.05 counts a job that then ends by itself as completed and does not
            # queue it again, so act as on PREEMPTION.
            signal.raise_signal(PREEMPTION)
            while True:  # not the first task: it queues the job again, which ends this one
                time.sleep(1)
        if code:
            reason = "was stopped" if self._is_terminated else "failed"
            raise RuntimeError(f"torchrun {reason} (exit code {code}); the same command resumes the run")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Stop the run, which saves; returns the task to queue again. submitit calls it in a signal handler."""
        import submitit

        self._stop()
        self._wait()
        return submitit.helpers.DelayedSubmission(replace(self))

    def _environment(self) -> dict[str, str]:
        # Seconds that torchrun waits for its processes after SIGTERM before it kills them (its own default is 30).
        environment = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.grace - MARGIN)}
        return environment if self.devices is None else environment | {"CUDA_VISIBLE_DEVICES": self.devices}

    def _stop(self) -> None:
        """Send torchrun one SIGTERM, which it passes on; a second would interrupt its wait for the processes."""
        if self._torchrun is not None and not self._is_stopping:
            self._is_stopping = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._torchrun.pid, signal.SIGTERM)

    def _wait(self) -> int | None:
        """Return torchrun's exit code. Popen.wait would hold a lock on which `checkpoint`, a signal handler, blocks."""
        if self._torchrun is None:
            return None
        with contextlib.suppress(ChildProcessError):  # reaped by the call that the signal handler interrupted
            _, status = os.waitpid(self._torchrun.pid, 0)
            self._torchrun.returncode = os.waitstatus_to_exitcode(status)
        return self._torchrun.returncode


def _ignore_preemption() -> None:
    signal.signal(PREEMPTION, signal.SIG_IGN)  # an ignored signal stays ignored in child processes


def is_running(job_id: str) -> bool:
    """Return True if Slurm counts a job as running: a preempted one is, one ended by scancel is not."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return answer.stdout.strip() == "RUNNING"


def minutes(text: str) -> int:
    """Convert Slurm's forms of a time to minutes, rounded up: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises:
        argparse.ArgumentTypeError: the text is none of them, or 0.
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


def parse_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the checked options, and the arguments after `--` as torchrun takes them.

    A command (`pretrain ...`) becomes `-m video_convmae pretrain ...`; a script stays as it is.
    """
    parser = CommandLine("submit", __doc__, usage="%(prog)s [options] -- COMMAND [arguments]")
    parser.add_argument("--cluster", default="slurm", choices=["slurm", "local"], help="local: this machine, no Slurm")
    parser.add_argument("--nodes", type=within(int, least=1), default=1, help="number of nodes (default %(default)s)")
    parser.add_argument(
        "--gpus-per-node", type=within(int, least=0), default=0, help="GPUs of each node; 0 (default): run on the CPU"
    )
    parser.add_argument("--processes-per-node", type=within(int, least=0), help="default: one for each GPU")
    parser.add_argument(
        "--cpus-per-gpu",
        type=within(int, least=1),
        default=9,
        help="cores of a process (default %(default)s: 8 of them load data)",
    )
    parser.add_argument("--mem", help="memory of a node in sbatch's form: 480G; 0: all of it")
    parser.add_argument("--time", type=minutes, default="24:00:00", help="time limit of a job (default %(default)s)")
    parser.add_argument("--partition", help="Slurm's partition")
    parser.add_argument("--name", default="video-convmae", help="name of the job (default %(default)s)")
    parser.add_argument("--logs", type=Path, default=Path("runs/jobs"), help="folder for logs, shared by all nodes")
    parser.add_argument(
        "--grace",
        type=within(int, least=0),
        default=300,
        help="seconds before the limit at which the run saves (default %(default)s)",
    )
    parser.add_argument(
        "--requeues",
        type=within(int, least=0),
        default=100,
        help="times that the job is queued again (default %(default)s)",
    )
    parser.add_argument(
        "--max-restarts",
        type=within(int, least=0),
        default=3,
        help="restarts in a job after a process failed (default %(default)s)",
    )
    parser.add_argument(
        "--slurm", nargs="+", default=[], metavar="KEY[=VALUE]", help="more options of sbatch: account=A exclusive"
    )
    arguments = list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options, script = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
    if not script:
        parser.error("no command; expected it after --: video-convmae submit --nodes 4 ... -- pretrain --config ...")
    if script[0] in COMMANDS:
        script = ["-m", "video_convmae", *script]
    elif not Path(script[0]).is_file():
        parser.error(
            f"{script[0]}: no such command, and no such script in {Path.cwd()}; commands are {', '.join(COMMANDS)}"
        )
    if options.cluster == "local" and options.nodes > 1:
        parser.error(f"--nodes is {options.nodes}; expected at least 1, and 1 with --cluster local")
    if options.gpus_per_node == 0 and not options.processes_per_node:
        parser.error("--gpus-per-node is 0; give the GPUs of a node, or --processes-per-node to run on the CPU")
    if options.grace <= MARGIN or options.grace >= options.time * 60:
        parser.error(f"--grace is {options.grace} s; expected more than {MARGIN} s and less than --time")
    return options, script


def build_executor(options: argparse.Namespace) -> submitit.LocalExecutor | submitit.SlurmExecutor:
    """Build submitit's executor with one task a node.

    Raises:
        RuntimeError: there is no Slurm on this machine.
    """
    import submitit

    common = {"nodes": options.nodes, "signal_delay_s": options.grace}
    if options.cluster == "local":
        local = submitit.LocalExecutor(options.logs, max_num_timeout=options.requeues)
        local.update_parameters(
            timeout_min=options.time, gpus_per_node=options.gpus_per_node, tasks_per_node=1, **common
        )
        return local
    slurm = submitit.SlurmExecutor(options.logs, max_num_timeout=options.requeues)
    cores = options.cpus_per_gpu * (options.processes_per_node or options.gpus_per_node)
    more = {"requeue": True} | ({"mem": options.mem} if options.mem else {})
    for option in options.slurm:
        key, is_set, value = option.partition("=")
        more[key] = value if is_set else True
    slurm.update_parameters(
        job_name=options.name,
        partition=options.partition,
        time=options.time,
        ntasks_per_node=1,
        gpus_per_node=options.gpus_per_node or None,
        cpus_per_task=cores,
        # Since 22.05 srun does not inherit the number of cores from sbatch. Without --kill-on-bad-exit the other nodes
        # would wait for one that failed.
        srun_args=[f"--cpus-per-task={cores}", "--kill-on-bad-exit=1"],
        additional_parameters=more,
        **common,
    )
    return slurm


def submit(options: argparse.Namespace, script: list[str]) -> submitit.Job:
    """Submit a job and print its number, logs and torchrun command."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES") if options.cluster == "local" and options.gpus_per_node else None
    processes = options.processes_per_node or options.gpus_per_node
    launch = Launch(tuple(script), options.nodes, processes, options.max_restarts, options.grace, devices)
    job = build_executor(options).submit(launch)
    where = "" if options.nodes == 1 else "on the first node, FIRST_NODE (is_host=0 on the others): "
    print(f"job {job.job_id}, logs {job.paths.folder}/{job.job_id}_*_log.out and .err")
    print(f"{where}{shlex.join(launch.command(job.job_id))}", flush=True)
    return job


def wait(job: submitit.LocalJob) -> int:
    """Wait for a local job; returns the exit code 0. SIGTERM and Ctrl-C are passed on; the run then saves.

    Raises:
        UserError: the job failed; the message has its own.
    """

    def stop(*_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job.job_id), signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    error = job.exception()
    if error is None:
        print(f"job {job.job_id} ended")
        return 0
    lines = (job.stderr() or "").splitlines() or ["it said nothing"]
    said = next((line for line in lines if re.match(r"video-convmae \S+: error: ", line)), lines[-1])
    raise UserError(f"job {job.job_id} failed: {said}; all that it said is in {job.paths.stderr}")


def main(arguments: Sequence[str]) -> int:
    """Submit a job; with --cluster local, wait for its end. Returns the exit code."""
    options, script = parse_options(arguments)
    try:
        import submitit
    except ImportError as error:
        raise UserError('submit needs submitit: pip install "video-convmae[slurm]"') from error
    if options.cluster == "local":  # inherited by submitit's controller: `wait` passes Ctrl-C on, once
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        job = submit(options, script)
    except RuntimeError as error:
        raise UserError(f"{error} Without Slurm, --cluster local runs the job on this machine.") from error
    return wait(job) if isinstance(job, submitit.LocalJob) else 0
