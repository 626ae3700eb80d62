"""The vision encoder of the scenes preset: a CLIP vision transformer, trained on pictures and their captions.

Two terms, both from caption words alone, no boxes:

* **contrast** (CLIP, Radford et al., arXiv:2103.00020): the class token finds its caption among the batch's; half of
  the batches share one setting and one number of things, so that the contrast must be about the things;
* **naming** (in the spirit of SuperClass, Huang et al., arXiv:2411.03313: classify the words of the caption): which
  words does the caption use? The caption says "on the left, near us, a red car". The evidence for that phrase is the
  best patch's sum `red + car + left + near`, so one and the same patch must be able to say all four words, linearly.

A frozen language model can only use what is linearly readable in the patch tokens; the naming term asks for just that.
The class list has one entry per (kind, colour) pair and slot; pairs of the compositional hold-out are not in it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from minivlm.data.features import normalised
from minivlm.pretraining import loop
from minivlm.pretraining.reading_tasks import covered
from minivlm.runtime.files import write_json
from minivlm.scenes import vocabulary as w
from minivlm.scenes.drawing.draw import layout
from minivlm.scenes.drawing.gallery import cached_pictures
from minivlm.scenes.facts import (
    COLOURLESS,
    COLOURS,
    DISTANCES,
    HELD_OUT_COLOURS,
    KINDS,
    PLACES,
    SETTINGS,
    Scene,
    Thing,
    random_stream,
    sample_scene,
)
from minivlm.scenes.language import caption

RECIPE = loop.Recipe(steps=3600, batch_size=64, muon_lr=0.02, adam_lr=1.5e-3, save_every=250)
PICTURES = 16_000
PROBE_FIT, PROBE_TEST = 4_000, 2_000  # pictures of the "dev" split: the exam's own mix, never trained on
TEXT_WIDTH = 128
SHIFT = 4  # pixels by which a training picture is moved at random

PAIRS = tuple(
    (kind, colour)
    for kind in KINDS
    for colour in ((None,) if kind in COLOURLESS else COLOURS)
    if (kind, colour) not in HELD_OUT_COLOURS
)
SLOTS = tuple((place, distance) for place in PLACES for distance in DISTANCES)
MIRRORED = {"left": "right", "middle": "middle", "right": "left"}


class NamingHead(nn.Module):
    """Evidence of every patch for every phrase (kind, colour, place, distance): a sum of four word scores."""

    def __init__(self, width: int):
        super().__init__()
        self.words = nn.Linear(width, len(KINDS) + len(COLOURS) + 1 + len(PLACES) + len(DISTANCES))
        hues = [len(COLOURS) if colour is None else COLOURS.index(colour) for _, colour in PAIRS]
        self.register_buffer("kinds", torch.tensor([KINDS.index(kind) for kind, _ in PAIRS]), persistent=False)
        self.register_buffer("hues", torch.tensor(hues), persistent=False)
        self.register_buffer("places", torch.tensor([PLACES.index(p) for p, _ in SLOTS]), persistent=False)
        self.register_buffer("distances", torch.tensor([DISTANCES.index(d) for _, d in SLOTS]), persistent=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch tokens (B, N, Dv) to phrase scores (B, pairs, slots): a soft maximum over patches."""
        sizes = (len(KINDS), len(COLOURS) + 1, len(PLACES), len(DISTANCES))
        kind, hue, place, distance = self.words(patches).split(sizes, dim=-1)  # (B, N, words) each
        pair = kind[..., self.kinds] + hue[..., self.hues]  # (B, N, pairs)
        slot = place[..., self.places] + distance[..., self.distances]  # (B, N, slots)
        # log-sum-exp over patches of (pair + slot), as a product of exponentials: no (B, N, pairs, slots) tensor
        top_pair, top_slot = pair.amax(dim=(1, 2), keepdim=True).detach(), slot.amax(dim=(1, 2), keepdim=True).detach()
        joint = torch.bmm((pair - top_pair).exp().transpose(1, 2), (slot - top_slot).exp())  # (B, pairs, slots)
        return joint.clamp_min(1e-20).log() + top_pair + top_slot


class TextTower(nn.Module):
    """A small caption encoder for the contrast: two transformer layers, the mean of the tokens."""

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, TEXT_WIDTH, padding_idx=0)
        self.position = nn.Parameter(torch.randn(96, TEXT_WIDTH) * 0.02)
        block = nn.TransformerEncoderLayer(
            TEXT_WIDTH, 2, 2 * TEXT_WIDTH, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.out = nn.Linear(TEXT_WIDTH, width, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T), 0 for padding, to caption vectors (B, Dv)."""
        shown = (input_ids != 0)[..., None]
        hidden = self.embed(input_ids) + self.position[: input_ids.shape[1]]  # (B, T, 128)
        hidden = self.blocks(hidden, src_key_padding_mask=~shown[..., 0])
        return self.out((hidden * shown).sum(1) / shown.sum(1))


class EncoderTrainer(nn.Module):
    """The encoder with everything that only its training needs."""

    def __init__(self, config: CLIPVisionConfig, tokenizer: PreTrainedTokenizerFast, recipe: loop.Recipe, bf16: bool):
        super().__init__()
        self.encoder = CLIPVisionModel(config)
        self.encoder.set_attn_implementation("eager")  # on a CPU faster than the fused kernel's backward, measured
        self.naming = NamingHead(config.hidden_size)
        self.setting = nn.Linear(config.hidden_size, len(SETTINGS))
        self.text = TextTower(len(tokenizer), config.hidden_size)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.tokenizer, self.recipe, self.bf16 = tokenizer, recipe, bf16

    def use(self, pictures: np.ndarray, scenes: list[Scene]) -> None:
        """The pictures (I, H, W, 3) and their facts; scenes are grouped by setting and count for hard batches."""
        self.pictures, self.scenes = pictures, scenes
        groups: dict[tuple[str, int], list[int]] = {}
        for index, scene in enumerate(scenes):
            groups.setdefault((scene.setting, len(scene.things)), []).append(index)
        self.groups = [np.array(group) for group in groups.values() if len(group) >= self.recipe.batch_size]

    def step_loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Contrast and naming loss of batch number `step`, a pure function of `step` and the weights."""
        rng = random_stream("encoder", self.recipe.seed, step)
        pool = np.arange(len(self.scenes))
        if step % 2 and self.groups:
            pool = self.groups[rng.integers(len(self.groups))]
        chosen = np.sort(rng.choice(pool, self.recipe.batch_size, replace=False))
        mirror = rng.random(len(chosen)) < 0.5
        scenes = [_mirrored(self.scenes[i]) if m else self.scenes[i] for i, m in zip(chosen, mirror, strict=True)]
        pixels = _moved(self.pictures[chosen], mirror, rng)
        captions = [caption(scene, w.LANGUAGES[int(rng.integers(2))], rng) for scene in scenes]
        ids = self.tokenizer(captions, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            vision = self.encoder(pixel_values=pixels)
            text = self.text(ids)
        patches = vision.last_hidden_state[:, 1:].float()  # (B, N, Dv)
        naming, setting = self._naming_loss(patches, scenes)
        contrast = contrast_loss(vision.pooler_output.float(), text.float(), self.scale, captions)
        parts = {"naming": naming.item(), "setting": setting.item(), "contrast": contrast.item()}
        return naming + 0.5 * setting + 0.3 * contrast, parts

    def _naming_loss(self, patches: torch.Tensor, scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the caption's phrases among all phrases; of its setting among the settings."""
        target = torch.zeros(len(scenes), len(PAIRS), len(SLOTS))
        for row, scene in enumerate(scenes):
            for thing in scene.things:
                pair, slot = (thing.kind, thing.colour), (thing.place, thing.distance)
                target[row, PAIRS.index(pair), SLOTS.index(slot)] = 1 / len(scene.things)
        scores = self.naming(patches)  # (B, pairs, slots)
        exact = -(target.flatten(1) * scores.flatten(1).log_softmax(dim=-1)).sum(-1).mean()
        names = -(target.sum(2) * scores.logsumexp(2).log_softmax(dim=-1)).sum(-1).mean()
        truth = torch.tensor([SETTINGS.index(scene.setting) for scene in scenes])
        return exact + names, F.cross_entropy(self.setting(patches.mean(1)), truth)


def contrast_loss(
    seen: torch.Tensor, spoken: torch.Tensor, scale: torch.Tensor, captions: Sequence[str]
) -> torch.Tensor:
    """CLIP's symmetric loss (arXiv:2103.00020, figure 3). Of rows with the same caption each is the other's match too.

    Args:
        seen: (B, Dv), one vector for each picture.
        spoken: (B, Dv), one for each caption.
        scale: a number, the log of what cosines are multiplied with.
        captions: the B captions themselves, to know which are the same.
    """
    scores = F.normalize(seen, dim=-1) @ F.normalize(spoken, dim=-1).T * scale.exp().clamp(max=100)  # (B, B)
    same = torch.tensor([[a == b for b in captions] for a in captions], dtype=torch.float)
    target = same / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target))


def train(
    config: CLIPVisionConfig,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    bf16: bool = True,
    recipe: loop.Recipe = RECIPE,
    pictures: int = PICTURES,
    workers: int | None = None,
) -> tuple[CLIPVisionModel, dict]:
    """Train the encoder from nothing; resumable. Returns it and its measured probes."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    trainer = EncoderTrainer(config, tokenizer, recipe, bf16)
    images = cached_pictures(folder / "pictures.npy", "base", pictures, config.image_size, workers)
    trainer.use(images, [sample_scene("base", i) for i in range(pictures)])
    log = loop.run(trainer, trainer.step_loss, recipe, folder, "encoder")
    metrics = probe(trainer.encoder.eval(), folder, workers)
    metrics["minutes"] = sum(row["seconds"] for row in log) / 60
    write_json(folder / "metrics.json", metrics)
    return trainer.encoder, metrics


@torch.no_grad()
def patch_tokens(encoder: CLIPVisionModel, pictures: np.ndarray, batch_size: int = 250) -> torch.Tensor:
    """Patch tokens (I, N, Dv) of uint8 pictures (I, H, W, 3), without the class token."""
    batches = (pictures[i : i + batch_size] for i in range(0, len(pictures), batch_size))
    return torch.cat([encoder(pixel_values=normalised(batch)).last_hidden_state[:, 1:] for batch in batches])


def probe(encoder: CLIPVisionModel, folder: Path, workers: int | None = None) -> dict:
    """What one logistic regression reads from the mean of the patch tokens that a thing covers; and the setting.

    Fitted and tested on held-out pictures of the exam's own mix; accuracy by distance and number of things.
    """
    count = PROBE_FIT + PROBE_TEST
    pictures = cached_pictures(folder / "probe.npy", "dev", count, encoder.config.image_size, workers)
    scenes = [sample_scene("dev", i) for i in range(count)]
    tokens = patch_tokens(encoder, pictures).numpy()
    side = int(tokens.shape[1] ** 0.5)
    rows = [
        (index, thing, len(scene.things), tokens[index, covered(box, side)].mean(0))
        for index, scene in enumerate(scenes)
        for thing, box in zip(scene.things, layout(scene), strict=True)
    ]
    result = {name: _probe_things([row for row in rows if getattr(row[1], name)], name) for name in ("kind", "colour")}
    means, truth = tokens.mean(1), [scene.setting for scene in scenes]
    reader = _reader().fit(means[:PROBE_FIT], truth[:PROBE_FIT])
    return result | {"setting": float(reader.score(means[PROBE_FIT:], truth[PROBE_FIT:]))}


def _probe_things(rows: list[tuple[int, Thing, int, np.ndarray]], name: str) -> dict:
    fit, test = [row for row in rows if row[0] < PROBE_FIT], [row for row in rows if row[0] >= PROBE_FIT]
    reader = _reader().fit(np.stack([row[3] for row in fit]), [getattr(row[1], name) for row in fit])
    groups: dict[str, list[bool]] = {}
    for (_, thing, count, _), answer in zip(test, reader.predict(np.stack([row[3] for row in test])), strict=True):
        groups.setdefault(f"{thing.distance}, {count} in the picture", []).append(answer == getattr(thing, name))
    return {key: {"accuracy": float(np.mean(hits)), "things": len(hits)} for key, hits in sorted(groups.items())}


def _reader():
    # here, for it takes half a second, and most of those who import this module never come here
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, C=0.1))


def _mirrored(scene: Scene) -> Scene:
    return replace(scene, things=tuple(replace(thing, place=MIRRORED[thing.place]) for thing in scene.things))


def _moved(pictures: np.ndarray, mirror: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Mirror the chosen pictures and move each by a few pixels, its border repeated."""
    side = pictures.shape[1]
    padded = np.pad(pictures, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    corners = rng.integers(0, 2 * SHIFT + 1, size=(len(pictures), 2))
    cut = [p[y : y + side, x : x + side] for p, (y, x) in zip(padded, corners, strict=True)]
    return normalised(np.stack([c[:, ::-1] if m else c for c, m in zip(cut, mirror, strict=True)]))
