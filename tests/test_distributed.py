"""Several processes on one machine, and on two, learn what one learns; if one dies, all stop and go on later.

Two machines are two torchrun agents here, each with a folder of its own: no disk is shared.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_oracles import loss_by_hand
from training import save_base, some_features
from worker import KILLED_IN, ROWS, RUNS, learn, machine_folder

from minivlm.checkpoint import load_checkpoint, read_meta

SCRIPT = Path(__file__).with_name("worker.py")
SETTINGS = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
PATIENCE = 120  # seconds, in which a job has ended, well or not
CLOSE = {"fp32": {"rel": 0, "abs": 1e-5}, "bf16": {"rel": 0, "abs": 0.02}}  # of losses

pytestmark = pytest.mark.slow


def launch(agents: int, processes: int, *command: str) -> list[subprocess.CompletedProcess]:
    """Start torchrun agents, with so many processes each, and wait for all of them."""
    environment = os.environ | SETTINGS | {"PYTHONPATH": str(SCRIPT.parents[1])}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--nnodes", str(agents), "--master_addr", "127.0.0.1", "--master_port", str(port)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), *place]
    started = [
        subprocess.Popen(
            [*torchrun, "--node_rank", str(number), *command],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(agents)
    ]  # fmt: skip
    try:
        said = [agent.communicate(timeout=PATIENCE) for agent in started]
    finally:
        for agent in started:
            agent.kill()
    return [
        subprocess.CompletedProcess(agent.args, agent.returncode, *each)
        for agent, each in zip(started, said, strict=True)
    ]


def work(folder: Path, job: str, agents: int, processes: int) -> list[dict]:
    """What every process has to tell about a job that ends well."""
    ended = launch(agents, processes, str(SCRIPT), str(folder), job)
    assert [agent.returncode for agent in ended] == [0] * agents, "\n".join(agent.stderr for agent in ended)
    return [json.loads((folder / f"{job}-{rank}.json").read_text()) for rank in range(agents * processes)]


@pytest.fixture
def make_machines(tmp_path, model, processor):
    """`make_machines(name, count)`: a folder with so many machines, each with the same base and parent."""
    first = machine_folder(tmp_path / "alone", 0)
    save_base(first / "base", model, processor)
    learn("pretrain", first, "parent")

    def make(name: str, count: int) -> Path:
        for number in range(count):
            for part in ("base", "parent"):
                shutil.copytree(first / part, machine_folder(tmp_path / name, number) / part)
        return tmp_path / name

    return make


@pytest.fixture
def alone(tmp_path, make_machines):
    """Each run in one process: its machine, the models and the logs."""
    machine = machine_folder(tmp_path / "alone", 0)
    runs = {name: learn(name, machine) for name in RUNS}
    return machine, {name: [entry["loss"] for entry in log] for name, (_, _, log) in runs.items()}


def distance(one: Path, other: Path) -> float:
    """The largest difference of two checkpoints' weights."""
    first, second = (load_checkpoint(folder)[0].state_dict() for folder in (one, other))
    return max((first[name] - second[name]).abs().max().item() for name in first)


def test_two_processes_and_two_machines_learn_what_one_process_learns(make_machines, alone):
    machine, losses = alone
    for agents, count in ((1, 2), (2, 1)):
        folder = make_machines(f"{agents}-{count}", agents)
        reports = work(folder, "everything", agents, count)
        assert [(report["processes"], report["launched"]) for report in reports] == [(2, 2), (2, 2)]
        for name, (stage, _, precision) in RUNS.items():
            first, second = (report[name] for report in reports)
            assert first["losses"] == second["losses"] and first["hashes"] == second["hashes"]
            assert first["losses"] == pytest.approx(losses[name], **CLOSE[precision])
            together = machine_folder(folder, 0) / name
            assert distance(together, machine / name) < (1e-5 if precision == "fp32" else 0.02)
            assert read_meta(together)["steps"] == stage.steps
        assert sorted(path.name for path in folder.glob("*/sft")) == ["sft"]  # written by the main process alone
        seen = [[row for rows in report["pretrain"]["seen"] for row in rows] for report in reports]
        assert [len(set(rows)) for rows in seen] == [32, 32] and set(seen[0]).isdisjoint(seen[1])
        assert sorted(seen[0] + seen[1]) == sorted(row.where for row in ROWS)  # an epoch: every row once


def test_the_loss_is_the_mean_over_the_tokens_of_all_processes(make_machines):
    """By hand, for the first step; the mean of the processes' own means is another number."""
    folder = make_machines("two", 1)
    machine = machine_folder(folder, 0)
    reports = work(folder, "everything", 1, 2)
    model, processor, _ = load_checkpoint(machine / "parent")
    features, rendered = some_features(model.config), {row.where: row for row in ROWS}

    def loss(names):
        rows = [processor.render(rendered[name].messages(), name) for name in names]
        for row in rows:
            row.patch_features = features[row.pictures] if row.pictures else None
        batch = processor.collate(rows)
        with torch.no_grad():
            return loss_by_hand(model(**batch).logits, batch["labels"])

    shares = [[name for part in report["sft"]["seen"][:2] for name in part] for report in reports]  # two passes
    assert [len(share) for share in shares] == [7, 7]
    assert {len(rendered[name].images) for share in shares for name in share} == {0, 1, 2}
    first = reports[0]["sft"]["losses"][0]
    assert first == pytest.approx(loss(shares[0] + shares[1]), abs=1e-5)
    assert abs(first - (loss(shares[0]) + loss(shares[1])) / 2) > 1e-3


def test_what_one_process_finds_wrong_stops_all_of_them(make_machines):
    folder = make_machines("two", 2)
    first, second = work(folder, "refusals", 2, 1)
    assert first["rows"] == second["rows"]
    assert "process 1 of 2 was given another run than the main process: its rows is" in first["rows"]
    assert "its recipe is" in first["recipe"] == second["recipe"]
    assert first["taken"].startswith("CheckpointError: ") and "exists and is no checkpoint" in first["taken"]
    assert second["taken"] == "ProcessError: the main process stopped: " + first["taken"].removeprefix(
        "CheckpointError: "
    )
    assert "step 1 has the loss nan" in first["poisoned"] and first["poisoned"] == second["poisoned"]
    assert first["stopped"] == second["stopped"] == "yes"  # a Ctrl-C that reaches one of them
    assert read_meta(machine_folder(folder, 0) / "stopped")["steps"] == 3
    left = {path.name for number in (0, 1) for path in machine_folder(folder, number).iterdir()}
    assert left == {"base", "parent", "taken", "stopped"}


def test_a_killed_worker_ends_the_job_and_the_same_command_goes_on(make_machines, alone, tmp_path):
    """With as many processes as before to the last bit, with another number to tolerance."""
    machine, losses = alone
    never = make_machines("never", 2)
    expected = work(never, "everything", 2, 1)
    folder = make_machines("killed", 2)
    first, second = (machine_folder(folder, number) for number in (0, 1))
    ended = launch(2, 1, str(SCRIPT), str(folder), "killed")
    assert all(agent.returncode for agent in ended)
    assert {path.name for path in first.iterdir()} == {"base", "parent", "killed"}
    assert {path.name for path in second.iterdir()} == {"base", "parent", "died"}
    _, _, meta = load_checkpoint(first / "killed")
    assert (meta["steps"], meta["finished"]) == (KILLED_IN - 2, False)
    shutil.copytree(first / "killed", machine / "killed")

    again = work(folder, "killed", 2, 1)
    assert [report["passes"] for report in again] == [2 * 2, 2 * 2]  # two steps of two passes were left
    assert again[0]["losses"] == again[1]["losses"] == expected[0]["sft"]["losses"]
    same = machine_folder(never, 0) / "sft"
    for file in ("projector.safetensors", "language_model.safetensors"):
        assert (first / "killed" / file).read_bytes() == (same / file).read_bytes()

    _, _, log = learn("sft", machine, "killed")
    assert [entry["loss"] for entry in log] == pytest.approx(losses["sft"], **CLOSE["fp32"])
    assert distance(machine / "killed", machine / "sft") < 1e-5


def test_a_picture_that_one_process_cannot_read_ends_the_job(make_machines):
    folder = make_machines("two", 2)
    for number in (0, 1):
        Image.new("RGB", (8, 8), "red").save(machine_folder(folder, number) / "red.png")
        (machine_folder(folder, number) / "broken.png").write_bytes(b"no picture")
    ended = launch(2, 1, str(SCRIPT), str(folder), "unreadable")
    assert all(agent.returncode for agent in ended)
    named = [agent.stderr.count("PictureError") > 0 and "broken.png" in agent.stderr for agent in ended]
    assert sorted(named) == [False, True]
    assert not list(folder.glob("*/unreadable*"))
