"""Rows from files: conversations and the pictures they speak of, checked on the way in.

One JSON object a line, pictures in a folder beside it, as MiniMind-V publishes them:

    {"conversations": [{"role": "user", "content": "<image>\\n这个图像中有什么内容？"},
                       {"role": "assistant", "content": "一只白色的狗。"}], "image": "dog.jpg"}

Several pictures are one string, "0.jpg, 1.jpg"; a text-only row has no "image". In these strings `<image>` is a
placeholder, and there must be one for each picture.

LLaVA's form is read, too: one JSON array over the whole file, and turns `{"from": "human" or "gpt", "value": …}`.

So is a Parquet table, as minimind-3v publishes it: the column "conversations" has the turns as JSON, "image_bytes" the
pictures themselves (bytes, a list of bytes, or null). There a text-only row carries a small black picture that no
`<image>` speaks of; it is left out.
"""

import json
import os.path
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minivlm.config import IMAGE_TOKEN
from minivlm.data.images import ImageError, open_image
from minivlm.data.readers import contents, source_files
from minivlm.processor import HALF_A_CHARACTER, SampleError, check_answers, messages_from_row

SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}  # LLaVA's names
STAND_IN_SIZE = (8, 8)
STAND_IN_BYTES = 4096  # what is larger is not opened


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
        conversations: turns `{"role": …, "content": …}` with `<image>` where a picture stands.
        images: the pictures in order: paths, the bytes of files, or pictures already drawn.
        where: the row's name in messages, such as "train.jsonl, line 12".
    """

    conversations: list[dict]
    images: list = field(default_factory=list)
    where: str = ""

    def messages(self) -> list[dict]:
        """The same as chat messages with image parts."""
        return messages_from_row(self.conversations, self.images, self.where)


def read_rows(path: str | Path, images: str | Path | None = None) -> Iterator[Sample]:
    """The rows of a file, one after the other, up to the first that cannot be used; blank lines are passed over.

    Args:
        path: JSON lines or one JSON array, UTF-8, or a Parquet table; or a folder with some `.jsonl` and `.parquet`
            files, read by their names. Of an array, all of the text is held in memory; of the others some rows.
        images: the folder of the pictures; by default the one in which the file lies.

    Raises:
        SampleError: the file is missing, cut off or has no such columns; or, with the line's number, a line is no JSON
            object, a turn is not understood or out of order, nothing is to be learnt from it, a text has half a
            character, its `<image>`s are more or fewer than its pictures, or one of these is missing or lies outside
            the folder. The pictures are not opened.
    """
    for found in scan_rows(path, images):
        if isinstance(found, SampleError):
            raise found
        yield found


def scan_rows(path: str | Path, images: str | Path | None = None) -> Iterator[Sample | SampleError]:
    """All rows, as `read_rows` reads them; in the place of one that cannot be used stands its error.

    Raises:
        SampleError: the file is missing, or a folder has none.
    """
    for file in source_files(path):
        folder = file.parent if images is None else Path(images)
        for found in contents(file):
            yield found if isinstance(found, SampleError) else _row_or_error(*found, folder)


def _row_or_error(where: str, content: Any, folder: Path) -> Sample | SampleError:
    try:
        return _row(content, folder, where)
    except SampleError as error:
        return error


def _row(content: bytes | Any, folder: Path, where: str) -> Sample:
    if isinstance(content, bytes):
        content = _json(content, "a line of JSON", where)
    if not isinstance(content, dict) or content.get("conversations") is None:
        raise SampleError(where, 'not an object with "conversations"; each row needs its turns under that name')
    if "image_bytes" in content:
        turns = _turns(_json(content["conversations"], "JSON", where), where)
        pictures = _shown(_held_pictures(content["image_bytes"], where), turns)
    else:
        turns = _turns(content["conversations"], where)
        pictures = _image_files(content.get("image"), folder, where)
    row = Sample(turns, pictures, where)
    messages = row.messages()
    check_answers(messages, where)
    _check_order([message["role"] for message in messages], where)
    return row


def _json(content: Any, what: str, where: str) -> Any:
    """What a text says; what is no text is taken as it is."""
    if not isinstance(content, bytes | str):
        return content
    try:
        return json.loads(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or brackets in brackets without end
        raise SampleError(where, f"not {what} ({error}); correct it") from error


def _held_pictures(held: Any, where: str) -> list[bytes]:
    """A table's pictures: one, several or none."""
    pictures = [] if held is None else held if isinstance(held, list) else [held]
    for picture in pictures:
        if not isinstance(picture, bytes):
            raise SampleError(
                where,
                f'"image_bytes" has {type(picture).__name__}; it must be the bytes of picture files, and only Parquet '
                'holds these (in JSON, "image" names files)',
            )
    return pictures


def _shown(pictures: list[bytes], turns: Any) -> list[bytes]:
    """The pictures, without the stand-ins of a row that speaks of none."""
    texts = [str(turn.get("content")) for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    spoken_of = any(IMAGE_TOKEN in text for text in texts)
    return pictures if spoken_of or not all(map(_is_stand_in, pictures)) else []


def _is_stand_in(picture: bytes) -> bool:
    """Whether a picture is small and black all over."""
    if len(picture) > STAND_IN_BYTES:
        return False
    try:
        opened = open_image(picture)
    except ImageError:
        return False
    return opened.size == STAND_IN_SIZE and opened.getextrema() == ((0, 0),) * 3


def _turns(conversations: Any, where: str) -> Any:
    """LLaVA's turns under our names; of all turns only role and content."""
    if not isinstance(conversations, list) or not all(isinstance(turn, dict) for turn in conversations):
        return conversations
    turns = []
    for turn in conversations:
        if set(turn) >= {"from", "value"}:
            if not isinstance(turn["from"], str) or turn["from"] not in SPEAKERS:
                raise SampleError(where, f"a turn is from {turn['from']!r}; it must be one of {', '.join(SPEAKERS)}")
            turn = {"role": SPEAKERS[turn["from"]], "content": turn["value"]}
        turns.append({key: turn[key] for key in ("role", "content") if key in turn})
    return turns


def _check_order(roles: list[str], where: str) -> None:
    """After an optional system turn, user and assistant take turns, the user first."""
    spoken = roles[1:] if roles[0] == "system" else roles
    for place, role in enumerate(spoken, start=1 + len(roles) - len(spoken)):
        expected = ("assistant", "user")[(place - len(roles) + len(spoken)) % 2]
        if role != expected:
            raise SampleError(
                where, f"turn {place} is the {role}'s where the {expected}'s is expected; user and assistant take turns"
            )


def _short(name: str, length: int = 40) -> str:
    return repr(name if len(name) <= length else f"{name[:length]}…")


def _image_files(names: Any, folder: Path, where: str) -> list[Path]:
    """The paths behind "0.jpg, 1.jpg"."""
    if not names:
        return []
    if not isinstance(names, str):
        raise SampleError(where, f'"image" is {type(names).__name__}; write file names in one string, "0.jpg, 1.jpg"')
    paths = []
    for name in (name.strip() for name in names.split(",")):
        if not name or os.path.isabs(name) or os.path.normpath(name).startswith(".."):
            raise SampleError(where, f"the picture {name!r} is no name inside {folder}; name files in that folder")
        if HALF_A_CHARACTER.search(name):
            raise SampleError(where, f"the picture's name {_short(name)} has half of a character; rename the file")
        try:
            found = (folder / name).is_file()
        except OSError as error:  # such as a name that is too long
            raise SampleError(where, f"no file can be called {_short(name)} ({error.strerror}); correct it") from error
        if not found:
            raise SampleError(where, f"the picture {folder / name} is missing; add it or drop the row")
        paths.append(folder / name)
    return paths
