"""Fill the measured numbers into README.md and its sisters (`PAGES`): `python docs/build.py`. Nobody types them.

A slot is a comment that names its source, its present content, and a closing comment:

    <!-- n: data/results/measured.json#run.bf16.minutes:.1f -->8.7<!-- /n -->
    <!-- n: data/results/table.md -->
    (a whole file)
    <!-- /n -->

The first takes one value of a JSON file, by dotted key (a number picks from a list) and format; `#seconds/60:.1f`
divides it first. The second takes a whole file, whose links to other files are turned to fit. A slot whose source does
not exist yet shows `…`. A test holds that no slot is empty and that the page says what the files say.
"""

import json
import os.path
import re
from functools import reduce
from pathlib import Path

EMPTY = "…"
PAGES = ("README.md", "README.zh.md", "notebooks/README.md")
SLOT = re.compile(
    r"<!-- n: (?P<file>[^#\s]+?)(?:#(?P<key>[^:/\s]+)(?:/(?P<unit>\d+))?(?::(?P<format>\S+))?)? -->.*?<!-- /n -->",
    re.DOTALL,
)
LINK = re.compile(r"""(?P<before>\]\(|\b(?:src|href)=")(?P<target>(?![\w+.-]+:|[/#])[^)"\s]+)""")


def slot_content(root: Path, slot: re.Match) -> str:
    """What belongs into a slot, `…` while its file is missing.

    Raises:
        KeyError, IndexError: the JSON file has no such key.
    """
    file = root / slot["file"]
    if not file.is_file():
        return EMPTY if slot["key"] else f"\n{EMPTY}\n"
    text = file.read_text(encoding="utf-8")
    if slot["key"] is None:
        return f"\n{with_links_from(text.strip(), os.path.dirname(slot['file']))}\n"
    value = reduce(
        lambda v, part: v[int(part) if isinstance(v, list) else part], slot["key"].split("."), json.loads(text)
    )
    return format(value / int(slot["unit"]) if slot["unit"] else value, slot["format"] or "")


def with_links_from(text: str, folder: str) -> str:
    """A text from `folder` whose relative links shall work from the root."""

    def turn(link: re.Match) -> str:
        return link["before"] + os.path.normpath(os.path.join(folder, link["target"])).replace(os.sep, "/")

    return LINK.sub(turn, text)


def filled(text: str, root: Path) -> str:
    """The page with every slot filled from the files below `root`."""

    def fill(slot: re.Match) -> str:
        return slot[0].split("-->")[0] + "-->" + slot_content(root, slot) + "<!-- /n -->"

    return SLOT.sub(fill, text)


if __name__ == "__main__":
    root = Path(__file__).parents[1]
    for page in PAGES:
        (root / page).write_text(filled((root / page).read_text(encoding="utf-8"), root), encoding="utf-8")
