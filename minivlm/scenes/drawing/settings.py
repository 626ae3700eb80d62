"""The ten settings, painted: calm, slightly greyed backgrounds that leave the strong colours to the things.

Each setting has its own palette and composition, so that it is told at a glance; within a setting the hour,
the light, the lie of the land and every small mark come from `rng`. Coordinates are shares of the picture's
side, (0, 0) at the top left. Light falls from the upper left unless a sun is in the picture.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from minivlm.scenes.drawing.board import Board, Colour, cloud, down_to, ridge, shifted, streak, treetops, tufts
from minivlm.scenes.drawing.ink import mix, smooth

# Height of the horizon as a share of the picture, from the top: far things stand just below it.
GROUND: dict[str, float | None] = {
    "beach": 0.46,
    "sky": None,
    "street": 0.52,
    "space": None,
    "park": 0.48,
    "grassland": 0.46,
    "waterfall": 0.55,
    "snow": 0.50,
    "lake": 0.47,
    "desert": 0.49,
}

_WALLS: Sequence[Colour] = ((52, 54, 92), (86, 62, 84), (58, 76, 96), (78, 66, 100), (92, 74, 78))
_WORLDS: Sequence[Colour] = ((150, 132, 124), (120, 128, 148), (134, 116, 142), (116, 136, 136))

# Outlines for `Board.stamp`, around their own origin.
_STAR = ((0, -1), (1, 0), (0, 1), (-1, 0))
_SPARKLE = ((0, -1), (0.13, -0.13), (1, 0), (0.13, 0.13), (0, 1), (-0.13, 0.13), (-1, 0), (-0.13, -0.13))
_FLAKE = ((-1, -0.4), (0, -1), (1, -0.4), (1, 0.4), (0, 1), (-1, 0.4))
_SCREE = ((-1.7, 0), (-1, -0.35), (1, -0.35), (1.7, 0))
_MESA = ((-1, -0.35), (-0.9, -1), (0.86, -0.96), (1, -0.35))
_MESA_SHADE = ((0.35, -0.35), (0.42, -0.98), (0.86, -0.96), (1, -0.35))
_MESA_STRATUM = ((-0.93, -0.8), (0.9, -0.78), (0.92, -0.7), (-0.95, -0.72))


def paint_setting(setting: str, rng: np.random.Generator, pixels: int) -> Image.Image:
    """Paint one of `facts.SETTINGS` as an RGB picture of `pixels` x `pixels`, without any things in it.

    Raises ValueError for a setting that does not exist.
    """
    if setting not in _PAINTERS:
        raise ValueError(f"unknown setting {setting!r}; choose one of {', '.join(_PAINTERS)}")
    board = Board(rng, pixels)
    _PAINTERS[setting](board)
    board.grain()
    return board.image


def _paint_beach(board: Board) -> None:
    ground, hour = GROUND["beach"], board.rng.random()
    low = mix((250, 216, 164), (242, 190, 158), hour)
    middle = mix((236, 182, 150), (206, 148, 158), hour)
    board.wash(0, ground, ((0, mix((146, 152, 182), (112, 104, 150), hour)), (0.45, middle), (1, low)))
    sun, height, radius = board.between(0.14, 0.86), ground - board.between(-0.01, 0.06), board.between(0.055, 0.08)
    board.glow(sun, height, 0.42, (255, 226, 168), 0.75)
    for _ in range(int(board.rng.integers(4, 8))):
        y = board.between(0.05, ground - 0.08)
        colour = mix(mix(middle, (255, 224, 196), 0.55), (158, 120, 148), board.between(0, 0.6))
        board.lens(board.between(0, 1), y, board.between(0.14, 0.34), board.between(0.007, 0.017), colour)
    board.disc(sun, height, radius, (255, 240, 204))
    _headland(board, ground, sun)
    sea = mix((128, 158, 162), (110, 130, 150), hour)
    board.wash(ground, 0.9, ((0, mix(low, sea, 0.45)), (0.22, sea), (1, mix(sea, (70, 112, 126), 0.55))))
    for _ in range(16):
        depth = board.rng.random()
        colour = mix(sea, low if board.chance(0.5) else (76, 104, 124), 0.35)
        y = ground + 0.015 + 0.3 * depth
        board.lens(board.between(0, 1), y, 0.03 + 0.1 * depth, 0.0015 + 0.004 * depth, colour)
    for depth in np.linspace(0.01, 1, 30).tolist():
        x = sun + board.between(-1, 1) * (0.03 + 0.075 * depth)
        reach = board.between(0.02, 0.045 + 0.04 * depth)
        board.lens(x, ground + 0.3 * depth, reach, 0.002 + 0.004 * depth, (255, 232, 190))
    _shore(board, hour)


def _headland(board: Board, ground: float, sun: float) -> None:
    """A far spit of land on the side away from the sun."""
    reach, rise = board.between(0.24, 0.42), board.between(0.04, 0.09)
    line = [(0, -rise), (0.25, -rise * 0.95), (0.5, -rise * 0.5), (0.72, -rise * 0.42), (1, 0.004)]
    for share, colour in ((1.0, (168, 134, 150)), (0.62, (134, 112, 138))):
        points = [(reach * share * t, ground + dy * (0.6 + 0.55 * share)) for t, dy in line]
        points = [(-0.02, ground + 0.004), *points]
        board.shape(points if sun > 0.5 else [(1 - x, y) for x, y in points], colour)


def _shore(board: Board, hour: float) -> None:
    """Foam, wet sand and dry sand, the waterline aslant."""
    sand = mix((230, 204, 166), (214, 184, 160), hour)
    slope, line = board.between(-0.05, 0.05), ridge(board, 0.76, 0.022, 1.4)
    line = [(x, y + slope * (x - 0.5)) for x, y in line]
    board.veil(down_to(shifted(line, 0.03, -0.035), 0.9), (236, 232, 220), 0.35)
    board.shape(down_to(shifted(line, 0, -0.012), 1.02), (246, 238, 224))
    board.shape(down_to(line, 1.02), mix(sand, (136, 116, 116), 0.42))
    dry = [(x, y + slope * (x - 0.5)) for x, y in ridge(board, 0.8, 0.012, 1.1)]
    board.graded(down_to(dry, 1.02), ((0, sand), (1, mix(sand, (176, 140, 120), 0.3))))
    for _ in range(7):
        y = board.between(0.85, 0.99)
        board.lens(board.between(0, 1), y, board.between(0.06, 0.16), 0.004, mix(sand, (170, 136, 116), 0.3))
    for _ in range(9):
        colour = mix(sand, (110, 92, 96) if board.chance(0.6) else (250, 240, 226), 0.6)
        board.disc(board.between(0, 1), board.between(0.84, 0.99), board.between(0.003, 0.007), colour, 0.0035)


def _paint_sky(board: Board) -> None:
    hour = board.rng.random()
    top = mix((104, 158, 206), (126, 150, 204), hour)
    low = mix((206, 228, 236), (244, 224, 212), hour)
    board.wash(0, 1, ((0, top), (0.6, mix(top, low, 0.62)), (1, low)))
    if board.chance(0.5):
        board.glow(board.between(0, 1), -0.02, 0.34, (255, 246, 222), 0.75)
    lit, shade = mix((246, 248, 250), (255, 244, 232), hour), mix((178, 202, 226), (204, 194, 220), hour)
    for _ in range(int(board.rng.integers(1, 4))):
        y = board.between(0.03, 0.3)
        board.veil(streak(board.between(0, 1), y, board.between(0.2, 0.4)), lit, 0.4, 0.006)
    side = board.side()
    for k, depth in enumerate(np.linspace(0.1, 1, int(board.rng.integers(4, 6))).tolist()):
        far = mix(low, top, 0.25)
        x = 0.5 + side * (-1) ** k * board.between(0.1, 0.46)
        base, width = 0.28 + 0.6 * depth + board.between(-0.06, 0.06), (0.22 + 0.4 * depth) * board.between(0.85, 1.2)
        cloud(board, x, base, width, mix(lit, far, 0.35 * (1 - depth)), mix(shade, far, 0.5 * (1 - depth)))
    if board.chance(0.6):
        cloud(board, 0.5 + 0.4 * board.side(), 1.1, board.between(0.7, 0.9), lit, shade)


def _paint_street(board: Board) -> None:
    ground, hour = GROUND["street"], board.rng.random()
    top, low = mix((28, 32, 62), (40, 34, 72), hour), mix((70, 78, 118), (112, 84, 118), hour)
    board.wash(0, ground + 0.02, ((0, top), (1, low)))
    for x, y in board.rng.random((14, 2)).tolist():
        board.disc(x, y * 0.3, 0.0022 + 0.002 * y, (196, 200, 214))
    moon, height = board.between(0.36, 0.64), board.between(0.09, 0.2)
    board.glow(moon, height, 0.18, (178, 184, 206), 0.5)
    _moon(board, moon, height)
    _blocks(board, 0.0, 1.0, ground + 0.01, (0.1, 0.24), mix(top, low, 0.62), 0.25)
    _blocks(board, -0.03, board.between(0.3, 0.36), ground + 0.02, (0.24, 0.42), mix(top, low, 0.3), 0.45)
    _blocks(board, board.between(0.64, 0.7), 1.03, ground + 0.02, (0.24, 0.42), mix(top, low, 0.3), 0.45)
    board.glow(0.5, ground, 0.34, (216, 166, 122), 0.45, 0.12)
    _shop_fronts(board, ground + 0.02)
    _road(board, ground, top)
    _lamps(board, ground)


def _moon(board: Board, cx: float, cy: float) -> None:
    """A moon of any phase between crescent and full."""
    t, phase, side = np.linspace(-np.pi / 2, np.pi / 2, 14), board.between(-0.55, 1), board.side()
    tilt = board.between(-0.5, 0.5)
    x = 0.042 * side * np.concatenate([np.cos(t), -phase * np.cos(t[::-1])])
    y = 0.042 * np.concatenate([np.sin(t), np.sin(t[::-1])])
    x, y = x * np.cos(tilt) - y * np.sin(tilt) + cx, x * np.sin(tilt) + y * np.cos(tilt) + cy
    board.shape(list(zip(x.tolist(), y.tolist(), strict=True)), (238, 230, 202))


def _blocks(board: Board, left: float, right: float, base: float, rise: tuple, colour: Colour, lit: float) -> None:
    """A row of flat-roofed town buildings between `left` and `right`, a share `lit` of their windows lit."""
    x = left
    while x < right - 0.03:
        width = min(right - x, board.between(0.09, 0.16))
        top = base - board.between(*rise)
        hue = board.pick(_WALLS)
        wall = mix(mix(colour, hue, 0.45), (18, 20, 44), board.between(0, 0.25))
        board.bar(x, top, x + width, base, wall)
        board.bar(x + width * 0.78, top, x + width, base, mix(wall, (10, 12, 32), 0.3))
        if board.chance(0.4):  # a water tank or lift house on the roof
            board.bar(x + width * 0.3, top - 0.02, x + width * 0.6, top, wall)
        _windows(board, (x, top, width, base), wall, lit)
        x += width + 0.002


def _windows(board: Board, block: tuple, wall: Colour, lit: float) -> None:
    x, top, width, base = block
    columns, rows = max(2, round(width / 0.034)), max(2, int((base - top) / 0.04))
    w, h = width / columns, (base - top) / rows
    bright = board.rng.random((rows, columns))
    dark, warm, amber = mix(wall, (96, 108, 146), 0.28), (232, 194, 122), (214, 158, 104)
    for row, column in np.ndindex(rows, columns):
        left, upper, dim = x + w * (column + 0.24), top + h * (row + 0.26), bright[row, column]
        colour = dark if dim > lit else warm if dim > lit * 0.4 else amber
        board.bar(left, upper, left + w * 0.52, upper + h * 0.5, colour)


def _shop_fronts(board: Board, base: float) -> None:
    """The lit ground floors on both sides of the street, under dull awnings."""
    for side in (-1, 1):
        x, end = 0.5, 0.2
        while x > end:
            width = board.between(0.07, 0.12)
            a, b = 0.5 + side * (x - width + 0.006), 0.5 + side * (x - 0.004)
            cloth = mix(board.pick(_WALLS), (190, 160, 150), 0.35)
            board.bar(a, base - 0.05, b, base, (44, 40, 64))
            glass = mix((236, 196, 132), (206, 150, 112), board.rng.random())
            inset = (b - a) * 0.14
            board.bar(a + inset, base - 0.04, b - inset, base - 0.008, glass)
            top, low = base - 0.052, base - 0.034
            board.shape([(a, low), (a + inset, top), (b - inset, top), (b, low)], cloth)
            x -= width


def _road(board: Board, ground: float, night: Colour) -> None:
    """Pavements, kerbs and a road that narrows to a point a little left or right of the middle."""
    far, x0, x1 = 0.5 + board.between(-0.06, 0.06), board.between(-0.12, -0.02), board.between(1.02, 1.12)
    pavement = mix((98, 98, 124), night, 0.25)
    board.wash(ground + 0.015, 1, ((0, mix(pavement, (150, 120, 120), 0.3)), (1, pavement)))
    horizon = ground + 0.015
    board.shape([(far - 0.055, horizon), (far + 0.055, horizon), (x1 + 0.03, 1), (x0 - 0.03, 1)], (146, 140, 152))
    road = mix((58, 60, 84), night, 0.3)
    stops = ((0, mix(road, (150, 114, 112), 0.45)), (0.35, road), (1, road))
    board.graded([(far - 0.05, horizon), (far + 0.05, horizon), (x1, 1), (x0, 1)], stops)
    middle, phase = (x0 + x1) / 2, board.rng.random()
    for k in range(6):  # squares: marks grow longer towards the viewer
        (xa, ya, wa), (xb, yb, wb) = (
            (far + (middle - far) * t, horizon + (1 - horizon) * t, 0.003 + 0.013 * t)
            for t in (((k + phase) / 6) ** 2, min(1, (k + phase + 0.5) / 6) ** 2)
        )
        board.shape([(xa - wa, ya), (xa + wa, ya), (xb + wb, yb), (xb - wb, yb)], (206, 200, 190))


def _lamps(board: Board, ground: float) -> None:
    """Street lamps along both pavements, the nearer the taller, each with its pool of light."""
    offset = board.between(0, 0.12)
    iron, rim = board.tone((26, 26, 48)), board.tone((122, 108, 112))
    for depth in (0.1 + offset * 0.3, 0.34 + offset, 0.86 + offset):
        for side in (-1, 1):
            x, foot, tall = 0.5 + side * (0.15 + 0.42 * depth), ground + 0.03 + 0.24 * depth, 0.13 + 0.4 * depth
            arm, thick = -side * tall * 0.16, 0.004 + 0.009 * depth
            board.glow(x + arm, foot, tall * 0.36, (236, 190, 132), 0.55, tall * 0.09)
            board.pen.line([(x, foot), (x, foot - tall), (x + arm, foot - tall * 1.02)], iron, thick)
            board.pen.line([(x - thick * 0.35, foot), (x - thick * 0.35, foot - tall)], rim, thick * 0.3)
            board.disc(x, foot, thick * 1.5, (26, 26, 48), thick * 0.7)
            board.glow(x + arm, foot - tall, tall * 0.22, (252, 212, 146), 0.8)
            board.disc(x + arm, foot - tall, thick * 1.8, (255, 240, 206), thick * 1.1)


def _paint_space(board: Board) -> None:
    hue = board.rng.random()
    deep = mix((20, 22, 48), (34, 20, 50), hue)
    board.wash(0, 1, ((0, deep), (0.55, mix(deep, (44, 42, 84), 0.7)), (1, mix(deep, (14, 16, 34), 0.6))))
    clouds = ((60, 96, 128), (104, 62, 118), (52, 104, 108), (128, 76, 96))
    start, angle = board.rng.random(2) * (0.6, 1) + (0.2, -0.5)
    for k in range(13):
        t, size = (k - 6) / 11, board.between(0.1, 0.24)
        x, y = start + t + board.between(-0.05, 0.05), 0.5 + t * angle * 1.6 + board.between(-0.13, 0.13)
        colour = clouds[(k // 4 + int(hue * 4)) % len(clouds)]
        if k % 4 == 3:  # a brighter heart
            colour, size = mix(colour, (226, 196, 200), 0.45), size * 0.55
        board.glow(x, y, size * 1.25, colour, board.between(0.5, 0.75), size * board.between(0.5, 0.9))
    _stars(board, (start, angle * 1.6))
    if board.chance(0.35):
        _world_below(board)
    if board.chance(0.75):
        _planet(board)


def _stars(board: Board, band: tuple[float, float]) -> None:
    """Small stars everywhere, more of them along the nebula's band (its middle and slope), and a few that sparkle."""
    tints = ((216, 220, 236), (236, 222, 196), (176, 192, 228))
    stars = board.rng.random((110, 3))
    stars[70:, 1] = 0.5 + (stars[70:, 0] - band[0]) * band[1] + board.rng.normal(0, 0.09, 40)
    for x, y, s in stars.tolist():
        r = 0.0016 + 0.0036 * s**5
        board.stamp(_STAR, x, y, r, r, tints[int(s * 37) % 3])
    for x, y, s in board.rng.random((6, 3)).tolist():
        r = 0.008 + 0.014 * s * s
        board.glow(x, y, r * 1.5, (190, 204, 240), 0.5)
        board.stamp(_SPARKLE, x, y, r, r, tints[0])


def _planet(board: Board) -> None:
    """A banded planet in greyed colours, lit from the upper left, mostly with rings."""
    base = board.pick(_WORLDS)
    n = board.pixels
    r, ringed = round(n * board.between(0.055, 0.1)), board.chance(0.75)
    disc = Image.new("RGB", (2 * r, 2 * r), board.tone(base))
    pen = ImageDraw.Draw(disc)
    for share in (-0.62, -0.2, 0.12, 0.5):
        y, thick = r * (1 + share), r * board.between(0.08, 0.24)
        pen.rectangle((0, y, 2 * r, y + thick), fill=board.tone(mix(base, (216, 206, 196), board.between(0.1, 0.5))))
    disc = disc.rotate(board.between(-25, 25), Image.Resampling.BILINEAR, fillcolor=board.tone(base))
    mask = Image.new("L", disc.size, 0)
    ImageDraw.Draw(mask).ellipse((0, 0, 2 * r - 1, 2 * r - 1), fill=255)
    dark = Image.new("L", disc.size, 175)
    ImageDraw.Draw(dark).ellipse((-0.5 * r, -0.5 * r, 1.6 * r, 1.6 * r), fill=0)
    disc.paste(board.tone((24, 22, 48)), (0, 0), dark.filter(ImageFilter.BoxBlur(max(1, r // 6))))
    cx, cy = round(n * board.between(0.1, 0.9)), round(n * board.between(0.1, 0.5))
    board.glow(cx / n, cy / n, 1.7 * r / n, base, 0.35)
    board.image.paste(disc, (cx - r, cy - r), mask)
    if ringed:
        _rings(board, (cx, cy, r), mix(base, (214, 204, 190), 0.55))


def _rings(board: Board, planet: tuple[int, int, int], colour: Colour) -> None:
    """Two flat rings around the planet; their far half is hidden by it."""
    cx, cy, r = planet
    side = round(4.6 * r)
    mask = Image.new("L", (side, side), 0)
    pen, m = ImageDraw.Draw(mask), side / 2
    for radius, value in ((2.2, 210), (1.86, 60), (1.78, 190), (1.42, 0)):
        pen.ellipse((m - radius * r, m - radius * r * 0.3, m + radius * r, m + radius * r * 0.3), fill=value)
    hidden = Image.new("L", (side, side), 0)
    ImageDraw.Draw(hidden).pieslice((m - r, m - r, m + r, m + r), 180, 360, fill=255)
    mask = ImageChops.subtract(mask, hidden).rotate(board.between(-28, 28), Image.Resampling.BILINEAR)
    corner = (round(cx - m), round(cy - m))
    board.image.paste(board.tone(colour), (*corner, corner[0] + side, corner[1] + side), mask)


def _world_below(board: Board) -> None:
    """The rim of a great world at the bottom of the picture, with craters."""
    base = mix(board.pick(_WORLDS), (40, 38, 70), 0.45)
    cx, top, r = board.between(0.2, 0.8), board.between(0.82, 0.92), board.between(0.7, 1.2)
    board.disc(cx, top + r, r + 0.012, mix(base, (190, 200, 224), 0.5))
    board.disc(cx, top + r, r, base)
    for _ in range(6):
        x, y, s = board.between(0, 1), board.between(0.0, 0.1), board.between(0.015, 0.045)
        y += top + r - np.sqrt(max(0, r * r - (x - cx) ** 2)) + 0.03
        board.disc(x, y, s, mix(base, (20, 20, 44), 0.35), s * 0.4)
        board.disc(x + s * 0.08, y + s * 0.08, s * 0.86, mix(base, (20, 20, 44), 0.12), s * 0.32)


def _paint_park(board: Board) -> None:
    ground, hour = GROUND["park"], board.rng.random()
    top, low = mix((164, 200, 218), (190, 196, 210), hour), mix((232, 234, 218), (246, 228, 202), hour)
    board.wash(0, ground, ((0, top), (1, low)))
    for _ in range(2):
        x, base, width = board.between(0, 1), board.between(0.1, 0.2), board.between(0.2, 0.36)
        cloud(board, x, base, width, (246, 244, 236), (224, 228, 226), 0.8)
    leaf = mix((116, 146, 122), (146, 146, 108), hour)
    wood = board.between(0.27, 0.33)
    for k, (rise, bump) in enumerate(((0, 0.1), (0.06, 0.075), (0.115, 0.055))):
        colour = mix(mix(leaf, (206, 216, 206), 0.42), mix(leaf, (66, 98, 80), 0.35), k / 2)
        line = treetops(board, wood + rise, 0.022, bump)
        board.shape(down_to(line, ground + 0.02), mix(colour, (232, 232, 190), 0.22))
        board.shape(down_to(shifted(line, 0.008, 0.014), ground + 0.02), colour)
    lawn = mix((150, 178, 122), (166, 174, 114), hour)
    board.wash(ground, 1, ((0, mix(lawn, (222, 222, 170), 0.35)), (0.3, lawn), (1, mix(lawn, (112, 140, 84), 0.5))))
    _park_fence(board, ground)
    for _ in range(9):  # the shade of trees outside the picture
        y = board.between(0.58, 1)
        board.glow(board.between(0, 1), y, 0.22 * y, mix(lawn, (84, 120, 96), 0.6), 0.6, 0.05 * y)
    tufts(board, 16, 0.6, 1, mix(lawn, (96, 128, 76), 0.55))
    _path(board, ground)
    _hedges(board, ground, mix(leaf, (86, 126, 92), 0.5))


def _park_fence(board: Board, ground: float) -> None:
    """A low railing of iron along the far edge of the lawn."""
    iron, step = (92, 106, 104), board.between(0.016, 0.022)
    for x in np.arange(board.between(-step, 0), 1, step).tolist():
        board.bar(x, ground - 0.034, x + 0.003, ground + 0.012, iron)
    for y in (ground - 0.027, ground + 0.004):
        board.bar(0, y, 1, y + 0.004, iron)


def _path(board: Board, ground: float) -> None:
    """A sandy path that winds from the foreground to the far edge of the lawn."""
    start, end, bend = board.between(0.25, 0.75), board.between(0.3, 0.7), board.between(0.12, 0.24) * board.side()
    t = np.linspace(0, 1, 22)
    centre = start + (end - start) * t + bend * np.sin(np.pi * 1.6 * t) * (1 - 0.5 * t)
    y, half = 1.02 - (1.02 - ground - 0.005) * t**0.8, 0.012 + 0.17 * (1 - t) ** 1.7
    for spread, colour in ((1.12, (178, 166, 124)), (1.0, (226, 210, 176))):
        left = list(zip((centre - half * spread).tolist(), y.tolist(), strict=True))
        right = list(zip((centre + half * spread).tolist(), y.tolist(), strict=True))
        board.shape(left + right[::-1], colour)
    for k in board.rng.integers(0, 12, 12).tolist():
        x, s = float(centre[k] + board.between(-0.7, 0.7) * half[k]), 0.004 + 0.1 * float(half[k])
        board.lens(x, float(y[k]), s, 0.003, (204, 186, 150))


def _hedges(board: Board, ground: float, leaf: Colour) -> None:
    """Clipped hedges that run in from the sides, rounded at the end and lit on top, and a lamp post or two."""
    for side in (-1, 1):
        reach, top = board.between(0.14, 0.27), ground + board.between(0.005, 0.03)
        high = board.between(0.06, 0.08)
        for grow, drop, colour in ((0.0, 0.0, leaf), (-0.012, -0.022, mix(leaf, (206, 214, 156), 0.3))):
            right, foot = reach + grow, top + high + drop
            block = [(-0.05, top), (right - 0.03, top), (right - 0.006, top + 0.01), (right, top + 0.03)]
            block += [(right - 0.004, foot), (-0.05, foot)]
            board.shape([(x if side < 0 else 1 - x, y) for x, y in block], colour)
        for _ in range(14):
            x, y = board.between(0, reach - 0.02), board.between(top + 0.01, top + high - 0.01)
            board.lens(x if side < 0 else 1 - x, y, 0.008, 0.004, mix(leaf, (220, 226, 170), 0.4))
        if board.chance(0.6):
            _park_lamp(board, 0.5 + side * board.between(0.12, 0.4), ground + 0.06, board.between(0.2, 0.26))


def _park_lamp(board: Board, x: float, foot: float, tall: float) -> None:
    iron = board.tone((78, 90, 92))
    board.pen.line([(x, foot), (x, foot - tall)], iron, 0.008)
    board.disc(x, foot, 0.014, (78, 90, 92), 0.007)
    board.disc(x, foot - tall - 0.016, 0.02, (240, 234, 206))
    board.pen.polygon([(x - 0.02, foot - tall - 0.028), (x, foot - tall - 0.05), (x + 0.02, foot - tall - 0.028)], iron)


def _paint_grassland(board: Board) -> None:
    ground, hour = GROUND["grassland"], board.rng.random()
    top, low = mix((150, 196, 222), (176, 204, 222), hour), mix((226, 238, 232), (246, 238, 212), hour)
    board.wash(0, ground + 0.05, ((0, top), (1, low)))
    if board.chance(0.5):
        board.glow(board.between(0, 1), 0.02, 0.3, (255, 246, 206), 0.8)
    for _ in range(int(board.rng.integers(2, 4))):
        x, base, width = board.between(0, 1), board.between(0.12, 0.28), board.between(0.2, 0.34)
        cloud(board, x, base, width, (248, 249, 246), (212, 226, 230), 0.9)
    grass = mix((188, 206, 104), (204, 204, 104), hour)
    for k, lift in enumerate((0.1, 0.055, 0.01)):
        line = ridge(board, ground - lift, 0.06 - 0.012 * k, 0.8 + 0.3 * k)
        colour = mix(mix(grass, (184, 212, 190), 0.62 - 0.24 * k), (128, 170, 110), 0.18)
        board.shape(down_to(line, ground + 0.1), mix(colour, (250, 246, 190), 0.35))
        board.shape(down_to(shifted(line, 0.012, 0.01), ground + 0.1), colour)
    for k, y in enumerate((0.015, 0.1, 0.22, 0.37)):
        line = ridge(board, ground + y, 0.014 + 0.012 * k, 0.7)
        body = mix(grass, (150, 178, 82), 0.1 * k)
        stops = ((0, mix(body, (244, 240, 164), 0.45)), (0.45, body), (1, mix(body, (134, 164, 74), 0.45)))
        board.graded(down_to(line, min(1.02, ground + y + 0.2 + 0.06 * k)), stops)
        if k == 0:
            _wooden_fence(board, ground + board.between(0.01, 0.02))
    tufts(board, 34, 0.54, 1, mix(grass, (116, 148, 66), 0.6))


def _wooden_fence(board: Board, base: float) -> None:
    """A low fence of pale wood, right across: two rails on posts, rising and falling with the ground."""
    line = ridge(board, base, 0.012, 0.5, 15)
    wood, dark = (230, 214, 180), (186, 166, 132)
    for lift in (0.026, 0.048):
        top, low = shifted(line, 0, -lift - 0.0085), shifted(line, 0, -lift)
        board.shape(top + low[::-1], wood)
        board.shape(shifted(low, 0, -0.0025) + low[::-1], dark)
    for x, y in line:
        board.bar(x - 0.006, y - 0.062, x + 0.006, y + 0.004, wood)
        board.bar(x + 0.002, y - 0.062, x + 0.006, y + 0.004, dark)


def _paint_waterfall(board: Board) -> None:
    ground, hour = GROUND["waterfall"], board.rng.random()
    board.wash(0, 0.5, ((0, mix((166, 196, 208), (190, 198, 212), hour)), (0.6, (226, 234, 226))))
    rock = mix((104, 120, 128), (142, 124, 108), board.rng.random())
    fall, width = board.between(0.36, 0.64), board.between(0.16, 0.26)
    lip = board.between(0.13, 0.2)
    _cliff(board, rock, fall, lip, ground)
    _falling_water(board, fall, width, lip, ground)
    pool = mix((124, 170, 168), (116, 158, 170), hour)
    stops = ((0, mix(pool, (222, 234, 228), 0.5)), (0.35, pool), (1, mix(pool, (62, 106, 112), 0.6)))
    board.wash(ground + 0.015, 0.92, stops)
    for _ in range(18):
        depth = board.rng.random()
        colour = mix(pool, (232, 240, 234) if board.chance(0.6) else (76, 122, 126), 0.45)
        y = ground + 0.04 + 0.27 * depth
        board.lens(board.between(0, 1), y, 0.02 + 0.07 * depth, 0.002 + 0.003 * depth, colour)
    board.glow(fall, ground, width * 1.5, (240, 245, 242), 0.9, 0.09)
    for _ in range(5):
        x = fall + width * board.between(-0.9, 0.9)
        board.glow(x, ground - board.between(0, 0.06), board.between(0.06, 0.12), (242, 246, 244), 0.6)
    _rainbow_over(board, fall, ground)
    _bank(board, rock)


def _cliff(board: Board, rock: Colour, fall: float, lip: float, ground: float) -> None:
    """Two rock walls in stepped columns with woods above; lowest where the water comes over."""
    wood = down_to(treetops(board, lip - 0.02, 0.02, 0.06), ground)
    board.shape(wood, mix((104, 136, 112), (178, 198, 182), 0.45))
    moss = mix((128, 152, 98), (110, 138, 100), board.rng.random())
    edges = (np.linspace(-0.02, 1.02, 15) + board.rng.uniform(-0.016, 0.016, 15)).tolist()
    for left, right in pairwise(edges):
        away = abs((left + right) / 2 - fall)
        top = lip + 0.03 - min(0.12, away * 0.25) + board.between(-0.022, 0.022)
        colour = mix(rock, (196, 200, 192) if left < fall else (66, 74, 84), board.between(0.05, 0.32))
        _column(board, (left, top, right, ground + 0.05), colour, moss)


def _column(board: Board, box: tuple[float, float, float, float], colour: Colour, moss: Colour) -> None:
    """One column of the cliff: a lit and a shaded face, a few facets, moss hanging over its top."""
    left, top, right, foot = box
    split, dark = right - (right - left) * board.between(0.25, 0.45), (58, 64, 78)
    board.shape([(left, foot), (left, top), (right, top + 0.012), (right, foot)], colour)
    board.shape([(split, foot), (split + 0.006, top), (right, top + 0.012), (right, foot)], mix(colour, dark, 0.35))
    for y in (board.between(0.22, 0.34), board.between(0.38, 0.5)):
        facet = mix(colour, dark if board.chance(0.6) else (206, 208, 198), 0.24)
        board.shape([(left, y), (split, y + 0.05), (split - 0.01, y + 0.1), (left, y + 0.06)], facet)
    drip = top + 0.02 + board.between(0.02, 0.05)
    cap = [(left - 0.004, top - 0.006), (right + 0.004, top + 0.004), (right, top + 0.024)]
    board.shape([*cap, (split, drip), (left, top + 0.022)], moss)


def _falling_water(board: Board, fall: float, width: float, lip: float, ground: float) -> None:
    """The fall: a pale sheet that widens downwards, in strands."""
    top, half = lip + 0.012, width / 2
    sheet = [(fall - half * 0.72, top), (fall, top - 0.012), (fall + half * 0.72, top), (fall + half * 0.86, 0.34)]
    sheet += [(fall + half * 1.12, ground + 0.04), (fall - half * 1.12, ground + 0.04), (fall - half * 0.86, 0.34)]
    board.graded(sheet, ((0, (198, 220, 224)), (0.3, (220, 234, 236)), (1, (240, 246, 244))))
    for _ in range(15):
        across, start = board.between(-0.92, 0.92), board.between(top, ground - 0.14)
        length, thick = board.between(0.09, 0.24), board.between(0.002, 0.006)
        end = min(ground, start + length)
        xa, xb = (fall + across * half * (0.72 + 0.4 * (y - top) / (ground - top)) for y in (start, end))
        colour = (166, 198, 208) if board.chance(0.6) else (250, 252, 250)
        board.shape([(xa, start), (xb + thick, (start + end) / 2), (xb, end), (xb - thick, (start + end) / 2)], colour)


@lru_cache(maxsize=8)
def _rainbow(radius: int) -> Image.Image:
    """The upper half of a rainbow of this outer radius in pixels, as RGBA: seven soft bands, faint at the rims.

    Computed at half the size and enlarged: the bands are soft anyway.
    """
    bands = np.array(
        [
            (186, 150, 210),
            (140, 160, 222),
            (132, 200, 196),
            (172, 214, 136),
            (250, 228, 130),
            (248, 184, 120),
            (236, 132, 124),
        ]
    )
    half = max(2, radius // 2)
    y, x = np.mgrid[-half:0, -half:half] + 0.5
    across = (np.hypot(x, y) / half - 0.76) / 0.24  # 0 at the inner rim, 1 at the outer one
    place = np.linspace(0.08, 0.92, len(bands))
    colour = np.stack([np.interp(across, place, bands[:, i]) for i in range(3)], axis=-1)
    opacity = np.interp(across, (0, 0.14, 0.86, 1), (0, 205, 205, 0))
    opacity *= np.interp(y / half, (-1, -0.3, 0), (1, 0.95, 0.5))
    bow = Image.fromarray(np.dstack([colour, opacity]).astype(np.uint8))
    return bow.resize((2 * radius, radius), Image.Resampling.BILINEAR)


def _rainbow_over(board: Board, fall: float, ground: float) -> None:
    """A rainbow that rises from the pool and spans the fall; its radius comes in steps so that masks are reused."""
    n = board.pixels
    radius = round(n * (0.36 + 0.03 * int(board.rng.integers(0, 4))))
    bow = _rainbow(radius)
    cx, cy = round(n * (fall + board.between(-0.14, 0.14))), round(n * (ground + board.between(0.05, 0.1)))
    board.image.paste(bow, (cx - radius, cy - radius), bow)


def _bank(board: Board, rock: Colour) -> None:
    """Boulders at the sides of the pool and a mossy bank in front."""
    moss = mix((138, 156, 104), rock, 0.2)
    for side in (-1, 1):
        for _ in range(3):
            x, y, s = 0.5 + side * board.between(0.34, 0.52), board.between(0.62, 0.86), board.between(0.035, 0.075)
            board.disc(x, y + s * 0.2, s, mix(rock, (60, 70, 80), 0.4), s * 0.6)
            board.disc(x - s * 0.1, y + s * 0.1, s * 0.86, mix(rock, (190, 196, 190), 0.25), s * 0.48)
    line = ridge(board, 0.845, 0.02, 1.2)
    board.shape(down_to(shifted(line, 0, -0.01), 1.02), mix(rock, (56, 66, 76), 0.35))
    stops = ((0, mix(moss, (220, 224, 170), 0.3)), (0.4, moss), (1, mix(moss, (84, 104, 80), 0.5)))
    board.graded(down_to(line, 1.02), stops)
    tufts(board, 14, 0.87, 1, mix(moss, (78, 100, 70), 0.55))


def _paint_snow(board: Board) -> None:
    ground, hour = GROUND["snow"], board.rng.random()
    top, low = mix((138, 162, 190), (154, 156, 188), hour), mix((206, 218, 228), (228, 212, 218), hour)
    board.wash(0, ground, ((0, top), (1, low)))
    _mountains(board, ground, mix(top, low, 0.45), 0.34, 0.5)
    _mountains(board, ground, mix(top, (108, 128, 160), 0.45), 0.24, 0.0)
    field = mix((216, 226, 236), (226, 222, 232), hour)
    shadow = mix((166, 186, 212), (176, 178, 208), hour)
    for k, y in enumerate((ground - 0.012, ground + 0.07, ground + 0.19, ground + 0.33)):
        line = ridge(board, y, 0.014 + 0.006 * k, 1.0)
        stops = ((0, field), (0.5, mix(field, shadow, 0.35)), (1, mix(field, shadow, 0.62)))
        board.graded(down_to(line, y + 0.2 + 0.08 * k), stops)
        board.shape(line + shifted(line, 0.01, 0.006 + 0.003 * k)[::-1], mix(field, (248, 250, 252), 0.6))
    for _ in range(5):
        board.glow(board.between(0, 1), board.between(ground + 0.1, 0.97), board.between(0.1, 0.2), shadow, 0.6, 0.025)
    _flakes(board)


def _mountains(board: Board, ground: float, rock: Colour, rise: float, haze: float) -> None:
    """A chain of snowy peaks: white to the left of each crest, blue to the right, rock showing at the foot."""
    white, blue = mix((236, 242, 246), (206, 216, 228), haze), mix((160, 182, 212), (188, 202, 220), haze)
    count = int(board.rng.integers(3, 5))
    for k in board.rng.permutation(count).tolist():
        x, half = (k + board.between(0.2, 0.8)) / count, board.between(0.2, 0.3)
        peak = ground - rise * board.between(0.65, 1)
        tall, spine = ground + 0.02 - peak, [(0, 0), (0.05, 0.18), (-0.06, 0.36), (0.08, 0.6), (-0.04, 1)]
        ridge = [(x + half * dx, peak + tall * dy) for dx, dy in spine]
        board.shape([(x - half, ground + 0.02), (x - half * 0.44, peak + tall * 0.5), *ridge], white)
        board.shape([*ridge, (x + half, ground + 0.02), (x + half * 0.5, peak + tall * 0.44)], blue)
        for dx, dy, slant in ((-0.5, 0.6, 0.16), (-0.3, 0.72, 0.14), (0.24, 0.56, -0.14), (0.46, 0.7, -0.12)):
            a, y = x + half * dx, peak + tall * dy * board.between(0.9, 1.1)
            colour = mix(rock, white if dx < 0 else blue, 0.3)
            foot = (a + half * (0.05 - slant), y + tall * 0.2)
            board.shape([(a, y), (a + half * 0.05, y - tall * 0.02), foot], colour)


def _flakes(board: Board) -> None:
    """Falling snow: many small flakes, a few large soft ones close by."""
    for x, y, s in board.rng.random((80, 3)).tolist():
        r = 0.0028 + 0.004 * s * s
        board.stamp(_FLAKE, x, y, r, r, (246, 249, 252))
    for x, y, s in board.rng.random((14, 3)).tolist():
        board.glow(x, y, 0.012 + 0.012 * s, (250, 252, 254), 0.95)


def _paint_lake(board: Board) -> None:
    ground, hour = GROUND["lake"], board.rng.random()
    top, low = mix((160, 196, 214), (184, 184, 212), hour), mix((244, 238, 214), (252, 224, 200), hour)
    board.wash(0, ground, ((0, top), (1, low)))
    for _ in range(int(board.rng.integers(2, 5))):
        wisp = streak(board.between(0, 1), board.between(0.05, 0.2), board.between(0.15, 0.35))
        board.veil(wisp, (248, 244, 238), 0.5, 0.005)
    board.glow(board.between(0.1, 0.9), ground - 0.12, 0.36, (255, 244, 214), 0.7, 0.26)
    far = mix((142, 170, 188), (160, 156, 188), hour)
    for k, rise in enumerate((0.2, 0.125, 0.06)):
        line = ridge(board, ground - rise, 0.07 - 0.015 * k, 0.8 + 0.4 * k)
        colour = mix(mix(far, low, 0.4), mix((84, 128, 116), far, 0.15), k / 2)
        line = [(x, min(y, ground - 0.012)) for x, y in line]
        board.graded(down_to(line, ground + 0.01), ((0, colour), (1, mix(colour, low, 0.35))))
    _mirror(board, ground, mix((134, 166, 180), (142, 156, 184), hour))
    mist = down_to([(0, ground - 0.006), (1, ground - 0.006)], ground + 0.006)
    board.veil(mist, (240, 238, 228), 0.5, 0.004)
    for _ in range(20):
        depth = board.rng.random()
        colour = mix((150, 176, 186), (236, 240, 236) if board.chance(0.65) else (92, 128, 142), 0.6)
        y = ground + 0.03 + 0.36 * depth
        board.lens(board.between(0, 1), y, 0.03 + 0.1 * depth, 0.0012 + 0.0026 * depth, colour)
    _lake_shore(board)


def _mirror(board: Board, ground: float, water: Colour) -> None:
    """Everything above the waterline, upside down, darker with the depth of the water."""
    n = board.pixels
    line, depth = round(ground * n), round(0.43 * n)
    above = board.image.crop((0, line - depth, n, line)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    tint = Image.new("RGB", above.size, board.tone(water))
    fade = Image.fromarray(np.linspace(70, 215, depth).astype(np.uint8)[:, None])
    above.paste(tint, (0, 0), fade.resize(above.size, Image.Resampling.NEAREST))
    board.image.paste(above, (0, line))


def _lake_shore(board: Board) -> None:
    """A grassy shore with pebbles in front, and reeds that frame one side or both."""
    slope, shore = board.between(-0.04, 0.04), (172, 176, 136)
    line = [(x, y + slope * (x - 0.5)) for x, y in ridge(board, 0.85, 0.016, 1.1)]
    board.veil(down_to(shifted(line, 0, -0.03), 0.95), (96, 124, 126), 0.3)
    board.shape(down_to(shifted(line, 0, -0.009), 1.02), (206, 198, 174))
    board.graded(down_to(line, 1.02), ((0, (196, 190, 156)), (0.4, shore), (1, (138, 148, 112))))
    for _ in range(16):
        colour = mix((150, 148, 142), (222, 216, 204), board.rng.random())
        s = board.between(0.006, 0.013)
        board.disc(board.between(0, 1), board.between(0.87, 0.99), s, colour, s * 0.55)
    first = board.side()
    for side in (first, -first) if board.chance(0.5) else (first,):
        for _ in range(13):
            _reed(board, 0.5 + side * (0.5 - 0.13 * board.rng.random() ** 1.5), board.between(0.84, 0.9))


def _reed(board: Board, x: float, foot: float) -> None:
    tall, lean = board.between(0.1, 0.27), board.between(-0.03, 0.03)
    green = mix((116, 130, 88), (166, 168, 112), board.rng.random())
    tip, bend, half = (x + lean, foot - tall), x + lean * 0.4, foot - tall * 0.5
    board.shape([(x - 0.004, foot), (bend - 0.003, half), tip, (bend + 0.003, half), (x + 0.004, foot)], green)
    if board.chance(0.35):
        board.pen.line([(x + lean * 0.84, foot - tall * 0.84), tip], board.tone((116, 88, 70)), 0.011)


def _paint_desert(board: Board) -> None:
    ground, hour = GROUND["desert"], board.rng.random()
    top, low = mix((142, 190, 200), (206, 176, 168), hour), mix((240, 226, 190), (246, 210, 166), hour)
    board.wash(0, ground, ((0, top), (0.9, low)))
    sun, height, radius = board.between(0.12, 0.88), board.between(0.1, 0.24), board.between(0.075, 0.11)
    board.glow(sun, height, 0.42, (255, 244, 212), 0.8)
    board.disc(sun, height, radius, (254, 244, 214))
    _mesas(board, ground, low)
    sand, shade = mix((230, 200, 150), (222, 182, 136), hour), mix((196, 152, 118), (176, 130, 112), hour)
    board.wash(ground - 0.005, 1, ((0, mix(sand, low, 0.4)), (1, sand)))
    for k, y in enumerate((ground - 0.01, ground + 0.09, ground + 0.23, ground + 0.36)):
        _dune(board, y, 0.026 + 0.017 * k, mix(mix(sand, low, 0.45), sand, k / 3), shade)
    for _ in range(12):
        y = board.between(0.62, 0.98)
        board.lens(board.between(0, 1), y, board.between(0.03, 0.09), 0.0028, mix(sand, (190, 148, 112), 0.45))
    for _ in range(int(board.rng.integers(0, 4))):
        _cactus(board, board.between(0.04, 0.96), ground + board.between(0.0, 0.02), board.between(0.025, 0.045))


def _mesas(board: Board, ground: float, haze: Colour) -> None:
    """Flat-topped rocks on the horizon, with a lit left flank, darker strata and a skirt of scree."""
    spots = board.rng.permutation([0.15, 0.42, 0.66, 0.9])[: int(board.rng.integers(1, 4))].tolist()
    for k, spot in enumerate(sorted(spots)):
        x, half, rise = spot + board.between(-0.08, 0.08), board.between(0.05, 0.12), board.between(0.07, 0.16)
        rock = mix((190, 138, 112), haze, 0.25 + 0.12 * k)
        dark = (120, 82, 84)
        board.stamp(_SCREE, x, ground, half, rise, mix(rock, haze, 0.25))
        board.stamp(_MESA, x, ground, half, rise, rock)
        board.stamp(_MESA_SHADE, x, ground, half, rise, mix(rock, dark, 0.35))
        board.stamp(_MESA_STRATUM, x, ground, half, rise, mix(rock, dark, 0.2))


def _dune(board: Board, y: float, swing: float, sand: Colour, shade: Colour) -> None:
    """A dune: lit on the windward side; from its crest a winding edge runs down, the slip face beyond it in shade."""
    crest, side = board.between(0.2, 0.8), board.side()
    rise, fall = board.between(0.5, 0.8), board.between(0.35, 0.6)
    x = np.sort(np.append(np.linspace(-0.02, 1.02, 22), crest))
    away = (x - crest) * side
    slope = np.clip(1 - np.abs(away) / np.where(away < 0, rise, fall), 0, 1)
    heights = y + swing * (0.6 - 1.9 * slope**1.4 + 0.18 * np.sin(9 * x + board.between(0, 6)))
    line = list(zip(x.tolist(), heights.tolist(), strict=True))
    stops = ((0, mix(sand, (255, 240, 206), 0.5)), (0.45, sand), (1, mix(sand, shade, 0.3)))
    board.graded(down_to(line, y + 0.34), stops)
    lee = [point for point in line if 0 <= (point[0] - crest) * side <= fall]
    lee = lee if side > 0 else lee[::-1]
    (x0, y0), (x1, y1) = lee[0], lee[-1]
    edge = [(0, 0), (0.07, 0.8), (0.02, 1.6), (0.12, 2.6), (0.36, 3.0), (0.7, 2.2), (1, (y1 - y0) / swing)]
    curve = smooth([(x0 + (x1 - x0) * t, y0 + swing * drop) for t, drop in edge], 5)[:-4]  # without its way back
    board.graded([*curve, *lee[::-1]], ((0, mix(sand, shade, 0.72)), (0.35, mix(sand, shade, 0.55)), (1, sand)))


def _cactus(board: Board, x: float, foot: float, tall: float) -> None:
    """A tiny far cactus in silhouette; too small and too dull to be taken for a thing."""
    green, arm = board.tone((134, 136, 104)), tall * 0.32
    board.pen.line([(x, foot), (x, foot - tall)], green, 0.009)
    for side, low in ((-1, 0.35), (1, 0.5)):
        elbow, y = x + side * arm, foot - tall * low
        board.pen.line([(x, y), (elbow, y), (elbow, y - tall * 0.3)], green, 0.006)


_PAINTERS: dict[str, Callable[[Board], None]] = {
    "beach": _paint_beach,
    "sky": _paint_sky,
    "street": _paint_street,
    "space": _paint_space,
    "park": _paint_park,
    "grassland": _paint_grassland,
    "waterfall": _paint_waterfall,
    "snow": _paint_snow,
    "lake": _paint_lake,
    "desert": _paint_desert,
}
