"""The map of the course: how everything flows through the model, with the boxes lit that a notebook is about."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Ellipse, FancyArrowPatch, FancyBboxPatch, Patch, Polygon, Rectangle

from lessons.plots.figures import BLUE, GREY, INK, ORANGE, PALE_ORANGE, show, style

# name: (left, bottom) of its box; W stands right above the box that its output goes to
BOXES = {
    "picture": (0, 21),
    "encoder": (27, 21),
    "W": (54, 21),
    "text": (0, 3),
    "look-up": (27, 3),
    "replace": (54, 3),
    "language model": (81, 3),
    "answer": (108, 3),
}
BOX_WIDTH, BOX_HEIGHT = 14, 11
ARROWS = (  # from, to, what flows, in which shape
    ("picture", "encoder", "pixel_values", "(I, 3, H, W)"),
    ("encoder", "W", "patch_features", "(I, N, Dv)"),
    ("W", "replace", "image_embeds", "(I, N, Dl)"),
    ("text", "look-up", "input_ids", "(B, T)"),
    ("look-up", "replace", "text_embeds", "(B, T, Dl)"),
    ("replace", "language model", "inputs_embeds", "(B, T, Dl)"),
    ("language model", "answer", "logits", "(B, T, V)"),
)
LETTERS = (
    ("I", "pictures in the batch"),
    ("B", "texts in the batch"),
    ("T", "tokens of a text, pictures included"),
    ("N", "image tokens of a picture: its patches"),
    ("Dv, Dl", "width of the encoder, of the language model"),
    ("V", "vocabulary"),
)


@style()
def flow_figure(lit: Sequence[str] = (), notes: Mapping[str, str] | None = None) -> Figure:
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
    figure = Figure(figsize=(11.5, 3.3))
    ax = figure.add_axes((0, 0, 1, 1))
    for start, end, what, shape in ARROWS:
        _arrow(ax, start, end, what, shape)
    for name in BOXES:
        _box(ax, name, name in lit, notes.get(name, ""))
    for line, (letter, meaning) in enumerate(LETTERS):
        ax.text(88.5, 31.2 - 2.3 * line, letter, ha="right", va="center", fontsize=9, fontweight="bold")
        ax.text(89.5, 31.2 - 2.3 * line, meaning, va="center", fontsize=9)
    ax.set(xlim=(-1, 123), ylim=(-0.8, 33.5), aspect="auto")
    ax.axis("off")
    return figure


def show_flow(lit: Sequence[str], summary: str, notes: Mapping[str, str] | None = None) -> None:
    """Show the map with its alternative text and a one-line summary of what this notebook adds to it."""
    noted = "".join(f" Under {name}: {note}." for name, note in (notes or {}).items())
    alt = (
        "Diagram of the data flow. Above: picture, encoder, W, from left to right. Below: text, look-up, replace, "
        "language model, answer. W's arrow leads down into replace. Each arrow bears what flows there, and its shape. "
        f"Lit in this notebook: {', '.join(lit) if lit else 'nothing'}.{noted}"
    )
    show(flow_figure(lit, notes), alt, summary)


def _box(ax: Axes, name: str, lit: bool, note: str) -> None:
    left, bottom = BOXES[name]
    plain = {"facecolor": "white", "edgecolor": GREY, "linewidth": 1.2}
    look = {"facecolor": PALE_ORANGE, "edgecolor": ORANGE, "linewidth": 2.6} if lit else plain
    shape = "round,pad=0,rounding_size=1.4"
    ax.add_patch(FancyBboxPatch((left, bottom), BOX_WIDTH, BOX_HEIGHT, shape, zorder=2, **look))
    middle = left + BOX_WIDTH / 2
    for stroke in ICONS[name](middle, bottom + 6.9):
        stroke.set_zorder(3)
        ax.add_patch(stroke)
    weight, size = "bold" if lit else "normal", 10.5 if len(name) < 10 else 9.5
    ax.text(middle, bottom + 1.9, name, ha="center", va="center", fontsize=size, fontweight=weight, zorder=3)
    x, align = (middle - 1.2, "right") if name == "W" else (middle, "center")  # an arrow leaves W downwards
    ax.text(x, bottom - 0.9, note, ha=align, va="top", fontsize=9, style="italic")


def _arrow(ax: Axes, start: str, end: str, what: str, shape: str) -> None:
    """An arrow between two boxes: what flows stands above it and its shape below, beside it where it leads down."""
    (x0, y0), (x1, y1) = BOXES[start], BOXES[end]
    down = y0 != y1
    tail = (x0 + BOX_WIDTH / 2, y0) if down else (x0 + BOX_WIDTH, y0 + BOX_HEIGHT / 2)
    head = (x1 + BOX_WIDTH / 2, y1 + BOX_HEIGHT) if down else (x1, y1 + BOX_HEIGHT / 2)
    ax.add_patch(FancyArrowPatch(tail, head, arrowstyle="-|>", mutation_scale=12, color=INK, linewidth=1.2))
    if down:
        ax.text(head[0] + 1.2, (tail[1] + head[1]) / 2, f"{what}\n{shape}", va="center", fontsize=8.5)
        return
    middle = (tail[0] + head[0]) / 2
    ax.text(middle, tail[1] + 0.7, what, ha="center", va="bottom", fontsize=8.5)
    ax.text(middle, tail[1] - 0.8, shape, ha="center", va="top", fontsize=8.5)


# A small drawing for each box. They get the point that is their middle; a unit is as high as 1.1 is wide.
def _picture(x: float, y: float) -> list[Patch]:
    """A landscape under a grid of patches."""
    left, bottom, width, height = x - 3.2, y - 3.2, 6.4, 6.6
    hills = [(left, bottom), (left, bottom + 2.2), (left + 2.2, bottom + 4), (left + 4, bottom + 2.6)]
    hills += [(left + 5, bottom + 3.2), (left + width, bottom + 2.1), (left + width, bottom)]
    lines = [Rectangle((left + width * k / 4 - 0.04, bottom), 0.08, height, color="white") for k in (1, 2, 3)]
    lines += [Rectangle((left, bottom + height * k / 4 - 0.05), width, 0.1, color="white") for k in (1, 2, 3)]
    sky = Rectangle((left, bottom), width, height, color="#BBD7EA")
    return [sky, Circle((x + 1.7, y + 1.8), 0.85, color="#FFC98F"), Polygon(hills, color=BLUE), *lines]


def _eye(x: float, y: float) -> list[Patch]:
    """An eye that looks."""
    white = Ellipse((x, y), 8, 5, facecolor="white", edgecolor=INK, linewidth=1.4)
    iris, pupil = Ellipse((x, y), 3.5, 3.7, color=BLUE), Ellipse((x, y), 1.6, 1.7, color=INK)
    return [white, iris, pupil, Ellipse((x + 0.7, y + 0.75), 0.8, 0.85, color="white")]


def _matrix(x: float, y: float) -> list[Patch]:
    """A matrix of light and dark cells."""
    shades = ("#FFB066", "#B35500", ORANGE, "#D96A00")
    return [
        Rectangle((x - 3.5 + 1.4 * i, y - 3 + 1.5 * j), 1.25, 1.35, color=shades[(3 * i + 5 * j + i * j) % 4])
        for i, j in product(range(5), range(4))
    ]


def _lines(x: float, y: float) -> list[Patch]:
    """Lines of writing."""
    widths = (7, 5.6, 6.4, 3.4)
    return [Rectangle((x - 3.5, y + 1.9 - 1.7 * k), width, 0.75, color=BLUE) for k, width in enumerate(widths)]


def _table(x: float, y: float) -> list[Patch]:
    """A table of which one row is taken."""
    rows = [Rectangle((x - 3.5, y + 1.9 - 1.2 * k), 7, 0.9, color="#CFE1EE") for k in range(5)]
    return [*rows, Rectangle((x - 3.5, y - 0.5), 7, 0.9, color=BLUE)]


def _swapped(x: float, y: float) -> list[Patch]:
    """A line of words in which some have become patches."""
    line = [Rectangle((x - 5 + 1.45 * k, y - 2.2), 1.25, 4.4, color=BLUE) for k in range(7)]
    patches = [Rectangle((x - 5 + 1.45 * k, y - 2.2), 1.25, 4.4, color=ORANGE) for k in (2, 3, 4)]
    return [*line, *patches]


def _layers(x: float, y: float) -> list[Patch]:
    """Layers, one on the other."""
    corners = ((x - 4.4, y - 1.6), (x, y - 3.4), (x + 4.4, y - 1.6), (x, y + 0.2))
    return [
        Polygon([(left, low + k) for left, low in corners], facecolor=shade, edgecolor="white", linewidth=0.8)
        for k, shade in ((0, INK), (1.4, "#6E6E6E"), (2.8, GREY))
    ]


def _speech(x: float, y: float) -> list[Patch]:
    """A balloon with words in it."""
    frame = {"facecolor": "white", "edgecolor": INK, "linewidth": 1.4}
    balloon = FancyBboxPatch((x - 4.2, y - 1.7), 8.4, 4.6, boxstyle="round,pad=0,rounding_size=1.2", **frame)
    tail = Polygon([(x - 2.4, y - 1.6), (x - 2.9, y - 3.4), (x - 0.4, y - 1.6)], **frame)
    words = [Rectangle((x - 3, y + 1.1 - 1.4 * k), width, 0.7, color=BLUE) for k, width in enumerate((6, 4.2))]
    return [tail, balloon, Polygon([(x - 2.27, y - 1.5), (x - 0.65, y - 1.5), (x - 1.2, y - 2)], color="white"), *words]


ICONS: dict[str, Callable[[float, float], list[Patch]]] = {
    "picture": _picture,
    "encoder": _eye,
    "W": _matrix,
    "text": _lines,
    "look-up": _table,
    "replace": _swapped,
    "language model": _layers,
    "answer": _speech,
}
