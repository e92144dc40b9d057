"""tools/profile.py: a trace of the steps of a run, and a name that the standard library has too."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_pretrain import ENVIRONMENT, ROOT

PHASES = {"forward", "backward", "optimizer"}


@pytest.mark.parametrize("recipe", ["pretrain", "finetune"])
def test_a_trace_shows_the_phases_of_a_few_steps(recipe: str, videos: Path, tmp_path: Path) -> None:
    edits = [f"--data.train={videos / 'list.txt'}", f"--data.root={videos}", "--data.decoder=pyav", "--device=cpu"]
    edits += [f"--output={tmp_path / 'run'}", "--model.image_size=32", "--data.workers=0", "--train.epochs=4"]
    if recipe == "finetune":
        edits += ["--data.validation=null", "--data.num_classes=16", "--data.augmentation.flip=false"]
    config = str(ROOT / "configs" / "debug" / f"{recipe}.yaml")
    program = [sys.executable, str(ROOT / "tools" / "profile.py"), recipe, "--config", config, *edits]
    result = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "stopped by a signal after step 6" in result.stdout + result.stderr  # three to warm up, three recorded
    with gzip.open(tmp_path / "run" / "logs" / "trace_rank_0000.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert all(names.count(phase) == 3 * names.count("ProfilerStep#3") for phase in PHASES), names
    assert "aten::addmm" in {event["name"] for event in events}
    assert "aten::" in (tmp_path / "run" / "logs" / "trace_rank_0000.txt").read_text()
    again = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert "holds a run; expected a new folder" in again.stderr


def test_scripts_beside_it_get_the_standard_librarys_profile() -> None:
    """cProfile imports `profile`, and torch.compile imports cProfile."""
    program = "import cProfile, profile; assert profile.Profile.runctx; cProfile.run('1 + 1'); print('fine')"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "tools", capture_output=True, text=True, timeout=60
    )
    assert result.stdout.endswith("fine\n"), result.stderr
