"""The exercise of notebook 03, `build_labels`: messages for a right answer, typical mistakes and cheating."""

from collections.abc import Callable

import pytest
import torch
from lessons.exercises import labels
from lessons.exercises.checking import verdict
from lessons.exercises.labels import PICTURE, TALK, Segment, expected, segments

from minivlm.config import IGNORE_INDEX
from minivlm.data.samples import Sample
from minivlm.processor import MiniVLMProcessor


def ids_of(conversation) -> list[int]:
    return [token for segment in conversation for token in segment.ids]


def labels_where(supervised: Callable[[Segment], bool]) -> Callable:
    """An answer that supervises the segments for which `supervised` is true."""

    def answer(conversation):
        return [token if supervised(s) else IGNORE_INDEX for s in conversation for token in s.ids]

    return answer


def is_supervised(segment: Segment) -> bool:
    return segment.role == "assistant" and segment.part in ("text", "end")


right = labels_where(is_supervised)


def without_first(conversation, count: int = 1) -> list[int]:
    """The right labels, but the first `count` of each answer."""
    labels = []
    for segment in conversation:
        own = right([segment])
        cut = count if is_supervised(segment) and segment.part == "text" else 0
        labels += [IGNORE_INDEX] * cut + own[cut:]
    return labels


def moved_mask(conversation, by: int) -> list[int]:
    """Supervision that begins and ends `by` tokens late."""
    ids, supervised = ids_of(conversation), [label != IGNORE_INDEX for label in right(conversation)]
    mask = [0 <= i - by < len(ids) and supervised[i - by] for i in range(len(ids))]
    return [token if yes else IGNORE_INDEX for token, yes in zip(ids, mask, strict=True)]


def search_by_value(conversation) -> list[int]:
    """Looks for the answer's ids wherever they stand."""
    answers = {token for segment in conversation if is_supervised(segment) for token in segment.ids}
    return [token if token in answers else IGNORE_INDEX for token in ids_of(conversation)]


def first_answer_only(conversation) -> list[int]:
    end = next(i for i, s in enumerate(conversation) if s.role == "assistant" and s.part == "end")
    return right(conversation[: end + 1]) + [IGNORE_INDEX] * len(ids_of(conversation[end + 1 :]))


def last_answer_only(conversation) -> list[int]:
    start = max(i for i, s in enumerate(conversation) if s.part == "head")
    return [IGNORE_INDEX] * len(ids_of(conversation[:start])) + right(conversation[start:])


def changes_the_segments(conversation) -> list[int]:
    for segment in conversation:
        if not is_supervised(segment):
            segment.ids[:] = [IGNORE_INDEX] * len(segment.ids)
    return ids_of(conversation)


def breaks(conversation) -> list[int]:
    """Takes a segment for a pair."""
    return [token for _, ids in conversation for token in ids]


WRONG = {
    "off by one, late": (lambda c: moved_mask(c, 1), "off by one: supervision begins one token late"),
    "off by one, early": (lambda c: moved_mask(c, -1), "off by one: supervision begins one token early"),
    "shifted as if the loss did not": (lambda c: [*right(c)[1:], IGNORE_INDEX], "as if the loss did not shift"),
    "shifted the other way": (
        lambda c: [IGNORE_INDEX, *right(c)[:-1]],
        "off by one: supervision begins one token late",
    ),
    "end token not": (labels_where(lambda s: (s.role, s.part) == ("assistant", "text")), "never learn to stop"),
    "question": (labels_where(lambda s: s.part in ("text", "end")), "the user's text is supervised"),
    "system": (
        labels_where(lambda s: s.role != "user" and s.part in ("text", "end")),
        "the system's text is supervised",
    ),
    "user's end": (labels_where(lambda s: s.part == "end" or is_supervised(s)), "the end token of the user's turn"),
    "everything": (ids_of, "everything is supervised"),
    "all but the picture": (labels_where(lambda s: s.part != "image"), "the user's text is supervised"),
    "nothing": (lambda c: [IGNORE_INDEX] * len(ids_of(c)), "nothing is supervised"),
    "image block": (labels_where(lambda s: is_supervised(s) or s.part == "image"), "the picture's placeholders"),
    "head": (labels_where(lambda s: s.role == "assistant" and s.part != "gap"), "the head of a turn"),
    "newline": (labels_where(lambda s: s.role == "assistant" and s.part != "head"), "the newline after an end token"),
    "found by value": (search_by_value, "the user's text is supervised"),
    "only what is learnt": (lambda c: [label for label in right(c) if label != IGNORE_INDEX], "4 labels for 21 tokens"),
    "one token short": (lambda c: right(c)[:-1], "20 labels for 21 tokens"),
    "ids changed": (lambda c: [label + (label > 0) for label in right(c)], "label 16 is 42, but the token there is 41"),
    "zeros elsewhere": (lambda c: [max(label, 0) for label in right(c)], "labelled 0; the loss passes over -100 only"),
    "a mask": (lambda c: [label != IGNORE_INDEX for label in right(c)], "the labels hold False"),
    "floats": (lambda c: [float(label) for label in right(c)], "the labels hold -100.0"),
    "a list per segment": (lambda c: [right([s]) for s in c], "one per segment"),
    "no list": (lambda c: None, "returns nothing"),
    "first token of answers": (without_first, "own words are not all supervised"),
    "first answer only": (first_answer_only, "answer 2 of 2 is not wholly supervised"),
    "last answer only": (last_answer_only, "answer 1 of 2 is not wholly supervised"),
    "segments changed": (changes_the_segments, "the segments that you were given have changed"),
    "an error": (breaks, "your function raised ValueError: too many values to unpack"),
}


def test_the_right_answer_is_right():
    assert verdict("build_labels", right) == "Right."
    assert verdict("build_labels", lambda c: torch.tensor(right(c))) == "Right."


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_answer_hears_what_is_wrong(mistake):
    answer, message = WRONG[mistake]
    output = verdict("build_labels", answer)
    assert output.startswith("Not yet: ") and message in output


def test_mistakes_hear_different_things():
    assert len({verdict("build_labels", answer) for answer, _ in WRONG.values()}) >= 20


class TestThePackagesOwn:
    def test_render_is_refused(self, processor):
        messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a car"}]
        output = verdict("build_labels", lambda c: processor.encode(Sample(messages)).labels)
        assert "calls the package's own encode" in output
        assert processor.encode(Sample(messages)).labels  # and works again afterwards

    def test_the_checks_own_solution_is_refused(self):
        assert "calls the package's own expected" in verdict("build_labels", expected)
        assert "calls the package's own expected" in verdict("build_labels", lambda c: labels.expected(c))


class TestSegments:
    CONVERSATION = (
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]},
        {"role": "assistant", "content": "a red car and <image>"},
        {"role": "user", "content": "Which one is further left?"},
        {"role": "assistant", "content": "一只白色的狗"},
    )

    def test_a_rendered_row_falls_into_its_segments(self, processor: MiniVLMProcessor):
        row = processor.encode(Sample(list(self.CONVERSATION)))
        result = segments(row, processor)
        assert ids_of(result) == row.input_ids
        assert expected(result) == row.labels  # an independent renderer says the same
        turn = ["head", "text", "end", "gap"]
        shown = ["head", "image", *turn[1:]]
        assert [s.part for s in result] == [*turn, *shown, *turn, *turn, *turn]
        assert [s.role for s in result if s.part == "end"] == ["system", "user", "assistant", "user", "assistant"]
        assert [len(s.ids) for s in result if s.part == "image"] == [processor.num_image_tokens]

    def test_what_was_not_rendered_is_refused(self, processor):
        row = processor.encode(Sample(list(self.CONVERSATION)))
        bos = processor.tokenizer.bos_token_id
        for ids in ([5, *row.input_ids], [bos, 7, 8], []):
            row.input_ids = ids
            with pytest.raises(ValueError, match=r"render it by processor\.encode"):
                segments(row, processor)


def test_the_conversations_of_the_check_have_every_part():
    assert {(s.role, s.part) for s in TALK} >= {(s.role, s.part) for s in PICTURE} | {("system", "text")}
