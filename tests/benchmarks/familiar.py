"""How far images are from the drawn world, and from where they are far: `python tests/benchmarks/familiar.py [FOLDER]`.

Mean and covariance of the encoder's features come from one part of the held-out "dev" scenes, the threshold from
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
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import safetensors.torch
import sklearn.datasets
import torch
from lessons.lesson_00 import NAME, Familiar, fit
from PIL import Image, ImageOps

from minivlm.checkpoint import load_checkpoint
from minivlm.data.features import encode_images
from minivlm.data.images import FORMATS, open_image
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.files import hash_tensors, replace_file, write_json
from minivlm.runtime.paths import BASE, data_folder
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.facts import sample_scene
from minivlm.scenes.features import scene_features

FALSE_POSITIVES = 0.01  # the share of drawn scenes beyond the threshold
FIT, VALIDATION, TEST, JPEG = 4000, 1000, 500, 200  # scenes for the fit, the threshold, each test, the JPEG test
QUALITY = 50  # of the JPEG files, of 100
CROP = 0.5  # the sides of a crop, as a share of the photograph's
ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}


def photographs(folder: Path | None) -> dict[str, Image.Image]:
    """Images by name: those of the installed packages, and those below a folder, by their paths in it."""
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
    """An image after a JPEG file of half its size and low quality."""
    stream = io.BytesIO()
    ImageOps.scale(image, 0.5).save(stream, format="JPEG", quality=QUALITY)
    return open_image(stream.getvalue())


def measure(
    model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, photos: dict[str, Image.Image]
) -> tuple[Familiar, dict[str, Any]]:
    """Fit, choose the threshold, and count both kinds of error."""

    def scenes(split: str, first: int, count: int) -> torch.Tensor:
        chosen = [sample_scene(split, first + i) for i in range(count)]
        return scene_features(model, processor, chosen, title=f"{split} scenes")

    images = partial(encode_images, model, processor)
    familiar = fit(scenes("dev", 0, FIT))
    validation = familiar.distances(scenes("dev", FIT, VALIDATION))
    familiar = replace(familiar, threshold=round(torch.quantile(validation, 1 - FALSE_POSITIVES).item(), 3))
    compressed = [as_jpeg(draw(sample_scene("exam", i))) for i in range(JPEG)]
    features = {
        "exam scenes": scenes("exam", 0, TEST),
        "holdout scenes": scenes("holdout", 0, TEST),
        "exam scenes through JPEG": images(compressed, title="JPEG"),
        "photographs": images(list(photos.values()), title="photographs"),
        "corners of photographs": images([crop for one in photos.values() for crop in corners(one)], title="corners"),
    }
    distances = {name: familiar.distances(of) for name, of in features.items()}
    report = {
        "chosen on": f"{VALIDATION} dev scenes, of which {FALSE_POSITIVES:.0%} lie beyond; fitted on {FIT} others",
        "groups": {name: summary(values, familiar) for name, values in distances.items()},
        "scenes": rounded(distances["exam scenes"]),
        "photographs": dict(zip(photos, rounded(distances["photographs"]), strict=True)),
    }
    return familiar, report


def summary(distances: torch.Tensor, familiar: Familiar) -> dict[str, Any]:
    """How many images of a group count as far, and the lowest, median and highest distance."""
    far = sum(map(familiar.is_far, distances.tolist()))
    low, median, high = rounded(torch.quantile(distances, torch.tensor([0.0, 0.5, 1.0])))
    return {"pictures": len(distances), "far": far, "least": low, "median": median, "most": high}


def rounded(values: torch.Tensor) -> list[float]:
    """Numbers with three decimals."""
    return [round(value, 3) for value in values.tolist()]


def save_familiar(
    folder: Path, familiar: Familiar, model: MiniVLMForConditionalGeneration, report: dict[str, Any]
) -> None:
    """Write `familiar.safetensors` and `familiar.json`, which `lesson_00.load_familiar` reads."""
    with replace_file(folder / f"{NAME}.safetensors") as temporary:
        safetensors.torch.save_file({"mean": familiar.mean, "whiten": familiar.whiten}, temporary)
    encoder = hash_tensors(model.vision.state_dict())
    write_json(folder / f"{NAME}.json", {"threshold": familiar.threshold, "encoder": encoder, **report})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="photographs, of any common format, at any depth")
    parser.add_argument("--out", type=Path, default=Path("runs/familiar"), help="the folder (default runs/familiar)")
    options = parser.parse_args(arguments)
    model, processor, _ = load_checkpoint(data_folder() / BASE)
    familiar, report = measure(model, processor, photographs(options.folder))
    typed = sys.argv[1:] if arguments is None else arguments
    report |= {"command": shlex.join(["python", "tests/benchmarks/familiar.py", *typed])}
    save_familiar(options.out, familiar, model, report)
    for name, group in report["groups"].items():
        print(f"{name}: {group['far']} of {group['pictures']} are far, {group['least']} to {group['most']}")
    print(f"far is beyond {familiar.threshold}; written to {options.out}")


if __name__ == "__main__":
    main()
