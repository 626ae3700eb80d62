"""A checked data set: the usable samples of a source in one Arrow file, read from the disk one by one.

A data set is a folder. `rows.arrow` has the samples; images that are files stay where they are, and only their paths
and sizes are kept, while those of a Parquet table are copied into it. `index.json` says what was checked, and how: for
which tokenizer, up to which length, and whether every image was opened.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from minivlm.data.readers import checked_samples, source_files
from minivlm.data.samples import Sample, SampleError, messages_from_turns, turn_of
from minivlm.data.survey import Survey
from minivlm.runtime.files import (
    hash_tokenizer,
    latest_folder,
    replace_folder,
    require_replaceable,
    versions,
    write_json,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from minivlm.data.features import FeatureStore
    from minivlm.processor import MiniVLMProcessor

FORMAT = 1
ROWS, ABOUT = "rows.arrow", "index.json"
BATCH_ROWS, BATCH_BYTES = 256, 8_000_000  # samples wait in memory until there are so many of them, or of their bytes
IMAGE_ROWS = 32  # rows whose images are in memory together
MEASURED_BY = {  # what decides whether a sample is too long, and how a message calls it
    "tokenizer": "tokenizer",
    "token_limit": "token limit",
    "tokens_a_picture": "number of tokens of an image",
}
AGAIN = "write it again: minivlm data check PATH --out DATASET"


class DatasetError(ValueError):
    """A data set cannot be written or used. The message names the folder or the file, and says what to do."""


def write_dataset(
    folder: str | Path,
    path: str | Path,
    processor: "MiniVLMProcessor",
    images: str | Path | None = None,
    decode: bool = False,
) -> Survey:
    """Check every row once, and write those that are usable; a data set of that name is replaced.

    Args:
        folder: the data set to write. It takes its place when it is whole.
        path, images, processor, decode: as in `checked_samples`. Without `decode` the data set cannot be trained on.

    Returns the counts, with the errors of the bad rows.

    Raises:
        DatasetError: the source or its images lie in `folder`.
        FolderError: `folder` holds something else.
        SampleError: as `checked_samples`.
        OSError: the disk is full, or the folder cannot be written. What was there before is as it was.
    """
    folder = Path(folder)
    sources = [*source_files(path), *([] if images is None else [Path(images)])]
    if any(source.resolve().is_relative_to(folder.resolve()) for source in sources):
        raise DatasetError(f"{folder} holds the rows or images that are to be checked; choose another folder")
    require_replaceable(folder, ABOUT, "data set")
    result = Survey()
    with replace_folder(folder, (ROWS, ABOUT)) as temporary:
        with (temporary / ROWS).open("wb") as file:
            writer = _Writer(file)
            for row in checked_samples(path, processor, images, decode):
                result.count(row)
                if not isinstance(row, SampleError):
                    writer.add(row[0], len(row[1].input_ids))
            writer.finish()
        about = {"format": FORMAT, "source": os.path.abspath(path), "decoded": decode, **_measured_by(processor)}
        about |= {"rows": fingerprint(temporary / ROWS), **vars(result), "bad": len(result.bad)}
        write_json(temporary / ABOUT, about | {"versions": versions() | {"pyarrow": writer.version}})
    return result


class _Writer:
    """Samples to an Arrow file, a few of them in memory at a time; after `finish` it is whole."""

    def __init__(self, file: BinaryIO):
        import pyarrow

        turn = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
        self.schema = pyarrow.schema(
            {
                "where": pyarrow.string(),
                "conversations": pyarrow.list_(turn),  # `<image>` where an image stands
                "files": pyarrow.list_(pyarrow.string()),
                "sizes": pyarrow.list_(pyarrow.int64()),  # of the files, in bytes
                "pictures": pyarrow.list_(pyarrow.binary()),
                "tokens": pyarrow.int64(),
            }
        )
        self.version = pyarrow.__version__
        self._stream = pyarrow.ipc.new_stream(file, self.schema)
        self._waiting, self._bytes = [], 0

    def add(self, sample: Sample, tokens: int) -> None:
        """A usable sample and its length."""
        files = [os.path.abspath(image) for image in sample.images if isinstance(image, Path)]
        images = [image for image in sample.images if isinstance(image, bytes)]
        turns = [turn_of(message) for message in sample.messages]
        row = {"where": sample.name, "conversations": turns, "tokens": tokens}
        row |= {"files": files, "sizes": [*map(os.path.getsize, files)], "pictures": images}
        self._waiting.append(row)
        self._bytes += sum(map(len, images)) + sum(len(turn["content"]) for turn in turns)
        if len(self._waiting) == BATCH_ROWS or self._bytes >= BATCH_BYTES:
            self._write()

    def _write(self) -> None:
        import pyarrow

        self._stream.write_batch(pyarrow.RecordBatch.from_pylist(self._waiting, self.schema))
        self._waiting, self._bytes = [], 0

    def finish(self) -> None:
        """Write what is waiting, and the stream's end."""
        self._write()
        self._stream.close()


class SampleDataset(Sequence[Sample]):
    """The samples of a data set, each read from the disk when it is asked for; made by `open_dataset`.

    Attributes:
        folder: the data set's.
        about: what `index.json` says.
        table: the rows as the `datasets` library has them, memory-mapped.
        features: the store that samples take their `patch_features` from; None leaves them out.
    """

    def __init__(self, folder: Path, about: dict[str, Any], table: "Dataset", features: "FeatureStore | None" = None):
        self.folder, self.about, self.table, self.features = folder, about, table, features

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`, its images as paths or as the bytes of files, its features from the store.

        Raises IndexError where there is no such sample, and FeatureError as `FeatureStore.of` does.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        row = self.table[index]
        images = [*map(Path, row["files"]), *row["pictures"]]
        name, turns = row["where"], row["conversations"]
        sample = Sample(messages_from_turns(turns, images, name), name, checked=True)
        if self.features is None or not images:
            return sample
        return replace(sample, patch_features=self.features.of(index, sample), checked=True)

    def with_features(self, store: "FeatureStore") -> "SampleDataset":
        """The same data set with `patch_features` in every sample that has images.

        Raises FeatureError where the store was made for another data set.
        """
        store.require_dataset(self)
        return SampleDataset(self.folder, self.about, self.table, store)

    def require_trainable(self, processor: "MiniVLMProcessor") -> None:
        """Refuse a data set on which training a model with this processor could end at a sample.

        Raises:
            DatasetError: the samples' lengths were counted with another tokenizer, limit or number of tokens of an
                image; the images were not opened; or a file is missing or has another size than at the check.
        """
        for name, value in _measured_by(processor).items():
            if self.about[name] != value:
                raise DatasetError(
                    f"{self.folder}: its samples were measured with another {MEASURED_BY[name]} than the model's "
                    f"({self.about[name]}, not {value}), so one could be too long; check them again with --model"
                )
        if not self.about["decoded"]:
            raise DatasetError(
                f"{self.folder}: its images were never opened, and one that cannot be would end the training; check "
                "them again with --decode"
            )
        for name, file, size in self.files():
            present = os.path.getsize(file) if os.path.isfile(file) else None
            if present != size:
                state = "is missing" if present is None else f"has {present:,} bytes and had {size:,} at the check"
                raise DatasetError(f"{self.folder}: {name}: the image {file} {state}; put it back, or {AGAIN}")

    def files(self) -> Iterator[tuple[str, str, int]]:
        """Sample's name, path and size of each image that is a file; the size is that of the check."""
        columns = self.table.select_columns(["where", "files", "sizes"])
        for batch in columns.iter(BATCH_ROWS):
            for name, files, sizes in zip(batch["where"], batch["files"], batch["sizes"], strict=True):
                for file, size in zip(files, sizes, strict=True):
                    yield name, file, size

    def images(self) -> Iterator[tuple[str, list[Path | bytes]]]:
        """Every sample's name and its images, as `Sample.images` has them; their texts are not read."""
        columns = self.table.select_columns(["where", "files", "pictures"])
        for batch in columns.iter(IMAGE_ROWS):
            for name, files, images in zip(batch["where"], batch["files"], batch["pictures"], strict=True):
                yield name, [*map(Path, files), *images]


def open_dataset(folder: str | Path) -> SampleDataset:
    """Open a data set; its file is read once to compare its hash, then only where samples are asked for.

    Raises DatasetError where there is none, it is of another format, or a file is damaged.
    """
    from datasets import Dataset

    folder = latest_folder(Path(folder))
    about = read_about(folder / ABOUT, FORMAT, ("rows", "decoded", *MEASURED_BY), DatasetError, AGAIN)
    if fingerprint(folder / ROWS) != about["rows"]:
        raise DatasetError(f"{folder / ROWS}: missing, cut off or changed since it was written; {AGAIN}")
    return SampleDataset(folder, about, Dataset.from_file(str(folder / ROWS), in_memory=False))


def read_about(file: Path, version: int, keys: Iterable[str], refused: type[ValueError], remedy: str) -> dict[str, Any]:
    """What a folder says about itself in a JSON file of format `version` with these `keys`.

    Raises `refused` where it does not, with `remedy`, which says what to do.
    """
    if not file.is_file():
        raise refused(f"{file.parent}: {file.name} is missing, so there is nothing to open here; {remedy}")
    try:
        about = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise refused(f"{file}: cut off or damaged ({error}); {remedy}") from error
    if not isinstance(about, dict) or about.get("format") != version:
        raise refused(f"{file}: not of format {version}; it was written by another version of minivlm; {remedy}")
    if missing := [key for key in keys if key not in about]:
        raise refused(f"{file}: {', '.join(missing)} is missing; {remedy}")
    return about


def fingerprint(file: Path) -> dict[str, Any] | None:
    """Size and hash of a file; None if there is none."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _measured_by(processor: "MiniVLMProcessor") -> dict[str, Any]:
    """What decides whether a sample is too long, in the order of `MEASURED_BY`."""
    tokenizer = processor.tokenizer
    values = (hash_tokenizer(tokenizer), tokenizer.model_max_length, processor.num_image_tokens)
    return dict(zip(MEASURED_BY, values, strict=True))
