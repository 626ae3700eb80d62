"""From facts to a picture: where each thing stands, and putting setting and things together.

Everything that is not a fact (exact position, size within its class, pose, light, the shapes of clouds and
hills) is jitter, seeded by `scene.seed`: one scene is one picture, and no two scenes look alike.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from minivlm.scenes.drawing.settings import GROUND, paint_setting
from minivlm.scenes.drawing.things import paint_thing
from minivlm.scenes.facts import FLYERS, WIDTHS, Scene, Thing, random_stream

SIZE = 224  # pixels; CLIP-ViT-B/16 reads this size as it is
SUPERSAMPLE = 2  # everything is painted at twice the size and averaged down: smooth edges
LAYOUT_TRIES = 24
_CENTRES = {"left": 0.19, "middle": 0.5, "right": 0.81}
_MARGIN = 0.015  # of the picture, kept free at its borders

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the picture's side


def layout(scene: Scene) -> tuple[Box, ...]:
    """The square box of each thing, in the order of `scene.things`.

    The box's side is the thing's longer side. Of `LAYOUT_TRIES` random arrangements that respect place,
    distance and size, the one with the least overlap is taken.
    """
    rng = random_stream("layout", scene.seed)
    tries = [tuple(_place(thing, scene.setting, rng) for thing in scene.things) for _ in range(LAYOUT_TRIES)]
    return min(tries, key=_overlap)


def draw(scene: Scene, size: int = SIZE) -> Image.Image:
    """Paint a scene as an RGB picture of `size` x `size` pixels; far things first, so near ones cover them."""
    rng = random_stream("drawing", scene.seed)
    canvas = size * SUPERSAMPLE
    picture = paint_setting(scene.setting, rng, canvas)
    boxes = layout(scene)
    for index in sorted(range(len(boxes)), key=lambda i: (scene.things[i].distance == "near", boxes[i][3])):
        thing, (left, top, right, _) = scene.things[index], boxes[index]
        sprite = paint_thing(thing.kind, thing.colour, rng, max(8, round((right - left) * canvas)))
        if thing.kind not in FLYERS:
            _rest(picture, scene.setting, boxes[index], canvas)
        picture.paste(sprite, (round(left * canvas), round(top * canvas)), sprite)
    return picture.resize((size, size), Image.Resampling.BOX)


def _place(thing: Thing, setting: str, rng: np.random.Generator) -> Box:
    side = rng.uniform(*WIDTHS[thing.size])
    x = _CENTRES[thing.place] + rng.uniform(-0.03, 0.03)
    x = float(np.clip(x, side / 2 + _MARGIN, 1 - side / 2 - _MARGIN))
    near = thing.distance == "near"
    horizon = GROUND[setting]
    if horizon is None:  # nothing to stand on: anywhere, far things higher up
        y = rng.uniform(0.5, 0.8) if near else rng.uniform(0.12, 0.36)
    elif thing.kind in FLYERS:
        y = rng.uniform(0.2, 0.62) if near else rng.uniform(0.1, horizon - 0.05)
    else:
        y = (rng.uniform(0.86, 0.97) if near else horizon + rng.uniform(0.02, 0.09)) - side / 2
    y = float(np.clip(y, side / 2 + _MARGIN, 1 - side / 2 - _MARGIN))
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


def _overlap(boxes: tuple[Box, ...]) -> float:
    """Sum over pairs of the overlap as a share of the smaller box."""
    total = 0.0
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            width = min(a[2], b[2]) - max(a[0], b[0])
            height = min(a[3], b[3]) - max(a[1], b[1])
            if width > 0 and height > 0:
                total += width * height / min(a[2] - a[0], b[2] - b[0]) ** 2
    return total


def _rest(picture: Image.Image, setting: str, box: Box, canvas: int) -> None:
    """What a standing thing rests on: its shadow on the ground, a small cloud in the sky, nothing in space."""
    if setting == "space":
        return
    left, _, right, bottom = (edge * canvas for edge in box)
    width = right - left
    patch = Image.new("L", (round(width * 1.3), round(width * 0.36)), 0)
    pen = ImageDraw.Draw(patch)
    w, h = patch.size
    if setting == "sky":
        for cx, cy, r in ((0.25, 0.6, 0.3), (0.5, 0.45, 0.42), (0.75, 0.6, 0.3)):
            pen.ellipse((w * cx - h * r * 1.6, h * cy - h * r, w * cx + h * r * 1.6, h * cy + h * r), fill=235)
        colour = (252, 253, 255)
    else:
        pen.ellipse((w * 0.12, h * 0.25, w * 0.88, h * 0.75), fill=90)
        colour = (20, 24, 40)
    patch = patch.filter(ImageFilter.BoxBlur(max(1, h // 9)))
    corner = (round((left + right) / 2 - w / 2), round(bottom - h * (0.62 if setting == "sky" else 0.56)))
    picture.paste(colour, (*corner, corner[0] + w, corner[1] + h), patch)
