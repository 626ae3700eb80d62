"""The rows of both stages in the drawn world: which picture, what is asked, what is answered.

Stage 1 pairs a picture with a short caption, as LLaVA's does with CC3M. Stage 2 mixes what LLaVA-Instruct mixes
(arXiv:2304.08485, section 3): detailed descriptions, and conversations with questions of fact and of simple reasoning;
besides, a share of rows without a picture, so that the language model does not forget its text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minivlm.config import IMAGE_TOKEN, PROMPTS
from minivlm.data.samples import Sample
from minivlm.scenes.corpus import Conversation, listed_scene, small_talk, translation
from minivlm.scenes.facts import random_stream, sample_scene
from minivlm.scenes.language import caption, description, questions
from minivlm.scenes.vocabulary import LANGUAGES

SFT_MIX = {"description": 0.40, "conversation": 0.50, "text": 0.10}
FOLLOW_UPS = (0, 1, 2)  # questions after a description
TURNS = (3, 4, 5)  # questions of one conversation
TEXT_WRITERS = (listed_scene, translation, small_talk)
TEXT_OFFSET = 20_000_000  # scenes of the text corpus that neither base training nor its exam reaches


@dataclass(frozen=True)
class SceneRows(Sequence):
    """The rows of a stage as a sequence of `Sample`; each is a pure function of its index and of these fields.

    A row's picture is named by its number in the split, which is what `FeatureCache.of_scenes` calls it; the same
    pictures serve both stages. When all pictures have been shown, each comes again in the other language.

    Attributes:
        stage: "pretrain" or "sft".
        pictures: how many pictures there are. Row i shows picture number i modulo `pictures`.
        count: how many rows there are.
        seed: decides wording, and what is asked.
        split: the split of the scenes.
        noise: the share of descriptions in stage 2 with a plausible sentence that is not true.
    """

    stage: str
    pictures: int
    count: int
    seed: int = 0
    split: str = "train"
    noise: float = 0.0

    def __post_init__(self):
        """Refuse what has no rows.

        Raises:
            ValueError: another stage, no picture, or no row.
        """
        if self.stage not in ("pretrain", "sft"):
            raise ValueError(f"there are no scene rows for stage {self.stage!r}; choose 'pretrain' or 'sft'")
        if self.pictures < 1 or self.count < 1:
            raise ValueError(f"{self.count} rows of {self.pictures} pictures: at least one of each is needed")

    def __len__(self) -> int:
        """How many rows there are."""
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """Row number `index`.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"row {index} of {self.count}")
        if self.stage == "pretrain":
            return pretrain_row(index, self.pictures, self.seed, self.split)
        return sft_row(index, self.pictures, self.seed, self.split, self.noise)


def language_of(index: int, pictures: int, seed: int) -> str:
    """Languages take turns from picture to picture, and change sides whenever all pictures have been shown."""
    return LANGUAGES[(index % pictures + index // pictures + seed) % 2]


def pretrain_row(index: int, pictures: int, seed: int = 0, split: str = "train") -> Sample:
    """A picture, the prompt, and a short caption."""
    lang, picture = language_of(index, pictures, seed), index % pictures
    rng = random_stream("pretrain", seed, split, index)
    conversation = _with_picture([(PROMPTS[lang], caption(sample_scene(split, picture), lang, rng))])
    return Sample(conversation, [picture], f"pretrain row {index}")


def sft_row(index: int, pictures: int, seed: int = 0, split: str = "train", noise: float = 0.0) -> Sample:
    """A description, a conversation of three to five questions, or text without a picture, in the shares of `SFT_MIX`.

    Up to two questions follow a description: a reader who has been told what is there asks on.

    The prompt for a description is the one that stage 1 answers with a caption: what stage 2 changes is the answer.
    """
    lang, picture = language_of(index, pictures, seed), index % pictures
    rng = random_stream("sft", seed, split, index)
    kind = rng.choice(list(SFT_MIX), p=list(SFT_MIX.values()))
    where = f"sft row {index} ({kind})"
    if kind == "text":
        return Sample(_text(index, rng), [], where)
    scene = sample_scene(split, picture)
    described = kind == "description"
    asked = questions(scene, lang, rng)[: rng.choice(FOLLOW_UPS if described else TURNS)]
    pairs = [(q.text, q.answer) for q in asked]
    if described:  # written last: whatever noise it has, the questions stay the same
        pairs.insert(0, (PROMPTS[lang], description(scene, lang, rng, noise)))
    return Sample(_with_picture(pairs), [picture], where)


def _text(index: int, rng: np.random.Generator) -> Conversation:
    writer = TEXT_WRITERS[rng.integers(len(TEXT_WRITERS))]
    return writer(TEXT_OFFSET + index)


def _with_picture(pairs: list[tuple[str, str]]) -> Conversation:
    """Questions and answers as turns, the picture before the first question."""
    turns = []
    for question, answer in pairs:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    turns[0]["content"] = f"{IMAGE_TOKEN}\n{turns[0]['content']}"
    return turns
