"""Sequences: prompts and answers in one line each, and pictures of what stands where and what a step computes.

Letters as in `config.py`.
"""

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

from lessons.plots import BLUE, GREY, INK, ORANGE, style
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor

Part = str | Image.Image | None
KEPT = "#DCDCDC"  # what is in the cache and is not computed again
ROW = 0.62  # height of a row's strip


def user(*parts: Part) -> list[dict]:
    """A conversation of one message: text, pictures, and None for a picture that is handed over separately."""
    content = []
    for part in parts:
        shown = {} if part is None else {"image": part}
        content.append({"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} | shown)
    return [{"role": "user", "content": content}]


def prompts(processor: MiniVLMProcessor, *conversations: list[dict], **options) -> BatchFeature:
    """Conversations as one batch, padded on the left, each ending where the answer begins.

    `options` are those of `processor.apply_chat_template`.
    """
    wanted = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(list(conversations), **(wanted | options))


def answers(model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, batch, tokens: int = 60) -> list[str]:
    """What the model writes on each row of a batch from `prompts`, greedily."""
    written = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
    return processor.tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def rows_plate(
    input_ids: torch.Tensor, image_token_id: int, attention_mask: torch.Tensor, beside: Sequence[str] = ()
) -> Figure:
    """A batch, row below row: words, placeholders and padding to scale, each run with its length.

    Args:
        input_ids: (B, T).
        image_token_id: the id of `<image>`.
        attention_mask: (B, T), 0 at padding.
        beside: a few words to the right of each row.
    """
    rows, length = input_ids.shape
    image, padding = (input_ids == image_token_id).numpy(), (attention_mask == 0).numpy()
    kinds = np.select([padding, image], ["padding", "placeholders"], "words")
    with style():
        figure = Figure(figsize=(11.5, 0.52 * rows + 0.75))
        page = figure.add_axes((0.06, 0.02, 0.72 if any(beside) else 0.92, 0.96))
        for row in range(rows):
            page.text(-0.012 * length, row + ROW / 2, f"row {row}", ha="right", va="center", fontsize=10)
            _strip(page, row, kinds[row].tolist())
            if row < len(beside):
                page.text(1.012 * length, row + ROW / 2, beside[row], va="center", fontsize=9.5)
        _legend(page, length, rows)
        page.set(xlim=(0, length), ylim=(rows + 0.42, -0.1))
        page.axis("off")
    return figure


LOOKS = {
    "words": {"facecolor": BLUE},
    "placeholders": {"facecolor": ORANGE},
    "padding": {"facecolor": "white", "hatch": "////"},
}


def _strip(page: Axes, row: int, kinds: Sequence[str]) -> None:
    """One row: a bar for each run of equal places, with its length where there is room."""
    start = 0
    for kind, run in groupby(kinds):
        count = len(list(run))
        look = {"edgecolor": GREY if kind == "padding" else "white", "linewidth": 1.2} | LOOKS[kind]
        page.add_patch(Rectangle((start, row), count, ROW, **look))
        if count >= len(kinds) / 30:
            light = kind == "words"
            frame = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
            page.text(
                start + count / 2,
                row + ROW / 2,
                str(count),
                ha="center",
                va="center",
                fontsize=10,
                fontweight="bold",
                color="white" if light else INK,
                bbox=frame if kind == "padding" else None,
            )
        start += count


def _legend(page: Axes, length: int, rows: int) -> None:
    for place, (kind, look) in enumerate(LOOKS.items()):
        left = length * 0.17 * place
        page.add_patch(Rectangle((left, rows), length * 0.02, 0.3, edgecolor=GREY, linewidth=0.8, **look))
        page.text(left + length * 0.028, rows + 0.15, kind, va="center", fontsize=9)


def cache_plate(is_image: Sequence[bool], steps: int) -> Figure:
    """What has to be computed for each new token, without a cache and with one.

    Args:
        is_image: (T,), True where the prompt has a patch.
        steps: new tokens to be written.
    """
    prompt, total = len(is_image), len(is_image) + steps - 1
    colours = np.array([to_rgb(ORANGE if image else BLUE) for image in [*is_image, *[False] * (steps - 1)]])
    with style():
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
            axes.text(
                np.flatnonzero(is_image).mean() + 0.5, 0.5, "picture", ha="center", va="center", fontweight="bold"
            )
            if cached and steps > 1:
                axes.text(prompt / 2, (steps + 1) / 2, "kept in the cache", ha="center", va="center", fontsize=11)
            title = "with a cache" if cached else "without a cache"
            axes.set_title(f"{title}: {sum(counts)} places computed")
            axes.set(xlabel="place in the sequence", xlim=(0, total + 6), yticks=[])
            axes.set_ylabel("" if cached else "new token →", rotation=270, labelpad=12)
            for side in ("left", "bottom"):
                axes.spines[side].set_visible(False)
    return figure
