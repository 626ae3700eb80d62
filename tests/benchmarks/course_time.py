"""The course's own time beside that of an earlier commit: `python tests/benchmarks/course_time.py --before edfce0f`.

Both trees are laid out in a temporary folder and run with this environment's packages in slices of half a second, one
while the other is halted (SIGSTOP), so that whatever else the machine does falls on both alike, and each has all cores
while it runs: imports, a short run of everything (`minivlm run` with fewer steps, pictures and questions; its phases by
themselves), and every notebook that both have. Writes `data/results/course_time.json` after every pair: the seconds,
the ratio before / after of each turn, and the peak of memory in gigabytes. Linux and macOS.
"""

import argparse
import contextlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil

from minivlm.runtime.paths import data_folder

FILE = data_folder() / "results" / "course_time.json"
IMPORTS = {
    "import_minivlm": "import minivlm",
    "import_in_03": "import minivlm; from lessons import learning, lenses, plots, stages",
}
SLICE = 0.5  # seconds
SHORT = ["--scale", "0.1", "--pictures", "400", "--exam", "40", "--precision", "bf16", "--anew"]
IMPORTED = 5  # times in the first turn: an import is short
BOOKS = "notebooks/*.ipynb"
TREES = ("before", "after")


def lay_out(commit: str, folder: Path) -> Path:
    """The files of a commit, in a new folder."""
    archive = subprocess.run(["git", "archive", commit], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


class Program:
    """A Python program that runs in a tree and imports its package, not the installed one. It begins halted."""

    def __init__(self, tree: Path, *command: str):
        environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
        self.seconds, self.printed = 0.0, tree / "printed.txt"
        with self.printed.open("w") as printed:
            self.process = psutil.Popen(
                [sys.executable, *command], cwd=tree, env=environment, stdout=printed, stderr=subprocess.STDOUT
            )
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        """Tell it and whatever it started; a notebook's kernel is in a process group of its own."""
        for process in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended in the meantime
                process.send_signal(number)

    def slice(self) -> bool:
        """Let it run for a while. Returns whether it is done."""
        began = time.perf_counter()
        self._signal(signal.SIGCONT)
        with contextlib.suppress(psutil.TimeoutExpired):
            self.process.wait(SLICE)
        self.seconds += time.perf_counter() - began
        done = self.process.poll() is not None
        if not done:
            self._signal(signal.SIGSTOP)
        return done

    def end(self) -> None:
        """Stop it and whatever it started."""
        self._signal(signal.SIGKILL)

    def output(self) -> str:
        """What it printed, once it is done."""
        text = self.printed.read_text("utf-8")
        if self.process.returncode:
            raise RuntimeError(f"{' '.join(self.process.args)} failed:\n{text[-2000:]}")
        return text


def by_slices(command: Sequence[str], trees: dict[str, Path]) -> dict[str, Program]:
    """Run the same program in all trees, in slices by turns; one that has ended has its slices empty."""
    programs = {name: Program(tree, *command) for name, tree in trees.items()}
    running = list(programs.values())
    try:
        while running:
            for program in programs.values():
                if program not in running:
                    time.sleep(SLICE)  # a program's own clock runs on while it is halted: half of the time, to the end
                elif program.slice():
                    running.remove(program)
    finally:
        for program in running:
            program.end()
    return programs


def import_seconds(trees: dict[str, Path], statement: str) -> dict[str, dict[str, float]]:
    """How long fresh interpreters take over an import, the interpreter's start included."""
    programs, found = by_slices(["-c", statement], trees), {}
    for name, program in programs.items():
        program.output()
        found[name] = {"seconds": program.seconds}
    return found


def short_run(trees: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Seconds of a short run of everything and of its phases (by its own clock, halved), and its memory."""
    programs, found = by_slices(["-m", "minivlm", "run", "--out", "runs/short", *SHORT], trees), {}
    for name, program in programs.items():
        program.output()
        results = json.loads((trees[name] / "runs" / "short" / "results.json").read_text("utf-8"))
        halted = {phase: seconds / len(trees) for phase, seconds in results["seconds"].items() if phase != "total"}
        found[name] = {"seconds": program.seconds, "gigabytes": results["peak_memory_gb"]} | halted
    return found


def notebook(trees: dict[str, Path], name: str) -> dict[str, dict[str, float]]:
    """Seconds and memory of a notebook from top to bottom, the kernel's start included."""
    programs, found = by_slices(["-m", "lessons.refresh", f"notebooks/{name}"], trees), {}
    for tree, program in programs.items():
        program.output()
        entry = json.loads((trees[tree] / "notebooks" / "measured.json").read_text("utf-8"))[Path(name).stem]
        found[tree] = {"seconds": program.seconds, "gigabytes": entry["megabytes"] / 1000}
    return found


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
        command = " ".join(["python", *sys.argv])
        made = {"command": command, "commits": commits, "of": {}}
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
        jobs["short_run"] = short_run
        jobs |= {path.stem: partial(notebook, name=path.name) for path in sorted(trees["before"].glob(BOOKS))}
        taken: dict[str, list] = {name: [] for name in jobs if asked.only in name}
        for turn in range(asked.turns):
            for name, turns in taken.items():
                for _ in range(IMPORTED if name in IMPORTS and not turn else 1):
                    turns.append(jobs[name](trees))
                keep(commits, name, compared(turns))


if __name__ == "__main__":
    main()
