"""Put finished runs into data/: `python scripts/ship.py runs/seed-0 runs/seed-1 runs/seed-2`.

The first run's two checkpoints are shipped (W as it is, the language model in 16 bits), with its page's tables; of all
runs the headlines, so that every page can show the seeds side by side.
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from minivlm.checkpoint import load_checkpoint, save_checkpoint
from minivlm.paths import BASE, PRETRAIN, SFT, data_folder
from minivlm.report import headline
from minivlm.run import RESULTS, SEEDS
from minivlm.train import LOG, text_probe

MADE_ANEW = ("format", "versions", "holds", "hashes", "base")  # written by save_checkpoint


def ship(runs: list[Path], data: Path) -> None:
    """Write `data/pretrain`, `data/sft` and `data/results` from finished runs."""
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
    heads = [headline(json.loads((run / RESULTS).read_text("utf-8"))) for run in runs]
    results.write_text(json.dumps(heads, ensure_ascii=False, indent=1), "utf-8")
    for table in ("table.md", "metrics.md"):
        shutil.copy(runs[0] / table, results.parent / table)


if __name__ == "__main__":
    ship([Path(run) for run in sys.argv[1:]], data_folder())
