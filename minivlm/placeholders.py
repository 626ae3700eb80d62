"""`<image>` in the text, and the embeddings of the image that take its place.

The processor writes N placeholder ids for an image, so the sequence has its final length before the model runs; the
model looks up the embeddings of the text and puts the image's in. Letters as in `config.py`.
"""

import torch


class PlaceholderError(ValueError):
    """Placeholders and images do not belong together. The message names the row and both counts."""


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
    """Put the images' embeddings where the placeholders stand, in reading order. Pure: the inputs stay as they are.

    Counts are compared row by row. A count over the whole batch, as is common, would let one row swallow an image
    that belongs to another.

    Args:
        inputs_embeds: (B, T, Dl) embeddings of the text; what stands at a placeholder is not used.
        input_ids: (B, T) ids with N placeholders per image.
        image_embeds: (I, N, Dl) embeddings of all images, row after row.
        image_token_id: the id of `<image>`.
        images_per_row: (B,) images that belong to each row. None: as many as the row's placeholders are made for.

    Returns:
        (B, T, Dl), a new tensor through which gradients reach both inputs.

    Raises:
        PlaceholderError: a row has more or fewer placeholders than its images have embeddings, or the rows need
            more or fewer images than there are.
    """
    images, num_image_tokens, _ = image_embeds.shape
    mask = input_ids == image_token_id  # (B, T)
    counts = mask.sum(dim=1).tolist()  # B counts
    expected = [n // num_image_tokens for n in counts] if images_per_row is None else images_per_row.tolist()
    if len(expected) != len(counts):
        raise PlaceholderError(f"images_per_row counts {len(expected)} rows, but input_ids has {len(counts)}")
    for row, (placeholders, count) in enumerate(zip(counts, expected, strict=True)):
        if placeholders != count * num_image_tokens:
            raise PlaceholderError(
                f"row {row} has {placeholders} placeholders, but {count} images of {num_image_tokens} embeddings "
                f"({count * num_image_tokens}) belong to it; an image needs all of its placeholders, in its own row"
            )
    if sum(expected) != images:
        raise PlaceholderError(
            f"the rows need {' + '.join(map(str, expected))} = {sum(expected)} images, but {images} were given"
        )
    return inputs_embeds.index_put((mask,), image_embeds.flatten(0, 1))  # (B, T, Dl)
