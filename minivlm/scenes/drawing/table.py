"""The seven pictures of the table that the course starts from, as drawn counterparts.

The published table showed photographs: a sunset at the sea, clouds, an eagle in flight, city traffic at night, an
astronaut, an old person reading on a bench, a panda on the grass. Here each is a scene of the drawn world; the seeds
were chosen by eye.
"""

from pathlib import Path

from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.facts import Scene, Thing

TABLE: dict[str, Scene] = {
    "sunset": Scene(
        "beach",
        (Thing("kite", "red", "left", "near", "medium"), Thing("boat", "white", "right", "far", "small")),
        22,
    ),
    "clouds": Scene(
        "sky",
        (Thing("bird", "white", "left", "far", "small"), Thing("balloon", "red", "right", "near", "medium")),
        11,
    ),
    "eagle": Scene("snow", (Thing("bird", "orange", "middle", "near", "big"),), 10),
    "traffic": Scene(
        "street",
        (Thing("car", "red", "left", "near", "medium"), Thing("car", "yellow", "right", "near", "medium")),
        14,
    ),
    "astronaut": Scene(
        "space",
        (Thing("astronaut", "white", "middle", "near", "big"), Thing("rocket", "red", "right", "far", "small")),
        7,
    ),
    "reader": Scene(
        "park",
        (Thing("reader", "blue", "middle", "near", "big"), Thing("tree", "green", "right", "far", "small")),
        4,
    ),
    "panda": Scene(
        "grassland",
        (Thing("panda", None, "middle", "near", "big"), Thing("flower", "pink", "right", "near", "medium")),
        6,
    ),
}


def write_table(folder: str | Path) -> list[Path]:
    """Draw the seven pictures as `folder`/NAME.png, 224 x 224, and return their paths in the table's order.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, scene in TABLE.items():
        paths.append(folder / f"{name}.png")
        draw(scene).save(paths[-1], optimize=True)
    return paths
