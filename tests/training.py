"""What the tests of training share: rows of all kinds, features for their images, and a base checkpoint."""

import itertools
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minivlm.checkpoint import load_checkpoint, save_checkpoint
from minivlm.config import IGNORE_INDEX, STAGES, Stage
from minivlm.data.samples import Sample
from minivlm.train import text_probe

IMAGES = 6
META = {"stage": "sft", "seed": 3, "command": "minivlm train", "metrics": {"loss": 1.5}, "text_probe": 2.25}
FEATURES = torch.randn(IMAGES, 4, 16, generator=torch.Generator().manual_seed(3))  # (I, N, Dv) of the tiny config
WORDS = ("a red car", "a green tree", "一只白色的狗", "the dog is left of the boat", "一个红色的气球", "yes")


def stage(name: str, **changes) -> Stage:
    """A stage of six steps of four rows."""
    usual = STAGES["scenes"][name]
    small = {"steps": 6, "batch_size": 4, "accumulation": 1, "warmup_steps": 2}
    return replace(usual, **(small | {"learning_rates": dict.fromkeys(usual.trains, 2e-3)} | changes))


def some_rows(
    count: int = 26, features: torch.Tensor | None = FEATURES, images: Sequence | None = None
) -> list[Sample]:
    """Samples of very different lengths: one image, two images, several turns, and none (every fifth).

    Images are features (I, N, Dv), or the images that are given.
    """
    samples = []
    for i in range(count):
        indices = [] if i % 5 == 4 else [i % IMAGES, (i + 1) % IMAGES] if i % 7 == 3 else [i % IMAGES]
        turns = []
        for turn in range(1 + i % 3):
            parts = [{"type": "image"} if images is None else {"type": "image", "image": images[k]} for k in indices]
            question = {"type": "text", "text": "What is in this picture?"}
            turns.append({"role": "user", "content": [*(parts if turn == 0 else []), question]})
            turns.append({"role": "assistant", "content": ", ".join(WORDS[(i + k) % 6] for k in range(1 + i % 4))})
        known = None if images is not None or features is None or not indices else features[indices]
        samples.append(Sample(turns, f"row {i}", known))
    return samples


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_unharmed(folder: Path, before: dict[str, bytes]) -> None:
    """The folder is unchanged, and nothing was added next to it."""
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    load_checkpoint(folder)


def loss_by_hand(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The mean of -log p(label) over all supervised positions; position t predicts the token at t + 1. In float64."""
    losses = []
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1] - 1):
            label = labels[row, position + 1].item()
            if label != IGNORE_INDEX:
                scores = logits[row, position].double()
                losses.append((scores.exp().sum().log() - scores[label]).item())
    return sum(losses) / len(losses)


def save_base(folder: Path, model, processor) -> Path:
    return save_checkpoint(folder, model, processor, {"stage": "base", "text_probe": text_probe(model, processor)})


def kill_at(function: Callable, at: int | str) -> Callable:
    """The function, but its `at`-th call kills the process, or the call for an existing folder with that ending."""
    calls = itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == at or (isinstance(at, str) and args[0].name.endswith(at) and args[0].exists()):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


def in_a_child(work: Callable[[], None]) -> int:
    """Do something in a forked process; its wait status, `-signal.SIGKILL` if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)  # never back into pytest
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
