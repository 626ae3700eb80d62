"""Word mosaics and drills: what a small language model is shown on purpose, so that it can read a picture later.

A **mosaic** fills the block of N positions where a picture will stand with words, as if somebody had typed a picture.
A cell that the red car covers says `red`, `car`, `left` and `near` at once, in English or Chinese; a cell of the
background says `beach`. Such a *chord* is the weighted sum of the words' embeddings with a little noise, since that is
what a linear projector can make of a patch. No picture is involved.

A **drill** asks for what belongs together, one word after the other and almost nothing else: `car red left near` says
all that is known of the car, `red car ...` starts from the colour, `left near red car` from the place, and `panda` is
followed by "no" where there is none. Only what can be looked up is learnt from, never the key. To find what belongs to
a key is what every question needs, and a small model comes to it late where such lookups are rare: without drills
half of the answers about colours were still guesses after 4,700 steps, with them nine in ten were right after 300.
(The task is the associative recall of Arora et al., arXiv:2312.04927.) A **roll call** is a drill in reading order:
`left near red car left far blue dog`, every word of it learnt, so that nothing is passed over or named twice.
"""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from minivlm.config import IGNORE_INDEX
from minivlm.scenes import vocabulary as w
from minivlm.scenes.drawing.draw import layout
from minivlm.scenes.facts import KINDS, Scene, Thing
from minivlm.scenes.language import in_reading_order

SAID = 0.95  # how often a cell of a thing says each of colour, kind, place, distance
SAID_BEHIND = 0.8  # how often a cell of the background names the setting
LOUDNESS = (0.4, 1.2)  # the weight of a word in a chord
NOISE = 0.2  # the most noise added to a cell, in units of the embeddings' own size
PLACE = 2  # the way of a drill that starts from the place
WAYS = 2  # of three keys (kind, colour, place), how many a drill starts from for each thing
ABSENT = 2  # kinds that a drill asks for in vain


@dataclass(frozen=True)
class Lexicon:
    """The token id of every word that a mosaic or a drill can use, by language."""

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
            spaced = {"en": " {}", "zh": "{}"}  # as a word stands inside a sentence
            return {
                lang: {key: ids(spaced[lang].format(word))[-1] for key, word in row.items()}
                for lang, row in words.items()
            }

        return cls(
            colours=table(w.COLOUR_WORDS),
            kinds=table(w.KIND_WORDS),
            places=table({"en": {p: p for p in w.PLACE_WORDS["en"]}, "zh": w.PLACE_WORDS["zh"]}),
            distances=table({"en": {d: d for d in w.DISTANCE_WORDS["en"]}, "zh": w.DISTANCE_WORDS["zh"]}),
            settings=table({lang: {s: row[2] for s, row in w.SETTING_WORDS[lang].items()} for lang in w.LANGUAGES}),
            no={lang: ids(w.NO[lang])[0] for lang in w.LANGUAGES},
        )


def mosaic(scene: Scene, side: int, lexicon: Lexicon, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A scene typed as a grid of words: token ids and weights, both (N, 5), N = side x side.

    The five words of a cell are colour, kind, place, distance and, in the background, setting; a weight of 0 means
    unsaid. A third of the mosaics mix the two languages cell by cell.
    """
    owner = _owners(scene, side)
    languages = [*w.LANGUAGES] if rng.random() < 1 / 3 else [w.LANGUAGES[rng.integers(2)]]
    tables = [_word_table(scene, lexicon, lang) for lang in languages]  # (things + 1, 5); the last row: background
    ids = np.stack(tables)[rng.integers(len(tables), size=side * side), owner]  # (N, 5)
    said = rng.random(ids.shape) < np.array([SAID, SAID, SAID, SAID, SAID_BEHIND])
    said &= ids >= 0
    weights = (said * rng.uniform(*LOUDNESS, said.shape)).astype(np.float32)
    return np.where(said, ids, 0), weights


def drill(scene: Scene, lexicon: Lexicon, lang: str, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """The ids of a drill about a scene and their labels, `IGNORE_INDEX` on the keys."""
    items = [
        _looked_up(thing, scene, lexicon, lang, int(way)) for thing in scene.things for way in rng.permutation(3)[:WAYS]
    ]
    absent = [kind for kind in KINDS if kind not in {thing.kind for thing in scene.things}]
    items += [([lexicon.kinds[lang][kind], lexicon.no[lang]], 1) for kind in rng.choice(absent, ABSENT, replace=False)]
    ids, labels = [], []
    for item, keys in (items[i] for i in rng.permutation(len(items))):
        ids += item
        labels += [IGNORE_INDEX] * keys + item[keys:]
    return ids, labels


def roll_call(scene: Scene, lexicon: Lexicon, lang: str) -> list[int]:
    """The ids of all things in reading order, each with the place where it stands before it."""
    return [token for thing in in_reading_order(scene) for token in _looked_up(thing, scene, lexicon, lang, PLACE)[0]]


def _looked_up(thing: Thing, scene: Scene, lexicon: Lexicon, lang: str, way: int) -> tuple[list[int], int]:
    """A thing's words, and how many of them are the key: more than one word where one would fit several things."""
    kind = [lexicon.kinds[lang][thing.kind]]
    colour = [lexicon.colours[lang][thing.colour]] if thing.colour else []
    place, distance = [lexicon.places[lang][thing.place]], [lexicon.distances[lang][thing.distance]]
    others = [other for other in scene.things if other is not thing]
    if way == 0:
        return kind + colour + place + distance, 1 + any(t.kind == thing.kind for t in others)
    if way == 1 and colour:
        return colour + kind + place + distance, 1 + any(t.colour == thing.colour for t in others)
    return place + distance + colour + kind, 2


def _owners(scene: Scene, side: int) -> np.ndarray:
    """Which thing each cell shows (N,); len(things) where it shows the background."""
    centres = (np.arange(side) + 0.5) / side
    y, x = (axis.reshape(-1) for axis in np.meshgrid(centres, centres, indexing="ij"))
    owner = np.full(side * side, len(scene.things))
    boxes = layout(scene)
    for index in sorted(range(len(boxes)), key=lambda i: scene.things[i].distance == "near"):
        left, top, right, bottom = boxes[index]
        distance = ((x - (left + right) / 2) ** 2 + (y - (top + bottom) / 2) ** 2) / ((right - left) / 2) ** 2
        owner[(distance < 1) | (distance == distance.min())] = index
    return owner


def _word_table(scene: Scene, lexicon: Lexicon, lang: str) -> np.ndarray:
    rows = [
        (
            lexicon.colours[lang].get(t.colour, -1),
            lexicon.kinds[lang][t.kind],
            lexicon.places[lang][t.place],
            lexicon.distances[lang][t.distance],
            -1,
        )
        for t in scene.things
    ]
    return np.array([*rows, (-1, -1, -1, -1, lexicon.settings[lang][scene.setting])])
