"""Answers: those of the library's own loop, pictures read once, rows that end leave the batch."""

import pytest
import torch

from minivlm import generate as answers
from minivlm.config import PROMPTS
from minivlm.generate import Asked, answer, describe, prompt_ids


@pytest.fixture
def features(config):
    return torch.randn(5, config.num_image_tokens, config.vision_width)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_answers_are_those_of_generate(model, processor, features, batch_size):
    prompts = ["a red car", PROMPTS["zh"], "left?", "Which one is further left?"]
    asked = [Asked(prompt, picture) for prompt in prompts for picture in (3, None, 0, 4)]
    texts = answer(model, processor, asked, features, max_new_tokens=9, batch_size=batch_size)
    for (prompt, picture), text in zip(asked, texts, strict=True):
        parts = [{"type": "text", "text": prompt}]
        shown = {}
        if picture is not None:
            parts, shown = [{"type": "image"}, *parts], {"patch_features": features[[picture]]}
        batch = processor.apply_chat_template(
            [{"role": "user", "content": parts}], True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        out = model.generate(
            **batch, **shown, do_sample=False, max_new_tokens=9, eos_token_id=2, pad_token_id=0
        )  # one row alone, by the library's own loop
        expected = processor.tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == expected
    assert len(set(texts)) > 4


def test_memory_is_handed_back_when_all_is_answered_and_not_after_every_batch(model, processor, features, monkeypatch):
    done = []
    write = answers._answer_batch
    monkeypatch.setattr(answers, "_answer_batch", lambda *given: done.append("batch") or write(*given))
    monkeypatch.setattr(answers, "give_back_memory", lambda: done.append("given back"))
    answer(model, processor, [Asked("left?", picture) for picture in range(5)], features, 3, batch_size=2)
    assert done == ["batch"] * 3 + ["given back"]


def test_rows_that_end_leave_the_batch_and_the_others_go_on(model, processor, features):
    """The end token is made likely, so that answers end at different steps."""
    with torch.no_grad():
        model.get_input_embeddings().weight[2] *= 2.2
    asked = [Asked(prompt, i) for i in range(5) for prompt in ("a", "red car", "where is the dog?", "海滩")]
    texts = answer(model, processor, asked, features, max_new_tokens=12)
    alone = [answer(model, processor, [one], features, max_new_tokens=12)[0] for one in asked]
    assert texts == alone
    assert len({len(processor.tokenizer.encode(text)) for text in texts}) > 2


def test_what_is_asked_twice_is_answered_once(model, processor, features, monkeypatch):
    seen = []
    forward = type(model).forward

    def watched(self, input_ids=None, *args, **kwargs):
        seen.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    texts = answer(model, processor, [Asked("a", 1), Asked("b", 1), Asked("a", 1)], features, max_new_tokens=2)
    assert seen[:2] == [1, 2]  # one picture read, two prompts answered
    assert texts[0] == texts[2]


def test_a_typed_placeholder_is_text(processor):
    head, tail = prompt_ids(processor, Asked("<image> a", 0))
    assert head.count(processor.image_token_id) == processor.num_image_tokens
    assert processor.image_token_id not in tail


def test_pictures_are_described_from_pixels(model, processor, picture):
    other = picture.rotate(90)
    texts = describe(model, processor, [picture, other], "a", max_new_tokens=5)
    features = model.vision(processor.pixels([picture, other]))
    assert texts == answer(model, processor, [Asked("a", 0), Asked("a", 1)], features, max_new_tokens=5)
