"""LoRA (Hu et al., 2021): a frozen encoder trained by low-rank changes of its attention's Linear layers, through peft.

A change is `lora_alpha / lora_rank * B A`, beside a frozen weight W. Checkpoints of a run hold W, A and B under peft's
names; whatever reads them adds the change to W, which needs no peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from video_convmae.errors import UserError

BASE, DOWN, UP = ".base_layer", ".lora_A.default", ".lora_B.default"  # peft's names
TARGETS = ["qkv", "proj"]


def add_lora(blocks: nn.ModuleList, rank: int, alpha: float) -> None:
    """Freeze attention blocks and put trainable changes, zero at first, beside their qkv and proj.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f'model.lora_rank is {rank} and peft is missing: pip install "video-convmae[lora]"') from error
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS)  # type: ignore[arg-type]  # any number works
    inject_adapter_in_model(config, blocks)


def stated_scale(model: Any) -> float | None:
    """Return LoRA's scale, lora_alpha / lora_rank, of a model's configuration as plain data; None: none, or no LoRA."""
    rank = model.get("lora_rank") if isinstance(model, Mapping) else None
    return model["lora_alpha"] / rank if rank else None


def without_lora(name: str) -> str | None:
    """Return the name that a tensor of a LoRA model has in the model without; None: it is a part of a change."""
    return None if DOWN in name or UP in name else name.replace(BASE, "")


def merge_lora(tensors: dict[str, Tensor], scale: float | None) -> dict[str, Tensor]:
    """Return the tensors of the model without LoRA that computes the same; tensors without changes stay as they are.

    Args:
        tensors: by name, as a classifier's state dict has them.
        scale: lora_alpha / lora_rank; None: unknown.

    Raises:
        UserError: there are changes, and their scale is unknown.
    """
    if not any(DOWN in name for name in tensors):
        return tensors
    if scale is None:
        raise UserError("these weights have LoRA's changes and no configuration that says their scale")
    merged = {}
    for name, tensor in tensors.items():
        plain = without_lora(name)
        if plain is None:
            continue
        down = tensors.get(name.replace(BASE, DOWN)) if BASE in name else None
        if down is not None:
            tensor = tensor + scale * (tensors[name.replace(BASE, UP)] @ down)
        merged[plain] = tensor
    return merged
