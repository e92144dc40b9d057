"""Figures of the documentation: drawn by their scripts, from numbers that were measured."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools.study.study import table
from video_convmae import masking

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"


@pytest.mark.parametrize("name", ["adaptation", "architecture", "curves", "speed", "study", "targets"])
def test_a_figure_is_what_its_script_draws(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(FIGURES / f"{name}.py"), str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True, timeout=60)
    drawn = (tmp_path / f"{name}.svg").read_bytes()
    assert drawn == (FIGURES / f"{name}.svg").read_bytes(), f"run: python docs/figures/{name}.py"
    assert ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"


def test_the_mask_of_the_architecture_is_a_tube_mask_at_0_9(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FIGURES))
    import architecture

    grid = (architecture.FRAMES, architecture.GRID, architecture.GRID)
    assert len(set(architecture.VISIBLE)) == int(masking.tube(grid, 0.9)[0].sum())


def test_measured_ratios_are_medians_of_their_pairs_and_say_where_they_were_measured() -> None:
    measured = json.loads((ROOT / "docs" / "performance.json").read_text(encoding="utf-8"))
    names = [row["name"] for row in measured["step"]]
    assert len(set(names)) == len(names)
    for row in measured["step"]:
        assert row["ratio"] == pytest.approx(statistics.median(row["pairs"])), row["name"]
    for row in [*measured["step"], *measured["loader"], *measured["packing"]]:
        assert all(row[name] for name in ("command", "machine", "commit"))
    parts = dict(measured["counted"]["parts"])
    for name, total in parts.pop("sum").items():
        assert sum(part.get(name, 0) for part in parts.values()) == pytest.approx(total, abs=0.3)


def test_the_results_quote_the_study_as_measured() -> None:
    rows = json.loads((ROOT / "docs" / "study.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert all(row["commit"] and row["device"] for row in rows)
    for line in table(rows).splitlines():
        assert line in page, line
