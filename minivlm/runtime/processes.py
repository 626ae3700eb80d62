"""Several processes on one machine or more, started by torchrun or by accelerate's launcher.

Only the main process reads and writes the folder of a run, and sends the others what lies there: machines need no disk
in common. Of the launcher's settings only the processes and their devices count; accumulation and precision are the
stage's and the run's.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env, reduce

LEAVING = 30  # seconds, after which a process ends without having left its group


class ProcessError(ValueError):
    """These processes cannot work together. The message says what to do."""


def launched() -> int:
    """How many processes the launcher started on all machines; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes() -> PartialState:
    """This process among all: its number, its device, whether it is the main one. The first call waits for the others.

    Raises ProcessError where several were started, but their devices have no way to speak to each other.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    if state.num_processes != launched():
        raise ProcessError(
            f"{launched()} processes were started, but each would train by itself on {state.device}; start one, or set "
            "ACCELERATE_USE_CPU=true"
        )
    return state


@contextmanager
def process_group() -> Iterator[None]:
    """Leave the group of all processes at the end of a block, if it was ever joined, also after an error.

    A process that ends in its group may be aborted, since the group's threads are still at work. The others may have
    died, so they are not waited for; a connection could wait for them, so leaving has a limit.
    """
    try:
        yield
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            leaving = threading.Thread(target=torch.distributed.destroy_process_group, daemon=True)
            leaving.start()
            leaving.join(LEAVING)


def from_main(make: Callable[[], Any]) -> Any:
    """What the main process makes, in every process: picklable, with tensors on the CPU.

    Raises what `make` raises in the main process, and ProcessError in the others.
    """
    result = all_or_none(lambda: make() if processes().is_main_process else None)
    return broadcast_object_list([result])[0]


def all_or_none(work: Callable[[], Any]) -> Any:
    """Work that each process does by itself; its result, once all others are through with theirs.

    Raises what `work` raises here, and ProcessError where it went well here, but not in another process.
    """
    try:
        result = work()
    except Exception as error:
        from_all([str(error) or type(error).__name__])
        raise
    reasons = from_all([""])
    for number, reason in enumerate(reasons):
        if reason:
            name = f"process {number} of {len(reasons)}" if number else "the main process"
            raise ProcessError(f"{name} stopped: {reason}")
    return result


def sum_of_all(mine: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in every process; raises ProcessError where one has stopped."""
    try:
        return reduce(mine, "sum")
    except RuntimeError as error:  # the libraries' own for a connection that was closed, and for one that timed out
        reason = str(error).partition("\n")[0]
        raise ProcessError(
            f"another process stopped, and its own words say why; noticed here as: {reason}. The last checkpoint "
            "is as it was: run the same commands again to go on from there"
        ) from error


def from_all(mine: list) -> list:
    """The lists of all processes as one, those of the main process first; in every process."""
    processes()
    return gather_object(mine)


@contextmanager
def first_interrupt() -> Iterator[threading.Event]:
    """Let the first Ctrl-C only raise a flag, so that it never falls into the middle of a step; a second one stops."""
    interrupt = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield interrupt
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_):
        interrupt.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
