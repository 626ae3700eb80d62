"""The map of the course: how everything flows through the model, with the boxes lit that a notebook is about."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from minivlm.notebook.figures import GREY, INK, ORANGE, show, style

# name: (left, bottom) of its box; what leaves it is written on the arrow
BOXES = {
    "picture": (0, 22),
    "encoder": (24, 22),
    "W": (48, 22),
    "text": (0, 4),
    "look-up": (24, 4),
    "replace": (60, 4),
    "language model": (84, 4),
    "answer": (108, 4),
}
WIDTH, HEIGHT = 14, 9
ARROWS = (
    ("picture", "encoder", "pixel_values\n(I, 3, H, W)"),
    ("encoder", "W", "patch_features\n(I, N, Dv)"),
    ("W", "replace", "image_embeds\n(I, N, Dl)"),
    ("text", "look-up", "input_ids\n(B, T)"),
    ("look-up", "replace", "text_embeds\n(B, T, Dl)"),
    ("replace", "language model", "inputs_embeds\n(B, T, Dl)"),
    ("language model", "answer", "logits\n(B, T, V)"),
)


def flow(lit: Sequence[str] = (), notes: Mapping[str, str] | None = None) -> Figure:
    """The one way everything flows, drawn as boxes and arrows.

    Args:
        lit: boxes that the notebook at hand is about (names in `BOXES`): filled, with a thick frame and bold letters.
        notes: a few words under a box, such as "frozen" or "trains".

    Raises:
        ValueError: there is no such box.
    """
    notes = notes or {}
    if unknown := [name for name in (*lit, *notes) if name not in BOXES]:
        raise ValueError(f"no box {', '.join(unknown)}; the boxes are {', '.join(BOXES)}")
    with style():
        figure = Figure(figsize=(11.5, 3.1))
        page = figure.add_axes((0, 0, 1, 1))
        for start, end, what in ARROWS:
            _arrow(page, start, end, what)
        for name in BOXES:
            _box(page, name, name in lit, notes.get(name, ""))
        page.set(xlim=(-1, 123), ylim=(-1, 34), aspect="auto")
        page.axis("off")
    return figure


def show_flow(lit: Sequence[str], summary: str, notes: Mapping[str, str] | None = None) -> None:
    """Show the map with its alternative text and a one-line summary of what this notebook adds to it."""
    noted = "".join(f" Under {name}: {note}." for name, note in (notes or {}).items())
    alt = (
        "Diagram of the data flow. Above: picture, encoder, W, from left to right. Below: text, look-up, replace, "
        "language model, answer. W's arrow leads down into replace. "
        f"Lit in this notebook: {', '.join(lit) if lit else 'nothing'}.{noted}"
    )
    show(flow(lit, notes), alt, summary)


def _box(page: Axes, name: str, lit: bool, note: str) -> None:
    left, bottom = BOXES[name]
    page.add_patch(
        FancyBboxPatch(
            (left, bottom),
            WIDTH,
            HEIGHT,
            boxstyle="round,pad=0,rounding_size=1.4",
            facecolor="#FFE3C8" if lit else "white",
            edgecolor=ORANGE if lit else GREY,
            linewidth=2.6 if lit else 1.2,
            zorder=2,
        )
    )
    page.text(
        left + WIDTH / 2,
        bottom + HEIGHT / 2,
        name.replace(" ", "\n"),
        ha="center",
        va="center",
        fontsize=11,
        fontweight="bold" if lit else "normal",
        zorder=3,
    )
    page.text(left + WIDTH / 2, bottom - 1, note, ha="center", va="top", fontsize=9, style="italic")


def _arrow(page: Axes, start: str, end: str, what: str) -> None:
    (x0, y0), (x1, y1) = BOXES[start], BOXES[end]
    down = y0 != y1
    tail = (x0 + WIDTH, y0 + HEIGHT / 2)
    head = (x1 + WIDTH / 2, y1 + HEIGHT) if down else (x1, y1 + HEIGHT / 2)
    bend = "angle,angleA=0,angleB=90,rad=8" if down else "arc3"
    page.add_patch(
        FancyArrowPatch(tail, head, connectionstyle=bend, arrowstyle="-|>", mutation_scale=12, color=INK, linewidth=1.2)
    )
    x = head[0] + 1 if down else (tail[0] + head[0]) / 2
    y = (tail[1] + head[1]) / 2 if down else tail[1] + 0.9
    page.text(x, y, what, ha="left" if down else "center", va="center" if down else "bottom", fontsize=7.5)
