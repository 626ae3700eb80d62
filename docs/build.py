"""Write README.md and the other pages from their templates and the measured numbers: `python docs/build.py`.

A template `docs/templates/PAGE.md.j2` becomes the page PAGE.md; `PAGES` says where it lies. In a template a file
`data/results/NAME.json` is the variable NAME, so no table of numbers is typed. A test holds that every committed page
is what this command writes.
"""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES, RESULTS = ROOT / "docs/templates", ROOT / "data/results"
PLACES = {"README.md": "README.md", "README.zh.md": "README.zh.md", "teachers.md": "notebooks/README.md"}
EXAMPLES = (
    "sunset",
    "reader",
    "panda",
)  # the images of README.md; not all answers are right
NUMBER_WORDS = {"en": ("1 thing", "2 things", "3 things", "4 things"), "zh": ("一样", "两样", "三样", "四样")}


def pages() -> dict[str, str]:
    """Every page by its path from the root, as its template and the numbers make it."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    variables = _results() | {"included": lambda file: (ROOT / file).read_text("utf-8").strip()}
    names = sorted(file.name.removesuffix(".j2") for file in TEMPLATES.glob("*.md.j2"))
    return {
        PLACES.get(name, f"docs/{name}"): environment.get_template(f"{name}.j2").render(variables) for name in names
    }


def _results() -> dict[str, Any]:
    """The variables of the templates."""
    results = {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(RESULTS.glob("*.json"))}
    for name in ("bench-scenes", "bench-clip-26m"):
        results[name.replace("-", "_")] = json.loads((RESULTS / name / "bench.json").read_text("utf-8"))
    notebooks = json.loads((ROOT / "notebooks/measured.json").read_text("utf-8"))
    by_name = {entry["name"]: entry["answers"] for entry in results["table"]}
    return results | {
        "notebooks": {name: entry for name, entry in notebooks.items() if "/" not in name},
        "examples": {name: by_name[name] for name in EXAMPLES},
        "headline": {lang: _headline(results["seeds"][0]["near"], lang) for lang in NUMBER_WORDS},
    }


def _headline(near: dict[str, Any], lang: str) -> list[list[str]]:
    """Precision and recall of English answers by the number of things: one row a number, two cells a stage."""
    rows = []
    for number, words in enumerate(NUMBER_WORDS[lang], start=1):
        scores = [near[stage]["en"][str(number)][measure] for stage in near for measure in ("precision", "recall")]
        rows.append([words, *(f"{score['value']:.3f}" for score in scores)])
    return rows


if __name__ == "__main__":
    for place, text in pages().items():
        (ROOT / place).write_text(text, encoding="utf-8")
        print(f"{place}: {len(text.split())} words")
