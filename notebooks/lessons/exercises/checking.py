"""What all exercises share: how an answer is checked, and how a reader is told what is wrong with it.

An exercise is a function that takes the reader's answer and raises `Wrong` with one message for each typical mistake.
The notebooks call `check`; the tests call the same code with right and wrong answers.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lessons.faults import Patch, everywhere

Exercise = Callable[[Any], None]
EXERCISES: dict[str, Exercise] = {}


class Wrong(Exception):
    """An answer is wrong; the message tells the reader what, and where to look."""


def exercise(function: Exercise) -> Exercise:
    """Enter the decorated function into `EXERCISES`, under its own name."""
    EXERCISES[function.__name__] = function
    return function


def verdict(name: str, answer: Any) -> str:
    """What there is to say about an answer, in one line that begins with "Right", "Not yet" or "Not written yet".

    Raises:
        ValueError: there is no such exercise.
    """
    if name not in EXERCISES:
        raise ValueError(f"no exercise {name!r}; choose one of {', '.join(EXERCISES)}")
    try:
        EXERCISES[name](answer)
    except NotImplementedError:
        return "Not written yet. The cells below run all the same."
    except Wrong as problem:
        return f"Not yet: {problem}"
    return "Right."


@contextmanager
def forbidden(*functions: Callable, answer: Any = None) -> Iterator[None]:
    """Inside the block nobody can call these functions of the package: an answer is to be the reader's own.

    Args:
        functions: functions, methods or classes of the package.
        answer: the reader's, which must not be one of them.

    Raises:
        Wrong: one was called, even if what that raised was caught, or the answer is one of them.
    """
    uses: list[str] = []

    def refused(function: Callable) -> Callable:
        def refuse(*_, **__):
            uses.append(function.__name__)
            raise Wrong(_own(function.__name__))

        return refuse

    if answer in functions:
        raise Wrong(_own(answer.__name__))
    with Patch() as patch:
        for function in functions:
            owner = function.__qualname__.rpartition(".")[0]
            if owner:  # a method
                patch.setattr(getattr(sys.modules[function.__module__], owner), function.__name__, refused(function))
            else:
                everywhere(patch, function, refused(function))
        try:
            yield
        finally:
            if uses:  # also where the answer caught what was raised
                raise Wrong(_own(uses[0]))


def called(answer: Any, *arguments: Any) -> Any:
    """Call the reader's function; whatever it raises by itself becomes a message for the reader.

    Raises:
        Wrong: it raised something, returns nothing, or is no function.
        NotImplementedError: it is still the stub.
    """
    if not callable(answer):
        raise Wrong(f"give the function itself, without brackets behind its name; this is {type(answer).__name__}")
    try:
        result = answer(*arguments)
    except (Wrong, NotImplementedError):
        raise
    except Exception as error:
        raise Wrong(f"your function raised {type(error).__name__}: {_one_line(error)}") from error
    if result is None:
        raise Wrong("your function returns nothing; end it with `return` and the result")
    return result


def _own(name: str) -> str:
    """What there is to say to an answer that is not the reader's."""
    return f"this calls the package's own {name}; write the steps yourself"


def _one_line(error: Exception) -> str:
    """The beginning of an error's message, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "(no message)"
