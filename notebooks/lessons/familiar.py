"""How far a picture is from the drawn world, told from what the encoder makes of it. Letters as in `config.py`.

A model that knows only drawn scenes answers about any picture as if it were one. So the picture is measured first:
the mean of its patch features, and how far this point lies from those of held-out scenes, in their own spread
(Mahalanobis distance; for networks' features Lee et al., arXiv:1807.03888, section 2.1). `tests/benchmarks/familiar.py`
measures what is kept in `data/results/`: mean and spread, the threshold, and what lies on which side of it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from matplotlib.figure import Figure

from lessons.plots import BLUE, GREY, INK, ORANGE, style
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.runtime.files import hash_tensors
from minivlm.runtime.paths import data_folder

NAME = "familiar"  # of the two files in data/results
SHRINKAGE = 0.01  # how much of the spread is made even, so that no direction is nearly flat
MAKE = "make them with: python tests/benchmarks/familiar.py"


class FamiliarError(ValueError):
    """The measured numbers are missing or belong to another encoder. The message says what to do."""


@dataclass(frozen=True)
class Familiar:
    """What drawn scenes look like to the encoder, and how far from that is far.

    Attributes:
        mean: (Dv,) the mean of the scenes' mean patch features.
        whiten: (Dv, Dv) turns a difference from the mean into one in which the scenes spread alike in all directions.
        threshold: a picture that is farther than this is far.
    """

    mean: torch.Tensor
    whiten: torch.Tensor
    threshold: float

    def distances(self, patch_features: torch.Tensor) -> torch.Tensor:
        """How far pictures are: (I,) from patch features (I, N, Dv). A drawn scene has about 1."""
        seen = patch_features.float().mean(dim=1).cpu() - self.mean  # (I, Dv)
        return (seen @ self.whiten).pow(2).mean(dim=-1).sqrt()

    def distance(self, patch_features: torch.Tensor) -> float:
        """How far one picture is, from its patch features (1, N, Dv)."""
        (value,) = self.distances(patch_features).tolist()
        return value

    def is_far(self, distance: float) -> bool:
        """Whether a picture at this distance is no drawn scene."""
        return distance > self.threshold

    def warning(self, distance: float) -> str:
        """What to tell a reader before any answer; nothing if the picture is near."""
        if not self.is_far(distance):
            return ""
        return (
            f"This picture is far from the drawn world: {distance:.1f}, where 99 of 100 drawn scenes stay below "
            f"{self.threshold:.1f}. This model knows only drawn scenes and will answer as if this were one."
        )


def fit(patch_features: torch.Tensor, threshold: float = float("inf")) -> Familiar:
    """Mean and spread of scenes (I, N, Dv): the empirical covariance, `SHRINKAGE` of it replaced by an even one."""
    seen = patch_features.double().mean(dim=1)  # (I, Dv)
    spread = torch.cov(seen.T)  # (Dv, Dv)
    even = torch.eye(len(spread), dtype=spread.dtype) * spread.diagonal().mean()
    inverse = torch.linalg.inv((1 - SHRINKAGE) * spread + SHRINKAGE * even)
    return Familiar(seen.mean(dim=0).float(), torch.linalg.cholesky(inverse).float().contiguous(), threshold)


def save_familiar(
    folder: str | Path, familiar: Familiar, model: MiniVLMForConditionalGeneration, report: dict[str, Any]
) -> None:
    """Write `familiar.safetensors` and `familiar.json`: what was fitted, and what was measured with it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"mean": familiar.mean, "whiten": familiar.whiten}
    safetensors.torch.save_file(tensors, folder / f"{NAME}.safetensors")
    report = {"threshold": familiar.threshold, "encoder": hash_tensors(model.vision.state_dict()), **report}
    (folder / f"{NAME}.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def load_familiar(model: MiniVLMForConditionalGeneration, folder: str | Path | None = None) -> Familiar:
    """What was measured for this model's encoder, by default in `data/results`.

    Raises:
        FamiliarError: the files are missing, or were measured with another encoder.
    """
    folder = _folder(folder)
    report = read_report(folder)
    if report["encoder"] != hash_tensors(model.vision.state_dict()):
        raise FamiliarError(f"{folder / NAME}.json was measured with another encoder than this model's; {MAKE}")
    tensors = safetensors.torch.load_file(folder / f"{NAME}.safetensors")
    return Familiar(tensors["mean"], tensors["whiten"], report["threshold"])


def read_report(folder: str | Path | None = None) -> dict[str, Any]:
    """What was measured: threshold, distances of scenes and photographs, the command.

    Raises:
        FamiliarError: there is no such file.
    """
    file = _folder(folder) / f"{NAME}.json"
    if not file.is_file():
        raise FamiliarError(f"{file} is missing; {MAKE}")
    return json.loads(file.read_text("utf-8"))


def _folder(folder: str | Path | None) -> Path:
    return data_folder() / "results" if folder is None else Path(folder)


def distance_figure(report: dict[str, Any], marked: dict[str, float] | None = None) -> Figure:
    """Where held-out scenes and photographs lie, and the threshold between them.

    Args:
        report: from `read_report`.
        marked: names and distances of pictures at hand, marked in the figure.
    """
    scenes = np.array(report["scenes"])
    photographs = np.array(list(report["photographs"].values()))
    with style():
        figure = Figure(figsize=(8.5, 3))
        axes = figure.add_subplot()
        edges = np.geomspace(0.95 * scenes.min(), 1.05 * max(photographs.max(), scenes.max()), 60)
        axes.hist(scenes, edges, color=BLUE, weights=np.full(len(scenes), 100 / len(scenes)))
        axes.plot(photographs, np.full(len(photographs), 1.1), "D", color=ORANGE, markersize=6, markeredgecolor="white")
        top = axes.get_ylim()[1] * 1.2
        axes.set(xscale="log", ylim=(0, top), xlabel="distance from the drawn world", ylabel="% of the scenes")
        axes.axvline(report["threshold"], color=INK, linewidth=1.2, linestyle="--")
        note = {"textcoords": "offset points", "va": "top"}
        axes.annotate(f"far: above {report['threshold']:.2f}", (report["threshold"], top), (6, -2), **note)
        axes.annotate(f"{len(scenes)} drawn scenes", (np.median(scenes), top), (0, -2), ha="center", color=BLUE, **note)
        some = f"{len(photographs)} photographs"
        axes.annotate(some, (photographs.max(), top), (0, -2), ha="right", color="#A64E00", **note)
        ground = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": GREY, "linewidth": 0.6}
        for name, distance in (marked or {}).items():
            arrow = {"arrowstyle": "-|>", "color": INK, "shrinkB": 0}
            axes.annotate(name, (distance, 1.9), (0, 62), ha="center", bbox=ground, arrowprops=arrow, **note)
        ticks = [tick for tick in (0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6) if edges[0] <= tick <= edges[-1]]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    return figure
