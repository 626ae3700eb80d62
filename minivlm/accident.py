"""What answers are worth by accident: each is held against the facts of every picture but the one it was given about.

A control asks about one picture and shows another, or none. If its answers tell nothing about the picture asked about,
they fit it as well as they fit any other: what they score on average over all the wrong pictures is the chance
agreement of Cohen's kappa (Educational and Psychological Measurement 20:37-46, 1960), and the control's interval should
include it. The best guess lies higher: it is chosen for its score, while answers about another picture are as various
as pictures are.

Letters: I pictures; K kinds, or kinds with their colours.
"""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from minivlm.scenes.facts import COLOURS, KINDS, Scene
from minivlm.scenes.language import read_facts

Level = float | None  # None where nothing was counted
PAIRS = tuple((kind, colour) for kind in KINDS for colour in (*COLOURS, None))


def agreement(said: Sequence[Hashable], true: Sequence[Hashable]) -> Level:
    """How often what was said at one place equals what is true at another, over all pairs of different places."""
    counted, own = Counter(true), sum(one == other for one, other in zip(said, true, strict=True))
    equal = sum(times * counted[one] for one, times in Counter(said).items())
    return _share(equal - own, len(said) * (len(said) - 1))


def describing(scenes: Sequence[Scene], texts: Sequence[str]) -> dict[str, Level]:
    """What descriptions score on average over all pictures but their own.

    Args:
        scenes: the facts of I pictures.
        texts: what was said about each, I answers.

    Returns:
        precision and recall (kind with colour, near things), setting, chair_i, chair_s, as `score_descriptions` of
        `evaluate.py` counts them.
    """
    said = [read_facts(text) for text in texts]
    named, true, near = (
        np.minimum(_counts(rows, PAIRS), 1)  # sets: each pair once
        for rows in (
            [m.things for m in said],
            [[(t.kind, t.colour) for t in scene.things] for scene in scenes],
            [[(t.kind, t.colour) for t in scene.things if t.distance == "near"] for scene in scenes],
        )
    )  # (I, K) each
    asked = near.any(axis=1)  # a picture without any near thing says nothing about them
    right = _wrong_pairs(named @ near.T, asked)
    untrue = _wrong_pairs(named @ (1 - true).T, asked)
    wanted = _wrong_pairs(np.tile(near.sum(axis=1), (len(texts), 1)), asked)
    mentioned = _counts([[kind for kind, _ in m.things] for m in said], KINDS)
    absent = 1 - np.minimum(_counts([[t.kind for t in scene.things] for scene in scenes], KINDS), 1)
    invented = mentioned @ absent.T  # (I, I)
    pairs = len(texts) * (len(texts) - 1)
    return {
        "precision": _share(right, right + untrue),
        "recall": _share(right, wanted),
        "setting": agreement([m.setting for m in said], [scene.setting for scene in scenes]),
        "chair_i": _share(_wrong_pairs(invented), mentioned.sum() * (len(texts) - 1)),
        "chair_s": _share(_wrong_pairs(invented > 0), pairs),
    }


def _wrong_pairs(table: np.ndarray, asked: np.ndarray | None = None) -> float:
    """The sum of a table (I answers, I pictures) off its diagonal, over the pictures that are asked about."""
    off = table * (1 - np.eye(len(table), dtype=int))
    return float((off if asked is None else off[:, asked]).sum())


def _counts(rows: Sequence[Sequence[Hashable]], names: Sequence[Hashable]) -> np.ndarray:
    """How often each name stands in a row: (I, K)."""
    return np.array([[row.count(name) for name in names] for row in map(list, rows)])


def _share(count: float, of: float) -> Level:
    return round(float(count / of), 5) if of else None
