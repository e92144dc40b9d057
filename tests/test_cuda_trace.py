"""A training step traced as on a CUDA device, without one: no tensor on a wrong device, no wait of the host.

Fake tensors have a device, a shape and a type and no values. Reading one on the host is an error, so a hidden
synchronisation fails here; so does a copy between host and device that waits. Autograd's engine asks the CUDA driver
for its streams even for fake tensors, so `backward` walks the graph in its place and calls the same nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from video_convmae import create_autoencoder, create_classifier, masking
from video_convmae.build_trainer import build_optimization
from video_convmae.data.loader import Batch
from video_convmae.data.mixing import Mixing
from video_convmae.data.options import MixingConfig
from video_convmae.engine.distributed import DistInfo
from video_convmae.engine.log import BadRecordLog
from video_convmae.engine.metrics import StepMetrics
from video_convmae.engine.options import LogConfig, OptimConfig, TargetConfig, TrainConfig
from video_convmae.engine.tasks import Classification, Normalizer, Pretraining
from video_convmae.engine.teachers import Teacher, Teachers, feature_targets
from video_convmae.engine.trainer import Trainer
from video_convmae.kernels import depthwise
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.encoder import Encoder
from video_convmae.models.packing import Packing
from video_convmae.models.sizes import AutoencoderConfig

CUDA, CLASSES = torch.device("cuda"), 5
SHAPE = {"num_frames": 4, "image_size": 32}


class Waits(RuntimeError):
    """The host waits for the device."""


class NoWaits(TorchDispatchMode):
    """Refuse copies from the device to the host, and those to the device that block."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            refuse_waiting(args[0], kwargs["device"], kwargs.get("non_blocking", False))
        if func is torch.ops.aten.copy_.default:
            refuse_waiting(args[1], args[0].device, kwargs.get("non_blocking", False) or args[2:] == (True,))
        return func(*args, **kwargs)


def refuse_waiting(source: Tensor, to: torch.device, non_blocking: bool) -> None:
    if source.device.type != to.type and (to.type == "cpu" or not non_blocking):
        raise Waits(f"{tuple(source.shape)} is copied from {source.device} to {to}, and the host waits")


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("the gpu tests run the step itself")
    # Autocast and the loss scale would turn themselves off without a GPU.
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(StepMetrics, "add_batch", lambda *_: None)  # reads what a batch holds for the host
    with FakeTensorMode():
        yield


def backward(root: Tensor) -> None:
    """Add the gradients of a scalar to its leaves, as `Tensor.backward` does without autograd's engine.

    A node runs once all those have run that feed it. As in the engine, what it receives must lie on the device of its
    output, and is summed to its shape and cast to its type.

    Raises:
        RuntimeError: a gradient lies on another device than the tensor that it belongs to, or has no shape of it.
    """
    assert root.grad_fn is not None
    producers: Counter = Counter()
    found, seen = [root.grad_fn], {root.grad_fn}
    for node in found:
        for target, _ in node.next_functions:
            if target is not None:
                producers[target] += 1
                if target not in seen:
                    seen.add(target)
                    found.append(target)
    received: dict[Any, dict[int, Tensor]] = {root.grad_fn: {0: torch.ones_like(root)}}
    ready = [root.grad_fn]
    while ready:
        node = ready.pop()
        results = call(node, received.pop(node, {}))
        for (target, number), gradient in zip(node.next_functions, results):
            if target is None:
                continue
            if gradient is not None:
                output = target._input_metadata[number]
                if gradient.device != output.device:
                    raise RuntimeError(f"{node.name()} gives {target.name()} {gradient}; expected {output.device}")
                gradient = gradient.sum_to_size(tuple(output.shape)).to(output.dtype)
                sums = received.setdefault(target, {})
                sums[number] = sums[number] + gradient if number in sums else gradient
            producers[target] -= 1
            if producers[target] == 0:
                ready.append(target)


def call(node: Any, gradients: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """Run a node of the graph on the gradients of its outputs, by their numbers; None where there is none."""
    if not gradients:
        return (None,) * len(node.next_functions)
    given = [gradients.get(number) for number in range(len(node._input_metadata))]
    with torch.no_grad():  # nodes of operators in Python have `apply`; those of C++ are called
        result = node.apply(*given) if isinstance(node, torch.autograd.function.BackwardCFunction) else node(*given)
    return result if isinstance(result, tuple) else (result,)


class Patches(nn.Module):
    """A teacher's features: a convolution of patches of 16 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 6, (1, 16, 16), (1, 16, 16))

    def forward(self, clips: Tensor) -> Tensor:
        return self.conv(clips)


def to_cuda(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


def move(model: nn.Module) -> nn.Module:
    """Put fake tensors on the device in place of all parameters and buffers."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(to_cuda(parameter), parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = to_cuda(buffer)
    return model


def move_packing(packing: Packing) -> Packing:
    """Put fake indices on the device in place of the real ones."""
    for name, value in list(vars(packing).items()):
        if isinstance(value, Tensor):
            setattr(packing, name, to_cuda(value))
    if packing.packed:
        packing.computed = packing.keep
    return packing


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., nn.Module]:
    """Return what takes one step of the trainer, of two clips, and returns the model."""

    def take(recipe: str, implementation: str = "packed", precision: str = "bf16") -> nn.Module:
        teacher = teachers = None
        with _disable_current_modes():  # real: drop path and masks are drawn by value
            if recipe == "targets":
                teacher = Teacher(Patches(), 6, ((0.5,) * 3, (0.25,) * 3), (48, 48), 1, "patches")
                targets = TargetConfig("pixels"), TargetConfig("seen", "patches", tokens="visible")
                config = AutoencoderConfig("tiny", implementation=implementation, **SHAPE)
                model = Autoencoder(config, feature_targets(targets, {"seen": teacher}, 192))
                teachers = Teachers(targets, {"seen": teacher}, model, DistInfo(0, 1, torch.device("cpu")))
            elif recipe == "pretrain":
                model = create_autoencoder("tiny", implementation=implementation, **SHAPE)
            else:
                model = create_classifier("tiny", num_classes=CLASSES, implementation=implementation, **SHAPE)
            visible = torch.ones(2, *model.encoder.config.grid, dtype=torch.bool)
            if recipe != "finetune":
                visible = torch.stack([masking.tube(model.grid, 0.5) for _ in range(2)])
            packing = Packing(visible, torch.device("cpu"), implementation)
        move_packing(packing)
        monkeypatch.setattr(Encoder, "packing", lambda *_: packing)
        for module in filter(None, (model, teacher)):
            move(module)
        normalizer = Normalizer((0.5,) * 3, (0.25,) * 3, CUDA)
        mixing = Mixing(MixingConfig(mixup=0, cutmix=0, smoothing=0.1), CLASSES)
        is_classifier = recipe == "finetune"
        task = Classification(model, normalizer, mixing) if is_classifier else Pretraining(model, normalizer, teachers)
        train = TrainConfig(epochs=1, precision=precision, ema=0.9)
        optim = OptimConfig(lr=1e-3, warmup_epochs=0, clip_grad=1.0)
        clips, labels = torch.empty(2, 3, 4, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
        trainer = Trainer(
            task=task,
            optimization=build_optimization(model, optim, train, 2, 4),
            batches=lambda _: (_ for _ in ()),
            train=train,
            log=LogConfig(),
            info=DistInfo(0, 1, CUDA),
            folder=tmp_path,
            bad_records=BadRecordLog(tmp_path / "bad_records.jsonl", 4, 0.0),
            run_config={},
        )
        batch = Batch(clips, visible, None, labels, torch.zeros(2, dtype=torch.int64), ())
        with NoWaits():
            trainer.train_step(iter([batch]))
        with pytest.raises(DataDependentOutputException):  # or nothing above could have failed
            trainer.state.optimizer.state[next(model.parameters())]["exp_avg"].sum().item()
        return model

    return take


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("implementation", ["packed", "dense"])
@pytest.mark.parametrize("recipe", ["pretrain", "targets", "finetune"])
def test_a_step_never_leaves_the_device(recipe: str, implementation: str, precision: str, step: Callable) -> None:
    step(recipe, implementation, precision)


def put_elsewhere(gradient: Tensor) -> Tensor:
    return torch.zeros(gradient.shape, dtype=gradient.dtype)


def copy_to_the_host(gradient: Tensor) -> Tensor:
    return gradient.cpu().to(gradient.device)


def read(gradient: Tensor) -> Tensor:
    return gradient / gradient.abs().max().item()


def choose_by_value(gradient: Tensor) -> Tensor:
    return gradient[gradient.isfinite()].view(gradient.shape)


def branch(gradient: Tensor) -> Tensor:
    return gradient if gradient.isfinite().all() else gradient.zero_()


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        (put_elsewhere, "expected cuda:0"),
        (copy_to_the_host, "the host waits"),
        (read, "aten._local_scalar_dense"),
        (choose_by_value, "aten.nonzero"),
        (branch, "aten._local_scalar_dense"),
    ],
)
def test_a_mistake_in_our_own_backward_pass_is_found(
    mistake: Callable, error: str, step: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = depthwise._weight_gradient
    monkeypatch.setattr(depthwise, "_weight_gradient", lambda *inputs: mistake(right(*inputs)))
    with pytest.raises((RuntimeError, DataDependentOutputException, DynamicOutputShapeException), match=error):
        step("pretrain")


def test_the_walk_gives_the_gradients_of_autograd() -> None:
    with _disable_current_modes():
        torch.manual_seed(0)
        model = create_autoencoder("tiny", **SHAPE)
        visible = torch.stack([masking.tube(model.grid, 0.5) for _ in range(2)])
        loss = model(torch.randn(2, 3, 4, 32, 32), visible).loss
        expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        backward(loss)
        for (name, parameter), gradient in zip(model.named_parameters(), expected):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7, msg=name)
