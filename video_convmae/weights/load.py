"""Load weights into our models.

    load_weights(model, "convmae_base.pth")                                     # prints as a report
    model, report = model_from("videomae_k400.pth", num_frames=16)              # a model of the file's sizes
    load_weights(video_model, "convmae_base.pth", inflation=Inflation())        # image weights start a video run

Letters: N tokens, D width of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from video_convmae.errors import UserError
from video_convmae.models import positions
from video_convmae.models.autoencoder import Autoencoder, FusedEncoder, create_autoencoder
from video_convmae.models.classifier import Classifier, create_classifier
from video_convmae.models.encoder import EncoderParts
from video_convmae.models.lora import without_lora
from video_convmae.models.probe import Probe
from video_convmae.models.pytorchvideo import LibraryClassifier
from video_convmae.models.sizes import AutoencoderConfig, ClassifierConfig, EncoderConfig

from .arguments import count_blocks, encoder_arguments, model_arguments
from .files import Tensors
from .formats import Source, read_weights
from .formats.base import NO_CLS
from .formats.ours import rename_norm
from .formats.pytorchvideo import NET, clip_of, our_names
from .grids import find_grid, possible_frames
from .inflate import inflate
from .options import EXCLUDABLE, Inflation
from .state import PARTS, POSITIONS, Weights, embedding_weights, summarize_names
from .wrapping import OUTSIDE

READS_NO_FUSION = (
    "reads no fusion: if these weights were pretrained with one, as the released ConvMAE was, their norm followed it "
    "and was not trained on the tokens that it gets here"
)


@dataclass(frozen=True)
class LoadReport:
    """Result of loading weights.

    format: recognised format and kind.
    loaded: our names that were filled.
    missing: our names that the file does not hold; they keep their initial values.
    unexpected: names in the file without a place in the model.
    reshaped: our names whose tensors had another shape: positions, which were resized (loaded), and a head for other
        classes (new).
    notes: remarks in sentences.
    assumed: properties that neither shapes nor a configuration state, with the values that the model has.
    """

    format: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]
    notes: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = {
            "start new": summarize_names(self.missing),
            "in the file, not used by this model": summarize_names(self.unexpected),
            "assumed, as the file does not say it": ", ".join(self.assumed),
        }
        listed = [f"  {title}: {names}" for title, names in lines.items() if names]
        notes = [f"  note: {note}" for note in self.notes]
        return "\n".join([f"{self.format}: {len(self.loaded)} tensors loaded", *listed, *notes])


def model_from(source: Source, **overrides: Any) -> tuple[Autoencoder | Classifier | LibraryClassifier, LoadReport]:
    """Build the model that weights describe and load them: a classifier if there is a head, else an autoencoder.

    Of pytorchvideo it is that model, for clips as in the published test.

    `overrides` replace arguments that `model_arguments` returns: `heads`, `image_size`, `num_frames`, ...

    Raises:
        ValueError: as `read_weights`, `model_arguments` and `load_weights`.
    """
    weights = read_weights(source)
    if weights.size is not None:
        return _library_model_from(weights, **overrides)
    create: Callable[..., Autoencoder | Classifier] = create_classifier if weights.has("head") else create_autoencoder
    model = create(**{**model_arguments(weights), **overrides})
    report = load_weights(model, weights)
    if not weights.says_clip and not {"num_frames", "image_size"} <= overrides.keys():
        report = replace(report, assumed=(*report.assumed, describe_clip(model.encoder.config)))
    return model, report


def _library_model_from(weights: Weights, **overrides: Any) -> tuple[LibraryClassifier, LoadReport]:
    arguments = model_arguments(weights) | overrides
    classes = arguments.pop("num_classes", None)
    if classes is None:
        raise ValueError(f"{weights.format} weights without the last linear layer; expected a classifier's")
    model = LibraryClassifier(ClassifierConfig(**arguments), classes)
    report = load_weights(model, weights)
    if weights.guessed:
        report = replace(report, assumed=(f"{weights.size}: X3D-XS, S and M have the same shapes",))
    return model, report


def describe_encoder(config: EncoderConfig) -> str:
    """Return the numbers of an encoder in words."""
    if isinstance(config, ClassifierConfig) and config.of_library:
        return f"{config.size}; {describe_clip(config)}"
    return (
        f"widths {_as_option(config.widths)}, depths {_as_option(config.depths)}, {config.heads} heads, strides "
        f"{_as_option(config.strides)}, tubelet {config.tubelet}, {config.position_table} positions; "
        f"{describe_clip(config)}"
    )


def describe_clip(config: EncoderConfig) -> str:
    """Return the frames and pixels of a clip in words."""
    _, frames, height, width = config.clip_shape
    return f"{frames} frames of {height} x {width} pixels"


def load_weights(
    model: Autoencoder | Classifier | Probe | LibraryClassifier | EncoderParts,
    source: Source,
    *,
    inflation: Inflation | None = None,
    exclude: Collection[str] = (),
    class_names: Sequence[str] | None = None,
) -> LoadReport:
    """Load weights of any known format into a model. An error leaves the model unchanged.

    The encoder must be in the file and fit. What its file states beside the shapes (heads, strides, table of positions;
    of a decoder heads and target) must be the model's; what nothing states is reported as assumed. Norm, fusion,
    decoder and head are loaded if the file has them, and are else reported as missing. A head for other classes stays
    new; learnable positions of another grid are resized; a fixed position table is compared with the model's own. Parts
    of the file without a place in the model, as a decoder for a classifier, are reported as unexpected. A probe does
    not train the norm and fusion that it reads: the file must have them, too.

    Args:
        model: model to fill, not wrapped. Of an encoder with parameters that no weights have (a backbone for dense
            tasks), those stay new.
        source: as in `read_weights`.
        inflation: conversion of image weights for a video model; then a decoder that does not fit stays new.
        exclude: parts that are not loaded: positions, norm, fusion, decoder, head.
        class_names: of the model's classes; a head whose file names others is not taken.

    Raises:
        ValueError: as `read_weights`; the encoder or another part does not fit; positions of another kind, or of an
            ambiguous grid; image weights for a video model without `inflation`; a head that was not trained on the mean
            over tokens; no norm or fusion for a probe that reads it; a fusion that the model would not read.
    """
    if unknown := sorted(set(exclude) - set(EXCLUDABLE)):
        raise ValueError(f"exclude has {', '.join(unknown)}; expected some of {', '.join(EXCLUDABLE)}")
    whole = read_weights(source)
    if isinstance(model, LibraryClassifier) or whole.size is not None:
        return _load_library(model, whole, exclude, class_names)
    config = model.config if isinstance(model, EncoderParts) else model.encoder.config
    weights = _resolve(whole.without(*exclude), config, inflation)
    inflated = weights.is_image and config.num_frames > 1
    if inflated:
        if inflation is None:
            raise ValueError(
                f"{weights.format} weights of an image model for a video model: load them with an Inflation, or "
                "inflate them (video-convmae inflate)"
            )
        sizes = {name: getattr(config, name) for name in ("tubelet", "temporal_kernel", "num_frames")}
        weights = inflate(weights, embedding=inflation.embedding, depthwise=inflation.depthwise, **sizes)
    _check_parts(model, weights, whole)
    notes = [*weights.notes, *_notes_on_parts(model, whole, exclude)]
    plan = _Plan(_targets(model), config, weights, class_names, notes=notes)
    for part in PARTS:
        plan.add_part(part, may_be_new=part == "feature_heads" or (inflated and part == "decoder"))
    plan.add_positions()
    report = plan.load()
    if isinstance(model, FusedEncoder):
        model.may_lack_fusion = _may_lack_fusion(model, whole, exclude)
    added = sorted(model.added) if isinstance(model, EncoderParts) else ()
    return replace(report, missing=(*report.missing, *added))


def _load_library(
    model: nn.Module, whole: Weights, exclude: Collection[str], class_names: Sequence[str] | None
) -> LoadReport:
    """Load weights of pytorchvideo into its own model; arguments as of `load_weights`."""
    if whole.size is None:
        raise ValueError(f"{whole.format} weights for a model of pytorchvideo; expected weights of that library")
    if not isinstance(model, LibraryClassifier):
        raise ValueError(f"{whole.format} weights for a model of ours; expected --model.size {whole.size} to finetune")
    if others := sorted(set(exclude) - {"head"}):
        raise ValueError(f"exclude has {', '.join(others)}; of a model of pytorchvideo only head can be excluded")
    notes = ["excluded as asked: head"] if exclude else []
    plan = _Plan(_targets(model), model.config, whole.without(*exclude), class_names, notes)
    for part in ("net", "head"):
        plan.add_part(part, may_be_new=False)
    return plan.load()


def _resolve(weights: Weights, config: EncoderConfig, inflation: Inflation | None) -> Weights:
    """Determine from the model what a state dict leaves open: strides, tubelet and channels, and if it is of images."""
    kernel = config.temporal_kernel if len(config.strides) > 1 else 1  # a plain ViT has none
    inputs = (config.channels * config.tubelet, *config.widths[:-1])
    shapes = [values * stride**2 for values, stride in zip(inputs, config.strides)]
    same_shapes = shapes == [weight.shape[1] for weight in embedding_weights(weights.tensors)]
    if weights.guessed and same_shapes and weights.temporal_kernel == kernel:
        weights = replace(weights, strides=config.strides, tubelet=config.tubelet, channels=config.channels)
    # At tubelet 1 and temporal kernel 1 images and clips have the same shapes, and only positions differ. Without
    # positions an inflation would change nothing.
    ambiguous = (config.tubelet, kernel) == (1, 1) and config.num_frames > 1 and weights.frames is None
    if not ambiguous or not weights.is_image:
        return weights
    if POSITIONS[0] in weights.tensors:
        grid, _ = find_grid(weights, config)
        return replace(weights, frames=grid[0])
    return replace(weights, frames=config.grid[0] if inflation is None else 1)


def _check_parts(model: nn.Module, weights: Weights, whole: Weights) -> None:
    """Raise if the model would read an untrained part, or not read one that the others were trained with.

    `whole` has the excluded parts, too.
    """
    if isinstance(model, Classifier) and weights.has("head") and not whole.has("fc_norm"):
        raise ValueError(
            f"the head of these {weights.format} weights was trained on one token or is a probe's, not a classifier's "
            "on the mean over tokens; exclude head to load the encoder alone"
        )
    if isinstance(model, FusedEncoder) and model.fusion is None and weights.has("fusion"):
        raise ValueError("these weights were trained with the fusion: build the model with msd=True or exclude fusion")
    hints = {
        "norm": ("norm over tokens", "Probe pretraining weights: a finetuned norm is over the mean of tokens"),
        "fusion": ("fusion", "Build the probe with msd=False"),
    }
    for part, (words, hint) in hints.items():
        # Of a plain ViT the fusion has no parameters: it need not be in the file.
        if weights.has(part) or not any(name.startswith(f"{part}.") for name in model.state_dict()):
            continue
        if isinstance(model, Autoencoder) and weights.has("decoder"):
            raise ValueError(f"{weights.format} weights with a decoder but no {part}: msd=False, or exclude decoder")
        if isinstance(model, Probe):
            raise ValueError(
                f"no {words} comes from these {weights.format} weights: a probe would read its own, untrained and "
                f"frozen. {hint}"
            )


def _notes_on_parts(model: nn.Module, whole: Weights, exclude: Collection[str]) -> list[str]:
    unsaid = (NO_CLS, OUTSIDE)  # NO_CLS has a note of its own
    notes = [f"{name} dropped: {reason}" for name, reason in whole.dropped.items() if reason not in unsaid]
    if isinstance(model, Classifier) and whole.has("norm"):
        notes.append(
            "as always where a classifier starts from pretraining, its norm and head are new, and pretraining's norm "
            "over tokens, fusion and decoder are left out"
        )
    if _may_lack_fusion(model, whole, exclude):
        notes.append(f"the {'probe' if isinstance(model, Probe) else 'model'} {READS_NO_FUSION}")
    return [*notes, f"excluded as asked: {', '.join(exclude)}"] if exclude else notes


def _may_lack_fusion(model: nn.Module, whole: Weights, exclude: Collection[str]) -> bool:
    """Return True if a model without fusion takes a norm that may have been trained behind one.

    Of a plain ViT a fusion adds nothing. A decoder is trained with the fusion, and comes with it.
    """
    has_none = isinstance(model, FusedEncoder) and model.fusion is None and len(whole.strides) > 1
    takes_norm = whole.has("norm") and "norm" not in exclude
    return has_none and takes_norm and (whole.has("fusion") or not whole.has("decoder"))


def _targets(model: nn.Module) -> Tensors:
    """Return the tensors to fill by the names that `Weights` has. Fixed position tables are in no state dict."""
    tensors = model.state_dict()
    if isinstance(model, EncoderParts):
        return {f"encoder.{name}": tensor for name, tensor in tensors.items() if name not in model.added}
    if isinstance(model, LibraryClassifier):
        theirs = {name.removeprefix(NET): tensor for name, tensor in tensors.items()}
        return {ours: theirs[name] for name, ours in our_names(theirs).items()}
    if not isinstance(model, Classifier):
        return tensors
    named = ((without_lora(name), tensor) for name, tensor in tensors.items())
    return rename_norm({name: tensor for name, tensor in named if name is not None})


@dataclass
class _Plan:
    """Values to load, copied at the end, so that an error leaves the model unchanged.

    compared: fixed tables of the file that equal the model's.
    """

    targets: Tensors
    config: EncoderConfig
    weights: Weights
    class_names: Sequence[str] | None
    notes: list[str]
    assumed: list[str] = field(default_factory=list)
    values: Tensors = field(default_factory=dict)
    compared: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)

    def load(self) -> LoadReport:
        """Fill the model."""
        with torch.no_grad():
            for name, value in self.values.items():
                self.targets[name].copy_(value)
        names, done = self.weights.names, {*self.values, *self.reshaped, *self.compared}
        unexpected = [names.get(name, name) for name in self.weights.tensors if name not in done]
        missing = [name for name in self.targets if name not in done]
        return LoadReport(
            format=self.weights.format,
            loaded=tuple(name.removeprefix("fc_") for name in self.values),
            missing=tuple(name.removeprefix("fc_") for name in missing),
            unexpected=(*unexpected, *self.weights.dropped),
            reshaped=tuple(self.reshaped),
            notes=tuple(self.notes),
            assumed=tuple(self.assumed),
        )

    def add_part(self, part: str, may_be_new: bool) -> None:
        """Take a part whole if the file has it and it fits. A head, or if it `may_be_new`, stays new with a note."""
        wanted, given = (
            {name: t for name, t in tensors.items() if name.startswith(f"{part}.") and name not in POSITIONS}
            for tensors in (self.targets, self.weights.tensors)
        )
        if not wanted or (part not in ("encoder", "net") and not self.weights.has(part)):
            return
        if part in ("fc_norm", "pooling", "head") and (difference := self._compare_pools()):
            self.notes.append(f"the {part.removeprefix('fc_')} is new: {difference}")
            return
        faults = compare_shapes(wanted, given)
        if not faults and part == "encoder":
            self._check_encoder()
        if not faults and part == "decoder":
            faults = self._compare_decoder()
        if not faults and part == "head" and (difference := self._compare_classes()):
            self.reshaped += sorted(wanted)
            self.notes.append(f"the head is new: the file's classes are others ({difference})")
        elif not faults:
            self.values |= given
        elif part == "head" and given.keys() != wanted.keys():
            self.notes.append("the head is new: the file's is of another kind")
        elif part == "head" and "head.features" in wanted:
            self.notes.append("the head is new: the features that a nearest-neighbour probe stores are its own")
        elif part == "head":
            self.reshaped += sorted(wanted)
            bias = "head.bias" if "head.bias" in wanted else "head.linear.bias"
            theirs, ours = len(given[bias]), len(wanted[bias])
            self.notes.append(f"the head is new: {theirs} classes in the file, {ours} in the model")
        elif may_be_new or part == "pooling":
            self.notes.append(f"the {part} does not fit and is new: {faults[0]}")
        else:
            more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
            options = _other_sizes(self.weights, self.config) if part == "encoder" else ""
            advice = "build the model with the arguments of model_arguments(weights)"
            if part == "net":
                clip = clip_of(self.weights, tested=False)
                advice = f"set --model.size {self.weights.size} and its clip, " + ", ".join(
                    f"--model.{name} {value}" for name, value in clip.items()
                )
            elif part != "encoder":
                advice += f", or exclude {part}"
            elif options:
                advice = f"set {options}"
            raise ValueError(
                f"{self.weights.format} weights do not fit the model's {part}: {advice}. {'; '.join(faults[:3])}{more}"
            )

    def _check_encoder(self) -> None:
        """Raise if the file states other numbers than the model has, of equal shapes; note what it does not state.

        Raises:
            UserError: heads, strides, tubelet or channels differ.
        """
        weights, config = self.weights, self.config
        if weights.heads not in (None, config.heads):
            raise UserError(
                f"these {weights.format} weights were trained with {weights.heads} attention heads and the model has "
                f"{config.heads}: the shapes are equal, the features are not; set --model.heads {weights.heads}"
            )
        if others := _other_sizes(weights, config):
            raise UserError(
                f"these {weights.format} weights were trained with other numbers than the model's, though the shapes "
                f"are equal: set {others}"
            )
        if weights.heads is None:
            self.assumed.append(f"{config.heads} attention heads")
        if weights.guessed:
            self.assumed.append(f"strides {_as_option(config.strides)}, tubelet {config.tubelet}")
        if weights.position_table is None and POSITIONS[0] not in {*weights.tensors, *self.targets}:
            self.assumed.append(f"{config.position_table} table of positions")

    def _compare_decoder(self) -> list[str]:
        """Return in which numbers that shapes do not tell the file's decoder differs from the model's."""
        weights, config = self.weights, self.config
        if not isinstance(config, AutoencoderConfig):
            return []
        faults = []
        for name, stated, own, option in (
            (
                "decoder heads",
                weights.decoder_heads,
                config.decoder[2],
                f"--model.decoder {_as_option((*config.decoder[:2], weights.decoder_heads))}",
            ),
            ("target", weights.target, config.target, f"--model.target {weights.target}"),
        ):
            if stated is None:
                self.assumed.append(f"{name} {own}")
            elif stated != own:
                faults.append(f"the file's has {name} {stated}, the model's {own} ({option})")
        return faults

    def _compare_classes(self) -> str | None:
        """Return the first class that the file names otherwise than the run; None: there is none."""
        theirs, ours = self.weights.class_names, self.class_names
        if ours is None:
            return None
        if theirs is None:
            self.assumed.append("classes of the head in this run's order")
            return None
        pairs = enumerate(zip(theirs, ours))
        return next((f"class {n} is {old!r} there and {new!r} here" for n, (old, new) in pairs if old != new), None)

    def _compare_pools(self) -> str | None:
        """Return how the file's head reads other features than the model's; None: it does not, as far as is known."""
        config = self.config
        if not isinstance(config, ClassifierConfig) or config.of_library:
            return None
        if config.pools_attentively and "attentive" in (self.weights.pool, config.probe):
            their_heads, our_heads = (each.pool_heads or each.heads for each in (self.weights, config))
            if their_heads is not None and their_heads != our_heads:
                return f"the file's query has {their_heads} attention heads, the model's {our_heads} (model.pool_heads)"
        if config.probe == "attentive":
            return None
        weights, ours = self.weights, config.pool
        theirs = "attentive" if weights.has("pooling") else weights.pool
        if theirs == ours == "attentive":
            depth = 1 + count_blocks(weights.tensors, "pooling.blocks")
            if depth != config.pool_depth:
                return f"the file's pools with {depth} blocks, the model's with {config.pool_depth} (model.pool_depth)"
        if theirs is None and len(weights.tensors.get("fc_norm.weight", ())) == config.widths[-1]:
            theirs = "mean"
        return None if theirs in (None, ours) else f"the file's reads pool {theirs}, the model's {ours}"

    def add_positions(self) -> None:
        """Take learnable positions, resized to the model's grid; compare fixed ones with the model's own."""
        name, weights, config = POSITIONS[0], self.weights, self.config
        is_learnable, table, grid = name in self.targets, weights.tensors.get(name), weights.grid
        if table is None and weights.position_table not in (None, config.position_table):
            raise UserError(
                f"{weights.format} weights were trained with the {weights.position_table} position table, the model "
                f"has {config.position_table}: build it with position_table={weights.position_table!r} "
                f"(--model.position_table {weights.position_table})"
            )
        if table is None and is_learnable and grid is not None:  # a fixed table that is not stored
            table = positions.TABLES[config.position_table](grid, config.widths[-1])[None]
        elif table is None and is_learnable and weights.position_table is not None:
            self.compared.append(name)  # the same, and the model started from it
        if table is not None and is_learnable:
            grid, assumed = find_grid(weights, config)
            self.assumed += [f"positions over the grid {grid}"] if assumed else []
            self.values[name] = positions.resize(table[0], grid, config.grid)[None]
            if grid != config.grid:
                self.reshaped.append(name)
                self.notes.append(f"positions resized from the grid {grid} to {config.grid}")
        elif name in weights.tensors:
            self._compare_table(name)
        if "decoder.mask_token" in self.values and POSITIONS[1] in weights.tensors:
            self._compare_table(POSITIONS[1])

    def _compare_table(self, name: str) -> None:
        """Check that positions of the file are the fixed table over their grid; the model has its own over its grid."""
        weights, table = self.weights, self.config.position_table
        counts = possible_frames(weights, name, self.config.grid) | ({1} if weights.frames is None else set())
        if not any(weights.fixed_grids(name, table, count) for count in counts):
            learn = ", or build the model with learnable_positions=True to load them" if name == POSITIONS[0] else ""
            raise ValueError(
                f"{weights.names.get(name, name)} is not the fixed {table} table that the model has: it was learnt, or "
                f"is of another kind. Exclude positions (--init.exclude [positions]) to keep the model's own{learn}"
            )
        self.compared.append(name)


def compare_shapes(wanted: Tensors, given: Tensors) -> list[str]:
    """Return in which tensors a model's and a file's differ, a phrase each; those of another shape first."""
    shapes = [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    missing = [f"{name} is missing" for name in wanted if name not in given]
    return shapes + missing + [f"{name} has no place" for name in given if name not in wanted]


def _other_sizes(weights: Weights, config: EncoderConfig) -> str:
    """Return the options that give the model the file's sizes, for a message; empty if shapes only guess them."""
    try:
        theirs = {} if weights.guessed else encoder_arguments(weights)
    except ValueError:  # of no model of ours
        theirs = {}
    sizes = ("widths", "depths", "heads", "strides", "tubelet", "channels", "mlp_ratio")
    names = (*sizes, "temporal_kernel", "spatial_kernel")
    if weights.heads is None:
        theirs.pop("heads", None)
    others = [name for name in names if name in theirs and theirs[name] != getattr(config, name)]
    options = [
        f"--model.{name} {_as_option(theirs[name])} (now {_as_option(getattr(config, name))})" for name in others
    ]
    return ", ".join(options)


def _as_option(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else f"{value:g}"
