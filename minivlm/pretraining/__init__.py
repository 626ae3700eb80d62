"""How the base models of the scenes preset are made from nothing: tokenizer, vision encoder, language model."""

from minivlm.pretraining.encoder import contrast_loss, patch_tokens
from minivlm.pretraining.tokenizer import train_tokenizer
