"""Several processes, on one machine or two, train the same weights as one; if one dies, all stop and can resume.

Two machines are two torchrun agents here, each with a folder of its own: no disk is shared.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from rows import NOISE, contents, different_images, noise_rows, with_noise, write
from torch.nn.utils import parameters_to_vector
from training import loss_by_hand, save_base
from worker import KILLED_IN, ROWS, RUNS, learn, machine_folder

import minivlm.runtime.processes
from minivlm import cli
from minivlm.checkpoint import load_checkpoint, read_meta
from minivlm.data import features
from minivlm.data.dataset import open_dataset, write_dataset
from minivlm.data.features import FeatureStore
from minivlm.model import draw_projector
from minivlm.runtime.processes import ProcessError, process_group, processes
from minivlm.train import LOG

SCRIPT = Path(__file__).with_name("worker.py")
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    "PYTHONPATH": str(SCRIPT.parents[1]),
}
if torch.accelerator.is_available():  # elsewhere no setting is needed
    SETTINGS["ACCELERATE_USE_CPU"] = "true"
JOBS = {(1, 2): ["everything", "stored", "left"], (2, 1): ["everything", "stored", "refusals"]}  # of one launch each
PATIENCE = 400  # seconds, in which a launch has ended, well or not
LOSSES = {"fp32": {"rel": 0, "abs": 1e-5}, "bf16": {"rel": 0, "abs": 0.02}}
WEIGHTS = {"fp32": 1e-4, "bf16": 0.1}  # see `relative_distance`

pytestmark = pytest.mark.slow
TWO = pytest.mark.parametrize(("agents", "processes"), JOBS, ids=["two processes", "two machines"])


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_all(*commands: list[str]) -> list[subprocess.CompletedProcess]:
    """Start all commands at the same time, and wait until the last has ended."""
    options = {"env": os.environ | SETTINGS, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-m", *command], **options) for command in commands]
    try:
        outputs = [process.communicate(timeout=PATIENCE) for process in started]
    finally:
        for process in started:
            process.terminate()  # its workers with it
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *each)
        for process, each in zip(started, outputs, strict=True)
    ]


def torchrun(folder: Path, jobs: list[str], agents: int, processes: int) -> list[subprocess.CompletedProcess]:
    """Run jobs of the worker with this number of agents, and of processes for each."""
    common = ["torch.distributed.run", "--nproc_per_node", str(processes), "--nnodes", str(agents)]
    common += ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    end = [str(SCRIPT), str(folder), *jobs]
    return run_all(*([*common, "--node_rank", str(number), *end] for number in range(agents)))


def run_jobs(folder: Path, jobs: list[str], agents: int, processes: int) -> None:
    agents_ended = torchrun(folder, jobs, agents, processes)
    assert [agent.returncode for agent in agents_ended] == [0] * agents, "\n".join(a.stderr for a in agents_ended)


def reports(folder: Path, job: str) -> list[dict]:
    return [json.loads((folder / f"{job}-{rank}.json").read_text()) for rank in (0, 1)]


def with_images(folder: Path, processor) -> None:
    """What the jobs of a launch read: data sets for `stored`, image files for `left`; one image of each is none."""
    for name, index in (("pictures", "index"), ("broken-pictures", "broken-index")):
        stored = folder / "stored"
        write_dataset(stored / index, write(with_noise(stored / name), noise_rows()), processor)
    third_image(folder / "stored" / "broken-index").write_bytes(b"no picture")
    for machine in (folder / "left").glob("*"):
        Image.new("RGB", (8, 8), "red").save(machine / "red.png")
        (machine / "broken.png").write_bytes(b"no picture")


def third_image(index: Path) -> Path:
    """An image of the second batch of two, which is the second process's."""
    return different_images(open_dataset(index))[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The folder of all machines of this module."""
    return tmp_path_factory.mktemp("machines")


@pytest.fixture
def make_machines(root, model, processor):
    """`make_machines(name, count)`: a folder with so many machines, each with the same base and the same stage 1."""
    first = machine_folder(root / "alone", 0)
    if not first.exists():
        save_base(first / "base", model, processor)
        learn("pretrain", first, "parent")

    def make(name: str, count: int) -> Path:
        for number in range(count):
            for part in ("base", "parent"):
                shutil.copytree(first / part, machine_folder(root / name, number) / part)
        return root / name

    return make


@pytest.fixture
def one_process(root, make_machines):
    """All runs in one process: its machine, and the losses of each."""
    machine = machine_folder(root / "alone", 0)  # a run that is there is only read
    return machine, {name: [entry["loss"] for entry in learn(name, machine)[2]] for name in RUNS}


@pytest.fixture
def launch(root, make_machines, processor):
    """`launch(agents, processes, job)`: the job's folder and its reports; a launch does all its jobs, once."""

    def make(agents: int, processes: int, job: str) -> tuple[Path, list[dict]]:
        folder, jobs = root / f"{agents}-times-{processes}", JOBS[agents, processes]
        if not folder.exists():
            for name in jobs:
                make_machines(f"{folder.name}/{name}", agents)
            with_images(folder, processor)
            run_jobs(folder, jobs, agents, processes)
        return folder / job, reports(folder, job)

    return make


def relative_distance(one: Path, other: Path, parent: Path) -> float:
    """The distance between two checkpoints' weights, relative to how far training moved them from their parent."""
    start, first, second = (load_checkpoint(folder)[0] for folder in (parent, one, other))
    if read_meta(parent)["stage"] == "base":
        draw_projector(start, seed=0)
    start, first, second = (parameters_to_vector(model.parameters()).detach() for model in (start, first, second))
    return ((first - second).norm() / (second - start).norm()).item()


@TWO
def test_together_they_learn_what_one_process_learns(agents, processes, launch, one_process):
    machine, losses = one_process
    folder, results = launch(agents, processes, "everything")
    assert [(report["processes"], report["launched"]) for report in results] == [(2, 2), (2, 2)]
    for name, (stage, parent, precision) in RUNS.items():
        first, second = (report[name] for report in results)
        assert first["losses"] == second["losses"] and first["hashes"] == second["hashes"]
        assert first["losses"] == pytest.approx(losses[name], **LOSSES[precision])
        written = machine_folder(folder, 0) / name
        assert relative_distance(written, machine / name, machine / parent) < WEIGHTS[precision]
        assert read_meta(written)["steps"] == stage.steps
    assert len(list(folder.glob("*/sft"))) == 1  # only the main process writes


@TWO
def test_in_an_epoch_every_row_is_seen_once_by_one_of_them(agents, processes, launch):
    rows_read = [report["pretrain"]["seen"] for report in launch(agents, processes, "everything")[1]]
    assert [[len(rows) for rows in passes] for passes in rows_read] == [[2] * 16, [2] * 16]  # eight steps of two passes
    one, other = ({row for rows in passes for row in rows} for passes in rows_read)
    assert len(one) == len(other) == 32 and one | other == {row.name for row in ROWS}


def test_the_loss_is_the_mean_over_the_tokens_of_all_processes(launch):
    """By hand, for the first step; the mean of the processes' means would be another number."""
    folder, results = launch(1, 2, "everything")
    model, processor, _ = load_checkpoint(machine_folder(folder, 0) / "parent")
    named = {row.name: row for row in ROWS}

    def count(name):
        known = named[name].patch_features
        return 0 if known is None else len(known)

    def loss(names):
        rows = [processor.encode(named[name]) for name in names]
        batch = processor.collate(rows)
        with torch.no_grad():
            return loss_by_hand(model(**batch).logits, batch["labels"])

    shares = [[name for rows in report["sft"]["seen"][:2] for name in rows] for report in results]  # two passes
    assert [len(share) for share in shares] == [7, 7]
    assert set(map(count, shares[0] + shares[1])) == {0, 1, 2}
    first = results[0]["sft"]["losses"][0]
    assert first == pytest.approx(loss(shares[0] + shares[1]), abs=1e-5)
    assert abs(first - (loss(shares[0]) + loss(shares[1])) / 2) > 1e-3


def test_what_one_process_finds_wrong_stops_all_of_them(launch):
    folder, (first, second) = launch(2, 1, "refusals")
    assert first["rows"] == second["rows"]
    assert "process 1 of 2 was given another run than the main process: its rows is" in first["rows"]
    assert "its recipe is" in first["recipe"] == second["recipe"]
    assert first["taken"].startswith("FolderError: ") and "exists and is no checkpoint" in first["taken"]
    assert second["taken"] == "ProcessError: the main process stopped: " + first["taken"].removeprefix("FolderError: ")
    assert "has the loss nan" in first["poisoned"] and first["poisoned"] == second["poisoned"]
    assert first["stopped"] == second["stopped"] == "yes"  # a Ctrl-C that reaches one of them
    assert read_meta(machine_folder(folder, 0) / "stopped")["steps"] == 3
    left = {path.name for number in (0, 1) for path in machine_folder(folder, number).iterdir()}
    assert left == {"base", "parent", "taken", "stopped"}


def test_a_killed_worker_ends_the_job_and_the_same_command_goes_on(root, make_machines, one_process, launch):
    """With as many processes as before to the last bit, with another number to tolerance."""
    machine, losses = one_process
    never, expected = launch(2, 1, "everything")
    folder = make_machines("killed/killed", 2)
    first, second = (machine_folder(folder, number) for number in (0, 1))
    agents = torchrun(root / "killed", ["killed"], 2, 1)
    assert all(agent.returncode for agent in agents)
    assert "ProcessError: another process stopped, and its own words say why" in agents[0].stderr
    assert {path.name for path in first.iterdir()} == {"base", "parent", "killed"}
    assert {path.name for path in second.iterdir()} == {"base", "parent", "died"}
    _, _, meta = load_checkpoint(first / "killed")
    assert (meta["steps"], meta["finished"]) == (KILLED_IN - 2, False)
    shutil.copytree(first / "killed", machine / "killed")

    run_jobs(root / "killed", ["killed"], 2, 1)
    again = reports(root / "killed", "killed")
    assert [report["passes"] for report in again] == [2 * 2, 2 * 2]  # two steps of two passes were left
    assert again[0]["losses"] == again[1]["losses"] == expected[0]["sft"]["losses"]
    same = machine_folder(never, 0) / "sft"
    for file in ("projector.safetensors", "language_model.safetensors"):
        assert (first / "killed" / file).read_bytes() == (same / file).read_bytes()

    _, _, log = learn("sft", machine, "killed")
    assert [entry["loss"] for entry in log] == pytest.approx(losses["sft"], **LOSSES["fp32"])
    assert relative_distance(machine / "killed", machine / "sft", machine / "parent") < WEIGHTS["fp32"]


@TWO
def test_features_are_encoded_once_a_machine_and_one_that_cannot_be_stops_all(
    launch, model, processor, agents, processes, tmp_path, monkeypatch
):
    """Two processes share the batches; on two disks each machine makes all of its own. The bytes are those of one."""
    folder, results = launch(agents, processes, "stored")
    encoded = [report["encoded"] for report in results]
    assert encoded == ([6, 4] if agents == 1 else [10, 10]) and sum(encoded) == agents * NOISE
    monkeypatch.setattr(features, "BATCH", 2)
    FeatureStore.build(tmp_path / "alone", open_dataset(folder / "index"), model, processor)
    for number in range(agents):
        assert contents(machine_folder(folder, number) / "store") == contents(tmp_path / "alone")
    broken = third_image(folder / "broken-index")
    where = next(sample.name for sample in open_dataset(folder / "broken-index") if broken in sample.images)
    first, second = (report["said"] for report in results)
    assert second.startswith(f"SampleError: {where}: {broken}: this is not an image")
    if agents == 1:
        assert first == "ProcessError: process 1 of 2 stopped: " + second.removeprefix("SampleError: ")
    else:
        assert first == second


def test_the_group_is_left_at_the_end_of_a_command_and_after_an_image_that_one_process_cannot_read(launch):
    folder, results = launch(1, 2, "left")
    assert [report[name] for report in results for name in ("well", "error")] == [[True, False]] * 4
    one, other = sorted(report["said"] for report in results)
    assert one.startswith("ImageError: ") and "broken.png" in one
    assert other.startswith("ProcessError: another process stopped, and its own words say why")
    assert not list(folder.glob("*/unreadable*"))


@pytest.mark.parametrize("problem", [None, ValueError("a bad file"), KeyboardInterrupt()])
def test_the_command_line_leaves_the_group(tmp_path, monkeypatch, problem):
    """Of one process here; a command that joined none ends as ever."""
    group, joined = torch.distributed, []

    def command(*_):
        store = group.FileStore(str(tmp_path / "store"), 1)
        group.init_process_group("gloo", store=store, rank=0, world_size=1)
        joined.append(group.is_initialized())
        if problem is not None:
            raise problem

    monkeypatch.setattr(cli, "_evaluate", command)
    code = {type(None): 0, ValueError: cli.REFUSED, KeyboardInterrupt: 130}[type(problem)]
    assert cli.main(["evaluate"]) == code
    assert joined == [True] and not group.is_initialized()


def test_a_group_that_cannot_be_left_does_not_hold_a_process_up(monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(minivlm.runtime.processes, "LEAVING", 0.1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", never.wait)
    with pytest.raises(ValueError, match="a bad file"), process_group():
        raise ValueError("a bad file")
    never.set()


def test_the_command_line_in_two_processes_of_accelerate_is_that_of_one(root, capsys):
    """Whatever the launcher's own settings; only the main process speaks and writes, and images are drawn once."""
    command = ["train", "pretrain", "--scale", "0.002", "--pictures", "66", "--precision", "fp32", "--out"]
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "fp16", "--gradient_accumulation_steps", "4", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", free_port(), "-m", "minivlm"]
    one, two = (str(root / name) for name in ("by-one", "by-two"))
    (both,) = run_all([*launcher, *command, two])
    assert both.returncode == 0, both.stderr
    assert cli.main([*command, one]) == 0
    stdout = capsys.readouterr().out
    assert both.stdout == stdout.replace(one, two) and stdout.count("The checkpoint: ") == 1
    assert "64/64" in both.stderr and "66/66" not in both.stderr  # its share: the first batch of two
    steps = [[json.loads(line) for line in (Path(out) / LOG).read_text().splitlines()] for out in (one, two)]
    for key in ("loss", "grad_norm"):
        of_one, of_two = ([entry[key] for entry in log] for log in steps)
        assert len(of_one) == 2 and of_two == pytest.approx(of_one, rel=1e-5)


def test_commands_for_one_process_are_refused_in_several(monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    for command in (["run"], ["base"], ["experiment"]):
        assert cli.main(command) == cli.REFUSED
        assert "minivlm (process 1 of 2): this command works in one process" in capsys.readouterr().err


def test_processes_that_cannot_speak_to_each_other_are_refused(monkeypatch):
    processes()  # as it is without a launcher
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ProcessError, match="8 processes were started, but each would train by itself"):
        processes()
