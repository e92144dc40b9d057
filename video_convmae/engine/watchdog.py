"""A watchdog that ends a process without progress, and says what every rank was doing."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

_progress = ("starting", time.time())  # one tuple, replaced as a whole: threads see the old or the new one


def heartbeat(text: str) -> None:
    """Report progress to the watchdog: `text` says what this process is about to do."""
    global _progress
    _progress = (text, time.time())


class Watchdog:
    """End this process when it makes no progress for `hang_timeout` seconds, and say what each rank was doing.

    The training thread calls `heartbeat` before each phase, which costs nothing. A thread of the watchdog copies the
    last heartbeat to the group's key-value store every few seconds. Without a new heartbeat for `hang_timeout` seconds
    (a collective that a lost peer never joins, data that never arrive) it prints the last heartbeat of every rank and
    this process's stack, and exits with `EXIT_CODE`. torchrun then ends the other processes, and may restart them all.
    Time in which this process was stopped (Ctrl-Z, a laptop that sleeps) does not count.

    Args:
        rank, world_size: of this process.
        hang_timeout: seconds.
        attempt: prefix of this start's keys in the store.
    """

    EXIT_CODE = 70
    _INTERVAL = 5.0  # seconds between two messages to the store; at 256 ranks about 50 small messages a second

    def __init__(self, rank: int, world_size: int, hang_timeout: float, attempt: str) -> None:
        self.hang_timeout = hang_timeout
        self._rank, self._world_size, self._attempt = rank, world_size, attempt
        self._interval = min(self._INTERVAL, hang_timeout / 4)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        heartbeat("starting")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        store = self._connect()
        last, waited = _progress, 0.0  # the sum of this thread's own waits: no clock stands still with the process
        while True:
            if _progress is not last:
                last, waited = _progress, 0.0
            text, since = last
            if store is not None:
                with contextlib.suppress(RuntimeError):  # the store's process has ended: no other rank can read it
                    store.set(f"rank {self._rank}", json.dumps([text, since, time.time()]))
            if waited >= self.hang_timeout:
                self._end(store, text, waited)
            if self._ended.wait(self._interval):
                return
            waited += self._interval

    def _connect(self) -> dist.Store | None:
        """Connect this thread to the store that torchrun or rank 0 keeps for the group."""
        if self._world_size == 1:
            return None
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=self._interval))
        return dist.PrefixStore(f"{self._attempt} watchdog", store)

    def _end(self, store: dist.Store | None, text: str, seconds: float) -> None:
        lines = [
            f"rank {self._rank} of {self._world_size} has made no progress for {seconds:.0f} s "
            f"(hang_timeout {self.hang_timeout:g}): {text}"
        ]
        if store is not None:
            lines += [self._last_heartbeat(store, rank) for rank in range(self._world_size)]
        print("\n  ".join(lines), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr)
        os._exit(self.EXIT_CODE)

    @staticmethod
    def _last_heartbeat(store: dist.Store, rank: int) -> str:
        try:
            text, since, heard = json.loads(store.get(f"rank {rank}"))
        except RuntimeError as error:
            return f"rank {rank}: no heartbeat is known ({str(error).splitlines()[0]})"
        now = time.time()
        return f"rank {rank}: {text}, for {now - since:.0f} s; last heard of {now - heard:.0f} s ago"
