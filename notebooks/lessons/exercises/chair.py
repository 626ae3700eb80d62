"""Exercise of notebook 05: CHAIR, the two measures of invented things."""

import math
from collections.abc import Callable, Sequence

from lessons.exercises.checking import Wrong, called, exercise, forbidden
from minivlm.evaluation import score_descriptions

Mention = tuple[str, str | None]  # a kind and its colour, as `read_facts` gives them
Answers, Truths = Sequence[Sequence[Mention]], Sequence[Sequence[Mention]]
Rate = Callable[[Answers, Truths], float]
Count = Callable[[Sequence[Mention], Sequence[Mention]], float]  # of one answer and its picture

# Chosen so that no two of the formulas below agree on them.
PRESENT: Truths = [
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


def ratio(of: Count, to: Count = lambda named, there: 1) -> Rate:
    """A ratio of two sums over all answers; 0 where nothing was counted."""

    def formula(mentioned: Answers, present: Truths) -> float:
        pairs = list(zip(mentioned, present, strict=True))
        whole = sum(to(named, there) for named, there in pairs)
        return sum(of(named, there) for named, there in pairs) / whole if whole else 0.0

    return formula


def _kinds(pairs: Sequence[Mention]) -> set[str]:
    return {kind for kind, _ in pairs}


def _mentions(named: Sequence[Mention], there: Sequence[Mention]) -> int:
    return len(named)


def _invented(named: Sequence[Mention], there: Sequence[Mention]) -> int:
    return sum(kind not in _kinds(there) for kind, _ in named)


chair_i = ratio(_invented, _mentions)  # of all mentions in all answers, the share whose kind is not in the picture
chair_s = ratio(lambda named, there: _invented(named, there) > 0)  # the share of answers with at least one such kind
mean_of_each = ratio(lambda named, there: chair_i([named], [there]))


def missed(mentioned: Answers, present: Truths) -> float:
    """The share of present things that are not mentioned."""
    return chair_i(present, mentioned)


# What is typically given for CHAIR_i, and what to say about it.
WRONG_I: tuple[tuple[Rate, str], ...] = (
    (
        ratio(_invented, lambda named, there: len(there)),
        "divides by the things in the pictures. It asks how much of what was *said* is untrue: divide by the mentions",
    ),
    (
        ratio(lambda named, there: len(_kinds(named) - _kinds(there)), lambda named, there: len(_kinds(named))),
        "counts a kind once per answer, however often it is named. Every mention counts, above and below the line; "
        "a set drops those that come again",
    ),
    (
        ratio(lambda named, there: sum(pair not in there for pair in named), _mentions),
        "takes a thing of the wrong colour for an invented one. CHAIR looks at kinds alone: a blue dog where there is "
        "a red one is a mistake, but no invention. Compare the first half of each pair",
    ),
    (
        mean_of_each,
        "is the mean of each answer's own share, so that an answer with one mention weighs as much as one with six. "
        "Add up over all answers first, then divide once",
    ),
    (lambda m, p: 1 - chair_i(m, p), "is the share of mentions that *are* in the picture; CHAIR is the other part"),
    (
        missed,
        "is the share of the things there that nobody mentioned. That is what recall lacks; what is left out is no "
        "invention. Look at each mention, and ask whether it is in the picture",
    ),
    (
        lambda m, p: 1 - missed(m, p),
        "is recall: the share of the things there that are mentioned. Look at each mention, and ask whether it is in "
        "the picture",
    ),
    (
        lambda m, p: chair_i(m, [[pair for there in p for pair in there]] * len(m)),
        "looks for a mention in all pictures at once. A thing is invented when it is not in the picture that this "
        "answer is about: go through answers and pictures side by side, with zip",
    ),
    (
        ratio(_invented),
        "divides by the number of answers; that is invented things per answer. Divide by the number of mentions",
    ),
)
WRONG_S: tuple[tuple[Rate, str], ...] = (
    (
        mean_of_each,
        "is the mean of each answer's CHAIR_i. It asks only whether an answer invents anything: an answer with one "
        "invented thing counts 1, not a third",
    ),
    (lambda m, p: chair_s(m, p) * len(m), "is a number of answers; divide by how many there are"),
    (
        ratio(_invented),
        "counts every invented thing. An answer with three counts as much as one with a single one: 1",
    ),
    (
        ratio(lambda named, there: _invented(named, there) > 0, _mentions),
        "divides by the mentions; it is a share of answers: divide by how many answers there are",
    ),
    (
        ratio(lambda named, there: any(pair not in there for pair in named)),
        "counts an answer that gets only a colour wrong. CHAIR looks at kinds alone",
    ),
    (lambda m, p: 1 - chair_s(m, p), "is the share of answers that invent *nothing*; CHAIR_s is the other part"),
    (
        ratio(lambda named, there: _kinds(named) != _kinds(there)),
        "counts an answer that leaves something out. Only what is invented makes it count",
    ),
)


@exercise
def chair(answer: Callable[[Answers, Truths], tuple[float, float]]) -> None:
    """Check `chair(mentioned, present)`, which gives (CHAIR_i, CHAIR_s)."""
    # an answer that says nothing, among others and alone
    silent = (([*MENTIONED, ()], [*PRESENT, PRESENT[0]]), ([()], PRESENT[:1]))
    with forbidden(score_descriptions, answer=answer):
        for mentioned, present in ((MENTIONED, PRESENT), *silent):
            _compare(*_two_numbers(answer, mentioned, present), mentioned, present)


def _two_numbers(answer: Callable, mentioned: Answers, present: Truths) -> tuple[float, float]:
    """What the reader's function gives."""
    try:
        numbers = called(answer, mentioned, present)
    except Wrong as problem:
        if not all(mentioned) and isinstance(problem.__cause__, ZeroDivisionError):
            raise Wrong(
                "an answer may name nothing at all, and then your function divides by zero. Such an answer adds no "
                "mention and invents nothing; where no answer names anything, CHAIR_i is 0"
            ) from problem
        raise
    if (
        not isinstance(numbers, tuple | list)
        or len(numbers) != 2
        or not all(isinstance(v, int | float) for v in numbers)
    ):
        raise Wrong(f"give two numbers, CHAIR_i and CHAIR_s; this is {numbers!r}")
    return numbers[0], numbers[1]


def _compare(got_i: float, got_s: float, mentioned: Answers, present: Truths) -> None:
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
