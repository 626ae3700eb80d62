"""Which patches of a picture the words of an answer look at. Letters as in `config.py`; A words of an answer.

Attention is where the language model reads from, layer by layer and head by head; it is not the reason for a word.
What changes when a thing is hidden says more about that (Jain and Wallace, arXiv:1902.10186, "Attention is not
Explanation", section 4).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lessons.lenses import things_patches
from lessons.plots import BLUE, readable, show, style
from minivlm.config import PROMPTS
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor
from minivlm.scenes.facts import Scene, random_stream
from minivlm.scenes.language import description
from minivlm.scenes.vocabulary import KIND_WORDS

FADED, PAPER = 0.8, (244, 242, 238)  # how far a patch that is not looked at fades, and to which colour
ACROSS, ROWS = 5, 2  # words in a figure
HEIGHTS, SIDES = ("top", "middle", "bottom"), ("left", "middle", "right")


class Looks(NamedTuple):
    """Where the words of an answer looked.

    Attributes:
        words: A words of the answer; Chinese, which has no spaces, token by token.
        patches: (A, N) how much of each word's attention went to each patch. A row sums to at most 1; the rest went
            to text.
    """

    words: list[str]
    patches: np.ndarray


class AtThings(NamedTuple):
    """Where the words for things looked, on average over many pictures.

    Attributes:
        on_picture: the share of their attention that went to the picture.
        on_thing: of that, the share that went to the patches of the very thing.
        by_chance: the share of the patches that the thing covers: what looking everywhere alike would give.
    """

    on_picture: float
    on_thing: float
    by_chance: float


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
    picture: int = 0,
    patch_features: torch.Tensor | None = None,
) -> Looks:
    """Where the model looked while it wrote each word of an answer: a mean over heads, and over layers.

    A word is written by the position before it, so that position's attention is the one that counts. A word of
    several tokens gets their mean.

    Args:
        messages: the conversation up to the question, pictures as image parts.
        answer_text: the answer to it. The model is shown it and need not have written it.
        layer: counted from 0, negative from the end; None is the mean over all layers.
        picture: of several pictures in the conversation, the number of the one that is asked about.
        patch_features: (I, N, Dv) what `vision` made of all of its pictures before; their image parts carry none then.

    Returns:
        Words and (A, N) attention to the picture's patches, in float32.

    Raises:
        ValueError: there is no such picture or layer, or the answer has no word.
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
    columns = _columns(ids, processor, picture)
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
    rows = [table[positions][:, columns].mean(dim=0) for positions in writers]  # A rows of N
    return Looks([word for word, _ in words], torch.stack(rows).cpu().numpy())


def attention_to_things(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    scenes: Sequence[Scene],
    patch_features: torch.Tensor,
) -> AtThings:
    """How well the words for things find their things, while the model is shown right English descriptions.

    The descriptions are the same whichever model is asked, so that two models can be compared word by word.

    Args:
        patch_features: (I, N, Dv), those of `scenes`.

    Raises:
        ValueError: no description names a thing.
    """
    kinds, found = {word.split()[-1]: kind for kind, word in KIND_WORDS["en"].items()}, []
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPTS["en"]}]}]
    for number, (scene, features) in enumerate(zip(scenes, patch_features, strict=True)):
        told = description(scene, "en", random_stream("looked at", number))
        looks = attention_to_patches(model, processor, asked, told, patch_features=features[None])
        for word, row in zip(looks.words, looks.patches, strict=True):
            if kind := kinds.get(word.lower()):
                own = [patches for thing, patches in things_patches(scene, len(row)) if thing.kind == kind]
                covered = np.unique(np.concatenate(own))
                found.append((row.sum(), row[covered].sum() / row.sum(), len(covered) / len(row)))
    if not found:
        raise ValueError("no description names a thing; give scenes that have some")
    return AtThings(*(float(value) for value in np.mean(found, axis=0)))


def words_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[tuple[str, list[int]]]:
    """The words of a text, each with the places of its tokens; control tokens in it are ordinary text.

    Letters and digits of Latin script that touch each other are one word. Chinese goes token by token, and a
    character of several tokens is kept whole. Blank tokens belong to no word.
    """
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    spans = tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"]
    words: list[tuple[int, int, list[int]]] = []  # (start, end, tokens), in characters
    for place, (start, end) in enumerate(spans):
        if not text[start:end].strip():
            continue
        if words and (start < words[-1][1] or (start == words[-1][1] and _touch(text, start))):
            words[-1] = (words[-1][0], max(end, words[-1][1]), [*words[-1][2], place])
        else:
            words.append((start, end, [place]))
    return [(text[start:end].strip(), tokens) for start, end, tokens in words]


def _touch(text: str, at: int) -> bool:
    """Whether the characters before and at a place belong to one word of Latin script."""
    return all(character.isascii() and character.isalnum() for character in text[at - 1 : at + 1])


def _columns(ids: torch.Tensor, processor: MiniVLMProcessor, picture: int) -> torch.Tensor:
    """The places (N,) of a picture's placeholders in ids (1, T)."""
    places = (ids[0] == processor.image_token_id).nonzero()[:, 0].view(-1, processor.num_image_tokens)  # (I, N)
    if not 0 <= picture < len(places):
        raise ValueError(f"there is no picture {picture}; the conversation has {len(places)}, counted from 0")
    return places[picture]


# ---- figures


def faded(picture: Image.Image, weights: np.ndarray, side: int = 224) -> Image.Image:
    """The picture (square, else its middle is cut out) as a word saw it, by its attention (N,).

    The patch looked at most keeps its colours; others fade to paper with the square root of their share of it, so
    that a tenth of the attention can still be seen.
    """
    across = round(len(weights) ** 0.5)
    share = np.sqrt(weights / max(weights.max(), np.finfo(np.float32).tiny))  # (N,)
    kept = np.rint(255 * (1 - FADED * (1 - share))).astype(np.uint8).reshape(across, across)
    colours = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    mask = Image.fromarray(kept).resize((side, side), Image.Resampling.NEAREST)
    return Image.composite(colours, Image.new("RGB", colours.size, PAPER), mask)


def where(patch: int, patches: int) -> str:
    """A patch's place in words, such as "top left" or "middle", by the third its middle lies in."""
    across = round(patches**0.5)
    height, side = (3 * (2 * at + 1) // (2 * across) for at in divmod(patch, across))
    names = dict.fromkeys((HEIGHTS[height], SIDES[side]))  # once where both are "middle"
    return " ".join(names)


def strongest(looks: Looks, count: int = ACROSS * ROWS) -> list[int]:
    """The places of the `count` words that looked at the picture most, in the answer's order; no punctuation."""
    order = np.argsort(-looks.patches.sum(axis=1), kind="stable").tolist()
    return sorted([place for place in order if any(map(str.isalnum, looks.words[place]))][:count])


def attention_figure(picture: Image.Image, looks: Looks, chosen: Sequence[int] | None = None) -> Figure:
    """The picture once for each word, faded where it did not look; a frame marks the patch looked at most.

    Args:
        picture: the one that was asked about.
        looks: from `attention_to_patches`.
        chosen: places of words; by default those that looked at the picture most.

    Raises:
        ValueError: no word is chosen.
    """
    chosen = strongest(looks) if chosen is None else list(chosen)
    if not chosen:
        raise ValueError("no word is chosen; give the place of at least one")
    rows = -(-len(chosen) // ACROSS)
    with style():
        figure = Figure(figsize=(min(len(chosen), ACROSS) * 2.1, rows * 2.5))
        for number, place in enumerate(chosen, 1):
            axes = figure.add_subplot(rows, min(len(chosen), ACROSS), number)
            _looked(axes, picture, looks.patches[place])
            axes.set_title(_titled(looks, place), fontweight="bold", loc="center")
        figure.subplots_adjust(wspace=0.06, hspace=0.36, left=0, right=1)
    return figure


def compared_figure(picture: Image.Image, models: Mapping[str, Looks], chosen: Sequence[int]) -> Figure:
    """The same words of the same answer as several models read them: a row for each model, a column for each word.

    Args:
        picture: the one that was asked about.
        models: a name, and where its words looked.
        chosen: places of words.

    Raises:
        ValueError: no word is chosen, or the models read different words.
    """
    first = next(iter(models.values()))
    if not chosen or any(looks.words != first.words for looks in models.values()):
        raise ValueError("choose at least one word, of an answer that is the same for all")
    with style():
        figure = Figure(figsize=(0.6 + 1.85 * len(chosen), 2.25 * len(models)))
        panels = figure.subplots(len(models), len(chosen), squeeze=False)
        for line, (name, looks) in zip(panels, models.items(), strict=True):
            for axes, place in zip(line, chosen, strict=True):
                _looked(axes, picture, looks.patches[place])
                if looks is first:
                    axes.set_title(_titled(looks, place), fontweight="bold", loc="center")
            line[0].set_ylabel(name, fontweight="bold", labelpad=8)
        figure.subplots_adjust(wspace=0.06, hspace=0.2, left=0.03, right=1)
    return figure


def _looked(axes: Axes, picture: Image.Image, weights: np.ndarray) -> None:
    """The picture as a word saw it by its attention (N,), a frame around the patch looked at most."""
    axes.imshow(faded(picture, weights))
    across = round(len(weights) ** 0.5)
    row, column, size = *divmod(int(weights.argmax()), across), 224 / across
    corner = (column * size - 0.5, row * size - 0.5)
    axes.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=BLUE, linewidth=2))
    axes.set_xlabel(f"{weights.sum():.0%} on the picture", fontsize=8.5)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _titled(looks: Looks, place: int) -> str:
    """A word as the figures' fonts can write it."""
    return looks.words[place] if readable(looks.words[place]) else f"word {place + 1}"


def show_attention(picture: Image.Image, looks: Looks, chosen: Sequence[int] | None = None) -> None:
    """`attention_figure` with alternative text and a one-line summary."""
    chosen = strongest(looks) if chosen is None else list(chosen)
    figure = attention_figure(picture, looks, chosen)
    patches = looks.patches.shape[1]
    places = [(looks.words[place], where(int(looks.patches[place].argmax()), patches)) for place in chosen]
    alt = "The picture once for each word, faded where the word did not look. Looked at most: " + "; ".join(
        f"{word}: {at}" for word, at in places
    )
    most = looks.words[int(looks.patches.sum(axis=1).argmax())]
    show(figure, alt, f"{len(chosen)} words and where each looked; “{most}” looked at the picture more than any other.")


def show_compared(picture: Image.Image, models: Mapping[str, Looks], chosen: Sequence[int]) -> None:
    """`compared_figure` with alternative text and a one-line summary."""
    told = []
    for name, looks in models.items():
        patches = looks.patches.shape[1]
        words = [f"{looks.words[k]}: {where(int(looks.patches[k].argmax()), patches)}" for k in chosen]
        told.append(f"{name}, looked at most: {'; '.join(words)}.")
    alt = f"The picture once for each of {len(chosen)} words in {len(models)} rows, faded where the word did not look. "
    shares = ", ".join(
        f"{name} {np.mean([looks.patches[k].sum() for k in chosen]):.0%}" for name, looks in models.items()
    )
    show(
        compared_figure(picture, models, chosen),
        alt + " ".join(told),
        f"Of these words' attention on the picture: {shares}.",
    )
