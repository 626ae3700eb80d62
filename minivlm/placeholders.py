"""`<image>` in the text, and the picture's embeddings that take its place.

The processor writes N placeholder ids for a picture, so the sequence has its final length before the model runs; the
model looks up the embeddings of the text and puts the picture's in. Letters as in `config.py`.
"""

import torch


class PlaceholderError(ValueError):
    """Placeholders and pictures do not belong together. The message names the row and both counts."""


def expand_placeholders(ids: list[int], image_token_id: int, num_image_tokens: int) -> list[int]:
    """Write each `<image>` id N times; all other ids stay.

    >>> expand_placeholders([5, 99, 6], image_token_id=99, num_image_tokens=3)
    [5, 99, 99, 99, 6]
    """
    return [new for old in ids for new in [old] * (num_image_tokens if old == image_token_id else 1)]


def replace_placeholders(
    inputs_embeds: torch.Tensor,
    input_ids: torch.Tensor,
    image_embeds: torch.Tensor,
    image_token_id: int,
    images_per_row: torch.Tensor | None = None,
) -> torch.Tensor:
    """Put the pictures' embeddings where the placeholders stand, in reading order. Pure: the inputs stay as they are.

    Counts are compared row by row. A count over the whole batch, as is common, would let one row swallow a picture
    that belongs to another.

    Args:
        inputs_embeds: (B, T, Dl) embeddings of the text; what stands at a placeholder is not used.
        input_ids: (B, T) ids with N placeholders per picture.
        image_embeds: (I, N, Dl) embeddings of all pictures, row after row.
        image_token_id: the id of `<image>`.
        images_per_row: (B,) pictures that belong to each row. None: as many as the row's placeholders are made for.

    Returns:
        (B, T, Dl), a new tensor through which gradients reach both inputs.

    Raises:
        PlaceholderError: a row has more or fewer placeholders than its pictures have embeddings, or the rows need
            more or fewer pictures than there are.
    """
    images, num_image_tokens, _ = image_embeds.shape
    mask = input_ids == image_token_id  # (B, T)
    counts = mask.sum(dim=1).tolist()  # B counts
    expected = [n // num_image_tokens for n in counts] if images_per_row is None else images_per_row.tolist()
    if len(expected) != len(counts):
        raise PlaceholderError(f"images_per_row counts {len(expected)} rows, but input_ids has {len(counts)}")
    for row, (placeholders, pictures) in enumerate(zip(counts, expected, strict=True)):
        if placeholders != pictures * num_image_tokens:
            raise PlaceholderError(
                f"row {row} has {placeholders} placeholders, but {pictures} pictures of {num_image_tokens} embeddings "
                f"({pictures * num_image_tokens}) belong to it; a picture needs all of its placeholders, in its own row"
            )
    if sum(expected) != images:
        raise PlaceholderError(
            f"the rows need {' + '.join(map(str, expected))} = {sum(expected)} pictures, but {images} were given"
        )
    return inputs_embeds.index_put((mask,), image_embeds.flatten(0, 1))  # (B, T, Dl)
