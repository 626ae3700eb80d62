"""What the tests of real data share: good rows, the twelve bad ones, and the three forms of files they stand in."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


GOOD = [
    {"conversations": turns("<image>\nWhat is in this picture?", "a red car"), "image": "0.jpg"},
    {"conversations": turns("<image>\n<image>\n这个图像中有什么内容？", "一只白色的狗。"), "image": "0.jpg, 1.jpg"},
    {"conversations": [{"role": "system", "content": "Be brief."}, *turns("Hi", "Hi", "And?", "No.")]},
]
BAD = {  # name -> a bad row, and its message
    "not JSON": ('{"conversations": ', "not a line of JSON"),
    "missing key": ({"image": "0.jpg"}, 'not an object with "conversations"'),
    "wrong role": ({"conversations": [{"role": "robot", "content": "Hi"}, *turns("Hi", "Hi")]}, "role 'robot'"),
    "roles out of order": ({"conversations": turns("Hi", "Hi")[::-1]}, "where the user's is expected"),
    "no assistant turn": ({"conversations": turns("Hi")}, "no supervised token"),
    "empty answer": ({"conversations": turns("Hi", "")}, "an assistant turn is empty"),
    "more <image> than pictures": (
        {"conversations": turns("<image><image>", "Hi"), "image": "0.jpg"},
        "2 <image> in the text, but 1 images",
    ),
    "fewer": ({"conversations": turns("Hi", "Hi"), "image": "0.jpg"}, "0 <image> in the text, but 1 images"),
    "file missing": ({"conversations": turns("<image>", "Hi"), "image": "gone.jpg"}, "gone.jpg is missing"),
    "outside the folder": ({"conversations": turns("<image>", "Hi"), "image": "../0.jpg"}, "no name inside"),
    "picture unreadable": ({"conversations": turns("<image>", "Hi"), "image": "cut.jpg"}, "the file is cut off"),
    "too long": ({"conversations": turns("a red car " * 200, "Hi")}, "tokens"),
}


def with_images(folder: Path) -> Path:
    """Two images, and one that is cut off."""
    for name, colour in (("0.jpg", "red"), ("1.jpg", "lime"), ("cut.jpg", "blue")):
        Image.new("RGB", (16, 16), colour).save(folder / name)
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-20])
    return folder


def write(folder: Path, rows: list) -> Path:
    file = folder / "train.jsonl"
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


def write_array(folder: Path, rows: list) -> Path:
    speakers = {"user": "human", "assistant": "gpt"}
    array = []
    for number, row in enumerate(rows):
        turns = [
            {"from": speakers.get(turn["role"], turn["role"]), "value": turn["content"]}
            for turn in row.get("conversations", [])
        ]
        array.append({"id": number, **row, **({"conversations": turns} if "conversations" in row else {})})
    file = folder / "llava.json"
    file.write_text(json.dumps(array, indent=1, ensure_ascii=False), "utf-8")
    return file


def write_table(folder: Path, rows: list, **options) -> Path:
    """Parquet: turns as JSON, the bytes of images; one image is no list."""
    table = {"conversations": [], "image_bytes": []}
    for row in rows:
        turns = row if isinstance(row, str) else json.dumps(row["conversations"]) if "conversations" in row else None
        names = row["image"].split(", ") if isinstance(row, dict) and "image" in row else []
        table["conversations"].append(turns)
        table["image_bytes"].append([(folder / name).read_bytes() for name in names] or None)
    if all(held is None or len(held) == 1 for held in table["image_bytes"]):
        table["image_bytes"] = [held and held[0] for held in table["image_bytes"]]
    file = folder / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table), file, **options)
    return file


FORMS = {  # how rows are written, what a row's name is, and what cannot go wrong there
    "JSON lines": (write, "line", set()),
    "LLaVA": (write_array, "item", {"not JSON"}),
    "Parquet": (write_table, "row", {"file missing", "outside the folder"}),
}
REASONS = {  # where they are others than in JSON lines
    ("Parquet", "not JSON"): "not JSON",
    ("LLaVA", "wrong role"): "a turn is from 'robot'",
}


# ---- for stores of features

NOISE = 10  # different images


def with_noise(folder: Path) -> Path:
    """Ten images of noise, none like another, in a new folder."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(NOISE):
        Image.fromarray(random.integers(0, 256, (12, 10, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def noise_rows() -> list[dict]:
    """One image, two, and none by turns: all ten of them in eighteen positions, the last one first."""
    rows = []
    for i in range(18):
        turn = i // 3
        shown = [[9 - turn], [turn, (2 * turn + 1) % 10], []][i % 3]
        row = {"conversations": turns("<image>\n" * len(shown) + "What is in this picture?", f"a red car, {i}")}
        rows.append(row | ({"image": ", ".join(f"{number}.png" for number in shown)} if shown else {}))
    return rows


def different_images(samples) -> list:
    """Each different image once, in the order of the samples; compared by the bytes of their files."""
    images = {}
    for sample in samples:
        for image in sample.images:
            images.setdefault(image if isinstance(image, bytes) else image.read_bytes(), image)
    return list(images.values())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
