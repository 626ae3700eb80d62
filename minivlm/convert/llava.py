"""Out: a trained model as the library's own LLaVA, for every program that serves one. Letters as in `config.py`.

LLaVA (arXiv:2304.08485; `LlavaForConditionalGeneration`) has the same three parts. Its projector is two linear maps
with a function between them; with the identity for the function and for the second map it is W, bias and all. Its
language model also looks `<image>` up before the row is replaced, so the table has one row more. That row is zero, and
decides nothing.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from minivlm.config import IMAGE_TOKEN
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor
from minivlm.projector import Projector
from minivlm.runtime.files import replace_folder, require_writable

CARD = """---
license: {licence}
library_name: transformers
pipeline_tag: image-text-to-text
---

# MiniVLM as LLaVA

A small vision-language model of the MiniVLM course, written as `LlavaForConditionalGeneration`. {about}

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```

**Limits.** If it is the model that the course ships, it knows drawn scenes only and answers about any other picture as
if it were one. `linear_1` is W (Dl x Dv = {dl} x {dv}{bias}), `linear_2` is the identity. The last
row of the embedding table, that of `{image_token}`, is zero; the generation config never lets it be written.

Hashes of what it was made from: {hashes}
{sources}"""


class ExportError(ValueError):
    """The model cannot be written in that form. The message says what is in the way, and what to do."""


def as_llava(model: MiniVLMForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The same weights in the library's LLaVA; the first V of its V + 1 logits are the model's own.

    Raises ExportError where the projector is no single linear map, or the head is not tied to the table.
    """
    if type(model.projector) is not Projector:
        raise ExportError(
            f"the projector is {type(model.projector).__name__}; LLaVA holds two linear maps with a function between: "
            "only a single linear map is written; keep the model in its own format (save_pretrained)"
        )
    if not model.config.text_config.tie_word_embeddings:
        raise ExportError("the language model's head is not tied to its embedding table; only a tied one is written")
    config, vocabulary = model.config, model.config.text_config.vocab_size
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config.to_dict(),
            text_config=config.text_config.to_dict() | {"vocab_size": vocabulary + 1},
            image_token_index=config.image_token_id,
            image_seq_length=config.num_image_tokens,
            projector_hidden_act="linear",
            multimodal_projector_bias=config.projector_bias,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
        )
    )
    llava = llava.to(model.dtype).eval()
    weights = model.language_model.model.state_dict()
    table = weights["embed_tokens.weight"]  # (V, Dl)
    weights["embed_tokens.weight"] = torch.cat([table, table.new_zeros(1, table.shape[1])])
    llava.model.language_model.load_state_dict(weights)
    llava.model.vision_tower.load_state_dict(model.vision.clip.state_dict())
    projector = llava.model.multi_modal_projector
    projector.linear_1.load_state_dict(model.projector.state_dict())
    with torch.no_grad():
        torch.nn.init.eye_(projector.linear_2.weight)
        if config.projector_bias:
            projector.linear_2.bias.zero_()
    generation = model.generation_config.to_dict() | {"suppress_tokens": [config.image_token_id]}
    llava.generation_config = GenerationConfig.from_dict(generation)
    return llava


def llava_processor(model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor) -> LlavaProcessor:
    """LLaVA's processor with the same tokenizer, pictures and chat template: N placeholders a picture."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    # so that an answer goes on where its prompt ends, in a batch, too
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=tokenizer,
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" takes off again
        chat_template=processor.chat_template,
        image_token=IMAGE_TOKEN,
    )


def export_llava(
    folder: str | Path, model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, meta: dict[str, Any]
) -> Path:
    """Write a folder that `AutoModelForImageTextToText` and `AutoProcessor` read without any code of this project.

    Args:
        folder: where to; it must not exist, or be empty. It is returned.
        meta: the checkpoint's, for the model card.

    Raises:
        ExportError: as `as_llava`, or something lies in `folder`.
        FolderError: as `replace_folder`.
        OSError: the disk is full, or the folder cannot be written. Nothing is left half-written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} exists already; it is not overwritten, choose another folder")
    llava = as_llava(model)
    require_writable(folder)
    with replace_folder(folder) as temporary:
        llava.save_pretrained(temporary)
        llava_processor(model, processor).save_pretrained(temporary)
        (temporary / "README.md").write_text(_card(folder, model, meta), "utf-8")
    return folder


def _card(folder: Path, model: MiniVLMForConditionalGeneration, meta: dict[str, Any]) -> str:
    hashes = "; ".join(f"{part} {value[:12]}" for part, value in meta.get("hashes", {}).items())
    sources = "".join(f"* {line}\n" for line in meta.get("sources") or ())
    heading = "\nMade from what others published, under the licences of these sources:\n\n"
    return CARD.format(
        about=f"Stage: {meta.get('stage', 'unknown')}; made by `{meta.get('command', 'unknown')}`.",
        name=folder.name,
        dl=model.config.language_width,
        dv=model.config.vision_width,
        bias=", with a bias" if model.config.projector_bias else "",
        image_token=IMAGE_TOKEN,
        hashes=hashes or "not recorded",
        licence="other" if sources else "apache-2.0",
        sources=heading + sources if sources else "",
    )
