"""Notebook A1: two towers, byte pairs, a reader that ignores the image, shuffled bags of words, and figures."""

from collections import Counter

import numpy as np
import pytest
import torch
from lessons import lesson_a1
from lessons.lenses.words import ORDERS, typed_image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

from minivlm.checkpoint import load_checkpoint
from minivlm.config import W_ALONE, Stage
from minivlm.pretraining import loop
from minivlm.pretraining.encoder import contrast_loss
from minivlm.pretraining.language_model import Curriculum, LanguageModelTrainer
from minivlm.pretraining.reading_tasks import Lexicon, mosaic
from minivlm.pretraining.tokenizer import train_tokenizer
from minivlm.scenes.facts import Scene, Thing, random_stream, sample_scene
from minivlm.scenes.language import caption
from minivlm.scenes.samples import SceneSamples
from minivlm.train import Trainer

CAPTIONS = ["a red car in the park", "a green tree", "a panda", "a blue bird above a quiet lake"]
RECIPE = loop.Recipe(steps=3, batch_size=4, muon_lr=0.02, adam_lr=0.001, warmup=1)
CAR, TREE = Thing("car", "red", "left", "near", "medium"), Thing("tree", "green", "right", "far", "small")


@pytest.fixture
def towers(config, tokenizer):
    config.vision_config.hidden_act = "gelu"
    scenes = [sample_scene("train", index) for index in range(8)]
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    return lesson_a1.Towers(config.vision_config, tokenizer, images, scenes, batch_size=4)


class TestTowers:
    def test_the_contrast_is_the_librarys(self):
        """Of `transformers`' CLIP, with the same vectors; all captions differ."""
        text = CLIPTextConfig(vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                              num_attention_heads=2, max_position_embeddings=8, eos_token_id=2)  # fmt: skip
        vision = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32,
                  "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
        clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=12)).eval()
        ids = torch.randint(3, 30, (4, 6))
        ids[:, -1] = 2
        out = clip(input_ids=ids, pixel_values=torch.randn(4, 3, 8, 8), return_loss=True)
        ours = contrast_loss(out.image_embeds, out.text_embeds, clip.logit_scale, CAPTIONS)
        torch.testing.assert_close(ours, out.loss)

    def test_a_batch_is_a_function_of_its_number(self, towers):
        with torch.no_grad():
            first, again, other = (towers.step_loss(step)[0] for step in (3, 3, 4))
        assert first == again != other

    def test_cosines_do_not_depend_on_what_else_is_compared(self, towers):
        """A caption's padding, which depends on the longest one, changes nothing."""
        images, whole = towers.images[:3], towers.cosines(towers.images[:3], CAPTIONS)
        assert whole.shape == (3, 4) and np.abs(whole).max() <= 1 + 1e-6
        alone = np.concatenate([towers.cosines(images, [one]) for one in CAPTIONS], axis=1)
        np.testing.assert_allclose(alone, whole, atol=1e-5)

    def test_both_towers_learn_and_every_step_is_reported(self, towers):
        parts, calls = (towers.encoder.embeddings.patch_embedding.weight, towers.text.embed.weight, towers.scale), []
        before = [part.detach().clone() for part in parts]
        log = lesson_a1.train_briefly(towers, towers.step_loss, RECIPE, "towers", lambda *args: calls.append(args))
        assert [row["step"] for row in log] == [0, 1, 2]
        assert calls == [(row["step"] + 1, pytest.approx(row["loss"]), None) for row in log]
        assert not any(torch.equal(part, old) for part, old in zip(parts, before, strict=True))


def test_scenes_that_are_alike_differ_in_their_things():
    scenes = lesson_a1.alike("park", 2, 5)
    assert {(scene.setting, len(scene.things)) for scene in scenes} == {("park", 2)}
    assert len({scene.seed for scene in scenes}) == 5
    assert scenes[:3] == lesson_a1.alike("park", 2, 3)


def test_plain_captions_stay_and_are_true():
    scenes = [sample_scene("dev", index) for index in range(5)]
    captions = lesson_a1.plain_captions(scenes)
    assert captions == lesson_a1.plain_captions(scenes)
    for scene, line in zip(scenes, captions, strict=True):
        assert all(thing.kind in line for thing in scene.things)


def test_halved_images_are_means_of_four():
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    small = lesson_a1.halved(images)
    assert small.shape == (2, 2, 2, 3) and small.dtype == np.uint8
    assert small[1, 0, 1].tolist() == [round(images[1, :2, 2:, c].mean()) for c in range(3)]


def test_agreement_by_hand():
    park = Scene("park", (CAR,), 1)
    scenes = [park, Scene("park", (CAR, TREE), 2), Scene("snow", (TREE,), 3)]
    chosen = np.array([[0, 1, 0], [0, 1, 0], [0, 1, 0]])  # every image chooses the second caption
    assert lesson_a1.agreement(chosen, scenes) == pytest.approx(
        {"the setting": 2 / 3, "how many things": 1 / 3, "a kind of thing": 1, "its own caption": 1 / 3}
    )
    assert set(lesson_a1.agreement(np.eye(3), scenes).values()) == {1.0}


def test_hard_batches_are_of_one_setting_every_other_time(config, tokenizer, monkeypatch):
    config.vision_config.hidden_act = "gelu"
    scenes = [Scene(setting, (CAR,), seed) for seed in range(6) for setting in ("park", "snow")]
    captioned = []
    monkeypatch.setattr(lesson_a1, "caption", lambda scene, lang, rng: captioned.append(scene.setting) or scene.setting)
    towers = lesson_a1.Towers(config.vision_config, tokenizer, np.zeros((12, 8, 8, 3), np.uint8), scenes, 6, hard=True)
    settings = []
    for step in range(8):
        captioned.clear()
        towers.step_loss(step)
        settings.append(set(captioned))
    assert all(len(one) == 1 for one in settings[1::2]) and {"park", "snow"} == set().union(*settings[1::2])
    assert any(len(one) == 2 for one in settings[::2])
    with pytest.raises(ValueError, match="fewer than 7"):
        lesson_a1.Towers(config.vision_config, tokenizer, towers.images, scenes, 7, hard=True)


class TestBytePairs:
    def test_counted_by_hand(self):
        """low x5, lower x2, newest x6, widest x3: the example of Sennrich et al., section 3.2."""
        words = Counter({"low": 5, "lower": 2, "newest": 6, "widest": 3})
        merges = lesson_a1.learn_merges(words, 4)
        assert merges == [(("e", "s"), 9), (("es", "t"), 9), (("l", "o"), 7), (("lo", "w"), 7)]

    def test_a_run_of_letters_is_joined_from_the_left(self):
        assert lesson_a1.learn_merges(Counter({"aaa": 1, "b": 9}), 2) == [(("a", "a"), 2), (("aa", "a"), 1)]

    def test_the_librarys_merges_are_the_same(self):
        texts = lesson_a1.plain_captions([sample_scene("text", index) for index in range(500)])
        tokenizer = train_tokenizer(texts, 259 + 12)  # 256 bytes and three control tokens come before the merges
        mine = [pair for pair, _ in lesson_a1.learn_merges(lesson_a1.word_counts(tokenizer, texts), 12)]
        merges = [token for token, id_ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
                  if 259 <= id_ < 271]  # fmt: skip
        assert ["".join(pair) for pair in mine] == merges

    def test_cuts_can_be_read_and_lose_nothing(self, tokenizer):
        assert lesson_a1.visible("Ġcat") == "␣cat" and lesson_a1.visible("Ċ") == "↵"
        assert lesson_a1.visible("çº") == "‹e7 ba›"  # the first two bytes of 红
        text = "a bird 🐼 红"
        assert "".join(lesson_a1.pieces(tokenizer, text)).replace("␣", " ").startswith("a bird ")
        assert all(lesson_a1.pieces(tokenizer, text))


class TestBlindReader:
    def test_a_row_speaks_of_one_scene_and_shows_another(self, make_model, processor):
        reader = lesson_a1.BlindReader(make_model().language_model, processor, RECIPE, Curriculum(("mosaic",)), False)
        row, shown = reader.row("mosaic", 7)
        words = processor.tokenizer.decode(row.input_ids)
        assert caption(sample_scene("text", 7), "en", random_stream("blind reader", 7)) in words
        assert shown == sample_scene("text", 7 + lesson_a1.ANOTHER) != sample_scene("text", 7)
        assert row.input_ids.count(processor.image_token_id) == processor.num_image_tokens

    def test_it_learns_as_the_shipped_one_does(self, make_model, processor):
        model = make_model().language_model
        reader = lesson_a1.BlindReader(model, processor, RECIPE, Curriculum(("mosaic",)), False)
        assert reader.step_loss.__func__ is LanguageModelTrainer.step_loss
        log = lesson_a1.train_briefly(model, reader.step_loss, RECIPE, "blind")
        assert len(log) == 3 and all(np.isfinite(row["loss"]) for row in log)


class TestTypedBags:
    SCENE = Scene("park", (CAR, TREE), 5)

    def cells(self, model, processor, order, seed=5):
        return typed_image(model, processor.tokenizer, Scene("park", self.SCENE.things, seed), order)

    def test_in_place_it_is_the_mosaic(self, model, processor):
        ids, weights = mosaic(self.SCENE, 2, Lexicon.of(processor.tokenizer), random_stream("typed", 5))
        table = model.get_input_embeddings().weight
        by_hand = [sum(w * table[i] for i, w in zip(*cell, strict=True)) for cell in zip(ids, weights, strict=True)]
        torch.testing.assert_close(typed_image(model, processor.tokenizer, self.SCENE), torch.stack(by_hand).detach())

    def test_shuffled_cells_keep_their_words(self, model, processor):
        placed, moved = (self.cells(model, processor, order) for order in ORDERS[:2])
        assert not torch.equal(placed, moved)
        torch.testing.assert_close(placed[placed[:, 0].argsort()], moved[moved[:, 0].argsort()])

    def test_shuffled_words_are_the_same_words_elsewhere(self, model, processor):
        kept = []
        for seed in range(6):
            placed, dealt = (self.cells(model, processor, ORDERS[i], seed) for i in (0, 2))
            torch.testing.assert_close(placed.sum(dim=0), dealt.sum(dim=0))
            kept.append(torch.allclose(placed[placed[:, 0].argsort()], dealt[dealt[:, 0].argsort()]))
        assert not all(kept), "of four cells, by chance, some keep their words; not all of six scenes do"

    def test_another_order_is_refused(self, model, processor):
        with pytest.raises(ValueError, match="words shuffled"):
            self.cells(model, processor, "upside down")


def test_w_is_trained_as_stage_1_trains_it_and_nothing_is_kept(make_model, processor, tmp_path, capsys):
    parent = lesson_a1.save_base(tmp_path / "base", make_model(), processor)
    samples = SceneSamples("pretrain", 4, 8, features=torch.randn(4, 4, 16))
    stage = Stage("pretrain", W_ALONE, {"projector": 0.01}, steps=3, batch_size=4, warmup_steps=1, parent="base")
    losses, taught = lesson_a1.train_w(parent, samples, stage, seed=5, precision="fp32")
    assert capsys.readouterr().out == "" and [path.name for path in tmp_path.iterdir()] == ["base"]
    options = {"parent": parent, "seed": 5, "precision": "fp32"}
    log = Trainer(load_checkpoint(parent)[0], processor, samples, stage, tmp_path / "out", **options).fit()
    assert losses == [row["loss"] for row in log]
    torch.testing.assert_close(taught.projector.weight, load_checkpoint(tmp_path / "out")[0].projector.weight)


class TestWhatFiguresSay:
    """Every figure is described with its numbers, for those who do not see it."""

    @pytest.fixture(autouse=True)
    def shown(self, monkeypatch):
        figures = []
        monkeypatch.setattr(lesson_a1, "show", lambda figure, alt, summary: figures.append((alt, summary, figure)))
        return figures

    def test_the_square(self, shown, image):
        lesson_a1.show_matching([image] * 2, ["a car", "a cat"], np.array([[0.9, 0.1], [0.8, 0.5]]))
        [(alt, summary, _)] = shown
        assert "“a car” chooses number 1." in alt and "“a cat” chooses number 1." in alt
        assert summary == (
            "1 of 2 pictures choose their own caption; in the mean the cosine to it is 0.70, to the others 0.45."
        )

    def test_the_learning_order_has_a_line_for_each_name(self, shown):
        steps = {0: {"a": 0.1, "b": 0.5}, 5: {"a": 0.4, "b": 0.5}, 9: {"a": 0.9, "b": 0.9}}
        lesson_a1.show_learning_order(steps, "Learnt", "of the pictures")
        [(alt, summary, figure)] = shown
        assert alt == "Lines over the steps. Learnt: step 0, a 10%, b 50%. step 5, a 40%, b 50%. step 9, a 90%, b 90%."
        assert summary == "Step 5: a 40%, b 50%. Step 9: a 90%, b 90%."
        [axes] = figure.axes
        assert [line.get_ydata().tolist() for line in axes.lines] == [[0.1, 0.4, 0.9], [0.5, 0.5, 0.9]]
        heights = [text.xy[1] for text in axes.texts]
        assert [text.get_text() for text in axes.texts] == ["90% a", "90% b"]
        assert abs(heights[0] - heights[1]) >= 0.05, "names that would lie on each other are moved apart"

    def test_rounds(self, shown):
        rows = [(0, 9.0, "mosaic drill"), (20, 8.0, "list drill"), (0, 7.0, "text"), (20, 6.0, "mosaic roll call")]
        rows += [(0, 2.0, "text"), (20, 0.5, "text"), (40, 0.1, "text"), (60, 0.3, "mosaic")]
        lesson_a1.show_rounds([{"step": step, "loss": loss, "kind": kind} for step, loss, kind in rows], "rounds")
        [(alt, summary, figure)] = shown
        assert "It begins at 9.00." in alt
        assert summary == "The loss in the last round, in the median: conversations about mosaics 0.30, text 0.50."
        [axes] = figure.axes
        marked = {line.get_label(): list(line.get_xdata()) for line in axes.lines if line.get_label()[0] != "_"}
        recall, conversations = {"associative recall": [0, 20]}, {"conversations about mosaics": [102]}
        assert marked == recall | {"ordered listings": [41]} | conversations | {"text": [21, 42, 62, 82]}
        assert [text.get_text() for text in axes.texts] == ["round 1", "round 2", "round 3"]

    def test_two_tongues(self, shown):
        named = {"blind": [0.0, 0.02], "reader": [0.5, 0.6]}
        lesson_a1.show_two_tongues({"blind": [[2.0, 1.5]] * 2, "reader": [[2.0, 0.5]] * 2}, named)
        assert "blind: 1.50, 1.50; reader: 0.50, 0.50" in shown[0][0] and "reader: 50%, 60%" in shown[0][0]
        assert shown[0][1] == "Things named in the mean of 2 seeds: 1% and 55%; the seeds of one lie within 10%."

    def test_cuts_are_shown_with_their_numbers_and_as_text(self, monkeypatch):
        shown = []
        monkeypatch.setattr(lesson_a1, "display", lambda bundle, raw: shown.append(bundle))
        lesson_a1.show_cuts({"<b>": ["␣a", "红"]}, "vocabulary")
        assert shown[0]["text/plain"] == "<b>: 2 tokens: ␣a | 红"
        assert "&lt;b&gt;" in shown[0]["text/html"] and "<b>" not in shown[0]["text/html"]
