"""What notebook 06 shows: a photograph on its way into the model, where operations go, what fills the memory."""

import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np
from huggingface_hub import constants
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from lessons.cost import PARTS, Memory
from lessons.plots import BLUE, GREY, INK, ORANGE, note, style
from minivlm.checkpoint import CheckpointError
from minivlm.convert.hub import build
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor

PATTERNS = ("", "//", "..", "xx", "\\\\")  # so that no part is told by its colour alone
COLOURS = (GREY, INK, "#A2C8EC", BLUE, ORANGE)


def fetched(weights: str) -> tuple[MiniVLMForConditionalGeneration, MiniVLMProcessor, list[str]] | str:
    """The published model by its name, as `convert.build` gives it; or, in words, why it was not fetched."""
    if not reachable():
        return "there is no network here, or HF_HUB_OFFLINE is set"
    try:
        return build(weights)
    except CheckpointError as error:
        return str(error)


def reachable(seconds: float = 3.0) -> bool:
    """Whether the place where models are published can be asked now; False, too, where `HF_HUB_OFFLINE` is set."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=seconds):
            return True
    except (OSError, ValueError):  # no name, no route, no answer in time, a proxy that refuses, no address at all
        return False


@style()
def photo_plate(photo: Image.Image, processor: MiniVLMProcessor, side: int) -> Figure:
    """A photograph: whole with the square that is kept, as the encoder gets it, and cut into side x side patches.

    The processor's pixels are turned back into an image, so that what is shown is what goes in.
    """
    prepared = as_picture(processor, photo)
    figure = Figure(figsize=(10.5, 4), layout="constrained")
    whole, small, cut = figure.subplots(1, 3)
    whole.imshow(photo)
    edge = min(photo.size)
    left, top = ((length - edge) / 2 for length in photo.size)
    whole.add_patch(Rectangle((left, top), edge, edge, fill=False, edgecolor=ORANGE, linewidth=2.5))
    whole.set_title(f"the photograph, {photo.width} × {photo.height}\nframed: what is kept")
    small.imshow(prepared)
    small.set_title(f"what the encoder gets,\n{prepared.width} × {prepared.height}")
    cut.imshow(_apart(prepared, side))
    cut.set_title(f"cut into {side} × {side} = {side**2} patches:\nthe image tokens")
    for axes in (whole, small, cut):
        axes.axis("off")
    return figure


def as_picture(processor: MiniVLMProcessor, photo: Image.Image) -> Image.Image:
    """What the processor made of an image, turned back: normalised numbers become colours again."""
    settings = processor.image_processor
    pixels = processor.pixels([photo])[0].numpy().transpose(1, 2, 0)  # (H, W, 3)
    colours = pixels * np.array(settings.image_std) + np.array(settings.image_mean)
    return Image.fromarray((colours.clip(0, 1) * 255).round().astype(np.uint8))


def _apart(picture: Image.Image, side: int, gap: int = 3) -> np.ndarray:
    """The image's patches with white between them."""
    patch = picture.width // side
    values = np.asarray(picture).reshape(side, patch, side, patch, 3)
    wide = np.full((side, patch + gap, side, patch + gap, 3), 255, dtype=np.uint8)
    wide[:, :patch, :, :patch] = values
    return wide.reshape(side * (patch + gap), side * (patch + gap), 3)[:-gap, :-gap]


@style()
def losses_bars(losses: Mapping[str, float], nothing: float) -> Figure:
    """Losses on the same texts, and the line of a model that knows nothing."""
    figure = Figure(figsize=(8, 0.5 * len(losses) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(losses), list(losses.values()), color=BLUE, height=0.6)
    axes.invert_yaxis()
    for y, value in enumerate(losses.values()):
        note(axes, f"{value:.2f}", (value, y), (5, 0), va="center")
    axes.axvline(nothing, color=INK, linestyle=":")
    note(axes, f"ln V = {nothing:.2f}", (nothing, -0.5), (4, 6), fontsize=9, annotation_clip=False)
    axes.set(xlabel="loss per supervised token on the same texts", xlim=(0, 1.15 * max(*losses.values(), nothing)))
    axes.tick_params(axis="y", length=0)
    return figure


def arithmetic(stages: Mapping[str, Mapping[str, int]]) -> Figure:
    """Stacked bars: operations of one example, part by part (`cost.PARTS`), in billions."""
    billions = {name: [parts[part] / 1e9 for part in PARTS] for name, parts in stages.items()}
    return _stack(billions, PARTS, "{:.0f}", "billions of operations for one example")


def memory_bars(stages: Mapping[str, Memory]) -> Figure:
    """Stacked bars: what fills the memory in a step, in gigabytes."""
    kinds = tuple(field.name for field in fields(Memory))
    gigabytes = {name: [getattr(memory, kind) / 1e9 for kind in kinds] for name, memory in stages.items()}
    return _stack(gigabytes, kinds, "{:.1f}", "gigabytes in a step of the recipe's batch")


@style()
def _stack(rows: Mapping[str, Sequence[float]], parts: Sequence[str], form: str, unit: str) -> Figure:
    """Horizontal bars made of parts; a part that is wide enough bears its value, all stand in the legend."""
    figure = Figure(figsize=(10.5, 0.75 * len(rows) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    longest = max(map(sum, rows.values()))
    for y, (name, values) in enumerate(rows.items()):
        start = 0.0
        for part, value, colour, pattern in zip(parts, values, COLOURS, PATTERNS, strict=False):
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
