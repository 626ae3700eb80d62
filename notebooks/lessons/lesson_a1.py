"""What notebook A1 shows: short runs that make an encoder and a language model, and the figures of both.

Two towers are trained by CLIP's contrast alone (Radford et al., arXiv:2103.00020). Byte-level BPE takes a dozen lines.
For one language model the image tokens never said anything about the caption. Letters as in `config.py`.
"""

import html
import io
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lessons.lenses.words import ORDERS, listed, read_aloud, read_patches, show_words, typed_image  # noqa: F401 (for the notebook)
from lessons.plots import BLUE, GREY, INK, ORANGE, note, show, style, table_html, trailing_mean
from minivlm.checkpoint import load_checkpoint, save_checkpoint
from minivlm.config import PROMPTS, Stage
from minivlm.data import Example, Sample
from minivlm.evaluation import effect
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.pretraining import loop
from minivlm.pretraining.encoder import TextTower, contrast_loss, normalised
from minivlm.pretraining.language_model import LanguageModelTrainer
from minivlm.pretraining.reading_tasks import Lexicon, mosaic
from minivlm.processor import MiniVLMProcessor
from minivlm.scenes.facts import Scene, random_stream, sample_scene
from minivlm.scenes.language import caption
from minivlm.train import Trainer, text_probe

BytePair = tuple[str, str]
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # GPT-2's alphabet: a character a byte
ANOTHER = 5_000_000  # so many scenes further on is another scene, and no caption is of that one
MIDDLE_BLUE = "#5F9ED1"
STROKES = ((BLUE, "-", "o"), (MIDDLE_BLUE, "--", "s"), (INK, ":", "^"), (ORANGE, "-", "D"), ("#C85200", "--", "v"))
# of batches, as `pretraining/language_model.py` names them -> title, marker, colour
FORMS = {
    "drill": ("associative recall", "o", BLUE),
    "roll call": ("ordered listings", "s", ORANGE),
    "mosaic": ("conversations about mosaics", "^", INK),
    "text": ("text", "x", GREY),
}


# Two towers


class Towers(nn.Module):
    """An encoder and a caption's tower, whose vectors are to meet: CLIP, small, with no other loss.

    Args:
        config: of the encoder.
        tokenizer: cuts the captions.
        images: uint8 (I, H, W, 3), the training images.
        scenes: what they show.
        batch_size: pictures in a batch.
        hard: every other batch is of one setting (as `pretraining/encoder.py` has it, there of one number of things,
            too); otherwise all are drawn from all pictures.

    Raises:
        ValueError: there are fewer pictures than a batch needs, or fewer of a setting where batches are hard.
    """

    def __init__(
        self,
        config: CLIPVisionConfig,
        tokenizer: PreTrainedTokenizerFast,
        images: np.ndarray,
        scenes: Sequence[Scene],
        batch_size: int,
        hard: bool = False,
    ):
        super().__init__()
        self.encoder = CLIPVisionModel(config)
        self.encoder.set_attn_implementation("eager")  # faster on a CPU, as in `minivlm/pretraining/encoder.py`
        self.text = TextTower(len(tokenizer), config.hidden_size)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.tokenizer, self.images, self.scenes, self.batch_size = tokenizer, images, scenes, batch_size
        settings = np.array([scene.setting for scene in scenes])
        self.everything = np.arange(len(scenes))
        self.groups = [np.flatnonzero(settings == setting) for setting in np.unique(settings)] if hard else []
        if min(map(len, [self.everything, *self.groups])) < batch_size:
            raise ValueError(
                f"a batch is drawn from fewer than {batch_size} pictures; pass more, or a smaller batch_size"
            )

    def step_loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """The contrast of batch number `step`."""
        rng = random_stream("towers", step)
        hard = self.groups and step % 2
        pool = self.groups[rng.integers(len(self.groups))] if hard else self.everything
        chosen = rng.choice(pool, self.batch_size, replace=False)
        captions = [caption(self.scenes[i], "en", rng) for i in chosen]
        image_vectors = self.encoder(pixel_values=normalised(self.images[chosen])).pooler_output  # (B, Dv)
        caption_vectors = self.text(self.ids(captions))  # (B, Dv)
        return contrast_loss(image_vectors, caption_vectors, self.scale, captions), {}

    def ids(self, captions: Sequence[str]) -> torch.Tensor:
        """Captions as token ids (B, T), padded on the right."""
        options = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        return self.tokenizer(list(captions), **options)["input_ids"]

    @torch.no_grad()
    def cosines(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """How well every image goes with every caption (I, captions), from -1 to 1."""
        image_vectors = self.encoder(pixel_values=normalised(images)).pooler_output  # (I, Dv): the class token, normed
        caption_vectors = self.text(self.ids(captions))  # (captions, Dv)
        return (F.normalize(image_vectors, dim=-1) @ F.normalize(caption_vectors, dim=-1).T).numpy()


def train_briefly(
    module: nn.Module,
    step_loss: loop.StepLoss,
    recipe: loop.Recipe,
    title: str,
    on_step: Callable[[int, float, None], None] | None = None,
) -> list[dict]:
    """Train by the loop of the base models and keep nothing but the weights and the log.

    Args:
        on_step: called with the steps done, their last loss and None, such as a `LiveCurve`.
    """

    def reported(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        loss, extra = step_loss(step)
        if on_step is not None:
            on_step(step + 1, loss.item(), None)
        return loss, extra

    with tempfile.TemporaryDirectory() as folder:
        return loop.run(module, reported, recipe, Path(folder), title)


def plain_captions(scenes: Sequence[Scene]) -> list[str]:
    """One English caption for each scene, always the same."""
    return [caption(scene, "en", random_stream("caption", scene.seed)) for scene in scenes]


def alike(setting: str, things: int, count: int) -> list[Scene]:
    """The first `count` held-out scenes with one setting and one number of things: they differ in the things alone."""
    scenes, index = [], 0
    while len(scenes) < count:
        scene = sample_scene("dev", index, things)
        if scene.setting == setting:
            scenes.append(scene)
        index += 1
    return scenes


def halved(images: np.ndarray) -> np.ndarray:
    """uint8 images (I, H, W, 3) at half their width and height: each pixel the mean of four."""
    count, height, width, colours = images.shape
    return images.reshape(count, height // 2, 2, width // 2, 2, colours).mean((2, 4)).round().astype(np.uint8)


def agreement(cosines: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """What the caption that a picture chooses has in common with its own, as shares of the pictures.

    Args:
        cosines: (I, I), pictures against the captions of the same scenes.
    """
    pairs = [(scenes[i], scenes[best]) for i, best in enumerate(cosines.argmax(axis=1))]
    kinds = [[{thing.kind for thing in scene.things} for scene in pair] for pair in pairs]
    return {
        "the setting": float(np.mean([own.setting == chosen.setting for own, chosen in pairs])),
        "how many things": float(np.mean([len(own.things) == len(chosen.things) for own, chosen in pairs])),
        "a kind of thing": float(np.mean([bool(own & chosen) for own, chosen in kinds])),
        "its own caption": float(np.mean([own is chosen for own, chosen in pairs])),
    }


def show_matching(images: Sequence[Image.Image], captions: Sequence[str], cosines: np.ndarray) -> None:
    """CLIP's square, see `matching`."""
    chosen = cosines.argmax(axis=1)
    alt = f"A square of {len(images)} pictures against their captions; the brighter, the better they go together."
    for line, best in zip(captions, chosen, strict=True):
        alt += f" “{line}” chooses number {best + 1}."
    own = int((chosen == np.arange(len(chosen))).sum())
    apart = cosines[~np.eye(len(cosines), dtype=bool)].mean()
    means = f"in the mean the cosine to it is {cosines.diagonal().mean():.2f}, to the others {apart:.2f}"
    summary = f"{own} of {len(images)} pictures choose their own caption; {means}."
    show(matching(images, captions, cosines), alt, summary)


@style()
def matching(images: Sequence[Image.Image], captions: Sequence[str], cosines: np.ndarray) -> Figure:
    """CLIP's square: a row for each picture, a column for each caption, how well they go together.

    A frame marks the caption that each picture chooses; the right one stands on the diagonal. Captions are numbered,
    and written out beside the square.

    Args:
        cosines: (I, I).
    """
    count = len(images)
    figure = Figure(figsize=(11, 5.2))
    axes = figure.add_axes((0.07, 0.02, 0.44, 0.9))
    _square(axes, cosines)
    for row, image in enumerate(images):
        inset = axes.inset_axes((-1.5, row - 0.47, 0.94, 0.94), transform=axes.transData)
        inset.imshow(np.asarray(image))
        inset.axis("off")
    beside = figure.add_axes((0.53, 0.02, 0.46, 0.9))
    beside.set(xlim=(0, 1), ylim=(count - 0.5, -0.5))
    beside.axis("off")
    for index, line in enumerate(captions):
        beside.text(0.03, index, f"{index + 1}", va="center", ha="right", fontsize=11, fontweight="bold")
        beside.text(0.06, index, line, va="center", fontsize=11)
    return figure


def _square(axes: Axes, values: np.ndarray) -> None:
    """A matrix of cosines with numbers in it, and a frame around the largest of each row."""
    count = len(values)
    axes.imshow(values, vmin=-1, vmax=1)
    for row in range(count):
        best = int(values[row].argmax())
        for column in range(count):
            number = f"{values[row, column]:.1f}".replace("-0.0", "0.0").replace("-", "\N{MINUS SIGN}")
            look = {"color": INK if values[row, column] > 0.3 else "white", "fontsize": 9}
            weight = "bold" if column == best else "normal"
            axes.text(column, row, number, ha="center", va="center", fontweight=weight, **look)
        frame = {"fill": False, "edgecolor": ORANGE, "linewidth": 3, "zorder": 3}
        axes.add_patch(Rectangle((best - 0.46, row - 0.46), 0.92, 0.92, **frame))
    axes.set_xticks(range(count), [str(index + 1) for index in range(count)], fontweight="bold")
    axes.set_yticks([])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def show_learning_order(moments: Mapping[int, Mapping[str, float]], title: str, label: str) -> None:
    """The order in which things are learned, see `learning_order`."""
    lines = {step: ", ".join(f"{name} {share:.0%}" for name, share in row.items()) for step, row in moments.items()}
    steps = list(lines)
    alt = f"Lines over the steps. {title}: " + " ".join(f"step {step}, {line}." for step, line in lines.items())
    midway, end = steps[len(steps) // 2], steps[-1]
    show(learning_order(moments, title, label), alt, f"Step {midway}: {lines[midway]}. Step {end}: {lines[end]}.")


@style()
def learning_order(moments: Mapping[int, Mapping[str, float]], title: str, label: str) -> Figure:
    """Shares over the steps of a training, each line with its name at its end.

    Args:
        moments: step -> name -> share; the same names at every step.
        label: what the shares are of.
    """
    steps, names = list(moments), list(next(iter(moments.values())))
    ends = _moved_apart([moments[steps[-1]][name] for name in names], 0.055)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for (colour, dashes, mark), name, end in zip(STROKES, names, ends, strict=False):
        shares = [moment[name] for moment in moments.values()]
        axes.plot(steps, shares, dashes, color=colour, marker=mark, markersize=5, linewidth=2)
        ink = colour if colour != MIDDLE_BLUE else BLUE
        note(axes, f"{shares[-1]:.0%} {name}", (steps[-1], end), (9, 0), va="center", color=ink)
    axes.set(xlim=(0, steps[-1] * 1.3), ylim=(-0.02, 1.12), xlabel="step", ylabel=label)
    axes.set_xticks([step for step in axes.get_xticks() if step <= steps[-1]])
    axes.set_yticks(np.linspace(0, 1, 5), [f"{share:.0%}" for share in np.linspace(0, 1, 5)])
    axes.spines["bottom"].set_bounds(0, steps[-1])
    axes.grid(axis="y")
    axes.set_title(title)
    return figure


def _moved_apart(values: Sequence[float], least: float) -> list[float]:
    """The same heights, moved upwards where two would be closer than `least`."""
    placed, last = {}, -np.inf
    for index in np.argsort(values, kind="stable"):
        last = placed[int(index)] = max(values[index], last + least)
    return [placed[index] for index in range(len(values))]


# Byte pairs


def learn_merges(words: Counter[str], count: int) -> list[tuple[BytePair, int]]:
    """The first `count` merges of byte pair encoding (Sennrich et al., arXiv:1508.07909), and how often each pair was.

    Args:
        words: how often each word was read; a word's letters are what is merged.
    """
    cut = {word: list(word) for word in words}
    merges = []
    for _ in range(count):
        pairs = Counter()
        for word, times in words.items():
            for pair in pairwise(cut[word]):
                pairs[pair] += times
        best, times = pairs.most_common(1)[0]
        merges.append((best, times))
        cut = {word: _merged(pieces, best) for word, pieces in cut.items()}
    return merges


def _merged(pieces: list[str], pair: BytePair) -> list[str]:
    """A word's pieces, the pair joined wherever it stands, from left to right."""
    joined: list[str] = []
    index = 0
    while index < len(pieces):
        two = tuple(pieces[index : index + 2]) == pair
        joined.append("".join(pair) if two else pieces[index])
        index += 2 if two else 1
    return joined


def word_counts(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs: what no merge crosses, each byte written as one character of GPT-2's alphabet."""
    cutter = tokenizer.backend_tokenizer.pre_tokenizer
    return Counter(word for text in texts for word, _ in cutter.pre_tokenize_str(text))


def pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """A text cut into tokens, each as people can read it."""
    return [visible(token) for token in tokenizer.tokenize(text)]


def visible(token: str) -> str:
    """A token as people can read it: `␣` for a space, `‹e7 ba›` for bytes that are no whole character."""
    raw = bytes(BYTES[character] for character in token)
    try:
        return raw.decode().replace(" ", "␣").replace("\n", "↵")
    except UnicodeDecodeError:
        return f"‹{raw.hex(' ')}›"


def show_cuts(cuts: Mapping[str, Sequence[str]], heading: str) -> None:
    """Texts cut into tokens: one row for each, one frame for each token, and how many there are.

    Args:
        cuts: what stands in a row's first column, below `heading` -> its tokens.
    """
    frame = "display:inline-block;border:1px solid #8A8A8A;border-radius:3px;padding:1px 3px;margin:1px;color:#3B3B3B"
    rows = []
    for name, tokens in cuts.items():
        boxes = "".join(
            f'<span style="{frame};background:{("#E6F0F7", "#FFF0E2")[index % 2]}">{html.escape(token)}</span>'
            for index, token in enumerate(tokens)
        )
        rows.append([html.escape(name), str(len(tokens)), boxes])
    plain = "\n".join(f"{name}: {len(tokens)} tokens: {' | '.join(tokens)}" for name, tokens in cuts.items())
    table = table_html((heading, "tokens", "cut"), rows, widths={2: "46em"}, named=True)
    display({"text/html": table, "text/plain": plain}, raw=True)


# The language model


class BlindReader(LanguageModelTrainer):
    """Trains a language model on captions, each after a typed picture of *another* scene.

    It learns to speak, and it learns that what stands before a caption says nothing about it. The block is there so
    that it is nothing strange later; all that is missing is a reason to read it.
    """

    def row(self, kind: str, index: int) -> tuple[Example, Scene | None]:
        """Sample number `index`: the prompt and a caption, and the scene whose mosaic stands in the block."""
        own, another = (sample_scene("text", number) for number in (index, index + ANOTHER))
        text = caption(own, "en", random_stream("blind reader", index))
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPTS["en"]}]}
        return self.processor.encode(Sample([question, {"role": "assistant", "content": text}])), another


def weighted_words(tokenizer: PreTrainedTokenizerFast, scene: Scene, cells: Sequence[int]) -> list[str]:
    """The weighted sums of words in some cells of a scene's word mosaic, such as "1.0 · red + 0.7 · car"."""
    ids, weights = mosaic(scene, 8, Lexicon.of(tokenizer), random_stream("a typed picture"))  # (N, 5) each
    sums = []
    for cell in cells:
        words = [tokenizer.decode([word]).strip() for word in ids[cell]]
        pairs = zip(weights[cell], words, strict=True)
        sums.append(" + ".join(f"{weight:.1f} · {word}" for weight, word in pairs if weight))
    return sums


def save_base(folder: Path, model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor) -> Path:
    """The model as a base checkpoint, from which stage 1 can begin."""
    return save_checkpoint(folder, model, processor, {"stage": "base", "text_probe": text_probe(model, processor)})


def train_w(
    parent: Path, samples: Sequence[Sample], stage: Stage, seed: int, precision: str
) -> tuple[list[float], MiniVLMForConditionalGeneration]:
    """Stage 1 on a base checkpoint, with nothing kept on disk and no ledger printed: its losses, and the model."""
    model, processor, _ = load_checkpoint(parent)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        options = {"parent": parent, "seed": seed, "precision": precision}
        log = Trainer(model, processor, samples, stage, f"{folder}/pretrain", **options).fit()
    return [entry["loss"] for entry in log], model


def form_of(kind: str) -> str:
    """What a batch of the language model's log holds: "drill" of "mosaic drill" and of "list drill"."""
    return kind.split(" ", 1)[1] if " " in kind else kind


def show_rounds(log: Sequence[Mapping], title: str) -> None:
    """A language model's rounds, see `rounds`."""
    last = max(line for line, row in enumerate(log) if row["step"] == 0)  # the last round begins here
    losses = {name: [row["loss"] for row in log[last:] if form_of(row["kind"]) == name] for name in FORMS}
    medians = ", ".join(f"{FORMS[name][0]} {np.median(row):.2f}" for name, row in losses.items() if row)
    alt = (
        "Points of the training loss on a logarithmic scale, round after round, a mark for each form of batch. "
        f"It begins at {log[0]['loss']:.2f}. In the last round, in the median: {medians}."
    )
    show(rounds(log, title), alt, f"The loss in the last round, in the median: {medians}.")


@style()
def rounds(log: Sequence[Mapping], title: str) -> Figure:
    """The loss of a language model over its rounds, one mark for each form of batch.

    Args:
        log: rows with "step", "loss" and "kind"; the steps of each round begin at 0.
    """
    starts, steps = _one_after_the_other([row["step"] for row in log])
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for name, (form_title, mark, colour) in FORMS.items():
        chosen = [i for i, row in enumerate(log) if form_of(row["kind"]) == name]
        losses = [log[i]["loss"] for i in chosen]
        axes.plot([steps[i] for i in chosen], losses, mark, color=colour, markersize=5, label=form_title)
    for number, start in enumerate(starts, start=1):
        axes.axvline(start, color=GREY, linewidth=1)
        axes.text(start + 15, 1.02, f"round {number}", transform=axes.get_xaxis_transform(), fontsize=9)
    axes.set(xlim=(-20, steps[-1] * 1.02), xlabel="step", ylabel="loss (logarithmic)", yscale="log")
    axes.legend(frameon=False, ncols=4, loc="upper right")
    axes.set_title(title, pad=20)
    return figure


def _one_after_the_other(steps: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where each round starts, and all steps counted on; a round starts where the count falls back."""
    starts, counted, last = [], [], None
    for step in steps:
        if last is None or step <= last:
            starts.append(counted[-1] + 1 if counted else 0)
        counted.append(starts[-1] + step)
        last = step
    return starts, counted


def show_two_tongues(losses: Mapping[str, Sequence[Sequence[float]]], named: Mapping[str, Sequence[float]]) -> None:
    """W trained on two language models, see `two_tongues`."""
    ends = "; ".join(f"{name}: {', '.join(f'{curve[-1]:.2f}' for curve in seeds)}" for name, seeds in losses.items())
    shares = "; ".join(f"{name}: {', '.join(f'{share:.0%}' for share in seeds)}" for name, seeds in named.items())
    alt = f"Left, losses of W, a line for each seed; at the end {ends}. Right, the share of things named. {shares}."
    gap, seeds = effect(*named.values()), len(next(iter(named.values())))
    summary = f"Things named in the mean of {seeds} seeds: {gap.before:.0%} and {gap.after:.0%}"
    show(two_tongues(losses, named), alt, f"{summary}; the seeds of one lie within {gap.seed_range:.0%}.")


@style()
def two_tongues(losses: Mapping[str, Sequence[Sequence[float]]], named: Mapping[str, Sequence[float]]) -> Figure:
    """The same W trained on different language models: its loss, one line a seed, and the share of things named."""
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    for index, (name, (colour, dashes, mark)) in enumerate(zip(losses, STROKES[::4], strict=False)):
        for curve in losses[name]:
            mean = trailing_mean(curve, window=8)
            left.plot(np.arange(1, len(mean) + 1), mean, dashes, color=colour, linewidth=1.6)
        left.plot([], [], dashes, color=colour, label=name)
        right.plot(named[name], [index] * len(named[name]), mark, color=colour, markersize=9, alpha=0.8)
        right.text(0, index - 0.18, name, color=colour)
    left.set(ylim=(0, None), xlabel="step", ylabel="loss", title="Training W: a line for each seed")
    right.set(xlim=(-0.03, 1.03), ylim=(len(losses) - 0.6, -0.6), title="Things named, held-out pictures")
    left.legend(frameon=False, loc="upper right")
    right.set_yticks([])
    right.set_xticks(np.linspace(0, 1, 5), [f"{share:.0%}" for share in np.linspace(0, 1, 5)])
    for axes, axis in ((left, "y"), (right, "x")):
        axes.grid(axis=axis)
    return figure
