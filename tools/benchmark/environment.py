"""The machine and the commit that every result names."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Return `device`, the name of the processor or GPU, and `commit`."""
    if not device.startswith("cuda"):
        return {"device": processor_name(), "commit": current_commit()}
    import torch  # imported here: a result of a CPU needs none

    return {"device": torch.cuda.get_device_name(device), "commit": current_commit()}


def processor_name() -> str:
    """Return the processor's model name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def current_commit() -> str:
    """Return the commit that is measured, marked "-dirty" if files have changed since, or "unknown" without git."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()
