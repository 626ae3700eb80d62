"""What the encoder's patches know: linear probes that read kind and colour, and which patches are alike.

Only the encoder is looked at; W and the language model play no part. Letters as in `config.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from minivlm.pretraining.encoder import covered, normalised
from minivlm.scenes.drawing.draw import Box, layout
from minivlm.scenes.drawing.gallery import draw_many
from minivlm.scenes.facts import COLOURS, KINDS, SETTINGS, Scene, Thing, random_stream
from minivlm.vision import VisionEncoder

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

COLOURLESS_PROBE = "no colour"  # the colour probe's label for a panda


@dataclass(frozen=True)
class PatchExamples:
    """Patches that show exactly one thing each, and what thing that is.

    Attributes:
        features: (depths, patches, Dv); depth 0 is the patch by itself, the last one what W is given.
        kinds, colours: of the thing that each patch shows.
        images: the number of the image that each patch is from.
    """

    features: np.ndarray
    kinds: np.ndarray
    colours: np.ndarray
    images: np.ndarray

    def of(self, fact: str) -> np.ndarray:
        """The labels for "kind" or "colour"."""
        return {"kind": self.kinds, "colour": self.colours}[fact]


def patch_examples(vision: VisionEncoder, scenes: Sequence[Scene]) -> PatchExamples:
    """Encode drawn scenes and keep the patches whose centre lies on one thing and on no other."""
    features = depths(vision, draw_many(list(scenes), vision.clip.config.image_size, workers=1, title="drawing"))
    side = int(features.shape[2] ** 0.5)
    labelled = [
        (index, patch, thing)
        for index, scene in enumerate(scenes)
        for patch, thing in things_of_patches(scene, side).items()
    ]
    images, patches = (np.array([row[column] for row in labelled]) for column in (0, 1))
    return PatchExamples(
        features[:, images, patches],
        np.array([thing.kind for *_, thing in labelled]),
        np.array([thing.colour or COLOURLESS_PROBE for *_, thing in labelled]),
        images,
    )


@torch.no_grad()
def depths(vision: VisionEncoder, images: np.ndarray) -> np.ndarray:
    """Patch tokens (depths, I, N, Dv) of uint8 images (I, H, W, 3) after every layer; depth 0 is before the first."""
    parts = [
        torch.stack(vision.clip(pixel_values=normalised(some), output_hidden_states=True).hidden_states)[:, :, 1:]
        for some in np.split(images, range(100, len(images), 100))
    ]
    return torch.cat(parts, dim=1).numpy()


def things_of_patches(scene: Scene, side: int) -> dict[int, Thing]:
    """Which patches (of side x side) show which thing; those that two things share are left out."""
    claims: dict[int, list[Thing]] = {}
    for thing, box in zip(scene.things, layout(scene), strict=True):
        for patch in covered(box, side).tolist():
            claims.setdefault(patch, []).append(thing)
    return {patch: things[0] for patch, things in claims.items() if len(things) == 1}


def patches_of(scene: Scene, index: int, side: int) -> np.ndarray:
    """The patches (of side x side) whose centre lies on one thing of a scene."""
    return covered(layout(scene)[index], side)


class Probe(NamedTuple):
    """A linear probe and how it did on images that it was not fitted to.

    Attributes:
        reader: maps a patch feature (Dv,) to a word.
        accuracy: on held-out patches.
        guessing: the accuracy of always saying the commonest word.
    """

    reader: "Pipeline"
    accuracy: float
    guessing: float


def fit_probe(examples: PatchExamples, fact: str, depth: int, held_out: int) -> Probe:
    """Fit a logistic regression that reads "kind" or "colour" off a patch's feature at a depth.

    A linear probe (Alain and Bengio, arXiv:1610.01644): what it reads, a matrix like W can hand on.

    Args:
        held_out: the patches of the last so many images test the probe and fit nothing.
    """
    # imported here: it takes half a second, and most importers of this module never fit a probe
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fit = examples.images < examples.images.max() + 1 - held_out
    features, truth = examples.features[depth], examples.of(fact)
    # saga works without BLAS, whose threads get in the way of torch's: forty times slower on two busy cores
    regression = LogisticRegression(solver="saga", C=0.1, max_iter=200, tol=1e-2, random_state=0)
    reader = make_pipeline(StandardScaler(), regression).fit(features[fit], truth[fit])
    words, counts = np.unique(truth[fit], return_counts=True)
    guessing = float(np.mean(truth[~fit] == words[counts.argmax()]))
    return Probe(reader, float(reader.score(features[~fit], truth[~fit])), guessing)


def cosines(patch_features: torch.Tensor) -> torch.Tensor:
    """The cosine similarity of all pairs of patches, (…, N, N), from features (…, N, Dv)."""
    unit = F.normalize(patch_features, dim=-1)
    return unit @ unit.transpose(-1, -2)


def twin_of(cosine: torch.Tensor, patch: int, apart: int = 3) -> int:
    """The patch most like a given one, of all that are at least `apart` rows or columns away. `cosine` is (N, N)."""
    side = int(len(cosine) ** 0.5)
    y, x = divmod(patch, side)
    away = [other for other in range(side * side) if max(abs(other // side - y), abs(other % side - x)) >= apart]
    return away[int(cosine[patch, away].argmax())]


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
