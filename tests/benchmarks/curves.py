"""Cost curves, measured: `python tests/benchmarks/curves.py`, about ten minutes, on Linux.

At the true 26M shape, with random weights: milliseconds and kept megabytes of a row of stage 2 against the length of
its text and against the number of its image tokens (other sizes of the image), and what the encoder takes for one.
Here "old" is the old recipe but for its fixed padding: 32 bits, the encoder in every step, logits at every position.
The most memory of a step of stage 2 with 32 rows. And the data path alone, from 1,000 to 100,000 rows: the check with
its index, then one epoch of rows in training's order, rendered and padded, on one core, in a process of its own. Writes
`data/results/curves.json` and a plot beside it. Others may work on the machine: `load_before` is its load at the start.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from bench import OLD, PADDED, Step, Stepper, Variant, bench_rows, prepare
from check_rows import FORMS, ONE_CORE, make, private
from lessons.cost import Length, random_example
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import CLIPVisionModel, LlamaForCausalLM

from minivlm.checkpoint import load_checkpoint
from minivlm.config import STAGES
from minivlm.convert.hub import RANDOM, build
from minivlm.data.dataset import open_dataset, write_dataset
from minivlm.data.features import encode
from minivlm.model import MiniVLMForConditionalGeneration, assemble, set_trainable
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.paths import BASE, data_folder
from minivlm.train import PAD_TO, SampleOrder, adamw

FILE = "results/curves.json"
VARIANTS = {"old": OLD, "engine": Variant(False, "bf16")}
PEAKS = VARIANTS | {"compiled": Variant(False, "bf16", True)}
SIDES = (112, 224, 336, 448)  # of the image, in pixels: 49, 196, 441 and 784 patches of 16
TEXTS = (64, 192, 448, 960, 1984)  # tokens beside the image's
ROWS_A_STEP, TIMES = 2, 3
SHOWN = 0.88  # of a text is supervised
COUNTS = (1_000, 3_000, 10_000, 30_000, 100_000)  # rows


def model_with(side: int) -> tuple[MiniVLMForConditionalGeneration, MiniVLMProcessor]:
    """The true shape with another size of images, its position table drawn at that size."""
    model, processor, _ = build(RANDOM, RANDOM)
    vision = model.config.vision_config
    vision.image_size = side
    clip, words = CLIPVisionModel._from_config(vision), LlamaForCausalLM(model.config.text_config)
    resized = assemble(clip, words, model.config.image_token_id, seed=0)
    processor = MiniVLMProcessor.for_config(resized.config, processor.tokenizer)
    return resized, processor


def step_cost(model, processor, text: int, variant: Variant) -> dict[str, float]:
    """The median of a few steps, and the activation memory of one, for a row."""
    n = model.config.num_image_tokens
    row = random_example(model.config, Length(n + text, round(SHOWN * text)))
    stage = STAGES["clip-26m"]["sft"]
    set_trainable(model, stage)
    step: Step = prepare(model, processor, [row] * ROWS_A_STEP, PAD_TO)
    stepper = Stepper(variant, model, adamw(model, stage))
    kept = stepper.saved_bytes(step)
    seconds = [stepper.seconds(step) for _ in range(TIMES + 1)][1:]
    model.zero_grad()
    return {
        "image_tokens": n,
        "tokens": n + text,
        "milliseconds": 1e3 * statistics.median(seconds) / ROWS_A_STEP,
        "kept_megabytes": kept / ROWS_A_STEP / 1e6,
    }


def encoder_cost(model, processor) -> float:
    """Milliseconds an image, eight at once, in 32 bits."""
    grey = random_example(model.config, Length(model.config.num_image_tokens + 2, 1)).images
    pixels = processor.pixels(grey * 8)
    seconds = []
    for _ in range(TIMES + 1):
        start = time.perf_counter()
        encode(model, [pixels], 8, title="")
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[1:]) / 8


def data_path(count: int) -> dict:
    """So many rows from a file to padded batches; no image is opened."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), "json_lines", count)
        _, processor, _ = load_checkpoint(data_folder() / BASE)
        start = time.perf_counter()
        write_dataset(Path(folder) / "index", Path(folder) / FORMS["json_lines"], processor)
        checked = time.perf_counter() - start
        rows = open_dataset(Path(folder) / "index")
        order = SampleOrder(rows, processor, 32, seed=0)
        held, start, steps = [], time.perf_counter(), len(rows) // 32
        for step in range(steps):
            processor.collate([replace(row, images=[]) for row in order[step]], pad_to_multiple_of=PAD_TO)
            if step in (steps // 10, steps - 1):
                held.append(private()["held"])
        return {
            "rows": count,
            "check_seconds": checked,
            "epoch_seconds": time.perf_counter() - start,
            "held_mb": {"first": held[0], "last": held[-1]},
        }


def peak(name: str, rows: int) -> dict:
    """The most memory of this process after two steps of stage 2 with so many rows of the usual lengths."""
    model, processor, _ = build(RANDOM, RANDOM)
    stage = STAGES["clip-26m"]["sft"]
    set_trainable(model, stage)
    samples = bench_rows(model.config, processor, "clip-26m", "sft", rows)
    step = prepare(model, processor, samples, PADDED["clip-26m"]["sft"])
    stepper = Stepper(PEAKS[name], model, adamw(model, stage))
    for _ in range(2):
        stepper.seconds(step)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"gigabytes": most, "kept_a_row": stepper.saved_bytes(step) / rows / 1e9}


def alone(option: str, *args: object, one_core: bool = False) -> dict:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, option, *map(str, args)]
    environment = os.environ | (ONE_CORE if one_core else {})
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peaks() -> dict:
    """Of a step of stage 2 with 32 rows; the old recipe's, for lack of room, by 8 rows and what 24 more would keep."""
    old = alone("--peak", "old", 8)
    engine, compiled = (alone("--peak", name, 32)["gigabytes"] for name in ("engine", "compiled"))
    line = old["gigabytes"] + (32 - 8) * old["kept_a_row"]
    return {
        "old_8_rows": old["gigabytes"],
        "old_kept_a_row": old["kept_a_row"],
        "old_32_rows_on_a_line": line,
        "engine_32_rows": engine,
        "compiled_32_rows": compiled,
        "times": line / compiled,
    }


def plot(curves: dict) -> Figure:
    """Four panels: time and memory of a longer text, more image tokens, more rows."""
    figure = Figure(figsize=(10.5, 7), layout="constrained")
    (text, memory), (image, data) = figure.subplots(2, 2)
    for axes, curve, over, key, title in (
        (text, curves["text"], "tokens", "milliseconds", "a longer text: time"),
        (memory, curves["text"], "tokens", "kept_megabytes", "a longer text: kept for the way back"),
        (image, curves["image"], "image_tokens", "milliseconds", "more image tokens: time"),
    ):
        for name, label in (("old", "old recipe, not padded, fp32"), ("engine", "engine, bf16")):
            points = curve[name]
            _line(axes, [point[over] for point in points], [point[key] for point in points], label, name == "old")
        axes.set(title=title, xlabel=over.replace("_", " ") + " of a row", ylim=(0, None))
        axes.set(ylabel="milliseconds a row" if key == "milliseconds" else "megabytes a row")
    counts = [point["rows"] for point in curves["data"]]
    data.set(
        xscale="log", yscale="log", title="more rows: the data path alone", xlabel="rows of a file", ylabel="seconds"
    )
    for key in ("check_seconds", "epoch_seconds"):
        seconds = [point[key] for point in curves["data"]]
        _line(
            data, counts, seconds, {"check_seconds": "check", "epoch_seconds": "an epoch"}[key], key == "check_seconds"
        )
    return figure


def _line(axes: Axes, x: list[float], y: list[float], label: str, other: bool) -> None:
    """One curve: squares for what it is compared with."""
    marker, colour, line = ("s", "#6E6E6E", "--") if other else ("o", "#006BA4", "-")
    axes.plot(x, y, marker=marker, color=colour, linestyle=line, label=label)
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


def measured() -> dict:
    """All curves."""
    model, processor = model_with(224)
    curves: dict = {"text": {}, "image": {name: [] for name in VARIANTS}, "encoder": []}
    for name, variant in VARIANTS.items():
        curves["text"][name] = [step_cost(model, processor, text, variant) for text in TEXTS]
    for side in SIDES:
        model, processor = model_with(side)
        for name, variant in VARIANTS.items():
            curves["image"][name].append(step_cost(model, processor, 204, variant))
        tokens = model.config.num_image_tokens
        curves["encoder"].append({"image_tokens": tokens, "milliseconds": encoder_cost(model, processor)})
    curves["peak"] = peaks()
    curves["data"] = [alone("--data-path", count, one_core=True) for count in COUNTS]
    return curves


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-path", type=int, metavar="ROWS", help="this measurement alone, printed as JSON")
    parser.add_argument("--peak", nargs=2, metavar=("WAY", "ROWS"), help="likewise")
    options = parser.parse_args()
    if options.data_path or options.peak:
        result = data_path(options.data_path) if options.data_path else peak(options.peak[0], int(options.peak[1]))
        print(json.dumps(result))
        return
    report = {
        "command": "python tests/benchmarks/curves.py",
        "load_before": os.getloadavg()[0],
        "rows_a_step": ROWS_A_STEP,
    }
    report |= {"threads": torch.get_num_threads(), "torch": torch.__version__} | measured()
    file = data_folder() / FILE
    file.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    plot(report).savefig(file.with_suffix(".png"), dpi=144)


if __name__ == "__main__":
    main()
