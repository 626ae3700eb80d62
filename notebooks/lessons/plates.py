"""The plates: one large figure for each of the first notebooks. Plain arrays in, a figure out.

Letters as in `config.py`; show a plate with `figures.show`.
"""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

from lessons.plots import BLUE, GREY, INK, MAP, ORANGE, patches, style

GROUND = {BLUE: "#E6F0F7", ORANGE: "#FFF0E2", GREY: "#F4F4F4"}  # a pale ground for each line colour
PATCH_HEIGHT = 0.52  # of a patch in a line of them, in the units of `swap`, where it is about square
Box = tuple[float, float, float, float]  # left, bottom, width, height


def anatomy(
    picture: Image.Image,
    patch_features: np.ndarray,
    image_embeds: np.ndarray,
    inputs_embeds: np.ndarray,
    is_image: np.ndarray,
    parameters: Mapping[str, int],
    answer: str,
) -> Figure:
    """The whole model at work on one picture, with the real numbers in it: above the eye, below the language.

    Args:
        picture: what is looked at.
        patch_features: (N, Dv).
        image_embeds: (N, Dl).
        inputs_embeds: (T, Dl).
        is_image: (T,), True where a patch stands.
        parameters: how many "vision", "projector" and "language_model" have.
        answer: what the model says.
    """
    (n, dv), (t, dl) = patch_features.shape, inputs_embeds.shape
    side = int(n**0.5)
    with style():
        figure = Figure(figsize=(11.5, 5.4))
        page = figure.add_axes((0, 0, 1, 1))
        _picture(page, (1, 30, 22, 22), picture, side)
        _part(page, (29, 34, 16, 14), "vision", parameters["vision"], "frozen, always", BLUE)
        _matrix(page, (51, 30, 12, 22), patch_features)
        _part(page, (69, 34, 16, 14), "projector W", parameters["projector"], "trains in both stages", ORANGE)
        _matrix(page, (91, 30, 16, 22), image_embeds)
        _label(page, 12, 29, "pixel values", f"{side} × {side} = {n} patches")
        _label(page, 57, 29, "patch features", f"N × Dv = {n} × {dv}")
        _label(page, 99, 29, "image embeds", f"N × Dl = {n} × {dl}")
        for start, end in ((23.8, 28.2), (45.8, 50.2), (63.8, 68.2), (85.8, 90.2)):
            _arrow(page, (start, 41), (end, 41))
        strip = (1, 7.5, 64, 9)
        _matrix(page, strip, _each_by_itself(inputs_embeds).T)
        runs = _runs(page, strip, is_image)
        _arrow(page, (runs[-1], 4.5), (runs[-1], 7.3))
        page.text(runs[-1], 4.2, "words: looked up\nin the embedding table", ha="center", va="top", fontsize=8.5)
        _label(page, 27, 6.5, "inputs embeds: words and patches in one line", f"T × Dl = {t} × {dl}, drawn lying down")
        _bend(page, (99, 23.5), (runs[len(runs) // 2], 19.6))
        _part(page, (69, 5, 20, 14), "language model", parameters["language_model"], "trains in stage 2", GREY)
        _arrow(page, (65.4, 12), (68.4, 12))
        _arrow(page, (89.6, 12), (92.6, 12))
        page.text(93.4, 12, textwrap.fill(answer, 26), va="center", fontsize=10 if len(answer) < 80 else 8.5)
        page.set(xlim=(0, 115), ylim=(0, 54), aspect="auto")
        page.axis("off")
    return figure


def _picture(page: Axes, box: Box, picture: Image.Image, side: int) -> None:
    """A picture cut into its patches."""
    left, bottom, width, height = box
    page.imshow(np.asarray(picture), extent=(left, left + width, bottom, bottom + height), interpolation="bicubic")
    for cut in range(1, side):
        page.plot([left + width * cut / side] * 2, [bottom, bottom + height], color="white", linewidth=0.6, alpha=0.7)
        page.plot([left, left + width], [bottom + height * cut / side] * 2, color="white", linewidth=0.6, alpha=0.7)


def _matrix(page: Axes, box: Box, values: np.ndarray) -> None:
    """A matrix as a map of its values, each row or column as the eye finds it."""
    left, bottom, width, height = box
    extent = (left, left + width, bottom, bottom + height)
    low, high = np.percentile(values, [2, 98])
    page.imshow(values, extent=extent, cmap=MAP, vmin=low, vmax=high, aspect="auto", interpolation="nearest", zorder=1)


def _each_by_itself(values: np.ndarray) -> np.ndarray:
    """Every row scaled to its own largest value: rows of very different length all show their pattern."""
    return values / np.abs(values).max(axis=1, keepdims=True)


def _part(page: Axes, box: Box, name: str, parameters: int, role: str, colour: str) -> None:
    """A box of the diagram: what it is called, how large it is, whether it learns."""
    left, bottom, width, height = box
    page.add_patch(
        FancyBboxPatch(
            (left, bottom),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=1.2",
            facecolor=GROUND[colour],
            edgecolor=colour,
            linewidth=1.8,
            zorder=2,
        )
    )
    x, y = left + width / 2, bottom + height / 2
    page.text(x, y + 3, name, ha="center", va="center", fontsize=12, fontweight="bold", zorder=3)
    page.text(
        x,
        y - 2.2,
        f"{parameters:,} parameters\n{role}",
        ha="center",
        va="center",
        fontsize=8,
        zorder=3,
        linespacing=1.6,
    )


def _label(page: Axes, x: float, y: float, name: str, shape: str) -> None:
    page.text(x, y, name, ha="center", va="top", fontsize=10, fontweight="bold")
    page.text(x, y - 2.2, shape, ha="center", va="top", fontsize=9)


def _arrow(page: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    page.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=INK, linewidth=1.4))


def _bend(page: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow that goes sideways first, then down."""
    bend = "angle,angleA=180,angleB=90,rad=8"
    page.add_patch(
        FancyArrowPatch(start, end, connectionstyle=bend, arrowstyle="-|>", mutation_scale=13, color=INK, linewidth=1.4)
    )


def _runs(page: Axes, box: Box, is_image: np.ndarray) -> list[float]:
    """Bars over the stretches of a sequence, words, picture, words; returns where their middles are."""
    left, bottom, width, height = box
    edges = [0, *(np.flatnonzero(np.diff(is_image.astype(int))) + 1), len(is_image)]
    middles, top = [], bottom + height + 0.7
    for start, end in pairwise(edges):
        a, b = (left + width * edge / len(is_image) for edge in (start, end))
        page.plot([a + 0.2, b - 0.2], [top, top], color=ORANGE if is_image[start] else BLUE, linewidth=3)
        page.text((a + b) / 2, top + 0.8, "picture" if is_image[start] else "text", ha="center", fontsize=8.5)
        middles.append((a + b) / 2)
    return middles


def swap(
    picture: Image.Image, tokens: Sequence[str], looked_up: np.ndarray, swapped: np.ndarray, is_image: np.ndarray
) -> Figure:
    """A sequence before and after the picture's embeddings are put in, its patches laid out in a line above them.

    Args:
        picture: what the placeholders stand for.
        tokens: the T tokens as text; those of the picture are not written.
        looked_up: (T, Dl) embeddings after the look-up.
        swapped: (T, Dl) embeddings after the swap.
        is_image: (T,), True at a placeholder.
    """
    length, places = len(tokens), np.flatnonzero(is_image)
    with style():
        figure = Figure(figsize=(11.5, 4.6))
        page = figure.add_subplot()
        for bottom, values in ((7.0, looked_up), (0.0, swapped)):
            _matrix(page, (0, bottom, length, 5), _each_by_itself(values).T)
        for place, patch in zip(places, patches(picture, len(places)), strict=True):
            page.imshow(patch, extent=(place, place + 1, 13.3, 13.3 + PATCH_HEIGHT))
        for place in np.flatnonzero(~is_image):
            page.text(place + 0.5, 12.3, tokens[place], rotation=90, ha="center", va="bottom", fontsize=8)
        page.text(places.mean() + 0.5, 12.2, f"{len(places)} placeholders, one for each patch", ha="center", fontsize=9)
        for edge in (places[0], places[-1] + 1):
            page.plot([edge, edge], [-0.4, 12], color=ORANGE, linewidth=1.5)
        page.text(-1, 9.5, "after\nthe look-up", ha="right", va="center")
        page.text(-1, 2.5, "after\nthe swap", ha="right", va="center")
        page.text(places.mean() + 0.5, -1.6, "only these have changed", ha="center", fontsize=9)
        page.set(xlim=(0, length), ylim=(-2, 16.5), aspect="auto")
        page.axis("off")
    return figure
