"""What notebook 03 shows: patches as words, the path of the gradient, W at every step; its figures and widgets."""

import html
import re

import numpy as np
import pytest
import torch
from lessons import lesson_03, plots
from lessons.lenses import words as lenses
from lessons.lenses.blocks import gradient_map, moved
from lessons.plots import figures
from lessons.widgets.explorers import Album, Moment, PatchExplorer, StepExplorer, drawing
from runs import some_estimate
from training import stage

from minivlm.config import IGNORE_INDEX, PROMPTS, preset_config
from minivlm.data.samples import Sample
from minivlm.model import MiniVLMForConditionalGeneration, set_trainable
from minivlm.pretraining.tokenizer import train_tokenizer
from minivlm.processor import MiniVLMProcessor
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.facts import Scene, Thing, sample_scene
from minivlm.scenes.language import noun_phrase
from minivlm.scenes.vocabulary import COLOUR_WORDS, DISTANCE_WORDS, KIND_WORDS, PLACE_WORDS, SETTING_WORDS

RED_CAR = Scene("park", (Thing("car", "red", "left", "near", "big"),), seed=1)
PANDA = Scene("snow", (Thing("panda", None, "right", "far", "small"),), seed=2)
N = 64


@pytest.fixture(scope="module")
def world():
    """A random model whose small vocabulary has every word of the world as a token, and its processor."""
    facts = (COLOUR_WORDS, KIND_WORDS, PLACE_WORDS, DISTANCE_WORDS)
    words = [word for table in facts for row in table.values() for word in row.values()]
    words += [row[2] for table in SETTING_WORDS.values() for row in table.values()]
    things = [noun_phrase(kind, "red", lang) for lang in KIND_WORDS for kind in KIND_WORDS[lang]]
    tokenizer = train_tokenizer([f"a {text}?" for text in words + things for _ in range(4)], 600)
    config = preset_config("scenes", tokenizer.vocab_size)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    torch.manual_seed(0)
    return MiniVLMForConditionalGeneration(config).eval(), MiniVLMProcessor.for_config(config, tokenizer)


@pytest.fixture(scope="module")
def patch_features():
    """Random features of two images, (I, N, Dv)."""
    return torch.randn(2, N, 192, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def no_chinese(monkeypatch):
    monkeypatch.setattr(figures, "CHINESE_FONTS", ())
    figures.chinese_font.cache_clear()
    yield
    figures.chinese_font.cache_clear()


def embedding(world, word: str) -> torch.Tensor:
    """The row of a word in the embedding table; English words carry their space."""
    model, processor = world
    return model.get_input_embeddings().weight.detach()[processor.tokenizer.encode(word)[-1]]


class TestWords:
    def test_a_word_is_nearest_to_itself_at_any_length(self, world):
        model, processor = world
        ids = [processor.tokenizer.encode(word)[-1] for word in (" car", "汽车", "?")]
        embeds = model.get_input_embeddings().weight[ids].detach() * torch.tensor([[3.0], [0.1], [1.0]])
        assert lenses.nearest_tokens(model, embeds).argmax(-1).tolist() == ids
        few = lenses.nearest_few(model, processor.tokenizer, embeds, count=3)
        assert [row[0].word for row in few] == ["car", "汽车", lenses.NO_WORD]
        assert [row[0].english for row in few] == ["car", "car", lenses.NO_WORD]
        for row in few:
            cosines = [near.cosine for near in row]
            assert len(row) == 3 and cosines[0] == pytest.approx(1) and cosines == sorted(cosines, reverse=True)

    def test_a_patch_is_read_against_what_covers_it(self, world):
        model, processor = world
        covered = lenses.things_patches(RED_CAR, N)[0][1]
        for word, on_the_car, behind in ((" red", True, False), ("公园", True, True), (" snow", False, False)):
            read = lenses.read_patches(model, processor.tokenizer, RED_CAR, embedding(world, word).expand(N, -1))
            assert {read[patch].true for patch in covered} == {on_the_car}
            assert {read[patch].true for patch in set(range(N)) - set(covered.tolist())} == {behind}
            assert {patch.word for patch in read} == {word.strip()}
            english = {"red": "red", "公园": "park", "snow": "snow"}[word.strip()]
            assert read[0].english == english

    def test_near_things_stand_before_far_ones(self, world):
        scene = Scene("park", (*RED_CAR.things, Thing("dog", "blue", "left", "far", "small")), 1)
        assert [thing.distance for thing, _ in lenses.things_patches(scene, N)] == ["far", "near"]

    def test_patches_that_name_their_thing_are_counted_by_what_they_say(self, world):
        model, processor = world
        total = len(lenses.things_patches(RED_CAR, N)[0][1])
        words = dict(zip(lenses.FACTS, (" car", "红色", " left", "近处", " park"), strict=True))
        for fact, word in (words | {lenses.UNTRUE: " dog"}).items():
            counts = lenses.facts_named(model, processor.tokenizer, RED_CAR, embedding(world, word).expand(N, -1))
            assert counts == dict.fromkeys((*lenses.FACTS, lenses.UNTRUE), 0) | {fact: total}

    def test_a_image_typed_in_words_is_read_as_these_words(self, world):
        model, processor = world
        for scene in (RED_CAR, PANDA, sample_scene("dev", 3)):
            features = lenses.typed_image(model, processor.tokenizer, scene)
            assert features.shape == (N, 256)
            counts = lenses.facts_named(model, processor.tokenizer, scene, features)
            # a patch on a border may carry the other thing's words
            assert counts[lenses.UNTRUE] <= 0.2 * counts.total()

    def test_reading_aloud_is_the_models_own_answer(self, world, patch_features):
        model, processor = world
        texts = lenses.read_aloud(model, processor, model.projector(patch_features), PROMPTS["en"], max_new_tokens=5)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPTS["en"]}]}]
        ids = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_tensors="pt")
        for features, text in zip(patch_features, texts, strict=True):
            out = model.generate(input_ids=ids, patch_features=features[None], max_new_tokens=5, do_sample=False)
            assert text == processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def test_how_far_weights_moved(self):
        before = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
        assert moved(before, before) == 0
        after = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([4.0]), "other": torch.ones(9)}
        assert moved(before, after) == pytest.approx(1 / 5)


def test_the_gradient_goes_through_the_frozen_layers_and_ends_in_w(model, make_batch):
    """In the tiny model: N = 4, two layers; the row is one token, two of text, the image, three of text."""
    set_trainable(model, stage("pretrain"))
    batch = make_batch([1], "right")
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    batch["labels"][0, -1] = batch["input_ids"][0, -1]
    norms = gradient_map(model, batch)
    length = batch["input_ids"].shape[1]
    assert norms.shape == (3, length)
    # one label, at the last token: its loss is computed one position before it, and nothing flows to what comes later
    assert norms[-1].nonzero().flatten().tolist() == [length - 2]
    assert (norms[:, -1] == 0).all() and (norms[0, : length - 1] > 0).all()
    kept = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert kept == {"projector.weight"}
    # the oracle: W's gradient is the sum over patches of (what arrives there) x (the patch's features)
    features = model.vision(batch["pixel_values"])  # (1, N, Dv)
    embeds = model.embed(batch["input_ids"], patch_features=features).detach().requires_grad_()
    model.language_model(inputs_embeds=embeds, labels=batch["labels"]).loss.backward()
    arrived = embeds.grad[batch["input_ids"] == model.config.image_token_id]  # (N, Dl)
    assert torch.allclose(model.projector.weight.grad, arrived.T @ features[0], atol=1e-6)


class TestAlbum:
    def test_it_keeps_w_at_the_steps_asked_for(self, model):
        album, weight = Album(model, [2, 4]), model.projector.weight
        first = weight.detach().clone()
        for step in range(1, 5):
            weight.data.fill_(float(step))
            album(step, 0.0, model)
        assert album.steps == [0, 2, 4]
        with album.at(2, model):
            assert (weight == 2).all()
        assert (weight == 4).all()
        with album.at(0, model):
            assert torch.equal(weight, first)
        assert torch.equal(album[0], first) and (album[4] == 4).all()

        with pytest.raises(KeyError), album.at(0, model):
            raise KeyError
        assert (weight == 4).all(), "W comes back whatever happens"
        with pytest.raises(ValueError, match="step 3 was not kept; choose one of 0, 2, 4"), album.at(3, model):
            pass


class TestWidgets:
    @pytest.fixture
    def patches(self, world, patch_features):
        return PatchExplorer(*world, [RED_CAR, PANDA], patch_features)

    @pytest.fixture
    def steps(self, world, patch_features):
        model, _ = world
        album = Album(model, [1, 2])
        for step in (1, 2):
            model.projector.weight.data.mul_(-1.0)
            album(step, 0.0, model)
        return StepExplorer(album, *world, [RED_CAR, PANDA], patch_features)

    def test_a_patch_is_described_in_a_line_where_no_widget_is_shown(self, patches, capsys):
        patches.scene.value, patches.row.value, patches.column.value = 1, 2, 1
        patches.show()
        line = capsys.readouterr().out.splitlines()[0]  # below it the widget
        assert line == patches.in_words()
        assert line.startswith("Scene 1, patch in row 2, column 1; nearest words and their cosines: ")
        pairs = line.split("cosines: ")[1].split(", ")
        cells = re.findall(r'<td style="padding:1px 8px">(.*?)</td>', patches.page.value)
        assert pairs == [f"{html.unescape(word)} {value}" for word, value in zip(cells[::2], cells[1::2], strict=True)]

    def test_a_patch_is_chosen_by_row_and_column(self, world, patches, patch_features):
        model, processor = world
        patches.scene.value, patches.row.value, patches.column.value = 1, 3, 5
        embeds = model.projector(patch_features[1]).detach()
        nearest = lenses.nearest_few(model, processor.tokenizer, embeds[[2 * 8 + 4]])[0]
        page = patches.page.value
        assert "row 3, column 5" in page and f"nearest to <b>{nearest[0].word}" in page
        assert [f"{near.cosine:.2f}" for near in nearest] == re.findall(r">(-?\d\.\d\d)</td>", page)
        assert "stroke-dasharray" in page and 'x="201" y="101"' in page  # 50 units a patch
        assert "a panda; snow" in page

    def test_a_step_shows_the_answer_of_that_step(self, world, steps, patch_features):
        model, processor = world
        now = model.projector.weight.detach().clone()
        for step in steps.step.options:
            steps.step.value = step
            with steps.album.at(step, model):
                embeds = model.projector(patch_features[:1]).detach()
            assert f"<b>step {step}</b>" in steps.page.value
            assert html.escape(lenses.read_aloud(model, processor, embeds, PROMPTS["en"])[0]) in steps.page.value
            true = sum(patch.true for patch in lenses.read_patches(model, processor.tokenizer, RED_CAR, embeds[0]))
            assert f"{true} of 64 patches" in steps.page.value
        assert torch.equal(model.projector.weight, now)
        steps.scene.value = 1
        assert "Drawn: a panda; snow" in steps.page.value

    def test_a_drawing_says_what_there_is_to_see(self):
        words = [lenses.PatchWord("汽车", "car", True), *[lenses.PatchWord("<b>", "<b>", False)] * (N - 1)]
        page = drawing(RED_CAR, words)
        label = re.search(r'role="img" aria-label="([^"]+)"', page)[1]
        assert "red car; park" in label and "1 are true" in label
        assert page.count("<text ") == N and "&lt;b&gt;" in page and "<b>" not in page
        assert page.count('font-weight="bold"') == 1


@pytest.mark.usefixtures("no_missing_glyphs")
class TestFigures:
    def test_true_words_are_framed_and_bold(self):
        words = [lenses.PatchWord(word, word, word == "car") for word in ("red", "car", "far", "sky")]
        axes = lenses.patch_words(draw(RED_CAR, 64), {"panel": words}).axes[0]
        assert [text.get_text() for text in axes.texts] == ["red", "car", "far", "sky"]
        assert [text.get_text() for text in axes.texts if text.get_fontweight() == "bold"] == ["car"]

    def test_without_a_chinese_font_a_word_is_written_in_english(self, no_chinese):
        assert lenses.written(lenses.PatchWord("car", "car", True)) == "car"
        assert lenses.written(lenses.PatchWord("汽车", "car", True)) == "carᶻʰ"
        assert lenses.written(lenses.PatchWord("一", lenses.NO_WORD, False)) == lenses.NO_WORD

    def test_a_border_runs_around_what_is_covered_and_nowhere_else(self):
        assert sorted(figures.border(np.array([0]), 2)) == [(0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 1, 1), (1, 0, 1, 1)]
        both = figures.border(np.array([0, 1]), 2)
        assert len(both) == 6 and (1, 0, 1, 1) not in both
        assert len(figures.border(np.array([1, 2]), 2)) == 8  # they touch at a corner only

    def test_only_true_patches_are_lit(self):
        words = [lenses.PatchWord("a", "a", i == 2) for i in range(4)]
        axes = lesson_03.lighting_up(draw(RED_CAR, 64), {7: Moment(words, "a car")}).axes[0]
        assert [patch.get_xy() for patch in axes.patches] == [(0, 1)]
        assert [text.get_text() for text in axes.texts] == ["1 of 4 patches", "“a car”"]

    @pytest.fixture
    def shown(self, monkeypatch) -> list[dict]:
        bundles = []
        monkeypatch.setattr(figures, "display", lambda bundle, raw: bundles.append(bundle))
        return bundles

    def test_words_are_shown_with_the_answer_and_their_counts(self, shown):
        true, other = lenses.PatchWord("汽车", "car", True), lenses.PatchWord("<", "<", False)
        panels = {"before": [other] * N, "after": [true, true, *[other] * (N - 2)]}
        lesson_03.show_words(draw(RED_CAR, 64), RED_CAR, panels, ["a boat", "a car"])
        assert shown[0]["text/plain"].startswith(
            "before: “a boat”: 0 of 64 words are true; after: “a car”: 2 of 64 words are true."
        )
        alt = re.search(r'alt="([^"]*)"', shown[0]["text/html"])[1]
        assert "a red car; park" in alt
        assert "after: “a car”: 2 true, car." in alt and "before: “a boat”: 0 true, none." in alt

    def test_a_gradient_is_shown_with_its_counts(self, shown, processor):
        content = [{"type": "image"}, {"type": "text", "text": "What?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a red car"}]
        batch = processor.collate([processor.encode(Sample(messages))], pad_to_multiple_of=1)
        total = batch["input_ids"].shape[1]
        norms = torch.ones(3, total)
        norms[2, :-5] = 0
        lesson_03.show_gradient_path(draw(RED_CAR, 64), norms, batch, processor, torch.ones(2, 2))
        assert shown[0]["text/plain"] == (
            f"Out of the last layer 5 of {total} positions have a gradient, of what goes in {total} do, all 4 of the "
            "picture's among them; W keeps it."
        )

    def test_moments_facts_and_shares_are_shown_in_words_too(self, shown):
        words = [lenses.PatchWord("a", "a", i < 3) for i in range(4)]
        lesson_03.show_lighting_up(draw(RED_CAR, 64), {0: Moment(words[3:] * 4, "x"), 9: Moment(words, "y")})
        counts = {"before": (0, 9), "after": (1, 5)}
        lesson_03.show_facts({k: dict.fromkeys(lenses.FACTS, n) | {lenses.UNTRUE: m} for k, (n, m) in counts.items()})
        recalls = {"looking": {"recall": some_estimate(5, 10)}, "grey": {"recall": some_estimate(1, 10)}}
        plots.show_shares(recalls, "things")
        assert [bundle["text/plain"] for bundle in shown] == [
            "The picture lights up as W learns: 0 → 3 of its 4 patches.",
            "Patches of things whose nearest word is true of the thing: before 0%, after 50%.",
            "recall: looking 5 of 10, grey 1 of 10.",
        ]
        alts = [re.search(r'alt="([^"]*)"', bundle["text/html"])[1] for bundle in shown]
        assert "Step 9: 3, “y”." in alts[0] and "after: kind 10%" in alts[1] and "grey, recall: 1 of 10" in alts[2]

    def test_counts_are_written_beside_the_points(self):
        shares = {"a": {"x": some_estimate(5, 10), "y": some_estimate(0, 0)}}
        panels = plots.estimate_panels(shares, {"x": "X", "y": "Y"}, counts=True).axes
        texts = [text.get_text() for axes in panels for text in axes.texts]
        assert texts == ["0.50 (5 of 10)", "names nothing"]
