"""The wheel in an empty folder, used from another: every command a new user needs, on a few encoded clips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from clips import encode

from video_convmae.shipped import shipped_weights

ROOT = Path(__file__).parent.parent
TINY = ("--model.size=tiny", "--model.num_frames=4", "--model.image_size=32")
TINY += ("--train.epochs=1", "--train.batch_size=4", "--data.workers=0", "--device=cpu")


class Installed:
    """A wheel unpacked into a folder of its own, and a working folder beside it."""

    def __init__(self, folder: Path) -> None:
        self.site, self.work = folder / "site", folder / "work"
        self.work.mkdir()
        python = [sys.executable, "-m"]
        build = [*python, "build", "--wheel", "--no-isolation", f"--outdir={folder}", str(ROOT)]
        subprocess.run(build, check=True, capture_output=True, timeout=120)
        (wheel,) = folder.glob("video_convmae-*.whl")
        install = [*python, "pip", "install", "--quiet", "--no-deps", "--no-index", f"--target={self.site}", str(wheel)]
        subprocess.run(install, check=True, capture_output=True, timeout=120)
        # Nothing but the wheel and the packages that it depends on: the clone is neither the working folder nor here.
        self.environment = os.environ | {"PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1"}

    def run(self, *command: str, code: int = 0) -> str:
        """Run the installed program `video-convmae`; returns what it printed."""
        arguments = [sys.executable, str(self.site / "bin" / "video-convmae"), *command]
        done = subprocess.run(
            arguments, cwd=self.work, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"))


def test_the_package_is_the_wheels(installed: Installed) -> None:
    program = """
from importlib.util import find_spec
from video_convmae.shipped import find_config, find_labels, shipped_configs, shipped_weights
packages = [find_spec(name).origin for name in ("video_convmae", "video_convmae.benchmark.main")]
print(len(shipped_configs()), *packages, find_config("debug/pretrain"), find_labels("kinetics400"), sep="\\n")
print(*shipped_weights())
"""
    said = subprocess.run(
        [sys.executable, "-c", program],
        cwd=installed.work,
        env=installed.environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    *lines, weights = said.stdout.splitlines()
    count, *files = lines
    assert int(count) == len(list((ROOT / "configs").rglob("*.yaml")))
    assert [Path(file) for file in files] == [
        installed.site / "video_convmae" / name
        for name in ("__init__.py", "benchmark/main.py", "configs/debug/pretrain.yaml", "labels/kinetics400.txt")
    ]
    assert (installed.site / "video_convmae" / "py.typed").exists()
    assert weights.split() == shipped_weights()  # of the clone
    assert all((installed.site / "video_convmae" / "pretrained" / f"{name}.md").exists() for name in weights.split())


def test_from_videos_to_predictions(installed: Installed) -> None:
    for label, name in enumerate(("pouring", "stirring")):
        (installed.work / "videos" / name).mkdir(parents=True)
        for i in range(4):
            encode(installed.work / "videos" / name / f"{i}.mp4", 24 + i, seed=label)
    (installed.work / "videos" / "pouring" / "bad.mp4").write_text("no video")

    installed.run("make-list", "folders", "--root", "videos", "--out", "lists/all.txt", "--part", "all")
    installed.run("check-videos", "lists/all.txt", "--root", "videos", "--out", "checked", "--workers", "1")
    data = ("--data.train=checked/clean.txt", "--data.root=videos")
    installed.run("pretrain", "--config", "debug/pretrain", *data, *TINY, "--output=runs/pretrain")
    assert json.loads((installed.work / "runs" / "pretrain" / "metrics.json").read_text())["step"] == 2

    data += ("--data.validation=checked/clean.txt", "--init.weights=runs/pretrain")
    finetune = ("finetune", "--config", "debug/finetune", *data, *TINY, "--output=runs/finetune")
    installed.run(*finetune, "--test.segments=1", "--test.crops=1")
    installed.run("evaluate", "--weights=runs/finetune", "--output=runs/test", "--workers=0", "--device=cpu")
    metrics = json.loads((installed.work / "runs" / "test" / "metrics.json").read_text())
    assert (metrics["scored"], metrics["failed"]) == (8, 0)
    said = installed.run("predict", "runs/finetune", "videos/pouring/0.mp4", "--device=cpu", "--json")
    assert {each["name"] for each in json.loads(said)["predictions"]} == {"pouring", "stirring"}


def test_a_mistake_is_one_line(installed: Installed) -> None:
    assert installed.run("pretrain", "--config", "video/pretrain_k400", code=2).count("\n") == 1
    assert installed.run("pretrain", "--config", "debug/pretrain", "--train.epoch", "3", code=2).count("\n") == 1
