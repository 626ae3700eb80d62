"""W: the one matrix between the vision encoder and the language model. Letters as in `config.py`."""

import torch
from torch import nn


class Projector(nn.Linear):
    """A linear map, by default without bias, from patch features to the language model's embedding space.

    The first LLaVA's projection (arXiv:2304.08485, section 4.1): every patch becomes a word-like vector by itself,
    so what the language model is to use must be linearly readable in the patch.

    Args:
        vision_width: Dv.
        language_width: Dl.
        bias: add a constant vector (Dl,) to every patch, as published MiniMind-V checkpoints do.
    """

    def __init__(self, vision_width: int, language_width: int, bias: bool = False):
        super().__init__(vision_width, language_width, bias=bias)

    def forward(self, patch_features: torch.Tensor) -> torch.Tensor:
        """Map (I, N, Dv) to (I, N, Dl), in the precision of W: features may come from a 16-bit cache."""
        return super().forward(patch_features.to(self.weight.dtype))
