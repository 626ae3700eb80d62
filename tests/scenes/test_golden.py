"""Pixels and words of the drawn world, to the byte: the shipped weights were trained on them.

Where one of these hashes differs, the world is another one: base models, both stages and the exam must be made again.
Pixels also depend on the versions of Pillow and NumPy, which `constraints.txt` pins.
"""

import hashlib

from minivlm.scenes.corpus import listed_scene, plain_text, small_talk, translation
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.drawing.table import TABLE
from minivlm.scenes.facts import SPLITS, random_stream, sample_scene
from minivlm.scenes.language import caption, description, questions
from minivlm.scenes.vocabulary import LANGUAGES

PIXELS = "c52dd79d081cc4d3b7a84fbbdae82dc758e7a6b50afbd4f41ef128ad7371c39a"
TEXTS = "a5fa2c481c130ce9b766229b006409c1c4bfecc79855100524b0c373ebf2789d"


def test_pixels_are_those_that_the_weights_were_trained_on():
    scenes = [sample_scene(split, i) for split in ("base", "train", "exam", "holdout") for i in range(50)]
    images = [draw(scene).tobytes() for scene in (*scenes, *TABLE.values())]
    assert hashlib.sha256(b"".join(images)).hexdigest() == PIXELS


def test_texts_are_those_that_the_weights_were_trained_on():
    texts = []
    for i in range(500):
        scene = sample_scene(SPLITS[i % len(SPLITS)], i)
        texts += [plain_text(i), *(repr(write(i)) for write in (listed_scene, translation, small_talk))]
        for lang in LANGUAGES:
            rng = random_stream("golden", i, lang)
            texts += [repr(scene), caption(scene, lang, rng), description(scene, lang, rng, noise=0.5)]
            texts += [f"{question.type} {question.text} {question.answer}" for question in questions(scene, lang, rng)]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest() == TEXTS
