"""Train a segmenter, UperNet on a pretrained backbone, on folders of pictures and label maps.

    video-convmae train-segmentation --config segmentation/upernet_ade20k_base --init.weights convmae_base.pth \\
        --output DIR
    torchrun --nproc_per_node 8 -m video_convmae train-segmentation --config ...

The newest checkpoints and, by mIoU on the validation, the best (checkpoints/best) are kept. The same command on the
same folder resumes the run. `video-convmae evaluate` tests the result, `predict` draws what it sees.
"""

from __future__ import annotations

from collections.abc import Sequence

from video_convmae.cli.parser import run_command
from video_convmae.config_dense import TrainSegmentationConfig


def train_segmentation(config: TrainSegmentationConfig) -> int:
    """Run a configuration; return the steps done."""
    from video_convmae.build_dense import build_segmentation, resolve_segmentation
    from video_convmae.engine.distributed import init_distributed

    with init_distributed(config.device, config.hang_timeout) as info:
        config, records, validation = resolve_segmentation(config, info)
        if info.is_main:
            maps = records.maps
            print(f"{config.data.num_classes} classes; training: {len(records)} pictures, label maps in {maps}")
            if validation is not None:
                print(f"validation: {len(validation)} pictures, label maps in {validation.maps}", flush=True)
        return build_segmentation(config, info, records, validation).fit()


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    return run_command(TrainSegmentationConfig, train_segmentation, arguments)
