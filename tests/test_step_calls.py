"""A pretraining step stays readable: the training process calls few functions, in few files (step_calls.py counts)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_step_calls_few_functions_in_few_files() -> None:
    program = [sys.executable, str(ROOT / "tests" / "step_calls.py")]
    done = subprocess.run(
        program, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    found = re.search(r"loaded by workers: (\d+) functions in (\d+) files", done.stderr)
    assert found is not None, done.stderr
    functions, files = map(int, found.groups())
    assert functions <= 60
    assert files <= 14
