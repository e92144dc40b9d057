"""A sweep of probes: heads with their own learning rate and weight decay, side by side on one frozen forward pass.

The head is chosen on records of the training list that train no head, never on the list that is tested:

    run/sweep/       the training run of all heads: its log, its checkpoints, from which it resumes
    run/             the chosen head, an ordinary probe: checkpoints/, model.safetensors, metrics.json

Letters: R records, K heads, B clips.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from video_convmae.atomic import read_json_lines, write_text
from video_convmae.data.records import Records, hold_out
from video_convmae.errors import UserError
from video_convmae.models.probe import Probe
from video_convmae.weights.files import save_file

from .checkpoint import PUBLISHED, checkpoint_name, list_checkpoints, save_checkpoint
from .distributed import DistInfo, barrier
from .inference import ListInference
from .log import last_words
from .metrics import Values
from .options import HeadSettings
from .run_folder import claim, write_config
from .trainer import Trainer
from .validation import Validation

FOLDER = "sweep"  # of the training run, in the run folder
PREFIX = "held_out_"
RULE = "the records of each class whose path, without data.root, has the smallest SHA-256"


def split_records(records: Records, share: float, root: str = "") -> tuple[Records, Records]:
    """Split a labelled list into the part that trains and the part that is held out, by class and by record.

    Of n records of a class `share * n` are held out, rounded, and at least one if there are two or more. Which ones
    depends on their paths alone (`RULE`): not on the order of the list, its place, a seed or the number of processes.

    Returns:
        Both parts in the order of the list, with the lines of their records.

    Raises:
        UserError: nothing is left to train on or to choose by.
    """
    names = [record.path.removeprefix(os.path.join(root, "")) for record in records]
    held = np.zeros(len(records), bool)
    for label in np.unique(records.labels):
        places = np.flatnonzero(records.labels == label)
        held[places[hold_out([names[place] for place in places], share)]] = True
    if not held.any() or held.all():
        raise UserError(
            f"sweep.holdout is {share}, and of {len(records)} records {int(held.sum())} would be held out; expected "
            "classes of two or more records"
        )
    return records.select(np.flatnonzero(~held)), records.select(np.flatnonzero(held))


def measure_heads(inference: ListInference) -> Values:
    """Measure the accuracy of every head on a labelled list; the same on every rank.

    Returns:
        top1_of_heads: in the order of the heads; None for one whose logits are finite for no record.
        top1: the highest; None: no head has one.
        scored, failed: records.
    """
    model, labels = inference.model, inference.views.records.labels
    if not isinstance(model, Probe):
        raise TypeError(f"the model is a {type(model).__name__}; expected a Probe with several heads")

    def answers(clips: Tensor) -> Tensor:
        logits = model(clips).float()
        best = logits.argmax(dim=2).where(logits.isfinite().all(dim=2), -1)
        return best.T.float()  # exact: there are fewer than 2 ** 24 classes

    result = inference.run(answers, (model.head_count,))
    read = ~result.failed
    chosen = result.values[read]
    top1 = (chosen == labels[read, None]).mean(axis=0) if read.any() else np.zeros(model.head_count)
    is_dead = (chosen < 0).all(axis=0) & read.any()
    of_heads = [None if dead else score for score, dead in zip(top1.tolist(), is_dead)]
    return {
        "top1": max((score for score in of_heads if score is not None), default=None),
        "top1_of_heads": of_heads,
        "scored": int(read.sum()),
        "failed": int(result.failed.sum()),
    }


def choose_head(scores: Sequence[float | None]) -> int:
    """Return the head with the highest score, the first of equals; None: its logits are not finite.

    Raises:
        UserError: no head has a score.
    """
    alive = {head: score for head, score in enumerate(scores) if score is not None}
    if not alive:
        raise UserError(
            f"the logits of all {len(scores)} heads of the sweep are not finite, so there is none to choose; try "
            "smaller sweep.lr or optim.clip_grad, with another --output"
        )
    return max(alive, key=lambda head: alive[head])


def take_head(weights: dict[str, Tensor], head: int) -> dict[str, Tensor]:
    """Return the weights of a probe with one of several heads."""
    prefix = f"head.{head}."
    own = {f"head.{name.removeprefix(prefix)}": tensor for name, tensor in weights.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in weights.items() if not name.startswith("head.")} | own


@dataclass(frozen=True)
class Sweep:
    """A sweep of probes, new, resumed or finished.

    trainer: of all heads; its folder is `FOLDER` in the run's.
    settings: of the heads.
    folder: the run folder.
    probe: with one head, not trained, on this process's device.
    validation: of the chosen head, on the list that is tested; None: there is none.
    run_config: configuration of the run as plain data.
    held_out, share: records that choose, and their share.
    info: the processes.
    """

    trainer: Trainer
    settings: tuple[HeadSettings, ...]
    folder: Path
    probe: Probe
    validation: Validation | None
    run_config: dict[str, Any]
    held_out: int
    share: float
    info: DistInfo

    def fit(self) -> int:
        """Train all heads, choose one and write it as the run's; return the steps done, as `Trainer.fit`."""
        started = time.perf_counter()
        others = list_checkpoints(self.folder / "checkpoints")
        if others and not list_checkpoints(self.trainer.folder / "checkpoints"):
            raise UserError(f"{self.folder} holds a run that is no sweep ({others[-1].name}); give another --output")
        with claim(self.folder, self.info):
            if self.info.is_main:
                write_config(self.folder, self.run_config, self.trainer.state.step)
            barrier()
            steps = self.trainer.fit()
            written = (self.folder / "checkpoints" / checkpoint_name(steps)).exists()
            if steps == self.trainer.steps and not (written and (self.folder / "metrics.json").exists()):
                self._finish(steps, started)
            barrier()
            if self.info.is_main and steps == self.trainer.steps:
                print(last_words(self.folder), flush=True)
        return steps

    def _finish(self, steps: int, started: float) -> None:
        """Choose a head by the last measurement, validate it, and write it."""
        log = read_json_lines(self.trainer.folder / "log.jsonl")
        scores = next(line for line in reversed(log) if f"{PREFIX}top1_of_heads" in line)[f"{PREFIX}top1_of_heads"]
        chosen = choose_head(scores)
        weights = take_head(self.trainer.state.weights(), chosen)
        self.probe.load_state_dict(weights)
        values = {} if self.validation is None else self.validation.measure(self.probe)
        state = {"model": weights, "ema": None, "config": self.run_config}
        save_checkpoint(self.folder / "checkpoints", steps, state, writes=self.info.is_main)
        if not self.info.is_main:
            return
        save_file(weights, self.folder / PUBLISHED, self.run_config)
        heads = [
            {"lr": each.lr, "weight_decay": each.weight_decay, "held_out_top1": score}
            for each, score in zip(self.settings, scores)
        ]
        judged = {name: values.pop(name) for name in ("learned", "verdict") if name in values}
        metrics: dict[str, Any] = {"step": steps} | {f"val_{name}": value for name, value in values.items()} | judged
        metrics["sweep"] = {
            "chosen": {"head": chosen} | heads[chosen],
            "heads": heads,
            "held_out": {"records": self.held_out, "share": self.share, "rule": RULE},
        }
        path = f"checkpoints/{checkpoint_name(steps)}"
        metrics["last"] = {"path": path, "step": steps, "top1": values.get("top1")}
        metrics["seconds"] = time.perf_counter() - started
        write_text(self.folder / "metrics.json", json.dumps(metrics) + "\n")
        print("\n".join(format_table(heads, chosen, self.held_out)), flush=True)


def format_table(heads: Sequence[dict[str, Any]], chosen: int, records: int) -> list[str]:
    """Return the lines of a table of the heads, the chosen one marked."""
    lines = [f"{'lr':>10} {'weight decay':>13} {'held-out top-1':>15}   ({records} records of the training list)"]
    for number, head in enumerate(heads):
        mark = "  chosen" if number == chosen else ""
        top1 = "not finite" if head["held_out_top1"] is None else f"{head['held_out_top1']:.4f}"
        lines.append(f"{head['lr']:>10.3g} {head['weight_decay']:>13.3g} {top1:>15}{mark}")
    return lines
