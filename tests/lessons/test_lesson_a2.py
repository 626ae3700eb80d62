"""Notebook A2: counts are those by hand and by the library, variants compute the same, figures show the results."""

import pytest
import torch
from lessons import cost, lesson_a2
from lessons.cost import ATTENTION, COPIES, LARGE, SINGLE, WORK_KINDS, Length, Meter, Work, flops, random_example
from lessons.lesson_a2 import Dot, Share, StepVariant, Timing, Waste, loss_everywhere
from torch import nn

from minivlm.config import STAGES, clip_26m_config
from minivlm.model import set_trainable
from minivlm.runtime.precision import WorkingCopy
from minivlm.train import adamw, supervised_loss

CONFIG, SFT, LENGTH = clip_26m_config(), STAGES["clip-26m"]["sft"], Length(400, 180)
ALL = Waste(padded=1536, everywhere=True, encoder=True)


@pytest.fixture
def batches(model, processor):
    """Two rows of a tiny model: padded with images one by one, and both together with features."""
    set_trainable(model, STAGES["scenes"]["sft"])
    rows = [random_example(model.config, Length(20 + 4 * index, 7), seed=index) for index in range(2)]
    old = [processor.collate([row], pad_to_multiple_of=40) for row in rows]
    short = processor.collate(rows)
    with torch.no_grad():
        short["patch_features"] = model.vision(short.pop("pixel_values"))
    return old, [short]


NEEDED = flops(CONFIG, SFT, LENGTH) | {"encoder": 0}


class TestWaste:
    def test_nothing_wasted_is_what_the_bill_counts_without_the_encoder(self):
        assert lesson_a2.operations(CONFIG, SFT, LENGTH, Waste()) == NEEDED

    def test_everything_wasted_is_a_row_as_long_as_the_padding_that_learns_everywhere(self):
        assert lesson_a2.operations(CONFIG, SFT, LENGTH, ALL) == flops(CONFIG, SFT, Length(1536, 1536))

    def test_a_row_that_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match="400 tokens do not fit into 399"):
            lesson_a2.operations(CONFIG, SFT, LENGTH, Waste(padded=399))

    def test_gains_multiply_to_the_same_in_every_order_and_differ_in_between(self):
        orders = [("everywhere", "encoder", "padded"), ("padded", "everywhere", "encoder")]
        one, two = (lesson_a2.left_out(CONFIG, SFT, LENGTH, ALL, order) for order in orders)
        assert one[-1][1] == two[-1][1] == sum(NEEDED.values())
        whole = sum(flops(CONFIG, SFT, Length(1536, 1536)).values())
        for rows in (one, two):
            assert rows[0][2] * rows[1][2] * rows[2][2] == pytest.approx(whole / rows[-1][1])
        assert {name: times for name, _, times in two}["encoder"] > 1.3 * one[1][2]

    def test_the_strip_is_to_scale(self):
        (axes,) = lesson_a2.strip({"picture": 2, "question": 1, "answer": 3, "padding": 10}).axes
        assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 2), (2, 1), (3, 3), (6, 10)]
        assert [text.get_text() for text in axes.texts] == ["picture: 2", "question: 1", "answer: 3", "padding: 10"]

    @pytest.mark.parametrize("everywhere", [True, False])
    def test_operations_of_batches_are_those_that_the_meter_sees(self, model, batches, everywhere):
        model.vision.clip.set_attn_implementation("eager")  # the products of a fused kernel are not counted
        model.language_model.set_attn_implementation("eager")
        loss = loss_everywhere if everywhere else supervised_loss
        worker = WorkingCopy(model, "fp32").model
        for chosen in batches:
            with Meter() as meter:
                for batch in chosen:
                    loss(worker, batch).backward()
            products = meter.work[LARGE].operations + meter.work[ATTENTION].operations
            products += _convolution(model) * sum("pixel_values" in batch for batch in chosen)
            assert lesson_a2.operations_of(model.config, STAGES["scenes"]["sft"], chosen, everywhere) == products // 2


def _convolution(model) -> int:
    """The encoder cuts its patches with a convolution, which the meter takes for work on single numbers."""
    vision = model.config.vision_config
    return 2 * model.config.num_image_tokens * vision.hidden_size * vision.num_channels * vision.patch_size**2


class TestVariants:
    def test_the_old_loss_is_the_librarys_own_and_has_the_gradient_of_ours(self, model, batches):
        old, short = batches
        for batch in old:
            supervised = int((batch["labels"] >= 0).sum())
            there = model(**batch).loss * supervised  # the library's: a mean over supervised tokens
            torch.testing.assert_close(loss_everywhere(model, batch), there)
        weight = model.projector.weight
        before = torch.autograd.grad(sum(loss_everywhere(model, batch) for batch in old), weight)[0]
        after = torch.autograd.grad(supervised_loss(model, short[0]), weight)[0]
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)
        assert before.abs().max() > 1e-3

    def test_variants_of_the_same_examples_have_the_same_loss_and_leave_the_weights(self, model, batches):
        old, short = batches
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        engine = WorkingCopy(model, "fp32")
        settings = ("old", engine, loss_everywhere, old, 9), ("new", engine, supervised_loss, short, 3)
        variants = [StepVariant(*one) for one in settings]
        one, two = lesson_a2.measure(model, variants, rounds=2)
        assert one.loss == pytest.approx(two.loss, abs=1e-4) and one.seconds > 0 < two.seconds
        assert (one.title, one.operations, two.title, two.operations) == ("old", 9, "new", 3)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_the_best_turn_counts_and_for_one_row(self, model, batches, monkeypatch):
        taken = iter([(8.0, 1.0), (6.0, 1.0), (10.0, 1.0)])
        monkeypatch.setattr(lesson_a2, "_forward_and_back", lambda *args: next(taken))
        (height,) = lesson_a2.measure(model, [StepVariant("one", None, None, batches[1], 1)], rounds=3)
        assert height.seconds == 3.0 and height.loss == pytest.approx(1 / 14)

    def test_two_measurements_agree_on_the_variant_between_them(self):
        first = [Timing("a", 8, 8.0, 1.0), Timing("b", 4, 4.0, 1.0)]
        second = [Timing("b", 4, 2.0, 1.0), Timing("c", 4, 1.0, 1.0)]
        assert [height.seconds for height in lesson_a2.joined(first, second)] == [8.0, 4.0, 2.0]
        with pytest.raises(ValueError, match="'b' is not 'c'"):
            lesson_a2.joined(first, second[1:])

    def test_the_figure_shows_how_many_times_less(self):
        timings = [Timing("old", 8 * 10**9, 0.5, 1.0), Timing("new", 2 * 10**9, 0.05, 1.0)]
        (axes,) = lesson_a2.timings_figure(timings).axes
        diamonds = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D" and len(line.get_xdata())]
        dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
        assert diamonds == [1, 4] and dots == pytest.approx([1, 10])
        texts = [text.get_text() for text in axes.texts]
        assert texts == ["500 ms, 8 billion operations", "50 ms, 2 billion operations"]


class TestMeter:
    def test_a_product_and_a_sum_by_hand(self):
        one, other, column = torch.ones(3, 4), torch.ones(4, 5), torch.ones(5)
        with Meter() as meter:
            (one @ other) + column
        assert meter.work[LARGE] == Work(2 * 3 * 4 * 5, 4 * (12 + 20 + 15), 1)
        assert meter.work[SINGLE] == Work(15, 4 * (15 + 5 + 15), 1)
        assert meter.names == {"mm", "add"}

    def test_views_move_nothing_and_repeated_numbers_count_once(self):
        numbers = torch.ones(4, 1)
        with Meter() as meter:
            wide = numbers.expand(4, 100).transpose(0, 1).view(100, 4)
        assert sum(meter.work.values(), Work()) == Work()
        with Meter() as meter:
            wide.contiguous()
        assert meter.work[COPIES].operations == 0 and meter.work[COPIES].bytes == 4 * (4 + 400)

    def test_sixteen_bits_are_half_the_bytes_and_the_same_operations(self):
        gate = torch.ones(6, 10)
        whole, half = (
            cost.measured_work(lesson_a2.silu_mul, gate.to(t), gate.to(t)) for t in (torch.float32, torch.bfloat16)
        )
        assert whole == Work((4 + 1) * 60, 4 * 60 * 5, 2)  # SiLU reads one and writes one, the product reads two
        assert half.operations == whole.operations and 2 * half.bytes == whole.bytes

    def test_one_trip_reads_what_is_given_and_writes_the_result(self):
        gate = torch.ones(6, 10)
        fused = cost.in_one_trip(lesson_a2.silu_mul, gate, gate.clone())
        assert fused == Work((4 + 1) * 60, 4 * 60 * 3, 1) and fused.intensity == 300 / 720

    def test_attention_is_two_products(self):
        query, key = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 5, 4)
        work = cost.measured_work(lesson_a2.attention_products, query, key, key)
        assert work.operations == 2 * (2 * 2 * 3 * 8 * 5 * 4)
        with Meter() as meter:
            lesson_a2.attention_products(query, key, key)
        assert meter.work[ATTENTION] == work

    def test_every_kind_of_work_has_the_models_shape_and_a_marker(self):
        kinds = lesson_a2.kinds_of_work(CONFIG, 2, 10, torch.bfloat16, nn.Identity())
        assert set(kinds) == set(lesson_a2.SHAPES)
        text, shapes = CONFIG.text_config, {name: [tuple(t.shape) for t in args] for name, (_, args) in kinds.items()}
        assert shapes["large product"] == [(20, text.hidden_size), (text.intermediate_size, text.hidden_size)]
        assert shapes["softmax"] == [(2, text.num_attention_heads, 10, 10)]
        assert all(tensor.dtype == torch.bfloat16 for _, args in kinds.values() for tensor in args)
        query = shapes["attention's products"][0]
        assert query[1] * query[2] == text.num_attention_heads * 10 and query[3] == text.head_dim

    def test_a_bandwidth_counts_what_is_read_and_what_is_written(self, monkeypatch):
        monkeypatch.setattr(lesson_a2, "best_seconds", lambda *args: 0.5)
        assert lesson_a2.bandwidth(2) == 2 * 2e6 / 0.5


class TestStep:
    def test_a_step_taken_apart(self, model, batches, capfd):
        optimizer = adamw(model, STAGES["scenes"]["sft"])
        engine, short = WorkingCopy(model, "bf16", encoder=False), batches[1]
        shares = lesson_a2.dissect(engine, lambda worker: supervised_loss(worker, short[0]), optimizer, times=1)
        assert list(shares) == [*WORK_KINDS, "the optimizer", "Python, and making calls"]
        products = shares[LARGE].work.operations + shares[ATTENTION].work.operations
        assert products == 2 * lesson_a2.operations_of(model.config, STAGES["scenes"]["sft"], short)
        assert all(share.seconds > 0 for share in shares.values())
        weights = sum(p.numel() for part in (model.projector, model.language_model) for p in part.parameters())
        assert shares["the optimizer"].work.bytes > 4 * 4 * weights  # reads weight, gradient and two moments
        table = lesson_a2.as_table(shares)
        assert len(table.splitlines()) == 7 and all(kind in table for kind in shares)
        assert capfd.readouterr().err == "", "the profiler is quiet"

    def test_shares_of_the_table(self):
        table = lesson_a2.as_table({"a": Share(Work(30, 1, 2), 0.003), "b": Share(Work(10, 3, 1), 0.001)})
        assert table.splitlines()[1].split() == ["a", "2", "75.0%", "25.0%", "75.0%", "3"]

    def test_hours_of_a_schedule(self):
        stage = STAGES["scenes"]["sft"]  # 420 steps of 16 x 2 rows
        assert lesson_a2.hours(stage, 1.0) == pytest.approx(420 * 32 / 3600)
        assert lesson_a2.hours(stage, 1.0, 4.0) == pytest.approx(420 * 36 / 3600)


def test_the_roofline_puts_every_mark_where_it_was_measured():
    dots = [
        Dot("norm", "32 bits", Work(1000, 4000, 3), 1e-6),
        Dot("norm", "16 bits, compiled", Work(1000, 1000, 1), 5e-7),
    ]
    dots.append(Dot("large product", "32 bits", Work(10**6, 10**4, 1), 1e-5))
    (axes,) = lesson_a2.roofline(dots, {"32 bits": 2e11, "16 bits": 8e11}, memory=2e10, cache=5e10).axes
    marks = [
        (line.get_marker(), line.get_xdata()[0], line.get_ydata()[0])
        for line in axes.lines
        if line.get_marker() in lesson_a2.SHAPES.values() and len(line.get_xdata()) == 1
    ]
    assert [shape for shape, *_ in marks] == ["s", "v", "v"]
    assert [point for _, *point in marks] == [pytest.approx(at) for at in ([100, 100], [0.25, 1], [1, 2])]
    (ridge,) = (line for line in axes.lines if line.get_linestyle() == ":")
    assert list(ridge.get_xdata()) == [40, 40]  # 800 / 20
