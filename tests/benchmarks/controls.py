"""How many controls of finished runs are at chance: `python tests/benchmarks/controls.py runs/seed-0 runs/seed-1 …`.

Writes `data/results/controls.json`: for each run and control, and over all runs, how many intervals hold the chance
level (`evaluation/chance.py`), which lie above or below it, and where the model, shown another image, did better than
the best blind guess.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minivlm.evaluation import CONTROLS
from minivlm.pipeline import RESULTS
from minivlm.report import beats_blind, held
from minivlm.runtime.files import write_json
from minivlm.runtime.paths import data_folder

FILE = "results/controls.json"


def controls(run: dict[str, Any]) -> dict[str, Any]:
    """The counts of one run."""
    return {
        "seed": run["seed"],
        "command": run["command"],
        "held": {control: held(run, control)._asdict() for control in CONTROLS},
        "beats_blind": beats_blind(run),
    }


def total(runs: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """The counts over all runs."""
    return {
        control: {
            "inside": sum(run["held"][control]["inside"] for run in runs),
            "of": sum(run["held"][control]["of"] for run in runs),
            "above": sum(len(run["held"][control]["above"]) for run in runs),
        }
        for control in CONTROLS
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    folders = parser.parse_args(arguments).runs
    command = shlex.join(["python", "tests/benchmarks/controls.py", *map(str, folders)])
    runs = [controls(json.loads((folder / RESULTS).read_text("utf-8"))) for folder in folders]
    write_json(data_folder() / FILE, {"command": command, "runs": runs, "total": total(runs)})


if __name__ == "__main__":
    main()
