"""Attention from the words of an answer to the patches of an image.

Attention is where the language model reads from, layer by layer and head by head; it is not the reason for a word.
What changes when a thing is hidden says more about that (Jain and Wallace, arXiv:1902.10186, "Attention is not
Explanation", section 4). Letters as in `config.py`; A words of an answer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lessons.plots import BLUE, readable, show, style
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor

FADED, PAPER = 0.8, (244, 242, 238)  # how far a patch without attention fades, and to which colour
WORDS_ACROSS, WORD_ROWS = 5, 2  # words in a figure
HEIGHTS, SIDES = ("top", "middle", "bottom"), ("left", "middle", "right")


class Looks(NamedTuple):
    """Where the words of an answer looked.

    Attributes:
        words: A words of the answer; Chinese, which has no spaces, token by token.
        patches: (A, N) float32, how much of each word's attention went to each patch; the rest of a row went to text.
    """

    words: list[str]
    patches: np.ndarray


@contextmanager
def eager_attention(language_model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the language model computes attention step by step and can hand it out; afterwards as before.

    The fast implementations (sdpa, flash) never hold the whole table of who looks at whom, so they cannot show it.
    """
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)


@torch.no_grad()
def attention_to_patches(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    messages: Sequence[dict],
    answer_text: str,
    layer: int | None = None,
    image: int = 0,
    patch_features: torch.Tensor | None = None,
) -> Looks:
    """Where the model looked while it wrote each word of an answer: a mean over heads, and over layers.

    A word is written by the position before it, so that position's attention is the one that counts. A word of
    several tokens gets their mean.

    Args:
        messages: the conversation up to the question.
        answer_text: the answer to it. The model is shown it and need not have written it.
        layer: counted from 0, negative from the end; None is the mean over all layers.
        image: of several images in the conversation, the number of the one that is asked about.
        patch_features: (I, N, Dv) what `vision` made of all its images before; their image parts carry none then.

    Raises:
        ValueError: there is no such image or layer, or the answer has no word.
        SampleError, ImageError: as `processor.apply_chat_template` raises them.
    """
    layers = model.config.text_config.num_hidden_layers
    if layer is not None and not -layers <= layer < layers:
        raise ValueError(f"there is no layer {layer}; the language model has {layers}, counted from 0")
    prompt = processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True)[0]
    answer = {"role": "assistant", "content": answer_text}
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template([*messages, answer], continue_final_message=True, **options)
    ids = batch["input_ids"].to(model.device)  # (1, T): the prompt, then the answer
    images = (ids[0] == processor.image_token_id).nonzero()[:, 0].view(-1, processor.num_image_tokens)  # (I, N)
    if not 0 <= image < len(images):
        raise ValueError(f"there is no image {image}; the conversation has {len(images)}, counted from 0")
    words = words_of(processor.tokenizer, answer_text)
    if not words:
        raise ValueError("the answer has no word; give at least one")
    pixels = batch.get("pixel_values")
    shown = {"pixel_values": pixels.to(model.device)} if pixels is not None else {"patch_features": patch_features}
    with eager_attention(model.language_model):
        tables = model(input_ids=ids, output_attentions=True, use_cache=False, **shown).attentions  # L x (1, H, T, T)
    chosen = tables if layer is None else [tables[layer]]
    table = torch.stack([one[0].float().mean(dim=0) for one in chosen]).mean(dim=0)  # (T, T)
    writers = [[len(prompt) + token - 1 for token in tokens] for _, tokens in words]
    rows = [table[positions][:, images[image]].mean(dim=0) for positions in writers]  # A rows of N
    return Looks([word for word, _ in words], torch.stack(rows).cpu().numpy())


def words_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[tuple[str, list[int]]]:
    """The words of a text, each with the positions of its tokens; control tokens in it are ordinary text.

    Letters and digits of Latin script that touch each other are one word. Chinese goes token by token, and a
    character of several tokens is kept whole. Blank tokens belong to no word.
    """
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    spans = tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"]
    words: list[tuple[int, int, list[int]]] = []  # (start, end, tokens), in characters
    for position, (start, end) in enumerate(spans):
        if not text[start:end].strip():
            continue
        if words and (start < words[-1][1] or (start == words[-1][1] and _touch(text, start))):
            words[-1] = (words[-1][0], max(end, words[-1][1]), [*words[-1][2], position])
        else:
            words.append((start, end, [position]))
    return [(text[start:end].strip(), tokens) for start, end, tokens in words]


def _touch(text: str, at: int) -> bool:
    """Whether the characters before and at a position belong to one word of Latin script."""
    return all(character.isascii() and character.isalnum() for character in text[at - 1 : at + 1])


def faded(image: Image.Image, weights: np.ndarray, side: int = 224) -> Image.Image:
    """The image (square, else its middle is cut out) as a word saw it, by its attention (N,).

    The patch looked at most keeps its colours; others fade to paper with the square root of their share of it, so
    that a tenth of the attention can still be seen.
    """
    across = round(len(weights) ** 0.5)
    share = np.sqrt(weights / max(weights.max(), np.finfo(np.float32).tiny))  # (N,)
    kept = np.rint(255 * (1 - FADED * (1 - share))).astype(np.uint8).reshape(across, across)
    colours = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    mask = Image.fromarray(kept).resize((side, side), Image.Resampling.NEAREST)
    return Image.composite(colours, Image.new("RGB", colours.size, PAPER), mask)


def where(patch: int, patches: int) -> str:
    """A patch's position in words, such as "top left" or "middle", by the third its middle lies in."""
    across = round(patches**0.5)
    height, side = (3 * (2 * at + 1) // (2 * across) for at in divmod(patch, across))
    names = dict.fromkeys((HEIGHTS[height], SIDES[side]))  # once where both are "middle"
    return " ".join(names)


def strongest(looks: Looks, count: int = WORDS_ACROSS * WORD_ROWS) -> list[int]:
    """The positions of the `count` words that looked at the image most, in the answer's order; no punctuation."""
    order = np.argsort(-looks.patches.sum(axis=1), kind="stable").tolist()
    return sorted([word for word in order if any(map(str.isalnum, looks.words[word]))][:count])


@style()
def attention_figure(image: Image.Image, looks: Looks, chosen: Sequence[int] | None = None) -> Figure:
    """The image once for each word, faded where it did not look; a frame marks the patch looked at most.

    Args:
        chosen: indices of words; by default those that looked at the image most.

    Raises:
        ValueError: no word is chosen.
    """
    chosen = strongest(looks) if chosen is None else list(chosen)
    if not chosen:
        raise ValueError("no word is chosen; give the index of at least one")
    rows = -(-len(chosen) // WORDS_ACROSS)
    figure = Figure(figsize=(min(len(chosen), WORDS_ACROSS) * 2.1, rows * 2.5))
    for number, index in enumerate(chosen, 1):
        axes = figure.add_subplot(rows, min(len(chosen), WORDS_ACROSS), number)
        draw_attention(axes, image, looks.patches[index])
        axes.set_title(word_title(looks, index), fontweight="bold", loc="center")
    figure.subplots_adjust(wspace=0.06, hspace=0.36, left=0, right=1)
    return figure


def show_attention(image: Image.Image, looks: Looks, chosen: Sequence[int] | None = None) -> None:
    """`attention_figure` with alternative text and a one-line summary."""
    chosen = strongest(looks) if chosen is None else list(chosen)
    patches = looks.patches.shape[1]
    looked = [f"{looks.words[index]}: {where(int(looks.patches[index].argmax()), patches)}" for index in chosen]
    alt = f"The picture once for each word, faded where the word did not look. Looked at most: {'; '.join(looked)}"
    most = looks.words[int(looks.patches.sum(axis=1).argmax())]
    summary = f"{len(chosen)} words and where each looked; “{most}” looked at the picture more than any other."
    show(attention_figure(image, looks, chosen), alt, summary)


def draw_attention(axes: Axes, image: Image.Image, weights: np.ndarray) -> None:
    """The image as a word saw it by its attention (N,), a frame around the patch looked at most."""
    axes.imshow(faded(image, weights))
    across = round(len(weights) ** 0.5)
    row, column, size = *divmod(int(weights.argmax()), across), 224 / across
    corner = (column * size - 0.5, row * size - 0.5)
    axes.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=BLUE, linewidth=2))
    axes.set_xlabel(f"{weights.sum():.0%} on the picture", fontsize=8.5)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def word_title(looks: Looks, index: int) -> str:
    """A word as the figures' fonts can write it."""
    return looks.words[index] if readable(looks.words[index]) else f"word {index + 1}"
