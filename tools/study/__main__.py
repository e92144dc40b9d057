"""`python -m tools.study`. A module of its own: spawned processes cannot import what they run from a `__main__`."""

import sys

from tools.study.study import main
from video_convmae.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("tools.study", main))
