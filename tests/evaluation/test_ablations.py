"""The three experiments: what differs between variants and what does not, hand-counted scores, a whole small run."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from training import save_base

from minivlm.checkpoint import load_checkpoint, read_meta
from minivlm.config import PROMPTS
from minivlm.evaluation import ablations
from minivlm.pretraining.small_lm import SMALL_LM
from minivlm.runtime.paths import BASE, data_folder
from minivlm.scenes.facts import Scene, Thing
from minivlm.scenes.language import read_facts
from minivlm.scenes.samples import SceneSamples

IMAGES, ROWS = 40, 120


def scene(*kinds: str, setting: str = "beach") -> Scene:
    positions = [("left", "near"), ("right", "near"), ("middle", "far")]
    things = (Thing(kind, "red", *position, "medium") for kind, position in zip(kinds, positions, strict=False))
    return Scene(setting, tuple(things), 0)


FEATURES = torch.arange(IMAGES)[:, None, None]  # (I, 1, 1): each image's is its number


def text_of(message) -> str:
    return "".join(part.get("text", "") for part in message["content"])


class TestVariants:
    def test_each_experiment_turns_one_knob(self):
        for names in ablations.EXPERIMENTS.values():
            variants = [ablations.VARIANTS[name] for name in names]
            knobs = [{getattr(variant, knob) for variant in variants} for knob in ("base", "short", "noise")]
            assert sum(len(values) > 1 for values in knobs) == 1, names
        assert [ablations.VARIANTS[name].noise for name in ablations.EXPERIMENTS["noise"]] == [0.0, 0.1, 0.3]
        assert {name for names in ablations.EXPERIMENTS.values() for name in names} == set(ablations.VARIANTS)

    @pytest.fixture
    def long(self):
        return list(ablations.Variant().samples(IMAGES, ROWS, 1, FEATURES))

    def test_long_answers_are_the_shipped_recipe_and_noise_is_the_samples_own(self, long):
        assert long == list(SceneSamples("sft", IMAGES, ROWS, 1, features=FEATURES))
        noisy = list(ablations.Variant(noise=0.3).samples(IMAGES, ROWS, 1, FEATURES))
        assert noisy == list(SceneSamples("sft", IMAGES, ROWS, 1, noise=0.3, features=FEATURES)) != long

    def test_short_answers_name_the_same_things_in_one_clause_and_change_nothing_else(self, long):
        short, described = list(ablations.Variant(short=True).samples(IMAGES, ROWS, 1, FEATURES)), 0
        assert len(short) == len(long)
        for brief, full in zip(short, long, strict=True):
            assert (brief.name == full.name and brief.patch_features is not None) or "(text)" in brief.name
            if "(description)" not in full.name:
                assert brief == full
                continue
            described += 1
            prompt, answer, *rest = brief.messages
            assert prompt["content"] == full.messages[0]["content"] and rest == full.messages[2:]
            assert read_facts(text_of(answer)).setting == read_facts(text_of(full.messages[1])).setting
            assert set(read_facts(text_of(answer)).things) == set(read_facts(text_of(full.messages[1])).things)
            assert len(text_of(answer)) < len(text_of(full.messages[1]))
            assert not any(end in text_of(answer) for end in (". ", "。")), "one clause"
            assert ("的" in text_of(answer)) == (PROMPTS["zh"] in text_of(prompt))
        assert described > ROWS / 4

    def test_short_answers_depend_on_index_and_seed_alone(self):
        rows = ablations.Variant(short=True).samples(IMAGES, ROWS, 1, FEATURES)
        assert [rows[i] for i in reversed(range(ROWS))][::-1] == list(rows)
        assert list(ablations.Variant(short=True).samples(IMAGES, ROWS, 2, FEATURES)) != list(rows)


class TestScores:
    SCENES = (scene("dog", "boat"), scene("cat", setting="park"))
    TEXTS = (
        "This picture shows a beach. There is a red dog. There is a red kite. There is a red boat.",
        "We are in a park. There is a red car. There is a red tree.",
    )

    def test_invented_by_mention_by_hand(self):
        shares = ablations.invented_by_mention(self.SCENES, self.TEXTS, mentions=2)
        # first mentions: dog (there), car (not); second and later ones: kite (not), boat (there), tree (not)
        assert [(one["numerator"], one["denominator"]) for one in shares] == [(1, 2), (2, 3)]

    def test_usual_share_by_hand(self):
        share = ablations.usual_share(self.SCENES, self.TEXTS)
        # kite is usual at the beach, tree in the park, car in neither
        assert (share["numerator"], share["denominator"]) == (2, 3)

    @pytest.mark.parametrize(
        ("before", "after", "claimed"),
        [
            ([0.01, 0.02, 0.03], [0.06, 0.07, 0.08], True),  # means 0.05 apart, range 0.02
            ([0.01, 0.02, 0.03], [0.03, 0.03, 0.04], False),  # about 0.013 apart
            ([0.01, 0.01, 0.01], [0.02, 0.06, 0.10], False),  # 0.05 apart, but the second variant has a range of 0.08
            ([0.9, 0.9, 0.9], [0.5, 0.5, 0.5], True),
        ],
    )
    def test_an_effect_counts_where_it_exceeds_the_range_over_the_seeds(self, before, after, claimed):
        effect = ablations.effect(before, after)
        assert effect.claimed is claimed
        assert effect.difference == pytest.approx(sum(after) / 3 - sum(before) / 3)
        assert effect.seed_range == pytest.approx(max(max(before) - min(before), max(after) - min(after)))


class TestSampled:
    """Sampled answers are the model's own: as probable as it finds them, and the same again for the same seed."""

    def features(self, model, count):
        return torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1)).expand(count, -1, -1)

    def test_first_words_come_as_often_as_they_are_probable(self, model, processor, monkeypatch):
        monkeypatch.setattr(ablations, "LONG", 1)
        count = 2000
        texts = ablations.sampled(model, processor, self.features(model, count), "What?")
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
        ids = torch.tensor(processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True))
        with torch.no_grad():
            logits = model(input_ids=ids, patch_features=self.features(model, 1)).logits[0, -1]
        chances = Counter()  # several ids may be written alike
        for token, chance in enumerate(logits.softmax(-1).tolist()):
            chances[processor.tokenizer.decode([token], skip_special_tokens=True)] += chance
        for text, chance in chances.most_common(5):
            error = (chance * (1 - chance) / count) ** 0.5
            assert texts.count(text) / count == pytest.approx(chance, abs=5 * error)

    def test_the_same_seed_says_the_same_and_leaves_randomness_alone(self, model, processor, monkeypatch):
        monkeypatch.setattr(ablations, "LONG", 4)
        before = torch.random.get_rng_state()
        arguments = (model, processor, self.features(model, 3), "What?")
        first, again, other = (ablations.sampled(*arguments, seed) for seed in (0, 0, 1))
        assert first == again != other
        assert torch.equal(before, torch.random.get_rng_state())


class TestRun:
    @pytest.fixture
    def data(self, tmp_path, model, processor):
        """A folder with two tiny bases, as `data/` has them."""
        save_base(tmp_path / "data" / BASE, model, processor)
        save_base(tmp_path / "data" / SMALL_LM, model, processor)
        for name in (BASE, SMALL_LM):
            file = tmp_path / "data" / name / "minivlm.json"
            meta = json.loads(file.read_text("utf-8")) | {"metrics": {"language_model": {"list en": {"recall": 0.5}}}}
            file.write_text(json.dumps(meta), "utf-8")
        return tmp_path / "data"

    @pytest.fixture
    def plan(self, tmp_path, data, monkeypatch):
        usual = ablations.STAGES["scenes"]
        small = {name: replace(stage, batch_size=2, accumulation=1) for name, stage in usual.items()}
        monkeypatch.setattr(ablations, "STAGES", {"scenes": small})
        monkeypatch.setattr(ablations, "LONG", 4)
        monkeypatch.setattr(ablations, "SHORT", 2)
        steps = {"pretrain": 1, "sft": 1}
        return ablations.AblationPlan(tmp_path / "out", data, (0, 1), steps, 4, 4, "fp32", "minivlm test")

    def test_a_whole_run_and_its_second_sitting(self, plan, monkeypatch):
        results = ablations.experiment(plan)
        seeds = {name: [run["seed"] for run in variant["runs"]] for name, variant in results["variants"].items()}
        assert seeds == {name: [0, 1] for name in ablations.VARIANTS}
        assert results == json.loads((plan.out / "experiments.json").read_text("utf-8"))
        assert results["language_models"][SMALL_LM]["from_words"] == {"list en": {"recall": 0.5}}
        for variant, score in (("short", "sampled chair_s"), ("long", "pope")):
            assert len(ablations.values(results, variant, score)) == 2
        assert "sft, noise 30%" in ablations.as_text(results)
        monkeypatch.setattr(ablations, "Trainer", lambda *_, **__: pytest.fail("it was trained before"))
        assert ablations.experiment(plan)["variants"] == results["variants"]

    def test_arms_of_a_seed_share_stage_1_and_those_of_another_plan_are_refused(self, plan):
        runs = ablations.experiment(replace(plan, seeds=(0,)), ["length"])["variants"]
        assert set(runs) == {"short", "long"}
        folder = plan.out / "seed-0"
        parents = [read_meta(folder / variant)["parent"]["hashes"]["projector"] for variant in runs]
        assert parents == [read_meta(folder / f"pretrain-of-{BASE}")["hashes"]["projector"]] * 2
        assert runs["short"]["runs"][0]["pretrain"] == runs["long"]["runs"][0]["pretrain"]
        with pytest.raises(ValueError, match="made by another plan"):
            ablations.experiment(replace(plan, seeds=(0,), scored=5), ["length"])
        with pytest.raises(ValueError, match="no experiment colour; choose from length, noise, lm"):
            ablations.experiment(plan, ["colour"])


class TestShipped:
    @pytest.fixture
    def results(self):
        return json.loads((data_folder() / ablations.SHIPPED).read_text("utf-8"))

    def test_every_arm_has_three_seeds_and_was_made_by_the_documented_command(self, results):
        assert results["command"] == "minivlm experiment" and results["seeds"] == [0, 1, 2]
        assert set(results["variants"]) == set(ablations.VARIANTS)
        for variant in results["variants"].values():
            assert [run["seed"] for run in variant["runs"]] == results["seeds"]
            assert {len(run["losses"]) for run in variant["runs"]} == {results["steps"]["sft"]}
        assert results["steps"]["sft"] == ablations.STEPS["sft"]

    def test_both_language_models_are_the_ones_that_lie_here(self, results):
        for name, about in results["language_models"].items():
            meta = read_meta(data_folder() / name)
            assert about["hash"] == meta["hashes"]["language_model"][:12]
            assert about["from_words"] == meta["metrics"]["language_model"]
        sizes = [about["parameters"] for about in results["language_models"].values()]
        assert max(sizes) > 5 * min(sizes)

    def test_the_smaller_language_model_is_small_and_trained_beside_the_same_encoder(self):
        folder = data_folder() / SMALL_LM
        assert sum(file.stat().st_size for file in folder.iterdir()) < 2e6
        model, _, meta = load_checkpoint(folder)
        assert meta["command"] == "minivlm experiment small-lm"
        assert model.config.language_width == 128 and model.config.text_config.num_hidden_layers == 3
