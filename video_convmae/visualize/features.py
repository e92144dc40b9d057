"""Pictures of an encoder's features in a video or an image, and of a classifier's evidence for a class.

Rows: the frames; the features of each stage as colours (their first three principal components as red, green and blue,
one basis for all frames of a row, so a colour means the same at all times); for a pretrained encoder the tokens after
fusion and norm; for a classifier the evidence: the contribution of each token to the logit of a class, less the mean
over the tokens (red: more, blue: less). After attention the tokens share most of their content; their mean
contribution is printed above the picture, since it would paint the row in one colour. For the same reason a token's
evidence is not that of its pixels alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from video_convmae.config import FinetuneConfig
from video_convmae.errors import UserError
from video_convmae.models.autoencoder import Autoencoder, FusedEncoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.probe import LinearHead, Probe
from video_convmae.models.pytorchvideo import LibraryClassifier
from video_convmae.predictor import Predictor

FOR, AGAINST = np.array([214, 39, 40]), np.array([31, 119, 180])  # red and blue


class Evidence(NamedTuple):
    """A logit as a sum: the contributions of the tokens, `(N,)`, and a constant that depends on no token."""

    tokens: Tensor
    constant: Tensor


class FeatureRow(NamedTuple):
    """A row of the picture: its title, and images `(t, h, w, 3)` uint8, one for each token frame."""

    title: str
    images: np.ndarray


def token_evidence(model: Classifier | Probe, tokens: Tensor, label: int) -> Evidence:
    """Return the exact contribution of each of a view's tokens `(N, D)` to the logit of a class.

    A classifier's head is Linear(LayerNorm(m)) of the mean m of the tokens. With the mean and deviation s of m itself,

        logit = sum over tokens x of w gamma (x - mean(x)) / (s N)  +  w beta + b

    and the mean over channels of m is the mean of the mean(x). A linear probe standardises with fixed numbers instead.

    Raises:
        TypeError: the head is not linear in the tokens, as an attentive probe's or one that reads their change.
    """
    pool = model.config.pool if isinstance(model, Classifier) else getattr(model.head, "pool", "mean")
    if pool != "mean":
        raise TypeError(f"model.pool is {pool}: the logits are no sum over tokens, so no evidence is shown")
    if isinstance(model, Classifier):
        norm, linear = model.norm, model.head
        spread = (torch.var(tokens.mean(dim=0), correction=0) + norm.eps).sqrt()
        centred = tokens - tokens.mean(dim=1, keepdim=True)
        weight = linear.weight[label] * norm.weight / spread
        constant = linear.weight[label] @ norm.bias + linear.bias[label]
    elif isinstance(model.head, LinearHead):
        linear, statistics = model.head.linear, model.head.norm
        mean, variance = cast(Tensor, statistics.running_mean), cast(Tensor, statistics.running_var)
        centred = tokens - mean
        weight, constant = linear.weight[label] / (variance + statistics.eps).sqrt(), linear.bias[label].detach()
    else:
        head = type(getattr(model, "head", model)).__name__
        raise TypeError(f"the logits of this model ({head}) are no sum over tokens: there is no evidence to show")
    return Evidence(centred @ weight / len(tokens), constant)


def principal_colours(grid: Tensor) -> np.ndarray:
    """Turn features `(C, t, h, w)` into colours `(t, h, w, 3)` uint8: their first three principal components.

    Each component runs from its 1st to its 99th percentile over all positions; its sign makes its largest weight
    positive. A component without variance, or beyond the number of channels, is a middle grey.
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


def overlay_heat(frames: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Paint values over grey frames: red above 0, blue below it, stronger for larger values.

    Args:
        frames: `(t, H, W, 3)` uint8.
        values: `(t, h, w)`; the scale is symmetric and ends at the largest magnitude.
    """
    grey = frames.mean(axis=3, keepdims=True)
    shares = _enlarge(values / max(np.abs(values).max(), 1e-30), *frames.shape[1:3])[..., None]
    colour = np.where(shares > 0, FOR, AGAINST)
    strength = 0.85 * np.abs(shares)
    return ((1 - strength) * grey + strength * colour).round().astype(np.uint8)


def draw_feature_rows(
    predictor: Predictor, pictures: Tensor, clips: Tensor, label: int | None
) -> tuple[list[FeatureRow], list[str]]:
    """Return the rows of the picture, and the lines above them.

    Args:
        predictor: the model.
        pictures: one view, `(1, C, T, H, W)` uint8.
        clips: the same, normalised.
        label: class of the evidence; None: the most probable one.
    """
    model = predictor.model
    if isinstance(model, LibraryClassifier):
        raise UserError(f"the model is {model.config.size}; expected one of ours: only their tokens are drawn")
    config = model.encoder.config
    frames = pictures[0].permute(1, 2, 3, 0).numpy()[:: config.tubelet]  # the first of each token's frames
    with torch.inference_mode():
        tokens, grids = model.encoder.forward_intermediates(clips)
        rows = [FeatureRow("frames", frames)]
        for stage, grid in enumerate(grids, start=1):
            title = f"stage {stage}: {grid.shape[1]} x {_shape(grid)}"
            rows.append(FeatureRow(title, principal_colours(grid[0].cpu())))
        if isinstance(model, FusedEncoder):
            tokens = model.encode(clips)
            grid = tokens[0].T.unflatten(1, config.grid)
            layers = "fusion, norm" if model.fusion is not None and model.fusion.joints else "norm"
            rows.append(FeatureRow(f"after {layers}", principal_colours(grid.cpu())))
        if isinstance(model, Autoencoder):
            return rows, []
        logits = model(clips)[0].float()
        label = int(logits.argmax()) if label is None else label
        lines = [f"{predictor.name(label)}: {logits.softmax(dim=0)[label]:.1%} (this clip alone)"]
        try:
            parts = token_evidence(model, tokens[0], label)
        except TypeError as error:
            return rows, [*lines, str(error)]
    values = parts.tokens.view(config.grid).cpu().numpy()
    mean = values.mean()
    rows.append(FeatureRow("evidence", overlay_heat(frames, values - mean)))
    lines += [
        f"evidence: a token adds {mean:+.3g} to the logit on average; red: more, blue: less, full colour "
        f"{np.abs(values - mean).max():.3g} more or less",
        f"logit {logits[label]:.2f} = {values.sum():.2f} of all tokens {parts.constant:+.2f}",
    ]
    return rows, lines


def write_feature_picture(
    rows: Sequence[FeatureRow], lines: Sequence[str], path: Path, tubelet: int = 1, columns: int = 8
) -> None:
    """Write a PNG: the lines, then the rows, each with a title and up to `columns` images evenly spread over time."""
    count, height, width = rows[0].images.shape[:3]
    times = np.linspace(0, count - 1, min(columns, count)).round().astype(int)
    scale = max(1, 128 // width)
    height, width = scale * height, scale * width
    font = ImageFont.load_default(14)
    left = int(max(font.getlength(row.title) for row in rows)) + 16
    top = 4 + 20 * len(lines)
    across = max(left + len(times) * (width + 4), int(max((font.getlength(line) for line in lines), default=0)) + 16)
    picture = Image.new("RGB", (across, top + 20 + len(rows) * (height + 4)), "white")
    draw = ImageDraw.Draw(picture)
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


def find_label(predictor: Predictor, text: str) -> int:
    """Return the class of a number or a name.

    Raises:
        ValueError: there is no such class.
    """
    if isinstance(predictor.model, Autoencoder):
        raise UserError("--label was given; the model was pretrained only and has no classes")
    config = cast(FinetuneConfig, predictor.config)  # that of every model with classes
    names = predictor.class_names or ()
    count = config.data.num_classes or len(names)
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < count:
        return int(text)
    known = f"a number from 0 to {count - 1}" + (f" or a name such as {names[0]!r}" if names else "")
    raise UserError(f"--label is {text!r}; expected {known}")


def _shape(grid: Tensor) -> str:
    return " x ".join(map(str, grid.shape[2:]))


def _enlarge(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Enlarge `(t, h, w, ...)` to `(t, height, width, ...)`, positions repeated."""
    rows = np.arange(height) * images.shape[1] // height
    columns = np.arange(width) * images.shape[2] // width
    return images[:, rows][:, :, columns]
