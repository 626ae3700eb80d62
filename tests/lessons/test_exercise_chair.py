"""The exercise of notebook 05: a right CHAIR passes, and each typical wrong one gets a message of its own."""

import pytest
from lessons.exercises.chair import MENTIONED, PRESENT, WRONG_I, WRONG_S, chair_i, chair_s
from lessons.exercises.checking import verdict

from minivlm import evaluation
from minivlm.evaluation import score_descriptions
from minivlm.scenes.facts import Scene, Thing
from minivlm.scenes.language import noun_phrase


def by_hand(mentioned, present):
    """A right answer, written as a reader would."""
    invented = mentions = wrong_answers = 0
    for named, there in zip(mentioned, present, strict=True):
        kinds = {kind for kind, _ in there}
        untrue = [kind for kind, _ in named if kind not in kinds]
        invented += len(untrue)
        mentions += len(named)
        wrong_answers += len(untrue) > 0
    return invented / max(1, mentions), wrong_answers / len(mentioned)


def test_a_right_answer():
    assert verdict("chair", by_hand) == "Right."
    assert verdict("chair", lambda m, p: list(by_hand(m, p))) == "Right."


def test_the_measures_by_hand():
    # invented: dog, house, house, dancer in the third, cat, cat in the fourth; 3 + 1 + 6 + 3 + 2 + 1 + 2 mentions
    assert by_hand(MENTIONED, PRESENT) == (6 / 18, 2 / 7)
    assert (chair_i(MENTIONED, PRESENT), chair_s(MENTIONED, PRESENT)) == (6 / 18, 2 / 7)


def test_the_right_answer_is_the_packages_own():
    scenes, texts = [], []
    for named, there in zip(MENTIONED, PRESENT, strict=True):
        things = tuple(Thing(kind, colour, "left", "near", "medium") for kind, colour in there)
        scenes.append(Scene("park", things, 0))
        texts.append(" ".join(f"There is {noun_phrase(kind, colour, 'en')}." for kind, colour in named))
    scored = score_descriptions(scenes, texts, "en")
    counted = [(scored[name]["numerator"], scored[name]["denominator"]) for name in ("chair_i", "chair_s")]
    assert counted == [(6, 18), (2, 7)]


def test_no_two_formulas_agree():
    """Otherwise a mistake would get the message of another one."""
    for right, wrong in ((chair_i, WRONG_I), (chair_s, WRONG_S)):
        values = [right(MENTIONED, PRESENT), *(formula(MENTIONED, PRESENT) for formula, _ in wrong)]
        assert len({round(value, 5) for value in values}) == len(values), values
    assert len({message for _, message in (*WRONG_I, *WRONG_S)}) == len(WRONG_I) + len(WRONG_S)


@pytest.mark.parametrize(("formula", "message"), WRONG_I)
def test_each_wrong_chair_i_gets_its_own_message(formula, message):
    assert verdict("chair", lambda m, p: (formula(m, p), chair_s(m, p))) == f"Not yet: your CHAIR_i {message}"


@pytest.mark.parametrize(("formula", "message"), WRONG_S)
def test_each_wrong_chair_s_gets_its_own_message(formula, message):
    assert verdict("chair", lambda m, p: (chair_i(m, p), formula(m, p))) == f"Not yet: your CHAIR_s {message}"


def divides_by_zero(mentioned, present):
    invented = sum(kind not in {k for k, _ in p} for m, p in zip(mentioned, present, strict=True) for kind, _ in m)
    return invented / sum(map(len, mentioned)), chair_s(mentioned, present)


def skips_the_silent(mentioned, present):
    pairs = [(m, p) for m, p in zip(mentioned, present, strict=True) if m]
    return chair_i(mentioned, present), sum(chair_s([m], [p]) for m, p in pairs) / max(1, len(pairs))


WRONG = {
    "divides by zero": (divides_by_zero, "your function divides by zero. Such an answer adds no mention"),
    "skips the silent": (skips_the_silent, "your CHAIR_s is right until an answer names nothing"),
    "the other way round": (lambda m, p: by_hand(m, p)[::-1], "CHAIR_i comes first"),
    "percent": (lambda m, p: tuple(100 * v for v in by_hand(m, p)), "give shares between 0 and 1"),
    "nothing": (lambda m, p: None, "returns nothing"),
    "one number": (lambda m, p: by_hand(m, p)[0], "give two numbers"),
    "something else": (lambda m, p: (0.1, 0.2), "your CHAIR_i is 0.100, but for these 7 answers it is 0.333"),
    "an error": (lambda m, p: m.keys(), "your function raised AttributeError"),
    "the package's own": (lambda m, p: evaluation.score_descriptions([], [], "en"), "own score_descriptions"),
    "the package's own, by its name": (score_descriptions, "own score_descriptions"),
}


@pytest.mark.parametrize(("answer", "message"), WRONG.values(), ids=WRONG)
def test_each_wrong_answer_gets_its_own_message(answer, message):
    output = verdict("chair", answer)
    assert output.startswith("Not yet: ") and message in output
