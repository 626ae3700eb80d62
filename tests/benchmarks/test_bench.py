"""The engine against the recipe it grew from: the same loss and the same gradient, and figures that add up."""

import json
from dataclasses import replace
from pathlib import Path

import bench as b
import pytest
import torch
from lessons.cost import Length
from training import stage

from minivlm.config import IGNORE_INDEX
from minivlm.data.samples import Sample
from minivlm.model import set_trainable
from minivlm.runtime.precision import WorkingCopy
from minivlm.train import adamw, supervised_loss


@pytest.fixture
def short(monkeypatch):
    """Rows that the tiny model can read."""
    monkeypatch.setattr(b, "LENGTHS", {"pretrain": Length(20, 5), "sft": Length(30, 12)})
    monkeypatch.setattr(b, "PADDED", {"clip-26m": {"pretrain": 64, "sft": 96}})


def make_rows(model, processor, name, count) -> list:
    return b.bench_rows(model.config, processor, "clip-26m", name, count)


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_both_recipes_have_the_same_loss_and_the_same_gradient(model, processor, short, name):
    rows = make_rows(model, processor, name, 5)
    set_trainable(model, stage(name))
    step = b.prepare(model, processor, rows, b.PADDED["clip-26m"][name])
    exact = model.vision(processor.pixels([row.images[0] for row in rows]))  # not rounded to 16 bits
    step = replace(step, new=step.new | {"patch_features": exact})
    gradients, losses = [], []
    for loss in (b.old_loss(model, step), b.new_loss(model, step)):
        loss.backward()
        losses.append(loss.item())
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert gradients[0].keys() == gradients[1].keys() and "projector.weight" in gradients[0]
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-3, atol=1e-5)


def test_the_old_recipe_pads_every_row_to_its_length_and_encodes_again(model, processor, short, monkeypatch):
    calls = []
    forward = type(model).forward

    def noted(self, *args, **options):
        out = forward(self, *args, **options)
        calls.append((tuple(options["input_ids"].shape), tuple(out.logits.shape), "pixel_values" in options))
        return out

    monkeypatch.setattr(type(model), "forward", noted)
    rows = make_rows(model, processor, "sft", 3)
    step = b.prepare(model, processor, rows, 96)
    b.old_loss(model, step)
    b.new_loss(model, step)
    (old, old_logits, looks), (new, new_logits, looks_again) = calls
    assert old == (3, 96) and old_logits[:2] == (3, 96) and looks
    assert new[1] == 32 * -(-max(len(row.input_ids) for row in rows) // 32) and not looks_again
    assert new_logits[1] < new[1]  # logits at supervised positions only
    assert step.supervised == sum(label != IGNORE_INDEX for row in rows for label in row.labels)


def test_the_engines_step_is_the_one_that_train_takes(model, processor, short):
    step = b.prepare(model, processor, make_rows(model, processor, "sft", 2), 96)
    batch = processor.collate(
        [
            replace(row, images=[], patch_features=step.new["patch_features"][i : i + 1])
            for i, row in enumerate(step.rows)
        ],
        pad_to_multiple_of=32,
    )
    supervised = int((batch["labels"] != IGNORE_INDEX).sum())
    assert b.new_loss(model, step).item() == (supervised_loss(model, batch) / supervised).item()


def test_random_rows_have_lengths_around_the_typical_one_and_are_the_same_for_the_same_seed(model, processor, short):
    rows = make_rows(model, processor, "sft", 40)
    lengths = [len(row.input_ids) for row in rows]
    assert lengths == sorted(lengths) and 0.8 * 30 < lengths[0] < 30 < lengths[-1] < 1.2 * 30
    assert all(sum(label != IGNORE_INDEX for label in row.labels) < len(row.input_ids) - 4 for row in rows)
    assert [row.input_ids for row in make_rows(model, processor, "sft", 40)] == [row.input_ids for row in rows]


def test_rows_of_scenes_are_the_courses_own(model, processor):
    rows = b.bench_rows(model.config, processor, "scenes", "sft", 6)
    own = [processor.encode(row) for row in b.SceneSamples("sft", 6, 6, 0)]
    assert sorted(map(tuple, (row.input_ids for row in rows))) == sorted(map(tuple, (row.input_ids for row in own)))
    shown = [row.input_ids.count(model.config.image_token_id) // model.config.num_image_tokens for row in rows]
    assert [len(row.images) for row in rows] == shown


def test_rows_without_a_image_are_taken_as_they_are(model, processor, short):
    rows = make_rows(model, processor, "sft", 3)
    blind = processor.encode(Sample([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]))
    step = b.prepare(model, processor, [blind, *rows], 96)
    assert len(step.old["pixel_values"]) == len(step.new["patch_features"]) == 3
    assert b.old_loss(model, step).item() == pytest.approx(b.new_loss(model, step).item(), abs=0.02)


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_a_step_moves_what_learns_in_every_variant(model, processor, short, name):
    set_trainable(model, stage(name))
    optimizer = adamw(model, stage(name))
    step = b.prepare(model, processor, make_rows(model, processor, name, 2), b.PADDED["clip-26m"][name])
    for variant in (b.OLD, b.OLD_IN_BF16, *b.NEW[:2]):
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        assert b.Stepper(variant, model, optimizer).seconds(step) > 0
        moved = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert moved == set(stage(name).trains), variant


def test_the_bench_runs_and_its_figures_add_up(model, processor, short, tmp_path, monkeypatch):
    monkeypatch.setattr(b, "PRODUCT", 64)
    stages = {n: b.bench(model, processor, "clip-26m", n, 2, 3, compiled=False) for n in ("pretrain", "sft")}
    for stats in stages.values():
        assert list(stats) == ["old recipe, fp32", "old recipe, bf16", "engine, fp32", "engine, bf16"]
        for stat in stats.values():
            assert 0 < stat.fastest <= stat.seconds_per_row <= stat.slowest and stat.learnt_tokens_per_second > 0
            assert stat.ratio_from <= stat.ratio <= stat.ratio_to
            assert 0 < stat.share_nearby_from <= stat.share_nearby <= stat.share_nearby_to
            assert stat.share_of_matmul_rate > 0
            assert stat.peak_megabytes_per_row is None or stat.peak_megabytes_per_row >= 0
        old, new = stats["old recipe, fp32"], stats["engine, fp32"]
        assert old.ratio_from == old.ratio == old.ratio_to == old.ratio_equal == 1
        assert stats["old recipe, bf16"].ratio_equal == 1 and new.ratio_equal == new.ratio
        assert old.loss == pytest.approx(new.loss, abs=0.05)  # features in 16 bits
        assert new.kept_megabytes_per_row < old.kept_megabytes_per_row
    assert all(p.grad is None for p in model.parameters())
    written = json.loads(b.write(tmp_path / "bench", "clip-26m", 2, stages, "typed").read_text("utf-8"))
    assert (written["command"], written["preset"], written["step_size"]) == ("typed", "clip-26m", 2)
    assert written["stages"]["sft"]["engine_fp32"]["ratio"] == stages["sft"]["engine, fp32"].ratio
    rates = {stat.precision: [stats[title].matmul_gflops for stats in stages.values()] for title, stat in stats.items()}
    assert written["matmul_gflops"] == {precision: pytest.approx(sum(two) / 2) for precision, two in rates.items()}
    assert written["bf16_over_fp32"] == pytest.approx(sum(rates["bf16"]) / sum(rates["fp32"]))
    assert (tmp_path / "bench" / "bench.png").read_bytes().startswith(b"\x89PNG")
    lines = b.as_text(stages).splitlines()
    assert len(lines) == 1 + 2 * 4 and f"{stages['sft']['engine, bf16'].ratio:.1f}" in lines[8]


def test_every_variant_takes_the_steps_that_its_name_says(model, processor, short, monkeypatch):
    """Widths, calls of the encoder, logits, precision and compiling, as they are in the steps that are timed."""
    engines, calls = [], []
    forward, look = type(model).forward, type(model.vision).forward

    class Noted(WorkingCopy):
        def __init__(self, model, precision, compiled, encoder):
            super().__init__(model, precision, encoder=encoder)  # nothing is compiled here: that takes half a minute
            self.model.variant = len(engines)
            engines.append((precision, compiled, encoder))

    def noted(self, *args, **options):
        calls.append([getattr(self, "variant", None), options["input_ids"].shape[1], 0, "attention_mask" in options])
        out = forward(self, *args, **options)
        calls[-1].append(out.logits.shape[1])
        return out

    def looked(self, *args, **options):
        if calls:  # before the first step its features are made
            calls[-1][2] += 1
        return look(self, *args, **options)

    monkeypatch.setattr(b, "PRODUCT", 64)
    monkeypatch.setattr(b, "WorkingCopy", Noted)
    monkeypatch.setattr(type(model), "forward", noted)
    monkeypatch.setattr(type(model.vision), "forward", looked)
    b.bench(model, processor, "clip-26m", "sft", 2, 2, compiled=True)
    assert engines == [
        ("fp32", False, True),
        ("fp32", False, True),  # which mixes precisions by itself
        ("fp32", False, False),
        ("bf16", False, False),
        ("fp32", True, False),
        ("bf16", True, False),
    ]
    for variant, width, looks, masked, logits in calls[-6:]:
        assert not masked and looks == (1 if variant < 2 else 0)
        assert width == 96 and logits == 96 if variant < 2 else width <= 64 and logits < width
    assert {variant for variant, *_ in calls[-6:]} == set(range(6))


def test_ratios_and_shares_compare_what_was_measured_together(model, processor, short):
    step = b.prepare(model, processor, make_rows(model, processor, "sft", 2), 96)
    counted = []
    for row in step.rows:
        supervised = sum(label != IGNORE_INDEX for label in row.labels)
        parts = b.flops(model.config, stage("sft"), Length(len(row.input_ids), supervised))
        counted.append(sum(parts.values()) - parts["encoder"])  # which the engine does not run
    assert b.needed(model, stage("sft"), b.NEW[0], step) == sum(counted)
    assert b.needed(model, stage("sft"), b.OLD, step) == sum(counted) + 2 * parts["encoder"]
    # the machine was twice as fast in the second round, and four times in the third, where the step gained nothing
    rates = [2.0 * sum(counted), 4.0 * sum(counted), 8.0 * sum(counted)]
    old = [b.Turn(step, seconds, rate) for seconds, rate in zip([8.0, 4.0, 12.0], rates, strict=True)]
    new = [b.Turn(step, seconds, rate) for seconds, rate in zip([2.0, 1.0, 1.5], rates, strict=True)]
    alike = [b.Turn(step, seconds, rate) for seconds, rate in zip([2.0, 3.0, 3.0], rates, strict=True)]
    stat = b._stat(model, stage("sft"), b.NEW[0], new, (old, alike), 7.0, (1.0, None), 0.0)
    assert (stat.ratio_from, stat.ratio, stat.ratio_to) == (4, 4, 8)
    assert (stat.ratio_equal_from, stat.ratio_equal, stat.ratio_equal_to) == (1, 2, 3)
    assert (stat.fastest, stat.seconds_per_row, stat.slowest) == (0.5, 0.75, 1)
    assert (stat.share_nearby_from, stat.share_nearby, stat.share_nearby_to) == pytest.approx((1 / 12, 1 / 4, 1 / 4))
    assert stat.share_of_matmul_rate == pytest.approx(sum(counted) / 1.5 / 7e9)
    assert stat.learnt_tokens_per_second == pytest.approx(3 * step.supervised / 6 / 0.75) and stat.matmul_gflops == 7


def test_a_product_is_taken_just_before_and_after_every_step_in_its_precision(monkeypatch):
    taken = []

    class Note:
        def __init__(self, name):
            self.variant, self.times, self.operations = b.Variant(False, name), iter([9, 9, 1, 3, 2, 2]), 8

        def seconds(self, step):
            taken.append("step in " + self.variant.precision)
            return 1.0

        def take(self):
            taken.append(self.variant.precision)
            return next(self.times)

    step, names = b.Step([None], {}, {}), ["fp32", "bf16"]
    turns = b._by_turns([Note(name) for name in names], [step], 2, {name: Note(name) for name in names})
    assert turns == [[b.Turn(step, 1.0, 4.0), b.Turn(step, 1.0, 4.0)]] * 2  # 8 operations in 1 and 3, then 2 and 2
    assert taken == 3 * ["fp32", "step in fp32", "fp32", "bf16", "step in bf16", "bf16"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process its peak anew")
def test_the_peak_of_a_computation_is_what_it_held_at_the_same_time():
    def held(megabytes):
        def compute():
            for _ in range(3):
                torch.ones(250_000 * megabytes)  # freed before the next one is made

        return b.peak_bytes(compute, torch.device("cpu")) / 1e6

    assert held(400) == pytest.approx(400, abs=30)
    assert held(100) == pytest.approx(100, abs=30)  # and not what was held before


def test_on_a_gpu_the_old_recipe_mixes_precisions_as_it_did():
    assert b.variants_for(torch.device("cuda"), True) == (b.Variant(True, "bf16"), b.Variant(True, "fp32"), *b.NEW)
    assert b.variants_for(torch.device("cpu"), False) == (b.Variant(True, "fp32"), b.Variant(True, "bf16"), *b.NEW[:2])


def test_the_old_recipe_computes_with_the_librarys_attention(model):
    set_trainable(model, stage("sft"))
    stepper = b.Stepper(b.OLD, model, adamw(model, stage("sft")))
    assert stepper.working.model.language_model.config._attn_implementation == "sdpa"
    assert isinstance(stepper.working, WorkingCopy) and stepper.working.model.projector.weight is model.projector.weight


def test_a_machines_rate_is_that_of_the_product(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(b, "PRODUCT", 8)
    monkeypatch.setattr(b.time, "perf_counter", lambda: next(ticks) / 2)  # every product takes half a second
    assert b.matmul_rate("fp32") == 2 * 8**3 / 0.5
