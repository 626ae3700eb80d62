"""The report of a run: `index.html`, `report.md`, and two tables for a README, from plain JSON and templates.

A run is plain JSON (`pipeline.py` writes it as `results.json`), so its report can be written again at any time.
"""

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from minivlm.config import IMAGE_TOKEN, PROMPTS
from minivlm.evaluation import CONTROLLED, CONTROLS
from minivlm.report import tables
from minivlm.report.answers import LANGUAGES, STAGES, table_rows
from minivlm.report.tables import Cell, Table, counts, held, value

TITLE = "MiniVLM: what two stages of training taught"
PAGES = {  # file -> template
    "index.html": "page.html.j2",
    "report.md": "report.md.j2",
    "table.md": "table.md.j2",
    "metrics.md": "metrics.md.j2",
}


def write_report(out: str | Path, run: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write the report of a run into the folder `out`.

    Args:
        run: what `pipeline.py` recorded.
        seeds: `headline`s of shipped runs, shown together with this one's.

    Returns:
        The path of `index.html`, which needs nothing but itself. Beside it lie `report.md` with its pictures, and
        `table.md` and `metrics.md`, parts of it for a README.

    Raises:
        OSError: the folder cannot be written.
    """
    out = Path(out)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    content = page_content(run, seeds)
    for file, template in PAGES.items():
        (out / file).write_text(environment().get_template(template).render(content), "utf-8")
    (out / "pictures/loss.png").write_bytes(content["curves"]["png"])
    for row in content["rows"]:
        (out / f"pictures/{row['name']}.png").write_bytes(row["png"])
    return out / "index.html"


def environment() -> Environment:
    """The templates; what they insert is escaped, by what HTML or Markdown would obey."""
    made = Environment(
        loader=PackageLoader("minivlm.report"), autoescape=lambda name: bool(name) and name.endswith(".html.j2"),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters["plain"] = plain
    made.filters["data_uri"] = lambda png: Markup(f"data:image/png;base64,{base64.b64encode(png).decode()}")
    return made


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line, in a table too."""
    escaped = html.escape(text, quote=False)
    for sign in "\\`*_[]~#":
        escaped = escaped.replace(sign, f"\\{sign}")
    return re.sub(r"\s+", " ", escaped).replace("|", "&#124;")


def page_content(run: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What the templates show: texts, and tables of cells."""
    return {
        "title": TITLE,
        "opening": _opening(run),
        "tiles": _tiles(run),
        "prompts": {lang: f"{IMAGE_TOKEN} {prompt}" for lang, prompt in PROMPTS.items()},
        "stages": list(STAGES.values()),
        "rows": table_rows(run),
        "curves": loss_curves(run),
        "about_exam": _about_the_exam(run["sizes"]),
        "headline": tables.headline_table(tables.headline(run)),
        "controls": [tables.controls_table(run, stage) for stage in STAGES],
        "questions": {stage: tables.questions_table(run, stage) for stage in STAGES},
        "pope": tables.pope_table(run),
        "chance": _at_chance(run),
        "every_control": tables.every_control(run),
        "holdout": tables.holdout_table(run),
        "breakdown": [tables.breakdown(run, level) for level in ("pair", "kind")],
        "seeds": tables.seeds_table(run, seeds) if seeds else None,
        "ledger": tables.ledger_table(run),
        "made": _made_table(run),
        "definitions": environment().get_template("definitions.txt").render().splitlines(),
    }


def _opening(run: Mapping[str, Any]) -> str:
    seconds, ledgers = run["seconds"], run["ledgers"]
    w_size = sum(row[2] for row in ledgers["pretrain"])
    both = sum(row[2] for row in ledgers["sft"])
    return (
        "A language model that had only ever read text was shown drawn pictures, for "
        f"{_minutes(seconds['total'])} minutes on {run['machine']['cores']} processor cores. In stage 1 one matrix "
        f"learned to translate what a frozen encoder sees ({w_size:,} numbers); in stage 2 the language model learned "
        f"along with it ({both:,}). This page shows what came of it, right and wrong."
    )


def _tiles(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A few large numbers, each with what it is."""
    exams = [run["exam"]["sft"][lang] for lang in LANGUAGES]
    recall = min((tables.near(exam, "any")["recall"] for exam in exams), key=value)
    questions = min((exam["questions"]["model"]["all"] for exam in exams), key=value)
    named, answered = (f"{100 * one['value']:.0f}%" if one["denominator"] else "–" for one in (recall, questions))
    weaker = "after stage 2, in the weaker language"
    return [
        (_minutes(run["seconds"]["total"]), "minutes, all in all"),
        (f"{run['peak_memory_gb']:.1f} GB" if run["peak_memory_gb"] else "–", "of memory at the most"),
        (named, f"of near things named with their colour {weaker}: {counts(recall)}"),
        (answered, f"of questions answered exactly {weaker}: {counts(questions)}"),
    ]


def _about_the_exam(size: Mapping[str, int]) -> str:
    shown_another = min(CONTROLLED, size["questioned"])
    return (
        f"Measured on {size['exam']} pictures that nothing ever trained on, in each language: one to four things, a "
        "quarter each; a third of the things far away; kinds, colours, settings and positions uniform, but pictures "
        "with a held-out pair were drawn again: the shares of kinds and settings then differ by up to a quarter from "
        f"equal ones. Descriptions are of all {size['exam']}; the questions are asked about {size['questioned']} of "
        f"them, and with another picture as a control about {shown_another} of these. The table gives precision and "
        "recall of kind with colour over near things, by the number of things in the picture, with the counts below."
    )


def _at_chance(run: Mapping[str, Any]) -> str:
    results = {control: held(run, control) for control in CONTROLS}
    counts = ", ".join(f"{control} {one.inside} of {one.of}" for control, one in results.items())
    missed = [
        f"{control}, {side}: {'; '.join(names)}"
        for control, one in results.items()
        for side, names in (("above", one.above), ("below", one.below))
        if names
    ]
    return (
        "The chance level of the controls' answers lies within their 95% intervals (descriptions, every type of "
        f"question, every way of POPE, both stages and languages): {counts}. The cases share pictures, so they are not "
        "independent, and whoever always says the same meets this level by arithmetic. Intervals elsewhere: "
        f"{'. '.join(missed) or 'none'}."
    )


def _made_table(run: Mapping[str, Any]) -> Table:
    names = {
        "pictures": "drawing and encoding pictures",
        "pretrain": "stage 1",
        "sft": "stage 2",
        "exam": "the exam",
        "total": "all in all",
    }
    rows = [
        ["command", run["command"]],
        ["seed", str(run["seed"])],
        ["precision of training", run["precision"]],
        ["machine", f"{run['machine']['cores']} cores, {run['machine']['system']}"],
        ["peak memory", f"{run['peak_memory_gb']:.2f} GB" if run["peak_memory_gb"] else "not known on this system"],
        ["training pictures", f"{run['sizes']['pictures']:,}"],
        *([f"time: {names[key]}", f"{seconds:.0f} s"] for key, seconds in run["seconds"].items()),
        ["versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())],
        ["base models", run["base"]],
    ]
    return Table("", [Cell(""), Cell("")], [[Cell(text) for text in row] for row in rows], "", "facts")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


# ---- curves


def loss_curves(run: Mapping[str, Any]) -> dict[str, Any]:
    """Both losses, step by step and smoothed: "png", "alt", and "summary" in words."""
    with matplotlib.style.context(["default", "tableau-colorblind10"]), matplotlib.rc_context({"font.size": 9.5}):
        plot = Figure(figsize=(9.2, 3.1), dpi=150, layout="constrained")
        panels = plot.subplots(1, 2)
        for axes, (stage, name), colour in zip(panels, STAGES.items(), ("C0", "C1"), strict=True):
            losses = run["losses"][stage]
            steps = range(1, len(losses) + 1)
            axes.plot(steps, losses, color=colour, alpha=0.28, linewidth=0.7)
            axes.plot(steps, smoothed(losses), color=colour, linewidth=1.8)
            axes.set(xlabel="step", ylabel="loss", yscale="log")
            axes.set_title(f"{name}: {smoothed(losses)[-1]:.2f} at the end", loc="left")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.grid(axis="y", alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        memory = io.BytesIO()
        plot.savefig(memory, format="png")
    parts = [
        f"{name} from {run['losses'][stage][0]:.2f} to {smoothed(run['losses'][stage])[-1]:.2f} in "
        f"{len(run['losses'][stage]):,} steps"
        for stage, name in STAGES.items()
    ]
    nothing = f"A model that knows nothing would score ln V = {run['ln_vocabulary']:.2f}."
    summary = f"The loss fell for {', for '.join(parts)}. {nothing}"
    alt = f"Two curves on logarithmic scales, faint for single steps, strong for their running mean. {summary}"
    return {"png": memory.getvalue(), "alt": alt, "summary": summary}


def smoothed(values: Sequence[float], share: float = 0.03) -> list[float]:
    """A running mean over this share of the steps, around each; over fewer at both ends."""
    reach = round(share * len(values) / 2)
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def read_seeds(file: str | Path) -> list[dict[str, Any]]:
    """The shipped headlines, or none if there is no such file.

    Raises:
        ValueError: the file is no JSON.
    """
    file = Path(file)
    return json.loads(file.read_text("utf-8")) if file.is_file() else []
