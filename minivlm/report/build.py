"""The page of a run: what both stages say about seven pictures, how they learnt, and how good they are.

A run is plain JSON (`run.py` writes it as `results.json`), so a page can be made again at any time. Aims, floors and
the experiment that the project started from are data here, and stand beside what was measured.
"""

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
from matplotlib.figure import Figure as Plot
from matplotlib.ticker import LogLocator, NullLocator

from minivlm.config import IMAGE_TOKEN, PROMPTS
from minivlm.evaluation import CONTROLLED, CONTROLS, EVERYONE, POPE_WAYS, Estimate
from minivlm.report.page import (
    Block,
    Fold,
    Heading,
    Image,
    Inline,
    Lines,
    Paragraph,
    Span,
    Table,
    Tiles,
    html_page,
    markdown_page,
)
from minivlm.report.page import (
    Figure as Plate,
)
from minivlm.scenes import vocabulary as w
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.facts import MAX_THINGS, Scene
from minivlm.scenes.language import find_setting, find_things, in_reading_order, noun_phrase

STAGES = {"pretrain": "Pretrain_vlm", "sft": "SFT_vlm"}
LANGUAGES = {"en": "English", "zh": "Chinese"}
NUMBERS = tuple(str(n) for n in range(1, MAX_THINGS + 1))
CELLS = tuple((stage, number) for stage in STAGES for number in NUMBERS)
QUESTIONS = ("sft", "questions")

# Kind with colour over near things, precision and recall by stage and number of things; questions after SFT.
Target = Mapping[tuple[str, str], Any]
AIM: Target = {
    **dict(zip(CELLS[:4], ((0.99, 0.99), (0.95, 0.93), (0.90, 0.85), (0.80, 0.75)), strict=True)),
    **dict(zip(CELLS[4:], ((0.99, 0.99), (0.97, 0.96), (0.93, 0.90), (0.88, 0.85)), strict=True)),
    QUESTIONS: 0.92,
}
FLOOR: Target = {
    **dict(zip(CELLS[:4], ((0.95, 0.93), (0.82, 0.80), (0.60, 0.55), None), strict=True)),
    **dict(zip(CELLS[4:], ((0.97, 0.95), (0.88, 0.87), (0.70, 0.68), None), strict=True)),
    QUESTIONS: 0.75,
}
# An easier world: 12 kinds, English, up to three things, all of them near.
EXPERIMENT: Target = {
    **dict(zip(CELLS[:4], ((0.99, 0.99), (0.87, 0.87), (0.66, 0.60), None), strict=True)),
    **dict(zip(CELLS[4:], ((1.00, 1.00), (0.93, 0.95), (0.76, 0.74), None), strict=True)),
    QUESTIONS: "0.78–0.83",
}
SETTING_AIM = 0.97
SIGNS = {"aim": "●", "floor": "◐", "below": "○", "reported": ""}
MEANINGS = "● reaches the aim, ◐ reaches the floor, ○ stays below it"
TITLE = "MiniVLM: what two stages of training taught"


def write_report(out: str | Path, run: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write the page of a run into the folder `out`.

    Args:
        run: what `run.py` recorded.
        seeds: `headline`s of shipped runs, shown together with this one's.

    Returns:
        The path of `index.html`. Beside it lie `report.md` with its pictures, and `table.md` and `metrics.md`, parts of
        it for a README.

    Raises:
        OSError: the folder cannot be written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    curves = loss_curves(run)
    blocks = page_blocks(run, seeds, curves)
    (out / "index.html").write_text(html_page(TITLE, blocks), "utf-8")
    (out / "report.md").write_text(markdown_page(blocks), "utf-8")
    (out / "table.md").write_text(markdown_page([seven_rows(run, "../table/")]), "utf-8")
    (out / "metrics.md").write_text(markdown_page([headline_table(run)]), "utf-8")
    for image in (curves.image, *(_table_image(row) for row in run["table"])):
        (out / image.name).parent.mkdir(exist_ok=True)
        (out / image.name).write_bytes(image.png)
    return out / "index.html"


def page_blocks(run: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]], curves: Plate) -> list[Block]:
    """All of the page, in order."""
    return [
        Heading(TITLE, 1),
        Paragraph(_opening(run), "opening"),
        Tiles(_tiles(run)),
        Heading("The same question to both"),
        Paragraph(
            [
                "Both columns answer the same prompt, ",
                Span(f"{IMAGE_TOKEN} {PROMPTS['en']}", "strong"),
                " or ",
                Span(f"{IMAGE_TOKEN} {PROMPTS['zh']}", "strong"),
                " What an answer says that is not so is underlined and carries a ✗; what it leaves out is named below.",
            ]
        ),
        seven_rows(run),
        Heading("How they learnt"),
        curves,
        Heading("How good they are"),
        Paragraph(_about_the_exam(run)),
        headline_table(run),
        *_detail(run),
        *_seed_blocks(run, seeds),
        Heading("What trained"),
        _ledger_table(run),
        Heading("How this page was made"),
        _made_table(run),
        Heading("What the numbers mean"),
        *(Paragraph(text) for text in DEFINITIONS),
    ]


DEFINITIONS = (
    "Things. An answer names a set of (kind, colour) pairs. Precision is the share of named pairs that are true of "
    "some thing in the picture, recall the share of the picture's things that are named. Over near things only "
    "pictures with a near thing count, near things are asked for, and what is named of the far ones is left out. A "
    "pair that is not true always counts against precision, though it may have been meant for a far thing; "
    "precision at best is what it were if every missed far thing excused one such pair.",
    "CHAIR counts kinds that are not in the picture: CHAIR_i of all kinds mentioned, CHAIR_s of all answers. POPE asks "
    "yes or no about one kind that is there and one that is not, chosen at random, among the most frequent in "
    "training, or among the usual inhabitants of the setting. What is neither yes nor no is wrong, and is no yes.",
    "Controls show what is known without looking: the same prompts with a grey picture (blank), with another picture "
    "of the exam (another), and with no picture at all (alone). A guess is the best constant answer to a type of "
    "question, chosen with the exam's own answers in hand. By accident is what a control's answers score on average "
    "about other pictures than the one asked about and the one shown (yes and no: about pictures of which the same "
    "kind was asked). Answers that know nothing of the picture asked about fit it no better than those, so their "
    "interval should hold this level. With another picture the model answers about what it is shown, which is more "
    "various than a best guess.",
    "Intervals are the middle 95% of 1,000 bootstrap draws over pictures. Where everything is right they have no "
    "width: look at the counts.",
)


def _opening(run: Mapping[str, Any]) -> str:
    seconds, ledgers = run["seconds"], run["ledgers"]
    w_size = sum(row[2] for row in ledgers["pretrain"])
    both = sum(row[2] for row in ledgers["sft"])
    return (
        "A language model that had only ever read text was shown drawn pictures, for "
        f"{_minutes(seconds['total'])} minutes on {run['machine']['cores']} processor cores. In stage 1 one matrix "
        f"learnt to translate what a frozen encoder sees ({w_size:,} numbers); in stage 2 the language model learnt "
        f"along with it ({both:,}). This page shows what came of it, right and wrong."
    )


def _tiles(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    one = {lang: _near(run["exam"]["sft"][lang], "any") for lang in LANGUAGES}
    worst = min(one.values(), key=lambda score: score["recall"]["value"] or 0)
    asked = min((run["exam"]["sft"][lang]["questions"]["model"]["all"] for lang in LANGUAGES), key=_value)
    return [
        (_minutes(run["seconds"]["total"]), "minutes, all in all"),
        (f"{run['peak_memory_gb']:.1f} GB" if run["peak_memory_gb"] else "–", "of memory at the most"),
        (
            _percent(worst["recall"]),
            f"of near things named with their colour after stage 2, in the weaker language: {_counts(worst['recall'])}",
        ),
        (
            _percent(asked),
            f"of questions answered exactly after stage 2, in the weaker language: {_counts(asked)}",
        ),
    ]


def _about_the_exam(run: Mapping[str, Any]) -> str:
    size = run["sizes"]
    shown_another = min(CONTROLLED, size["questioned"])
    return (
        f"Measured on {size['exam']} pictures that nothing ever trained on, in each language: one to four things, a "
        "quarter each; a third of the things far away; kinds, colours, settings and places uniform, but pictures with "
        "a held-out pair were drawn again: the shares of kinds and settings then differ by up to a quarter from equal "
        f"ones. Descriptions are of all {size['exam']}; the questions are asked about {size['questioned']} of them, "
        f"and with another picture as a control about {shown_another} of these. The table gives precision and recall "
        "of kind with colour over near things, by the number of things in the picture, with the counts below. "
        f"{MEANINGS}."
    )


# ---- the seven rows


def seven_rows(run: Mapping[str, Any], pictures: str = "") -> Table:
    """The table: picture, Pretrain_vlm, SFT_vlm, in English and Chinese.

    Args:
        pictures: where the pictures lie for Markdown; by default beside the report.
    """
    rows = []
    for row in run["table"]:
        scene = Scene.from_dict(row["scene"])
        image = _table_image(row, pictures)
        truth = [Span(text, "small") for text in _truth(scene)]
        answers = [Lines([_answer(row["answers"][stage][lang], scene, lang) for lang in LANGUAGES]) for stage in STAGES]
        rows.append([Lines([image, *truth]), *answers])
    return Table(["picture", *STAGES.values()], rows, style="pictures")


def _table_image(row: Mapping[str, Any], folder: str = "") -> Image:
    scene = Scene.from_dict(row["scene"])
    return Image(_drawn(scene), "; ".join(_truth(scene)), f"{folder or 'pictures/'}{row['name']}.png")


@lru_cache(maxsize=16)
def _drawn(scene: Scene) -> bytes:
    memory = io.BytesIO()
    draw(scene).save(memory, "png", optimize=True)
    return memory.getvalue()


def _truth(scene: Scene) -> list[str]:
    things = [
        noun_phrase(t.kind, t.colour, "en", t.size) + (", far away" if t.distance == "far" else "")
        for t in in_reading_order(scene)
    ]
    return ["; ".join(things), w.SETTING_WORDS["en"][scene.setting][0]]


def _answer(text: str, scene: Scene, lang: str) -> Lines:
    """An answer with its errors marked, and below it what it does not name."""
    named = {thing for _, thing in find_things(text)}
    missed = [t for t in in_reading_order(scene) if (t.kind, t.colour) not in named]
    phrases = [noun_phrase(t.kind, t.colour, lang, article=lang == "zh") for t in missed]
    left_out = f"not named: {', '.join(phrases)}" if lang == "en" else f"没有提到：{'、'.join(phrases)}"
    return Lines([marked(text, scene), *([Span(left_out, "small")] if missed else [])], lang)


def marked(text: str, scene: Scene) -> list[Span]:
    """An answer in pieces; those that name a thing or a setting wrongly are marked and say what is true."""
    true = {(t.kind, t.colour) for t in scene.things}
    wrong = []
    for span, (kind, colour) in find_things(text):
        if (kind, colour) not in true:
            colours = " and ".join(sorted({t.colour for t in scene.things if t.kind == kind and t.colour}))
            noun = w.KIND_WORDS["en"][kind]
            wrong.append((span, f"the {noun} here is {colours}" if colours else f"there is no {noun} here"))
    found = find_setting(text)
    if found and found[1] != scene.setting:
        wrong.append((found[0], f"this is {w.SETTING_WORDS['en'][scene.setting][0]}"))
    spans, at = [], 0
    for (start, end), why in sorted(wrong):
        spans += [Span(text[at:start]), Span(text[start:end], "wrong", why)]
        at = end
    return [span for span in (*spans, Span(text[at:])) if span.text]


# ---- curves


def loss_curves(run: Mapping[str, Any]) -> Plate:
    """Both losses, step by step and smoothed, as one picture with its summary in words."""
    with matplotlib.style.context(["default", "tableau-colorblind10"]), matplotlib.rc_context({"font.size": 9.5}):
        plot = Plot(figsize=(9.2, 3.1), dpi=150, layout="constrained")
        sides = plot.subplots(1, 2)
        for side, (stage, name), colour in zip(sides, STAGES.items(), ("C0", "C1"), strict=True):
            losses = run["losses"][stage]
            steps = range(1, len(losses) + 1)
            side.plot(steps, losses, color=colour, alpha=0.28, linewidth=0.7)
            side.plot(steps, smoothed(losses), color=colour, linewidth=1.8)
            side.set(xlabel="step", ylabel="loss", yscale="log")
            side.set_title(f"{name}: {smoothed(losses)[-1]:.2f} at the end", loc="left")
            side.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.yaxis.set_major_formatter("{x:g}")
            side.yaxis.set_minor_locator(NullLocator())
            side.grid(axis="y", alpha=0.25, linewidth=0.6)
            side.spines[["top", "right"]].set_visible(False)
        memory = io.BytesIO()
        plot.savefig(memory, format="png")
    parts = [
        f"{name} from {run['losses'][stage][0]:.2f} to {smoothed(run['losses'][stage])[-1]:.2f} in "
        f"{len(run['losses'][stage]):,} steps"
        for stage, name in STAGES.items()
    ]
    ignorant = f"A model that knows nothing would score ln V = {run['ln_vocabulary']:.2f}."
    summary = f"The loss fell for {', for '.join(parts)}. {ignorant}"
    alt = f"Two curves on logarithmic scales, faint for single steps, strong for their running mean. {summary}"
    return Plate(Image(memory.getvalue(), alt, "pictures/loss.png"), summary)


def smoothed(values: Sequence[float], share: float = 0.03) -> list[float]:
    """A running mean over this share of the steps, around each; over fewer at both ends."""
    reach = round(share * len(values) / 2)
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


# ---- figures


def headline_table(run: Mapping[str, Any]) -> Table:
    """Kind with colour over near things beside aim, floor and experiment."""
    head: list[Inline] = [""]
    for stage, number in CELLS:
        things = "thing" if number == "1" else "things"
        head.append(Lines([Span(STAGES[stage], "small"), f"{number} {things}"]))
    head.append(Lines([Span(STAGES["sft"], "small"), "questions"]))
    shown = headline(run)
    rows: list[list[Inline]] = [_measured_row(f"measured, {name}", shown, lang) for lang, name in LANGUAGES.items()]
    for name, target in (("aim", AIM), ("floor", FLOOR), ("the experiment", EXPERIMENT)):
        rows.append([name, *(_target(target[cell]) for cell in (*CELLS, QUESTIONS))])
    note = "The experiment: an easier world of 12 kinds, in English, up to three things, all of them near."
    return Table(head, rows, "Kind with colour, near things: precision / recall", "numbers headline", note)


def headline(run: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a run that decide, small enough to ship: the headline, settings, CHAIR, questions."""

    def both(get: Callable[[Mapping[str, Any]], Any]) -> dict[str, dict[str, Any]]:
        return {stage: {lang: get(run["exam"][stage][lang]) for lang in LANGUAGES} for stage in STAGES}

    return {
        "seed": run["seed"],
        "command": run["command"],
        "precision": run["precision"],
        "minutes": round(run["seconds"]["total"] / 60, 2),
        "near": both(lambda exam: {number: _near(exam, number) for number in NUMBERS}),
        "setting": both(lambda exam: exam["descriptions"]["model"]["setting"]),
        "chair_i": both(lambda exam: exam["descriptions"]["model"]["chair_i"]),
        "questions": {lang: run["exam"]["sft"][lang]["questions"]["model"]["all"] for lang in LANGUAGES},
    }


def verdict(cell: tuple[str, str], *figures: Estimate) -> str:
    """ "aim", "floor" or "below", by the exact values; "reported" where no floor is set and the aim is missed."""
    values = [_value(figure) for figure in figures]

    def reaches(target: Any) -> bool:
        wanted = target if isinstance(target, tuple) else (target,)
        return all(value >= want for value, want in zip(values, wanted, strict=True))

    if reaches(AIM[cell]):
        return "aim"
    if FLOOR[cell] is None:
        return "reported"
    return "floor" if reaches(FLOOR[cell]) else "below"


def _measured_row(name: str, shown: Mapping[str, Any], lang: str) -> list[Inline]:
    cells: list[Inline] = [name]
    for stage, number in CELLS:
        score = shown["near"][stage][lang][number]
        both = (score["precision"], score["recall"])
        cells.append(_judged((stage, number), *both))
    return [*cells, _judged(QUESTIONS, shown["questions"][lang])]


def _judged(cell: tuple[str, str], *figures: Estimate) -> Lines:
    """Values with the sign of their verdict; below them the counts."""
    sign = SIGNS[verdict(cell, *figures)]
    return Lines(
        [
            [Span(" / ".join(_ratio(figure) for figure in figures), "number"), f" {sign}" if sign else ""],
            Span(" · ".join(_counts(figure) for figure in figures), "small"),
        ]
    )


def _detail(run: Mapping[str, Any]) -> list[Block]:
    """Everything else that was measured."""
    return [
        Heading("Against what can be known without looking", 3),
        *(_controls_table(run, stage) for stage in STAGES),
        Heading("Questions", 3),
        _questions_table(run, "sft"),
        Fold("Questions after stage 1, which never trained on any", [_questions_table(run, "pretrain")]),
        Heading("Is there …? Yes or no", 3),
        _pope_table(run),
        Paragraph(_chance(run)),
        _all_controls(run),
        Heading("Pairs never seen together", 3),
        _holdout_table(run),
        Fold(
            "Near and far, by the number of things, with all counts",
            [_breakdown(run, level) for level in ("pair", "kind")],
        ),
    ]


def _controls_table(run: Mapping[str, Any], stage: str) -> Table:
    rows = []
    for lang, name in LANGUAGES.items():
        for who in EVERYONE:
            exam = run["exam"][stage][lang]
            length = _interval(exam["descriptions"][who]["length"], 1)
            label = Span(f"{name}, the model", "strong") if who == "model" else f"{name}, {who}"
            levels = exam["chance"][who]["descriptions"] if who == "another" else {}
            cells = [_interval(figure, accident=levels.get(key)) for key, figure in _told(exam, who).items()]
            rows.append([label, *cells, length])
    head = ["", "near things: precision", "recall", "setting", "CHAIR_i", "CHAIR_s", "length"]
    note = (
        "Length in words (English) or characters (Chinese) an answer; its counts are all of them over the answers. "
        "Small figures: 95% intervals and counts."
    )
    return Table(head, rows, f"{STAGES[stage]}: descriptions", "numbers", note)


def _questions_table(run: Mapping[str, Any], stage: str) -> Table:
    exam = run["exam"][stage]
    columns = ("model", "another", "best blind")
    head: list[Inline] = ["type", *(f"{name}: {who}" for name in LANGUAGES.values() for who in columns)]
    rows = []
    for type_ in exam["en"]["questions"]["model"]:
        row: list[Inline] = ["all types" if type_ == "all" else type_]
        for lang in LANGUAGES:
            by_who = exam[lang]["questions"]
            level = exam[lang]["chance"]["another"]["questions"].get(type_)
            row += [_interval(by_who["model"][type_]), _interval(by_who["another"][type_], accident=level)]
            row.append(_named(*_best_blind(by_who, type_)))
        rows.append(row)
    note = [
        "Best blind: the best of three that see nothing. With another picture the model should do no better; it does, "
        "by its whole interval, in: ",
        ", ".join(beats_blind(run, [stage])) or "no type of question",
        ".",
    ]
    return Table(head, rows, f"{STAGES[stage]}: questions answered exactly", "numbers", note)


def _best_blind(by_who: Mapping[str, Mapping[str, Estimate]], type_: str) -> tuple[str, Estimate]:
    """Who answers a type of question best without seeing anything, and how well."""
    who = max(("guess", "blank", "alone"), key=lambda who: _value(by_who[who][type_]))
    return who, by_who[who][type_]


def beats_blind(run: Mapping[str, Any], stages: Iterable[str] = tuple(STAGES)) -> list[str]:
    """Types of questions that the model, shown another picture, answers better than the best blind, by its interval."""
    found = []
    for stage in stages:
        for lang, name in LANGUAGES.items():
            by_who = run["exam"][stage][lang]["questions"]
            for type_ in by_who["another"]:
                low = by_who["another"][type_]["low"]
                if low is not None and low > _value(_best_blind(by_who, type_)[1]):
                    found.append(f"{type_} ({name})")
    return found


def _pope_table(run: Mapping[str, Any]) -> Table:
    rows = []
    for stage, name in STAGES.items():
        for lang, language in LANGUAGES.items():
            pope = run["exam"][stage][lang]["pope"]
            for way in POPE_WAYS:
                got = pope["model"][way]
                control = {who: pope[who][way]["accuracy"] for who in CONTROLS}
                best = max(control, key=lambda who: _value(control[who]))
                shown = [_interval(got[key]) for key in ("accuracy", "precision", "recall", "f1", "yes_ratio")]
                shown += [_named(best, control[best]), _counts(got["unreadable"])]
                rows.append([f"{name}, {language}, {way}", *shown])
    head = ["", "accuracy", "precision", "recall", "F1", "yes-ratio", "best control", "unreadable"]
    note = (
        "Half of the questions are to be answered with yes, so 0.50 is chance, and the yes-ratio should be 0.50. "
        "F1 counts twice the yes that are right over all that were said or should have been."
    )
    return Table(head, rows, "POPE", "numbers headline", note)


class Held(NamedTuple):
    """Of so many intervals of a control, how many hold what its answers are worth by accident; which lie elsewhere."""

    inside: int
    of: int
    above: list[str]  # better than by accident: something is known
    below: list[str]


def held(run: Mapping[str, Any], control: str) -> Held:
    """How far a control is at chance: descriptions, types of question and ways of POPE, in both stages and languages.

    What is counted in nothing, as the precision of answers that name no thing, has no interval and is passed over.
    """
    inside, above, below = 0, [], []
    for stage, name in STAGES.items():
        for lang, language in LANGUAGES.items():
            exam = run["exam"][stage][lang]
            figures = {
                "descriptions": _told(exam, control),
                "questions": exam["questions"][control],
                "pope": {way: exam["pope"][control][way]["accuracy"] for way in POPE_WAYS},
            }
            levels = exam["chance"][control]
            for group, key, level in ((g, key, level) for g in levels for key, level in levels[g].items()):
                figure = figures[group][key]
                if level is None or figure["value"] is None:
                    continue
                missed = above if figure["low"] > level else below if figure["high"] < level else None
                if missed is None:
                    inside += 1
                else:
                    missed.append(f"{group}: {key} ({name}, {language})")
    return Held(inside, inside + len(above) + len(below), above, below)


def _told(exam: Mapping[str, Any], who: str) -> dict[str, Estimate]:
    """The figures of descriptions that have a level by accident, in the order of the table."""
    told = exam["descriptions"][who]
    near = told["things"]["pair"]["near"]["any"]
    return {key: near[key] for key in ("precision", "recall")} | {k: told[k] for k in ("setting", "chair_i", "chair_s")}


def _chance(run: Mapping[str, Any]) -> str:
    found = {control: held(run, control) for control in CONTROLS}
    counts = ", ".join(f"{control} {one.inside} of {one.of}" for control, one in found.items())
    missed = [
        f"{control}, {side}: {'; '.join(names)}"
        for control, one in found.items()
        for side, names in (("above", one.above), ("below", one.below))
        if names
    ]
    return (
        "What the controls' answers are worth by accident lies within their 95% intervals (descriptions, every type of "
        f"question, every way of POPE, both stages and languages): {counts}. The cases share pictures, so they are not "
        "independent, and whoever always says the same meets this level by arithmetic. Intervals elsewhere: "
        f"{'. '.join(missed) or 'none'}."
    )


def _all_controls(run: Mapping[str, Any]) -> Fold:
    """Every question type, and every way to ask POPE's, as the model and each of its controls answered them."""
    tables = []
    for stage, name in STAGES.items():
        for lang, language in LANGUAGES.items():
            exam = run["exam"][stage][lang]
            answerers = (*EVERYONE, "guess")
            rows: list[list[Inline]] = [
                ["all types" if t == "all" else t, *(_asked(exam, "questions", who, t) for who in answerers)]
                for t in exam["questions"]["model"]
            ]
            tables.append(Table(["type", *answerers], rows, f"{name}, {language}: questions", "numbers"))
            rows = [
                [f"{way}: {key.replace('_', '-')}", *(_asked(exam, "pope", who, way, key) for who in EVERYONE)]
                for way in POPE_WAYS
                for key in ("accuracy", "yes_ratio")
            ]
            tables.append(Table(["way", *EVERYONE], rows, f"{name}, {language}: POPE", "numbers"))
    note = Paragraph("Small figures: 95% intervals and counts. What each control is, is said at the end of the page.")
    return Fold(
        "All controls: every type of question and every way of POPE, with intervals and counts", [note, *tables]
    )


def _asked(exam: Mapping[str, Any], group: str, who: str, name: str, key: str | None = None) -> Inline:
    """A figure of questions or of POPE; an accuracy with what it is worth by accident, where that is known."""
    figure = exam[group][who][name] if key is None else exam[group][who][name][key]
    known = who in CONTROLS and key in (None, "accuracy")
    return _interval(figure, accident=exam["chance"][who][group].get(name) if known else None)


def _holdout_table(run: Mapping[str, Any]) -> Table:
    rows = []
    for stage, name in STAGES.items():
        for lang, language in LANGUAGES.items():
            pair = {who: run["exam"][stage][lang][who] for who in ("holdout", "descriptions")}
            pair["descriptions"] = pair["descriptions"]["model"]
            row: list[Inline] = [f"{name}, {language}"]
            for told in pair.values():
                near = told["things"]["pair"]["near"]["any"]
                row += [_interval(near["precision"]), _interval(near["recall"])]
            rows.append(row)
    head = ["", "hold-out: precision", "recall", "the exam: precision", "recall"]
    note = (
        f"{run['sizes']['holdout']} pictures, each with a pair of kind and colour, or of kind and setting, that was in "
        "no picture of any training. Near things, kind with colour."
    )
    return Table(head, rows, "The compositional hold-out", "numbers", note)


def _breakdown(run: Mapping[str, Any], level: str) -> Table:
    rows = []
    for stage, name in STAGES.items():
        for lang, language in LANGUAGES.items():
            things = run["exam"][stage][lang]["descriptions"]["model"]["things"][level]
            for number in ("any", *NUMBERS):
                row: list[Inline] = [f"{name}, {language}, {number}"]
                for distance in ("near", "far", "all"):
                    score = things[distance][number]
                    row += [_interval(score["precision"]), _interval(score["recall"])]
                near = things["near"][number]
                rows.append([*row, _interval(near["precision_at_best"])])
    head = ["number of things", "near: precision", "recall", "far: precision", "recall", "all: precision", "recall"]
    caption = {"pair": "Kind with colour", "kind": "Kind alone"}[level]
    return Table([*head, "near: precision at best"], rows, caption, "numbers headline")


# ---- seeds, ledger, how it was made


def _seed_blocks(run: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]]) -> list[Block]:
    if not seeds:
        return []
    shown = headline(run)
    runs = [(f"seed {shipped['seed']}, shipped", shipped) for shipped in seeds]
    if shown not in seeds:
        runs.append((f"seed {shown['seed']}, this run", shown))
    rows = [_measured_row(f"{name}, {LANGUAGES[lang]}", one, lang) for lang in LANGUAGES for name, one in runs]
    worst = worst_of([one for _, one in runs])
    rows += [_measured_row(f"the worst, {LANGUAGES[lang]}", worst, lang) for lang in LANGUAGES]
    caption = "Kind with colour, near things, precision / recall; questions after stage 2"
    table = Table(headline_table(run).head, rows, caption, "numbers headline", f"{MEANINGS}.")
    return [Heading("More than one seed"), table, Paragraph(_worst_of_the_rest([one for _, one in runs]))]


def worst_of(headlines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The worst of several runs, figure by figure, in the form of a headline."""

    def lowest(figures: Iterable[Estimate]) -> Estimate:
        return min(figures, key=_value)

    near = {
        stage: {
            lang: {
                n: {key: lowest(h["near"][stage][lang][n][key] for h in headlines) for key in ("precision", "recall")}
                for n in NUMBERS
            }
            for lang in LANGUAGES
        }
        for stage in STAGES
    }
    return {"near": near, "questions": {lang: lowest(h["questions"][lang] for h in headlines) for lang in LANGUAGES}}


def _worst_of_the_rest(headlines: Sequence[Mapping[str, Any]]) -> str:
    settings = [h["setting"][stage][lang] for h in headlines for stage in STAGES for lang in LANGUAGES]
    invented = [h["chair_i"][stage][lang] for h in headlines for stage in STAGES for lang in LANGUAGES]
    setting, chair = min(settings, key=_value), max(invented, key=_value)
    return (
        f"Of all runs, stages and languages, the worst setting accuracy is {_ratio(setting)} ({_counts(setting)}; "
        f"wanted: {SETTING_AIM}), the worst CHAIR_i {_ratio(chair)} ({_counts(chair)})."
    )


def _ledger_table(run: Mapping[str, Any]) -> Table:
    rows: list[list[Inline]] = []
    for stage, name in STAGES.items():
        for part, parameters, trained in run["ledgers"][stage]:
            state = "trained" if trained else "frozen"
            rows.append([f"{name}: {part}", f"{parameters:,}", f"{trained:,}", f"{parameters - trained:,}", state])
    note = "After each stage the hashes of all that is frozen were unchanged; otherwise there would be no checkpoint."
    return Table(["", "parameters", "trained", "frozen", ""], rows, "Ledger", "numbers", note)


def _made_table(run: Mapping[str, Any]) -> Table:
    names = {
        "pictures": "drawing and encoding pictures",
        "pretrain": "stage 1",
        "sft": "stage 2",
        "exam": "the exam",
        "total": "all in all",
    }
    rows: list[list[Inline]] = [
        ["command", Span(run["command"], "code")],
        ["seed", str(run["seed"])],
        ["precision of training", run["precision"]],
        ["machine", f"{run['machine']['cores']} cores, {run['machine']['system']}"],
        ["peak memory", f"{run['peak_memory_gb']:.2f} GB" if run["peak_memory_gb"] else "not known on this system"],
        ["training pictures", f"{run['sizes']['pictures']:,}"],
        *([f"time: {names[key]}", f"{seconds:.0f} s"] for key, seconds in run["seconds"].items()),
        ["versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())],
        ["base models", Span(run["base"], "code")],
    ]
    return Table(["", ""], rows, "", "facts")


# ---- numbers as text


def _near(exam: Mapping[str, Any], number: str) -> dict[str, Estimate]:
    return exam["descriptions"]["model"]["things"]["pair"]["near"][number]


def _value(figure: Estimate) -> float:
    """For comparisons: nothing counted is nothing right."""
    return figure["value"] or 0.0


def _ratio(figure: Estimate, digits: int = 3) -> str:
    return "–" if figure["value"] is None else f"{figure['value']:.{digits}f}"


def _percent(figure: Estimate) -> str:
    return "–" if figure["value"] is None else f"{100 * figure['value']:.0f}%"


def _counts(figure: Estimate) -> str:
    return f"{figure['numerator']}/{figure['denominator']}"


def _interval(figure: Estimate, digits: int = 3, accident: float | None = None) -> Inline:
    if figure["value"] is None:
        return "–"
    places = min(digits, 2)
    small = f"{figure['low']:.{places}f}–{figure['high']:.{places}f} · {_counts(figure)}"
    level = [] if accident is None else [Span(f"by accident {accident:.{digits}f}", "small")]
    return Lines([Span(_ratio(figure, digits), "number"), Span(small, "small"), *level])


def _named(who: str, figure: Estimate) -> Inline:
    """The figure of one control among several, with its name and counts."""
    return Lines([Span(_ratio(figure), "number"), Span(f"{who} · {_counts(figure)}", "small")])


def _target(target: Any) -> str:
    if target is None or isinstance(target, str):
        return target or "–"
    return " / ".join(f"{value:.2f}" for value in (target if isinstance(target, tuple) else (target,)))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def table_as_text(run: Mapping[str, Any]) -> str:
    """The seven rows for a terminal."""
    lines = []
    for row in run["table"]:
        lines.append(f"\n{row['name']}: {'; '.join(_truth(Scene.from_dict(row['scene'])))}")
        for stage, name in STAGES.items():
            lines += [f"  {name:<13}{row['answers'][stage][lang]}" for lang in LANGUAGES]
    return "\n".join(lines)


def read_seeds(file: str | Path) -> list[dict[str, Any]]:
    """The shipped headlines, or none if there is no such file.

    Raises:
        ValueError: the file is no JSON.
    """
    file = Path(file)
    return json.loads(file.read_text("utf-8")) if file.is_file() else []
