"""Lenses on the encoder: linear probes, twin patches, and the figures and the widget of notebook 01."""

import re

import numpy as np
import pytest
import torch
from lessons import lesson_01, probes
from lessons.lesson_01 import Twin
from lessons.plots.figures import BLUE, ORANGE, png
from lessons.probes import PatchExamples, cosines, fit_probe, pairs, things_of_patches, twin_of
from PIL import Image

from minivlm.pretraining.encoder import covered, normalised
from minivlm.scenes.drawing.draw import draw, layout
from minivlm.scenes.facts import Scene, Thing, sample_scene


def thing(kind="car", colour="red", place="left", distance="near", size="medium") -> Thing:
    return Thing(kind, colour, place, distance, size)


class TestExamples:
    def test_depths_begin_before_the_first_layer_and_end_with_what_w_is_given(self, model):
        images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
        tokens = probes.depths(model.vision, images)
        assert tokens.shape == (3, 3, 4, 16)  # the embeddings and two layers, I, N, Dv
        assert np.allclose(tokens[-1], model.vision(normalised(images)).numpy(), atol=1e-6)
        moved = probes.depths(model.vision, images[:, ::-1, ::-1])
        assert not np.allclose(tokens[0], moved[0])

    def test_many_images_go_through_in_parts(self, model):
        images = np.random.default_rng(0).integers(0, 256, (103, 8, 8, 3), dtype=np.uint8)
        whole, last = (probes.depths(model.vision, some) for some in (images, images[100:]))
        assert np.allclose(whole[:, 100:], last, atol=1e-6)

    def test_a_patch_that_two_things_share_is_nobodys(self):
        scene = Scene("park", (thing(), thing("dog", "blue")), seed=1)  # both in one slot: they overlap
        both = [set(covered(box, 8).tolist()) for box in layout(scene)]
        assert both[0] & both[1]
        assert set(things_of_patches(scene, 8)) == both[0] ^ both[1]
        assert all(things_of_patches(scene, 8)[patch].kind == "car" for patch in both[0] - both[1])

    def test_each_patch_is_labelled_with_its_thing(self, model):
        scenes = [Scene("park", (thing("panda", None),), 1), Scene("sky", (thing("kite", "blue", "right"),), 2)]
        examples = probes.patch_examples(model.vision, scenes)
        assert examples.features.shape[0] == 3 and examples.features.shape[2] == 16
        assert examples.of("kind").tolist() == ["panda" if index == 0 else "kite" for index in examples.images]
        assert set(examples.of("colour")) == {"no colour", "blue"}
        first = covered(layout(scenes[0])[0], 2)
        images = np.stack([np.asarray(draw(scenes[0]).resize((8, 8), Image.Resampling.BICUBIC))])
        assert np.allclose(examples.features[:, : len(first)], probes.depths(model.vision, images)[:, 0, first])


class TestProbe:
    def examples(self, readable: bool) -> PatchExamples:
        """Forty images of five patches; at depth 1 the kind is one of the numbers, or nothing is."""
        rng = np.random.default_rng(0)
        kinds = rng.choice(["car", "dog"], 200)
        features = rng.normal(size=(2, 200, 6))
        if readable:
            features[1, :, 3] += 12 * (kinds == "dog")
        return PatchExamples(features, kinds, np.full(200, "red"), np.repeat(np.arange(40), 5))

    def test_it_reads_what_is_there_and_guesses_where_nothing_is(self):
        assert fit_probe(self.examples(True), "kind", depth=1, held_out=10).accuracy > 0.95
        assert fit_probe(self.examples(True), "kind", depth=0, held_out=10).accuracy < 0.75
        assert fit_probe(self.examples(False), "kind", depth=1, held_out=10).accuracy < 0.75

    def test_held_out_images_fit_nothing(self):
        """The probe does not know what only the held-out images show, and only they are counted."""
        examples = self.examples(True)
        examples.kinds[-50:] = "cat"
        probe = fit_probe(examples, "kind", depth=1, held_out=10)
        assert probe.accuracy == probe.guessing == 0
        assert set(probe.reader.classes_) == {"car", "dog"}

    def test_guessing_is_the_commonest_word_of_the_fitted(self):
        examples = self.examples(True)
        examples.kinds[:] = ["car"] * 120 + ["dog"] * 60 + ["car"] * 5 + ["dog"] * 15
        assert fit_probe(examples, "kind", depth=1, held_out=4).guessing == pytest.approx(5 / 20)


class TestTwins:
    def test_cosines_of_known_directions(self):
        features = torch.tensor([[1.0, 0], [5, 0], [0, 2], [-3, 0]])
        expected = torch.tensor([[1.0, 1, 0, -1], [1, 1, 0, -1], [0, 0, 1, 0], [-1, -1, 0, 1]])
        assert torch.equal(cosines(features), expected)
        assert cosines(features.expand(2, 4, 2)).shape == (2, 4, 4)

    def test_a_twin_is_the_most_alike_that_is_not_near(self):
        cosine = torch.zeros(64, 64)
        cosine[9, 10], cosine[9, 27], cosine[9, 36], cosine[9, 63] = 0.9, 0.8, 0.7, 0.6  # 9 is row 1, column 1
        assert twin_of(cosine, 9) == 36  # 10 and 27 are one and two rows or columns away
        assert twin_of(cosine, 9, apart=1) == 10 and twin_of(cosine, 9, apart=2) == 27

    @pytest.mark.parametrize("alike", [("kind", "colour"), ("kind",), ("colour",), ()])
    def test_pairs_share_what_is_named_and_nothing_else(self, alike):
        scenes = pairs(alike, 30)
        assert scenes == pairs(alike, 30) and len(scenes) == 30
        for scene in scenes:
            left, right = scene.things
            assert (left.kind == right.kind) == ("kind" in alike)
            assert (left.colour == right.colour) == ("colour" in alike)
            assert (left.place, right.place) == ("left", "right")

    def test_an_encoder_that_sees_only_brightness_finds_twins(self, monkeypatch, model):
        """On a black field two white things are each other's twins; with one of them gone there is none."""
        scenes, side = pairs(("kind", "colour"), 4), 8

        def white_at(boxes_of):
            tokens = torch.ones(len(scenes), side * side, 2) * torch.tensor([1.0, 0])
            for i, scene in enumerate(scenes):
                for box in boxes_of(layout(scene)):
                    tokens[i, covered(box, side)] = torch.tensor([0.0, 1])
            return lambda vision, images: tokens[None].numpy()

        monkeypatch.setattr(probes, "depths", white_at(lambda boxes: boxes))
        assert probes.twin_rate(model.vision, scenes) == 1
        monkeypatch.setattr(probes, "depths", white_at(lambda boxes: boxes[:1]))
        assert probes.twin_rate(model.vision, scenes) < 0.5


class TestFigures:
    def test_the_cut_plate_shows_all_patches_and_those_chosen_large(self, no_missing_glyphs):
        image = draw(sample_scene("dev", 0), 64)
        figure = lesson_01.cut_plate(image, 8, (0, 1, 8, 9))
        _, apart, *large = figure.axes
        assert len(apart.images) == 64
        assert [frame.get_xy() for frame in apart.patches] == [(0, 0), (1, 0), (0, 1), (1, 1)]
        shown = [np.asarray(one.images[0].get_array()) for one in large]
        together = np.vstack([np.hstack(shown[:2]), np.hstack(shown[2:])])
        assert np.array_equal(together, np.asarray(image)[:16, :16])
        png(figure)  # `no_missing_glyphs` looks at what is written

    def test_areas_are_to_scale(self):
        parts = {"vision": 900, "projector": 100, "language_model": 400}
        page = lesson_01.to_scale({"small": parts, "large": {name: 4 * count for name, count in parts.items()}}).axes[0]
        areas = [square.get_width() * square.get_height() for square in page.patches]
        assert areas == pytest.approx([9 / 36, 4 / 36, 1 / 36, 1, 16 / 36, 4 / 36])
        assert "W\n100" in [text.get_text() for text in page.texts]

    def test_a_wrong_word_is_struck_through_bold_and_dashed(self):
        words = {"kind": {0: ("car", True), 1: ("dog", False)}}
        axes = lesson_01.reading_plate(draw(sample_scene("dev", 0), 64), words, 8).axes[0]
        right, wrong = axes.texts
        assert right.get_text() == "car" and wrong.get_text().replace("\u0336", "") == "dog" != wrong.get_text()
        assert (right.get_fontweight(), wrong.get_fontweight()) == ("normal", "bold")
        assert [frame.get_linestyle() for frame in axes.patches] == ["-", "--"]

    def test_light_falls_on_what_is_alike(self):
        cosine = torch.zeros(64, 64)
        cosine[0, 0] = cosine[0, 63] = 1
        axes = lesson_01.twin_plate([Twin(Image.new("RGB", (64, 64), "red"), cosine, 0, "red")]).axes[0]
        light = np.asarray(axes.images[0].get_array())
        assert light[60, 60].tolist() == [1, 0, 0] and light[30, 30].max() < 0.1
        chosen, twin = axes.patches
        assert chosen.get_xy() == (0, 0) and twin.get_xy() == (7, 7)
        assert chosen.get_linestyle() != twin.get_linestyle()

    def test_the_lines_of_the_curve_can_be_distinguished_without_colour(self):
        axes = lesson_01.probe_curve({"kind": [0.1, 0.9], "colour": [0.5, 0.8]}, {"kind": 0.1, "colour": 0.2}).axes[0]
        lines = [line for line in axes.lines if line.get_marker() not in ("", "None", None)]
        assert [(line.get_marker(), line.get_color()) for line in lines] == [("o", BLUE), ("s", ORANGE)]
        written = [text.get_text() for text in axes.texts]
        assert {"kind", "colour", "10%", "90%", "50%", "80%", "guessing"} <= set(written)


class TestChooser:
    def test_the_map_follows_the_sliders(self):
        cosine = torch.zeros(64, 64)
        cosine[9, 63], cosine[17, 7] = 0.75, 0.5
        row, column, view = lesson_01.twin_chooser(draw(sample_scene("dev", 0), 64), cosine, 9).children
        assert (row.value, column.value) == (1, 1)
        status = "Patch 9 (row 1, column 1): most like patch 63 (row 7, column 7), cosine 0.75."
        assert f'<p role="status">{status}</p>' in view.value
        assert re.search(r'<img src="data:image/png;base64,[^"]+" alt="[^"]*' + re.escape(status), view.value)
        row.value = 2
        assert "Patch 17 (row 2, column 1): most like patch 7 (row 0, column 7), cosine 0.50." in view.value
        column.value = 0
        assert "Patch 16 (row 2, column 0)" in view.value
