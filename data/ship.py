"""Copy finished runs into data/: `python data/ship.py runs/seed-0 runs/seed-1 runs/seed-2 --timed runs/fp32`.

Of the first run: its two checkpoints (W as it is, the language model in 16 bits), its answers about the seven images
and the tables of its report. Of all runs: the headline numbers. Of the first run and those behind `--timed`: minutes
and memory, by precision. `python docs/build.py` then writes the pages.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from minivlm.checkpoint import load_checkpoint, save_checkpoint
from minivlm.pipeline import RESULTS, SEEDS
from minivlm.report import headline
from minivlm.runtime.files import write_file, write_json
from minivlm.runtime.paths import BASE, PRETRAIN, SFT, data_folder
from minivlm.train import LOG, text_probe

MEASURED = "results/measured.json"
MADE_ANEW = ("format", "versions", "holds", "hashes", "base")  # written by save_checkpoint


def ship(runs: Sequence[Path], data: Path, timed: Sequence[Path] = ()) -> None:
    """Write `data/pretrain`, `data/sft` and `data/results` from finished runs, and what those in `timed` cost."""
    for name, parent, parts, dtype in (
        (PRETRAIN, BASE, ["projector"], None),
        (SFT, PRETRAIN, ["projector", "language_model"], torch.float16),
    ):
        model, processor, meta = load_checkpoint(runs[0] / name)
        if dtype is not None:  # the probe is measured on what is stored
            model.load_state_dict({key: value.to(dtype).float() for key, value in model.state_dict().items()})
        kept = {key: value for key, value in meta.items() if key not in MADE_ANEW}
        kept["text_probe"] = text_probe(model, processor)
        log = {LOG: (runs[0] / name / LOG).read_bytes()}
        save_checkpoint(data / name, model, processor, kept, parts, base=data / parent, dtype=dtype, extra=log)
    results = data / SEEDS
    results.parent.mkdir(exist_ok=True)
    write_json(results, [headline(_read(run)) for run in runs])
    cost = {made["precision"]: _cost(made) for made in map(_read, (runs[0], *timed))}
    write_json(data / MEASURED, {"run": cost})
    answers = json.dumps(_read(runs[0])["table"], ensure_ascii=False, indent=1)
    write_file(results.parent / "table.json", answers + "\n")
    for table in ("table.md", "metrics.md"):
        shutil.copy(runs[0] / table, results.parent / table)


def _read(run: Path) -> dict:
    return json.loads((run / RESULTS).read_text("utf-8"))


def _cost(results: dict) -> dict:
    """What a run took, and the command that it was."""
    minutes, gigabytes = results["seconds"]["total"] / 60, results["peak_memory_gb"]
    return {"minutes": round(minutes, 2), "gigabytes": round(gigabytes, 2), "command": results["command"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--timed", nargs="*", type=Path, default=[])
    options = parser.parse_args()
    ship(options.runs, data_folder(), options.timed)
