"""Many pictures at once: drawn by several processes, kept in one array."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from minivlm.scenes.drawing.draw import SIZE, draw
from minivlm.scenes.facts import Scene, sample_scene

PAPER = (250, 247, 240)
CHUNK = 100  # scenes a process draws before it reports back


def draw_many(scenes: list[Scene], side: int = SIZE, workers: int | None = None, title: str = "drawing") -> np.ndarray:
    """Draw scenes as uint8 pictures (I, side, side, 3), in the order given.

    Each is drawn at 224 px and, for a smaller `side`, shrunk by the same bicubic filter as the image processor's.
    The pictures do not depend on `workers` (by default one per core; 1 draws in this process). Ctrl-C, which a terminal
    sends to all processes, is this one's to answer; the workers only finish the chunk at hand. Without a title there is
    no bar.
    """
    workers = workers or os.cpu_count() or 1
    chunks = [(scenes[i : i + CHUNK], side) for i in range(0, len(scenes), CHUNK)]
    bar = tqdm(total=len(scenes), desc=title, unit="picture", mininterval=2, disable=not title)
    parts = []
    if workers == 1 or len(chunks) == 1:
        for chunk in chunks:
            parts.append(_draw_chunk(chunk))
            bar.update(len(chunk[0]))
    else:  # spawned, not forked: a forked process inherits torch's threads in an unknown state
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            try:
                with _interrupts_held_back():
                    drawn = pool.map(_draw_chunk, chunks)  # starts the processes
                for part in drawn:
                    parts.append(part)
                    bar.update(len(part))
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)  # leaving the pool would wait for every chunk
                raise
    bar.close()
    return np.concatenate(parts)


def cached_pictures(file: Path, split: str, count: int, side: int, workers: int | None = None) -> np.ndarray:
    """The first `count` pictures of a split, drawn once and then read from `file` (memory-mapped).

    The file ends with the key of the program that drew it; with another one, or none, it is drawn again.

    Raises:
        ValueError: the file holds another number of pictures, or pictures of another size.
    """
    key = drawing_key().encode()
    if not _ends_with(file, key):
        pictures = draw_many([sample_scene(split, i) for i in range(count)], side, workers, f"drawing {split}")
        aside = file.with_suffix(".partial.npy")
        with aside.open("wb") as out:
            np.save(out, pictures)
            out.write(key)  # behind the array, where reading it does not look: one file, replaced as one
        os.replace(aside, file)
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
    for place in range(across * across):
        corner = (gap + place % across * step, gap + place // across * step)
        sheet.paste(draw(sample_scene(split, first + place)), corner)
    return sheet


def _ends_with(file: Path, key: bytes) -> bool:
    if not file.is_file() or file.stat().st_size < len(key):
        return False
    with file.open("rb") as content:
        content.seek(-len(key), os.SEEK_END)
        return content.read() == key


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes started in here never see Ctrl-C, not even while they import; this one answers it right afterwards.

    The mask is for them: they inherit it. It does not shield this process, of which any other thread may take the
    signal; an answer in the middle of starting a process would leave a pool that is waited for without end. Where there
    are no masks (Windows), workers ignore Ctrl-C as soon as they can: once everything is imported.
    """
    in_main = threading.current_thread() is threading.main_thread()  # only there handlers can be exchanged
    answer, came = signal.getsignal(signal.SIGINT), []
    exchanged = in_main and callable(answer)
    if exchanged:
        signal.signal(signal.SIGINT, lambda *signal_and_frame: came.append(signal_and_frame))
    masks = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masks else None
    try:
        yield
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if exchanged:
            signal.signal(signal.SIGINT, answer)
    if came:
        answer(*came[0])


def _draw_chunk(chunk: tuple[list[Scene], int]) -> np.ndarray:
    scenes, side = chunk
    pictures = [draw(scene) for scene in scenes]
    if side != SIZE:
        pictures = [picture.resize((side, side), Image.Resampling.BICUBIC) for picture in pictures]
    return np.stack([np.asarray(picture) for picture in pictures])
