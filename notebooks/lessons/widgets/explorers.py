"""Explorers of drawn scenes: an image's patches as words, and W at each step that was kept. Letters: `config.py`."""

import html
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
from IPython.display import display

from lessons.lenses.words import (
    NO_WORD,
    NearWord,
    PatchWord,
    listed,
    nearest_few,
    read_aloud,
    read_patches,
    things_patches,
)
from lessons.plots import BLUE, INK, ORANGE, border, data_uri
from minivlm.config import PROMPTS
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.facts import Scene

PATCH_SIDE = 50  # of a patch in a drawing, in its own units; an image is shown at about one pixel for each
LETTER = 0.6  # how wide a letter is, as a share of its height; a Chinese character is as wide as high


class Album:
    """W as it was at some steps: pass it to `Trainer` as `on_step`.

    W is all that changes in stage 1, so it is all there is to keep of a moment.

    Args:
        model: its W, as it is now, is kept as that of step 0.
        steps: those to keep.
    """

    def __init__(self, model: MiniVLMForConditionalGeneration, steps: Collection[int]):
        self._wanted = set(steps)
        self._kept = {0: model.projector.weight.detach().clone()}

    def __call__(self, step: int, loss: float, model: MiniVLMForConditionalGeneration) -> None:
        """Keep W after a step (counted from 1), if it is one of those to keep."""
        if step in self._wanted:
            self._kept[step] = model.projector.weight.detach().clone()

    @property
    def steps(self) -> list[int]:
        """The steps that are kept, in order."""
        return sorted(self._kept)

    def __getitem__(self, step: int) -> torch.Tensor:
        """W after a step, (Dl, Dv).

        Raises:
            ValueError: that step was not kept.
        """
        if step not in self._kept:
            raise ValueError(f"step {step} was not kept; choose one of {', '.join(map(str, self.steps))}")
        return self._kept[step]

    @contextmanager
    def at(self, step: int, model: MiniVLMForConditionalGeneration) -> Iterator[None]:
        """The model with the W of a step, inside the block; after it, its own W again, to the bit.

        Raises:
            ValueError: that step was not kept.
        """
        weight, then = model.projector.weight, self[step]
        now = weight.detach().clone()
        try:
            weight.data.copy_(then)
            yield
        finally:
            weight.data.copy_(now)


class Moment(NamedTuple):
    """What one image was to the model at some step: the N nearest words of its patches, and the answer."""

    words: Sequence[PatchWord]
    answer: str


class SceneExplorer:
    """Controls above a page about one of some scenes; the page is written anew whenever a control moves.

    Args:
        model: its W is the one that is looked at.
        processor: its tokenizer names the words.
        scenes: what can be chosen.
        patch_features: (I, N, Dv) the encoder's features of their images.
    """

    def __init__(
        self,
        model: MiniVLMForConditionalGeneration,
        processor: MiniVLMProcessor,
        scenes: Sequence[Scene],
        patch_features: torch.Tensor,
    ):
        self.model, self.processor, self.scenes, self.features = model, processor, scenes, patch_features
        self.scene = widgets.BoundedIntText(min=0, max=len(scenes) - 1, description="scene", layout={"width": "12em"})
        self.page = widgets.HTML()
        controls = self._controls()
        self.widget = widgets.VBox([widgets.HBox(controls), self.page])
        for control in controls:
            control.observe(lambda _: self._draw(), names="value")
        self._draw()

    def show(self) -> None:
        """Show the controls and the page below them."""
        display(self.widget)

    def _read(self, scene: int) -> tuple[torch.Tensor, list[PatchWord]]:
        """A scene's projected patches (N, Dl), and the word nearest to each."""
        with torch.no_grad():
            embeds = self.model.projector(self.features[scene])
        return embeds, read_patches(self.model, self.processor.tokenizer, self.scenes[scene], embeds)

    def _write(self, words: Sequence[PatchWord], beside: str, chosen: int | None = None) -> None:
        """Fill the page: the scene with its words, and what stands beside it."""
        self.page.value = (
            '<div style="display:flex;flex-wrap:wrap;gap:1.5em;align-items:flex-start">'
            f"<div>{drawing(self.scenes[self.scene.value], words, chosen)}</div>"
            f'<div style="line-height:1.5;max-width:26em">{beside}</div></div>'
        )


class PatchExplorer(SceneExplorer):
    """Choose a scene and one of its patches, and see the words that it is nearest to."""

    def _controls(self) -> list[widgets.Widget]:
        self.side = int(self.features.shape[1] ** 0.5)
        self.row = widgets.IntSlider(min=1, max=self.side, description="row")
        self.column = widgets.IntSlider(min=1, max=self.side, description="column")
        return [self.scene, self.row, self.column]

    def show(self) -> None:
        """Say in a line what is chosen, for where no widget lives, and show the controls and the page below them."""
        print(self.in_words())
        super().show()

    def in_words(self) -> str:
        """The chosen patch and the words nearest to it, in a line."""
        _, _, nearest = self._chosen()
        words = ", ".join(f"{_both(near)} {near.cosine:.2f}" for near in nearest)
        return f"Scene {self.scene.value}, patch in {self._place()}; nearest words and their cosines: {words}"

    def _chosen(self) -> tuple[int, list[PatchWord], list[NearWord]]:
        """The patch that is chosen, the nearest word of each patch of its scene, and its own nearest few."""
        patch = (self.row.value - 1) * self.side + self.column.value - 1
        embeds, words = self._read(self.scene.value)
        return patch, words, nearest_few(self.model, self.processor.tokenizer, embeds[patch, None])[0]

    def _place(self) -> str:
        return f"row {self.row.value}, column {self.column.value}"

    def _draw(self) -> None:
        patch, words, nearest = self._chosen()
        self._write(words, _word_table(nearest, words[patch], self._place()), patch)


class StepExplorer(SceneExplorer):
    """Move through the training of W: at each step that was kept, what the patches were and what the model answered.

    Args:
        album: W at these steps.
        model, processor, scenes, patch_features: as in `SceneExplorer`.
        prompt: what the model is asked about the image.
    """

    def __init__(
        self,
        album: Album,
        model: MiniVLMForConditionalGeneration,
        processor: MiniVLMProcessor,
        scenes: Sequence[Scene],
        patch_features: torch.Tensor,
        prompt: str = PROMPTS["en"],
    ):
        self.album, self.prompt = album, prompt
        super().__init__(model, processor, scenes, patch_features)

    def _controls(self) -> list[widgets.Widget]:
        steps, wide = self.album.steps, {"style": {"description_width": "initial"}, "layout": {"width": "28em"}}
        self.step = widgets.SelectionSlider(options=steps, value=steps[-1], description="training step", **wide)
        return [self.step, self.scene]

    def moment(self, step: int, scene: int) -> Moment:
        """The nearest words of a scene's patches at a step, and the model's answer about it."""
        with self.album.at(step, self.model):
            embeds, words = self._read(scene)
            return Moment(words, read_aloud(self.model, self.processor, embeds[None], self.prompt)[0])

    def _draw(self) -> None:
        words, answer = self.moment(self.step.value, self.scene.value)
        self._write(
            words,
            f"<p>After <b>step {self.step.value}</b> the model says:</p>"
            f'<p style="font-size:1.15em"><b>{html.escape(answer)}</b></p>'
            f"<p>Drawn: {html.escape(listed(self.scenes[self.scene.value]))}.</p>"
            f"<p>The nearest word is true on {sum(word.true for word in words)} of {len(words)} patches (framed).</p>",
        )


def drawing(scene: Scene, words: Sequence[PatchWord], chosen: int | None = None) -> str:
    """A scene with the nearest word on each patch, as SVG: what is true is bold and framed, the chosen patch dashed."""
    side = int(len(words) ** 0.5)
    size = side * PATCH_SIDE
    true = sum(word.true for word in words)
    label = f"{listed(scene)}. A word stands on each of {len(words)} patches; {true} are true of it."
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" width="{size}" '
        f'style="max-width:100%;background:white" role="img" aria-label="{html.escape(label)}">',
        f'<image href="{data_uri(draw(scene, size))}" width="{size}" height="{size}" opacity="0.4"/>',
        *(_outline_path(covered, side) for _, covered in things_patches(scene, len(words))),
        *(_cell(patch, side, word) for patch, word in enumerate(words)),
    ]
    if chosen is not None:
        y, x = (k * PATCH_SIDE + 1 for k in divmod(chosen, side))
        look = f'fill="none" stroke="{INK}" stroke-width="3" stroke-dasharray="6 3"'
        parts.append(f'<rect x="{x}" y="{y}" width="{PATCH_SIDE - 2}" height="{PATCH_SIDE - 2}" {look}/>')
    return "".join([*parts, "</svg>"])


def _word_table(nearest: Sequence[NearWord], word: PatchWord, position: str) -> str:
    """The nearest words of a patch with their cosines, also as bars."""
    own = html.escape(_both(word))
    verdict = "which is true of it" if word.true else "which is not true of it"
    rows = "".join(
        f'<tr><td style="padding:1px 8px">{html.escape(_both(near))}</td>'
        f'<td style="padding:1px 8px">{near.cosine:.2f}</td>'
        f'<td><div style="background:{BLUE};height:0.8em;width:{max(0.0, near.cosine) * 10:.2f}em"></div></td></tr>'
        for near in nearest
    )
    return (
        f"<p>Patch in <b>{position}</b>: nearest to <b>{own}</b>, {verdict}.</p>"
        f'<table><tr><th scope="col">word</th><th scope="col">cosine</th><th></th></tr>{rows}</table>'
    )


def _both(word: PatchWord | NearWord) -> str:
    """A word, a Chinese one with its English."""
    return word.word if word.english in (word.word, NO_WORD) else f"{word.word} ({word.english})"


def _cell(patch: int, side: int, word: PatchWord) -> str:
    """A patch's word; the more letters, the smaller."""
    y, x = divmod(patch, side)
    middle, base = (x + 0.5) * PATCH_SIDE, (y + 0.5) * PATCH_SIDE
    letters = max(sum(1.0 if ord(letter) > 0x2E80 else LETTER for letter in word.word), 2.4)
    height = min(15.0, (PATCH_SIDE - 6) / letters)
    frame = ""
    if word.true:
        width = min(PATCH_SIDE - 2.0, letters * height + 6)
        frame = (
            f'<rect x="{middle - width / 2:.1f}" y="{base - height * 0.8:.1f}" width="{width:.1f}" '
            f'height="{height * 1.6:.1f}" rx="4" fill="#FFF6EC" stroke="{ORANGE}" stroke-width="1.6"/>'
        )
    return (
        f'{frame}<text x="{middle}" y="{base}" font-size="{height:.1f}" text-anchor="middle" '
        f'dominant-baseline="central" fill="{INK}" font-family="sans-serif" '
        f'font-weight="{"bold" if word.true else "normal"}">{html.escape(word.word)}</text>'
    )


def _outline_path(covered: np.ndarray, side: int) -> str:
    """A line around the patches of a thing."""
    lines = "".join("M{} {}L{} {}".format(*(end * PATCH_SIDE for end in piece)) for piece in border(covered, side))
    return f'<path d="{lines}" stroke="{BLUE}" stroke-width="2.5" stroke-linecap="round" fill="none"/>'
