"""Reads samples from files: lines of JSON, a JSON array in LLaVA's form, a Parquet table, or a folder of such files.

One JSON object a line, images in a folder beside it, as MiniMind-V publishes them:

    {"conversations": [{"role": "user", "content": "<image>\\n这个图像中有什么内容？"},
                       {"role": "assistant", "content": "一只白色的狗。"}], "image": "dog.jpg"}

Several images are one string, "0.jpg, 1.jpg"; a text-only row has no "image". In these strings `<image>` is a
placeholder, and there must be one for each image.

LLaVA's form is one JSON array over the whole file, with turns `{"from": "human" or "gpt", "value": …}`.

In a Parquet table, as minimind-3v publishes it, the column "conversations" has the turns as JSON, and "image_bytes" the
images themselves (bytes, a list of bytes, or null). There a text-only row carries a small black image that no `<image>`
stands for; it is left out.
"""

import codecs
import json
import os.path
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.config import IMAGE_TOKEN
from minivlm.data.images import ImageError, open_image
from minivlm.data.samples import HALF_A_CHARACTER, Example, Sample, SampleError, messages_from_turns

if TYPE_CHECKING:
    from minivlm.processor import MiniVLMProcessor

PARQUET = ".parquet"
ENDINGS = (".jsonl", PARQUET)  # of the files that are looked for in a folder
COLUMNS = ("conversations", "image_bytes")
TABLE_ROWS = 32  # read together, out of the page that Arrow holds anyway
BUFFER = 1 << 20  # bytes read at a time; Arrow's own ways are to read a row group's columns whole
SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}  # LLaVA's names
STAND_IN_SIZE, STAND_IN_BYTES = (8, 8), 4096  # of a text-only row's black image; a larger file is not opened


def source_files(path: str | Path) -> list[Path]:
    """The file itself, or the files of rows in a folder, by name; a SampleError where there is none."""
    path = Path(path)
    if path.is_dir():
        if files := sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS and file.is_file()):
            return files
        raise SampleError(str(path), f"no file in this folder ends in {' or '.join(ENDINGS)}; name a file of rows")
    if not path.is_file():
        raise SampleError(str(path), "there is no such file; check the path")
    return [path]


def read_samples(path: str | Path, images: str | Path | None = None) -> Iterator[Sample | SampleError]:
    """All rows of a file as samples, one after the other; an error stands for each row, or file, that cannot be used.

    Args:
        path: JSON lines or one JSON array, UTF-8, or a Parquet table; or a folder with some `.jsonl` and `.parquet`
            files, read by their names. Of an array, all of the text is held in memory; of the others some rows.
        images: the folder of the images; by default the one in which the file lies.

    Yields:
        Samples whose messages can be trained on; their images are there, but were not opened. Errors name the file and
        the row, and say what is wrong. Blank lines are passed over.

    Raises SampleError as `source_files` does.
    """
    for file in source_files(path):
        folder = file.parent if images is None else Path(images)
        for row in _rows(file):
            try:
                yield row if isinstance(row, SampleError) else _sample(*row, folder)
            except SampleError as error:
                yield error


def checked_samples(
    path: str | Path, processor: "MiniVLMProcessor", images: str | Path | None = None, decode: bool = False
) -> Iterator[tuple[Sample, Example] | SampleError]:
    """What `read_samples` yields, each sample encoded; one that is too long becomes an error, too.

    With `decode` every image is opened; one that cannot be makes its row an error. Raises as `source_files` does.
    """
    for sample in read_samples(path, images):
        try:
            if isinstance(sample, SampleError):
                raise sample
            example = processor.encode(sample)
            for image in sample.images if decode else ():
                open_image(image)
        except ImageError as error:
            yield SampleError(sample.name, str(error))
        except SampleError as error:
            yield SampleError("", str(error))  # the error itself holds the row, through its traceback
        else:
            yield sample, example


# ---- files to rows


def _rows(file: Path) -> Iterator[tuple[str, Any] | SampleError]:
    """Each row's name, such as "train.jsonl, line 12", and its content: bytes, or what JSON or a table's columns hold.

    An error stands for a file, or a part of one, that cannot be read, so that the files beside it still are.
    """
    if file.suffix.lower() == PARQUET:
        yield from _table(file)
        return
    with file.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
        lines.seek(0)
        if first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            yield from _array(file, lines.read())
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file}, line {number}", line


def _array(file: Path, text: bytes) -> Iterator[tuple[str, Any] | SampleError]:
    try:
        array = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        yield SampleError(str(file), f"not a JSON array ({error}); correct it, or write one object a line")
        return
    for number, content in enumerate(array, start=1):
        yield f"{file}, item {number}", content


def _table(file: Path) -> Iterator[tuple[str, Any] | SampleError]:
    """One row group after the other, page by page; a damaged group does not hide the others.

    A page is what must be in memory at once: as Arrow writes them, up to 1,024 rows.
    """
    import pyarrow
    import pyarrow.parquet

    broken = (pyarrow.ArrowException, OSError)
    try:
        table = pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
    except broken as error:
        yield SampleError(str(file), f"cut off, or not a Parquet file ({error}); copy or download it again")
        return
    with table:
        names = table.schema_arrow.names
        if wrong := [column for column in COLUMNS if names.count(column) != 1]:
            problem = f"there is no column {wrong[0]!r} (only {', '.join(names)}); each row needs one"
            if wrong[0] in names:
                problem = f"there are two columns {wrong[0]!r}; leave one of them"
            yield SampleError(str(file), problem)
            return
        first = 1
        for group in range(table.num_row_groups):
            last = first + table.metadata.row_group(group).num_rows - 1
            try:
                yield from _row_group(table, group, file, first)
            except broken as error:
                rows = f"{file}, row group {group + 1} (up to row {last})"
                yield SampleError(rows, f"damaged ({error}); copy or download the file again")
            first = last + 1


def _row_group(table: Any, group: int, file: Path, first: int) -> Iterator[tuple[str, Any] | SampleError]:
    for batch in table.iter_batches(TABLE_ROWS, row_groups=[group], columns=list(COLUMNS), use_threads=False):
        for index in range(batch.num_rows):
            name = f"{file}, row {first + index}"
            try:
                yield name, {column: batch.column(column)[index].as_py() for column in COLUMNS}
            except UnicodeDecodeError as error:  # Parquet does not look into its texts
                yield SampleError(name, f"its text is not UTF-8 ({error}); correct it")
        first += batch.num_rows


# ---- a row to a sample


def _sample(name: str, content: bytes | Any, folder: Path) -> Sample:
    if isinstance(content, bytes):
        content = _json(content, "a line of JSON", name)
    if not isinstance(content, dict) or content.get("conversations") is None:
        raise SampleError(name, 'not an object with "conversations"; each row needs its turns under that name')
    if "image_bytes" in content:
        turns = _turns(_json(content["conversations"], "JSON", name), name)
        images = _held_images(content["image_bytes"], turns, name)
    else:
        turns = _turns(content["conversations"], name)
        images = _image_files(content.get("image"), folder, name)
    sample = Sample(messages_from_turns(turns, images, name), name)
    roles = [message["role"] for message in sample.messages]
    start = int(roles[0] == "system")
    for number, (role, expected) in enumerate(zip(roles[start:], cycle(("user", "assistant"))), start + 1):
        if role != expected:
            problem = f"turn {number} is the {role}'s where the {expected}'s is expected"
            raise SampleError(name, f"{problem}; user and assistant take turns")
    return sample


def _json(content: Any, what: str, name: str) -> Any:
    """What a text says; what is no text is taken as it is."""
    if not isinstance(content, bytes | str):
        return content
    try:
        return json.loads(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or brackets in brackets without end
        raise SampleError(name, f"not {what} ({error}); correct it") from error


def _turns(conversations: Any, name: str) -> Any:
    """LLaVA's turns under our names; of all turns only role and content."""
    if not isinstance(conversations, list) or not all(isinstance(turn, dict) for turn in conversations):
        return conversations
    turns = []
    for turn in conversations:
        if set(turn) >= {"from", "value"}:
            if not isinstance(turn["from"], str) or turn["from"] not in SPEAKERS:
                raise SampleError(name, f"a turn is from {turn['from']!r}; it must be one of {', '.join(SPEAKERS)}")
            turn = {"role": SPEAKERS[turn["from"]], "content": turn["value"]}
        turns.append({key: turn[key] for key in ("role", "content") if key in turn})
    return turns


def _held_images(held: Any, turns: Any, name: str) -> list[bytes]:
    """A table's images: one, several or none; without the black ones of a row that shows none."""
    images = [] if held is None else held if isinstance(held, list) else [held]
    for image in images:
        if not isinstance(image, bytes):
            problem = f'"image_bytes" has {type(image).__name__}; it must be the bytes of image files'
            raise SampleError(name, f'{problem}, and only Parquet holds these (in JSON, "image" names files)')
    shows_some = isinstance(turns, list) and any(IMAGE_TOKEN in str(turn) for turn in turns)
    return images if shows_some or not all(map(_is_stand_in, images)) else []


def _is_stand_in(image: bytes) -> bool:
    """Whether an image is small and black all over."""
    if len(image) > STAND_IN_BYTES:
        return False
    try:
        opened = open_image(image)
    except ImageError:
        return False
    return opened.size == STAND_IN_SIZE and opened.getextrema() == ((0, 0),) * 3


def _image_files(names: Any, folder: Path, where: str) -> list[Path]:
    """The paths behind "0.jpg, 1.jpg"."""
    if not names:
        return []
    if not isinstance(names, str):
        raise SampleError(where, f'"image" is {type(names).__name__}; write file names in one string, "0.jpg, 1.jpg"')
    paths = []
    for name in (name.strip() for name in names.split(",")):
        short = repr(name if len(name) <= 40 else f"{name[:40]}…")
        if not name or os.path.isabs(name) or os.path.normpath(name).startswith(".."):
            raise SampleError(where, f"the image {name!r} is no name inside {folder}; name files in that folder")
        if HALF_A_CHARACTER.search(name):
            raise SampleError(where, f"the image's name {short} has half of a character; rename the file")
        try:
            exists = (folder / name).is_file()
        except OSError as error:  # such as a name that is too long
            raise SampleError(where, f"no file can be called {short} ({error.strerror}); correct it") from error
        if not exists:
            raise SampleError(where, f"the image {folder / name} is missing; add it or drop the row")
        paths.append(folder / name)
    return paths
