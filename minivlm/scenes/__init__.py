"""The drawn world, the course's laboratory: images, texts and exact truth without limit, from a seed.

`facts` decides what is true of a scene, `drawing` paints it, `language` says it in English and Chinese and reads it
back, `corpus` writes text without images, and `samples` makes the chat samples of both training stages.
"""

from minivlm.scenes.corpus import DESCRIPTION_PROMPTS, listed_scene, plain_text, small_talk, translation
from minivlm.scenes.drawing.draw import draw, layout
from minivlm.scenes.drawing.gallery import contact_sheet, draw_many
from minivlm.scenes.drawing.table import TABLE, write_table
from minivlm.scenes.facts import COLOURS, KINDS, SETTINGS, USUAL, Scene, Thing, random_stream, sample_scene
from minivlm.scenes.features import scene_features
from minivlm.scenes.language import (
    caption,
    description,
    exists_question,
    find_things,
    in_reading_order,
    noun_phrase,
    questions,
    read_facts,
)
from minivlm.scenes.samples import SceneSamples
from minivlm.scenes.vocabulary import LANGUAGES

__all__ = [
    "COLOURS",
    "DESCRIPTION_PROMPTS",
    "KINDS",
    "LANGUAGES",
    "SETTINGS",
    "TABLE",
    "USUAL",
    "Scene",
    "SceneSamples",
    "Thing",
    "caption",
    "contact_sheet",
    "description",
    "draw",
    "draw_many",
    "exists_question",
    "find_things",
    "in_reading_order",
    "layout",
    "listed_scene",
    "noun_phrase",
    "plain_text",
    "questions",
    "random_stream",
    "read_facts",
    "sample_scene",
    "scene_features",
    "small_talk",
    "translation",
    "write_table",
]
