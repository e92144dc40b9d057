"""Measure the speed of this machine with VideoConvMAE, each part beside a reference.

    video-convmae benchmark step --vs dense --json step.json
    video-convmae benchmark step --vs hf-videomae --device cuda --precision bf16 --batch 64
    video-convmae benchmark models --threads 1 --clock cpu --json models.json
    video-convmae benchmark scale --device cuda --precision bf16 --plot scale.png
    video-convmae benchmark loader --vs videomae --json loader.json
    video-convmae benchmark packing --json packing.json
    video-convmae benchmark opening --json opening.json

`benchmark step --help` (models, scale, loader, packing, opening) explains a measurement. Results: docs/performance.md.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir

from video_convmae.cli.parser import CommandLine, within
from video_convmae.models.sizes import LIBRARY, LIBRARY_MODELS, SIZES

# The choices of the measuring modules stand here again, for importing those imports torch; a test compares them.
STEP_SIDES = ("dense", "packed", "videomae", "hf-videomae", "hf-videomae-compiled")
SIZES_OF_ALL = (*SIZES, *(LIBRARY + name for name in LIBRARY_MODELS))
COMPARED = ("vit_base", *(LIBRARY + name for name in ("mvit_base_16x4", "slowfast_r50", "x3d_m")))
READ_SIDES = ("floor", "videomae")
MASK_KINDS = ("tube", "random", "frame", "block")
PRECISIONS = ("fp32", "bf16")
ACTIVATION_CHECKPOINTING = ("none", "conv", "all")
READERS = ("auto", "torchcodec", "pyav", "decord", "torchcodec_cuda")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a training step, shared by `step` and `scale`."""
    add = parser.add_argument
    add("--size", default="base", help="size of our model, or pytorchvideo/NAME (default %(default)s)")
    add("--implementation", default="packed", choices=["packed", "dense"])
    add(
        "--task",
        default="pretrain",
        choices=["pretrain", "finetune", "test"],
        help="finetune: nothing is hidden; test: forward alone",
    )
    add("--frames", type=within(int, least=1), default=16, help="frames of a clip; 1: images")
    add("--image-size", type=within(int, least=1), default=224, help="side of a clip in pixels")
    add("--mask", choices=MASK_KINDS, help="default: tube; random for images")
    add(
        "--ratio",
        type=within(float, above=0, below=1),
        help="share of the tokens that is hidden; default: 0.9; 0.75 for images",
    )
    add(
        "--decoder-ratio",
        type=within(float, above=0, most=1),
        help="share of the hidden tokens that is predicted; default: all",
    )
    add(
        "--masks",
        type=within(int, least=1),
        default=1,
        help="masks of a clip; --vs dense and packed take as many passes of one",
    )
    add("--no-msd", action="store_true", help="leave out the multi-scale decoder")
    add("--batch", type=within(int, least=1), default=2, help="clips a step")
    add("--device", default="cpu", help="cpu or cuda")
    add("--precision", default="fp32", choices=PRECISIONS)
    add("--threads", type=within(int, least=1), help="CPU threads of PyTorch; default: PyTorch's own")
    add("--compile", action="store_true", help="torch.compile each block of ours, as train.compile does")
    add(
        "--activation-checkpointing",
        default="none",
        choices=ACTIVATION_CHECKPOINTING,
        help="as train.activation_checkpointing; ours alone",
    )
    add(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: processor time, less disturbed by other jobs; on a CPU with one thread",
    )
    add("--warmup", type=within(int, least=0), default=1, help="steps of each side that are not counted")


def _add_step_options(parser: argparse.ArgumentParser) -> None:
    _add_model_options(parser)
    parser.add_argument(
        "--vs", default="dense", type=_side, help=f"the other side: {', '.join(STEP_SIDES)}, or a size as of --size"
    )
    parser.add_argument("--repeats", type=within(int, least=1), default=5, help="pairs of steps")
    parser.add_argument(
        "--loading",
        action="store_true",
        help="with --masks: also time one process that loads a decoded clip with all its masks, against as many clips",
    )
    parser.add_argument("--profile", action="store_true", help="first print where the time of our steps is spent")


def _side(name: str) -> str:
    if name not in (*STEP_SIDES, *SIZES_OF_ALL):
        raise argparse.ArgumentTypeError(f"it is {name!r}; expected {', '.join((*STEP_SIDES, *SIZES_OF_ALL))}")
    return name


def _add_models_options(parser: argparse.ArgumentParser) -> None:
    _add_model_options(parser)
    parser.set_defaults(batch=1)
    add = parser.add_argument
    add("--vs", nargs="*", default=list(COMPARED), choices=SIZES_OF_ALL, help="the others (default: %(default)s)")
    add("--repeats", type=within(int, least=1), default=3, help="pairs of steps, and of tests, with each")


def _add_scale_options(parser: argparse.ArgumentParser) -> None:
    _add_model_options(parser)
    # None: the middle of the device, see scale.MIDDLE.
    parser.set_defaults(size=None, frames=None, image_size=None, ratio=None, batch=None)
    parser.add_argument("--vs", nargs="*", default=["dense", "videomae"], choices=STEP_SIDES, help="the other sides")
    parser.add_argument("--repeats", type=within(int, least=1), default=3, help="counted steps of each point")
    parser.add_argument("--plot", type=Path, default=Path("scale.png"), help="PNG to write (default %(default)s)")


def _add_file_options(parser: argparse.ArgumentParser, files: int, turns: int) -> None:
    """Add the options of a reading measurement, shared by `loader` and `packing`."""
    add = parser.add_argument
    add("--list", type=Path, help="videos to read; default: files like those of both data sets are made")
    add("--root", type=Path, default=Path(), help="folder of the list's relative paths")
    add("--sampling", choices=["dense", "uniform"], default="dense", help="sampling of the list's clips")
    add("--stride", type=within(int, least=1), default=4, help="file frames between two frames of a dense clip")
    add("--files", type=within(int, least=1), default=files, help="made files of each kind (default %(default)s)")
    add("--turns", type=within(int, least=1), default=turns, help="counted samples of each side (default %(default)s)")
    add("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, for machines in use")
    add("--folder", type=Path, default=Path(gettempdir()) / "videoconvmae_files", help="folder for made files")


def _add_loader_options(parser: argparse.ArgumentParser) -> None:
    _add_file_options(parser, files=12, turns=48)
    add = parser.add_argument
    add("--reader", nargs="+", choices=READERS, default=["pyav"], help="each is measured")
    add("--vs", default="floor", choices=READ_SIDES, help="the other side")
    add("--frames", type=within(int, least=1), default=16, help="frames of a clip")
    add("--size", type=within(int, least=1), default=224, help="side of a clip in pixels")
    add("--crop", choices=["multi_scale", "random_resized", "whole"], default="multi_scale")
    add("--flip", action="store_true", help="mirror half of the clips")
    add("--on-device", action="store_true", help="leave resizing and flipping to the device")
    add("--repeats", type=within(int, least=1), default=1, help="clips a decode")
    add("--views", help="multi-view evaluation in place of training: segments x crops, as in 5x3")
    add(
        "--workers",
        type=within(int, least=0),
        default=0,
        help="also measure the whole loader with this many worker processes",
    )
    add("--batch", type=within(int, least=1), default=8, help="records of a batch, with --workers")


def _add_packing_options(parser: argparse.ArgumentParser) -> None:
    _add_file_options(parser, files=8, turns=40)
    parser.add_argument("--reader", choices=READERS, default="pyav")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="variants to measure; default: the presets")
    parser.add_argument("--workers", type=within(int, least=1), default=1, help="videos packed at once")


def _add_opening_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--file", type=Path, help="video to open; default: one is made")
    add("--hours", type=within(float, above=0), default=2.0, help="length of the made file (default %(default)g)")
    add("--repeats", type=within(int, least=1), default=5, help="pairs of openings (default %(default)s)")
    add("--folder", type=Path, default=Path(gettempdir()) / "videoconvmae_files", help="folder for made files")


COMMANDS = {
    "step": (_add_step_options, "a training step against another"),
    "models": (_add_models_options, "finetuning and testing of ours and of other families, in a table"),
    "scale": (_add_scale_options, "cost against frames, resolution, mask ratio and batch"),
    "loader": (_add_loader_options, "clips a second from files to batches"),
    "packing": (_add_packing_options, "speed, size and quality of re-encoded videos"),
    "opening": (_add_opening_options, "opening of a long file, without and with its kept scan"),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; `command` holds the subcommand. Imports no torch, so `--help` answers at once."""
    parser = CommandLine("benchmark", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (add_options, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=_docstring(name))
        add_options(command)
        command.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args(arguments)


def _docstring(name: str) -> str | None:
    """Return a module's docstring without importing it."""
    return ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a measurement, print it and write its JSON; returns the exit status."""
    args = parse_arguments(arguments)
    for path in (args.json, getattr(args, "plot", None)):  # what cannot be written is known before the measurement
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if hasattr(args, "device"):
        from video_convmae.engine.distributed import choose_device

        choose_device(args.device)
    module = importlib.import_module(f".{args.command}", __package__)  # imported only now: it imports torch
    result = getattr(module, f"run_{args.command}")(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0
