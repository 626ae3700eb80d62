"""The language model of the scenes preset: a Llama that has read text only.

Beside plain text, lists, translations and small talk, it reads **word mosaics**: the block of N positions where a
picture will stand later is filled with words, cell by cell, as if somebody had typed a picture. A cell that the red
car covers says `red`, `car`, `left`, `near`, in English or Chinese; a cell of the background says `beach`. In half of
the mosaics a cell is one word; in the other half it is a *chord*, the weighted sum of several words' embeddings with
a little noise, since that is what a linear projector can make of a patch. No picture is involved. A large language
model meets such jumbled lists of words among its trillions of tokens; a model of four million parameters must be
shown them on purpose, and the course says so (notebook A1).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from minivlm.base import loop
from minivlm.base.corpus import answered_prompts, listed_scene, listing_of, plain_text, small_talk, translation
from minivlm.config import IGNORE_INDEX, PROMPTS, MiniVLMConfig
from minivlm.placeholders import replace_placeholders
from minivlm.processor import MiniVLMProcessor, Rendered, messages_from_row
from minivlm.scenes import words as w
from minivlm.scenes.draw import layout
from minivlm.scenes.facts import Scene, random_stream, sample_scene
from minivlm.scenes.language import read_facts

EXAM_OFFSET = 10_000_000  # held-out scenes: indices that training, which counts up from 0, never reaches
ROUND_OFFSET = 1_000_000  # the second round reads other scenes than the first
TEXT_KINDS = 5
SOURCES = ("list", "mosaic")


@dataclass(frozen=True)
class Style:
    """How the mosaics of a round of training are typed, and how often plain text comes between.

    Attributes:
        said: how often a cell of a thing says its colour, kind, place, distance and setting.
        one_word: the share of mosaics in which a cell is a single word; in the others it is a chord.
        wrong: the share of cells that say a wrong colour and kind.
        noise: the most noise added to a cell, in units of the embeddings' own size.
        turns: questions asked about one mosaic.
        captions: how much more often than a question a caption is asked for.
        text_every: every so many batches, one is text without a mosaic.
        list_turns: questions asked about one list.
        list_in_order: the share of lists in reading order.
    """

    said: tuple[float, ...]
    one_word: float
    wrong: float
    noise: float
    turns: int
    captions: float
    text_every: int
    list_turns: int = 2
    list_in_order: float = 0.0


# Two rounds: the first teaches the words and to read a noisy bag of them; the second, with clearer mosaics, more
# questions and more lists, which colour belongs to which thing. The first alone left 0.4 of the pairs right.
ROUNDS = (
    (
        loop.Recipe(steps=1300, batch_size=40, muon_lr=0.02, adam_lr=3e-3, save_every=100),
        Style((0.85, 0.9, 0.7, 0.6, 0.15), 0.5, 0.02, 0.5, turns=3, captions=6.0, text_every=4),
    ),
    (
        loop.Recipe(steps=1700, batch_size=32, muon_lr=0.02, adam_lr=3e-3, save_every=100, seed=1),
        Style((1.0, 1.0, 1.0, 1.0, 0.0), 0.0, 0.0, 0.15, 4, 3.0, text_every=2, list_turns=4, list_in_order=0.4),
    ),
)


@dataclass(frozen=True)
class Lexicon:
    """The token id of every word that a mosaic can use, by language."""

    colours: dict[str, dict[str, int]]
    kinds: dict[str, dict[str, int]]
    places: dict[str, dict[str, int]]
    distances: dict[str, dict[str, int]]
    settings: dict[str, dict[str, int]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> "Lexicon":
        """Look the words up; of a word in several tokens the last one stands for it."""

        def table(words: dict[str, dict[str, str]]) -> dict[str, dict[str, int]]:
            def last_id(lang: str, word: str) -> int:
                spaced = f" {word}" if lang == "en" else word  # as it stands inside a sentence
                return tokenizer.encode(spaced, add_special_tokens=False)[-1]

            return {lang: {key: last_id(lang, word) for key, word in row.items()} for lang, row in words.items()}

        return cls(
            colours=table(w.COLOUR_WORDS),
            kinds=table(w.KIND_WORDS),
            places=table({"en": {p: p for p in w.PLACE_WORDS["en"]}, "zh": w.PLACE_WORDS["zh"]}),
            distances=table({"en": {d: d for d in w.DISTANCE_WORDS["en"]}, "zh": w.DISTANCE_WORDS["zh"]}),
            settings=table({lang: {s: row[2] for s, row in w.SETTING_WORDS[lang].items()} for lang in w.LANGUAGES}),
        )


def mosaic(
    scene: Scene, side: int, lexicon: Lexicon, rng: np.random.Generator, style: Style
) -> tuple[np.ndarray, np.ndarray]:
    """A scene typed as a grid of words: token ids and weights, both (N, 5), N = side x side.

    The five words of a cell are colour, kind, place, distance and setting; a weight of 0 means unsaid.
    """
    owner = _owners(scene, side)
    languages = [w.LANGUAGES[0], w.LANGUAGES[1]] if rng.random() < 1 / 3 else [w.LANGUAGES[rng.integers(2)]]
    tables = [_word_table(scene, lexicon, lang) for lang in languages]  # (things + 1, 5); the last row: background
    cell_language = rng.integers(len(tables), size=side * side)
    ids = np.stack(tables)[cell_language, owner]  # (N, 5)
    wrong = rng.random(side * side) < style.wrong
    for cell in np.flatnonzero(wrong):
        ids[cell, :2] = _any(lexicon.colours, rng), _any(lexicon.kinds, rng)
    said = rng.random(ids.shape) < np.array(style.said)
    background = owner == len(scene.things)
    said[background & ~wrong] = False
    said[background, 4] = rng.random(int(background.sum())) < 0.8
    said &= ids >= 0
    if rng.random() < style.one_word:  # one word a cell: the first of a random order among those said
        first = np.argmax(said * rng.random(said.shape), axis=1)
        said &= np.arange(5) == first[:, None]
        weights = said.astype(np.float32)
    else:  # a chord
        weights = (said * rng.uniform(0.4, 1.2, said.shape)).astype(np.float32)
    return np.where(said, ids, 0), weights


def _owners(scene: Scene, side: int) -> np.ndarray:
    """Which thing each cell shows (N,); len(things) where it shows the background."""
    centres = (np.arange(side) + 0.5) / side
    y, x = (axis.reshape(-1) for axis in np.meshgrid(centres, centres, indexing="ij"))
    owner = np.full(side * side, len(scene.things))
    boxes = layout(scene)
    for index in sorted(range(len(boxes)), key=lambda i: scene.things[i].distance == "near"):
        left, top, right, bottom = boxes[index]
        distance = ((x - (left + right) / 2) ** 2 + (y - (top + bottom) / 2) ** 2) / ((right - left) / 2) ** 2
        owner[(distance < 1) | (distance == distance.min())] = index
    return owner


def _word_table(scene: Scene, lexicon: Lexicon, lang: str) -> np.ndarray:
    setting = lexicon.settings[lang][scene.setting]
    rows = [
        (
            lexicon.colours[lang].get(t.colour, -1),
            lexicon.kinds[lang][t.kind],
            lexicon.places[lang][t.place],
            lexicon.distances[lang][t.distance],
            setting,
        )
        for t in scene.things
    ]
    return np.array([*rows, (-1, -1, -1, -1, setting)])


def _any(table: dict[str, dict[str, int]], rng: np.random.Generator) -> int:
    ids = list(table[w.LANGUAGES[rng.integers(2)]].values())
    return ids[rng.integers(len(ids))]


class MosaicReader:
    """Turns corpus documents into batches, and a batch into the language model's loss.

    `processor.num_image_tokens` decides how many cells a mosaic has: the same block a picture will fill.
    """

    def __init__(
        self, model: LlamaForCausalLM, processor: MiniVLMProcessor, recipe: loop.Recipe, style: Style, bf16: bool
    ):
        self.model, self.processor, self.recipe, self.style, self.bf16 = model, processor, recipe, style, bf16
        self.lexicon = Lexicon.of(processor.tokenizer)
        self.side = int(processor.num_image_tokens**0.5)

    def step_loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """The mean loss per supervised token of batch number `step`, a pure function of `step` and the model."""
        size = self.recipe.batch_size
        numbers = range(
            self.recipe.seed * ROUND_OFFSET + step * size, self.recipe.seed * ROUND_OFFSET + (step + 1) * size
        )
        if step % self.style.text_every == self.style.text_every - 1:
            rows, scenes = [self._text_row(number) for number in numbers], []
        else:
            pairs = [self._mosaic_row(number) for number in numbers]
            rows, scenes = [row for row, _ in pairs], [scene for _, scene in pairs]
        batch = self.processor.collate(rows)
        embeds = self.embed(batch, scenes, random_stream("mosaic", self.recipe.seed, step))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
        return loss, {"tokens": int((batch["labels"] != IGNORE_INDEX).sum())}

    def embed(self, batch: dict, scenes: list[Scene], rng: np.random.Generator) -> torch.Tensor:
        """Look the ids up (B, T, Dl) and put each scene's mosaic where its placeholders stand."""
        table = self.model.get_input_embeddings().weight  # (V, Dl)
        ids = batch["input_ids"]
        embeds = table[ids.masked_fill(ids == self.processor.image_token_id, 0)]  # (B, T, Dl)
        if not scenes:
            return embeds
        cells = [mosaic(scene, self.side, self.lexicon, rng, self.style) for scene in scenes]
        words, weights = (torch.from_numpy(np.stack(part)) for part in zip(*cells, strict=True))
        mosaics = (table[words] * weights[..., None]).sum(dim=-2)  # (I, N, Dl)
        scale = (
            table.detach().pow(2).mean().sqrt() * self.style.noise * torch.from_numpy(rng.random((len(scenes), 1, 1)))
        )
        noise = torch.from_numpy(rng.standard_normal(mosaics.shape, dtype=np.float32))
        return replace_placeholders(
            embeds, ids, mosaics + noise * scale.float(), self.processor.image_token_id, batch["images_per_row"]
        )

    def _mosaic_row(self, index: int) -> tuple[Rendered, Scene]:
        rng = random_stream("conversation", self.recipe.seed, index)
        scene, lang = sample_scene("text", index), w.LANGUAGES[int(rng.integers(2))]
        conversation = answered_prompts(scene, lang, rng, self.style.turns, self.style.captions)
        return self._picture_row(conversation), scene

    def _picture_row(self, conversation: list[dict[str, str]]) -> Rendered:
        first = conversation[0]["content"]
        turns = [{"role": "user", "content": f"<image>\n{first}"}, *conversation[1:]]
        return self.processor.render(messages_from_row(turns, [None]))

    def _text_row(self, index: int) -> Rendered:
        kind = index % TEXT_KINDS
        if kind == 0:
            ids = [*self.processor.tokenizer.encode(plain_text(index)), self.processor.tokenizer.eos_token_id]
            return Rendered(ids, [IGNORE_INDEX, *ids[1:]])
        if kind in (1, 2):
            return self.processor.render(listed_scene(index, self.style.list_turns, self.style.list_in_order))
        return self.processor.render((translation, small_talk)[kind - 3](index))

    @torch.no_grad()
    def captions(self, lang: str, count: int, source: str, batch_size: int = 100) -> dict[str, float]:
        """Precision and recall of (colour, kind) pairs in captions of held-out scenes, from words alone.

        `source` is "list" (a listed scene) or "mosaic". Greedy decoding.
        """
        right = named = true = 0
        for start in range(0, count, batch_size):
            size = min(batch_size, count - start)
            scenes = [sample_scene("text", EXAM_OFFSET + start + i) for i in range(size)]
            batch = self._questions(scenes, lang, source, start)
            embeds = self.embed(batch, scenes if source == "mosaic" else [], random_stream("exam mosaic", start))
            out = self.model.generate(
                inputs_embeds=embeds,
                attention_mask=batch["attention_mask"],
                max_new_tokens=64,
                do_sample=False,
                eos_token_id=self.processor.tokenizer.eos_token_id,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
            texts = self.processor.tokenizer.batch_decode(out, skip_special_tokens=True)
            for scene, text in zip(scenes, texts, strict=True):
                want = {(t.kind, t.colour) for t in scene.things}
                got = set(read_facts(text).things)
                right, named, true = right + len(want & got), named + len(got), true + len(want)
        return {"precision": right / max(1, named), "recall": right / true, "pairs": true}

    def _questions(self, scenes: list[Scene], lang: str, source: str, start: int) -> dict:
        rows = []
        for i, scene in enumerate(scenes):
            if source == "mosaic":
                turns = messages_from_row([{"role": "user", "content": f"<image>\n{PROMPTS[lang]}"}], [None])
            else:
                listing = listing_of(scene, lang, random_stream("exam list", start + i))
                turns = [{"role": "user", "content": f"{listing}\n{PROMPTS[lang]}"}]
            rows.append(turns)
        return self.processor.apply_chat_template(
            rows, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )


def build(config: MiniVLMConfig, seed: int) -> LlamaForCausalLM:
    """A language model of the preset's shape with random weights; attention in the form that is fastest here."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config.text_config)
    model.set_attn_implementation("eager")  # 64-wide heads on a CPU: twice as fast as the fused kernel, measured
    return model


def train(
    processor: MiniVLMProcessor,
    config: MiniVLMConfig,
    folder: Path,
    bf16: bool = True,
    rounds: Sequence[tuple[loop.Recipe, Style]] = ROUNDS,
    exam: int = 500,
) -> tuple[LlamaForCausalLM, dict]:
    """Train the language model from nothing, round after round; resumable. Returns it and its measured bars.

    Each round keeps its state and log in a folder of its own. `exam` held-out scenes are read in each language.
    """
    model = build(config, rounds[0][0].seed)
    minutes = []
    for number, (recipe, style) in enumerate(rounds, start=1):
        reader = MosaicReader(model, processor, recipe, style, bf16)
        model.train()
        log = loop.run(model, reader.step_loss, recipe, folder / f"round{number}", f"language model, round {number}")
        minutes.append(sum(row["seconds"] for row in log) / 60)
    model.eval()
    metrics = {f"{source} {lang}": reader.captions(lang, exam, source) for source in SOURCES for lang in w.LANGUAGES}
    metrics["minutes"] = minutes
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    return model, metrics
