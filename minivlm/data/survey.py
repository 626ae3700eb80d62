"""What a file of rows holds, and what is wrong with it: everything is read once, and nothing is trained on trust."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from minivlm.config import IGNORE_INDEX
from minivlm.data.images import ImageError, open_image
from minivlm.data.samples import Sample, scan_rows
from minivlm.processor import Example, MiniVLMProcessor, SampleError

BIN, BAR = 64, 40  # tokens in a bar of the histogram; letters of the longest bar
HAN = re.compile("[\u4e00-\u9fff]")  # the usual Chinese characters


@dataclass
class Survey:
    """What was found.

    Attributes:
        usable: rows that can be trained on.
        bad: the errors of all others, in the file's order; each names its row.
        pictures: usable rows by their number of pictures.
        languages: usable rows by language: "zh" where a Chinese character stands, "en" otherwise.
        lengths: usable rows by their tokens in bins of `BIN`.
        tokens, learnt: of all usable rows.
    """

    usable: int = 0
    bad: list[SampleError] = field(default_factory=list)
    pictures: Counter[int] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    tokens: int = 0
    learnt: int = 0


def survey(
    path: str | Path,
    processor: MiniVLMProcessor,
    images: str | Path | None = None,
    decode: bool = False,
    keep: Callable[[Sample, int], None] | None = None,
) -> Survey:
    """Read every row once, render it, and count.

    Memory does not grow with the rows, but for an array's text and for the messages about bad rows.

    Args:
        path, images: as in `read_rows`.
        processor: renders the rows, so that one that is too long is found.
        decode: open every picture, too.
        keep: called with each usable row, in order, and its number of tokens.

    Raises:
        SampleError: the file is missing, or a folder has none.
    """
    found = Survey()
    for row in scan_rows(path, images):
        try:
            rendered = _rendered(row, processor, decode)
        except SampleError as error:
            found.bad.append(SampleError("", str(error)))  # the error itself holds the row, through its traceback
            continue
        _count(found, row, rendered)
        if keep is not None:
            keep(row, len(rendered.input_ids))
    return found


def _rendered(row: Sample | SampleError, processor: MiniVLMProcessor, decode: bool) -> Example:
    if isinstance(row, SampleError):
        raise row
    rendered = processor.render(row.messages(), row.where)
    for picture in row.images if decode else ():
        try:
            open_image(picture)
        except ImageError as error:
            raise SampleError(row.where, str(error)) from error
    return rendered


def _count(found: Survey, row: Sample, rendered: Example) -> None:
    tokens = len(rendered.input_ids)
    found.usable += 1
    found.pictures[len(row.images)] += 1
    found.languages["zh" if any(HAN.search(turn["content"]) for turn in row.conversations) else "en"] += 1
    found.lengths[tokens // BIN] += 1
    found.tokens += tokens
    found.learnt += tokens - rendered.labels.count(IGNORE_INDEX)


def as_text(found: Survey) -> str:
    """The counts and the histogram for a terminal; the bad rows are not in it."""
    rows = found.usable + len(found.bad)
    lines = [f"{rows} rows, {'all of them usable' if not found.bad else f'{found.usable} of them usable'}"]
    if found.usable:
        lines.append("pictures in a row: " + ", ".join(f"{n}: {found.pictures[n]}" for n in sorted(found.pictures)))
        lines.append("languages: " + ", ".join(f"{name}: {count}" for name, count in sorted(found.languages.items())))
        share = found.learnt / found.tokens
        lines.append(f"tokens: {found.tokens}, {found.tokens / found.usable:.0f} a row, {share:.0%} of them learnt")
        most = max(found.lengths.values())
        for place in range(min(found.lengths), max(found.lengths) + 1):
            count = found.lengths[place]
            bar = "█" * round(BAR * count / most)
            lines.append(f"{place * BIN:>6} to {place * BIN + BIN - 1:<6}{count:>8} {bar}".rstrip())
    return "\n".join(lines)
