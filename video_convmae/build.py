"""A configuration -> model, data sets, trainer, of runs on clips; build_dense.py has detection and segmentation.

What any kind of run needs of a trainer is in build_trainer.py. Nothing is built elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from video_convmae import masking
from video_convmae.build_trainer import Parts, build_trainer
from video_convmae.config import (
    DataConfig,
    FinetuneConfig,
    InitConfig,
    LabelledDataConfig,
    MaskConfig,
    PretrainConfig,
    SourceConfig,
)
from video_convmae.data.datasets import ClipDataset, TestViewDataset
from video_convmae.data.decoding import resolve_reader
from video_convmae.data.decoding.memory import MemoryReader
from video_convmae.data.labels import check_labels, count_labels
from video_convmae.data.mixing import Mixing
from video_convmae.data.mixture import Mixture
from video_convmae.data.options import ViewConfig
from video_convmae.data.records import ListError, Records, read_list
from video_convmae.data.sampling import Sampling
from video_convmae.data.transforms import Augmentation
from video_convmae.data.windows import WindowPlan
from video_convmae.engine.checkpoint import newest_config, read_found_weights
from video_convmae.engine.distributed import DistInfo
from video_convmae.engine.evaluation import evaluate_list, write_bad_records
from video_convmae.engine.inference import ListInference
from video_convmae.engine.metrics import Values
from video_convmae.engine.optim import Optimization
from video_convmae.engine.options import HeadSettings, ProtocolConfig
from video_convmae.engine.probing import choose_records, measure_probe, plan_probe
from video_convmae.engine.sweep import FOLDER, PREFIX, Sweep, measure_heads, split_records
from video_convmae.engine.tasks import Classification, MultiLabel, Normalizer, Pretraining, ProbeSweep, Task
from video_convmae.engine.teachers import Teachers, feature_targets, load_teachers
from video_convmae.engine.trainer import Trainer
from video_convmae.engine.validation import Validation
from video_convmae.errors import UserError
from video_convmae.lists import open_process, read_class_names, read_records, try_records, try_training_records
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.encoder import EncoderParts
from video_convmae.models.probe import Probe
from video_convmae.models.pytorchvideo import LibraryClassifier
from video_convmae.models.sizes import ClassifierConfig, EncoderConfig
from video_convmae.weights.arguments import encoder_arguments
from video_convmae.weights.load import LoadReport, load_weights
from video_convmae.weights.state import Weights

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)
AnyClassifier = Classifier | Probe | LibraryClassifier

OWN_OF_A_RUN = ("drop_path", "implementation")  # fields of an encoder that no weights state

# Models


def build_classifier(config: ClassifierConfig, num_classes: int) -> AnyClassifier:
    """Build the classifier, one of pytorchvideo if `config.size` names it, or the probe if `config.probe` does."""
    if config.of_library:
        return LibraryClassifier(config, num_classes)
    return Classifier(config, num_classes) if config.probe is None else Probe(config, num_classes)


class InitialWeights:
    """The weights of `init.weights`, read once: `model.from_weights` looks at them to choose a model, and they are kept
    until they are loaded into it.
    """

    def __init__(self, config: InitConfig) -> None:
        self._config = config
        self._weights: Weights | None = None

    def look(self) -> Weights:
        """Return them, and keep them. Raises FileNotFoundError or ValueError: they cannot be read."""
        assert self._config.weights is not None
        if self._weights is None:
            self._weights = read_found_weights(self._config.weights)
        return self._weights

    def take(self) -> Weights:
        """Return them, and let go of them. Raises as `look`."""
        weights, self._weights = self.look(), None
        return weights


def load_initial_weights(
    config: InitConfig,
    model: Autoencoder | AnyClassifier | EncoderParts,
    data: SourceConfig,
    initial: InitialWeights | None = None,
) -> LoadReport | None:
    """Load the weights of `init.weights`, if any, and report what was loaded.

    Args:
        config: which weights, and how.
        model: to fill.
        data: how clips are made for it; with the names of the classes, if they are known.
        initial: the weights, if the model was built for them.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file does not fit the model, or was trained on pixels that were normalised otherwise.
    """
    if config.weights is None:
        return None
    weights = (initial or InitialWeights(config)).take()
    names = read_class_names(data) if isinstance(data, LabelledDataConfig) and weights.has("head") else None
    try:
        check_pixels({name: weights.preprocessing.get(f"data.{name}") for name in ("mean", "std")}, data)
        return load_weights(model, weights, inflation=config.inflation, exclude=config.exclude, class_names=names)
    except ValueError as error:
        raise UserError(f"init.weights {config.weights}: {error}") from error


def resolve_model(config: FinetuneConfig, initial: InitialWeights) -> FinetuneConfig:
    """Fill in the model of `model.from_weights`: from the run's own checkpoint, if it has begun, else the weights.

    The checkpoint is verified where it is resumed from; here its configuration is enough.

    Raises:
        UserError: there are no initial weights, or their sizes fit no model of ours.
    """
    if not config.model.from_weights:
        return config
    if config.init.weights is None:
        raise UserError("model.from_weights is on and init.weights is null; expected a file or folder of weights")
    begun = newest_config(Path(config.output) / "checkpoints")
    if begun is not None:
        encoder = {name: begun["model"][name] for name in EncoderConfig.__dataclass_fields__}
        encoder = {n: tuple(v) if isinstance(v, list) else v for n, v in encoder.items() if n not in OWN_OF_A_RUN}
    else:
        weights = initial.look()
        encoder = encoder_arguments(weights)
        if weights.is_image and config.data.format != "image":  # inflated: time is the run's
            encoder = {n: v for n, v in encoder.items() if n not in ("num_frames", "tubelet", "temporal_kernel")}
    return replace(config, model=config.model.with_encoder(encoder))


def check_pixels(stated: Mapping[str, Sequence[float] | None], data: SourceConfig) -> None:
    """Raise a UserError if weights state another normalisation of pixels, `mean` and `std`, than a run has."""
    if all(value is None or np.allclose(value, getattr(data, name), atol=1e-3) for name, value in stated.items()):
        return
    options = " ".join(
        f"--data.{name} [{','.join(f'{v:g}' for v in value)}]" for name, value in stated.items() if value
    )
    raise UserError(
        f"these weights were trained on pixels with another mean or deviation than data.mean {list(data.mean)} and "
        f"data.std {list(data.std)}: set {options}"
    )


# Data sets


def cap_workers(workers: int, info: DistInfo) -> int:
    """Return the loading processes of a device: with those of the machine's other devices no more than its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    capped = min(workers, max(1, cores // devices))
    if capped < workers and info.is_main:
        print(f"data.workers is {workers} for each of {devices} devices, on {cores} cores: {capped} are used")
    return capped


def build_sampling(data: DataConfig, encoder: EncoderConfig) -> Sampling:
    """Build the frame sampling of clips that this encoder takes."""
    return Sampling(data.sampling, encoder.num_frames, data.stride, data.fps)


def build_samplings(data: DataConfig, records: Records, encoder: EncoderConfig) -> tuple[Sampling, ...]:
    """Build the frame sampling of each list of a mixture; none for the records of one list."""
    return tuple(build_sampling(each, encoder) for each in data.sources) if isinstance(records, Mixture) else ()


def build_clips(
    data: DataConfig, records: Records, encoder: EncoderConfig, seed: int, mask: MaskConfig | None = None
) -> ClipDataset:
    """Build the training clips, in the shape that the encoder takes; with a mask, what is hidden and predicted."""
    if encoder.channels != 3:
        raise UserError(f"model.channels is {encoder.channels}; expected 3: the readers give red, green and blue")
    draw_mask = None
    if mask is not None:
        draw_mask = partial(masking.draw, mask.kind, encoder.grid, mask.ratio, mask.decoder_ratio, count=mask.count)
        try:
            visible, _ = draw_mask(torch.Generator())
        except ValueError as error:
            raise UserError(f"mask.ratio {mask.ratio}, mask.decoder_ratio {mask.decoder_ratio}: {error}") from error
        if visible.all():
            raise UserError(f"mask.ratio is {mask.ratio}, which hides none of {visible.numel()} tokens; expected more")
    reader = open_process(data)
    return ClipDataset(
        records,
        build_sampling(data, encoder),
        Augmentation(data.augmentation),
        encoder.clip_shape[2:],
        draw_mask,
        MemoryReader(reader, data.memory) if data.memory else reader,
        data.repeats,
        seed,
        samplings=build_samplings(data, records, encoder),
    )


def build_views(data: DataConfig, records: Records, encoder: EncoderConfig, views: ViewConfig) -> TestViewDataset:
    """Build the test views, in the shape that the encoder takes."""
    return TestViewDataset(
        records,
        build_sampling(data, encoder),
        views,
        Augmentation(data.augmentation),
        encoder.clip_shape[2:],
        open_process(data),
        build_samplings(data, records, encoder),
    )


def plan_windows(data: DataConfig, encoder: EncoderConfig, window: int, hop: int | None) -> WindowPlan:
    """Plan the windows over whole videos.

    Args:
        data: their stride, or frames a second.
        encoder: of the model.
        window: frames of a window.
        hop: frames of the file between the starts of two windows; None: window x stride.

    Raises:
        UserError: the model takes another number of frames, or nothing says how far apart they or the windows are.
    """
    if window != encoder.num_frames:
        raise UserError(
            f"--window is {window}, and the model takes {encoder.num_frames} frames; expected {encoder.num_frames}"
        )
    if data.sampling == "uniform" and window > 1:
        raise UserError(
            "the run takes its frames over the whole video (data.sampling uniform), which says nothing of windows; "
            "expected --sampling dense with --stride or --fps"
        )
    if hop is None and data.fps is not None:
        raise UserError(
            f"--hop is none and the frames are taken at {data.fps:g} a second; expected --hop in file frames"
        )
    return WindowPlan(build_sampling(data, encoder), window * data.stride if hop is None else hop)


def build_normalizer(data: SourceConfig, device: torch.device) -> Normalizer:
    """Build the conversion of bytes to the model's input."""
    return Normalizer(data.mean, data.std, device)


def build_inference(
    model: Autoencoder | AnyClassifier,
    data: DataConfig,
    records: Records,
    protocol: ProtocolConfig,
    info: DistInfo,
) -> ListInference:
    """Build the inference of a model over a list; the model is moved to this process's device."""
    return ListInference(
        model.to(info.device),
        build_views(data, records, model.config, protocol),
        build_normalizer(data, info.device),
        protocol,
        info,
        data.workers,
        data.start_method,
    )


# Runs


def resolve_config(config: Config, info: DistInfo, initial: InitialWeights | None = None) -> Config:
    """Decide what the configuration leaves open, once: the reader, the loading processes that this machine has cores
    for, the precision of validation and test, and the model of `model.from_weights`, from `initial`.
    """
    workers = cap_workers(config.data.workers, info)
    config = replace(config, data=replace(config.data, reader=resolve_reader(config.data.reader), workers=workers))
    if not isinstance(config, FinetuneConfig):
        return config
    config = resolve_model(config, initial or InitialWeights(config.init))
    validate = replace(config.validate, precision=config.validate.precision or config.train.precision)
    test = replace(config.test, precision=config.test.precision or config.train.precision)
    return replace(config, validate=validate, test=test)


def build_pretraining(config: PretrainConfig, info: DistInfo) -> Trainer:
    """Build the trainer of a pretraining run, new or resumed."""
    loaded = load_teachers(config.targets)  # before the seed is set: they may draw random numbers
    torch.manual_seed(config.seed)
    targets = feature_targets(config.targets, loaded, config.model.widths[-1])
    model = Autoencoder(config.model, targets, config.predicts_pixels)
    clips = build_clips(config.data, read_records(config.data), model.config, config.seed, config.mask)

    def task(wrapped: nn.Module, normalizer: Normalizer) -> Pretraining:
        teachers = Teachers(config.targets, loaded, model, info) if config.targets else None
        if teachers is not None and info.is_main:
            print("\n".join(teachers.describe()), flush=True)
        return Pretraining(wrapped, normalizer, teachers)

    parts = _clip_parts(config, info, model, clips, task, partial(build_probe, config, info, model))
    return build_trainer(config, info, parts)


def build_probe(
    config: PretrainConfig, info: DistInfo, model: Autoencoder, optimization: Optimization, batch: int
) -> Validation | None:
    """Build the probe of a pretraining run's features; None without a list.

    Args:
        config: of the run.
        info: the processes.
        model: the autoencoder.
        optimization: gives the length of the run.
        batch: records of one optimizer step, repeats not counted.

    Raises:
        ListError: a record has no label, or all have the same.
    """
    if config.probe.list is None:
        return None
    records = read_list(config.probe.list, config.data.format, config.data.root)
    check_labels(records, count_labels(records))
    classes = len(np.unique(records.labels))
    if classes < 2:
        raise ListError(f"probe.list {config.probe.list} has one class; expected two or more, or null for no probe")
    if records.is_multi_label:
        raise ListError(f"probe.list {config.probe.list} has records of several classes; expected one class of each")
    plan = plan_probe(
        config.probe,
        steps=optimization.schedule.steps,
        steps_per_epoch=optimization.steps_per_epoch,
        batch=batch,
        cost=_probe_cost(config, model),
        available=len(records),
        classes=classes,
    )
    chosen = choose_records(records.labels, plan.records)
    if info.is_main:
        print(
            f"probe: {len(chosen)} of the {len(records)} records of {config.probe.list}, {classes} classes, every "
            f"{plan.every} steps"
        )
    try_records(config.data, config.probe.list, records, info)
    probed = records.select(chosen)
    protocol = ProtocolConfig(precision=config.train.precision)
    folder = Path(config.output) / "probe"

    def measure(model: nn.Module) -> Values:
        assert isinstance(model, Autoencoder)
        return measure_probe(build_inference(model, config.data, probed, protocol, info), folder)

    return Validation(
        measure,
        lambda: Autoencoder(config.model, model.targets, model.predicts_pixels).to(info.device),
        every_steps=plan.every,
        prefix="probe_",
        best=None,
        from_start=True,
        own_model=config.train.compile,  # whole clips would make torch.compile treat every shape as variable
    )


def _probe_cost(config: PretrainConfig, model: Autoencoder) -> float:
    """Return the time of a measured record over that of a training record: the larger of their ratios in decoding and
    in arithmetic (a backward pass counts as two forward ones).

    With `data.memory` training does not decode: a decode then counts as much as a training record.
    """
    mask, repeats = config.mask, config.data.repeats
    visible, predicted = masking.draw(mask.kind, model.grid, mask.ratio, mask.decoder_ratio, torch.Generator())
    trained = model.multiply_adds(int(visible.sum()), None if predicted is None else int(predicted.sum()))
    encoded = model.multiply_adds(visible.numel(), 0)
    del encoded["decoder"]
    arithmetic = sum(encoded.values()) / (3 * repeats * mask.count * sum(trained.values()))
    return 1 + arithmetic if config.data.memory else max(1.0, arithmetic)


def build_finetuning(
    config: FinetuneConfig,
    info: DistInfo,
    records: Records,
    validation: Records | None,
    initial: InitialWeights | None = None,
) -> Trainer:
    """Build the trainer of a finetuning or probing run, new or resumed.

    Args:
        config: with the number of classes.
        info: the processes.
        records, validation: the lists.
        initial: the weights, if the model was decided by them.
    """
    torch.manual_seed(config.seed)
    num_classes = _num_classes(config.data)
    model = build_classifier(config.model, num_classes)
    clips = build_clips(config.data, records, model.config, config.seed)
    kind = Classification
    if config.data.multi_label:
        clips.num_classes, kind = num_classes, MultiLabel
    task = partial(kind, mixing=Mixing(config.mixing, num_classes))
    measured = build_validation(config, info, validation)
    parts = _clip_parts(config, info, model, clips, task, lambda *_: measured, initial)
    return build_trainer(config, info, parts)


def build_sweep(
    config: FinetuneConfig,
    info: DistInfo,
    records: Records,
    validation: Records | None,
    initial: InitialWeights | None = None,
) -> Sweep:
    """Build a sweep of probes, new, resumed or finished; arguments as those of `build_finetuning`."""
    torch.manual_seed(config.seed)
    num_classes, settings = _num_classes(config.data), config.sweep.heads
    training, held = split_records(records, config.sweep.holdout, config.data.root)
    model = Probe(config.model, num_classes, len(settings))
    probe = build_classifier(config.model, num_classes).to(info.device)
    assert isinstance(probe, Probe)
    protocol = replace(config.validate, segments=1, crops=1)

    def measure(model: nn.Module) -> Values:
        assert isinstance(model, Probe)
        return measure_heads(build_inference(model, config.data, held, protocol, info))

    if info.is_main:
        print(
            f"sweep: {len(settings)} heads on one forward pass; {len(held)} of the {len(records)} records of "
            f"{config.data.train} train none and choose one"
        )
    choice = Validation(
        measure,
        lambda: Probe(config.model, num_classes, len(settings)).to(info.device),
        config.validate.every,
        every_steps=config.validate.every_steps,
        prefix=PREFIX,
        best=None,
    )
    clips = build_clips(config.data, training, model.encoder.config, config.seed)
    task = partial(ProbeSweep, mixing=Mixing(config.mixing, num_classes))
    tested = build_validation(config, info, validation)
    folder = Path(config.output)
    parts = _clip_parts(config, info, model, clips, task, lambda *_: choice, initial)
    trainer = build_trainer(replace(config, output=str(folder / FOLDER)), info, parts)
    trainer.publishes = False
    peak = trainer.optimization.schedule.peak
    known = tuple(
        HeadSettings(
            peak if each.lr is None else each.lr,
            config.optim.weight_decay if each.weight_decay is None else each.weight_decay,
        )
        for each in settings
    )
    run_config = trainer.state.config | {"output": config.output}
    share = config.sweep.holdout
    return Sweep(trainer, known, folder, probe, tested, run_config, len(held), share, info)


def build_validation(config: FinetuneConfig, info: DistInfo, records: Records | None) -> Validation | None:
    """Build the validation of a classifier on a list, with the run's own views; None without a list."""
    if records is None:
        return None
    try_records(config.data, str(config.data.validation), records, info)
    folder, num_classes = Path(config.output) / "validation", _num_classes(config.data)
    names = read_class_names(config.data)

    def measure(model: nn.Module) -> Values:
        assert isinstance(model, AnyClassifier)
        inference = build_inference(model, config.data, records, config.validate, info)
        evaluation = evaluate_list(inference, num_classes, multi_label=bool(config.data.multi_label))
        if info.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_bad_records(evaluation.bad_records, folder)
        return evaluation.metrics() | evaluation.judge(names)

    def build_model() -> nn.Module:
        return build_classifier(config.model, num_classes).to(info.device)

    validate = config.validate
    best = "map" if config.data.multi_label else "top1"
    return Validation(
        measure, build_model, validate.every, every_steps=validate.every_steps, best=best, patience=validate.patience
    )


def _num_classes(data: LabelledDataConfig) -> int:
    if data.num_classes is None:
        raise UserError("data.num_classes is none; expected the number that count_classes returns")
    return data.num_classes


def _clip_parts(
    config: PretrainConfig | FinetuneConfig,
    info: DistInfo,
    model: Autoencoder | AnyClassifier,
    clips: ClipDataset,
    task: Callable[[nn.Module, Normalizer], Task],
    validation: Callable[[Optimization, int], Validation | None],
    initial: InitialWeights | None = None,
) -> Parts:
    """Return the parts of a run on clips."""
    data = config.data
    return Parts(
        model=model,
        data=data,
        dataset=clips,
        records=clips.records,
        digest=clips.records.digest(data.root),
        task=lambda wrapped: task(wrapped, build_normalizer(data, info.device)),
        validation=validation,
        try_records=lambda: try_training_records(data, clips.records, info),
        load_weights=lambda: load_initial_weights(config.init, model, data, initial),
        repeats=data.repeats,
        reader=data.reader,
        balanced_by=clips.records.labels if isinstance(data, LabelledDataConfig) and data.balanced else None,
    )
