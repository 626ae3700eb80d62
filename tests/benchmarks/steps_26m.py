"""Real steps at the true 26M shape: `python tests/benchmarks/steps_26m.py`, or with `--steps 200` on a GPU.

Random weights of CLIP-ViT-B/16 and of the 26M language model, drawn scenes at 224 pixels, the batches of the recipe,
and the course's own `train`. Writes loss, throughput and peak memory to `data/results/steps_DEVICE.json`. Each
precision has a process of its own, so that their peaks are separate.
"""

import argparse
import json
import platform
import resource
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch

from minivlm.checkpoint import load_checkpoint
from minivlm.config import STAGES
from minivlm.convert.hub import RANDOM, import_published
from minivlm.data.samples import Sample
from minivlm.runtime.files import write_json
from minivlm.runtime.paths import data_folder
from minivlm.scenes import samples as scene_samples
from minivlm.train import Trainer

IMAGES = 64


def measure(precision: str, steps: int, batch: int | None, device: str) -> dict:
    """Both stages in sequence, as the recipe has them, only shorter."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        parent = Path(folder) / "base"
        import_published(parent, RANDOM, RANDOM)
        for name, recipe in STAGES["clip-26m"].items():
            model, processor, _ = load_checkpoint(parent)
            stage = replace(recipe, steps=steps, warmup_steps=min(10, steps), batch_size=batch or recipe.batch_size)
            out = Path(folder) / name
            options = {"parent": parent, "precision": precision, "save_every": steps}
            log = Trainer(model, processor, rows(name), stage, out, **options).fit()
            results[name] = summary(log, stage.batch_size, device)
            parent = out
    return results


def rows(stage: str) -> list[Sample]:
    """The drawn world's samples of a stage; each image is drawn once and shared."""
    with patch.object(scene_samples, "draw", cache(scene_samples.draw)):
        return list(scene_samples.SceneSamples(stage, IMAGES, 8 * IMAGES))


def summary(log: list[dict], batch: int, device: str) -> dict:
    """The figures of a log; for speed the first step, which warms up, is left out where there are more."""
    seconds = statistics.median(entry["seconds"] for entry in log[1:] or log)
    losses = [entry["loss"] for entry in log]
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "steps": len(log),
        "batch_size": batch,
        "loss": {"first": losses[0], "last": statistics.mean(losses[-10:])},
        "seconds_per_step": seconds,
        "rows_per_second": batch / seconds,
        "tokens_per_second": statistics.median(entry["tokens_per_second"] for entry in log[1:] or log),
        "peak_gigabytes": peak / 1e9,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch", type=int, help="samples a step (default: the recipe's, 16 and 32)")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--out", type=Path, help="the file to write")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    typed = sys.argv[1:] if arguments is None else arguments
    content = {
        "command": shlex.join(["python", "tests/benchmarks/steps_26m.py", *typed]),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    for precision in options.precisions:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            content[precision] = pool.submit(measure, precision, options.steps, options.batch, device).result()
    write_json(options.out or data_folder() / "results" / f"steps_{device}.json", content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
