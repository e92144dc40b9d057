"""Test a classifier on a list: every record once, its views averaged, the same for any number of processes.

    python tools/evaluate.py --weights runs/k400 --output runs/k400/test
    torchrun --nproc_per_node 8 tools/evaluate.py --weights runs/k400 --list val.txt --segments 5 --crops 3 --output DIR

leaves predictions.csv, scores.npz and metrics.json in the folder, and bad_records.jsonl if a record could not be read.
An image is a record with one view. An interrupted test goes on with the same command.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from video_convmae import predictor
from video_convmae.cli.parser import run_command
from video_convmae.config import EvaluateConfig, LabelledDataConfig, check_labels, plain
from video_convmae.data.decoding import resolve_reader
from video_convmae.data.records import Records
from video_convmae.engine import checkpoint, distributed
from video_convmae.engine.distributed import DistInfo
from video_convmae.engine.evaluation import Evaluation, ProtocolConfig, evaluate, partial_folder, write
from video_convmae.engine.tasks import Normalizer
from video_convmae.predictor import Predictor


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Carry out a test; returns what metrics.json holds."""
    path, folder = checkpoint.find(config.weights), Path(config.output)
    loaded = predictor.load(path, labels=config.labels, ema=config.ema, decoder=config.decoder)
    data, protocol = settings(config, loaded)
    with distributed.init_distributed(config.device) as group:
        records = data.validation_records()
        check_labels(records, data.num_classes, least=-1)
        identity = {"weights": checkpoint.digest(path), "records": records.digest()}
        identity |= {"data": plain(data), "protocol": plain(protocol), "ema": config.ema}
        if group.is_main:
            print(f"{path}: {len(records)} records, {protocol.segments} x {protocol.crops} views", flush=True)
        distributed.barrier()
        started = time.perf_counter()
        evaluation = _evaluate(loaded, records, data, protocol, group, partial_folder(folder, identity))
        if not group.is_main:
            return evaluation.metrics()
        seconds = time.perf_counter() - started
        more = {
            "weights": str(path),
            "views": [protocol.segments, protocol.crops],
            "seconds": seconds,
            "videos_per_second": evaluation.new / seconds,
        }
        metrics = write(evaluation, records, folder, more)
        print(summary(metrics), flush=True)
        if config.plot and metrics["top1"] is not None:
            _plot(evaluation, loaded, folder)
        return metrics


def settings(config: EvaluateConfig, loaded: Predictor) -> tuple[LabelledDataConfig, ProtocolConfig]:
    """The run's own data and test protocol, with what the command line says in its place.

    Raises:
        ValueError: the model is no classifier.
    """
    data = loaded.config.data
    if not isinstance(data, LabelledDataConfig):
        raise ValueError(f"{config.weights} was pretrained only: it has no classes (tools/finetune.py adds them)")
    values = {name: value for name, value in asdict(config).items() if value is not None}
    edits = {name: values[name] for name in ("root", "format", "sampling", "stride", "workers") if name in values}
    if "list" in values:
        edits["validation"] = values["list"]
    edits["decoder"] = resolve_reader(values.get("decoder", data.decoder))
    protocol = {name: values[name] for name in ProtocolConfig.__dataclass_fields__ if name in values}
    protocol.setdefault("precision", loaded.config.test.precision or loaded.config.train.precision)
    return replace(data, **edits), replace(loaded.config.test, **protocol)


def summary(metrics: dict[str, Any]) -> str:
    """The metrics in a line."""
    if not metrics["scored"]:
        accuracy = "no record could be read"
    elif metrics["top1"] is None:
        accuracy = "no record that was scored has a label"
    else:
        names = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class"}
        accuracy = ", ".join(f"{title} {metrics[name]:.2%}" for name, title in names.items())
    counts = f"{metrics['scored']} records scored, {metrics['failed']} failed"
    return f"{accuracy}; {counts}; {metrics['videos_per_second']:.1f} videos/s"


def _evaluate(
    loaded: Predictor,
    records: Records,
    data: LabelledDataConfig,
    protocol: ProtocolConfig,
    group: DistInfo,
    partial: Path,
) -> Evaluation:
    model = loaded.model.to(group.device)
    views = data.views(records, model.encoder.config, protocol)
    pixels = Normalizer(data.mean, data.std, group.device)
    return evaluate(model, views, pixels, data.num_classes, protocol, group, data.workers, data.start_method, partial)


def _plot(evaluation: Evaluation, loaded: Predictor, folder: Path) -> None:
    from video_convmae.visualize.accuracy import draw_classes, draw_confusion  # matplotlib is needed for pictures alone

    names = [loaded.name(label) for label in range(evaluation.scores.shape[1])]
    draw_confusion(evaluation, names, folder / "confusion.png")
    draw_classes(evaluation, names, folder / "classes.png")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return run_command(EvaluateConfig, run, arguments)
