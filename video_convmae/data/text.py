"""Text files that people and other programs wrote, in whichever encoding; read nowhere else."""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path

from video_convmae.errors import UserError

from . import remote

# In this order: UTF-32's mark in the order of bytes of x86 begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MARK_AT_LINE = re.compile("^\ufeff+", re.MULTILINE)  # where marked files were put one behind the other


class ListError(UserError):
    """A list, or a file beside one, that cannot be used; the message names file, line and what was expected."""


def read_text(path: str | Path, title: str = "the file") -> str:
    """Return the text of a list, an annotation or a file of names; its lines end in `\\n`.

    UTF-8, UTF-16 or UTF-32 by their byte-order mark, UTF-16 without one by its zero bytes. Other bytes that are no
    UTF-8 are kept as `os.fsdecode` keeps those of a file name.

    Args:
        path: of the file, or its URL.
        title: of the file in messages.

    Raises:
        ListError: the file cannot be read, or is no text.
    """
    try:
        data = remote.read_bytes(str(path)) if remote.is_url(path) else Path(path).read_bytes()
    except OSError as error:
        raise ListError(f"cannot read {title} {path}: {error.strerror or error}") from error
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None) or _guess(data)
    try:
        text = data.decode(encoding, "strict" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape")
    except UnicodeDecodeError as error:
        raise ListError(
            f"{title} {path} is not whole: by its first bytes it is {encoding.upper()}, and byte {error.start} is not; "
            "save it again as UTF-8"
        ) from error
    text = _MARK_AT_LINE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ListError(f"{title} {path} holds a zero byte in line {line}: it is no text, or damaged; save it as UTF-8")
    return text


def readable(name: str) -> str:
    """Return a name of a class for people to read: bytes that are no UTF-8 are taken for Windows' cp1252."""
    data = os.fsencode(name)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _guess(data: bytes) -> str:
    """Return the encoding of a file without a mark: in UTF-16, every second byte of ASCII characters is zero."""
    zeros = data.count(0)
    if zeros and 4 * zeros >= len(data) and len(data) % 2 == 0:
        if data[1::2].count(0) == zeros:
            return "utf-16-le"
        if data[0::2].count(0) == zeros:
            return "utf-16-be"
    return "utf-8"
