"""What a small language model is shown on purpose, in words alone, so that it can read an image later.

A **mosaic** fills the N positions where an image will stand with words. A cell that the red car covers says `red`,
`car`, `left` and `near` at once, in English or Chinese; a cell of the background says `beach`. Such a cell is the
weighted sum of its tokens' embeddings with a little noise: what a linear projector can make of a patch.

**Associative recall** (Arora et al., arXiv:2312.04927) asks for what belongs together: `car red left near` gives all
that is known of the car, `red car ...` starts from the colour, `left near red car` from the place, and `panda` is
followed by "no" where there is none. The key is never supervised. Every question needs such look-ups, and a small model
learns them late where they are rare: without this task half of the answers about colours were still guesses after 4,700
steps, with it nine in ten were right after 300.

An **ordered listing** names everything in reading order: `left near red car left far blue dog`. Every word is
supervised, so that nothing is passed over or named twice.
"""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from minivlm.config import IGNORE_INDEX
from minivlm.scenes import vocabulary as w
from minivlm.scenes.drawing.draw import Box, layout
from minivlm.scenes.facts import DISTANCES, KINDS, PLACES, Scene, Thing
from minivlm.scenes.language import in_reading_order

THING_SHARE = 0.95  # how often a cell of a thing has each of colour, kind, place, distance
SETTING_SHARE = 0.8  # how often a cell of the background names the setting
WEIGHTS = (0.4, 1.2)  # of a token in a weighted sum
NOISE = 0.2  # the most noise added to a cell, in units of the embeddings' own size
KIND, COLOUR, PLACE = range(3)  # the keys that a look-up can start from
KEYS = 2  # of the three, how many are asked for each thing
ABSENT = 2  # kinds that are asked for in vain


@dataclass(frozen=True)
class Lexicon:
    """The token id of every word that the tasks use, by language."""

    colours: dict[str, dict[str, int]]
    kinds: dict[str, dict[str, int]]
    places: dict[str, dict[str, int]]
    distances: dict[str, dict[str, int]]
    settings: dict[str, dict[str, int]]
    no: dict[str, int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> "Lexicon":
        """Look the words up; of a word in several tokens the last one stands for it."""

        def ids(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        def table(words: dict[str, dict[str, str]]) -> dict[str, dict[str, int]]:
            space = {"en": " ", "zh": ""}  # as a word stands inside a sentence
            return {
                lang: {key: ids(space[lang] + word)[-1] for key, word in row.items()} for lang, row in words.items()
            }

        return cls(
            colours=table(w.COLOUR_WORDS),
            kinds=table(w.KIND_WORDS),
            places=table({"en": {p: p for p in PLACES}, "zh": w.PLACE_WORDS["zh"]}),
            distances=table({"en": {d: d for d in DISTANCES}, "zh": w.DISTANCE_WORDS["zh"]}),
            settings=table({lang: {s: row[2] for s, row in w.SETTING_WORDS[lang].items()} for lang in w.LANGUAGES}),
            no={lang: ids(w.NO[lang])[0] for lang in w.LANGUAGES},
        )


def mosaic(scene: Scene, side: int, lexicon: Lexicon, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A scene as a grid of weighted token sums: token ids and weights, both (N, 5), N = side x side.

    The five words of a cell are colour, kind, place, distance and, in the background, setting; a weight of 0 leaves a
    word out. A third of the mosaics mix the two languages cell by cell.
    """
    owner = _owners(scene, side)
    languages = [*w.LANGUAGES] if rng.random() < 1 / 3 else [w.LANGUAGES[rng.integers(2)]]
    tables = [_word_table(scene, lexicon, lang) for lang in languages]  # (things + 1, 5); the last row: background
    ids = np.stack(tables)[rng.integers(len(tables), size=side * side), owner]  # (N, 5)
    present = rng.random(ids.shape) < np.array([THING_SHARE] * 4 + [SETTING_SHARE])
    present &= ids >= 0
    weights = (present * rng.uniform(*WEIGHTS, present.shape)).astype(np.float32)
    return np.where(present, ids, 0), weights


def associative_recall(
    scene: Scene, lexicon: Lexicon, lang: str, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """The ids of look-ups about a scene and their labels, `IGNORE_INDEX` on the keys."""
    items = [
        _look_up(thing, scene, lexicon, lang, int(key)) for thing in scene.things for key in rng.permutation(3)[:KEYS]
    ]
    absent = [kind for kind in KINDS if kind not in {thing.kind for thing in scene.things}]
    items += [([lexicon.kinds[lang][kind], lexicon.no[lang]], 1) for kind in rng.choice(absent, ABSENT, replace=False)]
    ids, labels = [], []
    for item, keys in (items[i] for i in rng.permutation(len(items))):
        ids += item
        labels += [IGNORE_INDEX] * keys + item[keys:]
    return ids, labels


def ordered_listing(scene: Scene, lexicon: Lexicon, lang: str) -> list[int]:
    """The ids of all things in reading order, each with the place where it stands before it."""
    return [token for thing in in_reading_order(scene) for token in _look_up(thing, scene, lexicon, lang, PLACE)[0]]


def _look_up(thing: Thing, scene: Scene, lexicon: Lexicon, lang: str, key: int) -> tuple[list[int], int]:
    """A thing's words, and how many of them are the key: more than one word where one would fit several things."""
    kind = [lexicon.kinds[lang][thing.kind]]
    colour = [lexicon.colours[lang][thing.colour]] if thing.colour else []
    place, distance = [lexicon.places[lang][thing.place]], [lexicon.distances[lang][thing.distance]]
    others = [other for other in scene.things if other is not thing]
    if key == KIND:
        return kind + colour + place + distance, 1 + any(t.kind == thing.kind for t in others)
    if key == COLOUR and colour:
        return colour + kind + place + distance, 1 + any(t.colour == thing.colour for t in others)
    return place + distance + colour + kind, 2


def _owners(scene: Scene, side: int) -> np.ndarray:
    """Which thing each cell shows (N,); len(things) where it shows the background."""
    owner = np.full(side * side, len(scene.things))
    boxes = layout(scene)
    for index in sorted(range(len(boxes)), key=lambda i: scene.things[i].distance == "near"):
        owner[covered(boxes[index], side)] = index
    return owner


def covered(box: Box, side: int) -> np.ndarray:
    """The cells or patches (of side x side, row by row) whose centre lies in the inscribed circle of a thing's box."""
    centres = (np.arange(side) + 0.5) / side
    y, x = (axis.reshape(-1) for axis in np.meshgrid(centres, centres, indexing="ij"))
    left, top, right, bottom = box
    away = ((x - (left + right) / 2) ** 2 + (y - (top + bottom) / 2) ** 2) / ((right - left) / 2) ** 2
    return np.flatnonzero((away < 1) | (away == away.min()))


def _word_table(scene: Scene, lexicon: Lexicon, lang: str) -> np.ndarray:
    colours, kinds = lexicon.colours[lang], lexicon.kinds[lang]
    places, distances = lexicon.places[lang], lexicon.distances[lang]
    rows = [
        (colours.get(t.colour, -1), kinds[t.kind], places[t.place], distances[t.distance], -1) for t in scene.things
    ]
    return np.array([*rows, (-1, -1, -1, -1, lexicon.settings[lang][scene.setting])])
