"""The timeline of a video: what a classifier answers window by window, as stretches of one class; text and picture.

    clip.mp4
         0.00 -    12.40 s   93.1%  archery  (5 windows)
        12.40 -    31.07 s   71.8%  bowling  (9 windows)

Windows overlap. So that every moment has one answer, the border between two is midway between their middles. The score
of a stretch is the mean over its windows.

The picture needs matplotlib (pip install matplotlib).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from video_convmae.atomic import replacing
from video_convmae.data.windows import Span
from video_convmae.predictor import Prediction, WindowPrediction

from .segments import palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LANES = 12  # classes with a lane of their own, those shown longest; the others share one
PICTURES = 10  # frames above the lanes


class Stretch(NamedTuple):
    """A part of a video with one answer.

    Attributes:
        start, end: in seconds; in frames where the video has no times.
        name: of the class.
        label: of the class.
        score: mean probability of the class over the windows.
        windows: number of windows.
    """

    start: float
    end: float
    name: str
    label: int
    score: float
    windows: int


@dataclass
class Timeline:
    """What is drawn of a video: its stretches, the best class's probability in each window, and some frames."""

    stretches: list[Stretch] = field(default_factory=list)
    middles: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)
    unit: str = "s"

    def add(self, window: WindowPrediction) -> None:
        """Take what is drawn of a window beside its stretch."""
        self.middles.append(sum(place(window.span)) / 2)
        self.scores.append(window.predictions[0].score)
        self.unit = unit_of(window.span)
        self.pictures += [window.picture.copy()] * _chosen(window.total).count(window.number)


def _chosen(total: int) -> list[int]:
    """Return the numbers of the windows whose frames are drawn: `PICTURES` of them, spread evenly."""
    return [int((number + 0.5) * total / PICTURES) for number in range(PICTURES)]


def place(span: Span) -> tuple[float, float]:
    """Return where a window begins and ends: in seconds, or in frames where nothing says them."""
    if math.isnan(span.start_seconds):
        return float(span.start_frame), float(span.end_frame)
    return span.start_seconds, span.end_seconds


def unit_of(span: Span) -> str:
    """Return the unit of `place`: s or frames."""
    return "frames" if math.isnan(span.start_seconds) else "s"


def merge_windows(windows: Iterable[WindowPrediction]) -> Iterator[Stretch]:
    """Yield the stretches of windows in the order of their starts, each as soon as it has ended."""
    open_stretch: Stretch | None = None
    before: tuple[float, float] | None = None
    for window in windows:
        start, end = place(window.span)
        best = window.predictions[0]
        border = start if before is None else (sum(before) + start + end) / 4
        if open_stretch is not None and open_stretch.label == best.label:
            count = open_stretch.windows
            mean = (open_stretch.score * count + best.score) / (count + 1)
            open_stretch = open_stretch._replace(end=end, score=mean, windows=count + 1)
        else:
            if open_stretch is not None:
                yield open_stretch._replace(end=border)
            open_stretch = Stretch(border, end, best.name, best.label, best.score, 1)
        before = start, end
    if open_stretch is not None:
        yield open_stretch


def text_line(stretch: Stretch, unit: str) -> str:
    """Return a stretch as a line of text."""
    digits = 2 if unit == "s" else 0
    times = f"{stretch.start:10.{digits}f} - {stretch.end:10.{digits}f} {unit}"
    windows = "1 window" if stretch.windows == 1 else f"{stretch.windows} windows"
    return f"{times} {stretch.score:8.1%}  {stretch.name}  ({windows})"


def write_table(windows: Iterable[WindowPrediction], path: Path) -> Iterator[WindowPrediction]:
    """Write a CSV file of windows as they pass: where each lies, its best classes and their scores."""
    windows = iter(windows)
    first = next(windows, None)
    if first is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        places = range(1, len(first.predictions) + 1)
        names = [name for number in places for name in (f"class{number}", f"score{number}")]
        writer.writerow(["window", *Span._fields, *names])
        for window in chain([first], windows):
            span = ["" if isinstance(each, float) and math.isnan(each) else round(each, 6) for each in window.span]
            best = [value for each in window.predictions for value in (each.name, f"{each.score:.6g}")]
            writer.writerow([window.number, *span, *best])
            yield window


def draw_timeline(timeline: Timeline, title: str, path: Path) -> None:
    """Draw the classes as lanes over time, the probability of the best one below, and some frames above.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure  # pyplot and its global state are not touched
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    lanes = _lanes(timeline.stretches)
    heights = [1.0, 0.3 * len(lanes) + 0.2, 1.0]
    figure = Figure((12, sum(heights) + 1.2), layout="constrained")
    frames, classes, scores = figure.subplots(3, 1, sharex=True, height_ratios=heights)
    start, end = timeline.stretches[0].start, timeline.stretches[-1].end
    _draw_pictures(frames, timeline.pictures, start, end)
    frames.set_title(_shown(title, 100), fontsize=10)
    _draw_lanes(classes, timeline.stretches, lanes)
    scores.step(timeline.middles, timeline.scores, where="mid", color="0.3", linewidth=1)
    scores.set_ylim(0, 1.02)
    scores.set_ylabel("probability", fontsize=8)
    scores.tick_params(labelsize=8)
    scores.set_xlim(start, max(end, start + 1e-3))
    scores.xaxis.set_major_locator(MaxNLocator(10))
    if timeline.unit == "s":
        scores.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: clock(seconds, end - start)))
    scores.set_xlabel("time" if timeline.unit == "s" else "frame", fontsize=8)
    with replacing(path, "wb") as file:
        figure.savefig(file, dpi=120, format="png")


def clock(seconds: float, length: float) -> str:
    """Return a time as 1:02:03, 2:03 or, of a video of less than ten seconds, 2.5 s."""
    if length < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours or length >= 3600 else f"{minutes}:{rest:02}"


def _lanes(stretches: Sequence[Stretch]) -> list[tuple[str, set[int]]]:
    """Return the lanes, of the class shown first on top: a name and its labels; classes that are too many share one."""
    shown: dict[int, float] = {}
    names = {stretch.label: stretch.name for stretch in stretches}
    for stretch in stretches:
        shown[stretch.label] = shown.get(stretch.label, 0.0) + stretch.end - stretch.start
    longest = sorted(shown, key=lambda label: -shown[label])[: MAX_LANES if len(shown) > MAX_LANES else None]
    lanes = [(_shown(names[label], 32), {label}) for label in shown if label in longest]
    others = set(shown) - set(longest)
    return [*lanes, (f"{len(others)} other classes", others)] if others else lanes


def _draw_lanes(axes: Axes, stretches: Sequence[Stretch], lanes: Sequence[tuple[str, set[int]]]) -> None:
    colours = palette(len(lanes)) / 255
    for lane, (_, labels) in enumerate(lanes):
        bars = [(each.start, each.end - each.start) for each in stretches if each.label in labels]
        colour = tuple(colours[lane]) if len(labels) == 1 else (0.6, 0.6, 0.6)
        axes.broken_barh(bars, (lane - 0.42, 0.84), facecolors=colour)
    axes.set_ylim(len(lanes) - 0.4, -0.6)  # the first on top
    axes.set_yticks(range(len(lanes)), labels=[name for name, _ in lanes], fontsize=8)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)


def _draw_pictures(axes: Axes, pictures: Sequence[np.ndarray], start: float, end: float) -> None:
    """Draw frames side by side, each in its part of the time; none overlap, for they are spread evenly."""
    axes.axis("off")
    width = (end - start) / max(1, len(pictures))
    for number, picture in enumerate(pictures):
        left = start + (number + 0.02) * width
        inset = axes.inset_axes((left, 0.0, 0.96 * width, 1.0), transform=axes.get_xaxis_transform())
        inset.imshow(picture)
        inset.axis("off")


def _shown(text: str, width: int) -> str:
    """Shorten a text to fit; a dollar sign is escaped, for it would begin a formula."""
    return shorten(text, width, placeholder=" ...").replace("$", r"\$")


def as_plain(prediction: WindowPrediction | Stretch | Prediction) -> dict[str, object]:
    """Return plain data for JSON, without the picture."""
    if not isinstance(prediction, WindowPrediction):
        return prediction._asdict()
    span = {
        name: None if isinstance(v, float) and math.isnan(v) else v for name, v in zip(Span._fields, prediction.span)
    }
    return {**span, "predictions": [each._asdict() for each in prediction.predictions]}
