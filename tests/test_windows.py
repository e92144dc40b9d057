"""Long videos in windows: `features --window` and `predict --window`."""

from __future__ import annotations

import contextlib
import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import clips
import numpy as np
import pytest
import torch
from clips import encode, pictures, save_series
from hypothesis import given
from hypothesis import strategies as st
from processes import ENVIRONMENT, torchrun
from states import Interrupted

from video_convmae import load
from video_convmae.build import build_classifier
from video_convmae.cli import run as run_command
from video_convmae.cli.features import extract_features
from video_convmae.cli.parser import parse
from video_convmae.cli.predict import main as predict
from video_convmae.config import (
    ClassifierConfig,
    FeaturesConfig,
    FinetuneConfig,
    LabelledDataConfig,
    to_plain,
)
from video_convmae.data.decoding import DecodeError, open_frames, record_at
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.decoding.pyav_reader import PyAVReader
from video_convmae.data.records import Record, Records
from video_convmae.data.sampling import Sampling
from video_convmae.data.windows import Span
from video_convmae.engine import checkpoint
from video_convmae.engine.features import FeatureTable, read_features
from video_convmae.engine.inference import ListInference
from video_convmae.engine.options import ProtocolConfig
from video_convmae.engine.windows import video_names
from video_convmae.errors import UserError
from video_convmae.predictor import Prediction, WindowPrediction
from video_convmae.visualize.timeline import Timeline, draw_timeline, merge_windows

ROOT = Path(__file__).parent.parent
FRAMES = {"a": 50, "b/long": 75, "c": 5}  # of each video; 25 a second
NAMES = ("a", "b", "some $ signs")
WINDOW, STRIDE, HOP, BATCH = 4, 3, 8, 2
SPAN = 10  # (4 - 1) * 3 + 1


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    (folder / "b").mkdir()
    for place, (name, count) in enumerate(FRAMES.items()):
        encode(folder / f"{name}.mp4", count, size=(48, 80), seed=place, options={"g": "20", "bf": "2"})
    clips.blank(encode(folder / "breaks.mp4", 90, options={"g": "10", "bf": "0"}, size=(120, 160)), 0.5, 0.9)
    (folder / "bad.mp4").write_text("no video")
    rows = [f"{name}.mp4 {place}" for place, name in enumerate(FRAMES)]
    (folder / "list.txt").write_text("\n".join(rows))
    (folder / "with_bad.txt").write_text("\n".join([rows[0], "bad.mp4 1", "breaks.mp4 2", *rows[1:]]))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier as a run leaves it."""
    folder = tmp_path_factory.mktemp("run")
    data = LabelledDataConfig(train="", reader="pyav", stride=2, workers=0, num_classes=3, labels=NAMES)
    model = ClassifierConfig(size="tiny", num_frames=4, image_size=32, head_init_std=0.5)
    config = FinetuneConfig(output="", data=data, model=model, test=ProtocolConfig(2, 2, precision="fp32"))
    torch.manual_seed(0)
    state = {"model": build_classifier(model, 3).state_dict(), "ema": None, "config": to_plain(config)}
    checkpoint.save_checkpoint(folder / "checkpoints", 1, state)
    return folder


def options(run: Path, videos: Path, output: Path, *edits: str, name: str = "list.txt") -> list[str]:
    given = {"weights": run, "list": videos / name, "root": videos, "output": output, "device": "cpu"}
    windows = (f"--window={WINDOW}", f"--stride={STRIDE}", f"--hop={HOP}", f"--batch_size={BATCH}", "--precision=fp32")
    return [*(f"--{key}={value}" for key, value in given.items()), *windows, *edits]


def extracted(*arguments: Any, **named: str) -> FeatureTable:
    return read_features(extract_features(parse(FeaturesConfig, options(*arguments, **named))))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- which windows there are ----------------------------------------------------------------------------------------


@given(
    count=st.integers(1, 300),
    length=st.integers(1, 20),
    stride=st.integers(1, 6),
    hop=st.integers(1, 80),
    fps=st.sampled_from([None, 4.0, 12.5, 40.0]),
)
def test_windows_cover_the_video_and_only_the_last_repeats(
    count: int, length: int, stride: int, hop: int, fps: float | None
) -> None:
    times = np.arange(count) / 25
    sampling = Sampling("dense", length, stride, fps)
    starts = sampling.window_starts(count, hop, times)
    windows = sampling.windows(starts, count, times)
    assert starts.tolist() == [hop * number for number in range(len(starts))]
    assert windows.shape == (len(starts), length)
    assert (windows[:, 0] == starts).all()
    assert (np.diff(windows, axis=1) >= 0).all()
    assert windows.max() <= count - 1
    assert (windows[:-1, -1] < count - 1).all()  # those before the last fit
    if len(starts) * hop < count:  # no other could begin
        assert windows[-1, -1] == count - 1
    if fps is None:
        assert (np.diff(windows[:-1], axis=1) == stride).all()


def test_the_windows_of_a_small_video() -> None:
    sampling = Sampling("dense", 4, 2)
    starts = sampling.window_starts(12, 3)
    assert sampling.windows(starts, 12).tolist() == [[0, 2, 4, 6], [3, 5, 7, 9], [6, 8, 10, 11]]
    assert sampling.window_starts(7, 3).tolist() == [0]
    assert sampling.window_starts(8, 3).tolist() == [0, 3]
    assert sampling.window_starts(30, 20).tolist() == [0, 20]


# ---- one pass over a file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h264.mp4", "h264 intra refresh.mkv", "mpeg4 B-frames.avi", "vp9.webm"])
def test_a_stream_has_the_frames_that_reading_has(name: str, tmp_path: Path) -> None:
    record = Record(str(clips.make(name, tmp_path)))
    indices = np.unique(np.r_[0:60:3, 7, 59])
    with open_frames(record, "pyav") as opened:
        expected = opened.read(indices)
        assert np.array_equal(np.stack(list(opened.stream(indices))), expected)
    with open_frames(record, "decord") as opened:
        assert np.array_equal(np.stack(list(opened.stream(indices))), expected)


def test_a_stream_decodes_each_frame_once_and_holds_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "clip.mp4", 90, options={"g": "15", "bf": "0"})
    decoded = 0
    decode = PyAVReader._decode

    def counted(self: PyAVReader, packet: Any) -> list[Any]:
        nonlocal decoded
        frames = decode(self, packet)
        decoded += len(frames)
        return frames

    with open_frames(record_at(path), "pyav") as opened:
        monkeypatch.setattr(PyAVReader, "_decode", counted)
        for number, _ in enumerate(opened.stream(np.arange(90))):
            assert decoded <= number + 1 + 15  # within a group of pictures, never the file
    assert decoded == 90


def test_a_stream_crosses_from_the_reader_process(videos: Path, tmp_path: Path) -> None:
    """The frames before a damaged place come, then the error; frames of a folder, too."""
    folder = save_series(tmp_path / "frames", 12, "img_*.png")
    with ReaderProcess("pyav") as process:
        with process.open(Record(str(videos / "a.mp4"))) as opened:
            frames = np.stack(list(opened.stream(np.arange(0, 50, 7))))
            assert np.array_equal(frames, opened.read(np.arange(0, 50, 7)))
        with process.open(Record(str(folder), format="frames")) as opened:
            assert np.array_equal(np.stack(list(opened.stream(np.arange(12)))), opened.read(np.arange(12)))
        with process.open(Record(str(videos / "breaks.mp4"))) as opened:
            seen = []
            with pytest.raises(DecodeError, match=r"breaks\.mp4"):
                seen.extend(opened.stream(np.arange(len(opened))))
            for frame in opened.stream(np.arange(len(seen))):
                assert np.array_equal(frame, seen.pop(0))


# ---- features -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(run: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    extract_features(parse(FeaturesConfig, options(run, videos, output, name="with_bad.txt")))
    return output


def test_each_row_is_the_feature_of_its_window(run: Path, videos: Path, tmp_path: Path) -> None:
    table = extracted(run, videos, tmp_path)
    rows = rows_of(tmp_path / "windows.csv")
    assert list(rows[0]) == ["row", "record", "start_frame", "end_frame", "start_seconds", "end_seconds"]
    assert [int(row["row"]) for row in rows] == list(range(len(table.features)))
    assert [row["record"] for row in rows] == table.records.tolist()
    loaded, place = load(run), 0
    for label, (name, count) in enumerate(FRAMES.items()):
        starts = [start for start in range(0, count, HOP) if not start or start - HOP + SPAN < count]
        for start in starts:
            row, frames = rows[place], np.minimum(start + STRIDE * np.arange(WINDOW), count - 1)
            assert (int(row["start_frame"]), int(row["end_frame"])) == (start, frames[-1] + 1)
            assert float(row["start_seconds"]) == pytest.approx(start / 25)
            assert float(row["end_seconds"]) == pytest.approx((frames[-1] + 1) / 25)
            assert (table.labels[place], table.failed[place]) == (label, False)
            if start in (starts[0], starts[-1]):
                clip = _middle_crop(videos / f"{name}.mp4", frames)
                with torch.inference_mode():
                    feature = loaded.model.norm(loaded.model.encode(loaded.normalise(clip[None])).mean(dim=1))[0]
                np.testing.assert_allclose(table.features[place], feature, atol=1e-5)
            place += 1
    assert place == len(rows)
    assert (table.about["window"], table.about["stride"], table.about["hop"]) == (WINDOW, STRIDE, HOP)


def _middle_crop(path: Path, frames: np.ndarray) -> torch.Tensor:
    from video_convmae.data.transforms import Augmentation, view_crops

    with open_frames(record_at(path), "pyav") as opened:
        images = opened.read(frames)
    (crop,) = view_crops(*images.shape[1:3], (32, 32), 1)
    return Augmentation().apply(images, crop, (32, 32))


def test_an_array_for_each_video_as_detectors_read_it(run: Path, videos: Path, tmp_path: Path) -> None:
    """ActionFormer puts a time t at (t * fps - num_frames / 2) / feat_stride, counted in rows of the array."""
    table = extracted(run, videos, tmp_path)
    index = json.loads((tmp_path / "windows.json").read_text())
    assert (index["feat_stride"], index["num_frames"]) == (HOP, SPAN)
    assert list(index["database"]) == list(FRAMES)
    rows, first = rows_of(tmp_path / "windows.csv"), 0
    for name, facts in index["database"].items():
        array = np.load(tmp_path / "windows" / f"{name}.npy")
        assert array.dtype == np.float32
        assert np.array_equal(array, table.features[first : first + len(array)])
        assert (facts["frame"], facts["fps"], facts["windows"]) == (FRAMES[name], 25, len(array))
        assert facts["duration"] == pytest.approx(FRAMES[name] / 25)
        for number, row in enumerate(rows[first : first + len(array) - 1]):  # the last may be cut short by the end
            middle = (float(row["start_seconds"]) + float(row["end_seconds"])) / 2
            assert (middle * facts["fps"] - 0.5 * index["num_frames"]) / index["feat_stride"] == pytest.approx(number)
        first += len(array)


def test_another_list_replaces_the_arrays_of_the_first_and_nothing_else(
    run: Path, videos: Path, tmp_path: Path
) -> None:
    (tmp_path / "windows").mkdir()
    (tmp_path / "windows" / "mine.npy").write_text("mine")
    (tmp_path / "windows.json").write_text(json.dumps({"database": {"before": {}}}))
    (tmp_path / "windows" / "before.npy").write_text("of an earlier run")
    (tmp_path / "one.txt").write_text("c.mp4 0\n")
    given = options(run, videos, tmp_path)
    given[1] = f"--list={tmp_path / 'one.txt'}"
    extract_features(parse(FeaturesConfig, given))
    assert {path.name for path in (tmp_path / "windows").iterdir()} == {"c.npy", "mine.npy"}


def test_a_broken_video_keeps_the_windows_before_and_is_reported(alone: Path, videos: Path) -> None:
    faults = [json.loads(line) for line in (alone / "bad_records.jsonl").read_text().splitlines()]
    assert [Path(fault["path"]).name for fault in faults] == ["bad.mp4", "breaks.mp4"]
    rows = [row for row in rows_of(alone / "windows.csv") if row["record"] == faults[1]["path"]]
    assert 0 < len(rows) < 90 / HOP
    assert f"the {len(rows)} windows of 11 before that are kept" in faults[1]["error"]
    assert set(json.loads((alone / "windows.json").read_text())["database"]) == set(FRAMES)
    assert {path.name for path in (alone / "windows").rglob("*.npy")} == {"a.npy", "long.npy", "c.npy"}
    assert {path.name for path in alone.iterdir()} == {
        *("features.npz", "windows.csv", "windows", "windows.json", "bad_records.jsonl")
    }


def test_a_single_frame_is_shown_for_as_long_as_the_rate_says(run: Path, tmp_path: Path) -> None:
    """A picture has no rate, and no length."""
    encode(tmp_path / "one.mp4", 1, tick=Fraction(1, 25))
    save_series(tmp_path / "pictures", 1, "img_*.png")
    (tmp_path / "list.txt").write_text("one.mp4 0\n")
    extracted(run, tmp_path, tmp_path / "out")
    (row,) = rows_of(tmp_path / "out" / "windows.csv")
    assert (row["start_seconds"], row["end_seconds"]) == ("0.0", "0.04")
    (facts,) = json.loads((tmp_path / "out" / "windows.json").read_text())["database"].values()
    assert (facts["duration"], facts["fps"], facts["frame"]) == (0.04, 25.0, 1)
    (window,) = load(run).windows(next((tmp_path / "pictures").iterdir()))
    assert window.span == Span(0, 1, 0.0, 0.0)


@pytest.mark.parametrize("windows", [True, False])
def test_features_of_nothing_are_a_failure(
    windows: bool, run: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """What says why is written; the windows before the place where a video breaks are something."""
    (tmp_path / "list.txt").write_text("bad.mp4 0\nnowhere.mp4 1\n")
    given = [f"--root={videos}"] if windows else [f"--root={videos}", "--window=null", "--hop=null"]
    assert run_command("features", options(run, tmp_path, tmp_path / "out", *given)) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "none of the 2 records could be read" in error
    assert len((tmp_path / "out" / "bad_records.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "out" / "features.npz").exists()
    if windows:
        (tmp_path / "list.txt").write_text("breaks.mp4 0\n")
        assert run_command("features", options(run, tmp_path, tmp_path / "some", *given)) == 0


@pytest.mark.slow
def test_two_processes_with_loading_processes_write_the_same_bytes(
    run: Path, videos: Path, alone: Path, tmp_path: Path
) -> None:
    arguments = options(run, videos, tmp_path, "--workers=1", name="with_bad.txt")
    subprocess.run(torchrun(2, "-m", "video_convmae", "features", *arguments), env=ENVIRONMENT, check=True, timeout=300)
    assert contents(tmp_path) == contents(alone)


def test_an_interrupted_extraction_goes_on_within_a_video(
    run: Path, videos: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, computed, limit = ListInference.forward, [], [7]

    def interrupted(self: ListInference, compute: Any, clips: Any, views: int, names: str) -> np.ndarray:
        if len(computed) in limit:
            raise Interrupted
        computed.append(names.removeprefix(str(videos) + "/"))
        return forward(self, compute, clips, views, names)

    arguments = options(run, videos, tmp_path, name="with_bad.txt")
    monkeypatch.setattr(ListInference, "forward", interrupted)
    with pytest.raises(Interrupted):
        extract_features(parse(FeaturesConfig, arguments))
    for path in (tmp_path / "partial").rglob("*.rows"):  # the kill came while a row was written
        path.write_bytes(path.read_bytes()[:-3])
    before, computed[:], limit[:] = computed[:], [], []
    extract_features(parse(FeaturesConfig, arguments))
    assert [each for each in computed if each.startswith("a.mp4")] == []  # finished
    assert before[-1] in computed  # the batch with the torn row
    assert contents(tmp_path) == contents(alone)


def test_tokens_and_frames_a_second_and_a_single_video(run: Path, videos: Path, tmp_path: Path) -> None:
    video = str(videos / "a.mp4")
    given = [f"--weights={run}", f"--list={video}", f"--output={tmp_path}", "--window=4", "--hop=10", "--fps=5"]
    path = extract_features(parse(FeaturesConfig, [*given, "--kind=tokens", "--device=cpu", "--precision=fp32"]))
    table = read_features(path)
    assert table.features.shape == (5, 8, 192)  # 4 frames at 5 a second are 0.6 s, of 2 s
    rows = rows_of(tmp_path / "windows.csv")
    assert [(int(row["start_frame"]), int(row["end_frame"])) for row in rows][:2] == [(0, 16), (10, 26)]
    assert json.loads((tmp_path / "windows.json").read_text())["num_frames"] is None


def test_windows_of_frames_without_times(run: Path, tmp_path: Path) -> None:
    save_series(tmp_path / "frames", 20, "img_*.png")
    (tmp_path / "list.txt").write_text("frames 20 0\n")
    table = extracted(run, tmp_path, tmp_path / "out", "--format=frames")
    rows = rows_of(tmp_path / "out" / "windows.csv")
    assert len(table.features) == len(rows) == 3
    assert (rows[2]["start_frame"], rows[2]["end_frame"], rows[2]["start_seconds"]) == ("16", "20", "")


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (["--window=8"], "--window is 8, and the model takes 4 frames; expected 4"),
        (["--window=4", "--sampling=uniform"], "which says nothing of windows; expected --sampling dense"),
        (["--window=4", "--fps=5"], "--hop is none and the frames are taken at 5 a second"),
        (["--window=4", "--fps=5", "--stride=2"], "--stride 2 and --fps 5 are both given; expected one"),
        (["--window=4", "--kind=tokens", "--crops=2"], "expected 1 x 1 for tokens"),
        (["--hop=4"], "hop is 4 and window none"),
        (["--window=4", "--segments=2"], "segments is 2 and window 4"),
    ],
)
def test_what_makes_no_windows_is_an_error(
    edits: list[str], message: str, run: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [f"--weights={run}", f"--list={videos / 'list.txt'}", f"--root={videos}", f"--output={tmp_path}"]
    with contextlib.suppress(SystemExit):  # of a wrong command line
        assert run_command("features", [*given, "--device=cpu", *edits]) == 1
    assert message in capsys.readouterr().err


def test_names_of_videos() -> None:
    paths = ["/r/a.mp4", "/r/b/a.mp4", "/r/c.mp4", "/r/c.webm", "/elsewhere/d.mkv", "/r/s.tar#e.mp4"]
    clash = video_names(Records([Record(f"/r/{name}") for name in ("a.mp4", "a.webm", "a-1.mp4")]), "/r")
    assert len(set(clash)) == 3
    names = video_names(Records([Record(path) for path in paths]), "/r")
    assert names == ["a", "b/a", "c-3", "c-4", "d", "s.tar/e"]


@pytest.mark.faults
def test_a_kill_in_a_long_video_and_the_same_command_again(run: Path, tmp_path: Path) -> None:
    """The bytes are those of a run that nobody disturbed, and no window that was stored is computed again."""
    encode(tmp_path / "long.mp4", 500, options={"g": "50", "bf": "0"})

    def arguments(name: str) -> list[str]:
        given = {"weights": run, "list": tmp_path / "long.mp4", "output": tmp_path / name, "window": 4, "hop": 4}
        return ["features", *(f"--{key}={value}" for key, value in given.items()), "--device=cpu", "--precision=fp32"]

    command = [sys.executable, "-m", "video_convmae"]
    process = subprocess.Popen([*command, *arguments("killed")], env=ENVIRONMENT)
    end = time.monotonic() + 120
    while not (sizes := [path.stat().st_size for path in tmp_path.glob("killed/partial/*/*.rows")]) or not sizes[0]:
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (rows,) = tmp_path.glob("killed/partial/*/*.rows")
    assert 0 < rows.stat().st_size // (8 + 8 + 32 + 4 * 192) < 125
    for name in ("killed", "undisturbed"):
        subprocess.run([*command, *arguments(name)], env=ENVIRONMENT, check=True, timeout=300)
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


@pytest.mark.slow
def test_two_hours_take_no_more_memory_than_their_first_tenth(run: Path, tmp_path: Path) -> None:
    """Prints docs/evaluation.md's row: `pytest -m slow tests/test_windows.py -k two_hours -s`."""
    encode(tmp_path / "part.mp4", 1152, tick=Fraction(1, 8), options={"g": "48", "bf": "0"})
    repeat(tmp_path / "part.mp4", tmp_path / "long.mp4", 50)  # 57,600 frames, 7,200 windows
    given = {"weights": run, "list": tmp_path / "long.mp4", "output": tmp_path / "features", "device": "cpu"}
    options = (f"--{key}={value}" for key, value in given.items())
    windows = ("--window=4", "--stride=2", "--hop=8", "--precision=fp32", "--workers=0")
    command = [sys.executable, "-m", "video_convmae", "features", *options, *windows]
    mebibytes = []
    with subprocess.Popen(command, env=ENVIRONMENT) as process:
        while process.poll() is None:
            if any(path.stat().st_size for path in tmp_path.glob("features/partial/*/*.rows")):  # windows are stored
                mebibytes.append(proportional_memory(process.pid))
            time.sleep(0.2)
    assert process.returncode == 0
    features = read_features(tmp_path / "features" / "features.npz")
    assert len(features.records) == 7200
    at = {share: mebibytes[int(share * len(mebibytes))] for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)}
    print(" | ".join(f"{share:.0%} {value:.0f}" for share, value in at.items()), f"| peak {max(mebibytes):.0f} MiB")
    assert len(mebibytes) > 40
    assert max(mebibytes) < 1.1 * at[0.1]


def repeat(source: Path, target: Path, times: int) -> None:
    """Write the packets of a file so many times, one after the other."""
    with av.open(str(target), "w") as output:
        for place in range(times):
            with av.open(str(source)) as file:
                (video,) = file.streams.video
                if place == 0:
                    stream = output.add_stream_from_template(video)
                for packet in file.demux(video):
                    if packet.size:  # the last one is empty
                        packet.pts, packet.dts = (at + place * video.duration for at in (packet.pts, packet.dts))
                        packet.stream = stream
                        output.mux(packet)


def proportional_memory(pid: int) -> float:
    """Return the memory of a process and its children, pages that they share counted once, in MiB (Linux)."""
    total = 0
    for each in [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]:
        with contextlib.suppress(OSError):  # it has just ended
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


# ---- the timeline ---------------------------------------------------------------------------------------------------


def answers(*labels: int, hop: float = 2.0, length: float = 5.0) -> Iterator[WindowPrediction]:
    picture = pictures(1)[0]
    for number, label in enumerate(labels):
        span = Span(int(25 * number * hop), int(25 * (number * hop + length)), number * hop, number * hop + length)
        best = [Prediction(NAMES[label], 0.5 + 0.1 * (number % 2), label)]
        yield WindowPrediction(number, len(labels), span, best, picture)


def test_windows_of_one_class_are_a_stretch_and_every_moment_has_one() -> None:
    stretches = list(merge_windows(answers(0, 0, 2, 1, 1)))
    assert [(each.name, each.windows) for each in stretches] == [(NAMES[0], 2), (NAMES[2], 1), (NAMES[1], 2)]
    # Middles lie at 2.5, 4.5, 6.5, 8.5, 10.5: the borders are midway between them.
    assert [(each.start, each.end) for each in stretches] == [(0.0, 5.5), (5.5, 7.5), (7.5, 13.0)]
    assert [each.score for each in stretches] == pytest.approx([0.55, 0.5, 0.55])
    assert list(merge_windows(iter(()))) == []


def test_the_picture_of_a_timeline(tmp_path: Path) -> None:
    """With more classes than there are lanes."""
    pytest.importorskip("matplotlib")
    timeline = Timeline()

    def read() -> Iterator[WindowPrediction]:
        for window in answers(*(number % 3 for number in range(40))):
            timeline.add(window)
            yield window._replace(predictions=[window.predictions[0]._replace(label=window.number)])

    timeline.stretches = list(merge_windows(read()))
    draw_timeline(timeline, "a $ b.mp4", tmp_path / "many.png")
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")


def test_predict_prints_and_draws_a_timeline(
    run: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [str(run), "--window=4", "--stride=3", "--hop=8", "--device=cpu"]
    a, broken = str(videos / "a.mp4"), str(videos / "breaks.mp4")
    assert predict([*given, a, broken, f"--output={tmp_path}", "--top=2"]) == 1
    out, err = capsys.readouterr()
    assert a in out.splitlines()
    assert any(line.startswith("      0.00 - ") and "window" in line for line in out.splitlines())
    assert "cannot be read" in err
    assert "breaks.mp4" in err
    (rows,) = [rows_of(path) for path in tmp_path.rglob("a.csv")]
    assert list(rows[0])[5:] == ["class1", "score1", "class2", "score2"]
    assert {path.suffix for path in tmp_path.rglob("breaks.*")} == {".csv", ".png"}  # of what was read before

    assert predict([*given, a, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert [window["start_frame"] for window in plain["windows"]] == list(range(0, len(rows) * 8, 8))
    assert plain["timeline"][0]["start"] == 0
    assert plain["timeline"][-1]["end"] == pytest.approx(2.0)
    for window, row in zip(plain["windows"], rows):
        best = window["predictions"][0]
        assert (best["name"], float(row["score1"])) == (row["class1"], pytest.approx(best["score"], rel=1e-4))


def test_a_folder_without_times_is_reported_and_the_next_file_is_predicted(
    run: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save_series(tmp_path / "frames", 8, "img_*.png")
    video = str(videos / "a.mp4")
    given = [str(run), str(tmp_path / "frames"), video, "--window=4", "--fps=5", "--hop=10", "--device=cpu"]
    assert run_command("predict", given) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == video
    assert "cannot be read" in err
    assert "frames: nothing says when its frames are shown" in err


def test_a_window_that_spans_the_video_has_the_answer_of_its_middle_view(run: Path, tmp_path: Path) -> None:
    video = encode(tmp_path / "short.mp4", 7, tick=Fraction(1, 25))  # 4 frames, 2 apart
    loaded = load(run)
    (window,) = loaded.windows(video)
    from video_convmae.data.options import ViewConfig

    expected = loaded(video, top=3, views=ViewConfig(1, 2))
    assert [each.label for each in window.predictions] == [each.label for each in expected]
    assert [each.score for each in window.predictions] == pytest.approx([each.score for each in expected], abs=1e-6)
    assert window.span == Span(0, 7, 0.0, pytest.approx(0.28))


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (["--window=16"], "--window is 16, and the model takes 4 frames; expected 4"),
        (["--hop=16", "--output=x"], "--output, --hop without --window, which prints a timeline; give it"),
        (["--window=4", "--least=0.3"], "which has no --least; leave it out"),
    ],
)
def test_options_of_a_timeline_alone_are_errors(edits: list[str], message: str, run: Path, videos: Path) -> None:
    with pytest.raises(UserError, match=message):
        predict([str(run), str(videos / "a.mp4"), "--device=cpu", *edits])
