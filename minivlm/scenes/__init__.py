"""The drawn world, the course's laboratory: images, texts and exact truth without limit, from a seed.

`facts` decides what is true of a scene, `drawing` paints it, `language` says it in English and Chinese and reads it
back, `corpus` writes text without images, and `samples` makes the chat samples of both training stages.
"""

from minivlm.scenes.corpus import listed_scene, plain_text
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.drawing.gallery import contact_sheet, draw_many
from minivlm.scenes.drawing.table import TABLE, write_table
from minivlm.scenes.facts import Scene, Thing, sample_scene
from minivlm.scenes.features import scene_features
from minivlm.scenes.language import caption, description, questions, read_facts
from minivlm.scenes.samples import SceneSamples
