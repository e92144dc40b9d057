"""Reconstructions of a pretrained autoencoder: original, masked and reconstructed clips as PNG and mp4; their error.

A model that predicts normalised patches knows no patch's brightness or contrast: mean colour and variance are taken
from the original, and the caption says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from video_convmae.build import build_sampling
from video_convmae.config import PretrainConfig
from video_convmae.data.datasets import times_for
from video_convmae.data.decoding import open_frames, resolve_reader
from video_convmae.data.records import Record, read_list
from video_convmae.data.transforms import Augmentation, view_crops
from video_convmae.engine.probing import choose_records
from video_convmae.engine.tasks import Normalizer
from video_convmae.engine.trainer import Pictures
from video_convmae.errors import UserError
from video_convmae.masking import MASKS
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.packing import Packing, put_patches, take_patches, take_tokens

GREY = 110  # of hidden patches


@dataclass(frozen=True)
class Reconstructions:
    """Clips as uint8 `(B, C, T, H, W)`, and their masks `(B, t, h, w)`."""

    original: Tensor
    masked: Tensor
    reconstructed: Tensor
    visible: Tensor


def read_middle_clips(records: Iterable[Record], config: PretrainConfig, size: tuple[int, int]) -> Tensor:
    """Read the middle clip of each record, centre crop, as `(B, C, T, H, W)` uint8.

    Raises:
        DecodeError: a file cannot be read.
    """
    sampling = build_sampling(config.data, config.model)
    name, clips = resolve_reader(config.data.reader), []
    for record in records:
        with open_frames(record, name, config.data.max_side) as reader:
            times = times_for(sampling, reader, record.path)
            frames = reader.read(sampling.views(len(reader), 1, times)[0])
        height, width = frames.shape[1:3]
        (crop,) = view_crops(height, width, size, 1)
        clips.append(Augmentation(config.data.augmentation).apply(frames, crop, size))
    return torch.stack(clips)


def draw_masks(model: Autoencoder, config: PretrainConfig, count: int, seed: int = 0) -> Tensor:
    """Draw `count` masks of the run's kind and ratio, `(count, t, h, w)`."""
    generator = torch.Generator().manual_seed(seed)
    mask = MASKS[config.mask.kind]
    return torch.stack([mask(model.grid, config.mask.ratio, generator) for _ in range(count)])


def reconstruct_clips(model: Autoencoder, config: PretrainConfig, clips: Tensor, visible: Tensor) -> Reconstructions:
    """Run the model on uint8 clips `(B, C, T, H, W)` with masks `(B, t, h, w)`.

    With the target `patch`, too, each channel's mean is put back, not only the mean over all: the colour of a patch
    that is hard to guess would hide what the model says about its form.

    Raises:
        UserError: pixels were no target of the run.
    """
    if not config.predicts_pixels:
        names = ", ".join(each.name for each in config.targets)
        raise UserError(f"this run predicts no pixels, its targets are {names}; expected one with the target pixels")
    normalizer = Normalizer(config.data.mean, config.data.std, next(model.parameters()).device)
    with torch.inference_mode():
        reconstructed = normalizer.restore(model.reconstruct(normalizer.normalise(clips), visible)).cpu()
    if model.target == "patch":
        reconstructed = _with_mean_colours(reconstructed, clips, model)
    shown = F.interpolate(visible[:, None].float(), size=clips.shape[2:]).bool()
    return Reconstructions(clips, torch.where(shown, clips, GREY), reconstructed, visible)


def measure_hidden_error(model: Autoencoder, result: Reconstructions) -> dict[str, float]:
    """Measure the mean squared error on hidden pixels, scaled to 0..1, of the model and of two baselines.

    The baselines see the visible patches, as the model does.

    Returns:
        mse, psnr: of the model; psnr in dB.
        mean_colour_mse: every hidden pixel has the mean colour of the clip's visible ones.
        nearest_patch_mse: every hidden patch is a copy of the nearest visible one (in tokens, Euclidean).
        mean_patch_mse: the model predicts nothing: of normalised patches, whose own mean colours are put back, each is
            of that colour; otherwise mean_colour_mse. With a normalised target it alone knows what the model knows.
    """
    config = model.encoder.config
    packing = Packing(result.visible, torch.device("cpu"), "dense")

    def patches(clips: Tensor, index: Tensor) -> Tensor:
        return take_patches(clips.float() / 255, config.tubelet, config.patch, index)

    truth = patches(result.original, packing.hidden)
    seen = patches(result.original, packing.keep)
    place = torch.cartesian_prod(*(torch.arange(float(size)) for size in config.grid))
    distance = torch.cdist(place[packing.hidden], place[packing.keep])
    mean_colour = seen.mean(dim=(1, 2, 3, 4), keepdim=True).expand_as(truth)
    own_mean = truth.mean(dim=(2, 3, 4), keepdim=True).expand_as(truth)
    guesses = {
        "mse": patches(result.reconstructed, packing.hidden),
        "mean_colour_mse": mean_colour,
        "nearest_patch_mse": take_tokens(seen, distance.argmin(dim=2)),
        "mean_patch_mse": mean_colour if model.target == "none" else own_mean,
    }
    errors = {name: float((guess - truth).square().mean()) for name, guess in guesses.items()}
    return errors | {"psnr": -10 * float(np.log10(errors["mse"]))}


def build_pictures(config: PretrainConfig, device: torch.device, count: int = 4) -> Pictures:
    """Build the pictures of `log.pictures`: the same clips of the probe's list, else of the training list, each time.

    Args:
        config: of the run; `log.pictures` is set.
        device: of the model that is built for a picture.
        count: clips, evenly over the list.

    Raises:
        UserError: pixels are no target of the run.
    """
    if not config.predicts_pixels:
        raise UserError("log.pictures is set, and pixels are no target; leave it out, or add the target pixels")
    assert config.log.pictures is not None

    @cache
    def read() -> Tensor:
        records = choose_shown(config, count)
        return read_middle_clips(records, config, config.model.clip_shape[2:])

    def draw(weights: dict[str, Tensor], path: Path) -> None:
        model = Autoencoder(config.model)
        model.load_state_dict({n: t for n, t in weights.items() if not n.startswith("feature_heads.")})
        model.to(device).eval()
        clips = read()
        result = reconstruct_clips(model, config, clips, draw_masks(model, config, len(clips)))
        write_reconstruction_picture(result, path, write_caption(config, model, result))

    return Pictures("reconstruction", config.log.pictures, draw)


def choose_shown(config: PretrainConfig, count: int) -> list[Record]:
    """Choose records that show how a run reconstructs: of the probe's list, else of the (first) training list, evenly
    over classes and list.

    Raises:
        ListError: the list cannot be read.
    """
    data = config.data if config.probe.list else config.data.sources[0]
    records = read_list(config.probe.list or str(data.train), data.format, data.root)
    return [records[int(index)] for index in choose_records(records.labels, min(count, len(records)))]


def write_caption(config: PretrainConfig, model: Autoencoder, result: Reconstructions | None = None) -> str:
    """Return the caption: the rows of the picture, the values taken from the original and, of `result`, the error."""
    text = f"original / {config.mask.ratio:.0%} hidden ({config.mask.kind}) / reconstructed"
    if result is not None:
        errors = measure_hidden_error(model, result)
        whose = "the visible patches'" if model.target == "none" else "each hidden patch's"
        text += f"; squared error {errors['mse']:.4f}, of {whose} mean colour {errors['mean_patch_mse']:.4f}"
    if model.target == "none":
        return text + "; hidden patches are the model's pixels alone"
    values = "mean and variance of each channel" if model.target == "patch_channel" else "mean colour and variance"
    return text + f"; the model predicts normalised patches: each patch's {values} are the original's"


def write_reconstruction_picture(result: Reconstructions, path: Path, text: str, frames: int = 8) -> None:
    """Write a PNG: three rows a clip (original, masked, reconstructed), up to `frames` columns over time."""
    columns = np.linspace(0, result.original.shape[2] - 1, min(frames, result.original.shape[2])).round().astype(int)
    clips = []
    for rows in zip(result.original, result.masked, result.reconstructed):
        strips = [np.concatenate(list(enlarge(row, 128)[columns]), axis=1) for row in rows]
        clips.append(np.pad(np.concatenate(strips), ((0, 10), (0, 0), (0, 0)), constant_values=255))
    body = np.concatenate(clips)
    font = ImageFont.load_default(14)
    lines = text.split("; ")
    width, head = max(body.shape[1], *(int(font.getlength(line)) + 16 for line in lines)), 8 + 18 * len(lines)
    picture = Image.new("RGB", (width, body.shape[0] + head), "white")
    for number, line in enumerate(lines):
        ImageDraw.Draw(picture).text((8, 4 + 18 * number), line, fill="black", font=font)
    picture.paste(Image.fromarray(body), (0, head))
    picture.save(path)


def write_reconstruction_video(result: Reconstructions, path: Path, fps: float = 8, repeat: int = 4) -> None:
    """Write an H.264 mp4: original, masked and reconstructed clip side by side, a row a clip, played `repeat` times."""
    rows = [
        np.concatenate([enlarge(clip, 224) for clip in of_clip], axis=2)
        for of_clip in zip(result.original, result.masked, result.reconstructed)
    ]
    frames = np.concatenate(rows, axis=1)
    odd_rows, odd_columns = frames.shape[1] % 2, frames.shape[2] % 2
    frames = np.pad(frames, ((0, 0), (0, odd_rows), (0, odd_columns), (0, 0)))  # 4:2:0 needs even sides
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = {"crf": "18"}
        for image in np.concatenate([frames] * repeat):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())


def enlarge(clip: Tensor, width: int) -> np.ndarray:
    """Turn a clip `(C, T, H, W)` uint8 into frames `(T, s * H, s * W, 3)`, enlarged to `width` pixels at most."""
    scale = max(1, width // clip.shape[-1])
    frames = clip.permute(1, 2, 3, 0).numpy()
    size = (scale * frames.shape[2], scale * frames.shape[1])
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])


def _with_mean_colours(clips: Tensor, original: Tensor, model: Autoencoder) -> Tensor:
    """Give every patch of uint8 clips `(B, C, T, H, W)` the mean colour that it has in the original."""
    config = model.encoder.config
    index = torch.arange(prod(config.grid)).expand(len(clips), -1)
    ours, theirs = (take_patches(each.float(), config.tubelet, config.patch, index) for each in (clips, original))
    ours = ours + (theirs - ours).mean(dim=(2, 3, 4), keepdim=True)
    return put_patches(ours, config.grid).round().clamp(0, 255).to(torch.uint8)
