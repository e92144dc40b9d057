"""Train a detector, Mask R-CNN on a pretrained backbone, on data in COCO's format.

    video-convmae train-detection --config detection/vitdet_base --init.weights convmae_base.pth --output DIR
    torchrun --nproc_per_node 8 -m video_convmae train-detection --config ...

The newest checkpoints and, by box AP on the validation, the best (checkpoints/best) are kept. The same command on the
same folder resumes the run. `video-convmae evaluate` tests the result, `predict` draws what it finds.
"""

from __future__ import annotations

from collections.abc import Sequence

from video_convmae.cli.parser import run_command
from video_convmae.config_dense import TrainDetectionConfig


def train_detection(config: TrainDetectionConfig) -> int:
    """Run a configuration; return the steps done."""
    from video_convmae.build_dense import build_detection, resolve_detection
    from video_convmae.engine.distributed import init_distributed

    with init_distributed(config.device, config.hang_timeout) as info:
        config, records, validation = resolve_detection(config, info)
        if info.is_main:
            print(f"{len(config.data.labels)} classes; training: {records.report}")
            if validation is not None:
                print(f"validation: {validation.report}", flush=True)
        return build_detection(config, info, records, validation).fit()


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    return run_command(TrainDetectionConfig, train_detection, arguments)
