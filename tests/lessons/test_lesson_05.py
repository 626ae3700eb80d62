"""What notebook 05 shows: marks where an answer errs, things hidden and nothing else, windows, figures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lessons import lesson_05 as h
from lessons.plots import estimate_panels

from minivlm.evaluation import VARIANTS, estimate
from minivlm.generate import ask, reply
from minivlm.scenes.drawing.draw import draw, layout
from minivlm.scenes.facts import Scene, Thing, sample_scene

KITE = Thing("kite", "red", "left", "near", "medium")
BOAT = Thing("boat", "white", "right", "far", "small")
BEACH = Scene("beach", (KITE, BOAT), 22)


class TestMarked:
    def test_what_is_not_true_is_struck_through_and_says_why(self):
        page = h.marked_html("a red kite and a blue boat and a dog on a beach", BEACH)
        assert page.count("<del>") == page.count("✗") == 2
        assert "<del>blue boat</del> <b>✗</b> <small>(the boat here is white)</small>" in page
        assert "<del>dog</del> <b>✗</b> <small>(there is no dog here)</small>" in page
        assert "<del>" not in h.marked_html("a red kite and a white boat on a beach", BEACH)
        assert "<script>" not in h.marked_html("<script> a red kite", BEACH)

    def test_the_table_has_alternative_text_and_every_answer(self, monkeypatch):
        shown = []
        monkeypatch.setattr(h, "display", lambda bundle, raw: shown.append(bundle))
        h.show_marked({"sunset": BEACH}, {"first": ["a kite"], "second": ["a dog"]})
        (bundle,) = shown
        assert 'alt="sunset: a red kite, a white boat; beach"' in bundle["text/html"]
        assert bundle["text/plain"] == "first: a kite\nsecond: a dog"
        with pytest.raises(ValueError):
            h.show_marked({"sunset": BEACH}, {"first": []})


class TestHiding:
    def test_only_the_box_changes(self):
        whole = np.asarray(draw(BEACH)).astype(int)
        left, top, right, bottom = h.reach(layout(BEACH)[0])
        for grey in (True, False):
            changed = (np.asarray(h.hide(BEACH, 0, grey)) != whole).any(axis=-1)
            assert changed[top:bottom, left:right].any()
            changed[top:bottom, left:right] = False
            assert not changed.any()
        assert (np.asarray(h.hide(BEACH, 0, grey=True))[top:bottom, left:right] == 128).all()

    def test_a_thing_that_stands_alone_leaves_no_trace(self):
        """Hidden, one after the other, nothing but the setting remains: shadows are in the replaced part, too."""
        for index in range(12):
            scene = sample_scene("dev", index, things=1)
            assert h.stands_alone(scene, 0)
            empty = np.asarray(draw(replace(scene, things=()))).astype(int)
            assert np.abs(np.asarray(h.hide(scene, 0)).astype(int) - empty).max() <= 2  # the faint edge of a shadow

    def test_a_neighbour_that_would_be_cut_is_seen(self):
        assert h.stands_alone(Scene("beach", (KITE, replace(BOAT, distance="near", size="medium")), 22), 0)
        colours = {"left": "red", "middle": "blue", "right": "pink"}
        crowd = tuple(Thing("car", colour, place, "near", "medium") for place, colour in colours.items())
        assert not all(h.stands_alone(Scene("street", crowd, seed), 1) for seed in range(12))

    def test_the_reach_stays_in_the_image(self):
        assert h.reach((0.0, 0.0, 0.5, 0.99)) == (0, 0, 132, 224)


class TestOcclusion:
    def test_drops_are_means_over_the_windows_that_hide_a_patch(self):
        occlusion = h.Occlusion("", "kite", 1.0, np.array([[1.0, 0.4], [1.0, 1.0]]), window=2)
        assert occlusion.drops.shape == (3, 3)
        # the top right window (its corner at row 0, column 1) takes 0.6; the middle patch is under all four windows
        assert np.allclose(occlusion.drops, [[0, 0.3, 0.6], [0, 0.15, 0.3], [0, 0, 0]])

    def test_word_chances_are_those_of_the_model(self, model, processor, image):
        prompt, text = "What is in this picture?", "a red car"
        features = model.vision(processor.pixels([image]))
        actual = h.word_chances(model, processor, features, prompt, text, (6, 9))
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        batch = processor.apply_chat_template(ask(prompt, image), **options)
        tokens = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        chance = 1.0
        for i, (start, end) in enumerate(tokens["offset_mapping"]):  # one token after the other, by hand
            if end > 6 and start < 9:
                ids = torch.cat([batch["input_ids"], torch.tensor([tokens["input_ids"][:i]]).long()], dim=1)
                logits = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits[0, -1]
                chance *= logits.softmax(-1)[tokens["input_ids"][i]].item()
        assert actual == [pytest.approx(chance, rel=1e-4)]

    def test_occlude_hides_each_window_once(self, model, processor, image, monkeypatch):
        monkeypatch.setattr(h, "reply", lambda *_: "A red car.")
        result = h.occlude(model, processor, image, "What?", "car", window=1)
        assert result.word == "car" and result.hidden.shape == (2, 2)
        covered = image.copy()
        covered.paste(h.GREY_BOX, (4, 0, 8, 4))  # the second patch of the first row
        features = model.vision(processor.pixels([covered]))
        alone = h.word_chances(model, processor, features, "What?", "A red car.", (6, 9))
        assert result.hidden[0, 1] == pytest.approx(alone[0], rel=1e-4)

    def test_a_kind_that_is_not_named_is_refused(self, model, processor, image):
        answer = reply(model, processor, ask("What?", image))
        with pytest.raises(ValueError, match="does not name a panda"):
            h.occlude(model, processor, image, "What?", "panda")
        assert "panda" not in answer


def some_results():
    """Results of all arms with values that tell them apart: arm number a, seed s."""
    arms = {}
    for a, arm in enumerate(VARIANTS):
        runs = []
        for s in range(3):
            one = {"value": 0.1 * a + 0.01 * s}
            scored = dict.fromkeys(("precision", "recall", "chair_i", "chair_s", "length"), one)
            runs.append({"sft": {"en": scored | {"sampled": scored}}})
        arms[arm] = {"runs": runs}
    return {"variants": arms}


class TestFigures:
    def test_intervals_show_every_value_or_say_that_there_is_none(self):
        one, none = estimate([(0, 1, 2), (1, 1, 1)]), estimate([])
        figure = estimate_panels({"model": {"a": one}, "blank": {"a": none}}, {"a": "A"})
        assert [text.get_text() for text in figure.axes[0].texts] == ["0.67", "names nothing"]
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["model", "blank"]

    def test_by_mention_draws_the_mean_and_the_band_of_the_seeds(self):
        axes = h.by_mention({"noise": [[0.0, 0.2], [0.2, 0.4]], "none": [[0.0, None]]}).axes[0]
        assert axes.lines[0].get_ydata() == pytest.approx([0.1, 0.3])
        assert axes.lines[1].get_xdata() == pytest.approx([1]), "nothing was mentioned second"
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["noise", "none"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2 and later"]

    def test_experiment_panels_show_all_seeds_and_the_live_run(self):
        figure = h.experiment_panels(some_results(), {"noise 30%": {"sampled chair_i": 0.5}})
        assert len(figure.axes) == 9
        noise = figure.axes[1]
        assert [label.get_text() for label in noise.get_xticklabels()] == ["long", "noise 10%", "noise 30%"]
        assert noise.lines[1].get_ydata() == pytest.approx([0.0, 0.01, 0.02])
        assert [line.get_ydata()[0] for line in noise.lines if line.get_marker() == "*"] == [0.5]
        assert [text.get_text() for text in noise.texts].count("≠") == 2

    def test_occlusion_plate(self):
        occlusion = h.Occlusion("a red kite", "kite", 1.0, np.full((6, 6), 0.5), 3)
        figure = h.occlusion_plate(BEACH, 0, occlusion, {"whole": "a", "box": "b", "gone": "c"})
        titles = [axes.get_title(loc="left") for axes in figure.axes[:4]]
        assert titles == ["whole", "box", "gone", "What “kite” hangs on"]
