"""What the tests of training share: rows of all kinds, features for their pictures, and a base checkpoint."""

import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from minivlm.checkpoint import save_checkpoint
from minivlm.config import STAGES, Stage
from minivlm.data.features import FeatureCache
from minivlm.data.samples import Sample
from minivlm.train import text_probe, train

PICTURES = 6
WORDS = ("a red car", "a green tree", "一只白色的狗", "the dog is left of the boat", "一个红色的气球", "yes")


def stage(name: str, **changes) -> Stage:
    """A stage of six steps of four rows."""
    usual = STAGES["scenes"][name]
    small = {"steps": 6, "batch_size": 4, "accumulation": 1, "warmup_steps": 2}
    return replace(usual, **(small | {"learning_rates": dict.fromkeys(usual.trains, 2e-3)} | changes))


def some_rows(count: int = 26) -> list[Sample]:
    """Rows of very different lengths: one picture, two pictures, several turns, and none (every fifth)."""
    rows = []
    for i in range(count):
        pictures = [] if i % 5 == 4 else [i % PICTURES, (i + 1) % PICTURES] if i % 7 == 3 else [i % PICTURES]
        turns = []
        for turn in range(1 + i % 3):
            shown = "<image>\n" * len(pictures) if turn == 0 else ""
            turns.append({"role": "user", "content": f"{shown}What is in this picture?"})
            turns.append({"role": "assistant", "content": ", ".join(WORDS[(i + k) % 6] for k in range(1 + i % 4))})
        rows.append(Sample(turns, pictures, f"row {i}"))
    return rows


def some_features(config) -> FeatureCache:
    """Random features of `PICTURES` pictures."""
    random = torch.Generator().manual_seed(3)
    return FeatureCache(torch.randn(PICTURES, config.num_image_tokens, config.vision_width, generator=random))


def save_base(folder: Path, model, processor) -> Path:
    """The model as a base checkpoint."""
    return save_checkpoint(folder, model, processor, {"stage": "base", "text_probe": text_probe(model, processor)})


def die(*_args, **_kwargs) -> None:
    """The end of a process at once, with nothing tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(function: Callable, at: int | str) -> Callable:
    """The function, but its `at`-th call kills the process, or the one for an existing folder with that ending."""
    calls = itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == at or (isinstance(at, str) and args[0].name.endswith(at) and args[0].exists()):
            die()
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


def train_both(model, processor, base: Path, out: Path, **options) -> list[list[dict]]:
    """Both stages from a base; the logs."""
    options = {"features": some_features(model.config), "precision": "fp32"} | options
    first = train(model, processor, some_rows(), stage("pretrain"), out / "pretrain", parent=base, **options)
    second = train(model, processor, some_rows(), stage("sft"), out / "sft", parent=out / "pretrain", **options)
    return [first, second]
