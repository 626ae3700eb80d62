"""A folder that is written is whole or not there, and nothing of others is deleted; shown on checkpoints."""

import copy
import errno
import os
import resource
import shutil
import signal
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from training import META, assert_unharmed, contents, in_a_child, kill_at

from minivlm.checkpoint import load_checkpoint, read_meta, require_place, save_checkpoint
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime import files
from minivlm.runtime.files import MARK, FolderError, latest_folder, replace_folder, require_writable

FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def saved(model, processor, tmp_path) -> Path:
    return save_checkpoint(tmp_path / "sft", model, processor, META)


# ---- refused when saving: nothing half-written, the old one unharmed


@pytest.mark.parametrize(
    ("where", "number", "message"),
    [
        ("write_bytes", errno.ENOSPC, "No space left on device"),
        ("mkdir", errno.EROFS, "Read-only file system"),
        ("rename", errno.EACCES, "Permission denied"),
        ("_sync", errno.EDQUOT, "quota exceeded"),
    ],
)
def test_disk_trouble_at_every_step(saved, make_model, processor, monkeypatch, where, number, message):
    """Each step that touches the disk fails in turn, on its first, second, … call, until the save gets through."""
    before = contents(saved)
    changed = make_model(1)
    owner = files if where == "_sync" else Path
    genuine = getattr(owner, where)
    failed_at = 0
    while True:
        calls = 0

        def fails(*args, failed_at=failed_at, **kwargs):
            nonlocal calls
            calls += 1
            if calls == failed_at + 1:
                raise OSError(number, os.strerror(number))
            return genuine(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, where, fails)
            try:
                save_checkpoint(saved, changed, processor, META)
            except OSError as error:
                assert error.errno == number
                assert f"{saved} cannot be written" in str(error)
                assert message.lower() in str(error).lower()
                assert "unharmed" in str(error)
            else:
                break
        assert_unharmed(saved, before)
        failed_at += 1
    assert failed_at > 0
    assert torch.equal(load_checkpoint(saved)[0].projector.weight, changed.projector.weight)


def test_a_drive_that_cannot_sync_folders_is_good_enough(saved, make_model, processor, monkeypatch):
    genuine = os.fsync

    def only_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        genuine(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    save_checkpoint(saved, make_model(1), processor, META)
    load_checkpoint(saved)
    monkeypatch.setattr(os, "fsync", lambda handle: os.write(-1, b""))
    with pytest.raises(OSError, match="cannot be written"):
        save_checkpoint(saved, make_model(2), processor, META)


def test_a_folder_that_cannot_be_written(model, processor, tmp_path, monkeypatch):
    """As any user meets it, before training too; root may write anywhere, so for root the system call fails."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if os.geteuid() == 0:

        def refused(*_, **__):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(files, "TemporaryFile", refused)
    with pytest.raises(PermissionError, match=r"closed/sft cannot be written \(Permission denied\).*choose another"):
        save_checkpoint(closed / "sft", model, processor, META)
    assert list(closed.iterdir()) == []


@contextmanager
def no_file_larger_than(size: int):
    """The system truly refuses to write on beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_system_really_refuses_to_write_more(saved, make_model, processor):
    """A true write stops in the middle of the first, or only of the largest file."""
    before, changed = contents(saved), make_model(1)
    for limit in (100, max(map(len, before.values())) - 1):
        with no_file_larger_than(limit), pytest.raises(OSError, match=r"written \(File too large\)") as error_info:
            save_checkpoint(saved, changed, processor, META)
        assert error_info.value.errno == errno.EFBIG
        assert_unharmed(saved, before)


def test_a_full_disk_while_the_tokenizer_is_written(saved, model, processor):
    """The tokenizers library raises a bare Exception; here its file alone is too large."""
    before = contents(saved)
    largest = max(len(data) for name, data in before.items() if name != "tokenizer.json")
    processor.tokenizer = copy.deepcopy(processor.tokenizer)
    processor.tokenizer.add_tokens([f"word{i}" * 20 for i in range(2000)])
    with no_file_larger_than(largest + 5000), pytest.raises(OSError, match="cannot be written") as error_info:
        save_checkpoint(saved, model, processor, META)
    assert error_info.value.errno == errno.EFBIG
    assert_unharmed(saved, before)


@pytest.mark.parametrize(
    ("owner", "name", "trouble"),
    [(files, "_sync", KeyboardInterrupt), (MiniVLMProcessor, "save_pretrained", RuntimeError)],
)
def test_other_troubles_while_writing_keep_their_name(saved, model, processor, monkeypatch, owner, name, trouble):
    """Ctrl-C, or an error of the tokenizer's, leaves the old checkpoint and no rubbish."""

    def troubled(*_, **__):
        raise trouble("something else")

    before = contents(saved)
    with monkeypatch.context() as patch, pytest.raises(trouble, match="something else"):
        patch.setattr(owner, name, troubled)
        save_checkpoint(saved, model, processor, META)
    assert_unharmed(saved, before)


def killed_at_rename(number: int, folder: Path, model, processor) -> int:
    """Save in a forked process that is killed at that rename; its wait status."""

    def save_and_die():
        Path.rename = kill_at(Path.rename, number)
        save_checkpoint(folder, model, processor, {"stage": "pretrain"})

    return in_a_child(save_and_die)


@FORK
@pytest.mark.parametrize("rename", [1, 2])
def test_killed_at_a_rename(saved, model, processor, rename):
    """Killed before either rename, the old checkpoint loads; the next save clears up, succeeds, and keeps a user's."""
    (saved / "chapter.txt").write_text("years of work")
    assert killed_at_rename(rename, saved, model, processor) == -signal.SIGKILL
    assert load_checkpoint(saved)[2]["stage"] == read_meta(saved)["stage"] == "sft"
    save_checkpoint(saved, model, processor, {"stage": "pretrain"})
    assert [path.name for path in saved.parent.iterdir()] == ["sft"]
    assert load_checkpoint(saved)[2]["stage"] == "pretrain" and (saved / "chapter.txt").read_text() == "years of work"


def test_what_killed_runs_left_is_cleared_up(saved, make_model, processor):
    """Killed while writing the temporary folder, or after the second rename but before the old folder was deleted."""
    for left in ("sft.partial-1", "sft.replaced"):
        shutil.copytree(saved, saved.with_name(left))
        (saved.with_name(left) / MARK).touch()
    (saved.with_name("sft.partial-1") / "sft").mkdir()
    before = contents(saved)
    assert load_checkpoint(saved)[2]["stage"] == "sft"
    changed = make_model(1)
    save_checkpoint(saved, changed, processor, META)
    assert [path.name for path in saved.parent.iterdir()] == ["sft"]
    assert contents(saved) != before
    assert torch.equal(load_checkpoint(saved)[0].projector.weight, changed.projector.weight)


def test_what_a_user_put_into_a_folder_stays_and_what_an_earlier_save_wrote_goes(saved, make_model, processor):
    (saved / "notes").mkdir()
    for name in ("notes/chapter.txt", "my.json", "resume.pt"):
        (saved / name).write_text("years of work")
    (saved / "link").symlink_to("nowhere")
    before, changed = {path.name for path in saved.iterdir()}, make_model(1)
    save_checkpoint(saved, changed, processor, META)
    assert {path.name for path in saved.iterdir()} == before - {"resume.pt"} and (saved / "link").is_symlink()
    assert all((saved / name).read_text() == "years of work" for name in ("notes/chapter.txt", "my.json"))
    assert torch.equal(load_checkpoint(saved)[0].projector.weight, changed.projector.weight)


def test_what_others_named_like_a_temporary_folder_is_never_deleted(saved, make_model, processor):
    for name in ("sft.partial-x", f"sft.partial-{os.getpid()}"):
        saved.with_name(name).mkdir()
        (saved.with_name(name) / "chapter.txt").write_text("years of work")
    saved.with_name("sft.partial-link").symlink_to(saved, target_is_directory=True)
    (saved.parent / "sft.partial-file").write_text("years of work")
    there = {path.name for path in saved.parent.iterdir()}
    changed = make_model(1)
    save_checkpoint(saved, changed, processor, META)
    assert {path.name for path in saved.parent.iterdir()} == there
    assert all(path.read_text() == "years of work" for path in saved.parent.glob("sft.partial-*/chapter.txt"))
    assert len(list(saved.parent.glob("sft.partial-*/chapter.txt"))) == 2 and not (saved / MARK).exists()
    assert torch.equal(load_checkpoint(saved)[0].projector.weight, changed.projector.weight)


@pytest.mark.parametrize("other", ["thesis", "checkpoint", "file", "link"])
@pytest.mark.parametrize("there", [True, False])
def test_what_others_named_like_the_old_folder_is_never_deleted(saved, model, processor, other, there):
    """Even a checkpoint: without the mark it may be somebody's copy. The error comes before anything is written."""
    replaced, elsewhere = saved.with_name("sft.replaced"), saved.with_name("elsewhere")
    shutil.copytree(saved, elsewhere)
    (elsewhere / MARK).touch()
    if other == "thesis":
        replaced.mkdir()
        (replaced / "chapter.txt").write_text("years of work")
    elif other == "checkpoint":
        shutil.copytree(saved, replaced)
    elif other == "file":
        replaced.write_text("years of work")
    else:
        replaced.symlink_to(elsewhere, target_is_directory=True)
    if not there:
        shutil.rmtree(saved)
    before = {file: file.read_bytes() for file in saved.parent.rglob("*") if file.is_file()}
    for save in (
        lambda: save_checkpoint(saved, model, processor, META),
        lambda: replace_folder(saved).__enter__(),
        lambda: require_place(saved),
    ):
        with pytest.raises(FolderError, match=r"sft\.replaced is in the way .* give it another name") as error_info:
            save()
        assert "\n" not in str(error_info.value)
    assert {file: file.read_bytes() for file in saved.parent.rglob("*") if file.is_file()} == before


def test_only_a_folder_that_a_save_renamed_is_read_in_place_of_a_missing_one(saved):
    replaced = saved.with_name("sft.replaced")
    saved.rename(replaced)
    assert latest_folder(saved) == saved
    (replaced / MARK).touch()
    assert latest_folder(saved) == replaced


def test_a_folder_that_appears_beside_it_during_a_save_is_unharmed(saved):
    before, replaced = contents(saved), saved.with_name("sft.replaced")
    with pytest.raises(OSError, match="not empty"), replace_folder(saved):
        replaced.mkdir()
        (replaced / "chapter.txt").write_text("years of work")
    assert contents(saved) == before and (replaced / "chapter.txt").read_text() == "years of work"
    assert {path.name for path in saved.parent.iterdir()} == {"sft", "sft.replaced"}


def test_an_empty_folder_is_replaced_and_comes_back_after_a_failure(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"), replace_folder(out) as temporary:
        (temporary / "file").touch()
        patch.setattr(files, "_sync", lambda path: os.listdir("/no") if path == tmp_path else None)
    assert list(tmp_path.rglob("*")) == [out]
    with replace_folder(out) as temporary:
        (temporary / "file").touch()
    assert sorted(tmp_path.rglob("*")) == [out, out / "file"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_what_it_points_to_is_replaced(saved, make_model, processor, tmp_path, there):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "latest"
    link.symlink_to(Path("..") / "sft", target_is_directory=True)
    base = save_checkpoint(tmp_path / "base", make_model(1), processor, META)
    if not there:
        shutil.rmtree(saved)
    require_writable(link)
    changed = make_model(1)
    save_checkpoint(link, changed, processor, {"stage": "pretrain"}, ["projector"], base=base)
    assert link.is_symlink() and not saved.is_symlink() and read_meta(saved)["stage"] == "pretrain"
    assert {path.name for path in tmp_path.iterdir()} == {"links", "sft", "base"}
    assert [path.name for path in link.parent.iterdir()] == ["latest"]
    for folder in (link, saved):
        assert torch.equal(load_checkpoint(folder)[0].projector.weight, changed.projector.weight)


@FORK
def test_killed_between_the_renames_behind_a_link(saved, model, processor):
    link = saved.with_name("latest")
    link.symlink_to(saved, target_is_directory=True)
    assert killed_at_rename(2, link, model, processor) == -signal.SIGKILL
    assert not saved.exists() and (saved.with_name("sft.replaced") / MARK).is_file()
    assert read_meta(link)["stage"] == read_meta(saved)["stage"] == "sft"
    save_checkpoint(link, model, processor, {"stage": "pretrain"})
    assert {path.name for path in saved.parent.iterdir()} == {"sft", "latest"} and link.is_symlink()
    assert not (saved / MARK).exists()


def test_killed_while_the_old_one_is_deleted(saved, model, processor, monkeypatch):
    """What is left of it keeps its mark to the end, so that the next save clears it up."""

    def stopped(path, *_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.shutil, "rmtree", stopped)
        save_checkpoint(saved, model, processor, {"stage": "pretrain"})
    assert {path.name for path in saved.parent.iterdir()} > {"sft"}
    save_checkpoint(saved, model, processor, META)
    assert [path.name for path in saved.parent.iterdir()] == ["sft"]
