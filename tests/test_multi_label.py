"""Records with several classes each: lists, targets, mAP and F1, a run and its evaluation."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import encode
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score
from test_finetune import run

from video_convmae import load
from video_convmae.cli.evaluate import evaluate
from video_convmae.cli.parser import parse
from video_convmae.config import EvaluateConfig, FinetuneConfig, LabelledDataConfig
from video_convmae.data.labels import check_labels, count_labels
from video_convmae.data.mixing import Mixing
from video_convmae.data.options import MixingConfig
from video_convmae.data.records import ListError, Record, Records, format_line, parse_line, read_list
from video_convmae.engine.distributed import init_distributed
from video_convmae.engine.evaluation import Evaluation, macro_f1, mean_average_precision
from video_convmae.lists import has_several_labels
from video_convmae.models.sizes import ClassifierConfig
from video_convmae.visualize.report import make_report
from video_convmae.visualize.run_facts import read_run

SMALL = ("--model.widths=[16,24,32]", "--model.depths=[1,1,1]", "--model.heads=2", "--validate.batch_size=8")


# Lists


@pytest.mark.parametrize(
    ("line", "format", "record"),
    [
        ("a b.mp4 3,7", "video", Record("a b.mp4", 3, None, "video", (7,))),
        ("folder 12 0,4,9", "frames", Record("folder", 0, 12, "frames", (4, 9))),
        ("x.png 2", "image", Record("x.png", 2, None, "image")),
    ],
)
def test_a_label_may_be_several(line: str, format: str, record: Record) -> None:
    assert parse_line(line, format) == record
    assert parse_line(format_line(record), format) == record


def test_a_list_of_several_classes(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.mp4 3,0\nb.mp4 1\nc.mp4\n")
    records = read_list(tmp_path / "list.txt")
    assert records.is_multi_label
    assert [record.labels for record in records] == [(3, 0), (1,), ()]
    assert records.targets(4).tolist() == [[True, False, False, True], [False, True, False, False], [False] * 4]
    assert count_labels(records) == 4
    assert records.select(np.array([1, 2])).is_multi_label is False
    (tmp_path / "other.txt").write_text("a.mp4 3,1\nb.mp4 1\nc.mp4\n")
    assert read_list(tmp_path / "other.txt").digest() != records.digest()
    with pytest.raises(ListError, match=r"a\.mp4 has the label 3; expected 0 to 2"):
        check_labels(records, 3, least=-1)


def test_lines_that_only_look_like_several_classes(tmp_path: Path) -> None:
    """A name that ends so is a file's if it is there; other programs' lines are still told apart."""
    (tmp_path / "take 1,2").write_text("")
    (tmp_path / "list.txt").write_text("take 1,2\n")
    assert read_list(tmp_path / "list.txt", root=tmp_path)[0].label is None
    for line, message in [
        ("a.mp4, 3,7", "separates the fields"),
        ("a.mp4,3", "separates the fields"),
        ("a.mp4 3,3", "expected different classes, each once"),
        ("a.mp4 5 3,7", "2 numbers stand behind the file name"),
    ]:
        (tmp_path / "list.txt").write_text(f"{line}\n")
        with pytest.raises(ListError, match=message):
            read_list(tmp_path / "list.txt", root=tmp_path)


# Metrics


cases = st.integers(0, 2**31)


@given(seed=cases, records=st.integers(1, 30), classes=st.integers(1, 6), levels=st.sampled_from([2, 5, 1000]))
def test_map_and_f1_are_scikit_learns(seed: int, records: int, classes: int, levels: int) -> None:
    """With many equal scores too."""
    random = np.random.default_rng(seed)
    targets = random.random((records, classes)) < 0.4
    scores = (random.integers(0, levels, (records, classes)) / levels).astype(np.float32)
    seen = targets.any(axis=0)
    if seen.any():
        expected = average_precision_score(targets[:, seen], scores[:, seen], average="macro")
        assert mean_average_precision(targets, scores) == pytest.approx(expected, abs=1e-9)
    else:
        assert mean_average_precision(targets, scores) is None
    expected = f1_score(targets, scores > 0.5, average="macro", zero_division=0) if classes > 1 else None
    if expected is not None:
        assert macro_f1(targets, scores > 0.5) == pytest.approx(expected, abs=1e-9)
    labels, answers = targets.sum(axis=1), scores.argmax(axis=1)
    metrics = Evaluation(np.eye(8, dtype=np.float32)[answers], labels, np.zeros(records, bool), ()).metrics()
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, answers, average="macro", zero_division=0), abs=1e-9)


def evaluation(targets: np.ndarray, scores: np.ndarray) -> Evaluation:
    labels = np.where(targets.any(axis=1), targets.argmax(axis=1), -1)
    return Evaluation(scores.astype(np.float32), labels, np.zeros(len(labels), bool), (), 0, targets)


def test_map_is_judged_by_chance() -> None:
    """Scores that tell nothing are not above it, even of few records, whose mAP is then above the classes' shares."""
    random = np.random.default_rng(0)
    learned = []
    for _ in range(100):
        targets, scores = random.random((12, 4)) < 0.3, random.random((12, 4))
        judged = evaluation(targets, scores).judge()
        learned.append(judged["learned"])
        assert (judged["verdict"] is None) == judged["learned"]
    assert 5 < sum(learned) < 35  # 16% of a normal distribution lie above a standard deviation
    assert "no better than chance: mAP " in (evaluation(targets, np.full((12, 4), 0.3)).judge()["verdict"] or "")
    assert evaluation(targets, targets + scores).judge() == {"learned": True, "verdict": None}
    assert evaluation(targets[:0], scores[:0]).judge() == {"learned": None, "verdict": None}


# Mixing


@given(seed=cases, smoothing=st.sampled_from([0.0, 0.1]), kind=st.sampled_from([(0.8, 0.0), (0.0, 1.0), (0.0, 0.0)]))
def test_mixed_clips_have_the_shares_of_both_clips_classes(seed: int, smoothing: float, kind: tuple) -> None:
    mixup, cutmix = kind
    config = MixingConfig(mixup=mixup, cutmix=cutmix, smoothing=smoothing)
    labels = torch.eye(3)[[0, 1, 2, 0]] + torch.eye(3)[[1, 1, 0, 2]].clamp(max=1)
    labels = labels.clamp(max=1)
    values = torch.arange(4.0)
    clips = values.view(-1, 1, 1, 1, 1).expand(-1, 3, 2, 8, 8).clone()
    torch.manual_seed(seed)
    mixed, targets = Mixing(config, 3)(clips, labels)
    torch.manual_seed(seed)
    _, one = Mixing(MixingConfig(mixup=mixup, cutmix=cutmix, smoothing=0), 4)(clips, torch.arange(4))  # shares of clips
    torch.testing.assert_close(mixed.mean((1, 2, 3, 4)), one @ values)
    torch.testing.assert_close(targets, (1 - smoothing) * (one @ labels) + smoothing / 3)


# A run


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(6):
        encode(folder / f"{i}.mp4", 20, seed=i % 3)
    (folder / "list.txt").write_text("0.mp4 0,1\n1.mp4 1\n2.mp4 2,0\n3.mp4 0,1\n4.mp4 1\n5.mp4 0,2\n")
    return folder


@pytest.fixture(scope="module")
def trained(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learns six clips by heart, with mixup on."""
    folder = tmp_path_factory.mktemp("run")
    edits = ("--optim.lr=3e-3", "--optim.layer_decay=1", "--train.batch_size=6", "--train.epochs=30")
    edits += ("--mixing.mixup=0.1", "--mixing.cutmix=0", "--data.augmentation.crop=whole", "--validate.every=15")
    edits += ("--data.augmentation.rand_augment=null", "--data.augmentation.reprob=0", "--data.memory=1")
    run(videos, folder, *SMALL, *edits)
    return folder


def test_a_run_learns_several_classes_and_is_tested(
    trained: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["val_map"] > metrics["val_chance_map"] + 0.2
    assert metrics["best"]["map"] >= metrics["last"]["map"] == metrics["val_map"]
    assert (metrics["learned"], metrics["verdict"]) == (True, None)
    options = [f"--weights={trained}", f"--output={tmp_path}", "--workers=0", "--device=cpu"]
    tested = evaluate(parse(EvaluateConfig, [*options, "--segments=1", "--crops=1"]))
    assert {"map", "macro_f1", "chance_map", "scored", "failed"} <= tested.keys()
    assert tested["map"] == pytest.approx(metrics["val_map"], abs=1e-6)
    assert tested["learned"] is True
    said = capsys.readouterr().out
    assert f"mAP {tested['map']:.2%} (chance {tested['chance_map']:.2%}), F1 " in said
    with np.load(tmp_path / "scores.npz", allow_pickle=False) as file:
        expected = average_precision_score(file["labels"], file["scores"], average="macro")
        assert tested["map"] == pytest.approx(expected, abs=1e-6)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == ["0,1", "1", "2,0", "0,1", "1", "0,2"]
    scores = {p.label: p.score for p in load(trained)(videos / "0.mp4", top=3)}
    assert sum(scores.values()) != pytest.approx(1, abs=1e-3)  # each is a probability of its own


def test_a_record_without_a_class_among_others_is_an_error(trained: Path, videos: Path, tmp_path: Path) -> None:
    """It may be of no class or not labelled, and mAP differs."""
    (tmp_path / "some.txt").write_text("0.mp4 0,1\n1.mp4\n")
    options = [f"--weights={trained}", f"--output={tmp_path}", f"--list={tmp_path / 'some.txt'}", "--workers=0"]
    with pytest.raises(ListError, match=r"1.mp4 has no label, like 1 of the 2 records"):
        evaluate(parse(EvaluateConfig, [*options, f"--root={videos}", "--device=cpu"]))


def test_a_report_has_the_precision_of_several_classes(trained: Path) -> None:
    with init_distributed("cpu") as info:
        report = make_report(read_run(trained), info, records=8)
    assert "mAP" in report.html
    assert [title for title, _ in report.missing] == ["Confusion", "Most confident mistakes"]
    rows = re.findall(r'<tr><th scope="row">(\d)</th><td[^>]*>(\d)</td>.*?</tr>', report.html, re.DOTALL)
    assert sorted(rows) == [("0", "4"), ("1", "4"), ("2", "2")]  # records of each class
    assert "average precision" in report.html
    assert "always answering" not in report.html
    assert "better than scores that tell nothing" in report.html
    assert "chance " in report.html


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (["--data.balanced=true"], "data.balanced takes one of each"),
        (["--model.probe=knn"], "model.probe knn takes one of each"),
        (["--model.probe=linear", "--sweep.lr=[0.1,0.2]"], "a sweep takes one of each"),
        (["--data.multi_label=false"], r"0\.mp4 has the classes 0, 1; expected one of each record"),
    ],
)
def test_what_takes_one_class_of_each_record_says_so(
    edits: list[str], message: str, videos: Path, tmp_path: Path
) -> None:
    with pytest.raises(ListError, match=message):
        run(videos, tmp_path, "--optim.layer_decay=1", *edits)


def test_a_list_of_one_class_each_may_be_several_questions() -> None:
    records = Records([Record("a", 1)])
    config = FinetuneConfig(output="", data=LabelledDataConfig("list"), model=ClassifierConfig(size="tiny"))
    assert has_several_labels(config, records) is False
    assert has_several_labels(replace(config, data=replace(config.data, multi_label=True)), records) is True


def test_records_are_held_in_arrays() -> None:
    records = Records([Record("a", 1, None, "video", (2, 0)), Record("b", None), Record("c", 2)])
    assert records[0].others == (2, 0)
    assert [record.label for record in records] == [1, None, 2]
    assert records.all_labels.tolist() == [1, -1, 2, 2, 0]
