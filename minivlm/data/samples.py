"""`Sample`: a conversation with its images, on its way from a reader to the processor."""

from dataclasses import dataclass, field

import torch

from minivlm.data.images import ImageSource
from minivlm.processor import messages_from_row


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
        conversations: turns `{"role": …, "content": …}` with `<image>` where an image stands.
        images: the images in order.
        where: the sample's name in messages, such as "train.jsonl, line 12".
        patch_features: (I, N, Dv) what the encoder made of the images before; they replace the images.
    """

    conversations: list[dict]
    images: list[ImageSource] = field(default_factory=list)
    where: str = ""
    patch_features: torch.Tensor | None = field(default=None, compare=False)

    def messages(self) -> list[dict]:
        """The same as chat messages with image parts."""
        return messages_from_row(self.conversations, self.images, self.where)
