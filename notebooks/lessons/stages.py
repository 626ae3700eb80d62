"""What trains in which stage: the model's blocks to scale, a widget to choose among them, and how to hold others still.

A block is a stretch of the model that a reader can name: the encoder, W, the embedding table, each layer of the
language model. It is given by prefixes of parameter names, as `named_parameters` yields them.
"""

import base64
import html
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import ipywidgets as widgets
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from lessons.plots import BLUE, GREY, INK, ORANGE, flow_figure, png, show, style
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
    """Inside the block, nothing but the chosen parameters can learn, whatever a stage lets train.

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
    learning = {id(parameter) for parameter in chosen(model, prefixes).values()} if prefixes else set()
    rows = []
    for part in PARTS:
        parameters = list(getattr(model, part).parameters())
        trained = sum(p.numel() for p in parameters if id(p) in learning)
        rows.append(LedgerRow(part, sum(p.numel() for p in parameters), trained))
    return Ledger(title, tuple(rows))


# ---- figures


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
    with style():
        figure = Figure(figsize=(11.5, 0.2 + 1.1 * len(rows)))
        page = figure.add_axes((0, 0, 1, 1))
        for place, (title, names) in enumerate(rows.items()):
            _strip(page, -place, title, sizes, names)
        page.set(xlim=(-0.14, 1.01), ylim=(-len(rows) + 0.5, 0.52))
        page.axis("off")
    return figure


def _strip(page: Axes, y: float, title: str, sizes: Mapping[str, int], names: Collection[str]) -> None:
    total, left, slivers = sum(sizes.values()), 0.0, 0
    trained = sum(sizes[name] for name in names)
    share = f"{trained:,} train\n{trained / total:.1%} of all"
    page.text(-0.012, y + 0.08, title, ha="right", va="bottom", fontweight="bold")
    page.text(-0.012, y, share, ha="right", va="top", fontsize=8, linespacing=1.4)
    for name, count in sizes.items():
        width, trains = count / total, name in names
        page.barh(
            y, width, 0.5, left, color=PALE if trains else "white", edgecolor=ORANGE if trains else GREY,
            hatch="//" if trains else None, linewidth=1.6 if trains else 1.0, zorder=3 if trains else 2,
        )  # fmt: skip
        label = {"ha": "center", "fontsize": 8.5, "fontweight": "bold" if trains else "normal", "zorder": 4}
        if width > LETTERS * len(name):
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            page.text(left + width / 2, y, name, va="center", bbox=ground if trains else None, **label)
        else:  # slivers are named above and below in turn
            up = slivers % 2 == 0
            page.text(left + width / 2, y + (0.29 if up else -0.29), name, va="bottom" if up else "top", **label)
            slivers += 1
        left += width


def show_strips(model: MiniVLMForConditionalGeneration) -> None:
    """Both stages to scale, with alternative text and a summary."""
    rows = {title: blocks_of(model, STAGES["scenes"][name]) for title, name in TITLES.items()}
    shares = {title: _share(model, names) for title, names in rows.items()}
    said = "; ".join(f"{title} trains {', '.join(names)}, {shares[title]:.1%} of all" for title, names in rows.items())
    show(
        strips(model, rows),
        f"Two strips, each the whole model, its blocks as wide as they have parameters. Hatched is what trains: {said}",
        f"Stage 1 trains {shares['stage 1']:.1%} of the parameters, stage 2 {shares['stage 2']:.1%}; no encoder ever.",
    )


def _share(model: MiniVLMForConditionalGeneration, names: Collection[str]) -> float:
    total = ledger_of(model, names, OWN).total
    return total.trained / total.parameters


def rates_figure(stage: Stage) -> Figure:
    """The learning rate of each part over a stage's steps, each line named at its end."""
    steps = range(stage.steps)
    rates = [learning_rates(step, stage) for step in steps]
    looks = {"projector": (ORANGE, "--", "W"), "language_model": (BLUE, "-", "language model")}
    with style():
        figure = Figure(figsize=(7, 2.6))
        axes = figure.add_subplot()
        for part in stage.trains:
            colour, line, name = looks[part]
            values = [rate[part] for rate in rates]
            peak = values.index(max(values))
            axes.plot([step + 1 for step in steps], values, color=colour, linestyle=line, linewidth=2)
            at, label = (peak + 1, max(values)), f"{name}: at most {max(values):g}"
            axes.annotate(label, at, (4, 4), textcoords="offset points", color=INK)
        axes.set(xlim=(0, stage.steps * 1.02), ylim=(0, None), xlabel="step", ylabel="learning rate")
        axes.grid(axis="y", color="#E8E8E8")
        axes.set_axisbelow(True)
    return figure


# ---- the widget


class StageExplorer:
    """A stage or a choice of one's own: what it trains, in numbers, to scale, and on the map of the flow.

    Everything works by keyboard: Tab goes on, the space bar presses a stage's button or ticks a block. Without a kernel
    there is no widget; `show_strips` leaves a figure.

    Attributes:
        widget: to be shown as the last line of a cell.
        stage: the buttons of the stages, and of a choice of one's own.
        boxes: a box to tick for each block; the encoder's cannot be ticked.
        page: what the choice means, as HTML.
    """

    def __init__(self, model: MiniVLMForConditionalGeneration):
        self.model = model
        self.stage = widgets.ToggleButtons(options=[*TITLES, OWN], description="stage", value="stage 1")
        self.boxes = {
            name: widgets.Checkbox(description=name, indent=False, layout=widgets.Layout(width="auto"))
            for name in blocks(model)
        }
        self.boxes["encoder"].disabled = True
        self.boxes["encoder"].tooltip = "frozen in every stage"
        self.page = widgets.HTML()
        row = widgets.HBox(list(self.boxes.values()), layout=widgets.Layout(flex_flow="row wrap"))
        self.widget = widgets.VBox([self.stage, row, self.page])
        self._setting = False
        self.stage.observe(self._stage_changed, "value")
        for box in self.boxes.values():
            box.observe(self._box_changed, "value")
        self._stage_changed()

    @property
    def names(self) -> list[str]:
        """The blocks that are ticked."""
        return [name for name, box in self.boxes.items() if box.value]

    def _stage_changed(self, _change: dict | None = None) -> None:
        """A stage ticks its blocks; a choice of one's own begins with those that are ticked."""
        if self.stage.value in TITLES:
            trains = blocks_of(self.model, STAGES["scenes"][TITLES[self.stage.value]])
            self._setting = True
            for name, box in self.boxes.items():
                box.value = name in trains
            self._setting = False
        self._draw()

    def _box_changed(self, _change: dict) -> None:
        """Ticking a block makes the choice one's own, unless it is now exactly a stage's."""
        if self._setting:
            return
        stages = {title: blocks_of(self.model, STAGES["scenes"][name]) for title, name in TITLES.items()}
        now = next((title for title, names in stages.items() if names == self.names), OWN)
        if now == self.stage.value:
            self._draw()
        else:
            self.stage.value = now

    def _draw(self) -> None:
        self.page.value = explained(self.model, self.names, self.stage.value)


def explained(model: MiniVLMForConditionalGeneration, names: Collection[str], title: str) -> str:
    """What a choice of blocks means, as HTML: the ledger, one sentence, the strip, and the map with what trains lit."""
    account = ledger_of(model, names, title)
    share = account.total.trained / account.total.parameters
    sentence = f"{title}: {', '.join(names) or 'nothing'} trains, {share:.1%} of all parameters."
    lit = [box for box, learns in _learning(names).items() if learns]
    notes = {box: "trains" if learns else "frozen" for box, learns in _learning(names).items()}
    diagram = f"Diagram of the data flow. Lit, because they train: {', '.join(lit) or 'nothing'}."
    return (
        f"<pre>{html.escape(str(account))}</pre><p role='status'>{html.escape(sentence)}</p>"
        f"{_image(strips(model, {title: names}), f'The model as a strip, to scale. {sentence}')}"
        f"{_image(flow_figure(lit, notes), diagram)}"
    )


def _learning(names: Collection[str]) -> dict[str, bool]:
    """Which boxes of the map hold something that trains. The head of the language model is the embedding table."""
    layers = any(name.startswith("layer") for name in names)
    return {
        "encoder": "encoder" in names,
        "W": "W" in names,
        "look-up": "embeddings" in names,
        "language model": layers,
    }


def _image(figure: Figure, alt: str) -> str:
    source = base64.b64encode(png(figure)).decode()
    return f'<img src="data:image/png;base64,{source}" alt="{html.escape(alt)}" style="width:920px;max-width:100%">'
