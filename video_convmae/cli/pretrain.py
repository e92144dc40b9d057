"""Pretrain a masked autoencoder on a list of videos or images.

    video-convmae pretrain --config video/pretrain_k400_base --data.train train.txt --output runs/k400
    torchrun --nproc_per_node 8 -m video_convmae pretrain --config ...

The same command on the same folder resumes the run.
"""

from __future__ import annotations

from collections.abc import Sequence

from video_convmae.cli.parser import run_command
from video_convmae.config import PretrainConfig


def pretrain(config: PretrainConfig) -> int:
    """Run a configuration; return the steps done."""
    from video_convmae.build import build_pretraining, resolve_config
    from video_convmae.engine.distributed import init_distributed

    with init_distributed(config.device, config.hang_timeout) as info:
        config = resolve_config(config, info)
        trainer = build_pretraining(config, info)
        if config.log.pictures is not None:
            from video_convmae.visualize.reconstruct import build_pictures

            trainer.pictures = build_pictures(config, info.device)
        return trainer.fit()


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    return run_command(PretrainConfig, pretrain, arguments)
