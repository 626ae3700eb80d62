"""How far images are from the drawn world, and where to draw the line:

    `python tests/benchmarks/familiar.py [FOLDER]`.

Mean and covariance of the encoder's features are taken from one part of the held-out "dev" scenes, the threshold from
another: the distance that one scene in a hundred exceeds. No photograph is used for either. Then both kinds of error
are counted on images that decided nothing: exam and holdout scenes, exam scenes after JPEG, photographs and crops of
them. Photographs are those that matplotlib and scikit-learn install, and all images below FOLDER.
"""

import argparse
import io
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import sklearn.datasets
import torch
from lessons.lesson_00 import Familiar, fit, save_familiar
from PIL import Image, ImageOps

from minivlm.checkpoint import load_checkpoint
from minivlm.data.features import encode_images
from minivlm.data.images import FORMATS, open_image
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.paths import BASE, data_folder
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.facts import Scene, sample_scene
from minivlm.scenes.features import scene_features

ALLOWED = 0.01  # of the drawn scenes may be called far
FITTED, JUDGED, TESTED, SAVED = 4000, 1000, 500, 200  # scenes for the fit, the threshold, each test, the JPEG test
QUALITY = 50  # of the JPEG files, of 100
CROP = 0.5  # of a photograph's sides; there are four, at its corners
ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}


def photographs(folder: Path | None) -> dict[str, Image.Image]:
    """Names and images: those of the installed packages, and those below a folder, by their paths in it."""
    sample = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    photos = {f"matplotlib/{sample.name}": open_image(sample)}
    images = sklearn.datasets.load_sample_images()
    for path, pixels in zip(images.filenames, images.images, strict=True):
        photos[f"scikit-learn/{Path(path).name}"] = Image.fromarray(pixels)
    for file in sorted(folder.rglob("*")) if folder else []:
        if file.suffix.lower() in ENDINGS:
            photos[file.relative_to(folder).as_posix()] = open_image(file)
    return photos


def corners(image: Image.Image) -> list[Image.Image]:
    """The four corners of an image."""
    width, height = (max(1, round(side * CROP)) for side in image.size)
    right, lower = image.width - width, image.height - height
    return [image.crop((x, y, x + width, y + height)) for y in (0, lower) for x in (0, right)]


def as_jpeg(image: Image.Image) -> Image.Image:
    """What is left of an image after a JPEG file of half its size and low quality."""
    stream = io.BytesIO()
    ImageOps.scale(image, 0.5).save(stream, format="JPEG", quality=QUALITY)
    return open_image(stream.getvalue())


def scenes(split: str, first: int, count: int) -> list[Scene]:
    """Some scenes of a split."""
    return [sample_scene(split, first + i) for i in range(count)]


def measured(
    model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, shown: dict[str, Image.Image]
) -> tuple[Familiar, dict[str, Any]]:
    """Fit, choose the threshold, and count the errors on both sides."""

    def drawn(split: str, first: int, count: int) -> torch.Tensor:
        some = scenes(split, first, count)
        return scene_features(model, processor, some, title=f"{split} scenes")

    def seen(images: Sequence[Image.Image], title: str) -> torch.Tensor:
        return encode_images(model, processor, images, title=title)

    familiar = fit(drawn("dev", 0, FITTED))
    judged = familiar.distances(drawn("dev", FITTED, JUDGED))
    familiar = replace(familiar, threshold=round(torch.quantile(judged, 1 - ALLOWED).item(), 3))
    saved = [as_jpeg(draw(scene)) for scene in scenes("exam", 0, SAVED)]
    features = {
        "exam scenes": drawn("exam", 0, TESTED),
        "holdout scenes": drawn("holdout", 0, TESTED),
        "exam scenes through JPEG": seen(saved, "JPEG"),
        "photographs": seen(list(shown.values()), "photographs"),
        "corners of photographs": seen([crop for one in shown.values() for crop in corners(one)], "corners"),
    }
    distances = {name: familiar.distances(of) for name, of in features.items()}
    report = {
        "chosen on": f"{JUDGED} dev scenes, of which {ALLOWED:.0%} lie beyond; fitted on {FITTED} others",
        "groups": {name: summary(values, familiar) for name, values in distances.items()},
        "scenes": rounded(distances["exam scenes"]),
        "photographs": dict(zip(shown, rounded(distances["photographs"]), strict=True)),
    }
    return familiar, report


def summary(distances: torch.Tensor, familiar: Familiar) -> dict[str, Any]:
    """How many of a group's images are called far, and its smallest, middle and largest distance."""
    far = sum(map(familiar.is_far, distances.tolist()))
    least, middle, most = rounded(torch.quantile(distances, torch.tensor([0.0, 0.5, 1.0])))
    return {"pictures": len(distances), "far": far, "least": least, "median": middle, "most": most}


def rounded(values: torch.Tensor) -> list[float]:
    """Numbers with three decimals."""
    return [round(value, 3) for value in values.tolist()]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="photographs, of any common format, at any depth")
    parser.add_argument("--out", type=Path, default=Path("runs/familiar"), help="where to (default runs/familiar)")
    options = parser.parse_args()
    model, processor, _ = load_checkpoint(data_folder() / BASE)
    familiar, report = measured(model, processor, photographs(options.folder))
    report |= {"command": shlex.join(["python", "tests/benchmarks/familiar.py", *sys.argv[1:]])}
    save_familiar(options.out, familiar, model, report)
    for name, group in report["groups"].items():
        print(f"{name}: {group['far']} of {group['pictures']} are far, {group['least']} to {group['most']}")
    print(f"far is beyond {familiar.threshold}; written to {options.out}")


if __name__ == "__main__":
    main()
