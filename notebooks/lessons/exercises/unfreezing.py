"""Exercise of notebook 04: choose what to unfreeze under a budget of parameters, and predict what comes of it."""

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any

import torch

from lessons.exercises.checking import Wrong, called, exercise, forbidden
from lessons.lenses.blocks import chosen, size
from lessons.lesson_04 import CHOICES, compared, read_results
from minivlm.config import preset_config
from minivlm.evaluation import Effect
from minivlm.model import MiniVLMForConditionalGeneration, set_trainable

W, EMBEDDINGS, HEAD = "projector.", "language_model.model.embed_tokens.", "language_model.lm_head"
# what is to be predicted of each choice -> the measure that decides it, and the least change that is worth naming
PREDICTED = {"longer": ("words", 10), "forgets": ("translation", -0.02)}


@lru_cache(maxsize=1)
def bare_model() -> MiniVLMForConditionalGeneration:
    """The model of the scenes preset with all its names and shapes, and no numbers: it takes no memory."""
    with torch.device("meta"):
        return MiniVLMForConditionalGeneration(preset_config("scenes"))


def budgets(model: MiniVLMForConditionalGeneration) -> tuple[int, ...]:
    """The budgets that an answer is tried with: W and no more, then more and more, at last all that may train."""
    w, attention = size(model, [W]), size(model, ["language_model.model.layers.0.self_attn."])
    everything = size(model, ["projector.", "language_model."])
    return (w, w + attention, 800_000, 2_000_000, everything)


def units(model: MiniVLMForConditionalGeneration) -> dict[str, int]:
    """What can be unfrozen as a whole: the table, each layer's attention, each layer's MLP. Prefix to parameters."""
    layers = range(model.config.text_config.num_hidden_layers)
    prefixes = [f"language_model.model.layers.{i}.{part}." for i in layers for part in ("self_attn", "mlp")]
    return {prefix: size(model, [prefix]) for prefix in (EMBEDDINGS, *prefixes)}


@exercise
def choose_unfreezing(answer: Callable[[MiniVLMForConditionalGeneration, int], Collection[str]]) -> None:
    """Check `choose(model, budget)`, which gives the prefixes of the names of parameters to train."""
    model = bare_model()
    with forbidden(set_trainable):
        for budget in budgets(model):
            prefixes = called(answer, model, budget)
            _check_names(model, prefixes)
            _check_choice(model, prefixes, budget)


def _check_names(model: MiniVLMForConditionalGeneration, prefixes: Any) -> None:
    """What is given are prefixes, each of some name, and none of the encoder's."""
    if isinstance(prefixes, str):
        raise Wrong(f"{prefixes!r} is one string; give a list or a set of prefixes, even if there is only one")
    if not all(isinstance(prefix, str) for prefix in prefixes):
        raise Wrong("give prefixes of names, such as 'projector.', not parameters or modules")
    if not prefixes:
        raise Wrong("nothing is chosen, so nothing would train; W is always affordable here")
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        if prefix.startswith(HEAD):
            raise Wrong(
                f"{prefix!r} is the embedding table under another name: the head is tied to it. named_parameters lists "
                f"a shared tensor once, as {EMBEDDINGS + 'weight'!r}; choose it by that name"
            )
        if not any(name.startswith(prefix) for name in names):
            raise Wrong(f"no parameter's name begins with {prefix!r}; look at the names in model.named_parameters()")
    if thawed := [prefix for prefix in prefixes if any(name.startswith("vision.") for name in chosen(model, [prefix]))]:
        raise Wrong(f"{thawed[0]!r} unfreezes the encoder, which stays frozen in every stage; leave it out")


def _check_choice(model: MiniVLMForConditionalGeneration, prefixes: Collection[str], budget: int) -> None:
    """W is there, the budget is kept, and nothing whole that is left out would still fit."""
    total, names = size(model, prefixes), set(chosen(model, prefixes))
    if not set(chosen(model, [W])) <= names:
        raise Wrong(
            f"for {budget:,} you leave W frozen; stage 2 trains it always, and it is the cheapest of all: "
            f"{size(model, [W]):,} parameters. Take it first"
        )
    if total > budget:
        raise Wrong(
            f"your choice for {budget:,} has {total:,} parameters, {total - budget:,} too many; add up numel() of all "
            "parameters whose names begin with one of your prefixes, before you decide"
        )
    left, table = budget - total, size(model, [EMBEDDINGS])
    untouched = {unit: cost for unit, cost in units(model).items() if not names & set(chosen(model, [unit]))}
    fitting = {unit: cost for unit, cost in untouched.items() if cost <= left}
    if not fitting:
        return
    if left - table < min(fitting.values()) and (EMBEDDINGS in fitting or EMBEDDINGS + "weight" in names):
        raise Wrong(
            f"for {budget:,} you leave {left:,} unused. Did you count the {table:,} of the embedding table twice? The "
            "head is tied to it: state_dict() lists that tensor under two names, named_parameters() under one"
        )
    unit, cost = next(iter(fitting.items()))
    raise Wrong(
        f"for {budget:,} you choose {total:,} parameters; {left:,} are left, and {unit!r} with its {cost:,} would "
        "still fit. Go on until nothing whole fits any more"
    )


@exercise
def predict_unfreezing(answer: Mapping[str, Collection[str]]) -> None:
    """Check which of the measured choices make answers longer, and which make the language model forget.

    The measurements decide. A change counts if it exceeds the range over the seeds and is worth naming (`PREDICTED`):
    seeds that happen to agree have a range of zero, and would make an effect of a tenth of a word.
    """
    if answer is None or answer is Ellipsis:
        raise NotImplementedError
    if not isinstance(answer, Mapping) or set(answer) != set(PREDICTED):
        raise Wrong(f"give a dict with exactly these keys: {', '.join(map(repr, PREDICTED))}")
    if any(names is Ellipsis for names in answer.values()):
        raise NotImplementedError
    for key, names in answer.items():
        _check_names_of_choices(key, names)
    results = read_results()
    for key, names in answer.items():
        for name in CHOICES:
            _check_prediction(key, name, name in names, results)


def _check_names_of_choices(key: str, names: Any) -> None:
    """What is listed under a key are names of choices."""
    if isinstance(names, str) or not isinstance(names, Collection):
        raise Wrong(f"under {key!r} stands {names!r}; give a list of choices, even if it is one or none")
    if unknown := [name for name in names if name not in CHOICES]:
        raise Wrong(f"under {key!r} stands {unknown[0]!r}, which was not measured; choose from {', '.join(CHOICES)}")


def _check_prediction(key: str, name: str, predicted: bool, results: Mapping[str, Any]) -> None:
    """One choice under one key: the measurement says whether it happened, and the message says by how much."""
    measure, _ = PREDICTED[key]
    change = compared(results, name, measure)
    if predicted == happened(key, change):
        return
    unit = 1 if measure == "words" else 100
    outcome = (
        f"with {name!r}, {measure} went from {unit * change.before:.0f} to {unit * change.after:.0f}, and the "
        f"range over the seeds is {unit * change.seed_range:.1f}"
    )
    if not predicted:
        raise Wrong(f"{name!r} belongs under {key!r}, too: {outcome}")
    alone = results["variants"][name]["trains"] == ["W"]
    if alone and key == "forgets":
        raise Wrong(
            f"{name!r} cannot forget: its language model is the same to the last bit, and a text without a picture "
            f"never meets W. Take it out of {key!r}"
        )
    if alone:
        raise Wrong(
            f"{name!r} does not belong under {key!r}: {outcome}. W decides what is seen; how an answer to this prompt "
            "is built, the language model decides, and it stays as it was"
        )
    raise Wrong(f"{name!r} does not belong under {key!r}: {outcome}. That is nothing that three seeds could show")


def happened(key: str, change: Effect) -> bool:
    """Whether an effect is what a key of `PREDICTED` says."""
    return change.claimed and change.difference / PREDICTED[key][1] >= 1
