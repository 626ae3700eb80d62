"""The vision-language model: a frozen vision encoder, a matrix W and an untouched language model.

    pixel_values -> vision -> patch_features -> projector -> image_embeds -+
    input_ids -> embedding look-up -> text_embeds -> replace placeholders -+-> inputs_embeds -> language_model -> logits

The language model is handed `inputs_embeds` and is never rewritten. Letters as in `config.py`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPVisionModel, GenerationConfig
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from minivlm.config import MiniVLMConfig, Stage
from minivlm.placeholders import replace_placeholders
from minivlm.projector import Projector
from minivlm.vision import VisionEncoder

PARTS = ("vision", "projector", "language_model")


class MiniVLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Pictures and text in, text out: `vision` is frozen, `projector` is W, `language_model` is the library's."""

    config_class = MiniVLMConfig
    input_modalities = ("image", "text")
    # the parts choose their attention themselves; without these lines the library would give them the slowest
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MiniVLMConfig):
        super().__init__(config)
        self.vision = VisionEncoder(CLIPVisionModel._from_config(config.vision_config))
        self.projector = Projector(config.vision_width, config.language_width, config.projector_bias)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's embedding table (V, Dl)."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        images_per_row: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Ids and images as one sequence of embeddings (B, T, Dl).

        Args:
            input_ids: (B, T), N placeholders per image.
            pixel_values: (I, 3, H, W) images, row after row.
            patch_features: (I, N, Dv) what `vision` made of them before; replaces `pixel_values`.
            images_per_row: (B,) images of each row; None reads it off the placeholders.

        Raises:
            ValueError: both `pixel_values` and `patch_features` are given.
            PlaceholderError: placeholders and images do not belong together.
        """
        if pixel_values is not None and patch_features is not None:
            raise ValueError("give pixel_values or patch_features, not both")
        image_token_id = self.config.image_token_id
        text_ids = input_ids.masked_fill(input_ids == image_token_id, 0)  # <image> has no row in the table
        text_embeds = self.get_input_embeddings()(text_ids)  # (B, T, Dl)
        if pixel_values is not None:
            patch_features = self.vision(pixel_values)  # (I, N, Dv)
        if patch_features is None:  # no image: placeholders in the text are refused all the same
            image_embeds = text_embeds.new_empty(0, self.config.num_image_tokens, text_embeds.shape[-1])
        else:
            image_embeds = self.projector(patch_features).to(text_embeds.dtype)  # (I, N, Dl)
        return replace_placeholders(text_embeds, input_ids, image_embeds, image_token_id, images_per_row)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        images_per_row: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the loss where labels are given.

        Args:
            input_ids: (B, T); with `pixel_values`, `patch_features`, `images_per_row` as in `embed`.
            attention_mask: (B, T), 0 at padding on either side; with a cache (B, past + T).
            inputs_embeds: (B, T, Dl) from `embed`, in place of ids and images.
            labels: (B, T), `IGNORE_INDEX` where nothing is supervised. Not shifted: the loss does that.
            position_ids: (B, T); None counts the tokens that `attention_mask` shows, so that padding on the left
                does not shift a text.
            past_key_values, use_cache, logits_to_keep, **kwargs: as the language model takes them.

        Returns:
            loss (a mean over supervised tokens, in float32), logits (B, T, V), past_key_values.

        Raises:
            ValueError: as in `embed`, or `input_ids` and `inputs_embeds` are both given or both missing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values, patch_features, images_per_row)
        elif pixel_values is not None or patch_features is not None:
            raise ValueError("inputs_embeds already hold the images; give input_ids instead, or no images")
        if position_ids is None and attention_mask is not None:
            position_ids = positions(attention_mask)[:, -inputs_embeds.shape[1] :]
        return self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, labels=labels,
            past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        images_per_row: torch.Tensor | None = None,
        **kwargs,
    ):
        """Write on, as the library's `generate` does: greedily, with beams, by sampling, several answers a row.

        Prompt and images become embeddings once. Beams and samples then repeat whole rows of these, and what works on
        ids never meets `<image>`, for which there is no logit.

        Args:
            inputs, input_ids: (B, T) the prompt under either name, padded on the left.
            attention_mask: (B, T); None hides the padding token, wherever it stands.
            pixel_values, patch_features, images_per_row: as in `embed`.
            generation_config, **kwargs: as the library takes them.

        Returns:
            Prompt and answer (B * answers, T + new), or the library's output object with these as `sequences`.

        Raises:
            ValueError: as in `embed`; or the prompt is missing.
        """
        ids = inputs if inputs is not None else input_ids
        if ids is None:
            raise ValueError("give the prompt as input_ids")
        if attention_mask is None:
            pad = self.generation_config.pad_token_id
            attention_mask = torch.ones_like(ids) if pad is None else ids.ne(pad).long()
        embeds = self.embed(ids, pixel_values, patch_features, images_per_row)  # (B, T, Dl)
        output = super().generate(
            generation_config=generation_config, inputs_embeds=embeds, attention_mask=attention_mask, **kwargs
        )
        new = output if isinstance(output, torch.Tensor) else output.sequences  # (B * answers, new)
        prompt = ids.repeat_interleave(len(new) // len(ids), dim=0)  # (B * answers, T)
        sequences = torch.cat([prompt, new], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Each token's position in its own text, (B, T) from a mask (B, T); padding counts nothing and gets 0."""
    return (attention_mask.long().cumsum(dim=1) - 1).masked_fill(attention_mask == 0, 0)


def assemble(
    vision: CLIPVisionModel,
    language_model: PreTrainedModel,
    image_token_id: int,
    seed: int,
    projector_bias: bool = False,
) -> MiniVLMForConditionalGeneration:
    """Put two trained base models together, uncopied; W between them is drawn anew from the seed."""
    parts = {"vision_config": vision.config, "text_config": language_model.config}
    config = MiniVLMConfig(**parts, image_token_id=image_token_id, projector_bias=projector_bias)
    with torch.device("meta"):  # the shape of the whole, without numbers
        model = MiniVLMForConditionalGeneration(config)
    model.vision, model.language_model = VisionEncoder(vision), language_model
    model.projector.to_empty(device=language_model.device)
    draw_projector(model, seed)
    return model.eval()


@torch.no_grad()
def draw_projector(model: MiniVLMForConditionalGeneration, seed: int) -> None:
    """Draw W anew from the seed, as the language model's own matrices began: normal, with its `initializer_range`.

    A bias begins at zero. The numbers are the same on every device; the program's other random numbers are untouched.
    """
    weight, std = model.projector.weight, getattr(model.config.text_config, "initializer_range", 0.02)
    weight.copy_(torch.empty(weight.shape).normal_(std=std, generator=torch.Generator().manual_seed(seed)))
    if model.projector.bias is not None:
        model.projector.bias.zero_()


def set_trainable(model: MiniVLMForConditionalGeneration, stage: Stage) -> None:
    """Let exactly the stage's parts learn."""
    for part in PARTS:
        getattr(model, part).requires_grad_(part in stage.trains)


class LedgerRow(NamedTuple):
    """A part of the model and how many of its parameters learn."""

    part: str
    parameters: int
    trained: int


@dataclass(frozen=True)
class Ledger:
    """What trains and what is frozen, in exact counts. `print` shows a table."""

    stage: str
    rows: tuple[LedgerRow, ...]

    @property
    def total(self) -> LedgerRow:
        """The sum of all rows."""
        return LedgerRow("total", sum(row.parameters for row in self.rows), sum(row.trained for row in self.rows))

    def __str__(self) -> str:
        """A table in plain text."""
        lines = [f"{'stage ' + self.stage:<16}{'parameters':>14}{'trained':>14}{'frozen':>14}"]
        for part, parameters, trained in (*self.rows, self.total):
            lines.append(f"{part:<16}{parameters:>14,}{trained:>14,}{parameters - trained:>14,}")
        return "\n".join(lines)


def ledger(model: MiniVLMForConditionalGeneration, stage: Stage) -> Ledger:
    """Count, part by part, what really learns now (after `set_trainable`). A tied head is counted once."""
    rows = []
    for part in PARTS:
        parameters = list(getattr(model, part).parameters())  # yields a shared tensor once
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        rows.append(LedgerRow(part, sum(p.numel() for p in parameters), trained))
    return Ledger(stage.name, tuple(rows))


AutoModelForImageTextToText.register(MiniVLMConfig, MiniVLMForConditionalGeneration, exist_ok=True)
