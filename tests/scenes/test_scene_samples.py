"""The rows of both stages: pure functions, true to their images, in the documented shares."""

import re
from collections import Counter

import pytest
import torch

from minivlm.config import PROMPTS
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.facts import random_stream, sample_scene
from minivlm.scenes.language import questions, read_facts
from minivlm.scenes.samples import FOLLOW_UPS, SFT_MIX, TURNS, SceneSamples

NUMBERS = torch.arange(200)[:, None, None]  # as features (I, 1, 1): each image's is its number


def samples(*args, **kwargs) -> SceneSamples:
    return SceneSamples(*args, features=NUMBERS, **kwargs)


def text_of(message) -> str:
    """A message's text, with `<image>` where its image stands."""
    return "".join(part.get("text", "<image>") for part in message["content"])


def number(row) -> int:
    return int(row.patch_features[0])


def language(row) -> str:
    return "zh" if re.search(r"[\u4e00-\u9fff]", text_of(row.messages[-1])) else "en"


def truth(row):
    scene = sample_scene("train", number(row))
    return scene, {(thing.kind, thing.colour) for thing in scene.things}


def kind(row) -> str:
    return row.name.split("(")[1].rstrip(")")


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_row_depends_on_its_index_and_the_seed_alone(stage):
    rows = samples(stage, pictures=7, count=30, seed=1)
    backwards = [rows[i] for i in reversed(range(30))][::-1]
    assert backwards == list(rows)
    assert list(samples(stage, pictures=7, count=50, seed=1))[:30] == list(rows)
    assert list(samples(stage, pictures=7, count=30, seed=2)) != list(rows)
    assert list(samples(stage, pictures=7, count=30, seed=1, split="dev")) != list(rows)


def test_a_stage_1_row_is_the_prompt_and_a_true_caption():
    for row in samples("pretrain", pictures=9, count=40):
        user, assistant = row.messages
        assert text_of(user) == f"<image>{PROMPTS[language(row)]}"
        scene, things = truth(row)
        read = read_facts(text_of(assistant))
        assert set(read.things) == things and read.setting == scene.setting


def test_every_image_is_shown_in_both_languages_and_languages_are_even():
    for count in (6, 7):
        rows = list(samples("pretrain", count, count=2 * count))
        assert Counter(number(row) for row in rows) == dict.fromkeys(range(count), 2)
        assert len({(number(row), language(row)) for row in rows}) == 2 * count
        assert abs(Counter(map(language, rows))["en"] - count) == 0
    one, other = (SceneSamples("pretrain", 6, 3, seed) for seed in (0, 1))
    assert [one.language(i) for i in range(3)] != [other.language(i) for i in range(3)]


def test_stage_2_mixes_descriptions_conversations_and_text():
    rows = list(samples("sft", pictures=200, count=1000))
    shares = Counter(map(kind, rows))
    for name, share in SFT_MIX.items():
        assert shares[name] / 1000 == pytest.approx(share, abs=0.05)
    for name in ("description", "conversation"):
        languages = Counter(language(row) for row in rows if kind(row) == name)
        assert languages["en"] / shares[name] == pytest.approx(0.5, abs=0.1)


def test_stage_2_says_what_is_true():
    rows = list(samples("sft", pictures=50, count=120))
    for row in rows:
        roles = [turn["role"] for turn in row.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        if kind(row) == "text":
            assert row.patch_features is None and not any("<image>" in text_of(turn) for turn in row.messages)
            continue
        scene, things = truth(row)
        assert text_of(row.messages[0]).startswith("<image>")
        assert not any("<image>" in text_of(turn) for turn in row.messages[1:])
        if kind(row) == "description":
            assert text_of(row.messages[0]) == f"<image>{PROMPTS[language(row)]}"
            read = read_facts(text_of(row.messages[1]))
            assert set(read.things) == things and read.setting == scene.setting
        else:
            assert len(roles) // 2 in TURNS
    turns = {name: {len(row.messages) // 2 for row in rows if kind(row) == name} for name in SFT_MIX}
    assert turns["conversation"] == set(TURNS) and turns["description"] == {1 + more for more in FOLLOW_UPS}


def test_the_questions_are_those_of_the_image():
    row = next(row for row in samples("sft", pictures=50, count=50) if kind(row) == "conversation")
    scene, _ = truth(row)
    pairs = []
    for seed in range(200):
        pairs += [(q.text, q.answer) for q in questions(scene, language(row), random_stream(seed))]
    texts = [text_of(turn).removeprefix("<image>") for turn in row.messages[::2]]
    answered = [text_of(turn) for turn in row.messages[1::2]]
    assert set(zip(texts, answered, strict=True)) <= set(pairs)


def test_noise_adds_what_is_not_there_to_descriptions_alone():
    clean, noisy = (list(samples("sft", pictures=50, count=200, noise=noise)) for noise in (0.0, 1.0))
    for before, after in zip(clean, noisy, strict=True):
        if kind(before) != "description":
            assert before == after
            continue
        assert before.messages[2:] == after.messages[2:]
        _, things = truth(after)
        named = {thing for thing, _ in read_facts(text_of(after.messages[1])).things}
        assert named > {thing for thing, _ in things}


def test_without_features_the_image_is_drawn(processor):
    for stage in ("pretrain", "sft"):
        for known, row in zip(samples(stage, 3, 6), SceneSamples(stage, 3, 6), strict=True):
            example = processor.encode(row)
            assert example.input_ids == processor.encode(known).input_ids and known.images == []
            assert [image.tobytes() for image in example.images] == (
                [] if known.patch_features is None else [draw(sample_scene("train", number(known))).tobytes()]
            )


def test_what_has_no_rows_is_refused():
    with pytest.raises(ValueError, match="no scene samples for stage 'finetune'"):
        samples("finetune", 1, 1)
    with pytest.raises(ValueError, match="at least one of each"):
        samples("sft", 0, 5)
    with pytest.raises(ValueError, match="features of 200 pictures, not of 201"):
        samples("sft", 201, 5)
    rows = samples("sft", 3, 5)
    assert len(rows) == 5
    with pytest.raises(IndexError):
        rows[5]
