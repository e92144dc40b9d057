"""`benchmark loader`, `packing` and `opening`: they measure the loader, and their results are complete."""

from __future__ import annotations

import json
from pathlib import Path

import av
import clips
import numpy as np
import pytest

from video_convmae.benchmark import files as benchmark_files
from video_convmae.benchmark import main as benchmark
from video_convmae.benchmark import opening, packing, reading
from video_convmae.cli import run as run_command
from video_convmae.data.decoding import pyav_reader, read_record
from video_convmae.data.records import Record, read_list
from video_convmae.data.sampling import Sampling
from video_convmae.data.transforms import Augmentation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos and their list."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(2):
        clips.encode(folder / f"{number}.mp4", 70, size=(96, 128), options={"bf": "3", "g": "50"}, seed=number)
    (folder / "list.txt").write_text("0.mp4 0\n1.mp4 1\n")
    return folder


def run(folder: Path, out: Path, *options: str) -> dict | list:
    arguments = [f"--list={folder / 'list.txt'}", f"--root={folder}", "--turns=3", f"--json={out}"]
    assert benchmark.main([options[0], *arguments, *options[1:]]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("options", [(), ("--repeats=2",), ("--views=2x3",), ("--clock=cpu", "--on-device", "--flip")])
def test_loader_against_videomae(options: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("decord", reason="decord has no wheel here")
    result = run(folder, tmp_path / "result.json", "loader", "--vs=videomae", "--size=32", *options)
    keys = {"model", "against", "device", "precision", "threads", "batch", "ratio", "pairs", "ours", "theirs", "commit"}
    assert keys <= set(result)
    assert result["against"] == "videomae"
    assert result["batch"] == (6 if "--views=2x3" in options else 2 if "--repeats=2" in options else 1)
    assert len(result["pairs"]) == 3
    for side in ("ours", "theirs", "floor"):
        assert result[side]["clips_per_second"] > 0
    shares = result["ours"]["shares"]
    assert set(shares) == {"decode", "convert", "augment", "collate", "transfer"}
    assert min(shares.values()) >= 0
    assert shares["decode"] > shares["collate"]


def test_workers_are_measured(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "result.json", "loader", "--size=32", "--workers=1", "--batch=2")
    assert result["against"] == "floor"
    assert result["workers"]["workers"] == 1
    assert result["workers"]["clips_per_second"] > 0


def test_every_side_reads_the_same_frames(folder: Path) -> None:
    records = read_list(folder / "list.txt", root=folder)
    case = reading.ReadCase(
        "x", records, Sampling("dense", 4, 3), 32, 2, None, Augmentation(), reader="pyav", clock="wall"
    )
    asked = []
    stages = reading.StageTimer(case)
    reader = stages.open

    def noting(record: object) -> object:
        opened = reader(record)
        read = opened.read
        opened.read = lambda indices: (asked.append(np.asarray(indices)), read(indices))[1]
        return opened

    stages.open = noting
    for turn in range(5):
        stages(turn)
        assert (asked[turn] == np.unique(case.indices(turn, 70))).all()


def test_packing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--only", "keyframe every 16", "fast, half of the frames"]
    rows = run(folder, tmp_path / "rows.json", "packing", f"--folder={tmp_path}", *only)
    assert [row["variant"] for row in rows] == ["as it is", *only[1:]]
    assert all(row["clips_per_second"] > 0 and row["bytes"] > 0 and row["times"] > 0 for row in rows)
    assert "| as it is |" in capsys.readouterr().out


def test_packing_measures_the_presets_by_default_and_refuses_unknown_variants(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = []
    monkeypatch.setattr(packing, "measure_packing", lambda videos, variants, args: measured.append(variants) or [])
    monkeypatch.setattr(packing, "packing_table", lambda rows: [])
    assert run(folder, tmp_path / "rows.json", "packing") == []
    assert measured == [packing.PRESETS]
    assert run_command("benchmark", ["packing", f"--list={folder / 'list.txt'}", "--only", "slow"]) == 1
    assert "--only is 'slow'; expected some of 'fast', 'fastest'" in capsys.readouterr().err


def test_files_are_of_their_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in benchmark_files.KINDS.items():
        short = {"seconds": (0.5, 0.5), "width": 64, "height": 48}
        monkeypatch.setitem(benchmark_files.KINDS, name, kind.__class__(**{**kind.__dict__, **short}))
        path = benchmark_files.make_files(tmp_path, name, 2)
        made = [(file.name, file.stat().st_mtime_ns) for file in sorted(tmp_path.glob(f"{name}_*"))]
        assert len(made) == len(read_list(path, root=tmp_path)) == 2
        benchmark_files.make_files(tmp_path, name, 2)
        assert made == [(file.name, file.stat().st_mtime_ns) for file in sorted(tmp_path.glob(f"{name}_*"))]
        with av.open(str(tmp_path / made[0][0])) as video:
            assert video.streams.video[0].codec_context.name == ("h264" if name == "kinetics" else "vp9")
            assert len(list(video.decode(video=0))) == round(0.5 * kind.fps[0])


def test_opening_of_a_long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of each pair reads the kept scan; a film repeats the packets of a clip."""
    clips.encode(tmp_path / "kinetics_000.mp4", 50, options={"bf": "3", "b_strategy": "0", "g": "25"})
    monkeypatch.setattr(opening, "make_files", lambda *_: None)
    monkeypatch.setattr(pyav_reader, "KEEP_FRAMES", 1000)
    scans = []
    scan = pyav_reader.scan_packets
    monkeypatch.setattr(pyav_reader, "scan_packets", lambda *given: scans.append(1) or scan(*given))
    out = tmp_path / "opening.json"
    assert benchmark.main(["opening", f"--folder={tmp_path}", "--hours=0.02", "--repeats=2", f"--json={out}"]) == 0
    result = json.loads(out.read_text())
    assert result["frames"] == 1800
    assert len(result["pairs"]) == 2
    assert len(scans) == 2
    assert result["again"]["with_clip_cpu"] > result["again"]["cpu"] > 0
    film = tmp_path / result["file"]
    again = read_record(Record(str(film)), [1030, 1039], "pyav")
    assert (again == read_record(Record(str(tmp_path / "kinetics_000.mp4")), [30, 39], "pyav")).all()
