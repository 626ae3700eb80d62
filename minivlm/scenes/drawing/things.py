"""The sixteen kinds of things, each painted by one small function.

A painter puts shapes on a `Sketch`, from the back to the front, in coordinates of about 0 to 100 that look to the
right. `Sketch.render` does the rest: mirroring, tilt, fitting to the box, outline and light.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from minivlm.scenes.drawing.ink import INK, RGB, Sketch, Tones, mix, tones
from minivlm.scenes.facts import FLYERS

CREAM = (255, 246, 226)
SNOW = (250, 250, 248)
BLACK = (46, 43, 52)
GLASS = (196, 230, 244)
STEEL = (176, 182, 192)
WOOD = (150, 98, 58)
DARK_WOOD = (112, 70, 42)
STRAW = (222, 178, 110)
LEAF = (74, 140, 66)
DARK_LEAF = (44, 104, 56)
GOLD = (250, 204, 60)
LAMPLIGHT = (255, 224, 120)
FLAME = (255, 140, 40)
BLUSH = (244, 160, 160)
SKINS = ((250, 212, 180), (232, 180, 138), (190, 130, 90), (128, 82, 56))
HAIRS = ((58, 40, 36), (110, 66, 40), (40, 36, 44), (170, 96, 44))
TILTS = {"bird": (-14, 14), "rocket": (-14, 14), "balloon": (-5, 5), "kite": (16, 38)}  # degrees
STRETCH = 0.06  # the width varies by this share


def paint_thing(kind: str, colour: str | None, rng: np.random.Generator, pixels: int) -> Image.Image:
    """A thing on a transparent square of `pixels` x `pixels`; it fills the square's width or height.

    Kinds that stand on the ground touch the bottom; flyers are centred. Pose, proportions, direction and the
    exact tones are drawn from `rng`. `colour` is ignored by kinds that have none (see facts.COLOURLESS).
    """
    sketch = Sketch()
    palette = tones(colour or "white", rng)
    PAINTERS[kind](sketch, palette, rng)
    return sketch.render(
        pixels,
        palette.outline,
        mirror=rng.random() < 0.5,
        tilt=rng.uniform(*TILTS.get(kind, (0, 0))),
        stretch=1 + rng.uniform(-STRETCH, STRETCH),
        stand=kind not in FLYERS,
    )


def _eye(s: Sketch, x: float, y: float, radius: float = 2.6) -> None:
    s.ellipse(x, y, radius, radius * 1.1, INK)
    s.ellipse(x - radius * 0.3, y - radius * 0.4, radius * 0.35, radius * 0.35, SNOW)


def _bird(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    lift = rng.uniform(-4, 18)
    s.polygon([(46, 60), (34, 84), (42, 90), (50, 91), (58, 90), (66, 84), (54, 60)], c.dark)
    for x in (39, 46.5, 53.5, 61):
        s.stroke([(50, 62), (x, 86)], c.light, 2, 5)
    for side in (-1, 1):
        _wing(s, c, side, lift)
    s.blob([(44, 40), (50, 34), (56, 40), (59, 54), (54, 72), (46, 72), (41, 54)], c.base)
    s.blob([(45, 46), (50, 44), (52, 54), (48, 66), (44, 56)], c.light)
    for x in (46, 55):
        s.stroke([(x, 70), (x - 1, 76)], GOLD, 4, 3)
    s.blob([(55, 27), (63, 26), (68, 30), (68, 36), (63, 33), (55, 34)], GOLD)
    head = [(42, 28), (49, 22), (57, 24), (60, 32), (56, 38), (58, 44), (50, 42), (42, 44), (41, 36)]
    s.blob(head, mix(c.light, CREAM, 0.7))
    _eye(s, 54.5, 29.5, 2)


def _wing(s: Sketch, c: Tones, side: int, lift: float) -> None:
    """One spread wing: five finger feathers, a trailing row, the arm and its lit coverts."""

    def at(x: float, y: float) -> tuple[float, float]:
        return 50 + side * x, y - lift * (x / 40) ** 1.5

    for x, y, width in ((37, 66, 8), (43, 62, 7.5), (48, 55, 7), (51, 47, 6.5), (52, 39, 6)):
        s.stroke([at(26, 44), at(x, y)], c.dark, 10, width * 0.6)
    for x in (12, 18, 24, 30):
        s.ellipse(*at(x, 58), 5.5, 9, c.dark, turn=-side * 8)
    s.blob([at(2, 42), at(14, 34), at(26, 31), at(38, 34), at(42, 40), at(34, 50), at(22, 56), at(8, 60)], c.base)
    s.blob([at(4, 42), at(14, 36), at(26, 33), at(36, 36), at(28, 42), at(14, 46)], c.light)


def _dog(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    (_standing_dog if rng.random() < 0.5 else _sitting_dog)(s, c, rng.uniform(-6, 6))


def _standing_dog(s: Sketch, c: Tones, wag: float) -> None:
    s.stroke([(24, 52), (12, 44), (5 + wag, 30), (8 + wag, 18)], c.base, 9, 4)
    for x in (38, 62):
        s.stroke([(x, 66), (x + 1, 94)], c.dark, 13, 9)
    s.blob([(18, 50), (32, 45), (56, 47), (74, 42), (84, 54), (77, 73), (56, 70), (38, 75), (22, 76), (14, 62)], c.base)
    s.blob([(24, 53), (40, 48), (58, 50), (44, 54), (28, 60)], c.light)
    s.stroke([(26, 64), (21, 80), (25, 95)], c.base, 20, 10)
    s.stroke([(72, 62), (73, 95)], c.base, 15, 10)
    for x in (27, 76):
        s.ellipse(x, 96, 8, 4.4, CREAM)
    s.stroke([(70, 58), (75, 38)], c.base, 26, 20)
    _dog_head(s, c, 76, 26)


def _sitting_dog(s: Sketch, c: Tones, wag: float) -> None:
    s.stroke([(30, 90), (14, 88), (6 + wag / 2, 74), (9 + wag, 62)], c.base, 9, 4)
    s.blob([(52, 34), (68, 40), (74, 56), (70, 74), (60, 96), (28, 98), (19, 84), (26, 62), (40, 46)], c.base)
    s.blob([(62, 46), (71, 50), (72, 60), (66, 72), (60, 60)], CREAM)
    s.blob([(27, 66), (38, 52), (48, 46), (42, 58), (32, 70)], c.light)
    s.stroke([(60, 62), (62, 95)], c.dark, 12, 9)
    s.stroke([(66, 58), (69, 95)], c.base, 14, 9)
    s.ellipse(39, 80, 17, 16, c.dark)
    s.ellipse(38, 81, 16, 16, c.base)
    s.ellipse(48, 97, 11, 4, CREAM)
    s.ellipse(72, 97, 7, 3.6, CREAM)
    _dog_head(s, c, 60, 24)


def _dog_head(s: Sketch, c: Tones, x: float, y: float) -> None:
    """Long muzzle, floppy ear, collar: what a dog has and a cat has not."""
    s.stroke([(x - 12, y + 13), (x - 2, y + 18), (x + 7, y + 17)], c.outline, 5)
    s.ellipse(x - 1, y + 21, 3, 3.2, GOLD)
    s.ellipse(x, y, 16, 15, c.base)
    s.blob([(x + 6, y - 4), (x + 18, y - 1), (x + 26, y + 2), (x + 25, y + 10), (x + 12, y + 14), (x, y + 10)], c.base)
    s.ellipse(x + 14, y + 14, 3.2, 5, (236, 104, 112))
    s.blob([(x + 6, y + 5), (x + 17, y + 2), (x + 26, y + 4), (x + 24, y + 11), (x + 12, y + 14)], CREAM)
    s.ellipse(x + 25, y + 2, 4, 3.4, INK)
    _eye(s, x + 7, y - 3, 2.7)
    s.blob([(x - 6, y - 15), (x + 1, y - 11), (x, y + 4), (x - 5, y + 17), (x - 14, y + 15), (x - 15, y - 2)], c.dark)


def _cat(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    curl = rng.uniform(-6, 6)
    s.stroke([(62, 92), (82, 95), (95, 82), (90, 65 + curl), (79, 60 + curl), (76, 69 + curl)], c.base, 11, 7)
    s.stroke([(83, 61 + curl), (78, 61 + curl), (76, 69 + curl)], c.dark, 7.5)
    s.blob([(50, 36), (64, 48), (72, 66), (77, 86), (68, 98), (50, 99), (32, 98), (23, 86), (28, 66), (36, 48)], c.base)
    for y in (60, 68, 76):
        s.stroke([(73, y + 4), (64, y + 3)], c.dark, 4, 1)
        s.stroke([(27, y + 4), (36, y + 3)], c.dark, 4, 1)
    s.blob([(50, 46), (59, 54), (57, 70), (50, 76), (43, 70), (41, 54)], mix(c.light, CREAM, 0.5))
    s.stroke([(50, 72), (50, 97)], c.dark, 2)
    for x in (43, 57):
        s.ellipse(x, 96, 7.5, 4, mix(c.light, CREAM, 0.5))
    _cat_head(s, c, 50 + rng.uniform(-4, 4))


def _cat_head(s: Sketch, c: Tones, x: float) -> None:
    """Pointed ears, almond eyes, stripes, whiskers; `x` is its middle."""
    for side in (-1, 1):
        s.polygon([(x + side * 25, 28), (x + side * 24, -1), (x + side * 5, 14)], c.base)
        s.polygon([(x + side * 21, 20), (x + side * 21, 6), (x + side * 11, 14)], mix(c.dark, BLUSH, 0.5))
    s.ellipse(x, 30, 26, 20, c.base)
    s.ellipse(x - 9, 20, 10, 6, c.light, turn=-24)
    for shift in (-7, 0, 7):
        s.stroke([(x + shift, 12), (x + shift * 0.7, 20 - abs(shift) * 0.3)], c.dark, 3.4, 1.2)
    for side in (-1, 1):
        s.ellipse(x + side * 10.5, 29, 5.4, 5, (226, 240, 140), turn=side * 14)
        s.ellipse(x + side * 10, 29, 2, 4.6, INK)
        s.ellipse(x + side * 5, 40, 6, 4.6, CREAM)
        for drop in (-1, 3):
            s.stroke([(x + side * 9, 39 + drop / 2), (x + side * 24, 37 + drop * 1.6)], CREAM, 1.1)
    s.polygon([(x - 3.4, 35), (x + 3.4, 35), (x, 39)], (226, 110, 120))


def _panda(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    for x in (27, 73):
        s.ellipse(x, 13, 10.5, 10, BLACK)
    s.ellipse(50, 70, 36, 29, c.base)
    s.blob([(16, 54), (34, 46), (66, 46), (84, 54), (80, 64), (50, 60), (20, 64)], BLACK)
    s.ellipse(50, 74, 25, 20, c.light)
    for side in (-1, 1):
        s.ellipse(50 + side * 27, 88, 16, 12, BLACK, turn=-side * 20)
        s.ellipse(50 + side * 28, 90, 8, 6.5, (128, 112, 118), turn=-side * 20)
    lean = rng.uniform(-8, 8)
    if rng.random() < 0.7:
        _bamboo(s, lean)
    s.stroke([(22, 56), (24, 70), (42 - lean / 3, 72)], BLACK, 17, 14)
    s.stroke([(78, 56), (76, 66), (60 + lean / 3, 64)], BLACK, 17, 14)
    s.ellipse(50, 31, 33, 26, c.base)
    s.ellipse(40, 20, 16, 9, c.light, turn=-22)
    for side in (-1, 1):
        s.ellipse(50 + side * 14, 31, 7.5, 9.5, BLACK, turn=side * 30)
        s.ellipse(50 + side * 13, 30, 2.8, 2.8, SNOW)
        s.ellipse(50 + side * 12.4, 30.4, 1.5, 1.5, BLACK)
        s.ellipse(50 + side * 20, 43, 5, 3, (252, 206, 204))
    s.ellipse(50, 40, 5, 3.6, BLACK)
    s.stroke([(45, 46), (50, 48.5), (55, 46)], BLACK, 1.8)


def _bamboo(s: Sketch, lean: float) -> None:
    s.stroke([(40 - lean, 92), (62 + lean, 42)], LEAF, 5)
    for x, y, turn in ((68, 44, -30), (70, 54, 20), (36, 88, 150)):
        s.ellipse(x + lean, y, 9, 3.4, (104, 172, 76), turn=turn)


def _car(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    top = rng.uniform(20, 27)
    if rng.random() < 0.35:
        s.stroke([(34, top - 2), (64, top - 2)], DARK_WOOD, 2.5)
        s.polygon([(37, top - 13), (59, top - 13), (59, top - 3), (37, top - 3)], WOOD)
        s.polygon([(43, top - 13), (46, top - 13), (46, top - 3), (43, top - 3)], STRAW)
    s.blob([(19, 52), (26, top + 10), (38, top), (58, top), (71, top + 8), (84, 52), (50, 58)], c.base)
    s.blob([(28, top + 7), (38, top + 1.5), (57, top + 1.5), (52, top + 4), (38, top + 4)], c.light)
    s.polygon([(27, 46), (32, top + 9), (39, top + 6), (47, top + 6), (47, 46)], GLASS)
    s.polygon([(52, 46), (52, top + 6), (59, top + 6), (67, top + 11), (75, 46)], GLASS)
    s.polygon([(52, 46), (52, top + 16), (61, top + 6), (65, top + 9)], SNOW)
    s.blob([(2, 70), (2, 56), (9, 48), (30, 45), (74, 45), (92, 49), (98, 58), (98, 70), (88, 76), (12, 76)], c.base)
    s.polygon([(3, 66), (97, 66), (97, 72), (88, 77), (12, 77), (3, 72)], c.dark)
    s.stroke([(10, 51), (50, 48.5), (90, 51)], c.light, 4)
    s.stroke([(49.5, 49), (49.5, 70)], c.dark, 1.4)
    s.stroke([(54, 55), (60, 55)], c.dark, 2.4)
    s.ellipse(94, 58, 4.5, 5, LAMPLIGHT)
    s.ellipse(4, 58, 2.8, 4, (226, 70, 60))
    for x in (24, 76):
        s.ellipse(x, 73, 15, 15, c.dark)
        s.ellipse(x, 76, 12, 12, BLACK)
        s.ellipse(x, 76, 6, 6, STEEL)
        s.ellipse(x, 76, 2.4, 2.4, BLACK)


def _bicycle(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    turn = rng.uniform(0, 60)
    for x in (23, 77):
        _bicycle_wheel(s, c, x, turn)
    back, pedals, saddle, head, front = (23, 76), (47, 78), (38, 42), (68, 38), (77, 76)
    bars = ((back, pedals), (pedals, saddle), (back, saddle), (pedals, head), (saddle, head), (head, front))
    for fill, width in ((c.outline, 8.6), (c.base, 6)):
        for bar in bars:
            s.stroke(bar, fill, width)
    s.stroke([(38, 42), (36, 34)], STEEL, 3.5)
    s.blob([(24, 31), (36, 29), (47, 32), (36, 36), (26, 37)], DARK_WOOD)
    s.stroke([(68, 38), (66, 26), (58, 23), (54, 27)], BLACK, 4)
    s.polygon([(70, 24), (97, 24), (92, 43), (74, 43)], c.dark)
    s.polygon([(69, 22), (98, 22), (97, 28), (70, 28)], c.base)
    for x in (77, 83.5, 90):
        s.stroke([(x, 31), (x, 40)], c.light, 2)
    if rng.random() < 0.5:
        for x, fill in ((75, CREAM), (83, GOLD), (91, CREAM)):
            s.ellipse(x, 18, 5, 5, fill)
            s.ellipse(x, 18, 2, 2, FLAME)
    s.ellipse(*pedals, 5, 5, c.dark)
    s.stroke([pedals, (52, 88)], BLACK, 3)
    s.stroke([(48, 89), (57, 89)], BLACK, 3.5)


def _bicycle_wheel(s: Sketch, c: Tones, x: float, turn: float) -> None:
    """A tyre around a coloured disc, under a mudguard."""
    s.ellipse(x, 76, 23, 23, BLACK)
    s.ellipse(x, 76, 19.5, 19.5, c.base)
    for angle in np.radians((turn, turn + 60, turn + 120)):
        dx, dy = 16 * np.cos(angle), 16 * np.sin(angle)
        s.stroke([(x - dx, 76 - dy), (x + dx, 76 + dy)], c.light, 2.4)
    s.ellipse(x, 76, 5, 5, c.dark)
    arc = np.radians(np.linspace(200, 320, 6))
    s.stroke(np.stack((x + 23 * np.cos(arc), 76 + 23 * np.sin(arc)), axis=1), c.dark, 5)


def _boat(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    top = rng.uniform(0, 8)
    s.stroke([(48, top), (48, 76)], DARK_WOOD, 3.4)
    s.polygon([(48, top - 2), (34, top + 3), (48, top + 8)], c.dark)
    main = [(51, top + 6), (62, 22), (76, 44), (84, 66), (51, 67)]
    s.polygon(main, c.base)
    s.polygon([(51, 34), (69, 33), (76, 44), (79, 52), (51, 53)], c.light)
    s.polygon([(45, top + 12), (36, 28), (24, 50), (12, 66), (45, 67)], c.light)
    s.polygon([(45, top + 12), (41, 34), (38, 66), (45, 67)], c.base)
    s.stroke([(12, 69), (86, 69)], DARK_WOOD, 2.4)
    s.blob([(0, 73), (24, 76), (76, 76), (100, 71), (93, 86), (80, 98), (20, 98), (8, 88)], c.base)
    s.blob([(10, 90), (50, 92), (91, 89), (80, 98), (20, 98)], c.dark)
    s.stroke([(3, 75), (28, 78), (74, 78), (97, 74)], CREAM, 3)
    for x in (30, 50, 70):
        s.ellipse(x, 85, 3.4, 3.4, CREAM)
        s.ellipse(x, 85, 2.1, 2.1, c.outline)


def _rocket(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    tail = rng.uniform(102, 110)
    s.blob([(40, 80), (60, 80), (61, 90), (50, tail), (39, 90)], FLAME)
    s.blob([(45, 80), (55, 80), (55, 89), (50, tail - 8), (45, 89)], LAMPLIGHT)
    s.polygon([(41, 74), (59, 74), (63, 83), (37, 83)], INK)
    for side in (-1, 1):
        fin = [(14, 50), (26, 60), (34, 76), (35, 93), (26, 84), (12, 78)]
        s.blob([(50 + side * x, y) for x, y in fin], c.dark)
    s.blob([(50, 0), (63, 13), (71, 34), (70, 56), (62, 78), (38, 78), (30, 56), (29, 34), (37, 13)], c.base)
    s.blob([(41, 16), (36, 32), (36, 54), (41, 70), (44, 50), (43, 30)], c.light)
    s.blob([(62, 18), (70, 36), (69, 56), (62, 77), (59, 76), (64, 54), (64, 34)], c.dark)
    s.blob([(50, 0), (57, 5), (65, 18), (50, 22), (35, 18), (43, 5)], c.dark)
    s.ellipse(50, 39, 12.5, 12.5, CREAM)
    s.ellipse(50, 39, 9, 9, (72, 140, 190))
    s.ellipse(47, 36, 4, 2.6, SNOW, turn=-40)
    s.stroke([(33, 62), (50, 65), (67, 62)], c.light, 4)
    s.stroke([(50, 68), (50, 88)], c.dark, 7, 4)


def _balloon(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    sag = rng.uniform(-3, 3)
    for x in (41, 59):
        s.stroke([(x, 76), (50 + (x - 50) * 0.75, 92)], INK, 1.6)
    half = np.array([(0, 0), (20, 3), (35, 15), (40, 33), (34 + sag / 2, 50 + sag), (20, 66), (9, 79)], dtype=float)
    stripes = (c.base, c.light, c.base, c.light) if rng.random() < 0.5 else (c.dark, c.base, c.light, c.base)
    for share, fill in zip((1, 0.76, 0.48, 0.17), stripes, strict=True):
        right, left = half * (share, 1) + (50, 0), half[:0:-1] * (-share, 1) + (50, 0)
        s.blob(np.concatenate((right, left)), fill)
    s.polygon([(41, 76), (59, 76), (57, 81), (43, 81)], c.dark)
    s.polygon([(40, 90), (60, 90), (57, 104), (43, 104)], WOOD)
    s.stroke([(40, 90.5), (60, 90.5)], STRAW, 3.4)
    s.stroke([(43, 97), (57, 97)], DARK_WOOD, 1.6)


def _kite(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    wave = rng.uniform(5, 9) * rng.choice((-1, 1))
    tail = [(50, 78), (50 + wave, 89), (50 - wave, 103), (50 + wave, 117)]
    s.stroke(tail, c.outline, 2)
    for (x, y), fill in zip(tail[1:], (c.dark, c.base, c.dark), strict=True):
        for side in (-1, 1):
            s.polygon([(x, y), (x + side * 9, y - 5), (x + side * 9, y + 5)], fill)
    top, right, bottom, left, middle = (50, -2), (88, 33), (50, 82), (12, 33), (50, 33)
    quarters = ((top, left, c.light), (top, right, c.base), (bottom, left, c.base), (bottom, right, c.dark))
    for end, side, fill in quarters:
        s.polygon([end, side, middle], fill)
    s.stroke([top, bottom], CREAM, 2)
    s.stroke([left, right], CREAM, 2)


def _tree(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    (_fir if rng.random() < 0.4 else _round_tree)(s, c, rng)


def _round_tree(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    s.stroke([(50, 50), (49, 76), (50, 98)], WOOD, 9, 14)
    s.stroke([(51, 74), (62, 58)], WOOD, 6, 4)
    s.stroke([(53, 60), (54, 98)], DARK_WOOD, 3, 4)
    crown = np.array([(28, 44, 22), (72, 44, 22), (50, 26, 26), (38, 56, 17), (62, 56, 18), (50, 44, 24)])
    crown = crown + rng.uniform(-2.5, 2.5, crown.shape)
    for x, y, radius in crown:
        s.ellipse(x, y, radius, radius, c.dark)
    for x, y, radius in crown:
        s.ellipse(x - 2, y - 3, radius - 3, radius - 3, c.base)
    for x, y, radius in crown[:3]:
        s.ellipse(x - radius * 0.3, y - radius * 0.4, radius * 0.5, radius * 0.4, c.light, turn=-20)
    for x, y in rng.uniform((22, 30), (76, 62), (7, 2)):
        s.ellipse(x, y, 2.6, 1.8, c.light, turn=-30)


def _fir(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    s.stroke([(50, 80), (50, 98)], WOOD, 11, 13)
    s.stroke([(54, 84), (54, 98)], DARK_WOOD, 4)
    width = rng.uniform(34, 40)
    for top, bottom, share in ((48, 88, 1), (24, 66, 0.8), (0, 42, 0.58)):
        reach = width * share
        left, right = 50 - reach, 50 + reach
        hem = [(left, bottom - 2), (50 - reach / 2, bottom + 2), (50, bottom - 1), (50 + reach / 2, bottom + 2)]
        s.polygon([(50, top), *hem, (right, bottom - 2)], c.dark)
        s.polygon([(50, top), (left, bottom - 2), (50 - reach / 2, bottom - 2), (50 + reach * 0.6, bottom - 5)], c.base)
        s.polygon([(49, top + 4), (50 - reach * 0.8, bottom - 6), (50 - reach * 0.3, bottom - 10)], c.light)


def _flower(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    bend = rng.uniform(-5, 5)
    s.stroke([(50, 34), (50 + bend, 70), (50, 99)], DARK_LEAF, 5, 6)
    s.blob([(50, 92), (40, 78), (22, 70), (14, 72), (22, 84), (38, 92)], LEAF)
    s.blob([(50, 96), (60, 84), (76, 78), (86, 82), (76, 92), (60, 97)], DARK_LEAF)
    count = int(rng.integers(6, 10))
    start = rng.uniform(0, 360)
    for layer, (fill, reach) in enumerate(((c.dark, 21), (c.base, 19))):
        for petal in range(count):
            turn = start + 360 / count * (petal + layer / 2)
            dx, dy = np.cos(np.radians(turn)), np.sin(np.radians(turn))
            s.ellipse(50 + reach * dx, 34 + reach * dy, 15, 62 / count, fill, turn=turn)
            if layer:
                s.ellipse(50 + reach * dx, 34 + reach * dy, 8, 18 / count, c.light, turn=turn)
    warm = c.word in ("yellow", "orange")
    s.ellipse(50, 34, 11, 11, DARK_WOOD if warm else (232, 160, 40))
    s.ellipse(48.5, 32.5, 8, 8, WOOD if warm else GOLD)


def _house(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    (_gable_house if rng.random() < 0.5 else _long_house)(s, c, rng.uniform(-3, 3))


def _gable_house(s: Sketch, c: Tones, shift: float) -> None:
    s.polygon([(68, 8), (80, 8), (80, 44), (68, 34)], c.dark)
    s.polygon([(66, 5), (82, 5), (82, 11), (66, 11)], STEEL)
    s.polygon([(14, 99), (14, 46), (50, 12), (86, 46), (86, 99)], c.base)
    s.polygon([(76, 99), (76, 36), (86, 46), (86, 99)], c.dark)
    for y in (58, 72, 86):
        s.stroke([(16, y), (74, y)], c.light, 1.6)
    s.polygon([(50, 2), (99, 48), (92, 57), (50, 18), (8, 57), (1, 48)], c.dark)
    s.polygon([(50, 2), (50, 9), (5, 52), (1, 48)], c.light)
    s.ellipse(50, 40, 7.5, 7.5, CREAM)
    s.ellipse(50, 40, 5.4, 5.4, LAMPLIGHT)
    _window(s, 24, 70, 7.5)
    _window(s, 66, 70, 7.5)
    _door(s, 45 + shift / 4, 18)


def _long_house(s: Sketch, c: Tones, shift: float) -> None:
    x = 68 + shift
    s.polygon([(x, 4), (x + 12, 4), (x + 12, 30), (x, 30)], c.base)
    s.polygon([(x - 2, 2), (x + 14, 2), (x + 14, 8), (x - 2, 8)], STEEL)
    s.polygon([(8, 44), (92, 44), (92, 94), (8, 94)], c.base)
    s.polygon([(8, 48), (92, 48), (92, 55), (8, 55)], mix(c.base, c.dark, 0.6))
    s.polygon([(18, 14), (82, 14), (100, 50), (0, 50)], c.dark)
    s.polygon([(18, 14), (30, 14), (16, 50), (0, 50)], c.base)
    for y in (26, 38):
        reach = 32 + (y - 14) / 2
        s.stroke([(50 - reach + 3, y), (50 + reach - 3, y)], c.base, 1.8)
    _window(s, 24, 70)
    _window(s, 76, 70)
    _door(s, 50, 22, 94)


def _window(s: Sketch, x: float, y: float, half: float = 9) -> None:
    """A lit window of four panes."""
    s.polygon([(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)], CREAM)
    pane = half / 3
    for left in (x - 2.3 * pane, x + 0.3 * pane):
        for top in (y - 2.3 * pane, y + 0.3 * pane):
            right, low = left + 2 * pane, top + 2 * pane
            s.polygon([(left, top), (right, top), (right, low), (left, low)], LAMPLIGHT)


def _door(s: Sketch, x: float, width: float, floor: float = 99) -> None:
    half = width / 2
    s.polygon([(x - half - 2, floor), (x - half - 2, 64), (x + half + 2, 64), (x + half + 2, floor)], CREAM)
    s.polygon([(x - half, floor), (x - half, 67), (x + half, 67), (x + half, floor)], WOOD)
    s.polygon([(x, floor), (x, 67), (x + half, 67), (x + half, floor)], DARK_WOOD)
    s.ellipse(x + half - 4, 84, 1.8, 1.8, GOLD)


def _astronaut(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    wave = rng.uniform(-6, 8)
    s.blob([(26, 40), (74, 40), (76, 56), (74, 74), (26, 74), (24, 56)], c.dark)
    for side in (-1, 1):
        s.stroke([(50 + side * 9, 68), (50 + side * 11, 92)], c.base, 20, 17)
        s.stroke([(50 + side * 7, 72), (50 + side * 8, 88)], c.light if side < 0 else c.base, 5, 4)
        s.ellipse(50 + side * 13, 95, 11, 5.5, c.dark)
    s.stroke([(32, 48), (18, 58), (15, 72)], c.base, 16, 13)
    s.ellipse(15, 76, 7.5, 7, c.light)
    s.stroke([(68, 48), (84, 42), (88 + wave / 2, 24 - wave / 2)], c.base, 16, 13)
    s.ellipse(89 + wave / 2, 18 - wave / 2, 7.5, 7, c.light)
    s.blob([(30, 42), (50, 38), (70, 42), (73, 58), (68, 76), (50, 79), (32, 76), (27, 58)], c.base)
    s.polygon([(38, 51), (62, 51), (62, 64), (38, 64)], CREAM)
    for x, fill in ((43.5, (226, 70, 60)), (50, (72, 140, 200)), (56.5, GOLD)):
        s.ellipse(x, 57.5, 2.5, 2.5, fill)
    s.stroke([(33, 72), (50, 74), (67, 72)], c.dark, 4)
    s.ellipse(50, 22, 25, 23, c.base)
    s.ellipse(45, 16, 17, 14, c.light)
    s.ellipse(50, 24, 18.5, 15.5, c.dark)
    s.ellipse(50, 24, 16.5, 13.5, (36, 40, 72))
    s.ellipse(43, 18, 6.5, 3, (150, 190, 230), turn=-28)
    s.ellipse(60, 31, 2.6, 2, (92, 120, 170))


def _reader(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    skin = SKINS[rng.integers(len(SKINS))]
    _bench(s)
    s.stroke([(66, 80), (65, 94)], BLACK, 9)
    s.stroke([(72, 80), (72, 94)], (84, 84, 106), 9)
    s.ellipse(69, 96.5, 7, 3.8, BLACK)
    s.ellipse(76, 96.5, 8, 3.8, BLACK)
    s.stroke([(42, 73), (68, 73)], c.dark, 23, 21)
    s.stroke([(69, 74), (70, 84)], c.dark, 20, 22)
    s.stroke([(42, 69), (65, 70)], c.base, 23, 19)
    s.stroke([(66, 73), (67, 84)], c.base, 17, 19)
    s.blob([(34, 34), (50, 31), (60, 39), (62, 58), (60, 78), (26, 80), (22, 62), (26, 44)], c.base)
    s.blob([(31, 40), (38, 36), (36, 54), (31, 74), (26, 62)], c.light)
    _reader_head(s, c, rng, skin)
    s.stroke([(41, 45), (45, 63), (66, 61)], c.dark, 16, 12)
    s.stroke([(41, 44), (44, 61), (65, 59)], c.base, 14, 11)
    s.ellipse(68, 58, 4.5, 4.5, skin)
    _book(s)


def _bench(s: Sketch) -> None:
    for x in (14, 84):
        s.stroke([(x, 44), (x, 76)], BLACK, 3.2)
        s.stroke([(x, 76), (x, 98)], BLACK, 4)
    for y in (47, 57):
        s.stroke([(9, y), (88, y)], WOOD, 5.5)
    s.stroke([(7, 77.5), (90, 77.5)], DARK_WOOD, 5)
    s.stroke([(7, 75.5), (90, 75.5)], WOOD, 4)


def _book(s: Sketch) -> None:
    """An open book, its pages turned to whoever looks at the picture."""
    s.polygon([(64, 39), (77, 44), (92, 38), (92, 54), (78, 61), (64, 55)], (116, 60, 52))
    s.polygon([(65, 38), (78, 43), (78, 58), (65, 52)], SNOW)
    s.polygon([(78, 43), (90, 37), (90, 51), (78, 58)], (236, 226, 204))
    for y in (43, 48):
        s.stroke([(68, y), (75, y + 3)], STEEL, 1.3)
        s.stroke([(81, y + 3), (87, y)], STEEL, 1.3)


def _reader_head(s: Sketch, c: Tones, rng: np.random.Generator, skin: RGB) -> None:
    """White hair in a bun, or a white beard and a flat cap; always spectacles."""
    s.stroke([(36, 36), (46, 39), (54, 37)], c.light, 6)
    bearded = rng.random() < 0.5
    if not bearded:
        s.ellipse(33, 9, 7.5, 7, (226, 228, 234))
    s.ellipse(43, 18, 14, 14, SNOW)
    s.ellipse(50, 22, 13, 13, skin)
    s.ellipse(63, 24, 3.6, 3, skin)
    if bearded:
        s.blob([(40, 26), (49, 30), (60, 29), (61, 36), (53, 43), (43, 37)], SNOW)
    s.blob([(32, 22), (33, 8), (46, 2), (58, 7), (50, 11), (41, 16), (39, 29), (35, 30)], SNOW)
    s.ellipse(56, 20, 4.4, 4.4, INK)
    s.ellipse(56, 20, 3.2, 3.2, mix(skin, SNOW, 0.55))
    s.ellipse(57, 20.5, 1.3, 1.5, INK)
    s.stroke([(43, 19), (52, 20)], INK, 1.3)


def _dancer(s: Sketch, c: Tones, rng: np.random.Generator) -> None:
    skin, hair = SKINS[rng.integers(len(SKINS))], HAIRS[rng.integers(len(HAIRS))]
    swing = rng.uniform(-5, 5)
    if rng.random() < 0.5:
        legs = [[(58, 66), (80, 84), (103, 80)], [(44, 68), (26, 88), (2, 98)]]
    else:
        legs = [[(54, 66), (69, 88), (53, 97)], [(49, 66), (49, 90), (49, 110)]]
    for leg in legs:
        s.stroke(leg, skin, 8, 4)
        s.stroke([(np.array(leg[1]) + 2 * np.array(leg[2])) / 3, leg[2]], c.dark, 5, 3.4)
    for arm in ([(46, 30), (33, 20), (30 + swing, 2)], [(54, 30), (67, 20), (72 + swing, 3)]):
        s.stroke(arm, skin, 6, 3.4)
    _skirt(s, c, swing)
    s.blob([(43, 28), (50, 31), (57, 28), (58, 38), (55, 50), (45, 50), (42, 38)], c.base)
    s.blob([(44, 30), (48, 32), (47, 48), (44, 40)], c.light)
    s.stroke([(44, 49), (56, 49)], c.dark, 4)
    s.stroke([(50, 28), (50, 22)], skin, 5)
    s.ellipse(43, 8, 5.5, 5.5, hair)
    s.ellipse(49, 15, 9, 9.5, hair)
    s.ellipse(52, 17, 7, 7.5, skin)
    s.blob([(43, 18), (44, 8), (52, 6), (59, 12), (52, 12), (46, 17)], hair)


def _skirt(s: Sketch, c: Tones, swing: float) -> None:
    """A wide flying skirt, its folds fanning out from the waist."""
    hem = [(12, 56), (3, 68), (14, 76), (28, 74), (40, 82), (54, 77), (68, 82), (80, 74), (96, 73), (97, 60), (84, 52)]
    hem = [(x, y - swing * (x - 50) / 50) for x, y in hem]
    s.blob([(45, 46), (30, 49), *hem, (66, 49), (55, 46)], c.base)
    for inner, outer, fill in ((2, 3, c.dark), (4, 5, c.light), (6, 7, c.dark), (8, 9, c.light), (0, 1, c.light)):
        s.blob([(50, 48), hem[inner], hem[outer], (50, 48)], fill)


PAINTERS: dict[str, Callable[[Sketch, Tones, np.random.Generator], None]] = {
    "bird": _bird,
    "dog": _dog,
    "cat": _cat,
    "panda": _panda,
    "car": _car,
    "bicycle": _bicycle,
    "boat": _boat,
    "rocket": _rocket,
    "balloon": _balloon,
    "kite": _kite,
    "tree": _tree,
    "flower": _flower,
    "house": _house,
    "astronaut": _astronaut,
    "reader": _reader,
    "dancer": _dancer,
}
