"""What a store of features is worth at the true 26M shape:

    `python tests/benchmarks/feature_store.py`, some minutes, on Linux.

Random weights of CLIP-ViT-B/16, drawn scenes as JPEG files, an index, and the decision as `minivlm train --features`
makes it. Then the store is built, and every picture's features are read back in a random order, after the system was
asked to forget the files. Writes `data/results/feature_store.json`: milliseconds a picture, from how many epochs on the
store pays, and how far the process's private memory moved while all was read (`smaps_rollup`; `held` is Private_Dirty).
Others may work on the machine: `load_before` is its load at the start.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from minivlm.checkpoint import load_checkpoint
from minivlm.convert.hub import RANDOM, import_published
from minivlm.data.dataset import CheckedRows, read_index, write_index
from minivlm.data.feature_store import FeatureStore, fill, plan_store, worth
from minivlm.runtime.paths import data_folder
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.facts import sample_scene

FILE = "results/feature_store.json"
EPOCHS = 4  # of the recipe's first stage
THE_SEEDS = 595_376  # pictures of that stage


def index_of_drawn(folder: Path, count: int, processor) -> CheckedRows:
    """One row for each of so many drawn pictures."""
    lines = []
    for i in range(count):
        draw(sample_scene("train", i)).save(folder / f"{i}.jpg", quality=90)
        turns = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "a picture"}]
        lines.append(json.dumps({"conversations": turns, "image": f"{i}.jpg"}))
    (folder / "rows.jsonl").write_text("\n".join(lines), "utf-8")
    write_index(folder / "index", folder / "rows.jsonl", processor, decode=True)
    return read_index(folder / "index")


def held() -> int:
    """The process's memory that nobody can take away, in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))


def read_all(store: FeatureStore, rows: CheckedRows) -> dict:
    """Every picture once, in a random order."""
    pictures = [row.images for row in rows]
    random.Random(0).shuffle(pictures)
    for file in store.folder.iterdir():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, most, seconds = held(), 0, 0.0
    for picture in pictures:
        began = time.perf_counter()
        store[picture]
        seconds += time.perf_counter() - began
        most = max(most, held())
    return {"milliseconds": 1e3 * seconds / len(pictures), "held_mb": (most - before) / 1e6}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    found = {"command": " ".join(["python", *sys.argv]), "load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        import_published(Path(folder) / "base", RANDOM, RANDOM)
        model, processor, _ = load_checkpoint(Path(folder) / "base")
        rows = index_of_drawn(Path(folder), options.pictures, processor)
        plan = plan_store(Path(folder) / "store", rows, model, processor, options.precision)
        decision = worth(plan, rows, model, processor, EPOCHS)
        print(decision)
        began = time.perf_counter()
        store = fill(plan, rows, model, processor)
        built = time.perf_counter() - began
        found |= asdict(decision) | {"pays_from": decision.pays_from, "wins": decision.wins}
        found |= {"build": {"milliseconds": 1e3 * built / len(store), "bytes": plan.bytes}}
        found |= {"read": read_all(store, rows)}
    found |= {"gigabytes_of_the_seed": THE_SEEDS * plan.bytes / options.pictures / 1e9}
    found |= {"precision": options.precision, "torch": torch.__version__, "threads": torch.get_num_threads()}
    file = data_folder() / FILE
    file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
