"""Lenses: what a projected patch looks like to the language model, and how far a stage moved the weights.

Letters as in `config.py`.
"""

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from minivlm.base.encoder import covered
from minivlm.base.mosaic import Lexicon
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.scenes.draw import layout
from minivlm.scenes.facts import Scene, Thing
from minivlm.scenes.words import LANGUAGES

NO_WORD = "·"  # stands for a token that is no word: punctuation, half a character


@torch.no_grad()
def nearest_tokens(model: MiniVLMForConditionalGeneration, image_embeds: torch.Tensor) -> torch.Tensor:
    """The token whose embedding points most nearly the way that each projected patch does, out of all V.

    Args:
        image_embeds: (N, Dl) from the projector.

    Returns:
        Cosines (N, V) between patches and tokens; `argmax(-1)` is the nearest.
    """
    table = model.get_input_embeddings().weight  # (V, Dl)
    return F.normalize(image_embeds, dim=-1) @ F.normalize(table, dim=-1).T  # (N, V)


def nearest_words(
    model: MiniVLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    image_embeds: torch.Tensor,
    keep: Callable[[str], bool] = lambda word: True,
) -> list[str]:
    """The nearest token of each projected patch (N, Dl), as a word; `NO_WORD` where it is none.

    Args:
        keep: which words may be named, for a font that lacks some; among these the nearest is taken.
    """
    words = [tokenizer.decode([token_id]).strip() for token_id in range(model.config.text_config.vocab_size)]
    cosines = nearest_tokens(model, image_embeds)  # (N, V)
    cosines[:, [place for place, word in enumerate(words) if not keep(word)]] = -1
    nearest = [words[token_id] for token_id in cosines.argmax(dim=-1).tolist()]
    return [word if word.isalpha() else NO_WORD for word in nearest]


def named_patches(
    model: MiniVLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scene: Scene,
    image_embeds: torch.Tensor,
) -> tuple[int, int]:
    """Of the patches (N, Dl) that things cover, how many have a nearest token that is true of the thing.

    Such a token says its kind, colour, place, distance or setting, in either language; there are V tokens in all.
    Returns that number, and the number of patches that things cover.
    """
    nearest = nearest_tokens(model, image_embeds).argmax(dim=-1)  # (N,)
    lexicon, side = Lexicon.of(tokenizer), int(len(nearest) ** 0.5)
    right = total = 0
    for thing, box in zip(scene.things, layout(scene), strict=True):
        names = _names(thing, scene, lexicon)
        patches = covered(box, side)
        total += len(patches)
        right += sum(token_id in names for token_id in nearest[patches].tolist())
    return right, total


def true_words(scene: Scene, tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """The words that say a thing's kind, colour, place or distance, or the setting, in both languages."""
    lexicon = Lexicon.of(tokenizer)
    ids = {token_id for thing in scene.things for token_id in _names(thing, scene, lexicon)}
    return {tokenizer.decode([token_id]).strip() for token_id in ids}


def moved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> float:
    """How far a group of weights moved, as a share of their length: |after - before| / |before|, over all of them."""
    change = sum((after[name] - old).pow(2).sum().item() for name, old in before.items())
    return (change / sum(old.pow(2).sum().item() for old in before.values())) ** 0.5


def _names(thing: Thing, scene: Scene, lexicon: Lexicon) -> set[int]:
    """The tokens that are true of a thing."""
    facts = (
        (lexicon.kinds, thing.kind),
        (lexicon.colours, thing.colour),
        (lexicon.places, thing.place),
        (lexicon.distances, thing.distance),
        (lexicon.settings, scene.setting),
    )
    return {table[lang][key] for table, key in facts if key for lang in LANGUAGES}
