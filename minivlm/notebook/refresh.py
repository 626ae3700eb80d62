"""Run notebooks from top to bottom and keep what they say: `python -m minivlm.notebook.refresh notebooks/*.ipynb`.

Time and memory are measured on the way and written into the first cell's line that begins with **Measured**. Progress
bars are not kept: without a kernel they are empty frames. Linux and macOS only.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MEASURED = re.compile(r"^\*\*Measured\*\*:.*$", re.MULTILINE)
WIDGET = "application/vnd.jupyter.widget-view+json"
SECONDS_PER_CELL = 1200
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit in which the system counts


def refresh(file: Path) -> str:
    """Run one notebook in its own folder and write it back with its outputs. Returns the measured line.

    Raises:
        ValueError: its first cell has no line that begins with **Measured**.
        RuntimeError: a cell failed (its error is on stderr); the file is left as it was.
    """
    if not MEASURED.search(_first_cell(json.loads(file.read_text("utf-8")))):
        raise ValueError(f"{file}: the first cell has no line that begins with **Measured**; add one")
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        megabytes = _execute(file, folder)
        seconds = time.perf_counter() - began
        notebook = without_widgets(json.loads((Path(folder) / file.name).read_text("utf-8")))
    line = f"**Measured**: {_duration(seconds)} and {megabytes} MB on {os.cpu_count()} CPU cores."
    notebook["cells"][0]["source"] = MEASURED.sub(line, _first_cell(notebook)).splitlines(keepends=True)
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return line


def without_widgets(notebook: dict[str, Any]) -> dict[str, Any]:
    """Drop widget views, widget state and the version of the Python that ran it."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if WIDGET not in output.get("data", {})]
    notebook["metadata"].pop("widgets", None)
    notebook["metadata"]["language_info"] = {"name": "python"}
    return notebook


def _execute(file: Path, folder: str) -> int:
    """Run a notebook into a folder. Returns the megabytes of its largest process."""
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", folder]
    options = {"timeout": SECONDS_PER_CELL, "kernel_name": "python3", "record_timing": False}
    command += [f"--ExecutePreprocessor.{name}={value}" for name, value in options.items()]
    process = subprocess.Popen([*command, str(file)])
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"{file}: a cell failed, see above; the notebook was left as it was")
    return round(usage.ru_maxrss * MAXRSS_BYTES / 1e6)


def _first_cell(notebook: dict[str, Any]) -> str:
    return "".join(notebook["cells"][0]["source"])


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m minivlm.notebook.refresh", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="notebooks to run and write back")
    for file in parser.parse_args().files:
        print(f"{file}: {refresh(file)}", flush=True)


if __name__ == "__main__":
    main()
