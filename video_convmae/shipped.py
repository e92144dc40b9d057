"""Find the configurations, class names and weights that come with the package, in a wheel or in a clone."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

from video_convmae.errors import UserError

PACKAGE = Path(__file__).parent
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
WEIGHTS = PACKAGE / "pretrained"  # NAME.safetensors, and its card NAME.md


def find_config(name: str | Path, folder: str | Path = "") -> Path:
    """Return the file of a configuration.

    Args:
        name: a path, or the name of a shipped configuration (`video/pretrain_k400_base_msd`); `.yaml` may be left out.
        folder: folder of relative paths; by default the working directory.

    Raises:
        UserError: neither exists.
    """
    return _find(name, folder, _shipped_folder("configs", "configs"), ".yaml", "configuration")


def find_labels(name: str | Path) -> Path:
    """Return the file of class names, one a line.

    Args:
        name: a path, or the name of a shipped file (`kinetics400`); `.txt` may be left out.

    Raises:
        UserError: neither exists.
    """
    return _find(name, "", _shipped_folder("labels", "data_lists"), ".txt", "class names")


def shipped_labels(name: str) -> Path:
    """Return the file of shipped class names, whatever lies in the working directory."""
    return _shipped_folder("labels", "data_lists") / f"{name}.txt"


def shipped_configs() -> list[str]:
    """Return the names of the shipped configurations."""
    return _names(_shipped_folder("configs", "configs"), ".yaml")


def shipped_weights() -> list[str]:
    """Return the names of the shipped weights."""
    return _names(WEIGHTS, ".safetensors")


def find_shipped_weights(name: str | Path) -> Path | None:
    """Return the file of shipped weights.

    Args:
        name: name of shipped weights (`tiny-moving-digits`); `.safetensors` may be left out. What exists in the working
            directory under this name wins.

    Returns:
        None: something of this name exists, or no shipped weights have it.
    """
    if Path(name).exists() or Path(name).parent != Path():
        return None
    path = WEIGHTS / f"{str(name).removesuffix('.safetensors')}.safetensors"
    return path if path.is_file() else None


def explain_download(name: str | Path) -> str:
    """Return a sentence in parentheses for a name that may be one on the hub or an address; empty for others.

    Two words with a slash between them may be a path, too, but for one whose folder exists.
    """
    text = re.sub(r"^(?:hf:/+|hf-hub:|https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/)", "", str(name))
    is_address = text != str(name) or re.match(r"[a-z0-9]+:/", text) is not None
    hub = re.fullmatch(r"([A-Za-z0-9][\w.-]*)/([\w.-]+)(?:/tree/[\w.-]+)?/?", text)
    if hub is not None and (is_address or not (Path(hub[1]).exists() or Path(hub[2]).suffix in WEIGHT_SUFFIXES)):
        return (
            f" (nothing is downloaded here; if this is a name on the Hugging Face hub: hf download {hub[1]}/{hub[2]} "
            f"--local-dir {hub[2]}, then give that folder)"
        )
    return " (nothing is downloaded here: download the file and give its path)" if is_address else ""


def suggest_weights(name: str | Path) -> str:
    """Return the end of a message: which shipped weights may be meant by a name that is none; empty for a path."""
    names = shipped_weights()
    if not names or Path(name).parent != Path() or Path(name).exists():
        return ""
    near = get_close_matches(str(name).removesuffix(".safetensors"), names, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else f", or shipped weights: {', '.join(names)}"


def _find(name: str | Path, folder: str | Path, shipped: Path, suffix: str, kind: str) -> Path:
    for place in (Path(folder), shipped):
        for path in (place / name, place / f"{name}{suffix}"):
            if path.is_file():
                return path
    names = _names(shipped, suffix)
    near = get_close_matches(str(name).removesuffix(suffix), names, n=3)
    raise UserError(
        f"cannot read the {kind} {str(name)!r}: {Path(folder).resolve()} has no such file, and none is shipped; "
        + (f"did you mean {' or '.join(near)}?" if near else f"shipped are {', '.join(names)}")
    )


def _names(folder: Path, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob(f"*{suffix}"))


def _shipped_folder(in_wheel: str, in_clone: str) -> Path:
    """Return the folder inside an installed wheel's package, or that of the clone (pyproject.toml maps them)."""
    installed = PACKAGE / in_wheel
    return installed if installed.is_dir() else PACKAGE.parent / in_clone
