"""A chat: ask about a drawn scene or a file of one's own, and see where each word looked. Letters as in `config.py`."""

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets
import torch
from IPython.display import display
from PIL import Image
from transformers import TextStreamer

from lessons.lenses.attention import attention_to_patches, faded, strongest, where
from lessons.plots import data_uri
from minivlm.config import PROMPTS
from minivlm.data.images import ImageError, open_image
from minivlm.data.samples import without_shorthand
from minivlm.generate import reply
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.drawing.table import TABLE
from minivlm.scenes.facts import random_stream, sample_scene
from minivlm.scenes.language import caption
from minivlm.scenes.samples import TURNS

ANY, FILE = "any scene, by its number", "a file of your own"
SIDE = 280  # of the picture, in pixels
SCENES = 10_000  # of the "dev" split that can be chosen
MOST_QUESTIONS = max(TURNS)  # in one conversation: stage 2 trained no longer ones
WHOLE = "(the whole picture)"
TRY = ("What is in this picture?", "Describe this picture in detail.", PROMPTS["zh"], "Is there a dog in the picture?")


@dataclass(frozen=True)
class Turn:
    """A question that was asked, and the answer to it."""

    question: str
    answer: str


class Stream(TextStreamer):
    """Hands on an answer as it grows, from the ids that `generate` writes."""

    def __init__(self, processor: MiniVLMProcessor, on_text: Callable[[str], None]):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self._on_text = "", on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with every new piece of text, whole words only."""
        self.text += text
        self._on_text(self.text)


class Chat:
    """A picture, a conversation about it, and what each word of the last answer looked at.

    Args:
        model, processor: who answers.
        familiar: measures how far an image is from what the model was trained on; see `lesson_00.Familiar`.
    """

    def __init__(self, model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, familiar: Any):
        self.model, self.processor, self.familiar = model, processor, familiar
        self.image: Image.Image | None = None
        self.turns: list[Turn] = []
        self._alt, self._warning, self._looks = "", "", None
        wide = {"style": {"description_width": "6em"}, "layout": {"width": "24em"}}
        self.source = widgets.Dropdown(options=[*TABLE, ANY, FILE], value="panda", description="picture", **wide)
        self.scene = widgets.BoundedIntText(min=0, max=SCENES - 1, description="scene", **wide)
        self.file = widgets.FileUpload(accept="image/*", description="Choose a file")
        self.view = widgets.HTML()
        self.word = widgets.Dropdown(options=[WHOLE], description="as seen by", **wide)
        self.log = widgets.HTML()
        hint = "Ask about the picture"
        self.question = widgets.Text(placeholder=hint, tooltip=hint, layout={"width": "26em"})
        self.send = widgets.Button(description="Send", button_style="primary")
        left = widgets.VBox([self.source, self.scene, self.file, self.view, self.word])
        right = widgets.VBox([self.log, widgets.HBox([self.question, self.send])], layout={"max_width": "36em"})
        self.widget = widgets.HBox([left, right], layout={"flex_flow": "row wrap"})
        for control in (self.source, self.scene, self.file):
            control.observe(lambda _: self._choose(), names="value")
        self.word.observe(lambda _: self._look(), names="value")
        self.send.on_click(lambda _: self._ask())
        self.question.on_msg(lambda _, content, __: self._ask() if content.get("event") == "submit" else None)
        self._choose()

    def show(self) -> None:
        """Show the chat."""
        display(self.widget)

    def ask(self, question: str) -> str:
        """Ask about the picture, as "Send" does; what is already said is part of the conversation.

        Returns:
            The answer.

        Raises:
            ValueError: there is no picture yet, or the question is empty.
        """
        question = without_shorthand(question.strip()) if not self.turns else question.strip()
        if self.image is None or not question:
            raise ValueError("choose a picture, then type a question")
        if len(self.turns) == MOST_QUESTIONS:
            self.turns.clear()
        messages = self._messages(question)
        stream = Stream(self.processor, lambda so_far: self._tell(Turn(question, so_far)))
        answer = reply(self.model, self.processor, messages, streamer=stream)
        self.turns.append(Turn(question, answer))
        self._tell()
        self._looks = attention_to_patches(self.model, self.processor, messages, answer) if answer.strip() else None
        self._offer()
        return answer

    # ---- what the controls do

    def _ask(self) -> None:
        question, self.question.value = self.question.value, ""
        if self.image is None:
            self.log.value = _line("Choose a picture first.")
        elif question.strip():
            self.send.disabled = True
            try:
                self.ask(question)
            finally:
                self.send.disabled = False

    def _choose(self) -> None:
        """Take the picture that is chosen, and begin a new conversation with how far it is."""
        source = self.source.value
        self.scene.layout.display = None if source == ANY else "none"
        self.file.layout.display = None if source == FILE else "none"
        self.turns, self._looks, self._warning, self.image = [], None, "", None
        try:
            self.image, self._alt = self._chosen_image(source)
        except ImageError as problem:
            self._warning = str(problem)
        if self.image is not None:
            with torch.no_grad():
                features = self.model.vision(self.processor.pixels([self.image]))  # (1, N, Dv)
            self._warning = self.familiar.warning(self.familiar.distance(features))
        self._offer()
        self._tell()

    def _chosen_image(self, source: str) -> tuple[Image.Image | None, str]:
        """The chosen picture and its alternative text; None while no file is chosen."""
        if source == FILE:
            if not self.file.value:
                return None, ""
            chosen = self.file.value[0]
            return open_image(bytes(chosen["content"])), f"your file {chosen['name']}"
        scene = TABLE[source] if source in TABLE else sample_scene("dev", self.scene.value)
        return draw(scene), f"drawn: {caption(scene, 'en', random_stream('chat', source))}"

    def _messages(self, question: str) -> list[dict]:
        """The conversation so far and a new question; the picture stands before the first."""
        messages = []
        for turn in (*self.turns, Turn(question, "")):
            image = [] if messages else [{"type": "image", "image": self.image}]
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": turn.question}]})
            if turn.answer:
                messages.append({"role": "assistant", "content": turn.answer})
        return messages

    # ---- what is to be seen

    def _offer(self) -> None:
        """Offer the words of the last answer that looked at the picture most."""
        chosen = [] if self._looks is None else strongest(self._looks)
        self.word.options = [(WHOLE, None), *((self._looks.words[index], index) for index in chosen)]
        self.word.value = None
        self._look()

    def _look(self) -> None:
        """The picture; where a word is chosen, faded where it did not look."""
        if self.image is None:
            self.view.value = ""
            return
        index = self.word.value
        if index is None:
            self.view.value = _image(self.image, self._alt)
            return
        weights = self._looks.patches[index]  # (N,)
        at, word = where(int(weights.argmax()), len(weights)), self._looks.words[index]
        remark = f"“{word}” looked most at the {at} ({weights.sum():.0%} of its attention was on the picture)"
        self.view.value = _image(faded(self.image, weights), f"{self._alt}; {remark}") + _line(remark)

    def _tell(self, growing: Turn | None = None) -> None:
        """The conversation, with an answer that is still being written at its end."""
        turns = [*self.turns, *([growing] if growing else [])]
        lines = [_line(self._warning, mark="⚠ ")] if self._warning else []
        if not turns and self.image is not None:
            lines.append(_line("Ask anything, such as: " + " · ".join(TRY)))
        for turn in turns:
            lines += [_line(turn.question, "You: "), _line(turn.answer, "Model: ")]
        if len(self.turns) == MOST_QUESTIONS:
            lines.append(_line("The next question begins a new conversation: the model was trained on no longer ones."))
        self.log.value = f'<div role="log" aria-live="polite" style="line-height:1.5">{"".join(lines)}</div>'


def _line(text: str, mark: str = "") -> str:
    """A paragraph; text is shown as it is, never as HTML."""
    return f'<p style="margin:0.3em 0"><b>{html.escape(mark)}</b>{html.escape(text)}</p>' if text or mark else ""


def _image(image: Image.Image, alt: str) -> str:
    """An `<img>` with its bytes inside."""
    shown = image.convert("RGB")
    shown.thumbnail((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    return f'<img src="{data_uri(shown)}" alt="{html.escape(alt)}" style="max-width:{SIDE}px;max-height:{SIDE}px">'
