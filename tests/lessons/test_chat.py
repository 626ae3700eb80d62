"""The chat of notebook 00: what a reader picks, types and sees; no browser is needed for that."""

import datetime
import html
import io
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from lessons.lesson_00 import Familiar
from lessons.widgets import chat
from lessons.widgets.chat import ANY, FILE, MOST_QUESTIONS, WHOLE, Chat
from PIL import Image

from minivlm.checkpoint import load_checkpoint
from minivlm.generate import ask, reply
from minivlm.runtime.paths import data_folder
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.drawing.table import TABLE
from minivlm.scenes.facts import sample_scene

NOW = datetime.datetime(2026, 11, 25, tzinfo=datetime.UTC)


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(data_folder() / "sft")[:2]


class Ruler(Familiar):
    """Calls every picture near whose mean is that of no noise: by a rule of its own, not by what was measured."""

    def is_far(self, distance: float) -> bool:
        return self.threshold < distance


@pytest.fixture
def talk(shipped):
    """A chat for which every picture is near."""
    return Chat(*shipped, Ruler(torch.zeros(192), torch.eye(192), threshold=float("inf")))


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def upload(talk: Chat, content: bytes, name: str = "mine.png") -> None:
    """What the browser does when a file was chosen."""
    file = {"name": name, "type": "image/png", "size": len(content), "content": memoryview(content)}
    talk.source.value, talk.file.value = FILE, (file | {"last_modified": NOW},)


def type_and_send(talk: Chat, question: str, enter: bool = False) -> str:
    """Type a question, then click Send or press Enter. Returns the conversation as text."""
    talk.question.value = question
    if enter:
        talk.question._handle_custom_msg({"event": "submit"}, [])
    else:
        talk.send.click()
    return said(talk)


def said(talk: Chat) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", talk.log.value.replace("</p>", "\n")))


class TestAConversation:
    def test_it_begins_with_a_picture_and_what_to_ask(self, talk):
        assert 'alt="drawn: ' in talk.view.value and "panda" in talk.view.value and "data:image/" in talk.view.value
        assert "Ask anything" in said(talk) and "Model:" not in said(talk)
        assert talk.question.placeholder and talk.send.description == "Send"

    @pytest.mark.parametrize("enter", [False, True], ids=["click", "enter"])
    def test_a_question_is_answered_and_the_field_is_empty_again(self, talk, enter):
        question = "Is there a dog in the picture?"
        assert f"You: {question}\nModel: No.\n" in type_and_send(talk, question, enter)
        assert talk.question.value == "" and not talk.send.disabled

    def test_nothing_is_asked_by_an_empty_line(self, talk):
        before = said(talk)
        assert type_and_send(talk, "   ") == before
        with pytest.raises(ValueError, match="type a question"):
            talk.ask(" ")

    def test_the_answer_grows_word_by_word_to_what_generate_says(self, talk, shipped):
        seen = []
        talk.log.observe(lambda change: seen.append(said(talk).split("Model: ")[-1].strip()), names="value")
        answer = talk.ask("What is in this picture?")
        grown = list(dict.fromkeys(seen))
        assert len(grown) > 10 and grown[-1] == answer
        assert all(later.startswith(earlier) for earlier, later in pairwise(grown))
        assert answer == reply(*shipped, ask("What is in this picture?", draw(TABLE["panda"])))

    def test_what_was_said_is_part_of_the_next_question(self, talk, monkeypatch):
        asked = []

        def echo(model, processor, messages, streamer):
            asked.append(messages)
            return f"answer {len(asked)}"

        monkeypatch.setattr(chat, "reply", echo)
        for number in range(MOST_QUESTIONS + 1):
            talk.ask(f"<image>\nquestion {number}?")
        roles = [[message["role"] for message in messages] for messages in asked]
        assert roles[1] == ["user", "assistant", "user"] and len(roles[MOST_QUESTIONS - 1]) == 2 * MOST_QUESTIONS - 1
        assert roles[MOST_QUESTIONS] == ["user"], "a conversation longer than any of stage 2 begins anew"
        first, *later = [message["content"] for message in asked[1] if message["role"] == "user"]
        assert [part["type"] for part in first] == ["image", "text"] and first[1]["text"] == "question 0?"
        assert later == [[{"type": "text", "text": "<image>\nquestion 1?"}]], "shorthand only where a picture begins"

    def test_another_picture_begins_another_conversation(self, talk):
        type_and_send(talk, "Is there a dog in the picture?")
        talk.source.value = "traffic"
        assert talk.turns == [] and "You:" not in said(talk)
        assert "car" in talk.view.value
        assert "Model: Two." in type_and_send(talk, "How many things are there in all?")

    def test_any_scene_can_be_chosen_by_its_number(self, talk):
        assert talk.scene.layout.display == "none"
        talk.source.value = ANY
        assert talk.scene.layout.display is None
        talk.scene.value = 17
        np.testing.assert_array_equal(np.asarray(talk.image), np.asarray(draw(sample_scene("dev", 17))))

    def test_typed_markup_is_text(self, talk, monkeypatch):
        monkeypatch.setattr(chat, "reply", lambda *given, streamer: "<i>no</i>")
        talk.ask("<b>bold?</b>")
        assert "&lt;b&gt;bold?&lt;/b&gt;" in talk.log.value and "&lt;i&gt;no&lt;/i&gt;" in talk.log.value


class TestWhereAWordLooked:
    def test_each_word_offered_shows_the_picture_as_it_saw_it(self, talk):
        assert talk.word.options == ((WHOLE, None),)
        talk.ask("What is in this picture?")
        words = dict(talk.word.options)
        assert WHOLE in words and "panda" in words
        whole = talk.view.value
        talk.word.value = words["panda"]
        assert talk.view.value != whole and "“panda” looked most at the" in talk.view.value
        talk.word.value = None
        assert talk.view.value == whole

    def test_an_answer_without_words_offers_none(self, talk, monkeypatch):
        monkeypatch.setattr(chat, "reply", lambda *given, streamer: "")
        talk.ask("What?")
        assert talk.word.options == ((WHOLE, None),)


class TestAFileOfOnesOwn:
    def test_without_a_file_it_asks_for_one(self, talk):
        talk.source.value = FILE
        assert talk.view.value == "" and talk.file.layout.display is None
        assert "Choose a picture first." in type_and_send(talk, "What is it?")

    def test_a_wide_picture_is_shown_and_asked_about(self, talk):
        upload(talk, png(draw(TABLE["sunset"]).resize((400, 200))))
        assert 'alt="your file mine.png"' in talk.view.value
        assert "Model: " in type_and_send(talk, "Is there a dog in the picture?")

    def test_a_damaged_file_is_refused_in_words(self, talk):
        upload(talk, png(draw(TABLE["sunset"]))[:500])
        assert "cut off" in said(talk) and talk.image is None
        assert "Choose a picture first." in type_and_send(talk, "What is it?")

    def test_a_far_picture_is_called_far_before_any_answer(self, shipped):
        talk = Chat(*shipped, Ruler(torch.zeros(192), torch.eye(192), threshold=0.0))
        upload(talk, png(Image.effect_noise((64, 64), 80)))
        assert "This model knows only drawn scenes" in said(talk)
        log = type_and_send(talk, "What is in this picture?")
        assert log.index("This model knows only drawn scenes") < log.index("Model: ")
