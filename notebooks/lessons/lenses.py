"""Lenses: what a projected patch is to the language model, where a gradient goes, and how far a stage moved weights.

Letters as in `config.py`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from minivlm.generate import Asked, prompt_ids
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
    """How nearly each projected patch points the way that each token's embedding does.

    Args:
        image_embeds: (N, Dl) from the projector.

    Returns:
        Cosines (N, V) between patches and all tokens; `argmax(-1)` is the nearest.
    """
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
    english = _english(tokenizer, Lexicon.of(tokenizer))
    return [
        [NearWord(*_named(tokenizer, token_id, english), cosine) for token_id, cosine in zip(*row, strict=True)]
        for row in zip(ids.tolist(), cosines.tolist(), strict=True)
    ]


def read_patches(
    model: MiniVLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scene: Scene,
    image_embeds: torch.Tensor,
) -> list[PatchWord]:
    """A picture read patch by patch: the word nearest to each of its projected patches (N, Dl).

    A word is true of a patch if it says the kind, colour, place or distance of the thing that covers the patch, or the
    setting, in either language. Where no thing is, only the setting is true.
    """
    nearest, lexicon = nearest_tokens(model, image_embeds).argmax(dim=-1).tolist(), Lexicon.of(tokenizer)
    true = [_setting(scene, lexicon)] * len(nearest)
    for thing, patches in things_patches(scene, len(nearest)):
        for patch in patches:
            true[patch] = _names(thing, scene, lexicon).keys()
    english = _english(tokenizer, lexicon)
    return [
        PatchWord(*_named(tokenizer, token_id, english), token_id in names)
        for token_id, names in zip(nearest, true, strict=True)
    ]


def facts_named(
    model: MiniVLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scene: Scene,
    image_embeds: torch.Tensor,
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


def named_patches(
    model: MiniVLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scene: Scene,
    image_embeds: torch.Tensor,
) -> tuple[int, int]:
    """Of the patches (N, Dl) that things cover, how many have a nearest token that is true of the thing.

    There are V tokens in all, ten of which are true. Returns that number, and that of the patches that things cover.
    """
    counts = facts_named(model, tokenizer, scene, image_embeds)
    return counts.total() - counts[UNTRUE], counts.total()


def things_patches(scene: Scene, patches: int) -> list[tuple[Thing, np.ndarray]]:
    """Each thing with the patches that it covers, of so many; far things first, since near ones stand before them."""
    pairs = zip(scene.things, layout(scene), strict=True)
    placed = [(thing, covered(box, int(patches**0.5))) for thing, box in pairs]
    return sorted(placed, key=lambda pair: pair[0].distance == "near")


def listed(scene: Scene) -> str:
    """A scene's things and setting, for people."""
    things = [noun_phrase(thing.kind, thing.colour, "en") for thing in in_reading_order(scene)]
    return f"{', '.join(things)}; {scene.setting}"


def typed_picture(model: MiniVLMForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, scene: Scene):
    """A picture typed in words: image_embeds (N, Dl) that were never seen, only looked up.

    Each patch is the sum of the embeddings of the words that are true of it, as in `pretraining/reading_tasks.py`.
    """
    side = int(model.config.num_image_tokens**0.5)
    ids, weights = mosaic(scene, side, Lexicon.of(tokenizer), random_stream("typed", scene.seed))  # (N, 5)
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
    """The language model's greedy answer about pictures that are given as embeddings, wherever these come from.

    Args:
        image_embeds: (I, N, Dl), one picture for each answer.
    """
    head, tail = prompt_ids(processor, Asked(prompt, 0))
    ids = torch.tensor([head + tail] * len(image_embeds))  # (I, T)
    text_embeds = model.get_input_embeddings()(ids.masked_fill(ids == processor.image_token_id, 0))  # (I, T, Dl)
    embeds = replace_placeholders(text_embeds, ids, image_embeds, processor.image_token_id)
    end, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    written = model.language_model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return processor.tokenizer.batch_decode(written, skip_special_tokens=True)


def gradient_map(model: MiniVLMForConditionalGeneration, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """How much gradient arrives where on its way down through the language model.

    It comes from the loss and ends in W (`model.projector.weight.grad` holds it afterwards); what is frozen lets it
    pass and keeps none.

    Args:
        batch: one row, as `processor.collate` makes it.

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


def _names(thing: Thing, scene: Scene, lexicon: Lexicon) -> dict[int, str]:
    """The tokens that are true of a thing, and which fact each says."""
    keys = (thing.kind, thing.colour, thing.place, thing.distance, scene.setting)
    facts = zip(FACTS, _tables(lexicon), keys, strict=True)
    return {table[lang][key]: fact for fact, table, key in facts if key for lang in LANGUAGES}


def _setting(scene: Scene, lexicon: Lexicon) -> Sequence[int]:
    """The tokens that say the setting."""
    return [lexicon.settings[lang][scene.setting] for lang in LANGUAGES]


def _tables(lexicon: Lexicon) -> tuple[dict[str, dict[str, int]], ...]:
    """The lexicon's tables in the order of `FACTS`."""
    return lexicon.kinds, lexicon.colours, lexicon.places, lexicon.distances, lexicon.settings


def _english(tokenizer: PreTrainedTokenizerFast, lexicon: Lexicon) -> dict[int, str]:
    """The English word for each Chinese token of the lexicon."""
    pairs = [(table["zh"][key], table["en"][key]) for table in _tables(lexicon) for key in table["zh"]]
    return {chinese: _word(tokenizer, token_id) for chinese, token_id in pairs}


def _named(tokenizer: PreTrainedTokenizerFast, token_id: int, english: Mapping[int, str]) -> tuple[str, str]:
    """A token as a word, and that word in English."""
    word = _word(tokenizer, token_id)
    return word, word if word.isascii() else english.get(token_id, NO_WORD)


def _word(tokenizer: PreTrainedTokenizerFast, token_id: int) -> str:
    """A token as a word, `NO_WORD` if it is none."""
    text = tokenizer.decode([token_id]).strip()
    return text if text.isalpha() else NO_WORD
