"""What stage 2 buys and costs: short runs of it, three seeds each, and what each can do afterwards.

    python -m lessons.forgetting

trains W and parts of the language model from `data/pretrain`, with and without the rows that have no picture, and
writes what came out into `data/results/forgetting.json`, which notebook 04 reads. A run that is there already is not
done again, so a command that was stopped goes on; `--seeds 0` does those of one seed. The file counts the sittings.

**Forgetting** is measured on text alone, without any picture: held-out translations, small talk, and questions about
listed scenes, all written by `minivlm.scenes.corpus`, from which the language model learnt them in the first place. An
answer is right if it is the exact one, up to capital letters and punctuation.

**Looking** is measured while the model writes the word for a thing, in a right description that is the same for all:
how much of its attention goes to the picture, and how much of that to the thing's own patches.

An effect of one way of training against another is claimed as everywhere (`ablations.effect`): only where the
difference of the means over seeds is larger than the spread of the seeds.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lessons.attention import attention_to_things
from lessons.plots import BLUE, GREY, INK, ORANGE, show, style
from lessons.stages import blocks, only, size
from minivlm.checkpoint import load_checkpoint
from minivlm.config import PROMPTS, STAGES
from minivlm.data.features import FeatureCache
from minivlm.data.samples import Sample
from minivlm.evaluation import Effect, effect, exam_questions, is_right, normalised
from minivlm.generate import Asked, answer
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.paths import data_folder
from minivlm.runtime.precision import choose_precision
from minivlm.scenes.corpus import Conversation, listed_scene, small_talk, translation
from minivlm.scenes.facts import Scene, sample_scene
from minivlm.scenes.language import read_facts
from minivlm.scenes.samples import SceneRows
from minivlm.scenes.vocabulary import LANGUAGES
from minivlm.train import train

COMMAND = "python -m lessons.forgetting"
RESULTS = Path("results") / "forgetting.json"
SEEDS = (0, 1, 2)
PICTURES = 1600  # one for each row of a run
STAGE = replace(STAGES["scenes"]["sft"], steps=100, batch_size=8, accumulation=2, warmup_steps=20)
LAYERS = tuple(f"layer {i}" for i in range(1, 6))
TEXT_EXAM = 30_000_000  # texts from here on: neither base training, nor its exam, nor any stage reaches them
TEXTS, PICTURES_ASKED = 120, 40  # of each kind of text, and how many pictures are asked about
TEXT_TASKS = ("translation", "small talk", "listed scene")
SHORT, LONG = 32, 96  # tokens that an answer, that a description may take
BATCH = 64  # answers at a time: half of the usual, for the sake of memory

Scores = dict[str, float]


class Arm(NamedTuple):
    """One way to go through stage 2: which blocks learn, and whether a tenth of the rows is text alone."""

    trains: tuple[str, ...]
    text_rows: bool = True


WITH, WITHOUT = "W + language model", "W + language model, no text rows"
ARMS = {
    WITHOUT: Arm(("W", "embeddings", *LAYERS), text_rows=False),
    WITH: Arm(("W", "embeddings", *LAYERS)),
    "W alone": Arm(("W",)),
    "W + embeddings": Arm(("W", "embeddings")),
    "W + first layer": Arm(("W", LAYERS[0])),
    "W + last layer": Arm(("W", LAYERS[-1])),
}
CHOICES = tuple(name for name, arm in ARMS.items() if arm.text_rows)  # the same rows, other blocks


@dataclass(frozen=True)
class Exam:
    """What is asked after every run: texts, and questions about held-out pictures.

    Attributes:
        texts: task -> (prompt, right answer) pairs.
        scenes: the facts of the pictures.
        features: (I, N, Dv) what the encoder makes of them.
    """

    texts: Mapping[str, Sequence[tuple[str, str]]]
    scenes: Sequence[Scene]
    features: Any

    @classmethod
    def of(
        cls, model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, texts: int = TEXTS,
        pictures: int = PICTURES_ASKED,
    ) -> "Exam":  # fmt: skip
        """`texts` of each task; `pictures` of the split "dev", which no stage trains on."""
        scenes = [sample_scene("dev", i) for i in range(pictures)]
        return cls(text_questions(texts), scenes, FeatureCache.of_scenes(model, processor, scenes).features)


def text_questions(count: int = TEXTS) -> dict[str, list[tuple[str, str]]]:
    """Held-out text tasks, none of which needs a picture: task -> (prompt, right answer), `count` of each."""

    def pair(conversation: Conversation) -> tuple[str, str]:
        return conversation[0]["content"], conversation[1]["content"]

    numbers = range(TEXT_EXAM, TEXT_EXAM + count)
    # captions and descriptions have many right answers, so of listed scenes only questions are asked
    listed = [listed_scene(number, turns=1, captions=0.0, descriptions=0.0) for number in numbers]
    written = ([translation(number) for number in numbers], [small_talk(number) for number in numbers], listed)
    return {task: [pair(one) for one in texts] for task, texts in zip(TEXT_TASKS, written, strict=True)}


def text_scores(
    model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, exam: Exam, precision: str = "fp32"
) -> Scores:
    """task -> the share of exact answers, the language model being asked alone."""
    scores = {}
    for task, pairs in exam.texts.items():
        asked = [Asked(prompt) for prompt, _ in pairs]
        said = answer(model, processor, asked, exam.features, SHORT, precision, task, BATCH)
        right = sum(normalised(a) == normalised(b) for a, (_, b) in zip(said, pairs, strict=True))
        scores[task] = round(right / len(pairs), 4)
    return scores


def picture_scores(
    model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, exam: Exam, precision: str = "fp32"
) -> Scores:
    """In both languages: questions answered right; of descriptions precision and recall. In English: words, looking."""
    right = asked_in_all = named = true = hit = 0
    lengths = {}
    for lang in LANGUAGES:
        items = exam_questions(exam.scenes, lang)
        asked = [Asked(item.question.text, item.picture) for item in items]
        said = answer(model, processor, asked, exam.features, SHORT, precision, f"questions, {lang}", BATCH)
        right += sum(is_right(item.question, text) for item, text in zip(items, said, strict=True))
        asked_in_all += len(items)
        prompts = [Asked(PROMPTS[lang], i) for i in range(len(exam.scenes))]
        told = answer(model, processor, prompts, exam.features, LONG, precision, f"descriptions, {lang}", BATCH)
        for scene, text in zip(exam.scenes, told, strict=True):
            there, said_there = {(t.kind, t.colour) for t in scene.things}, set(read_facts(text).things)
            hit, named, true = hit + len(there & said_there), named + len(said_there), true + len(there)
        lengths[lang] = sum(len(text.split() if lang == "en" else text) for text in told) / len(told)
    scores = {"questions": right / asked_in_all, "precision": hit / max(1, named), "recall": hit / true}
    looks = attention_to_things(model, processor, exam.scenes, exam.features)
    scores |= {"words": lengths["en"], "on the picture": looks.on_picture, "on the thing": looks.on_thing}
    return {name: round(score, 4) for name, score in scores.items()}


def picture_rows(seed: int, count: int, pictures: int = PICTURES, text_rows: bool = True) -> list[Sample]:
    """The first `count` rows of stage 2; without text rows, the next rows with a picture take their places."""
    rows = SceneRows("sft", pictures, 2 * count, seed)
    kept = (row for row in rows if text_rows or row.images)
    return [row for row, _ in zip(kept, range(count), strict=False)]


def train_arm(
    arm: Arm, seed: int, cache: FeatureCache, parent: Path, precision: str, steps: int = STAGE.steps, **options: Any
) -> tuple[MiniVLMForConditionalGeneration, MiniVLMProcessor]:
    """Go through a short stage 2 in one way, from `parent`; `options` as `train` takes them. No checkpoint is kept."""
    model, processor, _ = load_checkpoint(parent)
    stage = replace(STAGE, steps=steps)
    rows = picture_rows(seed, steps * stage.batch_size * stage.accumulation, len(cache), arm.text_rows)
    prefixes = [prefix for name in arm.trains for prefix in blocks(model)[name]]
    with tempfile.TemporaryDirectory(dir=".") as out, only(model, prefixes):
        train(
            model, processor, rows, stage, f"{out}/sft", parent=parent, seed=seed, features=cache,
            precision=precision, save_every=steps, **options,
        )  # fmt: skip
    return model, processor


# ---- results


def read_results(file: Path | None = None) -> dict[str, Any]:
    """What `COMMAND` wrote: command, stage, sizes, before, and arms -> trains, parameters, text_rows, seeds."""
    return json.loads((file or data_folder() / RESULTS).read_text("utf-8"))


def seeds_of(results: Mapping[str, Any], arm: str, measure: str) -> list[float]:
    """What each seed of an arm reached in a measure."""
    return [scores[measure] for scores in results["arms"][arm]["seeds"].values()]


def mean_of(results: Mapping[str, Any], arm: str, measure: str) -> float:
    """What the seeds of an arm reached in a measure, on average."""
    values = seeds_of(results, arm, measure)
    return sum(values) / len(values)


def compared(results: Mapping[str, Any], arm: str, measure: str, against: str | None = None) -> Effect:
    """An arm in a measure against another one, or against the weights from which all began, which have no spread."""
    return effect(
        seeds_of(results, against, measure) if against else [results["before"][measure]],
        seeds_of(results, arm, measure),
    )


def in_words(name: str, found: Effect) -> str:
    """An effect as a sentence that claims no more than was measured."""
    points = f"{name}: {100 * found.difference:+.1f} points, spread of the seeds {100 * found.seed_range:.1f}"
    return f"{points}: {'an effect' if found.claimed else 'no effect that three seeds could show'}"


def run(file: Path, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Do the runs that are not in `file` yet; write it after each."""
    parent = data_folder() / "pretrain"
    model, processor, meta = load_checkpoint(parent)
    results = _begin(file, meta)
    results["sittings"] += 1
    exam, precision = Exam.of(model, processor), results["precision"] or choose_precision(model)
    results["precision"] = precision
    results["before"] = text_scores(model, processor, exam) | picture_scores(model, processor, exam)
    cache = FeatureCache.of_scenes(
        model, processor, [sample_scene("train", i) for i in range(PICTURES)], precision=precision
    )
    for seed in seeds:
        for name, arm in ARMS.items():
            entry = results["arms"].setdefault(name, _about(arm, model))
            if str(seed) not in entry["seeds"]:
                began = time.perf_counter()
                trained, _ = train_arm(arm, seed, cache, parent, precision)
                scores = text_scores(trained, processor, exam) | picture_scores(trained, processor, exam)
                results["seconds"] = round(results["seconds"] + time.perf_counter() - began)
                entry["seeds"][str(seed)] = scores
                _write(file, results)
    return results


def _begin(file: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The results so far, if they began at the same weights and with the same stage; otherwise none."""
    stage = {name: getattr(STAGE, name) for name in ("steps", "batch_size", "accumulation", "warmup_steps")}
    made_from = {"command": COMMAND, "parent": meta["hashes"]["projector"], "stage": stage}
    sizes = {"texts": TEXTS, "pictures": PICTURES_ASKED}
    if file.is_file() and made_from.items() <= (found := read_results(file)).items():
        return found
    about = {"sizes": sizes, "cores": os.cpu_count(), "precision": None, "sittings": 0, "seconds": 0}
    return made_from | about | {"arms": {}}


def _about(arm: Arm, model: MiniVLMForConditionalGeneration) -> dict[str, Any]:
    prefixes = [prefix for name in arm.trains for prefix in blocks(model)[name]]
    return {"trains": list(arm.trains), "parameters": size(model, prefixes), "text_rows": arm.text_rows, "seeds": {}}


def _write(file: Path, results: Mapping[str, Any]) -> None:
    aside = file.with_suffix(".partial")
    aside.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    aside.replace(file)


# ---- figures


def forgetting_figure(results: Mapping[str, Any], live: Scores | None = None) -> Figure:
    """Text tasks before stage 2 and after it, with and without text rows: one mark for each seed.

    Args:
        results: from `read_results`.
        live: scores of one more run, made on the spot without text rows; a star.
    """
    looks = {WITH: (BLUE, "o", "after, with text rows", 0.2), WITHOUT: (ORANGE, "^", "after, without", -0.2)}
    with style():
        figure = Figure(figsize=(8.6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for place, task in enumerate(TEXT_TASKS):
            before = results["before"][task]
            axes.plot([before] * 2, [-place - 0.4, -place + 0.4], color=GREY, linewidth=3, zorder=1)
            for arm, (colour, mark, name, up) in looks.items():
                values = seeds_of(results, arm, task)
                y = -place + up
                axes.plot([min(values), max(values)], [y, y], color=colour, linewidth=1.2, zorder=2)
                label = name if place == 0 else None
                axes.plot(values, [y] * len(values), mark, color=colour, markersize=8, alpha=0.8, label=label, zorder=3)
            if live is not None:
                star = {"markersize": 13, "color": "white", "markeredgecolor": ORANGE, "markeredgewidth": 1.6}
                axes.plot(live[task], -place - 0.2, "*", label="this run" if place == 0 else None, zorder=4, **star)
        axes.plot([], [], color=GREY, linewidth=3, label="before stage 2")
        axes.set_yticks([-place for place in range(len(TEXT_TASKS))], TEXT_TASKS)
        axes.set(xlim=(-0.02, 1.03), ylim=(-len(TEXT_TASKS) + 0.4, 0.6), xlabel="share of exact answers, text alone")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="x", color="#E8E8E8")
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, 1.2), ncols=4, frameon=False, fontsize=9)
    return figure


def choices_figure(results: Mapping[str, Any], measures: Mapping[str, str]) -> Figure:
    """Every choice of what to unfreeze, in a panel for each measure: one mark for each seed, a line where it began.

    Args:
        measures: name of a measure in the results -> the panel's title.
    """
    names = _by_size(results)
    with style():
        figure = Figure(figsize=(11.5, 3.2), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12)
        for number, (measure, title) in enumerate(measures.items()):
            axes = figure.add_subplot(1, len(measures), number + 1)
            axes.axvline(results["before"][measure], color=GREY, linewidth=2, linestyle="--")
            for place, name in enumerate(names):
                values = seeds_of(results, name, measure)
                axes.plot([min(values), max(values)], [-place] * 2, color=BLUE, linewidth=1.2)
                axes.plot(values, [-place] * len(values), "o", color=BLUE, markersize=7, alpha=0.7)
            axes.set_title(title)
            axes.margins(x=0.12)
            axes.set_ylim(-len(names) + 0.5, 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(lambda value, _, measure=measure: _shown(measure, value))
            axes.grid(axis="x", color="#E8E8E8")
            axes.set_axisbelow(True)
            axes.tick_params(axis="y", length=0)
            labels = [f"{name}\n{results['arms'][name]['parameters']:,}" for name in names] if number == 0 else []
            axes.set_yticks([-place for place in range(len(labels))], labels, fontsize=9, color=INK)
        began = (results["before"][next(iter(measures))], -len(names) + 1.5)
        figure.axes[0].annotate("before", began, (5, 0), textcoords="offset points", fontsize=8.5, va="center")
    return figure


def _by_size(results: Mapping[str, Any]) -> list[str]:
    """The choices, that with the fewest parameters first."""
    return sorted(CHOICES, key=lambda name: results["arms"][name]["parameters"])


def show_forgetting(results: Mapping[str, Any], live: Scores | None = None) -> None:
    """`forgetting_figure` with alternative text and a summary."""
    told = [
        f"{task} {results['before'][task]:.0%} before, {mean_of(results, WITH, task):.0%} after it with text rows, "
        f"{mean_of(results, WITHOUT, task):.0%} without"
        for task in TEXT_TASKS
    ]
    star = (
        "" if live is None else f" A star for this run: {', '.join(f'{task} {live[task]:.0%}' for task in TEXT_TASKS)}."
    )
    alt = f"Three rows, one for each task; a mark for each seed. Right answers, on average: {'; '.join(told)}.{star}"
    show(forgetting_figure(results, live), alt, f"Right without any picture: {'; '.join(told)}.")


def show_choices(results: Mapping[str, Any], measures: Mapping[str, str]) -> None:
    """`choices_figure` with alternative text and a summary."""
    told = {
        name: ", ".join(
            f"{title} {_shown(measure, mean_of(results, name, measure))}" for measure, title in measures.items()
        )
        for name in _by_size(results)
    }
    began = ", ".join(f"{title} {_shown(measure, results['before'][measure])}" for measure, title in measures.items())
    alt = (
        f"{len(measures)} panels, a row for each choice, a dot for each seed, a dashed line where all began: {began}. "
    )
    first = next(iter(measures))
    shown = "; ".join(f"{name} {_shown(first, mean_of(results, name, first))}" for name in told)
    show(
        choices_figure(results, measures),
        alt + " ".join(f"{name}: {line}." for name, line in told.items()),
        f"{measures[first].capitalize()}: {shown}; before {_shown(first, results['before'][first])}.",
    )


def _shown(measure: str, value: float) -> str:
    """A measure's value as people write it: words as a number, all else as a share."""
    return f"{value:.0f}" if measure == "words" else f"{value:.0%}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="these seeds only")
    options = parser.parse_args()
    results = run(data_folder() / RESULTS, options.seeds)
    for task in TEXT_TASKS:
        print(in_words(task, compared(results, WITH, task, WITHOUT)))


if __name__ == "__main__":
    main()
