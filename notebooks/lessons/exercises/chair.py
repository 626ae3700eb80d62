"""Exercise of notebook 05: CHAIR, the two measures of invented things."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from lessons.exercises.checking import Wrong, called, exercise, forbidden
from minivlm.evaluation import score_descriptions

Pair = tuple[str, str | None]  # a kind and its colour, as `read_facts` gives them
Answers, Pictures = Sequence[Sequence[Pair]], Sequence[Sequence[Pair]]
Formula = Callable[[Answers, Pictures], float]

# Chosen so that no two of the formulas below agree on them.
PRESENT: Pictures = [
    [("dog", "red"), ("boat", "white")],
    [("panda", None)],
    [("cat", "pink"), ("tree", "green"), ("car", "blue"), ("kite", "red")],
    [("bird", "white"), ("house", "red")],
    [("astronaut", "white"), ("rocket", "red")],
    [("flower", "pink"), ("balloon", "blue")],
    [("reader", "blue"), ("tree", "green"), ("bicycle", "pink")],
]
MENTIONED: Answers = [
    [("dog", "blue"), ("boat", "white"), ("boat", "white")],  # a wrong colour, and one thing named twice
    [("panda", None)],
    [("car", "blue"), ("dog", "red"), ("house", "pink"), ("house", "pink"), ("dancer", "red"), ("tree", "green")],
    [("bird", "white"), ("cat", "red"), ("cat", "red")],
    [("astronaut", "white"), ("rocket", "red")],
    [("flower", "pink")],
    [("tree", "green"), ("reader", "blue")],
]
SILENT = [()]  # an answer that names nothing


def _kinds(pairs: Sequence[Pair]) -> list[str]:
    return [kind for kind, _ in pairs]


def _invented(said: Sequence[Pair], there: Sequence[Pair]) -> list[str]:
    return [kind for kind in _kinds(said) if kind not in _kinds(there)]


def _share(counts: Sequence[tuple[float, float]]) -> float:
    """The ratio of two sums; 0 where nothing was counted."""
    count, of = (sum(column) for column in zip(*counts, strict=True))
    return count / of if of else 0.0


def chair_i(mentioned: Answers, present: Pictures) -> float:
    """Of all mentions in all answers, the share whose kind is not in the picture."""
    return _share([(len(_invented(m, p)), len(m)) for m, p in zip(mentioned, present, strict=True)])


def chair_s(mentioned: Answers, present: Pictures) -> float:
    """The share of answers with at least one invented kind."""
    return _share([(bool(_invented(m, p)), 1) for m, p in zip(mentioned, present, strict=True)])


def _each(mentioned: Answers, present: Pictures) -> list[float]:
    """CHAIR_i of each answer by itself."""
    return [chair_i([m], [p]) for m, p in zip(mentioned, present, strict=True)]


def _colours_too(mentioned: Answers, present: Pictures) -> float:
    return _share([(sum(t not in p for t in m), len(m)) for m, p in zip(mentioned, present, strict=True)])


def _sets(mentioned: Answers, present: Pictures) -> float:
    counts = [(set(_invented(m, p)), set(_kinds(m))) for m, p in zip(mentioned, present, strict=True)]
    return _share([(len(invented), len(said)) for invented, said in counts])


def _pooled(mentioned: Answers, present: Pictures) -> float:
    anywhere = [pair for there in present for pair in there]
    return chair_i(mentioned, [anywhere] * len(mentioned))


def _missed(mentioned: Answers, present: Pictures) -> float:
    """The share of present things that are not mentioned."""
    return chair_i(present, mentioned)


# What is typically given for CHAIR_i, and what to say about it.
WRONG_I: tuple[tuple[Formula, str], ...] = (
    (
        lambda m, p: _share([(len(_invented(a, b)), len(b)) for a, b in zip(m, p, strict=True)]),
        "divides by the things in the pictures. It asks how much of what was *said* is untrue: divide by the mentions",
    ),
    (
        _sets,
        "counts a kind once per answer, however often it is named. Every mention counts, above and below the line; "
        "a set drops those that come again",
    ),
    (
        _colours_too,
        "takes a thing of the wrong colour for an invented one. CHAIR looks at kinds alone: a blue dog where there is "
        "a red one is a mistake, but no invention. Compare the first half of each pair",
    ),
    (
        lambda m, p: sum(_each(m, p)) / len(m),
        "is the mean of each answer's own share, so that an answer with one mention weighs as much as one with six. "
        "Add up over all answers first, then divide once",
    ),
    (lambda m, p: 1 - chair_i(m, p), "is the share of mentions that *are* in the picture; CHAIR is the other part"),
    (
        _missed,
        "is the share of the things there that nobody mentioned. That is what recall lacks; what is left out is no "
        "invention. Look at each mention, and ask whether it is in the picture",
    ),
    (
        lambda m, p: 1 - _missed(m, p),
        "is recall: the share of the things there that are mentioned. Look at each mention, and ask whether it is in "
        "the picture",
    ),
    (
        _pooled,
        "looks for a mention in all pictures at once. A thing is invented when it is not in the picture that this "
        "answer is about: go through answers and pictures side by side, with zip",
    ),
    (
        lambda m, p: sum(len(_invented(a, b)) for a, b in zip(m, p, strict=True)) / len(m),
        "divides by the number of answers; that is invented things per answer. Divide by the number of mentions",
    ),
)
WRONG_S: tuple[tuple[Formula, str], ...] = (
    (
        lambda m, p: sum(_each(m, p)) / len(m),
        "is the mean of each answer's CHAIR_i. It asks only whether an answer invents anything: an answer with one "
        "invented thing counts 1, not a third",
    ),
    (
        lambda m, p: sum(bool(_invented(a, b)) for a, b in zip(m, p, strict=True)),
        "is a number of answers; divide by how many there are",
    ),
    (
        lambda m, p: sum(len(_invented(a, b)) for a, b in zip(m, p, strict=True)) / len(m),
        "counts every invented thing. An answer with three counts as much as one with a single one: 1",
    ),
    (
        lambda m, p: _share([(bool(_invented(a, b)), len(a)) for a, b in zip(m, p, strict=True)]),
        "divides by the mentions; it is a share of answers: divide by how many answers there are",
    ),
    (
        lambda m, p: _share([(any(t not in b for t in a), 1) for a, b in zip(m, p, strict=True)]),
        "counts an answer that gets only a colour wrong. CHAIR looks at kinds alone",
    ),
    (lambda m, p: 1 - chair_s(m, p), "is the share of answers that invent *nothing*; CHAIR_s is the other part"),
    (
        lambda m, p: _share([(set(_kinds(a)) != set(_kinds(b)), 1) for a, b in zip(m, p, strict=True)]),
        "counts an answer that leaves something out. Only what is invented makes it count",
    ),
)


@exercise
def chair(answer: Callable[[Answers, Pictures], tuple[float, float]]) -> None:
    """Check `chair(mentioned, present)`, which gives (CHAIR_i, CHAIR_s)."""
    with forbidden(score_descriptions, answer=answer):
        _compare(*_two_numbers(called(answer, MENTIONED, PRESENT)), MENTIONED, PRESENT)
        # an answer that says nothing, among others and alone
        for mentioned, present in (([*MENTIONED, *SILENT], [*PRESENT, PRESENT[0]]), (SILENT, PRESENT[:1])):
            _compare(*_two_numbers(_called_on_silence(answer, mentioned, present)), mentioned, present)


def _called_on_silence(answer: Callable, mentioned: Answers, present: Pictures) -> Any:
    try:
        return called(answer, mentioned, present)
    except Wrong as problem:
        if isinstance(problem.__cause__, ZeroDivisionError):
            raise Wrong(
                "an answer may name nothing at all, and then your function divides by zero. Such an answer adds no "
                "mention and invents nothing; where no answer names anything, CHAIR_i is 0"
            ) from problem
        raise


def _two_numbers(found: Any) -> tuple[float, float]:
    if not isinstance(found, tuple | list) or len(found) != 2 or not all(isinstance(v, int | float) for v in found):
        raise Wrong(f"give two numbers, CHAIR_i and CHAIR_s; this is {found!r}")
    return found[0], found[1]


def _compare(got_i: float, got_s: float, mentioned: Answers, present: Pictures) -> None:
    true_i, true_s = chair_i(mentioned, present), chair_s(mentioned, present)
    if _same(got_i, true_i) and _same(got_s, true_s):
        return
    if _same(got_i, true_s) and _same(got_s, true_i):
        raise Wrong("both numbers are right, but CHAIR_i comes first and CHAIR_s second")
    if _same(got_i, 100 * true_i) and _same(got_s, 100 * true_s):
        raise Wrong("these are percent; give shares between 0 and 1")
    for name, got, true, typical in (("CHAIR_i", got_i, true_i, WRONG_I), ("CHAIR_s", got_s, true_s, WRONG_S)):
        if _same(got, true):
            continue
        for formula, message in typical:
            if _same(got, formula(mentioned, present)):
                raise Wrong(f"your {name} {message}")
        if not all(mentioned):
            raise Wrong(
                f"your {name} is right until an answer names nothing; it is an answer all the same: it counts below "
                "the line of CHAIR_s, and adds nothing to CHAIR_i"
            )
        raise Wrong(
            f"your {name} is {got:.3f}, but for these {len(mentioned)} answers it is {true:.3f}; write down by hand "
            "which mentions are invented, answer by answer, in lessons.exercises.chair.MENTIONED"
        )


def _same(got: float, wanted: float) -> bool:
    return math.isclose(got, wanted, abs_tol=1e-6)
