"""What `test_distributed.py` starts in several processes: the runs of a machine, with a folder of its own.

torchrun … tests/worker.py FOLDER JOB...
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from training import FEATURES, some_rows, stage

from minivlm.checkpoint import load_checkpoint, part_hashes
from minivlm.data import features
from minivlm.data.dataset import open_dataset
from minivlm.data.features import FeatureStore
from minivlm.data.images import ImageError
from minivlm.data.samples import SampleError
from minivlm.runtime.processes import ProcessError, from_all, launched, process_group, processes
from minivlm.train import Trainer, TrainingError

# name: stage, its parent, precision. 7 rows of 3 in a pass, 3 rows for two processes: nothing divides evenly.
RUNS = {
    "pretrain": (stage("pretrain", steps=8, accumulation=2), "base", "fp32"),
    "sft": (stage("sft", batch_size=7, accumulation=2), "parent", "fp32"),
    "bf16": (stage("sft", batch_size=3), "parent", "bf16"),
}
ROWS = some_rows(64)  # of "pretrain": one epoch, in whole windows
KILLED_IN = 6  # step


def machine_folder(folder: Path, number: int) -> Path:
    """The folder of a machine: no other one reads or writes it."""
    return folder / f"machine-{number}"


def learn(name: str, machine: Path, out: str = "", before=lambda rows: None, **changes):
    """One of the runs; returns the model, its processor and the log. `before` is called with the rows of every pass."""
    default_stage, parent, precision = RUNS[name]
    model, processor, _ = load_checkpoint(machine / parent)
    collate = processor.collate

    def noted(rows, **options):
        before(rows)
        return collate(rows, **options)

    processor.collate = noted
    options = {"parent": machine / parent, "precision": precision} | changes
    rows = options.pop("rows", ROWS)
    log = Trainer(model, processor, rows, options.pop("stage", default_stage), machine / (out or name), **options).fit()
    return model, processor, log


def everything(machine: Path) -> dict:
    """All runs: the rows that this process read in each pass, the losses, and the hashes of the final weights."""
    report = {}
    for name in RUNS:
        read = []
        model, processor, log = learn(name, machine, before=lambda rows, read=read: read.append([r.name for r in rows]))
        report[name] = {
            "seen": read,
            "losses": [entry["loss"] for entry in log],
            "hashes": part_hashes(model, processor),
        }
    return report


def refusals(machine: Path) -> dict:
    """The message of each process for an error that only one of them has; and a Ctrl-C that reaches only one."""
    here, messages = processes(), {}
    taken = machine / "taken"
    if here.is_main_process:
        taken.mkdir()
        (taken / "thesis.txt").write_text("years of work")
    poisoned = some_rows(64, FEATURES * torch.nan) if here.process_index == 1 else ROWS
    own = ROWS[here.process_index :]  # a file that has a line more on one machine
    for name, changes in {
        "rows": {"rows": own},
        "recipe": {"stage": replace(RUNS["pretrain"][0], clip_norm=1.0 + here.process_index)},
        "taken": {},
        "poisoned": {"rows": poisoned},
    }.items():
        try:
            learn("pretrain", machine, name, **changes)
        except (TrainingError, ProcessError, ValueError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    passes = []

    def press(rows):
        passes.append(rows)
        if here.process_index == 1 and len(passes) == 5:  # in the third step
            os.kill(os.getpid(), signal.SIGINT)

    try:
        learn("pretrain", machine, "stopped", before=press)
    except KeyboardInterrupt:
        messages["stopped"] = "yes"
    return messages


def killed(machine: Path) -> dict:
    """A run in which process 1 dies at step `KILLED_IN`, in the first attempt only."""
    passes = []

    def die(rows):
        passes.append(rows)
        mark = machine / "died"
        if processes().process_index == 1 and len(passes) == 2 * KILLED_IN and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    _, _, log = learn("sft", machine, "killed", before=die, save_every=2)
    return {"losses": [entry["loss"] for entry in log], "passes": len(passes)}


def left(machine: Path) -> dict:
    """A command that ends well, then one in which a process cannot read an image: is the group there before and after?

    Between the two the group is joined anew, by a store of files: the launcher's is used up.
    """
    report = {}
    for name in ("well", "error"):
        if not torch.distributed.is_initialized():
            here, store = processes(), torch.distributed.FileStore(str(machine / "store-of-files"), 2)
            torch.distributed.init_process_group("gloo", store=store, rank=here.process_index, world_size=2)
        before = torch.distributed.is_initialized()
        try:
            with process_group():
                from_all([name])
                if name == "error":
                    broken, whole = (some_rows(64, images=[machine / file] * 6) for file in ("broken.png", "red.png"))
                    learn("pretrain", machine, "unreadable", rows=[broken[0], *whole[1:]])
        except (ImageError, ProcessError) as error:
            report["said"] = f"{type(error).__name__}: {error}"
        report[name] = [before, torch.distributed.is_initialized()]
    return report


def stored(machine: Path) -> dict:
    """A store of each machine; then one in which an image cannot be read. How many images this process encoded."""
    features.BATCH = 2
    model, processor, _ = load_checkpoint(machine / "base")
    counts, message = [], ""
    model.vision.register_forward_hook(lambda _module, args, _output: counts.append(len(args[0])))
    FeatureStore.build(machine / "store", open_dataset(machine.parent / "index"), model, processor)
    encoded = sum(counts)
    try:
        FeatureStore.build(machine / "broken", open_dataset(machine.parent / "broken-index"), model, processor)
    except (SampleError, ProcessError) as error:
        message = f"{type(error).__name__}: {error}"
    return {"encoded": encoded, "said": message}


def main(folder: Path, names: list[str]) -> None:
    """Run jobs, each in its own folder; the report of this process for each job goes to its own file."""
    torch.set_num_threads(1)
    for job in (globals()[name] for name in names):
        report = {"processes": processes().num_processes, "launched": launched()}
        report |= job(machine_folder(folder / job.__name__, int(os.environ["GROUP_RANK"])))
        (folder / f"{job.__name__}-{processes().process_index}.json").write_text(json.dumps(report))


def require_no_threads() -> None:
    """No gloo thread may be left: with one, Python may abort at exit. Only Linux shows the names of threads."""
    ends = time.monotonic() + 30
    while left := [name for name in thread_names() if "gloo" in name]:  # a joined one is still listed for an instant
        assert time.monotonic() < ends, left
        time.sleep(0.05)


def thread_names() -> list[str]:
    names = []
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # it has ended
            names.append((task / "comm").read_text().strip())
    return names


if __name__ == "__main__":
    with process_group():
        main(Path(sys.argv[1]), sys.argv[2:])
    require_no_threads()
