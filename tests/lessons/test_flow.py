"""The map of the course: every box is drawn, and what is highlighted can also be seen without colour."""

import pytest
from lessons.plots import flow
from lessons.plots.flow import ARROWS, BOXES, ICONS, LETTERS, show_flow
from matplotlib.figure import Figure


def texts(figure: Figure) -> list:
    return figure.axes[0].texts


def test_every_box_and_everything_that_flows_is_named():
    written = [text.get_text() for text in texts(flow.flow_figure())]
    assert set(BOXES) <= set(written) and set(BOXES) == set(ICONS)
    for *_, what, shape in ARROWS:
        assert any(what in one for one in written) and any(shape in one for one in written)
    assert {letter for letter, _ in LETTERS} <= set(written)


def test_lit_boxes_are_bold_and_notes_stand_on_the_page():
    figure = flow.flow_figure(["W", "replace"], {"encoder": "frozen"})
    bold = {text.get_text() for text in texts(figure) if text.get_fontweight() == "bold"}
    assert bold & set(BOXES) == {"W", "replace"}
    assert "frozen" in [text.get_text() for text in texts(figure)]


@pytest.mark.parametrize("arguments", [(["eye"],), ([], {"eye": "frozen"})], ids=["lit", "note"])
def test_an_unknown_box_is_refused_with_the_names_of_all(arguments):
    with pytest.raises(ValueError, match="no box eye; the boxes are picture, encoder, W, text"):
        flow.flow_figure(*arguments)


def test_alternative_text_says_what_is_lit_and_noted(monkeypatch):
    shown = []
    monkeypatch.setattr(flow, "show", lambda figure, alt, summary: shown.append((alt, summary)))
    show_flow(["W"], "W trains.", {"encoder": "frozen"})
    show_flow([], "Nothing yet.")
    assert "Lit in this notebook: W. Under encoder: frozen." in shown[0][0] and shown[0][1] == "W trains."
    assert shown[1][0].endswith("Lit in this notebook: nothing.")


def test_texts_do_not_run_out_of_their_boxes():
    figure = flow.flow_figure(list(BOXES))
    figure.draw_without_rendering()
    for text in texts(figure):
        if text.get_text() in BOXES:
            left, bottom = BOXES[text.get_text()]
            frame = figure.axes[0].transData.transform(
                [(left, bottom), (left + flow.BOX_WIDTH, bottom + flow.BOX_HEIGHT)]
            )
            extent = text.get_window_extent()
            assert frame[0][0] < extent.x0 and extent.x1 < frame[1][0], text.get_text()
