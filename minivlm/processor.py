"""Chat and images in; token ids, labels and pixels out, built side by side.

The processor decides how long the sequence is: each image becomes N placeholder tokens here, so masks, labels and
positions are final before the model runs, and the model only has to replace embeddings.

Ids and labels are written by one renderer, piece by piece, never searched for afterwards. Text that a person typed
is encoded as ordinary text: an `<image>` or `<|im_end|>` in it stays a few letters and cannot become a control token.

Letters as in `config.py`.
"""

import math
from itertools import islice
from typing import Any, NamedTuple

import torch
from transformers import AutoProcessor, BatchFeature, CLIPImageProcessorPil, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from minivlm.config import IGNORE_INDEX, IMAGE_TOKEN, MiniVLMConfig
from minivlm.data.images import ImageSource, open_image
from minivlm.data.samples import Example, Sample, SampleError, check_count, check_messages, images_of
from minivlm.placeholders import expand_placeholders


class Piece(NamedTuple):
    """A stretch of a conversation: one control token or ordinary text, and whether the model learns to write it."""

    text: str
    control: bool = False
    supervised: bool = False


class MiniVLMProcessor(ProcessorMixin):
    """CLIP's image processor, a tokenizer, and N: how many placeholder tokens stand for an image.

    Args:
        image_processor: turns RGB images into `pixel_values` (I, 3, H, W), normalised as for CLIP.
        tokenizer: fast, with a bos, an eos and a pad token, and with `<image>` as a special token.
        num_image_tokens: N, the encoder's number of patches.
        chat_template: Jinja text for other tools; by default the tokenizer's.
        system: what a system turn says before every conversation that has none of its own; None puts none there.

    Raises:
        ValueError: the tokenizer lacks one of the special tokens.
    """

    def __init__(
        self,
        image_processor: CLIPImageProcessorPil,
        tokenizer: PreTrainedTokenizerFast,
        num_image_tokens: int,
        chat_template: str | None = None,
        system: str | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, IMAGE_TOKEN):
            if token not in tokenizer.all_special_tokens:
                raise ValueError(f"the tokenizer has no special token {token!r}: add it and save the tokenizer again")
        self.num_image_tokens = num_image_tokens
        self.system = system
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    @classmethod
    def for_config(cls, config: MiniVLMConfig, tokenizer: PreTrainedTokenizerFast) -> "MiniVLMProcessor":
        """The processor that fits a model's config: images at the encoder's size, N placeholders each."""
        side = config.vision_config.image_size
        pixels = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        return cls(pixels, tokenizer, config.num_image_tokens)

    @property
    def model_input_names(self) -> list[str]:
        """What the model's `forward` takes from this processor."""
        return ["input_ids", "attention_mask", "pixel_values", "images_per_row"]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        return_tensors: str | None = None,
        padding: bool = True,
        padding_side: str = "left",
        max_length: int | None = None,
    ) -> BatchFeature:
        """Raw strings in which each `<image>` stands for one image, and the images.

        Args:
            images: what `open_image` takes: one, a list in the order of the `<image>`s, or one list per text.
            text: one string or several. Control tokens are obeyed: for what people typed, use `apply_chat_template`.
            return_tensors: "pt" for tensors, None for lists. Pixels are always a tensor.
            padding: pad to the longest row, on `padding_side` (left, so that generation goes on at the end).
            max_length: refuse longer rows; by default the tokenizer's `model_max_length`.

        Returns:
            `input_ids`, `attention_mask` (B, T), `images_per_row` (B,), and `pixel_values` (I, 3, H, W) if there are
            images. Without a text, `pixel_values` alone.

        Raises:
            SampleError: a row has more or fewer `<image>` than images, or is too long.
            ImageError: an image cannot be read.
        """
        if text is None:
            return BatchFeature({"pixel_values": self.pixels(images if isinstance(images, list) else [images])})
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise SampleError("", "the list of texts is empty; give at least one")
        dealt = _deal(images, [one.count(IMAGE_TOKEN) for one in texts])
        rows = []
        for index, (one, shown) in enumerate(zip(texts, dealt, strict=True)):
            ids = self.tokenizer.encode(one, add_special_tokens=False, verbose=False)
            ids = expand_placeholders(ids, self.image_token_id, self.num_image_tokens)
            rows.append(self._example(ids, [IGNORE_INDEX] * len(ids), shown, f"text {index}", max_length))
        return self._batch(rows, return_tensors, padding, padding_side)

    def apply_chat_template(
        self,
        conversation: list,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        padding: bool = True,
        padding_side: str = "left",
        max_length: int | None = None,
        processor_kwargs: dict | None = None,
    ) -> Any:
        """Chat messages, one conversation or a list of them, as the model reads them.

        An image is a part `{"type": "image", "image": …}`; everything in a text part, `<image>` included, is
        ordinary text. Leave `"image"` out of every part to pass `patch_features` to the model yourself.

        Args:
            conversation: messages `{"role": …, "content": a string or a list of parts}`, or a list of such lists.
            add_generation_prompt: end with the head of an assistant turn.
            continue_final_message: leave the last turn open.
            tokenize: False gives the text instead, one `<image>` an image.
            return_dict: the whole batch as `__call__` gives it, not only its `input_ids`.
            processor_kwargs: further values for the last four of `__call__`'s arguments, as pipelines pass them.

        Raises:
            SampleError: a message is not understood, only some images are given, or the conversation is too long.
            ImageError: an image cannot be read.
        """
        several = bool(conversation) and not isinstance(conversation[0], dict)
        options = {"return_tensors": return_tensors, "padding": padding, "padding_side": padding_side}
        options |= {"max_length": max_length} | (processor_kwargs or {})
        limit = options.pop("max_length")
        examples, texts = [], []
        for index, messages in enumerate(conversation if several else [conversation]):
            name = f"conversation {index}" if several else ""
            messages = check_messages(messages, name)
            pieces = self._pieces(messages)
            if continue_final_message:
                pieces = pieces[:-2]  # without the end token and its newline
            if add_generation_prompt:
                pieces += [Piece(self.tokenizer.bos_token, control=True), Piece("assistant\n")]
            texts.append("".join(piece.text for piece in pieces))
            if tokenize:
                examples.append(self._example(*self._encode(pieces), images_of(messages), name, limit))
        if not tokenize:
            return texts if several else texts[0]
        batch = self._batch(examples, **options)
        return batch if return_dict else batch["input_ids"]

    def encode(self, sample: Sample, max_length: int | None = None) -> Example:
        """A sample's ids and labels, side by side.

        Supervised are, in every assistant turn, the answer's own ids and the end token; nothing else.

        Raises:
            SampleError: more than `max_length` tokens (by default the tokenizer's `model_max_length`). Nothing is ever
                cut: a cut can fall into an image block or leave a question without its answer.
        """
        ids, labels = self._encode(self._pieces(sample.messages))
        images = sample.images if sample.patch_features is None else []
        return self._example(ids, labels, images, sample.name, max_length, sample.patch_features)

    def collate(
        self, examples: list[Example], padding_side: str = "right", pad_to_multiple_of: int = 1
    ) -> dict[str, torch.Tensor]:
        """Pad examples into one training batch, to the longest one or to the next `pad_to_multiple_of`.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, T), `images_per_row` (B,), and for I > 0 images either
            `patch_features` (I, N, Dv) or `pixel_values` (I, 3, H, W).

        Raises:
            SampleError: only some examples carry their images or features.
            ImageError: an image cannot be read.
        """
        batch = dict(self._batch(examples, "pt", True, padding_side, pad_to_multiple_of))
        width = batch["input_ids"].shape[1]
        labels = [_pad(example.labels, width, IGNORE_INDEX, padding_side) for example in examples]
        return batch | {"labels": torch.tensor(labels)}  # (B, T)

    def pixels(self, images: list) -> torch.Tensor:
        """Open images and prepare them for the encoder: (I, 3, H, W), float32, normalised."""
        opened = [open_image(image) for image in images]
        return self.image_processor(opened, return_tensors="pt")["pixel_values"]

    def _pieces(self, messages: list[dict]) -> list[Piece]:
        """`<|im_start|>role\\ncontent<|im_end|>\\n` for every checked message; an image part is `<image>\\n`."""
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": [{"type": "text", "text": self.system}]}, *messages]
        start, end = self.tokenizer.bos_token, self.tokenizer.eos_token
        pieces = []
        for message in messages:
            answer = message["role"] == "assistant"
            pieces += [Piece(start, control=True), Piece(f"{message['role']}\n")]
            for part in message["content"]:
                if part["type"] == "image":
                    pieces += [Piece(IMAGE_TOKEN, control=True), Piece("\n")]
                else:
                    pieces.append(Piece(part["text"], supervised=answer))
            pieces += [Piece(end, control=True, supervised=answer), Piece("\n")]
        return pieces

    def _encode(self, pieces: list[Piece]) -> tuple[list[int], list[int]]:
        """Ids and labels (T,) of the pieces: what is supervised is its own label."""
        pieces = _joined(pieces)
        texts = [piece.text for piece in pieces if not piece.control]
        # split_special_tokens: whatever looks like a control token in a text is only text
        encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        text_ids = iter(encoded["input_ids"])
        ids, labels = [], []
        for piece in pieces:
            new = [self.tokenizer.convert_tokens_to_ids(piece.text)] if piece.control else next(text_ids)
            new = expand_placeholders(new, self.image_token_id, self.num_image_tokens)
            ids += new
            labels += new if piece.supervised else [IGNORE_INDEX] * len(new)
        return ids, labels

    def _example(
        self,
        ids: list[int],
        labels: list[int],
        images: list[ImageSource],
        name: str,
        max_length: int | None,
        patch_features: torch.Tensor | None = None,
    ) -> Example:
        limit = max_length or self.tokenizer.model_max_length
        if len(ids) > limit:
            cures = ["shorten the text", "show fewer images", *(["raise max_length"] if max_length else [])]
            raise SampleError(
                name,
                f"{len(ids)} tokens, {ids.count(self.image_token_id)} of them for images, where {limit} are allowed; "
                f"{', '.join(cures[:-1])} or {cures[-1]} (nothing is ever cut)",
            )
        return Example(ids, labels, images, name, patch_features)

    def _batch(
        self,
        examples: list[Example],
        return_tensors: str | None,
        padding: bool,
        padding_side: str,
        pad_to_multiple_of: int = 1,
    ) -> BatchFeature:
        """Pad the ids and gather the images or their features."""
        ids = [example.input_ids for example in examples]
        width = math.ceil(max(map(len, ids)) / pad_to_multiple_of) * pad_to_multiple_of if padding else 0
        counts = [row.count(self.image_token_id) // self.num_image_tokens for row in ids]
        data = {
            "input_ids": [_pad(row, width, self.tokenizer.pad_token_id, padding_side) for row in ids],
            "attention_mask": [_pad([1] * len(row), width, 0, padding_side) for row in ids],
            "images_per_row": counts,
        }
        return BatchFeature(data | self._vision_inputs(examples, counts), tensor_type=return_tensors)

    def _vision_inputs(self, examples: list[Example], counts: list[int]) -> dict[str, torch.Tensor]:
        """`patch_features` if examples carry them, else `pixel_values`; nothing if the caller keeps them to himself."""
        features = [example.patch_features for example in examples]
        known = any(held is not None for held in features)
        held = [[] if one is None else one for one in features] if known else [example.images for example in examples]
        if not any(map(len, held)):
            return {}
        for example, count, one in zip(examples, counts, held, strict=True):
            if len(one) != count:
                kind = "features" if known else "image files"
                raise SampleError(example.name, f"{count} images, but {kind} for {len(one)}; give all of them or none")
        if known:
            return {"patch_features": torch.cat([one for one in held if len(one)])}  # (I, N, Dv)
        return {"pixel_values": self.pixels([image for one in held for image in one])}  # (I, 3, H, W)


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring texts made one, so that they are encoded as they would be in the whole string."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last and not piece.control and not last.control and piece.supervised == last.supervised:
            joined[-1] = last._replace(text=last.text + piece.text)
        else:
            joined.append(piece)
    return joined


def _deal(images: Any, counts: list[int]) -> list[list]:
    """Give every text its images: lists in a list belong to the texts one to one, a flat list is dealt out."""
    images = [] if images is None else images if isinstance(images, list | tuple) else [images]
    if images and isinstance(images[0], list | tuple):
        dealt = [list(row) for row in images]
    else:
        rest = iter(images)
        dealt = [list(islice(rest, count)) for count in counts]
        dealt[-1] += rest
    if len(dealt) != len(counts):
        raise SampleError("", f"{len(counts)} texts, but {len(dealt)} lists of images; give one list per text")
    for index, (count, row) in enumerate(zip(counts, dealt, strict=True)):
        check_count(count, len(row), f"text {index}")
    return dealt


def _pad(values: list[int], length: int, filler: int, side: str) -> list[int]:
    gap = [filler] * (length - len(values))
    return gap + values if side == "left" else values + gap


AutoProcessor.register(MiniVLMConfig, MiniVLMProcessor, exist_ok=True)  # a notebook may reload this module
