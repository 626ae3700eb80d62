"""Answers: those of the library's own loop, images encoded once, rows that end leave the batch."""

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from minivlm.config import PROMPTS
from minivlm.generate import ask, reply


@pytest.fixture
def features(config):
    return torch.randn(5, config.num_image_tokens, config.vision_width)


def by_the_library(model, processor, messages, features=None, tokens: int = 9) -> str:
    """One conversation alone, by the library's own loop."""
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template(messages, True, **options)
    inputs = batch | ({} if features is None else {"patch_features": features})
    out = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=2, pad_token_id=0)
    return processor.tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_answers_are_those_of_generate(model, processor, features, batch_size):
    prompts = ["a red car", PROMPTS["zh"], "left?", "Which one is further left?"]
    cases = [(prompt, image) for prompt in prompts for image in (3, None, 0, 4)]
    conversations = [ask(prompt, None if image is None else features[image]) for prompt, image in cases]
    texts = reply(model, processor, conversations, max_new_tokens=9, batch_size=batch_size)
    for (prompt, image), text in zip(cases, texts, strict=True):
        parts = [{"type": "text", "text": prompt}]
        if image is not None:
            parts = [{"type": "image"}, *parts]
        known = None if image is None else features[[image]]
        assert text == by_the_library(model, processor, [{"role": "user", "content": parts}], known)
    assert len(set(texts)) > 4


def test_a_conversation_of_several_turns_and_images_is_answered_as_by_generate(model, processor, image):
    other = image.rotate(90)
    turns = [*ask("a", image), {"role": "assistant", "content": "red"}, *ask("b", other)]
    short = [*ask("a", image), {"role": "assistant", "content": "red"}, *ask("left?")]
    texts = reply(model, processor, [turns, short, ask("a", image)], max_new_tokens=5)
    assert texts == [by_the_library(model, processor, one, tokens=5) for one in (turns, short, ask("a", image))]
    assert reply(model, processor, turns, max_new_tokens=5) == texts[0]


def test_a_streamer_sees_every_token_of_one_conversation(model, processor, image):
    class Listener(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    listener = Listener()
    text = reply(model, processor, ask("a", image), max_new_tokens=5, streamer=listener)
    prompt, *new = listener.tokens
    assert prompt.count(processor.image_token_id) == processor.num_image_tokens and listener.ended
    assert processor.tokenizer.decode([token for one in new for token in one], skip_special_tokens=True) == text
    with pytest.raises(ValueError, match="not of 2"):
        reply(model, processor, [ask("a"), ask("b")], streamer=listener)


def test_rows_that_end_leave_the_batch_and_the_others_go_on(model, processor, features):
    """The end token is made likely, so that answers end at different steps."""
    with torch.no_grad():
        model.get_input_embeddings().weight[2] *= 2.2
    conversations = [ask(prompt, one) for one in features for prompt in ("a", "red car", "where is the dog?", "海滩")]
    texts = reply(model, processor, conversations, max_new_tokens=12)
    assert texts == [reply(model, processor, one, max_new_tokens=12) for one in conversations]
    assert len({len(processor.tokenizer.encode(text)) for text in texts}) > 2


def test_an_image_of_many_questions_is_encoded_once_and_a_question_asked_twice_answered_once(
    model, processor, image, monkeypatch
):
    rows, encoded = [], []
    forward, look = type(model).forward, type(model.vision).forward

    def watched(self, input_ids=None, *args, **kwargs):
        rows.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    monkeypatch.setattr(type(model.vision), "forward", lambda self, x: encoded.append(len(x)) or look(self, x))
    texts = reply(model, processor, [ask("a", image), ask("b", image), ask("a", image)], max_new_tokens=2)
    assert rows[:2] == [1, 2] and encoded == [1]
    assert texts[0] == texts[2]


def test_images_may_be_files_bytes_or_features(model, processor, image, tmp_path):
    file = tmp_path / "a.png"
    image.save(file)
    forms = (image, file, str(file), file.read_bytes(), model.vision(processor.pixels([image]))[0])
    assert len(set(reply(model, processor, [ask("a", form) for form in forms], max_new_tokens=5))) == 1
