"""The training loop: what trains, what never moves, and that nothing but its inputs decides the result."""

import copy
import itertools
import json
import math
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lessons.faults import planted
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training import FEATURES, contents, in_a_child, kill_at, save_base, some_rows, stage

import minivlm.train
from minivlm.checkpoint import CheckpointError, load_checkpoint, read_meta, save_checkpoint
from minivlm.config import IGNORE_INDEX
from minivlm.data.images import ImageError
from minivlm.data.order import WINDOW
from minivlm.data.samples import Sample
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime import files
from minivlm.runtime.files import FolderError
from minivlm.train import (
    LOG,
    RESUME,
    SampleOrder,
    Trainer,
    TrainingError,
    learning_rates,
    shard,
    supervised_loss,
    text_probe,
)


@pytest.fixture
def base(tmp_path, model, processor) -> Path:
    return save_base(tmp_path / "base", model, processor)


@pytest.fixture
def start(base, processor):
    """`start(name, out, parent=base, **options)`: train the stage from its parent on the disk."""

    def run(name, out, parent=base, rows=None, changes=None, **options):
        model, _, _ = load_checkpoint(parent)
        options = {"precision": "fp32", "parent": parent} | options
        return model, Trainer(
            model, processor, rows or some_rows(), stage(name, **(changes or {})), out, **options
        ).fit()

    return run


@pytest.fixture
def pretrained(start, tmp_path) -> Path:
    start("pretrain", tmp_path / "pretrain")
    return tmp_path / "pretrain"


def interrupt_after(steps: int):
    """Ctrl-C at the end of a step."""
    return lambda done, *_: done == steps and os.kill(os.getpid(), signal.SIGINT)


def weight_bytes(folder: Path) -> dict[str, bytes]:
    files = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    assert files
    return files


# ---- what trains


def test_only_w_moves_in_stage_1_and_w_and_every_weight_of_the_language_model_in_stage_2(base, processor, tmp_path):
    model, _, _ = load_checkpoint(base)
    states = [copy.deepcopy(model.state_dict())]
    for name, parent in (("pretrain", base), ("sft", tmp_path / "pretrain")):
        options = {"parent": parent, "precision": "fp32"}
        assert len(Trainer(model, processor, some_rows(), stage(name), tmp_path / name, **options).fit()) == 6
        states.append(copy.deepcopy(model.state_dict()))
    first, second = (
        {name for name in before if not torch.equal(before[name], after[name])}
        for before, after in itertools.pairwise(states)
    )
    assert first == {"projector.weight"}
    assert second == {name for name in states[0] if not name.startswith("vision.")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_comes_back_as_a_user_wants_it(start, tmp_path, precision):
    model, _ = start("pretrain", tmp_path / "out", precision=precision)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert model.language_model.config._attn_implementation == "sdpa"
    assert "attn" not in (tmp_path / "out" / "config.json").read_text("utf-8")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert read_meta(tmp_path / "out")["precision"] == precision


def test_w_is_drawn_from_the_seed_whatever_the_caller_had(base, processor, tmp_path):
    firsts, before = [], torch.get_rng_state()
    for seed, factor in ((5, 1.0), (5, 3.0), (6, 1.0)):
        model, _, _ = load_checkpoint(base)
        model.projector.weight.data *= factor
        options = {"parent": base, "seed": seed, "precision": "fp32"}
        one_step, out = stage("pretrain", steps=1), tmp_path / f"{seed} {factor}"
        log = Trainer(model, processor, some_rows(), one_step, out, **options).fit()
        firsts.append((log[0]["loss"], model.projector.weight))
    assert firsts[0][0] == firsts[1][0] and torch.equal(firsts[0][1], firsts[1][1])
    assert not torch.equal(firsts[0][1], firsts[2][1])
    assert torch.equal(torch.get_rng_state(), before)  # the caller's own stay as they were


def test_a_frozen_weight_that_moves_is_noticed_and_nothing_is_saved(start, tmp_path):
    def touch(step, loss, model):
        if step == 5:
            next(model.vision.parameters()).data.add_(1e-3)

    with pytest.raises(TrainingError, match="vision moved in stage pretrain, which trains projector only"):
        start("pretrain", tmp_path / "out", on_step=touch)
    assert not (tmp_path / "out").exists()


# ---- rows


def test_a_row_that_fails_stops_the_step_that_needs_it_and_none_before(start, base, processor, tmp_path):
    rows, done = some_rows(24, images=[Image.new("RGB", (8, 8), "red")] * 6), []
    _, processor, _ = load_checkpoint(base)
    order = SampleOrder(rows, processor, 4, 0)
    bad = next(row for row in order[4] if row.images)  # of the fifth step
    broken = some_rows(24, images=["nowhere.png"] * 6)
    rows = [other if row.name == bad.name else row for row, other in zip(rows, broken, strict=True)]
    with pytest.raises(ImageError, match=r"nowhere\.png: there is no such file"):
        start("pretrain", tmp_path / "out", rows=rows, on_step=lambda step, loss, model: done.append(step))
    assert done == [1, 2, 3, 4]


# ---- the loss


def test_a_batch_padded_on_the_left_is_refused(model, processor):
    rows = [processor.encode(row) for row in some_rows(6)]
    batch = processor.collate([replace(row, patch_features=None) for row in rows], padding_side="left")
    assert not batch["attention_mask"].all()
    with pytest.raises(ValueError, match="padded on the right"):
        supervised_loss(model, batch)


def test_rows_without_any_image_teach_the_language_model_alone(start, tmp_path):
    changes = {"batch_size": 2, "steps": 4, "warmup_steps": 0}
    spoken = [[turn | {"content": "yes"} for turn in row.messages] for row in some_rows()]
    rows = [Sample(turns, f"row {i}") for i, turns in enumerate(spoken)]
    _, log = start("pretrain", tmp_path / "text", rows=rows, changes=changes)
    assert [entry["grad_norm"] for entry in log] == [0.0] * 4
    _, log = start("sft", tmp_path / "sft", rows=rows, changes=changes, parent=tmp_path / "text")
    assert all(entry["grad_norm"] > 0 for entry in log)


def by_hand(base, processor, rows) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over all supervised tokens of some rows, read one by one, and its gradient in W."""
    model, _, _ = load_checkpoint(base)
    minivlm.train.draw_projector(model, 0)
    losses = []
    for row in rows:
        shown = {} if row.patch_features is None else {"patch_features": row.patch_features}
        ids = torch.tensor([row.input_ids])
        images = torch.tensor([0 if row.patch_features is None else len(row.patch_features)])
        chances = model(input_ids=ids, images_per_row=images, **shown).logits[0].log_softmax(-1)  # (T, V)
        losses += [-chances[t - 1, label] for t, label in enumerate(row.labels) if t and label != IGNORE_INDEX]
    assert len(losses) > len(rows)
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), model.projector.weight.grad


@pytest.fixture
def gradients():
    """The gradients of every optimizer step: a list that grows."""
    steps = []

    def note(optimizer, *_):
        steps.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    hook = register_optimizer_step_pre_hook(note)
    yield steps
    hook.remove()


@pytest.mark.parametrize(("accumulation", "clip"), [(1, 2.0), (2, 2.0), (1, 0.02)])
def test_the_loss_of_a_step_is_the_mean_over_its_supervised_tokens(
    accumulation, clip, base, start, tmp_path, processor, gradients
):
    """And its gradient is scaled down to the norm of the stage."""
    loss, gradient = by_hand(base, processor, SampleOrder(some_rows(), processor, 4, seed=0)[0])
    norm = gradient.square().sum().sqrt().item()
    changes = {"batch_size": 4 // accumulation, "accumulation": accumulation, "steps": 1, "clip_norm": clip * norm}
    _, log = start("pretrain", tmp_path / "out", changes=changes)
    assert log[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert log[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)  # as it was before
    torch.testing.assert_close(gradients[0][0], gradient * min(1.0, clip), rtol=1e-4, atol=1e-6 * min(1.0, clip))


def test_features_give_what_images_give(start, tmp_path, model, processor):
    images = [Image.fromarray(torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()) for _ in range(6)]
    features = model.vision(processor.pixels(images))
    _, by_features = start("pretrain", tmp_path / "features", rows=some_rows(features=features))
    _, by_pixels = start("pretrain", tmp_path / "pixels", rows=some_rows(images=images))
    assert [e["loss"] for e in by_pixels] == pytest.approx([e["loss"] for e in by_features], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(start, tmp_path):
    with pytest.raises(TrainingError, match=r"step 1 .*row \d+.* has the loss nan"):
        start("pretrain", tmp_path / "out", rows=some_rows(features=FEATURES * math.inf))
    assert not (tmp_path / "out").exists()


def test_rows_in_which_nothing_is_supervised_are_distinguished_from_a_broken_loss(start, tmp_path):
    message = r"step 1 has no supervised token.* all labels of its 4 examples are -100\. .*row \d+.*template"
    with planted("template_of_another_model"), pytest.raises(TrainingError, match=message):
        start("pretrain", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- learning rates


def test_learning_rates_rise_in_a_line_and_fall_in_a_cosine():
    plan = stage("sft", steps=12, warmup_steps=2, learning_rates={"projector": 4.0, "language_model": 2.0})
    rates = [learning_rates(step, plan) for step in range(12)]
    assert [rate["projector"] for rate in rates[:2]] == [2.0, 4.0]
    assert rates[6]["projector"] == pytest.approx(4.0 * (0.1 + 0.9 * 0.5))  # halfway down
    assert rates[11]["projector"] == pytest.approx(0.4)
    assert all(rate["language_model"] == pytest.approx(rate["projector"] / 2) for rate in rates)
    assert all(a["projector"] > b["projector"] for a, b in itertools.pairwise(rates[1:]))


def test_each_part_gets_its_own_rate_and_decay_falls_on_matrices_only(model):
    plan = stage("sft", weight_decay=0.3)
    groups = minivlm.train.adamw(model, plan).param_groups
    decay = {id(p): (group["part"], group["weight_decay"]) for group in groups for p in group["params"]}
    expected = {
        id(p): (name.split(".")[0], 0.3 if p.ndim == 2 else 0.0)
        for name, p in model.named_parameters()
        if not name.startswith("vision.")
    }
    assert decay == expected


# ---- the order of the rows


def test_rows_are_drawn_from_anywhere_in_the_file(processor):
    """Each epoch is a permutation from its seed: rows of one step are not neighbours in the file."""
    rows, halves = some_rows(24), []
    for seed in range(3):
        order = SampleOrder(rows, processor, step_size=3, seed=seed)
        numbers = [int(row.name.removeprefix("row ")) for step in range(16) for row in order[step]]
        assert sorted(numbers[:24]) == sorted(numbers[24:]) == list(range(24))
        for epoch in (0, 1):  # within a window rows are sorted by length, so windows are compared as sets
            window = numbers[24 * epoch : 24 * epoch + 12]
            permuted = np.random.default_rng((seed, epoch)).permutation(24)
            assert set(window) == set(permuted[:12].tolist()) != set(range(12))
            halves.append(frozenset(window))
    assert len(set(halves)) == 6


def test_rows_of_similar_length_come_together(processor):
    order = SampleOrder(some_rows(48), processor, step_size=6, seed=0)

    def padded(steps):
        return sum(max(len(row.input_ids) for row in rows) * len(rows) for rows in steps)

    steps = [order[step] for step in range(WINDOW)]
    lengths = sorted(len(row.input_ids) for rows in steps for row in rows)
    best = [lengths[i : i + 6] for i in range(0, len(lengths), 6)]
    assert padded(steps) == sum(max(group) * 6 for group in best)


def test_rows_are_dealt_to_passes_and_processes_without_one_twice(processor):
    rows = [processor.encode(row) for row in some_rows(11)]
    parts = [part for process in range(3) for part in shard(rows, process, 3, accumulation=2)]
    assert len(parts) == 6
    assert Counter(row.name for part in parts for row in part) == Counter(f"row {i}" for i in range(11))


# ---- killed and stopped


@pytest.fixture
def base_with_dropout(config, make_model, processor, tmp_path) -> Path:
    """A base whose language model drops attention at random, so that random numbers matter too."""
    config.text_config.attention_dropout = 0.2
    return save_base(tmp_path / "base", make_model(), processor)


# moment: (owner, name of its function, which call, what is then left beside the other folders)
KILLS = {
    "before the first checkpoint": (None, "on_step", 1, set()),
    "between two checkpoints": (None, "on_step", 3, {"killed"}),
    "in the last step": (None, "on_step", 6, {"killed"}),
    "with the first files half-written": (files, "_sync", 3, {"partial"}),
    "with the second files half-written": (MiniVLMProcessor, "save_pretrained", 2, {"killed", "partial"}),
    "before the folders are exchanged": (files, "_exchange", 2, {"killed", "partial"}),
    "between the two renames": (Path, "rename", 3, {"killed.replaced", "partial"}),
    "before the old one is removed": (files.shutil, "rmtree", ".replaced", {"killed", "killed.replaced"}),
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", KILLS)
def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(moment, base_with_dropout, start, tmp_path, monkeypatch):
    start("pretrain", tmp_path / "parent")
    options = {"parent": tmp_path / "parent", "save_every": 2}
    _, log = start("sft", tmp_path / "never", **options)
    owner, name, at, expected = KILLS[moment]

    def run_and_die():
        if owner is None:
            start("sft", tmp_path / "killed", on_step=kill_at(lambda *_: None, at), **options)
        monkeypatch.setattr(owner, name, kill_at(getattr(owner, name), at))
        start("sft", tmp_path / "killed", **options)

    assert in_a_child(run_and_die) == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()} - {"base", "parent", "never"}
    assert {"partial" if "partial" in name else name for name in left} == expected
    _, again = start("sft", tmp_path / "killed", **options)
    assert weight_bytes(tmp_path / "killed") == weight_bytes(tmp_path / "never")
    same = ("step", "loss", "grad_norm", "learning_rates", "tokens")
    assert [[entry[key] for key in same] for entry in again] == [[entry[key] for key in same] for entry in log]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "parent", "never", "killed"}


def test_random_numbers_matter_in_these_runs(base_with_dropout, start, tmp_path, monkeypatch):
    changes = {"changes": {"steps": 1}}
    _, log = start("pretrain", tmp_path / "one", **changes)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: torch.random.default_generator.manual_seed(seed + 1))
    _, other = start("pretrain", tmp_path / "other", **changes)
    assert log[0]["loss"] != other[0]["loss"]


@pytest.fixture
def from_a_terminal():
    """Ctrl-C as Python handles it by default: tests may have been started in a way that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("from_a_terminal")
def test_ctrl_c_leaves_a_usable_checkpoint_and_says_how_to_go_on(start, tmp_path, capsys, pretrained, processor):
    start("sft", tmp_path / "whole", parent=pretrained)

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        start("sft", out, parent=pretrained, on_step=interrupt_after(3))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "Stopped after step 4 of 6." in (stdout := capsys.readouterr().out)
    assert str(out) in stdout and "run the same command again" in stdout
    model, _, meta = load_checkpoint(out)
    assert (meta["stage"], meta["steps"], meta["finished"]) == ("sft", 4, False)
    batch = processor(text="<image>", images=Image.new("RGB", (8, 8), "red"), return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=2).shape[1] > batch["input_ids"].shape[1]
    _, log = start("sft", out, parent=pretrained)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert weight_bytes(out) == weight_bytes(tmp_path / "whole")
    assert read_meta(out)["finished"] and not (out / RESUME).exists()


@pytest.mark.usefixtures("from_a_terminal")
def test_a_second_ctrl_c_stops_at_once(start, tmp_path):
    def interrupt_twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second one should have stopped this")

    with pytest.raises(KeyboardInterrupt):
        start("pretrain", tmp_path / "out", on_step=interrupt_twice)


def test_a_finished_run_is_not_run_again(start, tmp_path):
    first, log = start("pretrain", tmp_path / "out")
    steps = []
    second, again = start("pretrain", tmp_path / "out", on_step=lambda *args: steps.append(args))
    assert not steps and again == log
    assert torch.equal(first.projector.weight, second.projector.weight)


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("seed", {"seed": 1}),
        ("precision", {"precision": "bf16"}),
        ("rows", {"rows": some_rows(25)}),
        ("rows", {"rows": [replace(row, messages=row.messages[:2]) for row in some_rows()]}),
        ("recipe", {"changes": {"clip_norm": 0.5}}),
    ],
)
def test_another_run_is_neither_resumed_nor_overwritten(what, options, start, tmp_path):
    start("pretrain", tmp_path / "out")
    before = weight_bytes(tmp_path / "out")
    message = f"out holds another run: its {what} is .* choose another folder, or start anew .*resume=False.*--anew"
    with pytest.raises(TrainingError, match=message):
        start("pretrain", tmp_path / "out", **options)
    assert weight_bytes(tmp_path / "out") == before
    _, log = start("pretrain", tmp_path / "out", resume=False, **options)
    assert len(log) == 6


# ---- the parent


def test_a_stage_refuses_the_wrong_parent(start, tmp_path, base, pretrained):
    with pytest.raises(CheckpointError, match="'sft' starts from a 'pretrain' checkpoint"):
        start("sft", tmp_path / "out", parent=base)
    with pytest.raises(CheckpointError, match="'pretrain' starts from a 'base' checkpoint"):
        start("pretrain", tmp_path / "out", parent=pretrained)
    assert not (tmp_path / "out").exists()


def test_a_language_model_that_was_not_loaded_is_caught_before_the_first_step(
    base, make_model, processor, tmp_path, config
):
    config.text_config.initializer_range = 0.02
    random = make_model(seed=9)
    assert text_probe(random, processor) == pytest.approx(math.log(320), abs=0.1)
    trained, _, meta = load_checkpoint(base)
    assert abs(meta["text_probe"] - math.log(320)) > 0.1  # else this test could not fail
    random.vision.load_state_dict(trained.vision.state_dict())
    with pytest.raises(TrainingError, match=r"language model is not the one of .*ln V = ln 320 = 5\.77"):
        Trainer(random, processor, some_rows(), stage("pretrain"), tmp_path / "out", parent=base, precision="fp32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["vision", "projector", "language_model"])
def test_weights_that_are_not_the_parents_are_caught(part, pretrained, processor, tmp_path):
    model, _, _ = load_checkpoint(pretrained)
    next(getattr(model, part).parameters()).data.view(-1)[0] += 1e-3
    with pytest.raises(TrainingError, match=f"the model's {part} is not the one of .*pretrain"):
        Trainer(model, processor, some_rows(), stage("sft"), tmp_path / "out", parent=pretrained, precision="fp32")


def test_a_parent_without_a_probe_is_refused(model, processor, tmp_path):
    parent = save_checkpoint(tmp_path / "base", model, processor, {"stage": "base"})
    with pytest.raises(TrainingError, match="no 'text_probe' is recorded"):
        Trainer(model, processor, some_rows(), stage("pretrain"), tmp_path / "out", parent=parent).fit()


def test_a_checkpoint_names_its_stage_its_parent_and_how_it_was_made(base, start, tmp_path):
    out = tmp_path / "pretrain"
    _, log = start("pretrain", out, seed=3, command="minivlm train pretrain")
    meta, origin = read_meta(out), read_meta(base)
    assert (meta["stage"], meta["seed"], meta["precision"]) == ("pretrain", 3, "fp32")
    assert meta["command"] == "minivlm train pretrain" and meta["holds"] == ["projector"]
    assert meta["parent"] == {"stage": "base", "hashes": origin["hashes"]}
    assert {part for part in meta["hashes"] if meta["hashes"][part] != origin["hashes"][part]} == {"projector"}
    assert meta["recipe"]["learning_rates"] == {"projector": 2e-3} and meta["rows"]["count"] == 26
    assert meta["text_probe"] == pytest.approx(origin["text_probe"], abs=1e-5)
    assert meta["metrics"]["loss"] == log[-1]["loss"]
    start("sft", tmp_path / "sft", parent=out)
    meta = read_meta(tmp_path / "sft")
    assert meta["parent"]["stage"] == "pretrain" and meta["holds"] == ["projector", "language_model"]
    assert meta["parent"]["hashes"] == read_meta(out)["hashes"]
    assert meta["text_probe"] != read_meta(out)["text_probe"]


# ---- what a user sees


def test_the_ledger_is_printed_before_the_first_step_and_the_log_written(start, tmp_path, capsys):
    texts, steps = [], []

    def on_step(*step):
        texts.append(capsys.readouterr().out)
        steps.append(step)

    model, log = start("pretrain", tmp_path / "out", on_step=on_step)
    assert "stage pretrain" in texts[0] and "language_model" in texts[0] and "384" in texts[0]  # 16 x 24 weights learn
    assert [(step, loss) for step, loss, _ in steps] == [(entry["step"], entry["loss"]) for entry in log]
    assert {id(shown) for _, _, shown in steps} == {id(model)}
    written = [json.loads(line) for line in (tmp_path / "out" / LOG).read_text("utf-8").splitlines()]
    assert written == log
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    for entry in log:
        assert set(entry) == {
            "step", "loss", "learning_rates", "grad_norm", "tokens", "seconds", "tokens_per_second",
        }  # fmt: skip
        assert set(entry["learning_rates"]) == {"projector"}
        assert entry["tokens_per_second"] == pytest.approx(entry["tokens"] / entry["seconds"])
    assert log[1]["learning_rates"]["projector"] == 2e-3


# ---- precision


def test_every_step_in_16_bits_begins_with_the_weights_as_they_are(start, tmp_path, monkeypatch):
    """The engine's own weights are the model's, rounded to 16 bits, in each step; otherwise it would train old ones."""
    start("pretrain", tmp_path / "one", changes={"steps": 2})
    projectors, engines, loss = [], [], minivlm.train.supervised_loss

    class Noted(minivlm.train.WorkingCopy):
        def __init__(self, model, *args, **options):
            super().__init__(model, *args, **options)
            engines.append(model)

    def compared(worker, batch):
        if not engines or worker is engines[0]:  # the text probe, before the first step and when saving
            return loss(worker, batch)
        theirs = dict(engines[0].named_parameters())
        for name, weight in worker.named_parameters():
            assert weight.dtype == torch.bfloat16
            torch.testing.assert_close(weight, theirs[name].to(torch.bfloat16), rtol=0, atol=0)
        projectors.append(theirs["projector.weight"].to(torch.bfloat16))
        return loss(worker, batch)

    monkeypatch.setattr(minivlm.train, "WorkingCopy", Noted)
    monkeypatch.setattr(minivlm.train, "supervised_loss", compared)
    start("sft", tmp_path / "two", parent=tmp_path / "one", precision="bf16", changes={"steps": 4})
    assert len(projectors) >= 4 and not torch.equal(projectors[0], projectors[-1])


def test_a_run_without_a_precision_measures_once_and_keeps_it(start, tmp_path, monkeypatch):
    monkeypatch.setattr(minivlm.train, "choose_precision", lambda model: "bf16")
    with pytest.raises(KeyboardInterrupt):
        start("pretrain", tmp_path / "out", precision=None, on_step=interrupt_after(2))
    monkeypatch.setattr(minivlm.train, "choose_precision", lambda model: "fp32")
    start("pretrain", tmp_path / "out", precision=None)
    assert read_meta(tmp_path / "out")["precision"] == "bf16"
    with pytest.raises(TrainingError, match="no precision 'fp16'"):
        start("pretrain", tmp_path / "other", precision="fp16")


# ---- before the first step


def no_step(*_):
    pytest.fail("a step was made")


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("out", ["base", "pretrain"])
def test_a_stage_never_replaces_its_own_parents(start, base, pretrained, out, resume):
    out = base.with_name(out)
    before = contents(out)
    with pytest.raises(CheckpointError, match="builds on; it is not replaced, choose another folder"):
        start("sft", out, parent=pretrained, resume=resume, on_step=no_step)
    assert contents(out) == before


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_other_things_is_refused_before_the_first_step(start, tmp_path, resume):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    for path in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.txt"):
        with pytest.raises(FolderError, match="exists and is no checkpoint"):
            start("pretrain", path, resume=resume, on_step=no_step)
    with pytest.raises(OSError, match=r"out cannot be written \(.*make sure that"):
        start("pretrain", tmp_path / "thesis" / "chapter.txt" / "out", resume=resume, on_step=no_step)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (RESUME, lambda data: data[: len(data) // 2]),
        (RESUME, lambda data: b""),
        (RESUME, lambda data: data[:-1]),
        (RESUME, None),
        (LOG, lambda data: data[:-20]),
        (LOG, lambda data: b""),
        (LOG, None),
        (LOG, lambda data: data[: data.index(b"\n") + 1]),
    ],
)
def test_a_damaged_record_of_a_stopped_run_is_named_and_nothing_is_trained(start, tmp_path, name, damage):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        start("pretrain", out, on_step=interrupt_after(3))
    if damage is None:
        (out / name).unlink()
    else:
        (out / name).write_bytes(damage((out / name).read_bytes()))
    before = contents(out)
    with pytest.raises(TrainingError, match=rf"{name}.*cannot go on; start anew .*--anew"):
        start("pretrain", out, on_step=no_step)
    assert contents(out) == before


@pytest.mark.parametrize("key", ["finished", "steps"])
def test_a_record_without_its_progress_is_refused(key, start, pretrained):
    file = pretrained / "minivlm.json"
    meta = json.loads(file.read_text("utf-8"))
    del meta[key]
    file.write_text(json.dumps(meta), "utf-8")
    with pytest.raises(TrainingError, match="so the run cannot go on; start anew"):
        start("pretrain", pretrained)
