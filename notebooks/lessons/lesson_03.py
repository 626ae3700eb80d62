"""What notebook 03 shows: how gradients reach W, the words that patches become, and what the model then can do.

Each `show_…` shows a figure with its alternative text and its summary. Letters as in `config.py`.
"""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from PIL import Image

from lessons.faults import planted  # noqa: F401 (the notebook uses it, and others below)
from lessons.lenses.blocks import gradient_map  # noqa: F401
from lessons.lenses.words import FACTS, UNTRUE, facts_named, listed, read_aloud, read_patches, show_words, typed_image  # noqa: F401
from lessons.plots import BLUE, INK, LIGHT_BLUE, MAP, ORANGE, PALE_ORANGE, note, patches, show, style
from lessons.widgets.explorers import Album, Moment, PatchExplorer, StepExplorer  # noqa: F401
from minivlm.config import IGNORE_INDEX
from minivlm.processor import MiniVLMProcessor

FAINTEST = 0.002  # of a layer's largest gradient: what is below is drawn alike
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "")  # so that bars differ without colour, too
SHADES = ("#C85200", "#FF800E", "#FFBC79", "#5F9ED1", LIGHT_BLUE, "#E6E6E6")


def show_gradient_path(
    image: Image.Image,
    norms: torch.Tensor,
    batch: Mapping[str, torch.Tensor],
    processor: MiniVLMProcessor,
    kept: torch.Tensor,
) -> None:
    """The gradient through the language model, from `lenses.gradient_map`.

    Args:
        norms: (L + 1, T).
        batch: the one example, made by `processor`, of the backward pass.
        kept: W's gradient.
    """
    ids = batch["input_ids"][0]
    tokens = [processor.tokenizer.decode([token_id]).replace("\n", "↵") for token_id in ids.tolist()]
    is_image = (ids == processor.image_token_id).numpy()
    supervised = np.append(batch["labels"][0, 1:].numpy() != IGNORE_INDEX, False)
    figure = gradient_path(image, norms.numpy(), tokens, is_image, supervised, kept.norm().item())
    top, bottom = (np.count_nonzero(norms[layer]) for layer in (-1, 0))
    alt = (
        "A map: the row's tokens from left to right, the layers from top to bottom, the gradient's size as brightness. "
        f"At the top only {top} positions have any, those that predict a word of the caption. One layer below, all "
        "that stands before them has some, the picture's positions too. Below the map: the picture with a dot on each "
        "patch, the larger, the more arrives there; from there an arrow to W."
    )
    summary = (
        f"Out of the last layer {top} of {len(ids)} positions have a gradient, of what goes in {bottom} do, all "
        f"{np.count_nonzero(norms[0][is_image])} of the picture's among them; W keeps it."
    )
    show(figure, alt, summary)


def show_lighting_up(image: Image.Image, moments: Mapping[int, Moment]) -> None:
    """An image at several steps of the training; see `lighting_up`."""
    lit = {step: sum(word.true for word in moment.words) for step, moment in moments.items()}
    line = " ".join(f"Step {step}: {count}, “{moments[step].answer}”." for step, count in lit.items())
    alt = f"The same picture {len(moments)} times. Only patches whose nearest word is true are in colour. {line}"
    patches = len(next(iter(moments.values())).words)
    summary = f"The picture lights up as W learns: {' → '.join(map(str, lit.values()))} of its {patches} patches."
    show(lighting_up(image, moments), alt, summary)


def show_facts(rows: Mapping[str, Mapping[str, int]]) -> None:
    """What the nearest words of things' patches say; see `facts_bars`."""
    true = {name: 1 - counts[UNTRUE] / sum(counts.values()) for name, counts in rows.items()}
    alt = "Stacked bars of what the nearest word says of the thing on its patch."
    for name, counts in rows.items():
        shares = (f"{fact} {counts[fact] / sum(counts.values()):.0%}" for fact in (*FACTS, UNTRUE))
        alt += f" {name}: {', '.join(shares)}."
    summary = ", ".join(f"{name} {share:.0%}" for name, share in true.items())
    show(facts_bars(rows), alt, f"Patches of things whose nearest word is true of the thing: {summary}.")


@style()
def gradient_path(
    image: Image.Image,
    norms: np.ndarray,
    tokens: Sequence[str],
    is_image: np.ndarray,
    supervised: np.ndarray,
    arrives: float,
) -> Figure:
    """The gradient from the caption's words down through the language model to the patches, and on to W.

    Args:
        norms: (L + 1, T) from `lenses.gradient_map`; each row is drawn against its own largest.
        tokens: the T tokens as text; those of the image are not written.
        is_image: (T,), True where a patch stands.
        supervised: (T,), True where the next token is supervised: there the gradient begins.
        arrives: the norm of the gradient that W keeps.
    """
    layers, length = len(norms) - 1, norms.shape[1]
    positions, side = np.flatnonzero(is_image), int(is_image.sum() ** 0.5)
    figure = Figure(figsize=(11.8, 5.0))
    ax = figure.add_axes((0.105, 0.36, 0.885, 0.55))
    shares = np.ma.masked_equal(norms / norms.max(axis=1, keepdims=True), 0)
    options = {"norm": LogNorm(FAINTEST, 1), "cmap": MAP, "origin": "lower", "interpolation": "nearest"}
    ax.imshow(shares, aspect="auto", **options)
    ax.set_facecolor("white")
    ax.set_yticks(range(layers + 1), ["what goes in", *(f"out of layer {layer + 1}" for layer in range(layers))])
    ax.set_xticks(np.flatnonzero(~is_image), [tokens[t] for t in np.flatnonzero(~is_image)])
    ax.tick_params(axis="x", rotation=90, labelsize=7.5, length=0, pad=2)
    ax.tick_params(axis="y", length=0)
    for edge in (positions[0] - 0.5, positions[-1] + 0.5):
        ax.axvline(edge, color=ORANGE, linewidth=1.5)
    for t in np.flatnonzero(supervised):
        ax.plot(t, layers + 0.72, marker="v", color=INK, markersize=5, clip_on=False)
    middle, above = np.flatnonzero(supervised).mean(), layers + 1.0
    ax.text(middle, above, "the loss enters here", ha="center", va="bottom", fontsize=9)
    ax.text(positions.mean(), layers + 0.62, f"the picture's {len(positions)} positions", ha="center", fontsize=9)
    legend = "the brighter, the more of its row's largest gradient; white: none"
    ax.text(-0.5, above, legend, va="bottom", fontsize=8.5)
    ax.set(xlim=(-0.5, length - 0.5), ylim=(-0.5, layers + 0.5))
    ax.spines[:].set_visible(False)
    _down_to_w(figure, ax, image, norms[0][is_image].reshape(side, side), arrives)
    return figure


def _down_to_w(figure: Figure, ax: Axes, image: Image.Image, last: np.ndarray, arrives: float) -> None:
    """Below the map: the gradient over the image's own patches, and W, where it ends."""
    box, side = ax.get_position(), len(last)
    left = box.x0 + 0.16
    whole = figure.add_axes((left, 0.0, 0.125, 0.295))
    whole.imshow(np.asarray(image), extent=(0, side, side, 0), interpolation="bicubic")
    whole.imshow(np.ones((1, 1, 3)), extent=(0, side, side, 0), alpha=0.45)
    y, x = np.mgrid[:side, :side] + 0.5
    whole.scatter(x, y, s=70 * last / last.max(), color=BLUE, edgecolors="white", linewidths=0.6)
    whole.axis("off")
    arrow = {"arrowstyle": "-|>", "mutation_scale": 14, "color": INK, "linewidth": 1.4}
    middle = left + 0.0625
    figure.add_artist(FancyArrowPatch((middle, box.y0 - 0.008), (middle, 0.305), transform=figure.transFigure, **arrow))
    beside = figure.add_axes((left + 0.135, 0.0, 0.58, 0.295))
    beside.set(xlim=(0, 100), ylim=(0, 10))
    beside.axis("off")
    beside.text(0, 9.4, "a dot's area: how much\narrives at its patch", va="top", fontsize=8.5)
    beside.add_patch(FancyArrowPatch((0, 3.2), (24, 3.2), **arrow))
    beside.add_patch(Rectangle((25, 0.6), 11, 5.4, facecolor=PALE_ORANGE, edgecolor=ORANGE, linewidth=2.4))
    beside.text(30.5, 3.3, "W", ha="center", va="center", fontsize=15, fontweight="bold")
    size = f"keeps a gradient of norm {arrives:.3g};\nthe layers above keep none"
    beside.text(38, 3.3, size, va="center", fontsize=10)


@style()
def lighting_up(image: Image.Image, moments: Mapping[int, Moment]) -> Figure:
    """The same image at several steps: only patches whose nearest word is true are shown in their colours."""
    figure = Figure(figsize=(2.3 * len(moments), 3.7), layout="constrained")
    for number, (step, moment) in enumerate(moments.items(), start=1):
        axes = figure.add_subplot(1, len(moments), number)
        side = int(len(moment.words) ** 0.5)
        _lit(axes, image, [word.true for word in moment.words])
        lit = sum(word.true for word in moment.words)
        axes.set_title(f"step {step}", fontsize=11, loc="center")
        axes.text(side / 2, side + 0.25, f"{lit} of {len(moment.words)} patches", ha="center", va="top", fontsize=9)
        answer = textwrap.fill(moment.answer, 25)
        axes.text(side / 2, side + 1.25, f"“{answer}”", ha="center", va="top", fontsize=8.5, style="italic")
        axes.set(xlim=(-0.05, side + 0.05), ylim=(side + 4.2, -0.05), aspect="equal")
        axes.axis("off")
    return figure


def _lit(axes: Axes, image: Image.Image, lit: Sequence[bool]) -> None:
    """An image of which only some patches are shown as they are; the others are pale and grey."""
    side = int(len(lit) ** 0.5)
    for index, (patch, shown) in enumerate(zip(patches(image, len(lit)), lit, strict=True)):
        y, x = divmod(index, side)
        if not shown:
            grey = patch.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
            patch = (255 - (255 - grey) * 0.16).astype(np.uint8)
        axes.imshow(patch, extent=(x, x + 1, y + 1, y), interpolation="bilinear")
        if shown:
            axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=ORANGE, linewidth=0.7))


@style()
def facts_bars(rows: Mapping[str, Mapping[str, int]]) -> Figure:
    """What the nearest words of things' patches say: a bar for each row of counts from `lenses.facts_named`."""
    figure = Figure(figsize=(9.6, 0.55 * len(rows) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, counts) in enumerate(rows.items()):
        start, total = 0.0, sum(counts.values())
        for fact, shade, hatch in zip((*FACTS, UNTRUE), SHADES, HATCHES, strict=True):
            share = counts[fact] / total
            label = fact if index == 0 else None
            axes.barh(name, share, 0.72, start, color=shade, hatch=hatch, edgecolor="white", label=label)
            start += share
        true = 1 - counts[UNTRUE] / total
        note(axes, f"{true:.0%} true", (1, index), (6, 0), va="center")
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of the patches that things cover, by what their nearest word says of the thing")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.legend(ncols=6, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=9, handlelength=1.6)
    return figure
