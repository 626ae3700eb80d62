"""The training loop of the two base models: seeded, logged, stopped and resumed at any step.

Hidden matrices are trained with Muon (Jordan et al., 2024), everything else with AdamW: on these small models Muon
needed less than half of AdamW's steps.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from minivlm.runtime.files import replace_file, write_file
from minivlm.train import optimizer_step

StepLoss = Callable[[int], tuple[torch.Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Recipe:
    """How a base model is trained. `batch_size` counts samples; learning rates are peaks of a cosine schedule."""

    steps: int
    batch_size: int
    muon_lr: float
    adam_lr: float
    warmup: int = 50
    final_share: float = 0.02
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    save_every: int = 100
    seed: int = 0


class Muon(torch.optim.Muon):
    """The library's Muon in 32 bits: in its bfloat16 many processors multiply fifty times slower."""

    @torch.no_grad()
    def step(self) -> None:
        """Move each matrix along its orthogonalised momentum."""
        for group in self.param_groups:
            a, b, c = group["ns_coefficients"]
            for p in (p for p in group["params"] if p.grad is not None):
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                wide = update.T if p.shape[0] > p.shape[1] else update
                wide = wide / wide.norm().clamp(min=group["eps"])
                for _ in range(group["ns_steps"]):  # Newton-Schulz: all singular values come near 1
                    gram = wide @ wide.T
                    wide = a * wide + (b * gram + c * gram @ gram) @ wide
                update = wide.T if p.shape[0] > p.shape[1] else wide
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def cosine(step: int, recipe: Recipe) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then a cosine down to `final_share`."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.final_share + (1 - recipe.final_share) * 0.5 * (1 + math.cos(math.pi * progress))


def optimizers(module: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside transformer layers, AdamW for embeddings, heads, norms and biases."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    hidden = {name: p for name, p in named.items() if p.ndim == 2 and "layers." in name}
    rest = [p for name, p in named.items() if name not in hidden]
    muon = Muon(hidden.values(), lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95)
    adam = torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    return [muon, adam]


def run(module: nn.Module, step_loss: StepLoss, recipe: Recipe, folder: Path, title: str) -> list[dict]:
    """Train `module` for `recipe.steps` steps and return the log.

    `step_loss(step)` must depend on nothing but the step and the module, so that a run that was stopped resumes
    from `folder/state.pt` as if nothing had happened. The log is `folder/log.jsonl`, one line a step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    opts = optimizers(module, recipe)
    state_file, start, log = folder / "state.pt", 0, []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise ValueError(f"{state_file} was made by another recipe; delete {folder} to start anew")
        module.load_state_dict(state["module"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        start, log = state["step"], state["log"]
    parameters = [p for p in module.parameters() if p.requires_grad]
    bar = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, desc=title, mininterval=5)
    for step in bar:
        began = time.perf_counter()
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group.setdefault("peak", group["lr"]) * cosine(step, recipe)
        loss, extra = step_loss(step)
        loss.backward()
        norm = optimizer_step(opts, parameters, recipe.clip_norm, loss.item(), f"step {step}")
        for opt in opts:
            opt.zero_grad()
        seconds = time.perf_counter() - began
        log.append({"step": step, "loss": loss.item(), "norm": norm, "seconds": seconds} | extra)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            state = {"module": module.state_dict(), "optimizers": [opt.state_dict() for opt in opts]}
            with replace_file(state_file) as temporary:
                torch.save(state | {"recipe": asdict(recipe), "step": step + 1, "log": log}, temporary)
            rows = ({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in log)
            write_file(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return log
