"""What a reader of the notebooks touches: figures with alternative text, tables, lenses; and how notebooks are run."""

import io
import json
import re
import sys

import matplotlib
import numpy as np
import pytest
from lessons import lesson_01, lesson_02, refresh
from lessons.plots import figures, tables
from lessons.plots.figures import LiveCurve, loss_curve, show, trailing_mean
from lessons.plots.tables import show_answers, show_image, show_supervision, show_taught
from matplotlib.figure import Figure
from PIL import Image

from minivlm.data.samples import Example, Sample
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.facts import sample_scene

HOSTILE = '<script>alert("x")</script> & "quotes"'
ON_UNIX = pytest.mark.skipif(sys.platform == "win32", reason="measures memory as Linux and macOS do")


@pytest.fixture
def shown(monkeypatch) -> list[dict]:
    """What the notebook would display, bundle after bundle."""
    bundles = []

    class Handle:
        def update(self, bundle, raw):
            bundles.append(bundle | {"updated": raw})

    def display(bundle, raw, display_id=False):
        assert raw
        bundles.append(bundle)
        return Handle() if display_id else None

    monkeypatch.setattr(figures, "display", display)
    monkeypatch.setattr(tables, "display", display)
    return bundles


def small_figure() -> Figure:
    return loss_curve([3.0, 2.0, 1.0], 3, "a curve")


class TestShow:
    def test_alternative_text_and_summary_reach_the_page_escaped(self, shown):
        show(small_figure(), HOSTILE, "falls & falls")
        page = shown[0]["text/html"]
        assert "<script>" not in page and 'alt="&lt;script&gt;' in page
        assert "<figcaption>falls &amp; falls</figcaption>" in page
        assert shown[0]["text/plain"] == "falls & falls"
        assert re.search(r'src="data:image/png;base64,iVBOR', page)

    @pytest.mark.parametrize(("alt", "summary"), [("", "a"), ("  ", "a"), ("a", ""), ("a", "two\nlines")])
    def test_a_figure_without_words_is_refused(self, shown, alt, summary):
        with pytest.raises(ValueError, match="alternative text"):
            show(small_figure(), alt, summary)
        assert shown == []

    def test_style_is_left_as_it_was(self):
        before = dict(matplotlib.rcParams)
        with figures.style():
            assert matplotlib.rcParams["axes.prop_cycle"].by_key()["color"][0] == figures.BLUE
        assert dict(matplotlib.rcParams) == before


class TestLiveCurve:
    def test_it_draws_once_and_then_updates_until_the_last_step(self, shown):
        curve = LiveCurve(steps=5, title="stage", every=2)
        for step in range(1, 6):
            curve(step, 6.0 - step, model=None)
        assert [bundle.get("updated", False) for bundle in shown] == [False, True, True]
        assert shown[-1]["text/plain"] == "stage: loss 5.00 → 3.00 in 5 steps"
        assert curve.losses == [5.0, 4.0, 3.0, 2.0, 1.0]

    def test_what_the_model_says_is_listed_where_it_changes(self, shown):
        answers = iter(["a <b>", "a <b>", "a car"])
        curve = LiveCurve(steps=3, title="stage", every=1, say=lambda model: next(answers))
        for step in range(1, 4):
            curve(step, 1.0, model=None)
        assert curve.answers == {1: "a <b>", 2: "a <b>", 3: "a car"}
        listed = re.findall(r"<div><b>step (\d)</b>: ([^<]*)</div>", shown[-1]["text/html"])
        assert listed == [("1", "a &lt;b&gt;"), ("3", "a car")]

    def test_smoothed_is_the_mean_of_the_last(self):
        assert trailing_mean([1.0, 2.0, 3.0, 4.0], window=2).tolist() == [1.0, 1.5, 2.5, 3.5]


class TestPlates:
    @pytest.mark.usefixtures("no_missing_glyphs")
    def test_diagrams_are_drawn_in_all_fonts_that_they_need(self):
        image = draw(sample_scene("dev", 0), 64)
        values, is_image = np.random.default_rng(0).normal(size=(9, 6)), np.array([0, 0, 1, 1, 1, 1, 0, 0, 0]) == 1
        parameters = {"vision": 1, "projector": 2, "language_model": 3}
        anatomy = lesson_01.anatomy(image, values[:4], values[:4], values, is_image, parameters, "a red car")
        for figure in (anatomy, lesson_02.swap(image, ["a"] * 9, values, values, is_image)):
            assert Image.open(io.BytesIO(figures.png(figure))).mode == "P"

    def test_patches_are_cut_row_by_row(self):
        pixels = np.zeros((4, 4, 3), dtype=np.uint8)
        pixels[:2, 2:], pixels[2:, :2], pixels[2:, 2:] = 1, 2, 3
        cut = figures.patches(Image.fromarray(pixels), 4)
        assert [int(patch.mean()) for patch in cut] == [0, 1, 2, 3]

    def test_an_exact_zero_is_stated_in_words(self):
        texts = [text.get_text() for text in figures.bars({"a": 0.0, "b": 0.25}, "t", "l").axes[0].texts]
        assert texts == ["exactly 0: frozen", "25.0%"]


class TestTables:
    def test_answers_are_text_not_html(self, shown):
        image = Image.new("RGB", (8, 8))
        show_answers([image], ["a black square"], {"before": [HOSTILE], "after": ["一辆汽车"]})
        page = shown[0]["text/html"]
        assert "<script>" not in page and "&lt;script&gt;" in page and "一辆汽车" in page
        assert page.count("<img") == page.count('alt="a black square"') == 1
        assert shown[0]["text/plain"] == f"before: {HOSTILE}\nafter: 一辆汽车"

    def test_images_without_words_are_refused(self):
        with pytest.raises(ValueError, match="alternative text"):
            show_answers([Image.new("RGB", (8, 8))], [" "], {"a": ["b"]})
        with pytest.raises(ValueError, match="alternative text"):
            show_image(Image.new("RGB", (8, 8)), "")

    def test_an_image_by_itself(self, shown):
        show_image(Image.new("RGB", (8, 8)), "black & square")
        page = shown[0]["text/html"]
        assert page.count("<img") == page.count('alt="black &amp; square"') == 1
        assert re.findall(r"<figcaption[^>]*>(.*?)</figcaption></figure>", page) == ["black &amp; square"]
        assert shown[0]["text/plain"] == "black & square"

    def test_supervised_tokens_are_underlined_and_counted(self, shown, processor):
        content = [{"type": "image"}, {"type": "text", "text": "What <is> it?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a red car"}]
        row = processor.encode(Sample(messages))
        show_supervision(row, processor.tokenizer)
        page = shown[0]["text/html"]
        assert re.findall(r"<span style=[^>]*underline[^>]*>(.*?)</span>", page) == ["a red car&lt;|im_end|&gt;"]
        assert page.count("&lt;image&gt;") == page.count("&lt;image&gt; × 4") == 1
        assert "What &lt;is&gt; it?" in page
        supervised = len(processor.tokenizer.encode("a red car")) + 1
        assert shown[0]["text/plain"] == f"{supervised} of {len(row.labels)} tokens are supervised (underlined)."

    def test_rows_of_several_kinds_with_their_masks(self, shown, processor):
        rows = {"with <one>": Example([5, 6], [-100, 6]), "without": Example([5, 6, 7], [-100, -100, 7])}
        show_taught(rows, [(Image.new("RGB", (8, 8)), "black"), None], processor.tokenizer)
        page = shown[0]["text/html"]
        assert page.count("<img ") == 1 and 'alt="black"' in page and ">none</td>" in page
        assert "<b>with &lt;one&gt;</b>" in page and page.count("underline;") == 2
        counted = "with <one>: 1 of 2 tokens are supervised; without: 1 of 3 tokens are supervised"
        assert shown[0]["text/plain"] == counted

    @pytest.mark.parametrize("images", [[], [(Image.new("RGB", (8, 8)), " ")]])
    def test_rows_need_their_images_and_these_a_text(self, processor, images):
        with pytest.raises(ValueError, match=r"alternative text|zip"):
            show_taught({"a": Example([5, 6], [-100, 6])}, images, processor.tokenizer)


class TestRefresh:
    def notebook(self, source: str, code: str) -> dict:
        first = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": source}
        cell = {"cell_type": "code", "id": "b", "metadata": {}, "source": code, "outputs": [], "execution_count": None}
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        return {"cells": [first, cell], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}

    @pytest.mark.slow
    @ON_UNIX
    def test_outputs_and_the_measured_line_are_written(self, tmp_path):
        file = tmp_path / "n.ipynb"
        file.write_text(json.dumps(self.notebook("# t\n\n**Measured**: not yet.\n\nend", "print(6 * 7)")))
        line = refresh.refresh(file)
        cells = json.loads(file.read_text("utf-8"))["cells"]
        assert re.fullmatch(r"\*\*Measured\*\*: \d+ seconds and \d+ MB on \d+ CPU cores\.", line)
        assert "".join(cells[0]["source"]) == f"# t\n\n{line}\n\nend"
        assert cells[1]["outputs"][0]["text"] == ["42\n"] and cells[1]["execution_count"] == 1
        entry = refresh.measured(file)
        assert refresh.measured_line(entry) == line and entry["code"] == refresh.code_hash({"cells": cells})
        file.write_text(json.dumps(self.notebook(f"# t\n\n{line}\n\nend", "print(6 * 8)")))
        assert refresh.refresh(file, keep_times=True) == line
        kept, cells = refresh.measured(file), json.loads(file.read_text("utf-8"))["cells"]
        assert cells[1]["outputs"][0]["text"] == ["48\n"]
        assert kept == entry | {"timed": entry["code"], "code": refresh.code_hash({"cells": cells})}

    @pytest.mark.slow
    @ON_UNIX
    def test_a_failing_cell_leaves_the_notebook_as_it_was(self, tmp_path):
        file = tmp_path / "n.ipynb"
        file.write_text(text := json.dumps(self.notebook("**Measured**: x", "1 / 0")))
        with pytest.raises(RuntimeError, match="a cell failed"):
            refresh.refresh(file)
        assert file.read_text() == text

    def test_the_hash_is_that_of_code_alone(self):
        one, other = self.notebook("text", "1 + 1"), self.notebook("other text", "1 + 1")
        other["cells"][1] |= {"outputs": [{}], "execution_count": 3, "source": ["1 + 1"]}
        assert refresh.code_hash(one) == refresh.code_hash(other) != refresh.code_hash(self.notebook("text", "1 + 2"))

    def test_widgets_are_dropped_and_figures_kept(self):
        notebook = self.notebook("t", "x")
        widget = {"output_type": "display_data", "data": {refresh.WIDGET: {}, "text/plain": "0%"}}
        figure = {"output_type": "display_data", "data": {"text/html": "<img>"}}
        text = {"output_type": "stream", "name": "stdout", "text": "42"}
        notebook["cells"][1]["outputs"] = [widget, figure, text]
        notebook["metadata"]["widgets"] = {"state": {}}
        cleaned = refresh.without_widgets(notebook)
        assert cleaned["cells"][1]["outputs"] == [figure, text] and "widgets" not in cleaned["metadata"]
