"""What any kind of run needs of a trainer: batches, optimizer, schedule, resuming, and the assembling of its parts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from video_convmae.config import (
    FinetuneConfig,
    PretrainConfig,
    RunConfig,
    SourceConfig,
    flatten,
    from_plain,
    to_plain,
)
from video_convmae.data.loader import AnyBatch, BatchPlan, ResumableBatchSampler, collate, iter_batches
from video_convmae.data.mixture import Mixture
from video_convmae.engine.checkpoint import Checkpoint, find_latest
from video_convmae.engine.distributed import DistInfo, broadcast_object
from video_convmae.engine.log import BadRecordLog
from video_convmae.engine.loggers import check_loggers
from video_convmae.engine.optim import HasLayers, NamesUndecayed, Optimization, Schedule, head_groups, parameter_groups
from video_convmae.engine.options import HeadSettings, OptimConfig, TrainConfig
from video_convmae.engine.parallel import parallelize, unwrap
from video_convmae.engine.run_folder import check_unchanged
from video_convmae.engine.tasks import Task
from video_convmae.engine.trainer import Trainer
from video_convmae.engine.validation import Validation
from video_convmae.errors import UserError
from video_convmae.models.classifier import Classifier
from video_convmae.models.probe import Probe
from video_convmae.weights.load import LoadReport


def plan_batches(config: RunConfig, info: DistInfo, resumed: dict[str, Any] | None) -> BatchPlan:
    """Deal a step's records out so that the effective batch, and with it the learning rate, stays.

    A device takes as many records at a time as train.batch_size allows and as divide its part evenly.

    Args:
        config: of the run.
        info: the processes.
        resumed: configuration that the run started with, as plain data; None: it starts now.

    Raises:
        ValueError: the effective batch is not that of the start, or cannot be dealt to so many devices.
    """
    train = config.train
    before = None if resumed is None else resumed["train"]["effective_batch"]
    batch = train.effective_batch or before or train.batch_size * info.world_size * train.accumulate
    if before not in (None, batch):
        raise UserError(
            f"train.effective_batch is {batch} and the run in {config.output} began with {before}; expected the same: "
            "steps, epochs and learning rate follow from it"
        )
    if batch % info.world_size:
        raise UserError(
            f"the effective batch is {batch}, which cannot be dealt evenly to {info.world_size} devices: take a number "
            "of devices that divides it, or start a run with another train.effective_batch"
        )
    each = batch // info.world_size
    pairs = isinstance(config, FinetuneConfig) and config.mixing.mixes and config.data.repeats % 2  # of mixed clips
    fitting = [n for n in range(1, min(each, train.batch_size) + 1) if each % n == 0 and not (pairs and n % 2)]
    if not fitting:
        raise UserError(
            f"each device has {each} records of the effective batch {batch}; mixup and cutmix take pairs: make it even"
        )
    return BatchPlan(fitting[-1], info.world_size, info.rank, each // fitting[-1])


def build_optimization(
    model: nn.Module,
    config: OptimConfig,
    train: TrainConfig,
    effective_batch: int,
    steps_per_epoch: int,
    heads: Sequence[HeadSettings] = (),
) -> Optimization:
    """Build the optimizer and its schedule.

    AdamW is fused: it can skip a step with non-finite gradients without the host waiting for the device.

    Args:
        model: whose parameters learn; with layer decay, one that has `layer_scales`. One that has `no_weight_decay`
            names the parameters without.
        config: optimizer and learning rate.
        train: gives the length of the run.
        effective_batch: records of one optimizer step, repeats not counted.
        steps_per_epoch: optimizer steps of one pass over the list.
        heads: of a sweep, which the model has; the schedule's peak is the largest of their learning rates.

    Raises:
        ValueError: so few epochs that there is no step, or a warm-up as long as the run.
    """
    steps = round(train.epochs * steps_per_epoch) if train.max_steps is None else train.max_steps
    if steps < 1:
        raise UserError(
            f"train.epochs is {train.epochs}, with {steps_per_epoch} steps an epoch not one step; expected at least "
            f"{1 / steps_per_epoch:.2g}"
        )
    rates = [head.lr for head in heads if head.lr is not None]
    if rates:
        peak, end = max(rates), config.base_min_lr
        origin = f"{len(heads)} heads, lr {min(rates):.3g} to {peak:.3g} as configured"
    elif config.lr is not None:
        peak, end = config.lr, config.base_min_lr
        origin = f"lr {peak:.3g} as configured"
    else:
        peak, end = (base * effective_batch / 256 for base in (config.base_lr, config.base_min_lr))
        origin = f"lr {peak:.3g} = base_lr {config.base_lr:.3g} x effective batch {effective_batch} / 256"
    warmup = round(config.warmup_epochs * steps_per_epoch) if config.warmup_steps is None else config.warmup_steps
    if warmup and warmup >= steps:
        given = f"warmup_epochs is {config.warmup_epochs:g}, {warmup} steps" if config.warmup_steps is None else None
        raise UserError(
            f"optim.{given or f'warmup_steps is {warmup}'}, and the run has {steps}: the learning rate would never "
            "reach its peak; expected fewer (--optim.warmup_steps), or a longer run"
        )
    schedule = Schedule(peak, end, warmup, steps, config.decay, config.milestones)
    scales = None
    if config.layer_decay != 1:
        if not isinstance(model, HasLayers):
            raise UserError(f"optim.layer_decay is {config.layer_decay}; expected 1: only finetuning has layer decay")
        scales = model.layer_scales(config.layer_decay)
    undecayed = model.no_weight_decay() if isinstance(model, NamesUndecayed) else None
    groups = parameter_groups(model.named_parameters(), config.weight_decay, scales, undecayed)
    if heads:
        decays = [config.weight_decay if head.weight_decay is None else head.weight_decay for head in heads]
        factors = [1.0 if head.lr is None else head.lr / peak for head in heads]
        groups = head_groups(model.named_parameters(), list(zip(factors, decays)))
    if config.optimizer == "lars":
        from timm.optim.lars import Lars

        for group in groups:  # MAE's LARS: the trust ratio is for matrices, with or without weight decay
            group["always_adapt"] = any(p.ndim > 1 for p in group["params"])
        optimizer: torch.optim.Optimizer = Lars(groups, lr=0.0, momentum=config.betas[0])
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)
    return Optimization(optimizer, schedule, config.clip_grad, steps_per_epoch, origin)


@dataclass(frozen=True)
class Parts:
    """What a trainer is assembled from, of any kind of run.

    model: not wrapped, with new weights.
    data: the source of the training records.
    dataset: its keys are `SampleKey`s.
    records: those of training, in the data set.
    digest: of the training records.
    task: the wrapped model -> its training loss.
    validation: the run's length and the records of a step -> measurement beside training, or None.
    try_records: raises where the records cannot be read; called before weights are loaded.
    load_weights: fills a new run's model; None: it has no initial weights.
    collate: samples -> a batch.
    repeats: samples of a record.
    reader: named in the console; None: pictures have one alone.
    balanced_by: class of each record, where every class is to be shown equally often; None: every record once an epoch.
    """

    model: nn.Module
    data: SourceConfig
    dataset: Dataset[Any]
    records: Sized
    digest: str
    task: Callable[[nn.Module], Task]
    validation: Callable[[Optimization, int], Validation | None]
    try_records: Callable[[], None]
    load_weights: Callable[[], LoadReport | None]
    collate: Callable[[list[Any]], AnyBatch] = collate
    repeats: int = 1
    reader: str | None = None
    balanced_by: np.ndarray | None = None


def build_trainer(config: RunConfig, info: DistInfo, parts: Parts) -> Trainer:
    """Load initial weights or find the checkpoint to resume from; build everything that depends on the processes."""
    check_loggers(config.log.to)
    if config.log.pictures is not None and not isinstance(config, PretrainConfig):
        raise UserError("log.pictures is set, and only pretraining has pictures of reconstructions; leave it out")
    folder, model, data, records = Path(config.output), parts.model, parts.data, parts.records
    resume_from = _checkpoint_to_resume(folder / "checkpoints", info)
    if resume_from is not None:
        _check_resumed(config, data.train_names, resume_from, parts.digest, info)
    parts.try_records()
    report = parts.load_weights() if resume_from is None else None
    plan = plan_batches(config, info, None if resume_from is None else resume_from.config)
    config = replace(config, train=replace(config.train, effective_batch=plan.global_batch))
    together = plan.per_device * parts.repeats * plan.ranks
    if together < 2 and any(map(_gives_one_value, model.modules())):
        raise UserError(
            "BatchNorm over one value of each clip or picture needs two or more of them in a forward pass of all "
            f"devices; train.batch_size {config.train.batch_size} on {plan.ranks} devices gives {together}: raise "
            "train.batch_size"
        )
    steps_per_epoch = ResumableBatchSampler(records, plan, config.seed, 0, 0).steps_per_epoch
    wrapped = parallelize(
        model.to(info.device),
        info,
        activation_checkpointing=config.train.activation_checkpointing,
        compile=config.train.compile,
        parallel=config.train.parallel,
        compress_gradients=config.train.compress_gradients,
        accumulates=plan.accumulate > 1,
    )
    heads = config.sweep.heads if isinstance(config, FinetuneConfig) else ()
    optimization = build_optimization(
        unwrap(wrapped), config.optim, config.train, plan.global_batch, steps_per_epoch, heads
    )
    steps = optimization.schedule.steps
    if info.is_main:
        if report is not None:
            print(report)
        elif resume_from is None and (note := _note_frozen(model)) is not None:
            print(f"init.weights is none: {note}")
        lists = f" of {data.train_names}" if isinstance(records, Mixture) else ""
        reader = "" if parts.reader is None else f", reader {parts.reader}"
        print(f"{len(records)} records{lists}{reader}, device {info.device} x {info.world_size}")
        print(
            f"effective batch {plan.global_batch} = {plan.per_device} a device x {plan.ranks} devices x "
            f"{plan.accumulate} accumulated; {optimization.origin}; {steps} steps",
            flush=True,
        )

    def batches(first_step: int) -> Generator[AnyBatch]:
        sampler = ResumableBatchSampler(records, plan, config.seed, first_step, steps, parts.balanced_by)
        pin_memory = info.device.type == "cuda"
        return iter_batches(parts.dataset, sampler, data.workers, pin_memory, data.start_method, parts.collate)

    return Trainer(
        task=parts.task(wrapped),
        optimization=optimization,
        batches=batches,
        train=replace(config.train, batch_size=plan.per_device, accumulate=plan.accumulate),
        log=config.log,
        info=info,
        folder=folder,
        bad_records=BadRecordLog(folder / "bad_records.jsonl", records, data.max_bad_fraction),
        run_config=to_plain(config),
        records=parts.digest,
        seed=config.seed,
        validation=parts.validation(optimization, plan.global_batch),
        resume_from=resume_from,
    )


def _note_frozen(model: nn.Module) -> str | None:
    """Return what becomes of random weights that are not trained; None: all weights are."""
    if isinstance(model, Probe):
        return "a random encoder is probed"
    if isinstance(model, Classifier) and (frozen := model.config.frozen):
        return f"random weights of the encoder are frozen (model.{', model.'.join(frozen)})"
    return None


def _gives_one_value(module: nn.Module) -> bool:
    """Return whether a module gives BatchNorm one value of each sample: a probe's norm, UperNet's coarsest pooling."""
    return isinstance(module, nn.BatchNorm1d) or (isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size == 1)


def _check_resumed(config: RunConfig, train: str, checkpoint: Checkpoint, digest: str, info: DistInfo) -> None:
    """Print what has changed since the run began; `train` names the training records, which have the `digest`.

    Raises:
        UserError: what its weights, data order or schedule are made of has changed.
    """
    now = to_plain(config)
    before = to_plain(from_plain(type(config), _known_fields(checkpoint.config, now)))  # fields added since: defaults
    changed = check_unchanged(Path(config.output), dict(flatten(before)), dict(flatten(now)))
    records = checkpoint.info.get("records")  # not in checkpoints of earlier versions
    if records not in (None, digest):
        raise UserError(
            f"the records of {train} are not those that {config.output} began with; expected the same list "
            f"in the same order, of several with the same weights and options: restore it, or give another --output "
            f"(--init.weights {config.output} starts from these weights)"
        )
    if info.is_main:
        for line in changed:
            print(f"changed since the run began: {line}", flush=True)


def _known_fields(values: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Return the values of those fields that this version knows."""

    def keep(name: str) -> Any:
        both = isinstance(values[name], dict) and isinstance(known[name], dict)
        return _known_fields(values[name], known[name]) if both else values[name]

    return {name: keep(name) for name in values if name in known}


def _checkpoint_to_resume(folder: Path, info: DistInfo) -> Checkpoint | None:
    """Find the newest whole checkpoint on the main process, which verifies it for all and names those it skips."""
    found, errors = find_latest(folder) if info.is_main else (None, [])
    for error in errors:
        print(f"skipped: {error}", flush=True)
    path = broadcast_object(None if found is None else found.path)
    return None if path is None else Checkpoint(path, verified=True)
