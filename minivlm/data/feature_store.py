"""Features of an index's pictures on the disk: encoded once, then read where a step asks for them, memory-mapped.

A store is a folder. `shard-00000.bin`, `shard-00001.bin`, … hold the features (I, N, Dv) of so many pictures each and
nothing else, in bfloat16: it has float32's range, and of an encoder's few very large values float16 would make
infinities. `pictures.bin` says where a picture's features lie, and `store.json` what made them; a store is only ever
read for that same encoder, preprocessing and index.

A picture is known by what can be told without opening it: a file by its path, size and time of change, so that a file
that was changed has no features, and one that many rows show is encoded once; a picture out of a Parquet table by the
hash of its bytes. Pictures are numbered in the order in which the index shows them first.

Shards are written aside and renamed when they are whole, so there is one or there is none, whoever is killed. Several
builders of one folder need no lock: each makes the same bytes, and whose name comes last does not matter.
"""

import hashlib
import json
import math
import os
import re
import shutil
import statistics
import time
import uuid
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from minivlm.data.dataset import CheckedRows
from minivlm.data.features import BATCH, FeatureError, encode
from minivlm.data.images import ImageError
from minivlm.model import MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor, SampleError
from minivlm.runtime.files import hash_tensors
from minivlm.runtime.processes import all_or_none, from_main, launched_here, processes

FORMAT = 1
ABOUT, TABLE, ASIDE = "store.json", "pictures.bin", ".partial-"
DTYPE = "bfloat16"
SHARD_BYTES = 128_000_000  # at most, but for `BATCH` pictures: what is in memory while it is made, and lost by a kill
KEY = 32  # hexadecimal digits, 128 bits: no two of a billion pictures will have the same
RECORD = np.dtype([("key", f"S{KEY}"), ("number", "<i8"), ("row", "<i8"), ("position", "<i8")])
WORDS = {  # what has to be the same, and how a message calls it
    "tokens_a_picture": "number of tokens a picture",
    "width": "width",
    "encoder": "encoder",
    "image_processor": "preprocessing of pictures",
    "dtype": "type of numbers",
    "precision": "precision of the encoder",
    "rows": "index of rows",
}
COUNTS = ("pictures", "shown", "pictures_a_shard", "table")
TIMED, TIMED_TOGETHER = 4, 16  # batches that `worth` measures after one to warm up, and pictures in each
REMOVE = "remove the folder or name another one, and the features are made anew"


class FeatureStoreError(FeatureError):
    """A store of features cannot be built or used. The message says what was wrong, where, and what to do."""


class FeatureStore:
    """Features of pictures, read from the disk when they are asked for; made by `build_store` and `open_store`.

    `train` takes it as `features`. Pickled, it is its folder's path.

    Attributes:
        folder: the store.
        about: what `store.json` says.
    """

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.folder, self.about = folder, about
        self._table = np.memmap(folder / TABLE, RECORD, mode="r")
        self._keys = self._table.view(np.ndarray)["key"]
        self._shards: dict[int, np.memmap] = {}

    def __reduce__(self) -> tuple:
        """The folder's path instead of what is mapped."""
        return type(self), (self.folder, self.about)

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self._table)

    def __getitem__(self, pictures: Sequence[Path | bytes]) -> torch.Tensor:
        """The features of these pictures, (len(pictures), N, Dv) in bfloat16.

        Raises:
            FeatureStoreError: one of them is not here, or its file was changed or is missing.
        """
        shape = (len(pictures), self.about["tokens_a_picture"], self.about["width"])
        found = np.empty(shape, np.int16)
        for place, picture in enumerate(pictures):
            shard, offset = divmod(self._number(picture), self.about["pictures_a_shard"])
            found[place] = self._mapped(shard)[offset]
        return torch.from_numpy(found).view(torch.bfloat16)  # (I, N, Dv)

    def _number(self, picture: Path | bytes) -> int:
        key = _key(picture)
        place = bisect_left(self._keys, key)
        if place == len(self) or self._keys[place] != key:
            raise FeatureStoreError(
                f"{self.folder}: there are no features of {_named(picture)} as it is now; it was changed since, or "
                "is in no row of the index"
            )
        return int(self._table[place]["number"])

    def _mapped(self, shard: int) -> np.memmap:
        if shard not in self._shards:
            shape = (-1, self.about["tokens_a_picture"], self.about["width"])
            self._shards[shard] = np.memmap(_shard(self.folder, shard), "<i2", mode="r").reshape(shape)
        return self._shards[shard]


@dataclass(frozen=True)
class StorePlan:
    """What a store holds when it is whole, and what of it is there.

    Attributes:
        folder: the store.
        about: what `store.json` says, or will say.
        table: where each picture's features lie and where the picture itself does, `RECORD`s sorted by their keys.
    """

    folder: Path
    about: dict[str, Any]
    table: np.ndarray

    @property
    def bytes(self) -> int:
        """Of all shards: N * Dv * 2 for each picture."""
        return self.about["pictures"] * _picture_bytes(self.about)

    @cached_property
    def shard_bytes(self) -> list[int]:
        """Of each shard."""
        size, full = self.about["pictures_a_shard"], self.about["pictures"]
        return [min(size, full - start) * _picture_bytes(self.about) for start in range(0, full, size)]

    def missing(self) -> list[int]:
        """The numbers of the shards that are not there, or have another size."""
        return [i for i, size in enumerate(self.shard_bytes) if _size(_shard(self.folder, i)) != size]

    def __str__(self) -> str:
        """One line for people: how large, where, and how much of it is there."""
        total = len(self.shard_bytes)
        return (
            f"features of {self.about['pictures']:,} pictures, {_readable(self.bytes)}, in {self.folder}: "
            f"{total - len(self.missing()):,} of {total:,} parts are there"
        )


@dataclass(frozen=True)
class Worth:
    """Whether a store is worth building, by what was measured on this machine.

    Attributes:
        encode_seconds: to open, prepare and encode a picture, as every step does without a store.
        write_seconds: to bring its features onto the disk.
        read_seconds: to read them back.
        pictures: different ones, each of which is encoded once for the store.
        shown: how many pictures an epoch shows.
        epochs: how often the rows are gone through, all stages and runs together.
        bytes: what is still to be written.
        free: what the disk has left.
    """

    encode_seconds: float
    write_seconds: float
    read_seconds: float
    pictures: int
    shown: int
    epochs: float
    bytes: int
    free: int

    @property
    def seconds_without(self) -> float:
        """With the encoder in every step."""
        return self.epochs * self.shown * self.encode_seconds

    @property
    def seconds_with(self) -> float:
        """With a store, from its first picture on."""
        built = self.pictures * (self.encode_seconds + self.write_seconds)
        return built + self.epochs * self.shown * self.read_seconds

    @property
    def wins(self) -> bool:
        """Whether the store takes less time."""
        return self.seconds_with < self.seconds_without

    @property
    def fits(self) -> bool:
        """Whether the disk has room."""
        return self.bytes <= self.free

    @property
    def pays_from(self) -> float:
        """The number of epochs from which on the store wins; infinite if reading is no faster than encoding."""
        gained = self.shown * (self.encode_seconds - self.read_seconds)
        return self.pictures * (self.encode_seconds + self.write_seconds) / gained if gained > 0 else math.inf

    def __str__(self) -> str:
        """The decision and its reasons in one line."""
        verdict = "the store wins" if self.wins else "encoding in every step is cheaper"
        room = "it fits" if self.fits else "it does not fit"
        return (
            f"{verdict}, {room}: {self.seconds_with:,.0f} s against {self.seconds_without:,.0f} s for "
            f"{self.epochs:.1f} epochs ({self.encode_seconds * 1e3:.1f} ms to encode a picture, "
            f"{self.read_seconds * 1e3:.1f} ms to read its features); it pays from {self.pays_from:.1f} epochs on, and "
            f"needs {_readable(self.bytes)} where {_readable(self.free)} are free"
        )


# ---- building


def estimate(rows: CheckedRows, model: MiniVLMForConditionalGeneration) -> int:
    """The bytes that the features of an index take, known before any is made: N * Dv * 2 for each different picture.

    Raises:
        FeatureStoreError: no row has a picture, or one of them is missing.
    """
    return len(_table(rows)[0]) * _picture_bytes(_shape(model))


def plan_store(
    folder: str | Path,
    rows: CheckedRows,
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    precision: str = "fp32",
) -> StorePlan:
    """Say what a store will hold, or does; nothing is written. Each picture's file is looked at, none is opened.

    Args:
        folder: the store; it may be new, empty, begun or whole.
        rows: the index whose pictures it holds.
        model, processor: whose encoder sees them, and what prepares them.
        precision: of the encoder, "fp32", or "bf16" to multiply in 16 bits.

    Raises:
        FeatureStoreError: the folder holds something else, or a store of another encoder, preprocessing, precision or
            index, or a damaged one; a picture was changed or is missing; or no row has one.
    """
    folder = Path(folder)
    wanted = _identity(rows, model, processor, precision)
    if (folder / ABOUT).is_file():
        about, table = _read(folder, wanted)
        _require_unchanged(folder, rows, table)
        return StorePlan(folder, about, table)
    _require_place(folder, rows)
    table, shown = _table(rows)
    a_batch = BATCH * _picture_bytes(wanted)
    counts = (len(table), shown, BATCH * max(1, SHARD_BYTES // a_batch), hashlib.sha256(table.tobytes()).hexdigest())
    return StorePlan(folder, wanted | dict(zip(COUNTS, counts, strict=True)), table)


def fill(
    plan: StorePlan, rows: CheckedRows, model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor
) -> FeatureStore:
    """Make the shards that are missing, each in one of the processes. Stopped at any moment, the same call goes on.

    First the processes of all machines share the work; then those of each machine make what did not come to its disk,
    which is nothing if the disk is shared.

    Raises:
        FeatureStoreError: the disk has not enough room, or a picture was changed.
        SampleError: a picture cannot be read; its row is named.
        OSError: the disk is full, or the folder cannot be written. Whole shards are kept.
        ProcessError: another process stopped.
    """
    here = processes()
    here.print(plan)

    def make(numbers: list[int]) -> None:
        all_or_none(lambda: _make_shards(plan, numbers, rows, model, processor))

    all_or_none(lambda: _begin(plan) if here.is_local_main_process else None)
    make(from_main(plan.missing)[here.process_index :: here.num_processes])
    left = all_or_none(plan.missing)  # by all, before any of them is made
    make(left[here.local_process_index :: launched_here()])
    all_or_none(lambda: _tidy(plan) if here.is_local_main_process else None)
    return _whole(plan.folder, plan.about)


def build_store(
    folder: str | Path,
    rows: CheckedRows,
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    precision: str = "fp32",
) -> FeatureStore:
    """`plan_store`, then `fill`: a store that is begun goes on, one that is whole is opened."""
    return fill(plan_store(folder, rows, model, processor, precision), rows, model, processor)


def worth(
    plan: StorePlan,
    rows: CheckedRows,
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    epochs: float,
) -> Worth:
    """Measure on some pictures whether the store is worth building, and whether it fits. Writes only a passing sample.

    The sample is read back in a random order, past the system's memory of what was just written where that can be
    asked for.

    Raises:
        FeatureStoreError: a picture was changed.
        SampleError: a picture cannot be read.
        OSError: the sample cannot be written.
    """
    places = np.linspace(0, len(plan.table) - 1, min(len(plan.table), (1 + TIMED) * TIMED_TOGETHER)).astype(int)
    sample = plan.table[places]
    sample["number"] = np.arange(len(sample))
    batches = [sample[i : i + TIMED_TOGETHER] for i in range(0, len(sample), TIMED_TOGETHER)]
    features, encoding = [], []
    for batch in batches:
        began = time.perf_counter()
        pixels = [_pixels(rows, batch, processor)]
        features.append(encode(model, pixels, len(batch), plan.about["precision"], title=""))
        encoding.append((time.perf_counter() - began) / len(batch))
    with TemporaryDirectory(dir=_existing(plan.folder), prefix=".features-") as folder:
        began = time.perf_counter()
        _write(_shard(Path(folder), 0), _as_bytes(torch.cat(features)))
        writing = (time.perf_counter() - began) / len(sample)
        _write(Path(folder) / TABLE, sample.tobytes())
        _forget(_shard(Path(folder), 0))
        store = FeatureStore(Path(folder), plan.about | {"pictures_a_shard": len(sample)})
        shuffled, reading = np.random.default_rng(0).permutation(sample), 0.0
        for start in range(0, len(shuffled), TIMED_TOGETHER):
            pictures = [_picture(rows, record)[1] for record in shuffled[start : start + TIMED_TOGETHER]]
            began = time.perf_counter()
            store[pictures]
            reading += time.perf_counter() - began
        del store  # Windows removes no file that is mapped
    missing = plan.missing()
    return Worth(
        encode_seconds=statistics.median(encoding[1:] or encoding),
        write_seconds=writing,
        read_seconds=reading / len(sample),  # the mean: what the disk takes at first counts
        pictures=sum(plan.shard_bytes[i] for i in missing) // _picture_bytes(plan.about),
        shown=plan.about["shown"],
        epochs=epochs,
        bytes=sum(plan.shard_bytes[i] for i in missing),
        free=shutil.disk_usage(_existing(plan.folder)).free,
    )


# ---- opening


def open_store(
    folder: str | Path,
    rows: CheckedRows,
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    precision: str = "fp32",
) -> FeatureStore:
    """Open a whole store of exactly these pictures, encoder and preprocessing.

    Raises:
        FeatureStoreError: there is none; it was made for or by another encoder, preprocessing, precision or index; a
            picture was changed; a file is damaged, missing or of another size; or the store is not finished.
    """
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        raise FeatureStoreError(f"{folder}: there is no store of features here ({ABOUT} is missing); build it first")
    about, table = _read(folder, _identity(rows, model, processor, precision))
    _require_unchanged(folder, rows, table)
    return _whole(folder, about)


def stored_precision(folder: str | Path) -> str | None:
    """The precision in which a store was made or begun; None if there is none.

    Raises:
        FeatureStoreError: `store.json` is damaged or of another format.
    """
    return _read_about(Path(folder))["precision"] if (Path(folder) / ABOUT).is_file() else None


def _whole(folder: Path, wanted: dict[str, Any]) -> FeatureStore:
    """The store, if nothing of it is missing."""
    plan = StorePlan(folder, *_read(folder, wanted))
    for number in plan.missing():
        file, size = _shard(folder, number), plan.shard_bytes[number]
        state = f"has {_size(file):,} bytes, not {size:,}" if file.is_file() else "is missing"
        raise FeatureStoreError(
            f"{file} {state}: the store is not finished, or was damaged; build it again, and only what is missing is "
            "made (on the command line: minivlm train STAGE --rows INDEX --features FOLDER)"
        )
    return FeatureStore(folder, plan.about)


def _read(folder: Path, wanted: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """What `store.json` says, and the table, mapped; refused if they are not what is wanted, or not whole."""
    about = _read_about(folder)
    for key, word in WORDS.items():
        if about[key] != wanted[key]:
            known = f" ({about[key]}, not {wanted[key]})" if not isinstance(wanted[key], dict) else ""
            raise FeatureStoreError(f"{folder}: its features are of another {word}{known}; {REMOVE}")
    file = folder / TABLE
    if _size(file) != about["pictures"] * RECORD.itemsize or _hash(file) != about["table"]:
        raise FeatureStoreError(f"{file}: missing, cut off or changed since it was written; {REMOVE}")
    return about, np.memmap(file, RECORD, mode="r").view(np.ndarray)


def _read_about(folder: Path) -> dict[str, Any]:
    file = folder / ABOUT
    try:
        about = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FeatureStoreError(f"{file}: cut off or damaged ({error}); {REMOVE}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise FeatureStoreError(f"{file}: not of format {FORMAT}; it was written by another version; {REMOVE}")
    if missing := {*WORDS, *COUNTS} - about.keys():
        raise FeatureStoreError(f"{file}: {', '.join(sorted(missing))} is missing; {REMOVE}")
    return about


def _require_unchanged(folder: Path, rows: CheckedRows, table: np.ndarray) -> None:
    """Refuse a store whose files have another size or time; what lies in the index itself is held by its hash."""
    known = np.ascontiguousarray(table["key"])
    for where, file, _ in rows.files():
        key = _key(Path(file), where)
        place = bisect_left(known, key)
        if place == len(known) or known[place] != key:
            raise FeatureStoreError(f"{folder}: {where}: the picture {file} was changed since it was encoded; {REMOVE}")


def _require_place(folder: Path, rows: CheckedRows) -> None:
    """Refuse a folder that a store may not take. What a builder left that was killed at once may lie there."""
    if folder.resolve().is_relative_to(rows.folder.resolve()):
        raise FeatureStoreError(f"{folder} lies in the index, which is replaced as a whole; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise FeatureStoreError(f"{folder} is a file; choose a folder for the features")
    if folder.is_dir() and any(path.name != TABLE and not _is_aside(path) for path in folder.iterdir()):
        raise FeatureStoreError(f"{folder} exists and is no store of features; choose another folder")


# ---- pictures and what they are known by


def _identity(
    rows: CheckedRows, model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, precision: str
) -> dict[str, Any]:
    """What decides the features, as `store.json` says it."""
    return {
        "format": FORMAT,
        **_shape(model),
        "encoder": hash_tensors(model.vision.state_dict()),
        "image_processor": json.loads(processor.image_processor.to_json_string()),
        "dtype": DTYPE,
        "precision": precision,
        "rows": rows.about["rows"]["sha256"],
    }


def _shape(model: MiniVLMForConditionalGeneration) -> dict[str, int]:
    """N and Dv."""
    return {"tokens_a_picture": model.config.num_image_tokens, "width": model.config.vision_width}


def _table(rows: CheckedRows) -> tuple[np.ndarray, int]:
    """A record of each different picture, sorted by key, and how many pictures the rows show in all."""
    keys, shown_in, positions = bytearray(), array("q"), array("q")
    for number, (where, pictures) in enumerate(rows.pictures()):
        for position, picture in enumerate(pictures):
            keys += _key(picture, where)
            shown_in.append(number)
            positions.append(position)
    if not keys:
        raise FeatureStoreError(f"{rows.folder}: no row has a picture, so there are no features to keep; train without")
    found, first = np.unique(np.frombuffer(keys, f"S{KEY}"), return_index=True)
    table = np.empty(len(found), RECORD)
    table["key"], table["number"] = found, first.argsort().argsort()
    table["row"], table["position"] = np.asarray(shown_in)[first], np.asarray(positions)[first]
    return table, len(shown_in)


def _key(picture: Path | bytes, where: str = "") -> bytes:
    """What a picture is known by; a file is not opened."""
    content = picture
    if not isinstance(picture, bytes):
        try:
            state = os.stat(picture)
        except OSError as error:
            place = f"{where}: " if where else ""
            raise FeatureStoreError(f"{place}{_named(picture)} is missing ({error.strerror}); put it back") from error
        content = os.fsencode(os.path.abspath(picture)) + f"\0{state.st_size}\0{state.st_mtime_ns}".encode()
    return hashlib.sha256(content).hexdigest()[:KEY].encode()


def _picture(rows: CheckedRows, record: np.void) -> tuple[str, Path | bytes]:
    """The name of the row that shows a picture first, and the picture."""
    row = rows[int(record["row"])]
    return row.where, row.images[int(record["position"])]


def _pixels(rows: CheckedRows, records: np.ndarray, processor: MiniVLMProcessor) -> torch.Tensor:
    """Pictures opened and prepared: (I, 3, H, W)."""
    pixels = []
    for record in records:
        where, picture = _picture(rows, record)
        if _key(picture, where) != record["key"]:
            raise FeatureStoreError(f"{where}: {_named(picture)} was changed while it was to be encoded; start again")
        try:
            pixels.append(processor.pixels([picture]))
        except ImageError as error:
            raise SampleError(where, str(error)) from error
    return torch.cat(pixels)


def _named(picture: Path | bytes) -> str:
    return f"the picture of {len(picture):,} bytes" if isinstance(picture, bytes) else f"the picture {picture}"


# ---- shards


def _begin(plan: StorePlan) -> None:
    """Refuse a disk that is too small; write what says where features lie, and, last, what they are."""
    needed = sum(plan.shard_bytes[i] for i in plan.missing()) + plan.table.nbytes
    free = shutil.disk_usage(_existing(plan.folder)).free
    if needed > free:
        raise FeatureStoreError(
            f"{plan.folder}: {_readable(needed)} of features are still to be written, but the disk has "
            f"{_readable(free)} left; choose a folder on a larger disk, or train without a store (every step "
            "encodes its pictures anew)"
        )
    with _written_to(plan.folder):
        plan.folder.mkdir(parents=True, exist_ok=True)
        if not (plan.folder / ABOUT).is_file():
            _write(plan.folder / TABLE, plan.table.tobytes())
            _write(plan.folder / ABOUT, (json.dumps(plan.about, indent=1, ensure_ascii=False) + "\n").encode())
    _read(plan.folder, plan.about)


def _make_shards(
    plan: StorePlan,
    numbers: list[int],
    rows: CheckedRows,
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
) -> None:
    """Encode these shards, but for those that another builder finished in the meantime."""
    size, records = plan.about["pictures_a_shard"], plan.table[plan.table["number"].argsort()]
    mine = {number: records[number * size : (number + 1) * size] for number in numbers}
    hidden = not (numbers and processes().is_main_process)
    with tqdm(total=sum(map(len, mine.values())), desc="encoding", unit="picture", disable=hidden) as bar:
        for number, wanted in mine.items():
            file = _shard(plan.folder, number)
            if _size(file) == plan.shard_bytes[number]:
                bar.update(len(wanted))
                continue
            batches = _batches(rows, wanted, processor, bar.update)
            features = encode(model, batches, len(wanted), plan.about["precision"], title="")  # (I, N, Dv)
            with _written_to(plan.folder):
                _write(file, _as_bytes(features))


def _batches(
    rows: CheckedRows, records: np.ndarray, processor: MiniVLMProcessor, done: Callable[[int], Any]
) -> Iterator[torch.Tensor]:
    """Pixels of `BATCH` pictures (i, 3, H, W), from the shard's start on: the same for every builder."""
    for start in range(0, len(records), BATCH):
        batch = records[start : start + BATCH]
        yield _pixels(rows, batch, processor)
        done(len(batch))


def _write(file: Path, content: bytes | memoryview) -> None:
    """Aside, on the disk for certain, then renamed: whole or not there."""
    aside = file.with_name(f"{file.name}{ASIDE}{uuid.uuid4().hex}")
    try:
        with aside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
    except FileNotFoundError:
        if not file.is_file():  # else another builder finished everything and tidied up
            raise
    finally:
        aside.unlink(missing_ok=True)


def _tidy(plan: StorePlan) -> None:
    """Remove what killed builders left. One that is still at work finds its file gone, and the finished one there."""
    for left in filter(_is_aside, plan.folder.glob(f"*{ASIDE}*")):
        with suppress(PermissionError):  # Windows removes no file that is open; its owner will
            left.unlink(missing_ok=True)


def _is_aside(file: Path) -> bool:
    """Whether `_write` gave a file its name: nobody else's file is deleted, or taken for a part of a store."""
    names = "|".join((re.escape(ABOUT), re.escape(TABLE), r"shard-\d{5,}\.bin"))
    return bool(re.fullmatch(rf"({names}){re.escape(ASIDE)}[0-9a-f]{{32}}", file.name))


@contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    """What the system says about a block that writes becomes a line that names the store."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"features were not written to {folder} ({error.strerror}): make sure that the disk has room and that you "
            "may write there; what is finished is kept, and the same command goes on from there",
        ) from error


def _as_bytes(features: torch.Tensor) -> memoryview:
    return memoryview(features.contiguous().view(torch.int16).numpy().astype("<i2", copy=False)).cast("B")


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.bin"


def _picture_bytes(about: dict[str, Any]) -> int:
    return about["tokens_a_picture"] * about["width"] * torch.bfloat16.itemsize


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _forget(file: Path) -> None:
    """Ask the system to drop its copy of a file, so that it is read from the disk, where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _readable(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"
