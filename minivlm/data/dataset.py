"""A checked set: the usable rows of a source in one Arrow file, read from the disk row by row when they are needed.

An index is a folder. `rows.arrow` has the rows; pictures that are files stay where they are, and only their paths and
sizes are kept, while those of a Parquet table are copied into it. `index.json` says what was checked, and how: for
which tokenizer, up to which length, and whether every picture was opened.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.data.readers import source_files
from minivlm.data.samples import Sample
from minivlm.data.survey import Survey, survey
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.files import hash_tokenizer, latest_folder, replace_folder, require_replaceable, versions

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 1
ROWS, ABOUT = "rows.arrow", "index.json"
BATCH_ROWS, BATCH_BYTES = 256, 8_000_000  # rows wait in memory until there are so many of them, or so much in them
PICTURE_ROWS = 32  # rows whose pictures are in memory together
COUNTS = ("usable", "pictures", "languages", "lengths", "tokens", "learnt")  # of the survey
MEASURED_BY = ("tokenizer", "token_limit", "tokens_a_picture")
AGAIN = "write it again: minivlm data check PATH --out INDEX"


class RowIndexError(ValueError):
    """An index cannot be written or used. The message names the folder or the file, and says what to do."""


def write_index(
    folder: str | Path,
    path: str | Path,
    processor: MiniVLMProcessor,
    images: str | Path | None = None,
    decode: bool = False,
) -> Survey:
    """Check every row once, and write those that are usable; an index of that name is replaced.

    Args:
        folder: the index to write, aside at first; it is renamed when it is whole.
        path, images, processor, decode: as in `survey`. Without `decode` the index cannot be trained on.

    Returns:
        What was found, the bad rows included.

    Raises:
        RowIndexError: the source or its pictures lie in `folder`.
        FolderError: `folder` holds something else, or cannot be replaced.
        SampleError: the source is missing, or a folder has no file of rows.
        OSError: the disk is full, or the folder cannot be written. What was there before is as it was.
    """
    folder = Path(folder)
    _require_place(folder, [*source_files(path), *([] if images is None else [Path(images)])])
    with replace_folder(folder) as temporary:
        with RowWriter(temporary / ROWS) as writer:
            found = survey(path, processor, images, decode, writer.add)
        about = {
            "format": FORMAT,
            "source": os.path.abspath(path),
            "decoded": decode,
            **_lengths_for(processor),
            "rows": _whole(temporary / ROWS),
            **{name: getattr(found, name) for name in COUNTS},
            "bad": len(found.bad),
            "versions": versions() | {"pyarrow": writer.version},
        }
        (temporary / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return found


class RowWriter:
    """Rows to an Arrow file, a few of them in memory at a time; a context, at the end of which the file is whole."""

    def __init__(self, file: Path):
        import pyarrow

        turn = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
        self.schema = pyarrow.schema(
            {
                "where": pyarrow.string(),
                "conversations": pyarrow.list_(turn),
                "files": pyarrow.list_(pyarrow.string()),
                "sizes": pyarrow.list_(pyarrow.int64()),  # of the files, in bytes
                "pictures": pyarrow.list_(pyarrow.binary()),
                "tokens": pyarrow.int64(),
            }
        )
        self.version = pyarrow.__version__
        self._file = file.open("wb")
        self._stream = pyarrow.ipc.new_stream(self._file, self.schema)
        self._waiting, self._bytes = [], 0

    def add(self, row: Sample, tokens: int) -> None:
        """A usable row and its length."""
        files = [os.path.abspath(picture) for picture in row.images if isinstance(picture, Path)]
        pictures = [picture for picture in row.images if isinstance(picture, bytes)]
        content = {"where": row.where, "conversations": row.conversations, "tokens": tokens}
        content |= {"files": files, "sizes": [os.path.getsize(file) for file in files], "pictures": pictures}
        self._waiting.append(content)
        self._bytes += sum(map(len, pictures)) + sum(len(turn["content"]) for turn in row.conversations)
        if len(self._waiting) == BATCH_ROWS or self._bytes >= BATCH_BYTES:
            self._write()

    def _write(self) -> None:
        import pyarrow

        self._stream.write_batch(pyarrow.RecordBatch.from_pylist(self._waiting, self.schema))
        self._waiting, self._bytes = [], 0

    def __enter__(self) -> "RowWriter":
        """The writer itself."""
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Write what is waiting, unless there was an error; close the file."""
        with self._file:
            if kind is None:
                self._write()
                self._stream.close()


class CheckedRows(Sequence[Sample]):
    """The rows of an index, each read from the disk when it is asked for; made by `read_index`.

    Attributes:
        folder: the index.
        about: what `index.json` says.
        dataset: the rows as the `datasets` library has them, memory-mapped.
    """

    def __init__(self, folder: Path, about: dict[str, Any], dataset: "Dataset"):
        self.folder, self.about, self.dataset = folder, about, dataset

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        """Row number `index`, its pictures as paths or as the bytes of files.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = self.dataset[index]
        return Sample(row["conversations"], [*map(Path, row["files"]), *row["pictures"]], row["where"])

    def require_trainable(self, processor: MiniVLMProcessor) -> None:
        """Refuse an index on which training could end at a row.

        Args:
            processor: that of the model that shall train.

        Raises:
            RowIndexError: the rows' lengths were counted with another tokenizer, limit or number of tokens a picture;
                the pictures were not opened; or one of their files is missing or has another size than at the check.
        """
        for name, value in _lengths_for(processor).items():
            if self.about[name] != value:
                raise RowIndexError(
                    f"{self.folder}: its rows were measured with another {name.replace('_', ' ')} than the model's "
                    f"({self.about[name]}, not {value}), so a row could be too long; check them again with --model"
                )
        if not self.about["decoded"]:
            raise RowIndexError(
                f"{self.folder}: its pictures were never opened, and one that cannot be would end the training; check "
                "them again with --decode"
            )
        for where, file, size in self.files():
            found = os.path.getsize(file) if os.path.isfile(file) else None
            if found != size:
                state = "is missing" if found is None else f"has {found:,} bytes and had {size:,} when it was checked"
                raise RowIndexError(f"{self.folder}: {where}: the picture {file} {state}; put it back, or {AGAIN}")

    def files(self) -> Iterator[tuple[str, str, int]]:
        """Sample's name, path and size of each picture that is a file; the size is that of the check."""
        columns = self.dataset.select_columns(["where", "files", "sizes"])
        for batch in columns.iter(BATCH_ROWS):
            for where, files, sizes in zip(batch["where"], batch["files"], batch["sizes"], strict=True):
                for file, size in zip(files, sizes, strict=True):
                    yield where, file, size

    def pictures(self) -> Iterator[tuple[str, list[Path | bytes]]]:
        """Every row's name and its pictures, as `Sample.images` has them; their texts are not read."""
        columns = self.dataset.select_columns(["where", "files", "pictures"])
        for batch in columns.iter(PICTURE_ROWS):
            for where, files, pictures in zip(batch["where"], batch["files"], batch["pictures"], strict=True):
                yield where, [*map(Path, files), *pictures]


def read_index(folder: str | Path) -> CheckedRows:
    """Open an index; its file is read once to compare its hash, then only where rows are asked for.

    Raises:
        RowIndexError: there is no index, it is of another format, or a file is damaged.
    """
    from datasets import Dataset

    folder = latest_folder(Path(folder))
    about = _read_about(folder)
    file = folder / ROWS
    if not file.is_file() or _whole(file) != about["rows"]:
        raise RowIndexError(f"{file}: missing, cut off or changed since it was written; {AGAIN}")
    return CheckedRows(folder, about, Dataset.from_file(str(file), in_memory=False))


def _read_about(folder: Path) -> dict[str, Any]:
    file = folder / ABOUT
    if not file.is_file():
        raise RowIndexError(f"{folder}: there is no index of rows here ({ABOUT} is missing); {AGAIN}")
    try:
        about = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RowIndexError(f"{file}: cut off or damaged ({error}); {AGAIN}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise RowIndexError(f"{file}: not of format {FORMAT}; it was written by another version of minivlm; {AGAIN}")
    if missing := {"rows", "decoded", *MEASURED_BY} - about.keys():
        raise RowIndexError(f"{file}: {', '.join(sorted(missing))} is missing; {AGAIN}")
    return about


def _lengths_for(processor: MiniVLMProcessor) -> dict[str, Any]:
    """What decides whether a row is too long, in the order of `MEASURED_BY`."""
    values = (hash_tokenizer(processor.tokenizer), processor.tokenizer.model_max_length, processor.num_image_tokens)
    return dict(zip(MEASURED_BY, values, strict=True))


def _require_place(folder: Path, sources: list[Path]) -> None:
    """Refuse a folder that an index may not take."""
    if any(source.resolve().is_relative_to(folder.resolve()) for source in sources):
        raise RowIndexError(
            f"{folder} holds the rows or pictures that are to be checked; choose another folder for the index"
        )
    require_replaceable(folder, ABOUT, "index of rows")


def _whole(file: Path) -> dict[str, Any]:
    """What tells a file from one that is cut off or was changed."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
