"""Figures and tables of notebook A1: CLIP's square, what it learns when, cuts into tokens, rounds of reading, two W.

Each `show_…` shows a figure with its alternative text and its summary; the numbers come from `base_models.py`. Letters
as in `config.py`.
"""

import html
from collections.abc import Mapping, Sequence

import numpy as np
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from lessons.plots import BLUE, CELL, GREY, INK, ORANGE, show, smoothed, style
from minivlm.evaluation import Effect

GRID = "#E8E8E8"
PALE_BLUE = "#5F9ED1"
STROKES = ((BLUE, "-", "o"), (PALE_BLUE, "--", "s"), (INK, ":", "^"), (ORANGE, "-", "D"), ("#C85200", "--", "v"))
FORMS = {"drill": ("o", BLUE), "roll call": ("s", ORANGE), "mosaic": ("^", INK), "text": ("x", GREY)}
TITLES = {"drill": "drills", "roll call": "roll calls", "mosaic": "talk about mosaics", "text": "text"}


def show_matching(pictures: Sequence[Image.Image], captions: Sequence[str], cosines: np.ndarray) -> None:
    """CLIP's square, see `matching`."""
    chosen = cosines.argmax(axis=1)
    alt = (
        f"A square of {len(pictures)} pictures against their captions; the brighter, the better they go together. "
    ) + " ".join(f"“{line}” chooses number {best + 1}." for line, best in zip(captions, chosen, strict=True))
    own = int((chosen == np.arange(len(chosen))).sum())
    apart = cosines[~np.eye(len(cosines), dtype=bool)].mean()
    means = f"in the mean the cosine to it is {cosines.diagonal().mean():.2f}, to the others {apart:.2f}"
    summary = f"{own} of {len(pictures)} pictures choose their own caption; {means}."
    show(matching(pictures, captions, cosines), alt, summary)


def show_learnt_when(moments: Mapping[int, Mapping[str, float]], title: str, label: str) -> None:
    """What was learnt when, see `learnt_when`."""
    told = {
        step: ", ".join(f"{name} {share:.0%}" for name, share in moment.items()) for step, moment in moments.items()
    }
    steps = list(told)
    alt = f"Lines over the steps. {title}: " + " ".join(f"step {step}, {row}." for step, row in told.items())
    midway, end = steps[len(steps) // 2], steps[-1]
    show(learnt_when(moments, title, label), alt, f"Step {midway}: {told[midway]}. Step {end}: {told[end]}.")


def show_rounds(log: Sequence[Mapping], title: str) -> None:
    """A language model's rounds, see `rounds`."""
    last = max(place for place, row in enumerate(log) if row["step"] == 0)  # the last round begins here
    losses = {name: [row["loss"] for row in log[last:] if form_of(row["kind"]) == name] for name in FORMS}
    told = ", ".join(f"{TITLES[name]} {np.median(row):.2f}" for name, row in losses.items() if row)
    alt = (
        "Points of the training loss on a logarithmic scale, round after round, a mark for each form of batch. "
        f"It begins at {log[0]['loss']:.2f}. In the last round, in the median: {told}."
    )
    show(rounds(log, title), alt, f"The loss in the last round, in the median: {told}.")


def show_two_tongues(
    losses: Mapping[str, Sequence[Sequence[float]]], found: Mapping[str, Sequence[float]], gap: Effect
):
    """W upon two language models, see `two_tongues`; `gap` compares what is found upon the one and upon the other."""
    ends = "; ".join(f"{name}: {', '.join(f'{row[-1]:.2f}' for row in rows)}" for name, rows in losses.items())
    shares = "; ".join(f"{name}: {', '.join(f'{share:.0%}' for share in row)}" for name, row in found.items())
    alt = f"Left, losses of W, a line for each seed; at the end {ends}. Right, the share of things named. {shares}."
    summary = (
        f"Things named in the mean of {len(next(iter(found.values())))} seeds: {gap.before:.0%} and {gap.after:.0%}"
    )
    show(two_tongues(losses, found), alt, f"{summary}; the seeds of one lie within {gap.seed_range:.0%}.")


def matching(pictures: Sequence[Image.Image], captions: Sequence[str], cosines: np.ndarray) -> Figure:
    """CLIP's square: a row for each picture, a column for each caption, how well they go together.

    A frame marks the caption that each picture chooses; the right one stands on the diagonal.

    Args:
        pictures: one per row.
        captions: one per column; numbered, and written out beside the square.
        cosines: (I, I).
    """
    count = len(pictures)
    with style():
        figure = Figure(figsize=(11, 5.2))
        axes = figure.add_axes((0.07, 0.02, 0.44, 0.9))
        _square(axes, cosines)
        for row, picture in enumerate(pictures):
            inset = axes.inset_axes((-1.5, row - 0.47, 0.94, 0.94), transform=axes.transData)
            inset.imshow(np.asarray(picture))
            inset.axis("off")
        beside = figure.add_axes((0.53, 0.02, 0.46, 0.9))
        beside.set(xlim=(0, 1), ylim=(count - 0.5, -0.5))
        beside.axis("off")
        for place, line in enumerate(captions):
            beside.text(0.03, place, f"{place + 1}", va="center", ha="right", fontsize=11, fontweight="bold")
            beside.text(0.06, place, line, va="center", fontsize=11)
    return figure


def _square(axes: Axes, values: np.ndarray) -> None:
    """A matrix of cosines with numbers in it, and a frame around the largest of each row."""
    count = len(values)
    axes.imshow(values, vmin=-1, vmax=1)
    for row in range(count):
        best = int(values[row].argmax())
        for column in range(count):
            number = f"{values[row, column]:.1f}".replace("-0.0", "0.0").replace("-", "\N{MINUS SIGN}")
            axes.text(column, row, number, ha="center", va="center", fontsize=9,
                      color=INK if values[row, column] > 0.3 else "white",
                      fontweight="bold" if column == best else "normal")  # fmt: skip
        frame = {"fill": False, "edgecolor": ORANGE, "linewidth": 3, "zorder": 3}
        axes.add_patch(Rectangle((best - 0.46, row - 0.46), 0.92, 0.92, **frame))
    axes.set_xticks(range(count), [str(place + 1) for place in range(count)], fontweight="bold")
    axes.set_yticks([])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def learnt_when(moments: Mapping[int, Mapping[str, float]], title: str, label: str) -> Figure:
    """Shares over the steps of a training, each line with its name at its end.

    Args:
        moments: step -> name -> share; the same names at every step.
        label: what the shares are of.
    """
    steps, names = list(moments), list(next(iter(moments.values())))
    ends = _apart([moments[steps[-1]][name] for name in names], 0.055)
    with style():
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for (colour, dashes, mark), name, end in zip(STROKES, names, ends, strict=False):
            shares = [moment[name] for moment in moments.values()]
            axes.plot(steps, shares, dashes, color=colour, marker=mark, markersize=5, linewidth=2)
            axes.annotate(f"{shares[-1]:.0%} {name}", (steps[-1], end), (9, 0), textcoords="offset points",
                          va="center", color=colour if colour != PALE_BLUE else BLUE)  # fmt: skip
        axes.set(xlim=(0, steps[-1] * 1.3), ylim=(-0.02, 1.12), xlabel="step", ylabel=label)
        axes.set_xticks([step for step in axes.get_xticks() if step <= steps[-1]])
        axes.set_yticks(np.linspace(0, 1, 5), [f"{share:.0%}" for share in np.linspace(0, 1, 5)])
        axes.spines["bottom"].set_bounds(0, steps[-1])
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        axes.set_title(title)
    return figure


def _apart(values: Sequence[float], least: float) -> list[float]:
    """The same heights, moved upwards where two would be closer than `least`."""
    placed, last = {}, -np.inf
    for place in np.argsort(values, kind="stable"):
        last = placed[int(place)] = max(values[place], last + least)
    return [placed[place] for place in range(len(values))]


def show_cuts(cuts: Mapping[str, Sequence[str]], heading: str) -> None:
    """Texts cut into tokens: one row for each, one frame for each token, and how many there are.

    Args:
        cuts: what stands in a row's first column -> its tokens.
        heading: of the first column.
    """
    frame = "display:inline-block;border:1px solid #8A8A8A;border-radius:3px;padding:1px 3px;margin:1px;color:#3B3B3B"
    wide, rows = CELL.replace("max-width:24em", "max-width:46em"), []
    for name, tokens in cuts.items():
        boxes = "".join(
            f'<span style="{frame};background:{("#E6F0F7", "#FFF0E2")[place % 2]}">{html.escape(token)}</span>'
            for place, token in enumerate(tokens)
        )
        rows.append(
            f'<tr><th scope="row" style="{CELL}">{html.escape(name)}</th>'
            f'<td style="{CELL}">{len(tokens)}</td><td style="{wide}">{boxes}</td></tr>'
        )
    head = "".join(f'<th scope="col" style="{CELL}">{name}</th>' for name in (html.escape(heading), "tokens", "cut"))
    plain = "\n".join(f"{name}: {len(tokens)} tokens: {' | '.join(tokens)}" for name, tokens in cuts.items())
    page = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    display({"text/html": page, "text/plain": plain}, raw=True)


def form_of(kind: str) -> str:
    """What a batch of the language model's log holds: "mosaic drill" and "list drill" are drills."""
    return kind.split(" ", 1)[1] if " " in kind else kind


def rounds(log: Sequence[Mapping], title: str) -> Figure:
    """The loss of a language model over its rounds, one mark for each form of batch.

    Args:
        log: rows with "step", "loss" and "kind"; the steps of each round begin at 0.
    """
    starts, steps = _one_after_the_other([row["step"] for row in log])
    with style():
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for name, (mark, colour) in FORMS.items():
            chosen = [i for i, row in enumerate(log) if form_of(row["kind"]) == name]
            axes.plot([steps[i] for i in chosen], [log[i]["loss"] for i in chosen], mark,
                      color=colour, markersize=5, label=TITLES[name])  # fmt: skip
        for number, start in enumerate(starts, start=1):
            axes.axvline(start, color=GREY, linewidth=1)
            axes.text(start + 15, 1.02, f"round {number}", transform=axes.get_xaxis_transform(), fontsize=9)
        axes.set(xlim=(-20, steps[-1] * 1.02), xlabel="step", ylabel="loss (logarithmic)", yscale="log")
        axes.legend(frameon=False, ncols=4, loc="upper right")
        axes.set_title(title, pad=20)
    return figure


def _one_after_the_other(steps: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where each round starts, and all steps counted on; a round starts where the count falls back."""
    starts, on, before, last = [], [], 0, None
    for step in steps:
        if last is None or step <= last:
            before += 0 if last is None else last + 1
            starts.append(before)
        on.append(before + step)
        last = step
    return starts, on


def two_tongues(losses: Mapping[str, Sequence[Sequence[float]]], found: Mapping[str, Sequence[float]]) -> Figure:
    """The same W trained on different language models: its loss, one line a seed, and what is named rightly.

    Args:
        losses: language model -> for each seed the losses of its steps.
        found: language model -> for each seed the share of things that are named.
    """
    with style():
        figure = Figure(figsize=(10.5, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        for place, (name, (colour, dashes, mark)) in enumerate(zip(losses, STROKES[::4], strict=False)):
            for curve in losses[name]:
                mean = smoothed(curve, window=8)
                left.plot(np.arange(1, len(mean) + 1), mean, dashes, color=colour, linewidth=1.6)
            left.plot([], [], dashes, color=colour, label=name)
            right.plot(found[name], [place] * len(found[name]), mark, color=colour, markersize=9, alpha=0.8)
            right.text(0, place - 0.18, name, color=colour)
        left.set(ylim=(0, None), xlabel="step", ylabel="loss", title="Training W: a line for each seed")
        right.set(xlim=(-0.03, 1.03), ylim=(len(losses) - 0.6, -0.6), title="Things named, held-out pictures")
        left.legend(frameon=False, loc="upper right")
        right.set_yticks([])
        right.set_xticks(np.linspace(0, 1, 5), [f"{share:.0%}" for share in np.linspace(0, 1, 5)])
        for axes, axis in ((left, "y"), (right, "x")):
            axes.grid(axis=axis, color=GRID)
            axes.set_axisbelow(True)
    return figure
