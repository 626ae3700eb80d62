"""Greedy answers to many conversations: each image is encoded once, however many questions are about it.

Conversations that begin with the same tokens and images, up to the last placeholder, share the language model's cache
of this beginning. It is computed once and copied for each of them. Letters as in `config.py`.
"""

from collections.abc import Hashable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from minivlm.data.images import ImageSource
from minivlm.data.samples import check_messages, images_of
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.precision import give_back_memory

BATCH = 125  # conversations answered together
Conversation = list[dict]


def ask(prompt: str, image: ImageSource | torch.Tensor | None = None) -> Conversation:
    """A conversation of one question, about an image or its patch features (N, Dv), or about no image."""
    parts = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


@torch.no_grad()
def reply(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    conversations: Conversation | Sequence[Conversation],
    *,
    max_new_tokens: int = 96,
    precision: str = "fp32",
    batch_size: int = BATCH,
    title: str = "",
    streamer: BaseStreamer | None = None,
) -> str | list[str]:
    """The model's greedy answer to one conversation, or to each of several.

    Args:
        conversations: chat messages that end with a question. An image part carries an image, as `open_image` takes
            it, or its patch features (N, Dv).
        max_new_tokens: an answer that does not end by itself is cut here.
        precision: "fp32", or "bf16" for autocast.
        title: of a progress bar; without one there is none.
        streamer: is given the tokens of the one conversation as soon as they are written.

    Returns:
        As `model.generate(do_sample=False)` would give it: one text for one conversation, a list for several.

    Raises:
        SampleError, ImageError: a conversation is not understood or too long; an image cannot be read.
        ValueError: there is a streamer, but more than one conversation.
    """
    single = bool(conversations) and isinstance(conversations[0], dict)
    if streamer is not None and not single:
        raise ValueError(f"a streamer takes the tokens of one conversation, not of {len(conversations)}")
    images: dict[Hashable, ImageSource | torch.Tensor] = {}
    prompts = [_prompt(processor, one, images) for one in ([conversations] if single else conversations)]
    order = {key: number for number, key in enumerate(images)}
    unique = sorted(set(prompts), key=lambda p: (not p.images, p.head, [order[key] for key in p.images], p.text))
    groups = [list(group) for _, group in groupby(unique, key=lambda prompt: prompt.head)]  # one head in a batch
    texts: dict[_Prompt, str] = {}
    with tqdm(total=len(unique), desc=title, unit="answer", mininterval=2, disable=not title) as bar:
        for batch in (group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
                answers = _answer_batch(model, processor, batch, images, max_new_tokens, streamer)
            decoded = processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
            texts |= dict(zip(batch, decoded, strict=True))
            bar.update(len(batch))
    give_back_memory()  # keys and values grew token by token and left pieces of all sizes
    return texts[prompts[0]] if single else [texts[one] for one in prompts]


class _Prompt(NamedTuple):
    """A conversation as token ids: `head` up to the last placeholder, `tail` behind it; its images by their keys."""

    head: tuple[int, ...]
    tail: tuple[int, ...]
    images: tuple[Hashable, ...]
    text: str


def _prompt(processor: MiniVLMProcessor, messages: Conversation, images: dict) -> _Prompt:
    """Encode a conversation; its images are entered into `images`."""
    messages = check_messages(messages)
    sources = images_of(messages)
    keys = [_key(source) for source in sources]
    images.update(zip(keys, sources, strict=True))
    bare = [
        message | {"content": [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]}
        for message in messages
    ]
    ids = processor.apply_chat_template(bare, add_generation_prompt=True, tokenize=True)[0]
    # without an image, every prompt begins with the same control token
    shared = len(ids) - ids[::-1].index(processor.image_token_id) if keys else 1
    text = processor.apply_chat_template(bare, add_generation_prompt=True)
    return _Prompt(tuple(ids[:shared]), tuple(ids[shared:]), tuple(keys), text)


def _key(image: ImageSource | torch.Tensor) -> Hashable:
    """What an image is known by while a call lasts: names and bytes by what they say, all else by where it lies."""
    if isinstance(image, torch.Tensor):
        return image.data_ptr(), tuple(image.shape)
    return image if isinstance(image, str | Path | bytes) else id(image)


def _answer_batch(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    batch: list[_Prompt],
    images: dict[Hashable, ImageSource | torch.Tensor],
    max_new_tokens: int,
    streamer: BaseStreamer | None,
) -> list[list[int]]:
    """Token ids of each answer, without the end token."""
    device, pad = model.device, processor.tokenizer.pad_token_id
    positions = {keys: number for number, keys in enumerate(dict.fromkeys(one.images for one in batch))}
    heads = torch.tensor([batch[0].head] * len(positions), device=device)  # (G, H)
    features = [images[key] for keys in positions for key in keys]
    inputs = {"patch_features": _features(model, processor, features)} if features else {}
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=heads, use_cache=True, past_key_values=cache, logits_to_keep=1, **inputs)
    cache.batch_select_indices(torch.tensor([positions[one.images] for one in batch], device=device))
    width = max(len(one.tail) for one in batch)
    ids = torch.tensor([[pad] * (width - len(one.tail)) + list(one.tail) for one in batch], device=device)  # (B, T)
    mask = torch.tensor([[0] * (width - len(one.tail)) + [1] * len(one.tail) for one in batch], device=device)  # (B, T)
    mask = torch.cat([mask.new_ones(len(batch), heads.shape[1]), mask], dim=1)  # (B, H + T)
    if streamer is not None:
        streamer.put(torch.tensor([batch[0].head + batch[0].tail]))
    return _decode(model, cache, ids, mask, processor.tokenizer.eos_token_id, max_new_tokens, streamer)


def _features(model, processor: MiniVLMProcessor, images: list[ImageSource | torch.Tensor]) -> torch.Tensor:
    """Patch features (I, N, Dv) of images, some of which may be features already."""
    pixels = [one for one in images if not isinstance(one, torch.Tensor)]
    encoded = iter(model.vision(processor.pixels(pixels).to(model.device)) if pixels else ())
    return torch.stack([one.to(model.device) if isinstance(one, torch.Tensor) else next(encoded) for one in images])


def _decode(
    model: MiniVLMForConditionalGeneration,
    cache: DynamicCache,
    ids: torch.Tensor,
    mask: torch.Tensor,
    end: int,
    max_new_tokens: int,
    streamer: BaseStreamer | None,
) -> list[list[int]]:
    """Greedy decoding behind a cache; an answer that has ended leaves the batch."""
    answers: list[list[int]] = [[] for _ in ids]
    rows = torch.arange(len(ids), device=ids.device)  # which answer each row of the batch is
    for _ in range(max_new_tokens):
        logits = model(ids, mask, past_key_values=cache, use_cache=True, logits_to_keep=1).logits  # (B, 1, V)
        new = logits[:, -1].argmax(dim=-1)  # (B,)
        if streamer is not None:
            streamer.put(new.cpu())
        going = (new != end).nonzero()[:, 0]
        for row, token in zip(rows[going].tolist(), new[going].tolist(), strict=True):
            answers[row].append(token)
        if len(going) == 0:
            break
        if len(going) < len(rows):
            cache.batch_select_indices(going)
        rows, ids = rows[going], new[going][:, None]
        mask = torch.cat([mask[going], mask.new_ones(len(going), 1)], dim=1)
    if streamer is not None:
        streamer.end()
    return answers
