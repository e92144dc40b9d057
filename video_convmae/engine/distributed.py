"""Processes: the group that torchrun starts, what it agrees on, what wraps a model, how many write one checkpoint.

This is the only file that knows torch.distributed. Models are written for one device and wrapped here in one order:
activation checkpointing of each block, compilation of each block, then DDP or FSDP2 (`fully_shard` of each block).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import platform
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

# One process writes checkpoints as many do; and nobody writes into the views that a sharded model returns.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
# Its new name is not known to PyTorch 2.11.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)

HANG_TIMEOUT = 1800.0  # seconds without progress after which a process ends

Parallel = Literal["ddp", "fsdp"]


# The group


@dataclass(frozen=True)
class DistInfo:
    """This process among all of them."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0


@contextlib.contextmanager
def init_distributed(device: str = "auto", patience: float = HANG_TIMEOUT) -> Iterator[DistInfo]:
    """Join the group that torchrun started, if it did, and leave it at the end.

    Objects and checkpoints travel by gloo, so that they need no accelerator; gradients by NCCL where there is CUDA.

    Args:
        device: auto (CUDA where there is one), cpu, cuda, or one device as cuda:1.
        patience: seconds without progress (see `doing`) after which this process ends and says what each rank does. A
            collective gives up after twice as many, for then nobody can be asked.
    """
    local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if chosen == "cuda":
        chosen = f"cuda:{local_rank}"
    on_cuda = chosen.startswith("cuda")
    if on_cuda:
        torch.cuda.set_device(chosen)
    else:
        keep_freed_memory()
    group = DistInfo(int(os.environ.get("RANK", 0)), count, torch.device(chosen))
    with contextlib.ExitStack() as stack:
        attempt = ""
        if "RANK" in os.environ:
            backend, timeout = "cpu:gloo,cuda:nccl" if on_cuda else "gloo", timedelta(seconds=2 * patience)
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
            attempt = _agree_on_attempt(store, group, patience)
            store = dist.PrefixStore(attempt, store)
            dist.init_process_group(backend, store=store, rank=group.rank, world_size=count, timeout=timeout)
            stack.callback(dist.destroy_process_group)
        stack.enter_context(Watchdog(group, patience, attempt))
        yield group


def keep_freed_memory() -> None:
    """Have this process keep the memory of freed tensors for the next ones (glibc; nothing is done elsewhere).

    By default glibc maps every tensor above 32 MB anew and returns the free end of its heap, and the kernel fills the
    same pages with zeros again in each step: at 8 clips of 16x224x224 every fourth second of a step of the base model
    (docs/PERFORMANCE.md). The peak is 1 to 7% higher, and the process holds it until it ends.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def _agree_on_attempt(store: dist.Store, group: DistInfo, patience: float) -> str:
    """A name that all ranks that live now know, and no others.

    torchrun keeps one store when it starts processes again, and what those before have left there are addresses at
    which nobody listens any more (PyTorch issue 135712). So rank 0 draws a name, and a rank takes it when rank 0 has
    answered to a number that the rank has drawn for itself.

    Raises:
        RuntimeError: a rank is missing after `patience` seconds.
    """
    mine = uuid.uuid4().hex
    if not group.is_main:
        return _follow(store, mine, group.rank, patience)
    store.set("attempt", mine)
    for rank in range(1, group.count):
        asks = f"rank {rank} asks"
        _wait_until(partial(_begins_with, store, asks, mine), f"rank {rank}", patience)
        store.set(f"rank {rank} is answered", store.get(asks))
    return mine


def _begins_with(store: dist.Store, key: str, text: str) -> bool:
    return store.check([key]) and store.get(key).startswith(text.encode())


def _follow(store: dist.Store, mine: str, rank: int, patience: float) -> str:
    answered = f"rank {rank} is answered"

    def is_answered() -> bool:
        store.set(f"rank {rank} asks", store.get("attempt").decode() + mine)
        return store.check([answered]) and store.get(answered).endswith(mine.encode())

    _wait_until(is_answered, "rank 0", patience)
    return store.get(answered).decode().removesuffix(mine)


def _wait_until(condition: Callable[[], bool], whom: str, patience: float) -> None:
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"{whom} has not joined the group in {patience:g} s (hang_timeout): see its log")
        time.sleep(0.02)


class Watchdog:
    """Ends a process that makes no progress, and says what it and all others wait for.

    The working thread says what it is about to do (`doing`), which costs nothing. A thread beside it passes this on to
    the group's key-value store. Where nothing new was said for `patience` seconds, be it for a collective that a lost
    peer never joins or for data that never come, it prints what every rank does and since when, and where this process
    stands, and ends it with `EXIT_CODE`. torchrun then ends the others, and starts all anew where it may.
    """

    EXIT_CODE = 70
    _BEAT = 5.0  # seconds between two messages to the store; at 256 ranks about 50 small messages a second

    def __init__(self, group: DistInfo, patience: float, attempt: str) -> None:
        self.patience = patience
        self._attempt = attempt
        self._group = group
        self._beat = min(self._BEAT, patience / 4)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        heartbeat("starts")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        store = self._store()
        while True:
            what, since = _doing
            now = time.time()
            with contextlib.suppress(RuntimeError):  # the store's process is gone: there is nobody left to tell
                if store is not None:
                    store.set(f"rank {self._group.rank}", json.dumps([what, since, now]))
            if now - since > self.patience:
                self._end(store, what, now - since)
            if self._ended.wait(self._beat):
                return

    def _store(self) -> dist.Store | None:
        """The store that torchrun or rank 0 keeps for the group, by a connection of this thread's own."""
        if self._group.count == 1:
            return None
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=self._beat))
        return dist.PrefixStore(f"{self._attempt} watchdog", store)

    def _end(self, store: dist.Store | None, what: str, seconds: float) -> None:
        lines = [
            f"rank {self._group.rank} of {self._group.count} has made no progress for {seconds:.0f} s "
            f"(hang_timeout {self.patience:g}): {what}"
        ]
        if store is not None:
            lines += [self._line(store, rank) for rank in range(self._group.count)]
        print("\n  ".join(lines), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr)
        os._exit(self.EXIT_CODE)

    @staticmethod
    def _line(store: dist.Store, rank: int) -> str:
        try:
            what, since, heard = json.loads(store.get(f"rank {rank}"))
        except RuntimeError as error:
            return f"rank {rank}: nothing is known of it ({str(error).splitlines()[0]})"
        now = time.time()
        return f"rank {rank}: {what}, for {now - since:.0f} s; last heard of {now - heard:.0f} s ago"


_doing = ("starts", time.time())  # one tuple, replaced whole: threads see the old or the new one


def heartbeat(what: str) -> None:
    """Say what this process is about to do; to the watchdog that is progress."""
    global _doing
    _doing = (what, time.time())


# Agreement


def all_gather_object(value: Any) -> list[Any]:
    """One picklable value of every process, by rank, on every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_max(value: int) -> int:
    """The largest of all processes' numbers. It travels by gloo, so no process waits for its accelerator."""
    if not dist.is_initialized():
        return value
    number = torch.tensor(value)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def all_reduce_mean(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


def barrier() -> None:
    """Wait for all processes."""
    all_reduce_max(0)


# Wrapping


def parallelize(
    model: nn.Module,
    group: DistInfo,
    blocks: tuple[type[nn.Module], ...],
    *,
    checkpointed: tuple[type[nn.Module], ...] = (),
    compile_blocks: bool = False,
    parallel: Parallel = "ddp",
    compress_gradients: bool = False,
    accumulates: bool = False,
) -> nn.Module:
    """Checkpoint, compile, and replicate or shard a model, in that order.

    Under DDP its parameters stay the same objects; under FSDP2 they become sharded ones of the same names, so that an
    optimizer must be made after this.

    Args:
        model: on its device.
        group: the processes that share the work.
        blocks: the classes whose instances are compiled and sharded one by one.
        checkpointed: the classes whose activations are computed again in the backward pass instead of being kept.
        compile_blocks: torch.compile each block.
        parallel: ddp keeps all weights on each device; fsdp shards weights, gradients and optimizer over the devices.
        compress_gradients: send gradients as bfloat16.
        accumulates: whether a step has several backward passes. DDP's static graph, which spares each pass a search,
            is for one: with `no_sync` in its first pass PyTorch 2.14 fails an internal assertion.
    """
    for block in [module for module in model.modules() if isinstance(module, blocks)]:
        if isinstance(block, checkpointed):  # the method: with a module around the block, names would change
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if compile_blocks:
            block.compile()
    if group.count == 1:
        return model
    _synchronise_batch_norms(model)
    if parallel == "fsdp":
        return _shard(model, blocks, compress_gradients)
    replica = DistributedDataParallel(
        model,
        device_ids=[group.device] if group.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=not accumulates,
        broadcast_buffers=False,  # tables are constant, running statistics come from the same numbers on all ranks
    )
    if compress_gradients:
        replica.register_comm_hook(None, bf16_compress_hook)
    return replica


def _shard(model: nn.Module, blocks: tuple[type[nn.Module], ...], compress: bool) -> nn.Module:
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if compress else None)
    for block in [module for module in model.modules() if isinstance(module, blocks)]:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def communication_seconds(recorded: torch.profiler.profile) -> float:
    """Seconds of a recording in which processes exchanged gradients or weights; what overlaps counts once.

    Most of that time passes beside the forward and backward pass.
    """
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in recorded.events()
        if event.name.startswith(("gloo:", "ncclDevKernel"))  # on CUDA the kernels: nccl: alone is their launch
    )
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e6


class SyncedBatchNorm(nn.BatchNorm1d):
    """A probe's BatchNorm over the clips of all processes, on any device (PyTorch's own is for CUDA alone).

    It reads the features of a frozen encoder and has no parameters, so no gradient passes through it.
    """

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """`(B, C)` -> the same shape."""
        if not self.training:
            return super().forward(x)
        if x.requires_grad or self.affine:
            raise RuntimeError("a BatchNorm that gradients pass through is not synchronised; expected a probe's")
        x = x.float()
        count = len(x) * dist.get_world_size()
        mean = all_reduce_mean(x.mean(dim=0))
        variance = all_reduce_mean((x - mean).square().mean(dim=0))  # about the common mean: nothing large cancels
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return (x - mean) * (variance + self.eps).rsqrt()


def _synchronise_batch_norms(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = SyncedBatchNorm  # its parameters and buffers stay where they are


def unwrap(model: nn.Module) -> nn.Module:
    """The model under DDP; a sharded model is itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether no process holds the whole model."""
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def gradient_sync(model: nn.Module, sync: bool) -> Iterator[None]:
    """A context in which gradients are averaged over the processes, or, for all but the last accumulated part, not."""
    context: AbstractContextManager = contextlib.nullcontext()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)
    elif isinstance(model, DistributedDataParallel) and not sync:
        context = model.no_sync()
    with context:
        yield


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on every process; any other as it is. All processes call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# Tensors on disk, written by all processes


class ShardWriter:
    """Writes tensors as safetensors files, each process its shards and its part of what all of them hold.

    No pickle is written, so none need be trusted (models/released.py reads the files).
    """

    @cached_property
    def _group(self) -> dist.ProcessGroup | None:
        """A group of its own: its thread must not speak in between the training's messages."""
        return dist.new_group(backend="gloo") if dist.is_initialized() else None

    def start(self, tensors: Mapping[str, Tensor], folder: Path) -> Future:
        """Copy the tensors to host memory and begin to write; the future is done when all processes have written."""
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        group = self._group
        return dcp.async_save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)


def read_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill tensors, sharded or not, from what any number of processes has written."""
    alone = not dist.is_initialized()
    dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone)
