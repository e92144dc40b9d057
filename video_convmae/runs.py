"""Runs: carry out a configuration, and take a model out of what a run left.

What pretraining and finetuning have in common stands here once; tools/pretrain.py and tools/finetune.py add the model
and the task.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from video_convmae.config import FinetuneConfig, PretrainConfig, from_plain, plain, write_yaml
from video_convmae.data.datasets import ClipDataset
from video_convmae.data.decoding import resolve_reader
from video_convmae.data.loader import Batch, BatchPlan, ResumableBatchSampler, load
from video_convmae.data.records import Records
from video_convmae.engine import checkpoint, distributed
from video_convmae.engine.distributed import DistInfo
from video_convmae.engine.evaluation import partial_folder, score_list
from video_convmae.engine.log import BadRecords, write_text
from video_convmae.engine.optim import build_optimization
from video_convmae.engine.tasks import Normalizer, Task
from video_convmae.engine.trainer import Validation, train
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.blocks import AttentionBlock, ConvBlock
from video_convmae.models.classifier import Classifier
from video_convmae.models.probe import Probe
from video_convmae.weights.files import read, run_config

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)

BLOCKS = (ConvBlock, AttentionBlock)  # what is compiled and sharded one by one
CHECKPOINTED = {"none": (), "conv": (ConvBlock,), "all": BLOCKS}  # by train.activation_checkpointing


def resolved(config: Config) -> Config:
    """The configuration with what it leaves open decided, once, before anything is read: `decoder: auto`, and the
    precision of validation and test."""
    config = replace(config, data=replace(config.data, decoder=resolve_reader(config.data.decoder)))
    if not isinstance(config, FinetuneConfig):
        return config
    validate, test = (
        replace(part, precision=part.precision or config.train.precision) for part in (config.validate, config.test)
    )
    return replace(config, validate=validate, test=test)


def carry_out(
    config: PretrainConfig | FinetuneConfig,
    group: DistInfo,
    model: nn.Module,
    clips: ClipDataset,
    task: Callable[[nn.Module, Normalizer], Task],
    validation: Validation | None = None,
) -> int:
    """Train a model as a configuration says; its run folder goes on where it was left.

    Args:
        config: the run's, its decoder resolved.
        group: the processes.
        model: newly built, on the CPU.
        clips: the training data.
        task: wrapped model, pixels -> what is trained.
        validation: what is measured beside training.

    Returns:
        Steps done: all of the schedule's, or fewer where a signal ended the run.
    """
    folder, count = Path(config.output), len(clips)
    begun = _newest(folder / "checkpoints", group)
    report = config.init.load(model) if begun is None else None
    share = plan_batches(config, group, None if begun is None else checkpoint.about(begun)["config"])
    config = replace(config, train=replace(config.train, effective_batch=share.global_batch))
    steps_per_epoch = ResumableBatchSampler(count, share, config.seed, 0, 0).steps_per_epoch
    wrapped = distributed.parallelize(
        model.to(group.device),
        group,
        BLOCKS,
        checkpointed=CHECKPOINTED[config.train.activation_checkpointing],
        compile_blocks=config.train.compile,
        parallel=config.train.parallel,
        compress_gradients=config.train.compress_gradients,
        accumulates=share.accumulate > 1,
    )
    bare = distributed.unwrap(wrapped)
    optimization = build_optimization(bare, config.optim, share.global_batch, config.train.epochs, steps_per_epoch)
    last_step = optimization.schedule.steps
    if group.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_yaml(config, folder / "config.yaml")
        if report is not None:
            print(report)
        elif isinstance(model, Probe) and begun is None:
            print("init.weights is none: a random encoder is probed")
        print(f"{count} records, decoder {config.data.decoder}, device {group.device} x {group.count}")
        print(
            f"effective batch {share.global_batch} = {share.per_device} a device x {share.ranks} devices x "
            f"{share.accumulate} accumulated; {optimization.origin}; {last_step} steps",
            flush=True,
        )

    def load_from(first_step: int) -> Generator[Batch]:
        batches = ResumableBatchSampler(count, share, config.seed, first_step, last_step)
        return load(clips, batches, config.data.workers, group.device.type == "cuda", config.data.start_method)

    started = time.perf_counter()
    steps = train(
        task(wrapped, Normalizer(config.data.mean, config.data.std, group.device)),
        optimization,
        load_from,
        replace(config.train, batch_size=share.per_device, accumulate=share.accumulate),
        group,
        folder,
        BadRecords(folder / "bad_records.jsonl", count, config.data.max_bad_fraction),
        plain(config),
        config.seed,
        validation,
        config.log,
        begun,
    )
    first_step = 0 if begun is None else checkpoint.step_of(begun)
    news = steps > first_step or not (folder / "metrics.json").exists()
    if group.is_main and steps == last_step:
        if news:
            _write_metrics(folder, time.perf_counter() - started)
        print(_kept(folder), flush=True)
    return steps


def _newest(checkpoints: Path, group: DistInfo) -> Path | None:
    """The checkpoint that a run goes on from, as its main process finds it; it says which it passes over."""
    found, complaints = checkpoint.latest(checkpoints) if group.is_main else (None, [])
    for complaint in complaints:
        print(f"passed over: {complaint}", flush=True)
    return distributed.all_gather_object(found)[0]


def plan_batches(config: Config, group: DistInfo, begun: dict[str, Any] | None) -> BatchPlan:
    """How a step's records are dealt out so that the effective batch, and with it the learning rate, stays.

    A device takes as many records at a time as train.batch_size allows and as divide its part evenly.

    Args:
        config: the run's.
        group: the processes.
        begun: the configuration that the run began with, as plain data; None: it begins now.

    Raises:
        ValueError: the effective batch is another than the run began with, or cannot be dealt to so many devices.
    """
    train = config.train
    before = None if begun is None else begun["train"]["effective_batch"]
    batch = train.effective_batch or before or train.batch_size * group.count * train.accumulate
    if before not in (None, batch):
        raise ValueError(
            f"train.effective_batch is {batch} and the run in {config.output} began with {before}; expected the same: "
            "steps, epochs and learning rate follow from it"
        )
    if batch % group.count:
        raise ValueError(
            f"the effective batch is {batch}, which cannot be dealt evenly to {group.count} devices: take a number of "
            "devices that divides it, or begin a run with another train.effective_batch"
        )
    each = batch // group.count
    pairs = isinstance(config, FinetuneConfig) and config.mixing.mixes and config.data.repeats % 2  # of mixed clips
    fitting = [n for n in range(1, min(each, train.batch_size) + 1) if each % n == 0 and not (pairs and n % 2)]
    if not fitting:
        raise ValueError(
            f"each device has {each} records of the effective batch {batch}; mixup and cutmix take pairs: make it even"
        )
    return BatchPlan(fitting[-1], group.count, group.rank, each // fitting[-1])


def remember(
    config: FinetuneConfig, group: DistInfo, model: Probe, records: Records, validation: Validation | None
) -> int:
    """Fill a nearest-neighbour probe with the training list's features and validate it. Returns 0: no step is done.

    A record's feature is that of its validation views; one that cannot be read is reported and left out.
    """
    folder, data = Path(config.output), config.data
    report = config.init.load(model)
    model = model.to(group.device)
    if group.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_yaml(config, folder / "config.yaml")
        print(report or "init.weights is none: a random encoder is probed", flush=True)
    identity = {"data": plain(data), "model": plain(config.model), "views": plain(config.validate), "seed": config.seed}
    weights = hashlib.sha256(b"".join(t.numpy(force=True).tobytes() for t in model.state_dict().values())).hexdigest()
    partial = partial_folder(folder, identity | {"weights": weights, "records": records.digest()})
    distributed.barrier()
    started = time.perf_counter()
    rows = score_list(
        model,
        lambda clips: model.head.embed(model.encode(clips)),
        (model.encoder.width,),
        data.views(records, model.encoder.config, config.validate),
        Normalizer(data.mean, data.std, group.device),
        config.validate,
        group,
        data.workers,
        data.start_method,
        partial,
    )
    if group.is_main:
        (folder / "bad_records.jsonl").unlink(missing_ok=True)  # of an earlier attempt: all were tried again
    distributed.barrier()
    BadRecords(folder / "bad_records.jsonl", len(records), data.max_bad_fraction).add(rows.faults, group.is_main)
    features = F.normalize(torch.from_numpy(rows.values[~rows.failed]), dim=1)  # a mean over views has lost its length
    model.head.fit(features.to(group.device), torch.from_numpy(records.labels[~rows.failed]).to(group.device))
    values = {} if validation is None else validation.measure(model)
    state = {"model": model.state_dict(), "ema": None, "config": plain(config)}
    checkpoint.save(folder / "checkpoints", 0, state, writes=group.is_main)
    if group.is_main:
        metrics = {f"val_{name}": value for name, value in values.items()}
        metrics |= {"step": 0, "remembered": len(features), "seconds": time.perf_counter() - started}
        last = {"path": f"checkpoints/{checkpoint.name_of(0)}", "step": 0, "top1": values.get("top1")}
        write_text(folder / "metrics.json", json.dumps(metrics | {"last": last}) + "\n")
        print(", ".join(f"{name} {value}" for name, value in metrics.items()), flush=True)
        print(_kept(folder), flush=True)
        shutil.rmtree(folder / "partial")
    distributed.barrier()
    return 0


def _write_metrics(folder: Path, seconds: float) -> None:
    """metrics.json of a run that ended: the last logged values, the last and the best checkpoint (paths within the run
    folder) with what they scored, this process's seconds."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = {name: value for line in lines if line["step"] == lines[-1]["step"] for name, value in line.items()}
    metrics["last"] = {"path": f"checkpoints/{checkpoint.name_of(metrics['step'])}", "step": metrics["step"]}
    validated = [line for line in lines if line.get("val_top1") is not None]
    if validated:
        best = max(validated, key=lambda line: line["val_top1"])  # the first of equals, as checkpoints/best
        metrics["last"]["top1"] = metrics.get("val_top1")
        metrics["best"] = {"path": f"checkpoints/{checkpoint.BEST}", "step": best["step"], "top1": best["val_top1"]}
    write_text(folder / "metrics.json", json.dumps(metrics | {"seconds": seconds}) + "\n")


def _kept(folder: Path) -> str:
    """The line that names a finished run's last and best checkpoint."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    parts = []
    for name in ("last", "best"):
        if (kept := metrics.get(name)) is not None:
            top1 = "" if kept.get("top1") is None else f", validation top-1 {kept['top1']:.4f}"
            parts.append(f"{name} checkpoint {folder / kept['path']} (step {kept['step']}{top1})")
    return "; ".join(parts)


def run_kind(path: Path) -> Literal["pretrain", "finetune"] | None:
    """Whose checkpoint, or file of weights, a path is; None: no run's of ours."""
    try:
        config = run_config(path)
    except (OSError, ValueError, SafetensorError):
        return None
    if not isinstance(config, dict) or not {"data", "model", "init"} <= config.keys():
        return None
    return "finetune" if "mixing" in config else "pretrain"


def load_autoencoder(path: str | Path, ema: bool = False) -> tuple[Autoencoder, PretrainConfig]:
    """A pretrained model in evaluation mode, and the configuration of its run.

    Args:
        path: a checkpoint, a run folder (its newest checkpoint), or the model.safetensors that a run leaves.
        ema: take the moving average of the weights, where the run kept one (`train.ema`).

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is no checkpoint of a pretraining run, or holds no average.
    """
    path = checkpoint.find(path)
    weights, plain_config = _read(path, ema)
    config = from_plain(PretrainConfig, plain_config)
    model = config.model.autoencoder()
    model.load_state_dict(weights)
    return model.eval(), config


def load_classifier(path: str | Path, ema: bool | None = None) -> tuple[Classifier | Probe, FinetuneConfig]:
    """A finetuned or probed model in evaluation mode, and the configuration of its run.

    Args:
        path: a checkpoint (`checkpoints/best` is the best), a run folder (its newest checkpoint), or the
            model.safetensors that a run leaves.
        ema: take the moving average of the weights; None: where the run kept one, which is what it validated.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is no checkpoint of a finetuning run, or holds no average.
    """
    path = checkpoint.find(path)
    if run_kind(path) != "finetune":
        raise ValueError(f"{path} is not a checkpoint of tools/finetune.py")
    weights, plain_config = _read(path, ema)
    config = from_plain(FinetuneConfig, plain_config)
    model = config.model.build(config.data.num_classes)
    model.load_state_dict(weights)
    return model.eval(), config


def _read(path: Path, ema: bool | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and configuration; `ema` None takes the average where there is one."""
    if path.is_file():  # model.safetensors: the average where the run kept one
        state = read(path)
        return state["model"], state["config"]
    state = checkpoint.load(path, "model", "ema")
    average = state.get("ema")
    if ema and average is None:
        raise ValueError(f"{path} holds no average of the weights: the run had no train.ema")
    return (state["model"] if average is None or ema is False else average), state["config"]
