"""Decoded records in memory: the frames are the same, a record is decoded once, and the bound is kept."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from clips import encode

from video_convmae.data.decoding import DecodeError
from video_convmae.data.decoding.memory import MemoryReader
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.records import Record

FRAMES = 12


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("memory")
    for i in range(3):
        encode(folder / f"{i}.mp4", FRAMES)
    return [Record(str(folder / f"{i}.mp4")) for i in range(3)]


def read(reader: MemoryReader | ReaderProcess, record: Record, indices: list[int]) -> np.ndarray:
    with reader.open(record) as opened:
        assert len(opened) == FRAMES
        return opened.read(indices)


def test_a_record_is_decoded_once_and_its_frames_are_the_same(records: list[Record]) -> None:
    with ReaderProcess("pyav") as process:
        expected = [read(process, record, [11, 0, 3, 3]) for record in records]
        reader = MemoryReader(process, gigabytes=1)
        for record in records:
            read(reader, record, [1])
        process.open = None  # type: ignore[assignment]  # nothing is opened again
        for record, frames in zip(records, expected):
            found = read(reader, record, [11, 0, 3, 3])
            np.testing.assert_array_equal(found, frames)
            found[:] = 0  # a caller's changes are its own
            np.testing.assert_array_equal(read(reader, record, [11, 0, 3, 3]), frames)


def test_records_that_do_not_fit_are_decoded_again(records: list[Record]) -> None:
    with ReaderProcess("pyav") as process:
        expected = [read(process, record, [2, 5]) for record in records]
        record_bytes = FRAMES * expected[0][0].nbytes
        reader = MemoryReader(process, gigabytes=1.5 * record_bytes / 2**30)
        for _ in range(2):
            for record, frames in zip(records, expected):
                np.testing.assert_array_equal(read(reader, record, [2, 5]), frames)
        assert reader.kept_bytes == record_bytes


def test_a_bad_record_fails_as_without_it_and_a_copy_starts_empty(records: list[Record], tmp_path: Path) -> None:
    with ReaderProcess("pyav") as process:
        reader = MemoryReader(process, gigabytes=1)
        read(reader, records[0], [0])
        for _ in range(2):
            with pytest.raises(DecodeError, match="missing"):
                reader.open(Record(str(tmp_path / "missing.mp4")))
        copy = pickle.loads(pickle.dumps(reader))
    with copy.reader:
        assert (copy.gigabytes, copy.kept_bytes) == (1, 0)
        np.testing.assert_array_equal(read(copy, records[0], [0]), read(reader, records[0], [0]))
