"""Test a classifier on a list: every record once, its views averaged, the same for any number of processes.

    video-convmae evaluate --weights runs/k400 --output runs/k400/test
    torchrun --nproc_per_node 8 -m video_convmae evaluate --weights runs/k400 --list val.txt --segments 5 --crops 3 \\
        --output DIR

writes predictions.csv, scores.npz and metrics.json into the folder, and bad_records.jsonl if a record could not be
read. An image is a record with one view. An interrupted test resumes with the same command.

A detector is tested on data in COCO's format (--list instances_val2017.json): metrics.json has COCO's twelve numbers of
boxes and of masks, detections.json the results in COCO's format; --plot draws some pictures (DETECTION.md).
A segmenter is tested on a folder of pictures with label maps beside (--list images/validation): metrics.json has mIoU,
mAcc and aAcc, classes.json those of each class; --plot draws the first pictures (SEGMENTATION.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_convmae.cli.parser import parse
from video_convmae.config import EvaluateConfig, InferenceConfig, LabelledDataConfig, replace_options, to_plain
from video_convmae.engine.options import ProtocolConfig
from video_convmae.errors import UserError

if TYPE_CHECKING:
    from video_convmae.config import DataConfig
    from video_convmae.data.records import Records
    from video_convmae.engine.baselines import Table
    from video_convmae.engine.checkpoint import Checkpoint
    from video_convmae.engine.distributed import DistInfo
    from video_convmae.predictor import Predictor


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Test a classifier; return the contents of metrics.json.

    Raises:
        ValueError: the model is no classifier.
    """
    from video_convmae import build, lists
    from video_convmae.cli.detection import evaluate_detector
    from video_convmae.cli.segmentation import evaluate_segmenter
    from video_convmae.data.labels import check_labels, check_single
    from video_convmae.engine.baselines import compare
    from video_convmae.engine.checkpoint import find_weights
    from video_convmae.engine.distributed import barrier, init_distributed
    from video_convmae.engine.evaluation import evaluate_list, write_evaluation
    from video_convmae.engine.inference import chunk_folder
    from video_convmae.runs import run_kind

    folder = output_folder(config)
    kind = run_kind(find_weights(config.weights))
    if kind == "detection":
        return evaluate_detector(config, folder)
    if kind == "segmentation":
        return evaluate_segmenter(config, folder)
    if config.maps is not None:
        raise UserError(f"{config.weights} is a classifier, which has no maps; leave it out")
    if config.plot:
        import matplotlib.figure  # noqa: F401  # where it is not installed, this is known before the test
    with init_distributed(config.device) as info:
        loaded, path, digest = load_model(config, info)
        data, protocol = merge_options(config, loaded, info)
        if not isinstance(data, LabelledDataConfig) or data.num_classes is None:
            raise UserError(
                f"{config.weights} was pretrained only: it has no classes (video-convmae finetune adds them)"
            )
        num_classes = data.num_classes
        if config.list is not None:
            data = replace(data, validation=config.list)
        records = lists.read_validation_records(data)
        unlabelled = int((records.labels < 0).sum())
        # Where records have several classes, one without any is of no class, or not labelled: the list does not say.
        check_labels(records, num_classes, least=0 if data.multi_label and unlabelled < len(records) else -1)
        check_single(records, data.multi_label)
        if data.multi_label and (config.baselines or config.plot):
            raise UserError(f"{config.weights} answers with several classes: leave out --baselines and --plot")
        settings = {"weights": digest, "records": records.digest(), "ema": config.ema}
        chunks = chunk_folder(folder, settings | {"data": to_plain(data), "protocol": to_plain(protocol)})
        if info.is_main:
            print(f"{path}: {len(records)} records, {protocol.segments} x {protocol.crops} views", flush=True)
            if unlabelled:
                print(f"labels: {unlabelled} of the {len(records)} records have none and do not count", flush=True)
        barrier()
        tables = read_baselines(loaded, data, records, protocol, info, chunks) if config.baselines else None
        started = time.perf_counter()
        inference = build.build_inference(loaded.model, data, records, protocol, info)
        evaluation = evaluate_list(inference, num_classes, chunks, bool(data.multi_label))
        if not info.is_main:
            return evaluation.metrics()
        seconds = time.perf_counter() - started
        names = [loaded.name(label) for label in range(num_classes)]
        judged = evaluation.judge(names)
        extra = {
            **judged,
            "weights": str(path),
            "views": [protocol.segments, protocol.crops],
            "seconds": seconds,
            "videos_per_second": evaluation.new / seconds,
        }
        baselines = None if tables is None else compare(evaluation, *tables)
        extra |= {} if baselines is None else baselines.metrics
        metrics = write_evaluation(evaluation, records, folder, extra)
        print(metrics_line(metrics), flush=True)
        if judged["verdict"] is not None:
            print(judged["verdict"], flush=True)
        if baselines is not None:
            print(*baselines.table, *([baselines.verdict] if baselines.verdict else []), sep="\n", flush=True)
        if config.plot and metrics["top1"] is not None:
            from video_convmae.visualize.accuracy import draw_classes, draw_confusion

            draw_confusion(evaluation, names, folder / "confusion.png")
            draw_classes(evaluation, names, folder / "classes.png")
        return metrics


def read_baselines(
    loaded: Predictor,
    data: LabelledDataConfig,
    records: Records,
    protocol: ProtocolConfig,
    info: DistInfo,
    chunks: Path,
) -> tuple[Table, Table]:
    """Read the run's training list, or 5,000 records of it, and the tested list for the baselines: middle views.

    Raises:
        ListError: there is no training list, or it has no labels.
    """
    from video_convmae import build, lists
    from video_convmae.data.records import ListError
    from video_convmae.engine.baselines import choose_training_records, read_table

    if not data.train:
        raise ListError("--baselines needs the training list of the run (data.train); these weights have none")
    middle = replace(protocol, segments=1, crops=1, precision="fp32")
    every = lists.read_records(data)
    training = choose_training_records(every)
    if info.is_main:
        print(f"baselines read {len(training)} of {len(every)} training records, and the list", flush=True)
    tables = [
        read_table(
            build.build_inference(loaded.model, data, each, middle, info), chunks.with_name(f"{chunks.name}-{name}")
        )
        for name, each in ((f"train-{training.digest()[:16]}", training), ("list", records))
    ]
    return tables[0], tables[1]


def output_folder(config: InferenceConfig) -> Path:
    """Return the folder of the results.

    Raises:
        UserError: it is that of a run, whose own metrics.json and bad_records.jsonl would be replaced or removed.
    """
    folder = Path(config.output)
    if (folder / "config.yaml").exists():
        raise UserError(
            f"output {folder} is a run, whose metrics.json would be replaced; choose e.g. {folder / 'test'}"
        )
    return folder


def load_model(config: InferenceConfig, info: DistInfo) -> tuple[Predictor, Path, str]:
    """Load the model that is to run over a list; the main process verifies its checkpoint for all.

    Returns:
        The model, the path of its weights, and their digest.
    """
    from video_convmae import predictor
    from video_convmae.engine.checkpoint import Checkpoint, file_digest, find_weights
    from video_convmae.engine.distributed import broadcast_object

    found: Checkpoint | Path | None = find_weights(config.weights) if info.is_main else None
    is_checkpoint, path = broadcast_object((True, found.path) if isinstance(found, Checkpoint) else (False, found))
    source = Checkpoint(path, verified=True) if is_checkpoint else path
    digest = source.digest() if is_checkpoint else file_digest(path)
    labels = config.labels if isinstance(config, EvaluateConfig) else None
    return predictor.load(source, labels=labels, ema=config.ema, reader=config.reader), path, digest


def merge_options(config: InferenceConfig, loaded: Predictor, info: DistInfo) -> tuple[DataConfig, ProtocolConfig]:
    """Return the run's own data and test protocol, with the command's options in their place.

    Raises:
        ListError: the folder of the list's paths does not exist; the message says who named it.
        UserError: the options contradict one another, or the run.
    """
    from video_convmae.build import cap_workers
    from video_convmae.lists import check_root

    run, options = loaded.config, vars(config)
    data_fields = ("root", "format", "sampling", "stride", "fps", "workers")
    given = {name: options[name] for name in data_fields if options[name] is not None}
    # Of the training lists' own options (fps, ...) only the baselines, which read them, need to fit these.
    reads_lists = isinstance(run.data.train, str) or getattr(config, "baselines", False)
    data = replace_options(run.data if reads_lists else replace(run.data, train=""), given)
    data = replace(data, workers=cap_workers(data.workers, info))
    check_root(data.root, f"data.root of {config.weights}" if config.root is None else "--root")
    protocol = getattr(run, "test", ProtocolConfig())
    fields = {name: options[name] for name in ProtocolConfig.__dataclass_fields__ if options[name] is not None}
    fields.setdefault("precision", protocol.precision or run.train.precision)
    return data, replace(protocol, **fields)


def metrics_line(metrics: dict[str, Any]) -> str:
    """Format the metrics in a line."""
    if not metrics["scored"]:
        accuracy = "no record could be read"
    elif metrics["macro_f1"] is None:
        accuracy = "no record that was scored has a label"
    else:
        names = {"map": "mAP", "top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class", "macro_f1": "F1"}
        chance = metrics.get("chance_map")
        beside = {} if chance is None else {"map": f" (chance {chance:.2%})"}
        shown = {name: title for name, title in names.items() if name in metrics}
        accuracy = ", ".join(f"{title} {metrics[name]:.2%}{beside.get(name, '')}" for name, title in shown.items())
    counts = f"{metrics['scored']} records scored, {metrics['failed']} failed"
    return f"{accuracy}; {counts}; {metrics['videos_per_second']:.1f} videos/s"


def nothing_was_read(count: int, folder: Path) -> UserError:
    """Return the error of a command that wrote its files, which hold no record."""
    return UserError(
        f"none of the {count} records could be read ({folder / 'bad_records.jsonl'} says why); check --root and files"
    )


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status. Raises a UserError if nothing was scored."""
    config = parse(EvaluateConfig, arguments)
    metrics = evaluate(config)
    # Of several processes the first alone: it ends when the files are written, and its error would end it with others'.
    if not metrics["scored"] and int(os.environ.get("RANK", 0)) == 0:
        raise nothing_was_read(metrics["failed"], Path(config.output))
    return 0
