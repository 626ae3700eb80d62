"""A store holds what the encoder says, in 16 bits, is whole or goes on, and serves only what it was made for."""

import errno
import json
import os
import pickle
import shutil
import signal
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rows import NOISE as ENTRIES
from rows import contents, different_images, noise_rows, with_noise, write, write_table
from training import in_a_child, kill_at, save_base, stage

from minivlm import cli
from minivlm.checkpoint import load_checkpoint, read_meta
from minivlm.data import features
from minivlm.data.dataset import open_dataset, write_dataset
from minivlm.data.features import ABOUT, DONE, FEATURES, IMAGES, FeatureError, FeatureStore, stored_precision
from minivlm.data.samples import SampleError
from minivlm.pipeline import train_on_dataset
from minivlm.runtime.files import FolderError

ENTRY = 4 * 16 * 2  # N * Dv * 2 bytes of the tiny model
FORMS = {"JSON lines": write, "Parquet": write_table}
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(features, "BATCH", 2)


@pytest.fixture
def folder(tmp_path) -> Path:
    return with_noise(tmp_path / "data")


@pytest.fixture
def make_dataset(folder, processor, tmp_path):
    """`make_dataset(form="JSON lines", rows=noise_rows(), name="dataset")`: a checked data set, opened."""

    def make(form: str = "JSON lines", rows: list[dict] | None = None, name: str = "dataset", decode: bool = True):
        write_dataset(tmp_path / name, FORMS[form](folder, rows or noise_rows()), processor, decode=decode)
        return open_dataset(tmp_path / name)

    return make


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def encoded(model) -> list[int]:
    counts = []
    model.vision.register_forward_hook(lambda _module, inputs, _output: counts.append(len(inputs[0])))
    return counts


# ---- what it holds


@pytest.mark.parametrize(("precision", "form"), list(zip(("fp32", "bf16"), FORMS, strict=True)))
def test_features_are_the_encoders_in_16_bits(out, make_dataset, model, processor, form, precision):
    dataset = make_dataset(form)
    store = FeatureStore.build(out, dataset, model, processor, precision)
    images = different_images(dataset)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        encoded = torch.cat([model.vision(processor.pixels(images[i : i + 2])) for i in range(0, ENTRIES, 2)])
    assert len(store) == len(images) == ENTRIES and stored_precision(out) == precision
    for plain, sample in zip(dataset, dataset.with_features(store), strict=True):
        assert sample == plain and plain.patch_features is None
        if not sample.images:
            assert sample.patch_features is None
        else:
            expected = encoded[[images.index(image) for image in sample.images]].to(torch.bfloat16)
            assert torch.equal(sample.patch_features, expected)


@pytest.mark.parametrize("form", FORMS)
def test_an_image_of_many_rows_is_encoded_once_and_the_size_is_printed_before(
    out, make_dataset, model, processor, encoded, capsys, form
):
    dataset = make_dataset(form)
    assert sum(len(sample.images) for sample in dataset) == 18
    FeatureStore.build(out, dataset, model, processor)
    assert encoded == [2, 2, 2, 2, 2]
    model.projector.weight.data += 1  # and the language model may change
    model.language_model.get_input_embeddings().weight.data += 1
    FeatureStore.build(out, dataset, model, processor)
    assert encoded == [2, 2, 2, 2, 2]
    printed = [line.partition(" to be written")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == [f"features of 10 images, 1,280 bytes, in {out}: {size} bytes" for size in ("1,280", "0")]
    assert (out / FEATURES).stat().st_size == ENTRIES * ENTRY


def test_features_stay_on_the_disk(out, make_dataset, model, processor, monkeypatch):
    """Entries of 5 MB: an image's features are read from the disk, and a pickled store is only its path."""
    dataset = make_dataset()
    about = FeatureStore.build(out, dataset, model, processor).about
    (out / ABOUT).write_text(json.dumps(about | {"tokens of an image": 256, "width": 10_000}))
    array = np.zeros((ENTRIES, 256, 10_000), "<i2")
    array[0] = torch.tensor(1.5, dtype=torch.bfloat16).view(torch.int16).item()
    (out / FEATURES).write_bytes(array)
    tracemalloc.start()
    held = dataset.with_features(FeatureStore(out))
    features = held[0].patch_features
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (features == 1.5).all() and features.shape == (1, 256, 10_000) and most < features.nbytes / 4
    packed = pickle.dumps(held)
    assert len(packed) < 20_000
    assert torch.equal(pickle.loads(packed)[0].patch_features, features)


# ---- training


@pytest.mark.parametrize(("name", "form"), list(zip(("pretrain", "sft"), FORMS, strict=True)))
def test_training_from_a_store_is_training_from_pixels_rounded(
    out, make_dataset, model, processor, tmp_path, form, name
):
    """The encoder sees each image once, in the first run; the second run makes the same weights from the disk."""
    folder = make_dataset(form).folder
    parent = save_base(tmp_path / "base", model, processor)
    if name == "sft":
        first, parent = parent, tmp_path / "parent"
        train_on_dataset(folder, stage("pretrain", steps=1), model, processor, first, parent, precision="fp32")
    small, counts = stage(name, steps=5, batch_size=6), []

    def losses(where: str, **options) -> list[float]:
        started = load_checkpoint(parent)[0]
        started.vision.register_forward_hook(lambda _module, inputs, _output: counts.append(len(inputs[0])))
        log = train_on_dataset(folder, small, started, processor, parent, tmp_path / where, precision="fp32", **options)
        return [entry["loss"] for entry in log]

    pixels = losses("pixels")
    counts.clear()
    stored = losses("stored", features=out)
    assert sum(counts) == ENTRIES and losses("again", features=out) == stored and sum(counts) == ENTRIES
    assert stored == pytest.approx(pixels, rel=0, abs=1e-2) and stored != pixels
    hashes = [read_meta(tmp_path / where)["hashes"] for where in ("stored", "again", "pixels")]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_store_keeps_its_precision_whatever_the_probe_finds(
    out, make_dataset, model, processor, tmp_path, monkeypatch
):
    dataset, base = make_dataset(), save_base(tmp_path / "base", model, processor)
    FeatureStore.build(out, dataset, model, processor, "bf16")
    monkeypatch.setattr("minivlm.pipeline.choose_precision", lambda _: "fp32")
    train_on_dataset(dataset.folder, stage("pretrain"), model, processor, base, tmp_path / "new", features=out)
    assert read_meta(tmp_path / "new")["precision"] == "bf16"


# ---- stopped and gone on with


@pytest.fixture
def whole_store(make_dataset, model, processor, tmp_path) -> dict[str, bytes]:
    FeatureStore.build(tmp_path / "undisturbed", make_dataset(), model, processor)
    return contents(tmp_path / "undisturbed")


@fork
@pytest.mark.parametrize(
    ("name", "at", "done"),
    [
        ("_create", 1, None),
        ("write_json", 1, None),
        ("encode", 1, 0),
        ("encode", 3, 2),
        ("_overwrite", 2, 0),
        ("_overwrite", 5, 2),
    ],
)
def test_killed_while_building(out, make_dataset, model, processor, whole_store, monkeypatch, encoded, name, at, done):
    """Before and while the folder is made, before a batch, between its features and its mark, and amid the build."""
    dataset = make_dataset()

    def build_and_die():
        monkeypatch.setattr(features, name, kill_at(getattr(features, name), at))
        FeatureStore.build(out, dataset, model, processor)

    assert in_a_child(build_and_die) == -signal.SIGKILL
    assert out.exists() == (done is not None)
    if done is not None:
        assert FeatureStore(out).missing() == list(range(done, 5))
    encoded.clear()
    FeatureStore.build(out, dataset, model, processor)
    assert len(encoded) == 5 - (done or 0) and contents(out) == whole_store
    assert {path.name for path in out.parent.iterdir()} == {"data", "dataset", "store", "undisturbed"}


@pytest.mark.parametrize("at", [1, 2, 7])
def test_a_full_disk_is_reported_and_what_is_finished_is_kept(
    out, make_dataset, model, processor, whole_store, monkeypatch, at
):
    """At the features of a batch, at its mark, and three batches later."""
    dataset, write, calls = make_dataset(), features._overwrite, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"written to .*store \(No space.*is kept, and"):
        patch.setattr(features, "_overwrite", full)
        FeatureStore.build(out, dataset, model, processor)
    assert FeatureStore(out).missing() == list(range((at - 1) // 2, 5))
    FeatureStore.build(out, dataset, model, processor)
    assert contents(out) == whole_store


def test_too_small_a_disk_is_refused_before_anything_is_encoded(
    out, make_dataset, model, processor, monkeypatch, encoded
):
    dataset, needed = make_dataset(), ENTRIES * ENTRY
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(FeatureError, match=rf"{needed:,} bytes of features .* has {needed - 1:,} bytes left"):
        FeatureStore.build(out, dataset, model, processor)
    assert encoded == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    FeatureStore.build(out, dataset, model, processor)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    FeatureStore.build(out, dataset, model, processor)  # what is there needs no room


def test_an_unreadable_image_names_its_row(out, make_dataset, model, processor):
    dataset = make_dataset(decode=False)
    bad = different_images(dataset)[5]
    bad.write_bytes(bytes(bad.stat().st_size))
    name = next(sample.name for sample in dataset if bad in sample.images)
    with pytest.raises(SampleError, match=rf"train\.jsonl, line \d+: .*{bad.name}.*not a") as refused:
        FeatureStore.build(out, dataset, model, processor)
    assert str(refused.value).startswith(f"{name}: ") and FeatureStore(out).missing() == [2, 3, 4]


# ---- refused


def refused(out, arguments, message: str) -> None:
    """A build ends with the complaint; every file is as it was."""
    before = contents(out)
    with pytest.raises(FeatureError, match=message):
        FeatureStore.build(out, *arguments)
    assert contents(out) == before


def test_features_of_something_else_are_refused(out, make_dataset, model, make_model, processor, monkeypatch):
    dataset = make_dataset()
    store = FeatureStore.build(out, dataset, model, processor)
    other = make_dataset(rows=noise_rows()[:12], name="other")
    refused(out, (dataset, make_model(seed=1), processor), r"another encoder \(\w+, not \w+\); remove the folder")
    refused(out, (dataset, model, processor, "bf16"), r"another precision \(fp32, not bf16\)")
    refused(out, (other, model, processor), "another data set")
    with pytest.raises(FeatureError, match="another data set"):
        other.with_features(store)
    with monkeypatch.context() as patch:
        patch.setattr(processor.image_processor, "image_mean", [0.5, 0.5, 0.5])
        refused(out, (dataset, model, processor), "another preprocessing;")


def test_a_changed_or_missing_image_is_refused(out, make_dataset, model, processor):
    """Changed in time, in size, and gone; also when it happens after the store was opened."""
    dataset = make_dataset()
    held = dataset.with_features(FeatureStore.build(out, dataset, model, processor))
    image = held[3].images[0]
    state, content = image.stat(), image.read_bytes()

    def both_refuse(message: str):
        refused(out, (dataset, model, processor), rf"train\.jsonl, line \d+: the image {image} {message}")
        with pytest.raises(FeatureError, match=rf"line 4: the image {image} {message}"):
            held[3]

    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000_000))
    both_refuse("was changed")
    image.write_bytes(content + b"\0")
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
    both_refuse("was changed")
    image.unlink()
    both_refuse("is missing")
    image.write_bytes(content)
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert held[3].patch_features.shape == (1, 4, 16)


def test_damaged_files_are_refused(out, make_dataset, model, processor):
    dataset = make_dataset()
    FeatureStore.build(out, dataset, model, processor)
    whole = contents(out)
    changed = bytearray(whole[IMAGES])
    changed[-1] ^= 1
    for name, content, message in [
        (ABOUT, whole[ABOUT][:-10], "cut off or damaged"),
        (ABOUT, whole[ABOUT].replace(b'"format": 2', b'"format": 1'), "not of format 2"),
        (ABOUT, whole[ABOUT].replace(b'"width"', b'"wide"'), "width is missing"),
        (IMAGES, whole[IMAGES][:-1], "missing, cut off or changed"),
        (IMAGES, bytes(changed), "missing, cut off or changed"),
        (IMAGES, None, "missing, cut off or changed"),
        (FEATURES, whole[FEATURES][:-1], "its size is not 1,280 bytes"),
        (FEATURES, None, "missing, or its size is not"),
        (DONE, b"", "its size is not 5 bytes"),
    ]:
        (out / name).unlink() if content is None else (out / name).write_bytes(content)
        refused(out, (dataset, model, processor), rf"{name}: .*{message}.*remove the folder")
        (out / name).write_bytes(whole[name])


def test_other_folders_are_refused(out, folder, make_dataset, model, processor, tmp_path):
    dataset, base = make_dataset(), save_base(tmp_path / "base", model, processor)
    assert stored_precision(out) is None
    for path, kind in ((folder, FolderError), (folder / "0.png", FolderError), (dataset.folder / "new", FeatureError)):
        with pytest.raises(kind, match=r"exists and is no store of features|lies in the data set"):
            FeatureStore.build(path, dataset, model, processor)
    new = tmp_path / "new"
    with pytest.raises(FeatureError, match=r"lies in .*new, which every checkpoint replaces"):
        train_on_dataset(dataset.folder, stage("pretrain"), model, processor, base, new, new / "features")
    assert not new.exists() and not (dataset.folder / "new").exists() and len(list(folder.iterdir())) == ENTRIES + 1
    out.mkdir()
    FeatureStore.build(out, dataset, model, processor)  # an empty folder will do


def test_samples_without_images_need_no_store(out, make_dataset, model, processor):
    dataset = make_dataset(rows=[row for row in noise_rows() if "image" not in row])
    with pytest.raises(FeatureError, match="no sample has an image, so there are no features; train without"):
        FeatureStore.build(out, dataset, model, processor)
    assert not out.exists()


# ---- the command


def test_train_as_a_command(out, make_dataset, model, make_model, processor, tmp_path, capsys):
    base, other = save_base(tmp_path / "a", model, processor), save_base(tmp_path / "b", make_model(seed=1), processor)
    options = ["--rows", make_dataset().folder, "--recipe", "scenes", "--steps", 3, "--batch-size", 6]
    options += ["--precision", "fp32", "--features", out, "--out", tmp_path / "new", "--parent"]
    assert cli.main(["train", "pretrain", *map(str, (*options, base))]) == 0
    assert f"features of 10 images, 1,280 bytes, in {out}: 1,280 bytes to be written" in capsys.readouterr().out
    assert cli.main(["train", "pretrain", *map(str, (*options, other))]) == 2
    assert "features are of another encoder" in capsys.readouterr().err
