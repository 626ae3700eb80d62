"""Atomic writes of files and folders, and hashes of what is in them.

New content is written under a temporary name beside its destination, forced onto the disk, and renamed at the end. So a
killed process, a full disk or Ctrl-C leave what was there before. Temporary folders carry a mark; no folder without it
is ever deleted. Where the destination is a link, what it points to is replaced.
"""

import errno
import glob
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from typing import Any
from uuid import uuid4

import torch
import transformers

MARK = ".minivlm-temporary"


class FolderError(ValueError):
    """A folder may not be replaced. The message says why, and what to do."""


# ---- writing


@contextmanager
def replace_file(file: str | Path) -> Iterator[Path]:
    """A temporary path to write to: it becomes `file` when the block ends, and is deleted when the block fails.

    Raises OSError where it cannot be written; the file that was there before is unharmed.
    """
    target = Path(file).resolve()
    temporary = target.with_name(f"{target.stem}.partial-{uuid4().hex}{target.suffix}")
    with _explained(file):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _sync(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def write_file(file: str | Path, content: str | bytes) -> None:
    """Replace a file by a text, in UTF-8, or by bytes."""
    with replace_file(file) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(file: str | Path, content: Any) -> None:
    """Replace a file by some JSON, one line for each value."""
    write_file(file, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def replace_folder(folder: str | Path, own: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder to write in: it becomes `folder` when the block ends, and is deleted when the block fails.

    Of what lies in `folder`, the names that match `own` are replaced; anything else is carried over.

    Raises:
        FolderError: the working directory is in it, or another's folder has the name of its predecessor.
        OSError: it cannot be written. The folder that was there before is unharmed.
    """
    _require_names(folder)
    target = Path(folder).resolve()
    with _explained(folder):
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f"{glob.escape(target.name)}.partial-*"):  # by a process that was killed
            _remove(left)
        around = Path(mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
        try:
            (around / MARK).touch()
            temporary = around / target.name  # the folder itself never has the mark
            temporary.mkdir()
            yield temporary
            _carry_over(latest_folder(target), temporary, own)
            for path in (*temporary.iterdir(), temporary):
                if not path.is_symlink():
                    _sync(path)
            _exchange(temporary, target)
        finally:
            with suppress(OSError):
                _remove(around) if _is_ours(around) else around.rmdir()
    with suppress(OSError):  # the new one is in place; the next write clears up what is left
        _remove(former_folder(target))


def latest_folder(folder: str | Path) -> Path:
    """The folder, or its predecessor if a write was killed in the instant between its two renames."""
    folder = Path(folder)
    return former_folder(folder) if not folder.exists() and _is_ours(former_folder(folder)) else folder


def former_folder(folder: str | Path) -> Path:
    """The name that a folder's predecessor has from the new one's arrival until it is deleted."""
    folder = Path(folder).resolve()
    return folder.with_name(f"{folder.name}.replaced")


def require_replaceable(folder: str | Path, sign: str, kind: str) -> None:
    """Refuse a destination that is not free, empty, or of the kind that will replace it: a folder with a file `sign`.

    Raises FolderError where it is something else, and as `replace_folder` does; `kind` is for the message.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / sign).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{folder} exists and is no {kind}; it is not overwritten, choose another folder")
    _require_names(folder)


def require_writable(folder: str | Path) -> None:
    """Raise OSError where a folder cannot be written, before hours are spent on what it will hold."""
    parent = Path(folder).resolve().parent
    with _explained(folder):
        parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=parent).close()


def _require_names(folder: str | Path) -> None:
    """Refuse to replace the working directory, or to take a name that something of others has."""
    target, former = Path(folder).resolve(), former_folder(folder)
    if Path.cwd().is_relative_to(target):
        raise FolderError(f"{folder} would be replaced as a whole while you are in it; go up and give its name")
    if os.path.lexists(former) and not _is_ours(former):
        raise FolderError(
            f"{former} is in the way of a save as {folder}, and is not deleted, since it has no mark of this "
            f"program; give it another name ({target.name}, if it is what you want to go on from)"
        )


def _exchange(temporary: Path, target: Path) -> None:
    """Put the new folder in the old one's position. Killed in between, `latest_folder` still finds the old one."""
    former = former_folder(target)
    try:
        if target.exists():
            _remove(former)
            (target / MARK).touch()  # before it has a name under which it may be deleted
            target.rename(former)
        temporary.rename(target)
        _sync(target.parent)
    except OSError:
        if not temporary.exists():
            target.rename(temporary)
        if not target.exists() and _is_ours(former):
            former.rename(target)
        (target / MARK).unlink(missing_ok=True)
        raise


def _carry_over(target: Path, temporary: Path, own: Sequence[str]) -> None:
    """Copy what a user put into a folder; the original goes with the folder that is replaced."""
    for path in target.iterdir() if target.exists() else ():
        copy = temporary / path.name
        if os.path.lexists(copy) or any(fnmatch(path.name, name) for name in (*own, MARK)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, copy, symlinks=True)
        else:
            shutil.copy2(path, copy, follow_symlinks=False)


def _is_ours(folder: Path) -> bool:
    """Whether a folder may be deleted."""
    return not folder.is_symlink() and (folder / MARK).is_file()


def _remove(folder: Path) -> None:
    """Delete a folder of ours and no other; its mark last: killed in between, it still shows whose it is."""
    if not _is_ours(folder):
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    shutil.rmtree(folder)


def _sync(path: Path) -> None:
    """Force a file or a folder's entries onto the disk."""
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network drives cannot
            raise
    finally:
        os.close(handle)


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    """Turn what the system says about a failed write into a line that names `path`."""
    try:
        yield
    except Exception as error:
        target, name = Path(path).resolve(), getattr(error, "filename", None)
        if isinstance(name, str | bytes):  # the system names no file where a disk is full
            file = Path(os.fsdecode(name)).absolute()
            if not (target.is_relative_to(file) or file.is_relative_to(target.parent)):
                raise  # a file that was to be read
        code, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
        if number := re.search(r"os error (\d+)", str(error)):  # of safetensors' and tokenizers' own errors
            code, reason = int(number[1]), os.strerror(int(number[1]))
        if code is None and not isinstance(error, OSError):
            raise
        raise OSError(
            code,
            f"{path} cannot be written ({reason or error}): make sure that the disk has room and that you may write "
            "there, or choose another destination; what was there before is unharmed",
        ) from error


# ---- identity


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes and values as 32-bit floats; neither order nor storage in 16 bits changes it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(values.numpy().astype("<f4", copy=False))
    return digest.hexdigest()


def hash_tokenizer(tokenizer: transformers.PreTrainedTokenizerFast | str) -> str:
    """SHA-256 of what decides the ids of a text, but not of how a batch was padded; a string is a `tokenizer.json`."""
    text = tokenizer if isinstance(tokenizer, str) else tokenizer.backend_tokenizer.to_str()
    content = json.loads(text) | {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide what a file holds."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
