"""Kernels, each beside its plain PyTorch reference. `models` calls the names below and knows nothing of Triton."""

from .depthwise import masked_depthwise
from .neighbours import Neighbours, find_neighbours

__all__ = ["Neighbours", "find_neighbours", "masked_depthwise"]
