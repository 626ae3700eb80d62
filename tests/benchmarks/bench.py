"""Training speed beside the reference recipe: `python tests/benchmarks/bench.py`, or with `--preset scenes`.

The reference is the recipe that this course grew from: every sample padded to one fixed length, the frozen encoder in
every step, logits at every position, float32 on a CPU. Ours is what `train` does: samples of like length together,
padded to the longest; encoder features computed before; logits only at supervised positions; and bfloat16 and compiled
layers. All variants take steps in turn on the same samples, with the same weights, loss and optimizer, and with the
library's attention, except ours in bfloat16 on a CPU (`runtime.attention`). The reference is measured in mixed
precision, too, so that the effect of bfloat16 can be told from the rest. Letters as in `config.py`.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lessons.cost import LENGTHS, Length, flops, random_example, saved_bytes
from lessons.lesson_a2 import loss_everywhere

from minivlm.checkpoint import load_checkpoint
from minivlm.config import IGNORE_INDEX, PRESETS, STAGES, MiniVLMConfig, Stage
from minivlm.convert.hub import RANDOM, build
from minivlm.data.features import encode
from minivlm.data.order import WINDOW
from minivlm.data.samples import Example
from minivlm.model import MiniVLMForConditionalGeneration, set_trainable
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.files import versions, write_json
from minivlm.runtime.paths import BASE, PRETRAIN, SFT, data_folder
from minivlm.runtime.precision import PRECISIONS, WorkingCopy, give_back_memory, why_not_compiled
from minivlm.scenes.samples import SceneSamples
from minivlm.train import PAD_TO, adamw, supervised_loss

# The reference's fixed lengths in tokens: MiniMind-V's for clip-26m; for scenes as many times the typical length.
PADDED = {"clip-26m": {"pretrain": 640, "sft": 1536}, "scenes": {"pretrain": 256, "sft": 512}}
LENGTH_RANGE = 0.15  # random lengths differ from the typical one by up to this share
CLEAR_REFS = Path("/proc/self/clear_refs")
MATRIX_SIZE, REPEATS = 4096, 10  # of the matrix product that measures a machine's rate


@dataclass(frozen=True)
class Variant:
    """One variant of a training step."""

    reference: bool
    precision: str
    compiled: bool = False

    def __str__(self) -> str:
        """Its name in tables and in JSON, such as "ours_bf16_compiled"."""
        return "_".join(["reference" if self.reference else "ours", self.precision, *["compiled"] * self.compiled])


REFERENCE = Variant(True, "fp32")  # as it ran on a CPU
REFERENCE_BF16 = Variant(True, "bf16")  # mixed precision, as it ran on a GPU
OURS = (Variant(False, "fp32"), Variant(False, "bf16"), Variant(False, "fp32", True), Variant(False, "bf16", True))


def variants_for(device: torch.device, compiled: bool) -> tuple[Variant, ...]:
    """The variants to compare on a device; first the reference in the precision it ran in there."""
    references = (REFERENCE, REFERENCE_BF16) if device.type == "cpu" else (REFERENCE_BF16, REFERENCE)
    return *references, *(variant for variant in OURS if compiled or not variant.compiled)


class MatrixProduct:
    """The matrix product that measures a machine's rate in one precision; warmed up."""

    def __init__(self, precision: str, device: torch.device | str = "cpu"):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.factors = [torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device).to(dtype) for _ in range(2)]
        self.operations = 2 * MATRIX_SIZE**3
        self.times: list[float] = []
        self.seconds()
        self.times.clear()

    def seconds(self) -> float:
        """Compute it once; the seconds are also appended to `times`."""
        start = time.perf_counter()
        (self.factors[0] @ self.factors[1])[0, 0].item()  # waits for a GPU
        self.times.append(time.perf_counter() - start)
        return self.times[-1]

    @property
    def rate(self) -> float:
        """Operations a second by the median of all times, at least `REPEATS`."""
        while len(self.times) < REPEATS:
            self.seconds()
        return self.operations / statistics.median(self.times)


def bench_rows(
    config: MiniVLMConfig, processor: MiniVLMProcessor, preset: str, name: str, count: int, seed: int = 0
) -> list[Example]:
    """Examples of a stage, the shortest first.

    Those of scenes are the course's own. For clip-26m they are random tokens with a grey image, with lengths that
    are uniform around the typical one.
    """
    if preset == "scenes":
        rows = [processor.encode(sample) for sample in SceneSamples(name, count, count, seed)]
        return sorted(rows, key=lambda row: len(row.input_ids))
    random, typical, rows = np.random.default_rng(seed), LENGTHS[name], []
    for index in range(count):
        factor = 1 + LENGTH_RANGE * random.uniform(-1, 1)
        supervised = round(typical.supervised * factor)
        tokens = max(round(typical.tokens * factor), config.num_image_tokens + supervised + 8)
        rows.append(random_example(config, Length(tokens, supervised), seed + index))
    return sorted(rows, key=lambda row: len(row.input_ids))


@dataclass(frozen=True)
class Step:
    """The examples of one step and both batches of them, on the device before any clock runs."""

    rows: list[Example]
    reference: dict[str, torch.Tensor]  # pixel_values, padded to a fixed length
    ours: dict[str, torch.Tensor]  # patch_features, padded to the longest

    @property
    def supervised(self) -> int:
        """The number of supervised tokens."""
        return sum(map(supervised_tokens, self.rows))


def supervised_tokens(row: Example) -> int:
    """The number of an example's tokens that have a label."""
    return sum(label != IGNORE_INDEX for label in row.labels)


def prepare(
    model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, rows: Sequence[Example], padded: int
) -> Step:
    """Both batches of the same examples."""
    pixels = processor.pixels([image for row in rows for image in row.images])  # (I, 3, H, W)
    features = encode(model, [pixels], len(pixels), title="")  # (I, N, Dv)
    parts = features.split([len(row.images) for row in rows])
    encoded = [replace(row, images=[], patch_features=part) for row, part in zip(rows, parts, strict=True)]
    reference, ours = (
        {name: tensor.to(model.device) for name, tensor in batch.items()}
        for batch in (
            processor.collate(list(rows), pad_to_multiple_of=padded),
            processor.collate(encoded, pad_to_multiple_of=PAD_TO),
        )
    )
    return Step(list(rows), reference, ours)


def loss_of(variant: Variant, model: MiniVLMForConditionalGeneration, step: Step) -> torch.Tensor:
    """A step's loss, a mean over supervised tokens.

    The reference's has fixed padding, the encoder in the step, and logits everywhere; ours is the one of `train`.
    """
    if not variant.reference:
        return supervised_loss(model, step.ours) / step.supervised
    with torch.autocast(model.device.type, torch.bfloat16, enabled=variant.precision == "bf16"):
        return loss_everywhere(model, step.reference) / step.supervised


class StepRunner:
    """Takes optimizer steps in one variant; all variants share the model's weights."""

    def __init__(self, variant: Variant, model: MiniVLMForConditionalGeneration, optimizer: torch.optim.Optimizer):
        self.variant, self.optimizer = variant, optimizer
        precision = "fp32" if variant.reference else variant.precision  # the reference's loss mixes precisions itself
        self.working = WorkingCopy(model, precision, variant.compiled, encoder=variant.reference)

    def loss(self, step: Step) -> torch.Tensor:
        """The loss of a step."""
        return loss_of(self.variant, self.working.model, step)

    def seconds(self, step: Step) -> float:
        """Take a step and return its seconds."""
        start = time.perf_counter()
        self.working.refresh()
        loss = self.loss(step)
        self.working.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        loss.item()  # waits for a GPU
        return time.perf_counter() - start

    def activation_bytes(self, step: Step) -> int:
        """The activation memory that a step saves for backward, without weights and inputs."""
        inputs = (*self.working.model.parameters(), *step.reference.values(), *step.ours.values())
        return saved_bytes(lambda: self.loss(step), inputs)


def peak_bytes(compute: Callable[[], Any], device: torch.device) -> int | None:
    """The peak memory of a computation above what was allocated before; None where neither CUDA nor Linux tells it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        compute()
        return torch.cuda.max_memory_allocated(device) - before
    if not CLEAR_REFS.exists():
        return None
    give_back_memory()
    CLEAR_REFS.write_text("5", "ascii")  # proc(5): resets the peak
    before = _status("VmRSS")
    compute()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A figure of this process as Linux gives it, in bytes."""
    lines = CLEAR_REFS.with_name("status").read_text("ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


class Stat(NamedTuple):
    """The median over the rounds, and the lowest and the highest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Stat":
        """Of these values."""
        return cls(statistics.median(values), min(values), max(values))

    def flat(self, name: str) -> dict[str, float]:
        """Three entries of `bench.json`."""
        return {name: self.median, f"{name}_from": self.low, f"{name}_to": self.high}


@dataclass(frozen=True)
class Measurement:
    """What was measured of a variant in a stage.

    Attributes:
        seconds_per_row: of a step, divided by its examples.
        share_of_matmul_rate: operations a second of the median step, as a share of the median matrix product's.
        share_nearby: the same for each step and the products just before and after it.
        activation_megabytes_per_row: saved for backward; a part of the peak.
        loss: of the first step, before any weight moved.
        ratio: how many times as fast as the reference in the precision it ran in. Compared within a round, since the
            speed of a shared machine changes within minutes.
        ratio_equal: how many times as fast as the reference in this variant's precision.
    """

    precision: str
    seconds_per_row: Stat
    supervised_tokens_per_second: float
    share_of_matmul_rate: float
    share_nearby: Stat
    matmul_gflops: float
    activation_megabytes_per_row: float
    peak_megabytes_per_row: float | None
    loss: float
    ratio: Stat
    ratio_equal: Stat

    def flat(self) -> dict[str, Any]:
        """As `bench.json` has it."""
        return {
            "precision": self.precision,
            "seconds_per_row": self.seconds_per_row.median,
            "fastest": self.seconds_per_row.low,
            "slowest": self.seconds_per_row.high,
            "rows_per_second": 1 / self.seconds_per_row.median,
            "learnt_tokens_per_second": self.supervised_tokens_per_second,
            "share_of_matmul_rate": self.share_of_matmul_rate,
            **self.share_nearby.flat("share_nearby"),
            "matmul_gflops": self.matmul_gflops,
            "kept_megabytes_per_row": self.activation_megabytes_per_row,
            "peak_megabytes_per_row": self.peak_megabytes_per_row,
            "loss": self.loss,
            **self.ratio.flat("ratio"),
            **self.ratio_equal.flat("ratio_equal"),
        }


def bench(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    preset: str,
    name: str,
    rows: int = 8,
    rounds: int = 4,
    compiled: bool | None = None,
) -> dict[str, Measurement]:
    """Take steps of a stage in all variants in turn, on the same examples and weights, which move a little.

    Args:
        name: the stage, "pretrain" or "sft".
        rows: examples in a step.
        rounds: of all variants, after one that is not counted. Each takes the next of four steps, whose examples were
            sorted by length together as `train` does it.
        compiled: also compile our layers; None where that works.

    Returns the measurement of each variant by its name.
    """
    stage = STAGES[preset][name]
    examples = bench_rows(model.config, processor, preset, name, WINDOW * rows)
    padded = PADDED[preset][name]
    steps = [prepare(model, processor, examples[i : i + rows], padded) for i in range(0, len(examples), rows)]
    set_trainable(model, stage)
    optimizer = adamw(model, stage)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6  # the weights should hardly move
    variants = variants_for(model.device, compiled if compiled is not None else not why_not_compiled())
    torch.compiler.reset()  # otherwise what an earlier stage compiled counts towards torch's limit
    with torch.random.fork_rng(devices=[]):
        runners = [StepRunner(variant, model, optimizer) for variant in variants]
        activations = [runner.activation_bytes(steps[-1]) for runner in runners]
        losses = [runner.loss(steps[0]).item() for runner in runners]
        products = {precision: MatrixProduct(precision, model.device) for precision in {v.precision for v in variants}}
        timings = _interleaved(runners, steps, rounds, products)
        peaks = [peak_bytes(partial(runner.seconds, steps[-1]), model.device) for runner in runners]
        gflops = {precision: product.rate / 1e9 for precision, product in products.items()}
    model.zero_grad()
    references = {v.precision: series for v, series in zip(variants, timings, strict=True) if v.reference}
    return {
        str(variant): _measurement(
            timings[i],
            [operations(model.config, stage, variant, timing.step) for timing in timings[i]],
            timings[0],
            references[variant.precision],
            precision=variant.precision,
            matmul_gflops=gflops[variant.precision],
            activation_megabytes_per_row=activations[i] / rows / 1e6,
            peak_megabytes_per_row=None if peaks[i] is None else peaks[i] / rows / 1e6,
            loss=losses[i],
        )
        for i, variant in enumerate(variants)
    }


class Timing(NamedTuple):
    """The seconds of a step, and the operations a second of the matrix products just before and after it."""

    step: Step
    seconds: float
    matmul_rate: float


def _interleaved(
    runners: Sequence[StepRunner], steps: Sequence[Step], rounds: int, products: Mapping[str, MatrixProduct]
) -> list[list[Timing]]:
    """Each runner's timings, all runners in each round; the first round warms up and is left out."""
    timings: list[list[Timing]] = [[] for _ in runners]
    for number in range(-1, rounds):
        step = steps[number % len(steps)]
        for runner, series in zip(runners, timings, strict=True):
            product = products[runner.variant.precision]
            before, seconds, after = product.seconds(), runner.seconds(step), product.seconds()
            series.append(Timing(step, seconds, product.operations / statistics.mean((before, after))))
    return [series[1:] for series in timings]


def operations(config: MiniVLMConfig, stage: Stage, variant: Variant, step: Step) -> int:
    """Floating-point operations that a variant needs for a step, padding not counted."""
    counts = [flops(config, stage, Length(len(row.input_ids), supervised_tokens(row))) for row in step.rows]
    return sum(n for parts in counts for part, n in parts.items() if variant.reference or part != "encoder")


def _measurement(
    timings: Sequence[Timing],
    counts: Sequence[int],
    reference: Sequence[Timing],
    same_precision: Sequence[Timing],
    **others: Any,
) -> Measurement:
    """A variant's timings, and the operations of these steps, beside the reference's timings in both precisions."""
    seconds = [timing.seconds / len(timing.step.rows) for timing in timings]
    tokens, rows = sum(t.step.supervised for t in timings), sum(len(t.step.rows) for t in timings)
    rate = statistics.mean(counts) / statistics.median(timing.seconds for timing in timings)
    ratio, ratio_equal = (
        Stat.of([other.seconds / timing.seconds for other, timing in zip(against, timings, strict=True)])
        for against in (reference, same_precision)
    )
    return Measurement(
        seconds_per_row=Stat.of(seconds),
        supervised_tokens_per_second=tokens / rows / statistics.mean(seconds),
        share_of_matmul_rate=rate / (1e9 * others["matmul_gflops"]),
        share_nearby=Stat.of([n / t.seconds / t.matmul_rate for n, t in zip(counts, timings, strict=True)]),
        ratio=ratio,
        ratio_equal=ratio_equal,
        **others,
    )


def as_text(stages: dict[str, dict[str, Measurement]]) -> str:
    """A table in plain text; `equal` is `ratio_equal`."""
    lines = [
        f"{'':<32}{'s a row':>9}{'from':>8}{'to':>8}{'tokens/s':>10}{'of matmul':>11}{'MB a row':>10}"
        f"{'times':>7}{'equal':>7}"
    ]
    for name, measurements in stages.items():
        for variant, m in measurements.items():
            median, low, high = m.seconds_per_row
            lines.append(
                f"{name + ', ' + variant:<32}{median:>9.4f}{low:>8.4f}{high:>8.4f}"
                f"{m.supervised_tokens_per_second:>10.0f}{m.share_of_matmul_rate:>11.0%}"
                f"{m.activation_megabytes_per_row:>10.1f}{m.ratio.median:>7.1f}{m.ratio_equal.median:>7.1f}"
            )
    return "\n".join(lines)


def write(folder: Path, preset: str, rows: int, stages: dict[str, dict[str, Measurement]], command: str) -> Path:
    """Write `bench.json`; returns its path. `docs/build.py` reads it from `data/results/bench-PRESET`."""
    measured = [m for measurements in stages.values() for m in measurements.values()]
    gflops = {p: statistics.mean(m.matmul_gflops for m in measured if m.precision == p) for p in PRECISIONS}
    content = {
        "command": command,
        "preset": preset,
        "rows_per_step": rows,
        "matmul_gflops": gflops,
        "bf16_over_fp32": gflops["bf16"] / gflops["fp32"],
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "stages": {
            name: {variant: measurement.flat() for variant, measurement in measurements.items()}
            for name, measurements in stages.items()
        },
    }
    write_json(folder / "bench.json", content)
    return folder / "bench.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: both stages of a preset, with random weights where the package ships none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="clip-26m", help="default: the true 26M shape")
    parser.add_argument("--rows", type=int, default=8, help="in a step (default 8)")
    parser.add_argument("--rounds", type=int, default=4, help="measured steps of each variant (default 4)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: where that works")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="the folder for bench.json")
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
