"""The exam: a model describes drawn pictures that nothing ever trained on and answers questions, with controls.

The same prompts are put with a mid-grey picture ("blank"), with another picture of the exam ("another"; like any two
pictures, the two hold as many things in a quarter of the cases), and without any picture ("alone"): what is scored
there is known without looking. Beside it stands the chance level of the same answers (`chance.py`). Letters as in
`config.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from minivlm.config import PROMPTS
from minivlm.data.features import encode_images
from minivlm.evaluation.chance import chance_levels
from minivlm.evaluation.metrics import score_descriptions, score_pope, score_questions
from minivlm.evaluation.questions import Item, Reply, best_guesses, exam_questions, pope_questions
from minivlm.generate import ask, reply
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor
from minivlm.scenes.facts import Scene, sample_scene
from minivlm.scenes.features import scene_features
from minivlm.scenes.vocabulary import LANGUAGES

EXAM_PICTURES, HOLDOUT_PICTURES = 500, 200
QUESTIONED = 200  # pictures of the exam about which every type of question is asked
CONTROLLED = 100  # of these, asked about with another picture too
CONTROLS = ("blank", "another", "alone")
EVERYONE = ("model", *CONTROLS)
LONG, SHORT = 96, 32  # tokens that a description, that an answer to a question may take


@dataclass(frozen=True)
class Exam:
    """Pictures to be examined on, as features: the exam's, then the hold-out's, then a grey one.

    Attributes:
        scenes, holdout: the facts of the exam's pictures, and of the compositional hold-out's.
        features: (exam + hold-out + 1, N, Dv).
        shown: "model" or a control -> for each of the exam's pictures the number of the one that is shown, or None.
        questioned: about how many of the exam's pictures every type of question is asked.
    """

    scenes: tuple[Scene, ...]
    holdout: tuple[Scene, ...]
    features: torch.Tensor
    shown: Mapping[str, tuple[int | None, ...]]
    questioned: int = QUESTIONED

    def image(self, number: int | None) -> torch.Tensor | None:
        """The patch features (N, Dv) of a picture; None stays None."""
        return None if number is None else self.features[number]


def prepare_exam(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    pictures: int = EXAM_PICTURES,
    holdout: int = HOLDOUT_PICTURES,
    questioned: int = QUESTIONED,
    workers: int | None = None,
) -> Exam:
    """Draw and encode an exam that serves both stages; a ValueError for fewer than two pictures."""
    if pictures < 2:
        raise ValueError(f"an exam of {pictures} pictures cannot show another picture as a control; take 2 or more")
    scenes = [sample_scene("exam", i) for i in range(pictures)]
    held_out = [sample_scene("holdout", i) for i in range(holdout)]
    drawn = scene_features(model, processor, scenes + held_out, workers=workers, title="the exam")
    grey = Image.new("RGB", (model.config.vision_config.image_size,) * 2, (128, 128, 128))
    blank = encode_images(model, processor, [grey], title="a grey picture")
    shown = pictures_shown(pictures, blank=len(drawn))
    return Exam(tuple(scenes), tuple(held_out), torch.cat([drawn, blank]), shown, min(questioned, pictures))


def pictures_shown(pictures: int, blank: int) -> dict[str, tuple[int | None, ...]]:
    """Which picture the model and each control see in place of each picture of an exam; `blank` is the grey one's."""
    half = max(1, pictures // 8 * 4)
    return {
        "model": tuple(range(pictures)),
        "blank": (blank,) * pictures,
        # numbers of things cycle through four values; the shift by i // 4 lets a quarter meet its own number
        "another": tuple((i + half + i // 4 % 4) % pictures for i in range(pictures)),
        "alone": (None,) * pictures,
    }


def evaluate(
    model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, exam: Exam
) -> dict[str, dict[str, Any]]:
    """Examine a model in each language. What is returned is plain JSON.

    Returns:
        language -> "descriptions": one of `EVERYONE` -> what `score_descriptions` gives; "holdout": the model's on the
        hold-out; "questions": one of `EVERYONE`, or "guess" -> type -> estimate; "guesses": type -> the guess in words;
        "pope": one of `EVERYONE` -> what `score_pope` gives; "chance": a control -> what `chance_levels` gives.
    """
    return {lang: _evaluate_in(lang, model, processor, exam) for lang in LANGUAGES}


def _evaluate_in(
    lang: str, model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, exam: Exam
) -> dict[str, Any]:
    def replies(items: list[Item], title: str) -> dict[str, list[Reply]]:
        """The replies of the model and of each control."""
        cases = [(c, item) for c in EVERYONE for item in items if c != "another" or item.picture < CONTROLLED]
        prompts = [ask(item.question.text, exam.image(exam.shown[c][item.picture])) for c, item in cases]
        texts = reply(model, processor, prompts, max_new_tokens=SHORT, title=f"{title}, {lang}")
        by_control = {c: [] for c in EVERYONE}
        for (c, item), text in zip(cases, texts, strict=True):
            by_control[c].append(Reply(item, text))
        return by_control

    pictures = [*range(len(exam.features)), None]
    prompts = [ask(PROMPTS[lang], exam.image(picture)) for picture in pictures]
    texts = reply(model, processor, prompts, max_new_tokens=LONG, title=f"descriptions, {lang}")
    text_about = dict(zip(pictures, texts, strict=True))
    described = {c: [text_about[picture] for picture in exam.shown[c]] for c in EVERYONE}
    of_holdout = [text_about[len(exam.scenes) + i] for i in range(len(exam.holdout))]
    items = exam_questions(exam.scenes[: exam.questioned], lang)
    answered = replies(items, "questions")
    guesses, guessed = best_guesses(items, lang)
    pope = replies(pope_questions(exam.scenes, lang), "yes or no")
    return {
        "descriptions": {c: score_descriptions(exam.scenes, described[c], lang, c == "model") for c in EVERYONE},
        "holdout": score_descriptions(exam.holdout, of_holdout, lang),
        "questions": {who: score_questions(given) for who, given in (answered | {"guess": guessed}).items()},
        "guesses": guesses,
        "pope": {c: score_pope(pope[c]) for c in EVERYONE},
        "chance": {c: chance_levels(exam.scenes, described[c], answered[c], pope[c], exam.shown[c]) for c in CONTROLS},
    }
