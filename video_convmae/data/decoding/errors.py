"""Errors of reading a record: every failure of a library becomes a `DecodeError` that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from video_convmae.errors import UserError


class DecodeError(UserError, RuntimeError):
    """A record that cannot be decoded. The message names its path and what is wrong."""


class DecodeTimeout(DecodeError):
    """A record whose reader did not return in time. Its process was killed."""


@contextmanager
def decode_errors(path: str) -> Iterator[None]:
    """Turn any exception (MemoryError of damaged sizes included) into a DecodeError that names the path."""
    try:
        yield
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(f"{path}: {error_line(error)}") from error


def error_line(error: BaseException) -> str:
    """Return an error in one line: its type and the first line of its message."""
    text = (getattr(error, "strerror", None) or str(error)).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
