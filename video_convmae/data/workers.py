"""Loading processes: their start, their end, and the report of a lost one.

PyTorch's loader expects workers that end by themselves. Here a worker may wait for a codec that hangs, or be killed for
its memory, and the training process must still save, report and exit. That takes private members of PyTorch's iterator
(`supervise`, `_shut_down`); there are no public ones.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from video_convmae.errors import UserError

_SHUTDOWN_SECONDS = 2.0  # for workers to end by themselves; then they are killed

_LESS = "fewer data.workers, a smaller train.batch_size or fewer data.repeats"
_ADVICE = {
    signal.SIGKILL: f"the system does this when memory runs out; set {_LESS}",
    signal.SIGBUS: f"shared memory (/dev/shm) is full; give it more room (docker run --shm-size), or set {_LESS}",
}


class LoaderError(UserError, RuntimeError):
    """A loading process was lost. No record is to blame, and the training process is intact."""


def prepare_worker(worker: int) -> None:
    """Set up a loading process (`worker_init_fn`): one thread, no signals, exit with the training process.

    The workers share the cores already, so more threads in each bring nothing. Ctrl-C and a scheduler's signals reach
    every process of a run: the training process saves and then ends its workers, which must serve it until then. If it
    is killed, they exit at once; PyTorch's workers would first finish their read, and under forkserver never exit.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # a loading process is a child

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


@contextmanager
def supervise(iterator: Any) -> Iterator[None]:
    """End the workers of a DataLoader's iterator on leaving, and report one that was lost before.

    Raises:
        LoaderError: a worker was lost, which is noticed within 5 s.
    """
    # Take the workers from PyTorch's SIGCHLD handler: it raises at once, possibly in the middle of an optimizer step.
    # The iterator also looks for lost workers when it has waited 5 s for a batch, where it is safe to raise.
    _remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False
    # An iterator that nobody closes, or that a traceback holds, must not keep the program from exiting.
    at_exit = Finalize(None, _kill_all, [iterator._workers], exitpriority=0)
    try:
        yield
    except Exception as error:
        if reason := _find_lost(iterator._workers):
            raise LoaderError(reason) from error
        raise
    finally:
        if at_exit.still_active():
            _shut_down(iterator)
            at_exit.cancel()


def _shut_down(iterator: Any) -> None:
    """End the workers by PyTorch's own method, and kill them if it takes long: one may wait for a codec that hangs."""
    force = threading.Timer(_SHUTDOWN_SECONDS, _kill_all, [iterator._workers])
    force.daemon = True
    force.start()
    try:
        iterator._shutdown_workers()
    finally:
        force.cancel()


def _kill_all(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


def _find_lost(workers: Sequence[BaseProcess]) -> str | None:
    """Report the first worker that ended: how, and what to do. None if all are alive.

    The wait is for a worker that has closed its pipe and is about to end.
    """
    ended = wait([worker.sentinel for worker in workers], timeout=1.0)
    for place, worker in enumerate(workers):
        if worker.sentinel in ended:
            worker.join(1.0)
            code = worker.exitcode
            fate, advice = f"ended with exit code {code}", "see its output above"
            if code is not None and code < 0:
                number = signal.Signals(-code)
                fate, advice = f"was ended by {number.name}", _ADVICE.get(number, advice)
            return f"loading process {worker.pid} (worker {place} of {len(workers)}) {fate}: {advice}"
    return None
