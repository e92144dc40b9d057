"""`read_frames` and `count_frames` on files whose container says something else than their packets hold."""

from __future__ import annotations

import contextlib
import gc
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import clips
import numpy as np
import pytest
from PIL import Image

import video_convmae
from video_convmae.data.decoding import DecodeError, open_frames, pyav_reader, rules
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.decoding.scan import Scan
from video_convmae.data.records import Record
from video_convmae.prepare.encode import pack_video
from video_convmae.prepare.options import PackSettings

READERS = ["pyav", pytest.param("decord", marks=pytest.mark.skipif("not has_decord()"))]
B = {"bf": "3", "b_strategy": "0", "g": "20"}
HEVC = {"x265-params": "log-level=none:open-gop=0:keyint=20:min-keyint=20:bframes=3"}
HEVC_OPEN = {"x265-params": "log-level=none:open-gop=1:keyint=20:min-keyint=20:bframes=3"}


def has_decord() -> bool:
    try:
        import decord  # noqa: F401
    except Exception:
        return False
    return True


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def linear(path: Path) -> list[np.ndarray]:
    """Every frame of one pass from the start; a packet that fails is passed over, as the ffmpeg program does."""
    found = []
    with av.open(str(path), metadata_errors="ignore") as file:
        stream = file.streams.best("video")
        stream.thread_type = "NONE"
        for packet in file.demux(stream):
            with contextlib.suppress(av.error.FFmpegError):
                found += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
    return found


def assert_right(path: Path, reader: str, expected: list[np.ndarray]) -> None:
    """Single frames, a clip, and all frames at once."""
    with open_frames(Record(str(path)), reader) as opened:
        assert len(opened) == len(expected)
        requests = [[index] for index in range(len(expected) - 1, -1, -3)]
        for request in [*requests, [5, 9, 13, 17], list(range(len(expected)))]:
            frames = opened.read(request).astype(int)
            wrong = [
                index for index, frame in zip(request, frames, strict=True) if np.abs(frame - expected[index]).max() > 2
            ]
            assert not wrong, (path.name, reader, opened.name, request)


# ---- the public functions --------------------------------------------------------------------------------------------


def test_read_and_count_a_video_a_folder_and_a_picture(tmp_path: Path) -> None:
    video = clips.encode(tmp_path / "clip.mp4", 12)
    expected = np.stack(linear(video))
    assert video_convmae.count_frames(video) == 12
    assert (video_convmae.read_frames(video) == expected).all()
    assert (video_convmae.read_frames(str(video), [7, 0, 7], reader="pyav") == expected[[7, 0, 7]]).all()
    (tmp_path / "folder").mkdir()
    images = clips.pictures(3)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{number}.png")
    assert video_convmae.count_frames(tmp_path / "folder") == 3
    assert (video_convmae.read_frames(tmp_path / "folder") == images).all()
    assert (video_convmae.read_frames(tmp_path / "folder" / "1.png") == images[1:2]).all()
    with pytest.raises(DecodeError, match=r"frame 12 was asked for; there are 12"):
        video_convmae.read_frames(video, [12])


def test_reading_frames_imports_no_torch() -> None:
    program = "import sys, video_convmae; video_convmae.read_frames; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# ---- orientation -----------------------------------------------------------------------------------------------------


def _turned(degrees: float) -> tuple[float, float, float, float]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return cos, sin, -sin, cos


ORIENTATIONS: dict[str, tuple[tuple[float, float, float, float], Callable[[np.ndarray], np.ndarray]]] = {
    "as stored": ((1, 0, 0, 1), lambda x: x),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "upside down and mirrored": ((1, 0, 0, -1), lambda x: x[::-1]),
    "transposed": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    "transposed the other way": ((0, -1, -1, 0), lambda x: x[::-1, ::-1].swapaxes(0, 1)),
    "89.95": (_turned(89.95), lambda x: np.rot90(x, -1)),
    "179.95": (_turned(179.95), lambda x: np.rot90(x, 2)),
    "180.4": (_turned(180.4), lambda x: np.rot90(x, 2)),
    "269.3": (_turned(269.3), lambda x: np.rot90(x, 1)),
    "0.6": (_turned(0.6), lambda x: x),
    "359.5": (_turned(359.5), lambda x: x),
    "90, twice as large": ((0, 2, -2, 0), lambda x: np.rot90(x, -1)),
    "no matrix": ((0, 0, 0, 0), lambda x: x),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ORIENTATIONS)
def test_the_display_matrix(name: str, reader: str, tmp_path: Path) -> None:
    path = clips.encode(tmp_path / "clip.mp4", 8)
    stored = linear(path)
    matrix, show = ORIENTATIONS[name]
    clips.set_matrix(path, matrix)
    assert (
        video_convmae.read_frames(path, [6, 1], reader=reader) == np.stack([show(stored[6]), show(stored[1])])
    ).all()


def test_an_angle_that_is_no_quarter_turn(tmp_path: Path) -> None:
    """As the ffmpeg program: turned within the frame, corners black."""
    path = clips.encode(tmp_path / "clip.mp4", 4, size=(64, 64))
    stored = linear(path)[0].astype(int)
    clips.set_matrix(path, _turned(30))
    image = video_convmae.read_frames(path, [0], reader="pyav")[0].astype(int)
    assert image.shape == stored.shape
    assert image[0, 0].max() < 20
    assert image[-1, -1].max() < 20
    # The centre of the right edge of the turned square comes from the stored picture, 30 degrees back.
    x, y = 20 * math.cos(math.radians(-30)), 20 * math.sin(math.radians(-30))
    assert np.abs(image[32, 52] - stored[round(32 + y), round(32 + x)]).max() < 60


def test_packing_shows_a_mirrored_clip_mirrored(tmp_path: Path) -> None:
    path = clips.encode(tmp_path / "clip.mp4", 8, size=(64, 96))
    stored = linear(path)[3].astype(int)
    clips.set_matrix(path, (-1, 0, 0, 1))
    (tmp_path / "packed.mp4").write_bytes(pack_video(Record(str(path)), PackSettings(short_side=64)).data)
    packed = linear(tmp_path / "packed.mp4")[3].astype(int)
    assert np.abs(packed - stored[:, ::-1]).mean() < 8 < np.abs(packed - stored).mean()


# ---- keyframes that are none -----------------------------------------------------------------------------------------

STREAMS = {
    "mpeg4": ("mpeg4", {"g": "12", "bf": "0"}, ("mp4", "mov", "3gp", "avi")),
    "mpeg4 B": ("mpeg4", {"g": "12", "bf": "2"}, ("mp4", "mkv")),
    "h263": ("h263", {"g": "12"}, ("3gp", "mov")),
    "hevc": ("libx265", HEVC, ("mp4", "mkv")),
    "hevc open": ("libx265", HEVC_OPEN, ("mp4",)),
    "h264 B": ("libx264", B, ("mp4", "mkv")),
    "h264": ("libx264", {"g": "20", "bf": "0"}, ("mp4",)),
    "vp9": ("libvpx-vp9", {"g": "20"}, ("webm",)),
    "vp8": ("libvpx", {"g": "20"}, ("webm",)),
    "mpeg2": ("mpeg2video", {"g": "12", "bf": "2"}, ("mkv",)),
}
CLAIMS = [(name, suffix, every) for name, stream in STREAMS.items() for suffix in stream[2] for every in (1, 7)]
CLAIMS = [claim for claim in CLAIMS if claim[2] == 1 or claim[1] == STREAMS[claim[0]][2][0]]


def _stream(name: str, folder: Path) -> Path:
    codec, options, suffixes = STREAMS[name]
    size = (96, 128) if codec == "h263" else (48, 64)
    return clips.encode(folder / f"source.{suffixes[0]}", 45, codec, size=size, options=options)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("name", "suffix", "every"), CLAIMS)
def test_frames_called_keyframes(name: str, suffix: str, every: int, reader: str, tmp_path: Path) -> None:
    path = clips.call_keys(_stream(name, tmp_path), tmp_path / f"claims.{suffix}", every)
    assert_right(path, reader, linear(path))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["mpeg4", "mpeg4 B", "hevc", "h264 B", "h264"])
def test_no_list_of_keyframes(name: str, reader: str, tmp_path: Path) -> None:
    path = _stream(name, tmp_path)
    clips.without_stss(path)
    assert_right(path, reader, linear(path))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("flags", ["frag_keyframe+empty_moov", "frag_every_frame+empty_moov", "dash+frag_every_frame"])
@pytest.mark.parametrize("name", ["h264 B", "hevc", "mpeg4 B"])
def test_keyframes_of_fragments(name: str, flags: str, reader: str, tmp_path: Path) -> None:
    source = _stream(name, tmp_path)
    for every in (1000, 7, 1):
        path = clips.call_keys(source, tmp_path / f"{every}.mp4", every, movflags=flags)
        assert_right(path, reader, linear(path))


def test_a_codec_whose_bytes_are_not_known_is_checked_when_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clips.call_keys(_stream("mpeg4", tmp_path), tmp_path / "claims.mp4")
    monkeypatch.setattr("video_convmae.data.decoding.scan.examiner", lambda *_: None)
    assert_right(path, "pyav", linear(path))


@pytest.mark.skipif("not has_decord()")
def test_decord_reads_only_what_it_reads_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clips.encode(tmp_path / "clip.mp4", options={"g": "20"})
    record = Record(str(path))
    assert open_frames(record, "decord").name == "decord"
    with monkeypatch.context() as patch:  # it takes other frames for keyframes than the scan does
        patch.setattr(Scan, "key_indices", lambda scan: np.array([0, 30]))
        assert open_frames(record, "decord").name == "pyav"
    with monkeypatch.context() as patch:  # it would walk all packets of a long file at each opening
        patch.setattr("video_convmae.data.decoding.rules.LONG", 59)
        assert open_frames(record, "decord").name == "pyav"


def test_packing_copies_what_is_shown(tmp_path: Path) -> None:
    path = clips.call_keys(_stream("h263", tmp_path), tmp_path / "claims.3gp")
    (tmp_path / "packed.mp4").write_bytes(pack_video(Record(str(path)), PackSettings(short_side=96)).data)
    for shown, packed in zip(linear(path), linear(tmp_path / "packed.mp4"), strict=True):
        assert np.abs(shown.astype(int) - packed).mean() < 8


# ---- packets that are no picture -------------------------------------------------------------------------------------

UNITS = {
    "h264 B": {
        "SEI": bytes([6, 5, 16, *range(16), 128]),
        "filler": bytes([12, 255, 255, 128]),
        "delimiter": b"\x09\xf0",
    },
    "hevc": {
        "SEI": bytes([78, 1, 5, 16, *range(16), 128]),
        "filler": bytes([76, 1, 255, 128]),
        "delimiter": b"\x46\x01\x50",
    },
}
UNITS["h264 B"] |= {"end of sequence": b"\x0a", "end of stream": b"\x0b"}
UNITS["hevc"] |= {"end of sequence": b"\x48\x01", "end of stream": b"\x4a\x01"}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("name", "unit"), [(name, unit) for name, units in UNITS.items() for unit in units])
def test_packets_without_a_picture(name: str, unit: str, reader: str, tmp_path: Path) -> None:
    for suffix in ("mp4", "mkv"):
        path = clips.insert_units(_stream(name, tmp_path), tmp_path / f"blank.{suffix}", UNITS[name][unit])
        assert_right(path, reader, linear(path))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("suffix", ["mp4", "mov", "avi"])
def test_pictures_that_are_not_coded(suffix: str, reader: str, tmp_path: Path) -> None:
    path = clips.leave_uncoded(_stream("mpeg4", tmp_path), tmp_path / f"gaps.{suffix}", (7, 8, 27, 41))
    expected = linear(path)
    assert len(expected) == 41
    assert_right(path, reader, expected)


def test_the_frame_that_does_not_decode_is_named(tmp_path: Path) -> None:
    """Frames of a later group of pictures come out; that of an earlier one is missing."""
    path = clips.encode(tmp_path / "clip.mp4", 60, options={"g": "20", "bf": "0"})
    with open_frames(Record(str(path)), "pyav") as reader:
        frames = reader._frames_from
        reader._frames_from = lambda start, only=None: (
            f for f in frames(start, only) if f.pts != reader.scan.times[12]
        )
        with pytest.raises(DecodeError, match="frame 12 of 60 does not decode"):
            reader.read([3, 12, 25, 45])


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        ("libvpx", "webm"),
        ("libvpx-vp9", "webm"),
        ("libx264", "mkv"),
        ("mpeg4", "avi"),
        ("mjpeg", "avi"),
        ("mpeg2video", "mkv"),  # FFmpeg does not show the last picture before a change
    ],
)
def test_a_size_that_changes(codec: str, suffix: str, reader: str, tmp_path: Path) -> None:
    """Every reader returns pictures of the first one's size, whichever frames are asked for, and says so."""
    path = clips.encode_sizes(tmp_path / f"clip.{suffix}", codec, [(96, 128), (48, 64), (96, 128)])
    stored = linear(path)
    assert {image.shape for image in stored} == {(96, 128, 3), (48, 64, 3)}
    with pytest.warns(UserWarning, match=r"clip.*: the size of the picture changes, from 128x96 to 64x48"):
        late = video_convmae.read_frames(path, [14, 30], reader=reader)
    with pytest.warns(UserWarning, match="changes"):
        frames = video_convmae.read_frames(path, reader=reader)
    assert frames.shape == (34 if codec == "mpeg2video" else 36, 96, 128, 3)
    assert (frames[[14, 30]] == late).all()
    for frame, image in zip(frames, stored, strict=True):
        if image.shape == frame.shape:
            assert (frame == image).all()
        else:
            assert np.abs(frame - image.repeat(2, axis=0).repeat(2, axis=1).astype(int)).mean() < 12


def test_no_picture_is_kept_while_the_next_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 8K each is 47 MiB, beside those that the codec refers to; reference cycles would keep them for long."""
    decode, held = pyav_reader.PyAVReader._decode, []

    def count() -> int:
        return sum(type(each) is av.VideoFrame for each in gc.get_objects())

    def watch(reader: pyav_reader.PyAVReader, packet: av.Packet) -> list[av.VideoFrame]:
        held.append(count() - before)
        return decode(reader, packet)

    monkeypatch.setattr(pyav_reader.PyAVReader, "_decode", watch)
    path = clips.encode(tmp_path / "clip.mp4", 40, options=B)
    gc.collect()
    gc.disable()
    before = count()  # of other tests
    try:
        assert len(video_convmae.read_frames(path, [3, 4, 9, 25, 30], reader="pyav")) == 5
        assert len(held) > 5
        assert max(held) == 1  # PyAV's own, empty, for the next
    finally:
        gc.enable()


def test_pictures_of_8k_are_divided(tmp_path: Path) -> None:
    path = clips.encode(tmp_path / "clip.mp4", 3, size=(240, 640), options={"bf": "0"})
    whole = video_convmae.read_frames(path)
    assert whole.shape == (3, 240, 640, 3)
    for name in ["pyav", "decord"] if has_decord() else ["pyav"]:
        with ReaderProcess(name, max_side=256) as process, process.open(Record(str(path))) as reader:
            frames = reader.read([0, 2])
        assert frames.shape == (2, 80, 213, 3)
        assert np.abs(frames.mean((1, 2)) - whole[[0, 2]].mean((1, 2))).max() < 3
    with ReaderProcess("pyav", max_side=640) as process, process.open(Record(str(path))) as reader:
        assert (reader.read([0, 2]) == whole[[0, 2]]).all()
    Image.fromarray(whole[0]).save(tmp_path / "picture.png")
    with open_frames(Record(str(tmp_path / "picture.png"), format="image"), max_side=320) as image:
        assert image.read([0]).shape == (1, 120, 320, 3)
    with pytest.raises(ValueError, match=r"data.max_side is 0; expected 1 pixel or more"):
        ReaderProcess("pyav", max_side=0)


@pytest.mark.parametrize("name", ["torchcodec", "decord"])
def test_large_pictures_are_read_by_pyav_with_a_word(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other libraries hold and return whole pictures, whatever `data.max_side`."""
    pytest.importorskip(name)
    path = clips.encode(tmp_path / "clip.mp4", 3, size=(240, 640), options={"bf": "0"})
    try:
        opened = open_frames(Record(str(path)), name, max_side=640)
    except ImportError as error:  # no FFmpeg
        pytest.skip(str(error))
    with opened:
        assert (opened.name, opened.note) == (name, None)
    with ReaderProcess(name, max_side=256) as process, process.open(Record(str(path))) as reader:
        assert reader.name == "pyav"
        assert reader.note == f"pictures above data.max_side (256) are divided; PyAV reads them in place of {name}"
        assert reader.read([0]).shape == (1, 80, 213, 3)
    monkeypatch.setattr(rules, "has_pyav", lambda: False)
    with open_frames(Record(str(path)), name, max_side=640) as opened:
        assert opened.read([0]).shape == (1, 240, 640, 3)
    with pytest.raises(DecodeError, match=rf"640x240 are above data.max_side \(256\), and {name} divides none"):
        open_frames(Record(str(path)), name, max_side=256)


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits_is_scaled(suffix: str, tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / f"ramp.{suffix}")
    frame = video_convmae.read_frames(tmp_path / f"ramp.{suffix}")[0].astype(int)
    assert np.abs(frame - np.round(ramp / 257.0)[..., None]).max() <= 1


@pytest.mark.parametrize(("kind", "dtype"), [("32-bit integers", np.int32), ("fractions", np.float32)])
def test_values_without_a_white_are_refused(kind: str, dtype: type, tmp_path: Path) -> None:
    Image.fromarray(np.arange(64, dtype=dtype).reshape(8, 8)).save(tmp_path / "depth.tif")
    with pytest.raises(DecodeError, match=rf"depth.tif: its values are {kind}.*convert it to 8 or 16 bits"):
        video_convmae.read_frames(tmp_path / "depth.tif")


def _save(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for place, name in enumerate(names):
        Image.new("RGB", (8, 8), (place, place, place)).save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["img_1.jpg", "img_2.jpg", "flow_x_1.jpg", "flow_x_2.jpg"],
            r"2 series of pictures: img_\* \(2\), flow_x_\* \(2\)",
        ),
        (["1.jpg", "2.jpg", "1.png", "2.png"], r"2 series of pictures: \*.jpg \(2\), \*.png \(2\)"),
        (["1_rgb.png", "2_rgb.png", "1_depth.png"], r"\*_rgb \(2\), \*_depth \(1\); name the one to read, clip/\*_rgb"),
        (["cam1_01.png", "cam1_02.png", "cam2_01.png", "cam2_02.png"], r"cam1_\* \(2\), cam2_\* \(2\)"),
        (["img_1.jpg", "img_2.jpg", "cover.jpg"], r"img_\* \(2\), \* \(1\)"),
    ],
)
def test_a_folder_of_several_series(names: list[str], message: str, tmp_path: Path) -> None:
    folder = _save(tmp_path / "clip", *names)
    with pytest.raises(DecodeError, match=message):
        video_convmae.read_frames(folder)


@pytest.mark.parametrize(
    "names",
    [
        ["img_1.jpg", "img_2.png", "img_10.JPG"],
        ["a.png", "b.png"],
        ["12-59-58.png", "12-59-59.png", "13-00-00.png"],
        ["frame_00.5.png", "frame_01.0.png", "frame_01.5.png"],
    ],
)
def test_a_folder_of_one_series(names: list[str], tmp_path: Path) -> None:
    assert video_convmae.count_frames(_save(tmp_path / "clip", *names)) == len(names)


def test_a_pattern_says_which_series(tmp_path: Path) -> None:
    folder = _save(tmp_path / "clip", "img_1.png", "img_2.png", "img_10.png", "img_mask_1.png", "img_1_flow.png")
    frames = video_convmae.read_frames(folder / "img_*.png")
    assert frames[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert video_convmae.count_frames(folder / "img_*") == 3
    assert len(open_frames(Record(str(folder / "img_mask_*"), 0, 1, "frames"))) == 1
    with pytest.raises(DecodeError, match=r"none of its 5 is named depth_\*"):
        video_convmae.read_frames(folder / "depth_*")


# ---- kept scans ------------------------------------------------------------------------------------------------------


def test_the_scan_of_a_long_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    monkeypatch.setattr(pyav_reader, "KEEP_FRAMES", 0)
    scans: list[str] = []
    scan = pyav_reader.scan_packets
    monkeypatch.setattr(pyav_reader, "scan_packets", lambda path, *rest: scans.append(path) or scan(path, *rest))
    for name in ("h264.mp4", "mpeg4 B-frames.avi"):  # of the second, frames are counted by decoding
        path = clips.make(name, tmp_path)
        expected = linear(path)
        for _ in range(3):
            assert_right(path, "pyav", expected)
        assert scans == [str(path)]
        scans.clear()
    clips.encode(path, 20, "mpeg4", seed=3)  # another file of this name
    assert video_convmae.count_frames(path) == 20
    assert len(scans) == 1
    for file in cache_folder.rglob("scans/*"):  # a kept scan that was cut off is made again
        file.write_bytes(file.read_bytes()[:-100])
    assert video_convmae.count_frames(path) == 20
    assert len(scans) == 2


def test_scans_of_short_files_are_not_kept(tmp_path: Path, cache_folder: Path) -> None:
    video_convmae.read_frames(clips.encode(tmp_path / "clip.mp4", 10), [3])
    assert not list(cache_folder.rglob("*"))


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyav_reader, "KEEP_FRAMES", 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert video_convmae.count_frames(clips.encode(tmp_path / "clip.mp4", 10)) == 10
