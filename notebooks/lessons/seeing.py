"""Lenses on the encoder: what a patch knows by itself, at each depth, and which patches it takes for its twins.

Only the encoder is looked at; W and the language model play no part. Letters as in `config.py`.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import ipywidgets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch.nn import functional as F

from lessons.plots import BLUE, GREY, INK, ORANGE, png, style
from minivlm.pretraining.encoder import covered, normalised
from minivlm.scenes.drawing.draw import Box, layout
from minivlm.scenes.drawing.gallery import draw_many
from minivlm.scenes.facts import COLOURS, KINDS, SETTINGS, Scene, Thing, random_stream
from minivlm.vision import VisionEncoder

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

COLOURLESS_PROBE = "no colour"  # what the colour probe is to say of a panda
DARK = 0.22  # brightness of a patch that is nothing like the chosen one


@dataclass(frozen=True)
class PatchExamples:
    """Patches that show exactly one thing each, and what thing that is.

    Attributes:
        features: (depths, patches, Dv); depth 0 is the patch by itself, the last one what W is given.
        kinds, colours: of the thing that each patch shows.
        pictures: the number of the picture that each patch is from.
    """

    features: np.ndarray
    kinds: np.ndarray
    colours: np.ndarray
    pictures: np.ndarray

    def of(self, fact: str) -> np.ndarray:
        """The labels for "kind" or "colour"."""
        return {"kind": self.kinds, "colour": self.colours}[fact]


def patch_examples(vision: VisionEncoder, scenes: Sequence[Scene]) -> PatchExamples:
    """Draw scenes, read them, and keep the patches whose centre lies on one thing and on no other."""
    features = depths(vision, draw_many(list(scenes), vision.clip.config.image_size, workers=1, title="drawing"))
    side = int(features.shape[2] ** 0.5)
    rows = [(index, patch, thing) for index, scene in enumerate(scenes) for patch, thing in shown(scene, side).items()]
    pictures, patches = (np.array([row[place] for row in rows]) for place in (0, 1))
    return PatchExamples(
        features[:, pictures, patches],
        np.array([thing.kind for *_, thing in rows]),
        np.array([thing.colour or COLOURLESS_PROBE for *_, thing in rows]),
        pictures,
    )


@torch.no_grad()
def depths(vision: VisionEncoder, pictures: np.ndarray) -> np.ndarray:
    """Patch tokens (depths, I, N, Dv) of uint8 pictures (I, H, W, 3) after every layer; depth 0 is before the first."""
    parts = [
        torch.stack(vision.clip(pixel_values=normalised(some), output_hidden_states=True).hidden_states)[:, :, 1:]
        for some in np.split(pictures, range(100, len(pictures), 100))
    ]
    return torch.cat(parts, dim=1).numpy()


def shown(scene: Scene, side: int) -> dict[int, Thing]:
    """Which patches (of side x side) show which thing; those that two things share are left out."""
    claims: dict[int, list[Thing]] = {}
    for thing, box in zip(scene.things, layout(scene), strict=True):
        for patch in covered(box, side).tolist():
            claims.setdefault(patch, []).append(thing)
    return {patch: things[0] for patch, things in claims.items() if len(things) == 1}


class Probe(NamedTuple):
    """A linear reader and how it did on pictures that it was not fitted to.

    Attributes:
        reader: gives each patch feature (Dv,) a word.
        accuracy: the share of held-out patches that it reads right.
        guessing: what one gets by always saying the commonest word.
    """

    reader: "Pipeline"
    accuracy: float
    guessing: float


def fit_probe(examples: PatchExamples, fact: str, depth: int, held_out: int) -> Probe:
    """Fit a logistic regression that reads "kind" or "colour" off a patch's feature at a depth.

    A linear probe (Alain and Bengio, arXiv:1610.01644): what it reads, a matrix like W can hand on.

    Args:
        held_out: the patches of the last so many pictures test the probe and fit nothing.
    """
    # here, for it takes half a second, and most of those who import this module never come here
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fit = examples.pictures < examples.pictures.max() + 1 - held_out
    features, truth = examples.features[depth], examples.of(fact)
    # saga works without BLAS, whose threads get in the way of torch's: forty times slower on two busy cores
    regression = LogisticRegression(solver="saga", C=0.1, max_iter=200, tol=1e-2, random_state=0)
    reader = make_pipeline(StandardScaler(), regression).fit(features[fit], truth[fit])
    words, counts = np.unique(truth[fit], return_counts=True)
    guessing = float(np.mean(truth[~fit] == words[counts.argmax()]))
    return Probe(reader, float(reader.score(features[~fit], truth[~fit])), guessing)


def probe_curve(accuracies: Mapping[str, Sequence[float]], guessing: Mapping[str, float]) -> Figure:
    """How well each fact can be read at each depth: one line per fact, and what guessing would give.

    Args:
        accuracies: for each fact its accuracy at depth 0, 1, 2, …
        guessing: for each fact the accuracy of a guess.
    """
    with style():
        figure = Figure(figsize=(7.6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for (fact, line), colour, marker in zip(accuracies.items(), (BLUE, ORANGE), ("o", "s"), strict=False):
            axes.plot(line, color=colour, marker=marker, markersize=7, linewidth=2.2)
            axes.axhline(guessing[fact], color=colour, linewidth=1.2, linestyle=":")
            lower = line[0] < max(values[0] for values in accuracies.values())
            for depth, value in enumerate(line):
                shift = (0, -17) if lower and depth else (0, 9)
                axes.annotate(
                    f"{value:.0%}", (depth, value), shift, textcoords="offset points", ha="center", fontsize=9
                )
            axes.annotate(
                fact, (0, line[0]), (-12, 0), textcoords="offset points", ha="right", va="center", fontsize=11
            )
        last = len(line) - 1
        axes.text(last + 0.58, max(guessing.values()) + 0.02, "guessing", ha="right", va="bottom", fontsize=9)
        ticks = [
            "the patch\nby itself",
            *(f"layer {depth}" for depth in range(1, last)),
            f"layer {last}:\nwhat W is given",
        ]
        axes.set_xticks(range(last + 1), ticks)
        axes.set(xlim=(-0.55, last + 0.6), ylim=(0, 1.1), ylabel="read right, held-out pictures")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.grid(axis="y", color="#E8E8E8")
        axes.set_axisbelow(True)
    return figure


def reading_plate(picture: Image.Image, readings: Mapping[str, Mapping[int, tuple[str, bool]]], side: int) -> Figure:
    """What probes read off single patches, written over the picture; wrong words are struck through.

    Args:
        picture: what is looked at.
        readings: for each panel's title, patch → (word, whether it is right).
        side: patches along an edge.
    """
    with style():
        figure = Figure(figsize=(5.6 * len(readings), 5.9), layout="constrained")
        for axes, (title, words) in zip(
            figure.subplots(1, len(readings), squeeze=False)[0], readings.items(), strict=True
        ):
            _picture(axes, picture, side, title, faded=0.35)
            for patch, (word, right) in words.items():
                y, x = divmod(patch, side)
                frame = Rectangle((x + 0.03, y + 0.2), 0.94, 0.6, facecolor="white", alpha=0.88)
                frame.set(edgecolor=BLUE if right else ORANGE, linewidth=1.6, linestyle="-" if right else "--")
                axes.add_patch(frame)
                text = word if right else "\u0336".join([*word, ""])
                size, weight = min(10, 68 / max(5, len(word))), "normal" if right else "bold"
                axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=size, fontweight=weight)
    return figure


def grid(axes: Axes, side: int) -> None:
    """White lines that cut a picture, drawn from 0 to `side`, into patches."""
    for cut in range(1, side):
        axes.plot([cut, cut], [0, side], color="white", linewidth=0.8, alpha=0.8)
        axes.plot([0, side], [cut, cut], color="white", linewidth=0.8, alpha=0.8)


def cut_plate(picture: Image.Image, side: int, pulled: Sequence[int]) -> Figure:
    """A picture, its patches pulled apart, and some of them large, as the line of patches that the encoder reads.

    Args:
        picture: square.
        side: patches along an edge.
        pulled: four patches that are shown large, with their numbers.
    """
    size = picture.width // side
    pixels = np.asarray(picture.resize((size * side, size * side)))
    with style():
        figure = Figure(figsize=(11.5, 4.3))
        whole, apart = figure.add_axes((0.005, 0.02, 0.36, 0.9)), figure.add_axes((0.385, 0.02, 0.36, 0.9))
        whole.imshow(pixels, extent=(0, side, side, 0), interpolation="bicubic")
        grid(whole, side)
        for patch in range(side * side):
            y, x = divmod(patch, side)
            apart.imshow(_cut(pixels, patch, side), extent=(x + 0.06, x + 0.94, y + 0.94, y + 0.06))
            if patch in pulled:
                apart.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2.2))
        for axes, title in ((whole, "one picture"), (apart, f"{side} × {side} = {side * side} patches")):
            axes.set(xlim=(-0.05, side + 0.05), ylim=(side + 0.05, -0.05), aspect="equal", title=title)
            axes.axis("off")
        for place, patch in enumerate(pulled):
            one = figure.add_axes((0.765 + 0.12 * (place % 2), 0.52 - 0.4 * (place // 2), 0.11, 0.3))
            one.imshow(_cut(pixels, patch, side), interpolation="nearest")
            one.set_title(f"patch {patch}", fontsize=10)
            one.axis("off")
    return figure


def _cut(pixels: np.ndarray, patch: int, side: int) -> np.ndarray:
    """One patch (size, size, 3) of a picture."""
    (y, x), size = divmod(patch, side), pixels.shape[0] // side
    return pixels[y * size : (y + 1) * size, x * size : (x + 1) * size]


def cosines(patch_features: torch.Tensor) -> torch.Tensor:
    """How alike all patches are, (…, N, N) from features (…, N, Dv): the cosine of the angle between two of them."""
    unit = F.normalize(patch_features, dim=-1)
    return unit @ unit.transpose(-1, -2)


def twin_of(cosine: torch.Tensor, patch: int, apart: int = 3) -> int:
    """The patch most like a given one, of all that are at least `apart` rows or columns away. `cosine` is (N, N)."""
    side = int(len(cosine) ** 0.5)
    y, x = divmod(patch, side)
    away = [other for other in range(side * side) if max(abs(other // side - y), abs(other % side - x)) >= apart]
    return away[int(cosine[patch, away].argmax())]


class Twin(NamedTuple):
    """One panel of `twin_plate`: a picture, its cosines (N, N), the chosen patch, and a title."""

    picture: Image.Image
    cosine: torch.Tensor
    patch: int
    title: str


def twin_plate(twins: Sequence[Twin]) -> Figure:
    """Where is this patch's twin? Light falls on each patch as far as it is like the chosen one (thick frame).

    The most alike patch that is not a near neighbour has a dashed frame and bears its cosine.
    """
    with style():
        width = min(3.9, 11.6 / len(twins))
        figure = Figure(figsize=(width * len(twins), width + 0.3), layout="constrained")
        for axes, twin in zip(np.atleast_1d(figure.subplots(1, len(twins))), twins, strict=True):
            _twin_panel(axes, twin)
    return figure


def _twin_panel(axes: Axes, twin: Twin) -> None:
    side = int(len(twin.cosine) ** 0.5)
    like = twin.cosine[twin.patch].reshape(side, side).clamp(0, 1).numpy()
    pixels = np.asarray(twin.picture.convert("RGB"), dtype=float) / 255
    light = np.asarray(Image.fromarray(like.astype(np.float32)).resize(twin.picture.size, Image.Resampling.NEAREST))
    grey = pixels.mean(-1, keepdims=True) * DARK
    axes.imshow(grey + (pixels - grey) * light[..., None], extent=(0, side, side, 0), interpolation="bicubic")
    found = twin_of(twin.cosine, twin.patch)
    for patch, dashes, colour in ((twin.patch, "-", ORANGE), (found, (0, (2.5, 1.2)), "white")):
        y, x = divmod(patch, side)
        axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=colour, linewidth=3, linestyle=dashes))
    y, x = divmod(found, side)
    axes.text(
        x + 0.5,
        y - 0.15 if y else 1.15,
        f"{twin.cosine[twin.patch, found]:.2f}",
        ha="center",
        va="bottom" if y else "top",
        color="white",
        fontsize=10,
        fontweight="bold",
    )
    axes.set_title(twin.title, fontsize=10.5)
    axes.set(xlim=(-0.06, side + 0.06), ylim=(side + 0.06, -0.06))
    axes.axis("off")


def side_by_side(setting: str, left: tuple[str, str], right: tuple[str, str], seed: int) -> Scene:
    """A scene with two near things of medium size, each given as (kind, colour)."""
    things = (Thing(*left, "left", "near", "medium"), Thing(*right, "right", "near", "medium"))
    return Scene(setting, things, seed)


def pairs(alike: Sequence[str], count: int, seed: int = 0) -> list[Scene]:
    """Scenes with two things, left and right: what is named in `alike` ("kind", "colour") is the same of both.

    What is not named differs. Pandas, which have no colour, are left out.
    """
    rng, scenes = random_stream("pairs", seed), []
    kinds = [kind for kind in KINDS if kind != "panda"]
    while len(scenes) < count:
        kind, other_kind = (kinds[i] for i in rng.choice(len(kinds), 2, replace=False))
        hue, other_hue = (COLOURS[i] for i in rng.choice(len(COLOURS), 2, replace=False))
        right = (kind if "kind" in alike else other_kind, hue if "colour" in alike else other_hue)
        setting, jitter = SETTINGS[rng.integers(len(SETTINGS))], int(rng.integers(2**31))
        scenes.append(side_by_side(setting, (kind, hue), right, jitter))
    return scenes


def twin_rate(vision: VisionEncoder, scenes: Sequence[Scene]) -> float:
    """How often the patch most like one of the left thing's, outside that thing's box, shows the right thing."""
    features = depths(vision, draw_many(list(scenes), vision.clip.config.image_size, workers=1, title="pairs"))[-1]
    hits = []
    for scene, cosine in zip(scenes, cosines(torch.from_numpy(features)), strict=True):
        (left, right), side = layout(scene), int(len(cosine) ** 0.5)
        outside = _outside(left, side)
        twins = outside[cosine[covered(left, side)][:, outside].argmax(1).numpy()]
        hits += np.isin(twins, covered(right, side)).tolist()
    return float(np.mean(hits))


def _outside(box: Box, side: int) -> np.ndarray:
    """The patches whose centre is at least a patch's width away from a box."""
    centres = (np.arange(side) + 0.5) / side
    y, x = (axis.reshape(-1) for axis in np.meshgrid(centres, centres, indexing="ij"))
    left, top, right, bottom = box
    return np.flatnonzero(
        (x < left - 1 / side) | (x > right + 1 / side) | (y < top - 1 / side) | (y > bottom + 1 / side)
    )


def twin_chooser(picture: Image.Image, cosine: torch.Tensor, patch: int) -> ipywidgets.VBox:
    """Two sliders choose a patch by row and column, and its map follows. Arrow keys move a slider that has the focus.

    Args:
        picture: what is looked at.
        cosine: (N, N) from `cosines`.
        patch: chosen at first.
    """
    side = int(len(cosine) ** 0.5)
    row, column = (
        ipywidgets.IntSlider(value, 0, side - 1, description=name)
        for name, value in zip(("row", "column"), divmod(patch, side), strict=True)
    )
    view = ipywidgets.HTML()

    def redraw(_=None) -> None:
        chosen = row.value * side + column.value
        found = twin_of(cosine, chosen)
        said = (
            f"Patch {chosen} (row {row.value}, column {column.value}): most like patch {found} "
            f"(row {found // side}, column {found % side}), cosine {cosine[chosen, found]:.2f}."
        )
        bytes_ = base64.b64encode(png(twin_plate([Twin(picture, cosine, chosen, f"like patch {chosen}")]))).decode()
        alt = f"The picture, lit where a patch is like the chosen one. {said}"
        view.value = (
            f'<img src="data:image/png;base64,{bytes_}" alt="{html.escape(alt)}" style="width:380px;max-width:100%">'
            f'<p role="status">{html.escape(said)}</p>'
        )

    for slider in (row, column):
        slider.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([row, column, view])


PART_COLOURS = {"vision": BLUE, "language_model": GREY, "projector": ORANGE}
PART_NAMES = {"vision": "encoder", "language_model": "language model", "projector": "W"}


def to_scale(models: Mapping[str, Mapping[str, int]]) -> Figure:
    """Every part of every model as a square whose area is its number of parameters, all on one scale.

    Args:
        models: for each model's name the parameters of "vision", "language_model" and "projector".
    """
    largest = max(count for parts in models.values() for count in parts.values())
    with style():
        figure = Figure(figsize=(11.5, 4.9))
        page, left = figure.add_axes((0, 0, 1, 1)), 0.0
        for name, parts in models.items():
            start = left
            for part, colour in PART_COLOURS.items():
                side = (parts[part] / largest) ** 0.5
                room = max(side, 0.27)
                x = left + (room - side) / 2
                page.add_patch(Rectangle((x, 0), side, side, facecolor=colour, edgecolor="white", linewidth=0.5))
                label = f"{PART_NAMES[part]}\n{parts[part]:,}"
                page.text(left + room / 2, -0.03, label, ha="center", va="top", fontsize=9.5, linespacing=1.4)
                left += room + 0.06
            page.plot([start, left - 0.06], [-0.19, -0.19], color=INK, linewidth=1)
            title = f"{name}: {sum(parts.values()):,} parameters"
            page.text((start + left - 0.06) / 2, -0.22, title, ha="center", va="top", fontsize=11, fontweight="bold")
            left += 0.12
        page.set(xlim=(-0.05, left - 0.13), ylim=(-0.32, 1.03), aspect="equal")
        page.axis("off")
    return figure


def _picture(axes: Axes, picture: Image.Image, side: int, title: str, faded: float = 0.0) -> None:
    """A picture drawn from 0 to `side`, faded towards white."""
    pixels = np.asarray(picture.convert("RGB"), dtype=float)
    axes.imshow(np.round(pixels + (255 - pixels) * faded).astype(np.uint8), extent=(0, side, side, 0))
    axes.set(xlim=(-0.03, side + 0.03), ylim=(side + 0.03, -0.03))
    axes.set_title(title, fontsize=11.5)
    axes.axis("off")
