"""The course's own time beside that of an earlier commit: `python scripts/course_time.py --before edfce0f`.

Both trees are laid out in a temporary folder and run by turns with this environment's packages: imports, a short run
of everything (`minivlm run` with fewer steps, pictures and questions; its phases by themselves), and every notebook
that both have. Each turn takes the two in the other order. Writes `data/results/course_time.json` after every turn:
the seconds, the ratio before / after of each turn, and the peak of memory in gigabytes.
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
from collections.abc import Iterator
from pathlib import Path

from minivlm.paths import data_folder

FILE = data_folder() / "results" / "course_time.json"
IMPORTS = {
    "import minivlm": "import minivlm",
    "import of notebook 03": "import minivlm; from minivlm.notebook import figures, learning, lenses, stages, tables",
}
SHORT = ["--scale", "0.1", "--pictures", "400", "--exam", "40", "--precision", "bf16", "--anew"]
TREES = ("before", "after")


def lay_out(commit: str, folder: Path) -> Path:
    """The files of a commit, in a new folder."""
    archive = subprocess.run(["git", "archive", commit], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def run_in(tree: Path, *command: str) -> str:
    """What a Python program prints that runs in a tree and imports its package, not the installed one."""
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
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


def by_turns(measure, trees: dict[str, Path], turns: int) -> Iterator[dict]:
    """After each turn: every figure of both trees so far, and the ratios of its turns, the fastest turn's first."""
    taken: dict[str, list[dict[str, float]]] = {tree: [] for tree in trees}
    for turn in range(turns):
        for tree in trees if turn % 2 == 0 else reversed(trees):
            taken[tree].append(measure(trees[tree]))
        yield {key: _compared(*([one[key] for one in taken[tree]] for tree in trees)) for key in taken["after"][0]}


def _compared(before: list[float], after: list[float]) -> dict:
    ratios = [one / other for one, other in zip(before, after, strict=True)]
    return {"before": before, "after": after, "ratio": statistics.median(ratios), "from_to": [min(ratios), max(ratios)]}


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
    parser.add_argument("--turns", type=int, default=2, help="of each notebook and of the short run")
    parser.add_argument("--only", default="", help="measure only what has this in its name, and keep the rest")
    asked = parser.parse_args()
    short = ["git", "rev-parse", "--short"]
    commits = {
        tree: subprocess.run([*short, getattr(asked, tree)], capture_output=True, text=True, check=True).stdout.strip()
        for tree in TREES
    }
    with tempfile.TemporaryDirectory() as folder:
        trees = {tree: lay_out(commits[tree], Path(folder) / tree) for tree in TREES}
        books = sorted({path.name for path in (trees["before"] / "notebooks").glob("*.ipynb")})
        jobs = {name: (lambda tree, said=said: import_seconds(tree, said), 5) for name, said in IMPORTS.items()}
        jobs["short run"] = (short_run, asked.turns)
        jobs |= {name: (lambda tree, name=name: notebook(tree, name), asked.turns) for name in books}
        for name, (measure, turns) in jobs.items():
            if asked.only in name:
                for found in by_turns(measure, trees, turns):
                    keep(commits, name, found)


if __name__ == "__main__":
    main()
