"""What a run costs: counted against the library's own counter, and against what a step really takes."""

import dataclasses
import gc

import pytest
import torch
from lessons import cost
from torch.utils.flop_counter import FlopCounterMode
from training import stage

from minivlm.config import STAGES, clip_26m_config
from minivlm.model import set_trainable
from minivlm.train import supervised_loss

SHORT = cost.Length(tokens=20, supervised=7)


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_operations_are_those_that_the_library_counts(model, processor, name):
    set_trainable(model, stage(name))
    for part in (model.vision.clip, model.language_model):
        part.set_attn_implementation("eager")  # a fused kernel's products are not counted on a CPU
    batch = processor.collate([cost.random_example(model.config, SHORT)])
    with FlopCounterMode(display=False) as counter:
        supervised_loss(model, batch).backward()
    counted = cost.flops(model.config, stage(name), SHORT)
    assert sum(counted.values()) == counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as seeing:
        model.vision(batch["pixel_values"])
    assert counted["encoder"] == seeing.get_total_flops()


def test_a_full_run_is_what_the_recipe_says():
    config = clip_26m_config()
    first = cost.bill(config, STAGES["clip-26m"]["pretrain"], cost.LENGTHS["pretrain"], examples_per_second=100)
    second = cost.bill(config, STAGES["clip-26m"]["sft"], cost.LENGTHS["sft"], examples_per_second=100)
    assert first.samples == 595_376 * 4 and second.samples == 158_720 * 6
    assert first.tokens == first.samples * 250 and first.hours == pytest.approx(595_376 * 4 / 100 / 3600)
    scaled = dataclasses.replace(STAGES["scenes"]["sft"], accumulation=2, batch_size=16, steps=10)
    assert cost.bill(config, scaled, cost.LENGTHS["sft"], 1).samples == 320
    lines = cost.as_lines([("stage 1", first), ("stage 2", second)])
    assert len({len(line) for line in lines}) == 1 and "2,381,504" in lines[1] and "952,320" in lines[2]


def test_what_is_kept_is_what_a_hand_counts():
    first, second = torch.nn.Linear(10, 6, bias=False), torch.nn.Linear(6, 5, bias=False)
    inputs = torch.randn(4, 10)
    own = [first.weight, second.weight, inputs]
    # forward: 4 x 6 numbers after the first map, made positive in a new tensor that ReLU and the second map both keep
    assert cost.saved_bytes(lambda: second(first(inputs).relu()), own) == 4 * 6 * 4
    # a square keeps what it squares; the sum keeps nothing
    assert cost.saved_bytes(lambda: first(inputs).pow(2).sum(), own) == 4 * 6 * 4
    first.requires_grad_(False)  # below the first trainable layer nothing is saved, and ReLU saves nothing for it
    assert cost.saved_bytes(lambda: second(first(inputs).relu()), own) == 4 * 6 * 4  # the second map's input
    second.requires_grad_(False)
    assert cost.saved_bytes(lambda: second(first(inputs).relu()), own) == 0


def test_counting_what_is_kept_keeps_nothing(model, processor):
    set_trainable(model, stage("sft"))
    batch = cost.on_device(model, processor.collate([cost.random_example(model.config, SHORT)]))
    cost.activation_bytes(model, batch, "fp32")
    gc.collect()
    before = sum(isinstance(one, torch.Tensor) for one in gc.get_objects())
    for _ in range(3):
        cost.activation_bytes(model, batch, "fp32")
    gc.collect()
    assert sum(isinstance(one, torch.Tensor) for one in gc.get_objects()) == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_memory_is_weights_two_states_and_what_the_whole_batch_keeps(model, processor, name, precision):
    part = stage(name, batch_size=3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    memory = cost.memory(model, processor, part, SHORT, precision)
    trained = 16 * 24 + (0 if name == "pretrain" else sum(p.numel() for p in model.language_model.parameters()))
    each = 4 if precision == "fp32" else 4 + 2  # the engine computes with a copy in 16 bits
    assert memory.weights == each * sum(p.numel() for p in model.parameters())
    assert (memory.gradients, memory.optimizer) == (each * trained, 8 * trained)
    whole = cost.on_device(model, processor.collate([cost.random_example(model.config, SHORT)] * 3))
    assert 0 < memory.activations == pytest.approx(cost.activation_bytes(model, whole, precision), rel=0.02)
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_a_probe_takes_real_steps_and_moves_what_learns_alone(model, processor, name, precision, monkeypatch):
    before, rates = {key: tensor.clone() for key, tensor in model.state_dict().items()}, []
    step = torch.optim.AdamW.step

    def noted(self, *args, **options):
        rates.extend(group["lr"] for group in self.param_groups)
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    probe = cost.time_steps(model, processor, stage(name), SHORT, precision, examples=2, steps=3)
    moved = {key.split(".")[0] for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved == ({"projector"} if name == "pretrain" else {"projector", "language_model"})
    assert len(probe.losses) == len(probe.seconds) == 3 and probe.losses[-1] < probe.losses[0]
    assert set(rates) == {2e-3}  # the stage's own
    timed = cost.TimedSteps(4, (9.0, 1.0, 2.0, 4.0), (1.0,) * 4)
    assert timed.examples_per_second == 2.0  # the median without the first
    assert not model.training


def test_the_random_row_has_the_length_and_its_supervised_tokens_at_its_end(model, processor):
    row = cost.random_example(model.config, SHORT)
    assert len(row.input_ids) == 20 and sum(label != -100 for label in row.labels) == 7
    assert row.labels[-7:] == row.input_ids[-7:] and row.input_ids.count(model.config.image_token_id) == 4
    assert cost.random_example(model.config, SHORT).input_ids == row.input_ids
    assert cost.random_example(model.config, SHORT, seed=1).input_ids != row.input_ids
    with pytest.raises(ValueError, match="10 tokens hold no image of 4 and 7 supervised"):
        cost.random_example(model.config, cost.Length(10, 7))
