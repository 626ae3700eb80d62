"""Rows from files: conversations and the pictures they speak of, checked on the way in.

One JSON object a line, pictures in a folder beside it, as MiniMind-V publishes them:

    {"conversations": [{"role": "user", "content": "<image>\\n这个图像中有什么内容？"},
                       {"role": "assistant", "content": "一只白色的狗。"}], "image": "dog.jpg"}

Several pictures are one string, "0.jpg, 1.jpg"; a text-only row has no "image". In these strings `<image>` is a
placeholder, and there must be one for each picture.
"""

import json
import os.path
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minivlm.processor import RowError, check_answers, messages_from_row


@dataclass(frozen=True)
class Row:
    """One sample.

    Attributes:
        conversations: turns `{"role": …, "content": …}` with `<image>` where a picture stands.
        images: the pictures in order: paths, or pictures already drawn.
        where: the row's name in messages, such as "train.jsonl, line 12".
    """

    conversations: list[dict]
    images: list = field(default_factory=list)
    where: str = ""

    def messages(self) -> list[dict]:
        """The same as chat messages with image parts."""
        return messages_from_row(self.conversations, self.images, self.where)


def read_rows(file: str | Path, images: str | Path | None = None) -> Iterator[Row]:
    """The rows of a JSON-lines file, one after the other; blank lines are passed over.

    Args:
        file: the JSON lines, UTF-8.
        images: the folder of the pictures; by default the one in which `file` lies.

    Raises:
        RowError: the file is missing; or, with the line's number, a line is no JSON object, a turn is not understood,
            nothing is to be learnt from it, a text has half a character, its `<image>`s are more or fewer than its
            pictures, or one of these is missing or lies outside the folder. The pictures themselves are not opened.
    """
    file = Path(file)
    folder = file.parent if images is None else Path(images)
    if not file.is_file():
        raise RowError(str(file), "there is no such file; check the path")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _row(line, folder, f"{file}, line {number}")


def _row(line: bytes, folder: Path, where: str) -> Row:
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or brackets in brackets without end
        cure = "one JSON object a line is read, not one array over many lines" if line[:1] == b"[" else "correct it"
        raise RowError(where, f"not a line of JSON ({error}); {cure}") from error
    if not isinstance(content, dict) or "conversations" not in content:
        raise RowError(where, 'not an object with "conversations"; each line needs its turns under that name')
    row = Row(content["conversations"], _image_files(content.get("image"), folder, where), where)
    check_answers(row.messages(), where)
    return row


def _short(name: str, length: int = 40) -> str:
    return repr(name if len(name) <= length else f"{name[:length]}…")


def _image_files(names: Any, folder: Path, where: str) -> list[Path]:
    """The paths behind "0.jpg, 1.jpg"."""
    if not names:
        return []
    if not isinstance(names, str):
        raise RowError(where, f'"image" is {type(names).__name__}; write file names in one string, "0.jpg, 1.jpg"')
    paths = []
    for name in (name.strip() for name in names.split(",")):
        if not name or os.path.isabs(name) or os.path.normpath(name).startswith(".."):
            raise RowError(where, f"the picture {name!r} is no name inside {folder}; name files in that folder")
        try:
            found = (folder / name).is_file()
        except OSError as error:  # such as a name that is too long
            raise RowError(where, f"no file can be called {_short(name)} ({error.strerror}); correct it") from error
        if not found:
            raise RowError(where, f"the picture {folder / name} is missing; add it or drop the row")
        paths.append(folder / name)
    return paths
