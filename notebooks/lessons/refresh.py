"""Run notebooks from top to bottom and keep what they say: `python -m lessons.refresh notebooks/*.ipynb`.

Time and memory are measured on the way and kept, with a hash of the code that was run, in `notebooks/measured.json`;
the line of a first cell that begins with **Measured** is made from there. Progress bars and widgets are not kept:
without a kernel they are empty frames. Linux and macOS only.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from minivlm.runtime.files import write_json

MEASURED = re.compile(r"^\*\*Measured\*\*:.*$", re.MULTILINE)
WIDGET = "application/vnd.jupyter.widget-view+json"
SECONDS_PER_CELL = 1200
SOLUTIONS = "solutions"
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit in which the system counts


def refresh(file: Path, keep_times: bool = False) -> str:
    """Run one notebook in its own folder and write it back with its outputs. Returns the measured line.

    Args:
        keep_times: leave time and memory as they were measured before, for a processor without bfloat16; the hash of
            the code that they are of is kept, too, as "timed".

    Raises:
        RuntimeError: a cell failed (its error is on stderr); the file is left as it was.
    """
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        megabytes = _execute(file, folder)
        seconds = time.perf_counter() - began
        notebook = without_widgets(json.loads((Path(folder) / file.name).read_text("utf-8")))
    entry = {"seconds": round(seconds), "megabytes": megabytes, "cores": os.cpu_count(), "code": code_hash(notebook)}
    if keep_times:
        earlier = measured(file)
        entry = {"timed": earlier["code"]} | earlier | {"code": entry["code"]}
    entries = json.loads(_record(file).read_text("utf-8")) if _record(file).is_file() else {}
    write_json(_record(file), dict(sorted((entries | {_name(file): entry}).items())))
    line = measured_line(entry)
    first = notebook["cells"][0]
    first["source"] = MEASURED.sub(line, "".join(first["source"])).splitlines(keepends=True)
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return line


def measured(file: Path) -> dict[str, Any]:
    """What was measured when the notebook was last run: seconds, megabytes, cores, and the hash of its code.

    Raises:
        KeyError: it was never run by `refresh`.
    """
    return json.loads(_record(file).read_text("utf-8"))[_name(file)]


def measured_line(entry: dict[str, Any]) -> str:
    """What the first cell says about time and memory, from an entry of `measured.json`."""
    seconds = entry["seconds"]
    duration = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"
    return f"**Measured**: {duration} and {entry['megabytes']} MB on {entry['cores']} CPU cores."


def code_hash(notebook: dict[str, Any]) -> str:
    """SHA-256 of all code cells, in order."""
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(cells, ensure_ascii=False).encode()).hexdigest()


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


def _record(file: Path) -> Path:
    """The one file of what was measured: beside the notebooks, also for those in `solutions/`."""
    folder = file.resolve().parent
    return (folder.parent if folder.name == SOLUTIONS else folder) / "measured.json"


def _name(file: Path) -> str:
    """A notebook's name in the record."""
    return f"{SOLUTIONS}/{file.stem}" if file.resolve().parent.name == SOLUTIONS else file.stem


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lessons.refresh", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="notebooks to run and write back")
    parser.add_argument("--keep-times", action="store_true", help="leave minutes and memory as they are")
    options = parser.parse_args()
    for file in options.files:
        print(f"{file}: {refresh(file, options.keep_times)}", flush=True)


if __name__ == "__main__":
    main()
