"""Loggers by name: what reaches TensorBoard, Weights & Biases and MLflow, resuming, and failures that stop no run."""

from __future__ import annotations

import importlib.util
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import encode
from PIL import Image

from video_convmae.cli import run as run_cli
from video_convmae.cli.parser import parse
from video_convmae.cli.pretrain import pretrain
from video_convmae.config import PretrainConfig
from video_convmae.engine import loggers
from video_convmae.engine.log import RunLog
from video_convmae.engine.loggers import Background, Memory
from video_convmae.errors import UserError
from video_convmae.runs import load_autoencoder

CONFIG = {"train": {"epochs": 3}, "seed": 0}


def values(step: int) -> dict:
    rate = {"loss": 0.5, "lr": 1e-3, "clips_per_second": 10.0, "data_wait": 0.1, "eta_seconds": 61.0}
    return {"step": step, **rate}


def log_twice(folder: Path, name: Any, picture: Path) -> None:
    """Log 6 steps of 8, as a process that is killed after its checkpoint of step 4; then resume from there."""
    Image.new("RGB", (8, 8)).save(picture)
    log = RunLog(folder, 0, 8, [name], CONFIG)
    for step in (2, 4, 6):
        log.write(values(step))
    log.picture("reconstruction", picture, 6)
    log.close()
    log = RunLog(folder, 4, 8, [name], CONFIG)
    log.write(values(6))
    log.picture("reconstruction", picture, 6)
    log.write({"step": 6, "val_top1": 0.25, "val_verdict": "fine", "val_top5": None})
    log.write(values(8))
    log.close()


def wandb_records(path: Path) -> Iterator[Any]:
    """Read an offline run's file: a head of 7 bytes, then LevelDB's log format, a record of W&B's protocol each."""
    from wandb.proto import wandb_internal_pb2

    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32_768 - place % 32_768
        if left < 7:  # a head does not fit into the rest of a block
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            yield message
            record = b""


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_twice(tmp_path / "run", "wandb", tmp_path / "a.png")
    wandb.teardown()  # its service writes the files to their end
    lines, runs, configuration = [], set(), {}
    for file in sorted(tmp_path.glob("run/wandb/offline-run-*/*.wandb")):
        for record in wandb_records(file):
            if record.HasField("run"):
                runs.add((record.run.run_id, record.run.project, record.run.display_name))
                configuration |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                items = record.history.item
                line = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                lines.append({name: value for name, value in line.items() if not name.startswith("_")})
    identity = json.loads((tmp_path / "run" / "logs" / "wandb.json").read_text())["id"]
    assert runs == {(identity, "video-convmae", "run")}
    assert configuration["train"] == CONFIG["train"]
    logged = [(line["step"], name) for line in lines for name in line if name in ("loss", "val_top1")]
    assert logged == [(2, "loss"), (4, "loss"), (6, "loss"), (6, "val_top1"), (8, "loss")]
    (picture,) = [line for line in lines if any(name.startswith("reconstruction") for name in line)]
    assert picture["step"] == 6
    assert list(tmp_path.glob("run/wandb/offline-run-*/files/media/images/reconstruction*.png"))


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    log_twice(tmp_path / "run", "mlflow", tmp_path / "a.png")
    client = mlflow.MlflowClient((tmp_path / "store").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    steps = {
        name: [each.step for each in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
    }
    assert steps["loss"] == [2, 4, 6, 8]
    assert steps["val_top1"] == [6]
    assert "val_top5" not in steps
    assert {each.path for each in client.list_artifacts(run.info.run_id)} == {"config.yaml", "reconstruction"}


def test_no_logger_writes_log_jsonl_alone(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, 2, ())
    log.write(values(2))
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


class Broken:
    """A server that is away, or never answers."""

    def __init__(self, hangs: bool) -> None:
        self.answers = threading.Event()
        self.hangs = hangs

    def write(self, values: dict) -> None:
        if self.hangs:
            self.answers.wait(60)
        raise ConnectionError("no route\nto host")

    def picture(self, name: str, path: Path, step: int) -> None:
        self.write({})

    def close(self, finished: bool) -> None:
        self.write({})


@pytest.mark.parametrize("hangs", [False, True])
def test_a_logger_that_fails_is_one_warning(hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "CLOSING", 0.3)
    monkeypatch.setattr(loggers, "MOST_WAITING", 20)
    warnings: list[str] = []
    broken = Broken(hangs)
    logger = Background("wandb", broken, Memory(tmp_path / "logs" / "wandb.json"), warnings.append)
    for step in range(100 if hangs else 5):
        logger.write(values(step))
    logger.close(finished=True)
    broken.answers.set()
    (warning,) = warnings
    assert warning.startswith("wandb cannot log, log.jsonl has all of it; the run goes on: ")
    assert "\n" not in warning
    assert hangs or warning.endswith("ConnectionError: no route to host")


def test_a_logger_that_cannot_be_opened_ends_a_new_run_and_not_a_resumed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(loggers, "MLflow", refuse)
    with pytest.raises(UserError, match="mlflow cannot be opened: ConnectionError: no server; log in or set its serv"):
        RunLog(tmp_path, 0, 9, ["mlflow"])
    log = RunLog(tmp_path, 4, 9, ["mlflow"])
    log.write(values(6))
    log.close()
    assert "warning: mlflow cannot be opened" in capsys.readouterr().out
    assert json.loads((tmp_path / "log.jsonl").read_text())["step"] == 6


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(4):
        encode(folder / f"{number}.mp4", 8, seed=number)
    (folder / "list.txt").write_text("".join(f"{number}.mp4\n" for number in range(4)))
    tiny = ["--model.size=tiny", "--model.num_frames=4", "--model.image_size=32", "--model.strides=[2,2,2]"]
    tiny += ["--data.workers=0", "--device=cpu", "--train.precision=fp32", "--train.batch_size=2", "--data.stride=1"]
    tiny += ["--optim.warmup_epochs=0", "--train.max_steps=3", "--train.log_every=1", "--data.reader=pyav"]
    return [f"--data.train={folder / 'list.txt'}", f"--data.root={folder}", *tiny]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_library_is_an_error_of_one_line_before_training(
    name: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda each, *rest: None if each == name else found(each, *rest))
    assert run_cli("pretrain", [*arguments, f"--output={tmp_path / 'run'}", f"--log.to=[tensorboard,{name}]"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert f'log.to has {name}, and {name} is not installed: pip install "video-convmae[{name}]"' in error
    assert not (tmp_path / "run").exists()


def test_pictures_change_no_weight_and_reach_the_logger(arguments: list[str], tmp_path: Path) -> None:
    pretrain(parse(PretrainConfig, [*arguments, f"--output={tmp_path / 'a'}", "--log.to=[]"]))
    pretrain(parse(PretrainConfig, [*arguments, f"--output={tmp_path / 'b'}", "--log.pictures=1"]))
    names = sorted(path.name for path in (tmp_path / "b" / "pictures").iterdir())
    assert names == ["reconstruction_step_00000002.png", "reconstruction_step_00000003.png"]  # an epoch, and the end
    plain, drawn = (load_autoencoder(tmp_path / name)[0].state_dict() for name in "ab")
    assert all(torch.equal(plain[each], drawn[each]) for each in plain)
    assert not list((tmp_path / "a").glob("events*"))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "b"))
    events.Reload()
    assert [each.step for each in events.Images("reconstruction")] == [2, 3]
    assert [each.step for each in events.Scalars("loss")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (["--log.to=[wandb,wandb]"], "log.to is ['wandb', 'wandb']; expected each name once"),
        (["--log.to=[comet]"], "log.to is"),
        (["--log.pictures=0"], "log.pictures is 0"),
    ],
)
def test_options_are_checked(
    edits: list[str], message: str, arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        parse(PretrainConfig, [*arguments, "--output=x", *edits])
    assert message in capsys.readouterr().err
