"""Finetune or probe a pretrained encoder on a list of labelled videos or images.

    video-convmae finetune --config video/finetune_k400_base --init.weights runs/pretrain --output DIR
    torchrun --nproc_per_node 8 -m video_convmae finetune --config ...

The newest checkpoints and, by the validation, the best (checkpoints/best) are kept. The same command on the same folder
resumes the run. `video-convmae evaluate` tests the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from video_convmae.cli.parser import run_command
from video_convmae.config import FinetuneConfig, to_plain


def finetune(config: FinetuneConfig) -> int:
    """Run a configuration; return the steps done (0 for a probe that is fitted at once)."""
    import torch

    from video_convmae import build, lists
    from video_convmae.data.labels import label_notes, path_notes
    from video_convmae.engine.distributed import init_distributed
    from video_convmae.engine.fit import fit_probe
    from video_convmae.engine.run_folder import claim
    from video_convmae.weights.load import describe_encoder

    config.check_fitted()
    takes_model = config.model.from_weights
    with init_distributed(config.device, config.hang_timeout) as info:
        initial = build.InitialWeights(config.init)
        config = build.resolve_config(config, info, initial)
        records = lists.read_records(config.data)
        validation = None if config.data.validation is None else lists.read_validation_records(config.data)
        num_classes = lists.count_classes(config.data, *[each for each in (records, validation) if each is not None])
        multi_label = lists.has_several_labels(config, *[each for each in (records, validation) if each is not None])
        labels = lists.read_class_names(config.data)
        if info.is_main:
            for note in (*label_notes(num_classes, labels, records, validation), *path_notes(records, validation)):
                print(f"labels: {note}")
        several = multi_label or config.data.multi_label  # as given where no record has several, as in older runs
        data = replace(config.data, labels=labels, num_classes=num_classes, multi_label=several)
        config = replace(config, data=data)
        if info.is_main:
            print(f"{num_classes} classes" + (", of which a record may have several" if multi_label else ""))
            if takes_model:
                print(f"model.from_weights: {config.init.weights} has {describe_encoder(config.model)}", flush=True)
        if config.sweep.heads:
            return build.build_sweep(config, info, records, validation, initial).fit()
        if not config.is_fitted:
            return build.build_finetuning(config, info, records, validation, initial).fit()
        torch.manual_seed(config.seed)  # of a random encoder
        probe = build.build_classifier(config.model, num_classes)
        report = build.load_initial_weights(config.init, probe, config.data, initial)
        if info.is_main:
            print(report or "init.weights is none: a random encoder is probed", flush=True)
        lists.try_training_records(config.data, records, info)
        measured = build.build_validation(config, info, validation)
        inference = build.build_inference(probe, config.data, records, config.validate, info)
        with claim(Path(config.output), info):
            fit_probe(
                inference,
                Path(config.output),
                config.data.max_bad_fraction,
                to_plain(config),
                measured,
            )
        return 0


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    return run_command(FinetuneConfig, finetune, arguments)
