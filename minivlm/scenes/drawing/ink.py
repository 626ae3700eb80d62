"""Shared drawing tools of the drawn world: one palette, smooth curves, a pen for settings, a sketch for things."""

from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

RGB = tuple[int, int, int]

# base, light and dark tone of every colour word; chosen to stay apart from one another at 20 pixels
TONES = {
    "red": ((212, 36, 42), (236, 82, 72), (146, 18, 34)),
    "orange": ((245, 126, 20), (254, 168, 74), (198, 90, 8)),
    "yellow": ((250, 214, 40), (255, 235, 124), (220, 170, 16)),
    "green": ((48, 156, 68), (112, 198, 104), (22, 104, 52)),
    "blue": ((38, 98, 212), (94, 150, 242), (20, 58, 146)),
    "purple": ((126, 56, 172), (170, 110, 214), (80, 28, 118)),
    "pink": ((248, 132, 182), (255, 182, 212), (214, 86, 144)),
    "white": ((243, 243, 240), (255, 255, 255), (194, 199, 210)),
}
INK = (52, 44, 58)  # the soft dark of outlines, eyes and tyres

_TONE_JITTER, _TINT_JITTER = 0.035, 0.015  # relative; far less than what lies between two colour words
_RIM = 0.016  # of the sprite's side: width of the outline and of the lit and shaded rims
_LIGHT = (255, 248, 226)
_LIT, _SHADED = ([round(v * share) for v in range(256)] for share in (0.36, 0.22))  # how strong the rims are
_STEEP = [min(255, 4 * v) for v in range(256)]  # hardens a blurred edge again, further out
_OUTLINE_SHARE = 0.45  # how much of the outline is the thing's own dark tone; the rest is INK
_CIRCLE = np.stack([f(np.linspace(0, 2 * np.pi, 28, endpoint=False)) for f in (np.cos, np.sin)], axis=1)
_CAP = np.stack([f(np.linspace(-np.pi / 2, np.pi / 2, 7)) for f in (np.cos, np.sin)], axis=1)


@cache
def _catmull_rom(steps: int) -> np.ndarray:
    """Weights (steps, 4) of four neighbouring points along the curve between the middle two."""
    t = np.linspace(0, 1, steps, endpoint=False)
    return 0.5 * np.stack((-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2), axis=1)


def _curve(padded: np.ndarray, steps: int) -> np.ndarray:
    """The Catmull-Rom curve from the second to the last but one of the `padded` points."""
    count = len(padded) - 3
    neighbours = np.concatenate((padded[:-3], padded[1:-2], padded[2:-1], padded[3:])).reshape(4, -1)
    return (_catmull_rom(steps) @ neighbours).reshape(steps, count, 2).swapaxes(0, 1).reshape(-1, 2)


def smooth(points: list[tuple[float, float]], steps: int = 6) -> list[tuple[float, float]]:
    """A closed Catmull-Rom curve through `points`, as a polygon."""
    return [tuple(xy) for xy in _closed(points, steps)]


def _closed(points, steps: int = 6) -> np.ndarray:
    p = np.asarray(points, dtype=float)
    return _curve(np.concatenate((p[-1:], p, p[:2])), steps)


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """The colour `share` of the way from `a` to `b`."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


class Tones(NamedTuple):
    """The tones of one thing: its colour word's three, slightly jittered, and that of its outline."""

    word: str
    base: RGB
    light: RGB
    dark: RGB
    outline: RGB


def tones(word: str, rng: np.random.Generator) -> Tones:
    """The tones of a colour word for one thing."""
    gain = 1 + rng.uniform(-_TONE_JITTER, _TONE_JITTER) + rng.uniform(-_TINT_JITTER, _TINT_JITTER, 3)
    base, light, dark = (tuple(int(min(255, v * g)) for v, g in zip(tone, gain, strict=True)) for tone in TONES[word])
    return Tones(word, base, light, dark, mix(INK, dark, _OUTLINE_SHARE))


class Pen:
    """Draws on a Pillow image in unit coordinates: (0, 0) is the top left corner, (1, 1) the bottom right."""

    def __init__(self, image: Image.Image):
        self.image = image
        self.scale = image.size[0]
        self._draw = ImageDraw.Draw(image)

    def polygon(self, points, fill) -> None:
        """A filled polygon."""
        self._draw.polygon([(x * self.scale, y * self.scale) for x, y in points], fill=fill)

    def blob(self, points, fill) -> None:
        """A filled smooth closed curve through the points."""
        self.polygon(smooth(points), fill)

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, fill) -> None:
        """A filled ellipse given by its centre and radii."""
        s = self.scale
        self._draw.ellipse(((cx - rx) * s, (cy - ry) * s, (cx + rx) * s, (cy + ry) * s), fill=fill)

    def line(self, points, fill, width: float) -> None:
        """A line with round joints; `width` in unit coordinates."""
        pixels = max(1, round(width * self.scale))
        self._draw.line([(x * self.scale, y * self.scale) for x, y in points], fill=fill, width=pixels, joint="curve")


class Sketch:
    """Collects shapes first and paints them later, fitted to a box.

    Coordinates are the painter's own, y pointing down; the painters of things use about 0 to 100. Only
    `render` decides on mirroring, tilt and scale, on the exact geometry, so that nothing is ever resampled.
    """

    def __init__(self):
        self._shapes: list[tuple[np.ndarray, RGB]] = []

    def polygon(self, points, fill: RGB) -> None:
        """A filled polygon."""
        self._shapes.append((np.asarray(points, dtype=float), fill))

    def blob(self, points, fill: RGB) -> None:
        """A filled smooth closed curve through the points."""
        self._shapes.append((_closed(points), fill))

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, fill: RGB, turn: float = 0) -> None:
        """A filled ellipse given by its centre and radii, turned clockwise by `turn` degrees."""
        points = _CIRCLE * (rx, ry)
        self._shapes.append(((points @ _rotation(turn) if turn else points) + (cx, cy), fill))

    def stroke(self, points, fill: RGB, width: float, end: float | None = None) -> None:
        """A round-ended smooth line through the points, tapering from `width` to `end`."""
        p = np.asarray(points, dtype=float)
        if len(p) > 2:
            p = np.concatenate((_curve(np.concatenate((2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1])), 5), p[-1:]))
        along = np.concatenate((p[1:2] - p[:1], p[2:] - p[:-2], p[-1:] - p[-2:-1]))
        along /= np.hypot(along[:, :1], along[:, 1:])
        side = along[:, ::-1] * (-1, 1)
        end = width if end is None else end
        reach = side * (width + (end - width) / (len(p) - 1) * np.arange(len(p)))[:, None] / 2
        head = p[-1] + end / 2 * (_CAP @ (along[-1], -side[-1]))
        tail = p[0] - width / 2 * (_CAP @ (along[0], -side[0]))
        self._shapes.append((np.concatenate((p + reach, head, (p - reach)[::-1], tail)), fill))

    def render(
        self,
        pixels: int,
        outline: RGB,
        *,
        mirror: bool = False,
        tilt: float = 0,
        stretch: float = 1,
        stand: bool = True,
    ) -> Image.Image:
        """Paint all shapes on a transparent square, as large as it allows, outlined and lit from the upper left.

        The sketch is turned by `tilt` degrees, stretched in width and mirrored; then it is centred, with its
        lowest point on the bottom border where it is to `stand`.
        """
        rim = max(1, round(pixels * _RIM))
        flat = Image.new("RGBA", (pixels, pixels), (*outline, 0))
        draw = ImageDraw.Draw(flat)
        for points, fill in self._fitted(pixels, rim, np.diag((-stretch if mirror else stretch, 1)), tilt, stand):
            draw.polygon(points, fill=(*fill, 255))
        return _outlined(flat, outline, rim)

    def _fitted(self, pixels: int, rim: int, frame: np.ndarray, tilt: float, stand: bool):
        """The shapes in pixels, `rim` of them kept free all around, each as a flat list x, y, x, y, ..."""
        points = np.concatenate([shape for shape, _ in self._shapes]) @ _rotation(tilt) @ frame
        low, high = points.min(0), points.max(0)
        room = pixels - 1 - 2 * rim
        scale = room / (high - low).max()
        free = (room - (high - low) * scale) * (0.5, 1.0 if stand else 0.5)
        points = (points - low) * scale + free + rim
        start = 0
        for shape, fill in self._shapes:
            yield points[start : start + len(shape)].ravel().tolist(), fill
            start += len(shape)


def _rotation(degrees: float) -> np.ndarray:
    """A matrix that turns row vectors clockwise (y points down)."""
    sine, cosine = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
    return np.array(((cosine, sine), (-sine, cosine)))


def _outlined(flat: Image.Image, outline: RGB, rim: int) -> Image.Image:
    """`flat` with a lit rim at the upper left, a shaded one at the lower right and an outline all around."""
    alpha = flat.getchannel("A")
    colours = flat.convert("RGB")  # the outline's colour where nothing was painted
    lit = ImageChops.subtract(alpha, ImageChops.offset(alpha, rim, rim))
    shaded = ImageChops.subtract(alpha, ImageChops.offset(alpha, -rim, -rim))
    colours.paste(outline, mask=shaded.point(_SHADED))
    colours.paste(_LIGHT, mask=lit.point(_LIT))
    colours.putalpha(ImageChops.lighter(alpha, alpha.filter(ImageFilter.BoxBlur(rim)).point(_STEEP)))
    return colours
