"""Processes: the group that torchrun starts, what it agrees on, and what wraps a model.

This is the only file that knows torch.distributed. Models are written for one device and wrapped here in one order:
activation checkpointing of each block, compilation of each block, DDP.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """This process among all of them."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Join the group that torchrun started, if it did, and leave it at the end.

    Args:
        device: auto (CUDA where there is one), cpu, cuda, or one device as cuda:1.
    """
    local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if chosen == "cuda":
        chosen = f"cuda:{local_rank}"
    if chosen.startswith("cuda"):
        torch.cuda.set_device(chosen)
    if "RANK" not in os.environ:
        yield Processes(0, 1, torch.device(chosen))
        return
    dist.init_process_group("nccl" if chosen.startswith("cuda") else "gloo")
    try:
        yield Processes(int(os.environ["RANK"]), count, torch.device(chosen))
    finally:
        dist.destroy_process_group()


def wrap(
    model: nn.Module,
    group: Processes,
    blocks: tuple[type[nn.Module], ...],
    activation_checkpointing: bool = False,
    compile_blocks: bool = False,
) -> nn.Module:
    """Checkpoint, compile and replicate a model, in that order.

    Args:
        model: on its device; its parameters stay the same objects.
        group: the processes that share the work.
        blocks: the classes whose instances are checkpointed and compiled one by one.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        compile_blocks: torch.compile each block.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, blocks):
                wrapped = checkpoint_wrapper(child) if activation_checkpointing else child
                if compile_blocks:
                    wrapped.compile()
                setattr(parent, name, wrapped)
    if group.count > 1:
        devices = None
        if group.device.type == "cuda":
            devices = [group.device]
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # a probe's; PyTorch has it for CUDA alone
        model = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The model under DDP."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def gradient_sync(model: nn.Module, sync: bool) -> AbstractContextManager:
    """A context in which gradients are averaged over the processes, or, for all but the last accumulated part, not."""
    if sync or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers (running statistics), so that all of them measure one model."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


def gather(value: Any) -> list[Any]:
    """One picklable value of every process, by rank, on every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
