"""The tables of a report, and what is concluded from them: headline numbers, controls at chance, the worst of seeds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from minivlm.evaluation import CONTROLS, EVERYONE, POPE_SAMPLINGS, Estimate
from minivlm.report.answers import COLUMNS, LANGS
from minivlm.scenes.facts import MAX_THINGS

NUMBERS = tuple(str(n) for n in range(1, MAX_THINGS + 1))
BLIND = ("guess", "blank", "alone")  # those who answer without any picture
NAMES = {"all": "all types"}  # of types of question, where a table calls them otherwise
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


def make_table(caption: str, head: Sequence[str | Cell], rows: Iterable[Sequence[str | Cell]], *more: str) -> Table:
    """A table in which a text stands for a cell without small print."""
    head, *rows = [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in (head, *rows)]
    return Table(caption, head, rows, *more)


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


def intervals(scores: Mapping[str, Estimate], names: Sequence[str] = ("precision", "recall")) -> list[Cell]:
    """Several estimates, by name."""
    return [interval(scores[name]) for name in names]


def best(estimates: Mapping[str, Estimate]) -> Cell:
    """The best of several estimates, with its name and counts."""
    name = max(estimates, key=lambda name: value(estimates[name]))
    return Cell(ratio(estimates[name]), (f"{name} · {counts(estimates[name])}",))


def _exams(run: Run) -> list[tuple[str, Run]]:
    """A label and the exam of each stage and language."""
    return [
        (f"{name}, {language}", run["exam"][stage][lang])
        for (stage, name), (lang, language) in product(COLUMNS.items(), LANGS.items())
    ]


def with_chance(exam: Run, who: str, group: str, name: str) -> Cell:
    """The accuracy of a type of question or a sampling of POPE, beside the chance level of a control's answers."""
    scored = exam[group][who][name]
    levels = exam["chance"].get(who, {group: {}})[group]
    return interval(scored["accuracy"] if group == "pope" else scored, chance=levels.get(name))


# ---- the headline, and several seeds


def headline(run: Run) -> dict[str, Any]:
    """The numbers of a run that decide, small enough to ship: things, settings, CHAIR, questions."""

    def both(get: Callable[[Run], Any]) -> dict[str, dict[str, Any]]:
        exams = run["exam"]
        return {stage: {lang: get(exams[stage][lang]["descriptions"]["model"]) for lang in LANGS} for stage in COLUMNS}

    return {
        **{key: run[key] for key in ("seed", "command", "precision")},
        "minutes": round(run["seconds"]["total"] / 60, 2),
        "near": both(lambda scores: {number: near(scores)[number] for number in NUMBERS}),
        "setting": both(lambda scores: scores["setting"]),
        "chair_i": both(lambda scores: scores["chair_i"]),
        "questions": {lang: run["exam"]["sft"][lang]["questions"]["model"]["all"] for lang in LANGS},
    }


def near(scores: Run) -> Run:
    """What descriptions score for kind with colour over near things, by the number of things in the picture."""
    return scores["things"]["pair"]["near"]


def headline_table(shown: Mapping[str, Run], caption: str = "near things: precision / recall") -> Table:
    """Headlines by name, each in both languages."""
    things = [
        Cell(f"{n} {'thing' if n == '1' else 'things'}", (name,)) for name, n in product(COLUMNS.values(), NUMBERS)
    ]
    rows = []
    for (lang, language), (name, one) in product(LANGS.items(), shown.items()):
        scores = [one["near"][stage][lang][number] for stage, number in product(COLUMNS, NUMBERS)]
        groups = [(score["precision"], score["recall"]) for score in scores] + [(one["questions"][lang],)]
        cells = [Cell(" / ".join(map(ratio, group)), (" · ".join(map(counts, group)),)) for group in groups]
        rows.append([f"{name}, {language}" if name else language, *cells])
    head = ["", *things, Cell("questions", (COLUMNS["sft"],))]
    return make_table(f"Kind with colour, {caption}", head, rows, "", "numbers headline")


def seeds_table(run: Run, seeds: Sequence[Run]) -> tuple[Table, str]:
    """This run beside the shipped seeds' headlines, with the worst of all; and the worst of the rest in words."""
    shown = {f"seed {one['seed']}, shipped": one for one in seeds}
    if (this := headline(run)) not in seeds:
        shown[f"seed {this['seed']}, this run"] = this
    runs = list(shown.values())
    setting, chair = (
        worst((one[key][stage][lang] for one, stage, lang in product(runs, COLUMNS, LANGS)), key=value)
        for key, worst in (("setting", min), ("chair_i", max))
    )
    caption = "near things, precision / recall; questions after stage 2"
    return headline_table(shown | {"the worst": worst_of(runs)}, caption), (
        f"Of all runs, stages and languages, the worst setting accuracy is {ratio(setting)} ({counts(setting)}), the "
        f"worst CHAIR_i {ratio(chair)} ({counts(chair)})."
    )


def worst_of(headlines: Sequence[Run]) -> dict[str, Any]:
    """The worst of several runs, number by number, in the form of a headline."""

    def lowest(nested: Sequence[Run]) -> Run:
        if "value" in nested[0]:
            return min(nested, key=value)
        return {key: lowest([one[key] for one in nested]) for key in nested[0] if key != "pictures"}

    return {key: lowest([one[key] for one in headlines]) for key in ("near", "questions")}


# ---- controls


def described(exam: Run, who: str) -> dict[str, Estimate]:
    """The estimates of descriptions that have a chance level, in the order of the table."""
    scores = exam["descriptions"][who]
    scores = scores | {key: near(scores)["any"][key] for key in ("precision", "recall")}
    return {key: scores[key] for key in ("precision", "recall", "setting", "chair_i", "chair_s")}


def controls_table(run: Run, stage: str) -> Table:
    """Descriptions of the model and its controls."""
    rows = []
    for (lang, name), who in product(LANGS.items(), EVERYONE):
        exam = run["exam"][stage][lang]
        levels = exam["chance"][who]["descriptions"] if who == "another" else {}
        cells = [interval(scored, chance=levels.get(key)) for key, scored in described(exam, who).items()]
        label = f"{name}, {'the model' if who == 'model' else who}"
        rows.append([label, *cells, interval(exam["descriptions"][who]["length"], 1)])
    head = ["", "near things: precision", "recall", "setting", "CHAIR_i", "CHAIR_s", "length"]
    note = (
        "Length in words (English) or characters (Chinese) an answer; its counts are all of them over the answers. "
        "Small print: 95% intervals and counts."
    )
    return make_table(f"{COLUMNS[stage]}: descriptions", head, rows, note)


def beats_blind(run: Run, stages: Iterable[str] = tuple(COLUMNS)) -> list[str]:
    """Types of questions that the model, shown another picture, answers better than the best blind, by its interval."""
    names = []
    for stage, (lang, language) in product(stages, LANGS.items()):
        by_who = run["exam"][stage][lang]["questions"]
        for type_, another in by_who["another"].items():
            if (another["low"] or 0.0) > max(value(by_who[who][type_]) for who in BLIND):
                names.append(f"{type_} ({language})")
    return names


class Held(NamedTuple):
    """Of so many intervals of a control, how many hold the chance level of its answers; which lie elsewhere."""

    inside: int
    of: int
    above: list[str]  # better than chance: something is known
    below: list[str]


def held(run: Run, control: str) -> Held:
    """How far a control is at chance, in everything with a chance level; what is counted in nothing is passed over."""
    cases: dict[str, list[str]] = {"inside": [], "above": [], "below": []}
    for label, exam in _exams(run):
        estimates = {
            "descriptions": described(exam, control),
            "questions": exam["questions"][control],
            "pope": {sampling: exam["pope"][control][sampling]["accuracy"] for sampling in POPE_SAMPLINGS},
        }
        levels = exam["chance"][control]
        for group, key, level in ((g, key, level) for g in levels for key, level in levels[g].items()):
            low, high = estimates[group][key]["low"], estimates[group][key]["high"]
            if level is not None and low is not None:
                side = "above" if low > level else "below" if high < level else "inside"
                cases[side].append(f"{group}: {key} ({label})")
    return Held(len(cases["inside"]), sum(map(len, cases.values())), cases["above"], cases["below"])


# ---- questions, POPE, hold-out, details


def questions_table(run: Run, stage: str) -> Table:
    """Accuracy by type of question, beside another picture and the best that can be said blind."""
    exams = [run["exam"][stage][lang] for lang in LANGS]
    rows = []
    for type_ in exams[0]["questions"]["model"]:
        row: list[str | Cell] = [NAMES.get(type_, type_)]
        for exam in exams:
            row += [with_chance(exam, who, "questions", type_) for who in ("model", "another")]
            row.append(best({who: exam["questions"][who][type_] for who in BLIND}))
        rows.append(row)
    note = (
        "Best blind: the best of three that see nothing. With another picture the model should do no better; it does, "
        f"by its whole interval, in: {', '.join(beats_blind(run, [stage])) or 'no type of question'}."
    )
    head = [
        "type",
        *(f"{name}: {who}" for name in LANGS.values() for who in ("model", "another", "best blind")),
    ]
    return make_table(f"{COLUMNS[stage]}: questions answered exactly", head, rows, note)


def pope_table(run: Run) -> Table:
    """POPE of both stages, languages and all samplings."""
    rows = []
    for (label, exam), sampling in product(_exams(run), POPE_SAMPLINGS):
        scores = exam["pope"]["model"][sampling]
        cells = intervals(scores, ("accuracy", "precision", "recall", "f1", "yes_ratio"))
        best_control = best({who: exam["pope"][who][sampling]["accuracy"] for who in CONTROLS})
        rows.append([f"{label}, {sampling}", *cells, best_control, counts(scores["unreadable"])])
    head = ["", "accuracy", "precision", "recall", "F1", "yes-ratio", "best control", "unreadable"]
    note = (
        "Half of the questions are to be answered with yes, so 0.50 is chance, and the yes-ratio should be 0.50. "
        "F1 counts twice the yes that are right over all that were said or should have been."
    )
    return make_table("POPE", head, rows, note, "numbers headline")


def every_control(run: Run) -> list[Table]:
    """Every type of question and every sampling of POPE, as the model and each of its controls answered them."""
    tables, everyone = [], (*EVERYONE, "guess")
    for label, exam in _exams(run):
        rows = [
            [NAMES.get(type_, type_), *(with_chance(exam, who, "questions", type_) for who in everyone)]
            for type_ in exam["questions"]["model"]
        ]
        tables.append(make_table(f"{label}: questions", ["type", *everyone], rows))
        rows = []
        for sampling in POPE_SAMPLINGS:
            rows.append([f"{sampling}: accuracy", *(with_chance(exam, who, "pope", sampling) for who in EVERYONE)])
            rows.append(
                [f"{sampling}: yes-ratio", *(interval(exam["pope"][who][sampling]["yes_ratio"]) for who in EVERYONE)]
            )
        tables.append(make_table(f"{label}: POPE", ["sampling", *EVERYONE], rows))
    return tables


def holdout_table(run: Run) -> Table:
    """The compositional hold-out beside the exam."""
    rows = [
        [label, *intervals(near(exam["holdout"])["any"]), *intervals(near(exam["descriptions"]["model"])["any"])]
        for label, exam in _exams(run)
    ]
    head = ["", "hold-out: precision", "recall", "the exam: precision", "recall"]
    note = (
        f"{run['sizes']['holdout']} pictures, each with a pair of kind and colour, or of kind and setting, that was in "
        "no picture of any training. Near things, kind with colour."
    )
    return make_table("The compositional hold-out", head, rows, note)


def breakdown(run: Run, level: str) -> Table:
    """Precision and recall by distance and number of things, with kind and colour ("pair") or by "kind" alone."""
    rows = []
    for (label, exam), number in product(_exams(run), ("any", *NUMBERS)):
        close, far, every = (exam["descriptions"]["model"]["things"][level][d][number] for d in ("near", "far", "all"))
        cells = [*intervals(close), *intervals(far), *intervals(every), interval(close["precision_at_best"])]
        rows.append([f"{label}, {number}", *cells])
    head = ["number of things", "near: precision", "recall", "far: precision", "recall", "all: precision", "recall"]
    caption = {"pair": "Kind with colour", "kind": "Kind alone"}[level]
    return make_table(caption, [*head, "near: precision at best"], rows, "", "numbers headline")


def ledger_table(run: Run) -> Table:
    """What each stage trained."""
    rows = [
        [f"{name}: {part}", f"{size:,}", f"{trained:,}", f"{size - trained:,}", "trained" if trained else "frozen"]
        for stage, name in COLUMNS.items()
        for part, size, trained in run["ledgers"][stage]
    ]
    note = "After each stage the hashes of all that is frozen were unchanged; otherwise there would be no checkpoint."
    return make_table("Ledger", ["", "parameters", "trained", "frozen", ""], rows, note)
