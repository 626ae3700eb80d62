"""The questions: what is asked, which answers are right, what can be guessed, and what POPE's names mean."""

from collections import Counter

import pytest

from minivlm.evaluation import Reply, exam_questions, is_right, pope_questions, score_questions
from minivlm.evaluation.questions import (
    POPULAR_KINDS,
    PRESENT,
    absent_kinds,
    best_guesses,
    kinds_by_frequency,
    yes_or_no,
)
from minivlm.scenes import vocabulary as w
from minivlm.scenes.facts import KINDS, USUAL, Scene, Thing, sample_scene
from minivlm.scenes.language import Question, read_facts

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
    assert is_right(Question(type_, "?", answer_), text) is right


@pytest.mark.parametrize("lang", w.LANGUAGES)
def test_exam_questions_cover_all_types_and_their_answers_are_right(lang):
    scenes = [sample_scene("exam", i) for i in range(40)]
    items = exam_questions(scenes, lang)
    assert {item.group for item in items} == set(w.QUESTION_TYPES)
    scores = score_questions([Reply(item, item.question.answer) for item in items])
    assert list(scores) == ["all", *w.QUESTION_TYPES]
    assert all(f["value"] == 1 for f in scores.values())
    assert scores["all"]["denominator"] == len(items) == sum(f["denominator"] for f in scores.values()) - len(items)


@pytest.mark.parametrize("lang", w.LANGUAGES)
def test_guesses_by_hand_and_on_the_exam(lang):
    items = exam_questions([sample_scene("exam", i) for i in range(120)], lang)
    guesses, replies = best_guesses(items, lang)
    scores = score_questions(replies)
    assert len(replies) == len(items)
    answers = [item.question.answer for item in items if item.group == "setting"]
    assert scores["setting"]["numerator"] == max(answers.count(one) for one in set(answers))
    assert guesses["setting"] in answers
    assert 0.35 < scores["compare"]["value"] < 0.65  # the one named first is a coin's throw
    assert 0.4 < scores["exists"]["value"] < 0.65
    assert scores["count"]["value"] > 0.4  # in Chinese too, where every kind has its own measure word


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
    assert yes_or_no(text) is read


@pytest.mark.parametrize("lang", w.LANGUAGES)
def test_pope_asks_what_its_names_say(lang):
    scenes = [sample_scene("exam", i) for i in range(60)]
    frequent = kinds_by_frequency()
    for item in pope_questions(scenes, lang):
        scene = scenes[item.picture]
        ((kind, _),) = read_facts(item.question.text).things
        there = {t.kind for t in scene.things}
        assert (kind in there) == (item.group == PRESENT) == yes_or_no(item.question.answer)
        if item.group == "popular":
            assert kind in [k for k in frequent if k not in there][:POPULAR_KINDS]
        if item.group == "adversarial" and not there >= set(USUAL[scene.setting]):
            assert kind in USUAL[scene.setting]


def test_adversarial_where_all_usual_inhabitants_are_there():
    things = tuple(Thing(kind, "red", "left", "near", "medium") for kind in USUAL["lake"])
    assert absent_kinds(Scene("lake", things, 0), "adversarial") == absent_kinds(Scene("lake", things, 0), "popular")


def test_kinds_are_sorted_by_how_often_training_shows_them():
    assert sorted(kinds_by_frequency()) == sorted(KINDS)
    usual = Counter(sum(USUAL.values(), ()))
    frequent = [usual[kind] for kind in kinds_by_frequency()]
    assert sum(frequent[:4]) > 2 * sum(frequent[-4:])  # what settings prefer is seen more often
