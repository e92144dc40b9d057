"""The passes of depthwise.py as Triton kernels: all taps in one pass, sums in float32, hidden tokens never read.

Letters: M packed tokens; S cells along a token's side; C channels; kt kh kw the kernel; r tokens it reaches beyond one.

Layout: features `(M, S², C)`, channels innermost, cells in nested order; neighbours `(M, kt, 2r + 1, 2r + 1)` int32,
which fit into the first-level cache beside the features (a program reads one token's box). Weights come as
`(taps, C)`, so that a tap's channels lie side by side.

`convolve`, and with it the input gradient. Tile: one token's S² cells (rounded up to a power of two) by up to 128
channels, summed in registers. Each tap loads the cells that it reads; those of the token itself and of its visible
neighbours are read kt kh kw times, but by one program or by programs side by side, so that memory sees about
`M S² C` values read and as many written.

`weight_gradient`. Tile: one row of taps (kt, kh), a part of the tokens, up to 64 channels; kw sums in registers. Memory
sees x and the gradient kt kh times at worst, mostly from the second-level cache. Parts are added in a fixed order
afterwards: no atomics, so a step can be repeated bit by bit.

Unchecked on a GPU so far: tested on the CPU with TRITON_INTERPRET=1, and compiled for sm_80 and sm_90.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .neighbours import Neighbours

CHANNELS, WARPS = 128, 4  # of a tile of `convolve`
# Of the weight gradient: one warp, so that the sum over a token's cells needs no barrier.
GRADIENT_CHANNELS, GRADIENT_WARPS = 64, 1
PARTS = 128  # into which it cuts the tokens
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Neighbours) -> Tensor:
    """Convolve `(M, S², C)` by `(C, 1, kt, kh, kw)` and add `(C)`; return `(M, S², C)`."""
    (count, _, channels) = x.shape
    x, taps = x.contiguous(), weight.flatten(1).t().contiguous()  # (taps, C)
    out = torch.empty_like(x)
    width = min(CHANNELS, triton.next_power_of_2(channels))
    grid = (count, triton.cdiv(channels, width))
    _convolve[grid](
        x,
        taps,
        taps if bias is None else bias,
        neighbours.tokens,
        neighbours.order,
        neighbours.stored(),
        out,
        count,
        channels,
        HAS_BIAS=bias is not None,
        CHANNELS=width,
        **_shape(neighbours),
        num_warps=WARPS,
    )
    return out


def weight_gradient(x: Tensor, gradient: Tensor, neighbours: Neighbours) -> Tensor:
    """Return the weight's gradient `(C, 1, kt, kh, kw)` float32 of `x` and the output's gradient, `(M, S², C)`."""
    (count, _, channels) = x.shape
    kt, kh, kw = neighbours.kernel
    per_part = triton.cdiv(count, PARTS)
    parts = triton.cdiv(count, per_part)
    sums = torch.empty(parts, kt * kh, triton.next_power_of_2(kw), channels, device=x.device)
    width = min(GRADIENT_CHANNELS, triton.next_power_of_2(channels))
    grid = (kt * kh, parts, triton.cdiv(channels, width))
    _weight_gradient[grid](
        x.contiguous(),
        gradient.contiguous(),
        neighbours.tokens,
        neighbours.order,
        neighbours.stored(),
        sums,
        count,
        channels,
        PER_PART=per_part,
        COLUMNS=triton.next_power_of_2(kw),
        CHANNELS=width,
        **_shape(neighbours),
        num_warps=GRADIENT_WARPS,
    )
    return sums.sum(0)[:, :kw].reshape(kt * kh * kw, channels).t().reshape(channels, 1, kt, kh, kw)


def _shape(neighbours: Neighbours) -> dict[str, int]:
    """Return the constants that the kernels are compiled with."""
    kt, kh, kw = neighbours.kernel
    return {
        "SIDE": neighbours.order.shape[0],
        "CELLS": triton.next_power_of_2(neighbours.order.numel()),
        "REACH": neighbours.tokens.shape[-1] // 2,
        "KT": kt,
        "KH": kh,
        "KW": kw,
    }


@triton.jit
def _read(x, tokens, order, token, row, column, here, channel, inside, count, channels, dt, dy, dx,
          SIDE: tl.constexpr, REACH: tl.constexpr, KT: tl.constexpr):  # fmt: skip
    """Load the cells `(dy, dx)` away in frame `dt` of the kernel: `(CELLS, CHANNELS)` float32, zero where hidden."""
    ACROSS: tl.constexpr = 2 * REACH + 1
    y = row + dy + REACH * SIDE  # from the first row of the box of tokens: never negative
    x_ = column + dx + REACH * SIDE
    place = ((token * KT + dt) * ACROSS + y // SIDE) * ACROSS + x_ // SIDE
    neighbour = tl.load(tokens + place, mask=here, other=count)
    cell = tl.load(order + (y % SIDE) * SIDE + x_ % SIDE, mask=here, other=0)
    at = (neighbour.to(tl.int64) * (SIDE * SIDE) + cell) * channels
    shown = here & (neighbour < count)
    return tl.load(x + at[:, None] + channel[None, :], mask=shown[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def _convolve(x, taps, bias, tokens, order, stored, out, count, channels,
              HAS_BIAS: tl.constexpr, SIDE: tl.constexpr, CELLS: tl.constexpr, REACH: tl.constexpr, KT: tl.constexpr,
              KH: tl.constexpr, KW: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    token = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    cell = tl.arange(0, CELLS)
    here = cell < SIDE * SIDE
    at = tl.load(stored + cell, mask=here, other=0)  # where this stored cell lies, row by row
    row, column = at // SIDE, at % SIDE
    total = tl.zeros((CELLS, CHANNELS), dtype=tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for dt in range(KT):
        for dy in range(KH):
            for dx in tl.static_range(KW):
                value = _read(x, tokens, order, token, row, column, here, channel, inside, count, channels,
                              dt, dy - KH // 2, dx - KW // 2, SIDE, REACH, KT)  # fmt: skip
                tap = (dt * KH + dy) * KW + dx
                total += (
                    value * tl.load(taps + tap * channels + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
                )
    rows = (token.to(tl.int64) * (SIDE * SIDE) + cell) * channels
    tl.store(
        out + rows[:, None] + channel[None, :], total.to(out.dtype.element_ty), mask=here[:, None] & inside[None, :]
    )


@triton.jit
def _weight_gradient(x, gradient, tokens, order, stored, sums, count, channels,
                     PER_PART: tl.constexpr, COLUMNS: tl.constexpr, SIDE: tl.constexpr, CELLS: tl.constexpr,
                     REACH: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
                     CHANNELS: tl.constexpr):  # fmt: skip
    tap_row, part = tl.program_id(0), tl.program_id(1)
    dt, dy = tap_row // KH, tap_row % KH
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    cell = tl.arange(0, CELLS)
    here = cell < SIDE * SIDE
    at = tl.load(stored + cell, mask=here, other=0)
    row, column = at // SIDE, at % SIDE
    taps = tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS, CHANNELS), dtype=tl.float32)
    for index in range(PER_PART):  # a constant: the interpreter of Triton 3.6 cannot loop to a tensor under NumPy 2.4
        token = part * PER_PART + index
        here = (cell < SIDE * SIDE) & (token < count)
        rows = (token.to(tl.int64) * (SIDE * SIDE) + cell) * channels
        g = tl.load(gradient + rows[:, None] + channel[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        g = g.to(tl.float32)
        for dx in tl.static_range(KW):
            value = _read(x, tokens, order, token, row, column, here, channel, inside, count, channels,
                          dt, dy - KH // 2, dx - KW // 2, SIDE, REACH, KT)  # fmt: skip
            total += tl.where((taps == dx)[:, None], tl.sum(value * g, axis=0)[None, :], 0.0)
    place = ((part * KT * KH + tap_row) * COLUMNS + taps) * channels
    tl.store(sums + place[:, None] + channel[None, :], total, mask=inside[None, :])
