"""Features of drawn scenes: what the frozen encoder makes of them, kept in a file where one is named."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch

from minivlm.data.features import encode, pixel_batches
from minivlm.runtime.files import hash_tensors, replace_file
from minivlm.scenes.drawing.gallery import draw_many, drawing_key, texts_key
from minivlm.scenes.facts import Scene

if TYPE_CHECKING:
    from minivlm.model import MiniVLMForConditionalGeneration
    from minivlm.processor import MiniVLMProcessor

MADE_FROM = "made_from"


def scene_features(
    model: "MiniVLMForConditionalGeneration",
    processor: "MiniVLMProcessor",
    scenes: Sequence[Scene],
    file: str | Path | None = None,
    precision: str = "fp32",
    workers: int | None = None,
    title: str = "pictures",
) -> torch.Tensor:
    """Draw scenes and encode them: (I, N, Dv) in bf16, on the CPU.

    Args:
        file: keep the features in this safetensors file, and take them from it the next time. It is made anew when it
            is damaged, or when encoder, precision, scenes or the program that draws are others.
        precision: "fp32", or "bf16" to encode about twice as fast where the processor is good at it.
        workers: processes that draw, by default as `draw_many` chooses.
        title: of the bars; without one there are none.

    Raises:
        OSError: the file cannot be written.
    """
    encoder = f"{hash_tensors(model.vision.state_dict())} {processor.image_processor.to_json_string()} {precision}"
    made_from = texts_key([encoder, drawing_key(), repr(list(scenes))])
    if (features := _read(file, made_from)) is None:
        drawing, encoding = (title and f"{work} {title}" for work in ("drawing", "encoding"))
        pictures = draw_many(list(scenes), model.config.vision_config.image_size, workers, drawing)
        features = encode(model, pixel_batches(processor, pictures), len(pictures), precision, encoding)
        if file is not None:
            with replace_file(file) as temporary:
                try:
                    safetensors.torch.save_file({"patch_features": features}, temporary, {MADE_FROM: made_from})
                except safetensors.SafetensorError as error:
                    raise OSError(f"the features were not kept in {file} ({error}); free some space") from error
    return features


def _read(file: str | Path | None, made_from: str) -> torch.Tensor | None:
    """The features in a file, if they are the ones that would be computed now."""
    if file is None or not Path(file).is_file():
        return None
    try:
        with safetensors.safe_open(file, "pt") as stored:
            fresh = (stored.metadata() or {}).get(MADE_FROM) == made_from
            return stored.get_tensor("patch_features") if fresh else None
    except safetensors.SafetensorError:  # cut off, or something else: the features are simply made again
        return None
