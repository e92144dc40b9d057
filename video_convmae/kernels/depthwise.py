"""The masked depthwise convolution over packed cells, without the dense grid.

Letters: M packed tokens of a batch (n visible ones of each of B clips, or all N); S cells along a token's side, so S²
cells a token; C channels; kt kh kw the kernel; r tokens that the kernel reaches beyond a token, ceil((kh // 2) / S).

Features lie as `(M, S², C)`, cells in the nested order of models/packing.py. A cell reads its neighbours in its own
token and in the tokens around it, wherever those lie in the pack; hidden and outside cells count as zeros and are never
read. One table of tokens, `Neighbours`, says who lies where. It is built once a batch and shared by a stage's blocks.

There are three passes: `convolve`; the input gradient, which is `convolve` of the output's gradient under the kernel
turned by 180 degrees, for a cell is its neighbour's neighbour; and `weight_gradient`. tiles.py computes them in
PyTorch, triton_depthwise.py in Triton; `passes_for` chooses, and nothing else does. With every token in the pack this
is the ordinary convolution of finetuning, and the same passes serve it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tiles

try:
    from . import triton_depthwise
except ImportError:  # no Triton: not on this platform, or not installed
    triton_depthwise = None

Kernel = tuple[int, int, int]


@dataclass(frozen=True)
class Neighbours:
    """Which token of the pack lies where around each token of the pack.

    tokens: `(M, kt, 2r + 1, 2r + 1)` int32, the packed token at each offset; M where there is none.
    order: `(S, S)` int32, the place of row, column in a token's stored cells.
    kernel: (kt, kh, kw), odd.
    """

    tokens: Tensor
    order: Tensor
    kernel: Kernel

    @property
    def side(self) -> int:
        """S."""
        return self.order.shape[0]

    @property
    def reach(self) -> int:
        """r."""
        return self.tokens.shape[-1] // 2

    def stored(self) -> Tensor:
        """`(S²)` int32: where each stored cell lies in its token, row by row; the inverse of `order`."""
        return self.order.flatten().argsort().int()

    def rows(self) -> Tensor:
        """`(kt, M, S + kh - 1, S + kw - 1)` int32: each token's cells and those around it, as rows of the pack
        flattened to `(M S², C)` with one token of zeros behind it."""
        cells, device = self.side * self.side, self.order.device
        of_axis = [torch.arange(-(size // 2), self.side + size // 2, device=device) for size in self.kernel[1:]]
        token = [axis.div(self.side, rounding_mode="floor") + self.reach for axis in of_axis]
        within = [axis % self.side for axis in of_axis]
        cell = self.order[within[0][:, None], within[1]]
        return self.tokens[:, :, token[0][:, None], token[1]].transpose(0, 1) * cells + cell


def find_neighbours(keep: Tensor, grid: Kernel, order: Tensor, kernel: Kernel) -> Neighbours:
    """Write each token's number into a grid with a border, then read the window around each token.

    Args:
        keep: `(B, n)` positions of the packed tokens in their clip's grid.
        grid: (t, h, w), the token grid.
        order: `(S, S)`, see `Neighbours`.
        kernel: (kt, kh, kw), odd.
    """
    (batch, n), (t, h, w), device = keep.shape, grid, keep.device
    reach = math.ceil(max(kernel[1:]) // 2 / order.shape[0])
    kt, across, count = kernel[0], 2 * reach + 1, batch * n
    h_, w_ = h + across - 1, w + across - 1
    clip_size = (t + kt - 1) * h_ * w_
    clip = torch.arange(batch, device=device)[:, None] * clip_size
    corner = clip + keep // (h * w) * (h_ * w_) + keep // w % h * w_ + keep % w  # the window's first position
    offsets = _positions((kt, across, across), (h_ * w_, w_, 1), device)
    centre = (kt // 2 * h_ + reach) * w_ + reach
    numbers = torch.full((batch * clip_size,), count, dtype=torch.int32, device=device)
    numbers[(corner + centre).flatten()] = torch.arange(count, dtype=torch.int32, device=device)
    return Neighbours(numbers[corner.view(-1, 1, 1, 1) + offsets], order.int(), kernel)


def masked_depthwise(x: Tensor, weight: Tensor, bias: Tensor, neighbours: Neighbours) -> Tensor:
    """The depthwise convolution of the visible cells, with zeros where a token is hidden.

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
    expected = (len(neighbours.tokens), neighbours.side**2)
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
    """`(M, S², C)` -> the same."""
    kt, kh, kw = weight.shape[2:]
    return passes_for(x).convolve(x, weight, bias, Neighbours(tokens, order, (kt, kh, kw))).contiguous()


@torch.library.custom_op(
    "video_convmae::masked_depthwise_weight_gradient",
    mutates_args=(),
    schema="(Tensor x, Tensor gradient, Tensor tokens, Tensor order, int[3] kernel) -> Tensor",
)
def _weight_gradient(x: Tensor, gradient: Tensor, tokens: Tensor, order: Tensor, kernel: list[int]) -> Tensor:
    """`x` and the output's gradient, `(M, S², C)` -> `(C, 1, kt, kh, kw)`, float32 at least."""
    kt, kh, kw = kernel
    return passes_for(x).weight_gradient(x, gradient, Neighbours(tokens, order, (kt, kh, kw))).contiguous()


@_convolve.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_weight_gradient.register_fake
def _(x: Tensor, gradient: Tensor, tokens: Tensor, order: Tensor, kernel: list[int]) -> Tensor:
    return x.new_empty(x.shape[2], 1, *kernel, dtype=torch.promote_types(x.dtype, torch.float32))


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, _, tokens, order = inputs
    ctx.save_for_backward(x, weight, tokens, order)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass gathers again what it needs, so that of the features only `x` is kept."""
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


_convolve.register_autograd(_backward, setup_context=_keep)


def passes_for(x: Tensor) -> ModuleType:
    """Triton where it runs, PyTorch elsewhere: the one place that chooses."""
    if triton_depthwise is not None and triton_depthwise.runs(x):
        return triton_depthwise
    return tiles


def depthwise_reference(x: Tensor, weight: Tensor, bias: Tensor, neighbours: Neighbours) -> Tensor:
    """What `masked_depthwise` is tested against: one gather and one product a tap, gradients by autograd."""
    batch, n, cells, channels = x.shape
    kt, kh, kw = neighbours.kernel
    side = neighbours.side
    padded = F.pad(x.reshape(-1, channels), (0, 0, 0, cells))
    total = bias.expand(batch * n, side, side, channels)
    rows = neighbours.rows()
    for dt in range(kt):
        halo = padded[rows[dt]]  # (M, S + kh - 1, S + kw - 1, C)
        for dy in range(kh):
            for dx in range(kw):
                total = total + halo[:, dy : dy + side, dx : dx + side] * weight[:, 0, dt, dy, dx]
    return total.flatten(1, 2)[:, neighbours.stored()].view(x.shape)


def _positions(shape: Kernel, strides: Kernel, device: torch.device) -> Tensor:
    """Flat positions of a box of that shape in a grid with these strides."""
    first, second, third = (torch.arange(size, device=device) * stride for size, stride in zip(shape, strides))
    return first[:, None, None] + second[:, None] + third
