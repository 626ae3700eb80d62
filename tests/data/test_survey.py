"""A file of rows is read once and described; every bad row is found, with its line and its reason."""

import gc
import io
import json
import random
import re
import tracemalloc
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from rows import BAD, FORMS, GOOD, REASONS, turns, with_images, write, write_table

from minivlm.config import IGNORE_INDEX
from minivlm.data.images import open_image
from minivlm.data.readers import read_samples
from minivlm.data.samples import SampleError, turn_of
from minivlm.data.survey import BIN, as_text, survey


@pytest.fixture
def folder(tmp_path):
    return with_images(tmp_path)


@pytest.fixture
def limited(processor, monkeypatch):
    """The processor with a limit; the tokenizer is shared by all tests."""
    monkeypatch.setattr(processor.tokenizer, "model_max_length", 200)
    return processor


@pytest.mark.parametrize("form", FORMS)
def test_all_twelve_bad_rows_are_found_and_named(folder, limited, form):
    writer, word, impossible = FORMS[form]
    planted = [name for name in BAD if name not in impossible]
    rows = [BAD[name][0] for name in planted]
    file = writer(folder, [GOOD[0], *rows[:6], GOOD[1], *rows[6:], GOOD[2]])
    result = survey(file, limited, decode=True)
    lines = [2, 3, 4, 5, 6, 7, *range(9, 3 + len(rows))]
    assert len(BAD) == 12 and result.usable == 3
    for error, line, name in zip(result.bad, lines, planted, strict=True):
        message, reason = str(error), REASONS.get((form, name), BAD[name][1])
        assert message.startswith(f"{file}, {word} {line}: ") and reason in message, name


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_hold_the_same_rows(folder, limited, form):
    writer, word, _ = FORMS[form]
    rows = list(read_samples(writer(folder, GOOD)))
    assert [[turn_of(message) for message in row.messages] for row in rows] == [row["conversations"] for row in GOOD]
    shown = [[open_image(image).getpixel((0, 0)) for image in row.images] for row in rows]
    colours = [open_image(folder / f"{name}.jpg").getpixel((0, 0)) for name in (0, 1)]
    assert shown == [[colours[0]], colours, []]
    assert [row.name.rsplit(", ")[-1] for row in rows] == [f"{word} 1", f"{word} 2", f"{word} 3"]


def black(size: tuple[int, int], dot: bool = False) -> bytes:
    image, file = Image.new("RGB", size), io.BytesIO()
    if dot:
        image.putpixel((0, 0), (0, 0, 9))
    image.save(file, "png")
    return file.getvalue()


def test_a_tables_black_stand_in_is_no_image_of_a_text_only_row(folder, limited):
    stand_in = black((8, 8))
    held = [stand_in, stand_in, black((8, 9)), black((8, 8), dot=True), b"", b"x" * 5000, None]
    texts = ["Hi", "<image>\nHi", *["Hi"] * 5]
    file = folder / "text.parquet"
    table = {"conversations": [json.dumps(turns(text, "Hi")) for text in texts], "image_bytes": held}
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    result = survey(file, limited, decode=True)
    assert result.images == {0: 2, 1: 1}
    messages = [f"{file}, row {row}: 0 <image> in the text, but 1 images" for row in (3, 4, 5, 6)]
    assert [str(error)[: len(one)] for error, one in zip(result.bad, messages, strict=True)] == messages
    table = {"conversations": [json.dumps(turns("Hi", "Hi"))] * 2, "image_bytes": [[stand_in] * 2, [stand_in, held[3]]]}
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    assert survey(file, limited).images == {0: 1}


def test_rows_of_a_table_are_named_across_its_row_groups(folder, limited):
    file = write_table(folder, [GOOD[0]] * 70 + [BAD["empty answer"][0]] + [GOOD[2]] * 30, row_group_size=40)
    result = survey(file, limited)
    assert result.usable == 100 and [str(error).split(":")[0] for error in result.bad] == [f"{file}, row 71"]
    assert [row.name for row in read_samples(write_table(folder, [GOOD[2]] * 45))][44] == f"{file}, row 45"


def test_a_row_group_is_never_whole_in_memory(folder):
    images = [random.Random(i).randbytes(20_000) for i in range(800)]
    table = {"conversations": [json.dumps(turns("<image>", "Hi"))] * 800, "image_bytes": images}
    file = folder / "one.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table), file, use_dictionary=False, write_batch_size=16)
    assert pyarrow.parquet.ParquetFile(file).num_row_groups == 1
    del table
    before, most = pyarrow.total_allocated_bytes(), 0
    for row, image in zip(read_samples(file), images, strict=True):
        most = max(most, pyarrow.total_allocated_bytes() - before)
        assert row.images == [image]
    assert most < file.stat().st_size / 3


def test_a_table_that_cannot_be_read_is_named_once(folder, limited):
    file = write_table(folder, [GOOD[0]] * 300, row_group_size=100, compression="none", use_dictionary=False)
    whole = file.read_bytes()
    for content in (whole[:-30], whole[: len(whole) // 2], b"", b"[1]"):
        file.write_bytes(content)
        result = survey(file, limited)
        assert result.usable == 0 and len(result.bad) == 1
        assert str(result.bad[0]).startswith(f"{file}: cut off, or not a Parquet file (")
    for column in ("conversations", "image_bytes"):
        others = {"conversations": ["[]"], "image_bytes": [b""]}
        del others[column]
        pyarrow.parquet.write_table(pyarrow.table(others), file)
        assert [str(error) for error in survey(file, limited).bad] == [
            f"{file}: there is no column '{column}' (only {next(iter(others))}); each row needs one"
        ]


def test_a_damaged_row_group_hides_no_other(folder, limited):
    file = write_table(folder, [GOOD[0]] * 300, row_group_size=100, compression="zstd")
    content = bytearray(file.read_bytes())
    column = pyarrow.parquet.ParquetFile(file).metadata.row_group(1).column(0)
    for i in range(column.total_compressed_size):
        content[column.dictionary_page_offset + i] ^= 0xFF
    file.write_bytes(content)
    result = survey(file, limited)
    assert result.usable == 200 and len(result.bad) == 1
    assert str(result.bad[0]).startswith(f"{file}, row group 2 (up to row 200): damaged (")


def test_a_tables_row_that_is_no_text_or_no_bytes_is_named(folder, limited):
    file = folder / "odd.parquet"
    texts = pyarrow.array([b'[{"role": "user", "content": "\xff"}]', json.dumps(turns("Hi", "Hi")).encode()])
    texts = pyarrow.StringArray.from_buffers(2, *texts.buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({"conversations": texts, "image_bytes": ["0.jpg", None]}), file)
    result = survey(file, limited)
    assert result.usable == 1 and str(result.bad[0]).startswith(f"{file}, row 1: its text is not UTF-8 (")
    pyarrow.parquet.write_table(
        pyarrow.table({"conversations": [turns("Hi", "Hi")] * 3, "image_bytes": ["0.jpg", "1.jpg", None]}), file
    )
    messages = [f'{file}, row {row}: "image_bytes" has str; it must be the bytes of image files' for row in (1, 2)]
    result = survey(file, limited)  # turns that are lists already are read, too
    assert result.usable == 1
    assert [str(error)[: len(one)] for error, one in zip(result.bad, messages, strict=True)] == messages


def test_a_folders_files_are_read_by_name_and_a_broken_one_hides_no_other(folder, limited):
    table = write_table(folder, GOOD).rename(folder / "b.parquet")
    broken = folder / "c.parquet"
    broken.write_bytes(table.read_bytes()[:100])
    first, last = (write(folder, [GOOD[0], "{"]).rename(folder / name) for name in ("a.jsonl", "d.jsonl"))
    (folder / "notes.json").write_text("{}")
    result = survey(folder, limited)
    assert result.usable == 1 + 3 + 1
    assert [str(error).split(":")[0] for error in result.bad] == [f"{first}, line 2", str(broken), f"{last}, line 2"]
    with pytest.raises(SampleError, match=r"no file in this folder ends in \.jsonl or \.parquet"):
        survey(folder / "..", limited)


def test_a_image_is_opened_only_where_that_is_asked_for(folder, limited):
    file = write(folder, [BAD["picture unreadable"][0]])
    assert survey(file, limited).bad == [] and len(survey(file, limited, decode=True).bad) == 1


def test_what_is_usable_is_counted(folder, limited):
    file = write(folder, GOOD)
    result = survey(file, limited)
    rendered = [limited.encode(row) for row in read_samples(file)]
    assert result.images == {0: 1, 1: 1, 2: 1} and result.languages == {"en": 2, "zh": 1}
    assert result.tokens == sum(len(one.input_ids) for one in rendered)
    assert result.supervised == sum(label != IGNORE_INDEX for one in rendered for label in one.labels)
    assert result.lengths == Counter(len(one.input_ids) // BIN for one in rendered)
    text = as_text(result)
    assert text.startswith("3 rows, all of them usable") and "0: 1, 1: 1, 2: 1" in text and "en: 2, zh: 1" in text
    assert sum(map(int, re.findall(r"to \d+ +(\d+)", text))) == 3


def test_an_array_that_ends_too_early_is_named(folder, limited):
    (folder / "llava.json").write_text('[{"conversations": []},', "utf-8")
    result = survey(folder / "llava.json", limited)
    assert result.usable == 0 and len(result.bad) == 1
    assert str(result.bad[0]).startswith(f"{folder / 'llava.json'}: not a JSON array (")


def test_an_answer_of_spaces_is_empty_and_a_column_may_not_be_there_twice(folder, limited):
    result = survey(write(folder, [{"conversations": turns("Hi", " \n")}, GOOD[2]]), limited)
    assert result.usable == 1 and "an assistant turn is empty" in str(result.bad[0])
    columns = [pyarrow.array(["[]"])] * 2 + [pyarrow.array([b""])]
    twice = pyarrow.table(columns, names=["conversations"] * 2 + ["image_bytes"])
    pyarrow.parquet.write_table(twice, folder / "twice.parquet")
    (problem,) = survey(folder / "twice.parquet", limited).bad
    assert str(problem) == f"{folder / 'twice.parquet'}: there are two columns 'conversations'; leave one of them"


@pytest.mark.parametrize("form", ["lines", "table"])
def test_memory_does_not_grow_with_the_rows(folder, limited, form):
    peaks = []
    for count in (200, 1200):
        rows = [GOOD[0]] * count
        file = write(folder, rows) if form == "lines" else write_table(folder, rows)
        gc.collect()
        tracemalloc.start()
        assert survey(file, limited).usable == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 300 * 1000  # that many bytes for each further row would be little for one kept


def test_nothing_is_divided_by_zero(folder, limited):
    assert as_text(survey(write(folder, [""]), limited)) == "0 rows, all of them usable"
    assert as_text(survey(write(folder, ["{"]), limited)) == "1 rows, 0 of them usable"
