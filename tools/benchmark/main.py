"""Measure this machine's speed with VideoConvMAE: each part beside what it is compared with.

    python tools/benchmark.py step --vs dense --json step.json
    python tools/benchmark.py step --vs videomae --device cuda --precision bf16 --batch 64
    python tools/benchmark.py scale --device cuda --precision bf16 --plot scale.png
    python tools/benchmark.py loader --vs videomae --json loader.json
    python tools/benchmark.py packing --json packing.json

`step --help` and so on say what a command does and how it measures. docs/PERFORMANCE.md has the results.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from video_convmae.benchmark import loader as benchmark_loader
from video_convmae.benchmark import packing as benchmark_packing
from video_convmae.benchmark import scale as benchmark_scale
from video_convmae.benchmark import step as benchmark_step

COMMANDS = (benchmark_step, benchmark_scale, benchmark_loader, benchmark_packing)  # each adds its own subcommand


def about(device: str = "cpu") -> dict[str, str]:
    """What every result says of the machine and the code."""
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else processor(),
        "commit": commit(),
    }


def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    names = (
        [line.split(": ")[1] for line in path.read_text().splitlines() if "model name" in line] if path.exists() else []
    )
    return names[0] if names else platform.processor()


def commit() -> str:
    """The commit that is measured, marked where files have changed since."""
    folder = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command in COMMANDS:
        command.add_command(commands, about)
    given = parser.parse_args(arguments)
    given.run(given)
