"""List files: the forms that users have load unchanged; what fits no form is an error with its number."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from video_convmae.data.records import ListError, Record, read_list


def write(folder: Path, text: str) -> Path:
    path = folder / "list.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("format", "line", "path", "label", "num_frames"),
    [
        ("video", "videos/a.mp4 7", "videos/a.mp4", 7, None),
        ("video", "a.mp4  7", "a.mp4", 7, None),  # VideoMAE's documentation shows two spaces
        ("video", "a.mp4\t7", "a.mp4", 7, None),
        ("video", "a.mp4 0 -1", "a.mp4", None, None),  # VideoMAE V2's pretraining list
        ("video", "a.mp4", "a.mp4", None, None),
        ("video", "my holiday, part 2.mp4 7", "my holiday, part 2.mp4", 7, None),
        ("video", "take 2 7", "take 2", 7, None),
        ("video", "naïve \"日本\" 'x'.webm 0", "naïve \"日本\" 'x'.webm", 0, None),
        ("frames", "folder/of frames 45 12", "folder/of frames", 12, 45),  # mmaction2
        ("frames", "folder 0 45", "folder", None, 45),  # VideoMAE V2's pretraining list
        ("image", "n01440764/x.JPEG 3", "n01440764/x.JPEG", 3, None),
        ("image", "x.png", "x.png", None, None),
    ],
)
def test_forms(tmp_path: Path, format: str, line: str, path: str, label: int | None, num_frames: int | None) -> None:
    records = read_list(write(tmp_path, f"# a comment\n\n{line}\r\n"), format)
    assert list(records) == [Record(path, label, num_frames, format)]
    (rooted,) = read_list(write(tmp_path, line), format, root="/data")
    assert rooted.path == f"/data/{path}"


def test_absolute_paths_keep_their_place(tmp_path: Path) -> None:
    assert read_list(write(tmp_path, "/else/a.mp4 1"), root="/data")[0].path == "/else/a.mp4"


@pytest.mark.parametrize(
    ("format", "line", "message"),
    [
        ("frames", "folder 5", "line 2: expected 'folder count label'"),
        ("frames", "folder -3 1", "line 2: the frame count is -3"),
        ("frames", "folder 0 0", "line 2: the frame count is 0"),
        ("video", "a.mp4 -2", "line 2: the label is -2"),
        ("image", "a.png -1", "line 2: the label is -1"),
    ],
)
def test_a_line_that_fits_no_form_is_an_error(tmp_path: Path, format: str, line: str, message: str) -> None:
    with pytest.raises(ListError, match=message):
        read_list(write(tmp_path, f"a 1 1\n{line}\n"), format)


@pytest.mark.parametrize(
    ("format", "line", "message"),
    [
        ("video", "a.mp4,3", "',' separates the fields; expected 'path label'.*sed"),
        ("video", "a.mp4, 3", "',' separates the fields"),
        ("video", '"a.mp4",3', "',' separates the fields"),
        ("video", "a.mp4;3", "';' separates the fields"),
        ("video", "a.mp4|3", r"'\|' separates the fields"),
        ("video", "a.mp4::3", "'::' separates the fields"),
        ("video", "v_run_g01,3", "',' separates the fields"),
        ("frames", "folder,45,12", "',' separates the fields; expected 'folder count label'"),
        ("frames", "folder, 45, 12", "',' separates the fields"),
        ("image", "x.png,3", "',' separates the fields"),
        ("video", "a.mp4,run", "',run' stands behind the file name"),
        ("video", '"a.mp4" 3', "'. 3' stands behind the file name.*without quotes"),
        ("video", "a.mp4 run", "'run' stands behind the file name.*classes are numbers"),
        ("video", "a.mp4 1.0", "'1.0' stands behind the file name"),
        ("video", "a.mp4 1 2 5", "3 numbers stand behind the file name .1 2 5..*one label"),
        ("video", "a.webm 0 250 3", "3 numbers stand behind the file name"),
        ("video", "path,label", "a header; expected 'path label'"),
        ("video", "video_path label", "a header"),
        ("video", "label,youtube_id,time_start,time_end,split,is_cc", "a header"),
        ("video", "filename;emotion", "a header"),
        ("video", "path", "a header"),
        ("video", "VideoPath\tLabel", "a header"),
        ("video", "3,a.mp4", "',' separates the fields"),
        ("frames", "frame_dir,total_frames,label", "a header"),
        ("frames", "folder 8 1 2 5", "4 numbers stand behind 'folder' .8 1 2 5., and no 'folder 8 1' is.*one label"),
        ("frames", "folder 0 8 1 2", "4 numbers stand behind 'folder'"),
        ("video", "folder/path 1 2 5", "3 numbers stand behind 'folder/path' .1 2 5..*one label"),
        ("video", "path 1 2 0 -1", "4 numbers stand behind 'path'"),
        ("image", "path 1 2 5", "3 numbers stand behind 'path'"),
    ],
)
def test_lists_of_other_programs_are_recognised(tmp_path: Path, format: str, line: str, message: str) -> None:
    with pytest.raises(ListError, match=f"line 1: {message}"):
        read_list(write(tmp_path, f"{line}\nb.mp4 1\n"), format)


@pytest.mark.parametrize("line", ["a.mp4,3", "a.mp4 1 2 5", "a.mp4 run", "path", "#20.mp4 3"])
def test_a_file_of_such_a_name_is_a_record(tmp_path: Path, line: str) -> None:
    path = line.removesuffix(" 3").removesuffix(" 5")
    (tmp_path / path).touch()
    (record, _) = read_list(write(tmp_path, f"{line}\nb.mp4 1\n"), root=tmp_path)
    assert record.path == str(tmp_path / path)


@pytest.mark.parametrize(("format", "line"), [("video", "take 2 7"), ("image", "take 2 7"), ("frames", "take 2 9 7")])
def test_a_number_behind_a_name_is_of_the_name_or_a_label_too_many(tmp_path: Path, format: str, line: str) -> None:
    path = write(tmp_path, line)
    (tmp_path / "take").mkdir()
    with pytest.raises(ListError, match=r"line 1: . numbers stand behind 'take' .*, and no 'take 2' is there"):
        read_list(path, format, root=tmp_path)
    (tmp_path / "take 2").mkdir()
    assert [(record.path, record.label) for record in read_list(path, format, tmp_path)] == [(f"{tmp_path}/take 2", 7)]


def test_other_files_are_recognised(tmp_path: Path) -> None:
    for text, message in (
        ('[{"id": "1"}]', "is JSON"),
        ("<!DOCTYPE html>\n<html>", "is a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of Git LFS"),
    ):
        with pytest.raises(ListError, match=message):
            read_list(write(tmp_path, text))
    assert read_list(write(tmp_path, "[1] a.mp4 3\n"))[0].path == "[1] a.mp4"


def test_missing_and_empty_lists_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ListError, match="cannot read the list"):
        read_list(tmp_path / "none.txt")
    with pytest.raises(ListError, match="holds no records"):
        read_list(write(tmp_path, "# nothing\n"))
    with pytest.raises(ListError, match=r"data\.format is 'films'"):
        read_list(write(tmp_path, "a 1"), "films")


def test_a_folder_of_class_folders_is_a_list(tmp_path: Path) -> None:
    for name in ("n02/b.JPEG", "n02/a.JPEG", "n01/c.JPEG", "n01/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "readme.txt").touch()
    (tmp_path / "n01" / "Thumbs.db").touch()
    (tmp_path / "n02" / "more" / "deep").mkdir(parents=True)
    (tmp_path / "n02" / "more" / "deep" / "d.jfif").touch()
    (tmp_path / "@eaDir").mkdir()  # of a Synology disk
    records = read_list(tmp_path, "image")
    assert [(Path(r.path).name, r.label) for r in records] == [
        ("c.JPEG", 0),
        ("a.JPEG", 1),
        ("b.JPEG", 1),
        ("d.jfif", 1),
    ]
    assert len(read_list(tmp_path.name, "image", root=tmp_path.parent)) == 4
    with pytest.raises(ListError, match="no class folders with frames"):
        read_list(tmp_path / "n01", "frames")
    with pytest.raises(ListError, match="no class folders with video"):
        read_list(tmp_path)


def test_a_class_folder_without_records_would_shift_the_classes(tmp_path: Path) -> None:
    for name in ("a/x.mp4", "b/readme.txt", "c/y.mp4"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with pytest.raises(ListError, match=r"1 class folders of .* hold no video files, the first 'b'"):
        read_list(tmp_path)


def test_class_folders_that_are_links_and_folders_of_frames(tmp_path: Path) -> None:
    for name in ("a/clip 1/img_1.jpg", "a/clip 1/img_2.jpg", "a/sub/clip 2/img_1.png", "a/Thumbs.db"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    records = read_list(tmp_path, "frames")
    assert [(os.path.relpath(record.path, tmp_path), record.label) for record in records] == [
        ("a/clip 1", 0),
        ("a/sub/clip 2", 0),
        ("b/clip 1", 1),
        ("b/sub/clip 2", 1),
    ]


def test_records_are_a_sequence_that_pickles_small(tmp_path: Path) -> None:
    records = read_list(write(tmp_path, "".join(f"videos/{i:06d}.mp4 {i % 400}\n" for i in range(10_000))))
    assert len(records) == 10_000
    assert records[-1] == records[9_999]
    assert records.labels[:3].tolist() == [0, 1, 2]
    with pytest.raises(IndexError):
        records[10_000]
    stored = pickle.dumps(records)
    assert len(stored) < 50 * len(records)
    assert pickle.loads(stored)[1234] == records[1234]
