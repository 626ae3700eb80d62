"""How well the shipped language model turns listed facts into captions:

    `python tests/benchmarks/lists.py`, about two minutes.

Writes `data/results/lists.json`: precision and recall of (colour, kind) pairs in the captions of held-out scenes, each
language, with bootstrap intervals over lists. The record of its training (`data/base/minivlm.json`) has the first 500.
"""

import argparse
import json

from minivlm.checkpoint import load_checkpoint
from minivlm.evaluation import estimate
from minivlm.pretraining.language_model import ROUNDS, LanguageModelTrainer
from minivlm.runtime.paths import BASE, data_folder
from minivlm.scenes.vocabulary import LANGUAGES

FILE = "results/lists.json"


def measure(lists: int) -> dict:
    """Figures by language."""
    model, processor, _ = load_checkpoint(data_folder() / BASE)
    recipe, lessons = ROUNDS[-1]
    reader = LanguageModelTrainer(model.language_model, processor, recipe, lessons, bf16=False)
    metrics = {}
    for lang in LANGUAGES:
        compared = list(enumerate(reader.compare_captions(lang, lists, "list")))
        metrics[lang] = {
            "precision": estimate((i, right, named) for i, (right, named, _) in compared),
            "recall": estimate((i, right, true) for i, (right, _, true) in compared),
        }
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lists", type=int, default=5000)
    lists = parser.parse_args().lists
    results = {"command": f"python tests/benchmarks/lists.py --lists {lists}", "lists": lists, **measure(lists)}
    (data_folder() / FILE).write_text(json.dumps(results, indent=1) + "\n", "utf-8")
