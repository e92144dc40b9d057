"""Imports point one way, as ALLOWED says; no circle, and torch.distributed only where processes are the subject."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "video_convmae"

ANYWHERE = {"atomic", "errors", "shipped"}
ENGINE = {"masking", "models", "kernels", "data", "weights", "engine"}
# Each part, and the parts that it may import besides itself.
ALLOWED = {
    "atomic": set(),
    "errors": set(),
    "shipped": set(),
    "masking": set(),
    "kernels": set(),
    "data": {"masking"},
    "models": {"masking", "kernels"},
    "weights": {"masking", "models"},
    "engine": {"masking", "models", "data", "weights"},
    "dense": {"masking", "models"},
    "config": ENGINE,
    "build": {"config", *ENGINE},
    "runs": {"config", *ENGINE},
    "predictor": {"build", "runs", "config", *ENGINE},
    "prepare": {"data", "masking"},
    "visualize": {"build", "runs", "predictor", "config", *ENGINE},
    "benchmark": {"build", "runs", "config", "prepare", *ENGINE},
    "cli": {"build", "runs", "predictor", "prepare", "visualize", "benchmark", "config", *ENGINE},
    "__main__": {"cli"},
}
FILES = sorted(PACKAGE.rglob("*.py"))
# A run's processes and what they write together; the rest of the package is written for one process.
KNOWS_PROCESSES = {PACKAGE / "engine" / f"{name}.py" for name in ("distributed", "parallel", "watchdog", "checkpoint")}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all that a file imports, wherever in it."""
    package = ["video_convmae", *path.relative_to(PACKAGE).parts[:-1]]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", [f for f in FILES if part_of(f) != "__init__"], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    ours = {name.split(".")[1] for name in imported_modules(path) if name.startswith("video_convmae.")}
    assert ours <= ALLOWED[part] | {part} | ANYWHERE, f"{part} may import {sorted(ALLOWED[part])}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_engine_knows_processes(path: Path) -> None:
    distributed = [name for name in imported_modules(path) if name.startswith("torch.distributed")]
    assert not distributed or path in KNOWS_PROCESSES


def test_the_check_sees_imports() -> None:
    assert "video_convmae.data.records" in imported_modules(PACKAGE / "data" / "datasets.py")
    assert "torch.distributed" in imported_modules(PACKAGE / "engine" / "distributed.py")
