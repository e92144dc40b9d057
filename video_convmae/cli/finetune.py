"""Finetune or probe a pretrained encoder on a list of labelled videos or images.

    python tools/finetune.py --config configs/video/finetune_k400_base.yaml --init.weights runs/pretrain --output DIR
    torchrun --nproc_per_node 8 tools/finetune.py --config ...

The newest checkpoints and, by the validation, the best (checkpoints/best) are kept. The same command on the same
folder goes on with the run. tools/evaluate.py tests the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from video_convmae.config import FinetuneConfig, run_tool
from video_convmae.data.mixing import Mixing
from video_convmae.data.records import Records
from video_convmae.engine import distributed
from video_convmae.engine.distributed import DistInfo
from video_convmae.engine.evaluation import evaluate, write_faults
from video_convmae.engine.tasks import Classification, Normalizer
from video_convmae.engine.trainer import Validation
from video_convmae.models.sizes import EncoderConfig
from video_convmae.runs import carry_out, remember, resolved


def finetune(config: FinetuneConfig) -> int:
    """Run a configuration; returns the steps done."""
    config = resolved(config)
    with distributed.init_distributed(config.device, config.hang_timeout) as group:
        records = config.data.records()
        lists = [records] if config.data.validation is None else [records, config.data.validation_records()]
        num_classes = config.data.count_classes(*lists)
        data = replace(config.data, labels=config.data.class_names(), num_classes=num_classes)
        config = replace(config, data=data)
        torch.manual_seed(config.seed)
        model = config.model.build(num_classes)
        if group.is_main:
            print(f"{num_classes} classes")
        clips = config.data.clips(records, model.encoder.config, config.seed)
        task = partial(Classification, mixing=Mixing(config.mixing, num_classes))
        validation = None
        if config.data.validation is not None:
            validation = _validation(config, group, lists[1], model.encoder.config)
        if config.model.probe == "knn":
            return remember(config, group, model, records, validation)
        return carry_out(config, group, model, clips, task, validation)


def _validation(config: FinetuneConfig, group: DistInfo, records: Records, encoder: EncoderConfig) -> Validation:
    """Score the validation list with the run's own views."""
    views = config.data.views(records, encoder, config.validate)
    folder = Path(config.output) / "validation"
    pixels = Normalizer(config.data.mean, config.data.std, group.device)

    def measure(model: nn.Module) -> dict[str, float | int | None]:
        evaluation = evaluate(
            model,
            views,
            pixels,
            config.data.num_classes,
            config.validate,
            group,
            config.data.workers,
            config.data.start_method,
        )
        if group.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_faults(evaluation.faults, folder)
        return evaluation.metrics()

    def build() -> nn.Module:
        return config.model.build(config.data.num_classes).to(group.device)

    return Validation(measure, build, config.validate.every)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_tool(FinetuneConfig, finetune, arguments)
