"""The metrics: precision and recall of things, settings, CHAIR, accuracy, POPE, each with a bootstrap interval.

The truth is exact, because a picture is made from its facts and `read_facts` reads facts back from any answer. Every
metric is a ratio of two sums over pictures (`Estimate`).

**Things.** A picture's truth is a set of kinds (level "kind") or of (kind, colour) pairs (level "pair"); an answer
names such a set. With `right` for the true ones it names and `untrue` for those it names that are true of nothing in
the picture,

    precision = right / (right + untrue)        recall = right / true

Over near things (and likewise over far ones) only pictures that hold a near thing count, `true` are the near things,
`right` the near things that are named, and what is named of the far ones is left out. An untrue name cannot be told to
mean a near or a far thing and always counts, which is strict: where a far thing was missed, it may have been meant.
`precision_at_best` leaves out as many untrue names as there are missed things at the other distance; what a
precision "over near things" could fairly be lies between the two.

**Hallucination.** CHAIR_i is the share of mentioned kinds that are not in the picture, CHAIR_s the share of answers
with at least one (Rohrbach et al., arXiv:1809.02156). POPE asks yes/no (Li et al., arXiv:2305.10355): per picture one
kind that is there and, for each sampling, one that is not: any ("random"), one of the most frequent in training
("popular"), a usual inhabitant of the setting ("adversarial"). What is neither yes nor no is wrong, and is no yes; the
yes-ratio is the model's.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypedDict

import numpy as np

from minivlm.evaluation.questions import POPE_SAMPLINGS, PRESENT, Reply, is_right, of_sampling, yes_or_no
from minivlm.scenes.facts import MAX_THINGS, Scene, random_stream
from minivlm.scenes.language import Mentioned, read_facts
from minivlm.scenes.vocabulary import QUESTION_TYPES

RESAMPLES, CONFIDENCE = 1000, 0.95  # of the bootstrap
LEVELS = ("kind", "pair")
DISTANCES = ("all", "near", "far")
COUNTS = ("any", *map(str, range(1, MAX_THINGS + 1)))  # how many things a picture holds


class Estimate(TypedDict):
    """A metric with its interval, as it also stands in JSON; None where nothing was counted."""

    value: float | None  # numerator / denominator
    low: float | None
    high: float | None
    numerator: int
    denominator: int


def estimate(rows: Iterable[tuple[int, float, float]]) -> Estimate:
    """A ratio of two sums over pictures, with its bootstrap interval.

    Rows are (picture, numerator, denominator); several of one picture are added up. low and high are the middle
    `CONFIDENCE` of the values of `RESAMPLES` draws of as many pictures with replacement, always the same draws. Where
    all are right, so is every draw, and the interval has no width: look at the denominator.
    """
    sums: dict[int, list[float]] = {}
    for picture, numerator, denominator in rows:
        total = sums.setdefault(picture, [0, 0])
        total[0] += numerator
        total[1] += denominator
    table = np.array(list(sums.values()), dtype=np.float64).reshape(-1, 2)  # (I, 2)
    numerator, denominator = table.sum(axis=0).tolist()
    if denominator == 0:
        return Estimate(value=None, low=None, high=None, numerator=int(numerator), denominator=0)
    drawn = _resamples(len(table)) @ table  # (R, 2)
    drawn = drawn[drawn[:, 1] > 0]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (tail, 1 - tail))
    value, low, high = (round(float(number), 5) for number in (numerator / denominator, low, high))
    return Estimate(value=value, low=low, high=high, numerator=int(numerator), denominator=int(denominator))


@lru_cache(maxsize=32)
def _resamples(pictures: int) -> np.ndarray:
    """How often each picture is drawn, (R, I)."""
    rng = random_stream("bootstrap", pictures)
    return rng.multinomial(pictures, np.full(pictures, 1 / pictures), size=RESAMPLES).astype(np.float64)


# ---- descriptions


class Compared(NamedTuple):
    """One answer against one picture's facts: sizes of sets, as the module's docstring defines them."""

    right: int
    untrue: int
    true: int
    excusable: int  # untrue names that may stand for a missed thing at the other distance


def compare(scene: Scene, answer: Mentioned, level: str = "pair", distance: str = "all") -> Compared:
    """Compare the things that an answer names with a picture's, at a level ("kind" or "pair") and a distance."""

    def identity(kind: str, colour: str | None) -> str | tuple[str, str | None]:
        return kind if level == "kind" else (kind, colour)

    named = {identity(*thing) for thing in answer.things}
    true = {identity(t.kind, t.colour) for t in scene.things}
    asked = {identity(t.kind, t.colour) for t in scene.things if distance in ("all", t.distance)}
    untrue = len(named - true)
    return Compared(len(named & asked), untrue, len(asked), min(untrue, len(true - asked - named)))


def score_descriptions(scenes: Sequence[Scene], texts: Sequence[str], lang: str, fully: bool = True) -> dict[str, Any]:
    """Score one answer per picture; things are broken down by their number if `fully`, else only "any" number.

    Returns:
        "things": level -> distance -> number of things -> precision, precision_at_best, recall (estimates), pictures;
        "setting", "chair_i", "chair_s": estimates; "length": words (English) or characters (Chinese) an answer.
    """
    pairs = [(scene, read_facts(text)) for scene, text in zip(scenes, texts, strict=True)]
    invented = [sum(kind not in {t.kind for t in scene.things} for kind, _ in answer.things) for scene, answer in pairs]
    numbers = COUNTS if fully else COUNTS[:1]
    return {
        "things": {
            level: {
                distance: {number: _score_things(pairs, level, distance, number) for number in numbers}
                for distance in DISTANCES
            }
            for level in LEVELS
        },
        "setting": estimate((i, answer.setting == scene.setting, 1) for i, (scene, answer) in enumerate(pairs)),
        "chair_i": estimate((i, invented[i], len(answer.things)) for i, (_, answer) in enumerate(pairs)),
        "chair_s": estimate((i, count > 0, 1) for i, count in enumerate(invented)),
        "length": estimate((i, len(text.split() if lang == "en" else text), 1) for i, text in enumerate(texts)),
    }


def _score_things(
    pairs: Sequence[tuple[Scene, Mentioned]], level: str, distance: str, number: str
) -> dict[str, Estimate | int]:
    chosen = [(i, pair) for i, pair in enumerate(pairs) if number in ("any", str(len(pair[0].things)))]
    compared = [(i, compare(*pair, level, distance)) for i, pair in chosen]
    compared = [(i, c) for i, c in compared if c.true]  # pictures without any thing at this distance say nothing
    return {
        "precision": estimate((i, c.right, c.right + c.untrue) for i, c in compared),
        "precision_at_best": estimate((i, c.right, c.right + c.untrue - c.excusable) for i, c in compared),
        "recall": estimate((i, c.right, c.true) for i, c in compared),
        "pictures": len(compared),
    }


# ---- questions


def score_questions(replies: Iterable[Reply]) -> dict[str, Estimate]:
    """Accuracy by type of question, and over "all"."""
    rows: dict[str, list[tuple[int, float, float]]] = {"all": []}
    for item, text in replies:
        row = (item.picture, is_right(item.question, text), 1)
        rows["all"].append(row)
        rows.setdefault(item.group, []).append(row)
    return {group: estimate(rows[group]) for group in ("all", *QUESTION_TYPES) if group in rows}


def score_pope(replies: Sequence[Reply]) -> dict[str, dict[str, Estimate]]:
    """sampling -> accuracy, precision, recall, f1, yes_ratio (all of them the model's), unreadable."""
    scores = {}
    for sampling in POPE_SAMPLINGS:
        rows = [(r.item.picture, r.item.group == PRESENT, yes_or_no(r.text)) for r in of_sampling(replies, sampling)]
        scores[sampling] = {
            "accuracy": estimate((i, yes is true, 1) for i, true, yes in rows),
            "precision": estimate((i, yes is true, 1) for i, true, yes in rows if yes),
            "recall": estimate((i, yes is true, 1) for i, true, yes in rows if true),
            # twice the true yes, over all that is there and all that was said to be
            "f1": estimate((i, 2 * (true and yes is True), true + (yes is True)) for i, true, yes in rows),
            "yes_ratio": estimate((i, yes is True, 1) for i, _, yes in rows),
            "unreadable": estimate((i, yes is None, 1) for i, _, yes in rows),
        }
    return scores
