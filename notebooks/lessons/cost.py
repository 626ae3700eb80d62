"""What a run costs, known before it starts: samples, tokens, arithmetic, memory, hours. Letters as in `config.py`.

Arithmetic is counted from the config: two operations (a product and a sum) per weight and token, as everybody counts
(Kaplan and others, arXiv:2001.08361, section 2.1), with attention's own products added. Memory is counted, too; only
what a step keeps for its way back is measured, on one row and on two. Hours come from a few real steps on the device at
hand.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from minivlm.config import IGNORE_INDEX, MiniVLMConfig, Stage
from minivlm.model import MiniVLMForConditionalGeneration, set_trainable
from minivlm.processor import Example, MiniVLMProcessor
from minivlm.runtime.precision import Engine, give_back_memory
from minivlm.train import adamw, supervised_loss

PARTS = ("encoder", "W", "language model, forward", "language model, backward", "head")


@dataclass(frozen=True)
class Length:
    """A typical row: tokens in all (T, one picture's N among them), and how many of them are learnt."""

    tokens: int
    learnt: int


# Our assumption for MiniMind-V's data, of which we know only that every row is padded to 640 and 1,536 tokens there;
# `minivlm data check` counts yours.
LENGTHS = {"pretrain": Length(250, 40), "sft": Length(400, 180)}


def flops(config: MiniVLMConfig, stage: Stage, length: Length, asked: int | None = None) -> dict[str, int]:
    """Floating-point operations of one training row with one picture, part by part (`PARTS`).

    A weight that learns costs three products for each token: forward, for what lies below, for itself. A frozen one on
    the gradient's way to W costs two. The encoder lies on nobody's way and costs one.

    Args:
        config: the model's.
        stage: what learns.
        length: of the row.
        asked: at how many places the last layer's output is computed (`engine.LastLayer`); None: at all.
    """
    vision, text = config.vision_config, config.text_config
    dv, dl, n, tokens = config.vision_width, config.language_width, config.num_image_tokens, length.tokens
    learns = "language_model" in stage.trains
    seen = n + 1  # with the class token
    block = 2 * seen * (4 * dv * dv + 2 * dv * vision.intermediate_size) + 4 * seen * seen * dv
    encoder = vision.num_hidden_layers * block + 2 * n * dv * vision.num_channels * vision.patch_size**2
    heads = text.num_attention_heads * text.head_dim
    shared = text.num_key_value_heads * text.head_dim
    wanted = (text.num_hidden_layers - 1) * tokens + (tokens if asked is None else asked)  # places, over all layers
    weights = 2 * dl * wanted * (2 * heads + 3 * text.intermediate_size)
    weights += 2 * dl * text.num_hidden_layers * tokens * 2 * shared  # keys and values
    attention = 4 * wanted * tokens * heads
    head = 2 * length.learnt * dl * text.vocab_size
    return {
        "encoder": encoder,
        "W": 2 * n * dv * dl * 2,
        "language model, forward": weights + attention,
        "language model, backward": weights * (2 if learns else 1) + 2 * attention,
        "head": head * (3 if learns else 2),
    }


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step: what lies there all the time, and what a step keeps for its way back."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it; what a product needs for a moment is not counted."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(
    model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, stage: Stage, length: Length, precision: str
) -> Memory:
    """What a step of `stage.batch_size` such rows will take: counted, and measured on one row and on two.

    AdamW keeps two numbers for each weight that learns. Leaves the model's weights as they were.
    """
    set_trainable(model, stage)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    copied = 2 if precision == "bf16" else 0  # bytes of a weight in the engine's working copy, and of its gradient
    one, two = (
        kept_bytes(model, on_device(model, processor.collate([probe_row(model.config, length)] * rows)), precision)
        for rows in (1, 2)
    )
    return Memory(
        weights=sum(p.numel() * (p.element_size() + copied) for p in model.parameters()),
        gradients=(4 + copied) * trained,
        optimizer=8 * trained,
        # what is kept once for all rows counts once
        activations=one + (stage.batch_size - 1) * (two - one),
    )


def kept_bytes(model: MiniVLMForConditionalGeneration, batch: dict[str, torch.Tensor], precision: str) -> int:
    """The bytes that a training step keeps from its way forward for its way back, weights and inputs apart."""
    worker = Engine(model, precision).model
    kept = kept_by(lambda: supervised_loss(worker, batch), (*worker.parameters(), *batch.values()))
    give_back_memory()
    return kept


def kept_by(forward: Callable[[], torch.Tensor], own: Iterable[torch.Tensor]) -> int:
    """The bytes that a computation keeps for its gradients, those of its `own` tensors apart; nothing counts twice."""
    given = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, torch.UntypedStorage] = {}  # the storage itself is held, so that no address is used again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage
        return tensor.detach()  # kept as it is, a result would hold the step that made it, and that step the result

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


@dataclass(frozen=True)
class Probe:
    """A few real steps: seconds of each, and the loss per learnt token before each."""

    rows: int
    seconds: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def rows_per_second(self) -> float:
        """By the median step; the first, in which everything warms up, is left out where there are more."""
        return self.rows / statistics.median(self.seconds[1:] or self.seconds)


def probe(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    stage: Stage,
    length: Length,
    precision: str,
    rows: int | None = None,
    steps: int = 3,
) -> Probe:
    """Take real optimizer steps on made-up rows of the length, with one made-up picture each. The weights move.

    The encoder runs in every step, as it does in `train` without a feature cache.

    Args:
        rows: of a step. By default the stage's batch; on a CPU, which one row keeps busy, a single one.
    """
    if rows is None:
        rows = 1 if model.device.type == "cpu" else stage.batch_size
    set_trainable(model, stage)
    optimizer = adamw(model, stage)
    for group in optimizer.param_groups:
        group["lr"] = stage.learning_rates[group["part"]]
    batch = on_device(model, processor.collate([probe_row(model.config, length, seed) for seed in range(rows)]))
    learnt, seconds, losses = int((batch["labels"] != IGNORE_INDEX).sum()), [], []
    engine = Engine(model, precision)
    for _ in range(steps):
        began = time.perf_counter()
        loss = supervised_loss(engine.model, batch) / learnt
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        engine.refresh()
        losses.append(loss.item())  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    model.zero_grad()
    del optimizer, batch, engine
    give_back_memory()
    return Probe(rows, tuple(seconds), tuple(losses))


def probe_row(config: MiniVLMConfig, length: Length, seed: int = 0) -> Example:
    """A row of random ids and one grey picture; what is learnt stands at the end.

    Raises:
        ValueError: there is no room in it for the picture and what is learnt.
    """
    n, room = config.num_image_tokens, length.tokens - config.num_image_tokens - length.learnt
    if room < 1 or length.learnt < 1:
        raise ValueError(f"{length.tokens} tokens hold no picture of {n} and {length.learnt} learnt ones; give more")
    random = torch.Generator().manual_seed(seed)
    words = torch.randint(
        3, min(config.text_config.vocab_size, config.image_token_id), (length.tokens,), generator=random
    )
    ids = words.tolist()
    ids[1 : 1 + n] = [config.image_token_id] * n
    labels = [IGNORE_INDEX] * (length.tokens - length.learnt) + ids[-length.learnt :]
    side = config.vision_config.image_size
    return Example(ids, labels, [Image.new("RGB", (side, side), "grey")], "a made-up row")


@dataclass(frozen=True)
class Bill:
    """A whole stage: what it takes in, what it computes, how long that takes at a speed measured here."""

    samples: int
    tokens: int
    flops: int
    hours: float


def bill(config: MiniVLMConfig, stage: Stage, length: Length, rows_per_second: float) -> Bill:
    """All steps of a stage with rows of a length."""
    samples = stage.steps * stage.batch_size * stage.accumulation
    return Bill(
        samples=samples,
        tokens=samples * length.tokens,
        flops=samples * sum(flops(config, stage, length).values()),
        hours=samples / rows_per_second / 3600,
    )


def on_device(model: MiniVLMForConditionalGeneration, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch where the model is."""
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def as_lines(bills: Sequence[tuple[str, Bill]]) -> list[str]:
    """A small table in plain text."""
    head = f"{'':<10}{'samples':>12}{'tokens':>16}{'operations':>14}{'hours here':>12}"
    rows = [f"{name:<10}{b.samples:>12,}{b.tokens:>16,}{b.flops:>14.2e}{b.hours:>12.1f}" for name, b in bills]
    return [head, *rows]
