"""The rows of both stages: pure functions, true to their pictures, in the announced shares."""

import re
from collections import Counter

import pytest

from minivlm.config import PROMPTS
from minivlm.scenes.facts import random_stream, sample_scene
from minivlm.scenes.language import questions, read_facts
from minivlm.scenes.samples import FOLLOW_UPS, SFT_MIX, TURNS, SceneRows, language_of, pretrain_row, sft_row


def language(row) -> str:
    return "zh" if re.search(r"[\u4e00-\u9fff]", row.conversations[-1]["content"]) else "en"


def truth(row):
    scene = sample_scene("train", row.images[0])
    return scene, {(thing.kind, thing.colour) for thing in scene.things}


def kind(row) -> str:
    return row.where.split("(")[1].rstrip(")")


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_row_depends_on_its_index_and_the_seed_alone(stage):
    rows = SceneRows(stage, pictures=7, count=30, seed=1)
    backwards = [rows[i] for i in reversed(range(30))][::-1]
    assert backwards == list(rows)
    assert list(SceneRows(stage, pictures=7, count=50, seed=1))[:30] == list(rows)
    assert list(SceneRows(stage, pictures=7, count=30, seed=2)) != list(rows)
    assert list(SceneRows(stage, pictures=7, count=30, seed=1, split="dev")) != list(rows)


def test_a_stage_1_row_is_the_prompt_and_a_true_caption():
    for row in SceneRows("pretrain", pictures=9, count=40):
        user, assistant = row.conversations
        assert user["content"] == f"<image>\n{PROMPTS[language(row)]}"
        scene, things = truth(row)
        read = read_facts(assistant["content"])
        assert set(read.things) == things and read.setting == scene.setting


def test_every_picture_is_shown_in_both_languages_and_languages_are_even():
    for pictures in (6, 7):
        rows = list(SceneRows("pretrain", pictures, count=2 * pictures))
        assert Counter(row.images[0] for row in rows) == dict.fromkeys(range(pictures), 2)
        assert len({(row.images[0], language(row)) for row in rows}) == 2 * pictures
        assert abs(Counter(map(language, rows))["en"] - pictures) == 0
    assert [language_of(i, 6, seed=0) for i in range(3)] != [language_of(i, 6, seed=1) for i in range(3)]


def test_stage_2_mixes_descriptions_conversations_and_text():
    rows = list(SceneRows("sft", pictures=200, count=1000))
    shares = Counter(map(kind, rows))
    for name, share in SFT_MIX.items():
        assert shares[name] / 1000 == pytest.approx(share, abs=0.05)
    for name in ("description", "conversation"):
        languages = Counter(language(row) for row in rows if kind(row) == name)
        assert languages["en"] / shares[name] == pytest.approx(0.5, abs=0.1)


def test_stage_2_says_what_is_true():
    rows = list(SceneRows("sft", pictures=50, count=120))
    for row in rows:
        roles = [turn["role"] for turn in row.conversations]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        if kind(row) == "text":
            assert row.images == [] and not any("<image>" in turn["content"] for turn in row.conversations)
            continue
        scene, things = truth(row)
        assert row.conversations[0]["content"].startswith("<image>\n")
        assert not any("<image>" in turn["content"] for turn in row.conversations[1:])
        if kind(row) == "description":
            assert row.conversations[0]["content"] == f"<image>\n{PROMPTS[language(row)]}"
            read = read_facts(row.conversations[1]["content"])
            assert set(read.things) == things and read.setting == scene.setting
        else:
            assert len(roles) // 2 in TURNS
    turns = {name: {len(row.conversations) // 2 for row in rows if kind(row) == name} for name in SFT_MIX}
    assert turns["conversation"] == set(TURNS) and turns["description"] == {1 + more for more in FOLLOW_UPS}


def test_the_questions_are_those_of_the_picture():
    row = next(row for row in SceneRows("sft", pictures=50, count=50) if kind(row) == "conversation")
    scene, _ = truth(row)
    found = []
    for seed in range(200):
        found += [(q.text, q.answer) for q in questions(scene, language(row), random_stream(seed))]
    asked = [turn["content"].removeprefix("<image>\n") for turn in row.conversations[::2]]
    answered = [turn["content"] for turn in row.conversations[1::2]]
    assert set(zip(asked, answered, strict=True)) <= set(found)


def test_noise_adds_what_is_not_there_to_descriptions_alone():
    clean, noisy = (list(SceneRows("sft", pictures=50, count=200, noise=noise)) for noise in (0.0, 1.0))
    for before, after in zip(clean, noisy, strict=True):
        if kind(before) != "description":
            assert before == after
            continue
        assert before.conversations[2:] == after.conversations[2:]
        _, things = truth(after)
        named = {thing for thing, _ in read_facts(after.conversations[1]["content"]).things}
        assert named > {thing for thing, _ in things}


def test_every_row_renders(processor):
    for stage in ("pretrain", "sft"):
        for row in SceneRows(stage, pictures=20, count=40):
            rendered = processor.render(row.messages(), row.where)
            assert rendered.pictures == row.images


def test_what_has_no_rows_is_refused():
    with pytest.raises(ValueError, match="no scene rows for stage 'finetune'"):
        SceneRows("finetune", 1, 1)
    with pytest.raises(ValueError, match="at least one of each"):
        SceneRows("sft", 0, 5)
    rows = SceneRows("sft", 3, 5)
    assert len(rows) == 5
    with pytest.raises(IndexError):
        rows[5]


def test_rows_can_be_had_one_by_one():
    assert SceneRows("pretrain", 5, 20, seed=3)[11] == pretrain_row(11, 5, seed=3)
    assert SceneRows("sft", 5, 20, seed=3, noise=0.5)[11] == sft_row(11, 5, seed=3, noise=0.5)
