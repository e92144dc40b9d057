"""Records in tar archives: read like files everywhere; errors distinguish bad members from bad archives."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import clips
import numpy as np
import pytest
import torch
from PIL import Image
from test_loader import clips_of

from video_convmae.data import shards
from video_convmae.data.datasets import SampleKey
from video_convmae.data.decoding import DecodeError, open_frames, read_record
from video_convmae.data.records import Record, read_list
from video_convmae.prepare.check import check_videos

NAMES = ("0.mp4", "two words 7.mp4", "folder/a.webm")
BAD = {"text.mp4": b"not a video\n" * 100, "empty.mp4": b""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files, an archive of them and of bad ones, and a list of either."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "folder").mkdir()
    for place, name in enumerate(NAMES):
        clips.encode(folder / name, 24 + place, "libvpx-vp9" if name.endswith("webm") else "libx264", seed=place)
    with tarfile.open(folder / "shard-000.tar", "w") as archive:
        for name in NAMES:
            archive.add(folder / name, name)
        for name, data in BAD.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    (folder / "files.txt").write_text("".join(f"{name} {i}\n" for i, name in enumerate(NAMES)))
    (folder / "shards.txt").write_text("".join(f"shard-000.tar#{name} {i}\n" for i, name in enumerate(NAMES)))
    return folder


def test_samples_are_those_of_the_files(folder: Path) -> None:
    of_files, of_shards = (clips_of(read_list(folder / name, root=folder)) for name in ("files.txt", "shards.txt"))
    for index in range(len(NAMES)):
        ours, theirs = of_shards[SampleKey(1, index)], of_files[SampleKey(1, index)]
        assert ours.bad_records == ()
        assert ours.label == index
        assert torch.equal(ours.clips, theirs.clips)


def test_pictures(folder: Path, tmp_path: Path) -> None:
    picture = clips.pictures(1)[0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "pictures.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
    record = Record(f"{tmp_path}/pictures.tar#a.png", format="image")
    assert (read_record(record, [0])[0] == picture).all()


@pytest.mark.parametrize(
    ("member", "error"),
    [
        ("text.mp4", "Invalid data"),
        ("empty.mp4", "is empty (0 bytes)"),
        ("missing.mp4", "no 'missing.mp4' among the 5 files of the archive"),
    ],
)
def test_bad_members(folder: Path, member: str, error: str) -> None:
    path = f"{folder}/shard-000.tar#{member}"
    with pytest.raises(DecodeError, match=re.escape(path)) as caught:
        open_frames(Record(path), "pyav")
    assert error in str(caught.value)


ERRORS = {
    "missing": "No such file",
    "empty": "damaged or cut off",
    "noise": "damaged or cut off",
    "gz": "the archive is gzip, not tar: store its files as a tar without compression",
    "bz2": "the archive is bzip2, not tar",
    "xz": "the archive is xz, not tar",
    "zip": "the archive is zip, not tar",
}


@pytest.mark.parametrize("kind", ERRORS)
def test_bad_archives(folder: Path, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.tar"
    if kind in ("gz", "bz2", "xz"):
        with tarfile.open(path, f"w:{kind}") as archive:
            archive.add(folder / NAMES[0], NAMES[0])
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(folder / NAMES[0], NAMES[0])
    elif kind != "missing":
        path.write_bytes(np.random.default_rng(0).bytes(4096) if kind == "noise" else b"")
    with pytest.raises(DecodeError, match=re.escape(f"{path}#{NAMES[0]}: ")) as caught:
        open_frames(Record(f"{path}#{NAMES[0]}"), "pyav")
    assert ERRORS[kind] in str(caught.value)


def test_compressed_archives_by_name(tmp_path: Path) -> None:
    for name in ("a.tar.gz#x.mp4", "a.zip#x.mp4", "a.tgz#x.mp4"):
        with pytest.raises(DecodeError, match=r"members are read from tar archives without compression, not \.\w"):
            open_frames(Record(str(tmp_path / name)), "pyav")
    clips.encode(tmp_path / "a.zip#x.mp4", 3)  # a file of this name
    assert len(open_frames(Record(str(tmp_path / "a.zip#x.mp4")), "pyav")) == 3


def test_links_and_spellings_of_names(folder: Path, tmp_path: Path) -> None:
    """tar stores the second name of a file as a link to the first, and `tar c .` names members ./a.mp4."""
    (tmp_path / "v" / "sub").mkdir(parents=True)
    os.link(folder / NAMES[0], tmp_path / "v" / "a.mp4")
    os.link(folder / NAMES[0], tmp_path / "v" / "hard.mp4")
    (tmp_path / "v" / "sub" / "soft.mp4").symlink_to("../hard.mp4")
    for name, target in (("gone.mp4", "nowhere.mp4"), ("x.mp4", "y.mp4"), ("y.mp4", "x.mp4")):
        (tmp_path / "v" / name).symlink_to(target)
    path = tmp_path / "v.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(tmp_path / "v", ".")
    data = (folder / NAMES[0]).read_bytes()
    for name in ("a.mp4", "./a.mp4", "hard.mp4", "sub/soft.mp4", "./sub/../a.mp4"):
        assert shards.read_member(str(path), name) == data
        assert shards.holds(str(path), name)
    for name, link in (("gone.mp4", "nowhere.mp4"), ("x.mp4", "x.mp4")):
        assert not shards.holds(str(path), name)
        with pytest.raises(shards.ShardError, match=rf"no '{name}' \(a link to '{link}'\) among the 1 files"):
            shards.read_member(str(path), name)


def test_files_with_holes(tmp_path: Path) -> None:
    """GNU tar --sparse stores the parts that are not zero: here 2 of them, in each of its formats."""
    data = bytearray(1 << 20)
    data[8192:8200], data[900_000:900_005] = b"12345678", b"abcde"
    with open(tmp_path / "holes.bin", "wb") as file:
        file.truncate(len(data))
        for start, size in ((8192, 8), (900_000, 5)):
            file.seek(start)
            file.write(data[start : start + size])
    if shutil.which("tar") is None:
        pytest.skip("no tar program")
    for format in ("gnu", "pax"):
        path = tmp_path / f"{format}.tar"
        subprocess.run(["tar", f"--format={format}", "--sparse", "-C", tmp_path, "-cf", path, "holes.bin"], check=True)
        assert shards.read_member(str(path), "holes.bin") == data


def test_of_members_of_one_name_the_last_counts(tmp_path: Path) -> None:
    for append, mode in ((b"first", "w"), (b"second", "a")):
        with tarfile.open(tmp_path / "a.tar", mode) as archive:
            entry = tarfile.TarInfo("x")
            entry.size = len(append)
            archive.addfile(entry, io.BytesIO(append))
    assert shards.read_member(str(tmp_path / "a.tar"), "x") == b"second"


def test_a_list_in_another_encoding_names_members(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder / NAMES[0], "café.mp4")
    (tmp_path / "list.txt").write_bytes("a.tar#café.mp4 3\n".encode("cp1252"))
    assert read_list(tmp_path / "list.txt", root=tmp_path)[0].path == f"{tmp_path}/a.tar#café.mp4"


def test_an_archive_that_is_cut_off_gives_what_is_before_the_cut(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    data = (folder / "shard-000.tar").read_bytes()
    second = data.index(NAMES[1].encode())
    path.write_bytes(data[: second + 512 + 1000])
    assert read_record(Record(f"{path}#{NAMES[0]}"), [0, 20], "pyav").shape == (2, 48, 64, 3)
    with pytest.raises(DecodeError, match="the archive ends after 1000 of the file's"):
        open_frames(Record(f"{path}#{NAMES[1]}"), "pyav")
    with pytest.raises(DecodeError, match="cut off behind them"):
        open_frames(Record(f"{path}#{NAMES[2]}"), "pyav")


def test_an_archive_is_indexed_once_until_it_changes(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(folder / NAMES[0], "a.mp4")
    shards._index.cache_clear()
    for _ in range(3):
        assert shards.read_member(str(path), "a.mp4") == (folder / NAMES[0]).read_bytes()
    assert shards._index.cache_info().misses == 1
    with tarfile.open(path, "w") as archive:
        archive.add(folder / NAMES[1], "b.mp4")
        archive.add(folder / NAMES[1], "a.mp4")
    os.utime(path, ns=(1, 1))
    assert shards.read_member(str(path), "a.mp4") == (folder / NAMES[1]).read_bytes()


def test_check_videos_reads_archives(folder: Path, tmp_path: Path) -> None:
    rows = [f"shard-000.tar#{name} 0" for name in (*NAMES, *BAD, "missing.mp4")] + ["gone.tar#a.mp4 0"]
    (tmp_path / "list.txt").write_text("\n".join(rows) + "\n")
    summary = check_videos(tmp_path / "list.txt", folder, tmp_path / "out", reader="pyav")
    assert (summary["good"], summary["bad"]) == (3, 4)
    assert summary["codecs"] == {"h264": 2, "vp9": 1}
    assert (tmp_path / "out" / "clean.txt").read_text().splitlines() == rows[:3]
    faults = (tmp_path / "out" / "faults.csv").read_text()
    assert "missing.mp4' among" in faults
    assert "No such file" in faults
