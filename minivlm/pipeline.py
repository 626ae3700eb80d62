"""The main job: base weights, pictures, stage 1, stage 2, the exam, the report; and single stages.

Every stage leaves a checkpoint in the run's folder, so a run that was stopped goes on where it was.
"""

import dataclasses
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minivlm.checkpoint import META, load_checkpoint, read_meta, require_parent, require_place
from minivlm.config import PRESETS, PROMPTS, STAGES, MiniVLMConfig, Stage
from minivlm.data.dataset import open_dataset
from minivlm.data.features import BATCH, FeatureError, FeatureStore, stored_precision
from minivlm.evaluation.exam import EXAM_PICTURES, HOLDOUT_PICTURES, QUESTIONED, Exam, evaluate, prepare_exam
from minivlm.generate import ask, reply
from minivlm.model import MiniVLMForConditionalGeneration, ledger
from minivlm.processor import MiniVLMProcessor
from minivlm.report import read_seeds, write_report
from minivlm.runtime.files import latest_folder, write_file
from minivlm.runtime.paths import BASE, PRETRAIN, SFT
from minivlm.runtime.precision import choose_precision
from minivlm.runtime.processes import from_all, from_main, processes
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.drawing.gallery import usable_cores
from minivlm.scenes.drawing.table import TABLE
from minivlm.scenes.facts import sample_scene
from minivlm.scenes.features import scene_features
from minivlm.scenes.samples import SceneSamples
from minivlm.train import Trainer

PICTURES = 5000  # of training, the same for both stages
RESULTS, SEEDS = "results.json", "results/seeds.json"


@dataclass(frozen=True)
class Plan:
    """What a run shall do.

    Attributes:
        out: the run's folder.
        data: the folder of the base weights.
        seed: decides W at the start, the samples and their order. The exam is the same for every seed.
        precision: of training, "bf16", "fp32", or "auto" for what a one-second probe finds faster.
        compiled: as in `Trainer`.
        pictures: how many pictures both stages train with.
        steps_scale: shortens or stretches both stages.
        exam: pictures of the exam; the hold-out and the questions shrink with it.
        workers: processes that draw; None: one per core that this process may use.
        resume: go on with what lies in `out`.
        command: what was typed, for the record.
    """

    out: Path
    data: Path
    seed: int = 0
    precision: str = "auto"
    compiled: bool | None = None
    pictures: int = PICTURES
    steps_scale: float = 1.0
    exam: int = EXAM_PICTURES
    workers: int | None = None
    resume: bool = True
    command: str = "minivlm run"

    def stage(self, name: str) -> Stage:
        """A stage of the scenes preset at this run's length."""
        stage = STAGES["scenes"][name]
        steps = max(1, round(stage.steps * self.steps_scale))
        return dataclasses.replace(stage, steps=steps, warmup_steps=min(stage.warmup_steps, steps // 2))


def run(plan: Plan) -> dict[str, Any]:
    """Do all of it; write `results.json` and the report into `plan.out`, and return what the report was made from.

    Raises what `load_checkpoint` and `Trainer` raise.
    """
    began, clock = time.perf_counter(), Clock()
    for name in (PRETRAIN, SFT):  # what cannot be saved is refused before hours are spent
        require_place(plan.out / name, plan.data / BASE)
    with clock("pictures"):
        model, processor, _ = load_checkpoint(plan.data / BASE)
        model.to(processes().device)
        precision = _precision(plan, model)
        features = training_features(plan, model, processor, precision)
    drawing_gb = peak_memory_gb(plan.workers or usable_cores())  # helpers draw; later there are none
    with clock("exam"):
        share = min(1.0, plan.exam / EXAM_PICTURES)
        holdout, questioned = (max(2, round(share * count)) for count in (HOLDOUT_PICTURES, QUESTIONED))
        exam = prepare_exam(model, processor, plan.exam, holdout, questioned, workers=plan.workers)
    table = [{"name": name, "scene": scene.to_dict(), "answers": {}} for name, scene in TABLE.items()]
    record = {"ledgers": {}, "losses": {}, "exam": {}, "table": table}
    for name, parent in ((PRETRAIN, plan.data / BASE), (SFT, plan.out / PRETRAIN)):
        stage = plan.stage(name)
        with clock(name):
            log = train_stage(plan, name, model, processor, parent, plan.out / name, features, precision)
        # a stage that went on from an earlier sitting took the time of both
        clock.seconds[name] = max(clock.seconds[name], sum(entry["seconds"] for entry in log))
        with clock("exam"):
            record["exam"][name] = evaluate(model, processor, exam)
            answers = table_answers(model, processor)
        record["ledgers"][name] = [list(row) for row in ledger(model, stage).rows]
        record["losses"][name] = [round(entry["loss"], 4) for entry in log]
        for i, row in enumerate(table):
            row["answers"][name] = {lang: texts[i] for lang, texts in answers.items()}
    record["seconds"] = clock.with_total(time.perf_counter() - began)
    record |= {"precision": precision} | _circumstances(plan, model, exam)
    record["peak_memory_gb"] = drawing_gb and max(drawing_gb, peak_memory_gb())
    write_file(plan.out / RESULTS, json.dumps(record, ensure_ascii=False, allow_nan=False))
    write_report(plan.out, record, read_seeds(plan.data / SEEDS))
    return record


def training_features(
    plan: Plan, model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, precision: str
) -> torch.Tensor:
    """Draw the training pictures and encode them (I, N, Dv), once for both stages. Several processes share the work.

    Each takes whole batches of the encoder, so that the features are the same to the last bit.
    """
    here = processes()
    share = BATCH * math.ceil(plan.pictures / BATCH / here.num_processes)
    mine = range(plan.pictures)[here.process_index * share : (here.process_index + 1) * share]
    title = "training pictures" if here.is_main_process else ""
    workers = plan.workers or max(1, usable_cores() // here.num_processes)
    scenes = [sample_scene("train", i) for i in mine]
    shares = from_all([scene_features(model, processor, scenes, None, precision, workers, title)] if mine else [])
    return shares[0] if len(shares) == 1 else torch.cat(shares)  # one process needs no copy


def train_stage(
    plan: Plan,
    name: str,
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    parent: Path,
    out: Path,
    features: torch.Tensor | None = None,
    precision: str | None = None,
) -> list[dict[str, Any]]:
    """Train one stage as planned, from `parent` into `out`; returns its log, and raises what `Trainer` raises."""
    stage = plan.stage(name)
    require_parent(read_meta(parent), stage, parent)  # what training would refuse is refused before minutes of drawing
    from_main(lambda: require_place(out, parent))  # it alone writes there
    model.to(processes().device)
    precision = precision or from_main(lambda: _precision(plan, model))
    if features is None:
        features = training_features(plan, model, processor, precision)
    count = stage.steps * stage.batch_size * stage.accumulation
    samples = SceneSamples(name, plan.pictures, count, plan.seed, features=features)
    return Trainer(
        model, processor, samples, stage, out, parent=parent, seed=plan.seed,
        precision=precision, compiled=plan.compiled, resume=plan.resume, command=plan.command,
    ).fit()  # fmt: skip


def recipe_for(config: MiniVLMConfig) -> str:
    """The preset of `STAGES` whose model has the widths of this one; a ValueError where there is none."""
    for name, make in PRESETS.items():
        preset = make()
        if (preset.vision_width, preset.language_width) == (config.vision_width, config.language_width):
            return name
    raise ValueError(
        f"the model's widths, {config.vision_width} and {config.language_width}, are those of no preset; say by "
        f"--recipe whose learning rates it shall have: {', '.join(STAGES)}"
    )


def sized_stage(recipe: str, name: str, **sizes: int | None) -> Stage:
    """A stage of a preset with other `steps`, `batch_size` or `accumulation`, where these are given."""
    stage = dataclasses.replace(STAGES[recipe][name], **{key: size for key, size in sizes.items() if size is not None})
    return dataclasses.replace(stage, warmup_steps=min(stage.warmup_steps, stage.steps // 2))


def train_on_dataset(
    dataset: str | Path,
    stage: Stage,
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    parent: Path,
    out: Path,
    features: Path | None = None,
    precision: str | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Train one stage on the samples of a data set, from `parent` into `out`; further options: `Trainer`. Its log.

    Args:
        features: a folder to keep features in; what is missing is encoded first. None encodes in every step.
        precision: as in `Trainer`; with `features`, None is that of the store, if there is one.

    Raises:
        DatasetError: there is no data set, or training on it could end at a sample.
        FeatureError: `features` holds features of something else, or has no room.
        CheckpointError, TrainingError, OSError: as `Trainer` does.
    """
    require_parent(read_meta(parent), stage, parent)
    samples = open_dataset(dataset)
    samples.require_trainable(processor)
    if features is not None:
        from_main(lambda: require_place(out, parent))  # what training would refuse is refused before hours of encoding
        if features.resolve().is_relative_to(out.resolve()):
            raise FeatureError(f"{features} lies in {out}, which every checkpoint replaces as a whole; take another")
        model.to(processes().device)
        precision = precision or from_main(lambda: stored_precision(features) or choose_precision(model))
        samples = samples.with_features(FeatureStore.build(features, samples, model, processor, precision))
    return Trainer(model, processor, samples, stage, out, parent=parent, precision=precision, **options).fit()


class Clock:
    """Seconds spent in named phases; a phase that comes again is added up."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time of a block."""
        began = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began

    def with_total(self, sitting: float) -> dict[str, float]:
        """Rounded seconds by phase, and their total: that of the last sitting, or of phases that took several."""
        phases = {phase: round(seconds, 1) for phase, seconds in self.seconds.items()}
        return phases | {"total": round(max(sitting, sum(phases.values())), 1)}


def table_answers(model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor) -> dict[str, list[str]]:
    """What a model says about the table's seven pictures, by language."""
    images = [draw(scene) for scene in TABLE.values()]
    return {lang: reply(model, processor, [ask(prompt, image) for image in images]) for lang, prompt in PROMPTS.items()}


def peak_memory_gb(helpers: int = 0) -> float | None:
    """The most memory that this process held until now, with so many helpers beside it, in GB; None on Windows.

    Ask for helpers while this process is small: Linux counts for a child what its parent held when it was started.
    """
    if sys.platform == "win32":
        return None
    import resource

    own, helper = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (own + helpers * helper) * (1 if sys.platform == "darwin" else 1024) / 1e9


def _precision(plan: Plan, model: MiniVLMForConditionalGeneration) -> str:
    """The precision that was asked for; with "auto" that of a run to go on with, or what the probe finds."""
    if plan.precision != "auto":
        return plan.precision
    folders = [latest_folder(folder) for folder in (plan.out / PRETRAIN, plan.out)]  # of a whole run, of one stage
    begun = [folder for folder in folders if (folder / META).is_file()]
    earlier = read_meta(begun[0]).get("precision") if begun and plan.resume else None
    return earlier or choose_precision(model)


def _circumstances(plan: Plan, model: MiniVLMForConditionalGeneration, exam: Exam) -> dict[str, Any]:
    """How large a run was, on what machine it was made, and from what."""
    hashes = read_meta(plan.data / BASE)["hashes"]
    sizes = {"pictures": plan.pictures, "exam": len(exam.scenes), "holdout": len(exam.holdout)}
    return {
        "seed": plan.seed,
        "command": plan.command,
        "sizes": sizes | {"questioned": exam.questioned},
        "machine": {"cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
        "versions": read_meta(plan.out / SFT)["versions"],
        "base": ", ".join(f"{part} {value[:12]}" for part, value in hashes.items() if part != "projector"),
        "ln_vocabulary": round(math.log(model.config.text_config.vocab_size), 3),
    }
