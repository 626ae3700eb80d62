"""Many pictures at once: drawn in one array by several processes, kept in a file, shown on a contact sheet."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from minivlm.runtime.files import replace_file
from minivlm.scenes.drawing.draw import SIZE, draw
from minivlm.scenes.facts import Scene, sample_scene

PAPER = (250, 247, 240)
CHUNK = 100  # scenes that a process draws before it reports back
MANY = 2000  # below, one process is as fast: starting others takes as long as drawing


def draw_many(scenes: list[Scene], side: int = SIZE, workers: int | None = None, title: str = "drawing") -> np.ndarray:
    """Draw scenes as uint8 pictures (I, side, side, 3), in the order given.

    Each is drawn at 224 px. For a smaller `side` it is shrunk by the bicubic filter of the image processor. `MANY`
    scenes or more are drawn by `workers` processes, by default and at most one per core that this process may use.
    Without a title there is no progress bar.
    """
    chunks = [(scenes[i : i + CHUNK], side) for i in range(0, len(scenes), CHUNK)]
    workers = min(workers or len(chunks), usable_cores()) if len(scenes) >= MANY else 1
    parts = []
    with tqdm(total=len(scenes), desc=title, unit="picture", mininterval=2, disable=not title) as bar:
        for part in _drawn_by_workers(chunks, workers) if workers > 1 else map(_draw_chunk, chunks):
            parts.append(part)
            bar.update(len(part))
    return np.concatenate(parts)


def cached_pictures(file: Path, split: str, count: int, side: int, workers: int | None = None) -> np.ndarray:
    """The first `count` pictures of a split, drawn once and then read from `file` (memory-mapped).

    The file ends with the key of the program that drew it; with another one, or none, it is drawn again.

    Raises:
        ValueError: the file holds another number of pictures, or pictures of another size.
        OSError: the file cannot be written.
    """
    key = drawing_key().encode()
    if not _ends_with(file, key):
        pictures = draw_many([sample_scene(split, i) for i in range(count)], side, workers, f"drawing {split}")
        with replace_file(file) as temporary, temporary.open("wb") as out:
            np.save(out, pictures)
            out.write(key)  # behind the array, where reading it does not look: one file, replaced as one
    pictures = np.load(file, mmap_mode="r")
    if pictures.shape != (count, side, side, 3):
        raise ValueError(f"{file} holds pictures of shape {pictures.shape}, not {count} of {side} px; delete it")
    return pictures


def drawing_key() -> str:
    """The text of the drawing program, hashed: another program draws another picture of the same scene."""
    return program_key([Path(__file__).parents[1] / "facts.py", *sorted(Path(__file__).parent.glob("*.py"))])


def program_key(files: Iterable[Path]) -> str:
    """The hash of some files' text, the same whatever ends their lines."""
    return texts_key(file.read_text("utf-8") for file in files)


def texts_key(texts: Iterable[str]) -> str:
    """The hash of texts, each hashed for itself first: where one ends and the next begins matters."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def contact_sheet(split: str = "base", first: int = 0, across: int = 8, gap: int = 6) -> Image.Image:
    """`across` x `across` pictures of a split on paper, with a gap of `gap` pixels around each."""
    step = SIZE + gap
    sheet = Image.new("RGB", (across * step + gap,) * 2, PAPER)
    for i in range(across * across):
        sheet.paste(draw(sample_scene(split, first + i)), (gap + i % across * step, gap + i // across * step))
    return sheet


def _ends_with(file: Path, key: bytes) -> bool:
    if not file.is_file() or file.stat().st_size < len(key):
        return False
    with file.open("rb") as content:
        content.seek(-len(key), os.SEEK_END)
        return content.read() == key


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _drawn_by_workers(chunks: list[tuple[list[Scene], int]], workers: int) -> Iterator[np.ndarray]:
    """The pictures of each chunk, drawn by a pool of processes that ends with the last one, or with an error."""
    context = multiprocessing.get_context("spawn")  # a forked process inherits torch's threads in an unknown state
    with _interrupts_ignored():
        pool = context.Pool(workers)
    with pool:
        yield from pool.imap(_draw_chunk, chunks)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A terminal sends Ctrl-C to all processes. What is started in here inherits that it is ignored."""
    if threading.current_thread() is not threading.main_thread():  # where handlers cannot be exchanged
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _draw_chunk(chunk: tuple[list[Scene], int]) -> np.ndarray:
    scenes, side = chunk
    pictures = [draw(scene) for scene in scenes]
    if side != SIZE:
        pictures = [picture.resize((side, side), Image.Resampling.BICUBIC) for picture in pictures]
    return np.stack([np.asarray(picture) for picture in pictures])
