"""The frozen CLIP vision encoder, whose patches become a sequence of features. Letters as in `config.py`."""

import torch
from torch import nn
from transformers import CLIPVisionModel


class VisionEncoder(nn.Module):
    """A `CLIPVisionModel` that never learns, read out patch by patch.

    Args:
        clip: the encoder. It is frozen and put into evaluation mode, for good.
    """

    def __init__(self, clip: CLIPVisionModel):
        super().__init__()
        self.clip = clip
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stay in evaluation mode, whatever the model around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """One feature per patch: the last hidden state without its class token.

        CLIP puts a class token before the patches to sum the image up; a language model that is to say what stands
        where needs the patches (LLaVA, arXiv:2304.08485, section 4.1).

        Args:
            pixel_values: (I, 3, H, W), normalised as the encoder's image processor does.

        Returns:
            patch_features (I, N, Dv), row after row from the image's top left.
        """
        hidden = self.clip(pixel_values=pixel_values).last_hidden_state  # (I, 1 + N, Dv)
        return hidden[:, 1:]  # (I, N, Dv)
