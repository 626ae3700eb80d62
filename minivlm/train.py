"""One loop for both stages: what differs between them is data (`config.STAGES`). Letters as in `config.py`.

Everything that decides the weights is a pure function of the parent checkpoint, the samples, the stage and the seed:
the order of the samples, the schedule, even dropout. So a run that was killed goes on from its last checkpoint and ends
with the bytes of one that never was, and several processes train as one does: each takes its share of every step's
examples, and the gradients are summed with one all-reduce.
"""

import io
import json
import math
import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm

from minivlm.checkpoint import load_checkpoint, part_hashes, read_meta, require_parent, require_place, save_checkpoint
from minivlm.config import IGNORE_INDEX, PROMPTS, Stage
from minivlm.data.order import SampleOrder, shard, step_seed
from minivlm.data.samples import Example, Sample
from minivlm.model import PARTS, MiniVLMForConditionalGeneration, draw_projector, ledger, set_trainable
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.files import latest_folder
from minivlm.runtime.precision import PRECISIONS, WorkingCopy, choose_compiled, choose_precision, give_back_memory
from minivlm.runtime.processes import first_interrupt, from_all, from_main, processes, sum_of_all

LOG, RESUME = "log.jsonl", "resume.pt"
IDENTITY = ("stage", "parent", "seed", "precision", "compiled", "rows", "recipe")  # what makes a run this one
PROBE_TEXTS = ("A red car and a white dog are in a park.", "公园里有一辆红色的汽车和一只白色的狗。", *PROMPTS.values())
PROBE_TOLERANCE = 0.02
ANEW = "start anew with resume=False (on the command line: --anew)"
TIDY_EVERY = 10  # steps
# Seconds between two drawings of the progress bar. Each sends some messages to a notebook; a program that reads them
# when the cell is done (nbval) loses those after the first 1,000 or 2,000, and with them the end of the cell.
BAR_EVERY = 1.0
PAD_TO = 32  # tokens: with few different shapes a step takes a tenth less time, and a fifth less memory stays behind


class TrainingError(ValueError):
    """A run cannot start or go on. The message says what was wrong and what to do."""


class Trainer:
    """One stage at work: `Trainer(…).fit()` trains it and writes its checkpoint.

    Stopped at any moment, the same call goes on where it was.

    Args:
        model: from `load_checkpoint(parent)` (stage 1 draws W anew). Trained in place, it ends in evaluation mode.
        samples: taken in an order that only `seed` decides, again and again if there are too few. Those with
            `patch_features` need no encoder; the images of the others are encoded in every step.
        stage: what trains, how fast, how long. Its `batch_size * accumulation` samples a step are of all processes.
        out: the checkpoint to write, with the parts that trained; the others are taken from `parent`. Of several
            processes only the main one reads and writes it: they need no disk in common.
        precision: "fp32", or "bf16" to compute in 16 bits (the weights stay in 32); None measures, `choose_precision`.
        compiled: compile the language model's layers; None where it pays and works, `choose_compiled`.
        resume: go on if `out` holds this very run. False starts anew and replaces it.
        save_every: steps from one checkpoint to the next.
        on_step: called after every step, in the main process, with the steps done, the loss and the model.
        command: what the user typed, for the record.

    Attributes:
        order: `order[step]` has the examples of a step, those of all processes.
        log: per step its step, loss, learning_rates, grad_norm, tokens, seconds, tokens_per_second.

    Raises:
        TrainingError: the model is not the parent's; `out` holds another run or a damaged one; there are no samples, or
            fewer in a step than processes; or two processes were given different things.
        CheckpointError, SampleError, FolderError, CompileError: what was given cannot be used, or not compiled.
        OSError: the checkpoint cannot be written: found out before the first step, but for a disk that fills up.
        ProcessError: another process stopped.
    """

    def __init__(
        self,
        model: MiniVLMForConditionalGeneration,
        processor: MiniVLMProcessor,
        samples: Sequence[Sample],
        stage: Stage,
        out: str | Path,
        *,
        parent: str | Path,
        seed: int = 0,
        precision: str | None = None,
        compiled: bool | None = None,
        resume: bool = True,
        save_every: int = 200,
        on_step: Callable[[int, float, MiniVLMForConditionalGeneration], None] | None = None,
        command: str = "",
    ):
        self.model, self.processor, self.stage, self.seed = model, processor, stage, seed
        self.out, self.parent = Path(out), Path(parent)
        self.save_every, self.on_step = save_every, on_step
        self.processes, self.interrupted, self.stopping = processes(), threading.Event(), False
        if not len(samples):
            raise TrainingError("there are no samples to train on; check the file or the recipe they come from")
        self.order = SampleOrder(samples, processor, stage.batch_size * stage.accumulation, seed)
        self.log: list[dict[str, Any]] = []
        self.grad_norm = math.nan  # of the last step, before it was scaled down
        self._check_options(precision)
        earlier = from_main(lambda: self._earlier_run(resume))
        model.to(self.processes.device)
        self.about = self._identity(earlier, precision, compiled, command)
        self._require_one_run()
        set_trainable(model, stage)
        self.optimizer = adamw(model, stage)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.frozen = self._frozen_hashes()
        if earlier:
            self._restore(earlier)
        encoder = all(example.patch_features is None for example in self.order[0])
        self.working_copy = WorkingCopy(model, self.about["precision"], self.about["compiled"], encoder=encoder)
        self.processes.print(ledger(model, stage))

    def fit(self) -> list[dict[str, Any]]:
        """All steps that are left, with a checkpoint every so often and at the end; returns the log.

        Raises:
            TrainingError: as `train_step` raises it; or a frozen weight moved.
            ImageError, SampleError, FeatureError: a sample of a step cannot be used.
            OSError, ProcessError: the checkpoint cannot be written; another process stopped.
            KeyboardInterrupt: Ctrl-C. The step at hand was finished and a checkpoint written.
        """
        steps, main = self.stage.steps, self.processes.is_main_process
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        options = {"desc": f"stage {self.stage.name}", "unit": "step", "mininterval": BAR_EVERY, "disable": not main}
        bar = tqdm(total=steps, initial=len(self.log), **options)
        try:
            with torch.random.fork_rng(devices), first_interrupt() as self.interrupted, bar:
                while len(self.log) < steps and not self.stopping:
                    began, examples = time.perf_counter(), self.order[len(self.log)]
                    loss = self.train_step(examples)
                    self._record(loss, examples, time.perf_counter() - began)
                    done = len(self.log)
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    bar.update()
                    if self.on_step is not None and main:
                        self.on_step(done, loss, self.model)
                    if done % TIDY_EVERY == 0:
                        give_back_memory()
                    if self.stopping or done % self.save_every == 0 or done == steps:
                        self.save()
        finally:
            self.model.zero_grad()
            give_back_memory()
        if self.stopping or self.interrupted.is_set():
            self.processes.print(
                f"Stopped after step {len(self.log)} of {steps}. {self.out} is a checkpoint that can be used as it "
                "is; run the same command again to go on from there."
            )
            raise KeyboardInterrupt
        return self.log

    def train_step(self, examples: list[Example]) -> float:
        """One optimizer step on the examples of all processes; returns the loss, a mean over their supervised tokens.

        Every process knows all examples, so it divides by their tokens before the gradients are summed.

        Raises:
            TrainingError: no token is supervised, or the loss or the gradient is not finite.
        """
        step, rank, count = len(self.log), self.processes.process_index, self.processes.num_processes
        supervised = self._supervised_tokens(examples)
        rates = learning_rates(step, self.stage)
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["part"]]
        torch.manual_seed(step_seed(self.seed, step, rank))  # for dropout
        self.optimizer.zero_grad(set_to_none=False)
        loss = torch.zeros((), device=self.processes.device)
        for part in shard(examples, rank, count, self.stage.accumulation):
            batch = self.processor.collate(part, pad_to_multiple_of=PAD_TO)
            batch = {name: tensor.to(self.processes.device) for name, tensor in batch.items()}
            share = supervised_loss(self.working_copy.model, batch) / supervised
            if share.requires_grad:  # without any image nothing leads to W
                self.working_copy.backward(share)
            loss += share.detach()
        mean, self.stopping = self._all_reduce(loss)
        name = f"step {step + 1} (its first samples are {_names(examples)})"
        self.grad_norm = optimizer_step([self.optimizer], self.parameters, self.stage.clip_norm, mean, name)
        self.working_copy.refresh()
        return mean

    def save(self) -> None:
        """Check that what is frozen is as it was; then the main process writes the checkpoint."""
        if moved := [part for part, value in self._frozen_hashes().items() if value != self.frozen[part]]:
            raise TrainingError(
                f"{', '.join(moved)} moved in stage {self.stage.name}, which trains {', '.join(self.stage.trains)} "
                "only; nothing was saved. Look for code that writes to these weights, such as in on_step"
            )
        if self.processes.is_main_process:
            self._write()
        self.processes.wait_for_everyone()

    # ---- before the first step

    def _check_options(self, precision: str | None) -> None:
        if self.stage.batch_size < self.processes.num_processes:
            raise TrainingError(
                f"a batch of {self.stage.batch_size} cannot be shared by {self.processes.num_processes} processes; "
                "raise batch_size"
            )
        if precision not in (None, *PRECISIONS):
            raise TrainingError(f"there is no precision {precision!r}; choose 'fp32' or 'bf16', or None to measure")

    def _earlier_run(self, resume: bool) -> dict[str, Any]:
        """What the run in `out` says about itself, if there is one to go on with. The place itself is checked first."""
        require_place(self.out, self.parent)
        folder = latest_folder(self.out)
        return read_meta(folder) if resume and folder.is_dir() and any(folder.iterdir()) else {}

    def _identity(self, earlier: Mapping, precision: str | None, compiled: bool | None, command: str) -> dict[str, Any]:
        """What makes this run this one and no other, as its checkpoint will say it."""
        origin = check_parent(self.model, self.processor, self.stage, self.parent)
        if self.stage.parent == "base":
            draw_projector(self.model, self.seed)
        if compiled is None and earlier:
            compiled = bool(earlier.get("compiled"))
        samples = self.stage.steps * self.order.step_size
        about = {
            "stage": self.stage.name,
            "command": command,
            "seed": self.seed,
            "recipe": asdict(self.stage),
            "rows": {"count": len(self.order.samples), "first": self.order.fingerprint()},
            "precision": from_main(lambda: precision or earlier.get("precision") or choose_precision(self.model)),
            "compiled": from_main(lambda: choose_compiled(self.model, samples) if compiled is None else compiled),
            "parent": origin,
        }
        return json.loads(json.dumps(about))  # as it will be read back

    def _require_one_run(self) -> None:
        """Machines may hold different files under the same names; nobody would notice, and the weights would differ."""
        runs = from_all([self.about])
        for number, about in enumerate(runs):
            if others := _differences(runs[0], about):
                raise TrainingError(
                    f"process {number} of {len(runs)} was given another run than the main process: its {others}; "
                    "give every machine the same parent, rows and options"
                )

    def _restore(self, earlier: Mapping[str, Any]) -> None:
        """Take weights, optimizer and log from `out`, if it holds this very run."""
        if others := _differences(self.about, earlier):
            raise TrainingError(f"{self.out} holds another run: its {others}; choose another folder, or {ANEW}")
        self.log, weights, state = from_main(lambda: self._progress(earlier))
        self.model.load_state_dict(weights)
        if state is not None:
            self.optimizer.load_state_dict(state)

    def _progress(self, earlier: Mapping[str, Any]) -> tuple[list[dict], dict[str, torch.Tensor], dict | None]:
        """The log, the weights and the optimizer's state as they lie in `out`."""
        folder, state = latest_folder(self.out), None
        file = folder / LOG
        try:
            log = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            if not earlier.get("finished"):
                file = folder / RESUME
                state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise TrainingError(f"{file} is missing or cut off ({error}), so the run cannot go on; {ANEW}") from error
        if len(log) != earlier.get("steps"):
            raise TrainingError(
                f"{folder / LOG} has {len(log)} steps, but the checkpoint was written after "
                f"{earlier.get('steps')}, so the run cannot go on; {ANEW}"
            )
        saved, _, _ = load_checkpoint(self.out, base=self.parent)
        return log, saved.state_dict(), state

    # ---- parts of a step

    def _supervised_tokens(self, examples: list[Example]) -> int:
        count = sum(label != IGNORE_INDEX for example in examples for label in example.labels[1:])
        if not count:
            raise TrainingError(
                f"step {len(self.log) + 1} has no supervised token: all labels of its {len(examples)} examples are "
                f"{IGNORE_INDEX}. Its first samples are {_names(examples)}. Encode one and look at its labels: was it "
                "written in the chat template of another model?"
            )
        return count

    def _all_reduce(self, loss: torch.Tensor) -> tuple[float, bool]:
        """Sum gradients and losses over the processes, in one tensor; tell all of them of a Ctrl-C."""
        if self.processes.num_processes == 1:
            return loss.item(), self.interrupted.is_set()
        stop = loss.new_tensor([float(self.interrupted.is_set())])
        flat = [*(p.grad.flatten() for p in self.parameters), loss[None], stop]
        *gradients, loss, stop = sum_of_all(torch.cat(flat)).split([len(one) for one in flat])
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad.copy_(gradient.view_as(parameter))
        return loss.item(), stop.item() > 0

    def _record(self, loss: float, examples: list[Example], seconds: float) -> None:
        tokens, step = sum(len(example.input_ids) for example in examples), len(self.log)
        entry = {"step": step + 1, "loss": loss, "learning_rates": learning_rates(step, self.stage)}
        entry |= {"grad_norm": self.grad_norm, "tokens": tokens, "seconds": seconds}
        self.log.append(entry | {"tokens_per_second": tokens / seconds})

    def _write(self) -> None:
        finished = len(self.log) == self.stage.steps
        files = {LOG: "".join(json.dumps(entry) + "\n" for entry in self.log).encode()}
        if not finished:
            state = io.BytesIO()
            torch.save(self.optimizer.state_dict(), state)
            files[RESUME] = state.getvalue()
        meta = self.about | {
            "steps": len(self.log),
            "finished": finished,
            "metrics": {"loss": self.log[-1]["loss"], "seconds": sum(entry["seconds"] for entry in self.log)},
            "text_probe": text_probe(self.model, self.processor),
        }
        save_checkpoint(self.out, self.model, self.processor, meta, self.stage.trains, base=self.parent, extra=files)

    def _frozen_hashes(self) -> dict[str, str]:
        hashes = part_hashes(self.model, self.processor)
        return {part: value for part, value in hashes.items() if part not in self.stage.trains}


def supervised_loss(model: MiniVLMForConditionalGeneration, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum of the next-token loss over the batch's supervised tokens, in float32.

    Logits are computed only at positions where some row of the batch is supervised: not over the images, for one. The
    model is given no mask, which is faster: padding is on the right, and no position looks ahead.

    Args:
        batch: what `collate` made: `labels` and `attention_mask` (B, T), and the inputs of `forward`.

    Raises:
        ValueError: there is padding on the left, or amid a row.
    """
    mask, labels = batch["attention_mask"], batch["labels"]  # (B, T)
    if (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError('training takes rows that are padded on the right: collate(examples, padding_side="right")')
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "attention_mask")}
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, T) what comes next
    kept = (targets != IGNORE_INDEX).any(dim=0).nonzero().flatten()  # (K,) positions
    logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits  # (B, K, V)
    logits, targets = logits.float().flatten(0, 1), targets[:, kept].flatten()  # (B * K, V), (B * K,)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def optimizer_step(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Sequence[torch.nn.Parameter],
    clip_norm: float,
    loss: float,
    name: str,
) -> float:
    """Scale the gradient down to `clip_norm` and take the optimizers' steps; returns the norm that it had.

    `loss` and `name` are the step's, for messages.

    Raises:
        TrainingError: the loss or the gradient is not finite; no weight was changed.
    """
    norm = clip_grad_norm_(parameters, clip_norm).item()
    if not math.isfinite(loss + norm):
        raise TrainingError(
            f"{name} has the loss {loss} and a gradient of norm {norm}. Look at its samples, or lower the learning "
            "rate; the last checkpoint is as it was"
        )
    for optimizer in optimizers:
        optimizer.step()
    return norm


def learning_rates(step: int, stage: Stage) -> dict[str, float]:
    """Each part's learning rate at a step counted from 0: up in a line, down in a cosine to `final_lr_share`."""
    if step < stage.warmup_steps:
        share = (step + 1) / stage.warmup_steps
    else:
        progress = (step + 1 - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
        share = stage.final_lr_share + (1 - stage.final_lr_share) * (1 + math.cos(math.pi * progress)) / 2
    return {part: share * peak for part, peak in stage.learning_rates.items()}


def adamw(model: MiniVLMForConditionalGeneration, stage: Stage) -> torch.optim.AdamW:
    """AdamW over the parts that train, weight decay on matrices only; gradients start as zeros, not as None.

    A step without an image then moves W by its momentum, in one process as in two.
    """
    groups = []
    for part in stage.trains:
        parameters = list(getattr(model, part).parameters())
        for decay, chosen in (
            (stage.weight_decay, [p for p in parameters if p.ndim >= 2]),
            (0.0, [p for p in parameters if p.ndim < 2]),
        ):
            if chosen:
                groups.append({"params": chosen, "part": part, "weight_decay": decay})
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    return torch.optim.AdamW(groups, fused=True)


def check_parent(
    model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, stage: Stage, parent: Path
) -> dict[str, Any]:
    """Refuse a model that is not its parent's, before the first step; return the parent's stage and hashes.

    The language model's loss on a few fixed texts must be the one that the parent recorded.

    Raises:
        CheckpointError: the parent is missing, damaged, or of another stage.
        TrainingError: the weights are others than the parent's.
    """
    meta = read_meta(parent)
    require_parent(meta, stage, parent)
    loss, recorded = text_probe(model, processor), meta.get("text_probe")
    if not isinstance(recorded, float):
        raise TrainingError(f"{parent}: no 'text_probe' is recorded; save it with text_probe=text_probe(model, …)")
    if not abs(loss - recorded) <= PROBE_TOLERANCE:  # written so that NaN is refused too
        vocabulary = model.config.text_config.vocab_size
        raise TrainingError(
            f"the language model is not the one of {parent}: its loss on the text probe is {loss:.3f}, there it is "
            f"{recorded:.3f}. (A model that knows nothing scores ln V = ln {vocabulary} = {math.log(vocabulary):.2f}: "
            "near that, the weights were never loaded.) Load the model by load_checkpoint"
        )
    hashes = part_hashes(model, processor)
    drawn = {"projector"} if stage.parent == "base" else set()  # the W of a base is only a draw, made anew
    for part in {*PARTS, "tokenizer"} - drawn:
        if hashes[part] != meta["hashes"][part]:
            raise TrainingError(f"the model's {part} is not the one of {parent}; load both by load_checkpoint")
    return {"stage": meta["stage"], "hashes": {part: meta["hashes"][part] for part in sorted(meta["hashes"])}}


@torch.no_grad()
def text_probe(model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor) -> float:
    """The language model's mean next-token loss on `PROBE_TEXTS`, without any image."""
    training = model.training
    model.eval()
    batch = processor(text=list(PROBE_TEXTS), return_tensors="pt", padding_side="right").to(model.device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
    loss = supervised_loss(model, {**batch, "labels": labels}) / (labels[:, 1:] != IGNORE_INDEX).sum()
    model.train(training)
    return loss.item()


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first thing by which two runs differ, in words; nothing if they are the same."""
    for key in IDENTITY:
        if other.get(key, False) != one[key]:
            return f"{key} is {other.get(key)}, not {one[key]}"
    return ""


def _names(examples: list[Example]) -> str:
    return ", ".join(example.name for example in examples[:4])
