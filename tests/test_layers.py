"""Imports point one way; torch.distributed is imported only where processes are the subject."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "video_convmae"

LEAVES = {"masking", "atomic", "bounds", "errors", "hub", "machine", "shipped"}  # anyone may import them
PARTS = {"models", "data", "weights", "engine"}
# Each part, and the parts that it may import besides itself, the leaves and the version.
ALLOWED = {
    "masking": set(),
    "atomic": set(),
    "bounds": set(),
    "errors": set(),
    "machine": set(),
    "shipped": set(),
    "hub": set(),
    "kernels": set(),
    "data": set(),
    "models": {"kernels"},
    "weights": {"models"},
    "engine": {"models", "data", "weights", "dense"},
    "dense": {"models"},
    "config": PARTS,
    "config_dense": {"config", "dense", *PARTS},
    "lists": {"config", *PARTS},
    "build_trainer": {"config", *PARTS},
    "build": {"build_trainer", "lists", "config", *PARTS},
    "runs": {"build", "config", "config_dense", "dense", *PARTS},
    # A detector's or a segmenter's run may start another.
    "build_dense": {"build", "build_trainer", "lists", "config", "config_dense", "dense", "runs", *PARTS},
    "predictor": {"lists", "build", "runs", "config", *PARTS},
    "timm": {"models", "dense", "weights"},
    "export": {"runs", "predictor", "config", "dense", *PARTS},
    "prepare": {"data"},
    "visualize": {"lists", "build", "runs", "predictor", "config", *PARTS},
    "benchmark": {"build", "runs", "config", "prepare", *PARTS},
    "cli": {
        "lists",
        "build",
        "build_dense",
        "runs",
        "predictor",
        "export",
        "prepare",
        "visualize",
        "benchmark",
        "config",
        "config_dense",
        *PARTS,
    },
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
    assert ours <= ALLOWED[part] | LEAVES | {part, "__version__"}, f"{part} may import {sorted(ALLOWED[part])}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_engine_knows_processes(path: Path) -> None:
    distributed = [name for name in imported_modules(path) if name.startswith("torch.distributed")]
    assert not distributed or path in KNOWS_PROCESSES


def test_the_check_sees_imports() -> None:
    assert "video_convmae.data.records" in imported_modules(PACKAGE / "data" / "datasets.py")
    assert "torch.distributed" in imported_modules(PACKAGE / "engine" / "distributed.py")
