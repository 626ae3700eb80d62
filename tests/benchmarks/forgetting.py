"""Measure what stage 2 gains and what it forgets: short runs with three seeds each, and what each can do afterwards.

    python tests/benchmarks/forgetting.py

trains W and parts of the language model from `data/pretrain`, with and without the samples that have no image, and
writes `data/results/forgetting.json`, which notebook 04 reads. The file is replaced after each run, and a run that is
in it is not repeated, so a command that was stopped continues; `--seeds 0` does those of one seed. `sittings` counts
how often the command was started.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lessons import lesson_04
from lessons.lenses.blocks import blocks, size

from minivlm.checkpoint import load_checkpoint
from minivlm.config import PROMPTS
from minivlm.evaluation import exam_questions, is_right
from minivlm.generate import ask, reply
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime import choose_precision
from minivlm.runtime.files import write_json
from minivlm.runtime.paths import data_folder
from minivlm.scenes.facts import Scene, sample_scene
from minivlm.scenes.features import scene_features
from minivlm.scenes.language import read_facts
from minivlm.scenes.vocabulary import LANGUAGES

COMMAND = "python tests/benchmarks/forgetting.py"
SEEDS = (0, 1, 2)
IMAGES = 1600  # one for each sample of a run
EXAM_IMAGES = 40  # held-out


def image_scores(
    model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, scenes: Sequence[Scene], features: torch.Tensor
) -> dict[str, float]:
    """Accuracy, and precision and recall of descriptions, over both languages; English words and attention."""
    right = questions = named = true = hit = 0
    for lang in LANGUAGES:
        items = exam_questions(scenes, lang)
        conversations = [ask(item.question.text, features[item.picture]) for item in items]
        answers = reply(model, processor, conversations, max_new_tokens=32, batch_size=64, title=f"questions, {lang}")
        right += sum(is_right(item.question, text) for item, text in zip(items, answers, strict=True))
        questions += len(items)
        conversations = [ask(PROMPTS[lang], image) for image in features]
        texts = reply(model, processor, conversations, batch_size=64, title=f"descriptions, {lang}")
        for scene, text in zip(scenes, texts, strict=True):
            things, names = {(thing.kind, thing.colour) for thing in scene.things}, set(read_facts(text).things)
            hit, named, true = hit + len(things & names), named + len(names), true + len(things)
        if lang == "en":
            words = sum(len(text.split()) for text in texts) / len(texts)
    scores = {"questions": right / questions, "precision": hit / max(1, named), "recall": hit / true}
    attention = lesson_04.attention_to_things(model, processor, scenes, features)
    scores |= {"words": words, "on the picture": attention.on_image, "on the thing": attention.on_thing}
    return {name: round(score, 4) for name, score in scores.items()}


def run(file: Path, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Do the runs that are not in `file` yet, and write it after each."""
    parent = data_folder() / "pretrain"
    model, processor, meta = load_checkpoint(parent)
    results = _results_so_far(file, meta)
    results["sittings"] += 1
    results["precision"] = precision = results["precision"] or choose_precision(model)
    texts, scenes = lesson_04.text_questions(), [sample_scene("dev", i) for i in range(EXAM_IMAGES)]
    features = scene_features(model, processor, scenes)

    def scores(one: MiniVLMForConditionalGeneration) -> dict[str, float]:
        return lesson_04.text_scores(one, processor, texts) | image_scores(one, processor, scenes, features)

    results["before"] = scores(model)
    drawn = [sample_scene("train", i) for i in range(IMAGES)]
    training_features = scene_features(model, processor, drawn, precision=precision)
    for seed in seeds:
        for name, variant in lesson_04.VARIANTS.items():
            prefixes = [prefix for block in variant.trains for prefix in blocks(model)[block]]
            about = {"trains": list(variant.trains), "parameters": size(model, prefixes)}
            entry = results["variants"].setdefault(name, about | {"text_samples": variant.text_samples, "seeds": {}})
            if str(seed) not in entry["seeds"]:
                start = time.perf_counter()
                trained, _ = lesson_04.train_variant(variant, seed, training_features, parent, precision)
                entry["seeds"][str(seed)] = scores(trained)
                results["seconds"] = round(results["seconds"] + time.perf_counter() - start)
                write_json(file, results)
    return results


def _results_so_far(file: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The results in the file if they have the same parent and stage, otherwise empty ones."""
    stage = {name: getattr(lesson_04.STAGE, name) for name in ("steps", "batch_size", "accumulation", "warmup_steps")}
    origin = {"command": COMMAND, "parent": meta["hashes"]["projector"], "stage": stage}
    if file.is_file() and origin.items() <= (earlier := lesson_04.read_results(file)).items():
        return earlier
    sizes = {"texts": lesson_04.TEXTS, "pictures": EXAM_IMAGES}
    about = {"sizes": sizes, "cores": os.cpu_count(), "precision": None, "sittings": 0, "seconds": 0}
    return origin | about | {"variants": {}}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="these seeds only")
    options = parser.parse_args(arguments)
    results = run(data_folder() / lesson_04.RESULTS, options.seeds)
    for task in lesson_04.TEXT_TASKS:
        print(lesson_04.in_words(task, lesson_04.compared(results, lesson_04.WITH, task, lesson_04.WITHOUT)))


if __name__ == "__main__":
    main()
