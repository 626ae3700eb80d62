"""An image as words: the nearest words of its patches, an image typed in words, and what the model says of either.

Letters as in `config.py`.
"""

import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from lessons.plots import BLUE, INK, ORANGE, border, readable, show, style
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
ZH = "ᶻʰ"  # marks an English word that stands for a Chinese one
FACTS = ("kind", "colour", "place", "distance", "setting")  # what a word can be true about
UNTRUE = "none of these"
ORDERS = ("in place", "cells shuffled", "words shuffled")  # of an image that is typed in words
SHARE = 0.38  # of an image's colours that are left below the words; the rest is white


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


def show_words(
    image: Image.Image, scene: Scene, panels: Mapping[str, Sequence[PatchWord]], answers: Sequence[str] = ()
) -> None:
    """The nearest words of an image's patches, once for each variant of them, and the model's answer to each.

    Args:
        scene: its facts; its things are outlined.
        panels: a name and N words for each variant.
        answers: one for each, or none.
    """
    sentences = [f": “{sentence}”" for sentence in answers] or [""] * len(panels)
    outlines = [
        (noun_phrase(thing.kind, thing.colour, "en"), outlined)
        for thing, outlined in things_patches(scene, len(next(iter(panels.values()))))
    ]
    titles = {f"{name}{sentence}": panels[name] for name, sentence in zip(panels, sentences, strict=True)}
    alt = (
        f"A pale picture ({listed(scene)}), {len(panels)} times, its things outlined, a word on each patch; words "
        "that are true of their patch are bold and framed."
    )
    counts = []
    for title, words in titles.items():
        true = [word.english for word in words if word.true]
        alt += f" {title}: {len(true)} true, {', '.join(sorted(set(true))) or 'none'}."
        counts.append(f"{title}: {len(true)} of {len(words)} words are true")
    remark = "" if readable("中") else f" ({ZH} marks a Chinese word, written in English here)"
    wrapped = {textwrap.fill(title, 52): words for title, words in titles.items()}
    show(patch_words(image, wrapped, outlines), alt, f"{'; '.join(counts)}.{remark}")


@style()
def patch_words(
    image: Image.Image, panels: Mapping[str, Sequence[PatchWord]], outlines: Sequence[tuple[str, np.ndarray]] = ()
) -> Figure:
    """The word nearest to each projected patch, written over the image; what is true of its patch is framed.

    Without a Chinese font, a Chinese word is written in English and marked "zh".

    Args:
        panels: a title and N words for each panel.
        outlines: a label and the patches of each thing, to be drawn around them.
    """
    figure = Figure(figsize=(5.9 * len(panels), 6.4), layout="constrained")
    for number, (title, words) in enumerate(panels.items(), start=1):
        axes, side = figure.add_subplot(1, len(panels), number), int(len(words) ** 0.5)
        pale = np.round(255 - (255 - np.asarray(image, dtype=float)) * SHARE).astype(np.uint8)
        axes.imshow(pale, extent=(0, side, side, 0), interpolation="bicubic")
        for label, outlined in outlines:
            _outline(axes, outlined, side, label)
        for index, word in enumerate(words):
            y, x = divmod(index, side)
            _patch_word(axes, x + 0.5, y + 0.5, word)
        axes.set_title(title, fontsize=12, pad=8)
        axes.set(xlim=(-0.03, side + 0.03), ylim=(side + 0.03, -0.03))
        axes.axis("off")
    return figure


def written(word: PatchWord) -> str:
    """A patch's word as the figures' fonts can write it."""
    if readable(word.word):
        return word.word
    return word.english if word.english == NO_WORD else f"{word.english}{ZH}"


def _patch_word(axes: Axes, x: float, y: float, word: PatchWord) -> None:
    """One word in its patch: framed and bold if it is true."""
    text = written(word)
    plain = {"facecolor": "white", "edgecolor": "none", "alpha": 0.45}
    frame = {"facecolor": "#FFF6EC", "edgecolor": ORANGE, "alpha": 0.95} if word.true else plain
    size = min(9.0, 58 / max(6, len(text.removesuffix(ZH)) + 1))
    look = {"color": INK, "fontweight": "bold", "zorder": 4} if word.true else {"color": "#5A5A5A", "zorder": 3}
    box = {"boxstyle": "round,pad=0.22", "linewidth": 1.5, **frame}
    axes.text(x, y, text, ha="center", va="center", fontsize=size, bbox=box, **look)


def _outline(axes: Axes, outlined: np.ndarray, side: int, label: str) -> None:
    """A line around patches, and what stands there."""
    lines = border(outlined, side)
    for colour, width in (("white", 5.0), (BLUE, 2.2)):
        for x0, y0, x1, y1 in lines:
            axes.plot([x0, x1], [y0, y1], color=colour, linewidth=width, solid_capstyle="round", zorder=2)
    top = outlined.min() // side
    middle = (outlined[outlined // side == top] % side).mean() + 0.5
    x, y, align = min(max(middle, 1.2), side - 1.2), top or 0.02, "center" if top else "top"
    box = {"boxstyle": "round,pad=0.25", "facecolor": BLUE, "edgecolor": "white"}
    axes.text(x, y, label, ha="center", va=align, fontsize=8, color="white", bbox=box, zorder=5)


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
