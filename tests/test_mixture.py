"""A weighted mixture of lists: what an epoch draws, and runs on it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from clips import encode, pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import ENVIRONMENT, torchrun
from states import load_state
from test_loader import clips_of

from video_convmae.cli.evaluate import evaluate
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.cli.pretrain import pretrain
from video_convmae.config import (
    DataConfig,
    EvaluateConfig,
    FinetuneConfig,
    LabelledDataConfig,
    ListConfig,
    PretrainConfig,
    from_plain,
    to_plain,
)
from video_convmae.data.datasets import BadRecord, SampleKey
from video_convmae.data.loader import BatchPlan, ResumableBatchSampler
from video_convmae.data.mixture import MixedList, Mixture
from video_convmae.data.records import ListError, Record, Records
from video_convmae.data.sampling import Sampling
from video_convmae.engine.log import BadRecordLog, TooManyBadRecords
from video_convmae.lists import read_class_names, read_records

# What an epoch draws


def mixture(counts: list[int], weights: list[float] | None = None) -> Mixture:
    weights = [float(count) for count in counts] if weights is None else weights
    lists = [
        MixedList(f"{n}.txt", "", Records([Record(f"{n}/{i}.mp4", i) for i in range(count)]), weight, {})
        for n, (count, weight) in enumerate(zip(counts, weights))
    ]
    return Mixture(lists)


COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@st.composite
def mixtures(draw: Any) -> tuple[Mixture, int]:
    """A mixture, and a length of its epochs."""
    counts = draw(COUNTS)
    weights = draw(st.none() | st.lists(st.floats(0.01, 100), min_size=len(counts), max_size=len(counts)))
    return mixture(counts, weights), draw(st.integers(1, sum(counts)))


@settings(max_examples=25)
@given(mixtures(), st.integers(0, 2**63 - 1), st.integers(1, 12))
def test_a_list_is_walked_through_whole_again_and_again(drawn: tuple[Mixture, int], seed: int, epochs: int) -> None:
    """Over the epochs, each walk through a list shows every record once, and begins when the one before has ended."""
    mixed, length = drawn
    seen = [mixed.draw(seed, epoch, length) for epoch in range(epochs)]
    assert all(each.shape == (length, 2) for each in seen)
    keys = np.concatenate(seen)
    assert len(np.unique(keys, axis=0)) == len(keys)  # no sample comes twice
    for _, indices in mixed.spans():
        walks = keys[np.isin(keys[:, 1], indices), 0]
        whole, rest = divmod(len(walks), len(indices))
        assert np.bincount(walks, minlength=0).tolist() == [len(indices)] * whole + [rest] * bool(rest)


@settings(max_examples=25)
@given(mixtures(), st.integers(0, 2**63 - 1), st.integers(1, 30))
def test_the_shares_are_those_of_the_weights(drawn: tuple[Mixture, int], seed: int, epochs: int) -> None:
    """Rounded up or down in each epoch, and closer over all of them than independent draws would be."""
    mixed, length = drawn
    weights = np.array([each.weight for each in mixed.lists])
    share = weights / weights.sum() * length
    counts = np.array(
        [
            [np.isin(mixed.draw(seed, epoch, length)[:, 1], indices).sum() for _, indices in mixed.spans()]
            for epoch in range(epochs)
        ]
    )
    assert (counts.sum(axis=1) == length).all()
    assert (np.abs(counts - share) < 1 + 1e-5).all()
    assert (np.abs(counts.mean(axis=0) - share) < 1e-5 + (1 + np.log2(epochs)) * 2 / epochs).all()


def test_the_expected_shares_are_exact() -> None:
    mixed = mixture([5, 50, 7], [1, 2, 0.7])
    counts = [[np.isin(mixed.draw(seed, 3, 20)[:, 1], i).sum() for _, i in mixed.spans()] for seed in range(300)]
    assert np.mean(counts, axis=0) == pytest.approx(np.array([1, 2, 0.7]) / 3.7 * 20, abs=0.12)


@settings(max_examples=25)
@given(COUNTS, st.integers(0, 99), st.integers(0, 5))
def test_without_weights_lists_are_one_list(counts: list[int], seed: int, epoch: int) -> None:
    drawn = mixture(counts).draw(seed, epoch, sum(counts))
    assert sorted(map(tuple, drawn.tolist())) == [(epoch, index) for index in range(sum(counts))]


@settings(max_examples=25)
@given(mixtures(), st.integers(0, 20), st.sampled_from([(4, 1, 1), (2, 2, 1), (1, 2, 2), (1, 1, 4)]))
def test_batches_are_the_same_for_any_processes_and_after_a_resumption(
    drawn: tuple[Mixture, int], first: int, batch: tuple[int, int, int]
) -> None:
    mixed, _ = drawn
    if len(mixed) < 4:
        return
    whole = list(ResumableBatchSampler(mixed, BatchPlan(4), 1, 0, first + 5))
    per_device, ranks, accumulate = batch
    plans = [BatchPlan(per_device, ranks, rank, accumulate) for rank in range(ranks)]
    dealt = [list(ResumableBatchSampler(mixed, plan, 1, first, first + 5)) for plan in plans]
    for step in range(5):
        parts = [rank[step * accumulate + part] for part in range(accumulate) for rank in dealt]
        assert [key for part in parts for key in part] == whole[first + step]


def test_records_keep_the_order_of_the_lists() -> None:
    mixed = mixture([3, 2])
    assert [(mixed[i].path, mixed[i].source) for i in range(-1, 4)] == [
        ("1/1.mp4", 1), ("0/0.mp4", 0), ("0/1.mp4", 0), ("0/2.mp4", 0), ("1/0.mp4", 1)
    ]  # fmt: skip
    assert mixed.labels.tolist() == [0, 1, 2, 0, 1]
    assert len(set(mixed.lines.tolist())) == 5
    chosen = mixed.select([1, 4])
    assert [(each.path, each.source, each.label) for each in chosen] == [("0/1.mp4", 0, 1), ("1/1.mp4", 1, 1)]
    with pytest.raises(IndexError):
        mixed[5]


def test_the_digest_is_of_all_that_decides_what_is_drawn() -> None:
    lists = mixture([3, 2], [1.0, 2.0]).lists
    digests = {
        Mixture(each).digest("")
        for each in (
            lists,
            lists[::-1],
            (MixedList("0.txt", "", lists[0].records, 3.0, {}), lists[1]),
            (MixedList("0.txt", "", lists[0].records, 1.0, {"stride": 2}), lists[1]),
        )
    }
    assert len(digests) == 4
    moved = MixedList("elsewhere.txt", "/b", Records([Record(f"/b/0/{i}.mp4", i) for i in range(3)]), 1.0, {})
    assert Mixture([moved, lists[1]]).digest("") == Mixture(lists).digest("")


def test_each_list_has_its_own_budget_of_bad_records(tmp_path: Path) -> None:
    mixed, path = mixture([98, 2]), tmp_path / "bad_records.jsonl"
    log = BadRecordLog(path, mixed, 0.1)
    log.add([BadRecord(i, f"0/{i}.mp4", "broken") for i in range(9)], write=True)
    with pytest.raises(TooManyBadRecords, match=r"1 of 2 records of 1\.txt cannot be read"):
        log.add([BadRecord(98, "1/0.mp4", "1/0.mp4: broken")], write=True)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["list"] for line in written] == ["0.txt"] * 9 + ["1.txt"]
    assert len(BadRecordLog(path, mixed, 0.1)) == 10


# Lists as a configuration names them


def test_a_configuration_survives_a_round_trip(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "extends: debug/pretrain\noutput: o\ndata:\n  train:\n"
        "  - {list: a.txt, root: /x, weight: 3}\n  - {list: b.txt, weight: 1, stride: 2, format: frames}\n"
    )
    config = parse(PretrainConfig, [f"--config={tmp_path / 'run.yaml'}"])
    assert config.data.train == (ListConfig("a.txt", "/x", 3.0), ListConfig("b.txt", None, 1.0, "frames", None, 2))
    assert from_plain(PretrainConfig, yaml.safe_load(yaml.safe_dump(to_plain(config)))) == config
    first, second = config.data.sources
    assert (first.train, first.root, first.stride, first.format) == ("a.txt", "/x", config.data.stride, "video")
    assert (second.train, second.root, second.stride, second.format) == ("b.txt", "", 2, "frames")
    edited = parse(PretrainConfig, ["--config=debug/pretrain", "--output=o", "--data.train=[{list: a.txt}]"])
    assert edited.data.train == (ListConfig("a.txt"),)


def test_a_list_samples_by_time_or_by_frames() -> None:
    """Its stride replaces `data.fps`, its fps `data.stride`; pictures have no rate."""
    train = (ListConfig("a"), ListConfig("b", stride=2), ListConfig("c", fps=5.0), ListConfig("d", format="image"))
    assert [(each.fps, each.stride) for each in DataConfig(train, fps=7.5).sources] == [
        (7.5, 4), (None, 2), (5.0, 4), (None, 4)
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"fps is 5.0 and data.format frames"):
        DataConfig((ListConfig("a", format="frames", fps=5.0),))


@pytest.mark.parametrize(
    ("lists", "error"),
    [
        ("[{list: a, wieght: 3}]", "there is no field data.train.wieght; did you mean data.train.weight?"),
        ("[{list: a, weight: x}]", "data.train.weight is x; expected number or null"),
        ("[{list: a, weight: 0}]", "weight of a in data.train is 0.0; expected more than 0"),
        ("[{list: a, stride: 0}]", "stride of a in data.train is 0; expected 1 or more"),
        ("[{list: a, weight: 1}, {list: b}]", "expected one for every list, or for none"),
        ("[{weight: 1}]", "an item of data.train has no list, which must be given"),
        ("[]", "data.train is an empty list"),
        ("[{list: a}, {list: b, format: image}]", "mask.kind is frame and b in data.train holds images; expected tube"),
    ],
)
def test_wrong_lists_are_errors_of_one_line(
    lists: str, error: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run.yaml").write_text(f"extends: debug/pretrain\noutput: o\ndata:\n  train: {lists}\n")
    with pytest.raises(SystemExit):
        parse(PretrainConfig, [f"--config={tmp_path / 'run.yaml'}", "--mask.kind=frame"])
    said = capsys.readouterr().err
    assert error in said
    assert said.count("\n") == 1


def test_wrong_lists_on_the_command_line_are_no_path(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(PretrainConfig, ["--config=debug/pretrain", "--output=o", "--data.train=[{list: a, wieght: 3}]"])
    assert "expected a list file, or several, each with list, root, weight" in capsys.readouterr().err


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of videos and one of pictures, each with its list; of the second one file is bad."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, count in (("a", 6), ("b", 3)):
        (folder / name).mkdir()
        for i in range(count):
            encode(folder / name / f"{i}.mp4", 20 + i, seed=i)
    (folder / "b" / "bad.mp4").write_text("not a video\n" * 100)
    (folder / "c").mkdir()
    for i, picture in enumerate(pictures(2)):
        Image.fromarray(picture).save(folder / "c" / f"{i}.png")
    (folder / "a.txt").write_text("".join(f"{i}.mp4 {i % 2}\n" for i in range(6)))
    (folder / "b.txt").write_text("".join(f"{name}.mp4 {i % 2}\n" for i, name in enumerate(("0", "bad", "1", "2"))))
    (folder / "c.txt").write_text("0.png 0\n1.png 1\n")
    return folder


def lists_of(folder: Path, *edits: str) -> str:
    """The value of --data.train: each is the name of a list, and what else it says."""
    return "[" + ", ".join(f"{{list: {folder / e[0]}.txt, root: {folder / e[0]}{e[1:]}}}" for e in edits) + "]"


def edits_of(folder: Path, output: Path, lists: str, *edits: str) -> list[str]:
    return [
        *(f"--data.train={lists}", "--data.workers=0", "--data.reader=pyav", "--model.image_size=32", "--device=cpu"),
        *("--data.max_bad_fraction=0.5", f"--output={output}", *edits),
    ]


def test_a_record_is_sampled_as_its_list_says_and_replaced_from_its_list(folder: Path) -> None:
    train = (
        ListConfig(str(folder / "a.txt"), str(folder / "a")),
        ListConfig(str(folder / "b.txt"), str(folder / "b"), stride=1),
        ListConfig(str(folder / "c.txt"), str(folder / "c"), format="image"),
    )
    records = read_records(DataConfig(train))
    samplings = (Sampling("dense", 4, 4), Sampling("dense", 4, 1), Sampling("dense", 4, 4))
    data = clips_of(records, samplings=samplings)
    bad = next(i for i in range(len(records)) if records[i].path.endswith("bad.mp4"))
    for epoch in range(5):
        sample = data[SampleKey(epoch, bad)]
        assert [each.index for each in sample.bad_records] in ([bad], [bad, bad], [bad] * 3)
        assert sample.index in range(6, 10)
    still = data[SampleKey(0, 10)].clips
    assert all(torch.equal(still[:, :, 0], still[:, :, t]) for t in range(4))
    moving = data[SampleKey(0, 0)].clips
    assert not torch.equal(moving[:, :, 0], moving[:, :, 1])


def test_a_run_is_resumed_exactly_with_the_same_weights(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """From a checkpoint within a walk through each list; stills beside videos; other weights are refused."""

    def run(output: str, *lists: str) -> list[dict]:
        value = lists_of(folder, *(lists or ("a, weight: 2", "b, weight: 1, stride: 1", "c, weight: 1, format: image")))
        edits = edits_of(
            folder, tmp_path / output, value, "--train.max_steps=8", "--train.save_every=0.3", "--train.keep=9"
        )
        pretrain(parse(PretrainConfig, ["--config=debug/pretrain", *edits]))
        return [json.loads(line) for line in (tmp_path / output / "log.jsonl").read_text().splitlines()]

    whole = run("whole")
    assert "12 records of " in capsys.readouterr().out
    assert [line["list"] for line in map(json.loads, (tmp_path / "whole" / "bad_records.jsonl").open())] == [
        str(folder / "b.txt")
    ]
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    steps = sorted(path for path in (tmp_path / "resumed" / "checkpoints").iterdir() if path.is_dir())
    for path in steps[len(steps) // 2 :]:
        shutil.rmtree(path)
    resumed = run("resumed")
    assert "resumes from step" in capsys.readouterr().out
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
    ours, theirs = (load_state(tmp_path / name)["model"] for name in ("resumed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ValueError, match=r"the records of .* are not those that .* began with"):
        run("whole", "a, weight: 1", "b, weight: 1, stride: 1", "c, weight: 1, format: image")


@pytest.mark.slow
def test_two_processes_take_the_same_steps(folder: Path, tmp_path: Path) -> None:
    """Of videos and stills of several weights, a bad file among them."""
    value = lists_of(folder, "a, weight: 2", "b, weight: 1, stride: 1", "c, weight: 1, format: image")

    def run(processes: int) -> list[dict]:
        output = tmp_path / str(processes)
        batch = f"--train.batch_size={4 // processes}"
        edits = edits_of(folder, output, value, "--train.max_steps=8", "--optim.warmup_epochs=0", batch)
        program = torchrun(processes, "-m", "video_convmae", "pretrain", "--config=debug/pretrain", *edits)
        subprocess.run(program, env=ENVIRONMENT, check=True, timeout=300)
        return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]

    one, two = run(1), run(2)
    assert len(one) == 8
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    ours, theirs = (load_state(tmp_path / name)["model"] for name in "21")
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4) for name in theirs)
    assert (tmp_path / "2" / "bad_records.jsonl").read_text().count("bad.mp4") >= 1


def test_a_classifier_learns_from_a_mixture_and_is_compared_with_baselines(folder: Path, tmp_path: Path) -> None:
    value, run = lists_of(folder, "a", "b, stride: 1", "c, format: image"), tmp_path / "run"
    common = ("--data.augmentation.flip=false", "--data.repeats=2", "--data.memory=0.1", "--train.max_steps=2")
    validation = (f"--data.validation={folder / 'a.txt'}", f"--data.root={folder / 'a'}")
    finetune(parse(FinetuneConfig, ["--config=debug/finetune", *edits_of(folder, run, value, *common, *validation)]))
    metrics = evaluate(EvaluateConfig(weights=str(run), output=str(tmp_path / "test"), baselines=True, device="cpu"))
    assert metrics["scored"] == 6
    assert set(metrics["baselines"]) >= {"largest_class", "motion_energy"}


def test_the_classes_of_all_lists_are_the_same(folder: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copy(folder / f"{name}.txt", tmp_path)
    (tmp_path / "a.labels.txt").write_text("cat\ndog\n")
    data = LabelledDataConfig(tuple(ListConfig(str(tmp_path / f"{name}.txt")) for name in "ab"))
    assert read_class_names(data) == ("cat", "dog")
    (tmp_path / "b.labels.txt").write_text("dog\ncat\n")
    with pytest.raises(ListError, match=re.escape("a.txt (2) and of ")):
        read_class_names(data)
    (tmp_path / "b.labels.txt").write_text("cat\ndog\n")
    assert read_class_names(data) == ("cat", "dog")
