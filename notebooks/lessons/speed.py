"""Notebook A2: where a training step's time goes, what each step of the engine gains, and the roof over it all.

Operations and bytes are counted from the calls that torch makes, times are measured here and now. Letters as in
`config.py`.
"""

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm.auto import tqdm

from lessons.cost import Length, flops
from lessons.plots import BLUE, GREY, INK, ORANGE, style
from minivlm.config import IGNORE_INDEX, MiniVLMConfig, Stage
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.runtime.precision import Engine, attend, attend_back, give_back_memory

PALE = "#A2C8EC"
LARGE, ATTENTION, SINGLE, COPIES = "large products", "attention's products", "number by number", "copies, look-ups"
KINDS = (LARGE, ATTENTION, SINGLE, COPIES)
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
SHAPES = {  # a marker for each kind of work on the roofline, so that none is told by its colour alone
    "large product": "s",
    "attention's products": "D",
    "softmax": "^",
    "norm": "v",
    "SiLU · mul": "o",
}


def working_copy(model: MiniVLMForConditionalGeneration, precision: str, compiled: bool = False) -> Engine:
    """An engine whose copy has no encoder, which takes memory for nothing where the features are known.

    Raises:
        EngineError: compiling failed.
    """
    engine = Engine(model, precision, compiled, encoder=False)
    give_back_memory()
    return engine


# Waste: what a padded row computes, and what anybody needs of it


@dataclass(frozen=True)
class Waste:
    """What can be left out of a step without a change to its result."""

    padded: int | None = None  # a fixed length, or None
    everywhere: bool = False  # logits, and the last layer's output, at every place
    encoder: bool = False  # run again in every step


def operations(config: MiniVLMConfig, stage: Stage, length: Length, waste: Waste) -> dict[str, int]:
    """`cost.flops` of a row with what is wasted on it, part by part.

    Raises:
        ValueError: the row does not fit into the padded length.
    """
    tokens = waste.padded or length.tokens
    if tokens < length.tokens:
        raise ValueError(f"{length.tokens} tokens do not fit into {tokens}")
    asked = tokens if waste.everywhere else length.learnt
    parts = flops(config, stage, Length(tokens, asked), asked)
    return parts if waste.encoder else parts | {"encoder": 0}


def operations_of(
    config: MiniVLMConfig, stage: Stage, batches: Sequence[Mapping[str, torch.Tensor]], everywhere: bool = False
) -> int:
    """Operations of one row, the mean over these batches as they are: with their padding, and the places of all rows.

    Args:
        everywhere: logits, and the last layer's output, are computed at every place, not only from the first where
            some row of the batch learns to the last.
    """
    done = 0
    for batch in batches:
        rows, tokens = batch["labels"].shape
        learnt = (batch["labels"] != IGNORE_INDEX).any(dim=0).nonzero()
        places = int(learnt.max() - learnt.min()) + 1
        waste = Waste(everywhere=everywhere, encoder="pixel_values" in batch)
        done += rows * sum(operations(config, stage, Length(tokens, places), waste).values())
    return done // _count(batches)[0]


def left_out(
    config: MiniVLMConfig, stage: Stage, length: Length, waste: Waste, order: Sequence[str]
) -> list[tuple[str, int, float]]:
    """Leave out the named wastes one after the other.

    Returns:
        For each of them (name, operations of a row afterwards, how many times fewer than before it).
    """
    before, rows = sum(operations(config, stage, length, waste).values()), []
    for name in order:
        waste = replace(waste, **{name: Waste.__dataclass_fields__[name].default})
        after = sum(operations(config, stage, length, waste).values())
        rows.append((name, after, before / after))
        before = after
    return rows


def strip(parts: Mapping[str, int]) -> Figure:
    """A row of tokens as a strip, cut into its parts, to scale."""
    looks = ((BLUE, ""), (INK, ""), (ORANGE, ""), ("#F1F0EE", "///"))
    with style():
        figure = Figure(figsize=(10.5, 1.75))
        axes = figure.add_axes((0.01, 0.3, 0.98, 0.36))
        start = 0
        for place, ((name, count), (colour, pattern)) in enumerate(zip(parts.items(), looks, strict=True)):
            axes.barh(0, count, left=start, color=colour, hatch=pattern, edgecolor="white" if not pattern else GREY)
            above = place % 2 == 0
            axes.annotate(
                f"{name}: {count:,}",
                (start + count / 2, 0.4 if above else -0.4),
                (0, 7 if above else -7),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                fontweight="bold",
            )
            start += count
        axes.set(xlim=(0, start), ylim=(-0.4, 0.4))
        axes.axis("off")
    return figure


# The ladder: passes over the same rows, each way by turns


@dataclass(frozen=True)
class Rung:
    """One way of computing the same rows' gradient.

    Attributes:
        title: for tables and figures.
        engine: what computes.
        loss: of the model and a batch, the sum over its learnt tokens.
        batches: the rows, in one batch or in several.
        operations: of a row, as counted.
    """

    title: str
    engine: Engine
    loss: Callable[[nn.Module, Mapping[str, torch.Tensor]], torch.Tensor]
    batches: Sequence[Mapping[str, torch.Tensor]]
    operations: int


@dataclass(frozen=True)
class Height:
    """What a rung came to: operations and best time of a row, and its loss per learnt token."""

    title: str
    operations: int
    seconds: float
    loss: float


def climb(
    model: MiniVLMForConditionalGeneration, rungs: Sequence[Rung], rounds: int, tidy: bool = False
) -> list[Height]:
    """Take all rungs by turns, there and back again, and keep the best time of each.

    Whatever slows a machine for a moment slows one turn, not one rung. Gradients are dropped, weights stay.

    Args:
        tidy: hand freed memory back before each way back, off the clock: a tenth of a gigabyte less at once.
    """
    seconds: dict[str, list[float]] = {rung.title: [] for rung in rungs}
    losses: dict[str, float] = {}
    with tqdm(total=rounds * len(rungs), desc="by turns", leave=False) as bar:
        for _ in range(rounds):
            for rung in rungs:
                taken, loss = _pass(model, rung, tidy)
                rows, learnt = _count(rung.batches)
                seconds[rung.title].append(taken / rows)
                losses[rung.title] = loss / learnt
                bar.update()
    give_back_memory()
    return [Height(r.title, r.operations, min(seconds[r.title]), losses[r.title]) for r in rungs]


def _pass(model: MiniVLMForConditionalGeneration, rung: Rung, tidy: bool) -> tuple[float, float]:
    """Seconds of a rung's way forward and back over all its batches, and the sum of the loss."""
    taken = total = 0.0
    for batch in rung.batches:
        model.zero_grad()
        give_back_memory()
        began = time.perf_counter()
        loss = rung.loss(rung.engine.model, batch)
        if tidy:
            taken += time.perf_counter() - began
            give_back_memory()
            began = time.perf_counter()
        rung.engine.backward(loss)
        total += loss.item()
        taken += time.perf_counter() - began
    model.zero_grad()
    return taken, total


def _count(batches: Sequence[Mapping[str, torch.Tensor]]) -> tuple[int, int]:
    """How many rows there are, and how many learnt tokens."""
    rows = sum(len(batch["labels"]) for batch in batches)
    return rows, sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)


def joined(first: Sequence[Height], second: Sequence[Height]) -> list[Height]:
    """Two flights of one ladder: the last rung of the first is the first of the second.

    Times of the second are scaled so that they agree on it.

    Raises:
        ValueError: it is another rung.
    """
    if first[-1].title != second[0].title:
        raise ValueError(f"{first[-1].title!r} is not {second[0].title!r}: both flights need the rung between them")
    scale = first[-1].seconds / second[0].seconds
    return [*first, *(replace(height, seconds=height.seconds * scale) for height in second[1:])]


def ladder(heights: Sequence[Height]) -> Figure:
    """How many times less than on the lowest rung: operations as diamonds, time as dots, one line for each rung."""
    lowest = heights[0]
    with style():
        figure = Figure(figsize=(10.5, 0.62 * len(heights) + 1.5), layout="constrained")
        axes = figure.add_subplot()
        for place, height in enumerate(heights):
            fewer, faster = lowest.operations / height.operations, lowest.seconds / height.seconds
            axes.plot([fewer, faster], [place, place], color=PALE, linewidth=5, solid_capstyle="round", zorder=1)
            axes.plot(fewer, place, "D", color="white", markeredgecolor=INK, markersize=8, zorder=3)
            axes.plot(faster, place, "o", color=BLUE, markersize=9, zorder=2)
            text = f"{1e3 * height.seconds:,.0f} ms, {height.operations / 1e9:,.0f} billion operations"
            axes.annotate(
                text, (max(fewer, faster), place), (12, 0), textcoords="offset points", va="center", fontsize=9
            )
        most = max(max(lowest.operations / h.operations, lowest.seconds / h.seconds) for h in heights)
        axes.set_yticks(range(len(heights)), [height.title for height in heights])
        axes.set_xscale("log")
        ticks = [tick for tick in (0.5, 1, 2, 4, 8, 16, 32, 64) if tick <= 1.3 * most]
        axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
        axes.set_xticks([], minor=True)
        left = min(min(lowest.operations / h.operations, lowest.seconds / h.seconds) for h in heights)
        axes.set(xlim=(0.85 * left, most * most**0.55), ylim=(len(heights) - 0.5, -0.6))
        axes.set_xlabel("how many times less than the old recipe, for one row")
        axes.grid(axis="x", color="#E8E8E8")
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.plot([], [], "D", color="white", markeredgecolor=INK, markersize=8, label="operations, counted")
        axes.plot([], [], "o", color=BLUE, markersize=9, label="time, measured")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


# The roof: operations and bytes of every call


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


OPENED = {torch.ops.minivlm.attend.default: attend, torch.ops.minivlm.attend_back.default: attend_back}


class Meter(TorchDispatchMode):
    """Counts, while it is entered, the operations and bytes of all calls that torch makes, by kind (`KINDS`).

    A call reads each of its tensors once and writes its result once. A product counts two operations for each pair
    of numbers that it multiplies, everything else what `STEPS` says for each number. A view moves nothing.

    Attributes:
        work: kind -> `Work`.
        names: of the calls that moved something.
    """

    def __init__(self):
        super().__init__()
        self.work = dict.fromkeys(KINDS, Work())
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Let the call happen, and note it; of the engine's attention, what it is made of."""
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


def _work_of(func, name: str, kind: str, given, result) -> Work:
    """One call's work."""
    read, written = ([t for t in tree_leaves(of) if isinstance(t, torch.Tensor)] for of in (given, result))
    moved = sum(map(_bytes, read)) + sum(map(_bytes, written))
    if kind in (LARGE, ATTENTION):
        done = flop_registry[func.overloadpacket](*given[0], **given[1], out_val=result)
    else:
        numbers = max((tensor.numel() for tensor in (*read, *written)), default=0)
        done = 0 if kind == COPIES else STEPS.get(name, 1) * numbers
    return Work(done, moved, 1)


def _bytes(tensor: torch.Tensor) -> int:
    """The bytes that a tensor stands for; numbers that are only repeated by a view count once."""
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
    """The same operations when nothing between them is written down: inputs are read once, the result written once."""
    with torch.no_grad():
        result = function(*inputs)
    moved = sum(_bytes(tensor) for tensor in tree_leaves((inputs, result)))
    return Work(measured_work(function, *inputs).operations, moved, 1)


def best_seconds(function: Callable, *inputs: torch.Tensor, seconds: float = 0.3) -> float:
    """The best time of a call, of as many as fit into some seconds, three at least; the first is not counted."""
    with torch.no_grad():
        function(*inputs)
        taken, until = [], time.perf_counter() + seconds
        while time.perf_counter() < until or len(taken) < 3:
            began = time.perf_counter()
            function(*inputs)
            taken.append(time.perf_counter() - began)
    return min(taken)


def bandwidth(megabytes: float) -> float:
    """Bytes a second, read and written, of a copy of so many megabytes."""
    source = torch.ones(round(megabytes * 1e6) // 4)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(target.copy_, source)


def kinds_of_work(config: MiniVLMConfig, rows: int, tokens: int, dtype: torch.dtype, norm: nn.Module) -> dict:
    """The kinds of work of a step of a Llama, each by itself at its true shape: name -> (function, its inputs).

    Args:
        norm: one of the model's own, in the same dtype.
    """
    text = config.text_config
    heads, groups, width = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    random = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    hidden, inner = made(rows * tokens, text.hidden_size), text.intermediate_size
    query = made(rows, groups, heads // groups * tokens, width)  # queries that share a key lie together
    key, value = made(rows, groups, tokens, width), made(rows, groups, tokens, width)
    return {
        "large product": (F.linear, (hidden, made(inner, text.hidden_size))),
        "attention's products": (attention_products, (query, key, value)),
        "softmax": (softmax, (made(rows, heads, tokens, tokens),)),
        "norm": (norm, (hidden,)),
        "SiLU · mul": (silu_mul, (made(rows * tokens, inner), made(rows * tokens, inner))),
    }


def attention_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The two products of attention, without what comes between: (B, G, R, d) and twice (B, G, S, d)."""
    return (query @ key.transpose(2, 3)) @ value


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """Scores become shares, along the last axis."""
    return scores.softmax(dim=-1)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The middle of a SwiGLU: one half opens the other."""
    return F.silu(gate) * up


@dataclass(frozen=True)
class Dot:
    """A kind of work on the roofline: its name, how it was computed ("32 bits", …), its work and its best time."""

    kind: str
    way: str
    work: Work
    seconds: float

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.work.operations / self.seconds


LOOKS = {"32 bits": (INK, INK), "16 bits": (BLUE, BLUE), "16 bits, compiled": (ORANGE, "white")}  # edge, face


def roofline(dots: Sequence[Dot], rates: Mapping[str, float], memory: float, cache: float) -> Figure:
    """Operations a second against operations a byte, under the roof of this machine.

    Args:
        dots: what was measured; each kind in several ways, joined by a line in their order.
        rates: way -> operations a second of a large product.
        memory, cache: bytes a second, from memory and near the processor.
    """
    least = min(dot.work.intensity for dot in dots) / 2
    most = 3 * max(dot.work.intensity for dot in dots)
    with style():
        figure = Figure(figsize=(10.5, 6.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xscale="log", yscale="log", xlim=(least, most))
        _roofs(axes, least, most, rates, memory, cache)
        for kind in SHAPES:
            found = [dot for dot in dots if dot.kind == kind]
            axes.plot([d.work.intensity for d in found], [d.rate / 1e9 for d in found], color=GREY, zorder=3)
            for dot in found:
                edge, face = LOOKS[dot.way]
                axes.plot(
                    dot.work.intensity, dot.rate / 1e9, SHAPES[kind], color=face, markeredgecolor=edge,
                    markeredgewidth=1.8, markersize=10, zorder=4,
                )  # fmt: skip
        axes.set_ylim(min(dot.rate for dot in dots) / 2.5e9, 2.5 * max(rates.values()) / 1e9)
        axes.set_xlabel("operations for each byte that is moved")
        axes.set_ylabel("billions of operations a second")
        axes.grid(color="#EEEEEE")
        axes.set_axisbelow(True)
        _roofline_legend(axes, {dot.way for dot in dots})
    return figure


def _roofs(axes: Axes, least: float, most: float, rates: Mapping[str, float], memory: float, cache: float) -> None:
    """The slopes, as far as the highest flat roof, and the flat roofs from where memory could feed them."""
    highest = max(rates.values())
    axes.fill_between(
        [least, highest / memory, most], [least * memory / 1e9, highest / 1e9, highest / 1e9],
        color="#F4F3F0", zorder=0,
    )  # fmt: skip
    for speed, line, name in ((memory, "-", "memory"), (cache, "--", "cache")):
        end = highest / speed
        axes.plot([least, end], [least * speed / 1e9, highest / 1e9], line, color=GREY, linewidth=2.5, zorder=1)
        over = line == "--"  # its name stands before it, the other's behind
        axes.annotate(
            f"{name}: {speed / 1e9:.0f} GB a second", (3, 3 * speed / 1e9), (-12, 0) if over else (12, 0),
            textcoords="offset points", ha="right" if over else "left", va="center", fontsize=9,
        )  # fmt: skip
    for way, rate in rates.items():
        axes.plot([rate / cache, most], [rate / 1e9] * 2, color=LOOKS[way][0], linewidth=2.5, zorder=1)
        above = rate == highest  # the other's name stands below, so that they never meet
        axes.annotate(
            f"products, {way}: {rate / 1e9:,.0f}", (most, rate / 1e9), (-4, 9 if above else -9),
            textcoords="offset points", ha="right", va="bottom" if above else "top", fontsize=9, color=LOOKS[way][0],
        )  # fmt: skip

    for text, side, align in (("memory limits  ", "left", "right"), ("  arithmetic limits", "right", "left")):
        axes.text(
            highest / memory, 0.02, f"◂ {text}" if side == "left" else f"{text} ▸", ha=align, fontsize=9,
            style="italic", transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.axvline(highest / memory, color=GREY, linestyle=":", linewidth=1, zorder=0)


def _roofline_legend(axes: Axes, ways: set[str]) -> None:
    """Shapes say the kind of work, filling and colour how it was computed."""
    for kind, shape in SHAPES.items():
        axes.plot([], [], shape, color="#E4E2DE", markeredgecolor=INK, markersize=9, label=kind)
    for way, (edge, face) in LOOKS.items():
        if way in ways:
            axes.plot([], [], "o", color=face, markeredgecolor=edge, markeredgewidth=1.8, markersize=9, label=way)
    axes.figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)


# Where the rest goes: one step, call by call


@dataclass(frozen=True)
class Share:
    """What a kind of work has in a step: its work as counted, its seconds as the profiler saw them."""

    work: Work
    seconds: float


def dissect(
    engine: Engine, loss: Callable[[nn.Module], torch.Tensor], optimizer: torch.optim.Optimizer, times: int = 3
) -> dict[str, Share]:
    """One step's work and time by kind: forward and back by `KINDS`, the optimizer by itself, and what is left.

    The step is counted once, and watched by torch's profiler; times are of the fastest, the optimizer's of the middle
    one. Weights move by the optimizer's rate.

    Args:
        loss: of the engine's model.
    """

    def forward_and_back() -> None:
        engine.backward(loss(engine.model))

    def update() -> None:
        optimizer.step()
        engine.refresh()

    give_back_memory()
    with Meter() as meter:
        forward_and_back()
    watched = min((_watch(forward_and_back) for _ in range(times)), key=lambda pair: pair[0])
    seconds = Counter()
    for name, taken in watched[1].items():
        if name in meter.names | COPY_CALLS:  # a call that only makes other calls counts as Python
            seconds[kind_of(name)] += taken
    shares = {kind: Share(meter.work[kind], seconds[kind]) for kind in KINDS}
    give_back_memory()
    update()  # makes room for the optimizer's two numbers, only now: forward and back have none to spare
    with Meter() as moved:
        update()
    updates = statistics.median(_seconds(update) for _ in range(times))
    shares["the optimizer"] = Share(sum(moved.work.values(), Work()), updates)
    shares["Python, and making calls"] = Share(Work(), max(0.0, watched[0] - sum(seconds.values())))
    optimizer.zero_grad()
    return shares


def _watch(step: Callable[[], None]) -> tuple[float, dict[str, float]]:
    """Seconds of a step under the profiler, and of each of torch's calls in it, by name."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would announce itself on stderr
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        taken = _seconds(step)
    found = {}
    for event in watched.key_averages():
        if event.key.startswith("aten::"):
            found[event.key.removeprefix("aten::")] = event.self_cpu_time_total / 1e6
    return taken, found


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
        done, moved = share.work.operations / whole.operations, share.work.bytes / whole.bytes
        lines.append(
            f"{kind:<26}{share.work.calls:>7,}{done:>15.1%}{moved:>10.1%}{share.seconds / seconds:>9.1%}"
            f"{1e3 * share.seconds:>7.0f}"
        )
    return "\n".join(lines)


def hours(stage: Stage, seconds_a_row: float, seconds_an_update: float = 0.0) -> float:
    """Hours of a stage's whole schedule."""
    rows = stage.batch_size * stage.accumulation
    return stage.steps * (rows * seconds_a_row + seconds_an_update) / 3600
