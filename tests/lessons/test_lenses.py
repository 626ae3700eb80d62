"""Attention from words to patches: by hand, against the library's own attentions in `generate`, and how it is shown."""

import io

import numpy as np
import pytest
import torch
from lessons import lesson_04
from lessons.lenses import attention as lenses
from lessons.lenses.words import things_patches
from lessons.plots.figures import png, readable
from PIL import Image

from minivlm.scenes.facts import sample_scene
from minivlm.scenes.vocabulary import KIND_WORDS

QUESTION = "What is in this picture?"
ANSWER = "a small blue bird"


def messages(*images, question=QUESTION) -> list[dict]:
    shown = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]


def prompt_of(processor, conversation) -> dict:
    """The conversation up to the head of the answer, ready for `generate`."""
    return processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def zero_queries(model) -> None:
    """Queries of zeros: every position attends equally to all positions up to itself."""
    for layer in model.language_model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()


class TestByHand:
    @pytest.mark.parametrize("before", [[], [{"role": "assistant", "content": "a car"}, *messages(question="Which?")]])
    def test_even_attention_is_one_over_what_can_be_seen(self, model, processor, image, before):
        """Also of a question that is asked later in a conversation."""
        zero_queries(model)
        conversation = [*messages(image), *before]
        looks = lenses.attention_to_patches(model, processor, conversation, ANSWER)
        prompt = prompt_of(processor, conversation)["input_ids"].shape[1]
        words = lenses.words_of(processor.tokenizer, ANSWER)
        # a token is predicted at the position before it, which also sees all earlier ones
        expected = [np.mean([1 / (prompt + token) for token in tokens]) for _, tokens in words]
        assert looks.words == ANSWER.split()
        np.testing.assert_allclose(looks.patches, np.tile(np.array(expected)[:, None], (1, 4)), rtol=1e-6)

    def test_the_second_image_has_columns_of_its_own(self, model, processor, image):
        other = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        arguments = (model, processor, messages(image, other), ANSWER)
        first, second = (lenses.attention_to_patches(*arguments, image=index).patches for index in (0, 1))
        assert not np.allclose(first, second) and (first.sum(axis=1) + second.sum(axis=1) < 1).all()


class TestAgainstTheLibrary:
    @pytest.mark.parametrize("layer", [None, 0, 1, -1])
    def test_what_generate_hands_out_step_by_step(self, model, processor, image, layer):
        """`generate` uses the cache, one token at a time: the attentions of step k have the row of token k."""
        batch = prompt_of(processor, messages(image))
        ids = processor.tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
        forced = iter(ids)
        steps = []

        def force(_ids, scores):
            only = torch.full_like(scores, -torch.inf)
            only[:, next(forced)] = 0
            return only

        with lenses.eager_attention(model.language_model):
            options = {"max_new_tokens": len(ids), "do_sample": False, "logits_processor": [force]}
            out = model.generate(**batch, **options, output_attentions=True, return_dict_in_generate=True)
        assert out.sequences[0, batch["input_ids"].shape[1] :].tolist() == ids
        columns = (batch["input_ids"][0] == processor.image_token_id).nonzero()[:, 0]
        for step in out.attentions:
            table = torch.stack([one[0, :, -1] for one in step]).mean(dim=1)  # (L, T)
            steps.append((table.mean(dim=0) if layer is None else table[layer])[columns])
        words = lenses.words_of(processor.tokenizer, ANSWER)
        expected = [torch.stack([steps[token] for token in tokens]).mean(0) for _, tokens in words]
        looks = lenses.attention_to_patches(model, processor, messages(image), ANSWER, layer=layer)
        torch.testing.assert_close(torch.tensor(looks.patches), torch.stack(expected), rtol=1e-5, atol=1e-7)

    def test_features_instead_of_pixels(self, model, processor, image):
        features = model.vision(processor.pixels([image]))
        bare = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        mine = lenses.attention_to_patches(model, processor, bare, ANSWER, patch_features=features)
        by_pixels = lenses.attention_to_patches(model, processor, messages(image), ANSWER)
        np.testing.assert_array_equal(mine.patches, by_pixels.patches)

    def test_the_fast_attention_is_back_afterwards(self, model, processor, image):
        before = model.language_model.config._attn_implementation
        lenses.attention_to_patches(model, processor, messages(image), ANSWER)
        assert model.language_model.config._attn_implementation == before == "sdpa"
        with pytest.raises(RuntimeError, match="stop"), lenses.eager_attention(model.language_model):
            assert model.language_model.config._attn_implementation == "eager"
            raise RuntimeError("stop")
        assert model.language_model.config._attn_implementation == "sdpa"


class TestThings:
    def test_looking_everywhere_alike_is_chance(self, model, processor):
        """With zero queries attention is equal, so the thing gets its share of patches."""
        zero_queries(model)
        scenes = [sample_scene("dev", i) for i in range(3)]
        looks = lesson_04.attention_to_things(model, processor, scenes, torch.randn(3, 4, 16))
        assert looks.on_thing == pytest.approx(looks.by_chance, rel=1e-5) and 0 < looks.by_chance < 1
        assert 0 < looks.on_image < 4 / 5

    def test_by_hand(self, model, processor, monkeypatch):
        scene = next(scene for scene in (sample_scene("dev", i) for i in range(40)) if len(scene.things) == 1)
        thing, patches = things_patches(scene, 4)[0]
        row = np.array([0.1, 0.2, 0.3, 0.2])
        words = ["a", KIND_WORDS["en"][thing.kind].split()[-1].upper(), "somewhere"]
        looks = lenses.Looks(words, np.stack([np.zeros(4), row, np.ones(4)]))
        monkeypatch.setattr(lesson_04, "attention_to_patches", lambda *_, **__: looks)
        result = lesson_04.attention_to_things(model, processor, [scene], torch.zeros(1, 4, 16))
        assert result == pytest.approx((0.8, row[patches].sum() / 0.8, len(patches) / 4))

    def test_no_scene_is_refused(self, model, processor):
        with pytest.raises(ValueError, match="no description names a thing"):
            lesson_04.attention_to_things(model, processor, [], torch.zeros(0, 4, 16))


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layer": 2}, "no layer 2; the language model has 2"),
            ({"layer": -3}, "no layer -3"),
            ({"image": 1}, "no image 1; the conversation has 1"),
            ({"image": -1}, "no image -1"),
        ],
    )
    def test_what_is_not_there(self, model, processor, image, options, message):
        with pytest.raises(ValueError, match=message):
            lenses.attention_to_patches(model, processor, messages(image), ANSWER, **options)

    def test_an_answer_without_words(self, model, processor, image):
        with pytest.raises(ValueError, match="no word"):
            lenses.attention_to_patches(model, processor, messages(image), " \n")


class TestWords:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("a red car, and a green tree.", ["a", "red", "car", ",", "and", "a", "green", "tree", "."]),
            ("  zebra\n\nquagga42  ", ["zebra", "quagga42"]),
            ("", []),
            ("<image>", ["<", "image", ">"]),
        ],
    )
    def test_latin(self, tokenizer, text, words):
        assert [word for word, _ in lenses.words_of(tokenizer, text)] == words

    def test_chinese_keeps_its_characters_whole(self, tokenizer):
        pieces = lenses.words_of(tokenizer, "海滩上有斑马。")  # 斑 is three bytes that this tokenizer never merged
        assert "".join(word for word, _ in pieces) == "海滩上有斑马。"
        assert "\ufffd" not in "".join(word for word, _ in pieces)
        assert len(dict(pieces)["斑"]) == 3

    @pytest.mark.parametrize("text", ["a zebra, 海滩上有斑马。", "x y", "red-green 7x"])
    def test_every_token_is_in_at_most_one_word_and_only_blanks_in_none(self, tokenizer, text):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        used = [token for _, tokens in lenses.words_of(tokenizer, text) for token in tokens]
        assert used == sorted(set(used))
        assert all(not tokenizer.decode([ids[i]]).strip() for i in set(range(len(ids))) - set(used))


class TestFigures:
    looks = lenses.Looks(
        ["On", ",", "the", "左"], np.array([[0.1, 0.2, 0, 0], [0.9, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.5]])
    )

    def test_the_strongest_words_in_the_order_of_the_answer(self):
        assert lenses.strongest(self.looks, 2) == [0, 3]
        assert lenses.strongest(self.looks) == [0, 2, 3]

    def test_the_patch_looked_at_most_keeps_its_colours(self):
        red = Image.new("RGB", (30, 20), (200, 0, 0))
        pixels = np.asarray(lenses.faded(red, np.array([0.4, 0.1, 0.0, 0.0]), side=4)).astype(int)
        assert pixels[0, 0].tolist() == [200, 0, 0]
        half = [200 + 0.4 * 44, 0.4 * 242, 0.4 * 238]  # the root of a quarter: half of it remains
        np.testing.assert_allclose(pixels[0, 3], half, atol=1.5)
        np.testing.assert_allclose(pixels[3, 0], [200 + 0.8 * 44, 0.8 * 242, 0.8 * 238], atol=1.5)
        # no attention at all: all is faded
        pixels = np.asarray(lenses.faded(Image.new("RGB", (4, 4)), np.zeros(4), side=4))
        assert (pixels == pixels[0, 0]).all() and pixels[0, 0, 0] > 150

    @pytest.mark.parametrize(
        ("patch", "name"),
        [(0, "top left"), (7, "top right"), (27, "middle"), (31, "middle right"), (60, "bottom middle")],
    )
    def test_positions_in_words(self, patch, name):
        assert lenses.where(patch, 64) == name

    def test_each_word_has_a_panel_with_its_share(self, image):
        axes = lenses.attention_figure(image, self.looks).axes
        assert [one.get_xlabel() for one in axes] == ["30% on the picture", "0% on the picture", "50% on the picture"]
        frame = axes[0].patches[0]
        assert frame.get_xy() == (111.5, -0.5) and frame.get_width() == 112
        with pytest.raises(ValueError, match="no word is chosen"):
            lenses.attention_figure(image, self.looks, [])

    def test_a_small_thing_keeps_its_colour_when_stored(self):
        """Also in a figure of many colours, of which 256 are kept."""
        ramp = np.linspace(0, 255, 224).astype(np.uint8)
        pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 128), axis=-1).astype(np.uint8)
        pixels[:14, :14] = (250, 220, 0)
        figure = lenses.attention_figure(Image.fromarray(pixels), lenses.Looks(["a"], np.eye(1, 256)), [0])
        stored = np.asarray(Image.open(io.BytesIO(png(figure))).convert("RGB")).astype(int)
        assert np.abs(stored - (250, 220, 0)).max(axis=-1).min() < 12

    def test_it_is_described_in_words(self, image, monkeypatch):
        shown = []
        monkeypatch.setattr(lenses, "show", lambda figure, alt, summary: shown.append((alt, summary)))
        lenses.show_attention(image, self.looks, [0, 3])
        assert shown[0][0].endswith("Looked at most: On: top right; 左: bottom right")
        assert shown[0][1].startswith("2 words")

    def test_two_models_in_rows_with_the_same_words(self, image, monkeypatch):
        other = self.looks._replace(patches=self.looks.patches[:, ::-1])
        models = {"before": self.looks, "after": other}
        panels = lesson_04.compared_figure(image, models, [0, 3]).axes
        assert [one.get_title() for one in panels[:2]] == ["On", "左" if readable("左") else "word 4"]
        assert [one.get_ylabel() for one in panels] == ["before", "", "after", ""]
        assert panels[2].patches[0].get_xy() == (-0.5, 111.5)
        shown = []
        monkeypatch.setattr(lesson_04, "show", lambda figure, alt, summary: shown.append((alt, summary)))
        lesson_04.show_compared(image, models, [0, 3])
        assert "after, looked at most: On: bottom left; 左: top left." in shown[0][0]
        assert shown[0][1].endswith("before 40%, after 40%.")

    @pytest.mark.parametrize("chosen", [[], [0]])
    def test_different_words_cannot_be_compared(self, image, chosen):
        other = self.looks._replace(words=["In", *self.looks.words[1:]]) if chosen else self.looks
        with pytest.raises(ValueError, match="at least one word"):
            lesson_04.compared_figure(image, {"before": self.looks, "after": other}, chosen)
