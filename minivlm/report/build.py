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
from minivlm.report.answers import COLUMNS, LANGS, table_rows
from minivlm.report.tables import Table, counts, held, make_table, value
from minivlm.runtime.files import write_file


def write_report(out: str | Path, run: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write the report of what `pipeline.py` recorded into the folder `out`, beside the `headline`s of other seeds.

    Returns the path of `index.html`, which needs no other file. Beside it: `report.md`, its images, two parts of it.
    """
    out = Path(out)
    content = page_content(run, seeds)
    for file in ("index.html", "report.md", "table.md", "metrics.md"):
        write_file(out / file, environment().get_template(f"{file}.j2").render(content))
    write_file(out / "pictures/loss.png", content["curves"]["png"])
    for row in content["rows"]:
        write_file(out / f"pictures/{row['name']}.png", row["png"])
    return out / "index.html"


def environment() -> Environment:
    """The templates; what they insert is escaped, by what HTML or Markdown would obey."""
    templates = Environment(
        loader=PackageLoader("minivlm.report"), autoescape=lambda name: bool(name) and name.endswith(".html.j2"),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    templates.filters["plain"] = plain
    templates.filters["data_uri"] = lambda png: Markup(f"data:image/png;base64,{base64.b64encode(png).decode()}")
    return templates


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line, in a table too."""
    escaped = html.escape(text, quote=False)
    for sign in "\\`*_[]~#":
        escaped = escaped.replace(sign, f"\\{sign}")
    return re.sub(r"\s+", " ", escaped).replace("|", "&#124;")


def page_content(run: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What the templates show: texts, and tables of cells."""
    opening, about_exam, chance, *definitions = _paragraphs(run)
    return {
        "title": "MiniVLM: what two stages of training taught",
        "opening": opening,
        "tiles": _tiles(run),
        "prompts": {lang: f"{IMAGE_TOKEN} {prompt}" for lang, prompt in PROMPTS.items()},
        "stages": list(COLUMNS.values()),
        "rows": table_rows(run),
        "curves": loss_curves(run),
        "about_exam": about_exam,
        "headline": tables.headline_table({"": tables.headline(run)}),
        "controls": [tables.controls_table(run, stage) for stage in COLUMNS],
        "questions": {stage: tables.questions_table(run, stage) for stage in COLUMNS},
        "pope": tables.pope_table(run),
        "chance": chance,
        "every_control": tables.every_control(run),
        "holdout": tables.holdout_table(run),
        "breakdown": [tables.breakdown(run, level) for level in ("pair", "kind")],
        "seeds": tables.seeds_table(run, seeds) if seeds else None,
        "ledger": tables.ledger_table(run),
        "made": _made_table(run),
        "definitions": definitions,
    }


def _paragraphs(run: Mapping[str, Any]) -> list[str]:
    """The lines of `paragraphs.txt`, with this run's numbers."""
    sizes = run["sizes"]
    trained = {f"trained_in_{stage}": f"{sum(row[2] for row in rows):,}" for stage, rows in run["ledgers"].items()}
    results = {control: held(run, control) for control in CONTROLS}
    outside = [
        f"{control}, {side}: {'; '.join(names)}"
        for control, one in results.items()
        for side, names in (("above", one.above), ("below", one.below))
        if names
    ]
    numbers = {
        "minutes": f"{run['seconds']['total'] / 60:.1f}",
        "cores": run["machine"]["cores"],
        "shown_another": min(CONTROLLED, sizes["questioned"]),
        "inside": ", ".join(f"{control} {one.inside} of {one.of}" for control, one in results.items()),
        "outside": ". ".join(outside) or "none",
    }
    return environment().get_template("paragraphs.txt").render(sizes | trained | numbers).splitlines()


def _tiles(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A few large numbers, each with what it is."""
    exams = [run["exam"]["sft"][lang] for lang in LANGS]
    recall = min((tables.near(exam["descriptions"]["model"])["any"]["recall"] for exam in exams), key=value)
    questions = min((exam["questions"]["model"]["all"] for exam in exams), key=value)
    named, answered = (f"{100 * one['value']:.0f}%" if one["denominator"] else "–" for one in (recall, questions))
    weaker = "after stage 2, in the weaker language"
    return [
        (f"{run['seconds']['total'] / 60:.1f}", "minutes, all in all"),
        (f"{run['peak_memory_gb']:.1f} GB" if run["peak_memory_gb"] else "–", "of memory at the most"),
        (named, f"of near things named with their colour {weaker}: {counts(recall)}"),
        (answered, f"of questions answered exactly {weaker}: {counts(questions)}"),
    ]


def _made_table(run: Mapping[str, Any]) -> Table:
    names = {"pictures": "drawing and encoding pictures", "pretrain": "stage 1", "sft": "stage 2"}
    names |= {"exam": "the exam", "total": "all in all"}
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
    return make_table("", ["", ""], rows, "", "facts")


# ---- curves


def loss_curves(run: Mapping[str, Any]) -> dict[str, Any]:
    """Both losses, step by step and moving_average: "png", "alt", and "summary" in words."""
    with matplotlib.style.context(["default", "tableau-colorblind10"]), matplotlib.rc_context({"font.size": 9.5}):
        plot = Figure(figsize=(9.2, 3.1), dpi=150, layout="constrained")
        parts = []
        for axes, (stage, name), colour in zip(plot.subplots(1, 2), COLUMNS.items(), ("C0", "C1"), strict=True):
            losses, smooth = run["losses"][stage], moving_average(run["losses"][stage])
            steps = range(1, len(losses) + 1)
            axes.plot(steps, losses, color=colour, alpha=0.28, linewidth=0.7)
            axes.plot(steps, smooth, color=colour, linewidth=1.8)
            axes.set(xlabel="step", ylabel="loss", yscale="log")
            axes.set_title(f"{name}: {smooth[-1]:.2f} at the end", loc="left")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.grid(axis="y", alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            parts.append(f"{name} from {losses[0]:.2f} to {smooth[-1]:.2f} in {len(losses):,} steps")
        memory = io.BytesIO()
        plot.savefig(memory, format="png")
    nothing = f"A model that knows nothing would score ln V = {run['ln_vocabulary']:.2f}."
    summary = f"The loss fell for {', for '.join(parts)}. {nothing}"
    alt = f"Two curves on logarithmic scales, faint for single steps, strong for their running mean. {summary}"
    return {"png": memory.getvalue(), "alt": alt, "summary": summary}


def moving_average(values: Sequence[float], share: float = 0.03) -> list[float]:
    """A running mean over this share of the steps, around each; over fewer at both ends."""
    reach = round(share * len(values) / 2)
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def read_seeds(file: str | Path) -> list[dict[str, Any]]:
    """The shipped headlines, or none if there is no such file; a ValueError if it is no JSON."""
    return json.loads(Path(file).read_text("utf-8")) if Path(file).is_file() else []
