"""Checkpoints: what is loaded is what was saved, or the file and the key that is wrong are named."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from training import META, assert_unharmed, contents

from minivlm.checkpoint import (
    SMALL_FILES,
    CheckpointError,
    hash_config,
    load_checkpoint,
    part_hashes,
    read_meta,
    read_tensors,
    save_checkpoint,
)
from minivlm.config import MiniVLMConfig
from minivlm.data.samples import Sample
from minivlm.model import PARTS, MiniVLMForConditionalGeneration
from minivlm.pretraining.tokenizer import train_tokenizer
from minivlm.runtime.files import FolderError, hash_tensors


def edit(file: Path, change) -> None:
    """Rewrite a safetensors file with `change` applied to its tensors."""
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(file).items()}
    change(tensors)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


def edit_json(file: Path, without: str = "", **changes) -> None:
    """Set keys of a JSON file, or take one out."""
    content = json.loads(file.read_text("utf-8")) | changes
    content.pop(without, None)
    file.write_text(json.dumps(content), "utf-8")


def assert_refused(folder: Path, problem: str) -> None:
    """The checkpoint is not loaded, and the message says why."""
    with pytest.raises(CheckpointError, match=problem):
        load_checkpoint(folder)


@pytest.fixture
def saved(model, processor, tmp_path) -> Path:
    return save_checkpoint(tmp_path / "sft", model, processor, META)


# ---- saved and loaded


def test_loaded_is_what_was_saved(saved, model, processor, make_batch):
    randomness = torch.get_rng_state()
    loaded, loaded_processor, meta = load_checkpoint(saved)
    assert torch.equal(torch.get_rng_state(), randomness)
    assert type(loaded) is MiniVLMForConditionalGeneration
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    head, embeddings = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert head.data_ptr() == embeddings.data_ptr()  # still tied
    batch = make_batch([2, 0, 1])
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    messages = [{"role": "user", "content": "Hi <image>"}, {"role": "assistant", "content": "a"}]
    assert loaded_processor.encode(Sample(messages)) == processor.encode(Sample(messages))
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert META.items() <= meta.items()
    assert meta["holds"] == list(PARTS)
    assert meta["hashes"] == part_hashes(model, processor) == part_hashes(loaded, loaded_processor)
    assert {"python", "torch", "transformers"} <= meta["versions"].keys()


FRESH = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
import minivlm
from minivlm.checkpoint import load_checkpoint
folder, batch, out = sys.argv[1:]
theirs, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
assert type(theirs) is minivlm.MiniVLMForConditionalGeneration and not theirs.training
assert not any(report.values()), report
ours = load_checkpoint(folder)[0]
assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
assert type(AutoProcessor.from_pretrained(folder)) is minivlm.MiniVLMProcessor
models = {"ours": ours, "theirs": theirs}
save_file({name: model(**load_file(batch)).logits.detach() for name, model in models.items()}, out)
"""


def test_a_fresh_process_gets_the_same_logits(saved, model, make_batch, tmp_path):
    """By our loader and the library's. A buffer that is not saved and not rebuilt would come back as empty memory."""
    batch, out = make_batch([1, 2, 0]), tmp_path / "logits.safetensors"
    safetensors.torch.save_file(batch, tmp_path / "batch.safetensors")
    subprocess.run([sys.executable, "-c", FRESH, saved, tmp_path / "batch.safetensors", out], check=True)
    for logits in safetensors.torch.load_file(out).values():
        assert torch.allclose(logits, model(**batch).logits, rtol=0, atol=1e-6)  # threads may sum in another order


def test_saving_what_was_loaded_gives_the_same_bytes(saved, model, processor, tmp_path, image):
    loaded, loaded_processor, _ = load_checkpoint(saved)
    loaded_processor(text=["a", "<image> and more"], images=[image])  # using it must leave no trace
    first = save_checkpoint(tmp_path / "one", loaded, loaded_processor, META)
    second = save_checkpoint(tmp_path / "two", *load_checkpoint(first)[:2], META)
    assert contents(first) == contents(second)
    different = {name for name, data in contents(saved).items() if contents(first)[name] != data}
    assert different <= {"tokenizer_config.json"}  # the library notes there that the tokenizer came from a folder


def test_only_safetensors_and_no_machine_path(saved):
    assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json", ".jinja"}
    assert not [name for name, data in contents(saved).items() if str(saved.parent).encode() in data]


def test_half_precision_and_how_to_generate_on_disk(model, processor, tmp_path):
    model.generation_config.update(no_repeat_ngram_size=7, eos_token_id=[2, 5])
    folder = save_checkpoint(tmp_path / "half", model, processor, META, dtype=torch.bfloat16)
    stored = safetensors.torch.load_file(folder / "projector.safetensors")["projector.weight"]
    assert stored.dtype == torch.bfloat16
    loaded, loaded_processor, meta = load_checkpoint(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.projector.weight, model.projector.weight.bfloat16().float())
    assert meta["hashes"] == part_hashes(loaded, loaded_processor)
    assert loaded.generation_config.no_repeat_ngram_size == 7 and loaded.generation_config.eos_token_id == [2, 5]


# ---- hashes


def test_hash_by_hand():
    """Names in order, shapes, and every value as 32 bits, for any layout in memory."""
    parts = (b"a (2,)\n", struct.pack("<2f", 1, -2), b"b ()\n", struct.pack("<f", 0.5))
    parts += (b"c (2, 2)\n", struct.pack("<4f", 1, 3, 2, 4))
    bfloat16, turned = torch.tensor([1.0, -2.0], dtype=torch.bfloat16), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t()
    expected = hashlib.sha256(b"".join(parts)).hexdigest()
    assert hash_tensors({"b": torch.tensor(0.5), "c": turned, "a": bfloat16}) == expected


# ---- only what a stage trained


@pytest.fixture
def chain(make_model, processor, tmp_path) -> Path:
    """base (all parts) <- pretrain (W alone) <- sft (W and the language model)."""
    model, base = make_model(0), save_checkpoint(tmp_path / "base", make_model(0), processor, {"stage": "base"})
    for seed, (stage, parts) in enumerate({"pretrain": PARTS[1:2], "sft": PARTS[1:]}.items(), 1):
        for part in parts:
            getattr(model, part).load_state_dict(getattr(make_model(seed), part).state_dict())
        base = save_checkpoint(tmp_path / stage, model, processor, META | {"stage": stage}, parts, base=base)
    return tmp_path


def test_a_part_that_is_not_held_comes_from_the_base(chain, make_model):
    loaded, _, meta = load_checkpoint(chain / "sft")
    assert meta["holds"] == ["projector", "language_model"]
    assert meta["base"] == "../pretrain"
    assert not (chain / "sft" / "vision.safetensors").exists()
    for part, seed in {"vision": 0, "projector": 2, "language_model": 2}.items():
        expected = getattr(make_model(seed), part).state_dict()
        actual = getattr(loaded, part).state_dict()
        assert all(torch.equal(actual[name], expected[name]) for name in expected), part
    shutil.move(chain, chain.with_name("moved"))  # together they may be moved
    load_checkpoint(chain.with_name("moved") / "sft")


def test_a_whole_checkpoint_made_from_a_part_forgets_its_base(chain):
    whole = save_checkpoint(chain / "whole", *load_checkpoint(chain / "sft"))
    assert "base" not in read_meta(whole)
    for part in ("base", "pretrain", "sft"):
        shutil.rmtree(chain / part)
    load_checkpoint(whole)


def test_base_may_be_given(chain):
    shutil.move(chain / "base", chain / "elsewhere")
    assert_refused(chain / "sft", r"pretrain holds only projector; its vision should lie in .*base")
    load_checkpoint(chain / "sft", base=chain / "elsewhere")


def test_another_base_is_refused(chain, make_model, processor):
    save_checkpoint(chain / "base", make_model(9), processor, {"stage": "base"})
    assert_refused(chain / "sft", r"vision\.safetensors: not the vision that .*sft.*minivlm\.json")


def test_bases_in_a_circle(chain):
    edit_json(chain / "pretrain" / "minivlm.json", base="../sft")
    assert_refused(chain / "sft", "its vision should lie in")


def test_parts_without_a_base(model, processor, tmp_path, chain):
    with pytest.raises(CheckpointError, match="only projector would be saved; say by base= where the rest lies"):
        save_checkpoint(tmp_path / "w", model, processor, META, ["projector"])
    edit_json(chain / "pretrain" / "minivlm.json", without="base")
    assert_refused(chain / "pretrain", "holds no vision and names no base; give base=")


# ---- refused when loading: keys, shapes, values

LM, W = "language_model.safetensors", "projector.safetensors"
WEIGHT = "projector.weight"
NORM = "language_model.model.norm.weight"
EMBEDDINGS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        (LM, lambda t: t.pop(NORM), rf"{NORM} is missing; the weights belong to another model"),
        (W, lambda t: t.update({"projector.bias": torch.zeros(24)}), r"projector\.bias is too much"),
        (
            W,
            lambda t: t.update({WEIGHT: t[WEIGHT].t().contiguous()}),
            rf"{WEIGHT} has the shape \(16, 24\), but its config wants \(24, 16\)",
        ),
        (W, lambda t: t.update({WEIGHT: t[WEIGHT] + 1}), "not the projector that .*hashes"),
        (W, lambda t: t[WEIGHT][0].fill_(float("nan")), rf"{WEIGHT} has values that are not finite"),
        (LM, lambda t: t[NORM][0].fill_(float("inf")), f"{NORM} has values that are not finite"),
        (
            LM,
            lambda t: t.update({HEAD: t[EMBEDDINGS] + 1}),
            rf"{HEAD} differs from {EMBEDDINGS}, to which the config ties it.*tie_word_embeddings",
        ),
        (LM, lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS][:-1].clone()}), rf"{EMBEDDINGS} has the shape \(319, 24\)"),
        (LM, lambda t: [t.update({f"x.{name}": t.pop(name)}) for name in list(t)], r".*\(and \d+ more\) is missing"),
    ],
)
def test_wrong_keys_shapes_and_values_are_named(saved, file, change, problem):
    edit(saved / file, change)
    assert_refused(saved, rf"{file}: {problem}")


def test_no_key_of_any_part_may_be_missing(saved):
    """A load that is not strict would leave random weights: drop each tensor in turn."""
    for part in PARTS:
        file = saved / f"{part}.safetensors"
        whole = file.read_bytes()
        for name in safetensors.torch.load_file(file):
            edit(file, lambda tensors, name=name: tensors.pop(name))
            assert_refused(saved, f"{name} is missing")
            file.write_bytes(whole)


def test_a_head_that_repeats_its_embeddings_is_fine(saved, model):
    edit(saved / LM, lambda tensors: tensors.update({HEAD: tensors[EMBEDDINGS].clone()}))
    loaded = load_checkpoint(saved)[0]
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)


def test_a_head_of_its_own_is_kept(config, processor, tmp_path):
    text = config.text_config.to_dict() | {"tie_word_embeddings": False}
    model = MiniVLMForConditionalGeneration(MiniVLMConfig(vision_config=config.vision_config, text_config=text))
    loaded = load_checkpoint(save_checkpoint(tmp_path / "untied", model, processor, META))[0]
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert not torch.equal(loaded.get_output_embeddings().weight, model.get_input_embeddings().weight)


# ---- refused when loading: files


@pytest.mark.parametrize("name", [LM, W, "vision.safetensors"])
def test_weights_cut_off_or_missing(saved, name):
    data = (saved / name).read_bytes()
    for share in (0, 0.01, 0.5, 0.999):
        (saved / name).write_bytes(data[: int(len(data) * share)])
        assert_refused(saved, rf"{name}: cut off, or no safetensors file .*copy it again")
    (saved / name).unlink()
    assert_refused(saved, rf"{name}: the file is missing; copy the whole checkpoint")


@pytest.mark.parametrize("name", ["minivlm.json", *SMALL_FILES])
def test_small_files_cut_off_or_missing(saved, name):
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: len(data) // 2])
    assert_refused(saved, rf"{name}: cut off or damaged")
    (saved / name).unlink()
    assert_refused(saved, rf"{name}: the file is missing")


def test_no_folder_and_no_checkpoint(tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere: there is no such checkpoint folder")
    assert_refused(tmp_path, r"minivlm\.json: the file is missing; give a folder that minivlm wrote")


@pytest.mark.parametrize(
    ("file", "changes", "problem"),
    [
        ("minivlm.json", {"format": 99}, "not of format 1"),
        ("minivlm.json", {"stage": None}, "'stage' is missing"),
        ("minivlm.json", {"holds": ["projector", "ears"]}, "'holds' is .*ears"),
        ("minivlm.json", {"holds": []}, "'holds' is"),
        ("minivlm.json", {"holds": [["projector"]]}, "'holds' is"),
        ("minivlm.json", {"base": 5}, "'base' is 5; it must be the path of a folder"),
        (
            "minivlm.json",
            {"hashes": {"vision": ""}},
            "'hashes' must name vision, projector, language_model and tokenizer",
        ),
        ("config.json", {"model_type": "llava"}, "model_type is 'llava', not 'minivlm'"),
        ("processor_config.json", {"num_image_tokens": 5}, "5 tokens per image, but the encoder .* makes 4"),
    ],
)
def test_json_files_of_something_else(saved, file, changes, problem):
    edit_json(saved / file, **changes)
    assert_refused(saved, rf"{file}: {problem}")


def edit_config(folder: Path, part: str, key: str, value) -> None:
    """Set a key of a part of `config.json`, or take it out (None)."""
    changed = json.loads((folder / "config.json").read_text("utf-8"))[part] | {key: value}
    if value is None:
        del changed[key]
    edit_json(folder / "config.json", **{part: changed})


EDITED = [
    ("text_config", "num_attention_heads", 5),
    ("text_config", "vocab_size", "1024"),
    ("text_config", "hidden_act", "x"),
    ("text_config", "model_type", "nonsense"),
    ("vision_config", "patch_size", 0),
    ("vision_config", "patch_size", 100),
    ("vision_config", "hidden_size", -16),
    ("vision_config", "num_attention_heads", 5),
    ("vision_config", "num_attention_heads", None),
]


@pytest.mark.parametrize(("part", "key", "value"), EDITED)
def test_a_config_that_was_edited_is_detected_by_its_hash(saved, part, key, value):
    """Even where the weights would fit: another number of heads gives other answers without an error."""
    edit_config(saved, part, key, value)
    assert_refused(saved, r"config\.json: not the one that .*put the checkpoint's own file back")
    if value is not None:  # which the library would take for its default
        edit_json(saved / "minivlm.json", without="config")  # as in a checkpoint that recorded no hash
        assert_refused(saved, r"config\.json: not understood \(\w+: .*; put the checkpoint's own")


def test_the_config_may_be_laid_out_anew_or_be_changed_on_purpose(saved):
    file = saved / "config.json"
    config = json.loads(file.read_text("utf-8"))
    assert read_meta(saved)["config"] == hash_config(saved)
    file.write_text(json.dumps(dict(reversed(config.items())) | {"transformers_version": "9"}), "utf-8")
    load_checkpoint(saved)
    edit_config(saved, "text_config", "attention_dropout", 0.25)
    edit_json(saved / "minivlm.json", without="config")
    assert load_checkpoint(saved)[0].config.text_config.attention_dropout == 0.25


@pytest.mark.parametrize("name", SMALL_FILES)
@pytest.mark.parametrize("content", ["[]", "5", "null", '"text"', "[" * 100_000])
def test_small_files_that_hold_no_object(saved, name, content):
    (saved / name).write_text(content, "utf-8")
    assert_refused(saved, rf"{name}: (holds a \w+, no JSON object|cut off or damaged)")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer_config.json", {"eos_token": 7}),
        ("tokenizer_config.json", {"pad_token": None}),
        ("processor_config.json", {"num_image_tokens": "four"}),
        ("processor_config.json", {"image_processor": 5}),
        ("processor_config.json", {"image_processor": {"crop_size": 5}}),
        ("generation_config.json", {"max_new_tokens": -3}),
    ],
)
def test_small_files_that_cannot_be_understood(saved, name, changes):
    edit_json(saved / name, **changes)
    with pytest.raises(CheckpointError, match=rf"{name}.*: ") as error:
        load_checkpoint(saved)
    assert len(str(error.value).replace(str(saved), "")) < 500 and "\n" not in str(error.value)


# ---- refused when loading: another vocabulary


def test_another_tokenizer(saved):
    words = ["完全不同的文字 and quite other words, many more of them, from which another vocabulary is learnt"] * 2
    train_tokenizer(words, 320).save_pretrained(saved)
    assert_refused(saved, r"tokenizer\.json: another vocabulary.*put the checkpoint's own")


@pytest.mark.parametrize(
    ("vocab_size", "image_id", "problem"),
    [
        (320, 320, None),
        (300, 320, r"tokenizer\.json: its ids go up to 319, but the language model knows 300: another vocabulary"),
        (400, 400, r"tokenizer\.json: <image> is id 320, but 400 in config\.json: another vocabulary"),
    ],
)
def test_tokenizer_and_model_of_different_vocabularies(config, processor, tmp_path, vocab_size, image_id, problem):
    text = config.text_config.to_dict() | {"vocab_size": vocab_size}
    other = MiniVLMConfig(vision_config=config.vision_config, text_config=text, image_token_id=image_id)
    folder = save_checkpoint(tmp_path / "other", MiniVLMForConditionalGeneration(other), processor, META)
    if problem is None:
        load_checkpoint(folder)
    else:
        assert_refused(folder, problem)


# ---- torch files


class Trap:
    """Runs code when it is unpickled carelessly."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_a_pickle_that_is_no_state_dict(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
    torch.save(Trap(), tmp_path / "trap.pt")
    for name in ("trap.pth", "trap.pt"):
        with pytest.raises(CheckpointError, match=rf"{name}: no state dict, but a pickle .*safetensors"):
            read_tensors(tmp_path / name)
    assert not (tmp_path / "sprung").exists()
    for content, problem in (
        ([1, 2], "holds a list, no state dict"),
        (torch.ones(2), "holds a Tensor, no state dict"),
        ({}, "holds a dict, no state dict"),
        ({"model": {"w": torch.ones(2)}, "epoch": 3}, "no state dict, since model, epoch is no tensor.*by itself"),
    ):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match=rf"other\.pt: {problem}"):
            read_tensors(tmp_path / "other.pt")


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.95])
def test_a_torch_file_cut_off(model, tmp_path, share):
    file = tmp_path / "w.pth"
    torch.save(model.state_dict(), file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(CheckpointError, match=r"w\.pth: "):
        read_tensors(file)


def test_not_finite_weights_are_not_saved(saved, model, processor):
    before = contents(saved)
    with torch.no_grad():
        model.projector.weight[1, 2] = float("nan")
    with pytest.raises(CheckpointError, match=r"was not saved: projector: projector\.weight has values .* not finite"):
        save_checkpoint(saved, model, processor, META)
    assert_unharmed(saved, before)


def test_meta_must_name_its_stage_and_be_json(saved, model, processor):
    before = contents(saved)
    with pytest.raises(CheckpointError, match="'stage' is missing"):
        save_checkpoint(saved, model, processor, {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_checkpoint(saved, model, processor, META | {"loss": float("nan")})
    assert_unharmed(saved, before)


def test_a_folder_of_other_things_is_never_overwritten(model, processor, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(FolderError, match="thesis exists and is no checkpoint; it is not overwritten"):
        save_checkpoint(tmp_path / "thesis", model, processor, META)
    with pytest.raises(FolderError, match="exists and is no checkpoint"):
        save_checkpoint(tmp_path / "thesis" / "chapter.txt", model, processor, META)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", model, processor, META)


@pytest.mark.parametrize("name", ["base", "there/../base", "pretrain", "base.replaced", "link"])
def test_a_checkpoint_never_replaces_what_it_builds_on(model, processor, tmp_path, name):
    """Not its base, nor that one's base, under whatever name."""
    base = save_checkpoint(tmp_path / "base", model, processor, META)
    save_checkpoint(tmp_path / "pretrain", model, processor, META, ["projector"], base=base)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(base)
    shutil.copytree(base, tmp_path / "base.replaced")  # what a save as `base` would clear up
    builds_on = tmp_path / ("base.replaced" if name == "base.replaced" else "pretrain")
    folder = tmp_path / ("base" if name == "base.replaced" else name)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match="builds on; it is not replaced, choose another folder"):
        save_checkpoint(folder, model, processor, META, ["projector"], base=builds_on)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_checkpoint_never_replaces_a_folder_that_holds_its_base(saved, model, processor):
    base = save_checkpoint(saved / "base", model, processor, META)
    with pytest.raises(CheckpointError, match="sft is, or holds, a checkpoint that the new one builds on"):
        save_checkpoint(saved, model, processor, META, ["projector"], base=base)
    load_checkpoint(base)


@pytest.mark.parametrize("path", [".", "sub/.."])
def test_the_folder_that_one_is_in_can_be_read_but_not_exchanged(saved, model, processor, monkeypatch, path):
    (saved / "sub").mkdir()
    monkeypatch.chdir(saved)
    assert load_checkpoint(path)[2] == read_meta(saved)
    with pytest.raises(FolderError, match="as a whole while you are in it; go up and give its name"):
        save_checkpoint(path, model, processor, META)
    load_checkpoint(saved)
