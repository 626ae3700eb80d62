"""How far the controls of finished runs are at chance: `python tests/benchmarks/controls.py runs/seed-0 runs/seed-1 …`.

Writes `data/results/controls.json`: for each run and control, and over all runs, how many intervals hold the
control's chance level (`evaluation/chance.py`), which lie above or below it, and where another image
did better than the best blind guess.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from minivlm.evaluation import CONTROLS
from minivlm.pipeline import RESULTS
from minivlm.report import beats_blind, held
from minivlm.runtime.paths import data_folder

FILE = "results/controls.json"


def controls(run: dict[str, Any]) -> dict[str, Any]:
    """One run's entry."""
    return {
        "seed": run["seed"],
        "command": run["command"],
        "held": {control: held(run, control)._asdict() for control in CONTROLS},
        "beats_blind": beats_blind(run),
    }


def total(runs: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Over all runs."""
    return {
        control: {
            "inside": sum(run["held"][control]["inside"] for run in runs),
            "of": sum(run["held"][control]["of"] for run in runs),
            "above": sum(len(run["held"][control]["above"]) for run in runs),
        }
        for control in CONTROLS
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    entries = [controls(json.loads((run / RESULTS).read_text("utf-8"))) for run in parser.parse_args().runs]
    results = {"runs": entries, "total": total(entries)}
    (data_folder() / FILE).write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", "utf-8")
