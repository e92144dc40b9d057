"""The study on real clips: what is taken from a folder, what the classes show, splits by source, and resuming."""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from clips import cut, encode
from states import load_state

from tools.study import real as tool
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.config import FinetuneConfig
from video_convmae.data.records import class_names, read_list

SETTINGS = {"sets": ["speed"], "splits": 1, "clips": 6, "seed": 3}
WAYS = partial(tool.draw_played, (1, 4, -1))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of 4.4 seconds, another encoding of one, one that is cut off, and one of a second."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "b").mkdir()
    for seed, name in enumerate(("b/one.mp4", "two.mkv", "a.avi")):
        encode(folder / name, 110, "mpeg4" if name == "a.avi" else "libx264", seed=seed)
    encode(folder / "b" / "again.mkv", 100, options={"crf": "18", "bf": "2"}, seed=0)
    encode(folder / "short.mp4", 25, seed=3)
    cut(encode(folder / "cut.mp4", 110, seed=4), 0.5)
    (folder / "notes.txt").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def sources(videos: Path) -> list[tool.Source]:
    return tool.find_sources(videos)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_damaged_files_and_copies_are_named_and_left_out(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [source.path for source in tool.find_sources(videos)] == ["a.avi", "b/one.mp4", "short.mp4", "two.mkv"]
    said = capsys.readouterr().out
    assert "cut.mp4 is left out: " in said
    assert "b/again.mkv is left out: it shows the same as b/one.mp4" in said
    assert "notes" not in said


def test_the_set_is_balanced_in_every_source(
    videos: Path, sources: list[tool.Source], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seconds in (("speed", 1), ("scuffle", 2)):
        tool.make_set(name, videos, sources, tmp_path / name, clips=12, seed=0)
        records = read_list(tmp_path / name / "all.txt", root=tmp_path / name)
        assert tuple(class_names(str(tmp_path / name / "all.txt")) or ()) == tool.SETS[name].classes
        assert Counter((Path(record.path).name[:3], record.label) for record in records) == {
            (f"{source:03d}", label): 2 for source in range(3) for label in (0, 1)
        }
        with av.open(records[0].path) as container:
            frames = list(container.decode(video=0))
            assert container.streams.video[0].codec_context.name == "h264"
        assert [(frame.width, frame.height) for frame in frames] == [(160, 120)] * 25 * seconds
    assert "speed: short.mp4 is left out: 1.0 s of 3.8" in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 clips for speed; expected two or more"):
        tool.make_set("speed", videos, sources[:1], tmp_path / "few", clips=12, seed=0)


def test_same_seed_same_bytes_and_other_settings_are_refused(
    videos: Path, sources: list[tool.Source], tmp_path: Path
) -> None:
    make = partial(tool.make_set, "scuffle", videos, sources, clips=6)
    make(tmp_path / "first", seed=0)
    make(tmp_path / "second", seed=0)
    made = contents(tmp_path / "first")
    assert contents(tmp_path / "second") == made
    with pytest.raises(ValueError, match="holds clips of other videos or settings"):
        make(tmp_path / "first", seed=1)
    make(tmp_path / "other", seed=1)
    assert not set(made.values()) & {data for name, data in contents(tmp_path / "other").items() if "mp4" in name}

    (tmp_path / "first" / "settings.json").unlink()  # as a run leaves it that was stopped
    (tmp_path / "first" / "clips" / "000_000_walk.mp4").write_bytes(b"half a cl")
    make(tmp_path / "first", seed=0)
    assert contents(tmp_path / "first") == made


@pytest.mark.parametrize(("rate", "step"), [(25.0, 1), (12.0, 1), (30.0, 1.2), (50.0, 2)])
def test_a_clip_is_a_second_once_four_times_as_fast_or_backward(rate: float, step: float) -> None:
    """Frame k is grey level k."""
    frames = np.broadcast_to(np.arange(250, dtype=np.uint8)[:, None, None, None], (250, 60, 80, 3))
    for label, factor in enumerate((1, 4, -1)):
        shown = WAYS(frames, rate, label, np.random.default_rng(label))[:, 0, 0, 0].astype(int)
        moved = np.diff(shown)
        assert len(shown) == 25
        assert np.abs(moved - factor * step).max() < 1, "to whole frames"
        assert moved.all(), "a frame is shown twice"


def test_a_walk_goes_straight_and_a_scuffle_does_not() -> None:
    def straightness(places: np.ndarray) -> float:
        return float(np.linalg.norm(places[-1] - places[0]) / np.linalg.norm(np.diff(places, axis=0), axis=1).sum())

    for seed in range(10):
        assert straightness(tool.walk(50, 3.0, np.random.default_rng(seed))) > 0.9
        assert straightness(tool.scuffle(50, 3.0, np.random.default_rng(seed))) < 0.8


def test_a_patch_is_drawn_where_it_lies_inside() -> None:
    patch = np.dstack([np.full((6, 4, 3), 200.0), np.ones((6, 4))])
    for place, rows, columns in [
        ((10, 10), 6, 4),
        ((0, 0), 3, 2),
        ((20, 30), 3, 2),
        ((-9, 10), 0, 0),
        ((10, 40), 0, 0),
    ]:
        shown = np.zeros((20, 30, 3))
        tool.paste(shown, patch, np.array(place))
        assert (shown == 200).sum() == 3 * rows * columns


@pytest.mark.parametrize(("sources", "each", "train"), [(16, 18, 80), (3, 6, 6), (2, 40, 40), (150, 2, 80)])
def test_no_source_is_on_both_sides(sources: int, each: int, train: int) -> None:
    source, label = np.arange(sources * each) // each, np.arange(sources * each) % 2
    for seed in range(5):
        learned, tested = tool.split_sources(source, label, np.random.default_rng(seed))
        assert not set(source[learned]) & set(source[tested])
        assert np.bincount(label[learned]).tolist() == [train // 2] * 2
        assert len(tested) >= 0.4 * len(source)
        assert len(set(source[tested]) | set(source[learned])) == sources, "no source is left out"


@pytest.mark.slow
def test_an_interrupted_run_resumes(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(config: object) -> None:
        raise KeyboardInterrupt

    evaluated = tool.evaluate
    measure = partial(tool.measure, videos, tmp_path, **SETTINGS)
    monkeypatch.setattr(tool, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        measure()
    monkeypatch.setattr(tool, "evaluate", evaluated)
    rows = measure()

    monkeypatch.setattr(tool, "finetune", stop)
    assert measure() == rows, "nothing is measured again"
    with pytest.raises(KeyboardInterrupt):
        measure(scratch=True)
    monkeypatch.setattr(tool, "finetune", finetune)
    more = measure(scratch=True)
    assert more[:1] == rows
    assert [row["model"].split(",")[0] for row in more] == ["tiny-moving-digits", "random weights"]
    for row in more:
        assert {"set", "split", "top1", "largest_class", "motion_energy", "mean_frame", "device", "commit"} <= set(row)
        assert (row["set"], row["split"], row["tested"]) == ("speed", 0, 4)
        assert 0 <= row["top1"] <= 1
    assert json.loads((tmp_path / "results.json").read_text()) == more
    assert "random weights" in (tmp_path / "table.md").read_text()


def test_the_table_compares_on_the_same_splits() -> None:
    baselines = {
        "largest_class": 0.5,
        "motion_energy": 0.6,
        "mean_frame": 0.5,
        "device": "a processor",
        "commit": "abc",
    }
    rows = [
        {"set": name, "split": split, "model": model, "top1": top1, **baselines}
        for name in ("speed", "scuffle")
        for model, numbers in (("tiny, 123", (0.7, 0.9)), (tool.RANDOM, (0.6, 0.7, 0.8)))
        for split, top1 in enumerate(numbers)
    ]
    assert tool.table(rows).splitlines() == [
        "| | speed | scuffle |",
        "|---|---|---|",
        "| tiny, 123 | 80.0 ± 14.1 (2) | 80.0 ± 14.1 (2) |",
        "| random weights | 70.0 ± 10.0 (3) | 70.0 ± 10.0 (3) |",
        "| always answering the most frequent class | 50.0 ± 0.0 (3) | 50.0 ± 0.0 (3) |",
        "| motion energy + logistic regression | 60.0 ± 0.0 (3) | 60.0 ± 0.0 (3) |",
        "| mean frame + logistic regression | 50.0 ± 0.0 (3) | 50.0 ± 0.0 (3) |",
        "| tiny, 123: better than motion energy by | 20.0 ± 14.1 (2) | 20.0 ± 14.1 (2) |",
        "| tiny, 123: better than random weights by | 15.0 ± 7.1 (2) | 15.0 ± 7.1 (2) |",
        "",
        "a processor, commit abc",
    ]


def test_random_weights_are_those_of_the_seed(tmp_path: Path) -> None:
    for index in range(2):
        encode(tmp_path / f"{index}.mp4", 20, seed=index)
    (tmp_path / "train.txt").write_text("0.mp4 0\n1.mp4 1\n")
    edits = ["--config=video/probe_own_videos_tiny", f"--data.train={tmp_path / 'train.txt'}", "--data.validation=null"]
    weights = []
    for number, seed in enumerate((1, 1, 2)):
        run = tmp_path / f"run{number}"
        finetune(parse(FinetuneConfig, [*edits, f"--data.root={tmp_path}", f"--output={run}", f"--seed={seed}"]))
        weights.append(load_state(run, "model")["model"]["encoder.attention_blocks.0.mlp.fc1.weight"])
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_the_command_reports_an_error_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["real", str(tmp_path), f"--output={tmp_path / 'out'}"])
    with pytest.raises(SystemExit):
        tool.main()
    assert "has 0 clips for speed; expected two or more" in capsys.readouterr().err.splitlines()[-1]
