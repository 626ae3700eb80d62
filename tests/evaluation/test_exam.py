"""The exam: definitions worked out by hand, answers as `generate` gives them, controls that know nothing."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from minivlm import generate as answers
from minivlm.config import PROMPTS
from minivlm.evaluation import exam as ev
from minivlm.generate import Asked, answer, describe, prompt_ids
from minivlm.scenes import vocabulary as w
from minivlm.scenes.facts import KINDS, USUAL, Scene, Thing, random_stream, sample_scene
from minivlm.scenes.language import Mentioned, Question, caption, description, read_facts

RED_CAR = Thing("car", "red", "left", "near", "medium")
BLUE_DOG = Thing("dog", "blue", "middle", "near", "big")
RED_DOG = Thing("dog", "red", "right", "far", "small")
PANDA = Thing("panda", None, "left", "far", "small")
SCENE = Scene("park", (RED_CAR, BLUE_DOG, RED_DOG, PANDA), 1)


def said(*things, setting="park"):
    return Mentioned(things, setting)


# ---- answers


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


# ---- things


@pytest.mark.parametrize(
    ("things", "level", "distance", "expected"),
    [
        # all four named, rightly
        ((("car", "red"), ("dog", "blue"), ("dog", "red"), ("panda", None)), "pair", "all", (4, 0, 4, 0)),
        ((("car", "red"), ("dog", "blue"), ("dog", "red"), ("panda", None)), "pair", "near", (2, 0, 2, 0)),
        ((("car", "red"), ("dog", "blue"), ("dog", "red"), ("panda", None)), "pair", "far", (2, 0, 2, 0)),
        ((("car", "red"), ("dog", "blue"), ("dog", "red"), ("panda", None)), "kind", "all", (3, 0, 3, 0)),
        # colours swapped: "dog, red" is true, but of the far one; of the two near things none is named
        ((("car", "blue"), ("dog", "red")), "pair", "all", (1, 1, 4, 0)),
        ((("car", "blue"), ("dog", "red")), "pair", "near", (0, 1, 2, 1)),  # blue car for the panda, at best
        ((("car", "blue"), ("dog", "red")), "pair", "far", (1, 1, 2, 1)),
        ((("car", "blue"), ("dog", "red")), "kind", "near", (2, 0, 2, 0)),
        # a colour left out is no pair; said twice counts once
        ((("car", None), ("dog", "blue"), ("dog", "blue")), "pair", "near", (1, 1, 2, 1)),
        # more untrue names than missed far things
        ((("cat", "red"), ("cat", "blue"), ("cat", "pink")), "pair", "near", (0, 3, 2, 2)),
        ((), "pair", "near", (0, 0, 2, 0)),
    ],
)
def test_named_things_by_hand(things, level, distance, expected):
    assert ev.compare(SCENE, said(*things), level, distance) == expected


def test_descriptions_by_hand():
    beach = Scene("beach", (Thing("bird", "white", "middle", "far", "small"),), 2)
    texts = [
        "A red car, a red dog and a green cat in a park",  # near: car right, cat untrue, dog left out; 1 of 3 invented
        "a white bird, a kite in outer space",  # a kite, with no colour, and the wrong place
    ]
    got = ev.score_descriptions([SCENE, beach], texts, "en")

    def counts(figure):
        return figure["count"], figure["of"]

    near = got["things"]["pair"]["near"]["any"]
    assert near["pictures"] == 1  # the beach holds nothing near and says nothing about it
    assert (counts(near["precision"]), counts(near["recall"])) == ((1, 2), (1, 2))
    assert counts(near["precision_at_best"]) == (1, 1)  # the green cat may have been meant for the panda
    every = got["things"]["pair"]["all"]
    assert (counts(every["any"]["precision"]), counts(every["any"]["recall"])) == ((3, 5), (3, 5))
    assert (counts(every["4"]["precision"]), counts(every["4"]["recall"])) == ((2, 3), (2, 4))
    assert (counts(every["1"]["precision"]), counts(every["1"]["recall"])) == ((1, 2), (1, 1))
    assert every["2"]["recall"] == {"value": None, "low": None, "high": None, "count": 0, "of": 0}
    assert counts(got["setting"]) == (1, 2)
    assert counts(got["chair_i"]) == (2, 5)
    assert counts(got["chair_s"]) == (2, 2)
    assert got["length"]["value"] == pytest.approx((13 + 8) / 2)


@pytest.mark.parametrize("lang", w.LANGUAGES)
@pytest.mark.parametrize("write", [caption, description])
def test_the_truth_scores_full_marks(lang, write):
    scenes = [sample_scene("exam", i) for i in range(40)]
    got = ev.score_descriptions(scenes, [write(s, lang, random_stream(s.seed)) for s in scenes], lang)
    for level in ev.LEVELS:
        for distance in ev.DISTANCES:
            for score in got["things"][level][distance].values():
                if score["pictures"]:
                    assert score["precision"]["value"] == score["recall"]["value"] == 1
    assert [got["things"]["pair"]["all"][str(n)]["pictures"] for n in (1, 2, 3, 4)] == [10] * 4
    assert got["setting"]["value"] == 1
    assert got["chair_i"]["value"] == got["chair_s"]["value"] == 0


# ---- intervals


def test_the_interval_is_that_of_the_plain_bootstrap():
    rng = np.random.default_rng(3)
    of = rng.integers(1, 5, 60)
    count = rng.binomial(of, 0.7)
    got = ev.figure((i, c, o) for i, (c, o) in enumerate(zip(count, of, strict=True)))
    draws = [rng.integers(0, 60, 60) for _ in range(4000)]  # another stream, one picture at a time
    values = [count[d].sum() / of[d].sum() for d in draws]
    assert got["value"] == pytest.approx(count.sum() / of.sum(), abs=1e-5)
    assert [got["low"], got["high"]] == pytest.approx(np.quantile(values, (0.025, 0.975)), abs=0.02)
    assert (got["count"], got["of"]) == (count.sum(), of.sum())


def test_rows_of_one_picture_are_drawn_together():
    apart = ev.figure((i, i % 2, 1) for i in range(100))
    together = ev.figure((i // 10, i // 10 % 2, 1) for i in range(100))
    assert together["high"] - together["low"] > 2 * (apart["high"] - apart["low"])


def test_an_interval_is_the_same_each_time():
    rows = [(i, i % 3 == 0, 1) for i in range(50)]
    ev._resamples.cache_clear()
    first = ev.figure(rows)
    ev._resamples.cache_clear()
    assert first == ev.figure(rows)


# ---- questions


@pytest.mark.parametrize(
    ("type_", "answer_", "text", "right"),
    [
        ("colour", "Red.", "red", True),
        ("colour", "Red.", "Dark red.", False),
        ("colour", "红色。", "红色", True),
        ("compare", "The red car.", "Red car!", True),
        ("compare", "The red car.", "The car", False),
        ("what", "A red car and a panda.", "a panda and a red car", True),
        ("what", "A red car and a panda.", "A red car, a panda and a dog.", False),
        ("what", "一辆红色的汽车和一只熊猫。", "一只熊猫、一辆红色的汽车", True),
        ("what", "Nothing.", "nothing", True),
        ("what", "Nothing.", "blub", False),  # names nothing, but does not say so
        ("what", "Nothing.", "A red car.", False),
        ("count", "两只。", "两辆。", False),
        ("total", "Two.", "", False),
    ],
)
def test_right_answers(type_, answer_, text, right):
    assert ev.is_right(Question(type_, "?", answer_), text) is right


@pytest.mark.parametrize("lang", w.LANGUAGES)
def test_exam_questions_cover_all_types_and_their_answers_are_right(lang):
    scenes = [sample_scene("exam", i) for i in range(40)]
    items = ev.exam_questions(scenes, lang)
    assert {item.group for item in items} == set(w.QUESTION_TYPES)
    got = ev.score_questions([ev.Reply(item, item.question.answer) for item in items])
    assert list(got) == ["all", *w.QUESTION_TYPES]
    assert all(figure["value"] == 1 for figure in got.values())
    assert got["all"]["of"] == len(items) == sum(figure["of"] for figure in got.values()) - len(items)


@pytest.mark.parametrize("lang", w.LANGUAGES)
def test_guesses_by_hand_and_on_the_exam(lang):
    items = ev.exam_questions([sample_scene("exam", i) for i in range(120)], lang)
    guesses, replies = ev.best_guesses(items, lang)
    got = ev.score_questions(replies)
    assert len(replies) == len(items)
    answers = [item.question.answer for item in items if item.group == "setting"]
    assert got["setting"]["count"] == max(answers.count(one) for one in set(answers))
    assert guesses["setting"] in answers
    assert 0.35 < got["compare"]["value"] < 0.65  # the one named first is a coin's throw
    assert 0.4 < got["exists"]["value"] < 0.65
    assert got["count"]["value"] > 0.4  # in Chinese too, where every kind has its own measure word


# ---- POPE


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes.", True),
        ("yes, there is", True),
        ("No.", False),
        ("是的。", True),
        ("没有。", False),
        ("不是。", False),
        ("Nope and nothing", None),
        ("A red car.", None),
        ("", None),
        ("红色。", None),
    ],
)
def test_reading_yes_and_no(text, read):
    assert ev.yes_or_no(text) is read


def test_pope_by_hand():
    """Two pictures: yes/yes, yes/no as replies to what is there and what is not; then one that is gibberish."""
    scenes = [sample_scene("exam", i) for i in range(3)]
    items = [item for item in ev.pope_questions(scenes, "en") if item.group in (ev.PRESENT, "random")]
    texts = ["Yes.", "Yes.", "Yes.", "No.", "Blub.", "Blub."]
    got = ev.score_pope([ev.Reply(item, text) for item, text in zip(items, texts, strict=True)])["random"]
    counts = {name: (figure["count"], figure["of"]) for name, figure in got.items()}
    assert counts == {
        "accuracy": (3, 6),
        "precision": (2, 3),
        "recall": (2, 3),
        "f1": (4, 6),  # 2 * 2 true yes; 3 are there, 3 were said to be
        "yes_ratio": (3, 6),
        "unreadable": (2, 6),
    }


@pytest.mark.parametrize("lang", w.LANGUAGES)
def test_pope_asks_what_its_names_say(lang):
    scenes = [sample_scene("exam", i) for i in range(60)]
    frequent = ev.kinds_by_frequency()
    for item in ev.pope_questions(scenes, lang):
        scene = scenes[item.picture]
        ((kind, _),) = read_facts(item.question.text).things
        there = {t.kind for t in scene.things}
        assert (kind in there) == (item.group == ev.PRESENT) == ev.yes_or_no(item.question.answer)
        if item.group == "popular":
            assert kind in [k for k in frequent if k not in there][: ev.POPULAR_KINDS]
        if item.group == "adversarial" and not there >= set(USUAL[scene.setting]):
            assert kind in USUAL[scene.setting]


def test_adversarial_where_all_usual_inhabitants_are_there():
    things = tuple(Thing(kind, "red", "left", "near", "medium") for kind in USUAL["lake"])
    assert ev.absent_kinds(Scene("lake", things, 0), "adversarial") == ev.absent_kinds(
        Scene("lake", things, 0), "popular"
    )


def test_kinds_are_sorted_by_how_often_training_shows_them():
    assert sorted(ev.kinds_by_frequency()) == sorted(KINDS)
    usual = Counter(sum(USUAL.values(), ()))
    frequent = [usual[kind] for kind in ev.kinds_by_frequency()]
    assert sum(frequent[:4]) > 2 * sum(frequent[-4:])  # what settings prefer is seen more often


# ---- the whole


@pytest.fixture
def exam(model, processor):
    return ev.prepare_exam(model, processor, pictures=16, holdout=4, questioned=4, workers=1)


@pytest.mark.parametrize("pictures", [2, 3, 5, 8, 16, 25, 500])
def test_another_picture_is_never_the_same(pictures):
    scenes = tuple(sample_scene("exam", i) for i in range(pictures))
    exam = ev.Exam(scenes, (), torch.zeros(pictures + 1, 1, 1))
    others = [exam.shown(i, "another") for i in range(pictures)]
    assert all(0 <= other < pictures and other != i for i, other in enumerate(others))


def test_another_picture_holds_as_many_things_as_any_other():
    scenes = tuple(sample_scene("exam", i) for i in range(500))
    exam = ev.Exam(scenes, (), torch.zeros(501, 1, 1))
    same = [len(scenes[i].things) == len(scenes[exam.shown(i, "another")].things) for i in range(ev.CONTROLLED)]
    assert 0.2 <= sum(same) / ev.CONTROLLED <= 0.3  # with as many things in all, "how many in all?" would be no control


def test_an_exam_of_one_picture_is_refused(model, processor):
    with pytest.raises(ValueError, match="take 2 or more"):
        ev.prepare_exam(model, processor, pictures=1)


def test_the_exam_is_the_exam_split_and_ends_with_grey(exam, model, processor):
    assert exam.scenes == tuple(sample_scene("exam", i) for i in range(16))
    assert exam.holdout == tuple(sample_scene("holdout", i) for i in range(4))
    assert len(exam.features) == 16 + 4 + 1
    grey = exam.features[-1].float()
    assert exam.shown(3, "blank") == 20
    side = model.config.vision_config.image_size
    pixels = processor.pixels([Image.fromarray(np.full((side, side, 3), 128, dtype=np.uint8))])
    assert torch.allclose(grey, model.vision(pixels)[0], atol=0.02)


def test_evaluation_of_a_model_that_knows_nothing(exam, model, processor, monkeypatch):
    monkeypatch.setattr(ev, "LONG", 6)
    monkeypatch.setattr(ev, "SHORT", 3)
    got = ev.evaluate(model, processor, exam)
    assert json.loads(json.dumps(got)) == got
    assert list(got) == list(w.LANGUAGES)
    for lang in got.values():
        assert set(lang) == {"descriptions", "holdout", "questions", "guesses", "pope", "accident"}
        assert tuple(lang["accident"]) == ev.CONTROLS
        assert set(lang["questions"]) == {"model", "blank", "another", "alone", "guess"}
        assert lang["pope"]["model"]["random"]["accuracy"]["of"] == 32
        assert lang["questions"]["model"]["all"]["of"] == lang["questions"]["alone"]["all"]["of"]
        assert lang["descriptions"]["model"]["setting"]["of"] == 16
        assert lang["holdout"]["setting"]["of"] == 4
        for control in ev.CONTROLS:
            assert list(lang["descriptions"][control]["things"]["pair"]["near"]) == ["any"]


def test_a_model_that_tells_the_truth_gets_full_marks_and_its_controls_do_not(exam, model, processor, monkeypatch):
    """The model's answers are replaced by the truth about the picture that it is shown."""

    def oracle(model, processor, asked, features, *args):
        texts = []
        for prompt, picture in asked:
            if picture is None or picture == len(features) - 1:
                texts.append("No.")
                continue
            scene = (exam.scenes + exam.holdout)[picture]
            lang = "zh" if prompt == PROMPTS["zh"] or any("\u4e00" <= c <= "\u9fff" for c in prompt) else "en"
            known = {q.question.text: q.question.answer for q in ev.pope_questions(exam.scenes, lang)}
            if prompt in PROMPTS.values():
                texts.append(caption(scene, lang, random_stream(picture)))
            else:
                own = ev.exam_questions(exam.scenes[:4], lang) + ev.pope_questions(exam.scenes, lang)
                own = {(q.picture, q.question.text): q.question.answer for q in own}
                texts.append(own.get((picture, prompt), known.get(prompt, "blub")))
        return texts

    monkeypatch.setattr(ev, "answer", oracle)
    monkeypatch.setattr(ev, "CONTROLLED", 4)
    for lang in ev.evaluate(model, processor, exam).values():
        pair = lang["descriptions"]["model"]["things"]["pair"]["all"]["any"]
        assert pair["precision"]["value"] == pair["recall"]["value"] == 1
        assert lang["holdout"]["things"]["pair"]["all"]["any"]["recall"]["value"] == 1
        assert lang["questions"]["model"]["all"]["value"] == 1
        assert lang["pope"]["model"]["adversarial"]["accuracy"]["value"] == 1
        assert lang["descriptions"]["another"]["things"]["pair"]["all"]["any"]["recall"]["value"] < 0.3
        assert lang["descriptions"]["blank"]["things"]["pair"]["all"]["any"]["recall"]["value"] == 0
        assert lang["questions"]["another"]["all"]["value"] < 0.5
        assert lang["pope"]["alone"]["random"]["yes_ratio"]["value"] == 0
        assert lang["questions"]["another"]["all"]["of"] == lang["questions"]["model"]["all"]["of"]
