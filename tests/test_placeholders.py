"""`<image>` becomes N placeholders, and image embeddings replace exactly their own positions."""

import pytest
import torch

from minivlm.placeholders import PlaceholderError, expand_placeholders, replace_placeholders

IMAGE, N, WIDTH = 99, 2, 3


def embeddings(rows: int, length: int) -> torch.Tensor:
    """(B, T, Dl) with a different negative number everywhere."""
    return -torch.arange(1.0, rows * length * WIDTH + 1).reshape(rows, length, WIDTH)


def image_embeddings(count: int) -> torch.Tensor:
    """(I, N, Dl) with a different positive number everywhere."""
    return torch.arange(1.0, count * N * WIDTH + 1).reshape(count, N, WIDTH)


def placed_by_hand(embeds, ids, images) -> torch.Tensor:
    """The definition, in loops: the k-th placeholder of the batch gets the k-th embedding of the images."""
    result, queue = embeds.clone(), [vector for image in images for vector in image]
    for row in range(ids.shape[0]):
        for column in range(ids.shape[1]):
            if ids[row, column] == IMAGE:
                result[row, column] = queue.pop(0)
    assert not queue
    return result


def test_expand():
    assert expand_placeholders([], IMAGE, 3) == []
    assert expand_placeholders([5, 6], IMAGE, 3) == [5, 6]
    assert expand_placeholders([IMAGE], IMAGE, 1) == [IMAGE]
    assert expand_placeholders([5, IMAGE, 6, IMAGE], IMAGE, 3) == [5, IMAGE, IMAGE, IMAGE, 6, IMAGE, IMAGE, IMAGE]


@pytest.mark.parametrize("counted", [True, False], ids=["counts given", "counts read off"])
@pytest.mark.parametrize(
    "rows",
    [
        [[5, IMAGE, IMAGE, 6]],
        [[IMAGE, IMAGE, IMAGE, IMAGE], [5, IMAGE, IMAGE, 6], [5, 6, 7, 8]],
        [[5, 6, 7, 8, 9, 10], [IMAGE, IMAGE, 7, IMAGE, IMAGE, 8], [9, IMAGE, IMAGE, 0, 0, 0]],
        [[5, 6]],
    ],
    ids=["one", "two, one, none", "none, two, one", "no picture"],
)
def test_image_embeddings_take_their_positions(rows, counted):
    ids = torch.tensor(rows)
    counts = (ids == IMAGE).sum(1) // N
    embeds, images = embeddings(*ids.shape), image_embeddings(int(counts.sum()))
    result = replace_placeholders(embeds, ids, images, IMAGE, counts if counted else None)
    assert torch.equal(result, placed_by_hand(embeds, ids, images))


def test_inputs_stay_as_they_are():
    ids = torch.tensor([[5, IMAGE, IMAGE, 6]])
    embeds, images = embeddings(1, 4), image_embeddings(1)
    before = embeds.clone(), images.clone()
    result = replace_placeholders(embeds, ids, images, IMAGE)
    result.zero_()
    assert torch.equal(embeds, before[0]) and torch.equal(images, before[1])


def test_gradients_reach_text_and_images_and_nothing_else():
    ids = torch.tensor([[5, IMAGE, IMAGE, 6], [IMAGE, IMAGE, 7, 8]])
    embeds, images = embeddings(2, 4).requires_grad_(), image_embeddings(2).requires_grad_()
    upstream = torch.randn(2, 4, WIDTH)
    replace_placeholders(embeds, ids, images, IMAGE).backward(upstream)
    is_text = (ids != IMAGE).unsqueeze(-1)
    assert torch.equal(embeds.grad, upstream * is_text)
    assert torch.equal(images.grad, torch.stack([upstream[0, 1:3], upstream[1, 0:2]]))


def test_one_row_cannot_swallow_anothers_picture():
    """Two placeholders too many here and two too few there: the sum is right and the rows are wrong."""
    ids = torch.tensor([[IMAGE, IMAGE, IMAGE, IMAGE], [5, 6, 7, 8]])
    assert issubclass(PlaceholderError, ValueError)
    with pytest.raises(PlaceholderError, match=r"row 0 has 4 placeholders, but 1 images of 2 embeddings \(2\)"):
        replace_placeholders(embeddings(2, 4), ids, image_embeddings(2), IMAGE, torch.tensor([1, 1]))


def test_half_a_picture_is_refused_though_the_sum_is_right():
    ids = torch.tensor([[IMAGE, IMAGE, IMAGE, 5], [IMAGE, 6, 7, 8]])
    for counts in (None, torch.tensor([1, 1])):
        with pytest.raises(PlaceholderError, match="row 0 has 3 placeholders"):
            replace_placeholders(embeddings(2, 4), ids, image_embeddings(2), IMAGE, counts)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_surplus_and_missing_images_are_refused(count):
    ids = torch.tensor([[IMAGE, IMAGE, 5], [IMAGE, IMAGE, 6]])
    for counts in (None, torch.tensor([1, 1])):
        with pytest.raises(PlaceholderError, match=rf"1 \+ 1 = 2 images, but {count} were given"):
            replace_placeholders(embeddings(2, 3), ids, image_embeddings(count), IMAGE, counts)


def test_counts_for_another_number_of_rows_are_refused():
    ids = torch.tensor([[IMAGE, IMAGE, 5]])
    with pytest.raises(PlaceholderError, match="counts 2 rows, but input_ids has 1"):
        replace_placeholders(embeddings(1, 3), ids, image_embeddings(1), IMAGE, torch.tensor([1, 0]))
