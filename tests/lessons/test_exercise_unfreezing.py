"""The exercise of notebook 04: right choices pass, and each typical wrong one is told what is wrong with it."""

import re

import pytest
from lessons import exercises as checks  # noqa: F401 (enters the exercises)
from lessons.exercises import unfreezing
from lessons.exercises.checking import verdict
from lessons.lenses.blocks import size

from minivlm.config import STAGES
from minivlm.model import set_trainable

W, TABLE, LAYERS = "projector.", "language_model.model.embed_tokens.", "language_model.model.layers."


def sizes(model) -> dict[str, int]:
    """Everything that can be chosen as a whole, W first."""
    return {W: size(model, [W])} | unfreezing.units(model)


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


def table_twice(items):
    """The table is counted under both of its names."""
    return [(prefix, 2 * cost if prefix == TABLE else cost) for prefix, cost in items]


def test_right_answers_are_right():
    assert verdict("choose_unfreezing", greedy) == "Right."
    assert verdict("choose_unfreezing", lambda m, b: set(greedy(m, b, layers_first))) == "Right."


def test_a_right_answer_may_use_a_wide_prefix_where_all_fits():
    def wide(model, budget):
        whole = ["projector.", "language_model."]
        return whole if size(model, whole) <= budget else greedy(model, budget)

    assert verdict("choose_unfreezing", wide) == "Right."


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
    "counted twice": (lambda m, b: greedy(m, b, table_twice), r"count the 262,144 of the embedding table twice"),
    "state dict": (counted_from_the_state_dict, r"leave 494,336 unused.*embedding table twice"),
    "nothing": (lambda m, b: [], r"nothing is chosen"),
    "wasted": (lambda m, b: [W], r"for 245,760 you choose 49,152.*196,608 are left.*0\.self_attn.*still fit"),
    "no return": (lambda m, b: None, r"returns nothing"),
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


EVERYTHING, ALONE, TABLE_TOO, FIRST, LAST = unfreezing.CHOICES
RIGHT = {"longer": [EVERYTHING, TABLE_TOO, FIRST, LAST], "forgets": [EVERYTHING]}


@pytest.fixture
def measured(monkeypatch) -> None:
    """Results in which all but W make answers longer, and in which translating is lost if everything learns.

    The last layer loses some, too, but no more than its seeds differ; the table wins some. W adds a tenth of a word,
    with every seed.
    """
    talk = {EVERYTHING: (0.7, 0.72, 0.71), TABLE_TOO: (0.9, 0.9, 0.9), LAST: (0.7, 0.8, 0.85)}
    arms = {
        name: {
            "trains": ["W"] if name == ALONE else ["W", "embeddings"],
            "seeds": {
                str(seed): {
                    "words": 13.1 if name == ALONE else 39 + seed,
                    "translation": talk.get(name, (0.8,) * 3)[seed],
                }
                for seed in range(3)
            },
        }
        for name in unfreezing.CHOICES
    }
    results = {"before": {"words": 13.0, "translation": 0.8}, "variants": arms}
    monkeypatch.setattr(unfreezing, "read_results", lambda: results)


WRONGLY = {
    "a list": ([EVERYTHING], r"a dict with exactly these keys: 'longer', 'forgets'"),
    "a key too few": ({"longer": []}, r"a dict with exactly these keys"),
    "a string": (RIGHT | {"longer": FIRST}, r"under 'longer' stands 'W \+ first layer'; give a list"),
    "a number": (RIGHT | {"longer": 4}, r"under 'longer' stands 4; give a list"),
    "unknown": (RIGHT | {"forgets": ["layer 1"]}, r"stands 'layer 1', which was not measured; choose from"),
    "W makes longer": (RIGHT | {"longer": list(unfreezing.CHOICES)}, r"'W alone' does not belong.*13 to 13.*W decides"),
    "W forgets": (RIGHT | {"forgets": [EVERYTHING, ALONE]}, r"'W alone' cannot forget: .*same to the last bit"),
    "within the range": (
        RIGHT | {"forgets": [EVERYTHING, LAST]},
        r"from 80 to 78.*range over the seeds is 15\.0.*nothing that",
    ),
    "the other way": (RIGHT | {"forgets": [EVERYTHING, TABLE_TOO]}, r"'W \+ embeddings' does not.*from 80 to 90"),
    "one left out": (RIGHT | {"longer": [EVERYTHING, FIRST, LAST]}, r"'W \+ embeddings' belongs.*too.*13 to 40"),
    "nothing forgets": (RIGHT | {"forgets": []}, r"'W \+ language model' belongs under 'forgets', too.*80 to 71"),
}


class TestPrediction:
    def test_what_was_measured_is_right(self, measured):
        assert verdict("predict_unfreezing", RIGHT) == "Right."
        assert verdict("predict_unfreezing", {key: set(names) for key, names in RIGHT.items()}) == "Right."

    @pytest.mark.parametrize("name", WRONGLY)
    def test_a_wrong_prediction_is_answered_with_the_measurement(self, measured, name):
        answer, message = WRONGLY[name]
        said = verdict("predict_unfreezing", answer)
        assert said.startswith("Not yet: ")
        assert re.search(message, said), said

    @pytest.mark.parametrize("nothing", [..., None, {"longer": ..., "forgets": ...}, {"longer": [], "forgets": ...}])
    def test_nothing_predicted_is_no_mistake(self, nothing):
        assert verdict("predict_unfreezing", nothing).startswith("Not written yet")

    def test_what_is_shipped_has_an_answer(self):
        """Not every choice does the same, else there were nothing to predict."""
        results = unfreezing.read_results()
        for key, (measure, _) in unfreezing.PREDICTED.items():
            effects = [unfreezing.compared(results, name, measure) for name in unfreezing.CHOICES]
            found = {unfreezing.happened(key, effect) for effect in effects}
            assert found == {True, False}
