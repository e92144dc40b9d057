"""Find one model among the contents of a file: nested dictionaries, prefixes of wrappers, averages beside the weights.

    {"state_dict": {"net.encoder...": ..., "loss.weight": ...}}     Lightning
    {"module.encoder...": ..., "n_averaged": ...}                   torch.optim.swa_utils.AveragedModel
    {"model": {...}, "model_ema": {...}, "optimizer": {...}}        timm, VideoMAE
    {"encoder._fsdp_wrapped_module...": ...}                        FSDP, activation checkpointing, torch.compile

A model is recognised by a tensor that all models of a format have, its marker; what stands before it is its prefix.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from video_convmae.errors import UserError

from .files import Tensors
from .state import PARTS, summarize_names

# Inserted anywhere in a name.
_INSERTED = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|_forward_module)\.")
_AVERAGE = re.compile(r"(?:^|_)(?:ema|swa|avg|averaged?|shadow|teacher|momentum)(?:_|$)")
_PARTS = ("encoder", "backbone", "videomae", "vit")  # a prefix of a part of a model: other parts may stand beside it
_FIRST = ("model", "state_dict", "module")  # of several models that are no averages
_OUR_PARTS = tuple(f"{part}." for part in PARTS)  # may lie in dictionaries of their own: {"encoder": ..., "head": ...}
OUTSIDE = "no part of the model"  # reason of what is dropped
_COUNTERS = ("n_averaged", "num_updates")


class _Named(NamedTuple):
    """A tensor with its dotted name, its name in the dictionary that holds it, and that dictionary's identity."""

    name: str
    own_name: str
    holder: int
    tensor: Tensor


@dataclass(frozen=True)
class Found:
    """Tensors of one model, without prefix.

    dropped: names beside them, in the same dictionary, that are not of the model -> reason.
    notes: sentences for the report.
    """

    tensors: Tensors
    dropped: dict[str, str]
    notes: tuple[str, ...]


def find_model(contents: Mapping[str, Any], markers: Collection[str], alone: str) -> Found:
    """Find the tensors of one model.

    Args:
        contents: of a file.
        markers: names, without prefix, of which every model has one.
        alone: marker of an encoder of ours that was saved without the rest; its names get `encoder.` before them.

    Raises:
        UserError: there are no tensors, no model, or several models.
    """
    entries = list(_flatten(contents))
    if not entries:
        got = summarize_names(str(name) for name in contents) or "nothing"
        raise UserError(f"expected names and tensors, or them under model, state_dict or module; got {got}")
    roots = _find_roots(entries, markers, alone)
    if not roots:
        raise UserError(_no_model(entries, markers))
    root, notes = _choose(roots)
    others = tuple(other for other in roots if not root.startswith(other))
    found: Tensors = {}
    dropped: dict[str, str] = {}
    for entry in entries:
        beside = entry.holder == roots[root]
        if entry.name.startswith(others):
            continue
        if entry.name.startswith(root) and (root or beside or entry.name.startswith(_OUR_PARTS)):
            found[entry.name.removeprefix(root)] = entry.tensor
        elif beside and entry.own_name not in _COUNTERS:
            dropped[entry.own_name] = OUTSIDE
    if alone in found:
        found = {f"encoder.{name}": tensor for name, tensor in found.items()}
    return Found(found, dropped, notes)


def _flatten(contents: Mapping[str, Any], prefix: str = "") -> Iterator[_Named]:
    """Yield the tensors of nested dictionaries; the names have no wrappers of modules inside a model."""
    for key, value in contents.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.")
        elif isinstance(value, Tensor):
            yield _Named(_INSERTED.sub("", name), _INSERTED.sub("", str(key)), id(contents), value)


def _find_roots(entries: list[_Named], markers: Collection[str], alone: str) -> dict[str, int]:
    """Return the prefix of each model, with the dictionary that holds its marker."""
    roots: dict[str, int] = {}
    for entry in entries:
        marker = next((each for each in (*markers, alone) if f".{entry.name}".endswith(f".{each}")), None)
        if marker is None:
            continue
        words = entry.name.removesuffix(marker).split(".")[:-1]
        if marker != alone and not marker.startswith("encoder.") and words and words[-1] in _PARTS:
            words.pop()
        roots.setdefault("".join(f"{word}." for word in words), entry.holder)
    return roots


def _choose(roots: Collection[str]) -> tuple[str, tuple[str, ...]]:
    """Choose a model: one that is no average of others, with a note where there are averages."""
    averages = [root for root in roots if any(_AVERAGE.search(word) for word in root.lower().split("."))]
    plain = [root for root in roots if root not in averages]
    if len(plain) > 1:
        plain = [root for first in _FIRST for root in plain if root.startswith(f"{first}.")][:1] or plain
    if len(plain) > 1 or (not plain and len(averages) > 1):
        names = ", ".join(root.rstrip(".") or "a model without prefix" for root in plain or averages)
        raise UserError(f"several models: {names}; give one of them alone, as a file or as a dictionary of tensors")
    if not plain:
        return averages[0], (f"an average of the weights, {averages[0].rstrip('.')}",)
    beside = ", ".join(root.rstrip(".") for root in averages)
    note = f"an average of the weights lies beside ({beside}) and is not taken: to take it, give it alone"
    return plain[0], (note,) if averages else ()


def _no_model(entries: list[_Named], markers: Collection[str]) -> str:
    names = summarize_names(entry.name for entry in entries)
    if any("_flat_param" in entry.name for entry in entries):
        return f"flattened parameters of FSDP ({names}); expected a full state dict of the model"
    known = ", ".join(dict.fromkeys(markers))
    return f"no known format: none of {known} is among the {len(entries)} names {names}"
