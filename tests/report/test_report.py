"""The report: what its page shows of a run, the same as Markdown, marks on errors, text that is never markup."""

import base64
import copy
import html
import io
import json
import re
from html.parser import HTMLParser
from itertools import product

import pytest
from PIL import Image
from runs import CHANCE, LANGUAGES, STAGES, make_run
from runs import some_estimate as figure

from minivlm.evaluation import POPE_SAMPLINGS
from minivlm.report import build, headline, held, marked, read_seeds, table_as_text, tables, write_report
from minivlm.report.answers import table_rows
from minivlm.report.tables import headline_table
from minivlm.runtime.paths import data_folder
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.drawing.table import TABLE
from minivlm.scenes.facts import Scene, Thing
from minivlm.scenes.vocabulary import QUESTION_TYPES

HOSTILE = """<script>alert(1)</script>&"' | <img src=x onerror=alert(2)> <!-- [a](b) `c` *d* _e_ ~~f~~ # \\ &lt;"""

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


def cells(table: tables.Table) -> list[list[str]]:
    """A table's cells with their small print, as a reader sees them."""
    return [[" ".join([cell.text, *cell.small]) for cell in row] for row in (table.head, *table.rows)]


@pytest.fixture(scope="module")
def run() -> dict:
    return make_run()


@pytest.fixture(scope="module")
def seeds() -> list[dict]:
    return [headline(make_run(seed)) for seed in (0, 1, 2)]


@pytest.fixture(scope="module")
def folder(run, seeds, tmp_path_factory):
    """A report on the disk. The run has been through JSON, as a real one has."""
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    assert write_report(out, json.loads(json.dumps(run)), seeds) == out / "index.html"
    return out


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "index.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def markdown(folder) -> str:
    return (folder / "report.md").read_text("utf-8")


def table_of(page: Page, head: str) -> list[list[str]]:
    """The one table with this among its column titles or row titles."""
    (table,) = (t for t in page.cells() if head in t[0] or head in [row[0] for row in t])
    return table


def two_lines(figure_: dict, digits: int = 3) -> str:
    """A figure with its interval and counts, as the page's tables write it."""
    decimals = min(digits, 2)
    interval = f"{figure_['low']:.{decimals}f}–{figure_['high']:.{decimals}f}"
    return f"{figure_['value']:.{digits}f} {interval} · {figure_['numerator']}/{figure_['denominator']}"


# ---- what the page shows


def test_the_table_has_seven_rows_of_image_and_both_columns(page, run):
    head, *rows = table_of(page, "picture")
    assert head == ["picture", "Pretrain_vlm", "SFT_vlm"]
    assert len(rows) == 7
    for row in rows:
        assert len(row) == 3
        assert all("A red car" in column and "一辆红色的汽车" in column for column in row[1:])
    assert rows[0][0] == "a red kite; a white boat, far away a beach at sunset"


def test_the_pages_images_are_the_drawn_scenes_and_say_in_words_what_they_show(page):
    *images, _ = page.images  # the last one shows the losses
    for scene, image in zip(TABLE.values(), images, strict=True):
        data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert Image.open(io.BytesIO(data)).tobytes() == draw(scene).tobytes()
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


def test_a_moving_average_by_hand():
    assert build.moving_average([1, 2, 3, 4, 5], share=0.8) == [2, 2.5, 3, 3.5, 4]  # two neighbours on each side
    assert build.moving_average([3.0, 1.0]) == [3.0, 1.0]
    hundred = build.moving_average(range(100))  # 3% of the steps around each
    assert hundred[50] == 50 and hundred[0] == sum(range(3)) / 3 and hundred[99] == sum(range(97, 100)) / 3


def test_the_headline_shows_values_and_counts(page, run):
    _, *rows = page.cells()[1]
    assert [row[0] for row in rows] == ["English", "Chinese"]
    for row, lang in zip(rows, LANGUAGES, strict=True):
        for cell, (stage, number) in zip(row[1:9], product(STAGES, "1234"), strict=True):
            p, r = (headline(run)["near"][stage][lang][number][key] for key in ("precision", "recall"))
            counts = [f"{one['numerator']}/{one['denominator']}" for one in (p, r)]
            assert cell == f"{p['value']:.3f} / {r['value']:.3f} {counts[0]} · {counts[1]}"


def test_the_shipped_tables_are_those_of_the_shipped_results():
    """data/results/metrics.md from the first of seeds.json, table.md from table.json."""
    results = data_folder() / "results"
    run = {"table": json.loads((results / "table.json").read_text("utf-8"))}
    content = {"headline": headline_table({"": read_seeds(results / "seeds.json")[0]}), "rows": table_rows(run)}
    for name in ("metrics.md", "table.md"):
        text = build.environment().get_template(f"{name}.j2").render(content, stages=["Pretrain_vlm", "SFT_vlm"])
        assert text == (results / name).read_text("utf-8")


@pytest.mark.parametrize(("another", "distinguished"), [(99, True), (60, False)])
def test_questions_stand_beside_another_image_and_the_best_of_three_blind(run, another, distinguished):
    """Another image is no blind guess, however good; where it beats chance by its interval, the page says so."""
    run = copy.deepcopy(run)
    for lang in LANGUAGES:
        run["exam"]["sft"][lang]["questions"]["another"] |= {t: figure(0, 100) for t in ("all", *QUESTION_TYPES)}
    by_who = run["exam"]["sft"]["en"]["questions"]
    for who, count in {"model": 90, "guess": 40, "blank": 55, "alone": 54, "another": another}.items():
        by_who[who]["colour"] = figure(count, 100)
    table = tables.questions_table(run, "sft")
    head, *rows = cells(table)
    assert [row[0] for row in rows] == ["all types", *QUESTION_TYPES]
    row = dict(zip(head, rows[1 + QUESTION_TYPES.index("colour")], strict=True))
    assert row["English: model"] == two_lines(figure(90, 100))
    level = CHANCE["questions"]["colour"]
    assert row["English: another"] == f"{two_lines(figure(another, 100))} chance level {level:.3f}"
    assert dict(zip(head, rows[0], strict=True))["English: another"] == two_lines(figure(0, 100))  # all types: no level
    assert row["English: best blind"] == "0.550 blank · 55/100"
    assert ("colour (English)" in table.note) == distinguished
    assert ("no type of question" in table.note) != distinguished


def test_pope_and_the_holdout_are_shown_as_measured(page, run):
    _, *rows = table_of(page, "yes-ratio")
    assert len(rows) == 2 * 2 * 3
    pope = run["exam"]["sft"]["zh"]["pope"]
    scores = pope["model"]["adversarial"]
    shown = [two_lines(scores[key]) for key in ("accuracy", "precision", "recall", "f1", "yes_ratio")]
    control = pope["alone"]["adversarial"]["accuracy"]  # figures grow in this fixture: the last is the best
    best = f"{control['value']:.3f} alone · {control['numerator']}/{control['denominator']}"
    unreadable = f"{scores['unreadable']['numerator']}/{scores['unreadable']['denominator']}"
    assert rows[-1] == ["SFT_vlm, Chinese, adversarial", *shown, best, unreadable]
    _, *rows = table_of(page, "hold-out: precision")
    near = [run["exam"]["pretrain"]["en"]["holdout"], run["exam"]["pretrain"]["en"]["descriptions"]["model"]]
    near = [d["things"]["pair"]["near"]["any"] for d in near]
    assert rows[0] == ["Pretrain_vlm, English", *(two_lines(n[key]) for n in near for key in ("precision", "recall"))]


def test_controls_at_their_chance_level_are_counted(run):
    """Every interval of a control holds its level but two, and one has none: it is counted in nothing."""
    run, wide = copy.deepcopy(run), {"value": 0.5, "low": 0.0, "high": 1.0, "numerator": 1, "denominator": 2}
    for stage in STAGES:
        for lang in LANGUAGES:
            exam = run["exam"][stage][lang]
            descriptions = exam["descriptions"]["another"]
            descriptions |= {"things": {"pair": {"near": {"any": {"precision": wide, "recall": wide}}}}}
            descriptions |= dict.fromkeys(("setting", "chair_i", "chair_s"), wide)
            exam["questions"]["another"] |= dict.fromkeys(QUESTION_TYPES, wide)
            exam["pope"]["another"] = {category: {"accuracy": wide} for category in POPE_SAMPLINGS}
    per_cell = 5 + len(QUESTION_TYPES) + len(POPE_SAMPLINGS)
    assert held(run, "another") == tables.Held(4 * per_cell, 4 * per_cell, [], [])
    edge = {"low": CHANCE["questions"]["colour"]}
    run["exam"]["sft"]["zh"]["questions"]["another"]["colour"] = wide | edge  # an end belongs to the interval
    assert held(run, "another").above == []
    run["exam"]["sft"]["zh"]["questions"]["another"]["colour"] = wide | {"low": 0.3}
    run["exam"]["pretrain"]["en"]["descriptions"]["another"]["chair_s"] = wide | {"high": 0.9}
    near = run["exam"]["pretrain"]["en"]["descriptions"]["another"]["things"]["pair"]["near"]
    near["any"]["precision"] = figure(0, 0)
    counts = held(run, "another")
    assert counts.above == ["questions: colour (SFT_vlm, Chinese)"]
    assert counts.below == ["descriptions: chair_s (Pretrain_vlm, English)"]
    assert (counts.inside, counts.of) == (4 * per_cell - 3, 4 * per_cell - 1)
    paragraph = build._paragraphs(run)[2]
    assert f"another {counts.inside} of {counts.of}" in paragraph
    assert f"another, above: {counts.above[0]}. another, below: {counts.below[0]}." in paragraph


def test_where_nothing_was_counted_a_dash_stands(run):
    run = copy.deepcopy(run)
    score = run["exam"]["sft"]["zh"]["descriptions"]["model"]["things"]["pair"]["near"]["4"]
    score |= {"precision": figure(0, 0), "recall": figure(0, 0), "precision_at_best": figure(0, 0)}
    assert cells(headline_table({"": headline(run)}))[2][8] == "– / – 0/0 · 0/0"
    assert cells(tables.breakdown(run, "pair"))[-1][1:3] == ["–", "–"]
    assert ("–", "of memory at the most") in build._tiles(run | {"peak_memory_gb": None})


def test_the_ledger_and_the_making_are_on_the_page(page):
    _, *ledger = table_of(page, "trained")
    assert ledger[1] == ["Pretrain_vlm: W", "49,152", "49,152", "0", "trained"]
    assert ledger[2] == ["Pretrain_vlm: language model", "8,000,003", "0", "8,000,003", "frozen"]
    cells = dict(table_of(page, "command"))
    assert cells["command"] == "minivlm run --seed 7" and cells["peak memory"] == "2.25 GB"
    assert cells["time: stage 2"] == "183 s"


# ---- seeds


def test_all_three_seeds_this_run_and_the_worst_are_shown(page):
    table = next(t for t in page.cells() if t[-1][0].startswith("the worst"))
    names = ["seed 0, shipped", "seed 1, shipped", "seed 2, shipped", "seed 7, this run"]
    expected = [f"{name}, {language}" for language in ("English", "Chinese") for name in (*names, "the worst")]
    assert [row[0] for row in table[1:]] == expected
    assert len({tuple(row[1:]) for row in table[1:5] + table[6:10]}) == 8
    for worst, first in ((table[5], table[1]), (table[10], table[6])):
        assert worst[1:] == first[1:]  # seed 0's figures are the lowest in this fixture


def test_a_run_that_is_shipped_is_not_shown_twice(seeds, tmp_path):
    assert read_seeds(tmp_path / "seeds.json") == []  # without a file there are none
    rows = cells(tables.seeds_table(json.loads(json.dumps(make_run(1))), json.loads(json.dumps(seeds)))[0])
    assert [row[0] for row in rows].count("seed 1, shipped, English") == 1
    assert not any("this run" in row[0] for row in rows)
    assert build.page_content(make_run(1))["seeds"] is None


def test_the_worst_counts_by_hand():
    """Each from the seed where it is worst, by value and not by count; nothing counted is the worst of all."""
    heads = [headline(make_run(seed)) for seed in (0, 1, 2)]
    for head, counts in zip(heads, ((90, 81, 70), (88, 95, 71), (95, 79, 69)), strict=True):
        near = head["near"]["pretrain"]["en"]
        near["1"] = {"precision": figure(counts[0], 100), "recall": figure(counts[1], 100)}
        head["questions"]["zh"] = figure(counts[2], 100)
    heads[1]["near"]["sft"]["zh"]["4"] = {"precision": figure(8, 9), "recall": figure(1, 50)}
    heads[2]["near"]["sft"]["zh"]["4"] = {"precision": figure(70, 80), "recall": figure(0, 0)}
    heads[0]["near"]["sft"]["zh"]["4"] = {"precision": figure(800, 900), "recall": figure(2, 50)}
    heads[1]["setting"]["sft"]["zh"] = figure(1, 500)
    heads[2]["chair_i"]["pretrain"]["zh"] = figure(777, 778)
    worst = tables.worst_of(heads)

    def counts(figure_):
        return figure_["numerator"], figure_["denominator"]

    first, last = worst["near"]["pretrain"]["en"]["1"], worst["near"]["sft"]["zh"]["4"]
    assert (counts(first["precision"]), counts(first["recall"])) == ((88, 100), (79, 100))
    assert (counts(last["precision"]), counts(last["recall"])) == ((70, 80), (0, 0))
    assert counts(worst["questions"]["zh"]) == (69, 100)
    _, text = tables.seeds_table(make_run(), heads)
    assert "worst setting accuracy is 0.002 (1/500)" in text
    assert "worst CHAIR_i 0.999 (777/778)" in text  # the highest: less is better


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
    pieces = marked(text, PARK)
    assert "".join(piece.text for piece in pieces) == text  # nothing is lost
    assert [tuple(piece) for piece in pieces if piece.error] == wrong


def test_what_an_answer_leaves_out_is_named_below(run, tmp_path):
    answers = {
        "pretrain": {"en": "A red car in a park.", "zh": "公园。"},
        "sft": {"en": "A red car and a blue dog.", "zh": "一只蓝色的狗。"},
    }
    run = run | {"table": [{"name": "x", "scene": PARK.to_dict(), "answers": answers}]}
    ((_, first, second),) = table_of(Page(write_report(tmp_path, run).read_text("utf-8")), "picture")[1:]
    assert first == "A red car in a park. not named: blue dog 公园。 没有提到：一辆红色的汽车、一只蓝色的狗"
    assert second == "A red car and a blue dog. 一只蓝色的狗。 没有提到：一辆红色的汽车"


# ---- escaping


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A report in which the texts of model, machine and command all contain markup."""
    run = make_run()
    for row in run["table"]:
        row["answers"] = {stage: dict.fromkeys(LANGUAGES, f"{HOSTILE} a green cat {HOSTILE}") for stage in STAGES}
    run |= {"command": HOSTILE, "base": HOSTILE, "versions": {HOSTILE: "1"}}
    run["machine"]["system"] = HOSTILE
    return write_report(tmp_path_factory.mktemp("evil"), run).parent


def test_what_a_model_wrote_is_text_in_the_page(hostile, page):
    own, text = page, (hostile / "index.html").read_text("utf-8")
    page = Page(text)
    assert "<script" not in text and "<img src=x" not in text and "<!-- " not in text
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in own.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert len(page.images) == 8
    assert tidy(page.text).count(HOSTILE) == 7 * 2 * 2 * 2 + 4  # every one of them, to the letter


def test_what_a_model_wrote_is_text_in_markdown(hostile):
    text = (hostile / "report.md").read_text("utf-8")
    assert set(re.findall(r"<[^>]*>?", text)) <= {"<br>", "<sub>", "</sub>"}
    tables = markdown_tables(text)
    assert all(len({len(row) for row in table}) == 1 for table in tables)  # a bar opens no new column
    assert len(tables[0]) == 8
    for row in tables[0][1:]:
        assert [cell.count(HOSTILE) for cell in row] == [0, 4, 4]
    for written in ("[a](b)", "`c`", "*d*", "_e_", "~~f~~", "# \\ &lt;"):  # each sign of theirs is escaped
        assert written not in text


def test_an_answer_of_many_lines_stays_in_its_cell(run, tmp_path):
    run = copy.deepcopy(run)
    run["table"][0]["answers"]["sft"]["en"] = "one\n\n| two |\n# three\n---\n```"
    write_report(tmp_path, run)
    (table,) = markdown_tables((tmp_path / "table.md").read_text("utf-8"))
    assert len(table) == 8 and table[1][2].startswith("one | two | # three --- ```")


# ---- HTML and Markdown


def test_markdown_and_html_agree_on_every_cell_of_every_table(page, markdown):
    assert len(page.cells()) > 10
    both = markdown_tables(markdown), page.cells()
    bare = [[[["".join(cell.split()) for cell in row] for row in table] for table in tables] for tables in both]
    assert bare[0] == bare[1]


def test_markdowns_images_lie_beside_it(folder, markdown, page):
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
    text = table_as_text(run)
    assert [line.split(":")[0] for line in text.splitlines() if ": " in line] == list(TABLE)
    assert text.count("Pretrain_vlm A red car in a park.") == text.count("SFT_vlm      公园里有一辆红色的汽车。") == 7


def test_a_page_is_the_same_bytes_each_time(run, seeds, folder, tmp_path):
    again = write_report(tmp_path, run, seeds)
    for file in ("index.html", "report.md", "table.md", "metrics.md"):
        assert (again.parent / file).read_bytes() == (folder / file).read_bytes()
