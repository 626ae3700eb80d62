"""What all tests share: a tokenizer trained here, tiny random models, and batches with images.

Nothing is downloaded and nothing is read from `data/`. `tests/faults.py` runs named tests with a fault planted.
"""

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig, LlamaConfig

from minivlm.config import MiniVLMConfig
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.pretraining.tokenizer import train_tokenizer
from minivlm.processor import MiniVLMProcessor

torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it brings

VOCAB_SIZE = 320
TEXTS = [
    "user\n",
    "assistant\n",
    "这个图像中有什么内容？",
    "What is in this picture?",
    "a red car and a green tree in the park",
    "a small blue bird is flying above a quiet lake",
    "海滩上有一只白色的狗和一个红色的气球。",
    "夜晚的城市街道上有两辆黄色的汽车。",
    "Which one is further left? The dog is further left than the boat.",
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def no_missing_glyphs():
    """A character that no font has is a warning of matplotlib's: here an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph .* missing")
        yield


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 320 tokens, with `<image>` as token 320."""
    return train_tokenizer(TEXTS, VOCAB_SIZE)


@pytest.fixture
def config() -> MiniVLMConfig:
    """N = 4, Dv = 16, Dl = 24, V = 320: four patches of 4 x 4 pixels, two layers on each side."""
    vision = CLIPVisionConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    text = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,  # large, so that images and positions matter to the logits
    )
    return MiniVLMConfig(vision_config=vision, text_config=text)


@pytest.fixture
def make_model(config) -> Callable[..., MiniVLMForConditionalGeneration]:
    """`make_model(seed=0, dtype=torch.float32)`: a random model of the tiny config, in evaluation mode."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> MiniVLMForConditionalGeneration:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return MiniVLMForConditionalGeneration(config).to(dtype).eval()

    return make


@pytest.fixture
def model(make_model) -> MiniVLMForConditionalGeneration:
    return make_model()


@pytest.fixture
def processor(config, tokenizer) -> MiniVLMProcessor:
    return MiniVLMProcessor.for_config(config, tokenizer)


@pytest.fixture
def image() -> Image.Image:
    """A small image with different pixels everywhere."""
    values = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


@pytest.fixture
def make_batch(config) -> Callable[..., dict[str, torch.Tensor]]:
    """`make_batch(counts, side="left", seed=0, dtype=torch.float32)`: one row per count, of different lengths.

    Row r is text, then alternately an image and text; it has `counts[r]` images. Without any image in the batch
    there are no `pixel_values`.
    """

    def make(counts, side="left", seed=0, dtype=torch.float32) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(seed)
        vocab, block = config.text_config.vocab_size, [config.image_token_id] * config.num_image_tokens

        def text(length):
            return torch.randint(3, vocab, (length,), generator=random).tolist()

        rows = []
        for index, count in enumerate(counts):
            row = [1, *text(2 + index)]
            for _ in range(count):
                row += block + text(3)
            rows.append(torch.tensor(row))
        padded = partial(pad_sequence, batch_first=True, padding_side=side)
        batch = {"input_ids": padded(rows), "attention_mask": padded([torch.ones_like(row) for row in rows])}
        batch["images_per_row"] = torch.tensor(counts)
        if sum(counts):
            size = config.vision_config.image_size
            batch["pixel_values"] = torch.randn(sum(counts), 3, size, size, generator=random, dtype=torch.float64)
            batch["pixel_values"] = batch["pixel_values"].to(dtype)
        return batch

    return make
