"""A file of rows is read once and described; every bad row is found, with its line and its reason."""

import json
import re

import pytest
from PIL import Image

from minivlm import cli
from minivlm.config import IGNORE_INDEX
from minivlm.data import read_rows
from minivlm.processor import RowError
from minivlm.survey import BIN, as_text, survey


def turns(*texts: str) -> list[dict]:
    """User and assistant by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


GOOD = [
    {"conversations": turns("<image>\nWhat is in this picture?", "a red car"), "image": "0.jpg"},
    {"conversations": turns("<image>\n<image>\n这个图像中有什么内容？", "一只白色的狗。"), "image": "0.jpg, 1.jpg"},
    {"conversations": [{"role": "system", "content": "Be brief."}, *turns("Hi", "Hi", "And?", "No.")]},
]
BAD = {  # what is planted -> what is said about it
    "not JSON": ('{"conversations": ', "not a line of JSON"),
    "missing key": ({"image": "0.jpg"}, 'not an object with "conversations"'),
    "wrong role": ({"conversations": [{"role": "robot", "content": "Hi"}, *turns("Hi", "Hi")]}, "role 'robot'"),
    "roles out of order": ({"conversations": turns("Hi", "Hi")[::-1]}, "where the user's is expected"),
    "no assistant turn": ({"conversations": turns("Hi")}, "no supervised token"),
    "empty answer": ({"conversations": turns("Hi", "")}, "an assistant turn is empty"),
    "more <image> than pictures": (
        {"conversations": turns("<image><image>", "Hi"), "image": "0.jpg"},
        "2 <image> in the text, but 1 pictures",
    ),
    "fewer": ({"conversations": turns("Hi", "Hi"), "image": "0.jpg"}, "0 <image> in the text, but 1 pictures"),
    "file missing": ({"conversations": turns("<image>", "Hi"), "image": "gone.jpg"}, "gone.jpg is missing"),
    "outside the folder": ({"conversations": turns("<image>", "Hi"), "image": "../0.jpg"}, "no name inside"),
    "picture unreadable": ({"conversations": turns("<image>", "Hi"), "image": "cut.jpg"}, "the file is cut off"),
    "too long": ({"conversations": turns("a red car " * 200, "Hi")}, "tokens"),
}


@pytest.fixture
def folder(tmp_path):
    """Two pictures, and one that is cut off."""
    for name, colour in (("0.jpg", "red"), ("1.jpg", "lime"), ("cut.jpg", "blue")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / name)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-20])
    return tmp_path


def write(folder, rows: list) -> str:
    """JSON lines."""
    file = folder / "train.jsonl"
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


@pytest.fixture
def strict(processor, monkeypatch):
    """The processor with a limit; the tokenizer is shared by all tests."""
    monkeypatch.setattr(processor.tokenizer, "model_max_length", 200)
    return processor


def test_all_twelve_bad_rows_are_found_and_named(folder, strict):
    planted = [row for row, _ in BAD.values()]
    file = write(folder, [GOOD[0], *planted[:6], GOOD[1], *planted[6:], GOOD[2]])
    found = survey(file, strict, decode=True)
    lines = [2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14]
    assert len(BAD) == 12 and found.usable == 3
    for error, line, (name, (_, reason)) in zip(found.bad, lines, BAD.items(), strict=True):
        assert str(error).startswith(f"{file}, line {line}: ") and reason in str(error), name


def test_a_picture_is_opened_only_where_that_is_asked_for(folder, strict):
    file = write(folder, [BAD["picture unreadable"][0]])
    assert survey(file, strict).bad == [] and len(survey(file, strict, decode=True).bad) == 1


def test_what_is_usable_is_counted(folder, strict):
    file = write(folder, GOOD)
    found = survey(file, strict)
    rendered = [strict.render(row.messages()) for row in read_rows(file)]
    assert found.pictures == {0: 1, 1: 1, 2: 1} and found.languages == {"en": 2, "zh": 1}
    assert found.tokens == sum(len(one.input_ids) for one in rendered)
    assert found.learnt == sum(label != IGNORE_INDEX for one in rendered for label in one.labels)
    assert found.lengths == {
        place: sum(len(one.input_ids) // BIN == place for one in rendered) for place in found.lengths
    }
    said = as_text(found)
    assert said.startswith("3 rows, all of them usable") and "0: 1, 1: 1, 2: 1" in said and "en: 2, zh: 1" in said
    assert sum(map(int, re.findall(r"to \d+ +(\d+)", said))) == 3


def test_llavas_array_and_names_are_read(folder, strict):
    def named(conversation):
        return [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in conversation]

    rows = [{"id": i, **row, "conversations": named(row["conversations"])} for i, row in enumerate(GOOD[:2])]
    file = folder / "llava.json"
    file.write_text(json.dumps([*rows, {"id": 9, "image": "0.jpg"}], indent=1), "utf-8")
    found = survey(file, strict)
    assert found.usable == 2 and [str(error).split(":")[0] for error in found.bad] == [f"{file}, item 3"]
    with pytest.raises(RowError, match="item 3"):
        list(read_rows(file))
    file.write_text(json.dumps(rows), "utf-8")
    assert [row.conversations for row in read_rows(file)] == [row["conversations"] for row in GOOD[:2]]


def test_an_array_that_ends_too_early_is_named(folder, strict):
    (folder / "llava.json").write_text('[{"conversations": []},', "utf-8")
    with pytest.raises(RowError, match=r"llava\.json: not a JSON array"):
        survey(folder / "llava.json", strict)


def test_nothing_is_divided_by_zero(folder, strict):
    assert as_text(survey(write(folder, [""]), strict)) == "0 rows, all of them usable"
    assert as_text(survey(write(folder, ["{"]), strict)) == "1 rows, 0 of them usable"


def test_the_command_prints_counts_and_every_bad_row(folder, capsys):
    file = write(folder, [*GOOD, BAD["empty answer"][0], BAD["picture unreadable"][0]])
    assert cli.main(["data", "check", str(file), "--decode"]) == 2
    said = capsys.readouterr()
    assert "5 rows, 3 of them usable" in said.out and "line 4" in said.err and "line 5" in said.err
    assert cli.main(["data", "check", str(write(folder, GOOD)), "--images", str(folder)]) == 0
