"""The exam: what is shown, and a model that tells the truth about what it is shown."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from minivlm.config import PROMPTS
from minivlm.evaluation import CONTROLLED, CONTROLS, evaluate, exam_questions, pope_questions, prepare_exam
from minivlm.evaluation import exam as exam_module
from minivlm.evaluation.exam import pictures_shown
from minivlm.scenes import vocabulary as w
from minivlm.scenes.facts import random_stream, sample_scene
from minivlm.scenes.language import caption


@pytest.fixture
def exam(model, processor):
    return prepare_exam(model, processor, pictures=16, holdout=4, questioned=4, workers=1)


@pytest.mark.parametrize("count", [2, 3, 5, 8, 16, 25, 500])
def test_another_image_is_never_the_same(count):
    others = pictures_shown(count, blank=count)["another"]
    assert all(0 <= other < count and other != i for i, other in enumerate(others))


def test_another_image_holds_as_many_things_as_any_other():
    """With as many things in all, "how many in all?" would be no control."""
    things, others = [len(sample_scene("exam", i).things) for i in range(500)], pictures_shown(500, 500)["another"]
    assert 0.2 <= sum(things[i] == things[others[i]] for i in range(CONTROLLED)) / CONTROLLED <= 0.3


def test_an_exam_of_one_image_is_refused(model, processor):
    with pytest.raises(ValueError, match="take 2 or more"):
        prepare_exam(model, processor, pictures=1)


def test_the_exam_is_the_exam_split_and_ends_with_grey(exam, model, processor):
    assert exam.scenes == tuple(sample_scene("exam", i) for i in range(16))
    assert exam.holdout == tuple(sample_scene("holdout", i) for i in range(4))
    assert len(exam.features) == 16 + 4 + 1
    grey = exam.features[-1].float()
    assert exam.shown["blank"] == (20,) * 16
    side = model.config.vision_config.image_size
    pixels = processor.pixels([Image.fromarray(np.full((side, side, 3), 128, dtype=np.uint8))])
    assert torch.allclose(grey, model.vision(pixels)[0], atol=0.02)


def test_a_model_that_tells_the_truth_gets_full_marks_and_its_controls_do_not(exam, model, processor, monkeypatch):
    """The model's answers are replaced by the truth about the image that it is shown."""

    def oracle(model, processor, conversations, **_):
        texts = []
        for [message] in conversations:
            *image, text = message["content"]
            prompt = text["text"]
            matches = [torch.equal(image[0]["image"], known) for known in exam.features] if image else [True]
            index = matches.index(True)
            if len(matches) == 1 or index == len(exam.features) - 1:
                texts.append("No.")
                continue
            scene = (exam.scenes + exam.holdout)[index]
            lang = "zh" if prompt == PROMPTS["zh"] or any("\u4e00" <= c <= "\u9fff" for c in prompt) else "en"
            known = {q.question.text: q.question.answer for q in pope_questions(exam.scenes, lang)}
            if prompt in PROMPTS.values():
                texts.append(caption(scene, lang, random_stream(index)))
            else:
                own = exam_questions(exam.scenes[:4], lang) + pope_questions(exam.scenes, lang)
                own = {(q.picture, q.question.text): q.question.answer for q in own}
                texts.append(own.get((index, prompt), known.get(prompt, "blub")))
        return texts

    monkeypatch.setattr(exam_module, "reply", oracle)
    monkeypatch.setattr(exam_module, "CONTROLLED", 4)
    results = evaluate(model, processor, exam)
    assert json.loads(json.dumps(results)) == results and list(results) == list(w.LANGUAGES)
    for lang in results.values():
        assert set(lang) == {"descriptions", "holdout", "questions", "guesses", "pope", "chance"}
        assert tuple(lang["chance"]) == CONTROLS
        assert set(lang["questions"]) == {"model", "blank", "another", "alone", "guess"}
        assert lang["pope"]["model"]["random"]["accuracy"]["denominator"] == 32
        assert lang["questions"]["model"]["all"]["denominator"] == lang["questions"]["alone"]["all"]["denominator"]
        assert lang["descriptions"]["model"]["setting"]["denominator"] == 16
        assert lang["holdout"]["setting"]["denominator"] == 4
        for control in CONTROLS:
            assert list(lang["descriptions"][control]["things"]["pair"]["near"]) == ["any"]
        pair = lang["descriptions"]["model"]["things"]["pair"]["all"]["any"]
        assert pair["precision"]["value"] == pair["recall"]["value"] == 1
        assert lang["holdout"]["things"]["pair"]["all"]["any"]["recall"]["value"] == 1
        assert lang["questions"]["model"]["all"]["value"] == 1
        assert lang["pope"]["model"]["adversarial"]["accuracy"]["value"] == 1
        assert lang["descriptions"]["another"]["things"]["pair"]["all"]["any"]["recall"]["value"] < 0.3
        assert lang["descriptions"]["blank"]["things"]["pair"]["all"]["any"]["recall"]["value"] == 0
        assert lang["questions"]["another"]["all"]["value"] < 0.5
        assert lang["pope"]["alone"]["random"]["yes_ratio"]["value"] == 0
        assert lang["questions"]["another"]["all"]["denominator"] == lang["questions"]["model"]["all"]["denominator"]
