"""check-videos: every bad file is named, every good row kept, nothing read twice after an interruption."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import clips
import numpy as np
import pytest
from PIL import Image

from tools.study.clips import write_h264
from video_convmae.cli import run as run_cli
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.records import Record, class_names
from video_convmae.data.sampling import dense_views
from video_convmae.prepare import check as tool

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
GOOD = ("plain.mp4", "two words, a comma.mp4", 'déjà "vu" 7.webm')


def write_video(path: Path, count: int = 20, **options: str) -> None:
    """A moving gradient, 48x32 at 10 frames a second: h264 in mp4 or vp9 in webm."""
    ramp = np.arange(48)[None, :, None] + np.arange(32)[:, None, None]
    frames = np.stack([np.repeat((ramp * 2 + 5 * i) % 256, 3, -1) for i in range(count)]).astype(np.uint8)
    if path.suffix == ".mp4" and not options:
        write_h264(path, frames, fps=10)
        return
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9" if path.suffix == ".webm" else "libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.options = options
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad files, and a list of them with a comment and an empty line."""
    folder = tmp_path_factory.mktemp("videos")
    for name in GOOD:
        write_video(folder / name)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video\n" * 100)
    (folder / "cut.mp4").write_bytes((folder / "plain.mp4").read_bytes()[:600])
    (folder / "folder.mp4").mkdir()
    names = ["# a comment", "", *GOOD, "empty.mp4", "text.mp4", "cut.mp4", "missing.mp4", "folder.mp4", "plain.mp4"]
    (folder / "list.txt").write_text(
        "".join(f"{name} {i}\n" if name and name[0] != "#" else f"{name}\n" for i, name in enumerate(names)),
        encoding="utf-8",
    )
    return folder


def check(folder: Path, out: Path, *options: str) -> list[dict[str, str]]:
    """Run the tool; the rows of faults.csv."""
    arguments = [folder / "list.txt", "--root", folder, "--out", out, "--reader", "pyav", "--workers", "2", *options]
    assert run_cli("check-videos", [str(argument) for argument in arguments]) == 0
    with open(out / "faults.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the records that were read."""
    names: list[str] = []
    work_on = tool.CheckJob.work_on

    def count(job: tool.CheckJob, record: Record, worker: ReaderProcess) -> dict:
        names.append(Path(record.path).name)
        return work_on(job, record, worker)

    monkeypatch.setattr(tool.CheckJob, "work_on", count)
    return names


def test_good_rows_are_kept_and_bad_ones_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = check(folder, tmp_path / "out")
    rows = (folder / "list.txt").read_text(encoding="utf-8").splitlines()
    bad = {6: "empty.mp4", 7: "text.mp4", 8: "cut.mp4", 9: "missing.mp4", 10: "folder.mp4"}
    assert {int(fault["line"]): fault["record"] for fault in faults} == bad
    assert all(fault["record"] in fault["error"] for fault in faults)
    clean = (tmp_path / "out" / "clean.txt").read_text(encoding="utf-8").splitlines()
    assert clean == [*rows[2:5], rows[10]]

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["rows"], summary["good"], summary["bad"]) == (9, 4, 5)
    assert summary["sizes"] == {"48x32": 4}
    assert summary["frame_rates"] == {"10": 4}
    assert summary["codecs"] == {"h264": 3, "vp9": 1}
    assert summary["frames"] == {"min": 20, "median": 20, "max": 20}
    assert summary["seconds"] == {"min": 2, "median": 2, "max": 2}
    assert sum(summary["errors"].values()) == 5
    printed = capsys.readouterr().out
    for words in ("9 rows: 4 good", "5 bad", "48x32 (4)", "h264 (3), vp9 (1)", "is empty"):
        assert words in printed


def test_a_size_that_changes_is_said_and_read_as_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips.encode_sizes(tmp_path / "call.webm", "libvpx", [(96, 128), (48, 64)])
    clips.encode(tmp_path / "plain.mp4", 12)
    (tmp_path / "list.txt").write_text("plain.mp4 0\ncall.webm 1\n")
    check(tmp_path, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["good"], summary["sizes"]) == (2, {"64x48": 1, "128x96": 1})
    (note,) = summary["notes"]
    assert (note["line"], note["record"]) == (2, "call.webm")
    assert "changes, from 128x96 to 64x48 at frame 12 or before; every frame is scaled to the first" in note["note"]
    assert "1 good with a note: call.webm: the size of the picture changes" in capsys.readouterr().out
    with ReaderProcess("pyav") as process, process.open(Record(str(tmp_path / "call.webm"))) as reader:
        assert reader.read([0, 20]).shape == (2, 96, 128, 3)
        assert reader.note == note["note"].replace("frame 12", "frame 20")


def test_half_of_a_download_is_bad(tmp_path: Path) -> None:
    """The frames that are left decode, and training reads them."""
    clips.encode(tmp_path / "half.mp4", 100, container={"movflags": "faststart"}, options={"g": "12"})
    for name in ("half.mkv", "whole.mkv"):
        clips.encode(tmp_path / name, 100, options={"g": "12"})
    for name in ("half.mp4", "half.mkv"):
        clips.cut(tmp_path / name, 0.6)
    (tmp_path / "list.txt").write_text("half.mp4 0\nwhole.mkv 1\nhalf.mkv 2\n")
    for options in ((), ("--full",)):
        faults = check(tmp_path, tmp_path / "out", *options)
        assert [fault["record"] for fault in faults] == ["half.mp4", "half.mkv"]
        assert all("is cut off" in fault["error"] and "header says 4.0 seconds" in fault["error"] for fault in faults)
        assert (tmp_path / "out" / "clean.txt").read_text() == "whole.mkv 1\n"
    with ReaderProcess("pyav") as process, process.open(Record(str(tmp_path / "half.mp4"))) as reader:
        assert reader.damaged
        assert reader.read(range(len(reader))).shape == (len(reader), 48, 64, 3)


def test_12_bits_in_16_are_noted(tmp_path: Path) -> None:
    for name, brightest in (("12 bits.png", 4095), ("12 bits.tif", 4095), ("16 bits.png", 65535), ("black.png", 0)):
        Image.fromarray(np.linspace(0, brightest, 600).reshape(20, 30).astype(np.uint16)).save(tmp_path / name)
    (tmp_path / "list.txt").write_text("12 bits.png 0\n16 bits.png 0\n12 bits.tif 1\nblack.png 1\n")
    assert not check(tmp_path, tmp_path / "out", "--format", "image")
    notes = json.loads((tmp_path / "out" / "summary.json").read_text())["notes"]
    assert [note["record"] for note in notes] == ["12 bits.png", "12 bits.tif"]
    assert "nearly black: the largest 16-bit value is 4095" in notes[0]["note"]
    assert "if these are 12 bits, multiply them by 16" in notes[0]["note"]


def test_a_dark_picture_among_bright_ones_is_not_noted(tmp_path: Path) -> None:
    for folder, brightest in (("night falls", (60_000, 900)), ("12 bits", (4000, 900))):
        (tmp_path / folder).mkdir()
        for number, value in enumerate(brightest):
            Image.fromarray(np.full((20, 30), value, np.uint16)).save(tmp_path / folder / f"{number}.png")
    (tmp_path / "list.txt").write_text("night falls 2 0\n12 bits 2 1\n")
    assert not check(tmp_path, tmp_path / "out", "--format", "frames")
    notes = json.loads((tmp_path / "out" / "summary.json").read_text())["notes"]
    assert [note["record"] for note in notes] == ["12 bits"]


def check_with_names(folder: Path, out: Path) -> Path:
    """Check the list while it has class names; returns `out`."""
    names = folder / "list.labels.txt"
    names.write_text("one\ntwo\n", encoding="utf-8")
    try:
        check(folder, out)
    finally:
        names.unlink()
    return out


def test_the_clean_list_has_the_class_names_of_the_list(folder: Path, tmp_path: Path) -> None:
    out = check_with_names(folder, tmp_path / "out")
    assert class_names(out / "clean.txt") == ["one", "two"]
    check(folder, out)  # those of the earlier check belong to another list
    assert class_names(out / "clean.txt") is None


def test_what_was_good_is_not_read_twice(folder: Path, tmp_path: Path, reads: list[str]) -> None:
    out = tmp_path / "out"
    faults = check(folder, out)
    outputs = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "checked.jsonl"}
    assert len(reads) == 8  # plain.mp4 stands twice in the list
    bad = {fault["record"] for fault in faults}

    lines = (out / "checked.jsonl").read_text().splitlines(keepends=True)
    good = [line for line in lines if json.loads(line)["error"] is None]
    (out / "checked.jsonl").write_text("".join(good[:2]) + good[2][:20])  # killed in the middle of a line
    reads.clear()
    check(folder, out)
    assert set(reads) == bad | {Path(json.loads(good[2])["path"]).name}
    assert outputs == {path.name: path.read_bytes() for path in out.iterdir() if path.name != "checked.jsonl"}
    reads.clear()
    check(folder, out)
    assert set(reads) == bad

    reads.clear()
    check(folder, out, "--full")
    assert len(reads) == 8


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name)
    (tmp_path / "list.txt").write_text("a.mp4\nb.mp4\nc.mp4\n")
    assert [fault["record"] for fault in check(tmp_path, tmp_path / "out")] == ["c.mp4"]
    os.replace(tmp_path / "b.mp4", tmp_path / "c.mp4")
    (tmp_path / "b.mp4").write_bytes(b"broken")
    reads.clear()
    assert [fault["record"] for fault in check(tmp_path, tmp_path / "out")] == ["b.mp4"]
    assert sorted(reads) == ["b.mp4", "c.mp4"]


def test_an_interrupted_check_resumes(
    folder: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work_on = tool.CheckJob.work_on

    def interrupted(job: tool.CheckJob, record: Record, worker: ReaderProcess) -> dict:
        if record.path.endswith("missing.mp4"):
            raise KeyboardInterrupt
        return work_on(job, record, worker)

    options = ["--root", folder, "--out", tmp_path / "out", "--reader", "pyav", "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(tool.CheckJob, "work_on", interrupted)
        assert run_cli("check-videos", [str(option) for option in [folder / "list.txt", *options]]) == 130
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line == "video-convmae check-videos: interrupted; the same command resumes"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checked.jsonl"]
    assert set(GOOD) <= set(reads)
    reads.clear()
    assert len(check(folder, tmp_path / "out")) == 5
    assert not set(GOOD) & set(reads)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    os.rename(tmp_path / "a.mp4", os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.mp4 1\nth\xe9.mp4 2\n")
    check_options = [tmp_path / "list.txt", "--root", tmp_path, "--out", tmp_path / "out", "--reader", "pyav"]
    assert run_cli("check-videos", [str(option) for option in check_options]) == 0
    assert (tmp_path / "out" / "clean.txt").read_bytes() == b"caf\xe9.mp4 1\n"
    assert (tmp_path / "out" / "faults.csv").read_bytes().splitlines()[1].startswith(b"2,th\xe9.mp4,")


def test_a_file_that_hangs_is_given_up(tmp_path: Path) -> None:
    """Opening a pipe without a writer never returns. The other files are read, the hanging one is named."""
    write_video(tmp_path / "a.mp4")
    os.mkfifo(tmp_path / "x.mp4")
    write_video(tmp_path / "z.mp4")
    (tmp_path / "list.txt").write_text("a.mp4 0\nx.mp4 1\nz.mp4 2\n")
    start = time.monotonic()
    faults = check(tmp_path, tmp_path / "out", "--timeout", "2", "--workers", "1")
    assert time.monotonic() - start < 15
    assert [(fault["line"], fault["record"]) for fault in faults] == [("2", "x.mp4")]
    assert "2 s" in faults[0]["error"]
    assert (tmp_path / "out" / "clean.txt").read_text() == "a.mp4 0\nz.mp4 2\n"


def test_full_finds_damage_that_a_look_does_not(tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    write_video(path, 200, g="5", bf="0")
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        positions = [(packet.pos, packet.size) for packet in packets[30:40]]
    data = bytearray(path.read_bytes())
    for position, size in positions:
        data[position : position + size] = bytes(size)
    path.write_bytes(data)
    (tmp_path / "list.txt").write_text("long.mp4\n")
    assert set(range(30, 40)).isdisjoint(tool.frames_to_check(200))
    assert not check(tmp_path, tmp_path / "out")
    assert [fault["record"] for fault in check(tmp_path, tmp_path / "out", "--full")] == ["long.mp4"]


def test_full_reads_every_frame_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "clip.mp4")
    seen: list[int] = []

    class Reader:
        def __init__(self, record: Record) -> None:
            self._opened = process.open(record)
            self.name, self.note, self.damaged = "pyav", None, False

        def __enter__(self) -> Reader:
            return self

        def __exit__(self, *exception: object) -> None:
            self._opened.close()

        def __len__(self) -> int:
            return len(self._opened)

        def read(self, indices: list[int]) -> np.ndarray:
            seen.extend(indices)
            return self._opened.read(indices)

    class Opener:
        open = staticmethod(Reader)

    monkeypatch.setattr(tool, "CHUNK_BYTES", 7 * 48 * 32 * 3)
    with ReaderProcess("pyav") as process:
        record = Record(str(tmp_path / "clip.mp4"))
        result = tool.CheckJob(tmp_path / "checked.jsonl", "pyav", 60.0, full=True).work_on(record, Opener())
    assert result["frames"] == 20
    assert seen == [0, *range(20)]


@pytest.mark.parametrize("count", [1, 2, 16, 61, 62, 300])
def test_a_look_takes_both_ends_the_middle_and_a_clip(count: int) -> None:
    frames = tool.frames_to_check(count)
    assert {0, count // 2, count - 1} <= set(frames)
    assert (np.diff(frames) > 0).all()
    assert set(dense_views(count, 16, 4, segments=1)[0]) <= set(frames)
    assert len(frames) <= 19
    if count > 61:
        start = (count - 61) // 2
        assert set(range(start, start + 61, 4)) <= set(frames)


def test_pictures_and_folders_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "clip 1").mkdir()
    for index in range(3):
        Image.new("RGB", (20, 10), (index, 0, 0)).save(tmp_path / "clip 1" / f"img_{index:05d}.jpg")
    (tmp_path / "list.txt").write_text("clip 1/img_00000.jpg 4\nclip 1/img_00009.jpg 5\n")
    faults = check(tmp_path, tmp_path / "images", "--format", "image")
    assert [fault["record"] for fault in faults] == ["clip 1/img_00009.jpg"]
    assert json.loads((tmp_path / "images" / "summary.json").read_text())["codecs"] == {"jpg": 1}
    (tmp_path / "list.txt").write_text("clip 1 3 7\nclip 2 3 7\n")
    faults = check(tmp_path, tmp_path / "frames", "--format", "frames")
    assert [fault["record"] for fault in faults] == ["clip 2"]
    assert (tmp_path / "frames" / "clean.txt").read_text() == "clip 1 3 7\n"


def test_errors_say_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("check-videos", [str(tmp_path / "no.txt"), "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no.txt" in line
    (tmp_path / "list.txt").write_text("a.mp4\n")
    with pytest.raises(SystemExit) as stop:
        run_cli("check-videos", [str(tmp_path / "list.txt"), "--out", str(tmp_path / "out"), "--workers", "0"])
    assert stop.value.code == 2
    assert "--workers: it is '0'; expected whole number (1 or more)" in capsys.readouterr().err


def test_a_clean_list_can_be_checked_in_its_own_folder(folder: Path, tmp_path: Path, reads: list[str]) -> None:
    out = check_with_names(folder, tmp_path / "out")
    clean = (out / "clean.txt").read_text(encoding="utf-8")
    reads.clear()
    options = ["--root", str(folder), "--out", str(out), "--reader", "pyav"]
    assert run_cli("check-videos", [str(out / "clean.txt"), *options]) == 0
    assert (out / "clean.txt").read_text(encoding="utf-8") == clean
    assert class_names(out / "clean.txt") == ["one", "two"]
    assert (out / "faults.csv").read_text() == "line,record,error\n"
    assert not reads


def test_an_interrupted_check_leaves_the_list_that_it_reads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    check(folder, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def interrupted(job: tool.CheckJob, record: Record, worker: ReaderProcess) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool.CheckJob, "work_on", interrupted)
    options = ["--root", str(folder), "--out", str(out), "--reader", "pyav", "--full"]
    assert run_cli("check-videos", [str(out / "clean.txt"), *options]) == 130
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_no_record_of_a_list_in_another_encoding_is_lost(folder: Path, tmp_path: Path, encoding: str) -> None:
    (tmp_path / "list.txt").write_text(f"{GOOD[2]} 0\r\n{GOOD[0]} 1\r\n", encoding=encoding, newline="")
    (tmp_path / "list.labels.txt").write_text("eins\nzwölf\n", encoding=encoding)
    options = [tmp_path / "list.txt", "--root", folder, "--out", tmp_path / "out", "--reader", "pyav"]
    assert run_cli("check-videos", [str(option) for option in options]) == 0
    clean = tmp_path / "out" / "clean.txt"
    assert clean.read_text(encoding="utf-8") == f"{GOOD[2]} 0\n{GOOD[0]} 1\n"
    assert class_names(clean) == ["eins", "zwölf"]


def test_rows_that_are_bad_now_are_kept_beside_the_list(tmp_path: Path) -> None:
    """A disk that is not mounted makes every record bad: the only list of them must not become an empty one."""
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name)
    (tmp_path / "list.txt").write_text("a.mp4 0\nb.mp4 1\n")
    out = tmp_path / "out"
    check(tmp_path, out)
    assert not (out / "clean.before.txt").exists()
    os.rename(tmp_path / "b.mp4", tmp_path / "c.mp4")
    options = [out / "clean.txt", "--root", tmp_path, "--out", out, "--reader", "pyav"]
    assert run_cli("check-videos", [str(option) for option in options]) == 0
    assert (out / "clean.txt").read_text() == "a.mp4 0\n"
    assert (out / "clean.before.txt").read_text() == "a.mp4 0\nb.mp4 1\n"


def test_what_it_reads_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4")
    (tmp_path / "clean.before.txt").write_text("a.mp4 0\n")
    (tmp_path / "link.txt").symlink_to("clean.before.txt")
    for name in ("clean.before.txt", "link.txt"):
        options = [tmp_path / name, "--root", tmp_path, "--out", tmp_path, "--reader", "pyav"]
        assert run_cli("check-videos", [str(option) for option in options]) == 1
        assert "would be overwritten" in capsys.readouterr().err
    options = [tmp_path / "link.txt", "--root", tmp_path / "gone", "--out", tmp_path / "out"]
    assert run_cli("check-videos", [str(option) for option in options]) == 1
    assert f"--root {tmp_path}/gone is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        ((1, 2), "labels begin at 1"),
        ((0, 3), "2 of the 4 classes have no record in the list: 1 to 2"),
        ((0, 2_000_000_000), "a.mp4 has the label 2000000000, and the list has 2 labels"),
        ((0, 1), None),
    ],
)
def test_labels_are_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: tuple[int, int], note: str | None
) -> None:
    write_video(tmp_path / "a.mp4")
    (tmp_path / "list.txt").write_text("".join(f"a.mp4 {label}\n" for label in labels))
    check(tmp_path, tmp_path / "out")
    notes = json.loads((tmp_path / "out" / "summary.json").read_text())["labels"]
    assert [note in each for each in notes] == ([] if note is None else [True])
    assert (note or "labels:") in capsys.readouterr().out or note is None


def test_class_names_that_are_no_text(tmp_path: Path) -> None:
    """make-list writes them as text; a file of names from elsewhere is read all the same."""
    write_video(tmp_path / "a.mp4")
    (tmp_path / "list.txt").write_text("a.mp4 0\n")
    (tmp_path / "list.labels.txt").write_bytes(b"caf\xe9\n")
    check(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "clean.labels.txt").read_text(encoding="utf-8") == "café\n"


@pytest.mark.parametrize("reader", ["pyav", "auto"])
def test_torch_is_not_imported(reader: str, tmp_path: Path) -> None:
    """Even where "auto" has to try torchcodec: a child process imports torch for it."""
    write_video(tmp_path / "a.mp4")
    (tmp_path / "list.txt").write_text("a.mp4 0\n")
    code = f"""
import sys
from video_convmae.cli.check_videos import main
assert main(["list.txt", "--out", "out", "--workers", "1", "--reader", {reader!r}]) == 0
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert (tmp_path / "out" / "clean.txt").read_text() == "a.mp4 0\n"


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_by_a_signal_it_leaves_no_process_and_resumes(
    tmp_path: Path, number: signal.Signals, request: pytest.FixtureRequest
) -> None:
    """An interrupt while one file hangs does not wait for the timeout, and earlier results are kept."""
    for index in range(4):
        write_video(tmp_path / f"{index}.mp4")
    os.mkfifo(tmp_path / "hangs.mp4")
    (tmp_path / "list.txt").write_text("".join(f"{index}.mp4\n" for index in range(4)) + "hangs.mp4\n")
    results = tmp_path / "out" / "checked.jsonl"
    options = ["--root", tmp_path, "--out", tmp_path / "out", "--reader", "pyav", "--workers", "1", "--timeout", "300"]
    process = subprocess.Popen(
        [sys.executable, "-m", "video_convmae", "check-videos", tmp_path / "list.txt", *options],
        env=ENVIRONMENT,
        stderr=subprocess.DEVNULL,
        # A shell starts background jobs, and so perhaps this test, with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    request.addfinalizer(process.kill)
    deadline = time.monotonic() + 120
    while not (results.exists() and results.read_text().count("\n") == 4):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    children = children_of(process.pid)
    assert children
    process.send_signal(number)
    assert process.wait(30) == (130 if number == signal.SIGINT else -signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    faults = check(tmp_path, tmp_path / "out", "--timeout", "1")
    assert [fault["record"] for fault in faults] == ["hangs.mp4"]
    assert len(results.read_text().splitlines()) == 5


def children_of(pid: int) -> list[int]:
    """The child processes, started by whichever thread."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
