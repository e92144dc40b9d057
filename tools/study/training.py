"""The runs of the demo and the study: pretraining on moving digits, and what is measured with labels afterwards."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from video_convmae.atomic import write_text
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.cli.pretrain import pretrain
from video_convmae.config import FinetuneConfig, PretrainConfig

Result = TypeVar("Result")

CONFIGS = Path(__file__).parents[2] / "configs" / "debug"


def is_finished(run: Path) -> bool:
    """Return whether a run took all its steps: its metrics.json is written last."""
    return (run / "metrics.json").exists()


def require_finished(run: Path) -> None:
    """Exit if a signal ended the run: half a run must not be measured."""
    if not is_finished(run):
        sys.exit(f"{run} was interrupted; the same command resumes it")


def remove_runs_of_other_settings(output: Path, settings: dict[str, str], runs: Sequence[str]) -> None:
    """Remove the runs of a finished demo, or of other settings; those of an interrupted one stay and are resumed.

    Args:
        output: folder of the demo.
        settings: all that the runs depend on.
        runs: folders in `output`.
    """
    output.mkdir(parents=True, exist_ok=True)
    known, metrics = output / "settings.json", output / "metrics.json"
    if metrics.exists() or not known.exists() or json.loads(known.read_text(encoding="utf-8")) != settings:
        for run in runs:
            shutil.rmtree(output / run, ignore_errors=True)
        metrics.unlink(missing_ok=True)
    write_text(known, json.dumps(settings, indent=2) + "\n")


def side_by_side(calls: Sequence[Callable[[], Result]], folders: Sequence[Path]) -> list[Result]:
    """Run functions at the same time, a process and a thread each, and return their results in order.

    So two runs on two cores end sooner than with two threads in turn. What a run prints goes to FOLDER.txt.

    Args:
        calls: functions that can be pickled.
        folders: of their runs.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(calls), context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(_call_quietly, calls, folders))


def _call_quietly(call: Callable[[], Result], folder: Path) -> Result:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(f"{folder}.txt", "a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        return call()


def pretrain_on(data: Path, run: Path, *edits: str) -> None:
    """Pretrain on all training clips, unless that is done; an interrupted run resumes."""
    if is_finished(run):
        return
    arguments = [f"--config={CONFIGS / 'demo.yaml'}", f"--output={run}", f"--data.root={data}"]
    pretrain(parse(PretrainConfig, [*arguments, f"--data.train={data / 'train_how.txt'}", *edits]))
    require_finished(run)


def write_labelled(data: Path, task: str, labelled: int) -> Path:
    """Write the list of the first labelled training clips, unless it is there; arguments as of `finetune_on`.

    Runs that are side by side take it from the same place: write it before they start, so that none of them does.
    """
    lines = (data / f"train_{task}.txt").read_text().splitlines(keepends=True)
    if len(lines) < labelled:
        raise ValueError(f"{data} has {len(lines)} training clips; expected {labelled} or more")
    path, text = data / f"labelled_{task}_{labelled}.txt", "".join(lines[:labelled])
    if not path.exists() or path.read_text() != text:
        write_text(path, text)
    return path


def finetune_on(
    data: Path, task: str, labelled: int, steps: int, run: Path, weights: Path | None, *edits: str
) -> dict[str, Any]:
    """Finetune or probe on the first labelled training clips, unless that is done; returns the run's metrics.

    Args:
        data: folder of the clips.
        task: how or what.
        labelled: number of clips; the pairs of a digit and a direction come in turn.
        steps: of the optimizer.
        run: the run folder.
        weights: where to start; None: from scratch.
        edits: of the configuration.
    """
    if not is_finished(run):
        arguments = [
            f"--config={CONFIGS / 'finetune_demo.yaml'}",
            f"--output={run}",
            f"--data.train={write_labelled(data, task, labelled)}",
            f"--data.validation={data / f'validation_{task}.txt'}",
            f"--data.labels={data / f'train_{task}.labels.txt'}",
            f"--data.root={data}",
            f"--train.max_steps={steps}",
        ]
        start = [] if weights is None else [f"--init.weights={weights}"]
        finetune(parse(FinetuneConfig, [*arguments, *start, *edits]))
        require_finished(run)
    return json.loads((run / "metrics.json").read_text())
