"""Convert weights between layouts, and image weights into video weights.

    python tools/convert_weights.py convmae_base.pth base.safetensors
    python tools/convert_weights.py runs/in1k convmae.pth --to convmae
    python tools/convert_weights.py inflate convmae_base.pth video.safetensors --tubelet 2 --temporal-kernel 3

What the source is, is found out from it: ConvMAE, FastConvMAE, ConvViT, EasyCV, mmpretrain, VideoMAE, Hugging Face
VideoMAE and ViTMAE, MAE, or ours. The suffix of the output says how it is stored: .safetensors, or anything else as
torch.save. Beside weights in our names the file keeps their windows and grid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from video_convmae.engine import checkpoint
from video_convmae.weights.files import save_file
from video_convmae.weights.load import EXCLUDABLE, inflate
from video_convmae.weights.released import WRITTEN, Weights, model_arguments, read_weights, to_format


def report(weights: Weights) -> str:
    """What was recognised, the sizes, and what was noted on the way."""
    sizes = ", ".join(f"{name} {value}" for name, value in model_arguments(weights).items())
    parts = [part for part in ("fusion", "decoder", "head") if weights.has(part)]
    lines = [f"{weights.layout}: {len(weights.tensors)} tensors; {', '.join(['encoder', *parts])}", sizes]
    lines += [f"dropped {name}: {reason}" for name, reason in weights.dropped.items()]
    return "\n  ".join([*lines, *(f"note: {note}" for note in weights.notes)])


def convert(given: argparse.Namespace) -> None:
    """Any layout to ours, or to a released one."""
    weights = read_weights(source(given)).without(*given.exclude)
    tensors = weights.state_dict() if given.to == "ours" else to_format(weights, given.to, given.image_size)
    save_file(tensors, given.output, geometry=weights.about() if given.to == "ours" else None)
    print(report(weights))
    print(f"{given.output}: {len(tensors)} tensors, layout {given.to}")


def source(given: argparse.Namespace) -> Path:
    """The file that was named, or the newest checkpoint of the run folder."""
    return checkpoint.find(given.source)


def inflate_file(given: argparse.Namespace) -> None:
    """Image weights of any layout to video weights of ours."""
    weights = inflate(
        read_weights(source(given)).without(*given.exclude),
        tubelet=given.tubelet,
        temporal_kernel=given.temporal_kernel,
        num_frames=given.num_frames,
        embedding=given.embedding,
        depthwise=given.depthwise,
    )
    tensors = weights.state_dict()
    save_file(tensors, given.output, geometry=weights.about())
    print(report(weights))
    print(f"{given.output}: {len(tensors)} tensors, layout ours")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and write the file."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    inflating = arguments[:1] == ["inflate"]
    parser = argparse.ArgumentParser(
        prog="convert_weights.py" + " inflate" * inflating,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="weights of any known layout, or a run folder")
    parser.add_argument("output", help="file to write")
    parser.add_argument("--exclude", nargs="+", choices=EXCLUDABLE, default=[], help="what is not taken")
    if inflating:
        parser.add_argument("--tubelet", type=int, default=2, help="frames in a token")
        parser.add_argument("--temporal-kernel", type=int, default=3, help="frames of the depthwise kernels")
        parser.add_argument("--num-frames", type=int, default=16, help="frames of a clip: positions are made for them")
        parser.add_argument("--embedding", choices=["average", "center"], default="average")
        parser.add_argument("--depthwise", choices=["average", "center"], default="center")
        inflate_file(parser.parse_args(arguments[1:]))
    else:
        parser.add_argument("--to", choices=["ours", *WRITTEN], default="ours", help="layout to write")
        parser.add_argument("--image-size", type=int, help="for convmae's position tables; by default a run's, or 224")
        convert(parser.parse_args(arguments))
