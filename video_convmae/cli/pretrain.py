"""Pretrain a masked autoencoder on a list of videos or images.

    python tools/pretrain.py --config configs/video/pretrain_k400_base.yaml --data.train train.txt --output runs/k400
    torchrun --nproc_per_node 8 tools/pretrain.py --config ...

The same command on the same folder goes on with the run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from video_convmae.cli.parser import run_command
from video_convmae.config import PretrainConfig
from video_convmae.engine import distributed
from video_convmae.engine.tasks import Pretraining
from video_convmae.runs import carry_out, resolved


def pretrain(config: PretrainConfig) -> int:
    """Run a configuration; returns the steps done."""
    config = resolved(config)
    with distributed.init_distributed(config.device, config.hang_timeout) as group:
        torch.manual_seed(config.seed)
        model = config.model.autoencoder()
        clips = config.data.clips(config.data.records(), model.encoder.config, config.seed, config.mask)
        return carry_out(config, group, model, clips, Pretraining)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return run_command(PretrainConfig, pretrain, arguments)
