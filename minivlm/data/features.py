"""Features of the frozen encoder, computed once per picture and then only looked up.

The encoder never learns, so what it says about a picture is the same in every step of both stages. Letters as in
`config.py`.
"""

import uuid
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from tqdm.auto import tqdm

from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.files import hash_tensors
from minivlm.scenes.drawing.gallery import draw_many, drawing_key, texts_key
from minivlm.scenes.facts import Scene

BATCH = 64  # pictures the encoder looks at together
FILE_KEY = "made_from"


class FeatureError(ValueError):
    """A picture has no features in the cache, or features and pictures do not belong together."""


class FeatureCache:
    """`patch_features` of many pictures, by name.

    Args:
        features: (I, N, Dv), kept as they are given (`of_scenes` and `of_pictures` give 16 bits).
        names: what each picture is called in a row's `images`; by default its number.

    Raises:
        FeatureError: a name is there twice, or there are more or fewer names than features.
    """

    def __init__(self, features: torch.Tensor, names: Iterable[Hashable] | None = None):
        self.features = features  # (I, N, Dv)
        self._places = {name: place for place, name in enumerate(range(len(features)) if names is None else names)}
        if len(self._places) != len(features):
            raise FeatureError(f"{len(self._places)} different names for {len(features)} pictures; name each one once")

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.features)

    def __getitem__(self, names: Sequence[Hashable]) -> torch.Tensor:
        """The features of these pictures, (len(names), N, Dv).

        Raises:
            FeatureError: one of them is not here.
        """
        try:
            return self.features[[self._places[name] for name in names]]
        except KeyError as error:
            raise FeatureError(
                f"there are no features of the picture {error.args[0]!r} among these {len(self)}; "
                "compute them for all pictures that the rows name"
            ) from error

    @classmethod
    def of_scenes(
        cls,
        model: MiniVLMForConditionalGeneration,
        processor: MiniVLMProcessor,
        drawn: Sequence[Scene],
        file: str | Path | None = None,
        precision: str = "fp32",
        workers: int | None = None,
        title: str = "pictures",
    ) -> "FeatureCache":
        """Draw scenes and encode them; scene number i is called i.

        Args:
            drawn: the scenes.
            file: keep the features in this safetensors file, and take them from it the next time. It is made anew
                when it is damaged, or when encoder, precision, scenes or the program that draws are others.
            precision: "fp32", or "bf16" to encode about twice as fast where the processor is good at it.
            workers: processes that draw, by default one per core.
            title: of the bars; without one there are none.

        Raises:
            OSError: the file cannot be written.
        """
        made_from = texts_key([_encoder_key(model, processor, precision), drawing_key(), repr(list(drawn))])
        if (found := _read(file, made_from)) is None:
            drawing, encoding = (title and f"{work} {title}" for work in ("drawing", "encoding"))
            pictures = draw_many(list(drawn), model.config.vision_config.image_size, workers, drawing)
            found = encode(model, pixel_batches(processor, pictures), len(pictures), precision, encoding)
            _write(file, found, made_from)
        return cls(found)

    @classmethod
    def of_pictures(
        cls,
        model: MiniVLMForConditionalGeneration,
        processor: MiniVLMProcessor,
        pictures: Sequence,
        precision: str = "fp32",
        title: str = "pictures",
    ) -> "FeatureCache":
        """Encode pictures, each whatever `open_image` takes; a path is its own name, other pictures have numbers.

        Raises:
            ImageError: a picture cannot be read.
            FeatureError: a path is there twice.
        """
        names = [picture if isinstance(picture, str | Path) else place for place, picture in enumerate(pictures)]
        batches = (processor.pixels(list(pictures[i : i + BATCH])) for i in range(0, len(pictures), BATCH))
        return cls(encode(model, batches, len(pictures), precision, f"encoding {title}"), names)


@torch.no_grad()
def encode(
    model: MiniVLMForConditionalGeneration,
    batches: Iterable[torch.Tensor],
    count: int,
    precision: str = "fp32",
    title: str = "encoding",
) -> torch.Tensor:
    """What the model's encoder makes of batches of `pixel_values` (i, 3, H, W): (count, N, Dv) in bf16, on the CPU."""
    config, device = model.config, model.vision.clip.device
    features = torch.empty(count, config.num_image_tokens, config.vision_width, dtype=torch.bfloat16)  # (I, N, Dv)
    done = 0
    with tqdm(total=count, desc=title, unit="picture", mininterval=2, disable=not title) as bar:
        for pixel_values in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                seen = model.vision(pixel_values.to(device))  # (i, N, Dv)
            features[done : done + len(seen)] = seen
            done += len(seen)
            bar.update(len(seen))
    return features


def pixel_batches(processor: MiniVLMProcessor, pictures: np.ndarray) -> Iterator[torch.Tensor]:
    """`processor.pixels` for uint8 pictures (I, H, W, 3) at the encoder's own size, several times as fast.

    There are only 256 levels for each of three channels, so each is rescaled and normalised once, with the image
    processor's arithmetic, and then looked up.

    Yields:
        (i, 3, H, W) float32, equal to the processor's to the last bit.

    Raises:
        FeatureError: the pictures have another size.
    """
    settings = processor.image_processor
    size = (settings.crop_size["height"], settings.crop_size["width"])
    if pictures.shape[1:] != (*size, 3):
        raise FeatureError(f"the pictures have the shape {pictures.shape[1:]}, but the encoder's is {(*size, 3)}")
    levels = (np.arange(256) * settings.rescale_factor).astype(np.float32)
    mean, std = (np.array(values, dtype=np.float32) for values in (settings.image_mean, settings.image_std))
    tables = (levels - mean[:, None]) / std[:, None]  # (3, 256)
    for start in range(0, len(pictures), BATCH):
        batch = pictures[start : start + BATCH]
        yield torch.from_numpy(np.stack([tables[c][batch[..., c]] for c in range(3)], axis=1))  # (i, 3, H, W)


def _encoder_key(model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, precision: str) -> str:
    """What decides the features of a given picture."""
    return f"{hash_tensors(model.vision.state_dict())} {processor.image_processor.to_json_string()} {precision}"


def _read(file: str | Path | None, made_from: str) -> torch.Tensor | None:
    """The features in a file, if they are the ones that would be computed now."""
    if file is None or not Path(file).is_file():
        return None
    try:
        with safetensors.safe_open(file, "pt") as stored:
            fresh = (stored.metadata() or {}).get(FILE_KEY) == made_from
            return stored.get_tensor("patch_features") if fresh else None
    except safetensors.SafetensorError:  # cut off, or something else: a cache is simply made again
        return None


def _write(file: str | Path | None, features: torch.Tensor, made_from: str) -> None:
    """Aside, then renamed: a cache is whole or not there."""
    if file is None:
        return
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.partial-{uuid.uuid4().hex}")  # a name that nobody has
    try:
        safetensors.torch.save_file({"patch_features": features}, aside, {FILE_KEY: made_from})
        aside.replace(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(
            f"the features were not kept in {file} ({error}); free some space or choose another file"
        ) from error
    finally:
        aside.unlink(missing_ok=True)
