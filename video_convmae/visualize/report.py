"""A run as one page: what it is, whether it learned, its curves, clips, accuracy and mistakes, and its configuration.

What the folder says without the weights is in run_facts.py. What cannot be shown says why in a line.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from html import escape
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor

from video_convmae import lists
from video_convmae.atomic import read_json
from video_convmae.build import build_inference, cap_workers
from video_convmae.config import FinetuneConfig, LabelledDataConfig, PretrainConfig
from video_convmae.data.decoding import DecodeError
from video_convmae.engine.checkpoint import Checkpoint, find_weights
from video_convmae.engine.distributed import DistInfo
from video_convmae.engine.evaluation import Evaluation, average_precision, evaluate_list, read_evaluation
from video_convmae.engine.probing import choose_records
from video_convmae.errors import UserError
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.predictor import Predictor, load

from .accuracy import confusion_matrix
from .page import (
    Cell,
    Clip,
    draw_clip,
    draw_details,
    draw_heat_map,
    draw_note,
    draw_table,
    encode_clip,
    show,
    write_page,
)
from .reconstruct import (
    Reconstructions,
    choose_shown,
    draw_masks,
    enlarge,
    measure_hidden_error,
    reconstruct_clips,
    write_caption,
)
from .run_facts import (
    RESULTS,
    TRAINING,
    Run,
    describe_kind,
    draw_bad_records,
    draw_curves,
    draw_head,
    draw_last_values,
    draw_sweep,
)

RECONSTRUCTIONS, MISTAKES = 6, 12  # shown at most
CLIP_WIDTHS = (192, 128)  # of a reconstruction's picture and of a mistake's, in pixels
MOST_FRAMES = 16  # of a clip, evenly over it
MOST_BYTES = 5_000_000  # of the page's clips together
MATRIX_CLASSES, PAIRS = 16, 15  # classes of a confusion matrix with numbers; confused pairs in the list
MOST_CLASSES, ENDS = 40, 15  # classes listed; of more, so many best and worst
OF_SCORES = ("Confusion", "Classes", "Most confident mistakes")  # sections beside a classifier's accuracy
EXPECTED = (UserError, ValueError, OSError, ImportError, RuntimeError)


@dataclass(frozen=True)
class Report:
    """The page, and what could not be shown: a title and a reason each."""

    html: str
    missing: tuple[tuple[str, str], ...]


def make_report(run: Run, info: DistInfo, records: int = 400) -> Report:
    """Make the page of a run.

    Args:
        run: its folder, read.
        info: this process, and the device that models run on.
        records: of the validation list that are classified where the run has no evaluation; 0: none.
    """
    shown = Shown(run, info, records)
    parts: list[tuple[str, Callable[[], str]]] = [("Curves", lambda: draw_curves(run, RESULTS))]
    if run.kind == "pretrain":
        parts.append(("Reconstructions", shown.reconstructions))
    if run.kind == "finetune":
        parts += [
            ("Accuracy", shown.accuracy),
            *zip(OF_SCORES, (shown.confusion, shown.classes, shown.mistakes)),
        ]
    parts.append(("Heads of the sweep", lambda: draw_sweep(run)))
    if run.lines:
        parts.append(("Course of the training", lambda: draw_curves(run, TRAINING)))
    parts.append(("Last values", lambda: draw_last_values(run)))
    parts.append(("Files that could not be read", lambda: draw_bad_records(run)))
    parts.append(("Configuration", lambda: draw_details("config.yaml", yaml.safe_dump(run.config, sort_keys=False))))
    sections: list[tuple[str, str]] = []
    missing: list[tuple[str, str]] = []
    for title, draw in parts:
        if title in OF_SCORES and "Accuracy" in dict(missing):  # for the same reason
            continue
        try:
            html = draw()
        except EXPECTED as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            missing.append((title, reason))
            html = draw_note(f"Not shown: {reason}.")
        if html:
            sections.append((title, html))
    foot = f"Made by video-convmae report on {datetime.now().astimezone():%Y-%m-%d %H:%M %Z} from {run.folder}."
    return Report(write_page(f"{run.name}: {describe_kind(run)}", draw_head(run), sections, foot), tuple(missing))


# Clips, accuracy, mistakes


class Scored(NamedTuple):
    """Scores of a list, the paths of its records, a sentence that says what they are, and accuracies of baselines."""

    evaluation: Evaluation
    paths: list[str]
    about: str
    baselines: dict[str, float]


class Shown:
    """What needs the run's weights or files: each part is made once, on demand.

    Args:
        run: what its folder says.
        info: this process and its device.
        records: of the validation list that are classified at most.
    """

    def __init__(self, run: Run, info: DistInfo, records: int) -> None:
        self.run, self.info, self.records = run, info, records
        self._left = MOST_BYTES

    @cached_property
    def source(self) -> Checkpoint | Path:
        """The run's newest checkpoint, as `evaluate` takes it: the best was chosen on the list that is shown."""
        return find_weights(self.run.folder)

    @cached_property
    def predictor(self) -> Predictor:
        """The model, on the device."""
        loaded = load(self.source)
        loaded.model.to(self.info.device)
        return loaded

    # Reconstructions

    def reconstructions(self) -> str:
        """Return clips of the probe's list, else of the training list, evenly over it: original, masked, reconstructed.

        Raises:
            UserError: the run has no checkpoint or predicts no pixels, or none of the records can be read.
        """
        predictor = self.predictor
        model, config = predictor.model, predictor.config
        assert isinstance(model, Autoencoder)
        assert isinstance(config, PretrainConfig)
        source = config.probe.list or config.data.train_names
        chosen = [record.path for record in choose_shown(config, RECONSTRUCTIONS)]
        pictures, errors = self._read(chosen)
        if not pictures:
            raise UserError(f"none of {len(chosen)} records of {source} that were tried can be read ({errors[0]})")
        masks = draw_masks(model, config, len(chosen))
        parts, results = [], []
        for place, path in enumerate(chosen):
            if path not in pictures:
                continue
            result = reconstruct_clips(model, config, pictures[path][None], masks[place : place + 1])
            results.append(result)
            error = measure_hidden_error(model, result)
            sides = (result.original[0], result.masked[0], result.reconstructed[0])
            clip = self._encode(_beside_each_other([_frames(each, CLIP_WIDTHS[0]) for each in sides]))
            if clip is None:
                break
            name = _short_path(path, config.data.root)
            alt = f"{name}: original, masked and reconstructed clip side by side"
            ours, mean = (show(error[name], digits=3) for name in ("mse", "mean_patch_mse"))
            beside = f"squared error <b>{ours}</b>, of mean patches {mean}"
            thirds = "<div class=thirds><span>original</span><span>masked</span><span>reconstructed</span></div>"
            parts.append(
                f"<figure>{thirds}{draw_clip(clip, alt)}"
                f"<figcaption>{beside}<br>{_breakable(name)}</figcaption></figure>"
            )
        every = Reconstructions(*(torch.cat(each) for each in zip(*(vars(result).values() for result in results))))
        error = measure_hidden_error(model, every)
        rows = [
            (words, show(error[name], digits=3))
            for name, words in (
                ("mse", "this model"),
                ("mean_patch_mse", "each hidden patch's mean colour" if model.target != "none" else "mean colour"),
                ("nearest_patch_mse", "the nearest visible patch"),
                ("mean_colour_mse", "mean colour of the visible patches"),
            )
        ]
        caption = f"Mean squared error on hidden pixels (0 to 1) of {len(results)} clips, fixed masks"
        about = [f"From {source}, evenly over it."]
        about += ["The clips play at 8 frames a second."] if config.model.num_frames > 1 else []
        about += [write_caption(config, model).partition("; ")[2].capitalize() + "."]
        about += self._left_out(len(results) - len(parts), "clips") + [f"Could not be read: {e}" for e in errors]
        return (
            f'<div class="clips">{"".join(parts)}</div>'
            + draw_note(" ".join(about))
            + draw_table(("predicted by", "error"), rows, caption)
        )

    # Classifiers

    @cached_property
    def scored(self) -> Scored:
        """The newest evaluation in the run, else one that is made now."""
        found = sorted(
            (path.parent for path in self.run.folder.glob("*/scores.npz") if (path.parent / "metrics.json").exists()),
            key=lambda folder: (folder / "metrics.json").stat().st_mtime,
        )
        if found:
            evaluation, paths = read_evaluation(found[-1])
            metrics = read_json(found[-1] / "metrics.json")
            views = " × ".join(str(each) for each in metrics.get("views", ()))
            weights = Path(metrics.get("weights", "")).name
            about = f"Evaluation in {found[-1].name}/ of {weights}, {views} views."
            about += f" {len(found) - 1} older ones are left out." if len(found) > 1 else ""
            return Scored(evaluation, paths, about, metrics.get("baselines", {}))
        return self._classify()

    def _classify(self) -> Scored:
        """Classify the validation list, or part of it, as the run's own validation does."""
        data = self.run.config["data"]
        advice = f"video-convmae evaluate --weights {self.run.folder} --output {self.run.folder}/test"
        if not data.get("validation"):
            raise UserError(f"the run has no data.validation and no evaluation; {advice} --list LIST makes one")
        if not self.records:
            raise UserError(f"the run has no evaluation and --records is 0; {advice} makes one")
        config = self.predictor.config
        assert isinstance(config, FinetuneConfig)
        every = lists.read_validation_records(config.data)
        chosen = choose_records(every.labels, min(self.records, len(every)))
        records = every.select(chosen)
        read = replace(config.data, workers=cap_workers(config.data.workers, self.info), reader=self._reader)
        protocol = replace(config.validate, precision=config.validate.precision or config.train.precision)
        with redirect_stdout(io.StringIO()):
            inference = build_inference(self.predictor.model, read, records, protocol, self.info)
            several = bool(config.data.multi_label)
            evaluation = evaluate_list(inference, int(config.data.num_classes or 0), multi_label=several)
        part = f"{len(records):,} of the {len(every):,}" if len(records) < len(every) else f"the {len(every):,}"
        views = f"{protocol.segments} × {protocol.crops} views"
        name = (self.source.path if isinstance(self.source, Checkpoint) else self.source).name
        about = f"Classified for this page by {name}: {part} records of the validation list, {views}."
        about += f" {advice} tests all of them." if len(records) < len(every) else ""
        return Scored(evaluation, [record.path for record in records], about, {})

    @property
    def _reader(self) -> Any:
        return self.predictor.config.data.reader

    @cached_property
    def names(self) -> list[str]:
        """Names of the classes, or their numbers."""
        stated = self.run.config["data"].get("labels")
        names = list(stated) if isinstance(stated, list) else []
        if not names:
            config = self.predictor.config
            names = list((isinstance(config.data, LabelledDataConfig) and lists.read_class_names(config.data)) or ())
        count = self.scored.evaluation.scores.shape[1]
        return [names[label] if label < len(names) else str(label) for label in range(count)]

    @property
    def _single(self) -> Evaluation:
        """The evaluation, of records with one class each."""
        if self.scored.evaluation.targets is not None:
            raise UserError("records have several classes each")
        return self.scored.evaluation

    def accuracy(self) -> str:
        """Return a table of accuracies, beside the share of the largest class."""
        evaluation, _, about, baselines = self.scored
        metrics = evaluation.metrics()
        if evaluation.targets is not None:
            values = {"mAP": "map", "mAP of scores that tell nothing": "chance_map", "macro F1": "macro_f1"}
            several = [(words, show(metrics[name], "%")) for words, name in values.items()]
            several += [(f"records {words}", f"{metrics[words]:,}") for words in ("scored", "failed")]
            table = draw_table(("", "several classes a record"), several)
            return draw_note(about) + table + _draw_verdict(evaluation.judge()["verdict"])
        top1 = metrics["top1"]
        if top1 is None:
            raise UserError("no record that was scored has a label")
        scored = metrics["scored"] or 0
        error = sqrt(top1 * (1 - top1) / scored)
        rows = [("top-1", f"{show(top1, '%')} ± {show(error, '%')}")]
        if len(self.names) > 5:
            rows.append(("top-5", show(metrics["top5"], "%")))
        rows += [("mean class accuracy", show(metrics["mean_class_accuracy"], "%"))]
        rows += [("always the largest class", show(metrics["largest_class"], "%"))]
        rows += [
            (f"baseline: {name.replace('_', ' ')}", show(value, "%"))
            for name, value in baselines.items()
            if name != "largest_class"
        ]
        rows += [("share predicted most often", show(metrics["predicted_largest"], "%"))]
        rows += [("records scored", f"{scored:,}"), ("could not be read", f"{metrics['failed']:,}")]
        table = draw_table(("", "accuracy ± standard error"), rows)
        return draw_note(about) + table + _draw_verdict(evaluation.judge(self.names)["verdict"])

    def confusion(self) -> str:
        """Return the confusion matrix, and the pairs that are confused most often."""
        evaluation, names = self._single, self.names
        shares, (labels, predicted) = confusion_matrix(evaluation), _counted(evaluation)
        wrong = labels != predicted
        pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
        order = np.lexsort((*pairs, -counts))[:PAIRS]
        rows = [
            (names[label], names[other], str(count), show(shares[label, other], "%"))
            for label, other, count in zip(*pairs[:, order].tolist(), counts[order].tolist())
        ]
        head = ("label", "predicted", "records", "of the label")
        table = draw_table(head, rows, "Confused most often", "pairs") if rows else draw_note("Nothing is confused.")
        return f'<div class="two">{_draw_matrix(shares, labels, predicted, names)}{table}</div>'

    def classes(self) -> str:
        """Return the accuracy of each class, the worst first; of many, the worst and the best."""
        if self.scored.evaluation.targets is not None:
            return self._precisions(self.scored.evaluation.targets)
        evaluation, names = self._single, self.names
        labels, _ = _counted(evaluation)
        shares = confusion_matrix(evaluation)
        found, counts = np.unique(labels, return_counts=True)
        order, caption = _both_ends(np.lexsort((found, shares[found, found])))
        rows: list[Sequence[Cell]] = []
        for label, count in zip(found[order].tolist(), counts[order].tolist()):
            others = shares[label].copy()
            others[label] = 0
            most = int(others.argmax())
            mistaken = f"{names[most]} {show(others[most], '%')}" if others[most] else ""
            accuracy = shares[label, label]
            rows.append((names[label], str(count), (show(accuracy, "%"), accuracy), mistaken))
        head = ("class", "records", "accuracy", "most often mistaken for")
        return draw_table(head, rows, caption, "names")

    def _precisions(self, targets: np.ndarray) -> str:
        """Return the average precision of each class that a record has, where records have several."""
        evaluation = self.scored.evaluation
        counted = ~evaluation.failed & (evaluation.labels >= 0)
        targets, scores = targets[counted], evaluation.scores[counted]
        found = np.flatnonzero(targets.any(axis=0))
        if not len(found):
            raise UserError("no record that was scored has a label")
        values = np.array([average_precision(targets[:, label], scores[:, label]) for label in found])
        order, caption = _both_ends(np.lexsort((found, values)))
        rows: list[Sequence[Cell]] = []
        for label, value in zip(found[order].tolist(), values[order].tolist()):
            of_class = targets[:, label]
            rows.append(
                (self.names[label], str(of_class.sum()), (show(value, "%"), value), show(float(of_class.mean()), "%"))
            )
        return draw_table(("class", "records", "average precision", "chance"), rows, caption, "names")

    def mistakes(self) -> str:
        """Return the wrong predictions of the highest scores, with their clips."""
        evaluation, paths = self._single, self.scored.paths
        best, counted = evaluation.scores.argmax(axis=1), ~evaluation.failed & (evaluation.labels >= 0)
        wrong = np.flatnonzero(counted & (best != evaluation.labels))
        if not len(wrong):
            return draw_note("None: every record's label is predicted.")
        order = wrong[np.argsort(-evaluation.scores[wrong].max(axis=1), kind="stable")][:MISTAKES]
        pictures, errors = self._read([paths[index] for index in order])
        parts, root, shown = [], self.run.config["data"].get("root", ""), 0
        for index in order.tolist():
            label, predicted, path = int(evaluation.labels[index]), int(best[index]), _short_path(paths[index], root)
            scores, picture = evaluation.scores[index], ""
            if (clip := pictures.get(paths[index])) is not None:
                encoded = self._encode(_frames(clip, CLIP_WIDTHS[1]))
                shown += encoded is not None
                picture = "" if encoded is None else draw_clip(encoded, f"Clip of {path}")
            said, right = (f"{escape(self.names[c])}</b> {show(float(scores[c]), '%')}" for c in (predicted, label))
            caption = f"<b>{said}<br>label <b>{right}<br>{_breakable(path)}"
            parts.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
        about = [f"{len(order)} of {len(wrong):,} mistakes, by the score of the predicted class."]
        about += self._left_out(len(pictures) - shown, "clips") + [f"Could not be read: {e}" for e in errors]
        return draw_note(" ".join(about)) + f'<div class="mistakes">{"".join(parts)}</div>'

    # Clips

    def _read(self, paths: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
        """Read the middle clip of each path, `(C, T, H, W)` uint8; also return the errors of those that cannot be."""
        pictures, errors = {}, []
        for path in paths:
            try:
                pictures[path] = self.predictor.pictures(path, self.predictor.middle)[0]
            except DecodeError as error:
                errors.append(str(error))
        return pictures, errors

    def _encode(self, frames: np.ndarray) -> Clip | None:
        """Encode a clip, or return None where the page holds as many bytes of clips as it may."""
        clip = encode_clip(frames)
        if len(clip) > self._left:
            return None
        self._left -= len(clip)
        return clip

    def _left_out(self, count: int, what: str) -> list[str]:
        if not count:
            return []
        return [f"{count} {what} are left out: the page holds {MOST_BYTES / 1e6:g} MB of clips at most."]


def _both_ends(order: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the order of classes, of many the worst and the best, and the caption that says so."""
    if len(order) <= MOST_CLASSES:
        return order, "The worst first."
    left_out = f"{len(order) - 2 * ENDS} classes between the {ENDS} worst and the {ENDS} best are left out."
    return np.concatenate([order[:ENDS], order[-ENDS:]]), f"The worst first. {left_out}"


def _draw_verdict(verdict: str | None) -> str:
    return f'<p class="verdict bad">{escape(verdict)}</p>' if verdict else ""


def _draw_matrix(shares: np.ndarray, labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> str:
    """Return the matrix with numbers of records, or of many classes as a picture; columns are numbered as rows are."""
    count = len(names)
    if count > MATRIX_CLASSES:
        alt = f"Confusion matrix of {count} classes; its diagonal is the accuracy of each class"
        caption = (
            "Rows: label, columns: predicted class, both by number; darker: a larger share of the label's records."
        )
        return f"<figure>{draw_heat_map(shares, alt)}<figcaption>{caption}</figcaption></figure>"
    counts = np.bincount(labels * count + predicted, minlength=count * count).reshape(count, count)
    rows: list[Sequence[Cell]] = [
        (
            str(place) if name == str(place) else f"{place}  {name}",
            *((str(n) if n else "", float(s)) for n, s in zip(counts[place], np.nan_to_num(shares[place]))),
        )
        for place, name in enumerate(names)
    ]
    return draw_table(
        ("label \\ predicted", *map(str, range(count))), rows, "Records of each label and predicted class", "matrix"
    )


def _counted(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels and predicted classes of the labelled records that were read."""
    counted = ~evaluation.failed & (evaluation.labels >= 0)
    if not counted.any():
        raise UserError("no record that was scored has a label")
    return evaluation.labels[counted], evaluation.scores[counted].argmax(axis=1)


def _frames(clip: Tensor, width: int) -> np.ndarray:
    """Turn a clip `(C, T, H, W)` uint8 into at most `MOST_FRAMES` frames `(T, H, W, 3)` of about `width` pixels."""
    count = min(MOST_FRAMES, clip.shape[1])
    clip = clip[:, np.linspace(0, clip.shape[1] - 1, count).round().astype(int)]
    if clip.shape[-1] > width:
        size = (round(clip.shape[-2] * width / clip.shape[-1]), width)
        frames = clip.permute(1, 0, 2, 3).float()
        clip = torch.nn.functional.interpolate(frames, size, mode="area").round().byte().permute(1, 0, 2, 3)
    return enlarge(clip, width)


def _beside_each_other(clips: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """Join clips `(T, H, W, 3)` along their width, with a grey line between two."""
    line = np.full((*clips[0].shape[:2], gap, 3), 128, np.uint8)
    return np.concatenate([each for clip in clips for each in (clip, line)][:-1], axis=2)


def _breakable(path: str) -> str:
    """Return a path as HTML that may be broken after its slashes and underscores."""
    return escape(path).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _short_path(path: str, root: str | None) -> str:
    """Return a path without the folder that all paths of the list begin with."""
    return path.removeprefix(f"{str(root).rstrip('/')}/") if root else path
