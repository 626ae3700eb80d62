"""Notebook 02: prompts as batches, and figures of what stands where in a sequence. Letters as in `config.py`."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from transformers import BatchFeature

from lessons.plots import BLUE, GREY, INK, ORANGE, draw_matrix, patches, scale_rows, style
from lessons.probes import side_by_side  # noqa: F401 (for the notebook)
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor

Part = str | Image.Image | None
PATCH_HEIGHT = 0.52  # of a patch in a line of them, in the units of `swap`, where it is about square
KEPT = "#DCDCDC"  # what is in the cache and is not computed again
ROW = 0.62  # height of a row's strip
LOOKS = {
    "words": {"facecolor": BLUE},
    "placeholders": {"facecolor": ORANGE},
    "padding": {"facecolor": "white", "hatch": "////"},
}


def user(*parts: Part) -> list[dict]:
    """A conversation of one message: text, images, and None for an image that is passed separately."""
    content = []
    for part in parts:
        image = {} if part is None else {"image": part}
        content.append({"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} | image)
    return [{"role": "user", "content": content}]


def prompts(processor: MiniVLMProcessor, *conversations: list[dict], **options) -> BatchFeature:
    """Conversations as one batch, padded on the left, each ending where the answer begins.

    `options` are those of `processor.apply_chat_template`.
    """
    defaults = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(list(conversations), **(defaults | options))


def answers(model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, batch, tokens: int = 60) -> list[str]:
    """The greedy answer to each row of a batch from `prompts`."""
    written = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
    return processor.tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@style()
def swap(
    image: Image.Image, tokens: Sequence[str], looked_up: np.ndarray, swapped: np.ndarray, is_image: np.ndarray
) -> Figure:
    """A sequence before and after the picture's embeddings replace its placeholders, with the patches above it.

    Args:
        tokens: the T tokens as text; those of the picture are not written.
        looked_up, swapped: (T, Dl) embeddings from the table, and after the replacement.
        is_image: (T,), True at a placeholder.
    """
    length, positions = len(tokens), np.flatnonzero(is_image)
    figure = Figure(figsize=(11.5, 4.6))
    ax = figure.add_subplot()
    for bottom, values in ((7.0, looked_up), (0.0, swapped)):
        draw_matrix(ax, (0, bottom, length, 5), scale_rows(values).T)
    for position, patch in zip(positions, patches(image, len(positions)), strict=True):
        ax.imshow(patch, extent=(position, position + 1, 13.3, 13.3 + PATCH_HEIGHT))
    for position in np.flatnonzero(~is_image):
        ax.text(position + 0.5, 12.3, tokens[position], rotation=90, ha="center", va="bottom", fontsize=8)
    ax.text(positions.mean() + 0.5, 12.2, f"{len(positions)} placeholders, one for each patch", ha="center", fontsize=9)
    for edge in (positions[0], positions[-1] + 1):
        ax.plot([edge, edge], [-0.4, 12], color=ORANGE, linewidth=1.5)
    ax.text(-1, 9.5, "after\nthe look-up", ha="right", va="center")
    ax.text(-1, 2.5, "after\nthe swap", ha="right", va="center")
    ax.text(positions.mean() + 0.5, -1.6, "only these have changed", ha="center", fontsize=9)
    ax.set(xlim=(0, length), ylim=(-2, 16.5), aspect="auto")
    ax.axis("off")
    return figure


@style()
def rows_plate(
    input_ids: torch.Tensor, image_token_id: int, attention_mask: torch.Tensor, beside: Sequence[str] = ()
) -> Figure:
    """A batch, row below row: words, placeholders and padding to scale, each run with its length.

    Args:
        input_ids, attention_mask: (B, T), the mask 0 at padding.
        beside: a few words to the right of each row.
    """
    rows, length = input_ids.shape
    is_image, padding = (input_ids == image_token_id).numpy(), (attention_mask == 0).numpy()
    kinds = np.select([padding, is_image], ["padding", "placeholders"], "words")
    figure = Figure(figsize=(11.5, 0.52 * rows + 0.75))
    ax = figure.add_axes((0.06, 0.02, 0.72 if any(beside) else 0.92, 0.96))
    for row in range(rows):
        ax.text(-0.012 * length, row + ROW / 2, f"row {row}", ha="right", va="center", fontsize=10)
        _strip(ax, row, kinds[row].tolist())
        if row < len(beside):
            ax.text(1.012 * length, row + ROW / 2, beside[row], va="center", fontsize=9.5)
    for index, (kind, look) in enumerate(LOOKS.items()):
        left = length * 0.17 * index
        ax.add_patch(Rectangle((left, rows), length * 0.02, 0.3, edgecolor=GREY, linewidth=0.8, **look))
        ax.text(left + length * 0.028, rows + 0.15, kind, va="center", fontsize=9)
    ax.set(xlim=(0, length), ylim=(rows + 0.42, -0.1))
    ax.axis("off")
    return figure


def _strip(ax: Axes, row: int, kinds: Sequence[str]) -> None:
    """One row: a bar for each run of equal positions, with its length where there is room."""
    start = 0
    for kind, run in groupby(kinds):
        count = len(list(run))
        look = {"edgecolor": GREY if kind == "padding" else "white", "linewidth": 1.2} | LOOKS[kind]
        ax.add_patch(Rectangle((start, row), count, ROW, **look))
        if count >= len(kinds) / 30:
            frame = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
            look = {"color": "white" if kind == "words" else INK, "bbox": frame if kind == "padding" else None}
            middle = {"ha": "center", "va": "center", "fontsize": 10, "fontweight": "bold"}
            ax.text(start + count / 2, row + ROW / 2, str(count), **middle, **look)
        start += count


@style()
def cache_plate(is_image: Sequence[bool], steps: int) -> Figure:
    """The positions that are computed for each of `steps` new tokens, without a cache and with one.

    Args:
        is_image: (T,), True where the prompt has a patch.
    """
    prompt, total = len(is_image), len(is_image) + steps - 1
    colours = np.array([to_rgb(ORANGE if image else BLUE) for image in [*is_image, *[False] * (steps - 1)]])
    figure = Figure(figsize=(11.5, 0.25 * steps + 1.0), layout="constrained")
    for axes, cached in zip(figure.subplots(1, 2), (False, True), strict=True):
        cells, counts = np.ones((steps, total, 3)), []
        for step in range(steps):
            first = prompt + step - 1 if cached and step else 0
            cells[step, :first] = to_rgb(KEPT)
            cells[step, first : prompt + step] = colours[first : prompt + step]
            counts.append(prompt + step - first)
        axes.imshow(cells, aspect="auto", interpolation="nearest", extent=(0, total, steps, 0))
        for step, count in enumerate(counts):
            axes.plot([0, total], [step, step], color="white", linewidth=2)
            axes.text(total + 1, step + 0.5, str(count), va="center", fontsize=8.5)
        middle = np.flatnonzero(is_image).mean() + 0.5
        axes.text(middle, 0.5, "picture", ha="center", va="center", fontweight="bold")
        if cached and steps > 1:
            axes.text(prompt / 2, (steps + 1) / 2, "kept in the cache", ha="center", va="center", fontsize=11)
        title = "with a cache" if cached else "without a cache"
        axes.set_title(f"{title}: {sum(counts)} positions computed")
        axes.set(xlabel="position in the sequence", xlim=(0, total + 6), yticks=[])
        axes.set_ylabel("" if cached else "new token →", rotation=270, labelpad=12)
        axes.spines[:].set_visible(False)
    return figure
