"""Kernels, each beside its plain PyTorch reference. `models` calls what is named here and knows nothing of Triton."""

from .depthwise import Neighbours, masked_depthwise

__all__ = ["Neighbours", "masked_depthwise"]
