"""Schedules, parameter groups, checkpoints, logs, and the loop on a toy task."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from states import load_state
from torch import Tensor, nn

from video_convmae import create_autoencoder
from video_convmae.build_trainer import build_optimization
from video_convmae.data.datasets import BadRecord
from video_convmae.data.loader import Batch
from video_convmae.engine import checkpoint
from video_convmae.engine.checkpoint import Checkpoint, CheckpointError, Saver
from video_convmae.engine.distributed import DistInfo
from video_convmae.engine.log import BadRecordLog, NullLog, RunLog, TooManyBadRecords
from video_convmae.engine.optim import Schedule, parameter_groups
from video_convmae.engine.options import LogConfig, OptimConfig, TrainConfig
from video_convmae.engine.parallel import RECOMPUTED, parallelize
from video_convmae.engine.tasks import Normalizer, Task
from video_convmae.engine.trainer import NonFiniteLoss, StopSignal, Trainer
from video_convmae.engine.validation import Validation, Validator
from video_convmae.errors import UserError
from video_convmae.weights import files

ALONE = DistInfo(0, 1, torch.device("cpu"))


def test_the_schedule_rises_linearly_and_falls_as_a_half_cosine() -> None:
    schedule = Schedule(peak=1.0, end=0.1, warmup=10, steps=110)
    assert [schedule.lr(step) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert schedule.lr(60) == pytest.approx(0.55)
    assert schedule.lr(109) == pytest.approx(0.1, abs=1e-3)
    falling = [schedule.lr(step) for step in range(10, 110)]
    assert falling == sorted(falling, reverse=True)


def test_the_learning_rate_follows_the_batch_and_says_so() -> None:
    model = nn.Linear(2, 2)
    scaled = build_optimization(
        model, OptimConfig(base_lr=1.5e-4, base_min_lr=1e-5), TrainConfig(epochs=800), 2048, 117
    )
    assert scaled.schedule.peak == pytest.approx(1.2e-3)
    assert scaled.schedule.end == pytest.approx(8e-5)
    assert (scaled.schedule.warmup, scaled.schedule.steps) == (40 * 117, 800 * 117)
    assert scaled.origin == "lr 0.0012 = base_lr 0.00015 x effective batch 2048 / 256"
    assert (
        build_optimization(model, OptimConfig(lr=3e-4, warmup_epochs=0), TrainConfig(epochs=1), 2048, 10).schedule.peak
        == 3e-4
    )


def test_a_run_of_max_steps_replaces_its_epochs() -> None:
    train = TrainConfig(epochs=800, max_steps=8)
    assert build_optimization(nn.Linear(2, 2), OptimConfig(warmup_steps=0), train, 2048, 117).schedule.steps == 8
    with pytest.raises(ValueError, match=r"train\.max_steps is 0"):
        TrainConfig(max_steps=0)
    optim = OptimConfig(warmup_epochs=40, warmup_steps=3)
    assert build_optimization(nn.Linear(2, 2), optim, train, 2048, 117).schedule.warmup == 3


def test_validations_may_be_counted_in_steps() -> None:
    def due(validation: Validation) -> list[int]:
        validator = Validator(validation, 10, 25, NullLog(), None)  # type: ignore[arg-type]  # nothing is saved
        return [step for step in range(26) if validator.is_due(step)]

    assert due(Validation(lambda model: {}, nn.Module, every=1.2)) == [12, 24, 25]
    assert due(Validation(lambda model: {}, nn.Module, every=1.2, every_steps=7)) == [7, 14, 21, 25]
    assert due(Validation(lambda model: {}, nn.Module, every_steps=20, from_start=True)) == [0, 20, 25]


def test_vectors_and_positions_are_not_decayed() -> None:
    model = create_autoencoder("tiny", num_frames=4, image_size=32, learnable_positions=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = (
        {names[id(p)] for p in group["params"]} for group in parameter_groups(model.named_parameters(), 0.05)
    )
    assert decayed | free == set(names.values())
    assert not decayed & free
    assert {"decoder.mask_token", "encoder.positions", "norm.weight"} <= free
    assert all(name.endswith("weight") for name in decayed)
    assert "encoder.conv_stages.0.0.depthwise.weight" in decayed


# Checkpoints


def state_of(step: int) -> dict:
    return {"model": {"w": torch.full((3, 2), float(step)), "n": torch.tensor(step)}, "ema": None, "config": {"a": [1]}}


def save(folder: Path, *steps: int, **changes: object) -> Saver:
    saver = Saver(folder, **changes)
    for step in steps:
        saver.save(step, state_of(step))
    saver.wait()
    return saver


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_are_whole_pruned_and_found(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 1, 2, 30, keep=2)
    assert names(folder) == ["step_00000002", "step_00000030"]
    assert checkpoint.find_weights(tmp_path).path == checkpoint.find_weights(folder).path == folder / "step_00000030"
    assert checkpoint.find_weights(folder / "step_00000002").path == folder / "step_00000002"
    newest, errors = checkpoint.find_latest(folder)
    assert (newest.path, errors) == (folder / "step_00000030", [])
    state = load_state(folder / "step_00000030")
    assert torch.equal(state["model"]["w"], torch.full((3, 2), 30.0))
    assert (state["step"], int(state["model"]["n"]), state["ema"], state["config"]) == (30, 30, None, {"a": [1]})
    assert "model" not in load_state(folder / "step_00000030", "optimizer")
    assert Checkpoint(folder / "step_00000030").tensors("optimizer") == {}


def test_what_is_saved_is_what_it_was_when_it_was_saved(tmp_path: Path) -> None:
    """Training continues while a checkpoint is written."""
    state, saver = state_of(5), Saver(tmp_path)
    saver.save(5, state)
    state["model"]["w"].fill_(-1)
    saver.wait()
    assert torch.equal(load_state(tmp_path / "step_00000005")["model"]["w"], torch.full((3, 2), 5.0))


def test_the_best_and_every_so_manyth_checkpoint_stay(tmp_path: Path) -> None:
    saver = save(tmp_path, 3, 4, keep=1, keep_every=10)
    saver.mark_best(4)
    for step in (10, 15, 20, 25, 26):
        saver.save(step, state_of(step))
    saver.wait()
    assert names(tmp_path) == ["best", "step_00000004", "step_00000010", "step_00000020", "step_00000026"]
    assert load_state(tmp_path / "best")["step"] == checkpoint.step_of(tmp_path / "best") == 4
    saver.mark_best(26)
    save(tmp_path, 30, 31, keep=1, keep_every=10)
    assert names(tmp_path)[:2] == ["best", "step_00000010"]
    assert checkpoint.find_weights(tmp_path).path == tmp_path / "step_00000031"


def test_pruning_keeps_the_newest_good_checkpoint(tmp_path: Path) -> None:
    """A run that passed over a damaged newer one writes behind it: what it wrote stays."""
    save(tmp_path, 20, 30)
    (tmp_path / "step_00000030" / "checkpoint.json").write_text("damaged")
    save(tmp_path, 25, keep=1)
    assert checkpoint.find_weights(tmp_path).path.name == "step_00000025"
    save(tmp_path, 30, keep=1)
    assert checkpoint.find_weights(tmp_path).path.name == "step_00000030"
    with pytest.raises(ValueError, match=r"train\.keep is 0"):
        Saver(tmp_path, keep=0)


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """One byte of a tensor, a file that was cut, a file that is not there, no files at all."""
    save(tmp_path, *range(1, 6))
    file = {step: next((tmp_path / f"step_0000000{step}").glob("*.safetensors")) for step in range(1, 6)}
    data = bytearray(file[5].read_bytes())
    data[-3] ^= 1
    file[5].write_bytes(data)
    file[4].write_bytes(file[4].read_bytes()[:-7])
    file[3].unlink()
    shutil.rmtree(tmp_path / "step_00000002")
    (tmp_path / "step_00000002").mkdir()
    newest, complaints = checkpoint.find_latest(tmp_path)
    assert newest.path == tmp_path / "step_00000001"
    reasons = ["has changed since it was written", r"has \d+ bytes, expected \d+", "has None bytes", "No such file"]
    for step, complaint, reason in zip((5, 4, 3, 2), complaints, reasons, strict=True):
        assert f"step_0000000{step}" in complaint
        assert re.search(reason, complaint)
    with pytest.raises(ValueError, match="has changed since it was written"):
        load_state(tmp_path / "step_00000005")


def test_a_checkpoint_is_verified_once_and_gives_the_parts_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte is checksummed once, whatever is read of it afterwards; the optimizer's tensors are not read."""
    state = state_of(1) | {"optimizer": {"w/exp_avg": torch.ones(3, 2)}}
    path = checkpoint.save_checkpoint(tmp_path, 1, state)
    checked: list[str] = []
    crc = checkpoint._crc
    monkeypatch.setattr(checkpoint, "_crc", lambda file: checked.append(file.name) or crc(file))
    found = checkpoint.find_weights(tmp_path)
    assert found.tensors("model").keys() == {"w", "n"}
    assert found.tensors("ema") == {}
    assert sorted(checked) == sorted(file.name for file in path.glob("*.safetensors"))
    Checkpoint(path, verified=True).tensors("model")  # another rank's: the main process has verified it
    assert len(checked) == len(set(checked))


def test_no_room_is_an_error_that_says_how_much_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    with pytest.raises(CheckpointError, match=r"MB are needed .* resumes from the newest"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001"]


class Malice:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/executed_by_a_checkpoint",)


def test_no_pickle_of_a_stranger_is_executed(tmp_path: Path) -> None:
    """Nothing that a checkpoint consists of is a pickle, and one in its place is not read."""
    path = checkpoint.save_checkpoint(tmp_path, 1, state_of(1))
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    torch.save({"model": Malice()}, next(path.glob("*.safetensors")))
    (path / ".metadata").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(ValueError, match="bytes, expected"):
        load_state(path)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        files.read_file(path)
    assert not Path("/tmp/executed_by_a_checkpoint").exists()


def test_no_checkpoint_is_an_error_that_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run folder"):
        checkpoint.find_weights(tmp_path)


# Logs


def values(step: int) -> dict:
    rate = {"loss": 0.5, "lr": 1e-3, "clips_per_second": 10.0, "data_wait": 0.1, "eta_seconds": 61.0}
    return {"step": step, **rate}


def test_a_resumed_run_takes_up_its_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, 9)
    for step in (2, 4, 6):
        log.write(values(step))
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 8, "los')  # the run was killed while it wrote
    log = RunLog(tmp_path, 5, 9)
    log.write(values(6))
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_bad_records_are_written_once_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "bad_records.jsonl"
    bad = BadRecordLog(path, records=100, max_fraction=0.02)
    assert bad.add([BadRecord(3, "a.mp4", "a.mp4: broken"), BadRecord(3, "a.mp4", "again")], write=True) == [
        BadRecord(3, "a.mp4", "a.mp4: broken")
    ]
    assert bad.add([BadRecord(7, "b.mp4", "b.mp4: empty")], write=False)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"index": 3, "path": "a.mp4", "error": "a.mp4: broken"}
    ]
    with open(path, "a") as file:
        file.write('{"index": 9, "pa')  # the run was killed while it wrote
    resumed = BadRecordLog(path, records=100, max_fraction=0.02)
    assert len(resumed) == 1
    with pytest.raises(TooManyBadRecords, match=r"3 of 100 .*max_bad_fraction 0.02(.|\n)*a.mp4: broken"):
        resumed.add([BadRecord(8, "c", "c: gone"), BadRecord(9, "d", "d: gone")], write=True)
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("optim", [OptimConfig(warmup_epochs=1), OptimConfig(warmup_steps=9)])
def test_a_warmup_that_does_not_fit_is_an_error(optim: OptimConfig) -> None:
    with pytest.raises(UserError, match=r"optim.warmup_(epochs is 1, 9 steps|steps is 9), and the run has 9"):
        build_optimization(nn.Linear(2, 2), optim, TrainConfig(epochs=1), 4, 9)


# The loop


class Toy(Task):
    """Fits a line; its "clips" are bytes, its labels the target."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.clips.flatten(1).float()
        loss = (self.model(x).squeeze(1) - batch.labels).square().mean()
        return loss, {"residual": loss.detach().sqrt()}


def batches(first: int, last: int, broken: Collection[int] = ()) -> Iterator[Batch]:
    for step in range(first, last):
        clips = torch.randint(0, 2, (4, 1, 1, 2, 2), generator=torch.Generator().manual_seed(step))
        labels = torch.full((4,), math.inf) if step in broken else torch.ones(4)
        visible = torch.ones(4, 1, 1, 1, dtype=torch.bool)
        yield Batch(clips, visible, None, labels, torch.arange(4) + 10 * step, ())


def run(
    folder: Path,
    steps: int = 12,
    broken: Collection[int] = (),
    end: int | None = None,
    task: Toy | None = None,
    **changes: object,
) -> Toy:
    """Train the toy until `end`, on a schedule of `steps`."""
    task = task or Toy()
    config = TrainConfig(**{"epochs": 1, "precision": "fp32", "log_every": 4, "save_every": 0.5, **changes})
    parts = config.accumulate
    optimization = build_optimization(task.model, OptimConfig(lr=0.05, warmup_epochs=0.2), config, 4, steps)

    def batches_from(first: int) -> Iterator[Batch]:
        yield from batches(first * parts, steps * parts if end is None else end * parts, broken)

    trainer = Trainer(
        task=task,
        optimization=optimization,
        batches=batches_from,
        train=config,
        log=LogConfig(),
        info=ALONE,
        folder=folder,
        bad_records=BadRecordLog(folder / "bad_records.jsonl", 40, 0.01),
        run_config={"name": "toy"},
        resume_from=checkpoint.find_latest(folder / "checkpoints")[0],
    )
    trainer.fit()
    return task


def weights(task: Toy) -> Tensor:
    return torch.cat([p.detach().flatten() for p in task.model.parameters()])


def test_the_loop_learns_logs_and_saves(tmp_path: Path) -> None:
    run(tmp_path, steps=40)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(4, 41, 4))
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert {
        "epoch",
        "lr",
        "grad_norm",
        "clips_per_second",
        "data_wait",
        "eta_seconds",
        "bad_records",
        "residual",
    } <= set(lines[0])
    state = load_state(tmp_path)
    assert state["step"] == 40
    assert state["config"] == {"name": "toy"}


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"accumulate": 3}, {"precision": "bf16"}, {"precision": "fp16"}])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, changes: dict) -> None:
    """Dropout included: a step's random numbers follow from (seed, step, rank)."""
    whole = run(tmp_path / "whole", **changes)
    with pytest.raises(StopIteration):
        run(tmp_path / "parts", end=9, **changes)  # the data breaks off after the checkpoint at step 6
    assert torch.equal(weights(run(tmp_path / "parts", **changes)), weights(whole))
    ema = [load_state(tmp_path / name)["ema"] for name in ("whole", "parts")]
    if "ema" in changes:
        assert all(torch.equal(ema[0][name], ema[1][name]) for name in ema[0])
        assert not torch.equal(ema[0]["0.weight"], whole.model[0].weight)


@pytest.mark.parametrize(("before", "after"), [("bf16", "fp16"), ("fp32", "fp16"), ("fp16", "bf16")])
def test_a_run_resumes_in_another_precision(tmp_path: Path, before: str, after: str) -> None:
    with pytest.raises(StopIteration):
        run(tmp_path, end=9, precision=before)
    assert weights(run(tmp_path, precision=after)).isfinite().all()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (lines[-1]["step"], "loss_scale" in lines[-1]) == (12, after == "fp16")


def test_a_repeated_signal_is_one_request_and_ctrl_c_twice_ends_at_once() -> None:
    """A job's every process gets Slurm's SIGTERM, and the workers torchrun's too, while the first of them saves."""
    with StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_non_finite_loss_stops_the_run_and_names_step_and_records(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"step 6: loss inf.*rank 0's records \[50, 51, 52, 53\]"):
        run(tmp_path, broken=[5])
    assert checkpoint.find_latest(tmp_path / "checkpoints")[0] is None  # the step of the checkpoint was the bad one


def test_a_non_finite_step_can_be_skipped(tmp_path: Path) -> None:
    skipped = run(tmp_path / "skip", broken=[5], on_nonfinite="skip")
    assert weights(skipped).isfinite().all()
    lines = [json.loads(line) for line in (tmp_path / "skip" / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines)


class Standardised(Toy):
    """A toy with BatchNorm, whose state before each batch it notes; the inputs of a broken batch are infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.known: list[dict[str, Tensor]] = []

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.known.append({name: buffer.clone() for name, buffer in self.model.named_buffers()})
        x = batch.clips.flatten(1).float().where(batch.labels.isfinite()[:, None], math.inf)
        return (self.model(x).squeeze(1) - 1).square().mean(), {}


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"precision": "fp16"}])
def test_a_skipped_step_leaves_running_statistics_as_they_were(tmp_path: Path, changes: dict) -> None:
    """Those of their average, too; of accumulated batches the first was finite."""
    parts = changes.get("accumulate", 1)
    task = run(
        tmp_path, broken=[12 * parts - 1], task=Standardised(), on_nonfinite="skip", log_every=1, ema=0.9, **changes
    )
    before, state = task.known[11 * parts], load_state(tmp_path)
    assert before["0.num_batches_tracked"] >= 10 * parts  # fp16 skips a step to find its loss scale
    for name, statistic in before.items():
        assert torch.equal(state["model"][name], statistic), name
        assert torch.equal(state["ema"][name], statistic), name
    assert weights(task).isfinite().all()


def test_gradients_that_are_never_finite_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"gradients of the last 12 steps were not finite: no weight has changed"):
        run(tmp_path / "short", broken=range(12), on_nonfinite="skip")
    with pytest.raises(NonFiniteLoss, match="gradients of the last 52 steps"):  # logged every fourth step
        run(tmp_path / "long", steps=80, broken=range(20, 80), on_nonfinite="skip")
    run(tmp_path / "now_and_then", steps=120, broken=[*range(30), *range(40, 80)], on_nonfinite="skip")


def test_the_average_of_a_short_run_follows_it(tmp_path: Path) -> None:
    task = run(tmp_path, steps=80, ema=0.9999)
    average = load_state(tmp_path)["ema"]["0.weight"]
    now, start = task.model[0].weight.detach(), Toy().model[0].weight.detach()
    assert (average - now).norm() < 0.2 * (start - now).norm()


# Wrapping


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("recomputed", RECOMPUTED)
def test_wrapping_changes_neither_values_nor_names(recomputed: str, compile: bool) -> None:
    """Compilation itself is left out (it wants a C++ compiler): this holds the wiring."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return create_autoencoder("tiny", num_frames=4, image_size=32, drop_path=0.2)

    bare, model = build(), build()
    names = list(model.state_dict())
    wrapped = parallelize(model, ALONE, activation_checkpointing=recomputed, compile=compile)
    clips, visible = torch.randn(2, 3, 4, 32, 32), torch.tensor([True, False, False, True] * 4).view(2, 2, 2, 2)
    losses = []
    for each in (bare, wrapped):
        torch.manual_seed(1)
        with torch.compiler.set_stance("force_eager"):
            loss = each(clips, visible).loss
            loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(bare.parameters(), wrapped.parameters()))
    assert list(wrapped.state_dict()) == names


@pytest.mark.parametrize("recomputed", RECOMPUTED)
def test_checkpointed_blocks_are_compiled_too(recomputed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(str(graph.graph))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    model = create_autoencoder("tiny", num_frames=4, image_size=32)
    wrapped = parallelize(model, ALONE, activation_checkpointing=recomputed, compile=True)
    clips, visible = torch.randn(2, 3, 4, 32, 32), torch.tensor([True, False, False, True] * 4).view(2, 2, 2, 2)
    wrapped(clips, visible).loss.backward()
    assert len(graphs) == 4  # a block of each stage, and of the decoder
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_pixels_go_there_and_back() -> None:
    pixels = Normalizer((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), torch.device("cpu"))
    clips = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    floats = pixels.normalise(clips)
    assert torch.allclose(floats[:, 0], (clips[:, 0] / 255 - 0.485) / 0.229, atol=1e-5)
    assert torch.equal(pixels.restore(floats), clips)
