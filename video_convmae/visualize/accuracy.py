"""Pictures of an evaluation: its confusion matrix and the accuracy of each class.

`evaluate --plot` writes them. They need matplotlib (pip install matplotlib).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np

from video_convmae.engine.evaluation import Evaluation
from video_convmae.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAMED = 40  # classes, in a picture with all names
ENDS = 20  # with more classes, the number of best and of worst that are shown


def confusion_matrix(evaluation: Evaluation) -> np.ndarray:
    """Return `(classes, classes)` float64: the share of each label's records (row) with each predicted class (column).

    Only labelled records that were read are counted; a class without any has a row of NaN.
    """
    labels, predicted = _counted(evaluation)
    count = evaluation.scores.shape[1]
    table = np.bincount(labels * count + predicted, minlength=count * count).reshape(count, count)
    with np.errstate(invalid="ignore"):
        return table / table.sum(axis=1, keepdims=True)


def draw_confusion(evaluation: Evaluation, names: Sequence[str], path: Path) -> None:
    """Draw the confusion matrix, normalised over each row; many classes are shown by number alone.

    Raises:
        ValueError: no labelled record was scored.
        ImportError: matplotlib is missing.
    """
    table = confusion_matrix(evaluation)
    side = 4 + 0.2 * len(names) if len(names) <= MAX_NAMED else 10
    figure = _figure(side + 1, side)
    axes = figure.add_subplot()
    axes.set_facecolor("0.8")  # rows of classes without records
    # The root makes rare confusions visible; without interpolation every class keeps its own pixels.
    image = axes.imshow(np.sqrt(table), vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02, label="share of the label's records")
    shares = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)
    bar.set_ticks([share**0.5 for share in shares], labels=[f"{share:.0%}" for share in shares])
    if len(names) <= MAX_NAMED:
        axes.set_xticks(range(len(names)), labels=_short(names), rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), labels=_short(names), fontsize=8)
    axes.set_xlabel("predicted" if len(names) <= MAX_NAMED else "predicted (class number)")
    axes.set_ylabel("label" if len(names) <= MAX_NAMED else "label (class number)")
    axes.set_title(_title(evaluation))
    figure.savefig(path, dpi=200 if len(names) > MAX_NAMED else 150, bbox_inches="tight")


def draw_classes(evaluation: Evaluation, names: Sequence[str], path: Path) -> None:
    """Draw the accuracy of each class that has records, best first; of many, the best and the worst.

    Raises:
        ValueError: no labelled record was scored.
        ImportError: matplotlib is missing.
    """
    labels, predicted = _counted(evaluation)
    classes, counts = np.unique(labels, return_counts=True)
    accuracy = np.array([(predicted[labels == label] == label).mean() for label in classes])
    order = np.lexsort((classes, -accuracy))
    parts = {"": order}
    if len(order) > MAX_NAMED:
        parts = {f"the {ENDS} best of {len(order)}": order[:ENDS], f"the {ENDS} worst": order[-ENDS:]}
    rows = max(map(len, parts.values()))
    figure = _figure(7.5 * len(parts), 1.5 + 0.22 * rows)
    figure.suptitle(_title(evaluation))
    for place, (title, part) in enumerate(parts.items(), start=1):
        axes = figure.add_subplot(1, len(parts), place, title=title)
        named = [f"{name} ({count})" for name, count in zip(_short([names[i] for i in classes[part]]), counts[part])]
        _draw_bars(axes, accuracy[part], named)
        mean = accuracy.mean()
        axes.axvline(100 * mean, color="0.3", linestyle="--", linewidth=1, label=f"mean class accuracy {mean:.1%}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    figure.savefig(path, dpi=150)


def _draw_bars(axes: Axes, accuracy: np.ndarray, names: Sequence[str]) -> None:
    places = range(len(names))
    axes.bar_label(axes.barh(places, 100 * accuracy), fmt="%.0f", padding=2, fontsize=8)
    axes.set_yticks(places, labels=names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axes.set_xlim(0, 108)  # with room for the number
    axes.set_xlabel("accuracy in %; in brackets: records")


def _counted(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels and predicted classes of the labelled records that were read."""
    counted = ~evaluation.failed & (evaluation.labels >= 0)
    if not counted.any():
        raise UserError("no labelled record was scored: there is no accuracy to draw; give a list with labels")
    return evaluation.labels[counted], evaluation.scores[counted].argmax(axis=1)


def _title(evaluation: Evaluation) -> str:
    metrics = evaluation.metrics()
    title = f"top-1 {metrics['top1']:.1%} of {len(_counted(evaluation)[0])} records"
    return title + (f", {metrics['failed']} could not be read" if metrics["failed"] else "")


def _short(names: Sequence[str]) -> list[str]:
    """Shorten names to fit beside a picture; a dollar sign is escaped, for it would begin a formula."""
    return [shorten(name, 48, placeholder=" ...").replace("$", r"\$") for name in names]


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches; pyplot and its global state are not touched."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")
