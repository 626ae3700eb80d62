"""MiniVLM: a vision-language model small enough to read in an evening and to train on two CPU cores.

Importing it makes `AutoConfig`, `AutoModelForImageTextToText` and `AutoProcessor` know the model type `minivlm`.
"""

from minivlm.config import MiniVLMConfig
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor

__all__ = ["MiniVLMConfig", "MiniVLMForConditionalGeneration", "MiniVLMProcessor"]
__version__ = "0.1.0"
