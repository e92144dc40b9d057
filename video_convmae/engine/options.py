"""Options of training, logging and testing: plain dataclasses, read without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from video_convmae.bounds import Bounds, check_bounds
from video_convmae.data.options import ViewConfig
from video_convmae.models.sizes import FeatureLoss, TargetTokens

Parallel = Literal["ddp", "fsdp"]
Precision = Literal["bf16", "fp16", "fp32"]
Decay = Literal["cosine", "linear", "steps"]
ActivationCheckpointing = Literal["none", "conv", "all"]
FeatureKind = Literal["pooled", "tokens"]
LoggerName = Literal["tensorboard", "wandb", "mlflow"]

TIMM, AVERAGE = "timm:", "ema"  # teachers that are no path
HANG_TIMEOUT = 1800.0  # seconds without progress after which a process ends


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    optimizer: Literal["adamw", "lars"] = "adamw"
    """adamw, or lars (large-batch linear probes)."""
    base_lr: Annotated[float, Bounds(least=0)] = 1.5e-4
    """Learning rate for an effective batch of 256: lr = base_lr x effective batch / 256."""
    base_min_lr: Annotated[float, Bounds(least=0)] = 0.0
    """Learning rate at the end of the cosine or the line, for an effective batch of 256."""
    lr: Annotated[float | None, Bounds(least=0)] = None
    """Absolute learning rate; replaces the rule above, and base_min_lr is then absolute too."""
    decay: Decay = "cosine"
    """How it falls after the warm-up: a half cosine, a line, or steps to a tenth at the milestones."""
    milestones: Annotated[tuple[float, ...], Bounds(above=0, below=1)] = ()
    """With decay steps: shares of the run."""
    warmup_epochs: Annotated[float, Bounds(least=0)] = 40
    """Epochs of linear warm-up from 0."""
    warmup_steps: Annotated[int | None, Bounds(least=0)] = None
    """Warm-up in optimizer steps; replaces warmup_epochs, as train.max_steps replaces train.epochs."""
    weight_decay: Annotated[float, Bounds(least=0)] = 0.05
    """Weight decay of matrices and kernels; vectors (biases, norms, the mask token) and positions have none. Of
    pytorchvideo's MViT positions and class token have it, as in its published training."""
    layer_decay: Annotated[float, Bounds(above=0, most=1)] = 1.0
    """Finetuning: learning rate of a layer divided by that of the layer after it."""
    betas: Annotated[tuple[float, float], Bounds(least=0, below=1)] = (0.9, 0.95)
    """AdamW's betas; the first is the momentum of LARS."""
    clip_grad: Annotated[float | None, Bounds(above=0)] = None
    """Largest gradient norm; none: no clipping."""

    def __post_init__(self) -> None:
        check_bounds(self, "optim.{}")
        if (self.decay == "steps") != bool(self.milestones):
            raise ValueError(
                f"optim.decay is {self.decay} and optim.milestones {list(self.milestones)}; expected milestones with "
                "steps, and none with the others"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, precision and parallelism of a run."""

    epochs: Annotated[float, Bounds(above=0)] = 800
    """Passes over the list; a repeated clip counts with its record."""
    max_steps: Annotated[int | None, Bounds(least=1)] = None
    """Length in optimizer steps; replaces epochs. The schedule ends there."""
    batch_size: Annotated[int, Bounds(least=1)] = 32
    """Records of one device in one forward pass, repeats not counted."""
    accumulate: Annotated[int, Bounds(least=1)] = 1
    """Forward passes whose gradients make one step, unless effective_batch is set."""
    effective_batch: Annotated[int | None, Bounds(least=1)] = None
    """Records of one step on all devices, repeats not counted; accumulation and, if needed, batch_size adapt to the
    number of devices. none: batch_size x devices x accumulate at the start of the run, and kept on resuming."""
    precision: Precision = "bf16"
    """Autocast type; fp16 comes with loss scaling, for GPUs older than Ampere."""
    parallel: Parallel = "ddp"
    """Several devices: ddp keeps all weights on each; fsdp shards weights, gradients and optimizer (large, huge)."""
    compress_gradients: bool = False
    """Send gradients between devices as bfloat16: half the bytes."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Blocks that recompute their activations in the backward pass: those of the convolutional stages, or all, which
    is a third more arithmetic."""
    compile: bool = False
    """torch.compile each block."""
    ema: Annotated[float | None, Bounds(least=0, most=1)] = None
    """Decay of an exponential moving average of the weights; none: no average."""
    log_every: Annotated[int, Bounds(least=1)] = 20
    """Steps between two logged ones; the host waits for the device only then."""
    save_every: Annotated[float, Bounds(above=0)] = 1.0
    """Epochs between two checkpoints, may be a fraction. One is always written before a validation and at the end."""
    keep: Annotated[int, Bounds(least=1)] = 2
    """Number of newest checkpoints that stay; the best by the validation stays too."""
    keep_every: Annotated[float | None, Bounds(above=0)] = None
    """Epochs between checkpoints that are never removed; none: no such checkpoints."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """After a non-finite loss or gradient, which reaches neither weights nor running statistics: stop the run, or skip
    the step."""

    def __post_init__(self) -> None:
        check_bounds(self, "train.{}")
        if self.parallel == "fsdp" and self.precision == "fp16":
            raise ValueError("train.precision is fp16 and train.parallel is fsdp; expected bf16 or fp32 with fsdp")


class HeadSettings(NamedTuple):
    """Learning rate (the peak) and weight decay of a head; None: those of the run."""

    lr: float | None
    weight_decay: float | None


@dataclass(frozen=True)
class SweepConfig:
    """Heads of a probe, trained side by side on one frozen forward pass; a held-out part of data.train chooses one."""

    lr: Annotated[tuple[float, ...], Bounds(above=0)] = ()
    """Learning rates (absolute, in place of optim.lr), each with every weight decay; empty: that of the run."""
    weight_decay: Annotated[tuple[float, ...], Bounds(least=0)] = ()
    """Weight decays; empty: that of the run. Without learning rates and weight decays there is no sweep."""
    holdout: Annotated[float, Bounds(above=0, below=1)] = 0.1
    """Share of the records of each class of data.train that trains no head and chooses one (docs/finetuning.md)."""

    def __post_init__(self) -> None:
        check_bounds(self, "sweep.{}")
        for name in ("lr", "weight_decay"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"sweep.{name} is {list(values)}; expected each value once")

    @property
    def heads(self) -> tuple[HeadSettings, ...]:
        """Settings of every head; empty: no sweep."""
        if not self.lr and not self.weight_decay:
            return ()
        return tuple(HeadSettings(lr, decay) for lr in self.lr or (None,) for decay in self.weight_decay or (None,))


@dataclass(frozen=True)
class LogConfig:
    """Where a run logs to, and measurements beside the usual log; train.log_every sets the interval."""

    to: tuple[LoggerName, ...] = ("tensorboard",)
    """Where it logs to beside log.jsonl: tensorboard, wandb, mlflow; empty: nowhere (docs/pretraining.md, Loggers)."""
    pictures: Annotated[float | None, Bounds(above=0)] = None
    """Pretraining: epochs between two pictures of reconstructions, in the folder pictures and in the loggers; the last
    step is always followed by one. none: no pictures."""
    profile: bool = False
    """Split the time of a step into data wait, forward, backward, optimizer and communication, most of which overlaps
    with the others. For communication, torch.profiler records one step of each logged interval."""
    trace: Annotated[int, Bounds(least=0)] = 0
    """Steps, after the first three, that each rank records in logs/trace_rank_NNNN.json.gz for ui.perfetto.dev."""

    def __post_init__(self) -> None:
        check_bounds(self, "log.{}")
        if len(set(self.to)) < len(self.to):
            raise ValueError(f"log.to is {list(self.to)}; expected each name once")
        if self.profile and self.trace:
            raise ValueError("log.profile and log.trace are both on; expected one: PyTorch runs one profiler at a time")


@dataclass(frozen=True)
class TargetConfig:
    """What the model predicts: pixels, or the features of a teacher (docs/pretraining.md, Targets)."""

    name: str
    """pixels; of features a word of your own: the log has their loss as loss_NAME."""
    teacher: str | None = None
    """none: pixels. timm:NAME, a model of timm for images; ema, an average of the encoder that is trained; or what
    init.weights takes: a run folder, a checkpoint, a published file, a folder of Hugging Face's (V-JEPA 2 too)."""
    weights: str | None = None
    """File of the weights of timm:NAME. Nothing is downloaded."""
    tokens: TargetTokens = "hidden"
    """hidden: reconstructed by the decoder; visible: mimicked by the encoder (ConvMAE-v2)."""
    layer: Annotated[int | None, Bounds(least=1)] = None
    """At visible tokens: the convolutional stage, from 1, that mimics; none: the tokens after fusion and norm do."""
    loss: FeatureLoss = "smooth_l1"
    """Distance from layer-normalised features: smooth_l1 or cosine. Of pixels it is the mean squared error."""
    weight: Annotated[float, Bounds(above=0)] = 1.0
    """Weight of the loss in the sum."""
    warmup_steps: Annotated[int, Bounds(least=0)] = 0
    """Optimizer steps over which that weight rises from 0."""
    momentum: Annotated[float, Bounds(least=0, below=1)] = 0.999
    """ema: largest weight of the average in an update; it rises to this as that of train.ema does."""
    frames: Literal["middle", "all"] = "middle"
    """Teachers of images: the frames of a token that they see; of all, features are averaged."""
    image_size: Annotated[int | None, Bounds(least=1)] = None
    """timm:NAME: pixels of a side of its input; none: its own."""

    def __post_init__(self) -> None:
        def check(is_right: bool, field: str, expected: str) -> None:
            if not is_right:
                raise ValueError(f"{field} of the target {self.name!r} is {getattr(self, field)}; expected {expected}")

        pixels = self.teacher is None
        word = self.name.isidentifier() and self.name not in ("nothing", "scale")  # of which the log has other losses
        check(word, "name", "a word of letters, digits and _, not nothing or scale")
        check(pixels or self.name != "pixels", "name", "another name for the features of a teacher")
        if pixels and self.name != "pixels":
            raise ValueError(f"the target {self.name!r} has no teacher; expected one, or the name pixels")
        check(not pixels or self.tokens == "hidden", "tokens", "hidden, for pixels")
        check(self.layer is None or self.tokens == "visible", "layer", "none, but at visible tokens")
        is_timm = self.teacher is not None and self.teacher.startswith(TIMM)
        check(is_timm or self.weights is None, "weights", "none: only timm:NAME has a file beside its name")
        check(is_timm or self.image_size is None, "image_size", "none: only timm:NAME takes another than its own")
        check_bounds(self, f"{{}} of the target {self.name!r}")


def is_path_of_teacher(teacher: str | None) -> bool:
    """Return whether a target's `teacher` is a path."""
    return teacher is not None and teacher != AVERAGE and not teacher.startswith(TIMM)


@dataclass(frozen=True)
class ProbeConfig:
    """Probes of the features while a model is pretrained: what can be read from them so far."""

    list: str | None = None
    """Labelled list, with the format and root of data.train; it is halved, and each half tests what the other taught.
    none: no probe."""
    every: Annotated[float | None, Bounds(above=0)] = None
    """Epochs between two measurements; the first is of the untrained model, the last of the finished one. none: up to
    20 in all, as many as 5% of the training time allow."""
    records: Annotated[int | None, Bounds(least=4)] = None
    """Records that are measured, chosen evenly over the classes; none: as many as 5% of the training time allow."""

    def __post_init__(self) -> None:
        check_bounds(self, "probe.{}")


@dataclass(frozen=True)
class ProtocolConfig(ViewConfig):
    """Test protocol of a classifier: its views, and how they are computed."""

    batch_size: Annotated[int, Bounds(least=1)] = 8
    """Records whose views go through the model together; a score may depend on it in the last bits."""
    precision: Precision | None = None
    """Autocast type; none: that of the training."""
