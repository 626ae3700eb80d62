"""An index holds what was read, is whole or not there, and training on it never ends at a row."""

import errno
import json
import os
import pickle
import signal
from pathlib import Path

import pyarrow
import pytest
from rows import BAD, FORMS, GOOD, contents, with_images, write, write_table
from training import in_a_child, kill_at, save_base, stage

from minivlm import cli
from minivlm.checkpoint import read_meta
from minivlm.config import STAGES, clip_26m_config, scenes_config
from minivlm.data import Sample, samples
from minivlm.data import dataset as index
from minivlm.data.dataset import ABOUT, ROWS, DatasetError, open_dataset, write_dataset
from minivlm.data.readers import read_samples
from minivlm.data.survey import survey
from minivlm.pipeline import recipe_for, sized_stage, train_on_dataset
from minivlm.train import SampleOrder, Trainer, TrainingError

MIXED = [GOOD[i % 3] for i in range(15)]  # one image, two images and none by turns


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return with_images(tmp_path / "data")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "index"


@pytest.mark.parametrize(("form", "batch"), list(zip(FORMS, (1, 2, 256), strict=True)))
def test_an_index_holds_the_usable_rows_as_they_are_read(folder, out, processor, form, batch, monkeypatch):
    monkeypatch.setattr(index, "BATCH_ROWS", batch)
    file = FORMS[form][0](folder, [GOOD[0], BAD["empty answer"][0], GOOD[1], BAD["picture unreadable"][0], GOOD[2]])
    result = write_dataset(out, file, processor, decode=True)
    direct, rows = survey(file, processor, decode=True), open_dataset(out)
    assert [str(error) for error in result.bad] == [str(error) for error in direct.bad] and len(result.bad) == 2
    assert (result.usable, result.tokens, result.lengths) == (direct.usable, direct.tokens, direct.lengths)
    expected = list(read_samples(FORMS[form][0](folder, GOOD)))
    assert len(rows) == 3
    assert [(row.messages, row.images) for row in rows] == [(row.messages, row.images) for row in expected]
    assert [int(row.name.split()[-1]) for row in rows] == [1, 3, 5]
    assert rows.table["tokens"][:] == [len(processor.encode(row).input_ids) for row in expected]
    for outside in (3, -1):
        with pytest.raises(IndexError):
            rows[outside]


def test_rows_are_validated_when_they_are_written_and_not_when_they_are_read_back(folder, out, processor, monkeypatch):
    write_dataset(out, FORMS["JSON lines"][0](folder, GOOD), processor, decode=True)
    rows, calls, check = open_dataset(out), [], samples.check_messages
    monkeypatch.setattr(samples, "check_messages", lambda *args: calls.append(args) or check(*args))
    assert len([row.messages for row in rows]) == 3 and calls == []
    Sample([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert len(calls) == 1


def test_a_source_that_cannot_be_read_is_not_called_a_failed_write(folder, tmp_path, processor, monkeypatch):
    file = FORMS["JSON lines"][0](folder, GOOD)

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(index, "checked_samples", refused)
    with pytest.raises(PermissionError) as error_info:
        write_dataset(tmp_path / "elsewhere" / "index", file, processor)
    assert error_info.value.filename == str(file) and "cannot be written" not in str(error_info.value)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_stands_beside_the_rows(folder, out, model, processor):
    file = write(folder, [*GOOD, BAD["not JSON"][0]])
    write_dataset(out, file, processor, decode=True)
    about = json.loads((out / ABOUT).read_text("utf-8"))
    assert {path.name for path in out.iterdir()} == {ROWS, ABOUT}
    assert about["format"] == 1 and about["source"] == str(file) and about["decoded"] is True
    assert about["usable"] == 3 and about["bad"] == 1 and about["images"] == {"0": 1, "1": 1, "2": 1}
    save_base(out.with_name("base"), model, processor)
    assert about["tokenizer"] == read_meta(out.with_name("base"))["hashes"]["tokenizer"]
    assert about["versions"]["pyarrow"] == pyarrow.__version__
    assert about["token_limit"] == processor.tokenizer.model_max_length and about["tokens_a_picture"] == 4


def test_the_rows_stay_on_the_disk(folder, out, processor):
    """The library's table is a memory map of the one file; a pickled index is its path, not its rows."""
    write_dataset(out, write_table(folder, MIXED), processor)
    allocated = pyarrow.total_allocated_bytes()
    rows = open_dataset(out)
    assert [Path(file["filename"]) for file in rows.table.cache_files] == [out / ROWS]
    assert type(rows.table.data).__name__ == "MemoryMappedTable"
    assert pyarrow.total_allocated_bytes() - allocated < (out / ROWS).stat().st_size / 2
    packed = pickle.dumps(rows)
    again = pickle.loads(packed)
    assert GOOD[0]["conversations"][0]["content"].encode() not in packed
    assert [row.images for row in again] == [row.images for row in rows]


def test_relative_paths_are_kept_in_full(folder, out, processor, monkeypatch):
    write(folder, GOOD)
    monkeypatch.chdir(folder)
    write_dataset(out, "train.jsonl", processor)
    monkeypatch.chdir(folder.parent)
    assert [row.images for row in open_dataset(out)] == [[folder / "0.jpg"], [folder / "0.jpg", folder / "1.jpg"], []]


# ---- whole or not there


@pytest.mark.parametrize("broken", ["_write", "add"])
def test_a_full_disk_leaves_what_was_there(folder, out, processor, monkeypatch, broken):
    """Nothing, or the index of before."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = write(folder, GOOD)
    for names in ({"data"}, {"data", "index"}):
        before = contents(out) if out.exists() else None
        with monkeypatch.context() as patch, pytest.raises(OSError, match=r"index cannot be written \(.*No space left"):
            patch.setattr(index._Writer, broken, full)
            write_dataset(out, file, processor)
        assert {path.name for path in out.parent.iterdir()} == names and before == (contents(out) if before else None)
        write_dataset(out, file, processor)
    assert len(open_dataset(out)) == 3 and {path.name for path in out.parent.iterdir()} == {"data", "index"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("owner", "name", "at"), [(index._Writer, "add", 2), (Path, "rename", 2)])
def test_killed_while_writing(folder, out, processor, monkeypatch, owner, name, at):
    """At a row, and between the two renames."""
    write_dataset(out, write(folder, GOOD), processor)

    def write_and_die():
        monkeypatch.setattr(owner, name, kill_at(getattr(owner, name), at))
        write_dataset(out, write(folder, GOOD[:2]), processor)

    assert in_a_child(write_and_die) == -signal.SIGKILL
    assert len(open_dataset(out)) == 3
    monkeypatch.undo()
    write_dataset(out, write(folder, GOOD[:2]), processor)
    assert len(open_dataset(out)) == 2 and {path.name for path in out.parent.iterdir()} == {"data", "index"}


def test_a_folder_of_other_things_is_refused(folder, out, processor, monkeypatch):
    file = write(folder, GOOD)
    out.mkdir()
    write_dataset(out, file, processor)  # an empty folder will do
    (folder.parent / "thesis").mkdir()
    (folder.parent / "thesis" / "chapter.txt").write_text("years of work")
    monkeypatch.chdir(folder)
    for path, message in [
        (folder.parent / "thesis", "exists and is no data set"),
        (file, "holds the rows or images that are to be checked"),
        (folder, "holds the rows or images that are to be checked"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_dataset(path, file, processor)
    elsewhere = write(folder.parent, GOOD)
    with pytest.raises(DatasetError, match="holds the rows or images"):
        write_dataset(folder, elsewhere, processor, images=folder)
    assert (folder.parent / "thesis" / "chapter.txt").read_text() == "years of work" and file.is_file()


# ---- refused


def test_no_index_another_format_and_damaged_files_are_refused(folder, out, processor):
    with pytest.raises(DatasetError, match=r"index.json is missing.*minivlm data check PATH --out DATASET"):
        open_dataset(out)
    write_dataset(out, write(folder, GOOD), processor)
    about, rows = (out / ABOUT).read_text("utf-8"), (out / ROWS).read_bytes()
    flipped = bytearray(rows)
    flipped[len(rows) // 2] ^= 1
    for content in (rows[:-8], bytes(flipped), b"", None):
        (out / ROWS).unlink() if content is None else (out / ROWS).write_bytes(content)
        with pytest.raises(DatasetError, match=r"rows\.arrow: missing, cut off or changed since it was written"):
            open_dataset(out)
    (out / ROWS).write_bytes(rows)
    for text, message in [
        (about[:-10], "cut off or damaged"),
        (about.replace('"format": 1', '"format": 2'), "not of format 1"),
        ("[]", "not of format 1"),
        ('{"format": 1, "rows": {}, "decoded": true}', "tokenizer, token_limit, tokens_a_picture is missing"),
    ]:
        (out / ABOUT).write_text(text, "utf-8")
        with pytest.raises(DatasetError, match=rf"index\.json: .*{message}"):
            open_dataset(out)


def test_an_index_on_which_training_could_end_at_a_row_is_refused(folder, out, processor, monkeypatch):
    file = write(folder, GOOD)
    write_dataset(out, file, processor)
    with pytest.raises(DatasetError, match=r"never opened.*--decode"):
        open_dataset(out).require_trainable(processor)
    write_dataset(out, file, processor, decode=True)
    rows = open_dataset(out)
    rows.require_trainable(processor)
    for owner, name, value, message in [
        (processor.tokenizer, "model_max_length", 100, "another token limit than the model's"),
        (processor, "num_image_tokens", 9, r"tokens of an image .*\(4, not 9\)"),
        (index, "hash_tokenizer", lambda _: "another", "another tokenizer than the model's"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(DatasetError, match=message):
            patch.setattr(owner, name, value)
            rows.require_trainable(processor)
    image = (folder / "1.jpg").read_bytes()
    (folder / "1.jpg").write_bytes(image[:-1])
    with pytest.raises(DatasetError, match=rf"line 2: the image {folder / '1.jpg'} has {len(image) - 1:,} bytes"):
        rows.require_trainable(processor)
    (folder / "1.jpg").unlink()
    with pytest.raises(DatasetError, match=rf"line 2: the image {folder / '1.jpg'} is missing"):
        rows.require_trainable(processor)


# ---- training


@pytest.mark.parametrize("form", ["JSON lines", "Parquet"])  # files of images, and their bytes
def test_training_on_an_index_is_training_on_its_rows(folder, out, model, make_model, processor, tmp_path, form):
    """Rows with one image, two and none in every step, over more than a whole epoch; the bad rows are not met."""
    bad = [BAD[name][0] for name in BAD if name not in FORMS[form][2] and name != "too long"]
    base = save_base(tmp_path / "base", model, processor)
    write_dataset(out, FORMS[form][0](folder, [*bad[:5], *MIXED, *bad[5:]]), processor, decode=True)
    rows, small = list(read_samples(FORMS[form][0](folder, MIXED))), stage("pretrain", steps=3, batch_size=12)
    checked = open_dataset(out)
    order = SampleOrder(checked, processor, small.batch_size, seed=0)
    steps = [order[step] for step in range(small.steps)]
    assert all({len(row.images) for row in step} == {0, 1, 2} for step in steps)
    assert {row.name for step in steps for row in step} == {row.name for row in checked} and len(checked) == 15
    options = {"parent": base, "precision": "fp32"}
    indexed = train_on_dataset(out, small, make_model(), processor, out=tmp_path / "a", **options)
    direct = Trainer(model, processor, rows, small, tmp_path / "b", **options).fit()
    assert [entry["loss"] for entry in indexed] == [entry["loss"] for entry in direct] and len(indexed) == 3

    def stop(done, *_):
        if done == 1:  # the step after it is still finished
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_on_dataset(out, small, make_model(), processor, out=tmp_path / "c", on_step=stop, **options)
    assert read_meta(tmp_path / "c")["steps"] == 2
    goes_on = train_on_dataset(out, small, make_model(), processor, out=tmp_path / "c", **options)
    assert [entry["loss"] for entry in goes_on] == [entry["loss"] for entry in indexed]
    hashes = [read_meta(tmp_path / name)["hashes"] for name in "abc"]
    assert hashes[0] == hashes[1] == hashes[2]


def test_an_unchecked_or_empty_index_is_refused_before_the_first_step(folder, out, model, processor, tmp_path):
    options = {"parent": save_base(tmp_path / "base", model, processor), "precision": "fp32"}
    write_dataset(out, write(folder, MIXED), processor)
    with pytest.raises(DatasetError, match="--decode"):
        train_on_dataset(out, stage("pretrain"), model, processor, out=tmp_path / "new", **options)
    assert (
        len(write_dataset(out, write(folder, ["{"]), processor, decode=True).bad) == 1 and len(open_dataset(out)) == 0
    )
    with pytest.raises(TrainingError, match="there are no samples to train on"):
        train_on_dataset(out, stage("pretrain"), model, processor, out=tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


# ---- the commands


def run_command(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_check_and_train_as_commands(folder, out, model, processor, tmp_path, capsys):
    base = save_base(tmp_path / "base", model, processor)
    file = write(folder, [*MIXED, BAD["empty answer"][0]])
    code, printed, errors = run_command(capsys, "data", "check", file, "--out", out, "--decode", "--model", base)
    assert code == 2 and f"The data set: {out}, 15 rows" in printed and f"{file}, line 16: " in errors
    assert "16 rows, 15 of them usable" in printed
    options = ("--parent", base, "--out", tmp_path / "new", "--precision", "fp32")
    sizes = ("--recipe", "scenes", "--steps", 3, "--batch-size", 2, "--accumulation", 2)
    assert run_command(capsys, "train", "pretrain", "--rows", out, *options, *sizes)[0] == 0
    recipe = read_meta(tmp_path / "new")["recipe"]
    usual = STAGES["scenes"]["pretrain"]
    assert [recipe[key] for key in ("steps", "batch_size", "accumulation", "warmup_steps")] == [3, 2, 2, 1]
    assert recipe["learning_rates"] == usual.learning_rates and read_meta(tmp_path / "new")["rows"]["count"] == 15
    code, _, errors = run_command(capsys, "train", "pretrain", "--rows", out, "--parent", base, "--out", tmp_path / "x")
    assert code == 2 and "say by --recipe" in errors
    (tmp_path / "elsewhere").mkdir()
    assert run_command(capsys, "data", "check", write(tmp_path / "elsewhere", GOOD), "--images", folder)[0] == 0
    code, _, errors = run_command(capsys, "train", "pretrain", "--rows", folder, *options, *sizes)
    assert code == 2 and "is missing, so there is nothing to open here" in errors


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("train pretrain --rows x", "--pictures 9"),
        ("train pretrain --rows x", "--scale 2"),
        ("train pretrain", "--recipe scenes"),
        ("train pretrain", "--features x"),
        ("train pretrain", "--steps 3"),
        ("train pretrain", "--batch-size 3"),
        ("train pretrain", "--accumulation 3"),
        ("data sheet x.png", "--images x"),
        ("data table x", "--decode"),
        ("data table x", "--out x"),
        ("data sheet x.png", "--model x"),
    ],
)
def test_options_that_do_not_apply_are_refused(command, option, capsys):
    code, _, errors = run_command(capsys, *command.split(), *option.split())
    assert code == 2 and errors.startswith(f"minivlm: {option.split()[0]} is for ") and "leave it out" in errors


def test_the_recipe_is_that_of_the_models_widths(config):
    assert recipe_for(scenes_config(500)) == "scenes" and recipe_for(clip_26m_config()) == "clip-26m"
    with pytest.raises(ValueError, match=r"widths, 16 and 24, are those of no preset; say by --recipe"):
        recipe_for(config)
    assert sized_stage("clip-26m", "sft") == STAGES["clip-26m"]["sft"]
    short = sized_stage("clip-26m", "sft", steps=10, batch_size=None)
    assert (short.steps, short.warmup_steps, short.batch_size) == (10, 5, 32)
