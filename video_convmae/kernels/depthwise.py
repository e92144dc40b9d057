"""The masked depthwise convolution over packed cells, without the dense grid: operator, autograd, PyTorch passes.

Letters: B clips, n visible tokens of a clip, M = B*n packed tokens of a batch (n, or all N); S cells along a token's
side, so S² cells a token; C channels; kt kh kw the kernel.

Features lie as `(M, S², C)`, cells in the nested order of models/packing.py. A cell reads its neighbours in its own
token and in the tokens around it, wherever those lie in the pack (neighbours.py has the table); hidden and outside
cells count as zeros and are never read.

There are three passes: the convolution; the input gradient, which is the convolution of the output's gradient under the
kernel turned by 180 degrees, for a cell is its neighbour's neighbour; and the weight gradient. Triton computes them
where it runs (triton_depthwise.py), PyTorch elsewhere: every token with the cells around it, its halo, becomes one
small padded tile. With every token in the pack this is the ordinary convolution of finetuning, by the same passes.

A tile holds S + kh - 1 by S + kw - 1 cells, at S = 4 and 5x5 four times the token. That is gathered for each kernel
frame, and a convolution without padding leaves the token's own S x S cells. Compared with writing the pack into a dense
grid, a tenth of the tokens costs four tenths of the grid's traffic, and nothing is filled with zeros first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .neighbours import Neighbours

try:
    from . import triton_depthwise
except ImportError:  # no Triton: not on this platform, or not installed
    triton_depthwise = None  # type: ignore[assignment]  # a module or None

# Bytes of the tiles made at once. Above 32 MB glibc maps fresh pages for every tensor: gathering 63 MB took 40 ms,
# three times 21 MB took 4 ms.
CHUNK = 2**23


def masked_depthwise(x: Tensor, weight: Tensor, bias: Tensor, neighbours: Neighbours) -> Tensor:
    """Convolve the visible cells depthwise, with zeros where a token is hidden.

    Args:
        x: `(B, n, S², C)` features of the packed tokens.
        weight: `(C, 1, kt, kh, kw)`.
        bias: `(C)`.
        neighbours: of these tokens, for this kernel.

    Returns:
        The same shape and dtype as `x`. Sums run in float32 at least.

    Raises:
        ValueError: `x`, `weight` and the table do not belong together.
    """
    expected = (neighbours.tokens.shape[0], neighbours.order.numel())
    if x.ndim != 4 or (x.shape[0] * x.shape[1], x.shape[2]) != expected:
        raise ValueError(f"x is {tuple(x.shape)}; expected (B, n, S², C) with B n = {expected[0]}, S² = {expected[1]}")
    if tuple(weight.shape) != (x.shape[3], 1, *neighbours.kernel):
        raise ValueError(
            f"weight is {tuple(weight.shape)}; expected (C, 1, kt, kh, kw) = {(x.shape[3], 1, *neighbours.kernel)}"
        )
    return _convolve(x.flatten(0, 1).contiguous(), weight, bias, neighbours.tokens, neighbours.order).view(x.shape)


# Operators of torch.library, so that torch.compile takes them whole. It reads their results in the layout that the fake
# ones promise, hence contiguous().


@torch.library.custom_op(
    "video_convmae::masked_depthwise",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor tokens, Tensor order) -> Tensor",
)
def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, order: Tensor) -> Tensor:
    """Convolve `(M, S², C)`; return the same shape and dtype.

    The bias joins the middle frame's taps, as on the dense grid: then packed and dense sum in one order, and their
    float32 tokens have the same bits.
    """
    kt, kh, kw = weight.shape[2:]
    neighbours = Neighbours(tokens, order, (kt, kh, kw))
    if uses_triton(x):
        return triton_depthwise.convolve(x, weight, bias, neighbours).contiguous()
    channels = x.shape[2]
    padded = F.pad(x.reshape(-1, channels), (0, 0, 0, x.shape[1]))  # hidden neighbours read the zeros at the end
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    sum_dtype = torch.promote_types(x.dtype, torch.float32)
    rows, stored = neighbours.halo_rows(), neighbours.stored()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part in _chunks(x, rows):
        total = None
        for dt, of_tile in enumerate(rows[:, part]):
            tile = padded.index_select(0, of_tile.flatten()).view(*of_tile.shape, channels).permute(0, 3, 1, 2)
            y = F.conv2d(tile, weight[:, :, dt], bias if dt == kt // 2 else None, groups=channels)  # (M, C, S, S)
            total = y.to(sum_dtype) if total is None else total.add_(y)
        assert total is not None  # kt is 1 at least
        out[part] = total.permute(0, 2, 3, 1).flatten(1, 2)[:, stored].to(x.dtype)
    return out


@torch.library.custom_op(
    "video_convmae::masked_depthwise_weight_gradient",
    mutates_args=(),
    schema="(Tensor x, Tensor gradient, Tensor tokens, Tensor order, int[3] kernel) -> Tensor",
)
def _weight_gradient(x: Tensor, gradient: Tensor, tokens: Tensor, order: Tensor, kernel: list[int]) -> Tensor:
    """Return the weight's gradient `(C, 1, kt, kh, kw)`, float32 at least, of `x` and the output's, `(M, S², C)`.

    One matrix product a channel, `(S², M) x (M, halo cells)`, gives for each cell i, j of a token and each cell a, b of
    its halo the sum over the tokens of gradient times input. A tap dy, dx pairs i, j with a, b = i + dy, j + dx. With
    S = 2 and a kernel of 3 x 3 there are 4 x 16 products; among the 16 of a cell i, j the nine of its taps are the
    3 x 3 box with its corner at a, b = i, j, and the weight's gradient is the sum of the four boxes.

    oneDNN's own takes 0.52 s for one 5x5 tap frame of 16x56x56x256 float32 (one Xeon core), which was 35% of the whole
    step; this one over the visible tenth takes a hundredth of that.
    """
    kt, kh, kw = kernel
    neighbours = Neighbours(tokens, order, (kt, kh, kw))
    if uses_triton(x):
        return triton_depthwise.weight_gradient(x, gradient, neighbours).contiguous()
    (_, cells, channels), side = x.shape, order.shape[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    padded = F.pad(x.to(dtype).reshape(-1, channels).t(), (0, cells))  # (C, (M + 1) S²)
    by_row = order.flatten()  # the gradient's cells in order of rows and columns
    gradient = gradient.to(dtype)[:, by_row].permute(2, 1, 0).contiguous()  # (C, S², M)
    rows = neighbours.halo_rows()
    halo = rows[0, 0].numel()
    products = padded.new_zeros(kt, channels, cells, halo)
    for part in _chunks(x, rows):
        for dt, of_tile in enumerate(rows[:, part]):
            tile = padded.index_select(1, of_tile.flatten()).view(channels, -1, halo)
            products[dt].baddbmm_(gradient[:, :, part], tile)
    products = products.view(kt, channels, side, side, side + kh - 1, side + kw - 1)
    taps = products.new_zeros(kt, channels, kh, kw)
    for i in range(side):
        for j in range(side):
            taps += products[:, :, i, j, i : i + kh, j : j + kw]
    return taps.transpose(0, 1)[:, None].contiguous()


@_convolve.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_weight_gradient.register_fake
def _(x: Tensor, gradient: Tensor, tokens: Tensor, order: Tensor, kernel: list[int]) -> Tensor:
    return x.new_empty(x.shape[2], 1, *kernel, dtype=torch.promote_types(x.dtype, torch.float32))


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, _, tokens, order = inputs
    ctx.save_for_backward(x, weight, tokens, order)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradients; the tiles are gathered again, so that of the features only `x` is kept."""
    x, weight, tokens, order = ctx.saved_tensors
    gradient = gradient.contiguous()
    of_x = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = _convolve(gradient, weight.flip(2, 3, 4), None, tokens, order)
    if ctx.needs_input_grad[1]:
        of_weight = _weight_gradient(x, gradient, tokens, order, list(weight.shape[2:])).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        of_bias = gradient.sum((0, 1), dtype=torch.promote_types(x.dtype, torch.float32)).to(weight.dtype)
    return of_x, of_weight, of_bias, None, None


_convolve.register_autograd(_backward, setup_context=_save_for_backward)


def uses_triton(x: Tensor) -> bool:
    """Return True where the Triton kernels take `x`: on CUDA, or anywhere under TRITON_INTERPRET=1; not in float64."""
    if triton_depthwise is None or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return x.is_cuda or triton_depthwise.INTERPRETED


def depthwise_reference(x: Tensor, weight: Tensor, bias: Tensor, neighbours: Neighbours) -> Tensor:
    """Compute `masked_depthwise` for tests: one gather and one product a tap, gradients by autograd."""
    batch, n, cells, channels = x.shape
    kt, kh, kw = neighbours.kernel
    side = neighbours.order.shape[0]
    padded = F.pad(x.reshape(-1, channels), (0, 0, 0, cells))
    total = bias.expand(batch * n, side, side, channels)
    rows = neighbours.halo_rows()
    for dt in range(kt):
        halo = padded[rows[dt]]  # (M, S + kh - 1, S + kw - 1, C)
        for dy in range(kh):
            for dx in range(kw):
                total = total + halo[:, dy : dy + side, dx : dx + side] * weight[:, 0, dt, dy, dx]
    return total.flatten(1, 2)[:, neighbours.stored()].view(x.shape)


def _chunks(x: Tensor, rows: Tensor) -> Iterator[slice]:
    """Cut the tokens into parts whose tiles take up to `CHUNK` bytes."""
    size = max(1, CHUNK // (rows[0, 0].numel() * x.shape[2] * x.element_size()))
    for start in range(0, len(x), size):
        yield slice(start, min(start + size, len(x)))
