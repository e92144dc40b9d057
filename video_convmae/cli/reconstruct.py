"""Draw original, masked and reconstructed clips of a pretrained autoencoder.

    video-convmae reconstruct runs/k400 clip.mp4 other.webm --output pictures

writes pictures/reconstruction.png and .mp4. The middle of each video is shown, with a mask of the run's own kind and
ratio. A model that predicts normalised patches knows no patch's brightness or contrast: they are taken from the
original, and the caption says so. It also compares the error with that of predicting nothing: the mean colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from video_convmae.cli.parser import SEED, CommandLine


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    parser = CommandLine("reconstruct", __doc__)
    parser.add_argument("weights", help="run folder (its newest checkpoint), checkpoint or model.safetensors of a "
                        "run, or the name of shipped weights")  # fmt: skip
    parser.add_argument("videos", nargs="+", help="videos, images, folders of frames or 'FOLDER/img_*'")
    parser.add_argument("--output", type=Path, required=True, help="folder for reconstruction.png and .mp4")
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights, if the run kept one")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of the masks (default %(default)s)")
    args = parser.parse_args(arguments)

    from video_convmae.atomic import refuse_overwriting
    from video_convmae.data.decoding import record_at
    from video_convmae.runs import load_autoencoder
    from video_convmae.visualize import reconstruct

    refuse_overwriting([args.output / f"reconstruction.{kind}" for kind in ("png", "mp4")], args.videos)
    model, config = load_autoencoder(args.weights, args.ema)
    records = [record_at(path) for path in args.videos]
    clips = reconstruct.read_middle_clips(records, config, model.encoder.config.clip_shape[2:])
    masks = reconstruct.draw_masks(model, config, len(clips), args.seed)
    result = reconstruct.reconstruct_clips(model, config, clips, masks)
    caption = reconstruct.write_caption(config, model, result)
    args.output.mkdir(parents=True, exist_ok=True)
    reconstruct.write_reconstruction_picture(result, args.output / "reconstruction.png", caption)
    reconstruct.write_reconstruction_video(result, args.output / "reconstruction.mp4")
    print(caption)
    print(f"{args.output}/reconstruction.png and .mp4: {len(clips)} clips")
    return 0
