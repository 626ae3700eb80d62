"""How fast the engine is, beside the recipe that this course grew from, on the same rows in one interleaved run.

The old recipe (`old_step`) pads every row to one fixed length, runs the frozen encoder in every step, and computes
logits at every place, in float32 on a CPU. The engine (`new_step`) is what `train` does: rows of like length together,
padded to the longest; features of the encoder kept from before; logits where something is learnt; and 16 bits where
that is faster. Both use the same model object, attention, threads and optimizer, and have the same loss. Letters as in
`config.py`.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from minivlm.checkpoint import versions
from minivlm.config import IGNORE_INDEX, STAGES, Stage
from minivlm.cost import LENGTHS, Length, flops, kept_by, probe_row
from minivlm.features import encode
from minivlm.model import MiniVLMForConditionalGeneration, set_trainable
from minivlm.processor import MiniVLMProcessor, Rendered
from minivlm.train import PAD_TO, adamw, give_back_memory, supervised_loss, training_mode

PADDED = {"pretrain": 640, "sft": 1536}  # tokens to which MiniMind-V pads every row
SPREAD = 0.15  # of the lengths around the typical one: rows are seldom alike
PRODUCT, TIMES = 4096, 10  # the matrix product that a machine's rate is measured with
ARMS = {"old, fp32": ("old", "fp32"), "engine, fp32": ("new", "fp32"), "engine, bf16": ("new", "bf16")}


def matmul_rate(precision: str, device: torch.device | str = "cpu") -> float:
    """Operations a second of a warmed-up 4096 x 4096 x 4096 product: the median of ten."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = (torch.randn(PRODUCT, PRODUCT, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(TIMES + 1):
        began = time.perf_counter()
        (one @ other)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return 2 * PRODUCT**3 / statistics.median(seconds[1:])


def bench_rows(config, name: str, count: int, seed: int = 0) -> list[Rendered]:
    """Made-up rows of a stage: one picture each, lengths spread evenly around the typical one."""
    random, typical, rows = np.random.default_rng(seed), LENGTHS[name], []
    for index in range(count):
        share = 1 + SPREAD * random.uniform(-1, 1)
        learnt = round(typical.learnt * share)
        tokens = max(round(typical.tokens * share), config.num_image_tokens + learnt + 8)
        rows.append(probe_row(config, Length(tokens, learnt), seed + index))
    return rows


def old_step(
    model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, rows: Sequence[Rendered], padded: int
) -> torch.Tensor:
    """The old recipe's loss, a mean over learnt tokens: fixed padding, encoder in the step, logits everywhere."""
    batch = processor.collate(list(rows), pad_to_multiple_of=padded)  # (B, padded)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits  # (B, padded, V)
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, padded)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)


def new_step(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    rows: Sequence[Rendered],
    features: torch.Tensor,
    precision: str,
) -> torch.Tensor:
    """The engine's loss on the same rows, their features (I, N, Dv) known from before: what `train` does in a step."""
    known = [replace(row, pictures=[], patch_features=features[i : i + 1]) for i, row in enumerate(rows)]
    batch = processor.collate(known, pad_to_multiple_of=PAD_TO)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    return supervised_loss(model, batch, precision) / sum(label != IGNORE_INDEX for row in rows for label in row.labels)


@dataclass(frozen=True)
class Arm:
    """What one way of taking a step came to, in one stage."""

    seconds_per_row: float
    fastest: float
    slowest: float
    learnt_tokens_per_second: float
    share_of_matmul_rate: float
    kept_megabytes_per_row: float
    loss: float


def bench(
    model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, name: str, rows: int = 4, rounds: int = 3
) -> dict[str, Arm]:
    """Take steps of a stage in all ways by turns, on the same rows and the same model. The weights move a little.

    Args:
        name: the stage, "pretrain" or "sft", of the recipe of clip-26m.
        rows: in a step.
        rounds: of all ways, after one that is not counted.

    Returns:
        One `Arm` for each of `ARMS`; losses are those of the first step, before anything moved.
    """
    stage, made = STAGES["clip-26m"][name], bench_rows(model.config, name, rows)
    features = encode(model, [processor.pixels([row.pictures[0]]) for row in made], rows, title="")
    device = model.device
    ways: dict[str, Callable[[], torch.Tensor]] = {
        arm: (
            (lambda: old_step(model, processor, made, PADDED[name]))
            if way == "old"
            else (lambda precision=precision: new_step(model, processor, made, features, precision))
        )
        for arm, (way, precision) in ARMS.items()
    }
    set_trainable(model, stage)
    with training_mode(model):
        kept = {arm: kept_by(way, model.parameters()) / rows / 1e6 for arm, way in ways.items()}
        with torch.no_grad():
            losses = {arm: way().item() for arm, way in ways.items()}
        taken = _by_turns(model, stage, ways, rounds)
    rates = {precision: matmul_rate(precision, device) for precision in ("fp32", "bf16")}
    return {arm: _arm(model, stage, made, ARMS[arm], taken[arm], rates, kept[arm], losses[arm]) for arm in ways}


def _by_turns(
    model: MiniVLMForConditionalGeneration, stage: Stage, ways: dict[str, Callable[[], torch.Tensor]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of real optimizer steps, all ways in each round; the first round warms up and is left out."""
    optimizer = adamw(model, stage)
    taken: dict[str, list[float]] = {arm: [] for arm in ways}
    for _ in range(rounds + 1):
        for arm, way in ways.items():
            began = time.perf_counter()
            loss = way()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            loss.item()  # waits for a GPU
            taken[arm].append(time.perf_counter() - began)
            give_back_memory()
    return {arm: seconds[1:] for arm, seconds in taken.items()}


def _arm(model, stage, rows, way, seconds, rates, kept, loss) -> Arm:
    """What was measured, per row. The arithmetic counted is what has to be done: the old recipe's padding is not."""
    lengths = [Length(len(row.input_ids), sum(label != IGNORE_INDEX for label in row.labels)) for row in rows]
    counted = [flops(model.config, stage, length) for length in lengths]
    encoder = way[0] == "old"
    needed = sum(value for parts in counted for part, value in parts.items() if encoder or part != "encoder")
    usual = statistics.median(seconds)
    return Arm(
        seconds_per_row=usual / len(rows),
        fastest=min(seconds) / len(rows),
        slowest=max(seconds) / len(rows),
        learnt_tokens_per_second=sum(length.learnt for length in lengths) / usual,
        share_of_matmul_rate=needed / usual / rates[way[1]],
        kept_megabytes_per_row=kept,
        loss=loss,
    )


def compared(arms: dict[str, Arm]) -> dict[str, dict[str, float]]:
    """How many times as fast as the old recipe each way of the engine is: by the medians, and at least and at most."""
    (old, *others) = arms
    base = arms[old]
    return {
        arm: {
            "ratio": base.seconds_per_row / arms[arm].seconds_per_row,
            "from": base.fastest / arms[arm].slowest,
            "to": base.slowest / arms[arm].fastest,
            "memory": base.kept_megabytes_per_row / arms[arm].kept_megabytes_per_row,
        }
        for arm in others
    }


def as_text(stages: dict[str, dict[str, Arm]]) -> str:
    """The figures of all stages as a table in plain text."""
    head = f"{'':<24}{'s a row':>9}{'from':>8}{'to':>8}{'tokens/s':>10}{'of matmul':>11}{'MB a row':>10}{'times':>7}"
    lines = [head]
    for name, arms in stages.items():
        ratios = compared(arms)
        for title, arm in arms.items():
            times = f"{ratios[title]['ratio']:.1f}" if title in ratios else ""
            lines.append(
                f"{name + ', ' + title:<24}{arm.seconds_per_row:>9.3f}{arm.fastest:>8.3f}{arm.slowest:>8.3f}"
                f"{arm.learnt_tokens_per_second:>10.0f}{arm.share_of_matmul_rate:>11.0%}"
                f"{arm.kept_megabytes_per_row:>10.0f}{times:>7}"
            )
    return "\n".join(lines)


def plot(stages: dict[str, dict[str, Arm]]) -> Figure:
    """Bars of seconds a row, a panel for each stage, with the spread of the rounds; lower is better."""
    figure = Figure(figsize=(9, 1.1 + 0.5 * len(ARMS)), layout="constrained")
    for axes, (name, arms) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items(), strict=True):
        seconds = [arm.seconds_per_row for arm in arms.values()]
        spread = [[arm.seconds_per_row - arm.fastest for arm in arms.values()],
                  [arm.slowest - arm.seconds_per_row for arm in arms.values()]]  # fmt: skip
        axes.barh(list(arms), seconds, xerr=spread, color="#006BA4", ecolor="#3B3B3B", height=0.6)
        axes.invert_yaxis()
        for place, value in enumerate(seconds):
            axes.annotate(f"{value:.2f} s", (value, place), (8, 8), textcoords="offset points", fontsize=9)
        axes.set(title=f"{name}: seconds a row", xlim=(0, 1.25 * max(seconds)))
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def write(folder: Path, stages: dict[str, dict[str, Arm]], command: str) -> Path:
    """Keep the figures as `bench.json` and the plot as `bench.png`; returns the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "command": command,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "stages": {name: {title: asdict(arm) for title, arm in arms.items()} for name, arms in stages.items()},
        "compared": {name: compared(arms) for name, arms in stages.items()},
    }
    plot(stages).savefig(folder / "bench.png", dpi=144)
    file = folder / "bench.json"
    file.write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    return file
