"""The process group that torchrun starts, and what its processes agree on.

Models, data and weights are written for one process; this file, parallel.py, watchdog.py and checkpoint.py are the
only ones that import torch.distributed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from video_convmae.errors import UserError

from .options import HANG_TIMEOUT
from .watchdog import Watchdog

# A single process writes checkpoints by the same code as many.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class DistInfo:
    """Rank and device of this process, and the number of processes."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the run's files."""
        return self.rank == 0


@contextlib.contextmanager
def init_distributed(device: str = "auto", hang_timeout: float = HANG_TIMEOUT) -> Iterator[DistInfo]:
    """Join the group that torchrun started, if any, and leave it at the end.

    Objects and checkpoints travel by gloo, so that they need no accelerator; gradients by NCCL on CUDA.

    Args:
        device: auto (CUDA if available), cpu, cuda, or one device such as cuda:1.
        hang_timeout: seconds without a heartbeat after which this process ends and says what each rank was doing. A
            collective gives up after twice as many, since the other ranks' heartbeats are then unknown.

    Raises:
        UserError: there is no such device.
    """
    local_rank, world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device, local_rank)
    on_cuda = chosen.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(chosen)
    else:
        keep_freed_memory()
    info = DistInfo(int(os.environ.get("RANK", 0)), world_size, chosen)
    with contextlib.ExitStack() as stack:
        attempt = ""
        if "RANK" in os.environ:
            backend, timeout = "cpu:gloo,cuda:nccl" if on_cuda else "gloo", timedelta(seconds=2 * hang_timeout)
            store = _join_store(timeout)
            attempt = _agree_on_attempt(store, info, hang_timeout)
            store = dist.PrefixStore(attempt, store)
            dist.init_process_group(backend, store=store, rank=info.rank, world_size=world_size, timeout=timeout)
            stack.callback(dist.destroy_process_group)
        stack.enter_context(Watchdog(info.rank, world_size, hang_timeout, attempt))
        yield info


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """Return the device of a process.

    Args:
        device: auto (CUDA if available), cpu, cuda, or one device such as cuda:1.
        local_rank: of the process on its machine: the number of its CUDA device, unless `device` names one.

    Raises:
        UserError: there is no such device.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UserError(f"device is {device!r}; expected auto, cpu, cuda, or one device such as cuda:1")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device is {device!r}, and PyTorch finds no CUDA device; expected cpu or auto")
    chosen = torch.device(device if ":" in device else f"cuda:{local_rank}")
    if (chosen.index or 0) >= (count := torch.cuda.device_count()):
        if ":" in device:
            raise UserError(
                f"device is {device!r}, and there are {count} CUDA devices; expected a number below {count}"
            )
        raise UserError(
            f"process {local_rank} of this machine needs {chosen}, and there are {count} CUDA devices; expected at "
            f"most {count} processes a machine (torchrun --nproc_per_node {count})"
        )
    return chosen


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors for the next ones; other allocators are left alone.

    By default glibc maps every tensor above 32 MB anew and returns the free end of its heap, and the kernel fills the
    same pages with zeros again in each step: at 8 clips of 16x224x224 every fourth second of a step of the base model
    (docs/performance.md). The peak is 1 to 7% higher, and the process holds it until it ends.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def all_gather_object(value: Any) -> list[Any]:
    """Return one picklable value of every process, by rank, on every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Return rank 0's picklable value, on every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather_object(value: Any) -> list[Any] | None:
    """Return one picklable value of every process, by rank, on rank 0 alone; None on the others."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def all_reduce_max(value: int) -> int:
    """Return the largest of all processes' numbers. It travels by gloo, so no process waits for its accelerator."""
    if not dist.is_initialized():
        return value
    number = torch.tensor(value)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def all_reduce_mean(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


def barrier() -> None:
    """Wait for all processes."""
    all_reduce_max(0)


def _join_store(timeout: timedelta) -> dist.Store:
    """Join the store of the group, which the first rank or torchrun keeps.

    Raises:
        UserError: its port is taken, or nobody answers there.
    """
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    except (dist.DistError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the group of processes cannot meet at {address} ({str(error).splitlines()[0]:.200}); another program may "
            "have this port: give torchrun --standalone, or another --master_port"
        ) from error
    return store


def _agree_on_attempt(store: dist.Store, info: DistInfo, hang_timeout: float) -> str:
    """Agree on a name for this start of the group, known to all living ranks and to no earlier ones.

    torchrun keeps one store over restarts, and the addresses that the ended processes left in it still look valid
    (PyTorch issue 135712). So rank 0 draws a name; each other rank draws a token and takes the name once rank 0 has
    answered to that token.

    Raises:
        RuntimeError: a rank is missing after `hang_timeout` seconds.
    """
    mine = uuid.uuid4().hex
    if info.is_main:
        store.set("attempt", mine)
        for rank in range(1, info.world_size):
            request = f"rank {rank} asks"

            def has_asked(request: str = request) -> bool:
                return store.check([request]) and store.get(request).startswith(mine.encode())

            _wait_until(has_asked, f"rank {rank}", hang_timeout)
            store.set(f"rank {rank} is answered", store.get(request).decode())
        return mine
    answer = f"rank {info.rank} is answered"

    def is_answered() -> bool:
        store.set(f"rank {info.rank} asks", store.get("attempt").decode() + mine)
        return store.check([answer]) and store.get(answer).endswith(mine.encode())

    _wait_until(is_answered, "rank 0", hang_timeout)
    return store.get(answer).decode().removesuffix(mine)


def _wait_until(condition: Callable[[], bool], peer: str, hang_timeout: float) -> None:
    end = time.monotonic() + hang_timeout
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"{peer} has not joined the group in {hang_timeout:g} s (hang_timeout): see its log")
        time.sleep(0.02)
