"""The main job's own decisions; a whole small run is in `test_cli.py`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from training import FEATURES, in_a_child, kill_at, save_base, some_rows, stage

import minivlm.pipeline
from minivlm.checkpoint import META, read_meta, save_checkpoint
from minivlm.pipeline import RESULTS, Clock, Plan, run
from minivlm.runtime.files import FolderError
from minivlm.runtime.paths import BASE, PRETRAIN, SFT
from minivlm.train import Trainer


@pytest.fixture
def plan(tmp_path, model, processor) -> Plan:
    save_base(tmp_path / BASE, model, processor)
    return Plan(tmp_path / "out", tmp_path)


@pytest.fixture
def events(monkeypatch, config) -> list[str]:
    """A tiny run: six steps a stage, an exam and a page without content. The list of what it did, in order."""
    order = []
    exam = SimpleNamespace(scenes=[], holdout=[], questioned=0)

    def trained(plan, name, model, processor, parent, out, cache, precision):
        order.append(name)
        options = {"parent": parent, "precision": precision, "resume": plan.resume}
        return Trainer(model, processor, some_rows(), stage(name), out, save_every=2, **options).fit()

    monkeypatch.setattr(minivlm.pipeline, "training_features", lambda *_: FEATURES)
    monkeypatch.setattr(minivlm.pipeline, "prepare_exam", lambda *_, **__: order.append("exam") or exam)
    monkeypatch.setattr(minivlm.pipeline, "evaluate", lambda *_: {})
    monkeypatch.setattr(minivlm.pipeline, "table_answers", lambda *_: {"en": [""] * 7, "zh": [""] * 7})
    monkeypatch.setattr(minivlm.pipeline, "write_report", lambda *_: None)
    monkeypatch.setattr(minivlm.pipeline, "train_stage", trained)
    return order


@pytest.fixture(autouse=True)
def probe_finds(monkeypatch):
    """`probe_finds(precision)`: the probe finds this precision faster; at first it is fp32."""

    def finds(precision: str) -> None:
        monkeypatch.setattr(minivlm.pipeline, "choose_precision", lambda model: precision)

    finds("fp32")
    return finds


@pytest.mark.parametrize("name", [PRETRAIN, ""])
def test_the_precision_of_what_was_begun_holds_whatever_the_probe_finds(plan, model, processor, name):
    """Of a run or of a single stage."""
    folder = plan.out / name
    save_base(folder, model, processor)
    meta = json.loads((folder / META).read_text("utf-8")) | {"precision": "bf16"}
    (folder / META).write_text(json.dumps(meta), "utf-8")
    assert minivlm.pipeline._precision(plan, model) == "bf16"
    assert minivlm.pipeline._precision(Plan(plan.out, plan.data, resume=False), model) == "fp32"
    assert minivlm.pipeline._precision(Plan(plan.out, plan.data, precision="fp32"), model) == "fp32"
    for other in (plan.out / "elsewhere", plan.data / BASE):  # nothing, and what no stage wrote
        assert minivlm.pipeline._precision(Plan(other, plan.data), model) == "fp32"


@pytest.mark.parametrize(
    ("parent", "out", "message"),
    [
        ("base", "new", "starts from a 'pretrain' checkpoint, but this one is of stage 'base'"),
        ("pretrain", "pretrain", "checkpoint that the new one builds on"),
        ("pretrain", "thesis", "thesis exists and is no checkpoint"),
        ("pretrain", "thesis/chapter.txt/new", "cannot be written"),
    ],
)
def test_a_stage_that_would_be_refused_is_refused_before_images_are_drawn(
    plan, model, processor, monkeypatch, parent, out, message
):
    save_checkpoint(plan.data / PRETRAIN, model, processor, {"stage": PRETRAIN})
    (plan.data / "thesis").mkdir()
    (plan.data / "thesis" / "chapter.txt").write_text("years of work")
    monkeypatch.setattr(minivlm.pipeline, "training_features", lambda *_: pytest.fail("drawn"))
    with pytest.raises((ValueError, OSError), match=message):
        minivlm.pipeline.train_stage(plan, SFT, model, processor, plan.data / parent, plan.data / out)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_between_two_renames_goes_on_in_its_precision(plan, events, monkeypatch, probe_finds):
    def run_and_die():
        probe_finds("bf16")
        monkeypatch.setattr(Path, "rename", kill_at(Path.rename, 3))
        run(plan)

    assert in_a_child(run_and_die) == -signal.SIGKILL
    assert not (plan.out / PRETRAIN).exists() and (plan.out / f"{PRETRAIN}.replaced").is_dir()
    assert run(plan)["precision"] == "bf16"
    assert [read_meta(plan.out / name)["precision"] for name in (PRETRAIN, SFT)] == ["bf16", "bf16"]


def test_a_run_that_went_on_took_the_time_of_all_its_sittings(plan, events):
    """As its logs tell, here of 100 seconds a step; twelve steps were made in an earlier sitting."""
    run(plan)
    assert events == ["exam", PRETRAIN, SFT]  # the exam is drawn once, before any training
    for name in (PRETRAIN, SFT):
        log = [json.loads(line) for line in (plan.out / name / "log.jsonl").read_text("utf-8").splitlines()]
        lines = [json.dumps(entry | {"seconds": 100.0}) for entry in log]
        (plan.out / name / "log.jsonl").write_text("\n".join(lines), "utf-8")
    seconds = run(plan)["seconds"]
    assert seconds[PRETRAIN] == seconds[SFT] == 600.0
    assert seconds["total"] >= sum(seconds[phase] for phase in ("pictures", "exam", PRETRAIN, SFT)) >= 1200
    assert json.loads((plan.out / RESULTS).read_text("utf-8"))["seconds"] == seconds


def test_a_total_is_never_less_than_its_rounded_phases():
    clock = Clock()
    clock.seconds = {"pictures": 0.26, "exam": 0.26}
    assert clock.with_total(0.52) == {"pictures": 0.3, "exam": 0.3, "total": 0.6}
    assert clock.with_total(9.0)["total"] == 9.0


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (PRETRAIN, FolderError, "pretrain exists and is no checkpoint"),
        (SFT, FolderError, "sft exists and is no checkpoint"),
        (".", OSError, "cannot be written"),
    ],
)
def test_a_run_refuses_a_folder_of_other_things_before_it_draws_anything(plan, events, path, error, message):
    (plan.out / path).parent.mkdir(exist_ok=True)
    (plan.out / path).write_text("years of work")
    with pytest.raises(error, match=message):
        run(plan)
    assert events == []


@pytest.mark.skipif(sys.platform == "win32", reason="this system does not tell")
def test_memory_is_that_of_this_process_and_of_its_helpers_beside_it():
    code = (
        "import subprocess, sys\n"
        "from minivlm.pipeline import peak_memory_gb\n"
        "subprocess.run([sys.executable, '-c', 'held = bytearray(900_000_000)'], check=True)\n"
        "print(peak_memory_gb(2), peak_memory_gb())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    both, own = map(float, printed.split())
    # own may be what the tests' process held when it started this one
    assert 2 * 0.9 < both - own < 2 * 1.0 and own > 0.05
