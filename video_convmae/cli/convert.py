"""Convert weights between formats.

    video-convmae convert convmae_base.pth base.safetensors
    video-convmae convert runs/in1k convmae.pth --to convmae

The source's format is recognised: ConvMAE, FastConvMAE, ConvViT, their names in EasyCV and mmpretrain, VideoMAE, MAE,
Hugging Face's VideoMAE and ViTMAE, or ours. The output's suffix determines how it is stored: .safetensors, or any other
by torch.save. A file in our format also keeps the model's strides, tubelet and token grid.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from video_convmae.cli.parser import CommandLine
from video_convmae.weights.options import EXCLUDABLE, WRITABLE

if TYPE_CHECKING:  # imports torch
    from video_convmae.weights.state import Weights


def main(arguments: Sequence[str]) -> None:
    """Read weights of any format, write them in another, and print both."""
    parser = CommandLine("convert", __doc__)
    add_files(parser)
    parser.add_argument("--to", choices=["ours", *WRITABLE], default="ours", help="format to write (%(default)s)")
    parser.add_argument(
        "--image-size", type=int, help="pixels, for the position tables of convmae; by default the run's, or 224"
    )
    args = parser.parse_args(arguments)

    from video_convmae.weights.files import save_file
    from video_convmae.weights.formats import to_format

    weights = read_source(args.source, args.exclude)
    if args.to == "ours":
        save_ours(weights, args.output)
        return
    tensors = to_format(weights, args.to, args.image_size)
    save_file(tensors, args.output)
    print(f"{explain(weights)}\n{args.output}: {len(tensors)} tensors, format {args.to}")


def add_files(parser: CommandLine) -> None:
    """Add the options that convert and inflate share."""
    parser.add_argument("source", help="weights of any known format, a run folder (its newest checkpoint), or the "
                        "name of shipped weights")  # fmt: skip
    parser.add_argument("output", help="file to write")
    parser.add_argument("--exclude", nargs="+", choices=EXCLUDABLE, default=[], help="parts that are not taken")


def read_source(source: str, exclude: Collection[str]) -> Weights:
    """Read a file, a checkpoint, or the newest checkpoint of a run folder."""
    from video_convmae.engine.checkpoint import Checkpoint, find_weights
    from video_convmae.weights.formats import read_weights

    found = find_weights(source)
    return read_weights(found.path if isinstance(found, Checkpoint) else found).without(*exclude)


def save_ours(weights: Weights, output: str) -> None:
    """Write weights in our format and print what was read and written."""
    from video_convmae.weights.files import save_file

    tensors = weights.state_dict()
    save_file(tensors, output, geometry=weights.geometry)
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
