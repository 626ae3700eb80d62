"""Rows from files: what is read, and what is refused with its line, beside the twelve of `rows.BAD`."""

import json
import re

import pytest
from PIL import Image
from rows import write

from minivlm.data.readers import read_samples
from minivlm.data.samples import Sample, SampleError, messages_from_turns


def turns(question: str, answer: str = "一只狗。") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for index, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "pictures" / f"{index}.jpg")
    return tmp_path


def test_rows_with_one_several_and_no_images(folder):
    rows = [
        {"conversations": turns("提供给定图像的简要描述。\n<image>"), "image": "0.jpg"},
        "",
        {"conversations": turns("<image>\n<image>\nWhich?"), "image": "1.jpg, 2.jpg"},
        {"conversations": turns("Hi")},
        {"conversations": turns("Hi"), "image": ""},
    ]
    file = write(folder, rows)
    images = folder / "pictures"
    assert list(read_samples(file, images)) == [
        Sample(messages_from_turns(conversation, [images / name for name in names]), f"{file}, line {line}")
        for line, conversation, names in (
            (1, turns("提供给定图像的简要描述。\n<image>"), ["0.jpg"]),
            (3, turns("<image>\n<image>\nWhich?"), ["1.jpg", "2.jpg"]),
            (4, turns("Hi"), []),
            (5, turns("Hi"), []),
        )
    ]


def test_byte_order_mark_and_windows_line_ends(folder):
    file = folder / "train.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"conversations": turns("Hi")}).encode() + b"\r\n\r\n")
    assert [row.messages for row in read_samples(file)] == [Sample(turns("Hi")).messages]


def test_a_row_becomes_a_batch(folder, processor):
    """Images stand where their `<image>` does, in whichever turn."""
    conversation = [*turns("Compare <image> with <image>."), *turns("简要描述。\n<image>")]
    file = write(folder, [{"conversations": conversation, "image": "0.jpg, 2.jpg, 1.jpg"}])
    row = next(read_samples(file, folder / "pictures"))
    rendered = processor.encode(row)
    assert rendered.name == f"{file}, line 1"
    batch = processor.collate([rendered])
    assert batch["images_per_row"].tolist() == [3]
    assert batch["input_ids"].eq(processor.image_token_id).sum() == 3 * processor.num_image_tokens
    assert batch["pixel_values"].mean(dim=(2, 3)).argmax(dim=1).tolist() == [0, 2, 1]  # red, blue, green


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('[{"conversations": []}, ', "not a line of JSON.*correct it"),
        ("[1, 2]", 'not an object with "conversations"'),
        ({"conversations": turns("<image>")}, "1 <image> in the text, but 0 images"),
        (
            {"conversations": turns("<image><image><image>"), "image": "0.jpg, 1.jpg"},
            "3 <image> in the text, but 2 images; write one <image> for each image",
        ),
        ({"conversations": turns("<image>"), "image": "gone.jpg"}, r"gone\.jpg is missing; add it or drop the row"),
        ({"conversations": turns("<image>"), "image": ["0.jpg"]}, '"image" is list; write file names in one string'),
        ({"conversations": turns("<image>"), "image": "/etc/passwd"}, "no name inside"),
        ({"conversations": turns("<image>"), "image": "0.jpg,"}, "'' is no name inside"),
        ({"conversations": []}, "the conversation is empty"),
        ({"conversations": turns("Hi", "<image>"), "image": "0.jpg"}, "an image stands in an assistant turn"),
        (
            json.dumps({"conversations": turns("<image>"), "image": "\udcff.jpg"}),
            r"name '\\udcff\.jpg' has half of a character; rename the file",
        ),
        (
            {"conversations": turns("<image>"), "image": "x" * 5000},
            r"no file can be called 'x{40}…' \(File name too long",
        ),
        ("[" * 100_000, r"not a line of JSON \(.*recursion"),
        (json.dumps({"conversations": turns("A \ud800 B")}), r"the user's text has '\\ud800', half of a character"),
        (json.dumps({"conversations": turns("Hi", "\udfff")}), r"the assistant's text has '\\udfff'.*take it out"),
        ({"conversations": "Hi"}, "must be a list of turns"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "no supervised token"),
        ({"conversations": [{"from": "robot", "value": "Hi"}]}, "a turn is from 'robot'; it must be one of human, gpt"),
        ({"conversations": [{"from": ["human"], "value": "Hi"}]}, r"a turn is from \['human'\]; it must be one of"),
        ({"conversations": turns("<image>"), "image_bytes": "/9j/"}, '"image_bytes" has str.*"image" names files'),
        ({"conversations": [turns("Hi")[0], *turns("Hi")]}, "turn 2 is the user's where the assistant's is expected"),
    ],
)
def test_refused_with_file_and_line(folder, row, problem):
    file = write(folder, [{"conversations": turns("Hi")}, row])
    rows = read_samples(file, folder / "pictures")
    assert isinstance(next(rows), Sample)
    error = next(rows)
    assert isinstance(error, SampleError) and re.search(rf"train\.jsonl, line 2: .*{problem}", str(error))


def test_a_missing_file_and_one_that_is_not_utf_8(folder):
    with pytest.raises(SampleError, match=r"nowhere\.jsonl: there is no such file"):
        list(read_samples(folder / "nowhere.jsonl"))
    file = folder / "train.jsonl"
    file.write_bytes(json.dumps({"conversations": turns("图像")}, ensure_ascii=False).encode("gb18030"))
    assert re.search(r"line 1: not a line of JSON.*utf-8", str(next(read_samples(file))))
