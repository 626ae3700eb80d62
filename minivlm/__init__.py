"""MiniVLM: a vision-language model small enough to read in an evening and to train on two CPU cores.

Importing it makes `AutoConfig`, `AutoModelForImageTextToText` and `AutoProcessor` know the model type `minivlm`.
"""

import os
from importlib import import_module

# On a CPU, oneDNN keeps the code that it generates for every new shape of a matrix product, a thousand of them by
# default. No two batches of text have the same shape, so it fills gigabytes and is hardly ever used again.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")

from minivlm.config import MiniVLMConfig
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor

__all__ = ["MiniVLMConfig", "MiniVLMForConditionalGeneration", "MiniVLMProcessor", "Trainer", "ask", "load", "reply"]
__version__ = "0.1.0"
_LAZY = {
    "Trainer": "minivlm.train",
    "ask": "minivlm.generate",
    "load": "minivlm.checkpoint",
    "reply": "minivlm.generate",
}


def __getattr__(name: str):
    """Import what training and generation need when it is asked for, not before."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'minivlm' has no attribute {name!r}")
