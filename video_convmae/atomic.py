"""Files that readers see whole: written beside their place and renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Open a file beside `path` for writing; rename it to `path` at the end, or remove it after an error.

    Args:
        path: of the file.
        mode, options: as for `open`.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, mode, **options) as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small text file: readers see the old or the new one."""
    with replacing(path, encoding="utf-8") as file:
        file.write(text)


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a file without an incomplete last one (a kill, a full disk)."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]
