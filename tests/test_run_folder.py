"""A run is its configuration: what may change when it is resumed; one writer a folder; faults that are met at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clips import encode
from test_pretrain import ENVIRONMENT

from video_convmae.build import cap_workers
from video_convmae.cli import run as run_cli
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.cli.pretrain import pretrain
from video_convmae.config import FinetuneConfig, PretrainConfig, flatten, to_plain
from video_convmae.engine.distributed import DistInfo, choose_device
from video_convmae.engine.log import RankLog, describe_process
from video_convmae.engine.run_folder import FREE, TOLD, check_unchanged, write_config
from video_convmae.errors import UserError

ALONE = DistInfo(0, 1, torch.device("cpu"))
TINY = ("--model.size=tiny", "--model.num_frames=4", "--model.image_size=32", "--model.strides=[2,2,2]")


def fields(kind: type = PretrainConfig, *edits: str) -> dict:
    return dict(flatten(to_plain(parse(kind, ["--output=x", "--data.train=x", *edits]))))


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig])
def test_every_field_is_fixed_told_or_free(kind: type) -> None:
    """What makes weights, data order or schedule is fixed unless somebody decided otherwise."""
    before = fields(kind)
    fixed = set()
    for name in before:
        now = before | {name: "another"}
        if any(name == each or name.startswith(f"{each}.") for each in (*FREE, *TOLD)):
            assert check_unchanged(Path("runs/x"), before, now) in ([], [f"{name}: {before[name]} -> another"])
            continue
        fixed.add(name)
        with pytest.raises(UserError, match=re.escape(f"{name} {before[name]}; this command has {name} another")):
            check_unchanged(Path("runs/x"), before, now)
    must = {"seed", "model.heads", "model.widths", "model.position_table", "model.image_size", "optim.lr"}
    must |= {"optim.warmup_epochs", "train.epochs", "train.max_steps", "data.stride", "init.weights"}
    must |= {"mask.ratio", "model.target"} if kind is PretrainConfig else {"mixing.mixup", "data.num_classes"}
    assert must <= fixed
    assert not {"output", "data.workers", "train.log_every", "device", "train.precision", "data.root"} & fixed


def test_fields_that_are_named_exist() -> None:
    known = [*fields(), *fields(FinetuneConfig)]
    for name in (*FREE, *TOLD):
        assert any(each == name or each.startswith(f"{name}.") for each in known), name


def test_a_field_of_another_version_is_left_out() -> None:
    assert check_unchanged(Path("runs/x"), {"a.old": 1, "seed": 0}, {"seed": 0, "a.new": 2}) == []


def teachers(**edits: dict) -> dict:
    targets = [
        {"name": "pixels", "teacher": None, "weights": None, "weight": 1.0},
        {"name": "clip", "teacher": "timm:vit", "weights": "a/clip.pt", "weight": 1.0},
        {"name": "video", "teacher": "a/run", "weights": None, "weight": 1.0},
    ]
    return {"targets": [each | edits.get(each["name"], {}) for each in targets]}


def test_a_teacher_s_file_may_move() -> None:
    moved = teachers(clip={"weights": "b/clip.pt"}, video={"teacher": "b/run"})
    said = check_unchanged(Path("x"), teachers(), moved)
    assert said == ["targets.clip.weights: a/clip.pt -> b/clip.pt", "targets.video.teacher: a/run -> b/run"]


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"clip": {"teacher": "timm:other"}}, "targets.clip.teacher timm:vit; this command has"),
        ({"video": {"teacher": "ema"}}, "targets.video.teacher a/run; this command has targets.video.teacher ema"),
        ({"video": {"weight": 0.5}}, "targets.video.weight 1.0; this command has targets.video.weight 0.5"),
        ({"video": {"name": "other"}}, r"targets \['pixels', 'clip', 'video'\]; this command has"),
    ],
)
def test_what_a_target_is_stays(edits: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_unchanged(Path("x"), teachers(), teachers(**edits))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(4):
        encode(folder / f"{number}.mp4", 8)
    (folder / "list.txt").write_text("".join(f"{number}.mp4 {number % 2}\n" for number in range(4)))
    return folder


def arguments(clips: Path, output: Path, *edits: str) -> list[str]:
    names = [f"--data.train={clips / 'list.txt'}", f"--data.root={clips}", f"--output={output}", "--data.stride=1"]
    short = ["--data.workers=0", "--device=cpu", "--train.precision=fp32", "--train.batch_size=2", "--data.reader=pyav"]
    return [*names, *short, *TINY, "--optim.warmup_epochs=0", "--train.max_steps=2", "--train.log_every=1", *edits]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    pretrain(parse(PretrainConfig, arguments(clips, output)))
    return output


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        ("--model.heads=2", "model.heads"),
        ("--model.widths=[16,32,48]", "model.widths"),
        ("--seed=3", "seed"),
        ("--model.target=patch", "model.target"),
        ("--train.max_steps=4", "train.max_steps"),
        ("--optim.lr=0.1", "optim.lr"),
    ],
)
def test_a_fixed_field_is_refused_by_name_and_nothing_is_written(
    clips: Path, finished: Path, capsys: pytest.CaptureFixture, edit: str, name: str
) -> None:
    before = contents(finished)
    assert run_cli("pretrain", arguments(clips, finished, edit)) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{finished} was begun with" in error
    assert name in error
    assert contents(finished) == before


@pytest.mark.parametrize("field", ["mask.count", "model.mlp_ratio", "data.max_side", "targets"])
def test_a_run_without_a_later_field_had_its_default(
    clips: Path, finished: Path, tmp_path: Path, field: str, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*/checkpoint.json"):
        state = json.loads(path.read_text())
        *group, name = field.split(".")
        del (state["config"][group[0]] if group else state["config"])[name]
        path.write_text(json.dumps(state))
    edits = {"mask.count": "2", "model.mlp_ratio": "2", "data.max_side": "64", "targets": "[{name: e, teacher: ema}]"}
    assert run_cli("pretrain", arguments(clips, tmp_path / "run", f"--{field}={edits[field]}")) == 1
    assert f"was begun with {field} " in capsys.readouterr().err
    assert run_cli("pretrain", arguments(clips, tmp_path / "run")) == 0
    assert "changed since" not in capsys.readouterr().out


def test_fields_added_later_keep_the_value_that_earlier_runs_had() -> None:
    """Runs that lack a field are taken to have its default."""
    assert fields()["mask.count"] == 1
    assert fields()["targets"] == []


def test_what_may_change_is_told_and_the_earlier_configuration_is_kept(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pretrain(parse(PretrainConfig, arguments(clips, tmp_path / "run")))
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    moved = tmp_path / "moved"
    shutil.copytree(clips, moved)
    capsys.readouterr()
    pretrain(parse(PretrainConfig, arguments(moved, tmp_path / "run", "--train.log_every=2")))
    said = capsys.readouterr().out
    assert f"changed since the run began: data.root: {clips} -> {moved}" in said
    assert "log_every" not in said
    assert f"{tmp_path / 'run'} is finished: all of its 2 steps are done and nothing is trained" in said
    assert (tmp_path / "run" / "config.before_step_2.yaml").read_bytes() == before
    assert "log_every: 2" in (tmp_path / "run" / "config.yaml").read_text()


def test_the_first_configuration_of_a_step_is_kept(tmp_path: Path) -> None:
    """Changed at step 10, killed before the next checkpoint, and changed again: the first made the steps before 10."""
    for step, lr in ((0, 1), (10, 2), (10, 3)):
        write_config(tmp_path, {"lr": lr}, step)
    assert (tmp_path / "config.before_step_10.yaml").read_text() == "lr: 1\n"
    assert (tmp_path / "config.yaml").read_text() == "lr: 3\n"


def test_a_run_on_the_cpu_says_so_on_a_machine_with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "a GPU")
    with RankLog(tmp_path, DistInfo(0, 1, torch.device("cpu"))):
        pass
    assert json.loads((tmp_path / "logs" / "rank_0000.jsonl").read_text())["device"] != "a GPU"
    assert describe_process(DistInfo(0, 1, torch.device("cuda:0")))["device"] == "a GPU"


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == choose_device("auto", local_rank=1) == torch.device("cuda:1")
    with pytest.raises(UserError, match=r"device is 'cuda:5', and there are 2 CUDA devices; expected a number below 2"):
        choose_device("cuda:5")
    with pytest.raises(UserError, match="at most 2 processes a machine"):
        choose_device("cuda", local_rank=2)


def test_another_list_under_the_same_name_is_refused(clips: Path, tmp_path: Path) -> None:
    shutil.copytree(clips, tmp_path / "data")
    pretrain(parse(PretrainConfig, arguments(tmp_path / "data", tmp_path / "run")))
    path = tmp_path / "data" / "list.txt"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match=r"the records of .*list.txt are not those that .*run began with"):
        pretrain(parse(PretrainConfig, arguments(tmp_path / "data", tmp_path / "run")))


def test_a_probe_that_is_fitted_at_once_does_not_hide_below_a_trained_run(clips: Path, tmp_path: Path) -> None:
    finetune(parse(FinetuneConfig, arguments(clips, tmp_path)))
    with pytest.raises(UserError, match=r"holds a trained run \(step_00000002\); give another --output"):
        finetune(parse(FinetuneConfig, arguments(clips, tmp_path, "--model.probe=knn")))


def test_a_folder_has_one_writer(clips: Path, tmp_path: Path) -> None:
    """Until its process dies: a forked child, as a loading process is one, does not prolong it."""
    holder = (
        "import os, sys, time, torch; from pathlib import Path; from video_convmae.engine.run_folder import claim\n"
        "from video_convmae.engine.distributed import DistInfo\n"
        f"with claim(Path({str(tmp_path)!r}), DistInfo(0, 1, torch.device('cpu'))):\n"
        "    child = os.fork()\n"
        "    print(child, flush=True) if child else None\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on .*; expected one run a folder"):
            pretrain(parse(PretrainConfig, arguments(clips, tmp_path)))
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
        process.kill()
        process.wait()
        pretrain(parse(PretrainConfig, arguments(clips, tmp_path)))
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_wrong_root_is_one_line_and_no_run(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command: str
) -> None:
    edited = arguments(clips, tmp_path / "run", f"--data.root={clips / 'vidoes'}")
    assert run_cli(command, edited) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert f"data.root is '{clips / 'vidoes'}', which is no folder here" in error
    assert not (tmp_path / "run").exists()


def test_a_list_of_which_nothing_can_be_read_is_met_before_the_first_step(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    assert run_cli("pretrain", arguments(clips, tmp_path / "run", f"--data.root={tmp_path / 'empty'}")) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "none of 4 records of" in error
    assert str(tmp_path / "empty" / "0.mp4") in error
    assert not (tmp_path / "run").exists()


def test_evaluate_of_a_moved_run_says_whence_a_path_came(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(clips, tmp_path / "data")
    finetune(parse(FinetuneConfig, arguments(tmp_path / "data", tmp_path / "run")))
    shutil.rmtree(tmp_path / "data")
    capsys.readouterr()
    asked = [f"--weights={tmp_path / 'run'}", f"--output={tmp_path / 'test'}", "--device=cpu"]
    assert run_cli("evaluate", [*asked, f"--list={clips / 'list.txt'}"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert f"data.root of {tmp_path / 'run'} is '{tmp_path / 'data'}', which is no folder here" in error
    assert run_cli("evaluate", [*asked, f"--list={clips / 'list.txt'}", f"--root={clips}"]) == 0
    assert json.loads((tmp_path / "test" / "metrics.json").read_text())["scored"] == 4


def test_more_workers_than_cores_are_capped_with_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert cap_workers(6, ALONE) == 6
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cap_workers(6, ALONE) == 1
    assert capsys.readouterr().out == "data.workers is 6 for each of 4 devices, on 6 cores: 1 are used\n"
    assert cap_workers(6, replace(ALONE, rank=1)) == 1
    assert capsys.readouterr().out == ""
    assert cap_workers(0, ALONE) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_one_line(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_cli("pretrain", arguments(clips, tmp_path / "run", "--device=cuda")) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "device is 'cuda', and PyTorch finds no CUDA device; expected cpu or auto" in error
