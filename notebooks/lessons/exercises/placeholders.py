"""The exercise of notebook 02: put the pictures' embeddings where the placeholders stand, and count row by row.

First the swap is compared with the definition in loops, on a batch in which every typical mistake gives another
result; then gradients; then the counts. Letters as in `config.py`.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lessons.exercises.checking import Wrong, called, exercise, forbidden
from minivlm.placeholders import replace_placeholders as packages_own

N, EMBED_WIDTH = 4, 3
IMAGE_ID = 77  # no model of this project has this id for <image>: an answer that knows the id by heart is found out
P = IMAGE_ID  # a placeholder in the pattern below; the small numbers are words
PATTERN = (  # one picture; two with a word between them; none; one at the row's end: I = 4
    (5, P, P, P, P, 6, 7, 8, 9, 5, 6),
    (P, P, P, P, 9, P, P, P, P, 6, 7),
    (8, 7, 6, 5, 6, 7, 8, 9, 5, 6, 7),
    (9, 8, 7, 6, 5, 6, 7, P, P, P, P),
)


class Batch(NamedTuple):
    """What the reader's function is given, in its order."""

    inputs_embeds: torch.Tensor  # (B, T, Dl)
    input_ids: torch.Tensor  # (B, T)
    image_embeds: torch.Tensor  # (I, N, Dl)
    image_token_id: int = IMAGE_ID

    @property
    def mask(self) -> torch.Tensor:
        """(B, T), True at a placeholder."""
        return self.input_ids == self.image_token_id


@exercise
def replace_placeholders(answer: Callable[..., torch.Tensor]) -> None:
    """Check `replace_placeholders(inputs_embeds, input_ids, image_embeds, image_token_id)`."""
    with forbidden(packages_own, answer=answer), torch.enable_grad():  # a notebook may have switched gradients off
        _swap(answer)
        _gradients(answer)
        _counts(answer)


def batch_of(pattern: Any, images: int) -> Batch:
    """A batch with these ids; all numbers in it are different, negative in the text and positive in pictures."""
    input_ids = torch.tensor(pattern)
    text = -torch.arange(1.0, input_ids.numel() * EMBED_WIDTH + 1).reshape(*input_ids.shape, EMBED_WIDTH)
    return Batch(text, input_ids, torch.arange(1.0, images * N * EMBED_WIDTH + 1).reshape(images, N, EMBED_WIDTH))


def by_definition(batch: Batch, image_embeds: torch.Tensor | None = None) -> torch.Tensor:
    """The definition, in loops: the k-th placeholder of the batch gets the k-th of the pictures' embeddings."""
    images = batch.image_embeds if image_embeds is None else image_embeds
    result, queue = batch.inputs_embeds.clone(), iter(images.reshape(-1, EMBED_WIDTH))
    for row, position in batch.mask.nonzero().tolist():
        result[row, position] = next(queue)
    return result


def _swap(answer: Callable) -> None:
    """The values, and that the inputs stay as they are."""
    batch = batch_of(PATTERN, images=4)
    given = batch._replace(**{name: getattr(batch, name).clone() for name in batch._fields[:3]})
    result = called(answer, *given)
    if not isinstance(result, torch.Tensor):
        raise Wrong(f"your function returns {type(result).__name__}; return one tensor (B, T, Dl)")
    if not torch.equal(given.inputs_embeds, batch.inputs_embeds):
        raise Wrong(
            "your function writes into `inputs_embeds`, which belongs to the caller: look at them after the call. "
            "Work on a copy: `.clone()` first, or `index_put`, `masked_scatter` or `torch.where`, which make one"
        )
    if not (torch.equal(given.input_ids, batch.input_ids) and torch.equal(given.image_embeds, batch.image_embeds)):
        raise Wrong("your function changes `input_ids` or `image_embeds`, which belong to the caller")
    _compare(result, batch)


def _compare(result: torch.Tensor, batch: Batch) -> None:
    """Say of a result that is not the right one which typical mistake it is."""
    expected, mask = by_definition(batch), batch.mask
    if result.shape != expected.shape:
        raise Wrong(
            f"the result has the shape {tuple(result.shape)}; it has to have that of `inputs_embeds`, (B, T, Dl) = "
            f"{tuple(expected.shape)}: no row gets longer, for the N positions are already there"
        )
    if result.dtype != expected.dtype:
        raise Wrong(f"the result is {result.dtype}, `inputs_embeds` are {expected.dtype}: keep the type")
    if torch.equal(result, expected):
        return
    for wrong, message in _wrong_order(batch) + _wrong_values(batch):
        if torch.equal(result, wrong):
            raise Wrong(message)
    if not torch.equal(result[~mask], expected[~mask]):
        row, position = (~mask & (result != expected).any(-1)).nonzero()[0].tolist()
        raise Wrong(
            f"a word has changed, in row {row} at position {position}: where `input_ids` is no <image>, the text's own "
            "embedding stays. Look at how you choose the positions"
        )
    row, position = (mask & (result != expected).any(-1)).nonzero()[0].tolist()
    raise Wrong(
        f"a placeholder has the wrong embedding, first in row {row} at position {position}. The rule is: the k-th "
        "placeholder of the batch, in reading order, gets the k-th of all I × N embeddings"
    )


def _wrong_order(batch: Batch) -> list[tuple[torch.Tensor, str]]:
    """All placeholders are filled, with patches of other positions or pictures."""
    images, side = batch.image_embeds, int(N**0.5)
    columns = images.reshape(-1, side, side, EMBED_WIDTH).transpose(1, 2).reshape_as(images)
    orders = [
        (
            images[:1].expand_as(images),
            "every picture is the first one. `image_embeds` holds I pictures, row after row: use all of them",
        ),
        (
            images.flip(1),
            "the patches of each picture stand in reverse order: the last placeholder got the first patch",
        ),
        (images.flip(0), "the pictures stand in reverse order: the last row got the first picture"),
        (images.flip(0, 1), "all embeddings stand in reverse order, from the last to the first"),
        (columns, "the patches of each picture stand column by column; they come row by row, as one reads"),
        (
            images.transpose(0, 1).reshape_as(images),
            "the pictures are shuffled together: first all first patches, then all second ones. `image_embeds` is "
            "(I, N, Dl), so `flatten(0, 1)` gives picture after picture; no axis has to be transposed",
        ),
    ]
    return [(by_definition(batch, wrong), message) for wrong, message in orders]


def _wrong_values(batch: Batch) -> list[tuple[torch.Tensor, str]]:
    """Not all placeholders are filled, or not with patches alone, or something else is."""
    text, images, mask, expected = batch.inputs_embeds, batch.image_embeds, batch.mask, by_definition(batch)
    first = torch.zeros_like(mask)
    first[0] = mask[0]
    one_each = mask & (mask.cumsum(1) <= N)
    return [
        (
            text,
            "the text comes back unchanged. Compare `input_ids` with the `image_token_id` that you are given (it is "
            f"{IMAGE_ID} here), and return what you have swapped",
        ),
        (
            torch.where(first[..., None], expected, text),
            "only the first row has its picture; the others still have the placeholders' own embeddings. Use the whole "
            "mask (B, T), not `mask[0]`",
        ),
        (
            torch.where(one_each[..., None], expected, text),
            "a row with two pictures gets only the first of them: only its first N placeholders are filled",
        ),
        (
            by_definition(batch, images.mean(1, keepdim=True).expand_as(images)),
            "every placeholder got the mean of its picture's patches: what stands where is lost. Patch k goes to "
            "placeholder k",
        ),
        (
            by_definition(batch, text[mask].reshape_as(images) + images),
            "the picture is added to what was looked up at the placeholders. That embedding means nothing (there is "
            "no row for <image>): put the picture there instead",
        ),
        (
            expected * mask[..., None],
            "the words are gone: where no placeholder stands there are zeros now. Begin with the text's embeddings",
        ),
    ]


def _gradients(answer: Callable) -> None:
    """W learns from what comes back through the swap, and so does the language model's table in stage 2."""
    batch = batch_of(PATTERN, images=4)
    text, images = batch.inputs_embeds.requires_grad_(), batch.image_embeds.requires_grad_()
    result = called(answer, text * 1, batch.input_ids, images * 1, IMAGE_ID)
    upstream = torch.arange(1.0, result.numel() + 1).reshape(result.shape)
    if result.requires_grad:
        result.backward(upstream)
    if images.grad is None or not torch.equal(images.grad.reshape(-1, EMBED_WIDTH), upstream[batch.mask]):
        raise Wrong(
            "no gradient comes back to `image_embeds`, so W would never learn. Something cuts the graph: `.detach()`, "
            "`.data`, `.tolist()`, numpy, `torch.tensor(…)` or `torch.no_grad`. Keep to tensor operations"
        )
    if text.grad is None or not torch.equal(text.grad[~batch.mask], upstream[~batch.mask]):
        raise Wrong(
            "no gradient comes back to `inputs_embeds`, so in stage 2 the word embeddings would never learn from the "
            "text. Copy with `.clone()`, not with `.detach()` or `.data`"
        )


def _counts(answer: Callable) -> None:
    """What has to be refused, and what must not be."""
    nothing = batch_of(((5, 6, 7, 8, 9),), images=0)
    if (problem := _refusal(answer, nothing)) is not None:
        raise Wrong(f"a text without a picture, and no picture given (I = 0), is right, but you raise: {problem}")
    hole = (P,) * N
    _refused(
        answer,
        batch_of(((*hole, 5), (*hole, 6)), images=3),
        "the rows have positions for 2 pictures and 3 were given: the third was passed over in silence, as "
        "`masked_scatter` does. Compare the number of placeholders with I × N and raise ValueError",
    )
    _refused(
        answer,
        batch_of(((*hole, 5), (*hole, 6)), images=1),
        "the rows have positions for 2 pictures and only 1 was given, and you noticed nothing. Compare the number of "
        "placeholders with I × N and raise ValueError",
    )
    message = _refused(
        answer,
        batch_of(((5, 6, *hole, 7), (5, *hole, P, 7), (5, 6, 7, P, P, P, 8)), images=3),
        f"row 1 has {N + 1} placeholders and row 2 has {N - 1}: together as many as 3 pictures need, so a count over "
        "the whole batch is content, and row 1 swallows a patch of row 2's picture. Count row by row, "
        "`mask.sum(dim=1)`: each count has to be a multiple of N",
    )
    if not re.search(r"\b1\b", message):
        raise Wrong(
            f"you count row by row, well done; but {message!r} does not say which row is wrong (it is row 1 here). "
            "In a batch of 32 one would have to search: name the row in the message"
        )


def _refused(answer: Callable, batch: Batch, if_not: str) -> str:
    """The message with which a faulty batch is refused.

    Raises:
        Wrong: it is not refused (`if_not` says what that means), or by torch and not by the reader.
    """
    problem = _refusal(answer, batch)
    if problem is None:
        raise Wrong(if_not)
    if not isinstance(problem, ValueError):
        raise Wrong(
            f"where the counts do not fit it is torch that stumbles, with {type(problem).__name__}, and it speaks of "
            "shapes, not of rows and pictures. Compare the counts first, and raise ValueError"
        )
    return str(problem)


def _refusal(answer: Callable, batch: Batch) -> BaseException | None:
    """What the reader's function raises for a batch, or None."""
    try:
        called(answer, *batch)
    except Wrong as problem:
        if problem.__cause__ is None:  # the check's own word, not the reader's
            raise
        return problem.__cause__
    return None
