"""make-list over trees in the official layouts: lists read back as the rows that were meant."""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from pathlib import Path

import clips
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from video_convmae.cli import run as run_cli
from video_convmae.data.folders import SUFFIXES, Tree, scan_folder
from video_convmae.data.labels import labels_file, read_names
from video_convmae.data.records import ListError, read_list
from video_convmae.prepare import lists as tool
from video_convmae.prepare.annotations import Annotation, Entry
from video_convmae.shipped import shipped_labels

ODD_NAMES = (
    "plain",
    "two words",
    "comma, and 'quotes' \"both\"",
    "déjà vu 東京",
    "take 2",
    "100% # sure?",
    "ends in 7",
)


def touch(root: Path, *paths: str) -> None:
    """Empty files: the tool opens none."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def rows_of(path: Path, format: str = "video") -> list[tuple[str, int | None]]:
    return [(record.path, record.label) for record in read_list(path, format)]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run_cli("make-list", [str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run_cli("make-list", [str(argument) for argument in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("video-convmae make-list: error: ")
    return line


# Kinetics-400

K400_ROWS = (
    ("zumba", "--3bOJ8vXqM", 4, 14),
    ("passing American football (in game)", "abcDEF_-123", 0, 10),
    ("air drumming", "-0xyz", 115, 125),
    ("massaging person's head", "gone", 3, 13),
)


def k400_csv(path: Path, columns: str = "label,youtube_id,time_start,time_end,split") -> Path:
    names = columns.split(",")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        for label, video, start, end in K400_ROWS:
            values = {"label": label, "youtube_id": video, "time_start": start, "time_end": end}
            writer.writerow({**dict.fromkeys(names, "train"), **{k: v for k, v in values.items() if k in names}})
    return path


def test_kinetics_with_flat_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tmp_path / "videos", tmp_path / "lists" / "train.txt"
    touch(root, "--3bOJ8vXqM_000004_000014.mp4", "abcDEF_-123.mp4", "-0xyz_000115_000125.webm")
    touch(root, "unknown_000000_000010.mp4", "notes.txt", ".hidden.mp4")
    printed = run(capsys, "kinetics400", "--annotation", k400_csv(tmp_path / "train.csv"), "--root", root, "--out", out)
    assert rows_of(out) == [
        ("--3bOJ8vXqM_000004_000014.mp4", 399),
        ("abcDEF_-123.mp4", 208),
        ("-0xyz_000115_000125.webm", 1),
    ]
    assert (out.parent / "train.missing.txt").read_text() == "gone_000003_000013\n"
    labels = (out.parent / "train.labels.txt").read_text().splitlines()
    assert labels == read_names(shipped_labels("kinetics400"))
    assert labels[208] == "passing American football (in game)"
    for words in ("3 listed", "1 in the annotation are missing", "1 files under", ".txt 1"):
        assert words in printed


@pytest.mark.parametrize("separator", [" ", "_"])
def test_kinetics_with_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str], separator: str) -> None:
    root, out = tmp_path / "videos", tmp_path / "train.txt"
    paths = [
        f"{label.replace(' ', separator)}/{video}_{start:06d}_{end:06d}.mp4" for label, video, start, end in K400_ROWS
    ]
    touch(root, *paths)
    copy = "replacement/-0xyz_000115_000125.mp4"  # not in the folder of its class
    touch(root, copy)
    printed = run(capsys, "kinetics400", "--annotation", k400_csv(tmp_path / "train.csv"), "--root", root, "--out", out)
    assert rows_of(out) == list(zip(paths, [399, 208, 1, 196]))
    assert "0 missing" in printed
    assert not tool.missing_file(out).exists()


def test_kinetics_test_split_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "videos", "-0xyz_000115_000125.mp4")
    annotation = k400_csv(tmp_path / "test.csv", "youtube_id,time_start,time_end,split")
    run(
        capsys, "kinetics400", "--annotation", annotation, "--root", tmp_path / "videos", "--out", tmp_path / "test.txt"
    )
    assert rows_of(tmp_path / "test.txt") == [("-0xyz_000115_000125.mp4", None)]


def test_the_shipped_label_names_are_the_usual_ones() -> None:
    kinetics = read_names(shipped_labels("kinetics400"))
    something = read_names(shipped_labels("something_something_v2"))
    assert (len(set(kinetics)), len(set(something))) == (400, 174)
    assert kinetics == sorted(kinetics)
    assert (kinetics[0], kinetics[399], something[0], something[173]) == (
        "abseiling",
        "zumba",
        "Approaching something with your camera",
        "Wiping something off of something",
    )


def test_a_list_in_the_working_directory_is_not_taken_for_class_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "videos", "-0xyz_000115_000125.mp4")
    k400_csv(tmp_path / "train.csv")
    for _ in range(2):
        run(capsys, "kinetics400", "--annotation", "train.csv", "--root", "videos", "--out", "kinetics400.txt")
    assert rows_of(tmp_path / "kinetics400.txt") == [("-0xyz_000115_000125.mp4", 1)]


# Something-Something V2


def ssv2_json(path: Path) -> Path:
    videos = [
        {"id": "78687", "label": "holding potato next to can", "template": "Holding [something] next to [something]"},
        {"id": "42326", "template": "[Something] falling like a feather or paper", "placeholders": ["leaf"]},
        {"id": "5", "template": "Poking [something] so lightly that it doesn't or almost doesn't move"},
    ]
    path.write_text(json.dumps(videos))
    return path


def test_something_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tmp_path / "20bn something, v2", tmp_path / "train.txt"
    touch(root, "78687.webm", "42326.mp4", "1.webm")
    arguments = ["--annotation", ssv2_json(tmp_path / "train.json"), "--root", root, "--out", out]
    printed = run(capsys, "ssv2", *arguments)
    names = read_names(shipped_labels("something_something_v2"))
    assert [(path, names[label]) for path, label in rows_of(out)] == [
        ("78687.webm", "Holding something next to something"),
        ("42326.mp4", "Something falling like a feather or paper"),
    ]
    assert tool.missing_file(out).read_text() == "5\n"
    assert "1 files under" in printed

    official = tmp_path / "labels.json"
    official.write_text(json.dumps({name: str(number) for number, name in reversed(list(enumerate(names)))}))
    shipped = rows_of(out), labels_file(out).read_text()
    run(capsys, "ssv2", *arguments, "--labels", official)
    assert (rows_of(out), labels_file(out).read_text()) == shipped


def test_something_something_test_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test.json").write_text(json.dumps([{"id": "1420"}, {"id": 9}]))
    touch(tmp_path / "videos", "1420.webm", "9.webm")
    out = tmp_path / "test.txt"
    run(capsys, "ssv2", "--annotation", tmp_path / "test.json", "--root", tmp_path / "videos", "--out", out)
    assert rows_of(out) == [("1420.webm", None), ("9.webm", None)]


# UCF101 and HMDB51


def test_ucf101(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = tmp_path / "ucfTrainTestlist"
    splits.mkdir()
    (splits / "classInd.txt").write_text("1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n")
    (splits / "trainlist02.txt").write_text(
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\nHandstandPushups/v_HandStandPushups_g01_c01.avi 2\r\n"
    )
    (splits / "testlist02.txt").write_text("HandstandPushups/v_HandStandPushups_g02_c01.avi\r\n")
    root, out = tmp_path / "UCF-101", tmp_path / "train.txt"
    touch(root, "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "HandstandPushups/v_HandStandPushups_g01_c01.avi")
    touch(root, "v_HandStandPushups_g02_c01.avi")
    run(capsys, "ucf101", "--splits", splits, "--fold", 2, "--part", "train", "--root", root, "--out", out)
    assert rows_of(out) == [
        ("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", 0),
        ("HandstandPushups/v_HandStandPushups_g01_c01.avi", 1),
    ]
    run(capsys, "ucf101", "--splits", splits, "--fold", 2, "--part", "test", "--root", root, "--out", out)
    assert rows_of(out) == [("v_HandStandPushups_g02_c01.avi", 1)]
    assert labels_file(out).read_text() == "ApplyEyeMakeup\nHandstandPushups\n"


def test_hmdb51(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits, root, out = tmp_path / "testTrainMulti_7030_splits", tmp_path / "hmdb51", tmp_path / "out.txt"
    splits.mkdir()
    files = {
        "brush_hair": {"April_09_brush_hair_u_nm_np1_ba_goo_0": 1, "sarah_brushing_hair_0": 0, "both_0": 2},
        "clap": {"#20_Rhythm_clap_u_nm_np1_fr_goo_0": 1, "(Rad) Schlag die Bank, 2! é_clap_0": 2, "both_0": 1},
    }
    for label, videos in files.items():
        lines = [f"{name}.avi {flag} \n" for name, flag in videos.items()]
        (splits / f"{label}_test_split1.txt").write_text("".join(lines), encoding="utf-8")
        (splits / f"{label}_test_split2.txt").write_text("")
        touch(root, *(f"{label}/{name}.avi" for name in videos))
    printed = run(capsys, "hmdb51", "--splits", splits, "--part", "train", "--root", root, "--out", out)
    assert rows_of(out) == [
        ("brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi", 0),
        ("clap/#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi", 1),
        ("clap/both_0.avi", 1),
    ]
    assert "3 files under" in printed
    run(capsys, "hmdb51", "--splits", splits, "--part", "test", "--root", root, "--out", out)
    assert rows_of(out) == [("brush_hair/both_0.avi", 0), ("clap/(Rad) Schlag die Bank, 2! é_clap_0.avi", 1)]


# Folders, and names


def test_folders_with_odd_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tmp_path / "my videos", tmp_path / "mine.txt"
    paths = [f"{label}/{name}{suffix}" for label in ODD_NAMES for name in ODD_NAMES for suffix in (".mp4", ".webm")]
    touch(root, *paths, "loose.mp4")
    printed = run(capsys, "folders", "--root", root, "--out", out)
    labels = labels_file(out).read_text(encoding="utf-8").splitlines()
    assert labels == sorted(ODD_NAMES)
    listed = rows_of(out)
    assert sorted(path for path, _ in listed) == sorted(paths)
    assert all(path.startswith(labels[label] + "/") for path, label in listed)
    assert "1 files under" in printed


def test_folders_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "images", "n01440764/a 1.JPEG", "n01443537/b.png", "n01443537/c.mp4")
    out = tmp_path / "images.txt"
    printed = run(capsys, "folders", "--format", "image", "--root", tmp_path / "images", "--out", out)
    assert rows_of(out, "image") == [("n01440764/a 1.JPEG", 0), ("n01443537/b.png", 1)]
    assert ".mp4 1" in printed


def test_folders_split_in_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "videos"
    paths = {f"{label}/{index}.mp4" for label in "ab" for index in range(20)}
    touch(root, *paths)
    parts = {}
    for part in ("train", "validation"):
        options = ["--part", part, "--validation-fraction", 0.25, "--seed", 1]
        run(capsys, "folders", "--root", root, "--out", tmp_path / f"{part}.txt", *options)
        parts[part] = rows_of(tmp_path / f"{part}.txt")
    assert [label for _, label in parts["validation"]] == [0] * 5 + [1] * 5
    assert len(parts["train"]) == 30
    assert {path for rows in parts.values() for path, _ in rows} == paths
    assert "needs both" in fails(capsys, "folders", "--root", root, "--out", tmp_path / "x.txt", "--part", "train")


@given(
    paths=st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1), min_size=1, max_size=5),
    label=st.none() | st.integers(0, 1000),
)
def test_what_is_written_reads_back_or_is_refused(tmp_path_factory: pytest.TempPathFactory, paths, label) -> None:
    out = tmp_path_factory.mktemp("lists") / "list.txt"
    rows = [(path, label) for path in paths]
    try:
        tool.write_list(out, rows, ["a"])
    except ListError as refusal:
        message = str(refusal)
    else:
        message = ""
    assert out.exists() != bool(message)
    if message:
        assert any(repr(path) in message for path in paths)
    else:
        assert rows_of(out) == rows


@pytest.mark.parametrize("path", ["#1/a.mp4", "two\nlines.mp4", "a\r.mp4", " a.mp4", "a.mp4 ", "a  2"])
def test_a_name_that_no_list_can_hold_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "list.txt").write_text("the list before\n")
    with pytest.raises(ListError, match="cannot hold"):
        tool.write_list(tmp_path / "list.txt", [("good.mp4", 0), (path, 3), ("good too.mp4", 1)], ["a"])
    assert [file.name for file in tmp_path.iterdir()] == ["list.txt"]
    assert (tmp_path / "list.txt").read_text() == "the list before\n"


@pytest.mark.parametrize("path", ["take 2", "folder 3/take 4 -1", "a 0 -1", "-1", "7", "x -1/y.mp4", "a.mp4 5 6"])
def test_names_that_end_in_numbers(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, path)  # else "a.mp4 5 6 3" has three labels
    tool.write_list(tmp_path / "list.txt", [(path, 3)], ["a"], root="")
    assert rows_of(tmp_path / "list.txt") == [(path, 3)]


def test_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    touch(tmp_path / "videos", f"class/{name}")
    run(capsys, "folders", "--root", tmp_path / "videos", "--out", tmp_path / "list.txt")
    assert rows_of(tmp_path / "list.txt") == [(f"class/{name}", 0)]
    assert (tmp_path / "list.txt").read_bytes() == b"class/caf\xe9.mp4 0\n"


def test_accents_may_be_written_in_two_ways(tmp_path: Path) -> None:
    """macOS takes a name apart into letter and accent; the path is listed as the disk has it."""
    apart = unicodedata.normalize("NFD", "café")
    touch(tmp_path, f"{apart}.webm")
    annotation = Annotation([Entry(("café",), "x")], ["x"])
    assert tool.match_files(annotation, scan_folder(tmp_path)).rows == [(f"{apart}.webm", 0)]


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "b.mp4")
    touch(tmp_path / "root", "a/a.mp4")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "a" / "back").symlink_to(tmp_path / "root")
    assert scan_folder(tmp_path / "root").files == {"a": ["a/a.mp4"], "b": ["linked/b.mp4"]}


# Errors say what is wrong, where, and what was expected


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tmp_path / "videos", tmp_path / "out.txt"
    touch(root, "other.mp4")
    ends = ["--root", root, "--out", out]
    annotation = k400_csv(tmp_path / "train.csv")
    empty = tmp_path / "empty"
    empty.mkdir()

    message = fails(capsys, "kinetics400", "--annotation", annotation, *ends)
    assert "nothing to list" in message
    assert "'other.mp4'" in message
    assert "'--3bOJ8vXqM_000004_000014'" in message
    assert "not a folder" in fails(capsys, "folders", "--root", tmp_path / "no", "--out", out)
    assert "No such file" in fails(capsys, "kinetics400", "--annotation", tmp_path / "no.csv", *ends)
    assert "expected a folder a class" in fails(capsys, "folders", *ends)

    columns = k400_csv(tmp_path / "columns.csv", "label,youtube_id,split")
    assert "expected also time_start, time_end" in fails(capsys, "kinetics400", "--annotation", columns, *ends)
    (tmp_path / "few.txt").write_text("zumba\n")
    message = fails(capsys, "kinetics400", "--annotation", annotation, "--labels", tmp_path / "few.txt", *ends)
    assert "train.csv, line 3" in message
    assert "passing American football" in message

    (tmp_path / "bad.json").write_text("{")
    assert "is not json" in fails(capsys, "ssv2", "--annotation", tmp_path / "bad.json", *ends)
    (tmp_path / "bad.json").write_text('[{"id": "1", "template": "Eating [something]"}]')
    assert "'Eating something'" in fails(capsys, "ssv2", "--annotation", tmp_path / "bad.json", *ends)
    assert "bad.json" in fails(
        capsys, "ssv2", "--annotation", ssv2_json(tmp_path / "t.json"), *ends, "--labels", "bad.json"
    )

    (empty / "classInd.txt").write_text("1 Archery\n3 Biking\n")
    assert "classInd.txt, line 2" in fails(capsys, "ucf101", "--splits", empty, "--part", "test", *ends)
    assert "<class>_test_split1.txt" in fails(capsys, "hmdb51", "--splits", empty, "--part", "test", *ends)
    (empty / "clap_test_split1.txt").write_text("a.avi 3\n")
    assert "clap_test_split1.txt, line 1" in fails(capsys, "hmdb51", "--splits", empty, "--part", "test", *ends)
    assert not out.exists()


# What is listed: links, frames, suffixes; what is written over


def test_class_folders_that_are_links_are_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "v", "a/x.mp4", "a/sub/y.mp4", "c/z.mp4")
    (tmp_path / "v" / "b").symlink_to(tmp_path / "v" / "a")
    (tmp_path / "v" / "c" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    printed = run(capsys, "folders", "--root", tmp_path / "v", "--out", tmp_path / "l.txt")
    assert rows_of(tmp_path / "l.txt") == [
        ("a/sub/y.mp4", 0),
        ("a/x.mp4", 0),
        ("b/sub/y.mp4", 1),
        ("b/x.mp4", 1),
        ("c/z.mp4", 2),
    ]
    assert "b is the same folder as a (a link)" in printed
    assert "broken link or no file 1" in printed


def test_folders_of_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tmp_path / "frames", tmp_path / "list.txt"
    touch(root, *(f"run/clip 1/img_{i:05d}.jpg" for i in range(3)), "run/clip 1/Thumbs.db")
    touch(root, *(f"walk/deep/v.1/{i}.png" for i in range(2)), "walk/readme.txt", "walk/empty/notes.txt")
    printed = run(capsys, "folders", "--format", "frames", "--root", root, "--out", out)
    assert out.read_text() == "run/clip 1 3 0\nwalk/deep/v.1 2 1\n"
    assert [(r.path, r.num_frames, r.label) for r in read_list(out, "frames")] == [
        ("run/clip 1", 3, 0),
        ("walk/deep/v.1", 2, 1),
    ]
    assert ".db 1" in printed

    touch(tmp_path / "ssv2", *(f"78687/{i:06d}.jpg" for i in range(4)), "42326/000001.jpg", "42326.txt")
    annotation = ["--annotation", ssv2_json(tmp_path / "t.json"), "--root", tmp_path / "ssv2", "--out", out]
    run(capsys, "ssv2", "--format", "frames", *annotation)
    names = read_names(shipped_labels("something_something_v2"))
    assert out.read_text().splitlines() == [
        f"78687 4 {names.index('Holding something next to something')}",
        f"42326 1 {names.index('Something falling like a feather or paper')}",
    ]
    (tmp_path / "t.json").write_text('[{"id": "78687"}]')
    run(capsys, "ssv2", "--format", "frames", *annotation)
    assert out.read_text() == "78687 0 4\n"  # without a label


def test_every_suffix_that_is_listed_is_opened() -> None:
    """tests/clips.py makes what encoders here can write; by suffix, the kinds are in the list."""
    suffixes = {Path(name).suffix for name in clips.GOOD}
    assert suffixes <= set(SUFFIXES["video"])
    assert {".3gp", ".asf", ".vob", ".ogv", ".m2v", ".mts", ".gif"} <= set(SUFFIXES["video"])
    readable = {suffix for suffix, format in Image.registered_extensions().items() if format in Image.OPEN}
    assert set(SUFFIXES["image"]) <= readable | {".avif"}  # of newer Pillows


def test_annotations_in_other_encodings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotation, out = k400_csv(tmp_path / "train.csv"), tmp_path / "out.txt"
    touch(tmp_path / "v", "-0xyz.mp4")
    text = annotation.read_text()
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le"):
        annotation.write_bytes(text.encode(encoding))
        run(capsys, "kinetics400", "--annotation", annotation, "--root", tmp_path / "v", "--out", out)
        assert rows_of(out) == [("-0xyz.mp4", 1)]
    annotation.write_bytes(text.encode() + b"\0")
    arguments = ["--annotation", annotation, "--root", tmp_path / "v", "--out", out]
    assert "holds a zero byte in line" in fails(capsys, "kinetics400", *arguments)


def test_class_names_that_are_no_text_are_written_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "v", os.fsdecode(b"caf\xe9/a.mp4"))
    run(capsys, "folders", "--root", tmp_path / "v", "--out", tmp_path / "l.txt")
    assert (tmp_path / "l.labels.txt").read_text(encoding="utf-8") == "café\n"
    assert (tmp_path / "l.txt").read_bytes() == b"caf\xe9/a.mp4 0\n"


def test_what_is_read_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "v"
    touch(root, "-0xyz.mp4")
    annotation = k400_csv(tmp_path / "train.csv")
    os.symlink(annotation, tmp_path / "link.txt")
    k400_csv(tmp_path / "x.labels.txt")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for read, out in (("train.csv", "train.csv"), ("train.csv", "link.txt"), ("x.labels.txt", "x.txt")):
        arguments = ["--annotation", tmp_path / read, "--root", root, "--out", tmp_path / out]
        assert "would be overwritten" in fails(capsys, "kinetics400", *arguments)
    arguments = ["--annotation", annotation, "--root", root, "--out"]
    assert "is a folder; expected the list to write" in fails(capsys, "kinetics400", *arguments, root)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    for _ in range(2):  # the names of an earlier list may be read and written again
        names = [] if _ == 0 else ["--labels", tmp_path / "y.labels.txt"]
        run(capsys, "kinetics400", *arguments, tmp_path / "y.txt", *names)
        assert rows_of(tmp_path / "y.txt") == [("-0xyz.mp4", 1)]


# Clips of one recording


def split(tree: Tree, fraction: float, group: str | None, seed: int = 0) -> tuple[tool.Listing, tool.Listing]:
    parts = [tool.list_folders(tree, part, fraction, seed, group) for part in ("train", "validation")]
    return parts[0], parts[1]


def tree_of(*paths: str) -> Tree:
    tree = Tree(Path("videos"))
    for path in paths:
        tree.add(path)
    return tree


@given(
    sizes=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 8)), min_size=4, max_size=60),
    fraction=st.floats(0.1, 0.5),
    seed=st.integers(0, 9),
)
def test_clips_of_one_recording_stay_on_one_side(sizes: list[tuple[str, int]], fraction: float, seed: int) -> None:
    """Whatever the recordings, of one class or of several: nothing is lost, listed twice, or on both sides."""
    paths = [f"{label}/rec{recording}_c{clip}.mp4" for clip, (label, recording) in enumerate(sizes)]
    recordings = {recording for _, recording in sizes}
    if len(recordings) < 2:
        return
    try:
        parts = split(tree_of(*paths), fraction, r"rec\d+", seed)
    except ListError:  # one of the parts would be empty
        return
    listed = [[path for path, _ in listing.rows] for listing in parts]
    assert sorted(listed[0] + listed[1]) == sorted(paths)
    sides = [{path.split("rec")[1].split("_")[0] for path in side} for side in listed]
    assert not sides[0] & sides[1]


def test_groups_keep_the_fraction_and_every_class() -> None:
    paths = [f"{label}/{label}_g{group:02d}_c{clip}.avi" for label in "xyz" for group in range(20) for clip in range(4)]
    train, validation = split(tree_of(*paths), 0.25, r"^(.*)_c\d")
    for label in range(3):
        assert [row[1] for row in validation.rows].count(label) == 20
        assert [row[1] for row in train.rows].count(label) == 60
    assert "240 files of 60 recordings" in validation.notes[0]
    two = [f"a/r1_{clip}.mp4" for clip in range(9)] + [f"a/r2_{clip}.mp4" for clip in range(9)]
    train, validation = split(tree_of(*two, "b/r3_0.mp4", "b/r3_1.mp4"), 0.1, r"r\d")
    assert len(validation.rows) == 9  # rather than none
    assert "1 classes have no file in the validation part, too few files or recordings: 'b'" in validation.notes


@pytest.mark.parametrize("group", [None, r"^(.*)_c\d"])
@pytest.mark.parametrize("seed", range(4))
def test_files_that_are_added_move_the_split_at_its_cut_alone(group: str | None, seed: int) -> None:
    """Lists of both parts, made on different days: what has become validation data is hardly in the training list."""
    paths = [f"{label}/{take:02d}_c{clip}.mp4" for label in "ab" for take in range(20) for clip in range(2)]
    new = [f"{label}/99_c{clip}.mp4" for label in "ab" for clip in range(2)]
    train, before = split(tree_of(*paths), 0.2, group, seed)
    validation = split(tree_of(*paths, *new), 0.2, group, seed)[1]
    assert len(before.rows) == 16
    assert len(set(train.rows) & set(validation.rows)) <= 2  # one a class
    assert len(set(before.rows) & set(validation.rows)) >= 12
    others = split(tree_of(*paths), 0.2, group, seed + 4)[1]
    assert set(others.rows) != set(before.rows)


def test_every_class_of_two_files_is_in_both_parts() -> None:
    train, validation = split(tree_of("a/0.mp4", "a/1.mp4", "b/0.mp4"), 0.2, None)
    assert [[label for _, label in part.rows] for part in (train, validation)] == [[0, 1], [0]]
    assert "1 classes have no file in the validation part, too few files or recordings: 'b'" in validation.notes


def test_the_parts_of_a_split_are_no_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(
        tmp_path / "ds", *(f"{part}/{label}/{i}.mp4" for part in ("train", "Val") for label in "ab" for i in range(2))
    )
    message = (
        "ds holds the parts of a split (Val, train), not classes; expected class folders: name each part by itself"
    )
    assert message in fails(capsys, "folders", "--root", tmp_path / "ds", "--out", tmp_path / "l.txt")
    with pytest.raises(ListError, match=re.escape(message)):
        read_list("ds", root=tmp_path)
    touch(tmp_path / "vehicles", "train/0.mp4", "tram/0.mp4")
    touch(tmp_path / "trains", "train/0.mp4")
    for name in ("vehicles", "trains"):
        run(capsys, "folders", "--root", tmp_path / name, "--out", tmp_path / "l.txt")
        assert ("train/0.mp4", 0) in rows_of(tmp_path / "l.txt")


def test_patterns_that_find_nothing_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "v", *(f"a/take{i}_{j}.mp4" for i in range(3) for j in range(2)), "a/other.mp4")
    arguments = ["folders", "--root", tmp_path / "v", "--part", "train", "--validation-fraction", 0.3]
    arguments += ["--out", tmp_path / "l.txt", "--group"]
    assert "matches none of the 7 paths" in fails(capsys, *arguments, "scene")
    assert "is no regular expression" in fails(capsys, *arguments, "(")
    printed = run(capsys, *arguments, r"take\d")
    assert "1 files do not match --group and stand for themselves: 'a/other.mp4'" in printed
    assert "--group" in run(capsys, *arguments[:-1])  # a split without it says so
