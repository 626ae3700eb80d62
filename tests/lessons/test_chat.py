"""The chat of notebook 00: what a reader chooses, types and sees; without a browser."""

import datetime
import html
import io
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from lessons.lesson_00 import Familiar
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
    """Decides by its threshold alone, not by measured values."""

    def is_far(self, distance: float) -> bool:
        return self.threshold < distance


@pytest.fixture
def chat(shipped):
    """A chat for which every image is near."""
    return Chat(*shipped, Ruler(torch.zeros(192), torch.eye(192), threshold=float("inf")))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def upload(chat: Chat, content: bytes, name: str = "mine.png") -> None:
    """What the browser does when a file was chosen."""
    file = {"name": name, "type": "image/png", "size": len(content), "content": memoryview(content)}
    chat.source.value, chat.file.value = FILE, (file | {"last_modified": NOW},)


def type_and_send(chat: Chat, question: str, enter: bool = False) -> str:
    """Type a question, then click Send or press Enter. Returns the conversation as text."""
    chat.question.value = question
    if enter:
        chat.question._handle_custom_msg({"event": "submit"}, [])
    else:
        chat.send.click()
    return text_of(chat)


def text_of(chat: Chat) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", chat.log.value.replace("</p>", "\n")))


class TestAConversation:
    def test_it_begins_with_a_image_and_what_to_ask(self, chat):
        assert 'alt="drawn: ' in chat.view.value and "panda" in chat.view.value and "data:image/" in chat.view.value
        assert "Ask anything" in text_of(chat) and "Model:" not in text_of(chat)
        assert chat.question.placeholder and chat.send.description == "Send"

    @pytest.mark.parametrize("enter", [False, True], ids=["click", "enter"])
    def test_a_question_is_answered_and_the_field_is_empty_again(self, chat, enter):
        question = "Is there a dog in the picture?"
        assert f"You: {question}\nModel: No.\n" in type_and_send(chat, question, enter)
        assert chat.question.value == "" and not chat.send.disabled

    def test_nothing_is_asked_by_an_empty_line(self, chat):
        before = text_of(chat)
        assert type_and_send(chat, "   ") == before
        with pytest.raises(ValueError, match="type a question"):
            chat.ask(" ")

    def test_the_answer_grows_word_by_word_to_what_generate_says(self, chat, shipped):
        answers = []
        chat.log.observe(lambda change: answers.append(text_of(chat).split("Model: ")[-1].strip()), names="value")
        answer = chat.ask("What is in this picture?")
        grown = list(dict.fromkeys(answers))
        assert len(grown) > 10 and grown[-1] == answer
        assert all(later.startswith(earlier) for earlier, later in pairwise(grown))
        assert answer == reply(*shipped, ask("What is in this picture?", draw(TABLE["panda"])))

    def test_the_conversation_so_far_is_part_of_the_next_question(self, chat, monkeypatch):
        conversations = []

        def echo(model, processor, messages, streamer):
            conversations.append(messages)
            return f"answer {len(conversations)}"

        monkeypatch.setattr("lessons.widgets.chat.reply", echo)
        for number in range(MOST_QUESTIONS + 1):
            chat.ask(f"<image>\nquestion {number}?")
        roles = [[message["role"] for message in messages] for messages in conversations]
        assert roles[1] == ["user", "assistant", "user"] and len(roles[MOST_QUESTIONS - 1]) == 2 * MOST_QUESTIONS - 1
        assert roles[MOST_QUESTIONS] == ["user"], "a conversation longer than any of stage 2 begins anew"
        first, *later = [message["content"] for message in conversations[1] if message["role"] == "user"]
        assert [part["type"] for part in first] == ["image", "text"] and first[1]["text"] == "question 0?"
        assert later == [[{"type": "text", "text": "<image>\nquestion 1?"}]], "shorthand only where a picture begins"

    def test_another_image_begins_another_conversation(self, chat):
        type_and_send(chat, "Is there a dog in the picture?")
        chat.source.value = "traffic"
        assert chat.turns == [] and "You:" not in text_of(chat)
        assert "car" in chat.view.value
        assert "Model: Two." in type_and_send(chat, "How many things are there in all?")

    def test_any_scene_can_be_chosen_by_its_number(self, chat):
        assert chat.scene.layout.display == "none"
        chat.source.value = ANY
        assert chat.scene.layout.display is None
        chat.scene.value = 17
        np.testing.assert_array_equal(np.asarray(chat.image), np.asarray(draw(sample_scene("dev", 17))))

    def test_typed_markup_is_text(self, chat, monkeypatch):
        monkeypatch.setattr("lessons.widgets.chat.reply", lambda *args, streamer: "<i>no</i>")
        chat.ask("<b>bold?</b>")
        assert "&lt;b&gt;bold?&lt;/b&gt;" in chat.log.value and "&lt;i&gt;no&lt;/i&gt;" in chat.log.value


class TestWhereAWordLooked:
    def test_each_word_offered_shows_the_image_as_it_saw_it(self, chat):
        assert chat.word.options == ((WHOLE, None),)
        chat.ask("What is in this picture?")
        words = dict(chat.word.options)
        assert WHOLE in words and "panda" in words
        whole = chat.view.value
        chat.word.value = words["panda"]
        assert chat.view.value != whole and "“panda” looked most at the" in chat.view.value
        chat.word.value = None
        assert chat.view.value == whole

    def test_an_answer_without_words_offers_none(self, chat, monkeypatch):
        monkeypatch.setattr("lessons.widgets.chat.reply", lambda *args, streamer: "")
        chat.ask("What?")
        assert chat.word.options == ((WHOLE, None),)


class TestAFileOfOnesOwn:
    def test_without_a_file_it_asks_for_one(self, chat):
        chat.source.value = FILE
        assert chat.view.value == "" and chat.file.layout.display is None
        assert "Choose a picture first." in type_and_send(chat, "What is it?")

    def test_a_wide_image_is_shown_and_asked_about(self, chat):
        upload(chat, png(draw(TABLE["sunset"]).resize((400, 200))))
        assert 'alt="your file mine.png"' in chat.view.value
        assert "Model: " in type_and_send(chat, "Is there a dog in the picture?")

    def test_a_damaged_file_is_refused_in_words(self, chat):
        upload(chat, png(draw(TABLE["sunset"]))[:500])
        assert "cut off" in text_of(chat) and chat.image is None
        assert "Choose a picture first." in type_and_send(chat, "What is it?")

    def test_a_far_image_is_called_far_before_any_answer(self, shipped):
        chat = Chat(*shipped, Ruler(torch.zeros(192), torch.eye(192), threshold=0.0))
        upload(chat, png(Image.effect_noise((64, 64), 80)))
        assert "This model knows only drawn scenes" in text_of(chat)
        log = type_and_send(chat, "What is in this picture?")
        assert log.index("This model knows only drawn scenes") < log.index("Model: ")
