"""The exercise of notebook 01: right answers pass, and each typical wrong one gets a message of its own."""

import dataclasses

import pytest
import torch
from lessons.exercises.checking import verdict
from lessons.exercises.parameters import LANGUAGE_MODEL, Formula, odd_config

from minivlm.config import clip_26m_config, scenes_config
from minivlm.model import MiniVLMForConditionalGeneration, ledger

CONFIGS = [scenes_config, clip_26m_config, odd_config]


def matrix(config) -> int:
    return config.vision_width * config.language_width


def by_hand(config):
    """A right answer, written as a reader would."""
    text, width = config.text_config, config.language_width
    narrow = width * text.num_key_value_heads // text.num_attention_heads
    layer = 2 * width * width + 2 * width * narrow + 3 * width * text.intermediate_size + 2 * width
    return matrix(config), text.vocab_size * width + text.num_hidden_layers * layer + width


@pytest.mark.parametrize("make", CONFIGS)
def test_the_right_formula_is_what_the_model_has(make):
    with torch.device("meta"):
        model = MiniVLMForConditionalGeneration(make())
    counted = [sum(p.numel() for p in part.parameters()) for part in (model.projector, model.language_model)]
    assert list(by_hand(make())) == [matrix(make()), Formula()(make())] == counted


def test_a_right_answer():
    assert verdict("count_parameters", by_hand) == "Right."
    assert verdict("count_parameters", lambda config: list(by_hand(config))) == "Right."


def test_no_two_formulas_agree():
    """Otherwise a mistake would get the message of another one."""
    counts = [formula(odd_config()) for formula, _ in LANGUAGE_MODEL] + [Formula()(odd_config())]
    assert len(set(counts)) == len(counts)
    assert len({message for _, message in LANGUAGE_MODEL}) == len(LANGUAGE_MODEL)


@pytest.mark.parametrize(("formula", "message"), LANGUAGE_MODEL)
def test_each_wrong_count_of_the_language_model_gets_its_own_message(formula, message):
    assert verdict("count_parameters", lambda c: (matrix(c), formula(c))) == (
        f"Not yet: W is right. Your language model {message}"
    )


def test_biases_and_missing_layers_against_the_library():
    """Two of the wrong formulas have a Llama that fits them."""
    config = scenes_config()
    config.text_config.attention_bias = config.text_config.mlp_bias = True
    with torch.device("meta"):
        biased = MiniVLMForConditionalGeneration(config).language_model
    assert sum(p.numel() for p in biased.parameters()) == Formula(biases=True)(config)
    config = scenes_config()
    config.text_config.num_hidden_layers = 1
    assert Formula(repeated=False)(scenes_config()) == Formula()(config)


WRONG = {
    "bias in W": (lambda c: (matrix(c) + c.language_width, Formula()(c)), "Your W has a bias"),
    "W per patch": (lambda c: (matrix(c) * c.num_image_tokens, Formula()(c)), "a matrix for each patch"),
    "W square": (lambda c: (c.language_width**2, Formula()(c)), "Your W is square"),
    "W something": (lambda c: (7, Formula()(c)), "It is one matrix from width Dv to width Dl"),
    "the other way round": (lambda c: by_hand(c)[::-1], "stand the other way round"),
    "one preset by heart": (lambda c: by_hand(scenes_config()), "the numbers of one preset"),
    "the other by heart": (lambda c: (393_216, 25_829_888), "the numbers of one preset"),
    "one too many": (lambda c: (matrix(c), Formula()(c) + 1), "1 too many. Print its parts"),
    "some too few": (lambda c: (matrix(c), Formula()(c) - 20), "20 too few"),
    "a sum": (lambda c: sum(by_hand(c)), "return two numbers"),
    "nothing": (lambda c: None, "returns nothing"),
    "divided": (lambda c: (matrix(c), Formula()(c) / 1), "divide with `//`"),
    "the package's ledger": (lambda c: ledger(None, None), "calls the package's own ledger"),
    "built": (lambda c: MiniVLMForConditionalGeneration(c), "calls the package's own MiniVLMForConditionalGeneration"),
    "an error": (lambda c: c.width, "your function raised AttributeError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_wrong_answers(name):
    answer, expected = WRONG[name]
    message = verdict("count_parameters", answer)
    assert message.startswith("Not yet: ") and expected in message and "\n" not in message


def test_every_part_that_can_be_counted_wrong_is_tried():
    changed = set()
    for formula, _ in LANGUAGE_MODEL:
        fields = dataclasses.fields(Formula)
        changed |= {field.name for field in fields if getattr(formula, field.name) != field.default}
    assert changed == {field.name for field in dataclasses.fields(Formula)}
