"""The rows of files as they stand there: lines of JSON, the items of one JSON array, the rows of a Parquet table.

What they mean is said in `data.py`. Whatever is wrong with a file as a whole stands as an error in the place of its
rows, so that the files beside it are still read.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minivlm.processor import SampleError

TABLE = ".parquet"
ENDINGS = (".jsonl", TABLE)  # of the files that are looked for in a folder
COLUMNS = ("conversations", "image_bytes")
TABLE_ROWS = 32  # read together, out of the page that Arrow holds anyway
BUFFER = 1 << 20  # bytes read at a time; Arrow's own ways are to read a row group's columns whole


def source_files(path: str | Path) -> list[Path]:
    """The file itself, or the files of rows in a folder, by name.

    Raises:
        SampleError: there is no such path, or no file of rows in it.
    """
    path = Path(path)
    if path.is_dir():
        if files := sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS and file.is_file()):
            return files
        raise SampleError(str(path), f"no file in this folder ends in {' or '.join(ENDINGS)}; name a file of rows")
    if not path.is_file():
        raise SampleError(str(path), "there is no such file; check the path")
    return [path]


def contents(file: Path) -> Iterator[tuple[str, Any] | SampleError]:
    """Each row's name, such as "train.jsonl, line 12", and what stands there.

    Yields:
        The bytes of a line; an item of an array, as JSON has it; or of a table a dict of `COLUMNS`. An error stands
        for a file, or a part of one, that cannot be read.
    """
    if file.suffix.lower() == TABLE:
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
        if missing := [name for name in COLUMNS if name not in table.schema_arrow.names]:
            found = ", ".join(table.schema_arrow.names)
            yield SampleError(str(file), f"there is no column {missing[0]!r} (only {found}); each row needs one")
            return
        if twice := [name for name in COLUMNS if table.schema_arrow.names.count(name) > 1]:
            yield SampleError(str(file), f"there are two columns {twice[0]!r}; leave one of them")
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
    number = first
    for batch in table.iter_batches(TABLE_ROWS, row_groups=[group], columns=list(COLUMNS), use_threads=False):
        columns = {name: batch.column(name) for name in COLUMNS}
        for place in range(batch.num_rows):
            where = f"{file}, row {number}"
            try:
                yield where, {name: column[place].as_py() for name, column in columns.items()}
            except UnicodeDecodeError as error:  # Parquet does not look into its texts
                yield SampleError(where, f"its text is not UTF-8 ({error}); correct it")
            number += 1
