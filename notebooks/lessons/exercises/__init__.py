"""Checks of the exercises: `check("replace_placeholders", my_function)` says what is wrong with an answer.

`planted` plants a fault of `lessons.faults`; `segments` divides an example for the exercise of notebook 03.
"""

from typing import Any

from lessons.exercises import chair, parameters, placeholders, unfreezing  # noqa: F401 (each enters its exercise)
from lessons.exercises.checking import verdict
from lessons.exercises.labels import segments
from lessons.faults import planted


def check(exercise: str, answer: Any) -> None:
    """Check the answer to an exercise and print the verdict.

    Raises:
        ValueError: there is no such exercise.
    """
    print(verdict(exercise, answer))
