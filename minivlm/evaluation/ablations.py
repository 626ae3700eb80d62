"""Three small experiments on why a model names what is not there, three seeds each: `minivlm experiment`.

A **variant** is one way of training. All variants of a seed share its pictures, its questions and their order, and
stage 1 of their language model; they differ in one thing.

* **length**: stage 2 answers "What is in this picture?" with one clause ("short") or with several sentences ("long"),
  about the same scenes, naming the same things.
* **noise**: of the long answers a share carries one plausible sentence that is not true, as machine-written
  instruction data does ("noise 10%", "noise 30%"; none in "long").
* **lm**: the same two stages on a smaller language model ("small lm"), made by the same text-only recipe as the
  shipped one (`minivlm experiment small-lm`). Its score **from words** says how good it is before it sees any image.

Each variant is scored on pictures of the "dev" split, after stage 1 and after stage 2, in two ways of decoding:
greedily, and **sampled**, where words are drawn as probable as the model finds them. A habit that the model has in
three answers of ten is never the most probable one, and greedy decoding hides it. What differs from seed to seed is W
at the start, the wording of the samples and their order; the language models are the same for all seeds.

Letters as in `config.py`.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minivlm.checkpoint import load_checkpoint, read_meta
from minivlm.config import PROMPTS, STAGES, Stage
from minivlm.data.samples import Sample
from minivlm.evaluation.exam import LONG, SHORT
from minivlm.evaluation.metrics import Estimate, estimate, score_descriptions, score_pope
from minivlm.evaluation.questions import POPE_SAMPLINGS, Reply, pope_questions
from minivlm.generate import ask, reply
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.pretraining.small_lm import SMALL_LM
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.files import write_file, write_json
from minivlm.runtime.paths import BASE
from minivlm.runtime.precision import choose_precision
from minivlm.scenes.facts import USUAL, Scene, random_stream, sample_scene
from minivlm.scenes.features import scene_features
from minivlm.scenes.language import caption, read_facts
from minivlm.scenes.samples import SceneSamples
from minivlm.train import Trainer

SHIPPED = "results/experiments.json"
STEPS = {"pretrain": 250, "sft": 100}  # about a third and a quarter of the shipped stages
SPLIT, LANGUAGE = "dev", "en"  # of what is scored
MENTIONS = 5  # the fifth mention stands for all later ones
SAMPLES = 12  # answers that are kept to be read


@dataclass(frozen=True)
class Variant:
    """One way of training.

    `base` names the checkpoint of the base models in `data/`; `short` is whether stage 2 answers the prompt with one
    clause; `noise` is the share of long answers with a sentence that is not true.
    """

    base: str = BASE
    short: bool = False
    noise: float = 0.0

    def samples(self, pictures: int, count: int, seed: int, features: torch.Tensor) -> Sequence[Sample]:
        """What stage 2 is trained on."""
        kind = ShortAnswers if self.short else SceneSamples
        return kind("sft", pictures, count, seed, noise=self.noise, features=features)


VARIANTS = {
    "long": Variant(),
    "short": Variant(short=True),
    "noise 10%": Variant(noise=0.1),
    "noise 30%": Variant(noise=0.3),
    "small lm": Variant(base=SMALL_LM),
}
EXPERIMENTS = {"length": ("short", "long"), "noise": ("long", "noise 10%", "noise 30%"), "lm": ("small lm", "long")}


class ShortAnswers(SceneSamples):
    """Samples of stage 2 whose descriptions are captions: one clause about the same things. All else is the same."""

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`; an IndexError if there is none."""
        sample = super().__getitem__(index)
        if "(description)" not in sample.name:
            return sample
        scene = sample_scene(self.split, index % self.pictures)
        rng = random_stream("short answer", self.seed, self.split, index)
        text = caption(scene, self.language(index), rng)
        question, answer, *rest = sample.messages
        return replace(sample, messages=[question, answer | {"content": text}, *rest])


@dataclass(frozen=True)
class AblationPlan:
    """What is done, and where.

    Attributes:
        out: the folder of the results; whatever is finished there is not done again.
        data: the folder of the base weights.
        seeds: one run of every variant each.
        steps: optimizer steps by stage.
        pictures, scored: how many are trained with; how many of the "dev" split are described.
        precision: "bf16", "fp32", or "auto" to measure.
        command: what was typed, for the record.
    """

    out: Path
    data: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: Mapping[str, int] = field(default_factory=lambda: dict(STEPS))
    pictures: int = 5000
    scored: int = 400
    precision: str = "auto"
    command: str = "minivlm experiment"

    def stage(self, name: str) -> Stage:
        """A stage of the scenes preset in this experiment's length."""
        steps, stage = self.steps[name], STAGES["scenes"][name]
        return replace(stage, steps=steps, warmup_steps=min(stage.warmup_steps, max(1, steps // 5)))

    def as_json(self) -> dict[str, Any]:
        """What decides the results, but for the seed."""
        stages = {name: self.stage(name) for name in STEPS}
        return {
            "steps": {name: stage.steps for name, stage in stages.items()},
            "rows_a_step": {name: stage.batch_size * stage.accumulation for name, stage in stages.items()},
            "learning_rates": {name: dict(stage.learning_rates) for name, stage in stages.items()},
            "pictures": self.pictures,
            "scored": {"split": SPLIT, "pictures": self.scored},
        }


def experiment(plan: AblationPlan, names: Iterable[str] = tuple(EXPERIMENTS)) -> dict[str, Any]:
    """Train and score all variants of some experiments for all seeds; write `experiments.json` into `plan.out`.

    Returns:
        What it holds: plain JSON; "variants" -> variant -> "runs", one a seed, each with "pretrain" and "sft" ->
        language -> what `score` gives.

    Raises:
        ValueError: there is no such experiment; or the folder holds runs of another plan.
        CheckpointError: a base checkpoint is missing; the small language model's is made by `make_small_lm`.
    """
    if unknown := set(names) - set(EXPERIMENTS):
        raise ValueError(f"no experiment {', '.join(sorted(unknown))}; choose from {', '.join(EXPERIMENTS)}")
    variants = [variant for variant in VARIANTS if any(variant in EXPERIMENTS[name] for name in names)]
    bases = {VARIANTS[variant].base: read_meta(plan.data / VARIANTS[variant].base) for variant in variants}
    lab = Lab(plan)
    runs = {variant: [] for variant in variants}
    for seed, variant in product(plan.seeds, variants):
        runs[variant].append(lab.run(variant, seed))
    results = {
        "command": plan.command,
        "seeds": list(plan.seeds),
        **plan.as_json(),
        "precision": lab.precision,
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": bases[BASE]["versions"] if BASE in bases else {},
        "minutes": round(sum(run["seconds"] for variant in variants for run in runs[variant]) / 60, 1),
        "language_models": {name: _language_model(plan.data / name, meta) for name, meta in bases.items()},
        "variants": {variant: {"base": VARIANTS[variant].base, "runs": runs[variant]} for variant in variants},
    }
    text = json.dumps(results, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    write_file(plan.out / Path(SHIPPED).name, text.replace('{"seed"', '\n{"seed"') + "\n")
    return results


def _language_model(folder: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """How large a language model is, and how well it reads from words alone."""
    parameters = sum(p.numel() for p in load_checkpoint(folder)[0].language_model.parameters())
    about = {"hash": meta["hashes"]["language_model"][:12], "from_words": meta["metrics"]["language_model"]}
    return {"parameters": parameters} | about


class Lab:
    """What all runs of a plan share: the pictures as features (the encoder is the same for all), and the precision."""

    def __init__(self, plan: AblationPlan):
        model, processor, _ = load_checkpoint(plan.data / BASE)
        self.plan = plan
        self.precision = choose_precision(model) if plan.precision == "auto" else plan.precision

        def features(scenes: list[Scene], name: str) -> torch.Tensor:
            return scene_features(model, processor, scenes, plan.out / f"{name}.safetensors", self.precision)

        self.training = features([sample_scene("train", i) for i in range(plan.pictures)], "training")  # (I, N, Dv)
        self.scenes = [sample_scene(SPLIT, i) for i in range(plan.scored)]
        self.patch_features = features(self.scenes, SPLIT)  # (I, N, Dv)

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Both stages of a variant and their scores, from its file if they were made before."""
        folder, variant = self.plan.out / f"seed-{seed}", VARIANTS[name]
        file = folder / f"{name.replace(' ', '-').replace('%', '')}.json"
        made_by = self.plan.as_json() | {"precision": self.precision}
        if file.is_file():
            result = json.loads(file.read_text("utf-8"))
            if result.pop("made_by") != made_by:
                raise ValueError(f"{file} was made by another plan; choose another folder, or delete this one")
            return result
        first = folder / f"pretrain-of-{variant.base}"
        scored, seconds = first.with_suffix(".json"), 0.0  # stage 1 serves all variants; its time counts for the first
        if not scored.is_file():
            stage_1 = partial(SceneSamples, "pretrain")
            log, scores = self._train("pretrain", seed, self.plan.data / variant.base, first, stage_1)
            write_json(scored, scores)
            seconds = sum(entry["seconds"] for entry in log)
        log, scores = self._train("sft", seed, first, folder / file.stem, variant.samples)
        seconds += sum(entry["seconds"] for entry in log)
        result = {"seed": seed, "seconds": round(seconds), "losses": [round(entry["loss"], 3) for entry in log]}
        result |= {"pretrain": json.loads(scored.read_text("utf-8")), "sft": scores}
        write_json(file, result | {"made_by": made_by})
        return result

    def _train(self, name: str, seed: int, parent: Path, out: Path, samples: Callable) -> tuple[list[dict], dict]:
        """One stage; `samples` makes what it trains on. Returns the log and the scores by language."""
        model, processor, _ = load_checkpoint(parent)
        stage = self.plan.stage(name)
        count = stage.steps * stage.batch_size * stage.accumulation
        training = samples(self.plan.pictures, count, seed, features=self.training)
        options = {"parent": parent, "seed": seed, "precision": self.precision, "command": self.plan.command}
        log = Trainer(model, processor, training, stage, out, **options).fit()
        return log, {LANGUAGE: score(model, processor, self.scenes, self.patch_features, LANGUAGE)}


# ---- scores


def score(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    scenes: Sequence[Scene],
    patch_features: torch.Tensor,
    lang: str,
) -> dict[str, Any]:
    """Have a model describe `scenes` by their features (I, N, Dv) and answer POPE's questions about them; score both.

    Returns:
        What `score_texts` gives for greedy answers; "sampled": the same for sampled ones; "pope": sampling -> accuracy,
        yes_ratio (greedy).
    """
    prompts = [ask(PROMPTS[lang], features) for features in patch_features]
    texts = reply(model, processor, prompts, max_new_tokens=LONG, title=f"descriptions, {lang}")
    items = pope_questions(scenes, lang)
    prompts = [ask(item.question.text, patch_features[item.picture]) for item in items]
    answers = reply(model, processor, prompts, max_new_tokens=SHORT, title=f"yes or no, {lang}")
    pope = score_pope([Reply(item, text) for item, text in zip(items, answers, strict=True)])
    return score_texts(scenes, texts, lang) | {
        "sampled": score_texts(scenes, sampled(model, processor, patch_features, PROMPTS[lang]), lang),
        "pope": {how: {name: pope[how][name] for name in ("accuracy", "yes_ratio")} for how in POPE_SAMPLINGS},
    }


def score_texts(scenes: Sequence[Scene], texts: Sequence[str], lang: str) -> dict[str, Any]:
    """Score one description per scene.

    Returns:
        "precision", "recall" (kind with colour), "chair_i", "chair_s", "length", "usual" (of `usual_share`): estimates;
        "mentions": what `invented_by_mention` gives; "samples": the first texts.
    """
    scores = score_descriptions(scenes, texts, lang, fully=False)
    scores |= scores["things"]["pair"]["all"]["any"]
    return {
        **{name: scores[name] for name in ("precision", "recall", "chair_i", "chair_s", "length")},
        "usual": usual_share(scenes, texts),
        "mentions": invented_by_mention(scenes, texts),
        "samples": list(texts[:SAMPLES]),
    }


@torch.no_grad()
def sampled(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    patch_features: torch.Tensor,
    prompt: str,
    seed: int = 0,
) -> list[str]:
    """One answer to a prompt about each picture (I, N, Dv), each word drawn as probable as the model finds it."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    prompt_ids = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True)[0]
    texts = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for features in patch_features.split(100):
            ids = torch.tensor([prompt_ids] * len(features))  # (B, T)
            whole = model.generate(input_ids=ids, patch_features=features, do_sample=True, top_k=0, max_new_tokens=LONG)
            texts += processor.tokenizer.batch_decode(whole[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def invented_by_mention(scenes: Sequence[Scene], texts: Sequence[str], mentions: int = MENTIONS) -> list[Estimate]:
    """CHAIR_i of all first mentions, of all second ones, and so on; the last stands for all from there on."""
    rows = [[] for _ in range(mentions)]
    for i, invented in enumerate(_invented(scenes, texts)):
        for position, kind in enumerate(invented):
            rows[min(position, mentions - 1)].append((i, kind is not None, 1))
    return [estimate(row) for row in rows]


def usual_share(scenes: Sequence[Scene], texts: Sequence[str]) -> Estimate:
    """Of the invented things, the share of usual inhabitants of the setting; by chance a quarter, 4 kinds of 16."""
    invented = [[kind for kind in kinds if kind] for kinds in _invented(scenes, texts)]
    usual = [sum(kind in USUAL[scene.setting] for kind in kinds) for scene, kinds in zip(scenes, invented, strict=True)]
    return estimate((i, usual[i], len(kinds)) for i, kinds in enumerate(invented))


def _invented(scenes: Sequence[Scene], texts: Sequence[str]) -> Iterator[list[str | None]]:
    """For each mention of an answer its kind where that is not in the picture, else None."""
    for scene, text in zip(scenes, texts, strict=True):
        present = {thing.kind for thing in scene.things}
        yield [None if kind in present else kind for kind, _ in read_facts(text).things]


class Effect(NamedTuple):
    """Two variants compared: the means over seeds, their difference, the wider range over seeds, whether it counts."""

    before: float
    after: float
    difference: float
    seed_range: float
    claimed: bool


def effect(before: Sequence[float], after: Sequence[float]) -> Effect:
    """Compare one measure of two variants, one value per seed.

    The difference of the means is claimed where it exceeds the range over seeds (largest minus smallest) of either.
    Three seeds are few: of six equal draws, three lie all above the other three one time in ten by chance.
    """
    means = [sum(values) / len(values) for values in (before, after)]
    seed_range = max(max(values) - min(values) for values in (before, after))
    difference = means[1] - means[0]
    return Effect(*means, difference, seed_range, abs(difference) > seed_range)


def values(results: Mapping[str, Any], variant: str, measure: str, lang: str = "en", stage: str = "sft") -> list[float]:
    """One measure of a variant, as `estimate_of` takes it: one value per seed."""
    return [estimate_of(run[stage][lang], measure)["value"] for run in results["variants"][variant]["runs"]]


def estimate_of(scored: Mapping[str, Any], measure: str) -> Estimate:
    """One measure of what `score` gives: a name of `score_texts`; behind "sampled ", of sampled answers; or "pope"."""
    if measure == "pope":
        return scored["pope"]["adversarial"]["accuracy"]
    sampling, _, name = measure.rpartition(" ")
    return (scored[sampling] if sampling else scored)[name]


def as_text(results: Mapping[str, Any], lang: str = "en") -> str:
    """The results as a table for a terminal: the mean of the seeds, and the smallest and largest."""
    measures = ("precision", "recall", "chair_i", "chair_s", "sampled chair_i", "pope", "length")
    lines = [f"{'':<22}" + "".join(f"{name:>20}" for name in measures)]
    first = {about["base"]: variant for variant, about in reversed(results["variants"].items())}.values()
    for stage, variants in (("pretrain", first), ("sft", results["variants"])):  # variants of one base share stage 1
        for variant in variants:
            cells = []
            for name in measures:
                scores = [value for value in values(results, variant, name, lang, stage) if value is not None]
                digits = 1 if name == "length" else 3
                shown = (sum(scores) / len(scores), min(scores), max(scores)) if scores else ()
                cells.append(f"{'{} ({}–{})'.format(*(f'{v:.{digits}f}' for v in shown)) if shown else '–':>20}")
            lines.append(f"{f'{stage}, {variant}':<22}" + "".join(cells))
    return "\n".join(lines)
