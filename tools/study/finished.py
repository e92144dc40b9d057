"""Finished and interrupted runs of a demo."""

from __future__ import annotations

import sys
from pathlib import Path


def is_finished(run: Path) -> bool:
    """Return whether a run took all its steps: its metrics.json is written last."""
    return (run / "metrics.json").exists()


def require_finished(run: Path) -> None:
    """Exit if a signal ended the run: half a run must not be measured."""
    if not is_finished(run):
        sys.exit(f"{run} was interrupted; the same command resumes it")
