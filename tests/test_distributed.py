"""Two processes learn what one learns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training import save_base, some_features, some_rows, stage

from minivlm.checkpoint import load_checkpoint, read_meta
from minivlm.train import train

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_from_disjoint_rows(tmp_path, model, processor, config):
    base = save_base(tmp_path / "base", model, processor)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    subprocess.run([*command, str(base), str(tmp_path)], env=os.environ | settings, check=True, timeout=500)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))

    assert first["processes"] == second["processes"] == 2
    log = train(
        model, processor, some_rows(80), stage("pretrain", steps=20), tmp_path / "alone",
        parent=base, features=some_features(config), precision="fp32",
    )  # fmt: skip
    assert len(first["losses"]) == 20 and first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx([entry["loss"] for entry in log], rel=0, abs=1e-5)

    for report in (first, second):
        assert [len(rows) for rows in report["seen"]] == [2] * 20
    seen = [row for report in (first, second) for rows in report["seen"] for row in rows]
    assert sorted(seen) == sorted(row.where for row in some_rows(80))  # every row once, in one process or the other

    alone, _, _ = load_checkpoint(tmp_path / "alone")
    together, _, _ = load_checkpoint(tmp_path / "out")
    assert (alone.projector.weight - together.projector.weight).abs().max() < 1e-5

    assert first["stopped"] and second["stopped"]  # a Ctrl-C that reaches one of them stops both
    assert read_meta(tmp_path / "stopped")["steps"] == 3
