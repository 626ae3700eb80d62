"""What the model is made of, and what its two training stages do: data, no code that runs.

Letters, everywhere: B batch, T sequence, N image tokens per image, Dv vision width, Dl language width, V vocabulary,
I images in the batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

IMAGE_TOKEN = "<image>"
IGNORE_INDEX = -100  # a label that the loss passes over
CLIP_B16, MINIMIND2_V = "openai/clip-vit-base-patch16", "jingyaogong/MiniMind2-V"  # published names
PROMPTS = {"zh": "这个图像中有什么内容？", "en": "What is in this picture?"}


class MiniVLMConfig(PreTrainedConfig):
    """An encoder's config, a language model's config, and the id of `<image>`.

    Args:
        vision_config: a `CLIPVisionConfig` or its dict.
        text_config: the config of any causal language model, or its dict (by default a Llama).
        image_token_id: the id of `<image>`. By default V, one past the language model's vocabulary: a placeholder is
            never looked up, so it needs no row in the embedding and the language model stays as it was.
        projector_bias: whether W adds a constant vector. Ours does not; published checkpoints of MiniMind-V do.

    Raises:
        ValueError: `image_token_id` is negative.
    """

    model_type = "minivlm"
    sub_configs_defaults = {  # noqa: RUF012 (the library's own form)
        "vision_config": CLIPVisionConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    projector_bias: bool = False

    def __post_init__(self, **kwargs):
        """Turn dicts into configs and fill in the id of `<image>`."""
        super().__post_init__(**kwargs)
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size
        if self.image_token_id < 0:
            raise ValueError(f"image_token_id is {self.image_token_id}; use the tokenizer's id of {IMAGE_TOKEN}")

    @property
    def num_image_tokens(self) -> int:
        """N: one token per patch, the class token is dropped."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def vision_width(self) -> int:
        """Dv."""
        return self.vision_config.hidden_size

    @property
    def language_width(self) -> int:
        """Dl."""
        return self.text_config.hidden_size


def scenes_config(vocab_size: int = 1024) -> MiniVLMConfig:
    """The preset for the drawn world, small enough for two CPU cores: N = 64, Dv = 192, Dl = 256."""
    # CLIP's own activation, quick_gelu, is three unfused steps: a fifth slower on a CPU
    vision = _clip(192, image_size=112, patch_size=14, num_hidden_layers=4, hidden_act="gelu")
    sizes = {"intermediate_size": 640, "num_hidden_layers": 5, "max_position_embeddings": 1024}
    text = _llama(256, rope_theta=10_000.0, vocab_size=vocab_size, **sizes)
    return MiniVLMConfig(vision_config=vision, text_config=text)


def clip_26m_config(vocab_size: int = 6400) -> MiniVLMConfig:
    """The preset at the size of CLIP-ViT-B/16 and the 26M MiniMind: N = 196, Dv = 768, Dl = 512."""
    vision = _clip(768, image_size=224, patch_size=16, num_hidden_layers=12)
    sizes = {"intermediate_size": 1408, "num_hidden_layers": 8, "max_position_embeddings": 8192}
    text = _llama(512, rope_theta=1_000_000.0, vocab_size=vocab_size, **sizes)
    return MiniVLMConfig(vision_config=vision, text_config=text)


def _clip(width: int, **sizes) -> CLIPVisionConfig:
    """What both encoders share: heads of 64 dimensions, and an MLP four times as wide as the encoder."""
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    return CLIPVisionConfig(**shape, **sizes)


def _llama(width: int, rope_theta: float, **sizes) -> LlamaConfig:
    """What both language models share: heads of 64 dimensions, MiniMind's special ids, norm and tied head."""
    shape = {"hidden_size": width, "num_attention_heads": width // 64, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": rope_theta}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaConfig(rope_parameters=rope, rms_norm_eps=1e-5, tie_word_embeddings=True, **shape, **ids, **sizes)


PRESETS: dict[str, Callable[..., MiniVLMConfig]] = {"scenes": scenes_config, "clip-26m": clip_26m_config}


def preset_config(name: str, vocab_size: int | None = None) -> MiniVLMConfig:
    """The config of a preset, with the tokenizer's vocabulary size (`<image>` not counted) where it is another.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]() if vocab_size is None else PRESETS[name](vocab_size)


@dataclass(frozen=True)
class Stage:
    """One training stage as data; `dataclasses.replace` varies it.

    Attributes:
        name: "pretrain" or "sft".
        trains: the parts of the model that learn, by module name. The encoder never does.
        learning_rates: the peak learning rate of each of these parts.
        steps: optimizer steps.
        batch_size: rows per forward pass; `accumulation` passes make one step.
        warmup_steps: linear warm-up; after it a cosine falls to `final_lr_share` of the peak.
        weight_decay: AdamW's, on matrices.
        clip_norm: the gradient is scaled down to this norm.
        parent: the kind of checkpoint the stage starts from, "base" or "pretrain".

    Raises:
        ValueError: the encoder is to train, or learning rates and parts do not belong together.
    """

    name: str
    trains: tuple[str, ...]
    learning_rates: Mapping[str, float]
    steps: int
    batch_size: int
    warmup_steps: int
    parent: str
    final_lr_share: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    accumulation: int = 1

    def __post_init__(self):
        """Refuse what no stage may do."""
        if not set(self.trains) <= {"projector", "language_model"}:
            raise ValueError(f"stage {self.name}: {self.trains} cannot train; only projector and language_model can")
        if set(self.learning_rates) != set(self.trains):
            raise ValueError(f"stage {self.name}: give a learning rate to each of {self.trains}, and to nothing else")


W_ALONE, W_AND_LM = ("projector",), ("projector", "language_model")

# Of clip-26m: the batches, rates and epochs of the 26M model that this course grew from
# (595,376 captions four times, then 158,720 conversations six times).
STAGES: dict[str, dict[str, Stage]] = {
    "scenes": {
        "pretrain": Stage("pretrain", W_ALONE, {"projector": 2e-2}, 800, 32, 40, "base"),
        # two passes of 16 rows make a step: half of the memory, the same gradient
        "sft": Stage(
            "sft", W_AND_LM, {"projector": 2e-3, "language_model": 1e-3}, 420, 16, 40, "pretrain", accumulation=2
        ),
    },
    "clip-26m": {
        "pretrain": Stage("pretrain", W_ALONE, {"projector": 4e-4}, 148_844, 16, 1000, "base"),
        "sft": Stage("sft", W_AND_LM, {"projector": 3e-6, "language_model": 3e-6}, 29_760, 32, 300, "pretrain"),
    },
}

AutoConfig.register(MiniVLMConfig.model_type, MiniVLMConfig, exist_ok=True)  # a notebook may reload this module
