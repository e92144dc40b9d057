"""The state in a checkpoint, as a test looks at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from video_convmae.engine.checkpoint import Checkpoint, find_weights


def load_state(path: str | Path, *parts: str) -> dict[str, Any]:
    """Return the plain data of a checkpoint (or of a run's newest one) and the tensors of the parts, or of all."""
    checkpoint = find_weights(path)
    assert isinstance(checkpoint, Checkpoint)
    state = {name: value for name, value in checkpoint.info.items() if name != "files"}
    for part in parts or ("model", "ema", "optimizer"):
        if tensors := checkpoint.tensors(part):
            state[part] = tensors
    return state
