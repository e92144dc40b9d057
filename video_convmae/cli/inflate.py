"""Convert image weights to video weights.

    video-convmae inflate convmae_base.pth video.safetensors --tubelet 2 --temporal-kernel 3

The source may have any format that convert reads; the output has ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from video_convmae.cli.convert import add_files, read_source, save_ours
from video_convmae.cli.parser import CommandLine, within
from video_convmae.errors import UserError


def main(arguments: Sequence[str]) -> None:
    """Read image weights of any format, write video weights in ours, and print both."""
    parser = CommandLine("inflate", __doc__)
    add_files(parser)
    add = parser.add_argument
    add("--tubelet", type=within(int, least=1), default=2, help="frames of a token (%(default)s)")
    add("--temporal-kernel", type=within(int, least=1), default=3, help="frames of the depthwise kernels (%(default)s)")
    add(
        "--num-frames",
        type=within(int, least=1),
        default=16,
        help="frames of a clip: the positions cover them (%(default)s)",
    )
    for name, kernels in (("embedding", "the first embedding"), ("depthwise", "depthwise kernels")):
        default = "average" if name == "embedding" else "center"
        text = f"spread {kernels} over time: repeated and divided, or on the middle frame (%(default)s)"
        add(f"--{name}", choices=["average", "center"], default=default, help=text)
    args = parser.parse_args(arguments)

    from video_convmae.weights.inflate import inflate

    numbers = {"tubelet": args.tubelet, "temporal_kernel": args.temporal_kernel, "num_frames": args.num_frames}
    weights = read_source(args.source).without(*args.exclude)
    try:
        inflated = inflate(weights, **numbers, embedding=args.embedding, depthwise=args.depthwise)
    except ValueError as error:
        raise UserError(f"{args.source}: {error}") from error
    save_ours(inflated, args.output)
