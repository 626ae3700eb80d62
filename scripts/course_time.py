"""The course's own time beside that of an earlier commit: `python scripts/course_time.py --before edfce0f`.

Both trees are laid out in a temporary folder and run at the same time, each with half of the cores and this
environment's packages, so that whatever else the machine does falls on both alike: imports, a short run of everything
(`minivlm run` with fewer steps, pictures and questions; its phases by themselves), and every notebook that both have.
Writes `data/results/course_time.json` after every pair: the seconds, the ratio before / after of each turn, and the
peak of memory in gigabytes.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from minivlm.paths import data_folder

FILE = data_folder() / "results" / "course_time.json"
IMPORTS = {
    "import minivlm": "import minivlm",
    "import of notebook 03": "import minivlm; from minivlm.notebook import figures, learning, lenses, stages, tables",
}
SHORT = ["--scale", "0.1", "--pictures", "400", "--exam", "40", "--precision", "bf16", "--anew"]
IMPORTED = 8  # times in the first turn: an import is short
BOOKS = "notebooks/*.ipynb"
TREES = ("before", "after")


def lay_out(commit: str, folder: Path) -> Path:
    """The files of a commit, in a new folder."""
    archive = subprocess.run(["git", "archive", commit], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def run_in(tree: Path, *command: str) -> str:
    """What a Python program prints that runs in a tree and imports its package, not the installed one."""
    threads = max(1, os.cpu_count() // len(TREES))
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    found = subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"{' '.join(command)} failed in {tree}:\n{found.stderr[-2000:]}")
    return found.stdout


def import_seconds(tree: Path, statement: str) -> dict[str, float]:
    """How long a fresh interpreter takes over an import, by its own clock."""
    program = f"import time; began = time.perf_counter(); {statement}; print(time.perf_counter() - began)"
    return {"seconds": float(run_in(tree, "-c", program))}


def short_run(tree: Path) -> dict[str, float]:
    """Seconds of each phase of a short run of everything, and its memory."""
    out = tree / "runs" / "short"
    run_in(tree, "-m", "minivlm", "run", "--out", str(out), *SHORT)
    results = json.loads((out / "results.json").read_text("utf-8"))
    return results["seconds"] | {"gigabytes": results["peak_memory_gb"]}


def notebook(tree: Path, name: str) -> dict[str, float]:
    """Seconds and memory of a notebook from top to bottom, the kernel's start included."""
    run_in(tree, "-m", "minivlm.notebook.refresh", f"notebooks/{name}")
    entry = json.loads((tree / "notebooks" / "measured.json").read_text("utf-8"))[Path(name).stem]
    return {"seconds": entry["seconds"], "gigabytes": entry["megabytes"] / 1000}


def side_by_side(measure: Callable, trees: dict[str, Path]) -> dict[str, dict[str, float]]:
    """What a measurement finds in each tree, made in all of them at the same time."""
    with ThreadPoolExecutor(len(trees)) as pool:
        return dict(zip(trees, pool.map(measure, trees.values()), strict=True))


def compared(turns: list[dict[str, dict[str, float]]]) -> dict[str, dict]:
    """Every figure of both trees, and how many times as much it was before; a ratio compares within a turn."""
    found = {}
    for key in turns[0]["after"]:
        before, after = ([turn[tree][key] for turn in turns] for tree in TREES)
        ratios = [one / other for one, other in zip(before, after, strict=True)]
        found[key] = {"before": before, "after": after, "ratio": statistics.median(ratios)}
        found[key]["from_to"] = [min(ratios), max(ratios)]
    return found


def keep(commits: dict[str, str], name: str, found: dict) -> None:
    """Enter one measurement, beside those that were made of the same two commits."""
    made = json.loads(FILE.read_text("utf-8")) if FILE.is_file() else {}
    if made.get("commits") != commits:
        made = {"command": "python scripts/course_time.py --before " + commits["before"], "commits": commits, "of": {}}
    made["of"][name] = found
    FILE.write_text(json.dumps(made, indent=1) + "\n", "utf-8")
    for part, figures in found.items():
        print(f"{name}, {part}: {figures['ratio']:.2f} ({figures['from_to'][0]:.2f} to {figures['from_to'][1]:.2f})")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="the earlier commit")
    parser.add_argument("--after", default="HEAD", help="the later commit")
    parser.add_argument("--turns", type=int, default=2, help="of everything")
    parser.add_argument("--only", default="", help="measure only what has this in its name, and keep the rest")
    asked = parser.parse_args()
    short = ["git", "rev-parse", "--short"]
    commits = {
        tree: subprocess.run([*short, getattr(asked, tree)], capture_output=True, text=True, check=True).stdout.strip()
        for tree in TREES
    }
    with tempfile.TemporaryDirectory() as folder:
        trees = {tree: lay_out(commits[tree], Path(folder) / tree) for tree in TREES}
        jobs = {name: partial(import_seconds, statement=statement) for name, statement in IMPORTS.items()}
        jobs["short run"] = short_run
        jobs |= {path.name: partial(notebook, name=path.name) for path in sorted(trees["before"].glob(BOOKS))}
        taken: dict[str, list] = {name: [] for name in jobs if asked.only in name}
        for turn in range(asked.turns):
            for name, turns in taken.items():
                for _ in range(IMPORTED if name in IMPORTS and not turn else 1):
                    turns.append(side_by_side(jobs[name], trees))
                keep(commits, name, compared(turns))


if __name__ == "__main__":
    main()
