"""Notebook 05: answers with their errors marked, hallucination by position, occlusion, and the ablations.

Letters as in `config.py`.
"""

import html
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from lessons.plots import BLUE, GREY, INK, MAP, ORANGE, image_html, note, style, table_html, trailing_mean
from minivlm.evaluation import EXPERIMENTS, effect, values
from minivlm.generate import ask, reply
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor
from minivlm.report import marked
from minivlm.scenes.drawing.draw import SIZE, Box, draw, layout
from minivlm.scenes.facts import Scene
from minivlm.scenes.language import find_things, in_reading_order, noun_phrase
from minivlm.scenes.vocabulary import KIND_WORDS

GREY_BOX = (128, 128, 128)
SHADOW = 0.18  # of its width that a thing's shadow reaches beyond its box
MEASURES = {"sampled chair_i": "CHAIR_i, sampled", "chair_i": "CHAIR_i, greedy", "recall": "recall, greedy"}

# ---- answers with their errors marked


def show_marked(scenes: Mapping[str, Scene], columns: Mapping[str, Sequence[str]], side: int = 110) -> None:
    """A table of drawn scenes and answers; what an answer says wrongly is struck through, with a cross behind it.

    Args:
        scenes: a name for each scene, and the scene.
        columns: a heading and one text per scene for each column.
    """
    rows = []
    for (name, scene), *texts in zip(scenes.items(), *columns.values(), strict=True):
        image = image_html(draw(scene), f"{name}: {facts_of(scene)}", side)
        rows.append([image, *(marked_html(text, scene) for text in texts)])
    plain = "\n".join(f"{name}: {text}" for name, texts in columns.items() for text in texts)
    display({"text/html": table_html(["picture", *columns], rows), "text/plain": plain}, raw=True)


def marked_html(text: str, scene: Scene) -> str:
    """An answer as HTML: what is not true is struck through and followed by a cross, and by why in small print."""
    parts = []
    for piece in marked(text, scene):
        words = html.escape(piece.text)
        if piece.error:
            words = f"<del>{words}</del> <b>✗</b> <small>({html.escape(piece.error)})</small>"
        parts.append(words)
    return "".join(parts)


def facts_of(scene: Scene) -> str:
    """What is true of a scene, in a few words."""
    things = [noun_phrase(t.kind, t.colour, "en", t.size) for t in in_reading_order(scene)]
    return f"{', '.join(things)}; {scene.setting}"


# ---- curves


@style()
def two_losses(losses: Mapping[str, Sequence[float]], nothing_known: float) -> Figure:
    """Two loss curves on one logarithmic scale, side by side, with the loss of a model that knows nothing."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (name, row), colour in zip(
        figure.subplots(1, 2, sharey=True), losses.items(), (BLUE, ORANGE), strict=True
    ):
        steps, mean = np.arange(1, len(row) + 1), trailing_mean(row)
        axes.plot(steps, row, color=GREY, linewidth=0.6)
        axes.plot(steps, mean, color=colour, linewidth=2)
        axes.axhline(nothing_known, color=INK, linewidth=1, linestyle=":")
        note(axes, f"{mean[-1]:.3f}", (steps[-1], mean[-1]), (0, 8), ha="right")
        axes.set(yscale="log", xlabel="step")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(name)
        axes.grid(axis="y")
    first = figure.axes[0]
    first.set_ylabel("loss per supervised token")
    end = (len(next(iter(losses.values()))), nothing_known)
    note(first, "ln V: knows nothing", end, (0, -12), ha="right", fontsize=8.5)
    return figure


@style()
def by_mention(rows: Mapping[str, Sequence[Sequence[float | None]]]) -> Figure:
    """Hallucination against position: the share of first, second, … mentions that are invented.

    Args:
        rows: who -> one row of shares for each seed (or a single one); None where nothing was mentioned.
    """
    figure = Figure(figsize=(7.4, 3.3), layout="constrained")
    axes = figure.add_subplot()
    looks = zip(rows.items(), (BLUE, ORANGE, INK, GREY), ("o-", "s--", "^-.", "D:"), strict=False)
    for (who, seeds), colour, mark in looks:
        columns = [[share for share in column if share is not None] for column in zip(*seeds, strict=True)]
        x = [n for n, shares in enumerate(columns, 1) if shares]  # some mention was the n-th
        lowest, highest = ([end(shares) for shares in columns if shares] for end in (min, max))
        axes.fill_between(x, lowest, highest, color=colour, alpha=0.15)
        means = [sum(shares) / len(shares) for shares in columns if shares]
        axes.plot(x, means, mark, color=colour, linewidth=2, label=who)
    last = max(len(seed) for seeds in rows.values() for seed in seeds)
    axes.set_xticks(range(1, last + 1), [*map(str, range(1, last)), f"{last} and later"])
    axes.set(xlabel="mention in the answer", ylim=(0, None))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_title("Share of the n-th mentions that are invented")
    axes.grid(axis="y")
    axes.legend(frameon=False)
    return figure


# ---- occlusion


def reach(box: Box) -> tuple[int, int, int, int]:
    """A thing's box with its shadow, in pixels: left, top, right, bottom."""
    left, top, right, bottom = box
    more = SHADOW * (right - left)
    edges = (left - more, top - 0.02, right + more, bottom + more)
    return tuple(round(min(max(edge, 0.0), 1.0) * SIZE) for edge in edges)


def hide(scene: Scene, index: int, grey: bool = False) -> Image.Image:
    """A scene without one of its things: a grey box over it, or what is behind it.

    A scene without things has the same background to the pixel, because the setting is painted first. So where no
    other thing stands nearby (`stands_alone`) the result is the very scene without the thing.
    """
    image, box = draw(scene), reach(layout(scene)[index])
    behind = Image.new("RGB", image.size, GREY_BOX) if grey else draw(replace(scene, things=()))
    image.paste(behind.crop(box), box)
    return image


def stands_alone(scene: Scene, index: int) -> bool:
    """Whether a thing with its shadow touches no other thing with its own."""
    boxes = [reach(box) for box in layout(scene)]
    left, top, right, bottom = boxes.pop(index)
    return all(o[2] <= left or right <= o[0] or o[3] <= top or bottom <= o[1] for o in boxes)


@dataclass(frozen=True)
class Occlusion:
    """What hiding a part of an image does to one word of the answer.

    Attributes:
        answer: what the model says about the whole image.
        word: the word that is followed.
        whole: its probability with the whole image, given the answer so far.
        hidden: (P, P), its probability with a window hidden whose top left patch is here; P positions a side.
        window: patches a side of the window.
    """

    answer: str
    word: str
    whole: float
    hidden: np.ndarray
    window: int

    @property
    def drops(self) -> np.ndarray:
        """(√N, √N): how much of the word's probability is lost, over all windows that hide a patch, on average."""
        positions, side = len(self.hidden), len(self.hidden) + self.window - 1
        total, count = np.zeros((side, side)), np.zeros((side, side))
        for y in range(positions):
            for x in range(positions):
                total[y : y + self.window, x : x + self.window] += self.whole - self.hidden[y, x]
                count[y : y + self.window, x : x + self.window] += 1
        return total / count


@torch.no_grad()
def occlude(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    image: Image.Image,
    prompt: str,
    kind: str,
    window: int = 3,
) -> Occlusion:
    """Slide a grey window over an image and watch the word for a kind of thing in the model's answer.

    The answer is the one to the whole image; what is asked is how probable the word still is at its position.

    Raises:
        ValueError: the answer does not name the kind.
    """
    text = reply(model, processor, ask(prompt, image))
    spans = [span for span, (named, _) in find_things(text) if named == kind]
    if not spans:
        raise ValueError(f"the answer does not name a {kind}: {text!r}")
    lang = "en" if text.isascii() else "zh"
    word = KIND_WORDS[lang][kind]
    start = text.lower().index(word, spans[0][0])
    side = int(model.config.num_image_tokens**0.5)
    size = image.width // side
    covers = [(x * size, y * size) for y in range(side - window + 1) for x in range(side - window + 1)]
    images = [image]
    for x, y in covers:
        images.append(image.copy())
        images[-1].paste(GREY_BOX, (x, y, x + window * size, y + window * size))
    features = model.vision(processor.pixels(images).to(model.device))  # (I, N, Dv)
    chances = word_chances(model, processor, features, prompt, text, (start, start + len(word)))
    positions = side - window + 1
    return Occlusion(text, word, chances[0], np.array(chances[1:]).reshape(positions, positions), window)


@torch.no_grad()
def word_chances(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    patch_features: torch.Tensor,
    prompt: str,
    text: str,
    span: tuple[int, int],
) -> list[float]:
    """The probability of the characters `span` of an answer, given what comes before them, for each image.

    Args:
        patch_features: (I, N, Dv).
    """
    tokens = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    prompt_ids = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=True)[0]
    positions = [i for i, (a, b) in enumerate(tokens["offset_mapping"]) if a < span[1] and b > span[0]]
    ids = torch.tensor([prompt_ids + tokens["input_ids"]] * len(patch_features), device=model.device)  # (I, T)
    before = [len(prompt_ids) + position - 1 for position in positions]  # what comes next is these characters
    kept = torch.tensor(before, device=model.device)
    logits = model(input_ids=ids, patch_features=patch_features, logits_to_keep=kept).logits  # (I, K, V)
    chosen = logits.log_softmax(dim=-1).gather(-1, ids[:, kept + 1, None])  # (I, K, 1)
    return chosen.sum(dim=(1, 2)).exp().tolist()


@style()
def occlusion_plate(scene: Scene, index: int, occlusion: Occlusion, texts: Mapping[str, str]) -> Figure:
    """A picture whole, with a thing under a grey box, and without it, each with its answer; and which patches matter.

    Args:
        texts: a title and an answer for the whole picture, the box and the scene without the thing.
    """
    images = (draw(scene), hide(scene, index, grey=True), hide(scene, index))
    figure = Figure(figsize=(11.4, 4.1), layout="constrained")
    panels = figure.subplots(1, 4)
    for axes, image, (title, text) in zip(panels, images, texts.items(), strict=False):
        axes.imshow(np.asarray(image))
        axes.set_title(title)
        axes.set_xlabel(textwrap.fill(text, 31), fontsize=8.5, loc="left")
    _heat(panels[3], images[0], occlusion)
    for axes in panels:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def _heat(axes: Axes, image: Image.Image, occlusion: Occlusion) -> None:
    """The loss of a word's probability, patch by patch, over a grey picture; the worst patches are framed."""
    drops = occlusion.drops.clip(0)
    side = len(drops)
    axes.imshow(np.asarray(image.convert("L")), cmap="gray", extent=(0, side, side, 0))
    shown = axes.imshow(drops, cmap=MAP, alpha=0.62, extent=(0, side, side, 0), vmin=0, vmax=max(0.01, drops.max()))
    for y, x in np.argwhere(drops >= 0.5 * max(0.01, drops.max())):
        axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor="white", linewidth=1.6))
    axes.set_title(f"What “{occlusion.word}” hangs on")
    axes.figure.colorbar(shown, ax=axes, location="bottom", shrink=0.8, pad=0.02).set_label(
        f"probability of “{occlusion.word}” lost when hidden\n(framed: at least half of the most)", fontsize=8.5
    )


# ---- the experiments


@style()
def experiment_panels(results: Mapping[str, Any], live: Mapping[str, Mapping[str, float]] | None = None) -> Figure:
    """The shipped experiments: one column each, one row a measure; circles are seeds, bars their means.

    Args:
        results: `data/results/experiments.json`.
        live: variant -> measure -> value of a run made just now: a star.
    """
    figure = Figure(figsize=(10.5, 7.2), layout="constrained")
    panels = figure.subplots(len(MEASURES), len(EXPERIMENTS), sharey="row")
    for row, (measure, title) in enumerate(MEASURES.items()):
        for column, (name, variants) in enumerate(EXPERIMENTS.items()):
            axes = panels[row, column]
            _variants(axes, results, variants, measure, live or {})
            axes.set_title(f"{name}: {title}")
            if name == "lm":
                axes.set_xticks(range(len(variants)), [one if "lm" in one else "large lm" for one in variants])
        if "chair" in measure:
            panels[row, 0].set_ylim(0, None)
    return figure


def _variants(
    axes: Axes, results: Mapping[str, Any], names: Sequence[str], measure: str, live: Mapping[str, Mapping[str, float]]
) -> None:
    base = values(results, names[0], measure)
    for index, variant in enumerate(names):
        reached = values(results, variant, measure)
        mean = sum(reached) / len(reached)
        axes.plot([index - 0.28, index + 0.28], [mean, mean], color=BLUE, linewidth=3)
        x = index + np.linspace(-0.12, 0.12, len(reached))
        axes.plot(x, reached, "o", color="white", markeredgecolor=INK, markersize=6)
        axes.annotate(f"{mean:.3f}", (index + 0.31, mean), va="center", fontsize=8.5)
        if index and effect(base, reached).claimed:
            note(axes, "≠", (index, max(reached)), (0, 7), ha="center", color=INK)
        if measure in live.get(variant, {}):
            axes.plot(index - 0.2, live[variant][measure], "*", color=ORANGE, markersize=14, markeredgecolor=INK)
    axes.set_xticks(range(len(names)), names)
    axes.set(xlim=(-0.5, len(names) - 0.2))
    axes.margins(y=0.25)
    axes.grid(axis="y")
