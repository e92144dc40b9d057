"""Speed measurements: the modules of tools/benchmark/ in a clone; in a wheel they lie in this folder."""

from pathlib import Path

__path__.append(str(Path(__file__).parents[2] / "tools" / "benchmark"))
