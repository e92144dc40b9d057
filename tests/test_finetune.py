"""tools/finetune.py as a user runs it: from pretrained weights, validated, resumed, on one process and on two."""

from __future__ import annotations

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
from clips import encode
from processes import ENVIRONMENT, torchrun
from states import load_state

from video_convmae import create_autoencoder, create_classifier, load
from video_convmae.build_trainer import build_optimization
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.config import FinetuneConfig
from video_convmae.engine import checkpoint
from video_convmae.engine.optim import parameter_groups
from video_convmae.engine.options import OptimConfig, TrainConfig
from video_convmae.models import positions
from video_convmae.runs import load_classifier
from video_convmae.weights.load import load_weights

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(8):
        encode(folder / f"{i}.mp4", 20 + i, seed=i % 4)
    (folder / "bad.mp4").write_text("no video")
    (folder / "list.txt").write_text("".join(f"{i}.mp4 {i % 4}\n" for i in range(8)))
    (folder / "with_bad.txt").write_text("".join(f"{i}.mp4 {i % 4}\n" for i in range(7)) + "bad.mp4 1\n")
    return folder


def arguments(videos: Path, output: Path, *edits: str, train: str = "list.txt") -> list[str]:
    return [
        f"--config={ROOT / 'configs' / 'debug' / 'finetune.yaml'}",
        f"--data.train={videos / train}",
        f"--data.validation={videos / train}",
        f"--data.root={videos}",
        "--data.reader=pyav",
        "--data.workers=0",
        "--model.image_size=32",
        "--device=cpu",
        f"--output={output}",
        *edits,
    ]


def run(videos: Path, output: Path, *edits: str, **named: str) -> int:
    return finetune(parse(FinetuneConfig, arguments(videos, output, *edits, **named)))


def log(output: Path) -> list[dict]:
    """A line a step: the training's and the validation's together."""
    steps: dict[int, dict] = {}
    for line in map(json.loads, (output / "log.jsonl").read_text().splitlines()):
        steps.setdefault(line["step"], {}).update(line)
    return list(steps.values())


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return load_state(path)["model"]


PLAIN = (
    "--mixing.mixup=0",
    "--mixing.cutmix=0",
    "--data.augmentation.rand_augment=null",
    "--data.augmentation.reprob=0",
)


def test_a_run_keeps_the_last_and_the_best_checkpoint(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    edits = ("--train.batch_size=8", "--optim.lr=2e-3", "--optim.layer_decay=1", "--data.augmentation.crop=whole")
    assert run(videos, tmp_path, *PLAIN, *edits, "--train.epochs=40", "--validate.every=8") == 40
    lines = log(tmp_path)
    validated = {line["step"]: line["val_top1"] for line in lines if "val_top1" in line}
    assert list(validated) == [8, 16, 24, 32, 40]
    metrics, highest = json.loads((tmp_path / "metrics.json").read_text()), max(validated.values())
    assert metrics["best"]["top1"] == highest > 0.5  # eight clips are learnt by heart; chance is 0.25
    best = load_state(tmp_path / "checkpoints" / "best")
    assert best["step"] == metrics["best"]["step"] == next(step for step in validated if validated[step] == highest)
    assert load_state(tmp_path)["step"] == 40
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert metrics["last"] == {"path": "checkpoints/step_00000040", "step": 40, "top1": validated[40]}
    steps = [load_state(tmp_path / metrics[name]["path"])["step"] for name in ("last", "best")]
    assert steps == [40, metrics["best"]["step"]]
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line == (
        f"last checkpoint {tmp_path}/checkpoints/step_00000040 (step 40, validation top-1 {validated[40]:.4f}); "
        f"best checkpoint {tmp_path}/checkpoints/best (step {best['step']}, validation top-1 {highest:.4f})"
    )


def test_pretrained_weights_start_a_classifier_of_other_frames_and_size(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.manual_seed(1)
    pretrained = create_autoencoder("tiny", num_frames=8, image_size=64)
    sizes = {"size": "tiny", "num_frames": 8, "image_size": 64}
    checkpoint.save_checkpoint(tmp_path, 1, {"model": pretrained.state_dict(), "config": {"model": sizes}})
    run(videos, tmp_path / "run", f"--init.weights={tmp_path / 'step_00000001'}", "--optim.lr=0", "--train.epochs=1")
    said = capsys.readouterr().out
    assert "start new: norm.weight, norm.bias, head.weight" in said
    assert "positions resized from the grid (4, 4, 4) to (2, 2, 2)" in said
    assert "4 classes" in said
    ours = weights_of(tmp_path / "run")
    name = "encoder.attention_blocks.3.mlp.fc2.weight"
    assert torch.equal(ours[name], pretrained.state_dict()[name])
    assert ours["head.weight"].std() == pytest.approx(2e-5, rel=0.2)


@pytest.mark.parametrize("size", [32, 64])
def test_an_image_run_starts_a_video_classifier_with_positions_in_time(videos: Path, tmp_path: Path, size: int) -> None:
    image = create_autoencoder("tiny", num_frames=1, image_size=size)
    sizes = {"size": "tiny", "num_frames": 1, "image_size": size}
    checkpoint.save_checkpoint(tmp_path, 1, {"model": image.state_dict(), "config": {"model": sizes}})
    run(videos, tmp_path / "run", f"--init.weights={tmp_path / 'step_00000001'}", "--optim.lr=0", "--train.epochs=1")
    ours = weights_of(tmp_path / "run")["encoder.positions"].view(2, 2, 2, -1)
    expected = positions.sincos((2, size // 16, size // 16), 192)
    expected = positions.resize(expected, (2, size // 16, size // 16), (2, 2, 2)).view(2, 2, 2, -1)
    torch.testing.assert_close(ours, expected)
    assert (ours[0] - ours[1]).abs().max() > 0.1


def test_a_finetuned_model_is_finetuned_for_other_classes_and_sizes(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(videos, tmp_path / "first", "--train.epochs=1")
    (videos / "two.txt").write_text("".join(f"{i}.mp4 {i % 2}\n" for i in range(8)))
    capsys.readouterr()
    larger = ("--model.image_size=48", "--model.num_frames=6", "--train.epochs=1", "--optim.lr=0")
    run(videos, tmp_path / "second", f"--init.weights={tmp_path / 'first'}", *larger, train="two.txt")
    said = capsys.readouterr().out
    assert "positions resized from the grid (2, 2, 2) to (3, 3, 3)" in said
    assert "the head is new: 4 classes in the file, 2 in the model" in said


def test_validation_scores_the_average_of_the_weights(videos: Path, tmp_path: Path) -> None:
    """With a decay of 1 the average is what the run started with: it scores the same at every validation."""
    edits = (
        "--train.ema=1",
        "--optim.lr=3e-3",
        "--optim.layer_decay=1",
        "--train.epochs=4",
        "--model.head_init_std=0.1",
    )
    run(videos, tmp_path, *PLAIN, *edits)
    assert len({line["val_top1"] for line in log(tmp_path) if "val_top1" in line}) == 1
    average, _ = load_classifier(tmp_path)
    last, _ = load_classifier(tmp_path, ema=False)
    assert not torch.equal(average.head.weight, last.head.weight)
    report = load_weights(last, next((tmp_path / "checkpoints").glob("step_*")))
    assert any("an average of the weights lies beside (ema) and is not taken" in note for note in report.notes)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_step(videos: Path, tmp_path: Path, precision: str) -> None:
    assert run(videos, tmp_path, f"--train.precision={precision}", "--train.epochs=1") == 4
    assert all(line["loss"] is not None for line in log(tmp_path))


@pytest.mark.parametrize("edits", [("--optim.optimizer=lars", "--optim.lr=0.5"), ("--model.probe=attentive",)], ids=str)
def test_a_probe_trains_its_head_alone(videos: Path, tmp_path: Path, edits: tuple[str, ...]) -> None:
    edits = ("--model.probe=linear", "--optim.layer_decay=1", "--optim.warmup_epochs=0", *edits)
    run(videos, tmp_path, *PLAIN, "--train.epochs=0.25", *edits)
    before = weights_of(tmp_path)
    run(videos, tmp_path / "on", *PLAIN, "--train.epochs=2", *edits)
    after = weights_of(tmp_path / "on")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head"}


def test_labels_are_checked_before_anything_runs(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has the label 3; expected 0 to 2"):
        run(videos, tmp_path, "--data.num_classes=3")
    (videos / "unlabelled.txt").write_text("0.mp4\n1.mp4\n")
    for edits in (["--data.num_classes=3"], []):
        with pytest.raises(ValueError, match=r"0\.mp4 has no label, like 2 of the 2 records of its list"):
            run(videos, tmp_path, *edits, train="unlabelled.txt")
    assert not list(tmp_path.iterdir())


def test_the_number_of_classes_and_their_names_agree(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    with pytest.raises(ValueError, match=r"data\.num_classes is 4 and there are 5 class names, the first 'one'"):
        run(videos, tmp_path / "run", f"--data.labels={tmp_path / 'names.txt'}", "--data.num_classes=4")


def test_a_run_of_no_steps_is_an_error_of_one_line(videos: Path, tmp_path: Path) -> None:
    """As the tool ends it: what its user can mend is said without a traceback."""
    with pytest.raises(ValueError, match=r"train.epochs is 0.1, with 4 steps an epoch not one step; .* at least 0.25"):
        run(videos, tmp_path / "run", "--train.epochs=0.1")
    command = [sys.executable, str(ROOT / "tools" / "finetune.py")]
    given = [*command, *arguments(videos, tmp_path / "run", "--train.epochs=0.1")]
    result = subprocess.run(given, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert "video-convmae finetune: error: train.epochs is 0.1" in result.stderr
    assert "Traceback" not in result.stderr


def test_clips_are_never_flipped_where_labels_name_left_or_right(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("Pulling something from left to right\nLifting\nTurning\nbright things\n")
    with pytest.raises(ValueError, match="name left or right, or a way to turn, the first 'Pulling"):
        run(videos, tmp_path / "run", f"--data.labels={tmp_path / 'names.txt'}", "--data.augmentation.flip=true")


def test_class_names_become_a_part_of_the_run(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    run(videos, tmp_path / "run", f"--data.labels={tmp_path / 'names.txt'}", "--train.epochs=1")
    (tmp_path / "names.txt").unlink()
    model, config = load_classifier(tmp_path / "run")
    assert config.data.labels == ("one", "two", "three", "four", "five")
    assert len(model.head.bias) == 5


def test_lists_whose_classes_differ_are_not_compared(videos: Path, tmp_path: Path) -> None:
    for name, classes in (("train", "ab"), ("validation", "bc")):
        (tmp_path / f"{name}.txt").write_text(f"{videos / '0.mp4'} 0\n{videos / '1.mp4'} 1\n")
        (tmp_path / f"{name}.labels.txt").write_text("\n".join(classes) + "\n")
    with pytest.raises(ValueError, match="differ, so their numbers mean different things"):
        run(
            videos,
            tmp_path / "run",
            f"--data.validation={tmp_path / 'validation.txt'}",
            train=str(tmp_path / "train.txt"),
        )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("--train.batch_size=3", "make it even"),
        ("--model.probe=linear", "layers are frozen"),
        ("--model.head_dropout=2", "head_dropout is 2.0; expected number (0 or more and less than 1)"),
        ("--data.augmentation.rand_augment=rand-mx", "rand_augment"),
    ],
)
def test_settings_that_cannot_work_are_errors(
    videos: Path, tmp_path: Path, edit: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        run(videos, tmp_path, edit)
    assert message in str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    ("edits", "parallel"),
    [((), "ddp"), pytest.param(("--model.lora_rank=2", "--train.ema=0.5"), "fsdp", marks=pytest.mark.slow)],
    ids=["all weights", "LoRA, sharded"],
)
def test_two_processes_take_the_same_steps(videos: Path, tmp_path: Path, edits: tuple[str, ...], parallel: str) -> None:
    edits = (*PLAIN, "--train.epochs=1", "--optim.warmup_epochs=0", "--validate.batch_size=8", *edits)
    run(videos, tmp_path / "one", *edits, "--train.batch_size=4")
    edits = (*edits, f"--train.parallel={parallel}")
    command = torchrun(2, str(ROOT / "tools" / "finetune.py"), *arguments(videos, tmp_path / "two", *edits))
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=300)
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    assert two[-1]["val_scored"] == one[-1]["val_scored"] == 8
    assert two[-1]["val_top1"] == one[-1]["val_top1"]
    ours, theirs = (load(tmp_path / name / "model.safetensors").model.state_dict() for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4) for name in theirs)


def test_a_run_that_was_killed_while_it_validated_does_so_again(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(videos, tmp_path / "whole", "--train.epochs=2")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("video_convmae.build.evaluate_list", killed)
        with pytest.raises(KeyboardInterrupt):
            run(videos, tmp_path / "killed", "--train.epochs=2")
    assert load_state(tmp_path / "killed")["step"] == 4
    run(videos, tmp_path / "killed", "--train.epochs=2")
    ours, theirs = log(tmp_path / "killed"), log(tmp_path / "whole")
    assert {line["step"]: line["val_top1"] for line in ours if "val_top1" in line} == {
        line["step"]: line["val_top1"] for line in theirs if "val_top1" in line
    }
    assert (tmp_path / "killed" / "checkpoints" / "best").exists()


@pytest.mark.faults
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_ends_with_the_weights_of_an_undisturbed_one(
    videos: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    """Bit for bit; with RandAugment, erasing, mixup, drop path, repeats, an average of the weights and a bad record."""
    edits = ("--model.drop_path=0.2", "--train.ema=0.9", "--data.repeats=2", "--train.epochs=4", "--data.workers=2")
    command = [sys.executable, str(ROOT / "tools" / "finetune.py")]
    whole = [*command, *arguments(videos, tmp_path / "whole", *edits, train="with_bad.txt")]
    subprocess.run(whole, env=ENVIRONMENT, check=True, timeout=300)
    stopped = tmp_path / "stopped"
    again = [*command, *arguments(videos, stopped, *edits, train="with_bad.txt")]
    last = random.Random(int(ending)).randint(2, 14)
    print(f"{ending.name} after step {last}")
    process = subprocess.Popen(again, env=ENVIRONMENT, start_new_session=True)
    deadline = time.monotonic() + 120
    while not ((stopped / "log.jsonl").exists() and len(log(stopped)) >= last):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, ending)
    assert process.wait(60) == (-ending if ending == signal.SIGKILL else 0)
    subprocess.run(again, env=ENVIRONMENT, check=True, timeout=300)
    ours, theirs = weights_of(stopped), weights_of(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    values = ("loss", "val_top1")
    lines = [
        {line["step"]: [line.get(name) for name in values] for line in log(f)} for f in (stopped, tmp_path / "whole")
    ]
    assert lines[0] == lines[1]
    best = [load_state(folder / "checkpoints" / "best")["step"] for folder in (stopped, tmp_path / "whole")]
    assert best[0] == best[1]


def test_learning_rates_follow_the_layer(videos: Path) -> None:
    model = create_classifier("tiny", num_classes=3, num_frames=1, image_size=32)
    scales = model.layer_scales(0.5)
    groups = parameter_groups(model.named_parameters(), 0.05, scales)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found["encoder.positions"] == (0.5**5, 0.0)
    assert found["encoder.conv_stages.0.0.mlp.fc1.weight"] == (0.5**5, 0.05)
    assert found["encoder.attention_blocks.3.mlp.fc1.weight"] == (0.5, 0.05)
    assert found["head.weight"] == (1.0, 0.05)
    assert found["head.bias"] == (1.0, 0.0)
    assert len(found) == len(names)


def test_lars_adapts_matrices_alone(videos: Path) -> None:
    """MAE's rule at weight decay 0: a matrix moves by lr x 0.001 x its norm, a vector by lr x its gradient."""
    model = torch.nn.Linear(8, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = OptimConfig(optimizer="lars", weight_decay=0.0, lr=0.4, warmup_epochs=0, betas=(0.9, 0.999))
    optimizer = build_optimization(model, config, TrainConfig(epochs=1), 4, 4).optimizer
    model(torch.randn(5, 8)).square().sum().backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.4
    optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    assert moved["weight"].norm().item() == pytest.approx(0.4e-3 * before["weight"].norm().item(), rel=1e-4)
    torch.testing.assert_close(moved["bias"], -0.4 * model.bias.grad)


def test_nearest_neighbours_know_what_they_remember(videos: Path, tmp_path: Path) -> None:
    """Clips of a class show the same pictures: with one neighbour's temperature the nearest is of the class."""
    edits = ("--model.probe=knn", "--optim.layer_decay=1", "--data.max_bad_fraction=0.5")
    assert run(videos, tmp_path, *PLAIN, *edits, train="with_bad.txt") == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["fitted"], metrics["val_scored"], metrics["val_failed"]) == (7, 7, 1)
    assert metrics["val_top1"] == 1.0
    assert (tmp_path / "bad_records.jsonl").exists()
    model, _ = load_classifier(tmp_path)
    assert model.head.features.shape == (7, 192)
    shares = model(torch.randn(2, 3, 4, 32, 32)).softmax(dim=1)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("name", ["left_shoe", "Turn Right", "something-left"])
def test_left_and_right_are_found_however_words_are_joined(videos: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "names.txt").write_text(f"{name}\nupright\ncleft\nbright\n")
    with pytest.raises(ValueError, match=f"1 classes name left or right, or a way to turn, the first {name!r}"):
        run(videos, tmp_path / "run", f"--data.labels={tmp_path / 'names.txt'}", "--data.augmentation.flip=true")


def test_parts_of_a_file_may_be_left_out(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(videos, tmp_path / "first", "--train.epochs=1")
    start = (f"--init.weights={tmp_path / 'first'}", "--init.exclude=[head]", "--optim.lr=0", "--train.epochs=1")
    run(videos, tmp_path / "second", *start)
    assert "excluded as asked: head" in capsys.readouterr().out
