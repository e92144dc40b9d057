"""State that runs leave, and interruptions of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from video_convmae.engine.checkpoint import Checkpoint, find_weights
from video_convmae.engine.inference import Chunk, ListInference


def load_state(path: str | Path, *parts: str) -> dict[str, Any]:
    """Return the plain data of a checkpoint (or of a run's newest one) and the tensors of the parts, or of all."""
    checkpoint = find_weights(path)
    assert isinstance(checkpoint, Checkpoint)
    state = {name: value for name, value in checkpoint.info.items() if name != "files"}
    for part in parts or ("model", "ema", "optimizer"):
        if tensors := checkpoint.tensors(part):
            state[part] = tensors
    return state


class Interrupted(Exception):
    """An inference was interrupted by a test."""


def interrupt_and_resume(
    run: Callable[[], Any], output: Path, after: int, patch: pytest.MonkeyPatch
) -> tuple[Any, list]:
    """Run an inference that stops after some chunks, cut off its last stored row, and run it again.

    Returns:
        The second run's result, and the records that either has computed, in order.
    """
    compute = ListInference._compute
    seen: list[int] = []

    def interrupted(last: int) -> Callable[..., Iterator[Chunk]]:
        def chunks(*arguments: Any) -> Iterator[Chunk]:
            for number, chunk in enumerate(compute(*arguments)):
                if number == last:
                    raise Interrupted
                seen.extend(chunk.records)
                yield chunk

        return chunks

    patch.setattr(ListInference, "_compute", interrupted(after))
    with pytest.raises(Interrupted):
        run()
    assert not list(output.glob("metrics.json")) + list(output.glob("features.npz"))
    for path in (output / "partial").rglob("*.rows"):  # the kill came while a row was written
        path.write_bytes(path.read_bytes()[:-3])
    patch.setattr(ListInference, "_compute", interrupted(100))
    return run(), seen
