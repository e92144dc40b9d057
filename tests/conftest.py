"""Fixtures and options shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clips import encode_list
from hypothesis import settings

# Timings differ between machines; a property holds or not, however long it takes to see.
settings.register_profile("project", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("project")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The same sums on every machine; the cores are for test processes side by side (pytest -n)."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference outputs and real clips beside the repository."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared with reference outputs and real clips is not here")
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen short videos, a bad one, and their list."""
    return encode_list(tmp_path_factory.mktemp("videos"), 15, bad="bad.mp4 15")
