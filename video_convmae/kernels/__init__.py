"""Kernels, each beside its plain PyTorch reference. `models` calls the names below and knows nothing of Triton."""

from .depthwise import masked_depthwise
from .neighbours import Kernel, Neighbours, find_neighbours

__all__ = ["Kernel", "Neighbours", "find_neighbours", "masked_depthwise"]
