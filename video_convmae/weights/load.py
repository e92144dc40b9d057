"""Published weights into our models; image weights into video.

    load_weights(model, "convmae_base.pth")                                     # prints as a report
    model, report = model_from("videomae_k400.pth", num_frames=16)              # a model of the file's sizes
    load_weights(video_model, "convmae_base.pth", inflation=Inflation())        # image weights start a video run

layouts.py knows the released names and shapes, released.py reads and writes files of them.

Letters: N tokens, D width of a token, O values out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from video_convmae.models import positions
from video_convmae.models.autoencoder import Autoencoder, FusedEncoder, create_autoencoder
from video_convmae.models.classifier import Classifier, create_classifier
from video_convmae.models.encoder import Encoder
from video_convmae.models.probe import Probe
from video_convmae.models.sizes import EncoderConfig

from .layouts import NO_CLS, Geometry, Tensors, matches
from .released import PARTS, POSITIONS, Weights, embeddings, fixed_grids, sizes_of, summarize_names, weights_of, what

EXCLUDABLE = ("positions", *PARTS[1:])


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint.

    layout: what it was recognised as.
    loaded: our names that were filled from it.
    missing: our names that it does not hold; they keep their initial values.
    unexpected: its names that have no place in the model.
    reshaped: our names whose tensors had another shape: positions that were resized (loaded) and a head for other
        classes (new).
    notes: what a person should know, in sentences.
    """

    layout: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.layout}: {len(self.loaded)} tensors loaded"]
        for title in ("missing", "unexpected", "reshaped"):
            names = getattr(self, title)
            lines.append(f"  {title}: {summarize_names(names)}" if names else f"  {title}: none")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class Inflation:
    """How image weights become video weights.

    embedding: of the first embedding over the frames of a token: `average` repeats and divides, `center` puts the image
        kernel on the middle frame.
    depthwise: of the depthwise kernels over time, likewise. Only `center` keeps the image model's tokens on a still
        clip: an average reads zero padding beyond the first and last frames and dims them.
    """

    embedding: Literal["average", "center"] = "average"
    depthwise: Literal["average", "center"] = "center"

    def __post_init__(self) -> None:
        for name in ("embedding", "depthwise"):
            if getattr(self, name) not in ("average", "center"):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected 'average' or 'center'")


# Loading


def load_weights(
    model: Autoencoder | Classifier | Probe | Encoder,
    path_or_state_dict: str | Path | Mapping[str, Any] | Weights,
    *,
    inflation: Inflation | None = None,
    exclude: Collection[str] = (),
) -> LoadReport:
    """Fill a model from weights of any known layout. Nothing is changed if there is an error.

    The encoder must be there and fit. Norm, fusion, decoder and head are taken where the file has them: where it has
    not, they keep their initial values and are reported as missing. A head for another number of classes stays new;
    learnable positions of another grid are resized; a fixed position table is compared with the model's own. What the
    file holds and the model has no place for (a decoder, for a classifier) is reported as unexpected. A probe never
    trains the norm and fusion that it reads: for it they must be there, as the encoder must.

    Args:
        model: an Autoencoder, a Classifier, a Probe or an Encoder of ours, not wrapped.
        path_or_state_dict: as in `weights_of`.
        inflation: lets image weights into a video model, in this way; then a decoder that does not fit stays new.
        exclude: what is not taken: positions, norm, fusion, decoder, head.

    Raises:
        ValueError: as `weights_of`; the encoder or another part does not fit; positions of another kind, or of a grid
            that cannot be told; image weights for a video model without `inflation`; a head that was not trained on the
            mean over tokens; no norm or fusion for a probe that reads it; a fusion that the model would not read.
    """
    weights = weights_of(path_or_state_dict)
    if unknown := sorted(set(exclude) - set(EXCLUDABLE)):
        raise ValueError(f"exclude has {', '.join(unknown)}; expected some of {', '.join(EXCLUDABLE)}")
    if "positions" in exclude:
        weights = weights.without("positions")
    encoder = model if isinstance(model, Encoder) else model.encoder
    weights = _as_of_frames(_as_of_windows(weights, encoder.config), encoder.config, inflation)
    inflated = weights.is_image and encoder.config.num_frames > 1
    if inflated:
        weights = _inflated_for(encoder.config, weights, inflation)
    _check_parts(model, {part for part in PARTS if weights.has(part)} - set(exclude), weights)
    weights = _arranged_for(model, weights, exclude)
    plan = _Plan(_targets(model), weights, notes=list(weights.notes))
    _plan_positions(plan, encoder.config)
    for part in PARTS:
        _plan_part(plan, part, decoder_may_be_new=inflated)
    if "decoder.mask_token" in plan.values and "decoder.positions" in weights.tensors:
        _compare(plan, "decoder.positions", encoder.config)
    return plan.carry_out()


def _as_of_windows(weights: Weights, config: EncoderConfig) -> Weights:
    """Bare tensors whose embeddings have the model's shapes are over the model's windows, whatever was guessed."""
    inputs = (config.channels * config.tubelet, *config.widths[:-1])
    windows = [values * stride**2 for values, stride in zip(inputs, config.strides)]
    same = windows == [kernel.shape[1] for kernel in embeddings(weights.tensors)]
    if not weights.bare or not same or weights.temporal_kernel != _temporal_kernel(config):
        return weights
    return replace(weights, geometry=Geometry(config.strides, config.tubelet, config.channels))


def _as_of_frames(weights: Weights, config: EncoderConfig, inflation: Inflation | None) -> Weights:
    """Weights that are known to be of images or of clips, where both have the same shapes.

    At tubelet 1 and temporal kernel 1 the positions alone tell; without them an inflation changes nothing.
    """
    same_shapes = (config.tubelet, _temporal_kernel(config)) == (1, 1)
    if not (weights.is_image and weights.frames is None and same_shapes and config.num_frames > 1):
        return weights
    if POSITIONS[0] in weights.tensors:
        frames = _grid_of(weights, config)[0]
    else:
        frames = config.grid[0] if inflation is None else 1
    return replace(weights, geometry=replace(weights.geometry, frames=frames))


def _temporal_kernel(config: EncoderConfig) -> int:
    """Frames of the model's depthwise kernels; 1 for a plain ViT, which has none."""
    return config.temporal_kernel if len(config.strides) > 1 else 1


@dataclass
class _Plan:
    """What is going to be loaded; carried out at the end, so that an error leaves the model as it was."""

    targets: Tensors
    weights: Weights
    values: Tensors = field(default_factory=dict)
    compared: set[str] = field(default_factory=set)  # fixed tables: there is nothing to copy
    reshaped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def carry_out(self) -> LoadReport:
        """Fill the model."""
        with torch.no_grad():
            for name, value in self.values.items():
                self.targets[name].copy_(value)
        accounted = {*self.values, *self.reshaped, *self.compared}
        weights = self.weights
        unexpected = [weights.names.get(name, name) for name in weights.tensors if name not in accounted]
        return LoadReport(
            layout=weights.layout,
            loaded=tuple(self.values),
            missing=tuple(name for name in self.targets if name not in accounted),
            unexpected=(*unexpected, *weights.dropped),
            reshaped=tuple(self.reshaped),
            notes=tuple(self.notes),
        )


def _targets(model: nn.Module) -> Tensors:
    """What can be filled, under the names of a whole model: all that is saved, so not the fixed tables."""
    prefix = "encoder." if isinstance(model, Encoder) else ""
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def _check_parts(model: nn.Module, parts: Collection[str], weights: Weights) -> None:
    """Raise if the model would read a part that these weights leave untrained, or not read what theirs was trained on.

    `parts` are those that are going to be taken.
    """
    if isinstance(model, Classifier) and "head" in parts and not weights.has("fc_norm"):
        raise ValueError(
            f"the head of these {weights.layout} weights was trained on one token or is a probe's, not a classifier's "
            "on the mean over tokens; leave out the head to take the encoder alone"
        )
    if isinstance(model, FusedEncoder) and model.fusion is None and "fusion" in parts:
        raise ValueError("these weights were trained with the fusion: build the model with msd=True or leave it out")
    if isinstance(model, Probe) and "norm" not in parts:
        raise ValueError(
            f"no norm over tokens comes from these {weights.layout} weights (a finetuned classifier's is over their "
            "mean): a probe would read its own, untrained and frozen. Probe pretraining weights, or finetune these"
        )
    if isinstance(model, Probe) and model.fusion is not None and model.fusion.joints and "fusion" not in parts:
        raise ValueError(
            f"no fusion comes from these {weights.layout} weights: a probe would read its own, untrained and frozen. "
            "Build the probe with msd=False"
        )


def _arranged_for(model: nn.Module, weights: Weights, exclude: Collection[str]) -> Weights:
    """Names as the model has them, without the parts that are to be left out."""

    def arranged(name: str) -> str:
        if isinstance(model, Classifier) and name.startswith(("norm.", "fc_norm.")):
            return name.removeprefix("fc_") if name.startswith("fc_") else "over_tokens." + name
        return name

    taken = replace(weights, tensors={arranged(n): t for n, t in weights.tensors.items()}).without(*exclude)
    names = {arranged(n): theirs for n, theirs in weights.names.items()}
    notes = [f"{name} dropped: {reason}" for name, reason in weights.dropped.items() if reason is not NO_CLS]
    if isinstance(model, Classifier) and weights.has("norm"):
        notes.append("a classifier has no place for pretraining's norm over tokens, fusion and decoder")
    if isinstance(model, Probe) and model.fusion is None and _may_have_had_fusion(weights):
        notes.append(
            "the probe reads no fusion: if these weights were pretrained with one, as the released ConvMAE was, their "
            "norm stood behind it and was not trained on what the probe reads"
        )
    notes += [f"left out as asked: {', '.join(exclude)}"] if exclude else []
    return replace(taken, names=names, notes=(*weights.notes, *notes))


def _may_have_had_fusion(weights: Weights) -> bool:
    """A hybrid's weights with a fusion, or so cut down that it may have been cut off."""
    return len(weights.geometry.strides) > 1 and (weights.has("fusion") or not weights.has("decoder"))


def _plan_part(plan: _Plan, part: str, decoder_may_be_new: bool) -> None:
    """Take one part of the model whole, or leave it as it is and say so."""
    wanted = {n: t for n, t in plan.targets.items() if n.startswith(part + ".") and n != "encoder.positions"}
    given = {n: t for n, t in plan.weights.tensors.items() if n.startswith(part + ".") and not n.endswith("positions")}
    if not wanted or (part != "encoder" and not _holds(plan, part, given)):
        return
    faults = _faults(wanted, given)
    if not faults:
        plan.values |= given
    elif part == "head" and given.keys() != wanted.keys():
        plan.notes.append("the head is new: the file's is of another kind")
    elif part == "head":
        plan.reshaped += sorted(wanted)
        theirs, ours = (_classes(tensors) for tensors in (given, wanted))
        plan.notes.append(f"the head is new: {theirs} classes in the file, {ours} in the model")
    elif part == "decoder" and decoder_may_be_new:
        plan.notes.append(f"the decoder does not fit and is new: {faults[0]}")
    else:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        hint = "" if part == "encoder" else f", or leave out the {part}"
        raise ValueError(
            f"{plan.weights.layout} weights do not fit the model's {part}: {'; '.join(faults[:3])}{more}. "
            f"Build the model with what sizes_of(weights) says{hint}"
        )


def _holds(plan: _Plan, part: str, given: Tensors) -> bool:
    """Whether the file has a part. A decoder cannot do without the norm and fusion that it was trained with."""
    weights = plan.weights
    if part == "decoder":
        return weights.has("decoder")
    if not given and part in ("norm", "fusion") and weights.has("decoder") and "decoder.mask_token" in plan.targets:
        raise ValueError(f"{weights.layout} weights with a decoder but no {part}; msd=False or leave out the decoder")
    return bool(given)


def _classes(head: Tensors) -> int:
    """How many classes a head tells apart; a probe's ends in a Linear of its own."""
    return len(head["head.bias"] if "head.bias" in head else head["head.linear.bias"])


def _faults(wanted: Tensors, given: Tensors) -> list[str]:
    absent = [f"{name} is missing" for name in wanted if name not in given]
    shapes = [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    extra = [f"{name} has no place" for name in given if name not in wanted]
    return shapes + absent + extra


def _plan_positions(plan: _Plan, config: EncoderConfig) -> None:
    """Learnable positions are loaded, resized where the grid differs; fixed ones must be the model's own table."""
    name, weights = POSITIONS[0], plan.weights
    table = weights.tensors.get(name)
    if table is None or table.shape[-1] != config.widths[-1]:
        if weights.position_table not in (None, config.position_table):
            raise ValueError(
                f"{weights.layout} weights were trained with the {weights.position_table} position table, the model "
                f"has {config.position_table}: build it with position_table={weights.position_table!r}"
            )
        if name in plan.targets and weights.grid not in (None, config.grid):
            _plan_resized(
                plan, positions.TABLES[config.position_table](weights.grid, config.widths[-1]), weights.grid, config
            )
        return
    if name not in plan.targets:
        _compare(plan, name, config)
        return
    _plan_resized(plan, table[0], _grid_of(weights, config), config)


def _plan_resized(plan: _Plan, table: Tensor, grid: tuple[int, int, int], config: EncoderConfig) -> None:
    """Positions `(N, D)` over the file's grid, as learnable ones over the model's."""
    plan.values["encoder.positions"] = positions.resize(table, grid, config.grid)[None]
    if grid != config.grid:
        plan.reshaped.append("encoder.positions")
        plan.notes.append(f"positions resized from the grid {grid} to {config.grid}")


def _compare(plan: _Plan, name: str, config: EncoderConfig) -> None:
    """Raise if a table of the file is not the fixed one over its grid. The model has its own over its own grid."""
    table, weights = plan.weights.tensors[name], plan.weights
    counts = {weights.frames} if weights.frames else _frames_of(weights, table.shape[-2], config.grid) | {1}
    if not any(fixed_grids(table, config.position_table, count) for count in counts):
        learn = "" if name != POSITIONS[0] else ", or build the model with learnable_positions=True to load them"
        raise ValueError(
            f"{weights.names.get(name, name)} is not the fixed {config.position_table} table that the model has: "
            "it was learnt, or is of another kind. Leave out positions (on the command line --init.exclude "
            f"[positions]) to keep the model's own{learn}"
        )
    plan.compared.add(name)


def _grid_of(weights: Weights, config: EncoderConfig) -> positions.Grid:
    """The grid that the file's positions are over: what it says, what their values say, or the only one that fits.

    Raises:
        ValueError: none or several fit.
    """
    if weights.grid is not None:
        return weights.grid
    tokens, fixed = weights.tensors[POSITIONS[0]].shape[-2], weights.fixed_grids(POSITIONS[0])
    if weights.bare and tokens == math.prod(config.grid) and not fixed:
        return config.grid  # a state dict of this very model
    grids = fixed if len(fixed) == 1 else _fitting_grids(weights, tokens, config.grid)
    if len(grids) == 1:
        return grids[0]
    fault = f"may be over the grid {' or '.join(map(str, grids))}" if grids else "are over no grid that is known here"
    raise ValueError(
        f"{weights.names.get(POSITIONS[0], POSITIONS[0])} has {tokens} tokens, which {fault}; the model's grid is "
        f"{config.grid}. Say it with dataclasses.replace(weights_of(path), grid=...), or leave out positions (on the "
        "command line --init.exclude [positions])"
    )


def _fitting_grids(weights: Weights, tokens: int, model: positions.Grid) -> list[positions.Grid]:
    """Grids of so many tokens, each frame square or as the model's."""
    counts = _frames_of(weights, tokens, model)
    sides = [(count, math.isqrt(tokens // count)) for count in counts]
    grids = {(count, side, side) for count, side in sides} | {(count, *model[1:]) for count in counts}
    return sorted(grid for grid in grids if math.prod(grid) == tokens)


def _frames_of(weights: Weights, tokens: int, model: positions.Grid) -> set[int]:
    """How many frames so many tokens may be of: what the file says, else the model's, as many as have the model's
    height and width, and an image's one."""
    if weights.frames is not None:
        return {weights.frames}
    t, h, w = model
    return {t, tokens // (h * w), *([1] if weights.is_image else [])} - {0}


def model_from(
    source: str | Path | Mapping[str, Any] | Weights, **overrides: Any
) -> tuple[Autoencoder | Classifier, LoadReport]:
    """The model that a checkpoint describes, with its weights: a classifier where there is a head, else an autoencoder.

    `overrides` go before what `sizes_of` says: `heads`, `image_size`, `num_frames`, ...

    Raises:
        ValueError: as `weights_of`, `sizes_of` and `load_weights`.
    """
    weights = weights_of(source)
    if "head.linear.weight" in weights.tensors:
        raise ValueError("these are a probe's weights: build it with create_probe and fill it with load_weights")
    create: Callable[..., Autoencoder | Classifier] = create_classifier if weights.has("head") else create_autoencoder
    model = create(**{**sizes_of(weights), **overrides})
    return model, load_weights(model, weights)


# Image weights into video


def inflate(
    source: str | Path | Mapping[str, Any] | Weights,
    *,
    tubelet: int = 2,
    temporal_kernel: int = 3,
    num_frames: int = 16,
    embedding: Literal["average", "center"] = "average",
    depthwise: Literal["average", "center"] = "center",
) -> Weights:
    """Image weights as video weights.

    The first embedding is spread over the tubelet, the depthwise kernels over time (see `Inflation`), positions get the
    table over time added, the decoder predicts every frame of a token as it predicted the image. Everything else works
    inside one frame, or on tokens, and is taken as it is. With a `center` depthwise kernel, the tokens of a still clip
    are the image model's but for what the table over time adds.

    Args:
        source: as in `weights_of`.
        tubelet: frames in a token.
        temporal_kernel: frames of the depthwise kernels, odd.
        num_frames: of a clip; the positions are made for it.
        embedding, depthwise: see `Inflation`.

    Raises:
        ValueError: the weights are no image model's, or numbers that do not fit.
    """
    inflation = Inflation(embedding, depthwise)
    weights = weights_of(source)
    if not weights.is_image:
        raise ValueError(f"only image weights can be inflated; {what(weights)}")
    if tubelet < 1 or num_frames % tubelet or temporal_kernel % 2 == 0:
        raise ValueError(
            f"tubelet {tubelet}, {num_frames} frames, temporal kernel {temporal_kernel}: expected frames a multiple of "
            "the tubelet and an odd kernel"
        )
    changes = (
        ("encoder.embeddings.0.linear.weight", lambda w: _spread(w[:, None], tubelet, embedding).flatten(1)),
        ("*.depthwise.weight", lambda w: _spread(w[:, 0], temporal_kernel, depthwise)[:, None]),
        ("*.positions", lambda table: _over_time(table, num_frames // tubelet)),
        ("decoder.prediction.weight", lambda w: w.repeat(tubelet, 1)),
        ("decoder.prediction.bias", lambda b: b.repeat(tubelet)),
    )
    tensors = dict(weights.tensors)
    for name, tensor in tensors.items():
        change = next((change for pattern, change in changes if matches(name, pattern)), None)
        tensors[name] = tensor if change is None else change(tensor)
    return replace(
        weights,
        layout=f"{weights.layout}, inflated",
        tensors=tensors,
        geometry=replace(weights.geometry, tubelet=tubelet, frames=num_frames // tubelet),
        grid=None if weights.grid is None else (num_frames // tubelet, *weights.grid[1:]),
        bare=False,
        notes=(*weights.notes, *_inflation_notes(weights, tubelet, temporal_kernel, num_frames, inflation)),
    )


def _spread(kernel: Tensor, frames: int, how: str) -> Tensor:
    """`(O, 1, ...)` -> `(O, frames, ...)` with the same sum over frames."""
    if how == "average":
        return torch.cat([kernel / frames] * frames, dim=1)
    spread = torch.zeros_like(kernel).repeat_interleave(frames, dim=1)
    spread[:, frames // 2] = kernel[:, 0]
    return spread


def _over_time(table: Tensor, t: int) -> Tensor:
    """Positions `(1, h w, D)` -> `(1, t h w, D)`, the table over time added and rounded once."""
    time = positions.time(t, table.shape[-1]).to(table.device, torch.promote_types(table.dtype, torch.float32))
    return (table + time[:, None]).to(table.dtype).flatten(0, 1)[None]


def _inflation_notes(weights: Weights, tubelet: int, kernel: int, frames: int, how: Inflation) -> list[str]:
    notes = [f"inflated: the first embedding over {tubelet} frames ({how.embedding})"]
    if weights.has("fusion"):
        notes.append("inflated: the fusion is taken as it is")
    if "encoder.conv_stages.0.0.depthwise.weight" in weights.tensors:
        notes.append(f"inflated: depthwise kernels over {kernel} frames ({how.depthwise})")
    if "encoder.positions" in weights.tensors:
        notes.append(
            f"inflated: positions over {frames // tubelet} token frames, the sine-cosine table over time added"
        )
    if weights.has("decoder"):
        notes.append(f"inflated: the decoder's prediction is repeated over {tubelet} frames, the rest as it is")
    else:
        notes.append("inflated: there is no decoder in the file")
    return notes


def _inflated_for(config: EncoderConfig, weights: Weights, inflation: Inflation | None) -> Weights:
    if inflation is None:
        raise ValueError(
            f"{weights.layout} weights of an image model for a video model: load them with an Inflation, or inflate "
            "them (tools/convert_weights.py inflate)"
        )
    return inflate(
        weights,
        tubelet=config.tubelet,
        temporal_kernel=config.temporal_kernel,
        num_frames=config.num_frames,
        embedding=inflation.embedding,
        depthwise=inflation.depthwise,
    )
