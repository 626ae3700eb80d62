"""The map of the course: its notebooks as stations, each with the boxes of the flow that it is about."""

import json
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from lessons.plots import BOXES, GREY, HEIGHT, INK, ORANGE, WIDTH, show, style


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
AFTER = {"A1": "01", "A2": "06"}  # what stands by itself, and the notebook that it asks for
CARD, GAP, HIGH = 26.0, 5.0, 34.0  # a card's width, the way to the next one, its height
ACROSS, BETWEEN = 5, 9.0  # cards in a row, and the way to the row below
SHORT = {"language model": "LM"}


def course_map(minutes: dict[str, float]) -> Figure:
    """The stations in their order; each card shows the boxes that its notebook is about.

    Args:
        minutes: number -> how long "Run all" takes there; a card without one says nothing about it.
    """
    with style():
        figure = Figure(figsize=(13.6, 7.0))
        page = figure.add_axes((0, 0, 1, 1))
        corners = [_corner(place) for place in range(len(STATIONS))]
        for station, (left, bottom) in zip(STATIONS, corners, strict=True):
            _card(page, station, left, bottom, minutes.get(station.number))
        for (x0, y0), (x1, y1) in pairwise(corners[: -len(AFTER)]):
            _way(page, (x0, y0), (x1, y1))
        for earlier, (left, bottom) in zip(AFTER.values(), corners[-len(AFTER) :], strict=True):
            text = f"at any time after {earlier}"
            page.text(left + CARD / 2, bottom + HIGH + 1.3, text, ha="center", style="italic", fontsize=9)
        left, bottom = _corner(len(STATIONS))
        page.text(
            left,
            bottom + HIGH - 8,
            "The model has these boxes;\na card lights those that\nits notebook is about.",
            va="top",
        )
        _boxes(page, (), left, bottom + 6.3, named=True)
        page.set(xlim=(-2, ACROSS * (CARD + GAP) - GAP + 2), ylim=(-2, 2 * HIGH + BETWEEN + 2), aspect="equal")
        page.axis("off")
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


def _corner(place: int) -> tuple[float, float]:
    """A card's lower left corner: the first row above, the others below."""
    row, column = divmod(place, ACROSS)
    return column * (CARD + GAP), (1 - row) * (HIGH + BETWEEN)


def _card(page: Axes, station: Station, left: float, bottom: float, minutes: float | None) -> None:
    shape = "round,pad=0,rounding_size=1.6"
    page.add_patch(FancyBboxPatch((left, bottom), CARD, HIGH, shape, facecolor="#FCFBF9", edgecolor=GREY))
    page.text(left + 1.8, bottom + HIGH - 2, station.number, va="top", fontsize=17, fontweight="bold", color="#A64E00")
    page.text(left + 8, bottom + HIGH - 2.6, station.title, va="top", fontsize=12, fontweight="bold")
    page.text(left + 1.8, bottom + HIGH - 8, station.question, va="top", fontsize=10, linespacing=1.25)
    _boxes(page, station.lit, left + 1.8, bottom + 6.3)
    if minutes is not None:
        page.text(left + 1.8, bottom + 1.6, _about(minutes), fontsize=9, va="bottom")


def _boxes(page: Axes, lit: tuple[str, ...], left: float, bottom: float, named: bool = False) -> None:
    """The boxes of the flow in small, those of a notebook lit; named in the legend."""
    across = (CARD - 3.6) / 122  # of the flow's own unit
    up = 1.5 * across
    for name, (x, y) in BOXES.items():
        shining, corner = name in lit, (left + x * across, bottom + y * up)
        page.add_patch(
            Rectangle(
                corner,
                WIDTH * across,
                HEIGHT * up,
                facecolor=ORANGE if shining else "#E4E2DE",
                edgecolor=INK if shining else "#C9C7C3",
                linewidth=1.1 if shining else 0.6,
            )
        )
        if named:
            middle = corner[0] + WIDTH * across / 2
            page.text(middle, corner[1] - 0.5, SHORT.get(name, name), ha="center", va="top", fontsize=6.6)


def _about(minutes: float) -> str:
    return f"runs in {minutes * 60:.0f} seconds" if minutes < 1.5 else f"runs in {minutes:.0f} minutes"


def _way(page: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow from a card to the next; where the row ends, down and back."""
    (x0, y0), (x1, y1) = start, end
    path = [(x0 + CARD, y0 + HIGH / 2), (x1, y1 + HIGH / 2)]
    if y0 != y1:
        path = [(x0 + CARD / 2, y0 + y) for y in (0, -BETWEEN / 2)] + [(x1 + CARD / 2, y0 - BETWEEN / 2)]
        path.append((x1 + CARD / 2, y1 + HIGH))
    page.plot(*zip(*path, strict=True), color=INK, linewidth=1.1, solid_joinstyle="round")
    page.add_patch(FancyArrowPatch(*path[-2:], arrowstyle="-|>", mutation_scale=14, color=INK, shrinkA=0, shrinkB=0))
