"""Where an encoder and a language model come from: short runs of both, for notebook A1.

* **Two towers**: CLIP's contrast (Radford et al., arXiv:2103.00020) and nothing else, on small pictures. What was
  learnt is measured by **retrieval**: of as many captions as there are pictures, which one does a picture choose?
* **Byte pairs**: what byte-level BPE does, in a dozen lines, and cuts that people can read.
* **A blind reader**: a language model to which what stands before a caption said nothing about it.
* **Bags of words**: pictures typed in words, and what is left of them when the words are shuffled.

The figures are in `base_plates.py`. Letters as in `config.py`.
"""

import io
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from minivlm.checkpoint import load_checkpoint
from minivlm.config import PROMPTS, Stage
from minivlm.data.features import FeatureCache
from minivlm.data.samples import Sample
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.pretraining import loop
from minivlm.pretraining.encoder import TextTower, contrast_loss, normalised
from minivlm.pretraining.language_model import LanguageModelTrainer
from minivlm.pretraining.reading_tasks import Lexicon, mosaic
from minivlm.processor import Example, MiniVLMProcessor, messages_from_row
from minivlm.scenes.facts import Scene, random_stream, sample_scene
from minivlm.scenes.language import caption
from minivlm.train import train

Pair = tuple[str, str]
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # GPT-2's alphabet: a character a byte
ANOTHER = 5_000_000  # so many scenes further on is another scene, and no caption is of that one
ORDERS = ("in place", "cells shuffled", "words shuffled")


class Towers(nn.Module):
    """An encoder and a caption's tower, whose vectors are to meet: CLIP, small, with no other loss.

    Args:
        config: of the encoder.
        tokenizer: cuts the captions.
        pictures: uint8 (I, H, W, 3), to be learnt from.
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
        pictures: np.ndarray,
        scenes: Sequence[Scene],
        batch_size: int,
        hard: bool = False,
    ):
        super().__init__()
        self.encoder = CLIPVisionModel(config)
        self.encoder.set_attn_implementation("eager")  # faster on a CPU, as in `minivlm/pretraining/encoder.py`
        self.text = TextTower(len(tokenizer), config.hidden_size)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.tokenizer, self.pictures, self.scenes, self.batch_size = tokenizer, pictures, scenes, batch_size
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
        seen = self.encoder(pixel_values=normalised(self.pictures[chosen])).pooler_output  # (B, Dv)
        spoken = self.text(self.ids(captions))  # (B, Dv)
        return contrast_loss(seen, spoken, self.scale, captions), {}

    def ids(self, captions: Sequence[str]) -> torch.Tensor:
        """Captions as token ids (B, T), padded on the right."""
        options = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        return self.tokenizer(list(captions), **options)["input_ids"]

    @torch.no_grad()
    def cosines(self, pictures: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """How well every picture goes with every caption (I, captions), from -1 to 1."""
        seen = self.encoder(pixel_values=normalised(pictures)).pooler_output  # (I, Dv): the class token, normed
        spoken = self.text(self.ids(captions))  # (captions, Dv)
        return (F.normalize(seen, dim=-1) @ F.normalize(spoken, dim=-1).T).numpy()


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

    def told(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        loss, extra = step_loss(step)
        if on_step is not None:
            on_step(step + 1, loss.item(), None)
        return loss, extra

    with tempfile.TemporaryDirectory() as folder:
        return loop.run(module, told, recipe, Path(folder), title)


def plain_captions(scenes: Sequence[Scene]) -> list[str]:
    """One English caption for each scene, always the same."""
    return [caption(scene, "en", random_stream("caption", scene.seed)) for scene in scenes]


def alike(setting: str, things: int, count: int) -> list[Scene]:
    """The first `count` held-out scenes with one setting and one number of things: they differ in the things alone."""
    found, index = [], 0
    while len(found) < count:
        scene = sample_scene("dev", index, things)
        if scene.setting == setting:
            found.append(scene)
        index += 1
    return found


def halved(pictures: np.ndarray) -> np.ndarray:
    """uint8 pictures (I, H, W, 3) at half their width and height: each pixel the mean of four."""
    count, height, width, colours = pictures.shape
    return pictures.reshape(count, height // 2, 2, width // 2, 2, colours).mean((2, 4)).round().astype(np.uint8)


def agreement(cosines: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """What the caption that a picture chooses has in common with its own, as shares of the pictures.

    Args:
        cosines: (I, I), pictures against the captions of the same scenes.
        scenes: the I scenes.
    """
    pairs = [(scenes[i], scenes[best]) for i, best in enumerate(cosines.argmax(axis=1))]
    return {
        "the setting": float(np.mean([own.setting == chosen.setting for own, chosen in pairs])),
        "how many things": float(np.mean([len(own.things) == len(chosen.things) for own, chosen in pairs])),
        "a kind of thing": float(np.mean([bool(_kinds(own) & _kinds(chosen)) for own, chosen in pairs])),
        "its own caption": float(np.mean([own is chosen for own, chosen in pairs])),
    }


def learn_merges(words: Counter[str], count: int) -> list[tuple[Pair, int]]:
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


def _merged(pieces: list[str], pair: Pair) -> list[str]:
    """A word's pieces, the pair joined wherever it stands, from left to right."""
    joined: list[str] = []
    place = 0
    while place < len(pieces):
        two = tuple(pieces[place : place + 2]) == pair
        joined.append("".join(pair) if two else pieces[place])
        place += 2 if two else 1
    return joined


def words_of(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Counter[str]:
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


class BlindReader(LanguageModelTrainer):
    """Trains a language model on captions, each after a typed picture of *another* scene.

    It learns to speak, and it learns that what stands before a caption says nothing about it. The block is there so
    that it is nothing strange later; all that is missing is a reason to read it.
    """

    def row(self, kind: str, index: int) -> tuple[Example, Scene | None]:
        """Row number `index`: the prompt and a caption, and the scene whose mosaic stands in the block."""
        own, another = (sample_scene("text", number) for number in (index, index + ANOTHER))
        said = caption(own, "en", random_stream("blind reader", index))
        turns = [{"role": "user", "content": f"<image>\n{PROMPTS['en']}"}, {"role": "assistant", "content": said}]
        return self.processor.render(messages_from_row(turns, [None])), another


def typed(
    model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, scene: Scene, order: str = "in place"
) -> torch.Tensor:
    """A scene typed in words where a picture would stand (`pretraining/reading_tasks.py`): image_embeds (N, Dl).

    Args:
        order: one of `ORDERS`. "in place", each cell where its patch would be; "cells shuffled", the cells go anywhere
            and each keeps its words; "words shuffled", the same words are dealt out anew, so that colour and kind of
            one thing no longer stand together.
    """
    if order not in ORDERS:
        raise ValueError(f"there is no order {order!r}; choose one of {', '.join(ORDERS)}")
    side, rng = int(processor.num_image_tokens**0.5), random_stream("typed", scene.seed)
    ids, weights = mosaic(scene, side, Lexicon.of(processor.tokenizer), rng)  # (N, 5) each
    if order == "cells shuffled":
        moved = rng.permutation(len(ids))
        ids, weights = ids[moved], weights[moved]
    if order == "words shuffled":
        moved = rng.permuted(np.tile(np.arange(len(ids))[:, None], ids.shape[1]), axis=0)  # each column by itself
        ids, weights = np.take_along_axis(ids, moved, axis=0), np.take_along_axis(weights, moved, axis=0)
    table = model.get_input_embeddings().weight.detach()  # (V, Dl)
    return (table[torch.from_numpy(ids)] * torch.from_numpy(weights)[..., None]).sum(dim=1)


def train_w(
    parent: Path, rows: Sequence[Sample], stage: Stage, features: FeatureCache, seed: int, precision: str
) -> tuple[list[float], MiniVLMForConditionalGeneration]:
    """Stage 1 upon a base checkpoint, with nothing kept on disk and no ledger printed: its losses, and the model."""
    model, processor, _ = load_checkpoint(parent)
    options = {"parent": parent, "seed": seed, "features": features, "precision": precision}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        log = train(model, processor, rows, stage, f"{folder}/pretrain", **options)
    return [row["loss"] for row in log], model


def _kinds(scene: Scene) -> set[str]:
    return {thing.kind for thing in scene.things}
