"""The exercise of notebook 03: which tokens of a conversation are supervised?

The reader is handed a conversation as segments and returns one label per token; `segments` makes them of a real row.
The rule that is checked is the one of `MiniVLMProcessor.encode`: an answer's own tokens and the end token after it.
"""

from collections.abc import Callable, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple

from lessons.exercises.checking import Wrong, called, exercise, forbidden
from minivlm.config import IGNORE_INDEX
from minivlm.data.samples import ROLES, Example
from minivlm.processor import MiniVLMProcessor


class Segment(NamedTuple):
    """A stretch of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        part: "head" (`<|im_start|>`, the role and a newline), "image" (N placeholders), "text", "end" (`<|im_end|>`)
            or "gap" (the newline between two turns).
        ids: its token ids.
    """

    role: str
    part: str
    ids: list[int]


# Small numbers stand for tokens. The answers repeat words of the questions, so nobody finds them by looking for ids.
START, END, GAP, IMAGE = 1, 2, 10, 99


def _turn(role: str, name: int, text: list[int], placeholders: int = 0) -> tuple[Segment, ...]:
    """The segments of a turn; `name` is the token of its role."""
    image = [Segment(role, "image", [IMAGE] * placeholders)] if placeholders else []
    head, end, gap = [START, name, GAP], [END], [GAP]
    parts = (Segment(role, "text", text), Segment(role, "end", end), Segment(role, "gap", gap))
    return (Segment(role, "head", head), *image, *parts)


# a picture, a question, an answer
PICTURE = (*_turn("user", 20, [GAP, 31, 32, 33], placeholders=4), *_turn("assistant", 21, [41, 31, 42]))
# the system's text, then two questions, the second without a picture
TALK = (*_turn("system", 22, [51, 52]), *PICTURE, *_turn("user", 20, [31, 41]), *_turn("assistant", 21, [31]))
PACKAGES_OWN = (MiniVLMProcessor.encode, MiniVLMProcessor.apply_chat_template, MiniVLMProcessor.collate)

# parts that carry labels though they should not -> what is wrong with that; the first that fits is the message
TOO_MUCH = {
    "image": "the picture's placeholders are supervised. Nobody writes them: W's rows will stand there, and the head "
    "has no logit for <image>",
    "text": "the {role}'s text is supervised: the model would learn to ask instead of to answer. Look at the role, not "
    "only at the part",
    "head": "the head of a turn is supervised ({role}). The chat template writes it; the model only goes on behind it",
    "end": "the end token of the {role}'s turn is supervised. Only an answer's own end is the model's to write",
    "gap": "the newline after an end token is supervised ({role}). A model that has written the end token has "
    "finished; nobody asks it for more",
}


@exercise
def build_labels(answer: Callable[[list[Segment]], list[int]]) -> None:
    """Check `build_labels(segments) -> labels`."""
    for conversation in (PICTURE, TALK):
        given = [segment._replace(ids=[*segment.ids]) for segment in conversation]
        with forbidden(*PACKAGES_OWN, expected, answer=answer):
            labels = called(answer, given)
        if given != list(conversation):
            raise Wrong("the segments that you were given have changed; build a new list and leave them as they are")
        _compare(_listed(labels), conversation)


def expected(conversation: Sequence[Segment]) -> list[int]:
    """The right labels of a conversation."""
    return [
        token if segment.role == "assistant" and segment.part in ("text", "end") else IGNORE_INDEX
        for segment in conversation
        for token in segment.ids
    ]


def segments(row: Example, processor: MiniVLMProcessor) -> list[Segment]:
    """A rendered row as segments; their ids, one behind the other, are the row's.

    Control tokens cannot stand in a text, so a row falls into its segments at them.

    Raises:
        ValueError: the row is no conversation that `processor.encode` made.
    """
    tokenizer, stretches = processor.tokenizer, []
    names = {role: tokenizer.encode(f"{role}\n", add_special_tokens=False) for role in ROLES}
    heads = {role: [tokenizer.bos_token_id, *ids] for role, ids in names.items()}
    starts = [index for index, token in enumerate(row.input_ids) if token == tokenizer.bos_token_id]
    if starts[:1] != [0]:
        raise ValueError("a conversation begins with the head of a turn; render it by processor.encode")
    for start, stop in zip(starts, [*starts[1:], len(row.input_ids)], strict=True):
        turn = row.input_ids[start:stop]
        role = next((role for role, head in heads.items() if turn[: len(head)] == head), None)
        if role is None:
            raise ValueError(f"the turn that begins at token {start} has no known role; render it by processor.encode")
        body = turn[len(heads[role]) :]
        stretches.append(Segment(role, "head", heads[role]))
        for part, ids in groupby(body, key={processor.image_token_id: "image", tokenizer.eos_token_id: "end"}.get):
            behind_the_end = stretches[-1].part == "end"
            stretches.append(Segment(role, part or ("gap" if behind_the_end else "text"), list(ids)))
    return stretches


def _listed(labels: Any) -> list[int]:
    """What was returned as a list of plain integers."""
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    if not isinstance(labels, list | tuple):
        raise Wrong(f"this returns {type(labels).__name__}; return a list with one label per token")
    if any(isinstance(label, list | tuple) for label in labels):
        raise Wrong("this returns a list of lists, one per segment; return one flat list, one label per token")
    if strange := [label for label in labels if isinstance(label, bool) or not isinstance(label, int)]:
        raise Wrong(
            f"the labels hold {strange[0]!r}; a label is the id of a supervised token, {IGNORE_INDEX} elsewhere"
        )
    return list(labels)


def _compare(labels: list[int], conversation: Sequence[Segment]) -> None:
    """Say of labels that are not the right ones what is wrong with them: first the form, then what is supervised."""
    ids, right = [token for segment in conversation for token in segment.ids], expected(conversation)
    if len(labels) != len(ids):
        raise Wrong(
            f"{len(labels)} labels for {len(ids)} tokens. Every token gets one: {IGNORE_INDEX} if it is not supervised"
        )
    if labels == right:
        return
    if set(labels) == {IGNORE_INDEX}:
        raise Wrong("nothing is supervised: every label is -100, so the loss would be a mean over no tokens (NaN)")
    if labels == ids:
        raise Wrong(
            "everything is supervised, the question and the placeholders too. Only what the assistant writes should be"
        )
    _check_shift(labels, ids, right)
    _check_values(labels, ids, right)
    _check_segments(labels, conversation)


def _check_shift(labels: list[int], ids: list[int], right: list[int]) -> None:
    """Labels that stand one position away from where they belong."""
    if labels == [*right[1:], IGNORE_INDEX]:
        raise Wrong(
            "every label stands one position early, as if the loss did not shift. It does: the output at position t is "
            "compared with the label at t + 1. So a label stands at its own token"
        )
    supervised = [label != IGNORE_INDEX for label in right]
    for shifted, what in (
        (
            [False, *supervised[:-1]],
            "begins one token late, so an answer's first token is never supervised, and ends one late",
        ),
        ([*supervised[1:], False], "begins one token early, at the head's newline, and ends before the end token"),
    ):
        moved = [token if yes else IGNORE_INDEX for token, yes in zip(ids, shifted, strict=True)]
        if labels in (moved, [IGNORE_INDEX, *right[:-1]]):
            raise Wrong(f"off by one: supervision {what}. Count from the segments' own lengths")


def _check_values(labels: list[int], ids: list[int], right: list[int]) -> None:
    """Labels that are neither -100 nor the id of their own token."""
    fillers = {label for label, wanted in zip(labels, right, strict=True) if wanted == IGNORE_INDEX}
    if len(fillers) == 1 and (filler := fillers.pop()) != IGNORE_INDEX:
        raise Wrong(f"tokens that teach nothing are labelled {filler}; the loss passes over {IGNORE_INDEX} only")
    for position, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (IGNORE_INDEX, token):
            raise Wrong(
                f"label {position} is {label}, but the token there is {token}. A label is the token's own id, unchanged"
            )


def _check_segments(labels: list[int], conversation: Sequence[Segment]) -> None:
    """Segments that carry labels though they should not; then segments of an answer that lack some."""
    rest = iter(labels)
    dealt = [(segment, list(islice(rest, len(segment.ids)))) for segment in conversation]
    carrying = {
        (segment.part, segment.role) for segment, own in dealt if set(expected([segment])) == {IGNORE_INDEX} != set(own)
    }
    for part, message in TOO_MUCH.items():
        for role in sorted(role for position, role in carrying if position == part):
            raise Wrong(message.format(role=role))
    lacking = [(segment.part, own != expected([segment])) for segment, own in dealt if segment.role == "assistant"]
    if ("text", True) not in lacking:
        raise Wrong(
            "the end token is not supervised: the model would never learn to stop, and talk until it is cut off"
        )
    answers = [lacks for part, lacks in lacking if part == "text"]
    if not all(answers):
        number = answers.index(True) + 1
        raise Wrong(f"answer {number} of {len(answers)} is not wholly supervised; every turn of the assistant teaches")
    raise Wrong("an answer's own words are not all supervised; from its first token to its last, each should be")
