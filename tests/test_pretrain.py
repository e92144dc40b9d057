"""tools/pretrain.py as a user runs it: killed and resumed, on one process and on two."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import ENVIRONMENT, torchrun
from states import load_state

from video_convmae.engine import checkpoint

ROOT = Path(__file__).parent.parent


def command(videos: Path, output: Path, *edits: str, processes: int = 1) -> list[str]:
    return [
        *(torchrun(processes) if processes > 1 else [sys.executable]),
        str(ROOT / "tools" / "pretrain.py"),
        f"--config={ROOT / 'configs' / 'debug' / 'pretrain.yaml'}",
        f"--data.train={videos / 'list.txt'}",
        f"--data.root={videos}",
        "--data.reader=pyav",
        "--model.image_size=32",
        "--device=cpu",
        f"--output={output}",
        *edits,
    ]


def run(videos: Path, output: Path, *edits: str, processes: int = 1) -> list[dict]:
    """Run to the end; the lines of its log."""
    subprocess.run(command(videos, output, *edits, processes=processes), env=ENVIRONMENT, check=True, timeout=300)
    return log(output)


def log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def model_of(output: Path) -> dict[str, torch.Tensor]:
    return load_state(output)["model"]


def test_a_run_folder(videos: Path, tmp_path: Path) -> None:
    lines = run(videos, tmp_path, "--train.epochs=1")
    assert [line["step"] for line in lines] == list(range(1, 9))
    config = (tmp_path / "config.yaml").read_text()
    assert "reader: pyav" in config
    assert json.loads((tmp_path / "metrics.json").read_text())["step"] == 8
    bad = [json.loads(line) for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
    assert [fault["path"] for fault in bad] == [str(videos / "bad.mp4")]
    assert lines[-1]["bad_records"] == 1
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert len(checkpoint.list_checkpoints(tmp_path / "checkpoints")) == 2


@pytest.mark.parametrize(
    ("batch", "accumulate", "processes"), [(2, 2, 1), pytest.param(2, 1, 2, marks=pytest.mark.slow), (1, 2, 2)]
)
def test_the_same_global_batch_gives_the_same_steps(
    videos: Path, tmp_path: Path, batch: int, accumulate: int, processes: int
) -> None:
    common = ("--train.epochs=1", "--data.workers=0", "--optim.warmup_epochs=0")
    whole = run(videos, tmp_path / "whole", "--train.batch_size=4", *common)
    dealt = run(
        videos,
        tmp_path / "dealt",
        f"--train.batch_size={batch}",
        f"--train.accumulate={accumulate}",
        *common,
        processes=processes,
    )
    assert dealt[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)
    assert dealt[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-5)
    for ours, theirs in zip(dealt, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["bad_records"] == theirs["bad_records"]


@pytest.mark.faults
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_with_the_weights_of_an_undisturbed_one(
    videos: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    """Bit for bit; twice stopped at a random step, with drop path, an average of the weights and repeated clips."""
    edits = ("--model.drop_path=0.2", "--train.ema=0.9", "--data.repeats=2", "--train.epochs=3")
    run(videos, tmp_path / "whole", *edits)
    stopped = tmp_path / "stopped"
    rng = random.Random(int(ending))
    for last in (rng.randint(1, 9), rng.randint(12, 20)):
        print(f"{ending.name} after step {last}")
        process = subprocess.Popen(command(videos, stopped, *edits), env=ENVIRONMENT, start_new_session=True)
        deadline = time.monotonic() + 120
        while not ((stopped / "log.jsonl").exists() and len(log(stopped)) >= last):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        # As a shell's Ctrl-C: SIGINT goes to the whole group, its loading processes included.
        (os.killpg if ending == signal.SIGINT else os.kill)(process.pid, ending)
        assert process.wait(60) == (-ending if ending == signal.SIGKILL else 0)
    lines = run(videos, stopped, *edits)
    assert [line["step"] for line in lines] == [line["step"] for line in log(tmp_path / "whole")]
    assert [line["loss"] for line in lines] == [line["loss"] for line in log(tmp_path / "whole")]
    ours, theirs = model_of(stopped), model_of(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (stopped / "bad_records.jsonl").read_text() == (tmp_path / "whole" / "bad_records.jsonl").read_text()


def test_too_many_bad_records_stop_the_run(videos: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        command(videos, tmp_path, "--data.max_bad_fraction=0.01", "--train.epochs=2"),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode != 0
    assert "1 of 16 records cannot be read" in result.stderr
    assert "bad.mp4" in result.stderr


@pytest.mark.parametrize("recipe", ["pretrain", "finetune"])
def test_a_trace_shows_the_phases_of_a_few_steps(recipe: str, videos: Path, tmp_path: Path) -> None:
    """`--log.trace 3 --train.max_steps 6`: three steps to warm up, three recorded, and the run ends by itself."""
    program = command(videos, tmp_path, "--data.workers=0", "--log.trace=3", "--train.max_steps=6")
    if recipe == "finetune":
        edits = ["--data.validation=null", "--data.num_classes=16", "--data.augmentation.flip=false"]
        program = [part.replace("pretrain", "finetune") for part in program] + edits
    subprocess.run(program, env=ENVIRONMENT, check=True, timeout=300)
    assert json.loads((tmp_path / "metrics.json").read_text())["step"] == 6
    with gzip.open(tmp_path / "logs" / "trace_rank_0000.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    phases = {"forward", "backward", "optimizer"}
    assert all(names.count(phase) == 3 * names.count("ProfilerStep#3") for phase in phases), names
    assert "aten::addmm" in {event["name"] for event in events}
    assert "aten::" in (tmp_path / "logs" / "trace_rank_0000.txt").read_text()
