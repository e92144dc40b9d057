"""Fit a probe at once: compute the features of a labelled list, fit the head to them and validate. No step is taken."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from video_convmae.atomic import write_text
from video_convmae.errors import UserError
from video_convmae.models.probe import KNNHead, LogisticHead, Probe

from .checkpoint import checkpoint_name, list_checkpoints, save_checkpoint, step_of
from .distributed import barrier
from .inference import ListInference, chunk_folder
from .log import BadRecordLog, last_words
from .run_folder import write_config
from .validation import Validation


def fit_probe(
    inference: ListInference,
    folder: Path,
    max_bad_fraction: float,
    run_config: dict[str, Any],
    validation: Validation | None,
) -> None:
    """Fit a probe's head to the features of the training list, validate, and write a checkpoint of step 0.

    A record's feature is the mean of those of its views; one that cannot be read is reported and left out.

    Args:
        inference: the probe over the training list's views.
        folder: the run folder, which the caller has claimed.
        max_bad_fraction: largest allowed fraction of bad records.
        run_config: configuration of the run as plain data.
        validation: measured once, with the fitted probe.

    Raises:
        TooManyBadRecords: see `BadRecordLog`.
        UserError: the folder holds a run that was trained.
    """
    model, info, records = inference.model, inference.info, inference.views.records
    if not isinstance(model, Probe) or not isinstance(model.head, KNNHead | LogisticHead):
        raise TypeError(f"the model is a {type(model).__name__}; expected a Probe with model.probe knn or logistic")
    head = model.head
    started = time.perf_counter()
    trained = [path for path in list_checkpoints(folder / "checkpoints") if step_of(path)]
    if trained:  # it would be taken for the newest
        raise UserError(f"{folder} holds a trained run ({trained[-1].name}); give another --output")
    if info.is_main:
        write_config(folder, run_config, 0)
    weights = hashlib.sha256(b"".join(t.numpy(force=True).tobytes() for t in model.state_dict().values())).hexdigest()
    settings = {name: run_config[name] for name in ("data", "model", "validate", "seed")}
    chunks = chunk_folder(folder, settings | {"weights": weights, "records": records.digest()})
    barrier()

    def embed(clips: Tensor) -> Tensor:
        features = model.features(clips)
        return head.embed(features.tokens, features.pyramid)

    result = inference.run(embed, (head.feature_width,), chunks)
    if info.is_main:
        (folder / "bad_records.jsonl").unlink(missing_ok=True)  # of an earlier attempt: all were tried again
    barrier()
    log = BadRecordLog(folder / "bad_records.jsonl", records, max_bad_fraction)
    log.add(result.bad_records, info.is_main)
    features = torch.from_numpy(result.values[~result.failed])
    head.fit(features.to(info.device), torch.from_numpy(records.labels[~result.failed]).to(info.device))
    values = {} if validation is None else validation.measure(model)
    state = {"model": model.state_dict(), "ema": None, "config": run_config}
    save_checkpoint(folder / "checkpoints", 0, state, writes=info.is_main)
    if info.is_main:
        judged = {name: values.pop(name) for name in ("learned", "verdict") if name in values}
        metrics: dict[str, Any] = {f"val_{name}": value for name, value in values.items()}
        metrics |= {"step": 0, "fitted": len(features), "seconds": time.perf_counter() - started}
        last = {"path": f"checkpoints/{checkpoint_name(0)}", "step": 0, "top1": values.get("top1")}
        write_text(folder / "metrics.json", json.dumps(metrics | {"last": last} | judged) + "\n")
        print(", ".join(f"{name} {value}" for name, value in metrics.items()), flush=True)
        print(last_words(folder), flush=True)
        shutil.rmtree(folder / "partial")
    barrier()
