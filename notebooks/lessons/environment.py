"""Is everything here that the course needs? Asked once, with what to do where something is missing."""

import html
import importlib.metadata
import os
import platform
import tempfile
from pathlib import Path
from typing import NamedTuple

import psutil
from IPython.display import display
from packaging.requirements import Requirement
from packaging.version import Version

from lessons.plots import CELL, chinese_font
from minivlm.runtime.paths import BASE, PRETRAIN, SFT, data_folder

PACKAGE = "minivlm"
GIGABYTES = 2.0  # no notebook takes more
AGAIN = "run `make lab` again; it installs what is missing"


class Finding(NamedTuple):
    """One thing that was looked at: what it is, what is here, whether that is enough, and if not what to do."""

    what: str
    here: str
    enough: bool
    advice: str = ""


def look() -> list[Finding]:
    """Look at Python, packages, weights, memory and the folder; nothing is changed."""
    wanted = importlib.metadata.metadata(PACKAGE)["Requires-Python"]
    python = platform.python_version()
    findings = [Finding("Python", python, Requirement(f"python{wanted}").specifier.contains(python), f"needs {wanted}")]
    findings += [_package(Requirement(line)) for line in importlib.metadata.requires(PACKAGE) if _of_course(line)]
    findings += [_weights(name) for name in (BASE, PRETRAIN, SFT)]
    free = psutil.virtual_memory().available / 2**30
    findings.append(
        Finding(
            "free memory", f"{free:.1f} GB", free >= GIGABYTES, f"close other programs: {GIGABYTES:.0f} GB are used"
        )
    )
    findings.append(_folder(Path.cwd()))
    return findings


def remarks() -> list[str]:
    """What changes how the course runs here, and is no fault."""
    cores = os.cpu_count() or 1
    said = [f"{cores} CPU cores: the minutes at the top of each notebook were measured with 2"]
    if chinese_font() is None:
        said.append("no Chinese font for figures: they are labelled in English; tables show Chinese all the same")
    return said


def show_environment(findings: list[Finding]) -> None:
    """A table of what was found; what is not enough comes first, with what to do."""
    ordered = sorted(findings, key=lambda finding: finding.enough)
    rows = "".join(f"<tr>{''.join(map(_cell, _row(finding)))}</tr>" for finding in ordered)
    heads = "".join(f'<th scope="col" style="{CELL}">{name}</th>' for name in ("", "what", "here", "what to do"))
    missing = sum(not finding.enough for finding in findings)
    summary = f"{len(findings) - missing} of {len(findings)} things are as they should be."
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in remarks())
    page = f"<details{' open' if missing else ''}><summary><b>{summary}</b></summary><table><thead><tr>{heads}</tr>"
    page += f"</thead><tbody>{rows}</tbody></table></details><ul>{notes}</ul>"
    display({"text/html": page, "text/plain": summary}, raw=True)


def _row(finding: Finding) -> tuple[str, str, str, str]:
    return ("✓", *finding[:2], "") if finding.enough else ("✗", *finding[:2], finding.advice)


def _cell(text: str) -> str:
    return f'<td style="{CELL}">{html.escape(text)}</td>'


def _of_course(line: str) -> bool:
    """Whether a requirement belongs to the package itself or to its notebooks."""
    marker = Requirement(line).marker
    return marker is None or marker.evaluate({"extra": "course"})


def _package(wanted: Requirement) -> Finding:
    advice = f"needs {wanted.specifier}: {AGAIN}"
    try:
        here = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(wanted.name, "missing", False, advice)
    return Finding(wanted.name, here, wanted.specifier.contains(Version(here).base_version), advice)


def _weights(name: str) -> Finding:
    files = list((data_folder() / name).glob("*.safetensors"))
    size = f"{sum(file.stat().st_size for file in files) / 1e6:.0f} MB"
    return Finding(
        f"weights in data/{name}", size, bool(files), "clone the project again: its data folder is incomplete"
    )


def _folder(folder: Path) -> Finding:
    """Notebooks train into a folder beside them, which they remove again."""
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            return Finding("this folder", "can be written", True)
    except OSError as problem:
        return Finding(
            "this folder", problem.strerror or "cannot be written", False, "copy the project to a place of yours"
        )
