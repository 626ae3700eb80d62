"""A made-up result of the whole pipeline: all that a report is made from. All numbers differ."""

from minivlm.evaluation import CONTROLS, EVERYONE, POPE_SAMPLINGS
from minivlm.evaluation.metrics import COUNTS, DISTANCES, LEVELS
from minivlm.scenes.drawing.table import TABLE
from minivlm.scenes.vocabulary import QUESTION_TYPES

STAGES, LANGUAGES = ("pretrain", "sft"), ("en", "zh")


def some_estimate(count: int, of: int) -> dict:
    if not of:
        return {"value": None, "low": None, "high": None, "numerator": 0, "denominator": 0}
    value = count / of
    return {
        "value": round(value, 5),
        "low": round(value * 0.9, 5),
        "high": round(value, 5) / 2 + 0.5,
        "numerator": count,
        "denominator": of,
    }


class Counted:
    """Estimates that all differ: 101/202, 102/203, ..."""

    def __init__(self, start: int):
        self.at = start

    def __call__(self) -> dict:
        self.at += 1
        return some_estimate(self.at, self.at + 101)


def description_scores(next_: Counted, fully: bool = True) -> dict:
    def score() -> dict:
        return {"precision": next_(), "precision_at_best": next_(), "recall": next_(), "pictures": 9}

    counts = COUNTS if fully else COUNTS[:1]
    things = {level: {d: {n: score() for n in counts} for d in DISTANCES} for level in LEVELS}
    return {"things": things} | {key: next_() for key in ("setting", "chair_i", "chair_s", "length")}


def exam_results(start: int) -> dict:
    """What `evaluate` gives for one stage and language."""
    next_ = Counted(start)
    keys = ("accuracy", "precision", "recall", "f1", "yes_ratio", "unreadable")
    return {
        "descriptions": {who: description_scores(next_, who == "model") for who in EVERYONE},
        "holdout": description_scores(next_),
        "questions": {who: {t: next_() for t in ("all", *QUESTION_TYPES)} for who in (*EVERYONE, "guess")},
        "guesses": dict.fromkeys(QUESTION_TYPES, "Two."),
        "pope": {who: {category: {key: next_() for key in keys} for category in POPE_SAMPLINGS} for who in EVERYONE},
        "chance": {who: {group: dict(levels) for group, levels in CHANCE.items()} for who in CONTROLS},
    }


CHANCE = {
    "descriptions": {"precision": 0.011, "recall": 0.012, "setting": 0.113, "chair_i": 0.814, "chair_s": 0.915},
    "questions": {type_: 0.201 + i / 1000 for i, type_ in enumerate(QUESTION_TYPES)},
    "pope": {category: 0.501 + i / 1000 for i, category in enumerate(POPE_SAMPLINGS)},
}


def make_run(seed: int = 7) -> dict:
    """All that `pipeline.run` records."""
    answers = {"en": "A red car in a park.", "zh": "公园里有一辆红色的汽车。"}
    return {
        "exam": {
            stage: {lang: exam_results(1000 * (2 * s + k) + 10 * seed) for k, lang in enumerate(LANGUAGES)}
            for s, stage in enumerate(STAGES)
        },
        "ledgers": {
            "pretrain": [["vision", 5_000_017, 0], ["W", 49_152, 49_152], ["language model", 8_000_003, 0]],
            "sft": [["vision", 5_000_017, 0], ["W", 49_152, 49_152], ["language model", 8_000_003, 8_000_003]],
        },
        "losses": {"pretrain": [8.5, 4.0, 2.25, 1.5], "sft": [3.5, 2.0, 1.25]},
        "table": [
            {"name": name, "scene": scene.to_dict(), "answers": {stage: dict(answers) for stage in STAGES}}
            for name, scene in TABLE.items()
        ],
        "seed": seed,
        "command": f"minivlm run --seed {seed}",
        "precision": "bf16",
        "sizes": {"pictures": 5000, "exam": 500, "holdout": 200, "questioned": 200},
        "seconds": {"pictures": 61.0, "pretrain": 122.0, "sft": 183.0, "exam": 30.0, "total": 396.0},
        "peak_memory_gb": 2.25,
        "machine": {"cores": 2, "system": "Linux x86_64"},
        "versions": {"torch": "2.9.1", "minivlm": "0.1.0"},
        "base": "vision 0123456789ab, language_model ba9876543210",
        "ln_vocabulary": 8.318,
    }
