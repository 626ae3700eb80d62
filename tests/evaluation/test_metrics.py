"""The metrics: definitions by hand, the truth scores full marks, intervals are those of a plain bootstrap."""

import numpy as np
import pytest

from minivlm.evaluation import Reply, compare, estimate, metrics, pope_questions, score_descriptions, score_pope
from minivlm.evaluation.metrics import DISTANCES, LEVELS
from minivlm.evaluation.questions import PRESENT
from minivlm.scenes import vocabulary as w
from minivlm.scenes.facts import Scene, Thing, random_stream, sample_scene
from minivlm.scenes.language import Mentioned, caption, description

RED_CAR = Thing("car", "red", "left", "near", "medium")
BLUE_DOG = Thing("dog", "blue", "middle", "near", "big")
RED_DOG = Thing("dog", "red", "right", "far", "small")
PANDA = Thing("panda", None, "left", "far", "small")
SCENE = Scene("park", (RED_CAR, BLUE_DOG, RED_DOG, PANDA), 1)


def mentioned(*things, setting="park"):
    return Mentioned(things, setting)


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
        # without its colour it is no pair; a repeated name counts once
        ((("car", None), ("dog", "blue"), ("dog", "blue")), "pair", "near", (1, 1, 2, 1)),
        # more untrue names than missed far things
        ((("cat", "red"), ("cat", "blue"), ("cat", "pink")), "pair", "near", (0, 3, 2, 2)),
        ((), "pair", "near", (0, 0, 2, 0)),
    ],
)
def test_named_things_by_hand(things, level, distance, expected):
    assert compare(SCENE, mentioned(*things), level, distance) == expected


def test_descriptions_by_hand():
    beach = Scene("beach", (Thing("bird", "white", "middle", "far", "small"),), 2)
    texts = [
        "A red car, a red dog and a green cat in a park",  # near: car right, cat untrue, dog left out; 1 of 3 invented
        "a white bird, a kite in outer space",  # a kite, with no colour, and the wrong place
    ]
    scores = score_descriptions([SCENE, beach], texts, "en")

    def counts(figure):
        return figure["numerator"], figure["denominator"]

    near = scores["things"]["pair"]["near"]["any"]
    assert near["pictures"] == 1  # the beach holds nothing near and says nothing about it
    assert (counts(near["precision"]), counts(near["recall"])) == ((1, 2), (1, 2))
    assert counts(near["precision_at_best"]) == (1, 1)  # the green cat may have been meant for the panda
    every = scores["things"]["pair"]["all"]
    assert (counts(every["any"]["precision"]), counts(every["any"]["recall"])) == ((3, 5), (3, 5))
    assert (counts(every["4"]["precision"]), counts(every["4"]["recall"])) == ((2, 3), (2, 4))
    assert (counts(every["1"]["precision"]), counts(every["1"]["recall"])) == ((1, 2), (1, 1))
    assert every["2"]["recall"] == {"value": None, "low": None, "high": None, "numerator": 0, "denominator": 0}
    assert counts(scores["setting"]) == (1, 2)
    assert counts(scores["chair_i"]) == (2, 5)
    assert counts(scores["chair_s"]) == (2, 2)
    assert scores["length"]["value"] == pytest.approx((13 + 8) / 2)


@pytest.mark.parametrize("lang", w.LANGUAGES)
@pytest.mark.parametrize("write", [caption, description])
def test_the_truth_scores_full_marks(lang, write):
    scenes = [sample_scene("exam", i) for i in range(40)]
    scores = score_descriptions(scenes, [write(s, lang, random_stream(s.seed)) for s in scenes], lang)
    for level in LEVELS:
        for distance in DISTANCES:
            for score in scores["things"][level][distance].values():
                if score["pictures"]:
                    assert score["precision"]["value"] == score["recall"]["value"] == 1
    assert [scores["things"]["pair"]["all"][str(n)]["pictures"] for n in (1, 2, 3, 4)] == [10] * 4
    assert scores["setting"]["value"] == 1
    assert scores["chair_i"]["value"] == scores["chair_s"]["value"] == 0


# ---- intervals


def test_the_interval_is_that_of_the_plain_bootstrap():
    rng = np.random.default_rng(3)
    of = rng.integers(1, 5, 60)
    count = rng.binomial(of, 0.7)
    interval = estimate((i, c, o) for i, (c, o) in enumerate(zip(count, of, strict=True)))
    draws = [rng.integers(0, 60, 60) for _ in range(4000)]  # another stream, one image at a time
    values = [count[d].sum() / of[d].sum() for d in draws]
    assert interval["value"] == pytest.approx(count.sum() / of.sum(), abs=1e-5)
    assert [interval["low"], interval["high"]] == pytest.approx(np.quantile(values, (0.025, 0.975)), abs=0.02)
    assert (interval["numerator"], interval["denominator"]) == (count.sum(), of.sum())


def test_rows_of_one_image_are_drawn_together():
    apart = estimate((i, i % 2, 1) for i in range(100))
    together = estimate((i // 10, i // 10 % 2, 1) for i in range(100))
    assert together["high"] - together["low"] > 2 * (apart["high"] - apart["low"])


def test_an_interval_is_the_same_each_time():
    rows = [(i, i % 3 == 0, 1) for i in range(50)]
    metrics._resamples.cache_clear()
    first = estimate(rows)
    metrics._resamples.cache_clear()
    assert first == estimate(rows)


# ---- POPE


def test_pope_by_hand():
    """Two images: yes/yes, yes/no as replies to what is there and what is not; then one that is gibberish."""
    scenes = [sample_scene("exam", i) for i in range(3)]
    items = [item for item in pope_questions(scenes, "en") if item.group in (PRESENT, "random")]
    texts = ["Yes.", "Yes.", "Yes.", "No.", "Blub.", "Blub."]
    scores = score_pope([Reply(item, text) for item, text in zip(items, texts, strict=True)])["random"]
    counts = {name: (figure["numerator"], figure["denominator"]) for name, figure in scores.items()}
    assert counts == {
        "accuracy": (3, 6),
        "precision": (2, 3),
        "recall": (2, 3),
        "f1": (4, 6),  # 2 * 2 true yes; 3 are there, 3 were answered with yes
        "yes_ratio": (3, 6),
        "unreadable": (2, 6),
    }
