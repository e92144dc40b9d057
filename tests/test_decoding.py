"""Frames of every reader against the sequence that FFmpeg decodes from a file's first packet to its last."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import av
import clips
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from video_convmae.data.decoding import (
    DecodeError,
    DecodeTimeout,
    FrameReader,
    open_frames,
    read_record,
    resolve_reader,
)
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.decoding.pyav_reader import _NoStart
from video_convmae.data.decoding.rules import misread
from video_convmae.data.records import Record

READERS = ["pyav", "torchcodec", "decord"]
SHARED = Path(__file__).parents[2] / "shared" / "videos"
ON_THIS_MACHINE = f"needs the clips of {SHARED}, which are not on this machine"

# Kinds of files that the reader asked for reads wrong, and PyAV reads instead. BOTH: for torchcodec and decord.
BOTH = {
    "h264 10 bits.mp4",
    "h264 fragmented.mp4",
    "h264 intra refresh.mkv",
    "h264 raw.h264",
    "h264 B-frames.avi",
    "open GOP.mp4",
    "open GOP.mkv",
    "vp9 odd height.webm",
    "vp8 hidden frame.webm",
    "wmv.wmv",
    "mpeg4 B-frames.avi",
    "mpeg2.mpg",
}
HANDED_TO_PYAV = {
    "torchcodec": BOTH,
    "decord": BOTH
    | {
        "hevc open GOP.mp4",
        "av1.mp4",
        "av1.webm",
        "mpeg4 B-frames.mp4",
        "mpeg2.mkv",
        "flv.flv",
        "edit list.mp4",
        "edit list in one GOP.mp4",
        "rotated 90.mp4",
        "rotated 270.mp4",
        "several streams.mp4",
        "several streams.mkv",
    },
}


# ---- the three readers, as far as they work here ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def ffmpeg_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the FFmpeg of PyAV's wheel under its plain names, as torchcodec looks for it."""
    folder = tmp_path_factory.mktemp("ffmpeg")
    for library in (Path(av.__file__).parents[1] / "av.libs").glob("*.so*"):
        plain = re.sub(r"-[0-9a-f]{8}\.so", ".so", library.name)
        for name in {library.name, plain, re.sub(r"(\.so\.\d+).*", r"\1", plain)}:
            (folder / name).symlink_to(library)
    return folder


@pytest.fixture(scope="session", params=READERS)
def process(request: pytest.FixtureRequest, ffmpeg_libraries: Path) -> Iterator[ReaderProcess]:
    """Each reader in a child process: there torchcodec can be given an FFmpeg, and no bad file can hang the tests."""
    if importlib.util.find_spec({"pyav": "av"}.get(request.param, request.param)) is None:
        pytest.skip(f"{request.param} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_LIBRARY_PATH", os.pathsep.join([str(ffmpeg_libraries), os.environ.get("LD_LIBRARY_PATH", "")]))
        with ReaderProcess(request.param, timeout=60.0) as child:
            try:
                child.open(Record(str(Path(__file__).parent), format="image"))
            except DecodeError:  # a folder is no image, but the child has started
                yield child
            except ImportError as error:
                pytest.skip(f"torchcodec finds no FFmpeg that it can use: {error}")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a kind of clip -> the file, made when first asked for."""
    folder = tmp_path_factory.mktemp("clips")
    return cache(lambda name: clips.make(name, folder))


@cache
def sequence(path: Path) -> list[av.VideoFrame]:
    """All frames that FFmpeg decodes, in one pass without seeking."""
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        stream.thread_type = "NONE"
        return list(container.decode(stream))


def rgb(frame: av.VideoFrame) -> np.ndarray:
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90 % 4)


def requests(count: int, seed: int = 0) -> list[np.ndarray]:
    """Index requests in the sizes that training makes: single frames, strided, scattered, repeated, backwards."""
    rng = np.random.default_rng(seed)
    strided = np.minimum(rng.integers(count) + 4 * np.arange(8), count - 1)
    scattered = [rng.integers(count, size=size) for size in (1, 1, 1, 3, 16)]
    return [strided, strided[::-1], *scattered, np.array([count - 1]), np.array([0])]


def assert_frames(reader: FrameReader, frames: list[av.VideoFrame], tolerance: int = 0) -> None:
    assert len(reader) == len(frames)
    for request in requests(len(frames)):
        expected = np.stack([rgb(frames[index]) for index in request]).astype(int)
        result = reader.read(request)
        assert result.dtype == np.uint8
        assert result.shape == expected.shape
        assert np.abs(result - expected).max() <= tolerance, (reader.name, request)


# ---- right frames ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in clips.GOOD if "interlaced" not in name])
def test_frames_are_those_of_ffmpeg(name: str, process: ReaderProcess, made: Callable[[str], Path]) -> None:
    path = made(name)
    with process.open(Record(str(path))) as reader:
        assert_frames(reader, sequence(path), tolerance=2 if "mpeg4" in name else 0)
        assert (reader.note, reader.damaged) == (None, False)
        handed = name in HANDED_TO_PYAV.get(process.reader, ())
        assert reader.name == ("pyav" if handed else process.reader)


def test_every_frame_alone(made: Callable[[str], Path]) -> None:
    for name in ("open GOP.mp4", "h264 keyframe every 4.mp4", "edit list.mp4", "h264 fragmented.mp4"):
        frames = sequence(made(name))
        with open_frames(Record(str(made(name))), "pyav") as reader:
            for index in np.random.default_rng(0).permutation(len(frames)):
                assert (reader.read([index])[0] == rgb(frames[index])).all(), (name, index)


@pytest.mark.parametrize("codec", ["mpeg1video", "mpeg2video"])
@pytest.mark.parametrize("b_frames", ["0", "2"])
@pytest.mark.parametrize("suffix", ["mpg", "vob"])
def test_every_frame_of_a_program_stream(codec: str, b_frames: str, suffix: str, tmp_path: Path) -> None:
    """Behind a seek FFmpeg gives its packets the times of others."""
    options = {"bf": b_frames, "b": "150000"}
    path = clips.encode(tmp_path / f"clip.{suffix}", 50, codec, size=(144, 176), options=options)
    frames = sequence(path)
    with open_frames(Record(str(path)), "pyav") as reader:
        assert len(reader) == len(frames) == 50
        for index in np.random.default_rng(1).permutation(50):
            assert (reader.read([index])[0] == rgb(frames[index])).all(), index
        assert (reader.read(range(50)) == np.stack([rgb(frame) for frame in frames])).all()


def test_decoding_begins_at_keyframes_alone(tmp_path: Path) -> None:
    """Behind a seek, another packet may bear a keyframe's time."""
    options = {"bf": "0", "b": "150000"}
    path = clips.encode(tmp_path / "clip.mpg", 50, "mpeg2video", size=(144, 176), options=options)
    found = 0
    with open_frames(Record(str(path)), "pyav") as reader:
        for start in range(len(reader.scan.keyframes)):
            with contextlib.suppress(_NoStart):
                assert next(reader._packets_from(start)).is_keyframe, start
                found += 1
    assert found


def test_every_frame_of_h264_with_b_frames_in_asf(tmp_path: Path) -> None:
    """FFmpeg guesses when its frames are shown, and guesses wrong."""
    path = clips.encode(tmp_path / "clip.asf", 50, options={"bf": "3", "b_strategy": "0", "g": "12"})
    with open_frames(Record(str(path)), "pyav") as reader:
        assert_frames(reader, sequence(path))


def test_interlaced_colours_are_those_of_the_ffmpeg_program(
    process: ReaderProcess, made: Callable[[str], Path]
) -> None:
    """The program converts with a filter, frame by frame; PyAV's `to_ndarray` would go by fields."""
    path = made("h264 interlaced.mp4")
    expected = []
    with av.open(str(path)) as container:
        graph = av.filter.Graph()
        source = graph.add_buffer(template=container.streams.video[0])
        convert, sink = graph.add("format", "rgb24"), graph.add("buffersink")
        source.link_to(convert)
        convert.link_to(sink)
        graph.configure()
        for frame in container.decode(video=0):
            assert frame.interlaced_frame
            graph.push(frame)
            expected.append(graph.pull().to_ndarray())
    with process.open(Record(str(path))) as reader:
        assert (reader.read(range(len(reader))) == np.stack(expected)).all()


@pytest.mark.parametrize(("degrees", "turns"), [(90, -1), (180, 2), (270, 1)])
def test_pictures_are_upright(degrees: int, turns: int, process: ReaderProcess, made: Callable[[str], Path]) -> None:
    with process.open(Record(str(made("h264.mp4")))) as reader:
        plain = reader.read([7, 33])
    with process.open(Record(str(made(f"rotated {degrees}.mp4")))) as reader:
        assert (reader.read([7, 33]) == np.rot90(plain, turns, axes=(1, 2))).all()


def test_an_edit_list_hides_frames(process: ReaderProcess, made: Callable[[str], Path]) -> None:
    with process.open(Record(str(made("h264.mp4")))) as reader:
        plain = reader.read(range(25, 45))
    with process.open(Record(str(made("edit list.mp4")))) as reader:
        assert len(reader) == 20
        assert (reader.read(range(20)) == plain).all()


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "open GOP.mkv", "rotated 90.mp4", "h264 raw.h264"])
def test_members_of_an_archive_are_read_like_files(
    name: str, process: ReaderProcess, made: Callable[[str], Path], tmp_path: Path
) -> None:
    path = made(name)
    with tarfile.open(tmp_path / "shard-000.tar", "w") as archive:
        archive.add(made("vp8.webm"), "first.webm")
        archive.add(path, f"folder/{name}")
    with process.open(Record(f"{tmp_path}/shard-000.tar#folder/{name}")) as reader:
        assert_frames(reader, sequence(path))
        handed = name in HANDED_TO_PYAV.get(process.reader, ())
        assert reader.name == ("pyav" if handed else process.reader)


def test_frames_that_nothing_refers_to_are_not_decoded(made: Callable[[str], Path]) -> None:
    path = made("h264.mp4")
    with open_frames(Record(str(path)), "pyav") as reader:
        wanted = reader.scan.times[[0, 4, 8, 12, 16]].tolist()
        all_frames = [frame.pts for frame in reader._frames_from(0) if frame.pts <= wanted[-1]]
        fewer = [frame.pts for frame in reader._frames_from(0, set(wanted)) if frame.pts <= wanted[-1]]
    assert set(wanted) <= set(fewer)
    assert len(fewer) < 0.75 * len(all_frames)
    with open_frames(Record(str(made("hevc.mp4"))), "pyav") as reader:
        assert not reader.scan.droppable  # HEVC's mark says less


@settings(max_examples=40, deadline=None)
@given(indices=st.lists(st.integers(0, 59), min_size=1, max_size=20))
def test_any_request(indices: list[int], made: Callable[[str], Path]) -> None:
    for name in ("h264.mp4", "open GOP.mkv", "h264 B-frames.avi"):
        frames = sequence(made(name))
        expected = np.stack([rgb(frames[index]) for index in indices])
        assert (read_record(Record(str(made(name))), indices, "pyav") == expected).all()


def shared(*folders: str) -> list[str]:
    files = [file for folder in folders for file in sorted((SHARED / folder).glob("*")) if file.suffix]
    return [str(file.relative_to(SHARED)) for file in files]


GOOD_FOLDERS = ("decord", "hiera", "special", "ssv2", "torchcodec", "torchvision")
REFUSED = {"special/tsna.ts", "decord/corrupted.mp4"}


@pytest.mark.skipif(not SHARED.is_dir(), reason=ON_THIS_MACHINE)
@pytest.mark.parametrize("name", [name for name in shared(*GOOD_FOLDERS) if name not in REFUSED] or ["none"])
def test_real_clips(name: str, process: ReaderProcess) -> None:
    path = SHARED / name
    frames, wanted = _some_frames(path)
    with process.open(Record(str(path))) as reader:
        assert len(reader) == frames
        assert (reader.note, reader.damaged) == (None, False)
        indices = np.random.default_rng(0).permutation(list(wanted))
        result = reader.read(indices)
        for index, image in zip(indices, result, strict=True):
            tolerance = 2 if path.suffix == ".avi" else 0
            assert np.abs(image.astype(int) - wanted[index]).max() <= tolerance, index


@cache
def _some_frames(path: Path) -> tuple[int, dict[int, np.ndarray]]:
    """Return the number of frames that one pass decodes, and up to 6 of them, in pairs of neighbours."""
    with open_frames(Record(str(path)), "pyav") as reader:
        count = len(reader)
    starts = np.linspace(0, max(count - 2, 0), 3).astype(int)
    wanted = {int(index): None for start in starts for index in (start, start + 1) if index < count}
    total = 0
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        stream.thread_type = "NONE"
        for total, frame in enumerate(container.decode(stream), start=1):
            if total - 1 in wanted:
                wanted[total - 1] = rgb(frame)
    return total, wanted


# ---- bad files ------------------------------------------------------------------------------------------------------

# Damaged files of the shared folder whose undamaged original lies there too.
ORIGINALS = {
    "bitflip400.mp4": "torchvision/R6llTwEh07w.mp4",
    "trunc_faststart50.mp4": "torchvision/R6llTwEh07w.mp4",
    "zerohole60k.mp4": "torchvision/R6llTwEh07w.mp4",
    "trunc_avi50.avi": "torchvision/v_SoccerJuggling_g23_c01.avi",
    "trunc_webm50.webm": "ssv2/id_166766.mp4",
}
OPENED = {"decord_corrupted.mp4", "five_frames.mp4", "fragmented.mp4", "one_frame.mp4", "raw.h264", "unordered.mov"}
OPENED |= {"bitflip200.webm", *ORIGINALS}


@pytest.mark.skipif(not SHARED.is_dir(), reason=ON_THIS_MACHINE)
@pytest.mark.parametrize("name", [Path(name).name for name in shared("bad")] or ["none"])
def test_bad_files_give_right_frames_or_an_error(name: str, process: ReaderProcess) -> None:
    path = SHARED / "bad" / name
    if name not in OPENED:
        with pytest.raises(DecodeError, match=re.escape(str(path))) as caught:
            process.open(Record(str(path)))
        assert not isinstance(caught.value, DecodeTimeout)
        return
    with process.open(Record(str(path))) as reader:
        frames = _read_what_can_be_read(reader)
    if name in {"trunc_faststart50.mp4", "trunc_avi50.avi", "trunc_webm50.webm", "zerohole60k.mp4"}:
        assert frames
        original = Record(str(SHARED / ORIGINALS[name]))
        expected = read_record(original, list(frames), "pyav").astype(int)
        assert np.abs(expected - np.stack(list(frames.values()))).max() <= 2


def _read_what_can_be_read(reader: FrameReader) -> dict[int, np.ndarray]:
    """Single frames, forwards and back over the whole file; those that raise a DecodeError are left out."""
    frames = {}
    steps = range(0, len(reader), max(1, len(reader) // 3))
    for index in [*steps, len(reader) - 1, *reversed(steps)]:
        with contextlib.suppress(DecodeError):
            frames[index] = reader.read([index])[0]
    return frames


def _spoiled(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "missing":
        return path
    if kind == "directory":
        path.mkdir()
    elif kind in ("empty", "text", "html", "noise", "zeros"):
        noise = np.random.default_rng(0).bytes(20_000)
        text = {"text": b"hello\n" * 100, "html": b"<!DOCTYPE html><html><body>404</body></html>"}
        path.write_bytes({"empty": b"", "noise": noise, "zeros": bytes(20_000), **text}[kind])
    elif kind == "picture":
        Image.fromarray(clips.pictures(1)[0]).save(path, format="png")
    elif kind in ("mpegts", "m2ts"):
        options = {"mpegts_m2ts_mode": "1" if kind == "m2ts" else "0"}
        clips.encode(path, 20, format="mpegts", container=options)
    elif kind == "audio only":
        with av.open(str(path), "w") as file:
            clips._write_silence(file)
    elif kind == "no moov":
        clips.cut(clips.encode(path), 0.6)
    elif kind == "header only":
        clips.encode(path, container={"movflags": "faststart"})
        data = path.read_bytes()
        path.write_bytes(data[: data.index(b"mdat") + 100])
    return path


SPOILED = {
    "missing": "No such file",
    "directory": "directory",
    "empty": "0 bytes",
    "text": "Invalid data",
    "html": "Invalid data",
    "noise": "",
    "zeros": "",
    "picture": "is a picture",
    "mpegts": "MPEG transport stream",
    "m2ts": "MPEG transport stream",
    "audio only": "no video stream",
    "no moov": "Invalid data",
    "header only": "no keyframe",
}


@pytest.mark.parametrize("kind", SPOILED)
def test_what_is_no_video_is_refused(kind: str, process: ReaderProcess, tmp_path: Path) -> None:
    path = _spoiled(kind, tmp_path)
    with pytest.raises(DecodeError, match=re.escape(f"{path}: ")) as caught:
        process.open(Record(str(path)))
    assert SPOILED[kind] in str(caught.value)
    assert not isinstance(caught.value, DecodeTimeout)


def test_no_permission(tmp_path: Path) -> None:
    path = clips.encode(tmp_path / "clip.mp4", 5)
    path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # whom no permission binds
            os.seteuid(65534)
        with pytest.raises(DecodeError, match=r"clip.mp4: .*Permission denied"):
            open_frames(Record(str(path)), "pyav")
    finally:
        os.seteuid(user)


def test_a_truncated_file_is_not_padded(process: ReaderProcess, tmp_path: Path) -> None:
    path = clips.encode(tmp_path / "clip.mp4", container={"movflags": "faststart"}, options={"g": "20"})
    whole = [rgb(frame) for frame in sequence(path)]
    clips.cut(path, 0.6)
    with process.open(Record(str(path))) as reader:
        count = len(reader)
        assert 5 < count < 60
        frames = reader.read(range(count))
        # The cut may fall on frames that are stored behind those shown after them: a gap among the last ones.
        sure = count - 4
        assert (frames[:sure] == np.stack(whole[:sure])).all()
        assert all(any((frame == later).all() for later in whole[sure : count + 4]) for frame in frames[sure:])
        with pytest.raises(DecodeError, match=rf"frame {count} was asked for; there are {count}"):
            reader.read([count - 1, count])


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.85])
@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx-vp9"), ("flv", "flv"), ("avi", "mpeg4")],
)
def test_a_file_that_is_cut_off_says_so(suffix: str, codec: str, kept: float, tmp_path: Path) -> None:
    """The frames that are left are right; with sound or without."""
    for audio in (False, True) if suffix in ("mp4", "mkv") else (False,):
        container = {"movflags": "faststart"} if suffix == "mp4" else {}
        path = clips.encode(
            tmp_path / f"{audio}.{suffix}", 100, codec, options={"g": "12"}, container=container, audio=audio
        )
        whole = [rgb(frame) for frame in sequence(path)]
        with open_frames(Record(str(path)), "pyav") as reader:
            assert (reader.note, reader.damaged) == (None, False)
        clips.cut(path, kept)
        with open_frames(Record(str(path)), "pyav") as reader:
            assert reader.damaged
            assert reader.note is not None
            says = rf"is cut off, {len(reader)} frames are left \(its header says 4.* seconds, and it ends at \d.\d\)"
            assert re.match(says, reader.note)
            assert 0 < len(reader) < 100
            sure = max(1, len(reader) - 4)  # of B-frames at the cut some are missing
            assert (reader.read(range(sure)) == np.stack(whole[:sure])).all()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "flv"])
def test_what_only_looks_cut_off(suffix: str, tmp_path: Path) -> None:
    """Sound that is longer or shorter than the pictures; a last frame that is shown for long, after long pauses."""
    codec = {"avi": "mpeg4", "flv": "flv"}.get(suffix, "libx264")
    paths = [tmp_path / f"{count}.{suffix}" for count in (8, 90)]
    if suffix in ("mp4", "mkv"):
        for path in paths:
            clips.encode(path, int(path.stem), codec, audio=True)
    paths.append(tmp_path / f"pauses.{suffix}")
    clips.encode(paths[-1], 8, codec, times=[0, 1, 2, 50, 51, 52, 150, 151], options={"bf": "0"})
    for path in (path for path in paths if path.exists()):
        with open_frames(Record(str(path)), "pyav") as reader:
            assert (reader.note, reader.damaged) == (None, False)


def test_a_trimmed_video_is_not_cut_off(tmp_path: Path) -> None:
    """An edit list that hides the end: the header counts more frames than are shown."""
    path = clips.encode(tmp_path / "clip.mp4", 60, options={"g": "20", "bf": "0"})
    clips.edit(path, 0, 20)
    with open_frames(Record(str(path)), "pyav") as reader:
        assert (len(reader), reader.note, reader.damaged) == (20, None, False)


def test_damage_in_the_middle(process: ReaderProcess, tmp_path: Path) -> None:
    """Frames before and behind the damage are right; asking again and again never gives a damaged one."""
    path = clips.encode(tmp_path / "clip.mp4", 90, options={"g": "30", "bf": "0"}, size=(120, 160))
    whole = [rgb(frame) for frame in sequence(path)]
    clips.blank(path, 0.45, 0.55)
    right, failed = set(), set()
    with process.open(Record(str(path))) as reader:
        assert len(reader) == 90
        for index in [*range(0, 90, 5), 89, *range(45, 90, 3), *range(30, 60)]:
            try:
                assert (reader.read([index])[0] == whole[index]).all(), index
                right.add(index)
            except DecodeError:
                failed.add(index)
    assert failed
    assert {0, 25, 89} <= right


@pytest.mark.parametrize("indices", [[-1], [60], [3, 1000], []])
def test_indices_out_of_range(indices: list[int], process: ReaderProcess, made: Callable[[str], Path]) -> None:
    with process.open(Record(str(made("h264.mp4")))) as reader:
        with pytest.raises(DecodeError, match=r"h264.mp4: "):
            reader.read(indices)
        assert reader.read([5]).shape == (1, 48, 64, 3)


def test_memory_error_is_a_decode_error(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(av, "open", no_memory)
    with pytest.raises(DecodeError, match=r"h264.mp4: MemoryError"):
        open_frames(Record(str(made("h264.mp4"))), "pyav")


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.mp4")
    clips.encode(tmp_path / "plain.mp4", 5).rename(os.fsdecode(path))
    for reader in ("pyav", "decord"):
        assert read_record(Record(os.fsdecode(path)), [3], reader).shape == (1, 48, 64, 3)


# ---- pictures -------------------------------------------------------------------------------------------------------


def _folder(path: Path, names: list[str], size: tuple[int, int] = (8, 10)) -> np.ndarray:
    images = clips.pictures(len(names), *size)
    path.mkdir()
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(path / name, format="png")
    return images


def test_a_folder_of_frames_is_read_in_natural_order(tmp_path: Path) -> None:
    images = _folder(tmp_path / "clip", [f"frame{number}.PNG" for number in range(12)])
    (tmp_path / "clip" / "notes.txt").write_text("not a frame")
    (tmp_path / "clip" / "._frame3.png").write_text("not a frame")
    with open_frames(Record(str(tmp_path / "clip"), 0, 12, "frames")) as reader:
        assert len(reader) == 12
        assert (reader.read([11, 2, 10, 2]) == images[[11, 2, 10, 2]]).all()


def test_frames_counted_by_the_list(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    _folder(folder, [f"img_{number:05}.png" for number in range(1, 7)])
    assert len(open_frames(Record(str(folder), 0, 6, "frames"))) == 6
    assert len(open_frames(Record(str(folder), 0, None, "frames"))) == 6
    for count in (4, 7):
        with pytest.raises(DecodeError, match=rf"clip: holds 6 pictures; the list says {count}"):
            open_frames(Record(str(folder), 0, count, "frames"))


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DecodeError, match=r"empty: holds no pictures"):
        open_frames(Record(str(tmp_path / "empty"), 0, 4, "frames"))
    with pytest.raises(DecodeError, match=r"gone: .*No such file"):
        open_frames(Record(str(tmp_path / "gone"), 0, 4, "frames"))
    _folder(tmp_path / "clip", ["1.png", "2.png", "3.png"])
    Image.fromarray(clips.pictures(1, 20, 30)[0]).save(tmp_path / "clip" / "2.png")
    with pytest.raises(DecodeError, match=r"clip: 2.png is 30x20, not 10x8"):
        read_record(Record(str(tmp_path / "clip"), 0, 3, "frames"), [0, 1])
    (tmp_path / "clip" / "3.png").write_bytes((tmp_path / "clip" / "1.png").read_bytes()[:60])
    with pytest.raises(DecodeError, match=r"clip.3.png: "):
        read_record(Record(str(tmp_path / "clip"), 0, 3, "frames"), [2])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "I;16", "CMYK", "1"])
def test_images_of_every_mode(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(clips.pictures(1, 20, 30)[0])
    image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16)) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "image.tif")
    frames = read_record(Record(str(tmp_path / "image.tif"), format="image"), [0, 0])
    assert (frames.shape, frames.dtype) == ((2, 20, 30, 3), np.uint8)


def test_an_image_is_upright(tmp_path: Path) -> None:
    image = Image.fromarray(clips.pictures(1, 20, 30)[0])
    tags = Image.Exif()
    tags[0x0112] = 6  # to be turned clockwise by 90 degrees
    image.save(tmp_path / "image.png", exif=tags)
    frames = read_record(Record(str(tmp_path / "image.png"), format="image"), [0])
    assert (frames[0] == np.rot90(np.asarray(image), -1)).all()


def test_a_bad_image(tmp_path: Path) -> None:
    (tmp_path / "image.jpg").write_bytes(b"no picture")
    with pytest.raises(DecodeError, match=r"image.jpg: UnidentifiedImageError"):
        open_frames(Record(str(tmp_path / "image.jpg"), format="image"))


# ---- choice of the reader --------------------------------------------------------------------------------------------


def _absent(patch: pytest.MonkeyPatch, *modules: str) -> None:
    for name in modules:
        patch.setitem(sys.modules, name, None)


def test_auto_takes_the_first_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", sys)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", sys)
    assert resolve_reader("auto") == "torchcodec"
    _absent(monkeypatch, "torchcodec.decoders")
    assert resolve_reader("auto") == "pyav"
    _absent(monkeypatch, "av")
    with pytest.warns(UserWarning, match="pip install av"):
        assert resolve_reader("auto") == "decord"
    _absent(monkeypatch, "decord")
    with pytest.raises(ImportError, match=r"pip install av") as caught:
        resolve_reader("auto")
    assert all(name in str(caught.value) for name in READERS)


def test_a_named_reader_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    _absent(monkeypatch, "torchcodec.decoders", "decord")
    assert resolve_reader("pyav") == "pyav"
    with pytest.raises(ImportError, match="FFmpeg's shared libraries"):
        resolve_reader("torchcodec")
    with pytest.raises(ImportError, match="pip install decord"):
        resolve_reader("decord")
    with pytest.raises(ValueError, match="expected one of auto, torchcodec, pyav, decord"):
        resolve_reader("opencv")
    with pytest.raises(ImportError, match="pip install decord"):  # not a DecodeError: no record is to blame
        open_frames(Record("clip.mp4"), "decord")


def test_decoding_on_a_gpu_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "torchcodec", sys)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", sys)
    with pytest.raises(ImportError, match=r"torchcodec_cuda.*NVIDIA GPU.*torch finds no CUDA device"):
        resolve_reader("torchcodec_cuda")
    assert resolve_reader("auto") == "torchcodec"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_reader("torchcodec_cuda") == "torchcodec_cuda"


def test_decord_without_pyav(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("decord")
    path = made("h264.mp4")
    expected = rgb(sequence(path)[30])
    _absent(monkeypatch, "av")
    with pytest.warns(UserWarning, match="PyAV is not installed"), open_frames(Record(str(path)), "decord") as reader:
        assert (reader.read([30])[0] == expected).all()


def test_decoding_needs_no_torch() -> None:
    program = (
        "import sys, video_convmae.data.decoding.process as i; i.resolve_reader('pyav'); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# ---- over a long run ------------------------------------------------------------------------------------------------


def _resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("opens", [200, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_memory_and_files_stay_flat(reader: str, opens: int, made: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip({"pyav": "av"}.get(reader, reader))
    damaged = clips.encode(tmp_path / "clip.mp4", options={"g": "20", "bf": "0"})
    clips.blank(damaged, 0.4, 0.5)
    names = ["h264.mp4", "vp9.webm", "open GOP.mp4", "h264 B-frames.avi", "rotated 90.mp4"]
    paths = [*(made(name) for name in names), damaged, tmp_path / "missing.mp4"]

    def use(path: Path) -> None:
        try:
            read_record(Record(str(path)), range(0, 60, 3), reader)
        except DecodeError:
            assert path in (damaged, tmp_path / "missing.mp4")

    for path in paths * 6:
        use(path)
    memory, files = _resident_megabytes(), _open_files()
    for number in range(opens):
        use(paths[number % len(paths)])
    assert _open_files() == files
    assert _resident_megabytes() - memory < 15


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_forked_worker_decodes_while_its_parent_has_a_file_open(made: Callable[[str], Path]) -> None:
    """The default threads of the codec would deadlock here."""
    record = Record(str(made("h264.mp4")))
    with open_frames(record, "pyav") as reader:
        reader.read([0, 30])
        worker = multiprocessing.get_context("fork").Process(target=read_record, args=(record, [3, 40], "pyav"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking while another library has threads
            worker.start()
        worker.join(30)
        alive = worker.is_alive()
        worker.kill()
        assert not alive
        assert worker.exitcode == 0


def test_one_thread_decodes(made: Callable[[str], Path]) -> None:
    with open_frames(Record(str(made("h264.mp4"))), "pyav") as reader:
        threads = len(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else 0
        reader.read(range(60))
        assert reader._stream.codec_context.thread_count == 1
        if threads:
            assert len(os.listdir("/proc/self/task")) == threads


def test_reasons_for_a_hand_over_are_given(made: Callable[[str], Path]) -> None:
    with open_frames(Record(str(made("open GOP.mp4"))), "decord") as reader:
        assert "GOP" in misread("decord", reader.scan)
        assert misread("pyav", reader.scan) is None
