"""What stage 2 buys and costs: how it is measured, and when an effect is claimed."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from lessons import forgetting, plots
from lessons.attention import AtThings
from lessons.forgetting import ARMS, CHOICES, TEXT_TASKS, WITH, WITHOUT, Arm, Exam, in_words
from PIL import Image
from training import some_features

from minivlm.checkpoint import read_meta, save_checkpoint
from minivlm.config import IMAGE_TOKEN
from minivlm.data.features import FeatureCache
from minivlm.evaluation import effect
from minivlm.runtime.paths import data_folder
from minivlm.scenes.facts import sample_scene
from minivlm.scenes.samples import TEXT_OFFSET, SceneRows
from minivlm.train import text_probe

ROWS = {WITH: (0.75, 0.85), WITHOUT: (0.1, 0.3)}
MEASURES = (*TEXT_TASKS, "questions", "precision", "recall", "words", "on the picture", "on the thing")


@pytest.fixture(scope="module")
def shipped() -> dict:
    """The results that notebook 04 shows."""
    return forgetting.read_results()


class TestQuestions:
    def test_texts_are_held_out_and_have_one_right_answer(self):
        texts = forgetting.text_questions(12)
        assert tuple(texts) == TEXT_TASKS and all(len(pairs) == 12 for pairs in texts.values())
        assert forgetting.TEXT_EXAM > TEXT_OFFSET + 5_000_000, "stage 2's own texts count up from TEXT_OFFSET"
        pairs = [pair for task in texts.values() for pair in task]
        assert all(IMAGE_TOKEN not in prompt and answer for prompt, answer in pairs)
        # no caption or description, of which there are many right ones
        assert max(len(answer) for _, answer in texts["listed scene"]) < 60

    def test_rows_without_text_are_as_many_and_all_have_a_picture(self):
        mixed, pictured = forgetting.picture_rows(1, 60, 40), forgetting.picture_rows(1, 60, 40, text_rows=False)
        assert len(mixed) == len(pictured) == 60
        assert mixed == list(SceneRows("sft", 40, 60, 1)) and not all(row.images for row in mixed)
        assert all(row.images for row in pictured)
        assert [row for row in mixed if row.images] == pictured[: sum(bool(row.images) for row in mixed)]


class TestScores:
    @pytest.fixture
    def exam(self) -> Exam:
        return Exam(forgetting.text_questions(4), [sample_scene("dev", i) for i in range(3)], torch.zeros(3, 4, 16))

    def test_texts_right_up_to_capitals_and_stops(self, exam, monkeypatch):
        right = {prompt: answer for pairs in exam.texts.values() for prompt, answer in pairs}
        first = exam.texts["translation"][0][0]

        def said(model, processor, asked, *_):
            assert all(one.picture is None for one in asked)
            return ["wrong" if one.prompt == first else right[one.prompt].upper().rstrip(".") for one in asked]

        monkeypatch.setattr(forgetting, "answer", said)
        assert forgetting.text_scores(None, None, exam) == {"translation": 0.75, "small talk": 1.0, "listed scene": 1.0}

    def test_pictures_by_hand(self, exam, monkeypatch):
        named = {"panda": ("panda", None)}
        scene = exam.scenes[2]
        assert named["panda"] in {(t.kind, t.colour) for t in scene.things}

        def said(model, processor, asked, features, longest, *_):
            return ["a panda and a red panda" if one.prompt == "What is in this picture?" else "" for one in asked]

        monkeypatch.setattr(forgetting, "answer", said)
        monkeypatch.setattr(forgetting, "attention_to_things", lambda *_: AtThings(0.5, 0.25, 0.1))
        scores = forgetting.picture_scores(None, None, exam)
        things = 2 * sum(len(one.things) for one in exam.scenes)  # in both languages
        true = sum(("panda", None) in {(t.kind, t.colour) for t in one.things} for one in exam.scenes)
        assert scores["recall"] == round(true / things, 4)
        assert scores["questions"] == 0 and scores["words"] == 6
        assert (scores["on the picture"], scores["on the thing"]) == (0.5, 0.25)
        assert scores["precision"] == round(true / 6, 4)  # two names in each of three English answers


class TestArms:
    def test_a_short_stage_moves_what_the_arm_names(self, tmp_path, monkeypatch, model, processor):
        monkeypatch.chdir(tmp_path)
        meta = {"stage": "pretrain", "text_probe": text_probe(model, processor)}
        parent = save_checkpoint(tmp_path / "pretrain", model, processor, meta)
        cache = some_features(model.config)
        trained, _ = forgetting.train_arm(Arm(("W",), False), 0, cache, parent, "fp32", steps=1)
        before, after = model.state_dict(), trained.state_dict()
        assert {name for name in before if not torch.equal(before[name], after[name])} == {"projector.weight"}
        assert list(tmp_path.iterdir()) == [parent], "no checkpoint is kept"

    def test_the_choices_differ_in_blocks_alone(self):
        assert len(CHOICES) == 5 and WITHOUT not in CHOICES
        assert ARMS[WITH].trains == ARMS[WITHOUT].trains
        assert all(arm.trains[0] == "W" for arm in ARMS.values())


class TestRun:
    @pytest.fixture
    def done(self, monkeypatch, model, processor) -> list:
        """The runs that are done, with everything slow left out."""
        runs = []
        meta = {"hashes": {"projector": "abc"}}
        monkeypatch.setattr(forgetting, "load_checkpoint", lambda folder: (model, processor, meta))
        monkeypatch.setattr(Exam, "of", lambda *_: None)
        monkeypatch.setattr(FeatureCache, "of_scenes", lambda *_, **__: None)
        monkeypatch.setattr(forgetting, "choose_precision", lambda model: "fp32")
        monkeypatch.setattr(forgetting, "text_scores", lambda *_: dict.fromkeys(TEXT_TASKS, 0.5))
        monkeypatch.setattr(forgetting, "picture_scores", lambda *_: dict.fromkeys(MEASURES[3:], 0.5))
        monkeypatch.setattr(forgetting, "ARMS", {"W alone": Arm(("W",)), "W + layer": Arm(("W", "layer 1"))})
        monkeypatch.setattr(
            forgetting, "train_arm", lambda arm, seed, *_: (runs.append((arm.trains, seed)), SimpleNamespace())
        )
        return runs

    def test_what_is_there_is_not_done_again(self, done, tmp_path):
        file = tmp_path / "forgetting.json"
        forgetting.run(file, seeds=(0,))
        assert done == [(("W",), 0), (("W", "layer 1"), 0)]
        results = forgetting.run(file, seeds=(0, 1))
        assert done[2:] == [(("W",), 1), (("W", "layer 1"), 1)]
        assert results == forgetting.read_results(file)
        assert results["arms"]["W alone"]["parameters"] == 16 * 24 and results["sittings"] == 2
        assert forgetting.seeds_of(results, "W alone", "recall") == [0.5, 0.5]

    def test_results_from_other_weights_are_not_mixed_in(self, done, tmp_path):
        file = tmp_path / "forgetting.json"
        forgetting.run(file, seeds=(0,))
        file.write_text(json.dumps(forgetting.read_results(file) | {"parent": "other"}))
        forgetting.run(file, seeds=(0,))
        assert len(done) == 4


class TestEffect:
    def test_against_another_arm_and_against_the_beginning(self):
        arms = {name: {"seeds": {str(i): {"recall": v} for i, v in enumerate(row)}} for name, row in ROWS.items()}
        results = {"before": {"recall": 0.5}, "arms": arms}
        assert forgetting.mean_of(results, WITH, "recall") == pytest.approx(0.8)
        found = forgetting.compared(results, WITH, "recall", WITHOUT)
        assert found.difference == pytest.approx(0.6) and found.seed_range == pytest.approx(0.2) and found.claimed
        found = forgetting.compared(results, WITH, "recall")
        assert found.difference == pytest.approx(0.3) and found.seed_range == pytest.approx(0.1)

    def test_in_words(self):
        assert (
            in_words("small talk", effect([0.5], [0.9]))
            == "small talk: +40.0 points, spread of the seeds 0.0: an effect"
        )
        assert in_words("x", effect([0.6, 0.7], [0.5, 0.9])).endswith("no effect that three seeds could show")


class TestShipped:
    def test_all_arms_with_three_seeds_each_and_the_command(self, shipped):
        assert shipped["command"] == forgetting.COMMAND == "python -m lessons.forgetting"
        assert set(shipped["arms"]) == set(ARMS)
        for arm in shipped["arms"].values():
            assert set(arm["seeds"]) == {"0", "1", "2"}
            assert all(set(scores) == set(MEASURES) for scores in arm["seeds"].values())
        assert set(shipped["before"]) == set(MEASURES)

    def test_they_began_at_the_shipped_weights(self, shipped):
        assert shipped["parent"] == read_meta(data_folder() / "pretrain")["hashes"]["projector"]

    def test_figures(self, shipped):
        live = dict.fromkeys(TEXT_TASKS, 0.4)
        measures = {"questions": "questions right", "words": "words"}
        for figure in (forgetting.forgetting_figure(shipped, live), forgetting.choices_figure(shipped, measures)):
            assert Image.open(io.BytesIO(plots.png(figure))).width > 500

    def test_they_are_told_in_words(self, shipped, monkeypatch):
        told = []
        monkeypatch.setattr(forgetting, "show", lambda figure, alt, summary: told.append((alt, summary)))
        forgetting.show_forgetting(shipped, dict.fromkeys(TEXT_TASKS, 0.4))
        before, means = shipped["before"], [forgetting.mean_of(shipped, arm, "translation") for arm in (WITH, WITHOUT)]
        line = f"translation {before['translation']:.0%} before, {means[0]:.0%} after it with text rows, {means[1]:.0%}"
        assert line in told[0][0] and line in told[0][1]
        assert "A star for this run: translation 40%, small talk 40%, listed scene 40%." in told[0][0]
        forgetting.show_forgetting(shipped)
        assert "star" not in told[1][0]
        forgetting.show_choices(shipped, {"words": "words an answer", "recall": "recall"})
        assert f"where all began: words an answer {before['words']:.0f}, recall {before['recall']:.0%}." in told[2][0]
        assert f"W alone {forgetting.mean_of(shipped, 'W alone', 'words'):.0f};" in told[2][1]
