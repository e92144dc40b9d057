"""The masked depthwise convolution: PyTorch's passes and Triton's against plain convolutions on a dense grid."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import CASES, MASKS, Case, differences, neighbours_of, tensors_of, tolerance
from torch import Tensor

from video_convmae import create_autoencoder
from video_convmae.engine.distributed import DistInfo
from video_convmae.engine.parallel import parallelize
from video_convmae.kernels import Neighbours, depthwise, masked_depthwise
from video_convmae.kernels.depthwise import uses_triton
from video_convmae.models.blocks import ConvBlock
from video_convmae.models.packing import Cells, Packing, nest, unnest

GEOMETRIES = {
    "16 cells": Case((3, 3, 4), (2, 2), (3, 5, 5)),
    "frames 1": Case((1, 3, 2), (2,), (1, 5, 5)),
    "frames 5": Case((7, 2, 3), (2,), (5, 3, 3)),
    "more frames than the clip": Case((2, 2, 3), (2,), (5, 3, 5)),
    "9 cells": Case((2, 3, 3), (3,), (3, 5, 7)),
    "one cell": Case((2, 5, 4), (), (3, 5, 5)),
}


def on_the_grid(x: Tensor, weight: Tensor, bias: Tensor, visible: Tensor, case: Case) -> Tensor:
    """The same by scatter, `conv3d` and gather."""
    batch, side = len(visible), prod(case.factors)
    cells = x.new_zeros(batch, visible[0].numel(), side**2, case.channels)
    flat = visible.flatten(1)
    cells[flat] = x.flatten(0, 1)
    grid = unnest(cells, case.factors, (case.grid[0], case.grid[1] * side, case.grid[2] * side)).permute(0, 4, 1, 2, 3)
    y = F.conv3d(grid, weight, bias, padding=[size // 2 for size in case.kernel], groups=case.channels)
    return nest(y.permute(0, 2, 3, 4, 1), case.factors)[flat].view(x.shape)


@pytest.mark.parametrize("mask", [*MASKS, "nothing hidden"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_values_and_gradients_are_those_of_the_dense_grid(
    geometry: str, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depthwise, "CHUNK", 6000)  # several chunks
    hidden = {"mask": "random", "ratio": 0} if mask == "nothing hidden" else {"mask": mask, "ratio": 0.7}
    case = GEOMETRIES[geometry]._replace(dtype=torch.float64, clips=2, **hidden)
    neighbours, visible = neighbours_of(case)
    *inputs, gradient = tensors_of(case, neighbours)
    inputs = [leaf.double().requires_grad_() for leaf in inputs]
    ours = masked_depthwise(*inputs, neighbours)
    theirs = on_the_grid(*inputs, visible, case)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    for mine, other in zip(torch.autograd.grad(ours, inputs, gradient), torch.autograd.grad(theirs, inputs, gradient)):
        assert torch.allclose(mine, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_the_passes_in_pytorch_equal_the_reference(name: str) -> None:
    assert max(differences(CASES[name])) < tolerance(CASES[name])


@pytest.mark.timeout(300)
def test_the_triton_kernels_equal_the_reference_in_the_interpreter() -> None:
    """In a process of its own: Triton looks for TRITON_INTERPRET when a kernel is defined."""
    pytest.importorskip("triton")
    folder = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(folder.parent)}
    script = folder / "kernel_cases.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [80, 90])
def test_the_triton_kernels_compile_for_a_gpu(
    architecture: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code, with the arguments that they are launched with; that needs the compiler, not the GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction, mangle_type

    triton_depthwise = pytest.importorskip("video_convmae.kernels.triton_depthwise")
    target = GPUTarget("cuda", architecture, 32)
    compiled = []

    def compile_instead(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, num_warps: int, **constants: Any):
        given = dict(zip(kernel.arg_names, args)) | constants
        signature = {name: "constexpr" if name in constants else mangle_type(given[name]) for name in kernel.arg_names}
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): constants[name] for name in constants})
        compiled.append(triton.compile(source, target, {"num_warps": num_warps}).asm["cubin"])

    monkeypatch.setattr(JITFunction, "run", compile_instead)
    for case in (GEOMETRIES["16 cells"], GEOMETRIES["frames 1"]):
        case = case._replace(channels=256, dtype=dtype)
        neighbours, _ = neighbours_of(case)
        x, weight, bias, gradient = tensors_of(case, neighbours)
        x, gradient = x.flatten(0, 1), gradient.flatten(0, 1)
        triton_depthwise.convolve(x, weight, bias, neighbours)
        triton_depthwise.convolve(gradient, weight, None, neighbours)
        triton_depthwise.weight_gradient(x, gradient, neighbours)
    assert len(compiled) == 6
    assert all(compiled)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [*CASES, *GEOMETRIES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_triton_kernels_equal_the_reference_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    case = (CASES | GEOMETRIES)[name]._replace(dtype=dtype)
    assert uses_triton(torch.zeros(1, dtype=dtype, device="cuda"))
    for wider in (case, case._replace(channels=130, clips=3)):
        assert max(differences(wider, "cuda")) < tolerance(wider)


def test_pytorch_is_chosen_on_the_cpu() -> None:
    assert not uses_triton(torch.zeros(1))


def test_only_what_needs_a_gradient_gets_one() -> None:
    case = GEOMETRIES["frames 1"]
    neighbours, _ = neighbours_of(case)
    x, weight, bias, gradient = tensors_of(case, neighbours)
    weight.requires_grad_()
    masked_depthwise(x, weight, bias, neighbours).backward(gradient)
    assert weight.grad is not None
    assert x.grad is None
    assert bias.grad is None


def test_what_does_not_fit_together_is_an_error() -> None:
    case = GEOMETRIES["frames 1"]
    neighbours, _ = neighbours_of(case)
    x, weight, bias, _ = tensors_of(case, neighbours)
    with pytest.raises(ValueError, match="x is"):
        masked_depthwise(x[:, 1:], weight, bias, neighbours)
    with pytest.raises(ValueError, match="weight is"):
        masked_depthwise(x, weight[..., 1:], bias, neighbours)


def test_a_compiled_block_is_the_same_and_takes_new_masks_without_being_compiled_again() -> None:
    torch.manual_seed(0)
    block = ConvBlock(8, (3, 5, 5))
    frames: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(block, backend=backend)
    for seed in range(3):
        visible = torch.zeros(1, 16, dtype=torch.bool)
        visible[:, torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:5]] = True
        x = torch.randn(1, 5, 4, 8, requires_grad=True)
        results = []
        for function in (block, compiled):
            y = function(x, Cells(Packing(visible.view(1, 2, 2, 4), x.device), (2,), (3, 5, 5)))
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results))
    assert len(frames) == 1


@pytest.mark.parametrize("name", GEOMETRIES)
def test_results_lie_in_memory_as_a_compiled_step_expects(name: str) -> None:
    case = GEOMETRIES[name]
    neighbours, _ = neighbours_of(case)
    x, weight, bias, gradient = (tensor.detach() for tensor in tensors_of(case, neighbours))
    x, gradient, table = x.flatten(0, 1), gradient.flatten(0, 1), (neighbours.tokens, neighbours.order)
    operators, only = torch.ops.video_convmae, "test_faketensor"
    torch.library.opcheck(operators.masked_depthwise.default, (x, weight, bias, *table), test_utils=only)
    arguments = (x, gradient, *table, list(case.kernel))
    torch.library.opcheck(operators.masked_depthwise_weight_gradient.default, arguments, test_utils=only)
    results = (
        operators.masked_depthwise(x, weight, bias, *table),
        operators.masked_depthwise_weight_gradient(*arguments),
    )
    assert all(result.is_contiguous() for result in results)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_model_that_is_really_compiled_has_the_same_gradients() -> None:
    models = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = create_autoencoder("tiny", num_frames=4, image_size=32)
        models.append(parallelize(model, DistInfo(0, 1, torch.device("cpu")), compile=compiled))
    clips, visible = torch.randn(2, 3, 4, 32, 32), torch.tensor([True, False, False, True] * 4).view(2, 2, 2, 2)
    for model in models:
        model(clips, visible).loss.backward()
    for ours, theirs in zip(*(model.parameters() for model in models)):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_the_table_names_neighbours() -> None:
    visible = torch.tensor([[1, 1, 0], [0, 0, 1]], dtype=torch.bool).view(1, 1, 2, 3)
    table = Cells(Packing(visible, torch.device("cpu")), (2,), (1, 3, 3)).neighbours
    assert isinstance(table, Neighbours)
    none = 3
    assert table.tokens.view(3, 9).tolist() == [
        [none, none, none, none, 0, 1, none, none, none],
        [none, none, none, 0, 1, none, none, none, 2],
        [1, none, none, none, 2, none, none, none, none],
    ]
