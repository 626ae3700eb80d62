"""The board that settings are painted on: gradients, glows and paper, and what several settings draw with them.

Coordinates are shares of the picture's side, (0, 0) at the top left.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from minivlm.scenes.drawing.ink import Pen, smooth

Colour = tuple[int, int, int]
Point = tuple[float, float]
Stops = Sequence[tuple[float, Colour]]  # (position from 0 to 1, colour), from top to bottom

_GRAIN = (10, 11, 9)  # strongest darkening by the paper's grain, per channel, of 255
# Outlines for `Board.stamp`, around their own origin.
_LENS = ((-1, 0), (-0.55, -0.75), (0, -1), (0.55, -0.75), (1, 0), (0.55, 0.75), (0, 1), (-0.55, 0.75))
_TUFT = ((-0.16, 0), (-0.7, -1), (0, -0.3), (0, -1.3), (0.1, -0.3), (0.7, -1), (0.16, 0))


class Board:
    """The picture being painted, its random numbers, and its mood: one tint that all its colours share."""

    def __init__(self, rng: np.random.Generator, pixels: int):
        self.rng = rng
        self.pixels = pixels
        self.image = Image.new("RGB", (pixels, pixels))
        self.pen = Pen(self.image)
        self.mood = np.clip(np.round(rng.normal(0, 3, 3) + rng.normal(0, 4)), -12, 12).astype(int).tolist()

    def between(self, low: float, high: float) -> float:
        """A uniform random number."""
        return float(self.rng.uniform(low, high))

    def chance(self, share: float) -> bool:
        """True with this probability."""
        return bool(self.rng.random() < share)

    def pick(self, colours: Sequence[Colour]) -> Colour:
        """One of the colours."""
        return colours[int(self.rng.integers(len(colours)))]

    def side(self) -> int:
        """-1 or 1, for left or right."""
        return 1 if self.rng.random() < 0.5 else -1

    def tone(self, colour: Colour) -> Colour:
        """The colour in this picture's mood."""
        (r, g, b), (dr, dg, db) = colour, self.mood
        return min(255, max(0, r + dr)), min(255, max(0, g + dg)), min(255, max(0, b + db))

    def shape(self, points: Sequence[Point], colour: Colour) -> None:
        """A filled polygon."""
        self.pen.polygon(points, self.tone(colour))

    def bar(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """A filled upright rectangle."""
        self.pen.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], self.tone(colour))

    def stamp(self, outline: Sequence[Point], x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """A ready outline, scaled and moved: its origin comes to (x, y), its units to `width` and `height`."""
        self.pen.polygon([(x + width * dx, y + height * dy) for dx, dy in outline], self.tone(colour))

    def disc(self, cx: float, cy: float, rx: float, colour: Colour, ry: float | None = None) -> None:
        """A filled circle, or an ellipse if `ry` is given."""
        self.pen.ellipse(cx, cy, rx, rx if ry is None else ry, self.tone(colour))

    def lens(self, cx: float, cy: float, rx: float, ry: float, colour: Colour) -> None:
        """A flat horizontal mark with pointed ends: a ripple, a glint, a streak of cloud."""
        self.stamp(_LENS, cx, cy, rx, ry, colour)

    def wash(self, top: float, bottom: float, stops: Stops) -> None:
        """A vertical gradient over the whole width, from height `top` to height `bottom`."""
        y0, y1 = round(top * self.pixels), round(bottom * self.pixels)
        self.image.paste(self._gradient(stops, self.pixels, y1 - y0), (0, y0))

    def graded(self, points: Sequence[Point], stops: Stops) -> None:
        """A polygon filled with a vertical gradient over its height."""
        mask, (x0, y0, x1, y1) = self._stencil(points, None)
        self.image.paste(self._gradient(stops, x1 - x0, y1 - y0), (x0, y0), mask)

    def veil(self, points: Sequence[Point], colour: Colour, opacity: float, blur: float = 0) -> None:
        """A see-through polygon, with soft edges where `blur` (a share of the side) is given."""
        mask, box = self._stencil(points, round(255 * opacity), blur)
        self.image.paste(self.tone(colour), box, mask)

    def glow(self, cx: float, cy: float, rx: float, colour: Colour, opacity: float, ry: float | None = None) -> None:
        """A soft round light (or patch of mist) that fades to nothing at its radius."""
        n = self.pixels
        w, h = max(2, round(2 * rx * n)), max(2, round(2 * (rx if ry is None else ry) * n))
        mask = _round_glow(round(255 * opacity / 5) * 5).resize((w, h), Image.Resampling.BILINEAR)
        x, y = round(cx * n - w / 2), round(cy * n - h / 2)
        self.image.paste(self.tone(colour), (x, y, x + w, y + h), mask)

    def grain(self) -> None:
        """The faint unevenness of gouache on paper, so that no plane is dead flat."""
        x, y = (int(v) for v in self.rng.integers(0, self.pixels // 2, 2))
        paper = _paper(self.pixels).crop((x, y, x + self.pixels, y + self.pixels))
        self.image = ImageChops.subtract(self.image, paper)

    def _gradient(self, stops: Stops, width: int, height: int) -> Image.Image:
        at = np.linspace(0, 1, max(1, height))
        where = [position for position, _ in stops]
        colours = np.array([self.tone(colour) for _, colour in stops])
        column = np.stack([np.interp(at, where, colours[:, i]) for i in range(3)], axis=1)
        strip = Image.fromarray((column + 0.5).astype(np.uint8)[:, None])
        return strip.resize((width, max(1, height)), Image.Resampling.NEAREST)

    def _stencil(self, points: Sequence[Point], value: int | None, blur: float = 0) -> tuple[Image.Image, tuple]:
        """A mask of the polygon, cut to its bounding box in pixels, and that box.

        Without a `value` it has one bit a pixel: such a mask pastes six times as fast as one with levels.
        """
        n = self.pixels
        corners = np.clip(np.asarray(points), -0.2, 1.2) * n
        radius = round(blur * n)
        x0, y0 = np.maximum(0, np.floor(corners.min(0)) - 2 * radius).astype(int).tolist()
        x1, y1 = np.minimum(n, np.ceil(corners.max(0)) + 1 + 2 * radius).astype(int).tolist()
        mask = Image.new("1" if value is None else "L", (max(1, x1 - x0), max(1, y1 - y0)), 0)
        fill = 1 if value is None else value
        ImageDraw.Draw(mask).polygon([(x - x0, y - y0) for x, y in corners.tolist()], fill=fill)
        if radius:
            mask = mask.filter(ImageFilter.BoxBlur(radius))
        return mask, (x0, y0, x0 + mask.size[0], y0 + mask.size[1])


@lru_cache(maxsize=64)
def _round_glow(strength: int) -> Image.Image:
    """A 64-pixel mask that falls smoothly from `strength` in the middle to 0 at the rim."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    fall = np.clip(1 - np.hypot(x, y), 0, 1)
    return Image.fromarray((strength * fall * fall * (3 - 2 * fall)).astype(np.uint8))


@lru_cache(maxsize=4)
def _paper(pixels: int) -> Image.Image:
    """Broad blotches and fine grain to subtract, half as large again as the picture so that crops differ."""
    rng = np.random.default_rng(7)
    side = pixels + pixels // 2
    total = np.zeros((side, side))
    for cells, weight in ((6, 0.45), (28, 0.3), (side // 3, 0.25)):
        noise = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
        total += weight * np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC))
    return Image.fromarray((np.clip(total, 0, 1)[..., None] * _GRAIN).astype(np.uint8))


def ridge(board: Board, height: float, swing: float, waves: float, steps: int = 28) -> list[Point]:
    """A rolling line from left to right around `height`: three summed sines, the finer the weaker."""
    x = np.linspace(-0.02, 1.02, steps)
    y = np.full(steps, height)
    for octave, weight in ((1, 0.6), (2.1, 0.28), (4.3, 0.12)):
        y += swing * weight * np.sin(2 * np.pi * (waves * octave * x + board.rng.random()))
    return list(zip(x.tolist(), y.tolist(), strict=True))


def down_to(line: list[Point], bottom: float) -> list[Point]:
    """The area between a line (left to right) and the height `bottom`."""
    return [*line, (line[-1][0], bottom), (line[0][0], bottom)]


def shifted(line: list[Point], dx: float, dy: float) -> list[Point]:
    """The line, moved to the right by `dx`."""
    return [(x + dx, y + dy) for x, y in line]


def treetops(board: Board, height: float, swing: float, bump: float) -> list[Point]:
    """The scalloped upper edge of a far wood: many crowns that run together, none that stands alone."""
    points: list[Point] = []
    x = -0.05
    while x < 1.05:
        width = bump * board.between(0.7, 1.4)
        top = height + swing * board.between(-1, 1)
        arc = np.linspace(np.pi, 0, 7)
        crown = np.stack([x + width / 2 + width / 2 * np.cos(arc), top - width * 0.42 * np.sin(arc)], axis=1)
        points += [tuple(xy) for xy in crown.tolist()]
        x += width * 0.9
    return points


def cloud(board: Board, cx: float, base: float, width: float, lit: Colour, shade: Colour, opacity: float = 1) -> None:
    """A cumulus: round lobes over a soft base, lit from the upper left, melting away at the bottom.

    Painted at a third of the resolution and enlarged, which makes its edges soft and saves most of the work.
    """
    w, h = max(8, round(width * board.pixels / 3)), max(6, round(width * 0.52 * board.pixels / 3))
    body, light = Image.new("L", (w, h), 0), Image.new("L", (w, h), 0)
    outer, inner = ImageDraw.Draw(body), ImageDraw.Draw(light)
    lobes, lean = int(board.rng.integers(6, 9)), board.between(-0.18, 0.18)
    outer.rounded_rectangle((w * 0.1, h * 0.66, w * 0.9, h * 0.96), radius=h * 0.15, fill=255)
    for i in sorted(range(lobes), key=lambda i: -abs(i - lobes / 2 + 0.5)):
        t = (i + 0.5) / lobes
        dome = np.sin(np.pi * (t + lean * np.sin(np.pi * t)))
        r = h * (0.13 + 0.19 * dome) * board.between(0.85, 1.15)
        x, y = r + (w - 2 * r) * t, h * 0.8 - h * 0.46 * dome * board.between(0.7, 1)
        outer.ellipse((x - r, y - r, x + r, y + r), fill=255)
        inner.ellipse((x - r, y - r, x + r, y + r), fill=165)
        inner.ellipse((x - r, y - r, x + r * 0.62, y + r * 0.62), fill=255)
    body = ImageChops.multiply(body, _cloud_fade(round(opacity * 20), 0.62).resize((w, h)))
    light = ImageChops.multiply(light, _cloud_fade(20, 0.34).resize((w, h)))
    light = ImageChops.multiply(light.filter(ImageFilter.BoxBlur(max(1, h // 22))), body)
    corner = (round(cx * board.pixels - 1.5 * w), round(base * board.pixels - 3 * h))
    fill, big = Image.new("RGB", (w, h), board.tone(shade)), (3 * w, 3 * h)
    fill.paste(board.tone(lit), (0, 0, w, h), light)
    board.image.paste(fill.resize(big), corner, body.resize(big, Image.Resampling.BILINEAR))


@lru_cache(maxsize=32)
def _cloud_fade(twentieths: int, full: float) -> Image.Image:
    """How a cloud, or the light on it, thins out towards its base: a column, at full strength down to `full`."""
    column = np.interp(np.linspace(0, 1, 48), (0, full, 1), (1, 1, 0.08)) * 255 * twentieths / 20
    return Image.fromarray(column.astype(np.uint8)[:, None])


def tufts(board: Board, count: int, top: float, bottom: float, colour: Colour) -> None:
    """Little strokes of grass, larger towards the viewer."""
    for _ in range(count):
        depth = board.rng.random() ** 0.7
        x, y, s = board.between(0, 1), top + (bottom - top) * depth, 0.006 + 0.016 * depth
        board.stamp(_TUFT, x, y, s, s, colour)


def streak(cx: float, cy: float, reach: float) -> list[Point]:
    """A long wisp of high cloud, slightly aslant."""
    return smooth(
        [(cx - reach, cy + 0.02), (cx, cy - 0.008), (cx + reach, cy - 0.03), (cx + reach * 0.3, cy + 0.012)], 4
    )
