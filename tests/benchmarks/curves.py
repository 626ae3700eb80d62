"""How the cost of a step grows: `python tests/benchmarks/curves.py`, about ten minutes, on Linux.

At the true 26M shape, with random weights: milliseconds and activation memory of a sample of stage 2 against the length
of its text and against the number of its image tokens (images of other sizes), and the encoder's time for an image.
"old" is the reference recipe without its fixed padding: float32, the encoder in every step, logits at every position.
"engine" is ours in bfloat16. Then the peak memory of a step of stage 2 with 32 samples. And the data path alone, from
1,000 to 100,000 rows: the check that writes a data set, then one epoch of samples in training's order, encoded and
padded, on one core, in a process of its own. Writes `data/results/curves.json` and the plot beside it; `--plot` only
draws the plot from the JSON that is there. `load_before` is the machine's load at the start.
"""

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from bench import OURS, PADDED, REFERENCE, StepRunner, Variant, bench_rows, prepare
from check_rows import FORMS, ONE_CORE, make, private_memory
from lessons.cost import Length, random_example
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import CLIPVisionModel, LlamaForCausalLM

from minivlm.checkpoint import load_checkpoint
from minivlm.config import STAGES
from minivlm.convert.hub import RANDOM, build
from minivlm.data.dataset import open_dataset, write_dataset
from minivlm.data.features import encode
from minivlm.data.order import SampleOrder
from minivlm.model import MiniVLMForConditionalGeneration, assemble, set_trainable
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.files import write_json
from minivlm.runtime.paths import BASE, data_folder
from minivlm.train import PAD_TO, adamw

FILE = "results/curves.json"
VARIANTS = {"old": REFERENCE, "engine": OURS[1]}  # by their names in the JSON
PEAK_VARIANTS = VARIANTS | {"compiled": OURS[3]}
LABELS = {"old": "reference recipe, not padded, fp32", "engine": "ours, bf16"}
SIDES = (112, 224, 336, 448)  # of the image, in pixels: 49, 196, 441 and 784 patches of 16
TEXTS = (64, 192, 448, 960, 1984)  # tokens beside the image's
ROWS_A_STEP, REPEATS = 2, 3
SUPERVISED = 0.88  # the share of a text
COUNTS = (1_000, 3_000, 10_000, 30_000, 100_000)  # rows


def model_with(side: int) -> tuple[MiniVLMForConditionalGeneration, MiniVLMProcessor]:
    """The true shape with another size of images, its position table drawn at that size."""
    model, processor, _ = build(RANDOM, RANDOM)
    vision = copy.deepcopy(model.config.vision_config)
    vision.image_size = side
    clip, language_model = CLIPVisionModel._from_config(vision), LlamaForCausalLM(model.config.text_config)
    model = assemble(clip, language_model, model.config.image_token_id, seed=0)
    return model, MiniVLMProcessor.for_config(model.config, processor.tokenizer)


def step_cost(model, processor, text: int, variant: Variant) -> dict[str, float]:
    """The median time of a few steps, and the activation memory of one, for each sample."""
    n = model.config.num_image_tokens
    row = random_example(model.config, Length(n + text, round(SUPERVISED * text)))
    stage = STAGES["clip-26m"]["sft"]
    set_trainable(model, stage)
    step = prepare(model, processor, [row] * ROWS_A_STEP, PAD_TO)
    runner = StepRunner(variant, model, adamw(model, stage))
    activations = runner.activation_bytes(step)
    seconds = [runner.seconds(step) for _ in range(REPEATS + 1)][1:]
    model.zero_grad()
    return {
        "image_tokens": n,
        "tokens": n + text,
        "milliseconds": 1e3 * statistics.median(seconds) / ROWS_A_STEP,
        "kept_megabytes": activations / ROWS_A_STEP / 1e6,
    }


def encoder_cost(model, processor) -> float:
    """Milliseconds an image, eight at once, in float32."""
    grey = random_example(model.config, Length(model.config.num_image_tokens + 2, 1)).images
    pixels = processor.pixels(grey * 8)
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        encode(model, [pixels], 8, title="")
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[1:]) / 8


def data_path(count: int) -> dict:
    """From a file of `count` rows to padded batches; no image is opened."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), "json_lines", count)
        _, processor, _ = load_checkpoint(data_folder() / BASE)
        start = time.perf_counter()
        write_dataset(Path(folder) / "index", Path(folder) / FORMS["json_lines"], processor)
        check_seconds = time.perf_counter() - start
        samples = open_dataset(Path(folder) / "index")
        order = SampleOrder(samples, processor, 32, seed=0)
        memory, start, steps = [], time.perf_counter(), len(samples) // 32
        for step in range(steps):
            processor.collate([replace(example, images=[]) for example in order[step]], pad_to_multiple_of=PAD_TO)
            if step in (steps // 10, steps - 1):
                memory.append(private_memory()["held"])
        return {
            "rows": count,
            "check_seconds": check_seconds,
            "epoch_seconds": time.perf_counter() - start,
            "held_mb": {"first": memory[0], "last": memory[-1]},
        }


def peak(name: str, rows: int) -> dict:
    """The peak memory of this process after two steps of stage 2 with so many samples of the usual lengths."""
    model, processor, _ = build(RANDOM, RANDOM)
    stage = STAGES["clip-26m"]["sft"]
    set_trainable(model, stage)
    examples = bench_rows(model.config, processor, "clip-26m", "sft", rows)
    step = prepare(model, processor, examples, PADDED["clip-26m"]["sft"])
    runner = StepRunner(PEAK_VARIANTS[name], model, adamw(model, stage))
    for _ in range(2):
        runner.seconds(step)
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"gigabytes": gigabytes, "kept_a_row": runner.activation_bytes(step) / rows / 1e9}


def in_a_process(option: str, *values: object, one_core: bool = False) -> dict:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, option, *map(str, values)]
    environment = os.environ | (ONE_CORE if one_core else {})
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peaks() -> dict:
    """Of a step of stage 2 with 32 samples; the reference's from 8 samples and the activations of 24 more."""
    reference = in_a_process("--peak", "old", 8)
    ours, compiled = (in_a_process("--peak", name, 32)["gigabytes"] for name in ("engine", "compiled"))
    extrapolated = reference["gigabytes"] + (32 - 8) * reference["kept_a_row"]
    return {
        "old_8_rows": reference["gigabytes"],
        "old_kept_a_row": reference["kept_a_row"],
        "old_32_rows_on_a_line": extrapolated,
        "engine_32_rows": ours,
        "compiled_32_rows": compiled,
        "times": extrapolated / compiled,
    }


def plot(curves: dict) -> Figure:
    """Four panels: time and memory against text length, time against image tokens, the data path against rows."""
    figure = Figure(figsize=(10.5, 7), layout="constrained")
    (text, memory), (image, data) = figure.subplots(2, 2)
    for axes, series, over, key, title in (
        (text, curves["text"], "tokens", "milliseconds", "longer text: time"),
        (memory, curves["text"], "tokens", "kept_megabytes", "longer text: activation memory"),
        (image, curves["image"], "image_tokens", "milliseconds", "more image tokens: time"),
    ):
        for name, label in LABELS.items():
            x, y = zip(*((point[over], point[key]) for point in series[name]), strict=True)
            _line(axes, x, y, label, name == "old")
        unit = "milliseconds" if key == "milliseconds" else "megabytes"
        axes.set(title=title, xlabel=f"{over.replace('_', ' ')} of a sample", ylabel=f"{unit} a sample", ylim=(0, None))
    counts = [point["rows"] for point in curves["data"]]
    for key, label in (("check_seconds", "check"), ("epoch_seconds", "one epoch")):
        _line(data, counts, [point[key] for point in curves["data"]], label, key == "check_seconds")
    data.set(xscale="log", yscale="log", title="more samples: data path alone", xlabel="rows", ylabel="seconds")
    return figure


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], label: str, dashed: bool) -> None:
    """One curve; dashed and with squares, so that it is not told by its colour alone."""
    marker, colour, line = ("s", "#6E6E6E", "--") if dashed else ("o", "#006BA4", "-")
    axes.plot(x, y, marker=marker, color=colour, linestyle=line, label=label)
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


def measure() -> dict:
    """All curves."""
    model, processor = model_with(SIDES[1])  # CLIP's own size
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
    curves["data"] = [in_a_process("--data-path", count, one_core=True) for count in COUNTS]
    return curves


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-path", type=int, metavar="ROWS", help="this measurement alone, printed as JSON")
    parser.add_argument("--peak", nargs=2, metavar=("VARIANT", "ROWS"), help="the same")
    parser.add_argument("--plot", action="store_true", help="measure nothing, draw the committed figures again")
    options = parser.parse_args(arguments)
    file = data_folder() / FILE
    if options.data_path or options.peak:
        name, rows = options.peak or ("", 0)
        print(json.dumps(data_path(options.data_path) if options.data_path else peak(name, int(rows))))
        return
    if not options.plot:
        about = {"command": "python tests/benchmarks/curves.py", "load_before": os.getloadavg()[0]}
        about |= {"rows_a_step": ROWS_A_STEP, "threads": torch.get_num_threads(), "torch": torch.__version__}
        write_json(file, about | measure())
    plot(json.loads(file.read_text("utf-8"))).savefig(file.with_suffix(".png"), dpi=144)


if __name__ == "__main__":
    main()
