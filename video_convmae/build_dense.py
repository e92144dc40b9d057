"""A configuration of a dense task -> model, data, trainer: detection and segmentation, beside build.py.

What it shares with clips is in build.py (initial weights) and build_trainer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from video_convmae.build import build_normalizer, cap_workers, check_pixels, load_initial_weights
from video_convmae.build_trainer import Parts, build_trainer
from video_convmae.config import SourceConfig
from video_convmae.config_dense import (
    DetectionDataConfig,
    SegmentationDataConfig,
    SegmentationTestConfig,
    TrainDetectionConfig,
    TrainSegmentationConfig,
)
from video_convmae.data.coco import CocoRecords, read_coco
from video_convmae.data.datasets import SampleKey
from video_convmae.data.decoding import DecodeError
from video_convmae.data.decoding.memory import MemoryReader
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.detection import DetectionDataset, DetectionTestDataset
from video_convmae.data.labels import find_names
from video_convmae.data.loader import collate_pictures
from video_convmae.data.options import JitterConfig
from video_convmae.data.records import ListError
from video_convmae.data.segmentation import (
    Labels,
    SegmentationDataset,
    SegmentationRecords,
    SegmentationTestDataset,
    classes_seen,
    read_pairs,
)
from video_convmae.dense.detection import Detector
from video_convmae.dense.segmentation import Segmenter, pixel_losses, slide
from video_convmae.engine.checkpoint import find_weights
from video_convmae.engine.dense_tasks import Detection, Segmentation
from video_convmae.engine.detection import DetectionInference, judge_detector
from video_convmae.engine.distributed import DistInfo, broadcast_object
from video_convmae.engine.evaluation import write_bad_records
from video_convmae.engine.metrics import Values
from video_convmae.engine.options import Precision
from video_convmae.engine.segmentation import SegmentationInference
from video_convmae.engine.tasks import Task
from video_convmae.engine.trainer import Trainer
from video_convmae.engine.validation import Validation
from video_convmae.errors import UserError
from video_convmae.models import positions
from video_convmae.runs import load_detector, load_segmenter, run_kind
from video_convmae.weights.load import LoadReport, compare_shapes

BACKBONE = "backbone."
COARSEST = 64  # stride of the coarsest level that anchors lie on

# What both tasks need


class PictureRecords(Protocol):
    """Records of a dense task: pictures and what is marked on them."""

    def __len__(self) -> int: ...

    def digest(self) -> str: ...


def picture_parts(
    config: TrainDetectionConfig | TrainSegmentationConfig,
    info: DistInfo,
    model: Detector | Segmenter,
    dataset: Dataset[Any],
    records: PictureRecords,
    task: Callable[[nn.Module], Task],
    validation: Validation | None,
) -> Parts:
    """Return the parts of a run on pictures, as `Parts` has them."""
    data = config.data
    return Parts(
        model=model,
        data=data,
        dataset=dataset,
        records=records,
        digest=records.digest(),
        task=task,
        validation=lambda *_: validation,
        try_records=lambda: try_pictures(data, dataset, info),
        load_weights=lambda: load_dense_weights(config, model),
        collate=collate_pictures,
    )


def load_dense_weights(
    config: TrainDetectionConfig | TrainSegmentationConfig, model: Detector | Segmenter
) -> LoadReport | None:
    """Load the weights of `init.weights`, if any: an encoder's into the backbone, or all of a run of the same task.

    Of such a run the layers of single classes stay new if the classes are others, and all heads if `init.exclude` has
    head.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the weights do not fit, or were trained on pixels that were normalised otherwise.
    """
    init, data = config.init, config.data
    found = None if init.weights is None else find_weights(init.weights)
    kind = None if found is None else run_kind(found)
    if found is None or kind not in ("detection", "segmentation"):
        return load_initial_weights(init, model.backbone, data)
    if kind != ("detection" if isinstance(model, Detector) else "segmentation"):
        raise UserError(f"init.weights {init.weights} is a run of {kind}; expected one of the same task, or an encoder")
    if others := sorted(set(init.exclude) - {"head"}):
        raise UserError(f"init.exclude has {', '.join(others)}; of a run of {kind} only head can be excluded")
    before, theirs = load_detector(found) if kind == "detection" else load_segmenter(found)
    grid, own_grid = before.backbone.config.grid, model.backbone.config.grid
    names = {each.labels for each in (theirs.data, data) if each.labels}  # a segmenter's classes may have none
    taken, note = before.state_dict(), None
    if grid != own_grid:
        table = f"{BACKBONE}positions"
        taken[table] = positions.resize(taken[table][0], grid, own_grid)[None]
    if init.exclude:
        taken = {name: tensor for name, tensor in taken.items() if name.startswith(BACKBONE)}
        note = "excluded as asked: head"
    elif before.num_classes != model.num_classes or len(names) == 2:
        taken = {name: tensor for name, tensor in taken.items() if not name.startswith(model.OF_CLASSES)}
        note = "the layers of single classes are new: the run's classes are others"
    try:
        check_pixels({"mean": theirs.data.mean, "std": theirs.data.std}, data)
        return _fill(model, taken, f"VideoConvMAE {kind} run", note)
    except UserError as error:
        raise UserError(f"init.weights {init.weights}: {error}") from error


def _fill(model: nn.Module, taken: dict[str, Tensor], format: str, note: str | None) -> LoadReport:
    """Fill what a model has of a run's tensors. Raises a UserError if it is another model, and changes nothing."""
    own = model.state_dict()
    loaded = {name: tensor for name, tensor in taken.items() if name in own}
    compared = [n for n in {**own, **taken} if n in loaded or n.startswith(BACKBONE)]  # heads may differ
    parts = ({name: tensors[name] for name in compared if name in tensors} for tensors in (own, taken))
    if faults := compare_shapes(*parts):
        raise UserError(f"another model than this run's ({faults[0]}); set --model as its config.yaml does")
    model.load_state_dict(loaded, strict=False)
    return LoadReport(
        format=format,
        loaded=tuple(loaded),
        missing=tuple(name for name in own if name not in loaded),
        unexpected=tuple(name for name in taken if name not in loaded),
        reshaped=(),
        notes=() if note is None else (note,),
    )


def try_pictures(data: SourceConfig, dataset: Dataset[Any], info: DistInfo) -> None:
    """Read one training sample: a wrong folder is met before any work. The main process does it for all.

    Raises:
        ListError: it cannot be read, and neither can those that would replace it.
    """
    error = None
    if info.is_main:
        try:
            dataset[SampleKey(0, 0)]
        except DecodeError as met:
            error = f"{data.train}: {met}; check data.root, which is {data.root!r}, and the files"
    if (error := broadcast_object(error)) is not None:
        raise ListError(error)


def picture_reader(data: SourceConfig) -> ReaderProcess | MemoryReader:
    """Build the reader of training pictures; they keep their size, to which boxes and masks belong."""
    reader = ReaderProcess("pyav", data.decode_timeout, max_side=None)
    return MemoryReader(reader, data.memory) if data.memory else reader


# Detection


def resolve_detection(
    config: TrainDetectionConfig, info: DistInfo
) -> tuple[TrainDetectionConfig, CocoRecords, CocoRecords | None]:
    """Read the data sets, and decide once what the configuration leaves open: loading processes, precision, classes.

    Returns:
        The configuration with the classes, the training pictures, and those of the validation.

    Raises:
        ListError: a data set cannot be used, or the classes of the two differ.
        ValueError: masks are to be predicted, and the data have none.
    """
    data = config.data
    records = read_coco(data.train, data.root, training=True)
    validation = None if data.validation is None else read_coco(data.validation, data.root)
    if validation is not None and validation.categories != records.categories:
        raise ListError(
            f"the categories of {data.train} ({len(records.categories)}) and of {data.validation} "
            f"({len(validation.categories)}) differ; expected the same ids and names in both"
        )
    if config.model.masks and not any(each.segmentation for record in records for each in record.objects):
        raise ListError(f"{data.train} has no masks: set --model.masks false for a detector of boxes alone")
    ids, names = zip(*records.categories)
    data = replace(data, workers=cap_workers(data.workers, info), labels=names, category_ids=ids)
    test = replace(config.validate, precision=config.validate.precision or config.train.precision)
    return replace(config, data=data, validate=test), records, validation


def build_detection(
    config: TrainDetectionConfig, info: DistInfo, records: CocoRecords, validation: CocoRecords | None
) -> Trainer:
    """Build the trainer of a detector, new or resumed; the arguments are those that `resolve_detection` returns."""
    torch.manual_seed(config.seed)
    model = Detector(config.model, len(config.data.labels))
    data = config.data
    dataset = DetectionDataset(records, data.augmentation, picture_reader(data), config.seed)
    size = padded_size(data.augmentation.size)

    def task(wrapped: nn.Module) -> Detection:
        return Detection(wrapped, build_normalizer(data, info.device), size, config.seed)

    measured = None if validation is None else build_detection_validation(config, info, validation)
    return build_trainer(config, info, picture_parts(config, info, model, dataset, records, task, measured))


def build_detection_validation(config: TrainDetectionConfig, info: DistInfo, records: CocoRecords) -> Validation:
    """Build the validation of a detector: COCO's numbers, and what cannot be read."""
    folder, test = Path(config.output) / "validation", config.validate
    precision = test.precision or config.train.precision
    inference = build_detection_inference(config.data, records, test.batch_size, precision, info)

    def measure(model: nn.Module) -> Values:
        metrics, _, bad_records = inference.evaluate(model)
        if info.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_bad_records(bad_records, folder)
        return metrics | judge_detector(metrics)

    def build_model() -> nn.Module:
        return Detector(config.model, len(config.data.labels)).to(info.device)

    return Validation(measure, build_model, test.every, every_steps=test.every_steps, best="box_ap")


def build_detection_inference(
    data: DetectionDataConfig,
    records: CocoRecords,
    batch_size: int,
    precision: Precision,
    info: DistInfo,
    show: bool = False,
) -> DetectionInference:
    """Build the inference of a detector over a data set."""
    reader = ReaderProcess("pyav", data.decode_timeout, max_side=None)
    return DetectionInference(
        DetectionTestDataset(records, data.augmentation, reader),
        build_normalizer(data, info.device),
        test_size(data.augmentation),
        batch_size,
        precision,
        info,
        data.workers,
        data.start_method,
        show,
    )


def padded_size(side: int) -> tuple[int, int]:
    """Return the height and width that pictures of up to `side` pixels are padded to: whole cells of every level."""
    padded = -(-side // COARSEST) * COARSEST
    return padded, padded


def test_size(augmentation: JitterConfig) -> tuple[int, int]:
    """Return the height and width that test pictures are padded to; all have the same."""
    return padded_size(max(augmentation.test_longest, augmentation.size if augmentation.pad else 0))


# Segmentation


def resolve_segmentation(
    config: TrainSegmentationConfig, info: DistInfo
) -> tuple[TrainSegmentationConfig, SegmentationRecords, SegmentationRecords | None]:
    """Read the folders, and decide once what the configuration leaves open: loading processes, precision, classes.

    Returns:
        The configuration with the classes, the training pictures, and those of the validation.

    Raises:
        ListError: a folder cannot be used, or the number of classes is not known.
    """
    data = config.data
    records = read_pairs(data.train, data.root, data.train_maps)
    validation = None
    if data.validation is not None:
        validation = read_pairs(data.validation, data.root, data.validation_maps)
    names = data.labels if isinstance(data.labels, tuple) else None
    if isinstance(data.labels, str):
        names = tuple(find_names(data.labels))
    count = data.num_classes or (None if names is None else len(names))
    if count is None:
        raise ListError(
            "the number of classes is not known: expected data.num_classes (ADE20K: 150), or a file of names, "
            "data.labels"
        )
    if names is not None and len(names) != count:
        raise ListError(f"data.num_classes is {count} and data.labels has {len(names)} names; expected as many")
    workers = cap_workers(data.workers, info)
    data = replace(data, workers=workers, labels=names, num_classes=count)
    if info.is_main and count > 1 and len(seen := classes_seen(records, labels_of(data))) < 2:
        print(
            f"label maps: those looked at in {records.maps} hold the class {min(seen, default='none')} alone; value "
            f"{data.ignored} is ignored (data.ignored): masks of 0 and 255 need other values",
            flush=True,
        )
    test = replace(config.validate, precision=config.validate.precision or config.train.precision)
    return replace(config, data=data, validate=test), records, validation


def build_segmentation(
    config: TrainSegmentationConfig,
    info: DistInfo,
    records: SegmentationRecords,
    validation: SegmentationRecords | None,
) -> Trainer:
    """Build the trainer of a segmenter, new or resumed; arguments are those that `resolve_segmentation` returns."""
    torch.manual_seed(config.seed)
    data = config.data
    model = Segmenter(config.model, labels_of(data).classes)
    dataset = SegmentationDataset(records, labels_of(data), data.augmentation, picture_reader(data), config.seed)

    def task(wrapped: nn.Module) -> Segmentation:
        normalizer = build_normalizer(data, info.device)
        return Segmentation(wrapped, normalizer, pixel_losses, config.model.auxiliary_weight)

    measured = None if validation is None else build_segmentation_validation(config, info, validation)
    return build_trainer(config, info, picture_parts(config, info, model, dataset, records, task, measured))


def build_segmentation_validation(
    config: TrainSegmentationConfig, info: DistInfo, records: SegmentationRecords
) -> Validation:
    """Build the validation of a segmenter by sliding windows: mIoU, mAcc, aAcc, and what cannot be read."""
    folder, test = Path(config.output) / "validation", config.validate

    def measure(model: nn.Module) -> Values:
        result = build_segmentation_inference(model, config.data, records, test, info).run()
        if info.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_bad_records(result.bad_records, folder)
        return result.metrics() | result.judge()

    def build_model() -> nn.Module:
        return Segmenter(config.model, labels_of(config.data).classes).to(info.device)

    return Validation(measure, build_model, test.every, every_steps=test.every_steps, best="miou")


def build_segmentation_inference(
    model: nn.Module,
    data: SegmentationDataConfig,
    records: SegmentationRecords,
    test: SegmentationTestConfig,
    info: DistInfo,
) -> SegmentationInference:
    """Build the inference of a segmenter over pictures with label maps."""
    labels, reader = labels_of(data), ReaderProcess("pyav", data.decode_timeout, max_side=None)

    def logits(model: nn.Module, images: Tensor) -> Tensor:
        return slide(model, images, test.window, test.stride, labels.classes, test.batch_size)

    return SegmentationInference(
        model,
        SegmentationTestDataset(records, labels, data.augmentation, reader),
        build_normalizer(data, info.device),
        logits,
        labels.classes,
        info,
        test.precision or "fp32",
        data.workers,
        data.start_method,
    )


def labels_of(data: SegmentationDataConfig) -> Labels:
    """Return what the values of the data's label maps mean."""
    if data.num_classes is None:
        raise UserError("data.num_classes is none; expected the number that resolve_segmentation finds")
    return Labels(data.num_classes, data.zero_is_ignored, data.ignored)
