"""`Sample`, a conversation as it comes from a reader, checked once, and `Example`, the same as token ids.

A message is `{"role": "user", "content": …}`; its content is a string, or a list of parts `{"type": "text", "text": …}`
and `{"type": "image", "image": …}`.
"""

import re
from dataclasses import InitVar, dataclass, field

import torch

from minivlm.config import IMAGE_TOKEN
from minivlm.data.images import ImageSource

HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")  # a surrogate without its other half, as JSON's "\ud800" makes it
ROLES = ("system", "user", "assistant")


class SampleError(ValueError):
    """A sample cannot be used. The message says which one, what is wrong with it and what to do."""

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name}: {problem}" if name else problem)


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


# ---- what must be true of messages


def check_messages(messages: list[dict], name: str = "") -> list[dict]:
    """The same messages with every content as a list of parts, and what an image part carries under the key "image".

    Raises SampleError where there is no message, or a role, a part or a character is not understood.
    """
    if not messages:
        raise SampleError(name, "the conversation is empty; give at least one message")
    return [{"role": message.get("role"), "content": _parts(message, name)} for message in messages]


def check_answers(messages: list[dict], name: str = "") -> None:
    """Refuse checked messages without any supervised token.

    Raises SampleError where no turn is the assistant's, or one of the assistant's is empty or has an image.
    """
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise SampleError(name, "there is no supervised token, as no turn is the assistant's; add it or drop the row")
    for parts in answers:
        if any(part["type"] == "image" for part in parts):
            raise SampleError(name, "an image stands in an assistant turn; move it to a user turn")
        if not any(part["text"].strip() for part in parts):
            raise SampleError(name, "an assistant turn is empty; write the answer or drop the row")


def _parts(message: dict, name: str) -> list[dict]:
    """A message's content as a list of checked parts."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise SampleError(name, f"a turn has the role {role!r}; the roles are {', '.join(ROLES)}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise SampleError(name, f"the {role}'s content is {type(content).__name__}; give a string or a list of parts")
    return [_part(part, role, name) for part in parts]


def _part(part: dict, role: str, name: str) -> dict:
    kind = part.get("type") if isinstance(part, dict) else part
    if kind == "image":
        source = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
        return {"type": "image"} if source is None else {"type": "image", "image": source}
    if kind != "text" or not isinstance(part.get("text"), str):
        raise SampleError(name, f"the {role}'s turn has a part {kind!r}; parts are text (with its text) and image")
    if half := HALF_A_CHARACTER.search(part["text"]):
        raise SampleError(name, f"the {role}'s text has {half[0]!r}, half of a character (a surrogate); take it out")
    return {"type": "text", "text": part["text"]}


def images_of(messages: list[dict]) -> list[ImageSource]:
    """What the image parts of checked messages carry, in order; parts without an image are passed over."""
    return [part["image"] for message in messages for part in message["content"] if "image" in part]


# ---- the shorthand of files: `<image>` in a string


def messages_from_turns(turns: list[dict], images: list[ImageSource | None], name: str = "") -> list[dict]:
    """Turns with strings, in which `<image>` is a placeholder, as chat messages with image parts.

    So files have it: `[{"role": "user", "content": "<image>\\n这个图像中有什么内容？"}]` and one image. An image part
    ends its line, so a newline right after `<image>` belongs to it.

    Raises SampleError where there are more or fewer `<image>` than images, or a turn is no role with a string.
    """
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns
    ):
        raise SampleError(name, 'the conversation must be a list of turns {"role": "user", "content": "text"}')
    check_count(sum(turn["content"].count(IMAGE_TOKEN) for turn in turns), len(images), name)
    rest, messages = iter(images), []
    for turn in turns:
        first, *others = turn["content"].split(IMAGE_TOKEN)
        parts = [{"type": "text", "text": first}]
        for text in others:
            parts.append({"type": "image", "image": next(rest)})
            parts.append({"type": "text", "text": text.removeprefix("\n")})
        messages.append({"role": turn.get("role"), "content": parts})
    return messages


def turn_of(message: dict) -> dict:
    """A checked message in the shorthand of files, without its images."""
    texts = [part.get("text", IMAGE_TOKEN + "\n") for part in message["content"]]
    return {"role": message["role"], "content": "".join(texts)}


def without_shorthand(text: str) -> str:
    """Take off a leading "<image>" and the end of its line, real or typed as "\\n"; all other text is as it was."""
    return re.sub(rf"\A{re.escape(IMAGE_TOKEN)}(\n|\\n)", "", text)


def check_count(placeholders: int, images: int, name: str) -> None:
    """Raise SampleError where a text has more or fewer `<image>` than images."""
    if placeholders != images:
        raise SampleError(
            name,
            f"{placeholders} {IMAGE_TOKEN} in the text, but {images} images; "
            f"write one {IMAGE_TOKEN} for each image, or correct the list of images",
        )
