"""What stage 2 buys and costs: how it is measured, and when an effect is claimed."""

import pytest
import torch
from lessons import lesson_04
from lessons.lesson_04 import TEXT_TASKS, VARIANTS, WITH, WITHOUT, Variant
from training import FEATURES

from minivlm.checkpoint import read_meta, save_checkpoint
from minivlm.config import IMAGE_TOKEN
from minivlm.runtime.paths import data_folder
from minivlm.scenes.samples import TEXT_OFFSET, SceneSamples
from minivlm.train import text_probe

ROWS = {WITH: (0.75, 0.85), WITHOUT: (0.1, 0.3)}
MEASURES = (*TEXT_TASKS, "questions", "precision", "recall", "words", "on the picture", "on the thing")


@pytest.fixture(scope="module")
def shipped() -> dict:
    return lesson_04.read_results()


class TestQuestions:
    def test_texts_are_held_out_and_have_one_right_answer(self):
        texts = lesson_04.text_questions(12)
        assert tuple(texts) == TEXT_TASKS and all(len(pairs) == 12 for pairs in texts.values())
        assert lesson_04.HELD_OUT > TEXT_OFFSET + 5_000_000, "stage 2's own texts count up from TEXT_OFFSET"
        pairs = [pair for task in texts.values() for pair in task]
        assert all(IMAGE_TOKEN not in prompt and answer for prompt, answer in pairs)
        # no caption or description, of which there are many right ones
        assert max(len(answer) for _, answer in texts["listed scene"]) < 60

    def test_without_text_samples_there_are_as_many_and_all_have_an_image(self):
        features = torch.zeros(40, 4, 16)
        mixed = lesson_04.stage_2_samples(1, 60, features)
        pictured = lesson_04.stage_2_samples(1, 60, features, text_samples=False)
        with_image = [sample for sample in mixed if sample.patch_features is not None]
        assert len(mixed) == len(pictured) == 60 and mixed == list(SceneSamples("sft", 40, 60, 1, features=features))
        assert 0 < len(with_image) < 60 and with_image == pictured[: len(with_image)]
        assert all(sample.patch_features is not None for sample in pictured)


def test_texts_are_right_up_to_capitals_and_stops(monkeypatch):
    questions = lesson_04.text_questions(4)
    right = {prompt: answer for pairs in questions.values() for prompt, answer in pairs}
    first = questions["translation"][0][0]

    def answers(model, processor, conversations, **_):
        prompts = [conversation[0]["content"][-1]["text"] for conversation in conversations]
        assert all(len(conversation[0]["content"]) == 1 for conversation in conversations), "no image"
        return ["wrong" if prompt == first else right[prompt].upper().rstrip(".") for prompt in prompts]

    monkeypatch.setattr(lesson_04, "reply", answers)
    scores = lesson_04.text_scores(None, None, questions)
    assert scores == {"translation": 0.75, "small talk": 1.0, "listed scene": 1.0}


class TestVariants:
    def test_a_short_stage_moves_what_the_arm_names(self, tmp_path, monkeypatch, model, processor):
        monkeypatch.chdir(tmp_path)
        meta = {"stage": "pretrain", "text_probe": text_probe(model, processor)}
        parent = save_checkpoint(tmp_path / "pretrain", model, processor, meta)
        trained, _ = lesson_04.train_variant(Variant(("W",), False), 0, FEATURES, parent, "fp32", steps=1)
        before, after = model.state_dict(), trained.state_dict()
        assert {name for name in before if not torch.equal(before[name], after[name])} == {"projector.weight"}
        assert list(tmp_path.iterdir()) == [parent], "no checkpoint is kept"


class TestEffect:
    def test_against_another_arm_and_against_the_beginning(self):
        variants = {name: {"seeds": {str(i): {"recall": v} for i, v in enumerate(row)}} for name, row in ROWS.items()}
        results = {"before": {"recall": 0.5}, "variants": variants}
        assert lesson_04.mean_of(results, WITH, "recall") == pytest.approx(0.8)
        effect = lesson_04.compared(results, WITH, "recall", WITHOUT)
        assert effect.difference == pytest.approx(0.6) and effect.seed_range == pytest.approx(0.2) and effect.claimed
        effect = lesson_04.compared(results, WITH, "recall")
        assert effect.difference == pytest.approx(0.3) and effect.seed_range == pytest.approx(0.1)


class TestShipped:
    def test_all_arms_with_three_seeds_each_and_the_command(self, shipped):
        assert shipped["command"] == "python tests/benchmarks/forgetting.py"
        assert set(shipped["variants"]) == set(VARIANTS)
        for arm in shipped["variants"].values():
            assert set(arm["seeds"]) == {"0", "1", "2"}
            assert all(set(scores) == set(MEASURES) for scores in arm["seeds"].values())
        assert set(shipped["before"]) == set(MEASURES)

    def test_they_began_at_the_shipped_weights(self, shipped):
        assert shipped["parent"] == read_meta(data_folder() / "pretrain")["hashes"]["projector"]

    def test_they_are_described_in_words(self, shipped, monkeypatch):
        shown = []
        monkeypatch.setattr(lesson_04, "show", lambda figure, alt, summary: shown.append((alt, summary)))
        lesson_04.show_forgetting(shipped, dict.fromkeys(TEXT_TASKS, 0.4))
        before = shipped["before"]
        means = [lesson_04.mean_of(shipped, variant, "translation") for variant in (WITH, WITHOUT)]
        line = f"translation {before['translation']:.0%} before, {means[0]:.0%} after it with text rows, {means[1]:.0%}"
        assert line in shown[0][0] and line in shown[0][1]
        assert "A star for this run: translation 40%, small talk 40%, listed scene 40%." in shown[0][0]
        lesson_04.show_forgetting(shipped)
        assert "star" not in shown[1][0]
        lesson_04.show_choices(shipped, {"words": "words an answer", "recall": "recall"})
        assert f"where all began: words an answer {before['words']:.0f}, recall {before['recall']:.0%}." in shown[2][0]
        assert f"W alone {lesson_04.mean_of(shipped, 'W alone', 'words'):.0f};" in shown[2][1]
