"""Many questions about many pictures, answered greedily: each picture is read once, however much is asked about it.

Every prompt about a picture begins with the same tokens, up to its last placeholder. The language model's cache of
that beginning is computed once per picture and copied for each of its prompts. Letters as in `config.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.precision import give_back_memory

BATCH = 125  # prompts answered together


class Asked(NamedTuple):
    """A prompt, and the number of the picture it is about; None asks the language model alone."""

    prompt: str
    picture: int | None = None


@torch.no_grad()
def answer(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    asked: Sequence[Asked],
    patch_features: torch.Tensor,
    max_new_tokens: int = 96,
    precision: str = "fp32",
    title: str = "answering",
    batch_size: int = BATCH,
) -> list[str]:
    """The model's greedy answer to each prompt, in the order asked; what is asked twice is answered once.

    Args:
        asked: prompts, each in a conversation of its own.
        patch_features: (I, N, Dv) the pictures that `asked` counts.
        max_new_tokens: an answer that does not end by itself is cut here.
        precision: "fp32", or "bf16" for autocast.

    Returns:
        One text per prompt, as `model.generate(do_sample=False)` would give it.
    """
    unique = sorted(set(asked), key=lambda one: (one.picture is None, one.picture or 0, one.prompt))
    blind = next((i for i, one in enumerate(unique) if one.picture is None), len(unique))
    batches = [
        part[start : start + batch_size]
        for part in (unique[:blind], unique[blind:])
        for start in range(0, len(part), batch_size)
    ]
    device, texts = model.language_model.device, {}
    with tqdm(total=len(unique), desc=title, unit="answer", mininterval=2) as bar:
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                written = _answer_batch(model, processor, batch, patch_features, max_new_tokens)
            decoded = processor.tokenizer.batch_decode(written, skip_special_tokens=True)
            texts |= dict(zip(batch, decoded, strict=True))
            bar.update(len(batch))
    give_back_memory()  # keys and values grew token by token and left pieces of all sizes
    return [texts[one] for one in asked]


@torch.no_grad()
def describe(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    pictures: Sequence,
    prompt: str,
    max_new_tokens: int = 96,
) -> list[str]:
    """The answer to one prompt about each picture; a picture is whatever `open_image` takes.

    Raises:
        ImageError: a picture cannot be read.
    """
    features = model.vision(processor.pixels(list(pictures)).to(model.device))  # (I, N, Dv)
    return answer(model, processor, [Asked(prompt, i) for i in range(len(features))], features, max_new_tokens)


@torch.no_grad()
def reply(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    messages: Sequence[dict],
    max_new_tokens: int = 96,
    streamer: BaseStreamer | None = None,
) -> str:
    """The model's greedy answer to a conversation that ends with a question, pictures as image parts.

    Args:
        streamer: is given every token as soon as it is written.

    Raises:
        ImageError, SampleError: as `processor.apply_chat_template` raises them.
    """
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template(list(messages), add_generation_prompt=True, **options).to(model.device)
    written = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    return processor.tokenizer.decode(written[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def prompt_ids(processor: MiniVLMProcessor, one: Asked) -> tuple[list[int], list[int]]:
    """A prompt's ids in two parts: what all prompts about this picture begin with, and the rest."""
    image = [] if one.picture is None else [{"type": "image"}]
    message = {"role": "user", "content": [*image, {"type": "text", "text": one.prompt}]}
    ids = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True)[0]
    shared = 1  # without a picture, every prompt begins with the same control token
    if image:
        shared = len(ids) - ids[::-1].index(processor.image_token_id)
    return ids[:shared], ids[shared:]


def _answer_batch(
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    batch: list[Asked],
    patch_features: torch.Tensor,
    max_new_tokens: int,
) -> list[list[int]]:
    """Token ids of each answer, without the end token."""
    device, pad = model.language_model.device, processor.tokenizer.pad_token_id
    parts = [prompt_ids(processor, one) for one in batch]
    places = {one.picture: place for place, one in enumerate({one.picture: one for one in batch}.values())}
    heads = torch.tensor([parts[0][0]] * len(places), device=device)  # (I, H): the same for every picture
    shown = {} if None in places else {"patch_features": patch_features[list(places)].to(device)}
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=heads, use_cache=True, past_key_values=cache, logits_to_keep=1, **shown)
    cache.batch_select_indices(torch.tensor([places[one.picture] for one in batch], device=device))
    width = max(len(tail) for _, tail in parts)
    ids = torch.tensor([[pad] * (width - len(tail)) + tail for _, tail in parts], device=device)  # (B, T)
    mask = torch.tensor([[0] * (width - len(tail)) + [1] * len(tail) for _, tail in parts], device=device)  # (B, T)
    mask = torch.cat([mask.new_ones(len(batch), heads.shape[1]), mask], dim=1)  # (B, H + T)
    return _write_on(model, cache, ids, mask, processor.tokenizer.eos_token_id, max_new_tokens)


def _write_on(
    model: MiniVLMForConditionalGeneration,
    cache: DynamicCache,
    ids: torch.Tensor,
    mask: torch.Tensor,
    end: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy decoding behind a cache; a row that has ended leaves the batch."""
    written: list[list[int]] = [[] for _ in ids]
    rows = torch.arange(len(ids), device=ids.device)  # which answer each row of the batch is
    for _ in range(max_new_tokens):
        logits = model(ids, mask, past_key_values=cache, use_cache=True, logits_to_keep=1).logits  # (B, 1, V)
        new = logits[:, -1].argmax(dim=-1)  # (B,)
        going = (new != end).nonzero()[:, 0]
        for row, token in zip(rows[going].tolist(), new[going].tolist(), strict=True):
            written[row].append(token)
        if len(going) == 0:
            break
        if len(going) < len(rows):
            cache.batch_select_indices(going)
        rows, ids = rows[going], new[going][:, None]
        mask = torch.cat([mask[going], mask.new_ones(len(going), 1)], dim=1)
    return written
