"""A model on many devices: compilation, activation checkpointing, DDP or FSDP2, applied from outside the model.

The order is fixed: each block is compiled, then checkpointed (the other way round nothing is compiled), then DDP, or
FSDP2 (`fully_shard` of each block and of the whole).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from video_convmae.models.blocks import AttentionBlock, ConvBlock

from .distributed import DistInfo
from .options import ActivationCheckpointing, Parallel

# Nothing here writes into the views that a sharded model returns.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
# PyTorch 2.11 does not know the new name yet.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)

BLOCKS = (ConvBlock, AttentionBlock)  # compiled and sharded one by one
RECOMPUTED: dict[ActivationCheckpointing, tuple[type[nn.Module], ...]] = {
    "none": (),
    "conv": (ConvBlock,),
    "all": BLOCKS,
}


def parallelize(
    model: nn.Module,
    info: DistInfo,
    *,
    activation_checkpointing: ActivationCheckpointing = "none",
    compile: bool = False,
    parallel: Parallel = "ddp",
    compress_gradients: bool = False,
    accumulates: bool = False,
) -> nn.Module:
    """Apply compilation and activation checkpointing, then replicate or shard the model.

    Under DDP its parameters stay the same objects; under FSDP2 they become sharded ones of the same names, so create
    the optimizer afterwards.

    Args:
        model: on its device.
        info: the processes that share the work.
        activation_checkpointing: blocks that recompute their activations in the backward pass.
        compile: torch.compile each block.
        parallel: ddp keeps all weights on each device; fsdp shards weights, gradients and optimizer over the devices.
        compress_gradients: send gradients as bfloat16.
        accumulates: a step has several backward passes. DDP's static graph, which saves a search in each pass, is for
            one: with `no_sync` in its first pass PyTorch 2.14 fails an internal assertion.
    """
    blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        # The method is wrapped, not the module: a wrapping module would change the parameters' names.
        if compile:
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
        if isinstance(block, RECOMPUTED[activation_checkpointing]):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    if info.world_size == 1:
        return model
    _synchronise_batch_norms(model)
    if parallel == "fsdp":
        return shard(model, compress_gradients)
    replica = DistributedDataParallel(
        model,
        gradient_as_bucket_view=True,
        static_graph=not accumulates,
        broadcast_buffers=False,  # tables are constant, running statistics are computed alike on all ranks
    )
    if compress_gradients:
        replica.register_comm_hook(None, bf16_compress_hook)
    return replica


def shard(model: nn.Module, compress_gradients: bool = False, learns: bool = True) -> nn.Module:
    """Shard each block of a model and the rest over the processes (FSDP2).

    A model that learns keeps the rest whole from the forward to the backward pass. One that does not has no backward
    pass, and would never see what is written into its shards.
    """
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if compress_gradients else None)
    for module in [module for module in model.modules() if isinstance(module, BLOCKS)]:
        fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy, reshard_after_forward=not learns)
    # Around FSDP's own hook, which moves what it is given to the device. Tokens are found on the CPU: see `Packing`.
    model.register_forward_pre_hook(_wrap_masks, prepend=True, with_kwargs=True)
    model.register_forward_pre_hook(_unwrap_masks, with_kwargs=True)
    return model


@dataclass(frozen=True)
class _Mask:
    """A mask as no tensor, which FSDP leaves where it is."""

    tensor: Tensor


def _wrap_masks(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    def wrap(value: Any) -> Any:
        return _Mask(value) if isinstance(value, Tensor) and value.dtype == torch.bool else value

    return tuple(map(wrap, args)), {name: wrap(value) for name, value in kwargs.items()}


def _unwrap_masks(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    def unwrap_mask(value: Any) -> Any:
        return value.tensor if isinstance(value, _Mask) else value

    return tuple(map(unwrap_mask, args)), {name: unwrap_mask(value) for name, value in kwargs.items()}


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the values of all processes, on any device (PyTorch's own is for CUDA alone).

    Processes may have different numbers of values, or none (a mask head without an object): each value counts once.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Take every shape `(B, C, ...)`."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, ...)` -> the same shape and type."""
        if not self.training:
            return super().forward(x)
        assert isinstance(self.running_mean, Tensor)
        assert isinstance(self.running_var, Tensor)
        assert isinstance(self.num_batches_tracked, Tensor)
        assert isinstance(self.momentum, float)
        normalized, mean, variance, count = _NormalizeTogether.apply(x.float(), self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            weight = torch.where(count > 1, self.momentum, 0.0)  # no value on any process: nothing is learned
            self.running_mean.lerp_(mean, weight)
            self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), weight)
        if self.affine:
            shape = (1, -1, *[1] * (x.ndim - 2))
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        return normalized.to(x.dtype)


class _NormalizeTogether(torch.autograd.Function):
    """Normalise each channel by the mean and variance of all processes; gradients pass through both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(B, C, ...)` float32 -> normalised values; mean and variance `(C,)`, number of values of a channel."""
        channels = x.shape[1]
        values = x.transpose(0, 1).reshape(channels, -1)
        # A row a process: mean, sum of squares about it, count. Moments about an own mean cancel no large squares.
        rows = x.new_zeros(dist.get_world_size(), 2 * channels + 1)
        if values.shape[1]:
            mean = values.mean(dim=1)
            squares = (values - mean[:, None]).square().sum(dim=1)
            rows[dist.get_rank()] = torch.cat([mean, squares, mean.new_tensor([values.shape[1]])])
        dist.all_reduce(rows)
        means, squares, counts = rows.split([channels, channels, 1], dim=1)
        count = counts.sum()
        mean = (means * counts).sum(dim=0) / count.clamp(min=1)
        variance = (squares + counts * (means - mean).square()).sum(dim=0) / count.clamp(min=1)
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = (variance + eps).rsqrt().view(shape)
        normalized = (x - mean.view(shape)) * scale
        ctx.save_for_backward(normalized, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return normalized, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the input: without the parts that change a channel's mean or scale."""
        gradient, (normalized, scale, count) = gradients[0], ctx.saved_tensors
        dims = [0, *range(2, gradient.ndim)]
        sums = torch.stack([gradient.sum(dim=dims), (gradient * normalized).sum(dim=dims)])
        dist.all_reduce(sums)
        shift, slope = (sums / count.clamp(min=1)).view(2, *scale.shape)
        return scale * (gradient - shift - normalized * slope), None


def _synchronise_batch_norms(model: nn.Module) -> None:
    """Replace every BatchNorm by a synchronised one with the same parameters and buffers."""
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                synced = SyncedBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine)
                synced.load_state_dict(norm.state_dict())
                setattr(parent, name, synced.to(next(norm.buffers()).device).train(norm.training))


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return what a forward pass changes in a model that trains: BatchNorm's buffers, whole on every process."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model under DDP; a sharded model is its own."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Return True if no process holds the whole model."""
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Leave gradients of this backward pass on their process: for all but the last accumulated part of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    elif isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every process; return any other as it is. All processes call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
