"""What the model says, measured against what is true: things, settings, hallucination, questions, with controls.

The pictures are those of the "exam" split, which nothing ever trained on. The truth is exact, because a picture is
made from its facts and `read_facts` reads facts back from any answer. Every figure is a ratio of two sums over
pictures, and carries both sums and an interval (bootstrap over pictures).

**Things.** A picture's truth is a set of kinds (level "kind") or of (kind, colour) pairs (level "pair"); an answer
names such a set. With `right` for the true ones it names and `untrue` for those it names that are true of nothing in
the picture,

    precision = right / (right + untrue)        recall = right / true

Over near things (and likewise over far ones) only pictures that hold a near thing count, `true` are the near things,
`right` the near things that are named, and what is named of the far ones is left out. An untrue name cannot be told to
mean a near or a far thing and always counts, which is strict: where a far thing was missed, it may have been meant.
`precision_at_best` leaves out as many untrue names as there are missed things at the other distance; what a
precision "over near things" could fairly be lies between the two.

**Hallucination.** CHAIR_i is the share of mentioned kinds that are not in the picture, CHAIR_s the share of answers
with at least one (Rohrbach et al., arXiv:1809.02156). POPE asks yes/no (Li et al., arXiv:2305.10355): per picture one
kind that is there and, for each way of choosing, one that is not: any ("random"), one of the most frequent in training
("popular"), a usual inhabitant of the setting ("adversarial"). What is neither yes nor no is wrong, and is no yes; the
yes-ratio is the model's.

**Controls.** The same prompts with a mid-grey picture ("blank"), with another picture of the exam ("another"; like
any two pictures, the two hold as many things in a quarter of the cases), and without any picture ("alone"): what is
scored there is known without looking. Beside it stands what the same answers are worth by accident (`accident.py`).

Letters as in `config.py`.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from minivlm.config import PROMPTS
from minivlm.data.features import FeatureCache
from minivlm.evaluation import chance as accident
from minivlm.generate import Asked, answer
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor
from minivlm.scenes import vocabulary as w
from minivlm.scenes.facts import KINDS, MAX_THINGS, USUAL, Scene, random_stream, sample_scene
from minivlm.scenes.language import (
    Mentioned,
    Question,
    exists_question,
    language_of,
    noun_phrase,
    questions,
    read_facts,
)

EXAM_PICTURES, HOLDOUT_PICTURES = 500, 200
QUESTIONED = 200  # pictures of the exam about which every type of question is asked
CONTROLLED = 100  # of these, asked about with another picture too
RESAMPLES, CONFIDENCE = 1000, 0.95  # of the bootstrap
LEVELS = ("kind", "pair")
DISTANCES = ("all", "near", "far")
COUNTS = ("any", *map(str, range(1, MAX_THINGS + 1)))  # how many things a picture holds
CONTROLS = ("blank", "another", "alone")
EVERYONE = ("model", *CONTROLS)
POPE_WAYS = ("random", "popular", "adversarial")
PRESENT = "present"  # marks the questions of POPE whose answer is yes, shared by all ways
POPULAR_KINDS = 4  # "popular" is one of the so many most frequent kinds that the picture lacks
COUNTED_SCENES = 4000  # training scenes in which kinds are counted
LONG, SHORT = 96, 32  # tokens that a description, that an answer to a question may take

Figure = dict[str, float | int | None]  # value, low, high (None where nothing was counted); count, of: the two sums


@dataclass(frozen=True)
class Exam:
    """Pictures to be examined on, as features: the exam's, then the hold-out's, then a grey one.

    Attributes:
        scenes: the facts of the exam's pictures.
        holdout: the facts of the compositional hold-out's.
        features: (exam + hold-out + 1, N, Dv).
        questioned: about how many of the exam's pictures every type of question is asked.
    """

    scenes: tuple[Scene, ...]
    holdout: tuple[Scene, ...]
    features: torch.Tensor
    questioned: int = QUESTIONED

    def shown(self, picture: int, control: str) -> int | None:
        """Which picture a control shows in place of one of the exam's."""
        if control == "blank":
            return len(self.features) - 1
        if control == "another":  # the number of things cycles through four values: a quarter meets its own number
            return (picture + max(1, len(self.scenes) // 8 * 4) + picture // 4 % 4) % len(self.scenes)
        return None if control == "alone" else picture


def prepare_exam(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    pictures: int = EXAM_PICTURES,
    holdout: int = HOLDOUT_PICTURES,
    questioned: int = QUESTIONED,
    precision: str = "fp32",
    workers: int | None = None,
) -> Exam:
    """Draw and encode what is examined. The encoder never learns, so one exam serves both stages.

    Raises:
        ValueError: fewer than two pictures: then none could be taken for another.
    """
    if pictures < 2:
        raise ValueError(f"an exam of {pictures} pictures cannot show another picture as a control; take 2 or more")
    scenes = [sample_scene("exam", i) for i in range(pictures)]
    held_out = [sample_scene("holdout", i) for i in range(holdout)]
    drawn = FeatureCache.of_scenes(
        model, processor, scenes + held_out, precision=precision, workers=workers, title="the exam"
    )
    grey = Image.new("RGB", (model.config.vision_config.image_size,) * 2, (128, 128, 128))
    blank = FeatureCache.of_pictures(model, processor, [grey], precision, "a grey picture")
    features = torch.cat([drawn.features, blank.features])  # (I, N, Dv)
    return Exam(tuple(scenes), tuple(held_out), features, min(questioned, pictures))


def evaluate(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    exam: Exam,
    precision: str = "fp32",
    languages: Iterable[str] = w.LANGUAGES,
) -> dict[str, dict]:
    """Examine a model in each language. What is returned is plain JSON.

    Returns:
        language -> "descriptions": model, blank, another, alone -> what `score_descriptions` gives; "holdout": the
        model's on the hold-out; "questions": model, blank, another, alone, guess -> type -> figure; "guesses":
        type -> the guess in words; "pope": model, blank, another, alone -> what `score_pope` gives; "accident":
        blank, another, alone -> what the same answers are worth by accident, as `accident_of` gives it.
    """
    return {lang: _evaluate_in(lang, model, processor, exam, precision) for lang in languages}


def _evaluate_in(
    lang: str, model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, exam: Exam, precision: str
) -> dict[str, dict]:
    def ask(asked: list[Asked], length: int, what: str) -> list[str]:
        return answer(model, processor, asked, exam.features, length, precision, f"{what}, {lang}")

    def ask_all(items: list[Item], what: str) -> dict[str, list[Reply]]:
        put = {c: [item for item in items if c != "another" or item.picture < CONTROLLED] for c in EVERYONE}
        asked = [Asked(item.question.text, exam.shown(item.picture, c)) for c in EVERYONE for item in put[c]]
        texts = iter(ask(asked, SHORT, what))
        return {c: [Reply(item, next(texts)) for item in put[c]] for c in EVERYONE}

    count, held_out = len(exam.scenes), range(len(exam.scenes), len(exam.features) - 1)
    prompts = [Asked(PROMPTS[lang], exam.shown(i, c)) for c in EVERYONE for i in range(count)]
    texts = ask(prompts + [Asked(PROMPTS[lang], i) for i in held_out], LONG, "descriptions")
    told = {c: texts[n * count : (n + 1) * count] for n, c in enumerate(EVERYONE)}
    items = exam_questions(exam.scenes[: exam.questioned], lang)
    answered = ask_all(items, "questions")
    guesses, answered["guess"] = best_guesses(items, lang)
    pope = ask_all(pope_questions(exam.scenes, lang), "yes or no")
    return {
        "descriptions": {c: score_descriptions(exam.scenes, told[c], lang, c == "model") for c in EVERYONE},
        "holdout": score_descriptions(exam.holdout, texts[len(prompts) :], lang),
        "questions": {who: score_questions(replies) for who, replies in answered.items()},
        "guesses": guesses,
        "pope": {c: score_pope(replies) for c, replies in pope.items()},
        "accident": {
            c: accident_of(exam.scenes, told[c], answered[c], pope[c], [exam.shown(i, c) for i in range(count)])
            for c in CONTROLS
        },
    }


# ---- figures


def figure(rows: Iterable[tuple[int, float, float]]) -> Figure:
    """A ratio of two sums over pictures, with its bootstrap interval.

    Args:
        rows: (picture, count, of); several rows of one picture are added up.

    Returns:
        value = count / of, low and high: the middle `CONFIDENCE` of the values of `RESAMPLES` draws of as many
        pictures with replacement, always the same draws. None where nothing was counted. Where all are right, so is
        every draw, and the interval has no width: look at `of`.
    """
    sums: dict[int, list[float]] = {}
    for picture, count, of in rows:
        total = sums.setdefault(picture, [0, 0])
        total[0] += count
        total[1] += of
    table = np.array(list(sums.values()), dtype=np.float64).reshape(-1, 2)  # (I, 2)
    count, of = table.sum(axis=0).tolist()
    if of == 0:
        return {"value": None, "low": None, "high": None, "count": int(count), "of": 0}
    drawn = _resamples(len(table)) @ table  # (R, 2)
    values = drawn[drawn[:, 1] > 0]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[:, 0] / values[:, 1], (tail, 1 - tail))
    return {
        "value": round(count / of, 5),
        "low": round(float(low), 5),
        "high": round(float(high), 5),
        "count": int(count),
        "of": int(of),
    }


@lru_cache(maxsize=32)
def _resamples(pictures: int) -> np.ndarray:
    """How often each picture is drawn, (R, I)."""
    rng = random_stream("bootstrap", pictures)
    return rng.multinomial(pictures, np.full(pictures, 1 / pictures), size=RESAMPLES).astype(np.float64)


# ---- descriptions


class Compared(NamedTuple):
    """One answer against one picture's facts: sizes of sets, as the module's docstring defines them."""

    right: int
    untrue: int
    true: int
    excusable: int  # untrue names that may stand for a missed thing at the other distance


def compare(scene: Scene, said: Mentioned, level: str = "pair", distance: str = "all") -> Compared:
    """Compare the things that an answer names with a picture's, at a level ("kind" or "pair") and a distance."""

    def identity(kind: str, colour: str | None) -> str | tuple[str, str | None]:
        return kind if level == "kind" else (kind, colour)

    named = {identity(*thing) for thing in said.things}
    true = {identity(t.kind, t.colour) for t in scene.things}
    asked = {identity(t.kind, t.colour) for t in scene.things if distance in ("all", t.distance)}
    untrue = len(named - true)
    return Compared(len(named & asked), untrue, len(asked), min(untrue, len(true - asked - named)))


def score_descriptions(scenes: Sequence[Scene], texts: Sequence[str], lang: str, fully: bool = True) -> dict:
    """Score one answer per picture.

    Args:
        fully: break things down by the number of things; otherwise only "any" number.

    Returns:
        "things": level -> distance -> number of things -> precision, precision_at_best, recall (figures), pictures;
        "setting", "chair_i", "chair_s": figures; "length": a figure, words (English) or characters (Chinese) an
        answer.
    """
    said = [read_facts(text) for text in texts]
    kinds = [{t.kind for t in scene.things} for scene in scenes]
    invented = [sum(kind not in there for kind, _ in m.things) for m, there in zip(said, kinds, strict=True)]
    return {
        "things": {
            level: {
                distance: {
                    number: _score_things(scenes, said, level, distance, number)
                    for number in (COUNTS if fully else COUNTS[:1])
                }
                for distance in DISTANCES
            }
            for level in LEVELS
        },
        "setting": figure(
            (i, m.setting == scene.setting, 1) for i, (scene, m) in enumerate(zip(scenes, said, strict=True))
        ),
        "chair_i": figure((i, bad, len(m.things)) for i, (bad, m) in enumerate(zip(invented, said, strict=True))),
        "chair_s": figure((i, bad > 0, 1) for i, bad in enumerate(invented)),
        "length": figure((i, len(text.split() if lang == "en" else text), 1) for i, text in enumerate(texts)),
    }


def _score_things(
    scenes: Sequence[Scene], said: Sequence[Mentioned], level: str, distance: str, number: str
) -> dict[str, Figure | int]:
    compared = [
        (i, compare(scene, mentioned, level, distance))
        for i, (scene, mentioned) in enumerate(zip(scenes, said, strict=True))
        if number in ("any", str(len(scene.things)))
    ]
    compared = [(i, c) for i, c in compared if c.true]  # pictures without any thing at this distance say nothing
    return {
        "precision": figure((i, c.right, c.right + c.untrue) for i, c in compared),
        "precision_at_best": figure((i, c.right, c.right + c.untrue - c.excusable) for i, c in compared),
        "recall": figure((i, c.right, c.true) for i, c in compared),
        "pictures": len(compared),
    }


# ---- questions


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


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: what may differ between two equal answers."""
    words = re.sub(r"[\W_]+", " ", text.casefold()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def is_right(question: Question, text: str) -> bool:
    """Whether an answer is the exact one after `normalised`; to "what", whether it names exactly the right things."""
    return answer_key(question, text) == answer_key(question, question.answer)


def answer_key(question: Question, text: str) -> Hashable:
    """What an answer says, in a form that can be compared between all questions of a type.

    To "what" a set of things; to "compare" which of the two; to "count" a number without the measure word that Chinese
    asks for, if it is the right one; else the `normalised` text.
    """
    said = normalised(text)
    if question.type == "what" and (things := read_facts(text).things):
        return frozenset(things)
    if question.type == "compare":
        lang, two = language_of(question.text), read_facts(question.text).things
        two = [normalised(noun_phrase(*thing, lang, article=False)) for thing in two]
        return two.index(said) if said in two else said
    measure = _measure(question)
    if measure and said.endswith(measure):
        return (said.removesuffix(measure),)
    return said


def _measure(question: Question) -> str:
    """The measure word that a question asks for: Chinese counts with one."""
    if question.type != "count" or language_of(question.text) == "en":
        return ""
    return w.MEASURES[read_facts(question.text).things[0][0]]


def best_guesses(items: Sequence[Item], lang: str) -> tuple[dict[str, str], list[Reply]]:
    """The best that can be said without looking: to each type of question, its most frequent answer in this exam.

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
        text += _measure(item.question)
        replies.append(Reply(item, text))
    return guesses | {"compare": "the thing named first"}, replies


def score_questions(replies: Iterable[Reply]) -> dict[str, Figure]:
    """Accuracy by type of question, and over "all"."""
    rows: dict[str, list[tuple[int, float, float]]] = {"all": []}
    for item, text in replies:
        row = (item.picture, is_right(item.question, text), 1)
        rows["all"].append(row)
        rows.setdefault(item.group, []).append(row)
    return {group: figure(rows[group]) for group in ("all", *w.QUESTION_TYPES) if group in rows}


# ---- POPE


def pope_questions(scenes: Sequence[Scene], lang: str) -> list[Item]:
    """About each picture one question whose answer is yes, and one for every way of choosing what is not there."""
    items = []
    for i, scene in enumerate(scenes):
        rng, there = random_stream("pope", i), sorted({t.kind for t in scene.things})
        items.append(Item(i, PRESENT, exists_question(there[rng.integers(len(there))], True, lang, rng)))
        for way in POPE_WAYS:
            pool = absent_kinds(scene, way)
            items.append(Item(i, way, exists_question(pool[rng.integers(len(pool))], False, lang, rng)))
    return items


def absent_kinds(scene: Scene, way: str) -> list[str]:
    """The kinds that are not in a picture from which a way of POPE chooses.

    If all usual inhabitants of a setting are there, "adversarial" chooses as "popular" does.
    """
    absent = [kind for kind in kinds_by_frequency() if kind not in {t.kind for t in scene.things}]
    usual = [kind for kind in absent if kind in USUAL[scene.setting]]
    if way == "random":
        return absent
    return usual if way == "adversarial" and usual else absent[:POPULAR_KINDS]


@lru_cache(maxsize=1)
def kinds_by_frequency() -> tuple[str, ...]:
    """All kinds, the most frequent in training first."""
    seen = Counter(t.kind for i in range(COUNTED_SCENES) for t in sample_scene("train", i).things)
    return tuple(sorted(KINDS, key=lambda kind: (-seen[kind], kind)))


def yes_or_no(text: str) -> bool | None:
    """What an answer says, or None if it is neither yes nor no."""
    words = normalised(text).split() or [""]
    if words[0] == "yes" or words[0].startswith("是"):
        return True
    return False if words[0] == "no" or words[0].startswith(("没有", "不")) else None


def score_pope(replies: Sequence[Reply]) -> dict[str, dict[str, Figure]]:
    """way -> accuracy, precision, recall, f1, yes_ratio (all of them the model's), unreadable."""
    return {way: _score_way(_of_way(replies, way)) for way in POPE_WAYS}


def _of_way(replies: Sequence[Reply], way: str) -> list[Reply]:
    return [reply for reply in replies if reply.item.group in (way, PRESENT)]


def _score_way(replies: Sequence[Reply]) -> dict[str, Figure]:
    rows = [(r.item.picture, r.item.group == PRESENT, yes_or_no(r.text)) for r in replies]
    return {
        "accuracy": figure((i, said is there, 1) for i, there, said in rows),
        "precision": figure((i, said is there, 1) for i, there, said in rows if said),
        "recall": figure((i, said is there, 1) for i, there, said in rows if there),
        # twice the true yes, over all that is there and all that was said to be
        "f1": figure((i, 2 * (there and said is True), there + (said is True)) for i, there, said in rows),
        "yes_ratio": figure((i, said is True, 1) for i, _, said in rows),
        "unreadable": figure((i, said is None, 1) for i, _, said in rows),
    }


# ---- by accident


def accident_of(
    scenes: Sequence[Scene],
    told: Sequence[str],
    answered: Sequence[Reply],
    pope: Sequence[Reply],
    shown: Sequence[int | None] | None = None,
) -> dict[str, dict[str, accident.Level]]:
    """What the answers of one control are worth by accident.

    Args:
        scenes: the exam's; told: what was said about each; shown: which of them was shown in its place, if one was.
        answered, pope: replies to the exam's and to POPE's questions.

    Returns:
        "descriptions": precision, recall, setting, chair_i, chair_s; "questions": type -> accuracy; "pope": way ->
        accuracy.
    """
    types = [type_ for type_ in w.QUESTION_TYPES if any(reply.item.group == type_ for reply in answered)]
    return {
        "descriptions": accident.describing(scenes, told, shown),
        "questions": {t: _agreement([r for r in answered if r.item.group == t], answer_key) for t in types},
        "pope": {way: _agreement(_of_way(pope, way), lambda _, text: yes_or_no(text)) for way in POPE_WAYS},
    }


def _agreement(replies: Sequence[Reply], key: Callable[[Question, str], Hashable]) -> accident.Level:
    """How often replies are right about the other pictures of the group; yes and no where the same kind was asked."""
    asked = [reply.item.question for reply in replies]
    said = [key(question, reply.text) for question, reply in zip(asked, replies, strict=True)]
    true = [key(question, question.answer) for question in asked]
    kinds = [read_facts(question.text).things[0][0] if question.type == "exists" else None for question in asked]
    return accident.agreement(said, true, kinds)
