"""Scans of long files, kept between openings: a two-hour film is walked packet by packet once, not for each clip.

The folder is `video-convmae/scans` under $XDG_CACHE_HOME or ~/.cache. A kept scan belongs to a path, size and
modification time; that of a file that has changed is never read again. The folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from contextlib import suppress
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import numpy as np

from video_convmae.data import shards

from .scan import Scan

KEEP_FRAMES = 5000  # a scan of more is kept (0.04 s at first opening); clips of a data set are shorter
_LAYOUT = 3  # of the files; another with every change of what a scan means


def kept_scan(path: str) -> Scan | None:
    """Return the scan that was kept of a file, or None."""
    try:
        text, arrays = _place(path).read_bytes().split(b"\n", 1)
        values, file = json.loads(text), io.BytesIO(arrays)
        values["tick"] = Fraction(values["tick"])
        values["rate"] = values["rate"] and Fraction(values["rate"])
        values["times"], values["keyframes"] = np.load(file), np.load(file)
        return Scan(**values)
    except (OSError, ValueError, TypeError, KeyError, EOFError):  # none, or one that was cut off
        return None


def keep_scan(path: str, scan: Scan) -> None:
    """Keep the scan of a file; a folder that cannot be written to is no error."""
    values = {field.name: getattr(scan, field.name) for field in fields(scan)}
    times, keyframes = values.pop("times"), values.pop("keyframes")
    values |= {"tick": str(scan.tick), "rate": scan.rate and str(scan.rate)}
    file = io.BytesIO()
    np.save(file, times)
    np.save(file, keyframes)
    with suppress(OSError):
        place = _place(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f"{place.name}.{os.getpid()}")  # several processes may keep the same scan
        partial.write_bytes(json.dumps(values).encode() + b"\n" + file.getvalue())
        partial.replace(place)


def _place(path: str) -> Path:
    """Return the file of a scan, named by all that it depends on."""
    import av

    status = os.stat(shards.file_of(path))
    key = (_LAYOUT, av.__version__, os.path.abspath(path), status.st_size, status.st_mtime_ns)
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder, "video-convmae", "scans", hashlib.sha256(repr(key).encode()).hexdigest()[:32])
