"""The engine computes what the model computes: the library's attention and a plain backward pass are the oracles."""

import copy
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from training import save_base, some_features, some_rows, stage
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, eager_attention_forward

import minivlm.runtime.precision
from minivlm.checkpoint import load_checkpoint, read_meta
from minivlm.config import IGNORE_INDEX
from minivlm.model import set_trainable
from minivlm.runtime.precision import (
    LEAN,
    Engine,
    EngineError,
    LastLayer,
    choose_compiled,
    choose_precision,
    held_memory,
    lean_attention,
    why_not_compiled,
)
from minivlm.train import supervised_loss, train


@pytest.fixture(scope="module")
def compiler():
    """Where tests must not be skipped, a missing compiler is a fault."""
    if reason := why_not_compiled():
        assert not os.environ.get("CI"), reason
        pytest.skip(f"torch.compile does not work here: {reason}")


def mixed_batch(model, processor) -> dict[str, torch.Tensor]:
    """Rows with one picture, with two, and with none."""
    features = some_features(model.config)
    rows = [processor.render(row.messages(), row.where) for row in some_rows(10)]
    rows = [replace(row, patch_features=features[row.pictures]) if row.pictures else row for row in rows]
    assert {len(row.pictures) for row in rows} == {0, 1, 2}
    return processor.collate(rows, pad_to_multiple_of=32)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plainly(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients by the model itself: logits everywhere, the library's loss, its eager attention."""
    model.language_model.set_attn_implementation("eager")
    count = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    loss = model(**batch).loss * count
    loss.backward()
    found = loss.item(), gradients(model)
    model.zero_grad()
    model.language_model.set_attn_implementation("sdpa")
    return found


# ---- attention


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_lean_attention_is_the_librarys_eager_one(groups, masked):
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, heads, 9, 8, generator=random, dtype=torch.float64, requires_grad=True)
        for heads in (4, groups, groups)
    )
    never = torch.finfo(torch.float32).min
    mask = torch.full((9, 9), never, dtype=torch.float64).triu(1).repeat(3, 1, 1, 1)
    mask[1, :, :, :3] = never  # padded on the left: the first queries see nothing at all
    module = nn.Module()
    module.num_key_value_groups = 4 // groups
    found = []
    for attention in (lean_attention, eager_attention_forward):
        read, _ = attention(module, query, key, value, mask if masked else None, scaling=0.3, dropout=0.0)
        (read * torch.arange(8)).sum().backward()
        found.append([read.detach(), *(tensor.grad for tensor in (query, key, value))])
        for tensor in (query, key, value):
            tensor.grad = None
    for lean, eager in zip(*found, strict=True):
        torch.testing.assert_close(lean, eager, rtol=1e-5, atol=1e-6)  # the library softens in 32 bits


def test_lean_attention_has_the_right_gradients_to_every_digit():
    """In 64 bits, against finite differences; a compiler needs the shapes besides."""
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, 4, generator=random, dtype=torch.float64)
        for heads, length in ((4, 3), (2, 5), (2, 5))
    )
    mask = torch.zeros(2, 1, 3, 5, dtype=torch.float64)
    mask[0, :, 0, 2:] = -1e9
    torch.library.opcheck(torch.ops.minivlm.attend, (query, key, value, mask, 0.5))
    given = [tensor.requires_grad_() for tensor in (query, key, value)]
    assert torch.autograd.gradcheck(lambda *given: lean_attention(nn.Module(), *given, mask, 0.5)[0], given)


def test_a_model_with_dropout_keeps_the_librarys_attention(model):
    with pytest.raises(ValueError, match=r"has no dropout, and shall drop 0\.1; set the attention to 'sdpa'"):
        lean_attention(nn.Module(), *(torch.ones(1, 1, 2, 4) for _ in range(3)), None, 1.0, dropout=0.1)
    config = model.language_model.config
    try:
        config.attention_dropout = 0.1
        assert Engine(model, "bf16").model.language_model.config._attn_implementation == "sdpa"
    finally:
        config.attention_dropout = 0.0


# ---- the working copy


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_in_32_bits_loss_and_gradient_are_the_models_own(model, processor, name):
    set_trainable(model, stage(name))
    batch = mixed_batch(model, processor)
    loss, expected = plainly(model, batch)
    engine = Engine(model, "fp32")
    found = supervised_loss(engine.model, batch)
    engine.backward(found)
    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert gradients(model).keys() == expected.keys()
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5 * expected[key].abs().max().item())


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_in_16_bits_the_gradient_points_the_same_way_and_adds_up_in_32(model, processor, name):
    set_trainable(model, stage(name))
    batch = mixed_batch(model, processor)
    loss, expected = plainly(model, batch)
    engine = Engine(model, "bf16")
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert engine.model.language_model.config._attn_implementation == LEAN
    found = supervised_loss(engine.model, batch)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(loss, rel=0.02)
    engine.backward(found)
    once = gradients(model)
    assert once.keys() == expected.keys() and {g.dtype for g in once.values()} == {torch.float32}
    one, other = (torch.cat([g[key].flatten() for key in expected]) for g in (once, expected))
    assert torch.cosine_similarity(one, other, dim=0) > 0.99
    engine.backward(supervised_loss(engine.model, batch))
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 2 * once[key], rtol=1e-6, atol=0)


def test_a_step_too_small_for_16_bits_is_not_lost(model, processor):
    set_trainable(model, stage("pretrain"))
    engine = Engine(model, "bf16")
    weight = model.projector.weight
    with torch.no_grad():
        weight.fill_(1.0)
    engine.refresh()
    for _ in range(8):
        with torch.no_grad():
            weight.add_(2**-10)  # a bfloat16 next to 1 is 2**-7 away
        engine.refresh()
    assert torch.equal(engine.model.projector.weight, torch.full_like(weight, 1 + 2**-7, dtype=torch.bfloat16))


def test_the_model_itself_is_left_alone(model, processor):
    set_trainable(model, stage("sft"))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    engine = Engine(model, "bf16")
    assert engine.model.training and not engine.model.vision.training and not model.training
    assert model.language_model.config._attn_implementation == model.config.text_config._attn_implementation == "sdpa"
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_tied_head_stays_tied(model, precision):
    engine = Engine(model, precision)
    assert engine.model.get_output_embeddings().weight is engine.model.get_input_embeddings().weight
    shared = engine.model.projector.weight is model.projector.weight
    assert shared == (precision == "fp32")


# ---- the last layer


@pytest.mark.parametrize("asked", [[0], [8], [3, 4, 5], [1, 6], list(range(9))])
@pytest.mark.parametrize("padded", [True, False])  # without padding the library makes no mask
@pytest.mark.parametrize("attention", ["sdpa", "eager", LEAN])
def test_the_last_layer_computes_what_is_asked_for_and_nothing_else(model, asked, padded, attention):
    language_model = model.language_model
    embeds = torch.randn(2, 9, language_model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    shown = torch.ones(2, 9, dtype=torch.long)
    shown[1, 7:] = 0 if padded else 1
    places, found = torch.tensor(asked), []
    language_model.set_attn_implementation(attention)
    try:
        copy = Engine(model, "fp32").model.language_model
    finally:
        language_model.set_attn_implementation("sdpa")
    for one, kept in ((copy, places), (language_model, 0)):
        given = embeds.clone().requires_grad_()
        logits = one(inputs_embeds=given, attention_mask=shown, logits_to_keep=kept, use_cache=False).logits
        logits = logits if one is copy else logits[:, places]
        logits = logits * shown[:, places, None]  # what padding looks at is nobody's business
        logits.square().sum().backward()
        found.append((logits.detach(), given.grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.fixture
def cut(monkeypatch) -> list[slice]:
    """What `LastLayer` was asked for, call by call."""
    asked, forward = [], LastLayer.forward

    def note(self, *args, **options):
        asked.append(self.asked)
        return forward(self, *args, **options)

    monkeypatch.setattr(LastLayer, "forward", note)
    return asked


def test_a_call_for_all_places_finds_the_librarys_own_layer(model, cut):
    copy = Engine(model, "fp32").model.language_model
    embeds = torch.zeros(1, 5, copy.config.hidden_size)
    for kept in (torch.tensor([2, 3]), 0, 2):
        copy(inputs_embeds=embeds, logits_to_keep=kept, use_cache=False)
    copy.base_model(inputs_embeds=embeds)
    with pytest.raises(AttributeError):
        copy(inputs_embeds="no numbers", logits_to_keep=torch.tensor([1]), use_cache=False)
    assert cut == [slice(2, 4)]
    assert type(copy.base_model.layers[-1]) is LlamaDecoderLayer
    assert copy.state_dict().keys() == model.language_model.state_dict().keys()


@pytest.mark.parametrize("options", [{}, {"use_cache": True}, {"use_cache": None}, {"asked": [-1], "use_cache": False}])
def test_calls_that_keep_keys_or_count_from_the_end_are_the_librarys(model, cut, options):
    """Generating by the copy, for one: a cut layer would leave the cache of the last layer empty."""
    copy, options = Engine(model, "fp32").model.language_model, dict(options)
    embeds = torch.randn(1, 5, copy.config.hidden_size, generator=torch.Generator().manual_seed(0))
    asked = torch.tensor(options.pop("asked", [3, 4]))
    ours, expected = (
        one(inputs_embeds=embeds, logits_to_keep=asked, **options) for one in (copy, model.language_model.train())
    )
    assert not cut and torch.equal(ours.logits, expected.logits)
    if options.get("use_cache") is not False:
        assert ours.past_key_values.get_seq_length(len(copy.base_model.layers) - 1) == 5


def test_an_interrupted_call_leaves_the_next_one_as_it_was(model, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    copy = Engine(model, "fp32").model.language_model
    embeds = torch.zeros(1, 5, copy.config.hidden_size)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LastLayer, "forward", interrupted)
        copy(inputs_embeds=embeds, logits_to_keep=torch.tensor([2, 3]), use_cache=False)
    assert copy(inputs_embeds=embeds, use_cache=False).logits.shape[1] == 5


def test_a_layer_that_we_do_not_know_stays_as_it_is(model, cut):
    class Another(LlamaDecoderLayer):
        pass

    layers = model.language_model.base_model.layers
    layers[-1].__class__ = Another
    try:
        copy = Engine(model, "fp32").model.language_model
        embeds = torch.zeros(1, 5, copy.config.hidden_size)
        copy(inputs_embeds=embeds, logits_to_keep=torch.tensor([3]), use_cache=False)
        assert not cut
    finally:
        layers[-1].__class__ = LlamaDecoderLayer


def test_attention_with_another_kind_of_mask_keeps_the_whole_layer(model, cut, monkeypatch):
    language_model = copy.deepcopy(model.language_model)
    monkeypatch.setattr(language_model.config, "_attn_implementation_internal", "flex_attention")
    minivlm.runtime.precision._only_where_asked(language_model, compiled=False)
    monkeypatch.undo()
    assert not language_model._forward_pre_hooks and not language_model._forward_hooks


# ---- compiled layers


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-5), ("bf16", 0.02)])
def test_compiled_layers_compute_the_same(model, processor, compiler, precision, close):
    set_trainable(model, stage("sft"))
    batch = mixed_batch(model, processor)
    loss, expected = plainly(model, batch)
    engine = Engine(model, precision, compiled=True)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())  # nothing is left of the trial
    found = supervised_loss(engine.model, batch)
    engine.backward(found)
    assert found.item() == pytest.approx(loss, rel=close)
    one, other = (torch.cat([g[key].flatten() for key in expected]) for g in (gradients(model), expected))
    assert 1 - torch.cosine_similarity(one, other, dim=0) < close / 2


@pytest.mark.slow
def test_a_compiled_run_that_was_stopped_ends_with_the_bytes_of_one_that_was_not(model, processor, compiler, tmp_path):
    base = save_base(tmp_path / "base", model, processor)
    part, features = stage("pretrain", steps=6), some_features(model.config)

    def start(out, on_step=None, compiled=None):
        # what a new process has not compiled, this one shall not have either
        torch.compiler.reset()
        parent = load_checkpoint(base)[:2]
        given = {"parent": base, "features": features, "precision": "bf16", "compiled": compiled, "on_step": on_step}
        train(*parent, some_rows(), part, tmp_path / out, **given)
        return {file.name: file.read_bytes() for file in (tmp_path / out).glob("*.safetensors")}

    whole = start("whole", compiled=True)
    assert read_meta(tmp_path / "whole")["compiled"] is True
    with pytest.raises(KeyboardInterrupt):
        start("parts", lambda step, loss, _: step == 3 and os.kill(os.getpid(), signal.SIGINT), compiled=True)
    assert start("parts") == whole  # without being told, it goes on compiled
    assert read_meta(tmp_path / "parts")["compiled"] is True


def test_compiling_that_fails_says_why_and_what_to_do(model, monkeypatch):
    def refuse(self, **_):
        raise RuntimeError("no compiler g++\nand much more")

    set_trainable(model, stage("sft"))
    monkeypatch.setattr(nn.Module, "compile", refuse)
    with pytest.raises(
        EngineError, match=r"compiled here \(no compiler g\+\+\); torch.compile needs a C\+\+ compiler.*--no-compile"
    ):
        Engine(model, "fp32", compiled=True)


@pytest.mark.parametrize("works", [True, False])
def test_only_a_long_run_is_compiled_and_only_where_that_works(model, monkeypatch, capsys, works):
    tried = []

    def attempt():
        tried.append(1)
        return "" if works else "no compiler"

    monkeypatch.setattr(minivlm.runtime.precision, "why_not_compiled", attempt)
    weights = sum(p.numel() for p in model.language_model.parameters())
    enough = minivlm.runtime.precision.COMPILE_FROM / weights
    assert not choose_compiled(model, int(enough) - 1) and not tried
    assert choose_compiled(model, int(enough) + 1) is works
    assert ("Not compiled" in capsys.readouterr().out) is not works


def test_the_true_models_stages_are_compiled_and_those_of_scenes_need_no_compiler():
    from minivlm.checkpoint import load_checkpoint
    from minivlm.config import STAGES, preset_config
    from minivlm.runtime.paths import BASE, data_folder

    text = preset_config("clip-26m").text_config
    least = 3 * text.hidden_size * text.intermediate_size * text.num_hidden_layers  # its MLPs alone
    base, _, _ = load_checkpoint(data_folder() / BASE)
    most = sum(p.numel() for p in base.language_model.parameters())
    for name, weights, compiled in (("clip-26m", least, True), ("scenes", most, False)):
        for part in STAGES[name].values():
            rows = part.steps * part.batch_size * part.accumulation
            assert (rows * weights >= minivlm.runtime.precision.COMPILE_FROM) is compiled


# ---- precision and memory


@pytest.mark.parametrize(("bf16", "choice"), [(0.5, "bf16"), (0.95, "fp32"), (3.0, "fp32")])
def test_precision_is_what_was_measured_to_be_faster(bf16, choice, model, monkeypatch):
    clock = [0.0]
    linear = torch.nn.functional.linear

    def slow(given, *others):
        clock[0] += bf16 if given.dtype == torch.bfloat16 else 1.0
        return linear(given, *others)

    monkeypatch.setattr(minivlm.runtime.precision.F, "linear", slow)
    monkeypatch.setattr(minivlm.runtime.precision.time, "perf_counter", lambda: clock[0])
    assert choose_precision(model) == choice


def test_memory_is_held_between_steps_and_given_back_in_the_end():
    if minivlm.runtime.precision._glibc() is None:
        pytest.skip("only glibc has to be told")
    from pathlib import Path

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    before = resident()
    with held_memory():
        torch.ones(50_000_000)  # 200 MB
        assert resident() > before + 150
    assert resident() < before + 50


FAULTS_AFTER = """
import resource
import torch
from minivlm.runtime.precision import held_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in range(1, 9):
        held = torch.ones(250_000 * megabytes)  # each while the one before still lies there
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(7_900_000)  # 32 MB: once that was freed, glibc keeps what is smaller
faults()
with held_memory():
    torch.ones(1_000_000)
faults()
print(faults())
"""


def test_a_process_is_as_it_was_after_its_memory_was_held():
    """With glibc's first thresholds, every tensor of some megabytes would be handed out anew, page by page."""
    if minivlm.runtime.precision._glibc() is None:
        pytest.skip("only glibc has to be told")
    done = subprocess.run([sys.executable, "-c", FAULTS_AFTER], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_000  # of 9,000 pages
