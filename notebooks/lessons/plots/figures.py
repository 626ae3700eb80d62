"""Figures for everybody: with alternative text, a one-line summary, and colours that colour-blind readers tell apart.

A notebook shows every figure through `show`. Nothing is said by colour alone. Letters as in `config.py`.
"""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import matplotlib.style
import numpy as np
from IPython.display import display
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

BLUE, ORANGE, GREY, INK = "#006BA4", "#FF800E", "#ABABAB", "#3B3B3B"  # of matplotlib's tableau-colorblind10
LIGHT_BLUE, PALE_ORANGE = "#A2C8EC", "#FFE3C8"
MAP = "cividis"  # even in lightness, and the same to colour-blind eyes
CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "PingFang SC",
    "Microsoft YaHei",
    "WenQuanYi Zen Hei",
    "SimHei",
    "Arial Unicode MS",
)
PIXELS_PER_INCH = 144
Rows = Mapping[str, Mapping[str, Mapping[str, Any]]]  # model -> measure -> its `evaluation.Estimate`
# a pattern beside each colour, so that a part can be told without its colour
STACK_COLOURS, STACK_PATTERNS = (GREY, INK, LIGHT_BLUE, BLUE, ORANGE), ("", "//", "..", "xx", "\\\\")


@lru_cache(maxsize=1)
def chinese_font() -> str | None:
    """A font of this machine that has Chinese characters, or None: then figures are labelled in English."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in CHINESE_FONTS if name in installed), None)


def readable(text: str) -> bool:
    """Whether the figures' fonts have every character of the text; others would be empty boxes."""
    return chinese_font() is not None or text.isascii()


@contextmanager
def style():
    """The look that all figures share."""
    fonts = ["DejaVu Sans", *filter(None, [chinese_font()])]
    own = {
        "font.family": fonts,
        "font.size": 10,
        "text.color": INK,
        "axes.axisbelow": True,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": "#E8E8E8",
        "figure.dpi": PIXELS_PER_INCH,
        "figure.facecolor": "white",
        "image.cmap": MAP,
    }
    with matplotlib.style.context("tableau-colorblind10"), matplotlib.rc_context(own):
        yield


def show(figure: Figure, alt: str, summary: str) -> None:
    """Show a figure with alternative text, and a one-line summary of what it says below it.

    Jupyter ignores alternative text in an output's metadata, so the image goes out as HTML with its bytes inside.

    Raises:
        ValueError: `alt` or `summary` is empty, or `summary` has several lines.
    """
    display(_bundle(figure, alt, summary), raw=True)


def _bundle(figure: Figure, alt: str, summary: str) -> dict[str, str]:
    """A figure as Jupyter's MIME bundle."""
    if not alt.strip() or not summary.strip() or "\n" in summary:
        raise ValueError("a figure needs alternative text, and a summary in one line")
    drawing = figure_html(figure, alt, round(figure.get_figwidth() * 90))
    page = f'<figure style="margin:0">{drawing}<figcaption>{html.escape(summary)}</figcaption></figure>'
    return {"text/html": page, "text/plain": summary}


def figure_html(figure: Figure, alt: str, width: int) -> str:
    """A figure as an `<img>` of so many pixels, its bytes inside."""
    source = f"data:image/png;base64,{base64.b64encode(png(figure)).decode()}"
    look = f"width:{width}px;max-width:100%;background:white"
    return f'<img src="{source}" alt="{html.escape(alt)}" style="{look}">'


def png(figure: Figure) -> bytes:
    """The figure as a PNG of 256 colours, a quarter of the full one's size; no colour is far from its own."""
    raw, small = io.BytesIO(), io.BytesIO()
    with style():
        figure.savefig(raw, format="png", dpi=PIXELS_PER_INCH, bbox_inches="tight", facecolor="white")
    image = Image.open(raw).convert("RGB")
    # the widest cover of colours: the median cut paints a small yellow thing in the colour of something larger
    palette = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    palette.save(small, format="png", optimize=True)
    return small.getvalue()


def data_uri(image: Image.Image) -> str:
    """An image as the `src` of an `<img>`, its bytes inside: nothing is fetched."""
    stream = io.BytesIO()
    image.save(stream, format="WEBP", quality=82)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


class LiveCurve:
    """A loss curve that grows while `train` runs: pass it as `on_step`.

    Args:
        steps: how many steps there will be.
        title: of the curve.
        every: draw after so many steps, and after the last.
        say: what the model says at that moment, to be listed below the curve where it changes.
    """

    def __init__(self, steps: int, title: str, every: int = 25, say: Callable[[Any], str] | None = None):
        self.steps, self.title, self.every, self.say = steps, title, every, say
        self.losses: list[float] = []
        self.answers: dict[int, str] = {}
        self._handle = None

    def __call__(self, step: int, loss: float, model) -> None:
        """Note the loss of a step (counted from 1)."""
        self.losses.append(loss)
        if step % self.every == 0 or step == self.steps:
            if self.say is not None:
                self.answers[step] = self.say(model)
            self._draw()

    def _draw(self) -> None:
        first, last = self.losses[0], trailing_mean(self.losses)[-1]
        alt = (
            f"Line plot of the training loss. It starts at {first:.2f} and after {len(self.losses)} of {self.steps} "
            f"steps it is at {last:.2f}."
        )
        summary = f"{self.title}: loss {first:.2f} → {last:.2f} in {len(self.losses)} steps"
        bundle = _bundle(loss_curve(self.losses, self.steps, self.title), alt, summary)
        before = None
        for step, answer in self.answers.items():
            if answer != before:
                bundle["text/html"] += f"<div><b>step {step}</b>: {html.escape(answer)}</div>"
            before = answer
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def trailing_mean(losses: Sequence[float], window: int = 20) -> np.ndarray:
    """The mean of the last `window` losses at every step."""
    total = np.concatenate([[0.0], np.cumsum(losses)])
    steps = np.arange(1, len(losses) + 1)
    start = np.maximum(0, steps - window)
    return (total[steps] - total[start]) / (steps - start)


def note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **look: Any) -> None:
    """Write a text some typographic points (x, y) away from a point of the axes."""
    axes.annotate(text, at, offset, textcoords="offset points", **look)


@style()
def loss_curve(losses: Sequence[float], steps: int, title: str) -> Figure:
    """Each step's loss, pale, and the mean of the last twenty."""
    figure = Figure(figsize=(7, 2.9))
    axes = figure.add_subplot()
    done, mean = np.arange(1, len(losses) + 1), trailing_mean(losses)
    axes.plot(done, losses, color=GREY, linewidth=0.7)
    axes.plot(done, mean, color=BLUE, linewidth=2)
    axes.plot(done[-1], mean[-1], "o", color=BLUE, markersize=5)
    note(axes, f"{mean[-1]:.2f}", (done[-1], mean[-1]), (6, 6), color=BLUE)
    axes.set(xlim=(0, steps * 1.06), ylim=(0, None), xlabel="step", ylabel="loss")
    axes.set_title(title)
    axes.grid(axis="y")
    return figure


def border(covered: np.ndarray, side: int) -> list[tuple[int, int, int, int]]:
    """The line around a thing's patches (of side x side): pieces from (x0, y0) to (x1, y1), in patches."""
    inside, pieces = set(covered.tolist()), []
    for patch in sorted(inside):
        y, x = divmod(patch, side)
        for neighbour, exists, piece in (
            (patch - side, y > 0, (x, y, x + 1, y)),
            (patch + side, y < side - 1, (x, y + 1, x + 1, y + 1)),
            (patch - 1, x > 0, (x, y, x, y + 1)),
            (patch + 1, x < side - 1, (x + 1, y, x + 1, y + 1)),
        ):
            if not (exists and neighbour in inside):
                pieces.append(piece)
    return pieces


def patches(image: Image.Image, count: int) -> list[np.ndarray]:
    """A square image cut into `count` squares, row by row, as uint8 arrays."""
    side = int(count**0.5)
    size = image.width // side
    pixels = np.asarray(image.resize((size * side, size * side)))
    rows = pixels.reshape(side, size, side, size, 3).swapaxes(1, 2)
    return list(rows.reshape(count, size, size, 3))


@style()
def bars(shares: Mapping[str, float], title: str, label: str) -> Figure:
    """Horizontal bars with their values written out; an exact zero says so."""
    figure = Figure(figsize=(8, 0.34 * len(shares) + 1.1), layout="constrained")
    axes = figure.add_subplot()
    values = list(shares.values())
    colours = [GREY if value == 0 else BLUE for value in values]
    axes.barh(list(shares), values, color=colours, height=0.7)
    axes.invert_yaxis()
    for index, value in enumerate(values):
        text = "exactly 0: frozen" if value == 0 else f"{value:.1%}"
        note(axes, text, (value, index), (5, 0), va="center", fontsize=9)
    axes.set(xlabel=label, xlim=(0, max(values) * 1.2 or 1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.tick_params(axis="y", length=0)
    axes.set_title(title)
    return figure


def draw_matrix(axes: Axes, box: tuple[float, float, float, float], values: np.ndarray) -> None:
    """Draw a matrix as a map of its values into a box: left, bottom, width, height."""
    left, bottom, width, height = box
    extent = (left, left + width, bottom, bottom + height)
    low, high = np.percentile(values, [2, 98])
    axes.imshow(values, extent=extent, cmap=MAP, vmin=low, vmax=high, aspect="auto", interpolation="nearest", zorder=1)


def scale_rows(values: np.ndarray) -> np.ndarray:
    """Every row scaled to its own largest value: rows of very different length all show their pattern."""
    return values / np.abs(values).max(axis=1, keepdims=True)


@style()
def estimate_panels(rows: Rows, titles: Mapping[str, str], counts: bool = False) -> Figure:
    """Estimates with their intervals: a line for each model, a panel for each measure.

    Args:
        rows: model -> measure -> estimate, whose value is None where nothing was counted.
        titles: measure -> title of its panel.
        counts: write the counts beside each value.
    """
    figure = Figure(figsize=(2.3 * len(titles) + 1.8, 0.36 * len(rows) + 1.1), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(titles), sharey=True))
    positions = np.arange(len(rows))[::-1]
    for axes, (measure, title) in zip(panels, titles.items(), strict=True):
        for y, estimate in zip(positions, (row[measure] for row in rows.values()), strict=True):
            if estimate["value"] is None:
                axes.text(0, y, "names nothing", va="center", fontsize=8.5, style="italic")
                continue
            axes.plot([estimate["low"], estimate["high"]], [y, y], color=BLUE, linewidth=3, alpha=0.35)
            axes.plot(estimate["value"], y, "o", color=BLUE, markersize=5)
            text = f"{estimate['value']:{'.0f' if measure == 'length' else '.2f'}}"
            align = "center"
            if counts:
                text += f" ({estimate['numerator']} of {estimate['denominator']})"
                align = "right" if estimate["value"] > 0.5 else "left"
            note(axes, text, (estimate["value"], y), (0, 5), ha=align, fontsize=8)
        axes.set_title(title)
        axes.grid(axis="x")
        axes.set(xlim=(-0.04, 1.06) if measure != "length" else (0, None), ylim=(-0.6, len(rows) - 0.2))
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(positions, list(rows))
    return figure


def show_shares(rows: Rows, label: str) -> None:
    """Shares with their intervals and counts; see `estimate_panels`."""

    def counts(share: Mapping[str, Any]) -> str:
        return f"{share['numerator']} of {share['denominator']}"

    lines = [f"{who}, {what}: {counts(share)}" for who, row in rows.items() for what, share in row.items()]
    what = next(iter(next(iter(rows.values()))))
    summary = f"{what}: {', '.join(f'{who} {counts(row[what])}' for who, row in rows.items())}."
    figure = estimate_panels(rows, {name: name for name in next(iter(rows.values()))}, counts=True)
    figure.supxlabel(label, fontsize=10)
    show(figure, f"Points with intervals, {label}. {'; '.join(lines)}.", summary)


def operations_bars(stages: Mapping[str, Mapping[str, int]]) -> Figure:
    """Stacked bars: operations of one example by part, in billions, as `cost.flops` counts them."""
    billions = {name: [count / 1e9 for count in parts.values()] for name, parts in stages.items()}
    return stacked_bars(billions, list(next(iter(stages.values()))), "{:.0f}", "billions of operations for one example")


@style()
def stacked_bars(rows: Mapping[str, Sequence[float]], parts: Sequence[str], form: str, unit: str) -> Figure:
    """Horizontal bars made of parts; a part that is wide enough bears its value, all stand in the legend."""
    figure = Figure(figsize=(10.5, 0.75 * len(rows) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    longest = max(map(sum, rows.values()))
    for y, (name, values) in enumerate(rows.items()):
        start = 0.0
        for part, value, colour, pattern in zip(parts, values, STACK_COLOURS, STACK_PATTERNS, strict=False):
            label = part if y == 0 else None
            axes.barh(name, value, left=start, color=colour, hatch=pattern, edgecolor="white", height=0.6, label=label)
            if value > 0.04 * longest:
                box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
                middle = start + value / 2
                axes.text(middle, y, form.format(value), ha="center", va="center", fontsize=9, bbox=box)
            start += value
        note(axes, form.format(start), (start, y), (6, 0), va="center", fontweight="bold")
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.1 * longest), xlabel=unit)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=len(parts), frameon=False, fontsize=9)
    return figure
