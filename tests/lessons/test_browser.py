"""The course in a real browser: JupyterLab on loopback, headless Chromium, a reader's clicks and keys.

The tests look for what a reader sees: text, roles, alternative text; never pixels or coordinates. Without a
browser these tests are skipped and say why; where `CI` is set, as `.ci/run` does, they fail instead.
"""

import os
import shutil

import matplotlib
import pytest
from lab import BROWSERS, FLAGS, NotebookPage, running_lab, shorten
from playwright.sync_api import expect, sync_playwright
from runs import make_run

from minivlm import report
from minivlm.runtime.paths import data_folder

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with running_lab(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        reason = f"no browser is installed (looked for {', '.join(BROWSERS)})"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        yield running
        running.close()


@pytest.fixture
def open_notebook(chromium, lab):
    """Opens a notebook by its name, in a browser context of its own."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    yield lambda name: NotebookPage(context.new_page(), lab, name)
    context.close()


WRONG = """def replace_placeholders(inputs_embeds, input_ids, image_embeds, image_token_id):
    return inputs_embeds


exercises.check("replace_placeholders", replace_placeholders)"""
RIGHT = """def replace_placeholders(inputs_embeds, input_ids, image_embeds, image_token_id):
    images, n, _ = image_embeds.shape
    mask = input_ids == image_token_id
    for row, count in enumerate(mask.sum(dim=1).tolist()):
        if count % n:
            raise ValueError(f"row {row} has {count} placeholders, no multiple of {n}")
    if mask.sum() != images * n:
        raise ValueError(f"{mask.sum()} placeholders for {images} pictures of {n}")
    return inputs_embeds.masked_scatter(mask[..., None], image_embeds)


exercises.check("replace_placeholders", replace_placeholders)"""


def test_the_exercise_of_notebook_02_is_solved_by_typing(open_notebook):
    notebook = open_notebook("02_placeholder_embeddings")
    notebook.run_above("raise NotImplementedError")
    expect(notebook.run("raise NotImplementedError")).to_contain_text("Not written yet")
    expect(notebook.cell("apply_chat_template(messages, add_generation_prompt=True)")).to_contain_text("<image>")
    texts = notebook.alternative_texts()
    assert texts and all(text and text.strip() for text in texts)
    assert any("Diagram of the data flow" in text for text in texts)
    notebook.write("raise NotImplementedError", WRONG)
    wrong = notebook.run("    return inputs_embeds\n\n")
    expect(wrong).to_contain_text("the text comes back unchanged")
    notebook.write("    return inputs_embeds\n\n", RIGHT)
    expect(notebook.run("return inputs_embeds.masked_scatter(mask[")).to_contain_text("Right.")


def test_the_slider_of_notebook_03_moves_through_the_training(open_notebook, lab):
    shorten(lab, "03_projector_pretraining", {"2400, 300, 200": "64, 8, 150"})  # images, steps, tested
    notebook = open_notebook("03_projector_pretraining")
    notebook.run_above("slider.show()")
    shown = notebook.run("slider.show()", seconds=180)
    expect(shown).to_contain_text("After step 8 the model says:")
    handle = shown.get_by_role("slider")
    handle.press("Home")
    expect(shown).to_contain_text("After step 0 the model says:")
    handle.press("ArrowRight")
    expect(shown).to_contain_text("After step 5 the model says:")
    scene = shown.get_by_label("scene")
    drawn = shown.get_by_role("img", name="A word stands on each of 64 patches")
    before = drawn.last.get_attribute("aria-label")
    scene.fill("3")
    scene.press("Enter")
    expect(drawn.last).not_to_have_attribute("aria-label", before)
    assert all(text and text.strip() for text in notebook.alternative_texts())


def test_the_chat_of_notebook_00_answers_and_shows_where_it_looked(open_notebook):
    notebook = open_notebook("00_see_it_work")
    notebook.run_above("chat.show()")
    shown = notebook.run("chat.show()", seconds=120)
    question = shown.get_by_placeholder("Ask about the picture")
    question.fill("Is there a dog in the picture?")
    question.press("Enter")
    conversation = shown.get_by_role("log")
    expect(conversation).to_contain_text("You: Is there a dog in the picture?")
    expect(conversation).to_contain_text("Model: No.", timeout=20_000)
    expect(question).to_have_value("")
    question.fill("What is in this picture?")
    shown.get_by_role("button", name="Send").press("Enter")
    expect(conversation).to_contain_text("pink flower", timeout=20_000)
    shown.get_by_label("as seen by").select_option("flower")
    expect(shown).to_contain_text("“flower” looked most at the")
    assert all(text and text.strip() for text in notebook.alternative_texts())
    shown.get_by_label("picture", exact=True).select_option("a file of your own")
    with notebook.page.expect_file_chooser() as chooser:
        shown.get_by_role("button", name="Choose a file").press("Enter")
    chooser.value.set_files(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg")
    expect(conversation).to_contain_text("This model knows only drawn scenes", timeout=20_000)
    expect(shown.get_by_alt_text("your file grace_hopper.jpg")).to_be_visible()


def test_the_table_of_seeds_is_seen_whole_on_a_laptop(chromium, tmp_path, monkeypatch):
    """On a page 1,200 pixels wide its last column is not cut off behind a scroll bar."""
    seeds = report.read_seeds(data_folder() / "results" / "seeds.json")
    monkeypatch.setattr(report, "headline", lambda run: seeds[0])  # counts of a real exam: as wide as a reader's
    context = chromium.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.goto(report.write_report(tmp_path, make_run(), seeds).as_uri())
    table = page.locator(".table").filter(has_text="the worst, Chinese")
    expect(table).to_have_count(1)
    needed, there = table.evaluate("table => [table.scrollWidth, table.clientWidth]")
    context.close()
    assert there > 1000 and needed <= there
