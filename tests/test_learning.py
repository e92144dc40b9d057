"""A run says whether it learns: probes beside pretraining, losses and accuracies beside those of trivial answers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import encode
from processes import torchrun
from test_finetune import ENVIRONMENT, ROOT, load_state

from video_convmae import create_autoencoder, masking
from video_convmae.cli.parser import parse
from video_convmae.cli.pretrain import pretrain
from video_convmae.config import PretrainConfig
from video_convmae.data.records import ListError
from video_convmae.engine import probing
from video_convmae.engine.evaluation import Evaluation
from video_convmae.engine.log import judge_pretraining
from video_convmae.engine.options import ProbeConfig
from video_convmae.models.autoencoder import predict_nothing

VALUES = ["probe_knn_top1", "probe_linear_top1", "probe_rank", "probe_std"]


# Features


def test_the_effective_rank_of_known_matrices() -> None:
    rng = np.random.default_rng(0)
    turned = np.linalg.qr(rng.normal(size=(30, 7)))[0]
    assert probing.effective_rank(3 * turned) == pytest.approx(7)
    assert probing.effective_rank(np.outer(rng.normal(size=30), rng.normal(size=7))) == pytest.approx(1)
    assert probing.effective_rank(np.diag([2.0, 1, 1])) == pytest.approx(2**0.5 * 4**0.5)  # shares 1/2, 1/4, 1/4
    assert probing.effective_rank(np.zeros((4, 3))) == 0


def features_of(classes: int, distance: float, width: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    labels = np.arange(40 * classes) % classes
    centres = rng.normal(size=(classes, width))
    return (distance * centres[labels] + rng.normal(size=(len(labels), width))).astype(np.float32), labels


def test_probes_read_classes_where_there_are_some() -> None:
    features, labels = features_of(4, 5.0)
    values = probing.probe_features(features, labels, probing.first_half(labels))
    assert values["knn_top1"] == values["linear_top1"] == 1
    features, labels = features_of(4, 0.0)
    values = probing.probe_features(features, labels, probing.first_half(labels))
    assert 0.1 < values["knn_top1"] < 0.4
    assert 0.1 < values["linear_top1"] < 0.4
    assert values["std"] == pytest.approx(1, rel=0.1)
    collapsed = probing.probe_features(np.ones_like(features), labels, probing.first_half(labels))
    assert (collapsed["rank"], collapsed["std"]) == (pytest.approx(1), 0)


def test_probes_of_too_little_are_none() -> None:
    for count in (0, 1):
        values = probing.probe_features(np.ones((count, 4), np.float32), np.zeros(count, int), np.ones(count, bool))
        assert values["knn_top1"] is values["linear_top1"] is None
    two = probing.probe_features(np.eye(2, dtype=np.float32), np.arange(2), np.array([True, False]))
    assert two["knn_top1"] == two["linear_top1"] == 0  # each half knows the other's class only


def test_records_are_chosen_evenly_whatever_the_order_of_the_list() -> None:
    for labels in (np.arange(80) % 8, np.arange(80) // 10):
        chosen = probing.choose_records(labels, 16)
        assert sorted(set(chosen)) == chosen.tolist()
        assert np.bincount(labels[chosen]).tolist() == [2] * 8
        assert np.bincount(labels[chosen][probing.first_half(labels[chosen])]).tolist() == [1] * 8


@pytest.mark.parametrize(("steps", "cost"), [(60, 1.0), (600, 1.0), (6000, 1.4), (100_000, 3.0)])
@pytest.mark.parametrize("config", [ProbeConfig("list"), ProbeConfig("list", every=2)], ids=["auto", "every"])
def test_measurements_take_a_twentieth_of_the_time(config: ProbeConfig, steps: int, cost: float) -> None:
    plan = probing.plan_probe(config, steps=steps, steps_per_epoch=50, batch=32, cost=cost, available=4000, classes=8)
    times = 1 + -(-steps // plan.every)
    assert times * plan.records * cost <= 0.05 * steps * 32 or plan.records == 16  # two a class at least
    assert plan.records <= 4000
    if config.every is None:
        assert 2 <= times <= 20
        assert plan.records >= min(160, int(0.05 * steps * 32 / cost / 2))
    else:
        assert plan.every == 100


# Runs


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(8):
        encode(folder / f"{i}.mp4", 20 + i, seed=i % 4)
    (folder / "bad.mp4").write_text("no video")
    (folder / "list.txt").write_text("".join(f"{i}.mp4 {i % 4}\n" for i in range(8)))
    (folder / "with_bad.txt").write_text("".join(f"{i}.mp4 {i % 4}\n" for i in range(8)) + "bad.mp4 1\n")
    return folder


def arguments(videos: Path, output: Path, *edits: str) -> list[str]:
    return [
        f"--config={ROOT / 'configs' / 'debug' / 'pretrain.yaml'}",
        f"--data.train={videos / 'list.txt'}",
        f"--data.root={videos}",
        "--data.reader=pyav",
        "--data.workers=0",
        "--model.image_size=32",
        "--device=cpu",
        f"--output={output}",
        *edits,
    ]


def run(videos: Path, output: Path, *edits: str) -> list[dict]:
    pretrain(parse(PretrainConfig, arguments(videos, output, *edits)))
    return log(output)


def log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def probed(lines: list[dict]) -> dict[int, list]:
    return {line["step"]: [line[name] for name in VALUES] for line in lines if "probe_scored" in line}


def test_a_probe_is_logged_and_changes_nothing(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    edits = ("--model.drop_path=0.2", "--train.ema=0.5", "--train.save_every=9")
    probe = (f"--probe.list={videos / 'with_bad.txt'}", "--probe.every=0.75", "--probe.records=9")
    plain = run(videos, tmp_path / "plain", *edits)
    lines = run(videos, tmp_path / "probed", *edits, *probe)
    assert list(probed(lines)) == [0, 3, 6, 8]
    for line in lines:
        if "probe_scored" in line:
            assert "loss" not in line
            assert (line["probe_scored"], line["probe_failed"]) == (8, 1)
            assert 0 <= line["probe_linear_top1"] <= 1 <= line["probe_rank"] <= 8
    said = capsys.readouterr().out
    assert "9 of the 9 records" in said
    assert "step 0/8  probe: nearest neighbours" in said
    assert "bad.mp4" in (tmp_path / "probed" / "probe" / "bad_records.jsonl").read_text()
    losses = [[line["loss"] for line in each if "loss" in line] for each in (plain, lines)]
    assert losses[0] == losses[1]
    for part in ("model", "ema", "optimizer"):
        ours, theirs = (load_state(tmp_path / name, part)[part] for name in ("probed", "plain"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    steps = [[path.name for path in (tmp_path / name / "checkpoints").iterdir()] for name in ("plain", "probed")]
    assert steps[0] == steps[1] == ["step_00000008"]  # none is marked as the best
    metrics = json.loads((tmp_path / "probed" / "metrics.json").read_text())
    assert [metrics[name] for name in VALUES] == probed(lines)[8]


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_probe_is_the_same_for_any_number_of_processes(videos: Path, tmp_path: Path, parallel: str) -> None:
    edits = (f"--probe.list={videos / 'with_bad.txt'}", "--train.epochs=1", "--optim.lr=0")
    one = probed(run(videos, tmp_path / "one", *edits, "--train.batch_size=4"))
    program = torchrun(2, str(ROOT / "tools" / "pretrain.py"), *arguments(videos, tmp_path / "two", *edits))
    subprocess.run([*program, f"--train.parallel={parallel}"], env=ENVIRONMENT, check=True, timeout=300)
    assert probed(log(tmp_path / "two")) == one
    assert list(one) == [0, 2]


def test_a_run_that_was_killed_while_it_measured_does_so_again(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = (f"--probe.list={videos / 'list.txt'}", "--probe.every=1", "--train.save_every=1")
    whole = run(videos, tmp_path / "whole", *edits)
    measured = probing.probe_features

    def killed(*arrays: np.ndarray) -> dict:
        if list((tmp_path / "killed" / "checkpoints").glob("step_*")):
            raise KeyboardInterrupt
        return measured(*arrays)

    with monkeypatch.context() as patch:
        patch.setattr(probing, "probe_features", killed)
        with pytest.raises(KeyboardInterrupt):
            run(videos, tmp_path / "killed", *edits)
    assert list(probed(log(tmp_path / "killed"))) == [0]
    lines = run(videos, tmp_path / "killed", *edits)
    assert probed(lines) == probed(whole)
    assert list(probed(lines)) == [0, 4, 8]


def test_a_probe_needs_labels_and_two_classes(videos: Path, tmp_path: Path) -> None:
    for content, message in (("0.mp4\n1.mp4 1\n", "has no label"), ("0.mp4 1\n1.mp4 1\n", "has one class")):
        (videos / "odd.txt").write_text(content)
        with pytest.raises(ListError, match=message):
            run(videos, tmp_path, f"--probe.list={videos / 'odd.txt'}")


# The loss beside that of predicting nothing


@pytest.mark.parametrize("kind", ["patch", "patch_channel", "none"])
def test_predicting_nothing(kind: str) -> None:
    torch.manual_seed(0)
    model = create_autoencoder("tiny", num_frames=4, image_size=32, target=kind)
    clips = torch.randn(2, 3, 4, 32, 32)
    clips[0] = clips[0] * 0.5 + 2
    clips[1, :, :2] = 1.0  # patches of one colour
    visible = torch.stack([masking.random(model.grid, 0.5, torch.Generator().manual_seed(i)) for i in range(2)])
    output = model(clips, visible)
    nothing = predict_nothing(clips, visible, output.target, model.target)
    if kind == "none":
        shown = visible[:, None].repeat_interleave(2, 2).repeat_interleave(16, 3).repeat_interleave(16, 4)
        expected = []
        for clip, seen in zip(clips, shown.expand_as(clips)):
            colour = torch.stack([clip[c][seen[c]].mean() for c in range(3)])[:, None, None, None]
            expected.append((clip - colour).square()[~seen].mean())
        assert nothing == pytest.approx(float(sum(expected) / 2), rel=1e-5)
    else:
        values = 2 * 16 * 16 * (3 if kind == "patch" else 1)
        flat = float((~visible[1, 0]).sum() / (~visible).sum())  # predicting them costs nothing
        assert nothing == pytest.approx((values - 1) / values * (1 - flat), rel=1e-3)


def test_a_model_that_predicts_nothing_is_told_so(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = run(videos, tmp_path, "--optim.lr=0", "--train.epochs=1")
    said = capsys.readouterr().out
    assert f"loss {lines[-1]['loss']:.4f} (predicting nothing: {lines[-1]['loss_nothing']:.4f})" in said
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["learned"] is False
    assert metrics["verdict"] in said
    assert metrics["verdict"].startswith("hardly better than predicting nothing, which costs")


def test_the_verdict_on_pretraining_is_five_percent() -> None:
    assert judge_pretraining(0.94, 1.0) == {"learned": True, "verdict": None}
    assert judge_pretraining(0.96, 1.0)["learned"] is False
    assert "not finite" in judge_pretraining(None, 1.0)["verdict"]


def test_a_run_whose_features_die_says_so_though_its_loss_falls() -> None:
    probes = [{"probe_rank": rank, "probe_std": std} for rank, std in ((26.5, 0.195), (5.6, 0.056), (8.8, 0.037))]
    judged = judge_pretraining(0.66, 1.0, probes)  # the study's run with tubes
    assert judged["learned"] is False
    assert "8.8, 26.5 at the start" in judged["verdict"]
    for rank, std in ((49.1, 0.232), (8.8, 0.19), (26.0, 0.05)):  # a rank or a deviation alone may fall
        assert judge_pretraining(0.66, 1.0, [probes[0], {"probe_rank": rank, "probe_std": std}])["learned"] is True


# A classifier beside always answering the largest class


def evaluation_of(labels: list[int], answers: list[int], failed: tuple[int, ...] = ()) -> Evaluation:
    scores = np.eye(3, dtype=np.float32)[answers]
    return Evaluation(scores, np.array(labels), np.isin(np.arange(len(labels)), failed), ())


def test_a_classifier_at_chance_is_told_so() -> None:
    labels = [0] * 50 + [1] * 30 + [2] * 20
    judged = evaluation_of(labels, [0] * 100).judge(["run", "walk", "sit"])
    assert judged["learned"] is False
    assert judged["verdict"].startswith(
        "no better than always answering 'run': top-1 50.0% of 100 records, of which 50"
    )
    metrics = evaluation_of(labels, [0] * 40 + [1] * 60).metrics()
    assert (metrics["largest_class"], metrics["predicted_largest"]) == (0.5, 0.6)
    assert evaluation_of(labels, [0] * 55 + [1] * 5 + [0] * 40).judge()["learned"] is False  # 55%: one standard error
    better = [0] * 50 + [1] * 6 + [0] * 44
    assert evaluation_of(labels, better).judge() == {"learned": True, "verdict": None}
    assert evaluation_of(labels, better, failed=tuple(range(50, 56))).judge()["learned"] is False
    assert evaluation_of([-1, -1], [0, 1]).judge() == {"learned": None, "verdict": None}
