"""Sequences as pictures: every run has its length, and a cache computes one position per new token."""

import pytest
import torch
from lessons.lesson_02 import LOOKS, answers, cache_plate, prompts, rows_plate, user
from lessons.plots.figures import png

IMAGE = 9


def bars(figure) -> list[tuple[int, int, float, float]]:
    """Row, start, length and height of each bar of a strip, from top to bottom; the legend left out."""
    rows = [patch for patch in figure.axes[0].patches if patch.get_height() > 0.5]
    return [(patch.get_y(), patch.get_x(), patch.get_width()) for patch in rows]


def test_messages_prompts_and_answers(model, processor, picture):
    asked = user("Look:", picture, "What is it?")
    assert [part["type"] for part in asked[0]["content"]] == ["text", "image", "text"]
    assert user(None)[0]["content"] == [{"type": "image"}]
    batch = prompts(processor, asked, user("What?"))
    assert batch["images_per_row"].tolist() == [1, 0] and batch["attention_mask"][1, 0] == 0
    head = processor.tokenizer.encode("assistant\n")
    assert batch["input_ids"][:, -len(head) :].tolist() == [head, head]
    together = answers(model, processor, batch, tokens=5)
    alone = answers(model, processor, prompts(processor, asked), tokens=5)
    assert len(together) == 2 and together[0] == alone[0]
    shorter = prompts(processor, user("What?"), padding_side="right")
    assert torch.equal(shorter["attention_mask"], torch.ones_like(shorter["input_ids"]))


def test_runs_of_words_placeholders_and_padding():
    ids = torch.tensor([[0, 0, 5, 9, 9, 9, 6], [9, 9, 9, 5, 9, 9, 9]])
    figure = rows_plate(ids, IMAGE, (ids != 0).long(), ["one picture", "two"])
    assert bars(figure) == [(0, 0, 2), (0, 2, 1), (0, 3, 3), (0, 6, 1), (1, 0, 3), (1, 3, 1), (1, 4, 3)]
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written[:6] == ["row 0", "2", "1", "3", "1", "one picture"] and {"row 1", "two", *LOOKS} <= set(written)
    assert png(figure)


def test_an_image_token_at_padding_is_padding():
    figure = rows_plate(torch.tensor([[IMAGE, IMAGE, 5]]), IMAGE, torch.tensor([[0, 1, 1]]))
    padding, image, words = figure.axes[0].patches[:3]
    assert padding.get_hatch() and not image.get_hatch() and not words.get_hatch()
    assert [patch.get_width() for patch in (padding, image, words)] == [1, 1, 1]


@pytest.mark.parametrize("steps", [1, 4])
def test_positions_computed_with_and_without_a_cache(steps):
    figure = cache_plate([False, True, True, False, False], steps)
    without, cached = figure.axes
    counts = [5 + step for step in range(steps)]
    assert [text.get_text() for text in without.texts if text.get_text().isdigit()] == [str(count) for count in counts]
    assert [text.get_text() for text in cached.texts if text.get_text().isdigit()] == ["5", *["1"] * (steps - 1)]
    for axes, title in ((without, f"without a cache: {sum(counts)}"), (cached, f"with a cache: {5 + steps - 1}")):
        assert axes.get_title(loc="left") == f"{title} positions computed"
    assert png(figure)
