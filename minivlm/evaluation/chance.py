"""What answers are worth by accident: each is held against the facts of pictures that it was not given about.

A control asks about one picture and shows another, or none. If its answers tell nothing about the picture asked about,
they fit it as well as they fit those that were neither asked about nor shown: what they score there on average is the
chance agreement of Cohen's kappa (Educational and Psychological Measurement 20:37-46, 1960), and the control's interval
should include it. An answer may depend on its question, though: of a kind that is seldom there, *no* is a good guess
without any picture. So yes and no are held against other pictures about which the same kind was asked. The best guess
lies higher: it is chosen for its score, while answers about another picture are as various as pictures are.

Letters: I pictures; K kinds, or kinds with their colours.
"""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from minivlm.scenes.facts import COLOURS, KINDS, Scene
from minivlm.scenes.language import read_facts

Level = float | None  # None where nothing was counted
PAIRS = tuple((kind, colour) for kind in KINDS for colour in (*COLOURS, None))


def agreement(said: Sequence[Hashable], true: Sequence[Hashable], asked: Sequence[Hashable] | None = None) -> Level:
    """How often an answer equals what is true at another place, on average over the answers.

    Args:
        said, true: what was said and what is true at each place.
        asked: what was asked at each place; an answer is held against places where the same was asked, and passed
            over where there is none. By default all places ask the same.
    """
    shares = []
    asked = asked or [None] * len(said)
    for question in set(asked):
        here = [(one, other) for one, other, what in zip(said, true, asked, strict=True) if what == question]
        counted = Counter(other for _, other in here)
        if len(here) > 1:
            shares += [(counted[one] - (one == other)) / (len(here) - 1) for one, other in here]
    return _share(sum(shares), len(shares))


def describing(
    scenes: Sequence[Scene], texts: Sequence[str], shown: Sequence[int | None] | None = None
) -> dict[str, Level]:
    """What descriptions score on average over all pictures but their own.

    Args:
        scenes: the facts of I pictures.
        texts: what was said about each, I answers.
        shown: which of the pictures was really shown for each answer, if one was; it is left out, too.

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
    mentioned = _counts([[kind for kind, _ in m.things] for m in said], KINDS)
    absent = 1 - np.minimum(_counts([[t.kind for t in scene.things] for scene in scenes], KINDS), 1)
    wrong = _wrong(len(scenes), shown)  # (I answers, I pictures), like all below
    asked = wrong & near.any(axis=1)  # a picture without any near thing says nothing about them
    right = (named @ near.T)[asked].sum()
    invented = (mentioned @ absent.T)[wrong]
    settings = np.array([[m.setting == scene.setting for scene in scenes] for m in said])
    return {
        "precision": _share(right, right + (named @ (1 - true).T)[asked].sum()),
        "recall": _share(right, (asked * near.sum(axis=1)).sum()),
        "setting": _share(settings[wrong].sum(), wrong.sum()),
        "chair_i": _share(invented.sum(), (wrong * mentioned.sum(axis=1, keepdims=True)).sum()),
        "chair_s": _share((invented > 0).sum(), wrong.sum()),
    }


def _wrong(pictures: int, shown: Sequence[int | None] | None) -> np.ndarray:
    """Which picture is the wrong one for which answer: neither its own nor the one that was shown."""
    wrong = ~np.eye(pictures, dtype=bool)
    for answer, picture in enumerate(shown or ()):
        if picture is not None and picture < pictures:  # behind them lies the grey one
            wrong[answer, picture] = False
    return wrong


def _counts(rows: Sequence[Sequence[Hashable]], names: Sequence[Hashable]) -> np.ndarray:
    """How often each name stands in a row: (I, K)."""
    return np.array([[row.count(name) for name in names] for row in map(list, rows)])


def _share(count: float, of: float) -> Level:
    return round(float(count / of), 5) if of else None
