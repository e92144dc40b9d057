"""Speed measurements. In a clone their files lie in tools/benchmark/; the wheel has them here."""

from pathlib import Path

__path__.append(str(Path(__file__).parents[2] / "tools" / "benchmark"))
