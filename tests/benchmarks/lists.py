"""How well the shipped language model turns lists of facts into captions: `python tests/benchmarks/lists.py`.

Writes `data/results/lists.json`: precision and recall of (colour, kind) pairs in the captions of held-out scenes, each
language, with bootstrap intervals over lists. The record of its training (`data/base/minivlm.json`) has the first 500.
"""

import argparse
from collections.abc import Sequence

from minivlm.checkpoint import load_checkpoint
from minivlm.evaluation import estimate
from minivlm.pretraining.language_model import ROUNDS, LanguageModelTrainer
from minivlm.runtime.files import write_json
from minivlm.runtime.paths import BASE, data_folder
from minivlm.scenes.vocabulary import LANGUAGES

FILE = "results/lists.json"


def measure(lists: int) -> dict:
    """Precision and recall by language."""
    model, processor, _ = load_checkpoint(data_folder() / BASE)
    recipe, lessons = ROUNDS[-1]
    trainer = LanguageModelTrainer(model.language_model, processor, recipe, lessons, bf16=False)
    scores = {}
    for lang in LANGUAGES:
        counts = list(enumerate(trainer.compare_captions(lang, lists, "list")))
        scores[lang] = {
            "precision": estimate((i, right, named) for i, (right, named, _) in counts),
            "recall": estimate((i, right, true) for i, (right, _, true) in counts),
        }
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lists", type=int, default=5000)
    lists = parser.parse_args(arguments).lists
    command = f"python tests/benchmarks/lists.py --lists {lists}"
    write_json(data_folder() / FILE, {"command": command, "lists": lists, **measure(lists)})


if __name__ == "__main__":
    main()
