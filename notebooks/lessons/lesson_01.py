"""Notebook 01: figures of the three parts, of what a patch knows at each depth, and of patches that are alike.

Letters as in `config.py`.
"""

import html
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import ipywidgets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from lessons.plots import BLUE, GREY, INK, ORANGE, draw_matrix, figure_html, note, patches, scale_rows, style
from lessons.probes import (  # noqa: F401 (for the notebook)
    cosines,
    fit_probe,
    pairs,
    patch_examples,
    patches_of,
    side_by_side,
    things_of_patches,
    twin_of,
    twin_rate,
)

GROUNDS = {BLUE: "#E6F0F7", ORANGE: "#FFF0E2", GREY: "#F4F4F4"}  # a pale ground for each line colour
DARK = 0.22  # brightness of a patch that is nothing like the chosen one
PART_COLOURS = {"vision": BLUE, "language_model": GREY, "projector": ORANGE}
PART_NAMES = {"vision": "encoder", "language_model": "language model", "projector": "W"}
Frame = tuple[float, float, float, float]  # left, bottom, width, height


# ---- the parts


@style()
def anatomy(
    image: Image.Image,
    patch_features: np.ndarray,
    image_embeds: np.ndarray,
    inputs_embeds: np.ndarray,
    is_image: np.ndarray,
    parameters: Mapping[str, int],
    answer: str,
) -> Figure:
    """The whole model at work on one picture, with its real numbers: vision above, language below.

    Args:
        patch_features, image_embeds, inputs_embeds: (N, Dv), (N, Dl), (T, Dl).
        is_image: (T,), True at a patch.
        parameters: those of "vision", "projector" and "language_model".
    """
    (n, dv), (t, dl) = patch_features.shape, inputs_embeds.shape
    side = int(n**0.5)
    figure = Figure(figsize=(11.5, 5.4))
    ax = figure.add_axes((0, 0, 1, 1))
    _draw_image(ax, (1, 30, 22, 22), image, side)
    _part(ax, (29, 34, 16, 14), "vision", parameters["vision"], "frozen, always", BLUE)
    draw_matrix(ax, (51, 30, 12, 22), patch_features)
    _part(ax, (69, 34, 16, 14), "projector W", parameters["projector"], "trains in both stages", ORANGE)
    draw_matrix(ax, (91, 30, 16, 22), image_embeds)
    _label(ax, 12, 29, "pixel values", f"{side} × {side} = {n} patches")
    _label(ax, 57, 29, "patch features", f"N × Dv = {n} × {dv}")
    _label(ax, 99, 29, "image embeds", f"N × Dl = {n} × {dl}")
    for start, end in ((23.8, 28.2), (45.8, 50.2), (63.8, 68.2), (85.8, 90.2)):
        _draw_arrow(ax, (start, 41), (end, 41))
    strip = (1, 7.5, 64, 9)
    draw_matrix(ax, strip, scale_rows(inputs_embeds).T)
    runs = _runs(ax, strip, is_image)
    _draw_arrow(ax, (runs[-1], 4.5), (runs[-1], 7.3))
    ax.text(runs[-1], 4.2, "words: looked up\nin the embedding table", ha="center", va="top", fontsize=8.5)
    _label(ax, 27, 6.5, "inputs embeds: words and patches in one line", f"T × Dl = {t} × {dl}, drawn lying down")
    bend = "angle,angleA=180,angleB=90,rad=8"  # sideways first, then down
    _draw_arrow(ax, (99, 23.5), (runs[len(runs) // 2], 19.6), connectionstyle=bend)
    _part(ax, (69, 5, 20, 14), "language model", parameters["language_model"], "trains in stage 2", GREY)
    _draw_arrow(ax, (65.4, 12), (68.4, 12))
    _draw_arrow(ax, (89.6, 12), (92.6, 12))
    ax.text(93.4, 12, textwrap.fill(answer, 26), va="center", fontsize=10 if len(answer) < 80 else 8.5)
    ax.set(xlim=(0, 115), ylim=(0, 54), aspect="auto")
    ax.axis("off")
    return figure


def _part(ax: Axes, box: Frame, name: str, parameters: int, role: str, colour: str) -> None:
    """A box of the diagram: its name, its parameters, whether it trains."""
    left, bottom, width, height = box
    look = {"facecolor": GROUNDS[colour], "edgecolor": colour, "linewidth": 1.8, "zorder": 2}
    ax.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=1.2", **look))
    x, y, middle = left + width / 2, bottom + height / 2, {"ha": "center", "va": "center", "zorder": 3}
    ax.text(x, y + 3, name, fontsize=12, fontweight="bold", **middle)
    ax.text(x, y - 2.2, f"{parameters:,} parameters\n{role}", fontsize=8, linespacing=1.6, **middle)


def _label(ax: Axes, x: float, y: float, name: str, shape: str) -> None:
    ax.text(x, y, name, ha="center", va="top", fontsize=10, fontweight="bold")
    ax.text(x, y - 2.2, shape, ha="center", va="top", fontsize=9)


def _draw_arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], **look) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=INK, linewidth=1.4, **look))


def _runs(ax: Axes, box: Frame, is_image: np.ndarray) -> list[float]:
    """Bars over the parts of a sequence: text, picture, text. Returns the middles of the bars."""
    left, bottom, width, height = box
    edges = [0, *(np.flatnonzero(np.diff(is_image.astype(int))) + 1), len(is_image)]
    middles, top = [], bottom + height + 0.7
    for start, end in pairwise(edges):
        a, b = (left + width * edge / len(is_image) for edge in (start, end))
        ax.plot([a + 0.2, b - 0.2], [top, top], color=ORANGE if is_image[start] else BLUE, linewidth=3)
        ax.text((a + b) / 2, top + 0.8, "picture" if is_image[start] else "text", ha="center", fontsize=8.5)
        middles.append((a + b) / 2)
    return middles


@style()
def to_scale(models: Mapping[str, Mapping[str, int]]) -> Figure:
    """Every part of every model as a square whose area is its number of parameters, all on one scale.

    Args:
        models: for each model the parameters of "vision", "language_model" and "projector".
    """
    largest = max(count for parts in models.values() for count in parts.values())
    figure = Figure(figsize=(11.5, 4.9))
    ax, left = figure.add_axes((0, 0, 1, 1)), 0.0
    for name, parts in models.items():
        start = left
        for part, colour in PART_COLOURS.items():
            side = (parts[part] / largest) ** 0.5
            room = max(side, 0.27)
            x = left + (room - side) / 2
            ax.add_patch(Rectangle((x, 0), side, side, facecolor=colour, edgecolor="white", linewidth=0.5))
            label = f"{PART_NAMES[part]}\n{parts[part]:,}"
            ax.text(left + room / 2, -0.03, label, ha="center", va="top", fontsize=9.5, linespacing=1.4)
            left += room + 0.06
        ax.plot([start, left - 0.06], [-0.19, -0.19], color=INK, linewidth=1)
        title = f"{name}: {sum(parts.values()):,} parameters"
        ax.text((start + left - 0.06) / 2, -0.22, title, ha="center", va="top", fontsize=11, fontweight="bold")
        left += 0.12
    ax.set(xlim=(-0.05, left - 0.13), ylim=(-0.32, 1.03), aspect="equal")
    ax.axis("off")
    return figure


# ---- patches


@style()
def cut_plate(image: Image.Image, side: int, pulled: Sequence[int]) -> Figure:
    """A square picture of side x side patches, these pulled apart, and four of them, `pulled`, large."""
    cuts = patches(image, side * side)
    figure = Figure(figsize=(11.5, 4.3))
    whole, apart = figure.add_axes((0.005, 0.02, 0.36, 0.9)), figure.add_axes((0.385, 0.02, 0.36, 0.9))
    _draw_image(whole, (0, 0, side, side), image, side)
    for patch in range(side * side):
        y, x = divmod(patch, side)
        apart.imshow(cuts[patch], extent=(x + 0.06, x + 0.94, y + 0.94, y + 0.06))
        if patch in pulled:
            apart.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2.2))
    for axes, title in ((whole, "one picture"), (apart, f"{side} × {side} = {side * side} patches")):
        axes.set(xlim=(-0.05, side + 0.05), ylim=(side + 0.05, -0.05), aspect="equal", title=title)
        axes.axis("off")
    for index, patch in enumerate(pulled):
        one = figure.add_axes((0.765 + 0.12 * (index % 2), 0.52 - 0.4 * (index // 2), 0.11, 0.3))
        one.imshow(cuts[patch], interpolation="nearest")
        one.set_title(f"patch {patch}", fontsize=10)
        one.axis("off")
    return figure


@style()
def probe_curve(accuracies: Mapping[str, Sequence[float]], guessing: Mapping[str, float]) -> Figure:
    """How well each fact can be read at depth 0, 1, 2, …: one line per fact, and what guessing would give."""
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for (fact, line), colour, marker in zip(accuracies.items(), (BLUE, ORANGE), ("o", "s"), strict=False):
        axes.plot(line, color=colour, marker=marker, markersize=7, linewidth=2.2)
        axes.axhline(guessing[fact], color=colour, linewidth=1.2, linestyle=":")
        lower = line[0] < max(values[0] for values in accuracies.values())
        for depth, value in enumerate(line):
            shift = (0, -17) if lower and depth else (0, 9)
            note(axes, f"{value:.0%}", (depth, value), shift, ha="center", fontsize=9)
        note(axes, fact, (0, line[0]), (-12, 0), ha="right", va="center", fontsize=11)
    last = len(line) - 1
    axes.text(last + 0.58, max(guessing.values()) + 0.02, "guessing", ha="right", va="bottom", fontsize=9)
    layers = [f"layer {depth}" for depth in range(1, last)]
    axes.set_xticks(range(last + 1), ["the patch\nby itself", *layers, f"layer {last}:\nwhat W is given"])
    axes.set(xlim=(-0.55, last + 0.6), ylim=(0, 1.1), ylabel="read right, held-out pictures")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="y")
    return figure


@style()
def reading_plate(image: Image.Image, readings: Mapping[str, Mapping[int, tuple[str, bool]]], side: int) -> Figure:
    """The words that probes read off single patches, written over the image; wrong words are struck through.

    Args:
        readings: for each panel's title, patch → (word, whether it is right).
    """
    figure = Figure(figsize=(5.6 * len(readings), 5.9), layout="constrained")
    panels = figure.subplots(1, len(readings), squeeze=False)[0]
    for axes, (title, words) in zip(panels, readings.items(), strict=True):
        pixels = np.asarray(image.convert("RGB"), dtype=float)
        axes.imshow(np.round(pixels + 0.35 * (255 - pixels)).astype(np.uint8), extent=(0, side, side, 0))
        axes.set(xlim=(-0.03, side + 0.03), ylim=(side + 0.03, -0.03))
        axes.set_title(title, fontsize=11.5)
        axes.axis("off")
        for patch, (word, right) in words.items():
            y, x = divmod(patch, side)
            look = {"edgecolor": BLUE, "linestyle": "-"} if right else {"edgecolor": ORANGE, "linestyle": "--"}
            frame = {"facecolor": "white", "alpha": 0.88, "linewidth": 1.6} | look
            axes.add_patch(Rectangle((x + 0.03, y + 0.2), 0.94, 0.6, **frame))
            text = word if right else "\u0336".join([*word, ""])
            size, weight = min(10, 68 / max(5, len(word))), "normal" if right else "bold"
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=size, fontweight=weight)
    return figure


def _draw_image(axes: Axes, box: Frame, image: Image.Image, side: int) -> None:
    """Draw an image into a box, under white lines that cut it into patches."""
    left, bottom, width, height = box
    axes.imshow(np.asarray(image), extent=(left, left + width, bottom, bottom + height), interpolation="bicubic")
    for cut in range(1, side):
        axes.plot([left + width * cut / side] * 2, [bottom, bottom + height], color="white", linewidth=0.7, alpha=0.8)
        axes.plot([left, left + width], [bottom + height * cut / side] * 2, color="white", linewidth=0.7, alpha=0.8)


# ---- patches that are alike


class Twin(NamedTuple):
    """One panel of `twin_plate`: an image, its cosines (N, N), the chosen patch, and a title."""

    image: Image.Image
    cosine: torch.Tensor
    patch: int
    title: str


@style()
def twin_plate(twins: Sequence[Twin]) -> Figure:
    """Which patches are like a chosen one (thick frame): the more alike, the brighter.

    The most similar patch that is no near neighbour has a dashed frame and bears its cosine.
    """
    width = min(3.9, 11.6 / len(twins))
    figure = Figure(figsize=(width * len(twins), width + 0.3), layout="constrained")
    for axes, twin in zip(np.atleast_1d(figure.subplots(1, len(twins))), twins, strict=True):
        _twin_panel(axes, twin)
    return figure


def _twin_panel(axes: Axes, twin: Twin) -> None:
    side = int(len(twin.cosine) ** 0.5)
    like = twin.cosine[twin.patch].reshape(side, side).clamp(0, 1).numpy()
    pixels = np.asarray(twin.image.convert("RGB"), dtype=float) / 255
    light = np.asarray(Image.fromarray(like.astype(np.float32)).resize(twin.image.size, Image.Resampling.NEAREST))
    grey = pixels.mean(-1, keepdims=True) * DARK
    axes.imshow(grey + (pixels - grey) * light[..., None], extent=(0, side, side, 0), interpolation="bicubic")
    similar = twin_of(twin.cosine, twin.patch)
    for patch, dashes, colour in ((twin.patch, "-", ORANGE), (similar, (0, (2.5, 1.2)), "white")):
        y, x = divmod(patch, side)
        axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=colour, linewidth=3, linestyle=dashes))
    y, x = divmod(similar, side)
    look = {"ha": "center", "va": "bottom" if y else "top", "color": "white", "fontsize": 10, "fontweight": "bold"}
    axes.text(x + 0.5, y - 0.15 if y else 1.15, f"{twin.cosine[twin.patch, similar]:.2f}", **look)
    axes.set_title(twin.title, fontsize=10.5)
    axes.set(xlim=(-0.06, side + 0.06), ylim=(side + 0.06, -0.06))
    axes.axis("off")


def twin_chooser(image: Image.Image, cosine: torch.Tensor, patch: int) -> ipywidgets.VBox:
    """Two sliders choose a patch by row and column, and its map follows. Arrow keys move a slider that has the focus.

    Args:
        cosine: (N, N) from `cosines`.
        patch: chosen at first.
    """
    side = int(len(cosine) ** 0.5)
    row = ipywidgets.IntSlider(patch // side, 0, side - 1, description="row")
    column = ipywidgets.IntSlider(patch % side, 0, side - 1, description="column")
    view = ipywidgets.HTML()

    def redraw(_=None) -> None:
        chosen = row.value * side + column.value
        similar = twin_of(cosine, chosen)
        text = (
            f"Patch {chosen} (row {row.value}, column {column.value}): most like patch {similar} "
            f"(row {similar // side}, column {similar % side}), cosine {cosine[chosen, similar]:.2f}."
        )
        plate = twin_plate([Twin(image, cosine, chosen, f"like patch {chosen}")])
        alt = f"The picture, lit where a patch is like the chosen one. {text}"
        view.value = f'{figure_html(plate, alt, 380)}<p role="status">{html.escape(text)}</p>'

    for slider in (row, column):
        slider.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([row, column, view])
