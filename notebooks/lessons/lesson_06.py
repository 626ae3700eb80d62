"""What notebook 06 shows: a photograph on its way into the model, where operations go, what fills the memory."""

import urllib.request
from collections.abc import Mapping
from dataclasses import fields

import numpy as np
from huggingface_hub import constants
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from lessons.cost import Memory
from lessons.plots import BLUE, INK, ORANGE, note, patches, stacked_bars, style
from minivlm.checkpoint import CheckpointError
from minivlm.convert.hub import build
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor


def fetched(weights: str) -> tuple[MiniVLMForConditionalGeneration, MiniVLMProcessor, list[str]] | str:
    """The published model by its name, as `convert.build` gives it; or, in words, why it was not fetched."""
    if not reachable():
        return "there is no network here, or HF_HUB_OFFLINE is set"
    try:
        return build(weights)
    except CheckpointError as error:
        return str(error)


def reachable(seconds: float = 3.0) -> bool:
    """Whether the site where models are published answers now; False, too, where `HF_HUB_OFFLINE` is set."""
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
    prepared = as_image(processor, photo)
    figure = Figure(figsize=(10.5, 4), layout="constrained")
    whole, small, cut = figure.subplots(1, 3)
    whole.imshow(photo)
    edge = min(photo.size)
    left, top = ((length - edge) / 2 for length in photo.size)
    whole.add_patch(Rectangle((left, top), edge, edge, fill=False, edgecolor=ORANGE, linewidth=2.5))
    whole.set_title(f"the photograph, {photo.width} × {photo.height}\nframed: what is kept")
    small.imshow(prepared)
    small.set_title(f"what the encoder gets,\n{prepared.width} × {prepared.height}")
    cut.imshow(with_gaps(prepared, side))
    cut.set_title(f"cut into {side} × {side} = {side**2} patches:\nthe image tokens")
    for axes in (whole, small, cut):
        axes.axis("off")
    return figure


def as_image(processor: MiniVLMProcessor, photo: Image.Image) -> Image.Image:
    """What the processor made of an image, turned back: normalised numbers become colours again."""
    settings = processor.image_processor
    pixels = processor.pixels([photo])[0].numpy().transpose(1, 2, 0)  # (H, W, 3)
    colours = pixels * np.array(settings.image_std) + np.array(settings.image_mean)
    return Image.fromarray((colours.clip(0, 1) * 255).round().astype(np.uint8))


def with_gaps(image: Image.Image, side: int, gap: int = 3) -> np.ndarray:
    """The image's patches (side x side) with white between them."""
    tiles = [np.pad(one, ((0, gap), (0, gap), (0, 0)), constant_values=255) for one in patches(image, side**2)]
    rows = [np.hstack(tiles[start : start + side]) for start in range(0, side**2, side)]
    return np.vstack(rows)[:-gap, :-gap]


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


def memory_bars(stages: Mapping[str, Memory]) -> Figure:
    """Stacked bars: what fills the memory in a step, in gigabytes."""
    kinds = tuple(field.name for field in fields(Memory))
    gigabytes = {name: [getattr(memory, kind) / 1e9 for kind in kinds] for name, memory in stages.items()}
    return stacked_bars(gigabytes, kinds, "{:.1f}", "gigabytes in a step of the recipe's batch")
