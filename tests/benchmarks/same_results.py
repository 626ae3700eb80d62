"""Whether a run reproduces the shipped results: `python tests/benchmarks/same_results.py runs/seed-0`.

Compares the headline figures of a finished run with those of the shipped seeds, which were trained with the library's
eager attention, in mixed precision or float32, not compiled. Writes `data/results/same_results.json`: for each figure
its value, the seeds' lowest and highest, and its distance from their mean in standard errors of one run (from the
widest of the four intervals, as that of a perfect score has no width). And the losses of the last steps beside those of
the shipped weights, step by step; both runs must have the same seed and samples.
"""

import argparse
import json
import shlex
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from minivlm.report import headline, read_seeds
from minivlm.runtime.files import write_json
from minivlm.runtime.paths import data_folder

FILE = "results/same_results.json"
LAST = 100  # steps


def figures(results: dict, name: str = "") -> Iterator[tuple[str, dict]]:
    """Every share in a headline, with its interval, by its name."""
    for key, value in results.items():
        if isinstance(value, dict):
            if {"value", "low", "high"} <= value.keys():
                yield f"{name}{key}", value
            else:
                yield from figures(value, f"{name}{key}.")


def compared(run: dict, seeds: list[dict]) -> dict:
    """Each figure beside the seeds'; an interval of 95% is 3.92 standard errors wide."""
    others, comparison = [dict(figures(seed)) for seed in seeds], {}
    for name, figure in figures(run):
        values = [other[name]["value"] for other in others]
        error = max(one["high"] - one["low"] for one in (figure, *(other[name] for other in others))) / 3.92
        comparison[name] = {
            "value": figure["value"],
            "seeds": [min(values), max(values)],
            "standard_errors": (figure["value"] - statistics.mean(values)) / (error or 1),
        }
    return comparison


def losses(run: Path, shipped: Path) -> dict:
    """The mean loss of the last steps of both, and the mean difference with its standard error over these steps."""
    logs = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
        for folder in (run, shipped)
    ]
    if len({tuple(step["tokens"] for step in log) for log in logs}) > 1:
        raise ValueError(f"{run} and {shipped} did not train on the same samples; run with the seed that was shipped")
    ours, theirs = ([step["loss"] for step in log[-LAST:]] for log in logs)
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    return {
        "run": statistics.mean(ours),
        "shipped": statistics.mean(theirs),
        "difference": statistics.mean(differences),
        "standard_error": statistics.stdev(differences) / len(differences) ** 0.5,
        "steps": len(differences),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    folder = parser.parse_args(arguments).run
    run = json.loads((folder / "results.json").read_text("utf-8"))
    comparison = compared(headline(run), read_seeds(data_folder() / "results" / "seeds.json"))
    distances = [figure["standard_errors"] for figure in comparison.values()]
    content = {
        "command": shlex.join(["python", "tests/benchmarks/same_results.py", str(folder)]),
        "run": run["command"],
        "precision": run["precision"],
        "figures": len(comparison),
        "within_two_standard_errors": sum(abs(distance) <= 2 for distance in distances),
        "mean_standard_errors": statistics.mean(distances),
        "furthest": max(distances, key=abs),
        "losses": {stage: losses(folder / stage, data_folder() / stage) for stage in run["losses"]},
        "by_name": comparison,
    }
    write_json(data_folder() / FILE, content)
    print(json.dumps({key: value for key, value in content.items() if key != "by_name"}, indent=1))


if __name__ == "__main__":
    main()
