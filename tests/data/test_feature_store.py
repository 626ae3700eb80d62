"""A store holds what the encoder says, in 16 bits, is whole or says so, and serves only what it was made for."""

import errno
import json
import os
import pickle
import shutil
import signal
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rows import turns, write, write_table
from training import deadly, in_a_child, save_base, stage

from minivlm import cli
from minivlm.checkpoint import load_checkpoint, read_meta
from minivlm.data import feature_store
from minivlm.data.dataset import read_index, write_index
from minivlm.data.feature_store import (
    ABOUT,
    TABLE,
    FeatureStore,
    FeatureStoreError,
    Worth,
    build_store,
    estimate,
    fill,
    open_store,
    plan_store,
    stored_precision,
    worth,
)
from minivlm.data.features import FeatureCache
from minivlm.pipeline import train_on_index
from minivlm.processor import SampleError
from minivlm.train import train

PICTURES = 10
A_PICTURE = 4 * 16 * 2  # N * Dv * 2 bytes of the tiny model
SHARDS = {"shard-00000.bin": 4, "shard-00001.bin": 4, "shard-00002.bin": 2}  # pictures in each
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Batches of two pictures, shards of four."""
    patch.setattr(feature_store, "BATCH", 2)
    patch.setattr(feature_store, "SHARD_BYTES", 5 * A_PICTURE)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """So in every test here."""
    make_small(monkeypatch)


def with_noise(folder: Path) -> Path:
    """Ten pictures of noise, none like another, in a new folder."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(PICTURES):
        Image.fromarray(random.integers(0, 256, (12, 10, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten pictures of noise."""
    return with_noise(tmp_path / "data")


def some_rows() -> list[dict]:
    """One picture, two, and none by turns: all ten of them in eighteen places, the last one first."""
    rows = []
    for i in range(18):
        turn = i // 3
        shown = [[9 - turn], [turn, (2 * turn + 1) % 10], []][i % 3]
        asked = {"conversations": turns("<image>\n" * len(shown) + "What is in this picture?", f"a red car, {i}")}
        rows.append(asked | ({"image": ", ".join(f"{number}.png" for number in shown)} if shown else {}))
    return rows


def table_of(folder: Path, rows: list[dict]) -> Path:
    """The same rows with their pictures' bytes in a Parquet table."""
    return write_table(folder, rows)


FORMS = {"JSON lines": write, "Parquet": table_of}


@pytest.fixture
def make_index(folder, processor, tmp_path):
    """`make_index(form="JSON lines", rows=some_rows(), name="index")`: a checked index, opened."""

    def make(form: str = "JSON lines", rows: list[dict] | None = None, name: str = "index", decode: bool = True):
        write_index(tmp_path / name, FORMS[form](folder, rows or some_rows()), processor, decode=decode)
        return read_index(tmp_path / name)

    return make


@pytest.fixture
def out(tmp_path) -> Path:
    """Where the store shall lie."""
    return tmp_path / "store"


@pytest.fixture
def encoded(model) -> list[int]:
    """How many pictures the encoder looked at, time after time."""
    counts = []
    model.vision.register_forward_hook(lambda _module, given, _made: counts.append(len(given[0])))
    return counts


def contents(folder: Path) -> dict[str, bytes]:
    """Every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shown_first(rows) -> list:
    """Each different picture once, in the order of the rows; found by their files' bytes."""
    seen = {}
    for row in rows:
        for picture in row.images:
            seen.setdefault(picture if isinstance(picture, bytes) else picture.read_bytes(), picture)
    return list(seen.values())


# ---- what it holds


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_the_encoders_in_16_bits(out, make_index, model, processor, form, precision):
    rows = make_index(form)
    store = build_store(out, rows, model, processor, precision)
    pictures = shown_first(rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        seen = torch.cat([model.vision(processor.pixels(pictures[i : i + 2])) for i in range(0, PICTURES, 2)])
    assert len(store) == len(pictures) == PICTURES and stored_precision(out) == precision
    assert torch.equal(store[pictures], seen.to(torch.bfloat16))
    for row in rows:
        places = [pictures.index(picture) for picture in row.images]
        assert torch.equal(store[row.images], seen[places].to(torch.bfloat16))
    assert store[[]].shape == (0, 4, 16)


@pytest.mark.parametrize("form", FORMS)
def test_the_size_told_before_is_the_size_on_the_disk(out, make_index, model, processor, form):
    rows = make_index(form)
    plan = plan_store(out, rows, model, processor)
    assert not out.exists()
    fill(plan, rows, model, processor)
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    assert sizes.keys() == {ABOUT, TABLE, *SHARDS}
    assert {name: sizes[name] for name in SHARDS} == {name: count * A_PICTURE for name, count in SHARDS.items()}
    assert estimate(rows, model) == plan.bytes == PICTURES * A_PICTURE == sum(sizes[name] for name in SHARDS)


def test_the_size_for_the_seed_is_that_of_the_issue(out, make_index, model, processor):
    """595,376 pictures of 196 tokens and 768 numbers."""
    plan = plan_store(out, make_index(), model, processor)
    about = plan.about | {"tokens_a_picture": 196, "width": 768, "pictures": 595_376, "pictures_a_shard": 384}
    large = feature_store.StorePlan(out, about, plan.table)
    assert large.bytes == sum(large.shard_bytes) == 595_376 * 196 * 768 * 2 == 179_241_517_056
    assert str(large) == f"features of 595,376 pictures, 179.2 GB, in {out}: 0 of 1,551 parts are there"


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_of_many_rows_is_encoded_once(out, make_index, model, processor, encoded, form):
    rows = make_index(form)
    assert sum(len(row.images) for row in rows) == 18
    build_store(out, rows, model, processor)
    assert encoded == [2, 2, 2, 2, 2]
    build_store(out, rows, model, processor)
    assert encoded == [2, 2, 2, 2, 2]


def test_features_stay_on_the_disk(out, make_index, model, processor):
    """A store whose one shard has 52 MB: a picture is read out of it, and pickled it is its path."""
    rows = make_index()
    about = build_store(out, rows, model, processor).about
    about |= {"tokens_a_picture": 256, "width": 10_000, "pictures_a_shard": PICTURES}
    shard = np.zeros((PICTURES, 256, 10_000), "<i2")
    shard[0] = torch.tensor(1.5, dtype=torch.bfloat16).view(torch.int16).item()
    (out / "shard-00000.bin").write_bytes(shard)
    store, first = FeatureStore(out, about), shown_first(rows)[0]
    tracemalloc.start()
    found = store[[first]]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found == 1.5).all() and found.shape == (1, 256, 10_000)
    assert most < 2 * found.nbytes < shard.nbytes / 4
    packed = pickle.dumps(store)
    assert len(packed) < 2000
    assert torch.equal(pickle.loads(packed)[[first]], found)


def test_workers_of_a_loader_read_it(out, make_index, model, processor):
    rows = make_index()
    store, pictures = build_store(out, rows, model, processor), shown_first(rows)
    loader = torch.utils.data.DataLoader(
        Features(store, pictures), batch_size=4, num_workers=1, multiprocessing_context="spawn"
    )
    assert torch.equal(torch.cat(list(loader)), store[pictures])


class Features(torch.utils.data.Dataset):
    """A store's pictures one by one, as a loader asks for them."""

    def __init__(self, store: FeatureStore, pictures: list[Path]):
        self.store, self.pictures = store, pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: int) -> torch.Tensor:
        return self.store[[self.pictures[place]]][0]


# ---- training


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_training_from_a_store_is_training_from_pixels_rounded(
    out, make_index, make_model, processor, tmp_path, form, name
):
    rows, model = make_index(form), make_model()
    base = parent = save_base(tmp_path / "base", model, processor)
    small = stage(name, steps=5, batch_size=6)
    if name == "sft":
        parent = tmp_path / "parent"
        train(make_model(), processor, rows, stage("pretrain", steps=1), parent, parent=base, precision="fp32")
        model.projector.load_state_dict(load_checkpoint(parent)[0].projector.state_dict())
    given = {"parent": parent, "precision": "fp32"}

    def learnt(where: str, **options) -> list[float]:
        started = load_checkpoint(parent)[0]
        log = train_on_index(rows.folder, small, started, processor, out=tmp_path / where, **given, **options)
        return [entry["loss"] for entry in log]

    pixels, stored = learnt("pixels"), learnt("stored", features=out, build_features=True)
    pictures = shown_first(rows)
    seen = torch.cat([model.vision(processor.pixels(pictures[i : i + 2])) for i in range(0, PICTURES, 2)])
    cache = FeatureCache(seen.to(torch.bfloat16), pictures)
    held = train(load_checkpoint(parent)[0], processor, rows, small, tmp_path / "held", features=cache, **given)
    assert stored == [entry["loss"] for entry in held]
    assert stored == pytest.approx(pixels, rel=0, abs=1e-2) and stored != pixels
    hashes = [read_meta(tmp_path / where)["hashes"] for where in ("stored", "held", "pixels")]
    assert hashes[0] == hashes[1] != hashes[2]


def test_steps_do_not_encode_again(out, make_index, model, processor, tmp_path, encoded):
    base = save_base(tmp_path / "base", model, processor)
    options = {"parent": base, "features": out, "build_features": True, "precision": "fp32"}
    train_on_index(make_index().folder, stage("pretrain"), model, processor, out=tmp_path / "a", **options)
    built = sum(encoded)
    assert built == 2 * PICTURES  # once to measure, as all of them are in the sample, and once for the store
    train_on_index(make_index().folder, stage("pretrain"), model, processor, out=tmp_path / "a", **options)
    assert sum(encoded) == built


@pytest.mark.parametrize(
    ("seconds", "free", "built"), [((0.1, 0.0), 10**9, True), ((0.0, 0.1), 10**9, False), ((0.1, 0.0), 0, False)]
)
def test_a_store_is_built_where_it_wins_and_fits_and_used_wherever_it_is_there(
    out, make_index, model, processor, tmp_path, monkeypatch, capsys, encoded, seconds, free, built
):
    """Two epochs; seconds to encode a picture and to read its features."""
    rows, base = make_index(), save_base(tmp_path / "base", model, processor)
    small = stage("pretrain", steps=2 * -(-len(rows) // 6), batch_size=6)

    def measured(plan, rows, model, processor, epochs):
        assert 1.9 < epochs < 2.7
        return Worth(seconds[0], 0.0, seconds[1], PICTURES, PICTURES, epochs, plan.bytes, free)

    def run(where, **options):
        options |= {"features": out, "precision": "fp32"}
        model.load_state_dict(load_checkpoint(base)[0].state_dict())
        train_on_index(rows.folder, small, model, processor, base, tmp_path / where, **options)
        return capsys.readouterr().out

    monkeypatch.setattr("minivlm.pipeline.worth", measured)
    said = run("first")
    assert out.exists() == built and ("It is not built: every step encodes its pictures." in said) != built
    assert (sum(encoded) == PICTURES) == built
    assert "not built" not in run("second", build_features=True) and out.exists()
    before = sum(encoded)
    assert "not built" not in run("third") and sum(encoded) == before


def test_a_store_keeps_its_precision_whatever_the_probe_finds(out, make_index, model, processor, tmp_path, monkeypatch):
    rows, base = make_index(), save_base(tmp_path / "base", model, processor)
    build_store(out, rows, model, processor, "bf16")
    monkeypatch.setattr("minivlm.pipeline.choose_precision", lambda _: "fp32")
    train_on_index(rows.folder, stage("pretrain"), model, processor, base, tmp_path / "new", features=out)
    assert read_meta(tmp_path / "new")["precision"] == "bf16"


# ---- whole or not there


@pytest.fixture
def undisturbed(make_index, model, processor, tmp_path) -> dict[str, bytes]:
    """The files of a build in one go."""
    build_store(tmp_path / "undisturbed", make_index(), model, processor)
    return contents(tmp_path / "undisturbed")


@fork
@pytest.mark.parametrize(
    ("owner", "name", "at", "there"),
    [
        (os, "fsync", 1, 0),
        (os, "fsync", 2, 0),
        (os, "fsync", 4, 1),
        *[(Path, "replace", at, max(0, at - 3)) for at in (1, 2, 3, 4, 5)],
        (feature_store, "encode", 1, 0),
        (feature_store, "encode", 3, 2),
        (feature_store, "_pixels", 4, 1),
        (feature_store, "_tidy", 1, 3),
    ],
)
def test_killed_while_building(
    out, make_index, model, processor, undisturbed, monkeypatch, encoded, owner, name, at, there
):
    """At the table, at what `store.json` says, before and after a shard, in the middle of one, and at the very end."""
    rows = read_index(make_index().folder)

    def build_and_die():
        monkeypatch.setattr(owner, name, deadly(getattr(owner, name), at))
        build_store(out, rows, model, processor)

    assert in_a_child(build_and_die) == -signal.SIGKILL
    shards = [path.name for path in sorted(out.glob("shard-*.bin"))]
    assert shards == list(SHARDS)[:there]
    if there < len(SHARDS):
        with pytest.raises(FeatureStoreError, match=r"not finished|there is no store of features here"):
            open_store(out, rows, model, processor)
    encoded.clear()
    build_store(out, rows, model, processor)
    assert sum(encoded) == PICTURES - sum(list(SHARDS.values())[:there])
    assert contents(out) == undisturbed


def test_only_files_that_a_builder_left_are_deleted(out, make_index, model, processor, undisturbed):
    out.mkdir()
    (out / f"shard-00001.bin.partial-{'0' * 32}").write_bytes(b"left")
    (out / "thesis.txt.partial-1").write_text("years of work")
    with pytest.raises(FeatureStoreError, match="exists and is no store of features"):
        build_store(out, make_index(), model, processor)
    (out / "thesis.txt.partial-1").rename(out.with_name("thesis"))
    plan = plan_store(out, make_index(), model, processor)
    out.with_name("thesis").rename(out / "thesis.txt.partial-1")
    feature_store.fill(plan, make_index(), model, processor)
    assert (out / "thesis.txt.partial-1").read_text() == "years of work"
    (out / "thesis.txt.partial-1").unlink()
    assert contents(out) == undisturbed


@fork
def test_two_builders_at_once_make_the_same_bytes(out, make_index, model, processor, undisturbed, monkeypatch):
    """They meet at the first shard, so that both make it, and each comes to the end."""
    rows = make_index()
    meeting, encode = out.with_name("meeting"), feature_store.encode
    meeting.mkdir()

    def met(*args, **options):
        (meeting / str(os.getpid())).touch()
        until = time.monotonic() + 60
        while len(list(meeting.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        return encode(*args, **options)

    monkeypatch.setattr(feature_store, "encode", met)
    children = []
    for _ in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                build_store(out, rows, model, processor)
                status = 0
            finally:
                os._exit(status)  # never back into pytest
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ends == [0, 0] and len(list(meeting.iterdir())) == 2
    assert contents(out) == undisturbed


def test_a_shard_that_another_builder_finished_is_not_made_again(
    out, make_index, model, processor, undisturbed, monkeypatch, encoded
):
    rows, encode = read_index(make_index().folder), feature_store.encode

    def overtaken(*args, **options):
        (out / "shard-00001.bin").write_bytes(undisturbed["shard-00001.bin"])
        return encode(*args, **options)

    encoded.clear()
    monkeypatch.setattr(feature_store, "encode", overtaken)
    build_store(out, rows, model, processor)
    assert encoded == [2, 2, 2] and contents(out) == undisturbed


def test_a_builder_whose_file_was_tidied_up_by_another_is_content(out, make_index, model, processor, monkeypatch):
    rows, replace = make_index(), Path.replace
    build_store(out, rows, model, processor)
    before = contents(out)
    (out / "shard-00001.bin").unlink()

    def late(aside, file):
        (out / "shard-00001.bin").write_bytes(before["shard-00001.bin"])  # the other one's
        aside.unlink()
        return replace(aside, file)

    monkeypatch.setattr(Path, "replace", late)
    build_store(out, rows, model, processor)
    assert contents(out) == before


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_full_disk_is_told_and_what_is_finished_is_kept(
    out, make_index, model, processor, undisturbed, monkeypatch, at
):
    rows, fsync, calls = read_index(make_index().folder), os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"not written to .*store .*No space.*is kept"):
        patch.setattr(os, "fsync", full)
        build_store(out, rows, model, processor)
    assert {path.name for path in out.iterdir()} == set([TABLE, ABOUT, *SHARDS][: at - 1])
    build_store(out, rows, model, processor)
    assert contents(out) == undisturbed


def test_too_small_a_disk_is_refused_before_anything_is_made(out, make_index, model, processor, monkeypatch, encoded):
    rows = make_index()
    needed = PICTURES * A_PICTURE + plan_store(out, rows, model, processor).table.nbytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(FeatureStoreError, match=rf"{needed:,} bytes of features .* has {needed - 1:,} bytes left"):
        build_store(out, rows, model, processor)
    assert encoded == [] and not out.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    build_store(out, rows, model, processor)
    (out / "shard-00002.bin").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 8 * A_PICTURE))
    build_store(out, rows, model, processor)  # what is there needs no room


def test_an_unreadable_picture_names_its_row(out, folder, make_index, model, processor):
    rows = make_index(decode=False)
    bad = shown_first(rows)[5]
    state = bad.stat()
    bad.write_bytes(bytes(state.st_size))
    where = next(row.where for row in rows if bad in row.images)
    with pytest.raises(SampleError, match=rf"train\.jsonl, line \d+: .*{bad.name}.*not a picture") as refused:
        build_store(out, rows, model, processor)
    assert str(refused.value).startswith(f"{where}: ")
    assert {path.name for path in out.iterdir()} == {TABLE, ABOUT, "shard-00000.bin"}


def test_a_picture_that_changes_while_it_is_to_be_encoded_is_refused(out, make_index, model, processor):
    rows = make_index()
    plan, changed = plan_store(out, rows, model, processor), shown_first(rows)[4]
    os.utime(changed, ns=(0, 0))
    with pytest.raises(FeatureStoreError, match=rf"line \d+: the picture {changed} was changed"):
        fill(plan, rows, model, processor)
    changed.unlink()
    with pytest.raises(FeatureStoreError, match=rf"line \d+: the picture {changed} is missing"):
        plan_store(out.with_name("other"), rows, model, processor)


# ---- refused


def refused(out, given, complaint: str) -> None:
    """Neither opened nor built over; every file is as it was."""
    before = contents(out)
    for use in (open_store, build_store):
        with pytest.raises(FeatureStoreError, match=complaint):
            use(out, *given)
    assert contents(out) == before


def test_features_of_something_else_are_refused(out, make_index, model, make_model, processor, monkeypatch):
    rows = make_index()
    build_store(out, rows, model, processor)
    other = make_index(rows=some_rows()[:12], name="other")
    refused(out, (rows, make_model(seed=1), processor), r"another encoder \(\w+, not \w+\); remove the folder")
    refused(out, (rows, model, processor, "bf16"), r"another precision of the encoder \(fp32, not bf16\)")
    refused(out, (other, model, processor), "another index of rows")
    with monkeypatch.context() as patch:
        patch.setattr(processor.image_processor, "image_mean", [0.5, 0.5, 0.5])
        refused(out, (rows, model, processor), "another preprocessing of pictures;")
    about = json.loads((out / ABOUT).read_text("utf-8"))
    for key, value, word in [
        ("tokens_a_picture", 9, r"number of tokens a picture \(9, not 4\)"),
        ("width", 32, r"width \(32, not 16\)"),
        ("dtype", "float16", r"type of numbers \(float16, not bfloat16\)"),
    ]:
        (out / ABOUT).write_text(json.dumps(about | {key: value}), "utf-8")
        refused(out, (rows, model, processor), f"another {word}")


def test_projector_and_language_model_may_change(out, make_index, model, processor, encoded):
    rows = make_index()
    build_store(out, rows, model, processor)
    before = sum(encoded)
    model.projector.weight.data += 1
    model.language_model.get_input_embeddings().weight.data += 1
    open_store(out, rows, model, processor)
    assert sum(encoded) == before


def test_a_changed_or_missing_picture_is_refused(out, make_index, model, processor):
    """Changed in time, in size, and gone; also when it happens after the store was opened."""
    rows = make_index()
    store, pictures = build_store(out, rows, model, processor), shown_first(rows)
    state, content = pictures[3].stat(), pictures[3].read_bytes()
    assert store[pictures[3:4]].shape == (1, 4, 16)
    os.utime(pictures[3], ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000_000))
    refused(out, (rows, model, processor), rf"train\.jsonl, line \d+: the picture {pictures[3]} was changed")
    with pytest.raises(FeatureStoreError, match=rf"no features of the picture {pictures[3]} as it is now"):
        store[pictures[:5]]
    pictures[3].write_bytes(content + b"\0")
    os.utime(pictures[3], ns=(state.st_atime_ns, state.st_mtime_ns))
    refused(out, (rows, model, processor), rf"line \d+: the picture {pictures[3]} was changed")
    pictures[3].unlink()
    refused(out, (rows, model, processor), rf"line \d+: the picture {pictures[3]} is missing")
    with pytest.raises(FeatureStoreError, match=rf"the picture {pictures[3]} is missing"):
        store[pictures[3:4]]
    pictures[3].write_bytes(content)
    os.utime(pictures[3], ns=(state.st_atime_ns, state.st_mtime_ns))
    open_store(out, rows, model, processor)


def test_a_picture_of_no_row_has_no_features(out, folder, make_index, model, processor):
    store = build_store(out, make_index("Parquet"), model, processor)
    with pytest.raises(FeatureStoreError, match=r"no features of the picture of 3 bytes as it is now.*in no row"):
        store[[b"abc"]]
    with pytest.raises(FeatureStoreError, match=r"no features of the picture .*0\.png as it is now"):
        store[[folder / "0.png"]]


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_that_is_missing_or_has_another_size_is_refused_and_made_again(
    out, make_index, model, processor, name, encoded
):
    rows = make_index()
    build_store(out, rows, model, processor)
    before = contents(out)
    for content, complaint in [
        (before[name][:-1], rf"{name} has {SHARDS[name] * A_PICTURE - 1:,} bytes, not {SHARDS[name] * A_PICTURE:,}"),
        (before[name] + b"\0", rf"{name} has .* bytes, not"),
        (b"", rf"{name} has 0 bytes"),
        (None, rf"{name} is missing: the store is not finished"),
    ]:
        (out / name).unlink() if content is None else (out / name).write_bytes(content)
        with pytest.raises(FeatureStoreError, match=complaint + ".*build it again"):
            open_store(out, rows, model, processor)
        encoded.clear()
        build_store(out, rows, model, processor)
        assert contents(out) == before and sum(encoded) == SHARDS[name]


def test_damaged_descriptions_are_refused(out, make_index, model, processor):
    rows = make_index()
    build_store(out, rows, model, processor)
    about, table = (out / ABOUT).read_text("utf-8"), (out / TABLE).read_bytes()
    for text, complaint in [
        (about[:-10], "cut off or damaged"),
        (about.replace('"format": 1', '"format": 2'), "not of format 1"),
        ("[]", "not of format 1"),
        (about.replace('"shown"', '"seen"'), "shown is missing"),
    ]:
        (out / ABOUT).write_text(text, "utf-8")
        refused(out, (rows, model, processor), rf"store\.json: .*{complaint}")
        if "shown" not in complaint:
            with pytest.raises(FeatureStoreError, match=complaint):
                stored_precision(out)
    (out / ABOUT).write_text(about, "utf-8")
    changed = table[:40] + bytes([table[40] ^ 1]) + table[41:]  # whichever record comes first
    for content in (table[:-1], changed, b""):
        (out / TABLE).write_bytes(content)
        refused(out, (rows, model, processor), r"pictures\.bin: missing, cut off or changed")
    (out / TABLE).unlink()
    refused(out, (rows, model, processor), r"pictures\.bin: missing")


def test_other_places_are_refused(out, folder, make_index, model, processor, tmp_path):
    rows = make_index()
    assert stored_precision(out) is None
    with pytest.raises(FeatureStoreError, match=r"there is no store of features here \(store\.json is missing\)"):
        open_store(out, rows, model, processor)
    base = save_base(tmp_path / "base", model, processor)
    for place, complaint in [
        (folder, "exists and is no store of features"),
        (folder / "0.png", "is a file"),
        (rows.folder / "features", "lies in the index"),
    ]:
        with pytest.raises(FeatureStoreError, match=complaint):
            build_store(place, rows, model, processor)
    with pytest.raises(FeatureStoreError, match=r"lies in .*new, which every checkpoint replaces"):
        train_on_index(
            rows.folder, stage("pretrain"), model, processor, base, tmp_path / "new", tmp_path / "new" / "features"
        )
    assert not (tmp_path / "new").exists() and not (rows.folder / "features").exists()
    out.mkdir()
    build_store(out, rows, model, processor)  # an empty folder will do


def test_rows_without_pictures_need_no_store(out, make_index, model, processor):
    rows = make_index(rows=[row for row in some_rows() if "image" not in row])
    for ask in (lambda: estimate(rows, model), lambda: build_store(out, rows, model, processor)):
        with pytest.raises(FeatureStoreError, match="no row has a picture, so there are no features to keep"):
            ask()
    assert not out.exists()


# ---- worth it or not


def test_the_decision_by_hand():
    """100 pictures, each shown twice an epoch; 10 ms to encode, 1 ms to write, 2 ms to read."""
    measured = {"encode_seconds": 0.01, "write_seconds": 0.001, "read_seconds": 0.002, "pictures": 100, "shown": 200}
    often = Worth(**measured, epochs=3, bytes=5_000_000, free=5_000_000)
    assert often.seconds_without == pytest.approx(6.0) and often.seconds_with == pytest.approx(1.1 + 1.2)
    assert often.wins and often.fits and often.pays_from == pytest.approx(1.1 / 1.6)
    assert str(often) == (
        "the store wins, it fits: 2 s against 6 s for 3.0 epochs (10.0 ms to encode a picture, 2.0 ms to read its "
        "features); it pays from 0.7 epochs on, and needs 5.0 MB where 5.0 MB are free"
    )
    rarely = Worth(**measured, epochs=0.5, bytes=5_000_001, free=5_000_000)
    assert not rarely.wins and not rarely.fits
    assert str(rarely).startswith("encoding in every step is cheaper, it does not fit: 1 s against 1 s for 0.5 epochs")
    slow = Worth(**measured | {"read_seconds": 0.01}, epochs=1e6, bytes=0, free=0)
    assert not slow.wins and slow.pays_from == float("inf") and "from inf epochs on" in str(slow)


def test_measuring_leaves_nothing_and_counts_what_is_missing(out, make_index, model, processor, tmp_path):
    rows = make_index()
    before = {path.name for path in tmp_path.iterdir()}
    found = worth(plan_store(out, rows, model, processor), rows, model, processor, epochs=2)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (found.pictures, found.shown, found.epochs, found.bytes) == (PICTURES, 18, 2, PICTURES * A_PICTURE)
    assert min(found.encode_seconds, found.write_seconds, found.read_seconds) > 0
    assert found.fits and found.free <= shutil.disk_usage(tmp_path).total
    build_store(out, rows, model, processor)
    (out / "shard-00002.bin").unlink()
    found = worth(plan_store(out, rows, model, processor), rows, model, processor, epochs=2)
    assert (found.pictures, found.bytes) == (2, 2 * A_PICTURE)


# ---- the command


def said(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_train_as_a_command(out, make_index, model, make_model, processor, tmp_path, capsys):
    base = save_base(tmp_path / "base", model, processor)
    options = ("--rows", make_index().folder, "--recipe", "scenes", "--steps", 3, "--batch-size", 6, "--parent", base)
    options += ("--precision", "fp32", "--features", out, "--build-features")
    code, printed, _ = said(capsys, "train", "pretrain", *options, "--out", tmp_path / "a")
    told = f"features of 10 pictures, 1,280 bytes, in {out}: 0 of 3 parts are there"
    assert code == 0 and told in printed and "it pays from" in printed and "for 1.0 epochs" in printed
    before = contents(out)
    code, printed, _ = said(capsys, "train", "pretrain", *options, "--out", tmp_path / "b")
    assert code == 0 and "3 of 3 parts are there" in printed and "it pays from" not in printed
    assert contents(out) == before
    other = save_base(tmp_path / "other", make_model(seed=1), processor)
    options = [other if option is base else option for option in options]
    code, _, errors = said(capsys, "train", "pretrain", *options, "--out", tmp_path / "c")
    assert code == 2 and "features are of another encoder" in errors and contents(out) == before
    code, _, errors = said(capsys, "train", "pretrain", "--rows", out, "--build-features")
    assert code == 2 and errors.startswith("minivlm: --build-features needs --features FOLDER; leave it out")
    code, _, errors = said(capsys, "train", "pretrain", "--features", out)
    assert code == 2 and errors.startswith("minivlm: --features is for training on --rows; leave it out")
