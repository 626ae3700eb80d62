"""What notebook A2 shows: where the time of a training step goes, what each variant gains, and the roofline.

Operations and bytes are counted from the calls that torch makes (`cost.Meter`), times are measured here and now.
Letters as in `config.py`.
"""

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from lessons.cost import COPY_CALLS, WORK_KINDS, Length, Meter, Work, flops, kind_of
from lessons.plots import BLUE, GREY, INK, LIGHT_BLUE, ORANGE, note, style
from minivlm.config import IGNORE_INDEX, MiniVLMConfig, Stage
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.runtime import WorkingCopy, give_back_memory
from minivlm.runtime.attention import LEAN

SHAPES = {  # a marker for each kind of work on the roofline, so that each can be told without its colour
    "large product": "s",
    "attention's products": "D",
    "softmax": "^",
    "norm": "v",
    "SiLU · mul": "o",
}
DOT_LOOKS = {"32 bits": (INK, INK), "16 bits": (BLUE, BLUE), "16 bits, compiled": (ORANGE, "white")}  # edge, face


# What the old recipe computes, and what is needed


def loss_everywhere(model: MiniVLMForConditionalGeneration, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`supervised_loss` as the old recipe computes it: with logits at every position, most of them unsupervised."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits  # (B, T, V), all of them
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, T) what comes next
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


@dataclass(frozen=True)
class Waste:
    """What can be left out of a step without a change to its result."""

    padded: int | None = None  # a fixed length, or None
    everywhere: bool = False  # logits at every position
    encoder: bool = False  # run again in every step


def operations(config: MiniVLMConfig, stage: Stage, length: Length, waste: Waste) -> dict[str, int]:
    """`cost.flops` of an example with what is wasted on it, part by part.

    Raises:
        ValueError: the example does not fit into the padded length.
    """
    tokens = waste.padded or length.tokens
    if tokens < length.tokens:
        raise ValueError(f"{length.tokens} tokens do not fit into {tokens}")
    parts = flops(config, stage, Length(tokens, tokens if waste.everywhere else length.supervised))
    return parts if waste.encoder else parts | {"encoder": 0}


def operations_of(
    config: MiniVLMConfig, stage: Stage, batches: Sequence[Mapping[str, torch.Tensor]], everywhere: bool = False
) -> int:
    """Operations of one example, the mean over these batches as they are, with their padding.

    Args:
        everywhere: logits are computed at every position, not only where some example of the batch is supervised.
    """
    total = 0
    for batch in batches:
        examples, tokens = batch["labels"].shape
        positions = int((batch["labels"] != IGNORE_INDEX).any(dim=0).sum())
        waste = Waste(everywhere=everywhere, encoder="pixel_values" in batch)
        total += examples * sum(operations(config, stage, Length(tokens, positions), waste).values())
    return total // _count(batches)[0]


def left_out(
    config: MiniVLMConfig, stage: Stage, length: Length, waste: Waste, order: Sequence[str]
) -> list[tuple[str, int, float]]:
    """Leave out the named wastes one after the other.

    Returns:
        For each of them (name, operations of an example afterwards, how many times fewer than before it).
    """
    before, steps = sum(operations(config, stage, length, waste).values()), []
    for name in order:
        waste = replace(waste, **{name: Waste.__dataclass_fields__[name].default})
        after = sum(operations(config, stage, length, waste).values())
        steps.append((name, after, before / after))
        before = after
    return steps


@style()
def strip(parts: Mapping[str, int]) -> Figure:
    """The tokens of an example as a strip, cut into its parts, to scale."""
    looks = ((BLUE, ""), (INK, ""), (ORANGE, ""), ("#F1F0EE", "///"))
    figure = Figure(figsize=(10.5, 1.75))
    axes = figure.add_axes((0.01, 0.3, 0.98, 0.36))
    start = 0
    for number, ((name, count), (colour, pattern)) in enumerate(zip(parts.items(), looks, strict=True)):
        axes.barh(0, count, left=start, color=colour, hatch=pattern, edgecolor="white" if not pattern else GREY)
        side, align = (1, "bottom") if number % 2 == 0 else (-1, "top")  # above and below in turn
        at = (start + count / 2, 0.4 * side)
        note(axes, f"{name}: {count:,}", at, (0, 7 * side), ha="center", va=align, fontweight="bold")
        start += count
    axes.set(xlim=(0, start), ylim=(-0.4, 0.4))
    axes.axis("off")
    return figure


# Variants of a step, measured in turn


@dataclass(frozen=True)
class StepVariant:
    """A variant of a step: how it computes the gradient of the same examples.

    Attributes:
        title: for tables and figures.
        copy: what computes.
        loss: of the model and a batch, the sum over its supervised tokens.
        batches: the examples, in one batch or in several.
        operations: of an example, as counted.
    """

    title: str
    copy: WorkingCopy
    loss: Callable[[nn.Module, Mapping[str, torch.Tensor]], torch.Tensor]
    batches: Sequence[Mapping[str, torch.Tensor]]
    operations: int


@dataclass(frozen=True)
class Timing:
    """What was measured of a variant: operations and best time of an example, and the loss per supervised token."""

    title: str
    operations: int
    seconds: float
    loss: float


def with_our_attention(model: MiniVLMForConditionalGeneration, precision: str) -> WorkingCopy:
    """A working copy without an encoder, with the attention of our own also in 32 bits."""
    copy = WorkingCopy(model, precision, encoder=False)
    copy.model.language_model.set_attn_implementation(LEAN)
    return copy


def measure(model: MiniVLMForConditionalGeneration, variants: Sequence[StepVariant], rounds: int) -> list[Timing]:
    """Run all variants in turn, and keep the best time of each. Gradients are dropped, weights stay.

    Whatever slows a machine for a moment slows one turn, not one variant.
    """
    seconds: dict[str, list[float]] = {variant.title: [] for variant in variants}
    losses: dict[str, float] = {}
    with tqdm(total=rounds * len(variants), desc="in turn", leave=False) as bar:
        for _ in range(rounds):
            for variant in variants:
                turn, loss = _forward_and_back(model, variant)
                examples, supervised = _count(variant.batches)
                seconds[variant.title].append(turn / examples)
                losses[variant.title] = loss / supervised
                bar.update()
    give_back_memory()
    return [Timing(one.title, one.operations, min(seconds[one.title]), losses[one.title]) for one in variants]


def _forward_and_back(model: MiniVLMForConditionalGeneration, variant: StepVariant) -> tuple[float, float]:
    """Seconds of a variant's forward and backward pass over all its batches, and the sum of the loss."""
    seconds = total = 0.0
    for batch in variant.batches:
        model.zero_grad()
        give_back_memory()
        began = time.perf_counter()
        loss = variant.loss(variant.copy.model, batch)
        variant.copy.backward(loss)
        total += loss.item()
        seconds += time.perf_counter() - began
    model.zero_grad()
    return seconds, total


def _count(batches: Sequence[Mapping[str, torch.Tensor]]) -> tuple[int, int]:
    """How many examples there are, and how many supervised tokens."""
    examples = sum(len(batch["labels"]) for batch in batches)
    return examples, sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)


def joined(first: Sequence[Timing], second: Sequence[Timing]) -> list[Timing]:
    """Two measurements as one: the last variant of the first is the first of the second.

    Times of the second are scaled so that they agree on it.

    Raises:
        ValueError: it is another variant.
    """
    if first[-1].title != second[0].title:
        raise ValueError(f"{first[-1].title!r} is not {second[0].title!r}: both need the variant between them")
    scale = first[-1].seconds / second[0].seconds
    return [*first, *(replace(timing, seconds=timing.seconds * scale) for timing in second[1:])]


@style()
def timings_figure(timings: Sequence[Timing]) -> Figure:
    """How many times less than the first variant: operations as diamonds, time as dots, one line for each variant."""
    first = timings[0]
    gains = [(first.operations / timing.operations, first.seconds / timing.seconds) for timing in timings]
    least, most = min(map(min, gains)), max(map(max, gains))
    figure = Figure(figsize=(10.5, 0.62 * len(timings) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    for y, (timing, (fewer, faster)) in enumerate(zip(timings, gains, strict=True)):
        axes.plot([fewer, faster], [y, y], color=LIGHT_BLUE, linewidth=5, solid_capstyle="round", zorder=1)
        axes.plot(fewer, y, "D", color="white", markeredgecolor=INK, markersize=8, zorder=3)
        axes.plot(faster, y, "o", color=BLUE, markersize=9, zorder=2)
        text = f"{1e3 * timing.seconds:,.0f} ms, {timing.operations / 1e9:,.0f} billion operations"
        note(axes, text, (max(fewer, faster), y), (12, 0), va="center", fontsize=9)
    axes.set_yticks(range(len(timings)), [timing.title for timing in timings])
    axes.set_xscale("log")
    ticks = [tick for tick in (0.5, 1, 2, 4, 8, 16, 32, 64) if tick <= 1.3 * most]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlim=(0.85 * least, most * most**0.55), ylim=(len(timings) - 0.5, -0.6))
    axes.set_xlabel("how many times less than the old recipe, for one example")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.plot([], [], "D", color="white", markeredgecolor=INK, markersize=8, label="operations, counted")
    axes.plot([], [], "o", color=BLUE, markersize=9, label="time, measured")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


# The roofline: operations a second against operations a byte


def best_seconds(function: Callable, *inputs: torch.Tensor, seconds: float = 0.3) -> float:
    """The best time of a call, of as many as fit into some seconds, three at least; the first is not counted."""
    with torch.no_grad():
        function(*inputs)
        times, until = [], time.perf_counter() + seconds
        while time.perf_counter() < until or len(times) < 3:
            times.append(_seconds(lambda: function(*inputs)))
    return min(times)


def bandwidth(megabytes: float) -> float:
    """Bytes a second, read and written, of a copy of so many megabytes."""
    source = torch.ones(round(megabytes * 1e6) // 4)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(target.copy_, source)


def kinds_of_work(config: MiniVLMConfig, batch: int, tokens: int, dtype: torch.dtype, norm: nn.Module) -> dict:
    """The kinds of work of a step of a Llama, each by itself at its true shape: name -> (function, its inputs).

    Args:
        norm: one of the model's own, in the same dtype.
    """
    text = config.text_config
    heads, groups, width = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    hidden, inner = numbers(batch * tokens, text.hidden_size), text.intermediate_size
    query = numbers(batch, groups, heads // groups * tokens, width)  # queries that share a key lie together
    key, value = numbers(batch, groups, tokens, width), numbers(batch, groups, tokens, width)
    return {
        "large product": (F.linear, (hidden, numbers(inner, text.hidden_size))),
        "attention's products": (attention_products, (query, key, value)),
        "softmax": (partial(F.softmax, dim=-1), (numbers(batch, heads, tokens, tokens),)),
        "norm": (norm, (hidden,)),
        "SiLU · mul": (silu_mul, (numbers(batch * tokens, inner), numbers(batch * tokens, inner))),
    }


def attention_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The two products of attention, without what comes between: (B, G, R, d) and twice (B, G, S, d)."""
    return (query @ key.transpose(2, 3)) @ value


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The middle of a SwiGLU: one half opens the other."""
    return F.silu(gate) * up


@dataclass(frozen=True)
class Dot:
    """A kind of work on the roofline: its name, the variant ("32 bits", …), its work and its best time."""

    kind: str
    variant: str
    work: Work
    seconds: float

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.work.operations / self.seconds


@style()
def roofline(dots: Sequence[Dot], rates: Mapping[str, float], memory: float, cache: float) -> Figure:
    """Operations a second against operations a byte, under the roof of this machine.

    Args:
        dots: the variants of a kind are joined by a line in their order.
        rates: variant -> operations a second of a large product.
        memory, cache: bytes a second, from memory and near the processor.
    """
    least = min(dot.work.intensity for dot in dots) / 2
    most = 3 * max(dot.work.intensity for dot in dots)
    figure = Figure(figsize=(10.5, 6.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", xlim=(least, most))
    _roofs(axes, least, most, rates, memory, cache)
    for kind in SHAPES:
        alike = [dot for dot in dots if dot.kind == kind]
        axes.plot([d.work.intensity for d in alike], [d.rate / 1e9 for d in alike], color=GREY, zorder=3)
        for dot in alike:
            edge, face = DOT_LOOKS[dot.variant]
            look = {"color": face, "markeredgecolor": edge, "markeredgewidth": 1.8, "markersize": 10, "zorder": 4}
            axes.plot(dot.work.intensity, dot.rate / 1e9, SHAPES[kind], **look)
    axes.set_ylim(min(dot.rate for dot in dots) / 2.5e9, 2.5 * max(rates.values()) / 1e9)
    axes.set_xlabel("operations for each byte that is moved")
    axes.set_ylabel("billions of operations a second")
    axes.grid(color="#EEEEEE")
    _roofline_legend(axes, {dot.variant for dot in dots})
    return figure


def _roofs(axes: Axes, least: float, most: float, rates: Mapping[str, float], memory: float, cache: float) -> None:
    """The slopes, as far as the highest flat roof, and the flat roofs from where memory could feed them."""
    highest = max(rates.values())
    x, y = [least, highest / memory, most], [least * memory / 1e9, highest / 1e9, highest / 1e9]
    axes.fill_between(x, y, color="#F4F3F0", zorder=0)
    # one name stands before its line, the other behind
    for speed, line, name, shift, align in ((memory, "-", "memory", 12, "left"), (cache, "--", "cache", -12, "right")):
        axes.plot(
            [least, highest / speed], [least * speed / 1e9, highest / 1e9], line, color=GREY, linewidth=2.5, zorder=1
        )
        text, at = f"{name}: {speed / 1e9:.0f} GB a second", (3, 3 * speed / 1e9)
        note(axes, text, at, (shift, 0), ha=align, va="center", fontsize=9)
    for variant, rate in rates.items():
        colour = DOT_LOOKS[variant][0]
        axes.plot([rate / cache, most], [rate / 1e9] * 2, color=colour, linewidth=2.5, zorder=1)
        shift, align = (9, "bottom") if rate == highest else (-9, "top")  # so that the names never meet
        text, at = f"products, {variant}: {rate / 1e9:,.0f}", (most, rate / 1e9)
        note(axes, text, at, (-4, shift), ha="right", va=align, fontsize=9, color=colour)
    look = {"fontsize": 9, "style": "italic", "transform": axes.get_xaxis_transform()}
    axes.text(highest / memory, 0.02, "◂ memory limits  ", ha="right", **look)
    axes.text(highest / memory, 0.02, "  arithmetic limits ▸", ha="left", **look)
    axes.axvline(highest / memory, color=GREY, linestyle=":", linewidth=1, zorder=0)


def _roofline_legend(axes: Axes, variants: set[str]) -> None:
    """Shapes say the kind of work, filling and colour how it was computed."""
    for kind, shape in SHAPES.items():
        axes.plot([], [], shape, color="#E4E2DE", markeredgecolor=INK, markersize=9, label=kind)
    for variant, (edge, face) in DOT_LOOKS.items():
        if variant in variants:
            axes.plot([], [], "o", color=face, markeredgecolor=edge, markeredgewidth=1.8, markersize=9, label=variant)
    axes.figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)


# One step, call by call


@dataclass(frozen=True)
class Share:
    """What a kind of work has in a step: its work as counted, its seconds as the profiler saw them."""

    work: Work
    seconds: float


def dissect(
    copy: WorkingCopy, loss: Callable[[nn.Module], torch.Tensor], optimizer: torch.optim.Optimizer, times: int = 3
) -> dict[str, Share]:
    """One step's work and time by kind: forward and backward by `WORK_KINDS`, the optimizer, and what is left.

    The step is counted once, and timed by torch's profiler; times are of the fastest, the optimizer's of the median
    one. Weights move by the optimizer's rate.

    Args:
        loss: of the working copy's model.
    """

    def forward_and_back() -> None:
        copy.backward(loss(copy.model))

    def update() -> None:
        optimizer.step()
        copy.refresh()

    give_back_memory()
    with Meter() as meter:
        forward_and_back()
    whole, calls = min((_profiled(forward_and_back) for _ in range(times)), key=lambda pair: pair[0])
    seconds = Counter()
    for name, duration in calls.items():
        if name in meter.names | COPY_CALLS:  # a call that only makes other calls counts as Python
            seconds[kind_of(name)] += duration
    shares = {kind: Share(meter.work[kind], seconds[kind]) for kind in WORK_KINDS}
    give_back_memory()
    update()  # makes room for the optimizer's two numbers, only now: forward and backward have none to spare
    with Meter() as meter:
        update()
    updates = statistics.median(_seconds(update) for _ in range(times))
    shares["the optimizer"] = Share(sum(meter.work.values(), Work()), updates)
    shares["Python, and making calls"] = Share(Work(), max(0.0, whole - sum(seconds.values())))
    optimizer.zero_grad()
    return shares


def _profiled(step: Callable[[], None]) -> tuple[float, dict[str, float]]:
    """Seconds of a step under the profiler, and of each of torch's calls in it, by name."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would announce itself on stderr
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        seconds = _seconds(step)
    events = [event for event in profiler.key_averages() if event.key.startswith("aten::")]
    return seconds, {event.key.removeprefix("aten::"): event.self_cpu_time_total / 1e6 for event in events}


def _seconds(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def as_table(shares: Mapping[str, Share]) -> str:
    """A step's kinds of work in plain text: calls, shares of operations, bytes and time, milliseconds."""
    whole = sum((share.work for share in shares.values()), Work())
    seconds = sum(share.seconds for share in shares.values())
    lines = [f"{'':<26}{'calls':>7}{'of operations':>15}{'of bytes':>10}{'of time':>9}{'ms':>7}"]
    for kind, share in shares.items():
        operations, moved = share.work.operations / whole.operations, share.work.bytes / whole.bytes
        lines.append(
            f"{kind:<26}{share.work.calls:>7,}{operations:>15.1%}{moved:>10.1%}{share.seconds / seconds:>9.1%}"
            f"{1e3 * share.seconds:>7.0f}"
        )
    return "\n".join(lines)


def hours(stage: Stage, seconds_an_example: float, seconds_an_update: float = 0.0) -> float:
    """Hours of a stage's whole schedule."""
    examples = stage.batch_size * stage.accumulation
    return stage.steps * (examples * seconds_an_example + seconds_an_update) / 3600
