"""The model as blocks: which of them train, how to hold the others still, where gradients go, how far weights moved.

A block is a part of the model that a reader can name: the encoder, W, the embedding table, each layer of the language
model. It is given by prefixes of parameter names, as `named_parameters` yields them. Letters as in `config.py`.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from lessons.plots import GREY, ORANGE, PALE_ORANGE, style
from minivlm.config import Stage
from minivlm.model import PARTS, Ledger, LedgerRow, MiniVLMForConditionalGeneration

TITLED_STAGES = {"stage 1": "pretrain", "stage 2": "sft"}  # title -> name
LETTER_WIDTH = 0.011  # as a share of a strip


def blocks(model: MiniVLMForConditionalGeneration) -> dict[str, tuple[str, ...]]:
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


def gradient_map(model: MiniVLMForConditionalGeneration, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """How much gradient arrives at each layer and position of the language model.

    It comes from the loss and ends in W (`model.projector.weight.grad` holds it afterwards); what is frozen lets it
    pass and keeps none.

    Args:
        batch: one example, as `processor.collate` makes it.

    Returns:
        Norms (L + 1, T): row 0 is what goes into the language model, row l what comes out of its layer l.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "attention_mask")}
    embeds = model.embed(**inputs)  # (1, T, Dl)
    out = model.language_model(inputs_embeds=embeds, labels=batch["labels"], output_hidden_states=True, use_cache=False)
    for hidden in out.hidden_states:
        hidden.retain_grad()
    out.loss.backward()
    return torch.stack([hidden.grad[0].norm(dim=-1) for hidden in out.hidden_states])  # (L + 1, T)


def moved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> float:
    """How far a group of weights moved, as a share of their length: |after - before| / |before|, over all of them."""
    change = sum((after[name] - old).pow(2).sum().item() for name, old in before.items())
    return (change / sum(old.pow(2).sum().item() for old in before.values())) ** 0.5


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
        _model_strip(ax, -number, title, sizes, names)
    ax.set(xlim=(-0.14, 1.01), ylim=(-len(rows) + 0.5, 0.52))
    ax.axis("off")
    return figure


def _model_strip(ax: Axes, y: float, title: str, sizes: Mapping[str, int], names: Collection[str]) -> None:
    total, left, slivers = sum(sizes.values()), 0.0, 0
    trained = sum(sizes[name] for name in names)
    share = f"{trained:,} train\n{trained / total:.1%} of all"
    ax.text(-0.012, y + 0.08, title, ha="right", va="bottom", fontweight="bold")
    ax.text(-0.012, y, share, ha="right", va="top", fontsize=8, linespacing=1.4)
    for name, count in sizes.items():
        width, trains = count / total, name in names
        look = {"color": "white", "edgecolor": GREY, "linewidth": 1.0, "zorder": 2}
        if trains:
            look = {"color": PALE_ORANGE, "edgecolor": ORANGE, "hatch": "//", "linewidth": 1.6, "zorder": 3}
        ax.barh(y, width, 0.5, left, **look)
        label = {"ha": "center", "fontsize": 8.5, "fontweight": "bold" if trains else "normal", "zorder": 4}
        if width > LETTER_WIDTH * len(name):
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            ax.text(left + width / 2, y, name, va="center", bbox=ground if trains else None, **label)
        else:  # slivers are named above and below in turn
            up = slivers % 2 == 0
            ax.text(left + width / 2, y + (0.29 if up else -0.29), name, va="bottom" if up else "top", **label)
            slivers += 1
        left += width
