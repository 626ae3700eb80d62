"""How the base models of the scenes preset are made from nothing: tokenizer, vision encoder, language model."""
