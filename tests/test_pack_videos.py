"""pack-videos: the list keeps its meaning, and no video is packed twice, however the tool ends or a file is damaged."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from fractions import Fraction
from pathlib import Path

import av
import clips
import numpy as np
import pytest
from PIL import Image

from video_convmae.cli import run as run_cli
from video_convmae.data.decoding import DecodeError, open_frames, read_record
from video_convmae.data.records import Record, class_names, read_list
from video_convmae.prepare import pack as tool
from video_convmae.prepare.encode import PackedVideo, pack_video, resample
from video_convmae.prepare.options import PackSettings

ROOT = Path(__file__).parent.parent
ROWS = [
    "# a comment",
    "a.mp4 3",
    "folder/two words 7.webm 1",
    "",
    "bad.mp4 2",
    "./a.mp4  5",
    "missing.mp4 4",
    "c.mkv 0",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad files, a list of them, and names of classes."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "folder").mkdir()
    clips.encode(folder / "a.mp4", 50, size=(96, 128), options={"bf": "3", "b_strategy": "0"})
    clips.encode(folder / "folder" / "two words 7.webm", 30, "libvpx-vp9", size=(49, 65), seed=1)
    clips.encode(folder / "c.mkv", 40, seed=2)
    (folder / "bad.mp4").write_text("not a video\n" * 200)
    (folder / "list.txt").write_text("\n".join(ROWS) + "\n")
    (folder / "list.labels.txt").write_text("\n".join("uvwxyz") + "\n")
    return folder


def run(folder: Path, out: Path, *options: str) -> dict:
    """Run the tool on the list; its summary."""
    arguments = [folder / "list.txt", "--root", folder, "--out", out, "--workers", "1", *options]
    assert run_cli("pack-videos", [str(argument) for argument in arguments]) == 0
    return json.loads((out / "summary.json").read_text())


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the videos that are packed; they are packed in this process."""
    names: list[str] = []

    def pack(process: tool.PackingProcess, record: Record) -> PackedVideo:
        names.append(Path(record.path).name)
        return pack_video(record, process.settings)

    monkeypatch.setattr(tool.PackingProcess, "pack", pack)
    return names


def test_the_list_keeps_its_meaning(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run(folder, tmp_path / "out", "--short-side=48", "--crf=10")
    assert (summary["rows"], summary["good"], summary["bad"]) == (6, 4, 2)
    assert (summary["source_frames"], summary["frames"]) == (120, 120)
    assert summary["psnr"]["min"] > 20
    old, new = (
        read_list(folder / "list.txt", root=folder),
        read_list(tmp_path / "out" / "list.txt", root=tmp_path / "out"),
    )
    kept = [0, 1, 3, 5]
    assert [record.label for record in new] == [old[place].label for place in kept] == [3, 1, 5, 0]
    assert new.lines.tolist() == old.lines[kept].tolist()  # so a record shows the same samples
    names = ["a.mp4", "folder/two words 7.webm.mp4", "a.mp4", "c.mkv.mp4"]
    assert [record.path for record in new] == [str(tmp_path / "out" / "videos" / name) for name in names]
    assert (tmp_path / "out" / "list.labels.txt").read_bytes() == (folder / "list.labels.txt").read_bytes()
    with open(tmp_path / "out" / "faults.csv", newline="") as file:
        faults = {int(row["line"]): row for row in csv.DictReader(file)}
    assert {line: row["record"] for line, row in faults.items()} == {5: "bad.mp4", 7: "missing.mp4"}
    assert "Invalid data" in faults[5]["error"]
    assert "6 rows: 4 packed" in capsys.readouterr().out


def test_a_size_that_changes_is_packed_at_the_first_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = clips.encode_sizes(tmp_path / "call.webm", "libvpx", [(96, 128), (48, 64)])
    (tmp_path / "list.txt").write_text("call.webm 1\n")
    summary = run(tmp_path, tmp_path / "out", "--crf=10")
    assert "the size of the picture changes, from 128x96 to 64x48 at frame 12" in summary["notes"][0]["note"]
    assert "1 good with a note: call.webm: the size" in capsys.readouterr().out
    packed = read_record(Record(str(tmp_path / "out" / "videos" / "call.webm.mp4")), range(24), "pyav").astype(float)
    shown = read_record(Record(str(path)), range(24), "pyav")
    assert packed.shape == shown.shape == (24, 96, 128, 3)
    assert np.abs(packed - shown).mean(axis=(1, 2, 3)).max() < 6


def test_packed_frames_are_the_source_s(folder: Path) -> None:
    record = Record(str(folder / "a.mp4"))
    packed = pack_video(record, PackSettings(crf=10))
    assert (packed.frames, packed.source_frames, packed.width, packed.height) == (50, 50, 128, 96)
    before = read_record(record, range(50), "pyav").astype(float)
    with av.open(io.BytesIO(packed.data)) as container:
        frames = list(container.decode(video=0))
    after = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    errors = np.square(after - before).mean(axis=(1, 2, 3))
    assert errors.max() < 60  # neighbouring frames differ by more than 1,000
    assert [frame.key_frame for frame in frames].count(True) >= 50 / 16
    assert [round(frame.time * 25) for frame in frames] == list(range(50))


@pytest.mark.parametrize(
    "name",
    [
        "rotated 90.mp4",
        "variable rate.mp4",
        "edit list.mp4",
        "h264 raw.h264",
        "h264 full range.mp4",
        "one frame.mp4",
        "mpeg4 B-frames.avi",
        "h264 444 odd size.mp4",
        "open GOP.mkv",
        "h264 intra refresh.mkv",
    ],
)
def test_odd_sources(name: str, tmp_path: Path) -> None:
    record = Record(str(clips.make(name, tmp_path)))
    packed = pack_video(record, PackSettings(crf=10))
    (tmp_path / "packed.mp4").write_bytes(packed.data)
    with open_frames(record, "pyav") as source, open_frames(Record(str(tmp_path / "packed.mp4")), "pyav") as result:
        assert len(source) == len(result)
        height, width = source.read([0]).shape[1:3]
        assert (packed.height, packed.width) == (height // 2 * 2, width // 2 * 2)
        if source.scan.timed:
            seconds = [(scan.times - scan.times[0]) * float(scan.tick) for scan in (source.scan, result.scan)]
            assert np.abs(seconds[0] - seconds[1]).max() < 0.002
    # Colours and sides are right; of 4:4:4 a part of the colours goes.
    assert packed.psnr > (18 if "444" in name else 28)


@pytest.mark.parametrize("short_side", [64, 32])
def test_the_psnr_of_interlaced_videos_is_that_of_the_frames(short_side: int, tmp_path: Path) -> None:
    """Both are converted and scaled frame by frame, as readers do, not by fields."""
    record = Record(str(clips.make("h264 interlaced.mp4", tmp_path)))
    packed = pack_video(record, PackSettings(short_side=short_side, crf=5))
    (tmp_path / "packed.mp4").write_bytes(packed.data)
    with open_frames(record, "pyav") as source, open_frames(Record(str(tmp_path / "packed.mp4")), "pyav") as result:
        places = np.unique(np.linspace(0, 59, 32).astype(int))
        size = (packed.width, packed.height)
        frames = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in source.read(places)]
        errors = np.square(result.read(places).astype(float) - np.stack([np.asarray(frame) for frame in frames]))
    assert packed.psnr == pytest.approx(10 * np.log10(255**2 / errors.mean()), abs=0.1 if short_side == 64 else 3)


def test_fewer_frames(tmp_path: Path) -> None:
    path = clips.encode(tmp_path / "a.mp4", 50)
    packed = pack_video(Record(str(path)), PackSettings(fps=10))
    assert (packed.frames, packed.source_frames) == (20, 50)
    assert pack_video(Record(str(path)), PackSettings(fps=30)).frames == 50


def test_resampling_keeps_the_frames_on_screen() -> None:
    """The example of its docstring; at a variable rate a frame that stays on screen is kept once."""
    fifth = Fraction(1, 5)
    kept, ticks, tick, rate = resample(np.arange(5), fifth, Fraction(5), 2.0)
    assert (kept.tolist(), ticks.tolist(), tick, rate) == ([0, 2], [0, 1], Fraction(1, 2), Fraction(2))
    kept, ticks, _, _ = resample(np.array([0, 1, 2, 9, 10]), fifth, Fraction(5), 2.5)
    assert kept.tolist() == [0, 2, 4]  # frame 2 is on screen from 0.4 to 1.8 s
    assert ticks.tolist() == [0, 1, 5]
    kept, ticks, tick, rate = resample(np.array([0, 3]), fifth, Fraction(5), 5.0)
    assert (kept.tolist(), ticks.tolist(), tick, rate) == ([0, 1], [0, 3], fifth, Fraction(5))


def test_sizes() -> None:
    assert PackSettings(short_side=256).size(1280, 720) == (456, 256)
    assert PackSettings(short_side=256).size(427, 240) == (428, 240)
    assert PackSettings(short_side=240).size(240, 427) == (240, 428)


@pytest.mark.parametrize("tar", [(), ("--tar=2",)])
def test_nothing_is_packed_twice(tar: tuple[str, ...], folder: Path, tmp_path: Path, packs: list[str]) -> None:
    out = tmp_path / "out"
    run(folder, out, *tar)
    assert packs == ["a.mp4", "two words 7.webm", "bad.mp4", "missing.mp4", "c.mkv"]
    made = {path: path.read_bytes() for path in out.rglob("*.*") if path.name != "packed.jsonl"}
    log = (out / "packed.jsonl").read_text().splitlines(keepends=True)
    packs.clear()
    run(folder, out, *tar)
    assert packs == ["bad.mp4", "missing.mp4"]
    assert {path: path.read_bytes() for path in made} == made

    (out / "packed.jsonl").write_text(log[0] + log[1][:30])  # killed before the second was written down
    packs.clear()
    run(folder, out, *tar)
    assert "a.mp4" not in packs
    assert {path: path.read_bytes() for path in made} == made


def test_a_source_that_was_replaced_is_packed_again(tmp_path: Path, packs: list[str]) -> None:
    for name in ("a.mp4", "b.mp4"):
        clips.encode(tmp_path / name, 20)
    (tmp_path / "list.txt").write_text("a.mp4\nb.mp4\n")
    run(tmp_path, tmp_path / "out")
    clips.encode(tmp_path / "b.mp4", 10, seed=5)
    packs.clear()
    assert run(tmp_path, tmp_path / "out")["frames"] == 30
    assert packs == ["b.mp4"]


def test_shards_are_webdataset_s(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out", "--tar=2", "--short-side=48")
    members = {}
    for shard in sorted((tmp_path / "out" / "shards").iterdir()):
        with tarfile.open(shard) as archive:
            members[shard.name] = archive.getnames()
            assert archive.extractfile(archive.getnames()[0]).read() == b"3" or shard.name != "000000.tar"
    assert members == {
        "000000.tar": [
            "00000002_a.cls",
            "00000002_a.mp4",
            "00000003_two words 7_webm.cls",
            "00000003_two words 7_webm.mp4",
        ],
        "000001.tar": ["00000008_c_mkv.cls", "00000008_c_mkv.mp4"],
    }
    records = read_list(tmp_path / "out" / "list.txt", root=tmp_path / "out")
    assert [record.label for record in records] == [3, 1, 5, 0]
    for record in records:
        with open_frames(record, "pyav") as reader:
            assert len(reader) in (50, 30, 40)
    # Shards can be packed again.
    again = tmp_path / "again"
    tool.pack_videos(tmp_path / "out" / "list.txt", tmp_path / "out", again, PackSettings(short_side=32))
    assert "videos/shards/000000.tar/00000002_a.mp4 3" in (again / "list.txt").read_text().splitlines()


@pytest.mark.parametrize("tar", [(), ("--tar=2",)])
def test_a_killed_run_resumes(tar: tuple[str, ...], tmp_path: Path) -> None:
    for number in range(4):
        clips.encode(tmp_path / f"{number}.mp4", 60, size=(96, 128), seed=number)
    (tmp_path / "list.txt").write_text("".join(f"{number}.mp4 {number}\n" for number in range(4)))
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "tools" / "pack_videos.py", tmp_path / "list.txt", "--root", tmp_path]
    command += ["--out", out, "--workers", "1", *tar]
    log = out / "packed.jsonl"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= 2):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    done = log.read_text().splitlines()[:2]
    for path in (out / "shards").glob("*"):
        with open(path, "ab") as file:
            file.write(b"half a video" * 1000)
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert log.read_text().splitlines()[:2] == done
    assert log.read_text().count("\n") == 4
    whole = tmp_path / "whole"
    tool.pack_videos(tmp_path / "list.txt", tmp_path, whole, PackSettings(), tar=2 if tar else 0)
    names = {path.relative_to(out) for path in out.rglob("*") if path.suffix in (".mp4", ".tar", ".txt", ".partial")}
    assert names == {path.relative_to(whole) for path in whole.rglob("*") if path.suffix in (".mp4", ".tar", ".txt")}
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_worker_that_hangs_or_ends_costs_the_video(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hangs.mp4")
    process = tool.PackingProcess(PackSettings(), timeout=3.0)
    try:
        with pytest.raises(DecodeError, match=r"hangs.mp4: nothing was decoded within 3 s"):
            process.pack(Record(str(tmp_path / "hangs.mp4")))
        assert process.pack(Record(str(folder / "a.mp4"))).frames == 50
        os.kill(process._child.pid, signal.SIGKILL)
        process._child._process.wait()
        assert process.pack(Record(str(folder / "a.mp4"))).frames == 50
    finally:
        process.close()


def test_what_cannot_be_done_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"crf": 3}))
    (tmp_path / "b.txt").write_text("a.webm.mp4\na.webm\n")
    (tmp_path / "c.txt").write_text("../x/a.mp4\n")
    for arguments, error in (
        ([folder / "list.txt", "--out", tmp_path], r"packed with other settings \(.*crf 3"),
        ([tmp_path / "b.txt", "--out", tmp_path / "b"], "lines 1 and 2 would both be packed into videos/a.webm.mp4"),
        ([tmp_path / "gone.txt", "--out", tmp_path / "c"], "cannot read the list"),
        ([folder / "list.txt", "--out", folder], "would be overwritten"),
    ):
        assert run_cli("pack-videos", [str(argument) for argument in arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(error, line)


@pytest.mark.parametrize("tar", [(), ("--tar", "2")], ids=["files", "shards"])
def test_no_source_is_packed_over(tar: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--out beside the videos is a habit: their folder is named videos/ or shards/, too."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "shards").mkdir()
    source = clips.encode(tmp_path / "videos" / "a.mp4", 12)
    with tarfile.open(tmp_path / "shards" / "000000.tar", "w") as archive:
        archive.add(source, "a.mp4")
    root, row = (tmp_path / "shards", "000000.tar#a.mp4") if tar else (tmp_path / "videos", "a.mp4")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "all.txt").write_text(f"{row} 0\n")
    (tmp_path / "link").symlink_to(root)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for settings in (False, True):  # a folder that is new, and one that holds packed videos already
        for folder in (root, tmp_path / "link"):
            options = [tmp_path / "lists" / "all.txt", "--root", folder, "--out", tmp_path, *tar]
            assert run_cli("pack-videos", [str(option) for option in options]) == 1
            assert "is a source, and would be overwritten" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in before} == before
        if not settings:
            (tmp_path / "settings.json").write_text("{}")


def test_files_that_it_has_not_packed_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips.encode(tmp_path / "a.mp4", 12)
    (tmp_path / "list.txt").write_text("a.mp4 0\n")
    for kept in ("out/list.txt", "out/videos/a.mp4"):
        out = tmp_path / kept.split("/")[0]
        (tmp_path / kept).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / kept).write_text("mine")
        options = [tmp_path / "list.txt", "--root", tmp_path, "--out", out]
        assert run_cli("pack-videos", [str(option) for option in options]) == 1
        assert f"{tmp_path / kept} exists and was not packed here" in capsys.readouterr().err
        assert (tmp_path / kept).read_text() == "mine"
        (tmp_path / kept).unlink()


def test_lists_in_other_encodings_and_with_other_names(tmp_path: Path) -> None:
    clips.encode(tmp_path / "café.mp4", 12)
    (tmp_path / "k400.train").write_text("café.mp4 0\r\n", encoding="utf-16")
    (tmp_path / "k400.val").write_bytes("café.mp4 1\n".encode("cp1252"))
    for name in ("k400.train", "k400.val"):
        (tmp_path / f"{name}.labels.txt").write_text("eins\nzwölf\n", encoding="utf-16")
        options = [
            tmp_path / name,
            "--root",
            tmp_path,
            "--out",
            tmp_path / "out",
            "--workers",
            "1",
            "--speed=ultrafast",
        ]
        assert run_cli("pack-videos", [str(option) for option in options]) == 0
    for label, name in enumerate(("k400.train", "k400.val")):
        (record,) = read_list(tmp_path / "out" / f"{name}.txt", root=tmp_path / "out")
        assert record.label == label
        assert len(open_frames(record, "pyav")) == 12
        assert class_names(tmp_path / "out" / f"{name}.txt") == ["eins", "zwölf"]
