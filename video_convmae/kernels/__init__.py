"""Kernels, each beside its plain PyTorch reference. `models` calls what is named here and knows nothing of Triton."""

from .depthwise import Neighbours, find_neighbours, masked_depthwise

__all__ = ["Neighbours", "find_neighbours", "masked_depthwise"]
