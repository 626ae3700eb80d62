"""Reads every row of a source once, checks and counts it: what `minivlm data check` prints."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm.config import IGNORE_INDEX
from minivlm.data.readers import checked_samples
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

    def count(self, row: tuple[Sample, Example] | SampleError) -> None:
        """Add a row of `checked_samples`."""
        if isinstance(row, SampleError):
            self.bad.append(row)
            return
        sample, example = row
        tokens = len(example.input_ids)
        texts = (part.get("text", "") for message in sample.messages for part in message["content"])
        self.usable += 1
        self.images[len(sample.images)] += 1
        self.languages["zh" if any(map(HAN.search, texts)) else "en"] += 1
        self.lengths[tokens // BIN] += 1
        self.tokens += tokens
        self.supervised += tokens - example.labels.count(IGNORE_INDEX)


def survey(
    path: str | Path, processor: "MiniVLMProcessor", images: str | Path | None = None, decode: bool = False
) -> Survey:
    """Read, check and count every row once; arguments and errors are those of `checked_samples`."""
    result = Survey()
    for row in checked_samples(path, processor, images, decode):
        result.count(row)
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
