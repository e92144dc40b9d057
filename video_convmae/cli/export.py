"""Export a model to a file for other programs, compared with the model before it is written.

    video-convmae export runs/k400 --format onnx --output k400.onnx
    video-convmae export runs/pretrained --format torch --output encoder.pt2 --image-size 160

A classifier, probe or published classifier gives logits, a pretrained model its tokens, a segmenter logits at a quarter
of the pixels. The input is clips (B, 3, T, H, W), of a segmenter images (B, 3, H, W), float and normalised; B may be
any number. Mean, deviation, sampling of frames and class names lie in the file, as JSON under the name video_convmae. A
file that computes something else than the model is not written. ONNX needs pip install "video-convmae[export]".
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from video_convmae.cli.parser import CommandLine, within


def main(arguments: Sequence[str]) -> None:
    """Export a model, and print what was written."""
    parser = CommandLine("export", __doc__)
    add = parser.add_argument
    add("weights", help="run folder, a checkpoint of one (checkpoints/best), or a published file")
    add("--format", choices=["onnx", "torch"], required=True, help="onnx, or torch for a file of torch.export")
    add("--output", required=True, help="file to write")
    add("--num-frames", type=within(int, least=1), help="frames of a clip; default: the model's own")
    add(
        "--image-size",
        type=within(int, least=1),
        nargs="+",
        action=_Size,
        help="pixels, one number or height and width; default: the model's own, of a segmenter its window",
    )
    args = parser.parse_args(arguments)

    from video_convmae.export import export

    print(export(args.weights, args.format, args.output, num_frames=args.num_frames, image_size=args.image_size))


class _Size(argparse.Action):
    """One number, or height and width."""

    def __call__(self, parser, namespace, values, option=None) -> None:
        if len(values) > 2:
            parser.error(f"{option} has {len(values)} numbers; expected one, or height and width")
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))
