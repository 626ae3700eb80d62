"""How fast the engine is, compared with the recipe that this course grew from: same rows, steps taken in turn.

The old recipe (`old_loss`) pads every row to one fixed length, runs the frozen encoder in every step, and computes
logits at every position, on a CPU in float32. The engine (`new_loss`) does what `train` does: rows of similar length
together, padded to the longest; features of the encoder computed before; logits at supervised positions; and 16 bits,
and compiled layers, where these are faster. All begin with the same weights, have the same loss, and take the same
optimizer's steps with the same threads and the library's own attention; only where the engine computes in 16 bits on a
CPU does it have another one (`runtime.attention`). The old recipe also takes its steps in mixed precision, so that the
gain of 16 bits can be separated from the rest. Letters as in `config.py`.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lessons.cost import LENGTHS, Length, flops, random_example, saved_bytes
from matplotlib.figure import Figure
from torch.nn import functional as F

from minivlm.checkpoint import load_checkpoint
from minivlm.config import IGNORE_INDEX, PRESETS, STAGES, Stage
from minivlm.convert.hub import RANDOM, build
from minivlm.data.features import encode
from minivlm.data.order import WINDOW
from minivlm.data.samples import Example
from minivlm.model import MiniVLMForConditionalGeneration, set_trainable
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.files import versions
from minivlm.runtime.paths import BASE, PRETRAIN, SFT, data_folder
from minivlm.runtime.precision import PRECISIONS, WorkingCopy, give_back_memory, why_not_compiled
from minivlm.scenes.samples import SceneSamples
from minivlm.train import PAD_TO, adamw, supervised_loss

# Tokens to which every row is padded: MiniMind-V's for clip-26m; for scenes about as many times the usual row.
PADDED = {"clip-26m": {"pretrain": 640, "sft": 1536}, "scenes": {"pretrain": 256, "sft": 512}}
VARIATION = 0.15  # of random lengths around the typical one, as a share of it
CLEAR_REFS = Path("/proc/self/clear_refs")
PRODUCT, TIMES = 4096, 10  # the matrix product that a machine's rate is measured with


@dataclass(frozen=True)
class Variant:
    """One variant of a training step."""

    old: bool
    precision: str
    compiled: bool = False

    def __str__(self) -> str:
        """For a table."""
        return ("old recipe, " if self.old else "engine, ") + self.precision + (" compiled" if self.compiled else "")


OLD = Variant(True, "fp32")  # as it ran on a CPU
OLD_IN_BF16 = Variant(True, "bf16")  # mixed precision, as it ran on a GPU
NEW = (Variant(False, "fp32"), Variant(False, "bf16"), Variant(False, "fp32", True), Variant(False, "bf16", True))


class Product:
    """The matrix product that a machine's rate is measured with, in one precision; it has warmed up."""

    def __init__(self, precision: str, device: torch.device | str = "cpu", size: int | None = None):
        size = size or PRODUCT
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.one, self.other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        self.operations = 2 * size**3
        self.times: list[float] = []
        self.take()
        self.times.clear()

    def take(self) -> float:
        """Compute it, and note and return the seconds."""
        start = time.perf_counter()
        (self.one @ self.other)[0, 0].item()  # waits for a GPU
        self.times.append(time.perf_counter() - start)
        return self.times[-1]

    @property
    def rate(self) -> float:
        """Operations a second, by the median of all times, which are made ten if they are fewer."""
        while len(self.times) < TIMES:
            self.take()
        return self.operations / statistics.median(self.times)


def matmul_rate(precision: str, device: torch.device | str = "cpu", size: int | None = None) -> float:
    """Operations a second of a warmed-up product of square matrices, `PRODUCT` wide or `size`: the median of ten."""
    return Product(precision, device, size).rate


def bench_rows(config, processor: MiniVLMProcessor, preset: str, name: str, count: int, seed: int = 0) -> list[Example]:
    """Rows of a stage, the shortest first, with grey images.

    Those of scenes are the course's own; for clip-26m they are random, with lengths uniformly around the typical one.
    """
    if preset == "scenes":
        grey = random_example(config, Length(config.num_image_tokens + 2, 1)).images
        rows = [processor.encode(row) for row in SceneSamples(name, count, count, seed)]
        rows = [replace(row, images=grey * len(row.images)) for row in rows]
        return sorted(rows, key=lambda row: len(row.input_ids))
    random, typical, rows = np.random.default_rng(seed), LENGTHS[name], []
    for index in range(count):
        share = 1 + VARIATION * random.uniform(-1, 1)
        supervised = round(typical.supervised * share)
        tokens = max(round(typical.tokens * share), config.num_image_tokens + supervised + 8)
        rows.append(random_example(config, Length(tokens, supervised), seed + index))
    return sorted(rows, key=lambda row: len(row.input_ids))


@dataclass(frozen=True)
class Step:
    """The rows of one step, as both recipes are given them: read, tokenized and on the device before any clock runs."""

    rows: list[Example]
    old: dict[str, torch.Tensor]  # pixel_values, padded to a fixed length
    new: dict[str, torch.Tensor]  # patch_features, padded to the longest

    @property
    def supervised(self) -> int:
        """How many tokens have a label."""
        return sum(label != IGNORE_INDEX for row in self.rows for label in row.labels)


def prepare(
    model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, rows: Sequence[Example], padded: int
) -> Step:
    """Both batches of the same rows."""
    pixels = processor.pixels([image for row in rows for image in row.images])  # (I, 3, H, W)
    features = encode(model, [pixels], len(pixels), title="")  # (I, N, Dv)
    shares = features.split([len(row.images) for row in rows])
    known = [replace(row, images=[], patch_features=share) for row, share in zip(rows, shares, strict=True)]
    device = model.device
    old, new = (
        {name: tensor.to(device) for name, tensor in batch.items()}
        for batch in (
            processor.collate(list(rows), pad_to_multiple_of=padded),
            processor.collate(known, pad_to_multiple_of=PAD_TO),
        )
    )
    return Step(list(rows), old, new)


def loss_everywhere(model: MiniVLMForConditionalGeneration, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What `supervised_loss` computes, by the old recipe: logits at every position, most of them not supervised."""
    inputs = {name: batch[name] for name in batch if name not in ("labels", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits  # (B, T, V), all of them
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, T) what comes next
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def old_loss(model: MiniVLMForConditionalGeneration, step: Step, precision: str = "fp32") -> torch.Tensor:
    """The old recipe's loss, a mean over supervised tokens: fixed padding, encoder in the step, logits everywhere."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return loss_everywhere(model, step.old) / step.supervised


def new_loss(model: MiniVLMForConditionalGeneration, step: Step) -> torch.Tensor:
    """The engine's loss on the same rows, their features known from before: what `train` does in a step."""
    return supervised_loss(model, step.new) / step.supervised


class Stepper:
    """Takes optimizer steps of a stage in one variant, from weights that all variants share."""

    def __init__(self, variant: Variant, model: MiniVLMForConditionalGeneration, optimizer: torch.optim.Optimizer):
        # the old recipe mixes precisions by itself, where it does
        self.variant, self.optimizer = variant, optimizer
        precision = "fp32" if variant.old else variant.precision
        self.working = WorkingCopy(model, precision, variant.compiled, encoder=variant.old)

    def loss(self, step: Step) -> torch.Tensor:
        """The loss of a step's rows."""
        if self.variant.old:
            return old_loss(self.working.model, step, self.variant.precision)
        return new_loss(self.working.model, step)

    def seconds(self, step: Step) -> float:
        """Take the step and say how long that took."""
        start = time.perf_counter()
        self.working.refresh()
        loss = self.loss(step)
        self.working.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        loss.item()  # waits for a GPU
        return time.perf_counter() - start

    def saved_bytes(self, step: Step) -> int:
        """Activation memory: what the forward pass of a step saves for backward, without weights and inputs."""
        own = (*self.working.model.parameters(), *step.old.values(), *step.new.values())
        return saved_bytes(lambda: self.loss(step), own)

    def peak_bytes(self, step: Step) -> int | None:
        """The peak memory of a step above what is held between steps; None where the system does not report it."""
        return peak_bytes(lambda: self.seconds(step), self.working.model.device)


def peak_bytes(compute: Callable[[], Any], device: torch.device) -> int | None:
    """The peak memory of a computation above what was held before; on a CPU only Linux reports it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        compute()
        return torch.cuda.max_memory_allocated(device) - before
    if not CLEAR_REFS.exists():
        return None
    give_back_memory()
    CLEAR_REFS.write_text("5", "ascii")  # proc(5): the peak begins anew
    before = _status("VmRSS")
    compute()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A figure of this process as Linux gives it, in bytes."""
    lines = CLEAR_REFS.with_name("status").read_text("ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


@dataclass(frozen=True)
class Stat:
    """What was measured of one variant, in one stage. Times are of the median round, and of the extremes.

    So are the shares of the processor's rate, and the ratios to the old recipe; both compare what was measured next to
    each other: a step with the matrix products before and after it, two variants within a round. `ratio` is to the old
    recipe in the precision it ran in, `ratio_equal` to the old recipe in this variant's. `share_of_matmul_rate`
    is the median step's of the median product's rate, `share_nearby` the median of what each step has of the products
    beside it; the activation memory is a part of the peak.
    """

    precision: str
    seconds_per_row: float
    fastest: float
    slowest: float
    rows_per_second: float
    learnt_tokens_per_second: float
    share_of_matmul_rate: float
    share_nearby: float
    share_nearby_from: float
    share_nearby_to: float
    matmul_gflops: float
    kept_megabytes_per_row: float
    peak_megabytes_per_row: float | None
    loss: float
    ratio: float
    ratio_from: float
    ratio_to: float
    ratio_equal: float
    ratio_equal_from: float
    ratio_equal_to: float


def variants_for(device: torch.device, compiled: bool) -> tuple[Variant, ...]:
    """What is compared on a device; the old recipe comes first, in the precision it ran in there."""
    old = (OLD, OLD_IN_BF16) if device.type == "cpu" else (OLD_IN_BF16, OLD)
    return *old, *(variant for variant in NEW if compiled or not variant.compiled)


def bench(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    preset: str,
    name: str,
    rows: int = 8,
    rounds: int = 4,
    compiled: bool | None = None,
) -> dict[str, Stat]:
    """Take steps of a stage in all variants in turn, on the same rows and the same weights, which move a little.

    Args:
        preset: "scenes" or "clip-26m", whose recipe and rows are taken.
        name: the stage, "pretrain" or "sft".
        rows: in a step.
        rounds: of all variants, after one that is not counted. Each takes the next of four steps' rows, all sorted
            by length as `train` does it.
        compiled: also compile the engine's layers; None where that works.

    Returns:
        One `Stat` for each variant, by its name, the old recipe's first. A machine that others use has fast and slow
        minutes, so ratios compare variants within a round, and a step's share of the processor's rate is that of the
        products just before and after it. Losses are those of the first step, before anything moved.
    """
    stage = STAGES[preset][name]
    samples = bench_rows(model.config, processor, preset, name, WINDOW * rows)
    padded = PADDED[preset][name]
    steps = [prepare(model, processor, samples[i : i + rows], padded) for i in range(0, len(samples), rows)]
    set_trainable(model, stage)
    optimizer = adamw(model, stage)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6  # the weights should hardly change
    chosen = variants_for(model.device, compiled if compiled is not None else not why_not_compiled())
    torch.compiler.reset()  # it counts what it has compiled, and a stage before this one would make it give up
    with torch.random.fork_rng(devices=[]):
        steppers = [Stepper(variant, model, optimizer) for variant in chosen]
        kept = [stepper.saved_bytes(steps[-1]) for stepper in steppers]
        losses = [stepper.loss(steps[0]).item() for stepper in steppers]
        products = {precision: Product(precision, model.device) for precision in {each.precision for each in chosen}}
        taken = _by_turns(steppers, steps, rounds, products)
        peaks = [stepper.peak_bytes(steps[-1]) for stepper in steppers]
        gflops = {precision: product.rate / 1e9 for precision, product in products.items()}
    model.zero_grad()
    like = {variant.precision: turns for variant, turns in zip(chosen, taken, strict=True) if variant.old}
    return {
        str(variant): _stat(
            model,
            stage,
            variant,
            turns,
            (taken[0], like[variant.precision]),
            gflops[variant.precision],
            [None if held is None else held / rows / 1e6 for held in (kept[i], peaks[i])],
            losses[i],
        )
        for i, (variant, turns) in enumerate(zip(chosen, taken, strict=True))
    }


@dataclass(frozen=True)
class Turn:
    """A step that was taken, in seconds, and the operations a second of the products just before and after it."""

    step: Step
    seconds: float
    rate: float


def _by_turns(
    steppers: Sequence[Stepper], steps: Sequence[Step], rounds: int, products: Mapping[str, Product]
) -> list[list[Turn]]:
    """Every taker's turns, all in each round; the first round warms up and is left out."""
    taken: list[list[Turn]] = [[] for _ in steppers]
    for number in range(-1, rounds):
        step = steps[number % len(steps)]
        for stepper, turns in zip(steppers, taken, strict=True):
            product = products[stepper.variant.precision]
            before, seconds, after = product.take(), stepper.seconds(step), product.take()
            turns.append(Turn(step, seconds, product.operations / statistics.mean((before, after))))
    return [turns[1:] for turns in taken]


def needed(model: MiniVLMForConditionalGeneration, stage: Stage, variant: Variant, step: Step) -> int:
    """Floating-point operations that a variant needs for a step; padding, the old or the new, is not counted."""
    lengths = [Length(len(row.input_ids), sum(label != IGNORE_INDEX for label in row.labels)) for row in step.rows]
    counted = [flops(model.config, stage, length) for length in lengths]
    return sum(value for parts in counted for part, value in parts.items() if variant.old or part != "encoder")


def _stat(
    model,
    stage: Stage,
    variant: Variant,
    turns: Sequence[Turn],
    old: tuple[Sequence[Turn], Sequence[Turn]],
    gflops: float,
    megabytes: Sequence[float | None],
    loss: float,
) -> Stat:
    """What was measured; `old` are the old recipe's turns, first in its precision, then in this variant's."""
    seconds = [turn.seconds / len(turn.step.rows) for turn in turns]
    usual = statistics.median(seconds)
    ratios, equal = (
        [before.seconds / now.seconds for before, now in zip(others, turns, strict=True)] for others in old
    )
    operations = [needed(model, stage, variant, turn.step) for turn in turns]
    shares = [count / turn.seconds / turn.rate for count, turn in zip(operations, turns, strict=True)]
    supervised, rows = sum(turn.step.supervised for turn in turns), sum(len(turn.step.rows) for turn in turns)
    return Stat(
        precision=variant.precision,
        seconds_per_row=usual,
        fastest=min(seconds),
        slowest=max(seconds),
        rows_per_second=1 / usual,
        learnt_tokens_per_second=supervised / rows / statistics.mean(seconds),
        share_of_matmul_rate=statistics.mean(operations) / statistics.median(t.seconds for t in turns) / gflops / 1e9,
        share_nearby=statistics.median(shares),
        share_nearby_from=min(shares),
        share_nearby_to=max(shares),
        matmul_gflops=gflops,
        kept_megabytes_per_row=megabytes[0],
        peak_megabytes_per_row=megabytes[1],
        loss=loss,
        ratio=statistics.median(ratios),
        ratio_from=min(ratios),
        ratio_to=max(ratios),
        ratio_equal=statistics.median(equal),
        ratio_equal_from=min(equal),
        ratio_equal_to=max(equal),
    )


def as_text(stages: dict[str, dict[str, Stat]]) -> str:
    """The figures of all stages as a table in plain text; `equal` is `ratio_equal`."""
    head = f"{'':<32}{'s a row':>9}{'from':>8}{'to':>8}{'tokens/s':>10}{'of matmul':>11}{'MB a row':>10}"
    head += f"{'times':>7}{'equal':>7}"
    lines = [head]
    for name, stats in stages.items():
        for title, stat in stats.items():
            lines.append(
                f"{name + ', ' + title:<32}{stat.seconds_per_row:>9.4f}{stat.fastest:>8.4f}{stat.slowest:>8.4f}"
                f"{stat.learnt_tokens_per_second:>10.0f}{stat.share_of_matmul_rate:>11.0%}"
                f"{stat.kept_megabytes_per_row:>10.1f}{stat.ratio:>7.1f}{stat.ratio_equal:>7.1f}"
            )
    return "\n".join(lines)


def plot(stages: dict[str, dict[str, Stat]]) -> Figure:
    """Bars of milliseconds a row, a panel for each stage, with the range over the rounds; lower is better."""
    variants = max(len(stats) for stats in stages.values())
    figure = Figure(figsize=(10, 1.1 + 0.45 * variants), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False, sharey=True)[0]
    panels[0].invert_yaxis()  # the first variant on top, in all panels
    for axes, (name, stats) in zip(panels, stages.items(), strict=True):
        times = [1e3 * stat.seconds_per_row for stat in stats.values()]
        errors = [[1e3 * (stat.seconds_per_row - stat.fastest) for stat in stats.values()],
                  [1e3 * (stat.slowest - stat.seconds_per_row) for stat in stats.values()]]  # fmt: skip
        colours = ["#8A8A8A" if title.startswith("old") else "#006BA4" for title in stats]
        axes.barh(list(stats), times, xerr=errors, color=colours, ecolor="#3B3B3B", height=0.6)
        for i, stat in enumerate(stats.values()):
            text = f"{1e3 * stat.seconds_per_row:.0f} ms" + (f"  ({stat.ratio:.1f}×)" if i else "")
            axes.annotate(text, (1e3 * stat.slowest, i), (6, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set(title=f"{name}: milliseconds a row", xlim=(0, 1.45 * max(times)))
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def write(
    folder: Path,
    preset: str,
    rows: int,
    stages: dict[str, dict[str, Stat]],
    command: str,
) -> Path:
    """Keep the figures as `bench.json` and the plot as `bench.png`; returns the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    stats = [stat for stage in stages.values() for stat in stage.values()]
    gflops = {p: statistics.mean(stat.matmul_gflops for stat in stats if stat.precision == p) for p in PRECISIONS}
    about = {
        "command": command,
        "preset": preset,
        "step_size": rows,
        "matmul_gflops": gflops,
        "bf16_over_fp32": gflops["bf16"] / gflops["fp32"],
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "stages": {
            name: {title.replace(",", "").replace(" ", "_"): asdict(stat) for title, stat in stats.items()}
            for name, stats in stages.items()
        },
    }
    plot(stages).savefig(folder / "bench.png", dpi=144)
    file = folder / "bench.json"
    file.write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    return file


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: both stages of a preset, with random weights where the package ships none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="clip-26m", help="default: the true 26M shape")
    parser.add_argument("--rows", type=int, default=8, help="in a step (default 8)")
    parser.add_argument("--rounds", type=int, default=4, help="steps of each kind that count (default 4)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: where that works")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="the folder for bench.json and bench.png")
    options = parser.parse_args(arguments)
    if options.preset == "scenes":
        model, processor, _ = load_checkpoint(data_folder() / BASE)
    else:
        model, processor, _ = build(RANDOM, RANDOM)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    stages = {
        name: bench(model, processor, options.preset, name, options.rows, options.rounds, options.compile)
        for name in (PRETRAIN, SFT)
    }
    print(as_text(stages))
    command = shlex.join(["python", "tests/benchmarks/bench.py", *(sys.argv[1:] if arguments is None else arguments)])
    print(f"Written: {write(options.out, options.preset, options.rows, stages, command)}")


if __name__ == "__main__":
    main()
