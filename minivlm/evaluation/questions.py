"""The questions of the exam and of POPE, the best guesses at them, and when an answer to one is right."""

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

from minivlm.scenes import vocabulary as w
from minivlm.scenes.facts import KINDS, USUAL, Scene, random_stream, sample_scene
from minivlm.scenes.language import Question, exists_question, language_of, noun_phrase, questions, read_facts

POPE_SAMPLINGS = ("random", "popular", "adversarial")
PRESENT = "present"  # marks the questions of POPE whose answer is yes, shared by all samplings
POPULAR_KINDS = 4  # "popular" is one of the so many most frequent kinds that the picture lacks
COUNTED_SCENES = 4000  # training scenes in which kinds are counted


class Item(NamedTuple):
    """A question about a picture of the exam; its group is its type or, in POPE, how its kind was chosen."""

    picture: int
    group: str
    question: Question


class Reply(NamedTuple):
    """What was answered to an item."""

    item: Item
    text: str


def exam_questions(scenes: Sequence[Scene], lang: str) -> list[Item]:
    """One question of every type that has an exact answer, about every picture."""
    return [
        Item(i, question.type, question)
        for i, scene in enumerate(scenes)
        for question in questions(scene, lang, random_stream("exam questions", i))
    ]


def best_guesses(items: Sequence[Item], lang: str) -> tuple[dict[str, str], list[Reply]]:
    """The most frequent answer in this exam to each type of question, in words, and a reply with it to each item.

    A count is guessed with the measure word that the question asks for. Of two things to compare the one named first is
    guessed, which is right half of the time.
    """
    guesses = {}
    for group in dict.fromkeys(item.group for item in items):
        answers = [item.question.answer for item in items if item.group == group]
        if group == "count" and lang == "zh":
            answers = [answer[:1] for answer in answers]  # the number: `_measure` is added to it below
        guesses[group] = Counter(answers).most_common(1)[0][0]
    replies = []
    for item in items:
        text = guesses[item.group]
        if item.group == "compare":
            text = noun_phrase(*read_facts(item.question.text).things[0], lang, article=False)
        replies.append(Reply(item, text + _measure(item.question)))
    return guesses | {"compare": "the thing named first"}, replies


# ---- what an answer says


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: what may differ between two equal answers."""
    words = re.sub(r"[\W_]+", " ", text.casefold()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def is_right(question: Question, text: str) -> bool:
    """Whether an answer is the exact one after `normalised`; to "what", whether it names exactly the right things."""
    return answer_key(question, text) == answer_key(question, question.answer)


def answer_key(question: Question, text: str) -> Hashable:
    """What an answer says, in a form that can be compared between all questions of a type.

    To "what" a set of things; to "compare" which of the two; to "count" a number without its right measure word; else
    the `normalised` text.
    """
    answer = normalised(text)
    if question.type == "what" and (things := read_facts(text).things):
        return frozenset(things)
    if question.type == "compare":
        lang, two = language_of(question.text), read_facts(question.text).things
        two = [normalised(noun_phrase(*thing, lang, article=False)) for thing in two]
        return two.index(answer) if answer in two else answer
    measure = _measure(question)
    return (answer.removesuffix(measure),) if measure and answer.endswith(measure) else answer


def _measure(question: Question) -> str:
    """The measure word that a question asks for: Chinese counts with one."""
    if question.type != "count" or language_of(question.text) == "en":
        return ""
    return w.MEASURES[read_facts(question.text).things[0][0]]


def yes_or_no(text: str) -> bool | None:
    """What an answer says, or None if it is neither yes nor no."""
    first, *_ = normalised(text).split() or [""]
    if first == "yes" or first.startswith("是"):
        return True
    return False if first == "no" or first.startswith(("没有", "不")) else None


# ---- POPE


def pope_questions(scenes: Sequence[Scene], lang: str) -> list[Item]:
    """About each picture one question whose answer is yes, and one for every sampling of what is not there."""
    items = []
    for i, scene in enumerate(scenes):
        rng, present = random_stream("pope", i), sorted({t.kind for t in scene.things})
        items.append(Item(i, PRESENT, exists_question(present[rng.integers(len(present))], True, lang, rng)))
        for sampling in POPE_SAMPLINGS:
            pool = absent_kinds(scene, sampling)
            items.append(Item(i, sampling, exists_question(pool[rng.integers(len(pool))], False, lang, rng)))
    return items


def absent_kinds(scene: Scene, sampling: str) -> list[str]:
    """The kinds that are not in a picture from which a sampling of POPE chooses.

    If all usual inhabitants of a setting are there, "adversarial" chooses as "popular" does.
    """
    absent = [kind for kind in kinds_by_frequency() if kind not in {t.kind for t in scene.things}]
    usual = [kind for kind in absent if kind in USUAL[scene.setting]]
    if sampling == "random":
        return absent
    return usual if sampling == "adversarial" and usual else absent[:POPULAR_KINDS]


@lru_cache(maxsize=1)
def kinds_by_frequency() -> tuple[str, ...]:
    """All kinds, the most frequent in training first."""
    counts = Counter(t.kind for i in range(COUNTED_SCENES) for t in sample_scene("train", i).things)
    return tuple(sorted(KINDS, key=lambda kind: (-counts[kind], kind)))


def of_sampling(replies: Sequence[Reply], sampling: str) -> list[Reply]:
    """The replies to the questions of one sampling of POPE, yes and no."""
    return [reply for reply in replies if reply.item.group in (sampling, PRESENT)]
