"""What a training run costs: operations, memory and hours before it starts, and a meter for the calls of a real step.

Operations are counted from the config: two (a product and a sum) per weight and token, as everybody counts (Kaplan and
others, arXiv:2001.08361, section 2.1), with attention's own products added. Memory is counted, too; only the activation
memory is measured, on one example and on two. Hours come from a few real steps. Letters as in `config.py`.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from minivlm.config import IGNORE_INDEX, MiniVLMConfig, Stage
from minivlm.data.samples import Example
from minivlm.model import MiniVLMForConditionalGeneration, set_trainable
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime import WorkingCopy, attend, attend_back, give_back_memory
from minivlm.train import adamw, supervised_loss


@dataclass(frozen=True)
class Length:
    """A typical example: tokens in all (T, one image's N among them), and how many of them are supervised."""

    tokens: int
    supervised: int


# Our assumption for MiniMind-V's data, of which we know only that every example is padded to 640 and 1,536 tokens
# there; `minivlm data check` counts yours.
LENGTHS = {"pretrain": Length(250, 40), "sft": Length(400, 180)}


def flops(config: MiniVLMConfig, stage: Stage, length: Length) -> dict[str, int]:
    """Floating-point operations of training on one example with one image, part by part.

    A weight that trains costs three products for each token: forward, for what lies below, for itself. A frozen one
    that the gradient passes on its way to W costs two. The encoder, which no gradient passes, costs one. Logits are
    computed at the supervised positions alone.
    """
    vision, text = config.vision_config, config.text_config
    dv, dl, n, tokens = config.vision_width, config.language_width, config.num_image_tokens, length.tokens
    trains = "language_model" in stage.trains
    patches = n + 1  # with the class token
    block = 2 * patches * (4 * dv * dv + 2 * dv * vision.intermediate_size) + 4 * patches * patches * dv
    encoder = vision.num_hidden_layers * block + 2 * n * dv * vision.num_channels * vision.patch_size**2
    heads = text.num_attention_heads * text.head_dim
    shared = text.num_key_value_heads * text.head_dim
    layer = 2 * heads + 2 * shared + 3 * text.intermediate_size  # queries and output, keys and values, MLP
    weights = 2 * text.num_hidden_layers * tokens * dl * layer
    attention = 4 * text.num_hidden_layers * tokens * tokens * heads
    head = 2 * length.supervised * dl * text.vocab_size
    return {
        "encoder": encoder,
        "W": 2 * n * dv * dl * 2,
        "language model, forward": weights + attention,
        "language model, backward": weights * (2 if trains else 1) + 2 * attention,
        "head": head * (3 if trains else 2),
    }


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step: what lies there all the time, and the activation memory saved for backward."""

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
    """What a step of `stage.batch_size` such examples will take: counted, and measured on one and on two.

    AdamW keeps two numbers for each weight that trains. The model's weights do not change.
    """
    set_trainable(model, stage)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    copied = 2 if precision == "bf16" else 0  # bytes of a weight in the working copy, and of its gradient
    one, two = (
        activation_bytes(
            model, on_device(model, processor.collate([random_example(model.config, length)] * n)), precision
        )
        for n in (1, 2)
    )
    return Memory(
        weights=sum(p.numel() * (p.element_size() + copied) for p in model.parameters()),
        gradients=(4 + copied) * trained,
        optimizer=8 * trained,
        # what is saved once for all examples counts once
        activations=one + (stage.batch_size - 1) * (two - one),
    )


def activation_bytes(model: MiniVLMForConditionalGeneration, batch: dict[str, torch.Tensor], precision: str) -> int:
    """The activation memory that a training step saves for backward, in bytes; weights and inputs do not count."""
    worker = WorkingCopy(model, precision).model
    saved = saved_bytes(lambda: supervised_loss(worker, batch), (*worker.parameters(), *batch.values()))
    give_back_memory()
    return saved


def saved_bytes(forward: Callable[[], torch.Tensor], inputs: Iterable[torch.Tensor]) -> int:
    """The bytes that a computation saves for backward beside its `inputs`; nothing counts twice."""
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    saved: dict[int, torch.UntypedStorage] = {}  # the storage itself is held, so that no address is used again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor.detach()  # kept as it is, a result would hold the step that made it, and that step the result

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in saved.values())


@dataclass(frozen=True)
class TimedSteps:
    """A few real steps: seconds of each, and the loss per supervised token before each."""

    examples: int
    seconds: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def examples_per_second(self) -> float:
        """By the median step; the first, in which everything warms up, is left out where there are more."""
        return self.examples / statistics.median(self.seconds[1:] or self.seconds)


def time_steps(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    stage: Stage,
    length: Length,
    precision: str,
    examples: int | None = None,
    steps: int = 3,
) -> TimedSteps:
    """Take real optimizer steps on random examples of the length, each with a grey image. The weights move.

    The encoder runs in every step, as it does in training without features that were computed before.

    Args:
        examples: of a step. By default the stage's batch; on a CPU, which one example keeps busy, a single one.
    """
    if examples is None:
        examples = 1 if model.device.type == "cpu" else stage.batch_size
    set_trainable(model, stage)
    optimizer = adamw(model, stage)
    for group in optimizer.param_groups:
        group["lr"] = stage.learning_rates[group["part"]]
    batch = on_device(model, processor.collate([random_example(model.config, length, n) for n in range(examples)]))
    supervised, seconds, losses = int((batch["labels"] != IGNORE_INDEX).sum()), [], []
    copy = WorkingCopy(model, precision)
    for _ in range(steps):
        began = time.perf_counter()
        loss = supervised_loss(copy.model, batch) / supervised
        copy.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        copy.refresh()
        losses.append(loss.item())  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    model.zero_grad()
    del optimizer, batch, copy
    give_back_memory()
    return TimedSteps(examples, tuple(seconds), tuple(losses))


def random_example(config: MiniVLMConfig, length: Length, seed: int = 0) -> Example:
    """An example of random ids and one grey image; its last tokens are supervised.

    Raises:
        ValueError: there is no room in it for the image and the supervised tokens.
    """
    n, room = config.num_image_tokens, length.tokens - config.num_image_tokens - length.supervised
    if room < 1 or length.supervised < 1:
        raise ValueError(f"{length.tokens} tokens hold no image of {n} and {length.supervised} supervised; give more")
    random = torch.Generator().manual_seed(seed)
    vocabulary = min(config.text_config.vocab_size, config.image_token_id)
    ids = torch.randint(3, vocabulary, (length.tokens,), generator=random).tolist()
    ids[1 : 1 + n] = [config.image_token_id] * n
    labels = [IGNORE_INDEX] * (length.tokens - length.supervised) + ids[-length.supervised :]
    side = config.vision_config.image_size
    return Example(ids, labels, [Image.new("RGB", (side, side), "grey")], "a random example")


@dataclass(frozen=True)
class Bill:
    """A whole stage: what it takes in, what it computes, how long that takes at a speed measured here."""

    samples: int
    tokens: int
    flops: int
    hours: float


def bill(config: MiniVLMConfig, stage: Stage, length: Length, examples_per_second: float) -> Bill:
    """All steps of a stage with examples of a length."""
    samples = stage.steps * stage.batch_size * stage.accumulation
    return Bill(
        samples=samples,
        tokens=samples * length.tokens,
        flops=samples * sum(flops(config, stage, length).values()),
        hours=samples / examples_per_second / 3600,
    )


def on_device(model: MiniVLMForConditionalGeneration, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch where the model is."""
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def as_lines(bills: Sequence[tuple[str, Bill]]) -> list[str]:
    """A small table in plain text."""
    head = f"{'':<10}{'samples':>12}{'tokens':>16}{'operations':>14}{'hours here':>12}"
    rows = [f"{name:<10}{b.samples:>12,}{b.tokens:>16,}{b.flops:>14.2e}{b.hours:>12.1f}" for name, b in bills]
    return [head, *rows]


# The meter: operations and bytes of every call that torch makes

LARGE, ATTENTION, SINGLE, COPIES = "large products", "attention's products", "number by number", "copies, look-ups"
WORK_KINDS = (LARGE, ATTENTION, SINGLE, COPIES)
LARGE_CALLS = {"mm", "addmm", "linear"}
ATTENTION_CALLS = {"bmm", "baddbmm"}
COPY_CALLS = {
    "_to_copy", "cat", "clone", "copy_", "embedding", "embedding_dense_backward", "fill_", "index", "index_put",
    "index_select", "masked_scatter", "new_zeros", "ones_like", "select_backward", "slice_backward", "stack", "zero_",
    "zeros", "zeros_like",
}  # fmt: skip
WITHOUT_TRAFFIC = {
    "_local_scalar_dense", "_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty",
    "new_empty_strided",
}  # fmt: skip
# what one call does to each number; every other call does one thing to it
STEPS = {"_softmax": 5, "_log_softmax": 5, "_softmax_backward_data": 4, "_log_softmax_backward_data": 3, "silu": 4}
OPENED = {torch.ops.minivlm.attend.default: attend, torch.ops.minivlm.attend_back.default: attend_back}


@dataclass(frozen=True)
class Work:
    """What something computes and what it moves: operations, and bytes read and written."""

    operations: int = 0
    bytes: int = 0
    calls: int = 0

    def __add__(self, other: "Work") -> "Work":
        """Both of them."""
        return Work(self.operations + other.operations, self.bytes + other.bytes, self.calls + other.calls)

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.operations / self.bytes


class Meter(TorchDispatchMode):
    """Counts, while it is entered, the operations and bytes of all calls that torch makes, by kind (`WORK_KINDS`).

    A call reads each of its tensors once and writes its result once. A product counts two operations for each pair of
    numbers that it multiplies, everything else what `STEPS` says for each number. A view moves nothing.

    Attributes:
        work: kind -> `Work`.
        names: of the calls that moved something.
    """

    def __init__(self):
        super().__init__()
        self.work = dict.fromkeys(WORK_KINDS, Work())
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Let the call happen, and count it; of the attention of our own, the calls that it is made of."""
        kwargs = kwargs or {}
        if func in OPENED:
            with self:
                return OPENED[func](*args, **kwargs)
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and name not in WITHOUT_TRAFFIC:
            kind = kind_of(name)
            self.names.add(name)
            self.work[kind] += _work_of(func, name, kind, (args, kwargs), result)
        return result


def kind_of(name: str) -> str:
    """The kind of a call of torch, by its name."""
    if name in LARGE_CALLS:
        return LARGE
    if name in ATTENTION_CALLS:
        return ATTENTION
    return COPIES if name in COPY_CALLS else SINGLE


def _work_of(func, name: str, kind: str, arguments, result) -> Work:
    """One call's work."""
    read, written = ([t for t in tree_leaves(of) if isinstance(t, torch.Tensor)] for of in (arguments, result))
    moved = sum(map(_bytes, read)) + sum(map(_bytes, written))
    if kind in (LARGE, ATTENTION):
        done = flop_registry[func.overloadpacket](*arguments[0], **arguments[1], out_val=result)
    else:
        numbers = max((tensor.numel() for tensor in (*read, *written)), default=0)
        done = 0 if kind == COPIES else STEPS.get(name, 1) * numbers
    return Work(done, moved, 1)


def _bytes(tensor: torch.Tensor) -> int:
    """A tensor's bytes; numbers that a view only repeats count once."""
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride else 1
    return numbers * tensor.element_size()


def measured_work(function: Callable, *inputs: torch.Tensor) -> Work:
    """The work of one call of a function, all kinds together."""
    with torch.no_grad(), Meter() as meter:
        function(*inputs)
    return sum(meter.work.values(), Work())


def in_one_trip(function: Callable, *inputs: torch.Tensor) -> Work:
    """The same operations where nothing between them is written: inputs are read once, the result is written once."""
    with torch.no_grad():
        result = function(*inputs)
    moved = sum(_bytes(tensor) for tensor in tree_leaves((inputs, result)))
    return Work(measured_work(function, *inputs).operations, moved, 1)
