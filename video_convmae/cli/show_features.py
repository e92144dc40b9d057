"""Draw the features of each stage of a model for a video or an image, and a classifier's evidence for a class.

    video-convmae show-features runs/k400 clip.mp4 --output clip.png
    video-convmae show-features runs/k400 clip.mp4 --output clip.png --label "playing guitar"

The middle of the file is shown. Rows: the frames; the features of each stage as colours (three principal components);
for a pretrained encoder the tokens after fusion and norm; for a classifier the contribution of each token to the logit
of a class, less the mean over the tokens (red: more, blue: less).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from video_convmae.cli.parser import CommandLine, within


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    parser = CommandLine("show-features", __doc__)
    parser.add_argument("weights", help="run folder, checkpoint or model.safetensors of a run, a published file, "
                        "or the name of shipped weights")  # fmt: skip
    parser.add_argument("file", help="a video, an image or a folder of frames")
    parser.add_argument("--output", type=Path, required=True, help="the picture, a PNG file")
    parser.add_argument("--label", help="number or name of a class; default: the most probable one")
    parser.add_argument("--labels", type=Path, help="file of class names; default: the run's own")
    parser.add_argument("--frames", type=within(int, least=1), default=8, help="columns at most (default %(default)s)")
    args = parser.parse_args(arguments)

    from video_convmae import predictor
    from video_convmae.atomic import refuse_overwriting
    from video_convmae.visualize.features import draw_feature_rows, find_label, write_feature_picture

    refuse_overwriting([args.output], [args.file])
    loaded = predictor.load(args.weights, labels=args.labels)
    label = None if args.label is None else find_label(loaded, args.label)
    pictures = loaded.pictures(args.file, loaded.middle)
    rows, lines = draw_feature_rows(loaded, pictures, loaded.normalise(pictures), label)
    lines = [f"{args.weights}, {args.file}", *lines]
    write_feature_picture(rows, lines, args.output, loaded.model.config.tubelet, args.frames)
    print(*lines, f"{args.output}: {len(rows)} rows", sep="\n")
    return 0
