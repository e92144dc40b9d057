"""The machine and the commit, which every result and every run names."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Return `device`, the name of the processor or GPU, and `commit`, "unknown" outside of a clone."""
    commit = current_commit() or "unknown"
    if not device.startswith("cuda"):
        return {"device": processor_name(), "commit": commit}
    import torch  # imported here: a result of a CPU needs none

    return {"device": torch.cuda.get_device_name(device), "commit": commit}


def processor_name() -> str:
    """Return the processor's model name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def current_commit() -> str | None:
    """Return the commit of the clone that this package lies in, marked "-dirty" if files have changed since.

    None: it lies in none (an installed wheel may stand in another project's repository), or there is no git.
    """
    clone = Path(__file__).parent.parent
    if not (clone / ".git").exists():
        return None
    git = ["git", "-C", str(clone), "describe", "--always", "--dirty", "--exclude", "*"]  # the commit, not a tag
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
