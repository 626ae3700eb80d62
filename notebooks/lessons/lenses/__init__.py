"""Lenses into a model: an image as words, attention from words to patches, and the blocks that train."""
