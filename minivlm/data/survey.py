"""Reads every row of a source once, checks and counts it: what `minivlm data check` prints."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm.config import IGNORE_INDEX
from minivlm.data.images import ImageError, open_image
from minivlm.data.readers import read_samples
from minivlm.data.samples import Example, Sample, SampleError

if TYPE_CHECKING:
    from minivlm.processor import MiniVLMProcessor

BIN, BAR = 64, 40  # tokens in a bar of the histogram; letters of the longest bar
HAN = re.compile("[\u4e00-\u9fff]")  # the usual Chinese characters


@dataclass
class Survey:
    """Counts of a source's rows.

    Attributes:
        usable: rows that can be trained on.
        bad: the errors of all others, in the file's order; each names its row.
        images, languages, lengths: usable rows by their number of images; by language, "zh" where a Chinese character
            stands, "en" otherwise; by their tokens in bins of `BIN`.
        tokens, supervised: of all usable rows.
    """

    usable: int = 0
    bad: list[SampleError] = field(default_factory=list)
    images: Counter[int] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    tokens: int = 0
    supervised: int = 0

    def count(self, sample: Sample, example: Example) -> None:
        """Add a usable row."""
        tokens = len(example.input_ids)
        texts = (part.get("text", "") for message in sample.messages for part in message["content"])
        self.usable += 1
        self.images[len(sample.images)] += 1
        self.languages["zh" if any(map(HAN.search, texts)) else "en"] += 1
        self.lengths[tokens // BIN] += 1
        self.tokens += tokens
        self.supervised += tokens - example.labels.count(IGNORE_INDEX)


def survey(
    path: str | Path,
    processor: "MiniVLMProcessor",
    images: str | Path | None = None,
    decode: bool = False,
    keep: Callable[[Sample, int], None] | None = None,
) -> Survey:
    """Read every row once, encode its text, and count.

    Memory does not grow with the rows, but for an array's text and for the messages about bad rows.

    Args:
        path, images: as in `read_samples`.
        processor: encodes the rows, so that one that is too long is noticed.
        decode: open every image, too.
        keep: called with each usable sample, in order, and its number of tokens.

    Raises SampleError where the file is missing, or a folder has none.
    """
    result = Survey()
    for sample in read_samples(path, images):
        try:
            if isinstance(sample, SampleError):
                raise sample
            example = processor.encode(sample)
            for image in sample.images if decode else ():
                open_image(image)
        except ImageError as error:
            result.bad.append(SampleError(sample.name, str(error)))
            continue
        except SampleError as error:
            result.bad.append(SampleError("", str(error)))  # the error itself holds the row, through its traceback
            continue
        result.count(sample, example)
        if keep is not None:
            keep(sample, len(example.input_ids))
    return result


def as_text(result: Survey) -> str:
    """The counts and the histogram for a terminal; the bad rows are not in it."""
    rows = result.usable + len(result.bad)
    lines = [f"{rows} rows, {f'{result.usable} of them' if result.bad else 'all of them'} usable"]
    if result.usable:
        lines.append("images in a row: " + ", ".join(f"{n}: {result.images[n]}" for n in sorted(result.images)))
        lines.append("languages: " + ", ".join(f"{name}: {count}" for name, count in sorted(result.languages.items())))
        share = result.supervised / result.tokens
        lines.append(f"tokens: {result.tokens}, {result.tokens / result.usable:.0f} a row, {share:.0%} supervised")
        most = max(result.lengths.values())
        for number in range(min(result.lengths), max(result.lengths) + 1):
            count = result.lengths[number]
            bar = "█" * round(BAR * count / most)
            lines.append(f"{number * BIN:>6} to {number * BIN + BIN - 1:<6}{count:>8} {bar}".rstrip())
    return "\n".join(lines)
