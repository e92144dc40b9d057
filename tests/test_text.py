"""Lists in the encodings that editors and shells write: right, or an error that says what the file is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_convmae.data.folders import scan_folder
from video_convmae.data.labels import class_names
from video_convmae.data.records import ListError, Records, read_list
from video_convmae.data.text import read_text
from video_convmae.prepare import lists

LINES = "# videos\na.mp4 0\nnaïve Süß.mp4 1\n\n日本 2.mp4 2\n"
MARKED = ("utf-8-sig", "utf-16", "utf-32")  # Python writes a byte-order mark for these
UNMARKED = ("utf-8", "utf-16-le", "utf-16-be")


def rows_of(records: Records) -> list[tuple[str, int | None]]:
    return [(record.path, record.label) for record in records]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", MARKED + UNMARKED)
def test_every_encoding_reads_the_same(tmp_path: Path, encoding: str, newline: str) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(LINES.replace("\n", newline).encode(encoding))
    records = read_list(path)
    assert rows_of(records) == [("a.mp4", 0), ("naïve Süß.mp4", 1), ("日本 2.mp4", 2)]
    assert records.lines.tolist() == [1, 2, 4]
    path.with_name("list.labels.txt").write_bytes("eins\nzwölf\ndrei\n".replace("\n", newline).encode(encoding))
    assert class_names(path) == ["eins", "zwölf", "drei"]


def test_marked_files_may_stand_one_behind_the_other(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("a.mp4 0\n".encode("utf-8-sig") + "b.mp4 1\n".encode("utf-8-sig"))
    assert rows_of(read_list(path)) == [("a.mp4", 0), ("b.mp4", 1)]


def test_windows_encodes_names_its_own_way(tmp_path: Path) -> None:
    """A list saved as cp1252 names files whose names are UTF-8; on another disk, names are cp1252 themselves."""
    (tmp_path / "café.mp4").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.mp4").touch()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/stra\xdfe.mp4")).touch()
    path = tmp_path / "list.txt"
    path.write_bytes(b"caf\xe9.mp4 0\nstra\xdfe.mp4 1\nmissing \xe4.mp4 2\nsub\\d.mp4 3\n")
    names = [os.path.relpath(record.path, tmp_path) for record in read_list(path, root=tmp_path)]
    assert names == ["café.mp4", os.fsdecode(b"stra\xdfe.mp4"), os.fsdecode(b"missing \xe4.mp4"), "sub/d.mp4"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a.mp4 0\nb\0.mp4 1\n", "holds a zero byte in line 2"),
        (b"a.mp4 0\nb.mp4 1\n" + bytes(16), "holds a zero byte in line 3"),  # a disk that lost power
        (b"\0\0\0\x20ftypisom\0\0\2\0" * 3, "holds a zero byte"),  # a video, not a list of them
        ("a.mp4 0\n".encode("utf-16")[:-1], "is not whole: by its first bytes it is UTF-16"),
        (b"\xff\xfe\x00\xd8a\x00", "is not whole"),
    ],
)
def test_what_is_no_text_is_said(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(ListError, match=message):
        read_list(tmp_path / "list.txt")


name_text = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20)
name_bytes = st.binary(min_size=1, max_size=20).filter(lambda data: not set(data) & set(b"/\0")).map(os.fsdecode)


@given(folder=name_text | name_bytes, file=name_text | name_bytes)
def test_what_make_list_writes_is_read_in_every_encoding(
    tmp_path_factory: pytest.TempPathFactory, folder: str, file: str
) -> None:
    """Names of a class folder and a file: listed and read back in whichever encoding the list is saved, or refused."""
    root = tmp_path_factory.mktemp("videos")
    path = root / folder / f"{file}.mp4"
    if folder in (".", ".."):
        return
    path.parent.mkdir(exist_ok=True)
    path.touch()
    out = root.with_name(f"{root.name}.txt")
    tree = scan_folder(root)
    if not len(tree):  # a hidden folder
        return
    try:
        lists.write_listing(out, lists.list_folders(tree), tree)
    except ListError:
        return
    assert rows_of(read_list(out, root=root)) == [(str(path), 0)]
    (name,) = class_names(out)
    name.encode()  # can be printed, and written into a configuration
    text = read_text(out)
    for encoding in (*MARKED, *UNMARKED, "cp1252"):
        try:
            out.write_bytes(text.encode(encoding))
        except UnicodeEncodeError:
            continue  # this encoding has no such character
        try:
            records = read_list(out, root=root)
        except ListError:  # without a mark and mostly without ASCII: said, not guessed
            if not encoding.startswith("utf-16-"):
                raise
        else:
            assert rows_of(records) == [(str(path), 0)]
