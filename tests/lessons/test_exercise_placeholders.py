"""The exercise of notebook 02: right answers pass, and each typical wrong one gets a message of its own."""

import re

import pytest
import torch
from lessons.exercises.checking import verdict
from lessons.exercises.placeholders import PATTERN, batch_of, by_definition

from minivlm import placeholders


def counted(input_ids, image_embeds, image_token_id) -> torch.Tensor:
    """The mask (B, T), after the counts were found right."""
    images, n, _ = image_embeds.shape
    mask = input_ids == image_token_id
    for row, count in enumerate(mask.sum(1).tolist()):
        if count % n:
            raise ValueError(f"row {row} has {count} placeholders, no multiple of {n}")
    if mask.sum() != images * n:
        raise ValueError(f"{int(mask.sum())} placeholders for {images} pictures of {n}")
    return mask


def by_index_put(embeds, ids, images, image):
    return embeds.index_put((counted(ids, images, image),), images.flatten(0, 1))


def by_masked_scatter(embeds, ids, images, image):
    return embeds.masked_scatter(counted(ids, images, image)[..., None], images)


def by_loops(embeds, ids, images, image):
    queue, rows = iter(images.flatten(0, 1)), []
    for row, mask in zip(embeds, counted(ids, images, image), strict=True):
        rows.append(torch.stack([next(queue) if hit else word for word, hit in zip(row, mask, strict=True)]))
    return torch.stack(rows)


@pytest.mark.parametrize("answer", [by_index_put, by_masked_scatter, by_loops])
def test_right_answers(answer):
    assert verdict("replace_placeholders", answer) == "Right."


def test_it_does_not_matter_whether_the_notebook_wants_gradients():
    with torch.no_grad():
        assert verdict("replace_placeholders", by_index_put) == "Right."
        assert not torch.is_grad_enabled()


def on_mask(mask_of):
    """An answer that fills only the positions that `mask_of` keeps of the mask."""

    def answer(embeds, ids, images, image):
        full = by_index_put(embeds, ids, images, image)
        return torch.where(mask_of(ids == image)[..., None], full, embeds)

    return answer


def with_images(change):
    """An answer that changes the images before the swap."""
    return lambda embeds, ids, images, image: by_index_put(embeds, ids, change(images), image)


def in_place(embeds, ids, images, image):
    embeds[counted(ids, images, image)] = images.flatten(0, 1)
    return embeds


def changes_ids(embeds, ids, images, image):
    result = by_index_put(embeds, ids, images, image)
    ids[ids == image] = 0
    return result


def on_numpy(embeds, ids, images, image):
    result = embeds.detach().numpy().copy()
    result[counted(ids, images, image).numpy()] = images.detach().flatten(0, 1).numpy()
    return torch.tensor(result)


def counted_over_the_batch(embeds, ids, images, image):
    mask = ids == image
    if mask.sum() != images.shape[0] * images.shape[1]:
        raise ValueError(f"{int(mask.sum())} image tokens and {images.shape[0] * images.shape[1]} features")
    return embeds.masked_scatter(mask[..., None], images)


def missing_ones_repeated(embeds, ids, images, image):
    """Notices a surplus, but fills a gap by repeating the embeddings."""
    count = int((ids == image).sum())
    vectors = images.flatten(0, 1)
    if len(vectors) > count:
        raise ValueError("too many pictures")
    return embeds.index_put((ids == image,), vectors.repeat(count + 1, 1)[:count] if count else vectors)


def row_not_named(embeds, ids, images, image):
    """Counted row by row, without a word about which."""
    try:
        return by_index_put(embeds, ids, images, image)
    except ValueError:
        raise ValueError("a row has too many or too few placeholders") from None


def at_least_one_image(embeds, ids, images, image):
    if len(images) == 0:
        raise ValueError("no picture")
    return by_index_put(embeds, ids, images, image)


WRONG = {
    "in place": (in_place, "writes into `inputs_embeds`"),
    "changes the ids": (changes_ids, "changes `input_ids` or `image_embeds`"),
    "surplus ignored": (
        lambda e, ids, i, image: e.masked_scatter((ids == image)[..., None], i),
        "the third was passed over in silence",
    ),
    "missing ones repeated": (missing_ones_repeated, "only 1 was given, and you noticed nothing"),
    "only torch notices": (
        lambda e, ids, i, image: e.index_put((ids == image,), i.flatten(0, 1)),
        "it is torch that stumbles, with RuntimeError",
    ),
    "counted over the batch": (counted_over_the_batch, "row 1 swallows a patch of row 2's picture"),
    "row not named": (row_not_named, "does not say which row is wrong"),
    "a picture demanded": (at_least_one_image, "is right, but you raise: no picture"),
    "first row only": (
        on_mask(lambda mask: mask & (torch.arange(len(mask)) == 0)[:, None]),
        "only the first row has its picture",
    ),
    "first N of a row": (on_mask(lambda mask: mask & (mask.cumsum(1) <= 4)), "only its first N placeholders"),
    "first picture everywhere": (with_images(lambda i: i[:1].expand_as(i)), "every picture is the first one"),
    "patches reversed": (with_images(lambda i: i.flip(1)), "patches of each picture stand in reverse order"),
    "pictures reversed": (with_images(lambda i: i.flip(0)), "the pictures stand in reverse order"),
    "all reversed": (with_images(lambda i: i.flip(0, 1)), "all embeddings stand in reverse order"),
    "column by column": (
        with_images(lambda i: i.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)),
        "stand column by column",
    ),
    "pictures crossed": (
        with_images(lambda i: i.transpose(0, 1).reshape_as(i)),
        "the pictures are shuffled together",
    ),
    "mean of the patches": (with_images(lambda i: i.mean(1, keepdim=True).expand_as(i)), "mean of its picture's"),
    "added": (
        lambda e, ids, i, image: by_index_put(e, ids, i, image) + e * (ids == image)[..., None],
        "is added to what was looked up",
    ),
    "words gone": (
        lambda e, ids, i, image: by_index_put(torch.zeros_like(e), ids, i, image),
        "the words are gone",
    ),
    "unchanged": (lambda e, ids, i, image: e.clone(), "the text comes back unchanged"),
    "id by heart": (
        lambda e, ids, i, _: e.masked_scatter((ids == 1024)[..., None], i),
        "the text comes back unchanged",
    ),
    "one place too early": (
        lambda e, ids, i, image: e.index_put(((ids == image).roll(-1, dims=1),), i.flatten(0, 1)),
        "a word has changed, in row 0 at position 0",
    ),
    "other numbers": (with_images(lambda i: i * 2), "has the wrong embedding, first in row 0 at position 1"),
    "picture detached": (with_images(lambda i: i.detach()), "no gradient comes back to `image_embeds`"),
    "numpy": (on_numpy, "no gradient comes back to `image_embeds`"),
    "text detached": (lambda e, *rest: by_index_put(e.detach(), *rest), "no gradient comes back to `inputs_embeds`"),
    "longer": (
        lambda e, ids, i, image: torch.cat([by_index_put(e, ids, i, image), e[:, :1]], dim=1),
        r"the result has the shape (4, 12, 3); it has to have that of `inputs_embeds`, (B, T, Dl) = (4, 11, 3)",
    ),
    "other type": (lambda *args: by_index_put(*args).double(), "the result is torch.float64"),
    "nothing returned": (lambda *args: None, "returns nothing"),
    "a list": (lambda *args: by_index_put(*args).tolist(), "returns list"),
    "an error": (lambda *args: args[9], "your function raised IndexError: tuple index out of range"),
    "the package's own": (
        lambda *args: placeholders.replace_placeholders(*args),
        "calls the package's own replace_placeholders",
    ),
    "handed in": (placeholders.replace_placeholders, "calls the package's own replace_placeholders"),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_answer_gets_its_own_message(name):
    answer, expected = WRONG[name]
    message = verdict("replace_placeholders", answer)
    assert message.startswith("Not yet: ") and expected in message and "\n" not in message


def test_no_message_fits_two_mistakes():
    """Two mistakes share a message only where they are one: the id by heart, numpy, the package's own."""
    messages = [re.escape(expected) for _, expected in WRONG.values()]
    assert len(WRONG) - len(set(messages)) == 3


def test_the_definition_is_the_packages():
    """The check's loops, the package's one line, and the pattern's order."""
    batch = batch_of(PATTERN, images=4)
    assert torch.equal(by_definition(batch), placeholders.replace_placeholders(*batch))
