"""Files that readers see whole: written beside their place and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from video_convmae.errors import UserError


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


def write_text(path: Path, text: str, **options: Any) -> None:
    """Write a small text file, UTF-8 unless the options of `open` say otherwise: readers see the old or the new one."""
    with replacing(path, **{"encoding": "utf-8", **options}) as file:
        file.write(text)


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a file without an incomplete last one (a kill, a full disk)."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file of ours. Raises a UserError that names it, if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged, or was edited: it is no JSON ({error}); restore it, or remove it"
        ) from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of ours, each an object in JSON, without an incomplete last one.

    Raises:
        UserError: another line is none; the message has its number.
    """
    values = []
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is damaged: {line[:60]!r} is no JSON; remove this line") from error
    return values


def refuse_overwriting(outputs: Iterable[str | Path], inputs: Iterable[str | Path]) -> None:
    """Raise a UserError if a file that is to be written is one that is read, under whichever name or link."""
    read = {os.path.realpath(path) for path in inputs}
    for path in outputs:
        if os.path.realpath(path) in read:
            raise UserError(f"{path} is read by this command and would be overwritten; choose another output")
