"""What trains in a stage: the model's blocks, strips that show them to scale, and how to hold all others still.

A block is a part of the model that a reader can name: the encoder, W, the embedding table, each layer of the language
model. It is given by prefixes of parameter names, as `named_parameters` yields them.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from lessons.plots import BLUE, GREY, INK, ORANGE, note, show, style
from minivlm.config import STAGES, Stage
from minivlm.model import PARTS, Ledger, LedgerRow, MiniVLMForConditionalGeneration
from minivlm.train import learning_rates

PALE = "#FFE3C8"  # the ground of what trains, as in the map of the flow
OWN = "your own"
TITLES = {"stage 1": "pretrain", "stage 2": "sft"}
LETTERS = 0.011  # the width of a letter, as a share of a strip

Blocks = dict[str, tuple[str, ...]]


def blocks(model: MiniVLMForConditionalGeneration) -> Blocks:
    """The model cut into blocks from the picture to the answer: name to prefixes of parameter names.

    Every parameter is in exactly one of them. The last layer holds the norm behind it. The head has no block of its
    own: it is the embedding table.
    """
    last = model.config.text_config.num_hidden_layers - 1
    layers = {f"layer {i + 1}": (f"language_model.model.layers.{i}.",) for i in range(last + 1)}
    layers[f"layer {last + 1}"] += ("language_model.model.norm.",)
    return {
        "encoder": ("vision.",),
        "W": ("projector.",),
        "embeddings": ("language_model.model.embed_tokens.",),
        **layers,
    }


def chosen(model: MiniVLMForConditionalGeneration, prefixes: Collection[str]) -> dict[str, nn.Parameter]:
    """The parameters whose names begin with one of the prefixes. A tied one is there once, under its first name."""
    begin = tuple(prefixes)
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(begin)}


def size(model: MiniVLMForConditionalGeneration, prefixes: Collection[str]) -> int:
    """How many numbers the chosen parameters hold."""
    return sum(parameter.numel() for parameter in chosen(model, prefixes).values())


@contextmanager
def only(model: MiniVLMForConditionalGeneration, prefixes: Collection[str]) -> Iterator[None]:
    """Inside the block, nothing but the chosen parameters trains, whatever a stage lets train.

    The gradient of every other parameter is put to zero as soon as it is computed. AdamW without weight decay then
    leaves these parameters where they are, to the last bit, and clipping sees the gradients of the chosen ones alone.

    Raises:
        ValueError: nothing is chosen.
    """
    names = chosen(model, prefixes)
    if not names:
        raise ValueError(f"no parameter's name begins with {', '.join(map(repr, prefixes)) or 'nothing'}")
    hooks = []
    for name, parameter in model.named_parameters():
        if name not in names:
            frozen = not parameter.requires_grad
            hooks.append(parameter.requires_grad_(True).register_hook(torch.zeros_like))  # only such a one takes a hook
            parameter.requires_grad_(not frozen)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def blocks_of(model: MiniVLMForConditionalGeneration, stage: Stage) -> list[str]:
    """The blocks that a stage trains."""
    return [name for name, prefixes in blocks(model).items() if prefixes[0].startswith(tuple(stage.trains))]


def ledger_of(model: MiniVLMForConditionalGeneration, names: Collection[str], title: str) -> Ledger:
    """The ledger of a choice of blocks, without freezing or freeing anything."""
    prefixes = [prefix for name in names for prefix in blocks(model)[name]]
    training = {id(parameter) for parameter in chosen(model, prefixes).values()}
    rows = []
    for part in PARTS:
        parameters = list(getattr(model, part).parameters())
        trained = sum(p.numel() for p in parameters if id(p) in training)
        rows.append(LedgerRow(part, sum(p.numel() for p in parameters), trained))
    return Ledger(title, tuple(rows))


@style()
def strips(model: MiniVLMForConditionalGeneration, rows: Mapping[str, Collection[str]]) -> Figure:
    """The model as strips, its blocks as wide as they have parameters; those that train are filled and hatched.

    Args:
        rows: a title and the names of the blocks that train, for each strip.

    Raises:
        ValueError: there is no such block.
    """
    sizes = {name: size(model, prefixes) for name, prefixes in blocks(model).items()}
    if unknown := [name for names in rows.values() for name in names if name not in sizes]:
        raise ValueError(f"no block {', '.join(unknown)}; the blocks are {', '.join(sizes)}")
    figure = Figure(figsize=(11.5, 0.2 + 1.1 * len(rows)))
    ax = figure.add_axes((0, 0, 1, 1))
    for number, (title, names) in enumerate(rows.items()):
        _strip(ax, -number, title, sizes, names)
    ax.set(xlim=(-0.14, 1.01), ylim=(-len(rows) + 0.5, 0.52))
    ax.axis("off")
    return figure


def _strip(ax: Axes, y: float, title: str, sizes: Mapping[str, int], names: Collection[str]) -> None:
    total, left, slivers = sum(sizes.values()), 0.0, 0
    trained = sum(sizes[name] for name in names)
    share = f"{trained:,} train\n{trained / total:.1%} of all"
    ax.text(-0.012, y + 0.08, title, ha="right", va="bottom", fontweight="bold")
    ax.text(-0.012, y, share, ha="right", va="top", fontsize=8, linespacing=1.4)
    for name, count in sizes.items():
        width, trains = count / total, name in names
        look = {"color": "white", "edgecolor": GREY, "linewidth": 1.0, "zorder": 2}
        if trains:
            look = {"color": PALE, "edgecolor": ORANGE, "hatch": "//", "linewidth": 1.6, "zorder": 3}
        ax.barh(y, width, 0.5, left, **look)
        label = {"ha": "center", "fontsize": 8.5, "fontweight": "bold" if trains else "normal", "zorder": 4}
        if width > LETTERS * len(name):
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            ax.text(left + width / 2, y, name, va="center", bbox=ground if trains else None, **label)
        else:  # slivers are named above and below in turn
            up = slivers % 2 == 0
            ax.text(left + width / 2, y + (0.29 if up else -0.29), name, va="bottom" if up else "top", **label)
            slivers += 1
        left += width


def show_strips(model: MiniVLMForConditionalGeneration) -> None:
    """Both stages to scale, with alternative text and a summary."""
    rows = {title: blocks_of(model, STAGES["scenes"][name]) for title, name in TITLES.items()}
    totals = {title: ledger_of(model, names, title).total for title, names in rows.items()}
    shares = {title: total.trained / total.parameters for title, total in totals.items()}
    lines = "; ".join(f"{title} trains {', '.join(names)}, {shares[title]:.1%} of all" for title, names in rows.items())
    alt = "Two strips, each the whole model, its blocks as wide as they have parameters. Hatched is what trains: "
    one, two = (f"{shares[title]:.1%}" for title in rows)
    show(strips(model, rows), alt + lines, f"Stage 1 trains {one} of the parameters, stage 2 {two}; no encoder ever.")


@style()
def rates_figure(stage: Stage) -> Figure:
    """The learning rate of each part over a stage's steps, each line named at its end."""
    steps = range(stage.steps)
    rates = [learning_rates(step, stage) for step in steps]
    looks = {"projector": (ORANGE, "--", "W"), "language_model": (BLUE, "-", "language model")}
    figure = Figure(figsize=(7, 2.6))
    axes = figure.add_subplot()
    for part in stage.trains:
        colour, line, name = looks[part]
        values = [rate[part] for rate in rates]
        peak = values.index(max(values))
        axes.plot([step + 1 for step in steps], values, color=colour, linestyle=line, linewidth=2)
        at, label = (peak + 1, max(values)), f"{name}: at most {max(values):g}"
        note(axes, label, at, (4, 4), color=INK)
    axes.set(xlim=(0, stage.steps * 1.02), ylim=(0, None), xlabel="step", ylabel="learning rate")
    axes.grid(axis="y")
    return figure
