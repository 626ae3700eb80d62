"""The order of training samples: which ones make up a step, and which of these go to which process."""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from minivlm.data.samples import Example, Sample

if TYPE_CHECKING:
    from minivlm.processor import MiniVLMProcessor

WINDOW = 4  # steps whose samples are sorted by length together


class SampleOrder:
    """Which examples make up a step: a pure function of the seed and the step.

    Samples come in a random order without repetition until all have been seen, then in another. Those of `WINDOW` steps
    are sorted by length, cut into steps and these shuffled, so that little is padded. `step_size` counts the samples
    of all processes and passes together.
    """

    def __init__(self, samples: Sequence[Sample], processor: "MiniVLMProcessor", step_size: int, seed: int):
        self.samples, self.processor, self.step_size, self.seed = samples, processor, step_size, seed
        self._span = max(1, min(WINDOW, len(samples) // step_size))  # so that a sample does not meet itself
        self._window, self._steps = -1, []

    def __getitem__(self, step: int) -> list[Example]:
        """The examples of a step, counted from 0, the shortest first."""
        window, position = divmod(step, self._span)
        if window != self._window:
            self._window, self._steps = window, self._encode(window)
        return self._steps[position]

    def fingerprint(self) -> str:
        """A hash of the first step's ids and labels, to tell one set of samples from another."""
        return hashlib.sha256(repr([(one.input_ids, one.labels) for one in self[0]]).encode()).hexdigest()

    def _encode(self, window: int) -> list[list[Example]]:
        size = self._span * self.step_size
        samples = (self._sample(position) for position in range(window * size, (window + 1) * size))
        examples = [self.processor.encode(sample) for sample in samples]
        examples.sort(key=lambda example: len(example.input_ids))
        steps = [examples[i : i + self.step_size] for i in range(0, size, self.step_size)]
        return [steps[i] for i in np.random.default_rng(step_seed(self.seed, window)).permutation(self._span)]

    def _sample(self, position: int) -> Sample:
        epoch, index = divmod(position, len(self.samples))
        return self.samples[int(_permutation(len(self.samples), self.seed, epoch)[index])]


@lru_cache(maxsize=2)  # a window can reach into the next epoch
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def shard(examples: list[Example], process: int, processes: int, accumulation: int) -> list[list[Example]]:
    """A process's share of a step, in as many parts as there are passes; no example goes to two processes."""
    mine = examples[process::processes]
    size = math.ceil(len(mine) / accumulation)
    return [mine[i : i + size] for i in range(0, len(mine), size)]


def step_seed(*key: int) -> int:
    """A seed that depends on nothing but these numbers."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])
