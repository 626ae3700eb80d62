"""What notebook 04 shows: what stage 2 gains and what it forgets, and where the words of an answer look.

The results of eighteen short trainings lie in `data/results/forgetting.json`; `tests/benchmarks/forgetting.py` writes
them. **Forgetting** is measured on text alone, without any image: held-out translations, small talk, and questions
about listed scenes, all written by `minivlm.scenes.corpus`, on which the language model was trained. An answer is
right if it is the exact one, up to capital letters and punctuation. **Looking** is measured while the model writes the
word for a thing, in a right description that is the same for all models: how much of its attention goes to the image,
and how much of that to the thing's own patches. Letters as in `config.py`.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from lessons.faults import planted  # noqa: F401 (the notebook uses it, and others below)
from lessons.lenses.attention import Looks, attention_to_patches, draw_attention, where, word_title
from lessons.lenses.blocks import TITLED_STAGES, blocks, blocks_of, ledger_of, moved, only, size, strips  # noqa: F401
from lessons.lenses.words import listed, things_patches  # noqa: F401
from lessons.plots import BLUE, GREY, INK, ORANGE, note, show, style
from lessons.widgets.stages import StageExplorer  # noqa: F401
from minivlm.checkpoint import load_checkpoint
from minivlm.config import PROMPTS, STAGES, Stage
from minivlm.data import Sample
from minivlm.evaluation import Effect, effect, normalised
from minivlm.generate import ask, reply
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.paths import data_folder
from minivlm.scenes.corpus import Conversation, listed_scene, small_talk, translation
from minivlm.scenes.facts import Scene, random_stream
from minivlm.scenes.language import description
from minivlm.scenes.samples import SceneSamples
from minivlm.scenes.vocabulary import KIND_WORDS
from minivlm.train import Trainer, learning_rates

RESULTS = Path("results") / "forgetting.json"
STAGE = replace(STAGES["scenes"]["sft"], steps=100, batch_size=8, accumulation=2, warmup_steps=20)
LAYERS = tuple(f"layer {i}" for i in range(1, 6))
HELD_OUT = 30_000_000  # texts from here on: neither base training, nor its exam, nor any stage reaches them
TEXTS = 120  # of each kind
TEXT_TASKS = ("translation", "small talk", "listed scene")


class Variant(NamedTuple):
    """One variant of stage 2: which blocks train, and whether a tenth of the samples is text alone."""

    trains: tuple[str, ...]
    text_samples: bool = True


WITH, WITHOUT = "W + language model", "W + language model, no text rows"
VARIANTS = {
    WITHOUT: Variant(("W", "embeddings", *LAYERS), text_samples=False),
    WITH: Variant(("W", "embeddings", *LAYERS)),
    "W alone": Variant(("W",)),
    "W + embeddings": Variant(("W", "embeddings")),
    "W + first layer": Variant(("W", LAYERS[0])),
    "W + last layer": Variant(("W", LAYERS[-1])),
}
CHOICES = tuple(name for name, variant in VARIANTS.items() if variant.text_samples)  # the same samples, other blocks


def text_questions(count: int = TEXTS) -> dict[str, list[tuple[str, str]]]:
    """Held-out text tasks, none of which needs an image: task -> (prompt, right answer), `count` of each."""

    def pair(conversation: Conversation) -> tuple[str, str]:
        return conversation[0]["content"], conversation[1]["content"]

    numbers = range(HELD_OUT, HELD_OUT + count)
    # captions and descriptions have many right answers, so of listed scenes only questions are asked
    scenes = [listed_scene(number, turns=1, captions=0.0, descriptions=0.0) for number in numbers]
    texts = ([translation(number) for number in numbers], [small_talk(number) for number in numbers], scenes)
    return {task: [pair(one) for one in conversations] for task, conversations in zip(TEXT_TASKS, texts, strict=True)}


def text_scores(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    questions: Mapping[str, Sequence[tuple[str, str]]],
    precision: str = "fp32",
) -> dict[str, float]:
    """task -> the share of exact answers to `text_questions`, the language model being asked alone."""
    scores = {}
    for task, pairs in questions.items():
        options = {"max_new_tokens": 32, "precision": precision, "batch_size": 64, "title": task}
        answers = reply(model, processor, [ask(prompt) for prompt, _ in pairs], **options)
        right = sum(normalised(text) == normalised(pair[1]) for text, pair in zip(answers, pairs, strict=True))
        scores[task] = round(right / len(pairs), 4)
    return scores


def stage_2_samples(seed: int, count: int, features: torch.Tensor, text_samples: bool = True) -> list[Sample]:
    """The first `count` samples of stage 2; without text samples, the next ones with an image take their positions.

    Args:
        features: (I, N, Dv), of the images of the scenes.
    """
    samples = SceneSamples("sft", len(features), 2 * count, seed, features=features)
    return list(islice((one for one in samples if text_samples or one.patch_features is not None), count))


def train_variant(
    variant: Variant, seed: int, features: torch.Tensor, parent: Path, precision: str, steps: int = STAGE.steps,
    **options: Any,
) -> tuple[MiniVLMForConditionalGeneration, MiniVLMProcessor]:  # fmt: skip
    """A short stage 2 from `parent` in one variant; `options` as `Trainer` takes them. No checkpoint is kept."""
    model, processor, _ = load_checkpoint(parent)
    stage = replace(STAGE, steps=steps)
    count = steps * stage.batch_size * stage.accumulation
    samples = stage_2_samples(seed, count, features, variant.text_samples)
    prefixes = [prefix for name in variant.trains for prefix in blocks(model)[name]]
    options |= {"parent": parent, "seed": seed, "precision": precision, "save_every": steps}
    with tempfile.TemporaryDirectory(dir=".") as out, only(model, prefixes):
        Trainer(model, processor, samples, stage, Path(out) / "sft", **options).fit()
    return model, processor


# Results of the short trainings


def read_results(file: Path | None = None) -> dict[str, Any]:
    """The measured results: command, stage, sizes, before, and variants -> trains, parameters, text_samples, seeds."""
    return json.loads((file or data_folder() / RESULTS).read_text("utf-8"))


def seeds_of(results: Mapping[str, Any], variant: str, measure: str) -> list[float]:
    """What each seed of a variant reached in a measure."""
    return [scores[measure] for scores in results["variants"][variant]["seeds"].values()]


def mean_of(results: Mapping[str, Any], variant: str, measure: str) -> float:
    """What the seeds of a variant reached in a measure, on average."""
    values = seeds_of(results, variant, measure)
    return sum(values) / len(values)


def compared(results: Mapping[str, Any], variant: str, measure: str, against: str | None = None) -> Effect:
    """A variant in a measure against another one, or against the weights from which all began, a single value."""
    return effect(
        seeds_of(results, against, measure) if against else [results["before"][measure]],
        seeds_of(results, variant, measure),
    )


def in_words(name: str, change: Effect) -> str:
    """An effect as a sentence that claims no more than was measured."""
    points = f"{name}: {100 * change.difference:+.1f} points, range over the seeds {100 * change.seed_range:.1f}"
    return f"{points}: {'an effect' if change.claimed else 'no effect that three seeds could show'}"


@style()
def forgetting_figure(results: Mapping[str, Any], live: dict[str, float] | None = None) -> Figure:
    """Text tasks before stage 2 and after it, with and without text rows: one mark for each seed.

    Args:
        live: scores of one more run, made on the spot without text rows; a star.
    """
    looks = {WITH: (BLUE, "o", "after, with text rows", 0.2), WITHOUT: (ORANGE, "^", "after, without", -0.2)}
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for index, task in enumerate(TEXT_TASKS):
        before = results["before"][task]
        axes.plot([before] * 2, [-index - 0.4, -index + 0.4], color=GREY, linewidth=3, zorder=1)
        for variant, (colour, mark, name, up) in looks.items():
            values = seeds_of(results, variant, task)
            y = -index + up
            axes.plot([min(values), max(values)], [y, y], color=colour, linewidth=1.2, zorder=2)
            label = name if index == 0 else None
            axes.plot(values, [y] * len(values), mark, color=colour, markersize=8, alpha=0.8, label=label, zorder=3)
        if live is not None:
            star = {"markersize": 13, "color": "white", "markeredgecolor": ORANGE, "markeredgewidth": 1.6}
            axes.plot(live[task], -index - 0.2, "*", label="this run" if index == 0 else None, zorder=4, **star)
    axes.plot([], [], color=GREY, linewidth=3, label="before stage 2")
    axes.set_yticks([-index for index in range(len(TEXT_TASKS))], TEXT_TASKS)
    axes.set(xlim=(-0.02, 1.03), ylim=(-len(TEXT_TASKS) + 0.4, 0.6), xlabel="share of exact answers, text alone")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, 1.2), ncols=4, frameon=False, fontsize=9)
    return figure


@style()
def choices_figure(results: Mapping[str, Any], measures: Mapping[str, str]) -> Figure:
    """Every choice of what to unfreeze, a panel for each measure (name -> title); a mark a seed, a line for before."""
    names = _by_size(results)
    figure = Figure(figsize=(11.5, 3.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    for number, (measure, title) in enumerate(measures.items()):
        axes = figure.add_subplot(1, len(measures), number + 1)
        axes.axvline(results["before"][measure], color=GREY, linewidth=2, linestyle="--")
        for index, name in enumerate(names):
            values = seeds_of(results, name, measure)
            axes.plot([min(values), max(values)], [-index] * 2, color=BLUE, linewidth=1.2)
            axes.plot(values, [-index] * len(values), "o", color=BLUE, markersize=7, alpha=0.7)
        axes.set_title(title)
        axes.margins(x=0.12)
        axes.set_ylim(-len(names) + 0.5, 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(lambda value, _, measure=measure: _written(measure, value))
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        labels = [f"{name}\n{results['variants'][name]['parameters']:,}" for name in names] if number == 0 else []
        axes.set_yticks([-index for index in range(len(labels))], labels, fontsize=9, color=INK)
    began = (results["before"][next(iter(measures))], -len(names) + 1.5)
    note(figure.axes[0], "before", began, (5, 0), fontsize=8.5, va="center")
    return figure


def _by_size(results: Mapping[str, Any]) -> list[str]:
    """The choices, that with the fewest parameters first."""
    return sorted(CHOICES, key=lambda name: results["variants"][name]["parameters"])


def show_forgetting(results: Mapping[str, Any], live: dict[str, float] | None = None) -> None:
    """`forgetting_figure` with alternative text and a summary."""
    shares = "; ".join(
        f"{task} {results['before'][task]:.0%} before, {mean_of(results, WITH, task):.0%} after it with text rows, "
        f"{mean_of(results, WITHOUT, task):.0%} without"
        for task in TEXT_TASKS
    )
    alt = f"Three rows, one for each task; a mark for each seed. Right answers, on average: {shares}."
    if live is not None:
        alt += f" A star for this run: {', '.join(f'{task} {live[task]:.0%}' for task in TEXT_TASKS)}."
    show(forgetting_figure(results, live), alt, f"Right without any picture: {shares}.")


def show_choices(results: Mapping[str, Any], measures: Mapping[str, str]) -> None:
    """`choices_figure` with alternative text and a summary."""
    means = {name: {m: mean_of(results, name, m) for m in measures} for name in _by_size(results)}

    def line(values: Mapping[str, float]) -> str:
        return ", ".join(f"{title} {_written(measure, values[measure])}" for measure, title in measures.items())

    alt = (
        f"{len(measures)} panels, a row for each choice, a dot for each seed, a dashed line where all began: "
        f"{line(results['before'])}. " + " ".join(f"{name}: {line(values)}." for name, values in means.items())
    )
    first = next(iter(measures))
    firsts = "; ".join(f"{name} {_written(first, values[first])}" for name, values in means.items())
    summary = f"{measures[first].capitalize()}: {firsts}; before {_written(first, results['before'][first])}."
    show(choices_figure(results, measures), alt, summary)


def _written(measure: str, value: float) -> str:
    """A measure's value as people write it: words as a number, all else as a share."""
    return f"{value:.0f}" if measure == "words" else f"{value:.0%}"


# What trains in a stage


def show_strips(model: MiniVLMForConditionalGeneration) -> None:
    """Both stages to scale, with alternative text and a summary."""
    rows = {title: blocks_of(model, STAGES["scenes"][name]) for title, name in TITLED_STAGES.items()}
    totals = {title: ledger_of(model, names, title).total for title, names in rows.items()}
    shares = {title: total.trained / total.parameters for title, total in totals.items()}
    lines = "; ".join(f"{title} trains {', '.join(names)}, {shares[title]:.1%} of all" for title, names in rows.items())
    alt = "Two strips, each the whole model, its blocks as wide as they have parameters. Hatched is what trains: "
    one, two = (f"{shares[title]:.1%}" for title in rows)
    show(strips(model, rows), alt + lines, f"Stage 1 trains {one} of the parameters, stage 2 {two}; no encoder ever.")


@style()
def rates_figure(stage: Stage) -> Figure:
    """The learning rate of each part over a stage's steps, each line named at its end."""
    steps = range(stage.steps)
    rates = [learning_rates(step, stage) for step in steps]
    looks = {"projector": (ORANGE, "--", "W"), "language_model": (BLUE, "-", "language model")}
    figure = Figure(figsize=(7, 2.6))
    axes = figure.add_subplot()
    for part in stage.trains:
        colour, line, name = looks[part]
        values = [rate[part] for rate in rates]
        peak = values.index(max(values))
        axes.plot([step + 1 for step in steps], values, color=colour, linestyle=line, linewidth=2)
        at, label = (peak + 1, max(values)), f"{name}: at most {max(values):g}"
        note(axes, label, at, (4, 4), color=INK)
    axes.set(xlim=(0, stage.steps * 1.02), ylim=(0, None), xlabel="step", ylabel="learning rate")
    axes.grid(axis="y")
    return figure


# Where the words of an answer look


class AtThings(NamedTuple):
    """Where the words for things looked, on average over many images.

    Attributes:
        on_image: the share of their attention that went to the image.
        on_thing: of that, the share that went to the patches of the very thing.
        by_chance: the share of the patches that the thing covers: what looking everywhere alike would give.
    """

    on_image: float
    on_thing: float
    by_chance: float


def right_description(scene: Scene, number: int) -> str:
    """A right English description of a scene, the same for every model; its wording is that of `number`."""
    return description(scene, "en", random_stream("looked at", number))


def attention_to_things(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    scenes: Sequence[Scene],
    patch_features: torch.Tensor,
) -> AtThings:
    """How well the words for things find their things, while the model is shown right English descriptions.

    The descriptions are the same whichever model is asked, so that two models can be compared word by word.

    Args:
        patch_features: (I, N, Dv), those of `scenes`.

    Raises:
        ValueError: no description names a thing.
    """
    kinds, shares = {word.split()[-1]: kind for kind, word in KIND_WORDS["en"].items()}, []
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPTS["en"]}]}]
    for number, (scene, features) in enumerate(zip(scenes, patch_features, strict=True)):
        text = right_description(scene, number)
        looks = attention_to_patches(model, processor, question, text, patch_features=features[None])
        for word, row in zip(looks.words, looks.patches, strict=True):
            if kind := kinds.get(word.lower()):
                own = [patches for thing, patches in things_patches(scene, len(row)) if thing.kind == kind]
                covered = np.unique(np.concatenate(own))
                shares.append((row.sum(), row[covered].sum() / row.sum(), len(covered) / len(row)))
    if not shares:
        raise ValueError("no description names a thing; give scenes that have some")
    return AtThings(*(float(value) for value in np.mean(shares, axis=0)))


@style()
def compared_figure(image: Image.Image, models: Mapping[str, Looks], chosen: Sequence[int]) -> Figure:
    """The same words of the same answer as several models read them: a row for each model, a column for each word.

    Args:
        chosen: positions of words.

    Raises:
        ValueError: no word is chosen, or the models read different words.
    """
    first = next(iter(models.values()))
    if not chosen or any(looks.words != first.words for looks in models.values()):
        raise ValueError("choose at least one word, of an answer that is the same for all")
    figure = Figure(figsize=(0.6 + 1.85 * len(chosen), 2.25 * len(models)))
    panels = figure.subplots(len(models), len(chosen), squeeze=False)
    for line, (name, looks) in zip(panels, models.items(), strict=True):
        for axes, word in zip(line, chosen, strict=True):
            draw_attention(axes, image, looks.patches[word])
            if looks is first:
                axes.set_title(word_title(looks, word), fontweight="bold", loc="center")
        line[0].set_ylabel(name, fontweight="bold", labelpad=8)
    figure.subplots_adjust(wspace=0.06, hspace=0.2, left=0.03, right=1)
    return figure


def show_compared(image: Image.Image, models: Mapping[str, Looks], chosen: Sequence[int]) -> None:
    """`compared_figure` with alternative text and a one-line summary."""
    alt = f"The picture once for each of {len(chosen)} words in {len(models)} rows, faded where the word did not look."
    shares = []
    for name, looks in models.items():
        looked = [f"{looks.words[k]}: {where(int(looks.patches[k].argmax()), looks.patches.shape[1])}" for k in chosen]
        alt += f" {name}, looked at most: {'; '.join(looked)}."
        shares.append(f"{name} {np.mean([looks.patches[k].sum() for k in chosen]):.0%}")
    summary = f"Of these words' attention on the picture: {', '.join(shares)}."
    show(compared_figure(image, models, chosen), alt, summary)
