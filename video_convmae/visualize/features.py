"""Show what each stage of an encoder sees in a video or an image, and where a classifier finds its class.

    python tools/show_features.py runs/k400 clip.mp4 --output clip.png
    python tools/show_features.py runs/k400 clip.mp4 --output clip.png --label "playing guitar"

The middle of the file is shown. Rows: the frames; each stage's features as colours (their first three principal
components as red, green and blue, one basis for all frames of a row, so that a colour means the same at all times); for
a pretrained encoder the tokens after fusion and norm; for a classifier the evidence: what each token adds to the logit
of a class, as it differs from the mean over the tokens (red: more, blue: less). All tokens share most of what they say,
since each has looked at the others; the mean stands above the picture, and would paint it in one colour. For the same
reason a token's evidence is not that of its pixels alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from video_convmae.data.decoding import DecodeError
from video_convmae.models.autoencoder import Autoencoder, FusedEncoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.probe import LinearHead, Probe
from video_convmae.predictor import Predictor, load

FOR, AGAINST = np.array([214, 39, 40]), np.array([31, 119, 180])


class Evidence(NamedTuple):
    """A logit taken apart: it is the sum of all tokens' contributions, `(N,)`, and of what no token changes."""

    tokens: Tensor
    constant: Tensor


class Row(NamedTuple):
    """A row of the picture: its title, and images `(t, h, w, 3)` uint8, one for each token frame."""

    title: str
    images: np.ndarray


def evidence(model: Classifier | Probe, tokens: Tensor, label: int) -> Evidence:
    """What each of a view's tokens `(N, D)` adds to the logit of a class; exact.

    A classifier's head is Linear(LayerNorm(m)) of the mean m of the tokens. With the mean and deviation s of m itself,

        logit = sum over tokens x of w gamma (x - mean(x)) / (s N)  +  w beta + b

    and the mean over channels of m is the mean of the mean(x). A linear probe standardises with fixed numbers instead.

    Raises:
        TypeError: another head, such as an attentive probe's, that is no sum over tokens.
    """
    if isinstance(model, Classifier):
        norm, linear = model.norm, model.head
        spread = (tokens.mean(dim=0).var(correction=0) + norm.eps).sqrt()
        centred = tokens - tokens.mean(dim=1, keepdim=True)
        weight, constant = linear.weight[label] * norm.weight / spread, linear.weight[label] @ norm.bias
    elif isinstance(model.head, LinearHead):
        norm, linear = model.head.norm, model.head.linear
        centred = tokens - norm.running_mean
        weight, constant = linear.weight[label] / (norm.running_var + norm.eps).sqrt(), 0
    else:
        head = type(getattr(model, "head", model)).__name__
        raise TypeError(f"the logits of this model ({head}) are no sum over tokens: there is no evidence to show")
    return Evidence(centred @ weight / len(tokens), constant + linear.bias[label])


def principal_colours(grid: Tensor) -> np.ndarray:
    """Features `(C, t, h, w)` -> colours `(t, h, w, 3)` uint8: their first three principal components over all places.

    Each component runs from its 1st to its 99th percentile; its sign is that with which its largest weight is positive.
    A component that is not there, for want of channels or of differences, is a middle grey.
    """
    x = grid.flatten(1).T.double()
    x = x - x.mean(dim=0)
    values, vectors = torch.linalg.eigh(x.T @ x)  # ascending
    vectors = vectors[:, -3:].flip(1)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    shares = torch.full((len(x), 3), 0.5, dtype=x.dtype)
    for i, value in enumerate(values[-3:].flip(0)):
        component = x @ vectors[:, i]
        low, high = np.percentile(component.numpy(), (1, 99))
        if value > 1e-12 * values[-1] and high > low:
            shares[:, i] = ((component - low) / (high - low)).clamp(0, 1)
    return (255 * shares).round().to(torch.uint8).view(*grid.shape[1:], 3).numpy()


def heat(frames: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values over grey frames: red where they are above 0, blue where they are below it, more for more.

    Args:
        frames: `(t, H, W, 3)` uint8.
        values: `(t, h, w)`; the scale is symmetric, and its end is the largest of all.
    """
    grey = frames.mean(axis=3, keepdims=True)
    shares = _enlarge(values / max(np.abs(values).max(), 1e-30), *frames.shape[1:3])[..., None]
    colour = np.where(shares > 0, FOR, AGAINST)
    strength = 0.85 * np.abs(shares)
    return ((1 - strength) * grey + strength * colour).round().astype(np.uint8)


def rows_of(predictor: Predictor, pictures: Tensor, clips: Tensor, label: int | None) -> tuple[list[Row], list[str]]:
    """The rows of the picture, and the lines above them.

    Args:
        predictor: the model.
        pictures: one view, `(1, C, T, H, W)` uint8.
        clips: the same as the model takes it.
        label: the class whose evidence is shown; None: the most probable one.
    """
    model, config = predictor.model, predictor.model.encoder.config
    frames = pictures[0].permute(1, 2, 3, 0).numpy()[:: config.tubelet]  # the first of each token's frames
    with torch.inference_mode():
        tokens, grids = model.encoder.forward_intermediates(clips)
        rows = [Row("frames", frames)]
        for stage, grid in enumerate(grids, start=1):
            rows.append(Row(f"stage {stage}: {grid.shape[1]} x {_shape(grid)}", principal_colours(grid[0].cpu())))
        if isinstance(model, FusedEncoder):
            tokens = model.encode(clips)
            grid = tokens[0].T.unflatten(1, config.grid)
            what = "fusion, norm" if model.fusion is not None and model.fusion.joints else "norm"
            rows.append(Row(f"after {what}", principal_colours(grid.cpu())))
        if isinstance(model, Autoencoder):
            return rows, []
        logits = model(clips)[0].float()
        label = int(logits.argmax()) if label is None else label
        lines = [f"{predictor.name(label)}: {logits.softmax(dim=0)[label]:.1%} (this clip alone)"]
        try:
            parts = evidence(model, tokens[0], label)
        except TypeError as error:
            return rows, [*lines, str(error)]
    values = parts.tokens.view(config.grid).cpu().numpy()
    mean = values.mean()
    rows.append(Row("evidence", heat(frames, values - mean)))
    lines += [
        f"evidence: a token adds {mean:+.3g} to the logit on average; red: more, blue: less, full colour "
        f"{np.abs(values - mean).max():.3g} more or less",
        f"logit {logits[label]:.2f} = {values.sum():.2f} of all tokens {parts.constant:+.2f}",
    ]
    return rows, lines


def write_picture(rows: Sequence[Row], lines: Sequence[str], path: Path, tubelet: int = 1, columns: int = 8) -> None:
    """A PNG: the lines, then the rows, each with its title and up to `columns` images, evenly spread over time."""
    count, height, width = rows[0].images.shape[:3]
    times = np.linspace(0, count - 1, min(columns, count)).round().astype(int)
    scale = max(1, 128 // width)
    height, width = scale * height, scale * width
    font = ImageFont.load_default(14)
    left = int(max(font.getlength(row.title) for row in rows)) + 16
    top = 4 + 20 * len(lines)
    across = max(left + len(times) * (width + 4), int(max((font.getlength(line) for line in lines), default=0)) + 16)
    picture = Image.new("RGB", (across, top + 20 + len(rows) * (height + 4)), "white")
    draw = ImageDraw.SampleKey(picture)
    for place, line in enumerate(lines):
        draw.text((8, 4 + 20 * place), line, fill="black", font=font)
    for column, time in enumerate(times):
        draw.text((left + column * (width + 4), top), f"frame {time * tubelet}", fill="black", font=font)
    for place, row in enumerate(rows):
        y = top + 20 + place * (height + 4)
        draw.text((8, y + height // 2 - 8), row.title, fill="black", font=font)
        for column, time in enumerate(times):
            image = Image.fromarray(_enlarge(row.images[time][None], height, width)[0])
            picture.paste(image, (left + column * (width + 4), y))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="run folder, a checkpoint of one, or a published file")
    parser.add_argument("file", help="a video, an image or a folder of frames")
    parser.add_argument("--output", type=Path, required=True, help="the picture, a PNG file")
    parser.add_argument("--label", help="number or name of the class to look for; default: the most probable one")
    parser.add_argument("--labels", type=Path, help="file of class names; default: the run's own")
    parser.add_argument("--frames", type=int, default=8, help="columns at most (default 8)")
    given = parser.parse_args(arguments)
    if given.frames < 1:
        parser.error(f"--frames is {given.frames}; expected 1 or more")
    try:
        predictor = load(given.weights, labels=given.labels)
        label = None if given.label is None else label_of(predictor, given.label)
        pictures = predictor.pictures(given.file, predictor.middle)
    except (OSError, ValueError, ImportError, DecodeError) as error:
        parser.error(str(error))
    rows, lines = rows_of(predictor, pictures, predictor.normalise(pictures), label)
    lines = [f"{given.weights}, {given.file}", *lines]
    write_picture(rows, lines, given.output, predictor.model.encoder.config.tubelet, given.frames)
    print("\n".join([*lines, f"{given.output}: {len(rows)} rows"]))


def label_of(predictor: Predictor, text: str) -> int:
    """The class that a number or a name means.

    Raises:
        ValueError: there is none.
    """
    if isinstance(predictor.model, Autoencoder):
        raise ValueError("--label was given; a model that was pretrained only has no classes")
    names, count = predictor.class_names or (), predictor.config.data.num_classes
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < count:
        return int(text)
    known = f"a number from 0 to {count - 1}" + (f" or a name such as {names[0]!r}" if names else "")
    raise ValueError(f"--label is {text!r}; expected {known}")


def _shape(grid: Tensor) -> str:
    return " x ".join(map(str, grid.shape[2:]))


def _enlarge(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """`(t, h, w, ...)` -> `(t, height, width, ...)`, positions repeated."""
    rows = np.arange(height) * images.shape[1] // height
    columns = np.arange(width) * images.shape[2] // width
    return images[:, rows][:, :, columns]
