"""The chance level of answers: how well they agree with unrelated pictures.

A control asks about one picture and shows another, or none. If its answers tell nothing about the picture asked about,
they fit it as well as they fit those that were neither asked about nor shown: what they score there on average is the
chance agreement of Cohen's kappa (Educational and Psychological Measurement 20:37-46, 1960), and the control's interval
should include it. An answer may depend on its question, though: of a kind that is seldom there, *no* is a good guess
without any picture. So yes and no are compared with other pictures about which the same kind was asked. The best guess
lies higher: it is chosen for its score, while answers about another picture are as various as pictures are.

Letters: I pictures; K kinds, or kinds with their colours.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from minivlm.evaluation.questions import POPE_SAMPLINGS, Reply, answer_key, of_sampling, yes_or_no
from minivlm.scenes.facts import COLOURS, KINDS, Scene
from minivlm.scenes.language import Question, read_facts
from minivlm.scenes.vocabulary import QUESTION_TYPES

Level = float | None  # None where nothing was counted
PAIRS = tuple((kind, colour) for kind in KINDS for colour in (*COLOURS, None))


def chance_levels(
    scenes: Sequence[Scene],
    texts: Sequence[str],
    answered: Sequence[Reply],
    pope: Sequence[Reply],
    shown: Sequence[int | None] | None = None,
) -> dict[str, Mapping[str, Level]]:
    """The chance levels of one control's answers: descriptions, replies to the exam's and to POPE's questions.

    Returns:
        "descriptions": as `describing` gives them; "questions": type -> accuracy; "pope": sampling -> accuracy.
    """
    by_type = {type_: [reply for reply in answered if reply.item.group == type_] for type_ in QUESTION_TYPES}
    return {
        "descriptions": describing(scenes, texts, shown),
        "questions": {type_: answering(replies, answer_key) for type_, replies in by_type.items() if replies},
        "pope": {
            sampling: answering(of_sampling(pope, sampling), lambda _, text: yes_or_no(text))
            for sampling in POPE_SAMPLINGS
        },
    }


def answering(replies: Sequence[Reply], key: Callable[[Question, str], Hashable]) -> Level:
    """How often replies are right about the other pictures of the group; yes and no where the same kind was asked.

    `key` says what an answer to a question means, in a form that can be compared.
    """
    questions = [reply.item.question for reply in replies]
    answers = [key(reply.item.question, reply.text) for reply in replies]
    true = [key(question, question.answer) for question in questions]
    kinds = [read_facts(question.text).things[0][0] if question.type == "exists" else None for question in questions]
    return agreement(answers, true, kinds)


def agreement(answers: Sequence[Hashable], true: Sequence[Hashable], asked: Sequence[Hashable] | None = None) -> Level:
    """How often an answer to one picture equals the truth of another, on average over the answers.

    An answer is compared with the pictures of which the same was `asked`, and left out where there is none. By default
    the same is asked of all.
    """
    shares = []
    asked = asked or [None] * len(answers)
    for question in set(asked):
        group = [(one, truth) for one, truth, what in zip(answers, true, asked, strict=True) if what == question]
        counts = Counter(truth for _, truth in group)
        if len(group) > 1:
            shares += [(counts[one] - (one == truth)) / (len(group) - 1) for one, truth in group]
    return _share(sum(shares), len(shares))


def describing(
    scenes: Sequence[Scene], texts: Sequence[str], shown: Sequence[int | None] | None = None
) -> dict[str, Level]:
    """What descriptions score on average over all pictures but their own: their chance level.

    `shown` says which of the pictures was really shown for each answer, if one was; it is left out, too. Precision and
    recall are of kind with colour, over near things; all is counted as by `score_descriptions`.
    """
    answers = [read_facts(text) for text in texts]
    near_things = [[t for t in scene.things if t.distance == "near"] for scene in scenes]
    named = np.minimum(_counts([answer.things for answer in answers], PAIRS), 1)  # (I, K): a set, each pair once
    true, near = (
        np.minimum(_counts([[(t.kind, t.colour) for t in things] for things in pictures], PAIRS), 1)
        for pictures in ([scene.things for scene in scenes], near_things)
    )  # (I, K) each
    mentioned = _counts([[kind for kind, _ in answer.things] for answer in answers], KINDS)
    absent = 1 - np.minimum(_counts([[t.kind for t in scene.things] for scene in scenes], KINDS), 1)
    # which picture (column) is a wrong one for which answer (row): neither its own nor the one that was shown
    wrong = ~np.eye(len(scenes), dtype=bool)
    for answer, picture in enumerate(shown or ()):
        if picture is not None and picture < len(scenes):  # behind them lies the grey one
            wrong[answer, picture] = False
    asked = wrong & near.any(axis=1)  # a picture without any near thing says nothing about them
    right = (named @ near.T)[asked].sum()
    invented = (mentioned @ absent.T)[wrong]
    settings = np.array([[answer.setting == scene.setting for scene in scenes] for answer in answers])
    return {
        "precision": _share(right, right + (named @ (1 - true).T)[asked].sum()),
        "recall": _share(right, (asked * near.sum(axis=1)).sum()),
        "setting": _share(settings[wrong].sum(), wrong.sum()),
        "chair_i": _share(invented.sum(), (wrong * mentioned.sum(axis=1, keepdims=True)).sum()),
        "chair_s": _share((invented > 0).sum(), wrong.sum()),
    }


def _counts(rows: Sequence[Sequence[Hashable]], names: Sequence[Hashable]) -> np.ndarray:
    """How often each name stands in a row: (I, K)."""
    return np.array([[row.count(name) for name in names] for row in map(list, rows)])


def _share(count: float, of: float) -> Level:
    return round(float(count / of), 5) if of else None
