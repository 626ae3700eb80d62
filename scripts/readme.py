"""Fill the measured numbers into README.md: `python scripts/readme.py`. Nobody types them.

A slot is a comment that names its source, its present content, and a closing comment:

    <!-- n: data/results/measured.json#run.bf16.minutes:.1f -->8.7<!-- /n -->
    <!-- n: data/results/table.md -->
    (a whole file)
    <!-- /n -->

The first takes one value of a JSON file, by dotted key and format; the second a whole file. A slot whose source does
not exist yet shows `…`. A test holds that no slot is empty and that the page says what the files say.
"""

import json
import re
from functools import reduce
from pathlib import Path

EMPTY = "…"
SLOT = re.compile(r"<!-- n: (?P<file>[^#\s]+?)(?:#(?P<key>[^:\s]+)(?::(?P<format>\S+))?)? -->.*?<!-- /n -->", re.DOTALL)


def slot_content(root: Path, file: str, key: str | None, spec: str | None) -> str:
    """What belongs into a slot, `…` while its file is missing.

    Raises:
        KeyError: the JSON file has no such key.
    """
    if not (root / file).is_file():
        return EMPTY if key else f"\n{EMPTY}\n"
    text = (root / file).read_text(encoding="utf-8")
    if key is None:
        return f"\n{text.strip()}\n"
    return format(reduce(lambda value, part: value[part], key.split("."), json.loads(text)), spec or "")


def filled(text: str, root: Path) -> str:
    """The page with every slot filled from the files below `root`."""

    def fill(slot: re.Match) -> str:
        opening = slot.group(0).split("-->")[0] + "-->"
        return opening + slot_content(root, slot["file"], slot["key"], slot["format"]) + "<!-- /n -->"

    return SLOT.sub(fill, text)


if __name__ == "__main__":
    page = Path(__file__).parents[1] / "README.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), page.parent), encoding="utf-8")
