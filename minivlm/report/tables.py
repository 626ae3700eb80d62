"""The tables of a report, and what is concluded from them: headline numbers, controls at chance, the worst of seeds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from minivlm.evaluation import CONTROLS, EVERYONE, POPE_WAYS, Estimate
from minivlm.report.answers import LANGUAGES, STAGES
from minivlm.scenes.facts import MAX_THINGS

NUMBERS = tuple(str(n) for n in range(1, MAX_THINGS + 1))
Run = Mapping[str, Any]  # what `pipeline.run` records


class Cell(NamedTuple):
    """A cell of a table: its text, and lines in small print below it."""

    text: str
    small: tuple[str, ...] = ()


class Table(NamedTuple):
    """A table; the first cell of each row is its heading."""

    caption: str
    head: list[Cell]
    rows: list[list[Cell]]
    note: str = ""
    style: str = "numbers"  # a class of the style sheet


def _table(caption: str, head: Sequence[str | Cell], rows: Iterable[Sequence[str | Cell]], *more: str) -> Table:
    """A table in which a text stands for a cell without small print."""
    cells = [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in (head, *rows)]
    return Table(caption, cells[0], cells[1:], *more)


# ---- estimates as text


def value(estimate: Estimate) -> float:
    """For comparisons: nothing counted is nothing right."""
    return estimate["value"] or 0.0


def ratio(estimate: Estimate, digits: int = 3) -> str:
    """The value, or a dash where nothing was counted."""
    return "–" if estimate["value"] is None else f"{estimate['value']:.{digits}f}"


def counts(estimate: Estimate) -> str:
    """Both sums."""
    return f"{estimate['numerator']}/{estimate['denominator']}"


def interval(estimate: Estimate, digits: int = 3, chance: float | None = None) -> Cell:
    """The value with its interval and counts, and its chance level where that is known."""
    if estimate["value"] is None:
        return Cell("–")
    places = min(digits, 2)
    small = f"{estimate['low']:.{places}f}–{estimate['high']:.{places}f} · {counts(estimate)}"
    level = () if chance is None else (f"chance level {chance:.{digits}f}",)
    return Cell(ratio(estimate, digits), (small, *level))


def _of_control(who: str, estimate: Estimate) -> Cell:
    return Cell(ratio(estimate), (f"{who} · {counts(estimate)}",))


def _exams(run: Run) -> list[tuple[str, Run]]:
    """A label and the exam of each stage and language."""
    return [
        (f"{name}, {language}", run["exam"][stage][lang])
        for (stage, name), (lang, language) in product(STAGES.items(), LANGUAGES.items())
    ]


# ---- the headline, and several seeds


def headline(run: Run) -> dict[str, Any]:
    """The numbers of a run that decide, small enough to ship: things, settings, CHAIR, questions."""

    def both(get: Callable[[Run], Any]) -> dict[str, dict[str, Any]]:
        return {stage: {lang: get(run["exam"][stage][lang]) for lang in LANGUAGES} for stage in STAGES}

    return {
        **{key: run[key] for key in ("seed", "command", "precision")},
        "minutes": round(run["seconds"]["total"] / 60, 2),
        "near": both(lambda exam: {number: near(exam, number) for number in NUMBERS}),
        "setting": both(lambda exam: exam["descriptions"]["model"]["setting"]),
        "chair_i": both(lambda exam: exam["descriptions"]["model"]["chair_i"]),
        "questions": {lang: run["exam"]["sft"][lang]["questions"]["model"]["all"] for lang in LANGUAGES},
    }


def near(exam: Run, number: str) -> dict[str, Estimate]:
    """Precision and recall of kind with colour over near things, by the number of things in the picture."""
    return exam["descriptions"]["model"]["things"]["pair"]["near"][number]


def headline_table(shown: Run) -> Table:
    """One run, by its `headline`."""
    rows = [_headline_row(name, shown, lang) for lang, name in LANGUAGES.items()]
    return _table("Kind with colour, near things: precision / recall", _headline_head(), rows, "", "numbers headline")


def _headline_head() -> list[str | Cell]:
    cells = [Cell(f"{n} {'thing' if n == '1' else 'things'}", (name,)) for name, n in product(STAGES.values(), NUMBERS)]
    return ["", *cells, Cell("questions", (STAGES["sft"],))]


def _headline_row(name: str, shown: Run, lang: str) -> list[str | Cell]:
    scores = [shown["near"][stage][lang][number] for stage, number in product(STAGES, NUMBERS)]
    groups = [(score["precision"], score["recall"]) for score in scores] + [(shown["questions"][lang],)]
    return [name, *(Cell(" / ".join(map(ratio, group)), (" · ".join(map(counts, group)),)) for group in groups)]


def seeds_table(run: Run, seeds: Sequence[Run]) -> tuple[Table, str]:
    """This run beside the shipped seeds' headlines, with the worst of all; and the worst of the rest in words."""
    shown = headline(run)
    runs = [(f"seed {one['seed']}, shipped", one) for one in seeds]
    if shown not in seeds:
        runs.append((f"seed {shown['seed']}, this run", shown))
    every = [one for _, one in runs]
    runs.append(("the worst", worst_of(every)))
    rows = [
        _headline_row(f"{name}, {language}", one, lang) for lang, language in LANGUAGES.items() for name, one in runs
    ]
    caption = "Kind with colour, near things, precision / recall; questions after stage 2"
    settings, invented = (
        [one[key][stage][lang] for one in every for stage in STAGES for lang in LANGUAGES]
        for key in ("setting", "chair_i")
    )
    setting, chair = min(settings, key=value), max(invented, key=value)
    return _table(caption, _headline_head(), rows, "", "numbers headline"), (
        f"Of all runs, stages and languages, the worst setting accuracy is {ratio(setting)} ({counts(setting)}), the "
        f"worst CHAIR_i {ratio(chair)} ({counts(chair)})."
    )


def worst_of(headlines: Sequence[Run]) -> dict[str, Any]:
    """The worst of several runs, number by number, in the form of a headline."""

    def lowest(nested: Sequence[Any]) -> Any:
        if "value" in nested[0]:
            return min(nested, key=value)
        return {
            key: lowest([one[key] for one in nested])
            for key in nested[0]
            if key not in ("precision_at_best", "pictures")
        }

    return {key: lowest([one[key] for one in headlines]) for key in ("near", "questions")}


# ---- controls


def described(exam: Run, who: str) -> dict[str, Estimate]:
    """The estimates of descriptions that have a chance level, in the order of the table."""
    scores = exam["descriptions"][who]
    things = scores["things"]["pair"]["near"]["any"]
    return {key: things[key] for key in ("precision", "recall")} | {
        key: scores[key] for key in ("setting", "chair_i", "chair_s")
    }


def controls_table(run: Run, stage: str) -> Table:
    """Descriptions of the model and its controls."""
    rows = []
    for (lang, name), who in product(LANGUAGES.items(), EVERYONE):
        exam = run["exam"][stage][lang]
        levels = exam["chance"][who]["descriptions"] if who == "another" else {}
        cells = [interval(found, chance=levels.get(key)) for key, found in described(exam, who).items()]
        label = f"{name}, {'the model' if who == 'model' else who}"
        rows.append([label, *cells, interval(exam["descriptions"][who]["length"], 1)])
    head = ["", "near things: precision", "recall", "setting", "CHAIR_i", "CHAIR_s", "length"]
    note = (
        "Length in words (English) or characters (Chinese) an answer; its counts are all of them over the answers. "
        "Small print: 95% intervals and counts."
    )
    return _table(f"{STAGES[stage]}: descriptions", head, rows, note)


def best_blind(exam: Run, type_: str) -> tuple[str, Estimate]:
    """Who answers a type of question best without any picture, and how well."""
    who = max(("guess", "blank", "alone"), key=lambda who: value(exam["questions"][who][type_]))
    return who, exam["questions"][who][type_]


def beats_blind(run: Run, stages: Iterable[str] = tuple(STAGES)) -> list[str]:
    """Types of questions that the model, shown another picture, answers better than the best blind, by its interval."""
    names = []
    for stage, (lang, language) in product(stages, LANGUAGES.items()):
        exam = run["exam"][stage][lang]
        for type_, another in exam["questions"]["another"].items():
            if another["low"] is not None and another["low"] > value(best_blind(exam, type_)[1]):
                names.append(f"{type_} ({language})")
    return names


class Held(NamedTuple):
    """Of so many intervals of a control, how many hold the chance level of its answers; which lie elsewhere."""

    inside: int
    of: int
    above: list[str]  # better than chance: something is known
    below: list[str]


def held(run: Run, control: str) -> Held:
    """How far a control is at chance: descriptions, types of question and ways of POPE, in both stages and languages.

    What is counted in nothing, as the precision of answers that name no thing, has no interval and is passed over.
    """
    inside, above, below = 0, [], []
    for label, exam in _exams(run):
        estimates = {
            "descriptions": described(exam, control),
            "questions": exam["questions"][control],
            "pope": {way: exam["pope"][control][way]["accuracy"] for way in POPE_WAYS},
        }
        levels = exam["chance"][control]
        for group, key, level in ((g, key, level) for g in levels for key, level in levels[g].items()):
            found = estimates[group][key]
            if level is None or found["value"] is None:
                continue
            if found["low"] <= level <= found["high"]:
                inside += 1
            else:
                (above if found["low"] > level else below).append(f"{group}: {key} ({label})")
    return Held(inside, inside + len(above) + len(below), above, below)


# ---- questions, POPE, hold-out, details


def questions_table(run: Run, stage: str) -> Table:
    """Accuracy by type of question, beside another picture and the best that can be said blind."""
    exams, columns = run["exam"][stage], ("model", "another", "best blind")
    rows = []
    for type_ in exams["en"]["questions"]["model"]:
        row: list[str | Cell] = ["all types" if type_ == "all" else type_]
        for exam in (exams[lang] for lang in LANGUAGES):
            level = exam["chance"]["another"]["questions"].get(type_)
            row += [
                interval(exam["questions"]["model"][type_]),
                interval(exam["questions"]["another"][type_], 3, level),
            ]
            row.append(_of_control(*best_blind(exam, type_)))
        rows.append(row)
    note = (
        "Best blind: the best of three that see nothing. With another picture the model should do no better; it does, "
        f"by its whole interval, in: {', '.join(beats_blind(run, [stage])) or 'no type of question'}."
    )
    head = ["type", *(f"{name}: {who}" for name in LANGUAGES.values() for who in columns)]
    return _table(f"{STAGES[stage]}: questions answered exactly", head, rows, note)


def pope_table(run: Run) -> Table:
    """POPE of both stages, languages and all ways."""
    rows = []
    for (label, exam), way in product(_exams(run), POPE_WAYS):
        scores, control = exam["pope"]["model"][way], {who: exam["pope"][who][way]["accuracy"] for who in CONTROLS}
        best = max(control, key=lambda who: value(control[who]))
        cells = [interval(scores[key]) for key in ("accuracy", "precision", "recall", "f1", "yes_ratio")]
        rows.append([f"{label}, {way}", *cells, _of_control(best, control[best]), counts(scores["unreadable"])])
    head = ["", "accuracy", "precision", "recall", "F1", "yes-ratio", "best control", "unreadable"]
    note = (
        "Half of the questions are to be answered with yes, so 0.50 is chance, and the yes-ratio should be 0.50. "
        "F1 counts twice the yes that are right over all that were said or should have been."
    )
    return _table("POPE", head, rows, note, "numbers headline")


def every_control(run: Run) -> list[Table]:
    """Every type of question and every way of POPE, as the model and each of its controls answered them."""

    def cell(exam: Run, group: str, who: str, name: str, key: str | None = None) -> Cell:
        found = exam[group][who][name] if key is None else exam[group][who][name][key]
        known = who in CONTROLS and key in (None, "accuracy")
        return interval(found, chance=exam["chance"][who][group].get(name) if known else None)

    tables = []
    for label, exam in _exams(run):
        rows = [
            ["all types" if type_ == "all" else type_]
            + [cell(exam, "questions", who, type_) for who in (*EVERYONE, "guess")]
            for type_ in exam["questions"]["model"]
        ]
        tables.append(_table(f"{label}: questions", ["type", *EVERYONE, "guess"], rows))
        rows = [
            [f"{way}: {key.replace('_', '-')}", *(cell(exam, "pope", who, way, key) for who in EVERYONE)]
            for way, key in product(POPE_WAYS, ("accuracy", "yes_ratio"))
        ]
        tables.append(_table(f"{label}: POPE", ["way", *EVERYONE], rows))
    return tables


def holdout_table(run: Run) -> Table:
    """The compositional hold-out beside the exam."""
    rows = []
    for label, exam in _exams(run):
        pair = [scores["things"]["pair"]["near"]["any"] for scores in (exam["holdout"], exam["descriptions"]["model"])]
        rows.append([label, *(interval(things[key]) for things in pair for key in ("precision", "recall"))])
    head = ["", "hold-out: precision", "recall", "the exam: precision", "recall"]
    note = (
        f"{run['sizes']['holdout']} pictures, each with a pair of kind and colour, or of kind and setting, that was in "
        "no picture of any training. Near things, kind with colour."
    )
    return _table("The compositional hold-out", head, rows, note)


def breakdown(run: Run, level: str) -> Table:
    """Precision and recall by distance and number of things, with kind and colour ("pair") or by "kind" alone."""
    rows = []
    for (label, exam), number in product(_exams(run), ("any", *NUMBERS)):
        things = exam["descriptions"]["model"]["things"][level]
        cells = [
            interval(things[distance][number][key])
            for distance in ("near", "far", "all")
            for key in ("precision", "recall")
        ]
        rows.append([f"{label}, {number}", *cells, interval(things["near"][number]["precision_at_best"])])
    head = ["number of things", "near: precision", "recall", "far: precision", "recall", "all: precision", "recall"]
    caption = {"pair": "Kind with colour", "kind": "Kind alone"}[level]
    return _table(caption, [*head, "near: precision at best"], rows, "", "numbers headline")


def ledger_table(run: Run) -> Table:
    """What each stage trained."""
    rows = [
        [f"{name}: {part}", f"{size:,}", f"{trained:,}", f"{size - trained:,}", "trained" if trained else "frozen"]
        for stage, name in STAGES.items()
        for part, size, trained in run["ledgers"][stage]
    ]
    note = "After each stage the hashes of all that is frozen were unchanged; otherwise there would be no checkpoint."
    return _table("Ledger", ["", "parameters", "trained", "frozen", ""], rows, note)
