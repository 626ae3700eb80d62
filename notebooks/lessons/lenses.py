"""Lenses into a model: nearest words of patches, attention from words to patches, gradients, and how weights moved.

Attention is where the language model reads from, layer by layer and head by head; it is not the reason for a word.
What changes when a thing is hidden says more about that (Jain and Wallace, arXiv:1902.10186, "Attention is not
Explanation", section 4). Letters as in `config.py`; A words of an answer.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lessons.plots import BLUE, readable, show, style
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.placeholders import replace_placeholders
from minivlm.pretraining.encoder import covered
from minivlm.pretraining.reading_tasks import Lexicon, mosaic
from minivlm.processor import MiniVLMProcessor
from minivlm.scenes.drawing.draw import layout
from minivlm.scenes.facts import Scene, Thing, random_stream
from minivlm.scenes.language import in_reading_order, noun_phrase
from minivlm.scenes.vocabulary import LANGUAGES

NO_WORD = "·"  # stands for a token that is no word: punctuation, half a character
FACTS = ("kind", "colour", "place", "distance", "setting")  # what a word can be true about
UNTRUE = "none of these"
ORDERS = ("in place", "cells shuffled", "words shuffled")  # of an image that is typed in words
FADED, PAPER = 0.8, (244, 242, 238)  # how far a patch without attention fades, and to which colour
ACROSS, ROWS = 5, 2  # words in a figure
HEIGHTS, SIDES = ("top", "middle", "bottom"), ("left", "middle", "right")


class PatchWord(NamedTuple):
    """The word nearest to a projected patch.

    Attributes:
        word: the token as text, `NO_WORD` if it is none.
        english: the same in English, for whoever lacks Chinese characters; `NO_WORD` if there is no such word.
        true: whether it is true of what the patch shows.
    """

    word: str
    english: str
    true: bool


class NearWord(NamedTuple):
    """A word as in `PatchWord`, and its cosine to a patch."""

    word: str
    english: str
    cosine: float


@torch.no_grad()
def nearest_tokens(model: MiniVLMForConditionalGeneration, image_embeds: torch.Tensor) -> torch.Tensor:
    """The cosines (N, V) between projected patches (N, Dl) and the embeddings of all tokens."""
    table = model.get_input_embeddings().weight  # (V, Dl)
    return F.normalize(image_embeds, dim=-1) @ F.normalize(table, dim=-1).T  # (N, V)


def nearest_few(
    model: MiniVLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    image_embeds: torch.Tensor,
    count: int = 8,
) -> list[list[NearWord]]:
    """The `count` nearest words of each projected patch (N, Dl), the nearest first."""
    cosines, ids = nearest_tokens(model, image_embeds).topk(count, dim=-1)  # (N, count)
    named = _namer(tokenizer, Lexicon.of(tokenizer))
    return [
        [NearWord(*named(token_id), cosine) for token_id, cosine in zip(*row, strict=True)]
        for row in zip(ids.tolist(), cosines.tolist(), strict=True)
    ]


def read_patches(
    model: MiniVLMForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, scene: Scene, image_embeds: torch.Tensor
) -> list[PatchWord]:
    """An image read patch by patch: the word nearest to each of its projected patches (N, Dl).

    A word is true of a patch if it says the kind, colour, place or distance of the thing that covers the patch, or the
    setting, in either language. Where no thing is, only the setting is true.
    """
    nearest, lexicon = nearest_tokens(model, image_embeds).argmax(dim=-1).tolist(), Lexicon.of(tokenizer)
    true = [[lexicon.settings[lang][scene.setting] for lang in LANGUAGES]] * len(nearest)
    for thing, patches in things_patches(scene, len(nearest)):
        for patch in patches:
            true[patch] = _names(thing, scene, lexicon).keys()
    named = _namer(tokenizer, lexicon)
    return [PatchWord(*named(token_id), token_id in names) for token_id, names in zip(nearest, true, strict=True)]


def facts_named(
    model: MiniVLMForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, scene: Scene, image_embeds: torch.Tensor
) -> Counter:
    """Of the patches (N, Dl) that things cover, how many have a nearest word that says which fact of the thing.

    Returns:
        `FACTS` and `UNTRUE` to counts. A patch that two things cover counts once for each.
    """
    nearest, lexicon = nearest_tokens(model, image_embeds).argmax(dim=-1), Lexicon.of(tokenizer)
    counts = Counter(dict.fromkeys((*FACTS, UNTRUE), 0))
    for thing, patches in things_patches(scene, len(nearest)):
        names = _names(thing, scene, lexicon)
        counts.update(names.get(token_id, UNTRUE) for token_id in nearest[patches].tolist())
    return counts


def things_patches(scene: Scene, patches: int) -> list[tuple[Thing, np.ndarray]]:
    """Each thing with the patches that it covers, of so many; far things first, since near ones stand before them."""
    pairs = zip(scene.things, layout(scene), strict=True)
    placed = [(thing, covered(box, int(patches**0.5))) for thing, box in pairs]
    return sorted(placed, key=lambda pair: pair[0].distance == "near")


def listed(scene: Scene) -> str:
    """A scene's things and setting, for people."""
    things = [noun_phrase(thing.kind, thing.colour, "en") for thing in in_reading_order(scene)]
    return f"{', '.join(things)}; {scene.setting}"


def typed_image(
    model: MiniVLMForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, scene: Scene, order: str = "in place"
) -> torch.Tensor:
    """An image typed in words: image_embeds (N, Dl) that no encoder made, only looked up.

    Each patch is the sum of the embeddings of the words that are true of it, as in `pretraining/reading_tasks.py`.

    Args:
        order: one of `ORDERS`. "in place", each cell where its patch would be; "cells shuffled", the cells go anywhere
            and each keeps its words; "words shuffled", the same words are dealt out anew, so that colour and kind of
            one thing no longer stand together.

    Raises:
        ValueError: there is no such order.
    """
    if order not in ORDERS:
        raise ValueError(f"there is no order {order!r}; choose one of {', '.join(ORDERS)}")
    side, rng = int(model.config.num_image_tokens**0.5), random_stream("typed", scene.seed)
    ids, weights = mosaic(scene, side, Lexicon.of(tokenizer), rng)  # (N, 5) each
    if order == "cells shuffled":
        cells = rng.permutation(len(ids))
        ids, weights = ids[cells], weights[cells]
    if order == "words shuffled":
        cells = rng.permuted(np.tile(np.arange(len(ids))[:, None], ids.shape[1]), axis=0)  # each column by itself
        ids, weights = np.take_along_axis(ids, cells, axis=0), np.take_along_axis(weights, cells, axis=0)
    table = model.get_input_embeddings().weight.detach()  # (V, Dl)
    return (table[torch.from_numpy(ids)] * torch.from_numpy(weights)[..., None]).sum(dim=1)  # (N, Dl)


@torch.no_grad()
def read_aloud(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    image_embeds: torch.Tensor,
    prompt: str,
    max_new_tokens: int = 48,
) -> list[str]:
    """The language model's greedy answers about images given as embeddings (I, N, Dl), wherever these come from."""
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    prompt_ids = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=True)[0]
    ids = torch.tensor([prompt_ids] * len(image_embeds))  # (I, T)
    text_embeds = model.get_input_embeddings()(ids.masked_fill(ids == processor.image_token_id, 0))  # (I, T, Dl)
    embeds = replace_placeholders(text_embeds, ids, image_embeds, processor.image_token_id)
    end, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": end, "pad_token_id": pad}
    answers = model.language_model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **options)
    return processor.tokenizer.batch_decode(answers, skip_special_tokens=True)


def gradient_map(model: MiniVLMForConditionalGeneration, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """How much gradient arrives where on its way down through the language model.

    It comes from the loss and ends in W (`model.projector.weight.grad` holds it afterwards); what is frozen lets it
    pass and keeps none.

    Args:
        batch: one example, as `processor.collate` makes it.

    Returns:
        Norms (L + 1, T): row 0 is what goes into the language model, row l what comes out of its layer l.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "attention_mask")}
    embeds = model.embed(**inputs)  # (1, T, Dl)
    out = model.language_model(inputs_embeds=embeds, labels=batch["labels"], output_hidden_states=True, use_cache=False)
    for hidden in out.hidden_states:
        hidden.retain_grad()
    out.loss.backward()
    return torch.stack([hidden.grad[0].norm(dim=-1) for hidden in out.hidden_states])  # (L + 1, T)


def moved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> float:
    """How far a group of weights moved, as a share of their length: |after - before| / |before|, over all of them."""
    change = sum((after[name] - old).pow(2).sum().item() for name, old in before.items())
    return (change / sum(old.pow(2).sum().item() for old in before.values())) ** 0.5


# Attention from the words of an answer to patches


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
    """A patch's place in words, such as "top left" or "middle", by the third its middle lies in."""
    across = round(patches**0.5)
    height, side = (3 * (2 * at + 1) // (2 * across) for at in divmod(patch, across))
    names = dict.fromkeys((HEIGHTS[height], SIDES[side]))  # once where both are "middle"
    return " ".join(names)


def strongest(looks: Looks, count: int = ACROSS * ROWS) -> list[int]:
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
    rows = -(-len(chosen) // ACROSS)
    figure = Figure(figsize=(min(len(chosen), ACROSS) * 2.1, rows * 2.5))
    for number, index in enumerate(chosen, 1):
        axes = figure.add_subplot(rows, min(len(chosen), ACROSS), number)
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


# Words that are true of a patch


def _names(thing: Thing, scene: Scene, lexicon: Lexicon) -> dict[int, str]:
    """The tokens that are true of a thing, and which fact each says."""
    keys = (thing.kind, thing.colour, thing.place, thing.distance, scene.setting)
    facts = zip(FACTS, _tables(lexicon), keys, strict=True)
    return {table[lang][key]: fact for fact, table, key in facts if key for lang in LANGUAGES}


def _tables(lexicon: Lexicon) -> tuple[dict[str, dict[str, int]], ...]:
    """The lexicon's tables in the order of `FACTS`."""
    return lexicon.kinds, lexicon.colours, lexicon.places, lexicon.distances, lexicon.settings


def _namer(tokenizer: PreTrainedTokenizerFast, lexicon: Lexicon) -> Callable[[int], tuple[str, str]]:
    """Names tokens: as a word, and that word in English; `NO_WORD` where there is none."""
    pairs = [(table["zh"][key], table["en"][key]) for table in _tables(lexicon) for key in table["zh"]]

    def word(token_id: int) -> str:
        text = tokenizer.decode([token_id]).strip()
        return text if text.isalpha() else NO_WORD

    english = {chinese: word(token_id) for chinese, token_id in pairs}

    def named(token_id: int) -> tuple[str, str]:
        text = word(token_id)
        return text, text if text.isascii() else english.get(token_id, NO_WORD)

    return named
