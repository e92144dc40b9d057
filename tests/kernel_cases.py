"""The Triton kernels against their plain PyTorch reference, on a GPU or, run as a script, in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/kernel_cases.py

The interpreter takes some milliseconds for each tap of each token, so the cases are as small as their subject allows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from video_convmae import masking
from video_convmae.kernels import Neighbours, masked_depthwise
from video_convmae.kernels.depthwise import depthwise_reference, uses_triton
from video_convmae.models.packing import Cells, Packing

MASKS = masking.MASKS | {"complementary": lambda grid, ratio, g: masking.complementary(grid, ratio, 1, g)[0]}


class Case(NamedTuple):
    """A grid of tokens, strides of the later stages (they make the cells), a kernel, and what is hidden."""

    grid: tuple[int, int, int]
    factors: tuple[int, ...]
    kernel: tuple[int, int, int]
    channels: int = 3
    mask: str = "random"
    ratio: float = 0.5
    dtype: torch.dtype = torch.float32
    clips: int = 1


CASES = {
    "16 cells, frames 3": Case((2, 1, 2), (2, 2), (3, 5, 3), 5),
    "one visible token": Case((1, 2, 2), (2,), (1, 5, 5), 9, ratio=0.75, clips=2),
    "nothing hidden": Case((2, 1, 1), (2,), (3, 3, 3), ratio=0),
    "nothing hidden, bfloat16": Case((1, 1, 2), (2,), (1, 3, 5), ratio=0, dtype=torch.bfloat16),
    "frames 5, one cell": Case((3, 1, 1), (), (5, 1, 3), ratio=0),
    "9 cells": Case((1, 2, 1), (3,), (1, 5, 3), 2),
    "beyond the next token": Case((1, 3, 3), (), (1, 5, 5), ratio=0.67),
    "more channels than a tile": Case((1, 1, 1), (2,), (1, 3, 3), 130, ratio=0),
    **{f"{mask}, bfloat16": Case((2, 2, 2), (2,), (3, 1, 3), mask=mask, dtype=torch.bfloat16) for mask in MASKS},
}


def neighbours_of(case: Case, device: str = "cpu") -> tuple[Neighbours, Tensor]:
    """The table, and `visible (B, t, h, w)`."""
    generator = torch.Generator().manual_seed(0)
    visible = torch.stack([MASKS[case.mask](case.grid, case.ratio, generator) for _ in range(case.clips)])
    return Cells(Packing(visible, torch.device(device)), case.factors, case.kernel).neighbours, visible


def tensors_of(case: Case, neighbours: Neighbours, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, weight, bias, and the output's gradient."""
    torch.manual_seed(0)
    shape = (case.clips, len(neighbours.tokens) // case.clips, neighbours.order.numel(), case.channels)
    x, gradient = (torch.randn(shape, device=device).to(case.dtype) for _ in range(2))
    weight = torch.randn(case.channels, 1, *case.kernel, device=device)
    return x, weight, torch.randn(case.channels, device=device), gradient


def differences(case: Case, device: str = "cpu") -> list[float]:
    """Relative differences from the reference in float64: values, and gradients of x, weight and bias."""
    neighbours, _ = neighbours_of(case, device)
    *inputs, gradient = tensors_of(case, neighbours, device)
    results = []
    for function, dtype in ((masked_depthwise, None), (depthwise_reference, torch.float64)):
        leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in inputs]
        value = function(*leaves, neighbours)
        value.backward(gradient.to(value.dtype))
        results.append([value, *(leaf.grad for leaf in leaves)])
    return [((ours.double() - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(*results)]


def tolerance(case: Case) -> float:
    """Of a relative difference. bfloat16 keeps 8 bits of what is summed in float32."""
    return 1e-6 if case.dtype == torch.float32 else 4e-3


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, case in CASES.items():
        assert uses_triton(torch.zeros(1, dtype=case.dtype)), "set TRITON_INTERPRET=1"
        found = differences(case)
        print(name, *(f"{value:.1e}" for value in found), flush=True)
        assert max(found) < tolerance(case), name
