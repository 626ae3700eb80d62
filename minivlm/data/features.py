"""Features of images: what the frozen encoder makes of them, computed once, in memory or in a memory-mapped file.

The encoder never learns, so the features of an image are the same in every step of both stages. Letters as in
`config.py`.

A store on the disk is a folder: `features.bin` is one array (E, N, Dv) in bfloat16 with an entry for each different
image, `images.npy` maps each sample's images to entries, `done.bin` marks what is encoded, a byte for each batch of
entries, and `store.json` says what the features are of. (float16 would make infinities of an encoder's largest values.)
"""

import hashlib
import json
import math
import os
import shutil
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from minivlm.data.dataset import SampleDataset, fingerprint, read_about
from minivlm.data.images import ImageError, ImageSource
from minivlm.data.samples import Sample, SampleError
from minivlm.runtime.files import hash_tensors, replace_folder, require_replaceable, write_json
from minivlm.runtime.processes import all_or_none, processes

if TYPE_CHECKING:
    from minivlm.model import MiniVLMForConditionalGeneration
    from minivlm.processor import MiniVLMProcessor

BATCH = 64  # images the encoder looks at together
FORMAT = 2
ABOUT, IMAGES, FEATURES, DONE = "store.json", "images.npy", "features.bin", "done.bin"
IDENTITY = ("tokens of an image", "width", "encoder", "preprocessing", "precision", "data set")
IMAGE = np.dtype([("sample", "<i8"), ("entry", "<i8"), ("size", "<i8"), ("time", "<i8")])
IN_DATASET = -1  # the time of an image that is no file
REMOVE = "remove the folder or name another one, and the features are made anew"


class FeatureError(ValueError):
    """Features cannot be made or used. The message says what was wrong, where, and what to do."""


def encode_images(
    model: "MiniVLMForConditionalGeneration",
    processor: "MiniVLMProcessor",
    images: Sequence[ImageSource],
    precision: str = "fp32",
    title: str = "pictures",
) -> torch.Tensor:
    """The features (I, N, Dv) of images, as `encode` makes them; raises ImageError where an image cannot be read."""
    batches = (processor.pixels(list(images[i : i + BATCH])) for i in range(0, len(images), BATCH))
    return encode(model, batches, len(images), precision, title and f"encoding {title}")


@torch.no_grad()
def encode(
    model: "MiniVLMForConditionalGeneration",
    batches: Iterable[torch.Tensor],
    count: int,
    precision: str = "fp32",
    title: str = "encoding",
) -> torch.Tensor:
    """What the model's encoder makes of batches of `pixel_values` (i, 3, H, W): (count, N, Dv) in bf16, on the CPU.

    Args:
        precision: of the encoder, "fp32", or "bf16" to multiply in 16 bits.
        title: of the bar; without one there is none.
    """
    config, device = model.config, model.vision.clip.device
    features = torch.empty(count, config.num_image_tokens, config.vision_width, dtype=torch.bfloat16)  # (I, N, Dv)
    done = 0
    with tqdm(total=count, desc=title, unit="image", mininterval=2, disable=not title) as bar:
        for pixel_values in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                encoded = model.vision(pixel_values.to(device))  # (i, N, Dv)
            features[done : done + len(encoded)] = encoded
            done += len(encoded)
            bar.update(len(encoded))
    return features


def pixel_batches(processor: "MiniVLMProcessor", images: np.ndarray) -> Iterator[torch.Tensor]:
    """`processor.pixels` for uint8 images (I, H, W, 3) at the encoder's own size, several times as fast.

    Yields (i, 3, H, W) float32, equal to the processor's to the last bit. Raises FeatureError for another size.
    """
    settings = processor.image_processor
    shape = (settings.crop_size["height"], settings.crop_size["width"], 3)
    if images.shape[1:] != shape:
        raise FeatureError(f"the images have the shape {images.shape[1:]}, but the encoder's is {shape}")
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        yield normalised(batch, settings.image_mean, settings.image_std, settings.rescale_factor)


def normalised(
    images: np.ndarray,
    mean: Sequence[float] = OPENAI_CLIP_MEAN,
    std: Sequence[float] = OPENAI_CLIP_STD,
    rescale_factor: float = 1 / 255,
) -> torch.Tensor:
    """uint8 images (I, H, W, 3) as `pixel_values` (I, 3, H, W), to the last bit as CLIP's image processor makes them.

    Each of the 256 levels of a channel is normalised once and then looked up.
    """
    levels = (np.arange(256) * rescale_factor).astype(np.float32)
    tables = (levels - np.float32(mean)[:, None]) / np.float32(std)[:, None]  # (3, 256)
    return torch.from_numpy(np.stack([table[images[..., c]] for c, table in enumerate(tables)], axis=1))


class FeatureStore:
    """Features of a data set's images on the disk, memory-mapped; `dataset.with_features(store)` attaches them.

    Args:
        folder: a store that `FeatureStore.build` made or began; pickled, a store is this path.

    Attributes:
        about: what `store.json` says: the features' identity, and the fingerprint of `images.npy`.
        images: an `IMAGE` record for each image that a sample shows, in the samples' order.
        features: (E, N, Dv), the bits of bfloat16 as whole numbers.

    Raises:
        FeatureError: there is no store, or one of its files is missing, damaged or of another version.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.about = read_about(self.folder / ABOUT, FORMAT, (*IDENTITY, "images"), FeatureError, REMOVE)
        if fingerprint(self.folder / IMAGES) != self.about["images"]:
            raise FeatureError(f"{self.folder / IMAGES}: missing, cut off or changed since it was written; {REMOVE}")
        self.images = np.load(self.folder / IMAGES, mmap_mode="r")
        shape = _shape(self.images, self.about)
        for name, size in _sizes(shape).items():
            file = self.folder / name
            if not file.is_file() or file.stat().st_size != size:
                raise FeatureError(f"{file}: missing, or its size is not {size:,} bytes; {REMOVE}")
        # copy-on-write: torch takes such an array without a warning, and nobody changes the file through it
        self.features = np.memmap(self.folder / FEATURES, "<i2", mode="c", shape=shape)  # (E, N, Dv)

    def __reduce__(self) -> tuple:
        """The folder's path instead of what is mapped."""
        return type(self), (self.folder,)

    def __len__(self) -> int:
        """E, how many different images there are."""
        return len(self.features)

    def of(self, number: int, sample: Sample) -> torch.Tensor:
        """The features (I, N, Dv) in bf16 of the images of sample `number`; those of one image stay on the disk.

        Raises:
            FeatureError: an image was changed since it was encoded, or is missing.
        """
        start = bisect_left(self.images["sample"], number)
        records = self.images[start : start + len(sample.images)]
        for record, image in zip(records, sample.images, strict=True):
            self.require_unchanged(record, image, sample.name)
        entries = records["entry"]
        features = self.features[entries[0] : entries[0] + 1] if len(entries) == 1 else self.features[entries]
        return torch.from_numpy(features).view(torch.bfloat16)  # (I, N, Dv)

    def missing(self) -> list[int]:
        """The numbers of the batches of `BATCH` entries that are not encoded yet."""
        return np.flatnonzero(np.fromfile(self.folder / DONE, np.uint8) == 0).tolist()

    def require_dataset(self, dataset: SampleDataset) -> None:
        """Refuse a data set that the store was not made for."""
        if self.about["data set"] != dataset.about["rows"]["sha256"]:
            raise FeatureError(f"{self.folder}: its features are of another data set than {dataset.folder}; {REMOVE}")

    def require_unchanged(self, record: np.void, image: Path | bytes, name: str) -> None:
        """Refuse a file that was changed since the store was begun; what lies in the data set, its hash holds."""
        if record["time"] != IN_DATASET and _size_and_time(image, name) != (record["size"], record["time"]):
            raise FeatureError(f"{self.folder}: {name}: the image {image} was changed since it was encoded; {REMOVE}")

    @classmethod
    def build(
        cls,
        folder: str | Path,
        dataset: SampleDataset,
        model: "MiniVLMForConditionalGeneration",
        processor: "MiniVLMProcessor",
        precision: str = "fp32",
    ) -> "FeatureStore":
        """Open a store, and encode the images that it still lacks. Stopped at any moment, the same call goes on.

        The processes of a machine share its work; each machine builds on its own disk.

        Args:
            folder: it may be new, empty, begun or whole.
            dataset: its images are encoded, each different one once.
            model, processor: whose encoder sees them, and what prepares them.
            precision: of the encoder, "fp32", or "bf16" to multiply in 16 bits.

        Raises:
            FeatureError: the store is of something else or damaged; an image was changed or is missing; no sample has
                one; or the disk has not enough room.
            FolderError: the folder holds something else.
            SampleError: an image cannot be read; its sample is named.
            OSError: the disk is full, or the folder cannot be written. Finished batches are kept.
            ProcessError: another process stopped.
        """
        folder, here = Path(folder), processes()
        identity = _identity(dataset, model, processor, precision)
        new = here.is_local_main_process and not (folder / ABOUT).is_file()
        all_or_none(lambda: _create(folder, dataset, identity) if new else None)
        store, missing = all_or_none(lambda: _open(folder, dataset, identity))  # by all, before any batch is made
        mine = missing[here.local_process_index :: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))]
        all_or_none(lambda: _encode_batches(store, mine, dataset, model, processor))
        return cls(folder)

    def _pixels(self, index: int, dataset: SampleDataset, processor: "MiniVLMProcessor") -> torch.Tensor:
        """The image of record `index`, opened and prepared: (1, 3, H, W)."""
        number = int(self.images["sample"][index])
        sample = dataset[number]
        image = sample.images[index - bisect_left(self.images["sample"], number)]
        self.require_unchanged(self.images[index], image, sample.name)
        try:
            return processor.pixels([image])
        except ImageError as error:
            raise SampleError(sample.name, str(error)) from error


def stored_precision(folder: str | Path) -> str | None:
    """The precision of a store that was made or begun, None if there is none; raises as `FeatureStore` does."""
    return FeatureStore(folder).about["precision"] if (Path(folder) / ABOUT).is_file() else None


def _identity(
    dataset: SampleDataset, model: "MiniVLMForConditionalGeneration", processor: "MiniVLMProcessor", precision: str
) -> dict[str, Any]:
    """What decides the features, under the names that `store.json` and messages give it."""
    return {
        "tokens of an image": model.config.num_image_tokens,
        "width": model.config.vision_width,
        "encoder": hash_tensors(model.vision.state_dict()),
        "preprocessing": json.loads(processor.image_processor.to_json_string()),
        "precision": precision,
        "data set": dataset.about["rows"]["sha256"],
    }


def _create(folder: Path, dataset: SampleDataset, identity: dict[str, Any]) -> None:
    """Write a store that lacks all its features."""
    if folder.resolve().is_relative_to(dataset.folder.resolve()):
        raise FeatureError(f"{folder} lies in the data set, which is replaced as a whole; choose another folder")
    require_replaceable(folder, ABOUT, "store of features")
    images = _images_of(dataset)
    with replace_folder(folder, (ABOUT, IMAGES, FEATURES, DONE)) as temporary:
        np.save(temporary / IMAGES, images)
        for name, size in _sizes(_shape(images, identity)).items():
            (temporary / name).touch()
            os.truncate(temporary / name, size)  # zeros, which take no room yet on most disks
        write_json(temporary / ABOUT, {"format": FORMAT, **identity, "images": fingerprint(temporary / IMAGES)})


def _shape(images: np.ndarray, identity: dict[str, Any]) -> tuple[int, int, int]:
    """(E, N, Dv) of the features."""
    return 1 + int(images["entry"].max()), identity["tokens of an image"], identity["width"]


def _sizes(shape: tuple[int, int, int]) -> dict[str, int]:
    """The bytes of the two files that are filled batch by batch."""
    return {FEATURES: math.prod(shape) * torch.bfloat16.itemsize, DONE: math.ceil(shape[0] / BATCH)}


def _images_of(dataset: SampleDataset) -> np.ndarray:
    """An `IMAGE` record for each image of each sample; entries have numbers in the order of their first samples."""
    hashes, values = bytearray(), array("q")
    for number, (name, images) in enumerate(dataset.images()):
        for image in images:
            content = image if isinstance(image, bytes) else os.fsencode(os.path.abspath(image))
            hashes += hashlib.sha256(content).digest()
            values.extend((number, 0, *_size_and_time(image, name)))
    if not hashes:
        raise FeatureError(f"{dataset.folder}: no sample has an image, so there are no features; train without")
    records = np.frombuffer(values, IMAGE).copy()
    _, first, same = np.unique(np.frombuffer(hashes, "S32"), return_index=True, return_inverse=True)
    records["entry"] = first.argsort().argsort()[same]
    return records


def _size_and_time(image: Path | bytes, name: str) -> tuple[int, int]:
    """An image's size in bytes, and when its file was changed; a file is not opened."""
    if isinstance(image, bytes):
        return len(image), IN_DATASET
    try:
        state = os.stat(image)
    except OSError as error:
        raise FeatureError(f"{name}: the image {image} is missing ({error.strerror}); put it back") from error
    return state.st_size, state.st_mtime_ns


def _open(folder: Path, dataset: SampleDataset, identity: dict[str, Any]) -> tuple[FeatureStore, list[int]]:
    """The store and its missing batches; refuse one of something else, and images of another size or time."""
    store = FeatureStore(folder)
    for key in IDENTITY:
        if store.about[key] != identity[key]:
            values = "" if isinstance(identity[key], dict) else f" ({store.about[key]}, not {identity[key]})"
            raise FeatureError(f"{folder}: its features are of another {key}{values}; {REMOVE}")
    files = store.images[store.images["time"] != IN_DATASET]
    for record, (name, file, _) in zip(files, dataset.files(), strict=True):
        store.require_unchanged(record, Path(file), name)
    missing = store.missing()
    _require_room(store, missing)
    return store, missing


def _require_room(store: FeatureStore, missing: list[int]) -> None:
    """Say how large the store is; refuse a disk that has no room for what is missing."""
    needed = sum(store.features[number * BATCH :][:BATCH].nbytes for number in missing)
    free = shutil.disk_usage(store.folder).free
    processes().print(
        f"features of {len(store):,} images, {_readable(store.features.nbytes)}, in {store.folder}: "
        f"{_readable(needed)} to be written, {_readable(free)} free on the disk"
    )
    if needed > free:
        raise FeatureError(
            f"{store.folder}: {_readable(needed)} of features are to be written, but the disk has {_readable(free)} "
            "left; choose a folder on a larger disk, or train without --features (every step encodes its images anew)"
        )


def _encode_batches(
    store: FeatureStore,
    numbers: list[int],
    dataset: SampleDataset,
    model: "MiniVLMForConditionalGeneration",
    processor: "MiniVLMProcessor",
) -> None:
    """Encode and write some batches, always of the same entries, so that the bytes are always the same."""
    shown_first = np.unique(store.images["entry"], return_index=True)[1]  # (E,) an entry's first record
    hidden = not (numbers and processes().is_main_process)
    for number in tqdm(numbers, desc="encoding", unit="batch", disable=hidden):
        indices = shown_first[number * BATCH :][:BATCH].tolist()
        pixels = torch.cat([store._pixels(index, dataset, processor) for index in indices])  # (i, 3, H, W)
        features = encode(model, [pixels], len(indices), store.about["precision"], title="")  # (i, N, Dv)
        content = features.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
        try:
            _overwrite(store.folder / FEATURES, number * BATCH * store.features[0].nbytes, content)
            _overwrite(store.folder / DONE, number, b"\1")
        except OSError as error:
            raise OSError(
                error.errno,
                f"features cannot be written to {store.folder} ({error.strerror}): make sure that the disk has room; "
                "what is finished is kept, and the same command goes on from there",
            ) from error


def _overwrite(file: Path, start: int, content: bytes) -> None:
    """Overwrite bytes of a file, so that they are on the disk for certain."""
    with file.open("r+b") as stream:
        stream.seek(start)
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _readable(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"
