"""The rows of both stages in the drawn world: which picture, what is asked, what is answered.

Stage 1 pairs a picture with a short caption, as LLaVA's does with CC3M. Stage 2 mixes what LLaVA-Instruct mixes
(arXiv:2304.08485, section 3): detailed descriptions, and conversations with questions of fact and of simple reasoning;
besides, a share of rows without a picture, so that the language model does not forget its text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from minivlm.config import PROMPTS
from minivlm.data.samples import Sample
from minivlm.scenes.corpus import listed_scene, small_talk, translation
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.facts import random_stream, sample_scene
from minivlm.scenes.language import caption, description, questions
from minivlm.scenes.vocabulary import LANGUAGES

SFT_MIX = {"description": 0.40, "conversation": 0.50, "text": 0.10}
FOLLOW_UPS = (0, 1, 2)  # questions after a description
TURNS = (3, 4, 5)  # questions of one conversation
TEXT_WRITERS = (listed_scene, translation, small_talk)
TEXT_OFFSET = 20_000_000  # scenes of the text corpus that neither base training nor its exam reaches


@dataclass(frozen=True)
class SceneSamples(Sequence):
    """The samples of a stage; each is a pure function of its index and of these fields.

    The same pictures serve both stages. When all have been shown, each comes again in the other language.

    Attributes:
        stage: "pretrain" or "sft".
        pictures: how many pictures there are. Sample i shows picture number i modulo `pictures`.
        count: how many samples there are.
        seed: decides wording, and what is asked.
        split: the split of the scenes.
        noise: the share of descriptions in stage 2 with a plausible sentence that is not true.
        features: (I, N, Dv) what the encoder makes of the pictures; None: the pictures are drawn.

    Raises:
        ValueError: another stage, no picture, no sample, or fewer features than pictures.
    """

    stage: str
    pictures: int
    count: int
    seed: int = 0
    split: str = "train"
    noise: float = 0.0
    features: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        """Refuse what has no samples."""
        if self.stage not in ("pretrain", "sft"):
            raise ValueError(f"there are no scene samples for stage {self.stage!r}; choose 'pretrain' or 'sft'")
        if self.pictures < 1 or self.count < 1:
            raise ValueError(f"{self.count} samples of {self.pictures} pictures: at least one of each is needed")
        if self.features is not None and len(self.features) < self.pictures:
            raise ValueError(f"there are features of {len(self.features)} pictures, not of {self.pictures}; make all")

    def __len__(self) -> int:
        """How many samples there are."""
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`; IndexError where there is none."""
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        rng = random_stream(self.stage, self.seed, self.split, index)
        return self._pretrain(index, rng) if self.stage == "pretrain" else self._sft(index, rng)

    def language(self, index: int) -> str:
        """Languages take turns from picture to picture, and change sides whenever all pictures have been shown."""
        return LANGUAGES[(index % self.pictures + index // self.pictures + self.seed) % 2]

    def _pretrain(self, index: int, rng: np.random.Generator) -> Sample:
        """A picture, the prompt, and a short caption."""
        lang, picture = self.language(index), index % self.pictures
        text = caption(sample_scene(self.split, picture), lang, rng)
        return self._about_picture(picture, [(PROMPTS[lang], text)], f"pretrain row {index}")

    def _sft(self, index: int, rng: np.random.Generator) -> Sample:
        """A description, a conversation of three to five questions, or text alone, in the shares of `SFT_MIX`.

        Up to two questions follow a description: a reader who has been told what is there asks on. The prompt for a
        description is the one that stage 1 answers with a caption: what stage 2 changes is the answer.
        """
        lang, picture = self.language(index), index % self.pictures
        kind = rng.choice(list(SFT_MIX), p=list(SFT_MIX.values()))
        name = f"sft row {index} ({kind})"
        if kind == "text":
            writer = TEXT_WRITERS[rng.integers(len(TEXT_WRITERS))]
            return Sample(writer(TEXT_OFFSET + index), name)
        scene, described = sample_scene(self.split, picture), kind == "description"
        asked = questions(scene, lang, rng)[: rng.choice(FOLLOW_UPS if described else TURNS)]
        pairs = [(q.text, q.answer) for q in asked]
        if described:  # written last: whatever noise it has, the questions stay the same
            pairs.insert(0, (PROMPTS[lang], description(scene, lang, rng, self.noise)))
        return self._about_picture(picture, pairs, name)

    def _about_picture(self, picture: int, pairs: list[tuple[str, str]], name: str) -> Sample:
        """Questions and answers, the picture before the first question."""
        messages = []
        for question, answer in pairs:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = {"type": "text", "text": pairs[0][0]}
        if self.features is not None:
            messages[0]["content"] = [{"type": "image"}, text]
            return Sample(messages, name, self.features[picture : picture + 1])
        messages[0]["content"] = [{"type": "image", "image": draw(sample_scene(self.split, picture))}, text]
        return Sample(messages, name)
