"""Shards: those that webdataset's own writer makes are read here, and ours by its reader."""

from __future__ import annotations

import io
from pathlib import Path

import clips
import pytest
import torch
import webdataset
from PIL import Image
from test_loader import clips_of
from test_remote import cache, copies, upload  # noqa: F401  # the first is a fixture

from video_convmae.cli import make_list, pack_videos
from video_convmae.data.datasets import SampleKey
from video_convmae.data.decoding import read_frames, read_record
from video_convmae.data.records import ListError, read_list


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(4):
        clips.encode(folder / f"{i}.mp4", 20 + i, seed=i)
    (folder / "list.txt").write_text("".join(f"{i}.mp4 {i % 2}\n" for i in range(4)))
    return folder


def write_shards(folder: Path, samples: list[dict], each: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(f"{folder}/train-%03d.tar", maxcount=each, verbose=0) as writer:
        for n, sample in enumerate(samples):
            writer.write({"__key__": f"{n:04d}", **sample})


def video_samples(videos: Path, classes: list | None) -> list[dict]:
    of_class = [{}] * 4 if classes is None else [{"cls": each} for each in classes]
    return [{"mp4": (videos / f"{i}.mp4").read_bytes(), "json": {"fps": 25}, **of_class[i]} for i in range(4)]


@pytest.mark.parametrize(
    ("classes", "labels", "names"),
    [([0, 1, 0, 1], [0, 1, 0, 1], None), (["b", "a", "b", "a"], [1, 0, 1, 0], "a\nb\n"), (None, [-1] * 4, None)],
)
def test_their_shards_are_read_here(
    videos: Path, tmp_path: Path, classes: list | None, labels: list[int], names: str | None
) -> None:
    if classes is not None and isinstance(classes[0], str):
        samples = [sample | {"cls": sample["cls"].encode()} for sample in video_samples(videos, classes)]
    else:
        samples = video_samples(videos, classes)
    write_shards(tmp_path / "shards", samples)
    out = tmp_path / "list.txt"
    assert make_list.main(["webdataset", "--root", str(tmp_path / "shards"), "--out", str(out)]) == 0
    records = read_list(out, root=tmp_path / "shards")
    assert records.labels.tolist() == labels
    beside = tmp_path / "list.labels.txt"
    assert (beside.read_text() if beside.exists() else None) == names
    ours, theirs = clips_of(records), clips_of(read_list(videos / "list.txt", root=videos))
    for index in range(4):
        assert torch.equal(ours[SampleKey(2, index)].clips, theirs[SampleKey(2, index)].clips)


def test_their_shards_by_url(videos: Path, tmp_path: Path, cache: Path) -> None:  # noqa: F811
    write_shards(tmp_path / "shards", video_samples(videos, [0, 1, 0, 1]))
    root = upload(tmp_path / "shards", "flaky")
    out = tmp_path / "list.txt"
    make_list.main(["webdataset", "--root", root, "--out", str(out)])
    records = read_list(out, root=root)
    assert [record.path for record in records] == [f"{root}/train-00{i // 2}.tar#{i:04d}.mp4" for i in range(4)]
    assert records.labels.tolist() == [0, 1, 0, 1]
    for i in (3, 0):  # in any order
        assert (read_frames(records[i].path, reader="pyav") == read_frames(videos / f"{i}.mp4", reader="pyav")).all()
    assert not any(path.stat().st_size > (videos / "3.mp4").stat().st_size * 1.5 for path in copies(cache))


def test_their_pictures(tmp_path: Path) -> None:
    pictures = clips.pictures(2)
    encoded = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        encoded.append({"png": file.getvalue(), "cls": 0})
    write_shards(tmp_path / "shards", encoded)
    out = tmp_path / "list.txt"
    make_list.main(["webdataset", "--root", str(tmp_path / "shards"), "--out", str(out), "--format", "image"])
    records = read_list(out, "image", tmp_path / "shards")
    assert all((read_record(record, [0])[0] == picture).all() for record, picture in zip(records, pictures))


@pytest.mark.parametrize(
    ("samples", "error"),
    [
        ([], r"holds no shards \(\*\.tar\)"),
        ([{"txt": "a"}], "hold no video"),
        ([{"mp4": b"1", "cls": 1}, {"mp4": b"1"}], r"1 of the 2 samples in .* have no \.cls beside them"),
    ],
)
def test_shards_that_make_no_list(tmp_path: Path, samples: list[dict], error: str) -> None:
    if samples:
        write_shards(tmp_path / "shards", samples)
    (tmp_path / "shards").mkdir(exist_ok=True)
    with pytest.raises(ListError, match=error):
        make_list.main(["webdataset", "--root", str(tmp_path / "shards"), "--out", str(tmp_path / "list.txt")])


def test_our_shards_are_read_by_their_reader(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    assert pack_videos.main([str(videos / "list.txt"), "--root", str(videos), "--out", str(out), "--tar", "3"]) == 0
    shards = sorted(str(path) for path in (out / "shards").glob("*.tar"))
    read = list(webdataset.WebDataset(shards, shardshuffle=False))
    rows = [record.path for record in read_list(out / "list.txt", root=out)]
    assert len(read) == len(rows) == 4
    for path in rows:
        key, suffix = path.partition("#")[2].split(".", 1)
        sample = next(each for each in read if each["__key__"] == key)
        with open(tmp_path / "video.mp4", "wb") as file:
            file.write(sample[suffix])
        assert (read_frames(tmp_path / "video.mp4") == read_frames(path)).all()
