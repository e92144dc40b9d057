"""Pretrain a masked autoencoder on a list of videos or images.

    python tools/pretrain.py --config configs/video/pretrain_k400_base.yaml --data.train train.txt --output runs/k400
    torchrun --nproc_per_node 8 tools/pretrain.py --config ...

The same command on the same folder goes on with the run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import torch

from video_convmae.config import PretrainConfig, parse, plain, write_yaml
from video_convmae.data.decoding import resolve
from video_convmae.data.loader import Batch, Batches, Share, load
from video_convmae.engine import checkpoint, distributed
from video_convmae.engine.log import BadRecords, write_text
from video_convmae.engine.loop import train
from video_convmae.engine.optim import build_optimization
from video_convmae.engine.tasks import Pixels, Pretraining
from video_convmae.models.blocks import AttentionBlock, ConvBlock


def pretrain(config: PretrainConfig) -> int:
    """Run a configuration; returns the steps done."""
    config = replace(config, data=replace(config.data, decoder=resolve(config.data.decoder)))
    folder, settings = Path(config.output), plain(config)
    with distributed.processes(config.device) as group:
        records = config.data.records()
        torch.manual_seed(config.seed)
        model = config.model.autoencoder()
        report = None if checkpoint.checkpoints(folder / "checkpoints") else config.init.load(model)
        model = model.to(group.device)
        clips = config.data.clips(records, model, config.mask, config.seed)

        share = Share(config.train.batch_size, group.count, group.rank, config.train.accumulate)
        steps_per_epoch = Batches(len(records), share, config.seed, 0, 0).steps_per_epoch
        optimization = build_optimization(model, config.optim, share.global_batch, config.train.epochs, steps_per_epoch)
        if group.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_yaml(config, folder / "config.yaml")
            if report is not None:
                print(report)
            print(f"{len(records)} records, decoder {config.data.decoder}, device {group.device} x {group.count}")
            print(
                f"effective batch {share.global_batch} = {share.per_device} a device x {share.ranks} devices x ", end=""
            )
            print(
                f"{share.accumulate} accumulated; {optimization.origin}; {optimization.schedule.steps} steps",
                flush=True,
            )

        def load_from(first_step: int) -> Generator[Batch]:
            batches = Batches(len(records), share, config.seed, first_step, optimization.schedule.steps)
            pin_memory = group.device.type == "cuda"
            return load(clips, batches, config.data.workers, pin_memory, config.data.start_method)

        wrapped = distributed.wrap(
            model, group, (ConvBlock, AttentionBlock), config.train.activation_checkpointing, config.train.compile
        )
        started = time.perf_counter()
        steps = train(
            Pretraining(wrapped, Pixels(config.data.mean, config.data.std, group.device)),
            optimization,
            load_from,
            config.train,
            group,
            folder,
            BadRecords(folder / "bad_records.jsonl", len(records), config.data.max_bad_fraction),
            settings,
            config.seed,
        )
        if group.is_main and steps == optimization.schedule.steps:
            last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
            write_text(folder / "metrics.json", json.dumps(last | {"seconds": time.perf_counter() - started}) + "\n")
    return steps


if __name__ == "__main__":
    pretrain(parse(PretrainConfig))
