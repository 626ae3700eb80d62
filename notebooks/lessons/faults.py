"""The classic faults of vision-language models, to be planted on purpose, one at a time.

The tests plant them to prove that they can fail (`tests/faults.py`), the notebooks to show what each looks like:

    with planted("left_padding_ignored"):
        ...

Whatever happens inside the block, the package is as it was after it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from minivlm import checkpoint, model, placeholders, processor, vision
from minivlm.config import IGNORE_INDEX, MiniVLMConfig
from minivlm.data.samples import ROLES, Example

FAULTS: dict[str, Callable[["Patch"], None]] = {}


class Patch(ExitStack):
    """Attributes set for a while; leaving the context sets them back."""

    def setattr(self, owner: object, name: str, value: object) -> None:
        """Set an attribute until the context is left."""
        self.enter_context(mock.patch.object(owner, name, value))


def fault(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
    """Enter the decorated function into `FAULTS`, under its own name."""
    FAULTS[plant.__name__] = plant
    return plant


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The package with one fault in it, for the length of a `with` block.

    Raises:
        ValueError: there is no such fault.
    """
    if name not in FAULTS:
        raise ValueError(f"no fault {name!r}; choose one of {', '.join(FAULTS)}")
    with Patch() as patch:
        FAULTS[name](patch)
        yield


def everywhere(patch: Patch, original: Callable, replacement: Callable) -> None:
    """Replace a function in every module that has imported it: the package's, the tests', a notebook's own."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("minivlm", "lessons", "__main__") or name.startswith("test_"):
            for attribute, value in list(vars(module).items()):
                if value is original:
                    patch.setattr(module, attribute, replacement)


@fault
def class_token_counted(patch: Patch) -> None:
    """The class token is taken for one more patch, 197 instead of 196; consistently, so that nothing crashes."""

    @torch.no_grad()
    def forward(self, pixel_values):
        return self.clip(pixel_values=pixel_values).last_hidden_state  # (I, 1 + N, Dv)

    patches = MiniVLMConfig.num_image_tokens.fget
    patch.setattr(vision.VisionEncoder, "forward", forward)
    patch.setattr(MiniVLMConfig, "num_image_tokens", property(lambda self: patches(self) + 1))


@fault
def class_token_kept_last_patch_lost(patch: Patch) -> None:
    """The class token stays and the last patch goes: the shape is right, every patch stands one position too late."""

    @torch.no_grad()
    def forward(self, pixel_values):
        return self.clip(pixel_values=pixel_values).last_hidden_state[:, :-1]  # (I, N, Dv)

    patch.setattr(vision.VisionEncoder, "forward", forward)


@fault
def mask_off_by_one(patch: Patch) -> None:
    """Supervision begins and ends one token late: the first token of an answer is never supervised."""
    encode = processor.MiniVLMProcessor._encode

    def shifted(self, pieces):
        ids, labels = encode(self, pieces)
        supervised = [False, *(label != IGNORE_INDEX for label in labels[:-1])]
        return ids, [token if yes else IGNORE_INDEX for token, yes in zip(ids, supervised, strict=True)]

    patch.setattr(processor.MiniVLMProcessor, "_encode", shifted)


@fault
def template_of_another_model(patch: Patch) -> None:
    """Turns are written as another model's template has them, so no answer is found where ours would stand."""
    pieces = processor.MiniVLMProcessor._pieces
    heads = {f"{role}\n": f"{role.upper()}: " for role in ROLES}

    def foreign(self, messages):
        marks = (self.tokenizer.bos_token, self.tokenizer.eos_token)
        written = [piece for piece in pieces(self, messages) if piece.text not in marks]
        return [piece._replace(text=heads.get(piece.text, piece.text), supervised=False) for piece in written]

    patch.setattr(processor.MiniVLMProcessor, "_pieces", foreign)


@fault
def interleaved_rotary_rows(patch: Patch) -> None:
    """The rows of queries and keys stand in the other of the two rotary orders: every weight loads, no word fits."""
    assemble = model.assemble

    @torch.no_grad()
    def interleaved(*args, **kwargs):
        vlm = assemble(*args, **kwargs)
        for layer in vlm.language_model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                halves = linear.weight.unflatten(0, (-1, 2, layer.self_attn.head_dim // 2))  # (heads, 2, d/2, Dl)
                linear.weight.copy_(halves.transpose(1, 2).flatten(0, 2))  # (heads * d, Dl), pair by pair
        return vlm

    everywhere(patch, assemble, interleaved)


@fault
def frozen_weight_moved(patch: Patch) -> None:
    """Stage 1 says that it trains W alone, and trains the language model's last layer too."""
    set_trainable = model.set_trainable

    def careless(vlm, stage):
        set_trainable(vlm, stage)
        vlm.language_model.model.layers[-1].requires_grad_(True)

    everywhere(patch, set_trainable, careless)


@fault
def counted_over_the_batch(patch: Patch) -> None:
    """Placeholders are counted over the whole batch and not per row: a row can swallow another row's picture."""

    def replace(inputs_embeds, input_ids, image_embeds, image_token_id, images_per_row=None):
        mask = input_ids == image_token_id
        if mask.sum() != image_embeds.shape[:2].numel():
            raise placeholders.PlaceholderError("image tokens and image features do not match")
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), image_embeds)

    everywhere(patch, placeholders.replace_placeholders, replace)


@fault
def non_strict_load(patch: Patch) -> None:
    """What a file does not hold stays random, and what it holds too much is passed over, without a word."""

    def load(folder, base=None):
        meta = checkpoint.read_meta(folder)
        tokens, config = checkpoint._load_processor(folder, meta)
        vlm, state = model.MiniVLMForConditionalGeneration(config), {}
        for part in model.PARTS:
            state |= checkpoint.read_tensors(folder / f"{part}.safetensors")
        strict = False  # the fault itself; nowhere else in the package
        vlm.load_state_dict(state, strict=strict)
        return vlm.eval(), tokens, meta

    everywhere(patch, checkpoint.load_checkpoint, load)


@fault
def image_block_cut(patch: Patch) -> None:
    """A text that is too long is cut, and the cut may fall into a picture's placeholders."""

    def cut(self, ids, labels, images, name, max_length, patch_features=None):
        limit = max_length or self.tokenizer.model_max_length
        return Example(ids[:limit], labels[:limit], images, name, patch_features)

    patch.setattr(processor.MiniVLMProcessor, "_example", cut)


@fault
def left_padding_ignored(patch: Patch) -> None:
    """Positions are counted from the edge of the batch: padding on the left shifts the text."""

    def from_the_edge(attention_mask):
        return torch.arange(attention_mask.shape[1]).expand_as(attention_mask)

    everywhere(patch, model.positions, from_the_edge)


@fault
def at_sign_as_placeholder(patch: Patch) -> None:
    """The placeholder is `@`, a character that people type: each @ in a text asks for one more patch."""
    encode = processor.MiniVLMProcessor._encode

    def confused(self, pieces):
        ids, labels = encode(self, pieces)
        at = self.tokenizer.convert_tokens_to_ids("@")
        return [self.image_token_id if token == at else token for token in ids], labels

    patch.setattr(processor.MiniVLMProcessor, "_encode", confused)
