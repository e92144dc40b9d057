"""Convert weights between formats.

    video-convmae convert convmae_base.pth base.safetensors
    video-convmae convert runs/in1k convmae.pth --to convmae
    video-convmae convert runs/k400_videomae folder --to huggingface

The source's format is recognised: ConvMAE, FastConvMAE, ConvViT, their names in EasyCV and mmpretrain, VideoMAE, MAE,
Hugging Face's VideoMAE and ViTMAE (a folder, with its config.json), or ours. The output's suffix determines how it is
stored: .safetensors, or any other by torch.save. Every file keeps what shapes do not say: strides, tubelet, token grid,
heads, target, class names, normalisation of pixels, stride of frames; of a run that is not changed, its configuration.
Without a suffix, --to huggingface writes a folder, with the config.json that transformers reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from video_convmae.cli.parser import CommandLine, within
from video_convmae.errors import UserError
from video_convmae.weights.options import EXCLUDABLE, WRITABLE

if TYPE_CHECKING:  # imports torch
    from video_convmae.weights.files import Tensors
    from video_convmae.weights.state import Weights


def main(arguments: Sequence[str]) -> None:
    """Read weights of any format, write them in another, and print both."""
    parser = CommandLine("convert", __doc__)
    add_files(parser)
    parser.add_argument("--to", choices=["ours", *WRITABLE], default="ours", help="format to write (%(default)s)")
    parser.add_argument(
        "--image-size",
        type=within(int, least=1),
        help="pixels, for the position tables of convmae; by default the run's, or 224",
    )
    args = parser.parse_args(arguments)

    from video_convmae.weights.files import save_file
    from video_convmae.weights.formats import to_format

    whole, output = read_source(args.source), Path(args.output).expanduser()
    weights = whole.without(*args.exclude)
    if args.to == "ours":
        save_ours(weights, output)
        return
    # In place of excluded positions the file has the fixed table over their grid.
    weights = replace(weights, grid=whole.grid)
    try:
        tensors = to_format(weights, args.to, args.image_size)
    except ValueError as error:
        raise UserError(f"{args.source} cannot be written as {args.to}: {error}") from error
    if args.to == "huggingface" and not output.suffix:
        save_folder(weights, tensors, output)
    else:
        save_file(tensors, output, geometry=weights.geometry)
    print(f"{explain(weights)}\n{output}: {len(tensors)} tensors, format {args.to}")


def add_files(parser: CommandLine) -> None:
    """Add the options that convert and inflate share."""
    parser.add_argument("source", help="weights of any known format, a folder of Hugging Face's, a run folder (its "
                        "newest checkpoint), or the name of shipped weights")  # fmt: skip
    parser.add_argument("output", type=_file_name, help="file to write")
    parser.add_argument("--exclude", nargs="+", choices=EXCLUDABLE, default=[], help="parts that are not taken")


def _file_name(text: str) -> str:
    if not Path(text).name or text.endswith("/"):
        raise argparse.ArgumentTypeError(f"it is {text!r}; expected the path of a file")
    return text


def read_source(source: str) -> Weights:
    """Read a file, a checkpoint, or the newest checkpoint of a run folder."""
    from video_convmae.engine.checkpoint import read_found_weights

    weights = read_found_weights(source)
    if weights.size is not None:
        raise UserError(f"{source} is {weights.size}, which has one format alone; expected a model of ours")
    return weights


def save_folder(weights: Weights, tensors: Tensors, folder: Path) -> None:
    """Write a folder as transformers reads it."""
    from video_convmae.weights.files import save_file
    from video_convmae.weights.formats.huggingface import huggingface_config, preprocessor_config

    configs = {"config": huggingface_config(weights), "preprocessor_config": preprocessor_config(weights)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", geometry=weights.geometry)


def save_ours(weights: Weights, output: str | Path) -> None:
    """Write weights in our format, with the run's configuration if they are a run's, and print what was done."""
    from video_convmae.weights.files import save_file

    tensors = weights.state_dict()
    output = Path(output).expanduser()
    if weights.config is None:
        save_file(tensors, output, geometry=weights.geometry)
    else:
        save_file(tensors, output, config=weights.config)
    print(f"{explain(weights)}\n{output}: {len(tensors)} tensors, format ours")


def explain(weights: Weights) -> str:
    """Return the recognised format, the model's sizes, and the notes of reading."""
    from video_convmae.weights.arguments import model_arguments

    parts = [part for part in ("fusion", "decoder", "head") if weights.has(part)]
    lines = [
        f"{weights.format}: {len(weights.tensors)} tensors; {', '.join(['encoder', *parts])}",
        ", ".join(f"{name} {value}" for name, value in model_arguments(weights).items()),
        *(f"dropped {name}: {reason}" for name, reason in weights.dropped.items()),
        *(f"note: {note}" for note in weights.notes),
    ]
    return "\n  ".join(lines)
