"""The working copy computes the same as the model; the library's eager forward pass is the reference."""

import ctypes
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from training import contents, save_base, some_rows, stage
from transformers.models.llama.modeling_llama import eager_attention_forward

import minivlm.runtime.precision
from minivlm.checkpoint import load_checkpoint, read_meta
from minivlm.config import IGNORE_INDEX, STAGES, preset_config
from minivlm.model import set_trainable
from minivlm.runtime.attention import LEAN, lean_attention
from minivlm.runtime.paths import BASE, data_folder
from minivlm.runtime.precision import (
    CompileError,
    WorkingCopy,
    choose_compiled,
    choose_precision,
    give_back_memory,
    why_not_compiled,
)
from minivlm.train import Trainer, supervised_loss


@pytest.fixture(scope="module")
def compiler():
    """Where tests must not be skipped, a missing compiler is an error."""
    if reason := why_not_compiled():
        assert not os.environ.get("CI"), reason
        pytest.skip(f"torch.compile does not work here: {reason}")


def mixed_batch(model, processor) -> dict[str, torch.Tensor]:
    """Rows with one image, with two, and with none."""
    rows = [processor.encode(row) for row in some_rows(10)]
    assert {0 if row.patch_features is None else len(row.patch_features) for row in rows} == {0, 1, 2}
    return processor.collate(rows, pad_to_multiple_of=32)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients by the model itself: logits everywhere, the library's loss, its eager attention."""
    model.language_model.set_attn_implementation("eager")
    count = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    loss = model(**batch).loss * count
    loss.backward()
    result = loss.item(), gradients(model)
    model.zero_grad()
    model.language_model.set_attn_implementation("sdpa")
    return result


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
    results = []
    for attention in (lean_attention, eager_attention_forward):
        read, _ = attention(module, query, key, value, mask if masked else None, scaling=0.3, dropout=0.0)
        (read * torch.arange(8)).sum().backward()
        results.append([read.detach(), *(tensor.grad for tensor in (query, key, value))])
        for tensor in (query, key, value):
            tensor.grad = None
    for lean, eager in zip(*results, strict=True):
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
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    assert torch.autograd.gradcheck(lambda *args: lean_attention(nn.Module(), *args, mask, 0.5)[0], inputs)


def test_a_model_with_dropout_keeps_the_librarys_attention(model):
    with pytest.raises(ValueError, match=r"has no dropout, but 0\.1 is asked for; set the attention to 'sdpa'"):
        lean_attention(nn.Module(), *(torch.ones(1, 1, 2, 4) for _ in range(3)), None, 1.0, dropout=0.1)
    config = model.language_model.config
    try:
        config.attention_dropout = 0.1
        assert WorkingCopy(model, "bf16").model.language_model.config._attn_implementation == "sdpa"
    finally:
        config.attention_dropout = 0.0


# ---- the working copy


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_in_32_bits_loss_and_gradient_are_the_models_own(model, processor, name):
    set_trainable(model, stage(name))
    batch = mixed_batch(model, processor)
    loss, expected = reference(model, batch)
    working = WorkingCopy(model, "fp32")
    actual = supervised_loss(working.model, batch)
    working.backward(actual)
    assert actual.item() == pytest.approx(loss, rel=1e-5)
    assert gradients(model).keys() == expected.keys()
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5 * expected[key].abs().max().item())


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_in_16_bits_the_gradient_has_the_same_direction_and_adds_up_in_32(model, processor, name):
    set_trainable(model, stage(name))
    batch = mixed_batch(model, processor)
    loss, expected = reference(model, batch)
    working = WorkingCopy(model, "bf16")
    assert {p.dtype for p in working.model.parameters()} == {torch.bfloat16}
    assert working.model.language_model.config._attn_implementation == LEAN
    actual = supervised_loss(working.model, batch)
    assert actual.dtype == torch.float32 and actual.item() == pytest.approx(loss, rel=0.02)
    working.backward(actual)
    once = gradients(model)
    assert once.keys() == expected.keys() and {g.dtype for g in once.values()} == {torch.float32}
    one, other = (torch.cat([g[key].flatten() for key in expected]) for g in (once, expected))
    assert torch.cosine_similarity(one, other, dim=0) > 0.99
    working.backward(supervised_loss(working.model, batch))
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 2 * once[key], rtol=1e-6, atol=0)


def test_a_step_too_small_for_16_bits_is_not_lost(model, processor):
    set_trainable(model, stage("pretrain"))
    working = WorkingCopy(model, "bf16")
    weight = model.projector.weight
    with torch.no_grad():
        weight.fill_(1.0)
    working.refresh()
    for _ in range(8):
        with torch.no_grad():
            weight.add_(2**-10)  # a bfloat16 next to 1 is 2**-7 away
        working.refresh()
    assert torch.equal(working.model.projector.weight, torch.full_like(weight, 1 + 2**-7, dtype=torch.bfloat16))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_tied_head_stays_tied(model, precision):
    working = WorkingCopy(model, precision)
    assert working.model.get_output_embeddings().weight is working.model.get_input_embeddings().weight
    shared = working.model.projector.weight is model.projector.weight
    assert shared == (precision == "fp32")


# ---- compiled layers


@pytest.mark.slow
def test_compiled_layers_compute_the_same(model, processor, compiler):
    set_trainable(model, stage("sft"))
    batch = mixed_batch(model, processor)
    loss, expected = reference(model, batch)
    working = WorkingCopy(model, "fp32", compiled=True)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())  # nothing is left of the trial
    actual = supervised_loss(working.model, batch)
    working.backward(actual)
    assert actual.item() == pytest.approx(loss, rel=1e-5)
    one, other = (torch.cat([g[key].flatten() for key in expected]) for g in (gradients(model), expected))
    assert 1 - torch.cosine_similarity(one, other, dim=0) < 5e-6


@pytest.mark.slow
def test_a_compiled_run_that_was_stopped_ends_with_the_bytes_of_one_that_was_not(model, processor, compiler, tmp_path):
    """In 16 bits, with our own attention; the trained weights are those of a run that is not compiled."""
    base = save_base(tmp_path / "base", model, processor)

    def start(out, on_step=None, compiled=None):
        options = {"parent": base, "precision": "bf16", "compiled": compiled, "on_step": on_step}
        return Trainer(*load_checkpoint(base)[:2], some_rows(), stage("pretrain"), tmp_path / out, **options).fit()

    torch.compiler.reset()
    log, plain = start("whole", compiled=True), start("plain", compiled=False)
    for key in ("loss", "grad_norm"):
        assert [entry[key] for entry in log] == pytest.approx([entry[key] for entry in plain], rel=0.02)
    with pytest.raises(KeyboardInterrupt):
        start("parts", lambda step, loss, _: step == 3 and os.kill(os.getpid(), signal.SIGINT), compiled=True)
    torch.compiler.reset()  # as in a new process, nothing is compiled yet
    start("parts")  # it resumes compiled, without the option
    whole, parts, without = (contents(tmp_path / out) for out in ("whole", "parts", "plain"))
    assert parts["projector.safetensors"] == whole["projector.safetensors"] != without["projector.safetensors"]
    assert [read_meta(tmp_path / out)["compiled"] for out in ("whole", "parts", "plain")] == [True, True, False]


def test_compiling_that_fails_says_why_and_what_to_do(model, monkeypatch):
    def refuse(self, **_):
        raise RuntimeError("no compiler g++\nand much more")

    set_trainable(model, stage("sft"))
    monkeypatch.setattr(nn.Module, "compile", refuse)
    with pytest.raises(
        CompileError, match=r"compiled here \(no compiler g\+\+\); torch.compile needs a C\+\+ compiler.*--no-compile"
    ):
        WorkingCopy(model, "fp32", compiled=True)


@pytest.mark.parametrize("works", [True, False])
def test_only_a_long_run_is_compiled_and_only_where_that_works(model, monkeypatch, capsys, works):
    tried = []
    reason = "" if works else "no compiler"
    monkeypatch.setattr(minivlm.runtime.precision, "why_not_compiled", lambda: tried.append(1) or reason)
    weights = sum(p.numel() for p in model.language_model.parameters())
    enough = minivlm.runtime.precision.COMPILE_FROM / weights
    assert not choose_compiled(model, int(enough) - 1) and not tried
    assert choose_compiled(model, int(enough) + 1) is works
    assert ("Not compiled" in capsys.readouterr().out) is not works


def test_the_true_models_stages_are_compiled_and_those_of_scenes_need_no_compiler():
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

    def slow(inputs, *args):
        clock[0] += bf16 if inputs.dtype == torch.bfloat16 else 1.0
        return linear(inputs, *args)

    monkeypatch.setattr(minivlm.runtime.precision.F, "linear", slow)
    monkeypatch.setattr(minivlm.runtime.precision.time, "perf_counter", lambda: clock[0])
    assert choose_precision(model) == choice


def test_freed_memory_goes_back_to_the_system():
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("only glibc keeps it")

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    pieces = [torch.ones(25_000) for _ in range(2000)]  # 200 MB, each too small to be mapped by itself
    full = resident()
    del pieces[:-1]  # the last one keeps the heap from shrinking by itself
    give_back_memory()
    assert resident() < full - 150
