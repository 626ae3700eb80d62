"""The exercise of notebook 04: right choices pass, and each typical wrong one is told what is wrong with it."""

import re

import pytest

from minivlm.config import STAGES
from minivlm.model import set_trainable
from minivlm.notebook import checks  # noqa: F401 (enters the exercises)
from minivlm.notebook.checks import unfreeze
from minivlm.notebook.checks.frame import verdict
from minivlm.notebook.stages import size

W, TABLE, LAYERS = "projector.", "language_model.model.embed_tokens.", "language_model.model.layers."


def sizes(model) -> dict[str, int]:
    """Everything that can be chosen as a whole, W first."""
    return {W: size(model, [W])} | unfreeze.units(model)


def greedy(model, budget, order=list):
    """W, then whatever still fits, in some order."""
    taken, left = [], budget
    for prefix, cost in order(sizes(model).items()):
        if cost <= left:
            taken, left = [*taken, prefix], left - cost
    return taken


def layers_first(items):
    """W, then the layers from the last to the first, the table at the end."""
    first, table, *rest = items
    return [first, *reversed(rest), table]


def test_right_answers_are_right():
    assert verdict("choose_unfreezing", greedy) == "Right."
    assert verdict("choose_unfreezing", lambda m, b: set(greedy(m, b, layers_first))) == "Right."


def test_a_right_answer_may_use_a_wide_prefix_where_all_fits():
    def wide(model, budget):
        whole = ["projector.", "language_model."]
        return whole if size(model, whole) <= budget else greedy(model, budget)

    assert verdict("choose_unfreezing", wide) == "Right."


def test_the_stub_is_no_mistake():
    def stub(model, budget):
        raise NotImplementedError

    assert verdict("choose_unfreezing", stub).startswith("Not written yet")


def counted_twice(model, budget):
    """The table is counted under both of its names."""
    taken, left = [], budget
    for prefix, cost in sizes(model).items():
        cost = 2 * cost if prefix == TABLE else cost
        if cost <= left:
            taken, left = [*taken, prefix], left - cost
    return taken


def counted_from_the_state_dict(model, budget):
    """The budget is all there is, but the sum over the state dict is larger: the last layer's MLP does not fit."""
    total = sum(tensor.numel() for name, tensor in model.state_dict().items() if not name.startswith("vision."))
    chosen = greedy(model, budget)
    return chosen if budget >= total or budget < 3_000_000 else [p for p in chosen if p != LAYERS + "4.mlp."]


def with_the_packages_own(model, budget):
    set_trainable(model, STAGES["scenes"]["sft"])
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


WRONG = {
    "over budget": (lambda m, b: [W, "language_model."], r"has 3,754,752 parameters, 3,705,600 too many"),
    "the encoder": (lambda m, b: [*greedy(m, b), "vision."], r"'vision\.' unfreezes the encoder"),
    "everything": (lambda m, b: [""], r"'' unfreezes the encoder"),
    "unknown name": (lambda m, b: ["W"], r"no parameter's name begins with 'W'; look at the names"),
    "block's name": (lambda m, b: [*greedy(m, b), "layer 1"], r"begins with 'layer 1'"),
    "W forgotten": (lambda m, b: greedy(m, b)[1:] or [LAYERS + "0.input_layernorm."], r"you leave W frozen.*49,152"),
    "the head by name": (lambda m, b: [W, "language_model.lm_head.weight"], r"under another name.*tied"),
    "counted twice": (counted_twice, r"count the 262,144 of the embedding table twice"),
    "state dict": (counted_from_the_state_dict, r"leave 494,336 unused.*embedding table twice"),
    "nothing": (lambda m, b: [], r"nothing is chosen"),
    "wasted": (lambda m, b: [W], r"for 245,760 you choose 49,152.*196,608 are left.*0\.self_attn.*still fit"),
    "no return": (lambda m, b: None, r"gives None"),
    "a string": (lambda m, b: W, r"one string; give a list or a set"),
    "parameters": (lambda m, b: list(m.projector.parameters()), r"not parameters or modules"),
    "an error": (lambda m, b: m.nothing, r"raised AttributeError"),
    "the package's own": (with_the_packages_own, r"package's own set_trainable"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_typical_mistake_has_its_own_message(name):
    answer, message = WRONG[name]
    said = verdict("choose_unfreezing", answer)
    assert said.startswith("Not yet: ")
    assert re.search(message, said), said


def test_no_two_mistakes_are_told_the_same():
    """Two mistakes are each made in two ways."""
    said = {re.sub(r"[\d,]+|'[^']*'", "…", verdict("choose_unfreezing", answer)) for answer, _ in WRONG.values()}
    assert len(said) == len(WRONG) - 2


@pytest.fixture
def measured(monkeypatch):
    """Results of five choices: the first two cannot be told apart, the others can."""
    values = [(0.5, 0.6, 0.55), (0.52, 0.6, 0.58), (0.7, 0.72, 0.71), (0.8, 0.8, 0.8), (0.9, 0.9, 0.9)]
    arms = {
        name: {"seeds": {str(i): {"questions": v} for i, v in enumerate(row)}}
        for name, row in zip(unfreeze.CHOICES, values, strict=True)
    }
    monkeypatch.setattr(unfreeze, "read_results", lambda: {"arms": arms})
    return list(unfreeze.CHOICES)


class TestPrediction:
    def test_what_was_measured_is_right_and_a_tie_may_stand_either_way(self, measured):
        assert verdict("predict_unfreezing", measured) == "Right."
        assert verdict("predict_unfreezing", [measured[1], measured[0], *measured[2:]]) == "Right."

    def test_a_wrong_order_is_answered_with_the_measurement(self, measured):
        said = verdict("predict_unfreezing", [*measured[:3], measured[4], measured[3]])
        assert f"{measured[4]!r} comes before {measured[3]!r}" in said and "10 points more" in said

    def test_names_must_be_those_of_the_choices(self, measured):
        assert f"missing: {measured[0]}" in verdict("predict_unfreezing", measured[1:])
        assert "not among them: W only" in verdict("predict_unfreezing", [*measured, "W only"])
        assert "one is there twice" in verdict("predict_unfreezing", [*measured, measured[0]])

    def test_nothing_predicted_is_no_mistake(self, measured):
        assert verdict("predict_unfreezing", ...).startswith("Not written yet")
        assert verdict("predict_unfreezing", None).startswith("Not written yet")
