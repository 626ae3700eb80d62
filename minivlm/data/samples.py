"""`Sample`, a conversation as it comes from a reader, and `Example`, the same as token ids."""

from dataclasses import InitVar, dataclass, field

import torch

from minivlm.data.images import ImageSource
from minivlm.data.validation import check_answers, check_messages, images_of


@dataclass(frozen=True)
class Sample:
    """One conversation with a supervised answer, checked when it is made.

    Attributes:
        messages: chat messages whose contents are lists of parts; a string is taken as one part of text.
        name: the sample's name in messages, such as "train.jsonl, line 12".
        patch_features: (I, N, Dv) what the encoder made of the images before; None: the image parts carry them.
        checked: the messages were checked before, as those of a data set on the disk; they are taken as they are.

    Raises:
        SampleError: as `check_messages` and `check_answers` raise it.
    """

    messages: list[dict]
    name: str = ""
    patch_features: torch.Tensor | None = field(default=None, compare=False)
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool):
        """Check the messages and write every content as a list of parts."""
        if checked:
            return
        object.__setattr__(self, "messages", check_messages(self.messages, self.name))
        check_answers(self.messages, self.name)

    @property
    def images(self) -> list[ImageSource]:
        """What the image parts carry, in order."""
        return images_of(self.messages)


@dataclass
class Example:
    """A sample as token ids, ready to be collated.

    Attributes:
        input_ids: (T,), every image already N placeholders.
        labels: the same ids (T,) where they are supervised, `IGNORE_INDEX` elsewhere.
        images: what stands behind the placeholders, in order; empty where the features are given.
        name: the sample's.
        patch_features: (I, N, Dv) features of the images; they replace the images.
    """

    input_ids: list[int]
    labels: list[int]
    images: list[ImageSource] = field(default_factory=list)
    name: str = ""
    patch_features: torch.Tensor | None = None
