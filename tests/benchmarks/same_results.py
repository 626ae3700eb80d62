"""Whether a run by the engine answers as the plain path did: `python tests/benchmarks/same_results.py runs/seed-0`.

Compares the page's headline figures of a finished run with those of the shipped seeds, which were trained before there
was an engine (the library's eager attention, mixed precision or float32, nothing compiled). Writes
`data/results/same_results.json`: for each figure its value, the seeds' lowest and highest, and its distance from their
mean in standard errors of one run (the widest of the four, as the interval of a perfect score has no width). And the
losses of the last steps beside those of the shipped weights, whose seed and rows the run must share, step by step.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from minivlm.report import headline, read_seeds
from minivlm.runtime.paths import data_folder

FILE = "results/same_results.json"
LAST = 100  # steps


def figures(scores: dict, name: str = "") -> Iterator[tuple[str, dict]]:
    """Every share in a headline, with its interval, by its name."""
    for key, value in scores.items():
        if isinstance(value, dict):
            if {"value", "low", "high"} <= value.keys():
                yield f"{name}{key}", value
            else:
                yield from figures(value, f"{name}{key}.")


def compared(run: dict, seeds: list[dict]) -> dict:
    """Each figure beside the seeds'; an interval of 95% is 3.92 standard errors wide."""
    others, result = [dict(figures(seed)) for seed in seeds], {}
    for name, score in figures(run):
        values = [other[name]["value"] for other in others]
        error = max(one["high"] - one["low"] for one in (score, *(other[name] for other in others))) / 3.92
        result[name] = {
            "value": score["value"],
            "seeds": [min(values), max(values)],
            "standard_errors": (score["value"] - statistics.mean(values)) / (error or 1),
        }
    return result


def losses(run: Path, shipped: Path) -> dict:
    """The mean loss of the last steps of both, and its difference with a standard error over steps of the same rows."""
    one, other = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
        for folder in (run, shipped)
    )
    if [step["tokens"] for step in one] != [step["tokens"] for step in other]:
        raise ValueError(f"{run} and {shipped} did not take the same rows; run with the seed that was shipped")
    pairs = [(now["loss"], before["loss"]) for now, before in zip(one, other, strict=True)][-LAST:]
    differences = [now - before for now, before in pairs]
    return {
        "run": statistics.mean(now for now, _ in pairs),
        "shipped": statistics.mean(before for _, before in pairs),
        "difference": statistics.mean(differences),
        "standard_error": statistics.stdev(differences) / len(differences) ** 0.5,
        "steps": len(differences),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    folder = parser.parse_args().run
    run = json.loads((folder / "results.json").read_text("utf-8"))
    result = compared(headline(run), read_seeds(data_folder() / "results" / "seeds.json"))
    distances = [figure["standard_errors"] for figure in result.values()]
    report = {
        "command": run["command"],
        "precision": run["precision"],
        "figures": len(result),
        "within_two_standard_errors": sum(abs(distance) <= 2 for distance in distances),
        "mean_standard_errors": statistics.mean(distances),
        "furthest": max(distances, key=abs),
        "losses": {stage: losses(folder / stage, data_folder() / stage) for stage in run["losses"]},
        "by_name": result,
    }
    (data_folder() / FILE).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(json.dumps({key: value for key, value in report.items() if key != "by_name"}, indent=1))


if __name__ == "__main__":
    main()
