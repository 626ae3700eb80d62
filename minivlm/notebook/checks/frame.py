"""What all exercises share: how an answer is checked, and how a reader is told what is wrong with it.

An exercise is a function that takes the reader's answer and raises `Wrong` with one message for each typical mistake.
The notebooks call `check`; the tests call the same code with right and wrong answers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from minivlm.notebook.faults import Patch, everywhere

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
        return "Not written yet. The cells below go on with the package's own."
    except Wrong as problem:
        return f"Not yet: {problem}"
    return "Right."


@contextmanager
def forbidden(function: Callable) -> Iterator[None]:
    """Inside the block nobody can call this function of the package: an answer is to be the reader's own.

    Raises:
        Wrong: it was called.
    """

    def refuse(*_, **__):
        raise Wrong(f"this calls the package's own {function.__name__}; write the steps yourself")

    with Patch() as patch:
        everywhere(patch, function, refuse)
        yield


def called(answer: Callable, *arguments: Any) -> Any:
    """Call the reader's function; whatever it raises by itself becomes a message for the reader.

    Raises:
        Wrong: it raised something.
        NotImplementedError: it is still the stub.
    """
    try:
        return answer(*arguments)
    except (Wrong, NotImplementedError):
        raise
    except Exception as error:
        raise Wrong(f"your function raised {type(error).__name__}: {error}") from error
