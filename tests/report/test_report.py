"""The page: made from a small run written by hand, read again by a parser, as HTML and as Markdown."""

import base64
import copy
import html
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from minivlm.evaluation import CONTROLLED, CONTROLS, EVERYONE, POPE_WAYS
from minivlm.evaluation.metrics import COUNTS, DISTANCES, LEVELS
from minivlm.report import build as report
from minivlm.report.page import Figure, Fold, Heading, Lines, Paragraph, Span, Table, Tiles, html_page, markdown_page
from minivlm.report.page import Image as Picture
from minivlm.runtime.paths import data_folder
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.drawing.table import TABLE
from minivlm.scenes.facts import Scene, Thing
from minivlm.scenes.vocabulary import QUESTION_TYPES

EVIL = """<script>alert(1)</script>&"' | <img src=x onerror=alert(2)> <!-- [a](b) `c` *d* _e_ ~~f~~ # \\ &lt;"""
STAGES, LANGUAGES = ("pretrain", "sft"), ("en", "zh")

# ---- a run, by hand


def figure(count: int, of: int) -> dict:
    if not of:
        return {"value": None, "low": None, "high": None, "numerator": 0, "denominator": 0}
    value = count / of
    return {
        "value": round(value, 5),
        "low": round(value * 0.9, 5),
        "high": round(value, 5) / 2 + 0.5,
        "numerator": count,
        "denominator": of,
    }


class Counted:
    """Figures that all differ: 101/202, 102/203, ..."""

    def __init__(self, start: int):
        self.at = start

    def __call__(self) -> dict:
        self.at += 1
        return figure(self.at, self.at + 101)


def told(next_: Counted, fully: bool = True) -> dict:
    def score() -> dict:
        return {"precision": next_(), "precision_at_best": next_(), "recall": next_(), "pictures": 9}

    counts = COUNTS if fully else COUNTS[:1]
    things = {level: {d: {n: score() for n in counts} for d in DISTANCES} for level in LEVELS}
    return {"things": things} | {key: next_() for key in ("setting", "chair_i", "chair_s", "length")}


def examined(start: int) -> dict:
    """What `evaluate` gives for one stage and language."""
    next_ = Counted(start)
    ways = ("accuracy", "precision", "recall", "f1", "yes_ratio", "unreadable")
    return {
        "descriptions": {who: told(next_, who == "model") for who in EVERYONE},
        "holdout": told(next_),
        "questions": {who: {t: next_() for t in ("all", *QUESTION_TYPES)} for who in (*EVERYONE, "guess")},
        "guesses": dict.fromkeys(QUESTION_TYPES, "Two."),
        "pope": {who: {way: {key: next_() for key in ways} for way in POPE_WAYS} for who in EVERYONE},
        "chance": {who: {group: dict(levels) for group, levels in ACCIDENT.items()} for who in CONTROLS},
    }


ACCIDENT = {
    "descriptions": {"precision": 0.011, "recall": 0.012, "setting": 0.113, "chair_i": 0.814, "chair_s": 0.915},
    "questions": {type_: 0.201 + i / 1000 for i, type_ in enumerate(QUESTION_TYPES)},
    "pope": {way: 0.501 + i / 1000 for i, way in enumerate(POPE_WAYS)},
}


def make_run(seed: int = 7) -> dict:
    """All that `run.py` records."""
    answers = {"en": "A red car in a park.", "zh": "公园里有一辆红色的汽车。"}
    return {
        "exam": {
            stage: {lang: examined(1000 * (2 * s + k) + 10 * seed) for k, lang in enumerate(LANGUAGES)}
            for s, stage in enumerate(STAGES)
        },
        "ledgers": {
            "pretrain": [["vision", 5_000_017, 0], ["W", 49_152, 49_152], ["language model", 8_000_003, 0]],
            "sft": [["vision", 5_000_017, 0], ["W", 49_152, 49_152], ["language model", 8_000_003, 8_000_003]],
        },
        "losses": {"pretrain": [8.5, 4.0, 2.25, 1.5], "sft": [3.5, 2.0, 1.25]},
        "table": [
            {"name": name, "scene": scene.to_dict(), "answers": {stage: dict(answers) for stage in STAGES}}
            for name, scene in TABLE.items()
        ],
        "seed": seed,
        "command": f"minivlm run --seed {seed}",
        "precision": "bf16",
        "sizes": {"pictures": 5000, "exam": 500, "holdout": 200, "questioned": 200},
        "seconds": {"pictures": 61.0, "pretrain": 122.0, "sft": 183.0, "exam": 30.0, "total": 396.0},
        "peak_memory_gb": 2.25,
        "machine": {"cores": 2, "system": "Linux x86_64"},
        "versions": {"torch": "2.9.1", "minivlm": "0.1.0"},
        "base": "vision 0123456789ab, language_model ba9876543210",
        "ln_vocabulary": 8.318,
    }


# ---- reading pages


class Page(HTMLParser):
    """A page as a reader gets it: its tags, its tables as cells of lines, its text."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.tables, self.text, self.images = [], [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == [], "tags that nobody closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        self._break(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self._break(tag)

    def _break(self, tag):
        if tag not in ("span", "strong", "mark"):
            self.handle_data("\n")

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            data = data.replace("\u2060", " ")  # joins the sign of an error to its word
            self.text += data
            if {"th", "td"} & set(self.open):
                self.tables[-1][-1][-1] += data

    def cells(self) -> list[list[list[str]]]:
        return [[[tidy(cell) for cell in row] for row in table] for table in self.tables]


def tidy(text: str) -> str:
    return " ".join(text.split())


def shown(markdown: str) -> str:
    """What a reader sees of Markdown: images, markup and escapes removed."""
    text = re.sub(r"!\[.*?\]\(.*?\)", "", markdown)
    text = re.sub(r"<br>|</?sub>|(?<!\\)\*\*|(?<!\\)~~|(?<!\\)\*", " ", text)
    return tidy(re.sub(r"\\([\\`*_\[\]~#])", r"\1", html.unescape(text)))


def bare(text: str) -> str:
    """Without any white space."""
    return "".join(text.split())


def markdown_tables(text: str) -> list[list[list[str]]]:
    tables, before = [], ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                tables.append([])
            if "-" not in line or not set(line) <= set("| -"):
                tables[-1].append([shown(cell) for cell in line.strip().strip("|").split("|")])
        before = line
    return tables


@pytest.fixture(scope="module")
def run() -> dict:
    return make_run()


@pytest.fixture(scope="module")
def seeds() -> list[dict]:
    return [report.headline(make_run(seed)) for seed in (0, 1, 2)]


@pytest.fixture(scope="module")
def folder(run, seeds, tmp_path_factory):
    """A report as it lies on the disk. The run has been through JSON, as a real one has."""
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    assert report.write_report(out, json.loads(json.dumps(run)), seeds) == out / "index.html"
    return out


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "index.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def markdown(folder) -> str:
    return (folder / "report.md").read_text("utf-8")


def table_of(page: Page, head: str) -> list[list[str]]:
    """The one table with this among its column titles or row titles."""
    (found,) = (t for t in page.cells() if head in t[0] or head in [row[0] for row in t])
    return found


def two(figure_: dict, digits: int = 3) -> str:
    """A figure with its interval and counts, as the page's tables write it."""
    places = min(digits, 2)
    interval = f"{figure_['low']:.{places}f}–{figure_['high']:.{places}f}"
    return f"{figure_['value']:.{digits}f} {interval} · {figure_['numerator']}/{figure_['denominator']}"


# ---- what the page shows


def test_the_table_has_seven_rows_of_picture_and_both_columns(page, run):
    head, *rows = table_of(page, "picture")
    assert head == ["picture", "Pretrain_vlm", "SFT_vlm"]
    assert len(rows) == 7
    for row in rows:
        assert len(row) == 3
        assert all("A red car" in column and "一辆红色的汽车" in column for column in row[1:])
    assert "a red car; a yellow car a city street at night" in rows[list(TABLE).index("traffic")][0]
    assert rows[0][0] == "a red kite; a white boat, far away a beach at sunset"


def test_the_pages_pictures_are_the_drawn_scenes_and_the_curves(page):
    assert len(page.images) == 8
    for scene, image in zip(TABLE.values(), page.images, strict=False):
        assert opened(image).tobytes() == draw(scene).tobytes()
    width, height = opened(page.images[7]).size
    assert width > 2 * height  # two curves side by side


def opened(image: dict) -> Image.Image:
    kind, _, data = image["src"].partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_every_picture_says_in_words_what_it_shows(page):
    alternatives = [image.get("alt") for image in page.images]
    assert len(set(alternatives)) == 8 and all(alternatives)
    assert alternatives[list(TABLE).index("panda")] == "a big panda; a pink flower; a wide grassland"
    assert "from 8.50 to 1.50 in 4 steps" in alternatives[7] and "from 3.50 to 1.25 in 3 steps" in alternatives[7]


def test_the_page_needs_nothing_but_itself(folder, page):
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base", "a", "form"} == set()
    for _, attributes in page.tags:
        assert not {"href", "srcset", "style", "action", "data"} & set(attributes)
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    text = (folder / "index.html").read_text("utf-8")
    assert not re.search(r"https?://|//\w|url\(|@import", re.sub(r'src="data:[^"]*"', "", text))
    (policy,) = (a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "img-src data:" in policy


def test_the_loss_curves_are_drawn_one_beside_the_other(run, page):
    """Stage 1 in its colour on the left, stage 2 in its own on the right; other losses, another picture."""
    pixels = np.asarray(opened(page.images[7]).convert("RGB"), dtype=int)
    blue, orange = ((np.abs(pixels - colour).max(axis=-1) < 20) for colour in ((0, 107, 164), (255, 128, 14)))
    half = pixels.shape[1] // 2
    assert blue[:, :half].sum() > 200 and blue[:, half:].sum() == 0
    assert orange[:, half:].sum() > 200 and orange[:, :half].sum() == 0
    assert "ln V = 8.32" in page.text
    other = report.loss_curves(run | {"losses": {"pretrain": [8.5, 8.5, 8.5, 8.5], "sft": run["losses"]["sft"]}})
    drawn = np.asarray(Image.open(io.BytesIO(other.image.png)).convert("RGB"), dtype=int)
    assert (drawn[:, :half] != pixels[:, :half]).any() and "from 8.50 to 8.50" in other.summary


def test_smoothed_by_hand():
    assert report.smoothed([1, 2, 3, 4, 5], share=0.8) == [2, 2.5, 3, 3.5, 4]  # two neighbours on each side
    assert report.smoothed([3.0, 1.0]) == [3.0, 1.0]
    hundred = report.smoothed(range(100))  # 3% of the steps around each
    assert hundred[50] == 50 and hundred[0] == sum(range(3)) / 3 and hundred[99] == sum(range(97, 100)) / 3


def test_the_headline_shows_values_and_counts_beside_aim_floor_and_experiment(page, run):
    head, english, chinese, *targets = next(t for t in page.cells() if t[-1][0] == "the experiment")
    numbers = ("1 thing", "2 things", "3 things", "4 things")
    assert head[1:] == [*(f"{name} {n}" for name in ("Pretrain_vlm", "SFT_vlm") for n in numbers), "SFT_vlm questions"]
    for lang, row in zip(LANGUAGES, (english, chinese), strict=True):
        cells = iter(row[1:])
        for stage in STAGES:
            near = run["exam"][stage][lang]["descriptions"]["model"]["things"]["pair"]["near"]
            for n in "1234":
                p, r = near[n]["precision"], near[n]["recall"]
                numbers = f"{p['value']:.3f} / {r['value']:.3f}"
                assert re.sub(" [●◐○]", "", next(cells)) == (
                    f"{numbers} {p['numerator']}/{p['denominator']} · {r['numerator']}/{r['denominator']}"
                )
        assert f"{run['exam']['sft'][lang]['questions']['model']['all']['value']:.3f}" in next(cells)
    assert [" | ".join(row) for row in targets] == [  # as they were promised
        "aim | 0.99 / 0.99 | 0.95 / 0.93 | 0.90 / 0.85 | 0.80 / 0.75"
        " | 0.99 / 0.99 | 0.97 / 0.96 | 0.93 / 0.90 | 0.88 / 0.85 | 0.92",
        "floor | 0.95 / 0.93 | 0.82 / 0.80 | 0.60 / 0.55 | – | 0.97 / 0.95 | 0.88 / 0.87 | 0.70 / 0.68 | – | 0.75",
        "the experiment | 0.99 / 0.99 | 0.87 / 0.87 | 0.66 / 0.60 | –"
        " | 1.00 / 1.00 | 0.93 / 0.95 | 0.76 / 0.74 | – | 0.78–0.83",
    ]


@pytest.mark.parametrize(
    ("cell", "figures", "expected"),
    [
        (("pretrain", "1"), (figure(99, 100), figure(99, 100)), "aim"),  # reached exactly
        (("pretrain", "1"), (figure(100, 100), figure(989, 1000)), "floor"),  # one of both is not enough
        (("pretrain", "1"), (figure(95, 100), figure(93, 100)), "floor"),
        (("pretrain", "1"), (figure(9499, 10000), figure(100, 100)), "below"),  # though 0.950 is written
        (("pretrain", "4"), (figure(10, 100), figure(10, 100)), "reported"),  # no floor is set
        (("pretrain", "4"), (figure(80, 100), figure(75, 100)), "aim"),
        (("sft", "3"), (figure(70, 100), figure(67, 100)), "below"),
        (("sft", "1"), (figure(0, 0), figure(0, 0)), "below"),  # nothing counted is nothing right
        (("sft", "questions"), (figure(92, 100),), "aim"),
        (("sft", "questions"), (figure(75, 100),), "floor"),
        (("sft", "questions"), (figure(74, 100),), "below"),
    ],
)
def test_verdicts_by_hand(cell, figures, expected):
    assert report.verdict(cell, *figures) == expected


def test_a_verdict_has_a_sign_on_the_page(run):
    run = copy.deepcopy(run)
    near = run["exam"]["pretrain"]["en"]["descriptions"]["model"]["things"]["pair"]["near"]
    for n, (precision, recall) in zip("1234", ((100, 99), (94, 92), (59, 90), (70, 70)), strict=True):
        near[n] |= {"precision": figure(precision, 100), "recall": figure(recall, 100)}
    _, row, *_ = Page(report.headline_table(run).html()).cells()[0]
    assert row[1:5] == [
        "1.000 / 0.990 ● 100/100 · 99/100",
        "0.940 / 0.920 ◐ 94/100 · 92/100",
        "0.590 / 0.900 ○ 59/100 · 90/100",
        "0.700 / 0.700 70/100 · 70/100",
    ]


def test_the_controls_stand_beside_the_model(page, run):
    tables = [t for t in page.cells() if "CHAIR_i" in t[0]]
    assert len(tables) == 2
    for stage, (_, *rows) in zip(STAGES, tables, strict=True):
        expected = []
        for lang, name in zip(LANGUAGES, ("English", "Chinese"), strict=True):
            for who in ("model", "blank", "another", "alone"):
                d = run["exam"][stage][lang]["descriptions"][who]
                near = d["things"]["pair"]["near"]["any"]
                figures = [near["precision"], near["recall"], d["setting"], d["chair_i"], d["chair_s"]]
                label = f"{name}, {'the model' if who == 'model' else who}"
                levels = [
                    f" by accident {x:.3f}" if who == "another" else "" for x in ACCIDENT["descriptions"].values()
                ]
                cells = [two(figure) + level for figure, level in zip(figures, levels, strict=True)]
                expected.append([label, *cells, two(d["length"], digits=1)])
        assert rows == expected


def test_near_and_far_are_broken_down_by_the_number_of_things_with_counts(page, run):
    tables = [t for t in page.cells() if t[0][0] == "number of things"]
    for level, (_, *rows) in zip(("pair", "kind"), tables, strict=True):
        expected = []
        for stage, name in zip(STAGES, ("Pretrain_vlm", "SFT_vlm"), strict=True):
            for lang, language in zip(LANGUAGES, ("English", "Chinese"), strict=True):
                things = run["exam"][stage][lang]["descriptions"]["model"]["things"][level]
                for n in ("any", "1", "2", "3", "4"):
                    figures = [things[d][n][key] for d in ("near", "far", "all") for key in ("precision", "recall")]
                    figures.append(things["near"][n]["precision_at_best"])
                    expected.append([f"{name}, {language}, {n}", *map(two, figures)])
        assert rows == expected


@pytest.mark.parametrize(("another", "told_apart"), [(99, True), (60, False)])
def test_questions_stand_beside_another_picture_and_the_best_of_three_blind(run, another, told_apart):
    """Another picture is no blind guess, however good; where it beats chance by its interval, the page says so."""
    run = copy.deepcopy(run)
    for lang in LANGUAGES:
        run["exam"]["sft"][lang]["questions"]["another"] |= {t: figure(0, 100) for t in ("all", *QUESTION_TYPES)}
    by_who = run["exam"]["sft"]["en"]["questions"]
    for who, count in {"model": 90, "guess": 40, "blank": 55, "alone": 54, "another": another}.items():
        by_who[who]["colour"] = figure(count, 100)
    page = Page(report._questions_table(run, "sft").html())
    head, *rows = page.cells()[0]
    assert [row[0] for row in rows] == ["all types", *QUESTION_TYPES]
    row = dict(zip(head, rows[1 + QUESTION_TYPES.index("colour")], strict=True))
    assert row["English: model"] == two(figure(90, 100))
    level = ACCIDENT["questions"]["colour"]
    assert row["English: another"] == f"{two(figure(another, 100))} by accident {level:.3f}"
    assert dict(zip(head, rows[0], strict=True))["English: another"] == two(figure(0, 100))  # all types: no level
    assert row["English: best blind"] == "0.550 blank · 55/100"
    assert ("colour (English)" in page.text) == told_apart
    assert ("no type of question" in page.text) != told_apart


def test_pope_and_the_holdout_are_shown_as_measured(page, run):
    _, *rows = table_of(page, "yes-ratio")
    assert len(rows) == 2 * 2 * 3
    pope = run["exam"]["sft"]["zh"]["pope"]
    got = pope["model"]["adversarial"]
    shown = [two(got[key]) for key in ("accuracy", "precision", "recall", "f1", "yes_ratio")]
    control = pope["alone"]["adversarial"]["accuracy"]  # figures grow in this fixture: the last is the best
    best = f"{control['value']:.3f} alone · {control['numerator']}/{control['denominator']}"
    unreadable = f"{got['unreadable']['numerator']}/{got['unreadable']['denominator']}"
    assert rows[-1] == ["SFT_vlm, Chinese, adversarial", *shown, best, unreadable]
    _, *rows = table_of(page, "hold-out: precision")
    near = [run["exam"]["pretrain"]["en"]["holdout"], run["exam"]["pretrain"]["en"]["descriptions"]["model"]]
    near = [d["things"]["pair"]["near"]["any"] for d in near]
    assert rows[0] == ["Pretrain_vlm, English", *(two(n[key]) for n in near for key in ("precision", "recall"))]


def worth(exam, group, who, name, key=None):
    """A figure as it is shown, with what it is worth by accident where that is known."""
    shown = exam[group][who][name] if key is None else exam[group][who][name][key]
    known = who in CONTROLS and name in ACCIDENT[group] and key in (None, "accuracy")
    return two(shown) + (f" by accident {ACCIDENT[group][name]:.3f}" if known else "")


def test_controls_are_counted_that_hold_what_they_are_worth_by_accident(run):
    """Every interval of a control holds its level but two, and one has none: it is counted in nothing."""
    run = copy.deepcopy(run)
    for stage in STAGES:
        for lang in LANGUAGES:
            exam = run["exam"][stage][lang]
            told, wide = (
                exam["descriptions"]["another"],
                {"value": 0.5, "low": 0.0, "high": 1.0, "numerator": 1, "denominator": 2},
            )
            told |= {"things": {"pair": {"near": {"any": {"precision": wide, "recall": wide}}}}}
            told |= dict.fromkeys(("setting", "chair_i", "chair_s"), wide)
            exam["questions"]["another"] |= dict.fromkeys(QUESTION_TYPES, wide)
            exam["pope"]["another"] = {way: {"accuracy": wide} for way in POPE_WAYS}
    per_cell = 5 + len(QUESTION_TYPES) + len(POPE_WAYS)
    assert report.held(run, "another") == report.Held(4 * per_cell, 4 * per_cell, [], [])
    edge = {"low": ACCIDENT["questions"]["colour"]}
    run["exam"]["sft"]["zh"]["questions"]["another"]["colour"] = wide | edge  # an end belongs to the interval
    assert report.held(run, "another").above == []
    run["exam"]["sft"]["zh"]["questions"]["another"]["colour"] = wide | {"low": 0.3}
    run["exam"]["pretrain"]["en"]["descriptions"]["another"]["chair_s"] = wide | {"high": 0.9}
    near = run["exam"]["pretrain"]["en"]["descriptions"]["another"]["things"]["pair"]["near"]
    near["any"]["precision"] = figure(0, 0)
    found = report.held(run, "another")
    assert found.above == ["questions: colour (SFT_vlm, Chinese)"]
    assert found.below == ["descriptions: chair_s (Pretrain_vlm, English)"]
    assert (found.inside, found.of) == (4 * per_cell - 3, 4 * per_cell - 1)
    said = report._chance(run)
    assert f"another {found.inside} of {found.of}" in said
    assert f"another, above: {found.above[0]}. another, below: {found.below[0]}." in said


def test_what_controls_are_worth_by_accident_is_on_the_page(page, run):
    assert report._chance(run) in " ".join(page.text.split())


def test_all_controls_stand_in_a_fold_with_intervals_and_counts(run):
    fold = report._all_controls(run)
    assert isinstance(fold, Fold) and fold.title.startswith("All controls")
    tables = iter(Page(fold.html()).cells())
    for stage in STAGES:
        for lang in LANGUAGES:
            exam = run["exam"][stage][lang]
            (head, *rows), everyone = next(tables), ["model", "blank", "another", "alone"]
            assert head == ["type", *everyone, "guess"]
            assert rows == [
                ["all types" if t == "all" else t, *(worth(exam, "questions", who, t) for who in head[1:])]
                for t in ("all", *QUESTION_TYPES)
            ]
            head, *rows = next(tables)
            assert head == ["way", *everyone]
            assert rows == [
                [f"{way}: {key.replace('_', '-')}", *(worth(exam, "pope", who, way, key) for who in everyone)]
                for way in POPE_WAYS
                for key in ("accuracy", "yes_ratio")
            ]
    assert next(tables, None) is None
    captions = re.findall(r"<caption>(.*?)</caption>", fold.html())
    names = [f"{stage}, {lang}" for stage in ("Pretrain_vlm", "SFT_vlm") for lang in ("English", "Chinese")]
    assert captions == [f"{name}: {what}" for name in names for what in ("questions", "POPE")]


def test_all_controls_are_on_the_page_and_in_markdown(page, markdown, run):
    assert "All controls" in page.text and "**All controls" in markdown
    assert two(run["exam"]["pretrain"]["zh"]["pope"]["blank"]["popular"]["yes_ratio"]) in tidy(page.text)


def test_no_share_stands_without_its_counts(page):
    """A figure with three digits after the point is one over a set; the counts stand in the same cell."""
    alone = [cell for table in page.cells() for row in table for cell in row if re.search(r"\b[01]\.\d{3}\b", cell)]
    assert len(alone) > 400
    assert [cell for cell in alone if not re.search(r"\d+/\d+", cell)] == []


def test_tables_with_seven_columns_of_figures_and_more_are_set_small(run):
    """At full size their last column would lie beyond the edge of a laptop's screen."""
    for table in (report._pope_table(run), report._breakdown(run, "pair"), report.headline_table(run)):
        assert len(table.head) > 7 and "headline" in table.style.split()


def test_the_large_percentages_stand_with_their_counts(run):
    weaker = [run["exam"]["sft"]["en"]["descriptions"]["model"]["things"]["pair"]["near"]["any"]["recall"]]
    weaker.append(run["exam"]["sft"]["en"]["questions"]["model"]["all"])  # figures grow: English is the lower
    for (number, what), figure_ in zip(report._tiles(run)[2:], weaker, strict=True):
        assert number == f"{100 * figure_['value']:.0f}%"
        assert what.endswith(f"in the weaker language: {figure_['numerator']}/{figure_['denominator']}")


def test_the_ledger_counts_what_trained_and_what_was_frozen(page):
    _, *rows = table_of(page, "trained")
    assert rows == [
        ["Pretrain_vlm: vision", "5,000,017", "0", "5,000,017", "frozen"],
        ["Pretrain_vlm: W", "49,152", "49,152", "0", "trained"],
        ["Pretrain_vlm: language model", "8,000,003", "0", "8,000,003", "frozen"],
        ["SFT_vlm: vision", "5,000,017", "0", "5,000,017", "frozen"],
        ["SFT_vlm: W", "49,152", "49,152", "0", "trained"],
        ["SFT_vlm: language model", "8,000,003", "8,000,003", "0", "trained"],
    ]
    assert "(49,152 numbers)" in page.text and "(8,049,155)" in page.text  # the opening: what trained, by stage


def test_the_page_says_how_it_was_made(page):
    made = dict(row for row in table_of(page, "command") if row[0])
    assert made == {
        "command": "minivlm run --seed 7",
        "seed": "7",
        "precision of training": "bf16",
        "machine": "2 cores, Linux x86_64",
        "peak memory": "2.25 GB",
        "training pictures": "5,000",
        "time: drawing and encoding pictures": "61 s",
        "time: stage 1": "122 s",
        "time: stage 2": "183 s",
        "time: the exam": "30 s",
        "time: all in all": "396 s",
        "versions": "torch 2.9.1, minivlm 0.1.0",
        "base models": "vision 0123456789ab, language_model ba9876543210",
    }
    assert "6.6 minutes" in page.text  # 396 s
    assert "What is in this picture?" in page.text and "这个图像中有什么内容？" in page.text  # what both were asked


def test_where_the_system_does_not_tell_its_memory_the_page_says_so(run):
    run = run | {"peak_memory_gb": None}
    assert ["peak memory", "not known on this system"] in Page(report._made_table(run).html()).cells()[0]
    assert ("–", "of memory at the most") in report._tiles(run)


def test_where_nothing_was_counted_a_dash_stands(run):
    run = copy.deepcopy(run)
    score = run["exam"]["sft"]["zh"]["descriptions"]["model"]["things"]["pair"]["near"]["4"]
    score |= {"precision": figure(0, 0), "recall": figure(0, 0), "precision_at_best": figure(0, 0)}
    assert "– / – 0/0 · 0/0" in Page(report.headline_table(run).html()).cells()[0][2]
    assert Page(report._breakdown(run, "pair").html()).cells()[0][-1][1:3] == ["–", "–"]


# ---- seeds


def test_all_three_seeds_this_run_and_the_worst_are_shown(page):
    table = next(t for t in page.cells() if t[-1][0].startswith("the worst"))
    names = ["seed 0, shipped", "seed 1, shipped", "seed 2, shipped", "seed 7, this run"]
    expected = [f"{name}, {language}" for language in ("English", "Chinese") for name in names]
    assert [row[0] for row in table[1:]] == [*expected, "the worst, English", "the worst, Chinese"]
    assert len({tuple(row[1:]) for row in table[1:9]}) == 8
    for worst, first in ((table[9], table[1]), (table[10], table[5])):
        assert worst[1:] == first[1:]  # seed 0's figures are the lowest in this fixture


def test_a_run_that_is_shipped_is_not_shown_twice(seeds):
    blocks = report._seed_blocks(json.loads(json.dumps(make_run(1))), json.loads(json.dumps(seeds)))
    text = markdown_page(blocks)
    assert text.count("seed 1, shipped") == 2 and "this run" not in text


def test_without_shipped_seeds_there_is_no_word_of_them(run):
    assert report._seed_blocks(run, []) == []


def three_headlines() -> list[dict]:
    heads = [report.headline(make_run(seed)) for seed in (0, 1, 2)]
    for head, counts in zip(heads, ((90, 81, 70), (88, 95, 71), (95, 79, 69)), strict=True):
        near = head["near"]["pretrain"]["en"]
        near["1"] = {"precision": figure(counts[0], 100), "recall": figure(counts[1], 100)}
        head["questions"]["zh"] = figure(counts[2], 100)
    heads[1]["near"]["sft"]["zh"]["4"] = {"precision": figure(8, 9), "recall": figure(1, 50)}
    heads[2]["near"]["sft"]["zh"]["4"] = {"precision": figure(70, 80), "recall": figure(0, 0)}
    heads[0]["near"]["sft"]["zh"]["4"] = {"precision": figure(800, 900), "recall": figure(2, 50)}
    heads[1]["setting"]["sft"]["zh"] = figure(1, 500)
    heads[2]["chair_i"]["pretrain"]["zh"] = figure(777, 778)
    return heads


def test_the_worst_counts_by_hand():
    """Each from the seed where it is worst, by value and not by count; nothing counted is the worst of all."""
    worst = report.worst_of(three_headlines())

    def counts(figure_):
        return figure_["numerator"], figure_["denominator"]

    first, last = worst["near"]["pretrain"]["en"]["1"], worst["near"]["sft"]["zh"]["4"]
    assert (counts(first["precision"]), counts(first["recall"])) == ((88, 100), (79, 100))
    assert (counts(last["precision"]), counts(last["recall"])) == ((70, 80), (0, 0))
    assert counts(worst["questions"]["zh"]) == (69, 100)


def test_the_worst_setting_and_the_worst_chair_by_hand():
    text = report._worst_of_the_rest(three_headlines())
    assert "worst setting accuracy is 0.002 (1/500; wanted: 0.97)" in text
    assert "worst CHAIR_i 0.999 (777/778)" in text  # the highest: less is better


def test_the_shipped_seeds_are_headlines_that_a_page_can_show(run):
    shipped = report.read_seeds(data_folder() / "results" / "seeds.json")
    assert shipped and len({head["seed"] for head in shipped}) == len(shipped)
    text = markdown_page(report._seed_blocks(run, shipped))
    assert all(text.count(f"seed {head['seed']}, shipped") == 2 for head in shipped)


def test_seeds_are_none_without_a_file_and_refused_if_they_are_no_json(tmp_path):
    assert report.read_seeds(tmp_path / "seeds.json") == []
    (tmp_path / "seeds.json").write_text("{", "utf-8")
    with pytest.raises(ValueError, match="Expecting property name"):
        report.read_seeds(tmp_path / "seeds.json")


# ---- marks


PARK = Scene("park", (Thing("car", "red", "left", "near", "big"), Thing("dog", "blue", "right", "far", "small")), 1)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("A red car and a blue dog in a park.", []),
        ("A green car in a park.", [("green car", "the car here is red")]),
        ("a pink CAT", [("pink CAT", "there is no cat here")]),
        ("A red car on a beach at sunset.", [("beach", "this is a park")]),
        ("公园里有一辆蓝色的汽车和一只猫。", [("蓝色的汽车", "the car here is red"), ("猫", "there is no cat here")]),
        ("", []),
        ("blub", []),
    ],
)
def test_what_is_not_so_is_marked_and_says_what_is(text, wrong):
    spans = report.marked(text, PARK)
    assert "".join(span.text for span in spans) == text  # nothing is lost
    assert [(span.text, span.title) for span in spans if span.style == "wrong"] == wrong


def test_what_an_answer_leaves_out_is_named_below(run):
    run = run | {"table": [{"name": "x", "scene": PARK.to_dict(), "answers": {}}]}
    run["table"][0]["answers"] = {
        "pretrain": {"en": "A red car in a park.", "zh": "公园。"},
        "sft": {"en": "A red car and a blue dog.", "zh": "一只蓝色的狗。"},
    }
    ((_, first, second),) = Page(report.seven_rows(run).html()).cells()[0][1:]
    assert first == "A red car in a park. not named: blue dog 公园。 没有提到：一辆红色的汽车、一只蓝色的狗"
    assert second == "A red car and a blue dog. 一只蓝色的狗。 没有提到：一辆红色的汽车"


# ---- escaping


@pytest.fixture(scope="module")
def evil():
    """A page whose model, machine and command all write what should never be obeyed."""
    run = make_run()
    for row in run["table"]:
        row["answers"] = {stage: dict.fromkeys(LANGUAGES, f"{EVIL} a green cat {EVIL}") for stage in STAGES}
    run |= {"command": EVIL, "base": EVIL, "versions": {EVIL: "1"}}
    run["machine"]["system"] = EVIL
    return report.page_blocks(run, [], Figure(Picture(b"png", "curves", "x.png"), "The loss fell."))


def test_what_a_model_wrote_is_text_in_the_page(evil):
    text = html_page("A page", evil)
    page = Page(text)
    assert "<script" not in text and "<img src=x" not in text and "<!-- " not in text
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "dl", "div", "dd", "dt"),
        *("strong", "span", "table", "caption", "thead", "tbody", "tr", "th", "td", "img", "mark", "figure"),
        *("figcaption", "details", "summary"),
    }
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert len(page.images) == 8
    assert tidy(page.text).count(EVIL) == 7 * 2 * 2 * 2 + 4  # every one of them, to the letter


def test_what_a_model_wrote_is_text_in_markdown(evil):
    text = markdown_page(evil)
    assert set(re.findall(r"<[^>]*>?", text)) <= {"<br>", "<sub>", "</sub>"}
    tables = markdown_tables(text)
    assert all(len({len(row) for row in table}) == 1 for table in tables)  # a bar opens no new column
    assert len(tables[0]) == 8
    for row in tables[0][1:]:
        assert [cell.count(EVIL) for cell in row] == [0, 4, 4]
    for written in ("[a](b)", "`c`", "*d*", "_e_", "~~f~~", "# \\ &lt;"):  # each sign of theirs is escaped
        assert written not in text


def test_an_answer_of_many_lines_stays_in_its_cell(run):
    run = copy.deepcopy(run)
    run["table"][0]["answers"]["sft"]["en"] = "one\n\n| two |\n# three\n---\n```"
    (table,) = markdown_tables(markdown_page([report.seven_rows(run)]))
    assert len(table) == 8 and table[1][2].startswith("one | two | # three --- ```")


@pytest.mark.parametrize(
    ("block", "times"),
    [
        (Heading(EVIL), 1),
        (Paragraph(EVIL), 1),
        (Paragraph([EVIL, Span(EVIL, "strong")], "opening"), 2),
        (Paragraph(Span(EVIL, "wrong", EVIL)), 1),
        (Paragraph(Span(EVIL, "small", EVIL)), 1),
        (Paragraph(Lines([EVIL, EVIL], "en")), 2),
        (Tiles([(EVIL, EVIL)]), 2),
        (Figure(Picture(b"png", "a picture", "x.png"), EVIL), 1),
        (Table([EVIL, EVIL], [[EVIL, Span(EVIL, "code")]], EVIL, "", EVIL), 6),
        (Fold(EVIL, [Paragraph(EVIL)]), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_block_escapes_what_it_is_given(block, times):
    page = Page(block.html())
    assert {attributes["title"] for _, attributes in page.tags if "title" in attributes} <= {EVIL}
    assert tidy(page.text).count(EVIL) == times
    assert "script" not in {tag for tag, _ in page.tags}
    assert [image for image in page.images if image["src"] == "x"] == []
    text = block.markdown()
    assert set(re.findall(r"<[^>]*>?", text)) <= {"<br>", "<sub>", "</sub>"}
    assert shown(text).count(EVIL) == times


def test_a_pictures_description_cannot_leave_its_attribute():
    (image,) = Page(Picture(b"png", EVIL, "x.png").html()).images
    assert image["alt"] == EVIL and set(image) == {"alt", "src"}


def test_a_title_is_escaped_too():
    assert "<title>&lt;/title&gt;&lt;script&gt;</title>" in html_page("</title><script>", [])


# ---- HTML and Markdown


def test_markdown_and_html_agree_on_every_cell_of_every_table(page, markdown):
    assert len(page.cells()) > 10
    for ours, theirs in zip(markdown_tables(markdown), page.cells(), strict=True):
        assert [[bare(cell) for cell in row] for row in ours] == [[bare(cell) for cell in row] for row in theirs]


def test_markdown_and_html_agree_on_every_number_in_their_order(page, markdown):
    def numbers(text: str) -> list[str]:
        return re.findall(r"\d[\d,.]*\d|\d", text)

    seen = "\n".join(shown(line) for line in markdown.splitlines() if not re.fullmatch(r"[| -]+", line))
    assert numbers(seen) == numbers(page.text)
    assert len(numbers(seen)) > 1000


def test_markdowns_pictures_lie_beside_it(folder, markdown, page):
    links = re.findall(r"!\[(.*?)\]\((.*?)\)", markdown)
    assert [alt for alt, _ in links] == [image["alt"] for image in page.images]
    for (_, name), image in zip(links, page.images, strict=True):
        assert (folder / name).read_bytes() == base64.b64decode(image["src"].partition(",")[2])


def test_the_parts_for_a_readme_are_those_of_the_report(folder, markdown):
    table, metrics = ((folder / name).read_text("utf-8") for name in ("table.md", "metrics.md"))
    assert re.findall(r"\]\((.*?)\)", table) == [f"../table/{name}.png" for name in TABLE]
    assert table.replace("](../table/", "](pictures/").strip() in markdown
    assert metrics.strip() in markdown


def test_a_terminal_sees_the_seven_rows_too(run):
    text = report.table_as_text(run)
    assert [line.split(":")[0] for line in text.splitlines() if ": " in line] == list(TABLE)
    assert text.count("Pretrain_vlm A red car in a park.") == text.count("SFT_vlm      公园里有一辆红色的汽车。") == 7


def test_a_page_is_the_same_bytes_each_time(run, seeds, folder, tmp_path):
    again = report.write_report(tmp_path, run, seeds)
    for file in ("index.html", "report.md", "table.md", "metrics.md"):
        assert (again.parent / file).read_bytes() == (folder / file).read_bytes()


def test_a_folder_that_cannot_be_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("in the way", "utf-8")
    with pytest.raises(OSError):
        report.write_report(tmp_path / "file", run)


def test_markdown_keeps_the_spaces_between_plain_and_marked_words():
    said = ["A ", Span("red  car", "wrong"), " in ", Span(" a park ", "strong"), "."]
    assert Paragraph(said).markdown() == "A ~~red car~~ ✗ in  **a park** ."
    assert Span("", "small").markdown() == "" and Span(" ", "strong").markdown() == " "


def test_the_page_says_how_many_pictures_each_figure_is_about(run, page):
    said = " ".join(page.text.split())
    assert "Descriptions are of all 500; the questions are asked about 200 of them" in said
    assert f"with another picture as a control about {CONTROLLED} of these" in said
    assert "pictures with a held-out pair were drawn again" in said
    small = report._about_the_exam(run | {"sizes": run["sizes"] | {"exam": 40, "questioned": 16}})
    assert "asked about 16 of them, and with another picture as a control about 16 of these" in small
