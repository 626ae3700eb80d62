"""What is true of a drawn scene: its setting and its things, and how scenes are sampled.

Every picture of the drawn world is made *from* a `Scene`, so the truth is known exactly and never
has to be annotated. A scene is a pure function of `(split, index)`: the same two values give the same
facts and, because `Scene.seed` also seeds the drawing's jitter, the same picture.
"""

import zlib
from dataclasses import asdict, dataclass

import numpy as np

SETTINGS = (
    "beach",  # at sunset
    "sky",  # with clouds
    "street",  # a city street at night
    "space",
    "park",
    "grassland",
    "waterfall",  # with a rainbow
    "snow",
    "lake",
    "desert",
)
KINDS = (
    "bird",
    "dog",
    "cat",
    "panda",
    "car",
    "bicycle",
    "boat",
    "rocket",
    "balloon",
    "kite",
    "tree",
    "flower",
    "house",
    "astronaut",
    "reader",  # an old person reading on a bench
    "dancer",
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
COLOURLESS = frozenset({"panda"})  # black and white, always
FLYERS = frozenset({"bird", "rocket", "balloon", "kite"})
PLACES = ("left", "middle", "right")
DISTANCES = ("near", "far")
SIZES = ("small", "medium", "big")  # far things are small; near things are medium or big
WIDTHS = {"small": (1 / 6, 1 / 4), "medium": (0.25, 0.34), "big": (0.40, 0.50)}  # of the picture's width
MAX_THINGS = 4

# The compositional hold-out (data/README.md): these pairs appear in no picture that the encoder, W or the
# language model trains with, and in no class list of the encoder's loss. Text may name them.
HELD_OUT_COLOURS = frozenset(
    {
        ("car", "green"),
        ("dog", "blue"),
        ("boat", "pink"),
        ("house", "orange"),
        ("kite", "yellow"),
        ("bicycle", "red"),
        ("flower", "white"),
        ("balloon", "purple"),
    }
)
HELD_OUT_SETTINGS = frozenset(
    {
        ("tree", "street"),
        ("dog", "lake"),
        ("dancer", "snow"),
        ("rocket", "park"),
        ("cat", "desert"),
        ("astronaut", "waterfall"),
    }
)

# In training, each setting prefers four kinds, so that a language prior exists for the model to lean on.
# With probability USUAL_SHARE a thing is drawn from these, otherwise from all kinds uniformly.
USUAL = {
    "beach": ("boat", "kite", "dog", "bird"),
    "sky": ("bird", "balloon", "kite", "rocket"),
    "street": ("car", "bicycle", "house", "cat"),
    "space": ("rocket", "astronaut", "balloon", "bird"),
    "park": ("reader", "tree", "dog", "bicycle"),
    "grassland": ("panda", "flower", "tree", "kite"),
    "waterfall": ("flower", "bird", "tree", "dancer"),
    "snow": ("house", "tree", "dog", "cat"),
    "lake": ("boat", "house", "bird", "reader"),
    "desert": ("car", "balloon", "astronaut", "flower"),
}
USUAL_SHARE = 0.35

# Splits are disjoint streams of random numbers. Only "exam" and "holdout" measure; only "exam" decides. "text" is
# never drawn: its facts become sentences for the language model, held-out pairs included.
SPLITS = ("base", "train", "dev", "exam", "holdout", "text")
UNIFORM_SPLITS = frozenset({"dev", "exam", "holdout", "text"})


@dataclass(frozen=True)
class Thing:
    """One thing in a picture.

    `colour` is None for the kinds in `COLOURLESS`. `size` follows from the distance ("small" if and only if
    far); the drawn width is a share of the picture's width taken from `WIDTHS[size]`.
    """

    kind: str
    colour: str | None
    place: str
    distance: str
    size: str


@dataclass(frozen=True)
class Scene:
    """The facts of one picture: a setting, one to four things in distinct (place, distance) slots, a seed."""

    setting: str
    things: tuple[Thing, ...]
    seed: int

    def to_dict(self) -> dict:
        """The facts as plain JSON values."""
        return asdict(self) | {"things": [asdict(thing) for thing in self.things]}

    @classmethod
    def from_dict(cls, facts: dict) -> "Scene":
        """The inverse of `to_dict`."""
        return cls(facts["setting"], tuple(Thing(**thing) for thing in facts["things"]), facts["seed"])


def is_held_out(kind: str, colour: str | None, setting: str) -> bool:
    """Whether a thing of this kind and colour in this setting belongs to the compositional hold-out."""
    return (kind, colour) in HELD_OUT_COLOURS or (kind, setting) in HELD_OUT_SETTINGS


def random_stream(*key: object) -> np.random.Generator:
    """A random generator that depends on nothing but `key` (not on Python's hash seed)."""
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in key])


def sample_scene(split: str, index: int, things: int | None = None) -> Scene:
    """Scene number `index` of a split.

    `things` fixes how many things there are (1 to 4); by default the count is uniform, and in the uniform
    splits it cycles 1, 2, 3, 4 so that each is exactly a quarter. In "dev", "exam" and "holdout", kinds, colours,
    settings and places are uniform; in "base" and "train" settings have usual inhabitants. Among the pictures,
    held-out pairs appear in "holdout" alone, where each scene has at least one; "text" is not restricted.

    Raises ValueError for an unknown split or a count outside 1..4.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if things is not None and not 1 <= things <= MAX_THINGS:
        raise ValueError(f"a scene has 1 to {MAX_THINGS} things, not {things}")
    rng = random_stream("scene", split, index)
    count = things or int(rng.integers(1, MAX_THINGS + 1))
    if things is None and split in UNIFORM_SPLITS:
        count = index % MAX_THINGS + 1
    while True:
        scene = _draw_facts(rng, split, count)
        held_out = [is_held_out(thing.kind, thing.colour, scene.setting) for thing in scene.things]
        if split == "text" or any(held_out) == (split == "holdout"):
            return scene


def _draw_facts(rng: np.random.Generator, split: str, count: int) -> Scene:
    setting = SETTINGS[rng.integers(len(SETTINGS))]
    identities: list[tuple[str, str | None]] = []
    while len(identities) < count:
        usual = split not in UNIFORM_SPLITS and rng.random() < USUAL_SHARE
        kinds = USUAL[setting] if usual else KINDS
        kind = kinds[rng.integers(len(kinds))]
        colour = None if kind in COLOURLESS else COLOURS[rng.integers(len(COLOURS))]
        if (kind, colour) not in identities:
            identities.append((kind, colour))
    slots = _draw_slots(rng, count)
    sizes = _draw_sizes(rng, slots)
    things = tuple(Thing(k, c, *slot, size) for (k, c), slot, size in zip(identities, slots, sizes, strict=True))
    return Scene(setting, things, int(rng.integers(2**31)))


def _draw_slots(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Distinct (place, distance) slots; a third of all things are far, whatever the count.

    Four things cannot all be near (there are three near slots), so with four the number of far things is 1 or
    2 with mean 4/3; with fewer each thing is far with probability one third.
    """
    far = 1 + int(rng.random() < 1 / 3) if count == MAX_THINGS else int(rng.binomial(count, 1 / 3))
    far_places = rng.permutation(PLACES)[:far]
    near_places = rng.permutation(PLACES)[: count - far]
    slots = [(str(p), "far") for p in far_places] + [(str(p), "near") for p in near_places]
    return [slots[i] for i in rng.permutation(count)]


def _draw_sizes(rng: np.random.Generator, slots: list[tuple[str, str]]) -> list[str]:
    """At most one thing is big, and only where no more than two are near: there must be room for it."""
    sizes = ["small" if distance == "far" else "medium" for _, distance in slots]
    near = [i for i, size in enumerate(sizes) if size == "medium"]
    if near and len(near) <= 2 and rng.random() < 0.5:
        sizes[near[rng.integers(len(near))]] = "big"
    return sizes
