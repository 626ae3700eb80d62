"""The main job's own decisions; a whole small run is in `test_cli.py`."""

import json

import pytest
from training import save_base

import minivlm.run
from minivlm.checkpoint import META
from minivlm.paths import BASE, PRETRAIN
from minivlm.run import Clock, Plan, run


@pytest.mark.parametrize("place", [PRETRAIN, f"{PRETRAIN}.replaced", ""])
def test_a_run_goes_on_in_the_precision_it_began_in(tmp_path, model, processor, monkeypatch, place):
    """Of a run, of one killed between two renames, of a single stage; whatever the probe finds today."""
    folder = save_base(tmp_path / "out" / place, model, processor)
    meta = json.loads((folder / META).read_text("utf-8")) | {"precision": "bf16"}
    (folder / META).write_text(json.dumps(meta), "utf-8")
    monkeypatch.setattr(minivlm.run, "choose_precision", lambda model: "fp32")
    plan = Plan(tmp_path / "out", tmp_path)
    assert minivlm.run._precision(plan, model) == "bf16"
    assert minivlm.run._precision(Plan(plan.out, plan.data, resume=False), model) == "fp32"
    assert minivlm.run._precision(Plan(plan.out, plan.data, precision="fp32"), model) == "fp32"
    assert minivlm.run._precision(Plan(tmp_path / "elsewhere", plan.data), model) == "fp32"


def test_the_exam_is_drawn_before_any_training(tmp_path, model, processor, monkeypatch):
    order = []

    def trained(*_args, **_options):
        order.append("trained")
        raise InterruptedError

    save_base(tmp_path / BASE, model, processor)
    monkeypatch.setattr(minivlm.run, "training_features", lambda *_: None)
    monkeypatch.setattr(minivlm.run, "prepare_exam", lambda *_, **__: order.append("drawn"))
    monkeypatch.setattr(minivlm.run, "train_stage", trained)
    with pytest.raises(InterruptedError):
        run(Plan(tmp_path / "out", tmp_path, precision="fp32"))
    assert order == ["drawn", "trained"]


def test_a_phase_that_went_on_took_the_time_of_both_sittings():
    clock = Clock()
    with clock("sft"):
        pass
    clock.at_least("sft", 100.0)
    assert clock.seconds["sft"] == 100.0
    clock.at_least("sft", 50.0)
    assert clock.seconds["sft"] == 100.0
