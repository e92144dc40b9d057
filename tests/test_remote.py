"""Files by URL, through fsspec: read as local ones are, copied once, bounded; failures are bad records."""

from __future__ import annotations

import fcntl
import functools
import http.server
import os
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import clips
import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from PIL import Image
from test_loader import clips_of

from video_convmae.cli import run as run_command
from video_convmae.cli.parser import parse
from video_convmae.cli.pretrain import pretrain
from video_convmae.config import DataConfig, PretrainConfig
from video_convmae.data import remote, shards
from video_convmae.data.datasets import SampleKey
from video_convmae.data.decoding import DecodeError, read_frames, read_record
from video_convmae.data.decoding.process import ReaderProcess
from video_convmae.data.labels import class_names
from video_convmae.data.records import ListError, Record, read_list
from video_convmae.data.remote import ObjectCache
from video_convmae.errors import UserError
from video_convmae.lists import read_records


class Flaky(MemoryFileSystem):
    """An object store that fails: `faults` is what happens to the next downloads."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012  # as fsspec's
    faults: list[str] = []  # noqa: RUF012
    downloads: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        Flaky.downloads.append(rpath)
        fault = Flaky.faults.pop(0) if Flaky.faults else ""
        if fault == "broken":
            raise ConnectionError("connection reset")
        super().get_file(rpath, lpath, **options)
        if fault == "short":
            os.truncate(lpath, 100)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of copies for this process; no pauses; empty stores."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    remote.use_cache(ObjectCache(str(tmp_path / "cache")))
    shards._remote_index.cache_clear()
    Flaky.faults, Flaky.downloads = [], []
    yield tmp_path / "cache"
    remote.use_cache(ObjectCache())
    for files in (MemoryFileSystem, Flaky):
        files.store.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos, an archive of them, a series of pictures, and lists."""
    folder = tmp_path_factory.mktemp("objects")
    for i in range(3):
        clips.encode(folder / f"{i}.mp4", 20 + i, seed=i)
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for i in range(3):
            archive.add(folder / f"{i}.mp4", f"{i}.mp4")
    (folder / "frames").mkdir()
    for i, picture in enumerate(clips.pictures(4)):
        Image.fromarray(picture).save(folder / "frames" / f"{i}.png")
    (folder / "list.txt").write_text("0.mp4 0\n1.mp4 1\n2.mp4 0\n")
    (folder / "list.labels.txt").write_text("cat\ndog\n")
    return folder


def put(url: str, data: bytes) -> str:
    with fsspec.open(url, "wb") as file:
        file.write(data)
    return url


def upload(folder: Path, scheme: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            put(f"{scheme}://data/{path.relative_to(folder)}", path.read_bytes())
    return f"{scheme}://data"


def copies(cache: Path) -> list[Path]:
    return [path for path in cache.glob("??/*") if not path.name.startswith("lock")]


@pytest.mark.parametrize("name", ["0.mp4", "frames", "frames/*", "shard.tar#1.mp4"])
def test_objects_are_read_as_files_are(folder: Path, name: str) -> None:
    root = upload(folder, "memory")
    path = f"{root}/{name}"
    record = Record(path, format="frames" if name.startswith("frames") else "video")
    local = Record(str(folder / name), format=record.format)
    assert (read_record(record, [0, 3, 2], "pyav") == read_record(local, [0, 3, 2], "pyav")).all()


def test_a_copy_is_made_once(folder: Path, cache: Path) -> None:
    url = upload(folder, "flaky") + "/0.mp4"
    frames = [read_frames(url, [1]) for _ in range(3)]
    assert (frames[0] == frames[2]).all()
    assert len(Flaky.downloads) == 1
    assert [path.read_bytes() for path in copies(cache)] == [(folder / "0.mp4").read_bytes()]


def test_a_list_its_root_and_its_class_names_may_be_urls(folder: Path) -> None:
    root = upload(folder, "memory")
    records = read_list(f"{root}/list.txt", root=root)
    assert [record.path for record in records] == [f"{root}/{i}.mp4" for i in range(3)]
    assert records.digest(root) == read_list(folder / "list.txt", root=folder).digest(folder)
    assert class_names(f"{root}/list.txt", root) == ["cat", "dog"]
    assert class_names("list.txt", labels=f"{root}/list.labels.txt") == ["cat", "dog"]
    with pytest.raises(ListError, match=r"cannot read the class names memory://data/none\.txt: no such object"):
        class_names("list.txt", labels=f"{root}/none.txt")
    (folder / "urls.txt").write_text(f"{root}/1.mp4\n{folder / '0.mp4'}\n")
    mixed = read_list(folder / "urls.txt", root="/elsewhere")
    assert [record.path for record in mixed] == [f"{root}/1.mp4", str(folder / "0.mp4")]
    with pytest.raises(ListError, match=r"cannot read the list memory://data/none\.txt: no such object"):
        read_list(f"{root}/none.txt")


@pytest.mark.parametrize("fault", ["broken", "short"])
def test_a_passing_failure_is_tried_again(folder: Path, cache: Path, fault: str) -> None:
    url = upload(folder, "flaky") + "/0.mp4"
    Flaky.faults = [fault, fault]
    assert (read_frames(url) == read_frames(folder / "0.mp4")).all()
    assert len(Flaky.downloads) == 3


@pytest.mark.parametrize(
    ("name", "faults", "error"),
    [
        ("none.mp4", [], "no such object"),
        ("0.mp4", ["broken"] * 3, "not read in 3 attempts: connection reset"),
        ("0.mp4", ["short"] * 3, r"not read in 3 attempts: 100 of \d+ bytes came"),
        ("shard.tar#none.mp4", [], "no 'none.mp4' among the 3 files of the archive"),
        ("text.mp4", [], "Invalid data"),
    ],
)
def test_a_lasting_failure_is_that_of_its_record(
    folder: Path, cache: Path, name: str, faults: list[str], error: str
) -> None:
    root = upload(folder, "flaky")
    put(f"{root}/text.mp4", b"not a video\n" * 100)
    Flaky.faults = list(faults)
    with pytest.raises(DecodeError, match=f"^{re.escape(f'{root}/{name}')}: .*{error}"):
        read_frames(f"{root}/{name}")
    assert not any("partial" in path.name for path in copies(cache))


def test_a_member_is_read_without_its_archive(folder: Path, cache: Path) -> None:
    url = upload(folder, "flaky") + "/shard.tar#2.mp4"
    assert (read_frames(url) == read_frames(folder / "2.mp4")).all()
    assert Flaky.downloads == []  # of whole files
    assert max(path.stat().st_size for path in copies(cache)) < (folder / "shard.tar").stat().st_size / 2


def test_the_folder_is_bounded_and_what_was_used_longest_ago_goes(folder: Path, tmp_path: Path) -> None:
    for i in range(8):
        put(f"memory://data/{i}.bin", bytes(100_000))
    remote.use_cache(ObjectCache(str(tmp_path / "small"), gigabytes=450_000 / 2**30))
    for i in (0, 1, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7):
        assert os.path.getsize(remote.local_copy(f"memory://data/{i}.bin")) == 100_000
        time.sleep(0.005)
        assert sum(path.stat().st_size for path in copies(tmp_path / "small")) <= 450_000
    kept = {i for i in range(8) if os.path.exists(remote.place(f"memory://data/{i}.bin"))}
    assert {0, 7} <= kept
    assert 1 not in kept


def read_many(folder: str, root: str, seed: int) -> int:
    """In a process of its own: read files whose folder of copies is too small for them."""
    remote.use_cache(ObjectCache(folder, gigabytes=250_000 / 2**30))
    for i in np.random.default_rng(seed).integers(0, 6, 60):
        with open(remote.keep(f"memory://data/{i}", functools.partial(make, int(i))), "rb") as file:
            data = file.read()
        assert data == bytes([i]) * 100_000
    return 60


def make(value: int, path: str) -> None:
    with open(path, "wb") as file:
        for _ in range(10):
            file.write(bytes([value]) * 10_000)


def test_processes_share_a_folder_that_is_too_small(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        done = [pool.submit(read_many, str(tmp_path / "shared"), "memory://data", seed) for seed in range(4)]
        assert [each.result(timeout=60) for each in done] == [60] * 4
    assert not any("partial" in path.name for path in copies(tmp_path / "shared"))


def test_a_copy_that_was_made_again_is_not_taken_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process opens a copy to remove it; another has removed it, and a third reads the next one at its place."""
    remote.use_cache(ObjectCache(str(tmp_path)))
    copy = Path(remote.keep("memory://data/0", functools.partial(make, 0)))
    flock = fcntl.flock

    def others_first(file: Any, operation: int) -> None:
        copy.unlink()
        copy.write_bytes(b"the next")
        flock(file, operation)

    remote._state.held.clear()  # nobody reads the first
    monkeypatch.setattr(fcntl, "flock", others_first)
    assert not remote._remove(copy)
    assert copy.read_bytes() == b"the next"


def test_a_training_sample_from_file_urls_in_a_reader_process(folder: Path, tmp_path: Path) -> None:
    """`file://` is read where it lies; nothing is copied."""
    cache = tmp_path / "none"
    reader = ReaderProcess("pyav", 20, cache=ObjectCache(str(cache)))
    ours = clips_of(read_list(folder / "list.txt", root=f"file://{folder}"), reader=reader)
    theirs = clips_of(read_list(folder / "list.txt", root=folder))
    for index in range(3):
        assert torch.equal(ours[SampleKey(0, index)].clips, theirs[SampleKey(0, index)].clips)
    assert not cache.exists()


def test_a_library_that_is_missing_is_named_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.txt").write_text("a.mp4\n")
    monkeypatch.setitem(known_implementations, "nowhere", {"class": "no_library.Files", "err": "Install it"})
    with pytest.raises(UserError, match=r"Install it.*video-convmae\[remote\]"):
        read_records(DataConfig(str(tmp_path / "list.txt"), root="nowhere://data"))
    with pytest.raises(UserError, match="expected a URL that fsspec knows"):
        read_records(DataConfig(str(tmp_path / "list.txt"), root="nothing://data"))


@pytest.mark.parametrize("command", ["check-videos", "pack-videos"])
@pytest.mark.parametrize("arguments", [["LIST", "--root=http://host/data"], ["http://host/list.txt"]])
def test_a_url_in_place_of_a_path_of_this_machine_is_named_whole(
    command: str, arguments: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [argument.replace("LIST", str(folder / "list.txt")) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        run_command(command, [*given, f"--out={tmp_path / 'out'}"])
    assert ended.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.search(r"it is 'http://host/\S+', a URL; expected a path on this machine", error)
    assert not (tmp_path / "out").exists()


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves files whole, as Python's own server does; `cut.mp4` is announced longer than what is sent."""

    def do_GET(self) -> None:
        if self.path.endswith("cut.mp4"):
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"\0" * 1000)
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp (the extra `remote`)")
    handler = functools.partial(Server, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_features_of_a_video_by_url(folder: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = ["--weights=tiny-moving-digits", f"--list={server}/0.mp4", "--window=8", "--stride=1", "--hop=10"]
    assert run_command("features", [*given, f"--output={tmp_path / 'out'}", "--device=cpu", "--workers=0"]) == 0
    assert [path.name for path in (tmp_path / "out" / "windows").iterdir()] == ["0.npy"]
    assert f"0,{server}/0.mp4,0,8," in (tmp_path / "out" / "windows.csv").read_text()


@pytest.mark.slow
def test_a_run_on_a_list_from_a_server(folder: Path, server: str, cache: Path, tmp_path: Path) -> None:
    """Reader processes of loading processes download; a missing file and one that is cut off are bad records."""
    (folder / "served.txt").write_text("0.mp4\n1.mp4\n2.mp4\nshard.tar#1.mp4\nnone.mp4\ncut.mp4\n")
    edits = [f"--data.train={server}/served.txt", f"--data.root={server}", f"--data.cache={cache}", "--device=cpu"]
    edits += ["--data.max_bad_fraction=0.5", "--data.workers=2", "--data.reader=pyav", "--model.image_size=32"]
    pretrain(parse(PretrainConfig, ["--config=debug/pretrain", f"--output={tmp_path / 'run'}", *edits]))
    bad = (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()
    assert {re.sub(r".*/(.*mp4)\".*", r"\1", line) for line in bad} == {"none.mp4", "cut.mp4"}
    assert any("no such object" in line for line in bad)
    for i in range(3):
        assert any(path.read_bytes() == (folder / f"{i}.mp4").read_bytes() for path in copies(cache))
