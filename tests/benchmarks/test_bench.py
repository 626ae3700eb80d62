"""Our step beside the reference's: same loss and gradient, figures that add up, and the keys of the committed JSON."""

import json
from dataclasses import replace

import bench as b
import pytest
import torch
from lessons.cost import Length
from training import stage

from minivlm.config import IGNORE_INDEX
from minivlm.data.samples import Sample
from minivlm.model import set_trainable
from minivlm.runtime.paths import data_folder
from minivlm.runtime.precision import WorkingCopy
from minivlm.train import adamw


@pytest.fixture
def short(monkeypatch):
    """Lengths that the tiny model can read, and a small matrix product."""
    monkeypatch.setattr(b, "LENGTHS", {"pretrain": Length(20, 5), "sft": Length(30, 12)})
    monkeypatch.setattr(b, "PADDED", {"clip-26m": {"pretrain": 64, "sft": 96}})
    monkeypatch.setattr(b, "MATRIX_SIZE", 64)


def examples(model, processor, name, count) -> list:
    return b.bench_rows(model.config, processor, "clip-26m", name, count)


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_the_reference_and_ours_have_the_same_loss_and_the_same_gradient(model, processor, short, name):
    rows = examples(model, processor, name, 5)
    set_trainable(model, stage(name))
    step = b.prepare(model, processor, rows, b.PADDED["clip-26m"][name])
    longest = max(len(row.input_ids) for row in rows)
    assert step.reference["input_ids"].shape == (5, b.PADDED["clip-26m"][name])
    assert step.ours["input_ids"].shape == (5, 32 * -(-longest // 32)) and "pixel_values" not in step.ours
    assert step.supervised == sum(label != IGNORE_INDEX for row in rows for label in row.labels)
    exact = model.vision(processor.pixels([row.images[0] for row in rows]))  # not rounded to 16 bits
    step = replace(step, ours=step.ours | {"patch_features": exact})
    gradients, losses = [], []
    for loss in (b.loss_of(variant, model, step) for variant in (b.REFERENCE, b.OURS[0])):
        loss.backward()
        losses.append(loss.item())
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert gradients[0].keys() == gradients[1].keys() and "projector.weight" in gradients[0]
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-3, atol=1e-5)


def test_random_examples_vary_around_the_typical_length_and_depend_on_the_seed_alone(model, processor, short):
    rows = examples(model, processor, "sft", 40)
    lengths = [len(row.input_ids) for row in rows]
    assert lengths == sorted(lengths) and 0.8 * 30 < lengths[0] < 30 < lengths[-1] < 1.2 * 30
    assert all(b.supervised_tokens(row) < len(row.input_ids) - 4 for row in rows)
    assert [row.input_ids for row in examples(model, processor, "sft", 40)] == [row.input_ids for row in rows]


def test_examples_of_scenes_are_the_courses_own_with_their_images(model, processor):
    rows = b.bench_rows(model.config, processor, "scenes", "sft", 6)
    own = [processor.encode(sample) for sample in b.SceneSamples("sft", 6, 6, 0)]
    assert [row.input_ids for row in rows] == sorted((row.input_ids for row in own), key=len)
    placeholders = [row.input_ids.count(model.config.image_token_id) for row in rows]
    assert [len(row.images) * model.config.num_image_tokens for row in rows] == placeholders and sum(placeholders)


def test_examples_without_an_image_are_measured_too(model, processor, short):
    rows = examples(model, processor, "sft", 3)
    text = processor.encode(Sample([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]))
    step = b.prepare(model, processor, [text, *rows], 96)
    assert len(step.reference["pixel_values"]) == len(step.ours["patch_features"]) == 3
    reference, ours = (b.loss_of(variant, model, step).item() for variant in (b.REFERENCE, b.OURS[0]))
    assert reference == pytest.approx(ours, abs=0.02)


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_a_step_moves_what_trains_in_every_variant(model, processor, short, name):
    set_trainable(model, stage(name))
    optimizer = adamw(model, stage(name))
    step = b.prepare(model, processor, examples(model, processor, name, 2), b.PADDED["clip-26m"][name])
    for variant in (b.REFERENCE, b.REFERENCE_BF16, *b.OURS[:2]):
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        assert b.StepRunner(variant, model, optimizer).seconds(step) > 0
        moved = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert moved == set(stage(name).trains), variant


def keys_of(content) -> list:
    """The keys of a JSON object and of the objects in it, in order; a list is told by its first item."""
    if isinstance(content, list):
        return [keys_of(item) for item in content[:1]]
    return [(key, keys_of(value)) for key, value in content.items()] if isinstance(content, dict) else []


def test_the_bench_runs_its_figures_add_up_and_its_json_has_the_committed_keys(model, processor, short, tmp_path):
    stages = {n: b.bench(model, processor, "clip-26m", n, 2, 3, compiled=False) for n in ("pretrain", "sft")}
    for measurements in stages.values():
        assert list(measurements) == ["reference_fp32", "reference_bf16", "ours_fp32", "ours_bf16"]
        for one in measurements.values():
            for stat in (one.seconds_per_row, one.ratio, one.ratio_equal, one.share_nearby):
                assert 0 < stat.low <= stat.median <= stat.high
            assert one.share_of_matmul_rate > 0 and one.supervised_tokens_per_second > 0
            assert one.peak_megabytes_per_row is None or one.peak_megabytes_per_row >= 0
        reference, ours = measurements["reference_fp32"], measurements["ours_fp32"]
        assert reference.ratio == reference.ratio_equal == (1, 1, 1) and ours.ratio_equal == ours.ratio
        assert measurements["reference_bf16"].ratio_equal == (1, 1, 1)
        assert reference.loss == pytest.approx(ours.loss, abs=0.05)  # features in 16 bits
        assert ours.activation_megabytes_per_row < reference.activation_megabytes_per_row
    assert all(p.grad is None for p in model.parameters())
    text = b.write(tmp_path / "bench", "clip-26m", 2, stages, "typed").read_text("utf-8")
    written = json.loads(text)
    assert (written["command"], written["preset"], written["rows_per_step"]) == ("typed", "clip-26m", 2)
    ours = written["stages"]["sft"]["ours_fp32"]
    assert (ours["ratio"], ours["ratio_from"], ours["ratio_to"]) == stages["sft"]["ours_fp32"].ratio
    assert (ours["seconds_per_row"], ours["fastest"], ours["slowest"]) == stages["sft"]["ours_fp32"].seconds_per_row
    rates = {p: [s[f"ours_{p}"].matmul_gflops for s in stages.values()] for p in ("fp32", "bf16")}
    assert written["matmul_gflops"] == {precision: pytest.approx(sum(two) / 2) for precision, two in rates.items()}
    assert written["bf16_over_fp32"] == pytest.approx(sum(rates["bf16"]) / sum(rates["fp32"]))
    lines = b.as_text(stages).splitlines()
    assert len(lines) == 1 + 2 * 4 and f"{stages['sft']['ours_bf16'].ratio.median:.1f}" in lines[8]
    for preset in b.PRESETS:
        file = data_folder() / "results" / f"bench-{preset}" / "bench.json"
        committed = json.loads(file.read_text("utf-8"))
        assert file.read_text("utf-8") == json.dumps(committed, indent=1) + "\n"
        for measurements in committed["stages"].values():
            assert list(measurements) == [*map(str, b.variants_for(torch.device("cpu"), True))]
            for variant in set(measurements) - set(stages["sft"]):
                del measurements[variant]
        assert keys_of(written) == keys_of(committed) and text == json.dumps(written, indent=1) + "\n"


def test_every_variant_takes_the_steps_that_its_name_says(model, processor, short, monkeypatch):
    """Widths, calls of the encoder, logits, precision and compiling, as they are in the steps that are timed."""
    copies, calls = [], []
    forward, encode = type(model).forward, type(model.vision).forward

    class Noted(WorkingCopy):
        def __init__(self, model, precision, compiled, encoder):
            super().__init__(model, precision, encoder=encoder)  # nothing is compiled here: that takes half a minute
            self.model.variant = len(copies)
            copies.append((precision, compiled, encoder))

    def noted(self, *given, **options):
        calls.append([getattr(self, "variant", None), options["input_ids"].shape[1], 0, "attention_mask" in options])
        out = forward(self, *given, **options)
        calls[-1].append(out.logits.shape[1])
        return out

    def encoded(self, *given, **options):
        if calls:  # features are computed before the first step
            calls[-1][2] += 1
        return encode(self, *given, **options)

    monkeypatch.setattr(b, "WorkingCopy", Noted)
    monkeypatch.setattr(type(model), "forward", noted)
    monkeypatch.setattr(type(model.vision), "forward", encoded)
    b.bench(model, processor, "clip-26m", "sft", 2, 2, compiled=True)
    assert copies == [
        ("fp32", False, True),
        ("fp32", False, True),  # its loss mixes precisions
        ("fp32", False, False),
        ("bf16", False, False),
        ("fp32", True, False),
        ("bf16", True, False),
    ]
    for variant, width, encodes, masked, logits in calls[-6:]:
        assert not masked and encodes == (1 if variant < 2 else 0)
        assert width == 96 and logits == 96 if variant < 2 else width <= 64 and logits < width
    assert {variant for variant, *_ in calls[-6:]} == set(range(6))


def test_ratios_and_shares_compare_what_was_measured_together(model, processor, short):
    step = b.prepare(model, processor, examples(model, processor, "sft", 2), 96)
    lengths = [Length(len(row.input_ids), b.supervised_tokens(row)) for row in step.rows]
    parts = [b.flops(model.config, stage("sft"), length) for length in lengths]
    total = sum(sum(one.values()) for one in parts)
    ours = total - 2 * parts[0]["encoder"]
    assert b.operations(model.config, stage("sft"), b.OURS[0], step) == ours
    assert b.operations(model.config, stage("sft"), b.REFERENCE, step) == total

    def timings(*seconds):  # the machine is twice as fast in the second round, and four times in the third
        return [b.Timing(step, one, rate * ours) for one, rate in zip(seconds, (2.0, 4.0, 8.0), strict=True)]

    others = {"activation_megabytes_per_row": 1.0, "peak_megabytes_per_row": None, "loss": 0.0}
    result = b._measurement(
        timings(2.0, 1.0, 1.5), [ours] * 3, timings(8.0, 4.0, 12.0), timings(2.0, 3.0, 3.0),
        precision="fp32", matmul_gflops=7.0, **others,
    )  # fmt: skip
    assert result.ratio == (4, 4, 8) and result.ratio_equal == (2, 1, 3) and result.seconds_per_row == (0.75, 0.5, 1)
    assert result.share_nearby == pytest.approx((1 / 4, 1 / 12, 1 / 4))
    assert result.share_of_matmul_rate == pytest.approx(ours / 1.5 / 7e9)
    assert result.supervised_tokens_per_second == pytest.approx(3 * step.supervised / 6 / 0.75)


def test_a_matrix_product_is_timed_just_before_and_after_every_step_in_its_precision():
    events = []

    class Fake:
        def __init__(self, name):
            self.variant, self.times, self.operations = b.Variant(False, name), iter([9, 9, 1, 3, 2, 2]), 8

        def seconds(self, step=None):
            events.append(("step in " if step else "") + self.variant.precision)
            return 1.0 if step else next(self.times)

    step, names = b.Step([None], {}, {}), ["fp32", "bf16"]
    timings = b._interleaved([Fake(name) for name in names], [step], 2, {name: Fake(name) for name in names})
    assert timings == [[(step, 1.0, 4.0), (step, 1.0, 4.0)]] * 2  # 8 operations in 1 and 3, then 2 and 2 seconds
    assert events == 3 * ["fp32", "step in fp32", "fp32", "bf16", "step in bf16", "bf16"]


@pytest.mark.skipif(not b.CLEAR_REFS.exists(), reason="only Linux resets the peak of a process")
def test_the_peak_of_a_computation_is_what_it_had_allocated_at_the_same_time():
    def peak(megabytes):
        def compute():
            for _ in range(3):
                torch.ones(250_000 * megabytes)  # freed before the next one is made

        return b.peak_bytes(compute, torch.device("cpu")) / 1e6

    assert peak(400) == pytest.approx(400, abs=30)
    assert peak(100) == pytest.approx(100, abs=30)  # not that of the call before


def test_on_a_gpu_the_reference_comes_first_in_mixed_precision():
    assert b.variants_for(torch.device("cuda"), True) == (b.Variant(True, "bf16"), b.Variant(True, "fp32"), *b.OURS)
    assert b.variants_for(torch.device("cpu"), False) == (b.REFERENCE, b.REFERENCE_BF16, *b.OURS[:2])


def test_the_reference_computes_with_the_librarys_attention(model):
    set_trainable(model, stage("sft"))
    runner = b.StepRunner(b.REFERENCE, model, adamw(model, stage("sft")))
    assert runner.working.model.language_model.config._attn_implementation == "sdpa"
    assert runner.working.model.projector.weight is model.projector.weight


def test_a_machines_rate_is_that_of_the_matrix_product(short, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(b.time, "perf_counter", lambda: next(ticks) / 2)  # every product takes half a second
    assert b.MatrixProduct("fp32").rate == 2 * 64**3 / 0.5
