"""Mistakes of a user: one line that names the value, the exit code of INTERFACES, and nothing written.

All run in this process. What readers, weights and lists refuse has tests of its own beside those parts.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from clips import encode

from video_convmae import cli
from video_convmae.atomic import read_json, read_json_lines
from video_convmae.bounds import Bounds
from video_convmae.cli.parser import fields_of, parse, within
from video_convmae.config import EvaluateConfig, FeaturesConfig, FinetuneConfig, PretrainConfig
from video_convmae.engine.distributed import init_distributed
from video_convmae.errors import UserError
from video_convmae.weights.files import save_file

SHIPPED = "tiny-moving-digits"
RUN = (
    *("--data.train=list.txt", "--output=out", "--device=cpu", "--data.workers=0", "--data.reader=pyav"),
    *("--model.size=tiny", "--model.num_frames=4", "--model.image_size=32", "--model.strides=[2,2,2]"),
    *("--train.max_steps=2", "--train.batch_size=2", "--optim.warmup_epochs=0", "--train.precision=fp32"),
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a list of text that is no video, and its labels."""
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        Path(f"{number}.mp4").write_text("no video")
    Path("list.txt").write_text("".join(f"{number}.mp4 {number % 2}\n" for number in range(4)))
    Path("without.txt").write_text("0.mp4\n1.mp4\n")
    return tmp_path


def run(command: str, *arguments: str) -> int:
    try:
        return cli.run(command, arguments)
    except SystemExit as end:
        return int(end.code or 0)


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def error_of(capsys: pytest.CaptureFixture) -> str:
    """The only line on standard error."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig, EvaluateConfig, FeaturesConfig])
def test_every_number_of_a_configuration_has_bounds(kind: type) -> None:
    def holds_numbers(each: object) -> bool:
        return each in (int, float) or any(map(holds_numbers, get_args(each)))

    fields = fields_of(kind)
    assert [name for name, field in fields.items() if holds_numbers(field.type) and field.bounds is None] == []
    for name, field in fields.items():
        assert field.bounds is None or field.bounds.contain(field.default), name


def test_bounds() -> None:
    assert [Bounds(least=0, below=1).contain(value) for value in (0, 0.5, 1, -1, float("nan"), None)] == [
        *(True, True, False, False, False, True)
    ]
    assert not Bounds(above=0).contain(0)
    assert not Bounds().contain(float("inf"))
    assert Bounds(most=1).contain((1, 0))
    assert not Bounds(most=1).contain([1, 2])
    assert str(Bounds(above=0, most=1)) == "more than 0 and at most 1"
    assert (str(Bounds(least=1)), str(Bounds(below=2)), str(Bounds())) == ("1 or more", "less than 2", "finite")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("seed=-1", "seed is -1; expected whole number (0 or more"),
        ("train.epochs=0", "train.epochs is 0.0; expected number (more than 0)"),
        ("train.batch_size=0", "train.batch_size is 0; expected whole number (1 or more)"),
        ("train.max_steps=-3", "train.max_steps is -3; expected whole number or null (1 or more)"),
        ("train.log_every=0", "train.log_every is 0; expected"),
        ("train.ema=2", "train.ema is 2.0; expected number or null (0 or more and at most 1)"),
        ("train.keep=0", "train.keep is 0; expected"),
        ("optim.lr=-1", "optim.lr is -1.0; expected"),
        ("optim.lr=.nan", "optim.lr is NaN; expected"),
        ("optim.betas=[1,2]", "optim.betas is [1.0, 2.0]; expected [number, number]"),
        ("data.decode_timeout=0", "data.decode_timeout is 0.0; expected"),
        ("data.max_bad_fraction=2", "data.max_bad_fraction is 2.0; expected"),
        ("data.mean=[0.5]", "data.mean is [0.5]; expected [number, number, number]"),
        ("data.mean=[123.675,116.28,103.53]", "expected [number, number, number] (0 or more and at most 1)"),
        ("data.std=[0,1,1]", "data.std is [0.0, 1.0, 1.0]; expected"),
        ("data.augmentation.area=[1,0.5]", "augmentation.area is [1.0, 0.5]; expected the smaller number first"),
        ("hang_timeout=0", "hang_timeout is 0.0; expected"),
        ("log.trace=-1", "log.trace is -1; expected"),
        ("mask.ratio=1", "mask.ratio is 1.0; expected"),
        ("model.size=giant", "size is 'giant'; expected one of tiny, small"),
        ("model.image_size=33", "image_size is (33, 33); expected multiples of the spatial stride 8"),
        ("model.widths=[48,96]", "differ in length"),
        ("model.widths=[-1,2,3]", "model.widths is [-1, 2, 3]; expected"),
        ("model.widths=[48,96,189]", "widths is (48, 96, 189); expected a multiple of 4 as the last"),
        ("model.heads=5", "heads is 5; expected a number that divides the last of widths, 192"),
        ("model.heads=-1", "model.heads is -1; expected"),
        ("model.strides=[0,1,1]", "model.strides is [0, 1, 1]; expected"),
        ("model.temporal_kernel=2", "temporal_kernel is 2 and spatial_kernel 5; expected odd ones"),
        ("model.decoder=[96,2,5]", "decoder is (96, 2, 5); expected a width that 4 and the number of heads divide"),
        ("model.drop_path=1", "model.drop_path is 1.0; expected"),
        ("output=", "output is empty; expected text"),
    ],
)
def test_a_wrong_value_is_a_wrong_command_line(edit: str, message: str, capsys: pytest.CaptureFixture) -> None:
    assert run("pretrain", *RUN, f"--{edit}") == 2
    assert message in error_of(capsys)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("predict w f --top=0", "argument --top: it is '0'; expected whole number (1 or more)"),
        ("reconstruct w f --output=o --seed=-1", "argument --seed: it is '-1'; expected"),
        ("make-list folders --root=. --out=l --validation-fraction=2", "argument --validation-fraction: it is '2'"),
        ("check-videos list.txt --out=o --timeout=nan", "argument --timeout: it is 'nan'; expected number"),
        ("pack-videos list.txt --out=o --crf=99", "expected whole number (0 or more and at most 51)"),
        ("pack-videos list.txt --out=o --speed=warp", "invalid choice: 'warp'"),
        ("submit --processes-per-node=-1 -- pretrain", "argument --processes-per-node: it is '-1'; expected"),
        ("benchmark step --batch=0", "argument --batch: it is '0'; expected"),
        ("convert w .", "argument output: it is '.'; expected the path of a file"),
    ],
)
def test_options_of_commands_have_bounds(command: str, message: str, capsys: pytest.CaptureFixture) -> None:
    before = files()
    assert run(*command.split()) == 2
    assert message in error_of(capsys)
    assert files() == before


def test_a_bounded_option_reads_numbers() -> None:
    assert (within(int, least=1)("7"), within(float, above=0)("0.5")) == (7, 0.5)


# ---- configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "c.yaml is no YAML: line 2: seed is given twice"),
        ("train: {epochs: 1}\ndata: {}\ntrain: {keep: 1}\n", "line 3: train is given twice"),
        ("train: 5\n", "c.yaml: train is 5; expected its fields and their values below it"),
        ("train:\n", "c.yaml: train is None; expected its fields"),
        ("extends: 5\n", "c.yaml extends 5; expected the name or the path of one configuration"),
        ("extends: [a, b]\n", "c.yaml extends ['a', 'b']; expected"),
        ("data:\n\ttrain: x\n", "c.yaml is no YAML: line 2: found character '\\t'"),
        ("1: 2\n", "there is no field 1"),
        ("seed: !!python/name:os.system\n", "could not determine a constructor"),
        ("train: {batch_size: 0}\n", "train.batch_size is 0; expected whole number (1 or more)"),
    ],
)
def test_a_wrong_configuration(text: str, message: str, capsys: pytest.CaptureFixture) -> None:
    Path("c.yaml").write_text(text)
    assert run("pretrain", "--config=c.yaml", "--data.train=list.txt", "--output=out") == 2
    assert message in error_of(capsys)


def test_a_configuration_may_be_utf_16() -> None:
    Path("c.yaml").write_bytes("seed: 5\n".encode("utf-16"))
    assert parse(PretrainConfig, ["--config=c.yaml", *RUN]).seed == 5


# ---- runs and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("pretrain", ["--data.train=no.txt"], "cannot read the list no.txt: No such file or directory"),
        ("pretrain", ["--device=gpu"], "device is 'gpu'; expected auto, cpu, cuda, or one device such as cuda:1"),
        ("pretrain", ["--device=cpu:7"], "device is 'cpu:7'; expected"),
        ("pretrain", ["--model.channels=1"], "model.channels is 1; expected 3"),
        ("pretrain", ["--mask.ratio=0.001"], "mask.ratio is 0.001, which hides none of 32 tokens"),
        ("pretrain", ["--mask.decoder_ratio=0.001"], "mask.decoder_ratio 0.001: a share of 0.001 of 28 hidden"),
        ("pretrain", [], "none of 4 records of list.txt that were tried can be read (0.mp4: "),
        ("finetune", ["--data.train=without.txt"], "0.mp4 has no label, like 2 of the 2 records"),
        ("finetune", ["--data.labels=nope"], "cannot read the class names 'nope'"),
        ("finetune", ["--model.probe=knn"], "none of 4 records of list.txt that were tried can be read (0.mp4: "),
    ],
)
def test_a_run_that_cannot_begin_writes_nothing(
    command: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    before = files()
    assert run(command, *RUN, *arguments) == 1
    assert message in error_of(capsys)
    assert files() == before


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("features", ["--weights=no.pth", "--list=list.txt", "--output=o"], "no checkpoint at no.pth: expected a file"),
        ("features", ["--weights=https://x.y/z.pth", "--list=list.txt", "--output=o"], "no checkpoint at https://x.y/"),
        ("features", [f"--weights={SHIPPED}", "--list=list.txt", "--output=o", "--device=tpu"], "device is 'tpu'"),
        ("reconstruct", [SHIPPED, "0.mp4", "--output=o"], "0.mp4: InvalidDataError"),
        ("reconstruct", [SHIPPED, "no.mp4", "--output=o"], "no.mp4: FileNotFoundError"),
        ("show-features", [SHIPPED, "0.mp4", "--output=o.png", "--label=0"], "was pretrained only and has no classes"),
        ("convert", [SHIPPED, "o.pth", "--to=convmae"], f"{SHIPPED} cannot be written as convmae: the ConvMAE format"),
        ("convert", [SHIPPED, "list.txt/o.pth"], "a file lies where a folder is expected: give another path"),
        ("inflate", [SHIPPED, "o.pth"], f"{SHIPPED}: only image weights can be inflated"),
        ("make-list", ["folders", "--root=no", "--out=l.txt"], "no"),
        (
            "check-videos",
            ["list.txt", "--out=list.txt", "--reader=pyav"],
            "list.txt: File exists; a file lies where a folder",
        ),
        ("pack-videos", ["list.txt", "--root=no", "--out=o"], "--root no is not a folder"),
        ("benchmark", ["step", "--device=gpu"], "device is 'gpu'; expected"),
        ("benchmark", ["loader", "--json=list.txt/x"], "list.txt: File exists; a file lies where a folder"),
    ],
)
def test_a_command_that_cannot_do_its_job_writes_nothing(
    command: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    before = files()
    assert run(command, *arguments) == 1
    assert message in error_of(capsys)
    assert files() == before


def test_lists_beside_the_training_list_are_tried_before_the_first_step(capsys: pytest.CaptureFixture) -> None:
    for number in range(4):
        encode(Path(f"good{number}.mp4"), 8)
    Path("good.txt").write_text("".join(f"good{number}.mp4 {number % 2}\n" for number in range(4)))
    for command, option in (("pretrain", "probe.list"), ("finetune", "data.validation")):
        assert run(command, *RUN, "--data.train=good.txt", f"--{option}=list.txt") == 1
        assert "none of 4 records of list.txt that were tried can be read" in error_of(capsys)
        assert not Path("out").exists()


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        group = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in group.items():
            monkeypatch.setenv(name, str(value))
        with (
            pytest.raises(UserError, match=f"cannot meet at 127.0.0.1:{port} .*another program may have this port"),
            init_distributed("cpu"),
        ):
            pass


def test_damaged_files_of_a_run_are_named() -> None:
    Path("log.jsonl").write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 3')
    with pytest.raises(UserError, match=r"log\.jsonl, line 2 is damaged: .* remove this line"):
        read_json_lines(Path("log.jsonl"))
    Path("log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')  # a kill, while the last line was written
    assert read_json_lines(Path("log.jsonl")) == [{"step": 1}, {"step": 2}]
    with pytest.raises(UserError, match=r"list\.txt is damaged, or was edited"):
        read_json(Path("list.txt"))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_weights_are_written_whole_or_not_at_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(2)}, Path("new") / name)
    before = files()

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", name)

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_file({"a": torch.zeros(2)}, Path("new") / name)
    assert files() == before


# ---- errors that no part of ours raises -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), "out/x: No space left on device; the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "out: Permission denied; this user may not"),
        (
            ModuleNotFoundError("No module named 'sklearn'", name="sklearn.svm"),
            "sklearn is not installed: pip install",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate"),
            "out of memory: CUDA out of memory. Tried",
        ),
        (RuntimeError("[enforce fail] err == 0. can't allocate memory: 9 bytes"), "expected a smaller train.batch_"),
    ],
)
def test_errors_of_the_system_say_what_to_do(error: Exception, message: str, capsys: pytest.CaptureFixture) -> None:
    def work() -> None:
        raise error

    assert cli.report_errors("video-convmae pretrain", work) == 1
    assert message in error_of(capsys)


WITH_CONFIGURATION = ("pretrain", "finetune", "train-detection", "train-segmentation", "evaluate", "features")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_advice_where_memory_ran_out_names_options_of_the_command(command: str, capsys: pytest.CaptureFixture) -> None:
    def work() -> None:
        raise MemoryError("9 bytes")

    assert cli.report_errors(f"video-convmae {command}", work) == 1
    advice = error_of(capsys).partition("9 bytes; ")[2]
    assert advice
    with pytest.raises(SystemExit):
        cli.run(command, ["--help-all" if command in WITH_CONFIGURATION else "--help"])
    said = capsys.readouterr().out
    for option in re.findall(r"--\w+|\w+\.\w+", advice):
        assert option.lstrip("-") in said, option


def test_tools_of_a_clone_report_as_commands_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        assert sys.argv == ["clips"]
        raise UserError("data is x")

    monkeypatch.setattr(sys, "argv", ["clips"])
    assert cli.run_tool("tools.study.clips", main) == 1
    assert error_of(capsys) == "tools.study.clips: error: data is x"
    monkeypatch.setattr(sys, "argv", ["clips", "--debug"])
    with pytest.raises(UserError):
        cli.run_tool("tools.study.clips", main)
