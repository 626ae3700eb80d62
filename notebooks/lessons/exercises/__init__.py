"""Checks of the exercises: `check("replace_placeholders", my_function)` says what is wrong, not only that it is."""

from typing import Any

from lessons.exercises import chair, counting, mask, replacement, unfreeze  # noqa: F401 (they enter exercises)
from lessons.exercises.frame import verdict


def check(exercise: str, answer: Any) -> None:
    """Check the answer to an exercise and print what there is to say about it.

    Raises:
        ValueError: there is no such exercise.
    """
    print(verdict(exercise, answer))
