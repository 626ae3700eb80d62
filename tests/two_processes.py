"""What `test_distributed.py` starts twice: train, write down what this process saw, then be interrupted.

torchrun --nproc_per_node 2 tests/two_processes.py BASE FOLDER
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from training import some_features, some_rows, stage

from minivlm.checkpoint import load_checkpoint
from minivlm.train import train


def main(base: Path, folder: Path) -> None:
    """One run of 20 steps, and one in which the second process alone is interrupted."""
    torch.set_num_threads(1)
    accelerator = Accelerator()
    model, processor, _ = load_checkpoint(base)
    collate, seen = processor.collate, []

    def noted(rows, **options):
        seen.append([row.where for row in rows])
        return collate(rows, **options)

    processor.collate = noted
    options = {"parent": base, "features": some_features(model.config), "precision": "fp32"}
    log = train(model, processor, some_rows(80), stage("pretrain", steps=20), folder / "out", **options)
    report = {"processes": accelerator.num_processes, "seen": seen.copy(), "losses": [entry["loss"] for entry in log]}

    def interrupt(rows, **options):
        if accelerator.process_index == 1 and len(seen) == 22:
            os.kill(os.getpid(), signal.SIGINT)
        return noted(rows, **options)

    processor.collate = interrupt
    try:
        train(model, processor, some_rows(80), stage("pretrain", steps=20), folder / "stopped", **options)
    except KeyboardInterrupt:
        report["stopped"] = True
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
