"""Chance levels against the definition: every answer compared with every unrelated image in turn."""

from itertools import permutations

import pytest

from minivlm import evaluation
from minivlm.evaluation.questions import PRESENT, answer_key
from minivlm.scenes import vocabulary as w
from minivlm.scenes.facts import random_stream, sample_scene
from minivlm.scenes.language import description, read_facts

SCENES = [sample_scene("exam", i) for i in range(60)]


def replies(lang, shown, scenes=SCENES):
    """The exam's questions about each scene, each answered with the true answer about scene number `shown(i)`."""
    items = evaluation.exam_questions(scenes, lang)
    known = {(item.picture, item.group): item.question.answer for item in items}
    return [evaluation.Reply(item, known.get((shown(item.picture), item.group), "")) for item in items]


def test_agreement_is_the_mean_over_all_pairs_of_different_images():
    rng = random_stream("accident", 0)
    answers, true = ([str(x) for x in rng.integers(0, 4, 30)] for _ in range(2))
    pairs = list(permutations(range(30), 2))
    expected = sum(answers[i] == true[j] for i, j in pairs) / len(pairs)
    assert evaluation.chance.agreement(answers, true) == pytest.approx(expected, abs=1e-5)
    assert evaluation.chance.agreement(["a"], ["a"]) is None and evaluation.chance.agreement([], []) is None


def test_answers_are_compared_with_images_of_which_the_same_was_asked():
    """Three cats, two dogs, and one bird, which is skipped: there is nothing to compare it with."""
    questions = ["cat", "dog", "cat", "dog", "cat", "bird"]
    answers = ["no", "no", "yes", "yes", "no", "yes"]
    true = ["yes", "yes", "no", "no", "no", "yes"]
    # cat, answer no: others no, no -> 1; cat, answer yes: others yes, no -> 1/2; cat, answer no: others yes, no -> 1/2
    # dog, answer no: the other is no -> 1; dog, answer yes: the other is yes -> 1
    assert evaluation.chance.agreement(answers, true, questions) == pytest.approx((1 + 1 / 2 + 1 / 2 + 1 + 1) / 5)


@pytest.mark.parametrize("lang", w.LANGUAGES)
def test_descriptions_are_compared_with_every_image_but_their_own(lang):
    """The expected value is `score_descriptions` over all pairs of a text and another scene, not the one shown."""
    texts = [description(SCENES[i // 2], lang, random_stream("told", i)) for i in range(len(SCENES))]
    texts[5] = ""  # names nothing
    shown = [(i + 7) % len(SCENES) if i % 3 else [None, len(SCENES)][i % 2] for i in range(len(SCENES))]
    pairs = [(i, j) for i, j in permutations(range(len(SCENES)), 2) if j != shown[i]]
    scored = evaluation.score_descriptions(
        [SCENES[j] for _, j in pairs], [texts[i] for i, _ in pairs], lang, fully=False
    )
    near = scored["things"]["pair"]["near"]["any"]
    expected = {name: near[name]["value"] for name in ("precision", "recall")}
    expected |= {name: scored[name]["value"] for name in ("setting", "chair_i", "chair_s")}
    assert evaluation.chance.describing(SCENES, texts, shown) == pytest.approx(expected, abs=2e-5)
    assert 0 < expected["recall"] < 0.2


def test_descriptions_that_name_nothing_have_chance_level_zero_or_none():
    level = evaluation.chance.describing(SCENES, [""] * len(SCENES))
    assert level == {"precision": None, "recall": 0, "setting": 0, "chair_i": None, "chair_s": 0}


@pytest.mark.parametrize("lang", w.LANGUAGES)
def test_an_answer_is_right_where_its_words_are(lang):
    """`is_right` goes by keys; here it is held against the words themselves, for answers of other questions too."""
    items = evaluation.exam_questions(SCENES, lang)
    checked = 0
    for group in w.QUESTION_TYPES:
        questions = [item.question for item in items if item.group == group]
        for one in questions:
            for other in questions:
                true = read_facts(one.answer).things
                if group == "what" and true:
                    right = set(read_facts(other.answer).things) == set(true)
                else:
                    right = evaluation.normalised(other.answer) == evaluation.normalised(one.answer)
                assert evaluation.is_right(one, other.answer) == right, (one, other)
                checked += right
    assert checked > len(items)


def test_keys_compare_answers_to_different_questions():
    def of_type(lang, group):
        return [item.question for item in evaluation.exam_questions(SCENES, lang) if item.group == group]

    for lang in w.LANGUAGES:
        which = {answer_key(question, question.answer) for question in of_type(lang, "compare")}
        assert which == {0, 1}  # the one named first, the one named second
    counted = {answer_key(question, question.answer) for question in of_type("zh", "count")}
    assert counted <= {(evaluation.normalised(number),) for number in w.NUMBERS["zh"]} and len(counted) > 1
    (bare,) = {answer_key(q, w.NUMBERS["zh"][2]) for q in of_type("zh", "count")}
    assert bare not in counted  # without its measure word a number is no answer


@pytest.mark.parametrize("lang", w.LANGUAGES)
def test_pope_is_compared_with_other_images_of_which_the_same_kind_was_asked(lang):
    """Loose forms of yes and no, and one that is neither; against pairs of questions, by hand."""
    forms = {"en": ("Yes, there is.", "no", "Blub."), "zh": ("是的，有。", "不是。", "一只狗")}[lang]
    rng = random_stream("loose", lang)
    items = evaluation.pope_questions(SCENES, lang)
    pope = [evaluation.Reply(item, forms[int(rng.choice(3, p=(0.3, 0.5, 0.2)))]) for item in items]
    level = evaluation.chance.chance_levels(SCENES, [""] * len(SCENES), replies(lang, lambda i: i), pope)["pope"]
    assert len(set(level.values())) == len(evaluation.POPE_SAMPLINGS)
    for category in evaluation.POPE_SAMPLINGS:
        group = [reply for reply in pope if reply.item.group in (category, PRESENT)]
        shares = []
        for one in group:
            (kind, _), *_ = read_facts(one.item.question.text).things
            others = [o for o in group if o is not one and read_facts(o.item.question.text).things[0][0] == kind]
            answer = {forms[0]: True, forms[1]: False, forms[2]: None}[one.text]
            if others:
                shares.append(sum(answer is (o.item.group == PRESENT) for o in others) / len(others))
        assert level[category] == pytest.approx(sum(shares) / len(shares), abs=1e-5)


@pytest.mark.parametrize("lang", w.LANGUAGES)
def test_a_control_that_tells_about_another_image_scores_its_chance_level(lang):
    """A perfect model, shown images in another order: within the interval, nineteen times in twenty or so."""
    rng, count, inside = random_stream("another order", lang), len(SCENES), []
    for _ in range(20):
        order = rng.permutation(count).tolist()
        inside += within(lang, lambda i, order=order: order[i])
    assert 0.88 < sum(inside) / len(inside) < 0.99
    assert not any(within(lang, lambda i: i))  # shown the right one, it is far above


def within(lang, shown):
    """Which intervals hold their level: of recall, and of the types that can be asked about every image."""
    texts = [description(SCENES[shown(i)], lang, random_stream("told", i)) for i in range(len(SCENES))]
    answers = replies(lang, shown)
    level = evaluation.chance.chance_levels(SCENES, texts, answers, [], [shown(i) for i in range(len(SCENES))])
    assert set(level["questions"]) == set(w.QUESTION_TYPES)
    scored, right = evaluation.score_descriptions(SCENES, texts, lang, fully=False), evaluation.score_questions(answers)
    recall = scored["things"]["pair"]["near"]["any"]["recall"]
    pairs = [(recall, level["descriptions"]["recall"])]
    pairs += [(right[type_], level["questions"][type_]) for type_ in ("what", "total", "setting", "time")]
    return [figure["low"] <= value <= figure["high"] for figure, value in pairs]
