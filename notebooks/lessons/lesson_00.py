"""Notebook 00: what the course needs, the map of its notebooks, and how far an image is from the drawn world.

A model that knows only drawn scenes answers about any image as if it were one. So the image is measured first: the
Mahalanobis distance between the mean of its patch features and those of drawn scenes (for networks' features Lee et
al., arXiv:1807.03888, section 2.1). `tests/benchmarks/familiar.py` measures what is kept in `data/results/`.
"""

import html
import importlib.metadata
import json
import os
import platform
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import safetensors.torch
import torch
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from packaging.requirements import Requirement
from packaging.version import Version

from lessons.lenses.attention import attention_to_patches, show_attention  # noqa: F401 (for the notebook)
from lessons.plots import (
    BLUE,
    BOX_HEIGHT,
    BOX_WIDTH,
    BOXES,
    GREY,
    INK,
    ORANGE,
    chinese_font,
    note,
    show,
    style,
    table_html,
)
from lessons.widgets.chat import Chat  # noqa: F401 (for the notebook)
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.runtime.files import hash_tensors
from minivlm.runtime.paths import BASE, PRETRAIN, SFT, data_folder

# ---- what the course needs

PACKAGE = "minivlm"
GIGABYTES = 2.0  # no notebook takes more
AGAIN = "run `make lab` again; it installs what is missing"


class Finding(NamedTuple):
    """One requirement: what it is, what is here, whether that is enough, and if not what to do."""

    what: str
    here: str
    enough: bool
    advice: str = ""


def look() -> list[Finding]:
    """Look at Python, packages, weights, memory and the folder; nothing is changed."""
    wanted = importlib.metadata.metadata(PACKAGE)["Requires-Python"]
    python = platform.python_version()
    findings = [Finding("Python", python, Requirement(f"python{wanted}").specifier.contains(python), f"needs {wanted}")]
    packages = map(Requirement, importlib.metadata.requires(PACKAGE))
    course = {"extra": "course"}  # what the package itself or its notebooks require
    findings += [_package(one) for one in packages if one.marker is None or one.marker.evaluate(course)]
    findings += [_weights(name) for name in (BASE, PRETRAIN, SFT)]
    free = psutil.virtual_memory().available / 2**30
    advice = f"close other programs: {GIGABYTES:.0f} GB are used"
    findings.append(Finding("free memory", f"{free:.1f} GB", free >= GIGABYTES, advice))
    findings.append(_writable(Path.cwd()))
    return findings


def remarks() -> list[str]:
    """What changes how the course runs here, and is no fault."""
    cores = os.cpu_count() or 1
    notes = [f"{cores} CPU cores: the minutes at the top of each notebook were measured with 2"]
    if chinese_font() is None:
        notes.append("no Chinese font for figures: they are labelled in English; tables show Chinese all the same")
    return notes


def show_environment(findings: list[Finding]) -> None:
    """A table of what was found; what is not enough comes first, with what to do."""
    ordered = sorted(findings, key=lambda finding: finding.enough)
    rows = [
        ["✓" if one.enough else "✗", *map(html.escape, (one.what, one.here, "" if one.enough else one.advice))]
        for one in ordered
    ]
    missing = sum(not finding.enough for finding in findings)
    summary = f"{len(findings) - missing} of {len(findings)} things are as they should be."
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in remarks())
    table = table_html(("", "what", "here", "what to do"), rows)
    page = f"<details{' open' if missing else ''}><summary><b>{summary}</b></summary>{table}</details><ul>{notes}</ul>"
    display({"text/html": page, "text/plain": summary}, raw=True)


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
    advice = "clone the project again: its data folder is incomplete"
    return Finding(f"weights in data/{name}", size, bool(files), advice)


def _writable(folder: Path) -> Finding:
    """Whether notebooks can train into a temporary folder beside them."""
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            return Finding("this folder", "can be written", True)
    except OSError as problem:
        reason = problem.strerror or "cannot be written"
        return Finding("this folder", reason, False, "copy the project to a folder of yours")


# ---- the map of the course


class Station(NamedTuple):
    """A notebook: its number, its title, the question it answers, and the boxes of the flow that are lit in it."""

    number: str
    title: str
    question: str
    lit: tuple[str, ...]


STATIONS = (
    Station("00", "See it work", "What does it see,\nand what not?", ("picture", "text", "answer")),
    Station("01", "Architecture", "What is it made of?", ("picture", "encoder", "W", "language model")),
    Station(
        "02", "Placeholders", "How does a picture\nget into a text?", ("text", "look-up", "replace", "language model")
    ),
    Station("03", "Stage 1", "How does W learn\nto translate?", ("W",)),
    Station("04", "Stage 2", "What does unfreezing\nbuy, and cost?", ("W", "look-up", "language model")),
    Station("05", "Results", "When and why does it\nmake things up?", ("picture", "answer")),
    Station("06", "Scaling to 26M", "What does the real\none cost?", ("picture", "encoder", "W", "language model")),
    Station("A1", "Base models", "Where do eye and\nspeaker come from?", ("encoder", "language model")),
    Station("A2", "Speed", "Where does the time go,\nand what is it for?", ("encoder", "language model", "answer")),
)
AFTER = {"A1": "01", "A2": "06"}  # the appendices, and the notebook that each asks for
CARD, MARGIN, HIGH = 26.0, 5.0, 34.0  # the width of a card, the gap to the next one, the height of a card
CARDS, BETWEEN = 5, 9.0  # cards in a row, and the gap to the row below
SHORT = {"language model": "LM"}


@style()
def course_map(minutes: dict[str, float]) -> Figure:
    """The stations in their order; each card shows the boxes that its notebook is about, and its minutes if known."""
    figure = Figure(figsize=(13.6, 7.0))
    axes = figure.add_axes((0, 0, 1, 1))
    corners = [_corner(station) for station in range(len(STATIONS))]
    for station, (left, bottom) in zip(STATIONS, corners, strict=True):
        _card(axes, station, left, bottom, minutes.get(station.number))
    for start, end in pairwise(corners[: -len(AFTER)]):
        _path(axes, start, end)
    for earlier, (left, bottom) in zip(AFTER.values(), corners[-len(AFTER) :], strict=True):
        text = f"at any time after {earlier}"
        axes.text(left + CARD / 2, bottom + HIGH + 1.3, text, ha="center", style="italic", fontsize=9)
    left, bottom = _corner(len(STATIONS))
    legend = "The model has these boxes;\na card lights those that\nits notebook is about."
    axes.text(left, bottom + HIGH - 8, legend, va="top")
    _boxes(axes, (), left, bottom + 6.3, named=True)
    axes.set(xlim=(-2, CARDS * (CARD + MARGIN) - MARGIN + 2), ylim=(-2, 2 * HIGH + BETWEEN + 2), aspect="equal")
    axes.axis("off")
    return figure


def minutes_measured(file: Path = Path("measured.json")) -> dict[str, float]:
    """How long "Run all" takes in each notebook, by its number, as `make notebooks` has measured it."""
    entries = json.loads(file.read_text("utf-8"))
    return {name[:2]: entry["seconds"] / 60 for name, entry in entries.items() if "/" not in name}


def show_course(minutes: dict[str, float]) -> None:
    """Show the map with its alternative text and a one-line summary."""
    stations = "; ".join(f"{s.number} {s.title}: {' '.join(s.question.split())}" for s in STATIONS)
    alt = (
        f"Map of the course, {len(STATIONS)} cards joined by arrows in their order, "
        f"{' and '.join(AFTER)} by themselves. {stations}"
    )
    total = sum(minutes.get(station.number, 0) for station in STATIONS)
    show(course_map(minutes), alt, f"{len(STATIONS)} notebooks; all of them run in {total:.0f} minutes on two cores.")


def _corner(station: int) -> tuple[float, float]:
    """A card's lower left corner: the first row above, the others below."""
    row, column = divmod(station, CARDS)
    return column * (CARD + MARGIN), (1 - row) * (HIGH + BETWEEN)


def _card(axes: Axes, station: Station, left: float, bottom: float, minutes: float | None) -> None:
    shape = "round,pad=0,rounding_size=1.6"
    axes.add_patch(FancyBboxPatch((left, bottom), CARD, HIGH, shape, facecolor="#FCFBF9", edgecolor=GREY))
    axes.text(left + 1.8, bottom + HIGH - 2, station.number, va="top", fontsize=17, fontweight="bold", color="#A64E00")
    axes.text(left + 8, bottom + HIGH - 2.6, station.title, va="top", fontsize=12, fontweight="bold")
    axes.text(left + 1.8, bottom + HIGH - 8, station.question, va="top", fontsize=10, linespacing=1.25)
    _boxes(axes, station.lit, left + 1.8, bottom + 6.3)
    if minutes is not None:
        duration = f"{minutes * 60:.0f} seconds" if minutes < 1.5 else f"{minutes:.0f} minutes"
        axes.text(left + 1.8, bottom + 1.6, f"runs in {duration}", fontsize=9, va="bottom")


def _boxes(axes: Axes, lit: tuple[str, ...], left: float, bottom: float, named: bool = False) -> None:
    """The boxes of the flow in small, those of a notebook lit; named in the legend."""
    across = (CARD - 3.6) / 122  # of the flow's own unit
    up = 1.5 * across
    for name, (x, y) in BOXES.items():
        corner = (left + x * across, bottom + y * up)
        plain = {"facecolor": "#E4E2DE", "edgecolor": "#C9C7C3", "linewidth": 0.6}
        look = {"facecolor": ORANGE, "edgecolor": INK, "linewidth": 1.1} if name in lit else plain
        axes.add_patch(Rectangle(corner, BOX_WIDTH * across, BOX_HEIGHT * up, **look))
        if named:
            middle = corner[0] + BOX_WIDTH * across / 2
            axes.text(middle, corner[1] - 0.5, SHORT.get(name, name), ha="center", va="top", fontsize=6.6)


def _path(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow from a card to the next; where the row ends, down and back."""
    (x0, y0), (x1, y1) = start, end
    path = [(x0 + CARD, y0 + HIGH / 2), (x1, y1 + HIGH / 2)]
    if y0 != y1:
        path = [(x0 + CARD / 2, y0 + y) for y in (0, -BETWEEN / 2)] + [(x1 + CARD / 2, y0 - BETWEEN / 2)]
        path.append((x1 + CARD / 2, y1 + HIGH))
    axes.plot(*zip(*path, strict=True), color=INK, linewidth=1.1, solid_joinstyle="round")
    axes.add_patch(FancyArrowPatch(*path[-2:], arrowstyle="-|>", mutation_scale=14, color=INK, shrinkA=0, shrinkB=0))


# ---- how far an image is from the drawn world

NAME = "familiar"  # of the two files in data/results
SHRINKAGE = 0.01  # the share of the covariance that is made isotropic, so that it can be inverted
MAKE = "make them with: python tests/benchmarks/familiar.py"


class FamiliarError(ValueError):
    """The measured numbers are missing or belong to another encoder."""


@dataclass(frozen=True)
class Familiar:
    """The Mahalanobis distance of an image from the drawn world, and the threshold from which it is far.

    Attributes:
        mean: (Dv,) the mean of the scenes' mean patch features.
        whiten: (Dv, Dv) maps a difference from the mean to one in which scenes vary alike in all directions.
        threshold: an image that is farther than this is far.
    """

    mean: torch.Tensor
    whiten: torch.Tensor
    threshold: float

    def distances(self, patch_features: torch.Tensor) -> torch.Tensor:
        """The distances (I,) of images from their patch features (I, N, Dv). A drawn scene has about 1."""
        difference = patch_features.float().mean(dim=1).cpu() - self.mean  # (I, Dv)
        return (difference @ self.whiten).pow(2).mean(dim=-1).sqrt()

    def distance(self, patch_features: torch.Tensor) -> float:
        """The distance of one image from its patch features (1, N, Dv)."""
        (value,) = self.distances(patch_features).tolist()
        return value

    def is_far(self, distance: float) -> bool:
        """Whether an image at this distance is no drawn scene."""
        return distance > self.threshold

    def warning(self, distance: float) -> str:
        """What to tell a reader before any answer; empty if the image is near."""
        if not self.is_far(distance):
            return ""
        return (
            f"This picture is far from the drawn world: {distance:.1f}, where 99 of 100 drawn scenes stay below "
            f"{self.threshold:.1f}. This model knows only drawn scenes and will answer as if this were one."
        )


def fit(patch_features: torch.Tensor, threshold: float = float("inf")) -> Familiar:
    """Mean and covariance of scenes (I, N, Dv), with shrinkage: `SHRINKAGE` of the covariance is made isotropic."""
    means = patch_features.double().mean(dim=1)  # (I, Dv)
    covariance = torch.cov(means.T)  # (Dv, Dv)
    isotropic = torch.eye(len(covariance), dtype=covariance.dtype) * covariance.diagonal().mean()
    inverse = torch.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * isotropic)
    return Familiar(means.mean(dim=0).float(), torch.linalg.cholesky(inverse).float().contiguous(), threshold)


def load_familiar(model: MiniVLMForConditionalGeneration, folder: str | Path | None = None) -> Familiar:
    """What was measured for this model's encoder, by default in `data/results`.

    Raises:
        FamiliarError: the files are missing, or were measured with another encoder.
    """
    folder = data_folder() / "results" if folder is None else Path(folder)
    report = read_report(folder)
    if report["encoder"] != hash_tensors(model.vision.state_dict()):
        raise FamiliarError(f"{folder / NAME}.json was measured with another encoder than this model's; {MAKE}")
    tensors = safetensors.torch.load_file(folder / f"{NAME}.safetensors")
    return Familiar(tensors["mean"], tensors["whiten"], report["threshold"])


def read_report(folder: str | Path | None = None) -> dict[str, Any]:
    """What was measured: threshold, distances of scenes and photographs, the command.

    Raises:
        FamiliarError: there is no such file.
    """
    file = (data_folder() / "results" if folder is None else Path(folder)) / f"{NAME}.json"
    if not file.is_file():
        raise FamiliarError(f"{file} is missing; {MAKE}")
    return json.loads(file.read_text("utf-8"))


@style()
def distance_figure(report: dict[str, Any], marked: dict[str, float] | None = None) -> Figure:
    """The distances of held-out scenes and of photographs, and the threshold between them; named images are marked."""
    scenes = np.array(report["scenes"])
    photographs = np.array(list(report["photographs"].values()))
    figure = Figure(figsize=(8.5, 3))
    axes = figure.add_subplot()
    edges = np.geomspace(0.95 * scenes.min(), 1.05 * max(photographs.max(), scenes.max()), 60)
    axes.hist(scenes, edges, color=BLUE, weights=np.full(len(scenes), 100 / len(scenes)))
    axes.plot(photographs, np.full(len(photographs), 1.1), "D", color=ORANGE, markersize=6, markeredgecolor="white")
    top = axes.get_ylim()[1] * 1.2
    axes.set(xscale="log", ylim=(0, top), xlabel="distance from the drawn world", ylabel="% of the scenes")
    axes.axvline(report["threshold"], color=INK, linewidth=1.2, linestyle="--")
    note(axes, f"far: above {report['threshold']:.2f}", (report["threshold"], top), (6, -2), va="top")
    drawn, some = f"{len(scenes)} drawn scenes", f"{len(photographs)} photographs"
    note(axes, drawn, (np.median(scenes), top), (0, -2), ha="center", va="top", color=BLUE)
    note(axes, some, (photographs.max(), top), (0, -2), ha="right", va="top", color="#A64E00")
    ground = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": GREY, "linewidth": 0.6}
    arrow = {"arrowstyle": "-|>", "color": INK, "shrinkB": 0}
    for name, distance in (marked or {}).items():
        note(axes, name, (distance, 1.9), (0, 62), ha="center", va="top", bbox=ground, arrowprops=arrow)
    ticks = [tick for tick in (0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6) if edges[0] <= tick <= edges[-1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    return figure
