"""The engine beside the recipe it grew from: the same loss and the same gradient, and figures that add up."""

import json

import pytest
import torch
from training import stage

from minivlm import bench as b
from minivlm.config import IGNORE_INDEX
from minivlm.cost import Length
from minivlm.features import encode
from minivlm.model import set_trainable
from minivlm.train import supervised_loss, training_mode


@pytest.fixture
def short(monkeypatch):
    """Rows that the tiny model can read."""
    monkeypatch.setattr(b, "LENGTHS", {"pretrain": Length(20, 5), "sft": Length(30, 12)})
    monkeypatch.setattr(b, "PADDED", {"pretrain": 64, "sft": 96})


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_both_ways_have_the_same_loss_and_the_same_gradient(model, processor, short, name):
    rows = b.bench_rows(model.config, name, 5)
    exact = model.vision(processor.pixels([row.pictures[0] for row in rows]))  # not rounded to 16 bits
    set_trainable(model, stage(name))
    gradients, losses = [], []
    with training_mode(model):
        for loss in (
            b.old_step(model, processor, rows, b.PADDED[name]),
            b.new_step(model, processor, rows, exact, "fp32"),
        ):
            loss.backward()
            losses.append(loss.item())
            gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
            model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert gradients[0].keys() == gradients[1].keys() and "projector.weight" in gradients[0]
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-3, atol=1e-5)


def test_the_old_way_pads_every_row_to_its_length_and_looks_again(model, processor, short, monkeypatch):
    seen = []
    forward = type(model).forward

    def noted(self, *given, **options):
        out = forward(self, *given, **options)
        seen.append((tuple(options["input_ids"].shape), tuple(out.logits.shape), "pixel_values" in options))
        return out

    monkeypatch.setattr(type(model), "forward", noted)
    rows = b.bench_rows(model.config, "sft", 3)
    features = encode(model, [processor.pixels([row.pictures[0] for row in rows])], 3, title="")
    b.old_step(model, processor, rows, 96)
    b.new_step(model, processor, rows, features, "fp32")
    (old, old_logits, looks), (new, new_logits, looks_again) = seen
    assert old == (3, 96) and old_logits[:2] == (3, 96) and looks
    assert new[1] == 32 * -(-max(len(row.input_ids) for row in rows) // 32) and not looks_again
    assert new_logits[1] < new[1]  # logits only where something is learnt


def test_rows_spread_around_the_typical_length_and_come_again_by_their_seed(model, short):
    rows = b.bench_rows(model.config, "sft", 40)
    lengths = [len(row.input_ids) for row in rows]
    assert 0.8 * 30 < min(lengths) < 30 < max(lengths) < 1.2 * 30
    assert all(sum(label != IGNORE_INDEX for label in row.labels) < len(row.input_ids) - 4 for row in rows)
    assert [row.input_ids for row in b.bench_rows(model.config, "sft", 40)] == [row.input_ids for row in rows]


def test_the_bench_runs_and_its_figures_add_up(model, processor, short, monkeypatch, tmp_path):
    monkeypatch.setattr(b, "PRODUCT", 64)
    stages = {name: b.bench(model, processor, name, rows=2, rounds=3) for name in ("pretrain", "sft")}
    for arms in stages.values():
        assert set(arms) == set(b.ARMS)
        for arm in arms.values():
            assert 0 < arm.fastest <= arm.seconds_per_row <= arm.slowest and arm.learnt_tokens_per_second > 0
        assert arms["old, fp32"].loss == pytest.approx(arms["engine, fp32"].loss, abs=0.05)  # features in 16 bits
        assert arms["engine, fp32"].kept_megabytes_per_row < arms["old, fp32"].kept_megabytes_per_row
    ratios = b.compared(stages["sft"])["engine, fp32"]
    old, new = stages["sft"]["old, fp32"], stages["sft"]["engine, fp32"]
    assert ratios["ratio"] == pytest.approx(old.seconds_per_row / new.seconds_per_row)
    assert ratios["from"] <= ratios["ratio"] <= ratios["to"]
    written = json.loads(b.write(tmp_path / "bench", stages, "typed").read_text("utf-8"))
    assert written["command"] == "typed" and set(written["stages"]["sft"]) == set(b.ARMS)
    assert written["compared"]["sft"]["engine, fp32"]["ratio"] == pytest.approx(ratios["ratio"])
    assert (tmp_path / "bench" / "bench.png").read_bytes().startswith(b"\x89PNG")
    lines = b.as_text(stages).splitlines()
    assert len(lines) == 1 + 2 * len(b.ARMS) and f"{ratios['ratio']:.1f}" in lines[5]


def test_a_machines_rate_is_that_of_the_product(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(b, "PRODUCT", 8)
    monkeypatch.setattr(b.time, "perf_counter", lambda: next(ticks) / 2)  # every product takes half a second
    assert b.matmul_rate("fp32") == 2 * 8**3 / 0.5


def test_the_engines_step_is_the_one_that_train_takes(model, processor, short):
    rows = b.bench_rows(model.config, "sft", 2)
    features = encode(model, [processor.pixels([row.pictures[0] for row in rows])], 2, title="")
    batch = processor.collate(
        [b.replace(row, pictures=[], patch_features=features[i : i + 1]) for i, row in enumerate(rows)],
        pad_to_multiple_of=32,
    )
    learnt = int((batch["labels"] != IGNORE_INDEX).sum())
    expected = supervised_loss(model, batch, "fp32") / learnt
    assert b.new_step(model, processor, rows, features, "fp32").item() == expected.item()
