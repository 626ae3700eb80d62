"""Rows from files: conversations and the pictures they speak of, checked on the way in.

One JSON object a line, pictures in a folder beside it, as MiniMind-V publishes them:

    {"conversations": [{"role": "user", "content": "<image>\\n这个图像中有什么内容？"},
                       {"role": "assistant", "content": "一只白色的狗。"}], "image": "dog.jpg"}

Several pictures are one string, "0.jpg, 1.jpg"; a text-only row has no "image". In these strings `<image>` is a
placeholder, and there must be one for each picture.

LLaVA's form is read, too: one JSON array over the whole file, and turns `{"from": "human" or "gpt", "value": …}`.
"""

import codecs
import json
import os.path
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minivlm.processor import RowError, check_answers, messages_from_row

SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}  # LLaVA's names


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
    """The rows of a file, one after the other, up to the first that cannot be used; blank lines are passed over.

    Args:
        file: JSON lines or one JSON array, UTF-8. Of an array, all of the text is held in memory.
        images: the folder of the pictures; by default the one in which `file` lies.

    Raises:
        RowError: the file is missing; or, with the line's number, a line is no JSON object, a turn is not understood or
            out of order, nothing is to be learnt from it, a text has half a character, its `<image>`s are more or fewer
            than its pictures, or one of these is missing or lies outside the folder. The pictures are not opened.
    """
    for found in scan_rows(file, images):
        if isinstance(found, RowError):
            raise found
        yield found


def scan_rows(file: str | Path, images: str | Path | None = None) -> Iterator[Row | RowError]:
    """All rows of a file, as `read_rows` reads them; in the place of one that cannot be used stands its error.

    Raises:
        RowError: the file is missing.
    """
    file = Path(file)
    folder = file.parent if images is None else Path(images)
    if not file.is_file():
        raise RowError(str(file), "there is no such file; check the path")
    for where, content in _contents(file):
        try:
            yield _row(content, folder, where)
        except RowError as error:
            yield error


def _contents(file: Path) -> Iterator[tuple[str, bytes | dict]]:
    """The name and the JSON of each row: bytes of a line, or what stands in an array."""
    with file.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
        if not first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file}, line {number}", line
            return
        lines.seek(0)
        try:
            array = json.loads(lines.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise RowError(str(file), f"not a JSON array ({error}); correct it, or write one object a line") from error
    for number, content in enumerate(array, start=1):
        yield f"{file}, item {number}", content


def _row(content: bytes | Any, folder: Path, where: str) -> Row:
    if isinstance(content, bytes):
        try:
            content = json.loads(content.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or brackets in brackets without end
            raise RowError(where, f"not a line of JSON ({error}); correct it") from error
    if not isinstance(content, dict) or "conversations" not in content:
        raise RowError(where, 'not an object with "conversations"; each row needs its turns under that name')
    turns = _turns(content["conversations"], where)
    row = Row(turns, _image_files(content.get("image"), folder, where), where)
    messages = row.messages()
    check_answers(messages, where)
    _check_order([message["role"] for message in messages], where)
    return row


def _turns(conversations: Any, where: str) -> Any:
    """LLaVA's turns under our names; all others as they are."""
    if not isinstance(conversations, list) or not all(isinstance(turn, dict) for turn in conversations):
        return conversations
    turns = []
    for turn in conversations:
        if set(turn) >= {"from", "value"}:
            if turn["from"] not in SPEAKERS:
                raise RowError(where, f"a turn is from {turn['from']!r}; it must be one of {', '.join(SPEAKERS)}")
            turn = {"role": SPEAKERS[turn["from"]], "content": turn["value"]}
        turns.append(turn)
    return turns


def _check_order(roles: list[str], where: str) -> None:
    """After an optional system turn, user and assistant take turns, the user first."""
    spoken = roles[1:] if roles[0] == "system" else roles
    for place, role in enumerate(spoken, start=1 + len(roles) - len(spoken)):
        expected = ("assistant", "user")[(place - len(roles) + len(spoken)) % 2]
        if role != expected:
            raise RowError(
                where, f"turn {place} is the {role}'s where the {expected}'s is expected; user and assistant take turns"
            )


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
