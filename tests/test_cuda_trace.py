"""A training step traced as on a CUDA device, without one: no tensor on a wrong device, no wait of the host.

Fake tensors have a device, a shape and a type and no values. Reading one on the host is an error, so a hidden
synchronisation fails here. Backward passes need the CUDA driver even for fake tensors: gradients are made up, and those
of our own operators are checked in test_kernels.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from video_convmae import create_autoencoder, create_classifier, masking
from video_convmae.build import build_optimization
from video_convmae.data.loader import Batch
from video_convmae.data.mixing import Mixing
from video_convmae.data.options import MixingConfig
from video_convmae.engine.distributed import DistInfo
from video_convmae.engine.options import OptimConfig, TargetConfig, TrainConfig
from video_convmae.engine.tasks import Classification, Normalizer, Pretraining, Task, autocast
from video_convmae.engine.teachers import Teacher, Teachers, feature_targets
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.encoder import Encoder
from video_convmae.models.packing import Packing
from video_convmae.models.sizes import AutoencoderConfig

CUDA, CLASSES = torch.device("cuda"), 5
SHAPE = {"num_frames": 4, "image_size": 32}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    if torch.cuda.is_available():
        pytest.skip("the gpu tests run the step itself")
    # Autocast would turn itself off without a GPU.
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    with FakeTensorMode() as mode:
        yield mode


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


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("implementation", ["packed", "dense"])
@pytest.mark.parametrize("recipe", ["pretrain", "targets", "finetune"])
def test_a_step_never_leaves_the_device(
    recipe: str, implementation: str, precision: str, fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.utils._python_dispatch._disable_current_modes():  # real: drop path and masks are drawn by value
        if recipe == "targets":
            teacher = Teacher(Patches(), 6, ((0.5,) * 3, (0.25,) * 3), (48, 48), 1, "patches")
            targets = TargetConfig("pixels"), TargetConfig("seen", "patches", tokens="visible")
            config = AutoencoderConfig("tiny", implementation=implementation, **SHAPE)
            model = Autoencoder(config, feature_targets(targets, {"seen": teacher}, 192))
            teachers = Teachers(targets, {"seen": teacher}, model, DistInfo(0, 1, torch.device("cpu")))
            visible = torch.stack([masking.tube(model.grid, 0.5) for _ in range(2)])
        elif recipe == "pretrain":
            model = create_autoencoder("tiny", implementation=implementation, **SHAPE)
            visible = torch.stack([masking.tube(model.grid, 0.5) for _ in range(2)])
        else:
            model = create_classifier("tiny", num_classes=CLASSES, implementation=implementation, **SHAPE)
            visible = torch.ones(2, *model.encoder.config.grid, dtype=torch.bool)
        packing = Packing(visible, torch.device("cpu"), implementation)
    for name, value in list(vars(packing).items()):
        if isinstance(value, Tensor):
            setattr(packing, name, to_cuda(value))
    if packing.packed:
        packing.computed = packing.keep
    monkeypatch.setattr(Encoder, "packing", lambda *_: packing)
    move(model)
    normalizer = Normalizer((0.5,) * 3, (0.25,) * 3, CUDA)
    mixing = Mixing(MixingConfig(mixup=0, cutmix=0, smoothing=0.1), CLASSES)
    task: Task = Classification(model, normalizer, mixing)
    if recipe != "finetune":
        task = Pretraining(model, normalizer, teachers if recipe == "targets" else None)
    if recipe == "targets":
        move(teacher)
    optimization = build_optimization(
        model, OptimConfig(lr=1e-3, warmup_epochs=0, clip_grad=1.0), TrainConfig(epochs=1), 2, 4
    )
    clips, labels = torch.empty(2, 3, 4, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    batch = Batch(clips, visible, None, labels, torch.zeros(2, dtype=torch.int64), ())
    with autocast(CUDA, precision):
        loss, values = task(batch)
    assert loss.device.type == "cuda"
    assert loss.dtype == torch.float32
    assert all(value.device.type == "cuda" for value in values.values())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    norm = optimization.clip_gradients()
    optimization.optimizer.grad_scale = None
    optimization.optimizer.found_inf = (~norm.isfinite()).float()
    optimization.optimizer.step()
    with pytest.raises(DataDependentOutputException):  # or nothing above could have failed
        loss.item()
