"""A model as the library's LLaVA: read by a process that cannot import anything of this project."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from minivlm import MiniVLMForConditionalGeneration, cli
from minivlm.checkpoint import load_checkpoint
from minivlm.convert.llava import ExportError, as_llava, export_llava
from minivlm.generate import ask
from minivlm.runtime.paths import data_folder

# Runs in a separate process, in which `import minivlm` fails. Given: the folder, an image, a file to write.
STRANGER = """
import importlib.abc, json, sys

class Closed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "minivlm":
            raise ImportError("closed")

sys.meta_path.insert(0, Closed())
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, picture, out = sys.argv[1:]
torch.set_num_threads(1)
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
part = {"type": "image", "image": Image.open(picture)}
messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is in this picture?"}]}]
options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
batch = processor.apply_chat_template(messages, **options)
with torch.no_grad():
    logits = model(**batch).logits
written = model.generate(**batch, max_new_tokens=60, do_sample=False)[:, batch["input_ids"].shape[1]:]
pipe = pipeline("image-text-to-text", model=model, processor=processor)
piped = pipe(text=messages, max_new_tokens=60, return_full_text=False, generate_kwargs={"do_sample": False})
save_file({"ids": batch["input_ids"], "pixels": batch["pixel_values"], "logits": logits, "written": written}, out)
print(json.dumps({"class": type(model).__name__, "processor": type(processor).__name__,
                  "said": processor.decode(written[0], skip_special_tokens=True), "piped": piped[0]["generated_text"]}))
assert "minivlm" not in sys.modules
"""


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(data_folder() / "sft")


BATCH = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.mark.slow
def test_a_process_without_this_project_gets_the_same_logits_and_answers(shipped, tmp_path):
    model, processor, _ = shipped
    folder, image = export_llava(tmp_path / "llava", *shipped), data_folder() / "table" / "panda.png"
    command = [sys.executable, "-c", STRANGER, str(folder), str(image), str(tmp_path / "seen.safetensors")]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=offline)
    assert done.returncode == 0, done.stderr[-3000:]
    answers, tensors = json.loads(done.stdout.splitlines()[-1]), load_file(tmp_path / "seen.safetensors")
    batch = processor.apply_chat_template(ask("What is in this picture?", str(image)), **BATCH)
    assert answers["class"] == "LlavaForConditionalGeneration" and answers["processor"] == "LlavaProcessor"
    assert torch.equal(tensors["ids"], batch["input_ids"])
    torch.testing.assert_close(tensors["pixels"], batch["pixel_values"], rtol=0, atol=1e-6)
    with torch.no_grad():
        ours = model(**batch).logits  # (B, T, V)
    torch.testing.assert_close(tensors["logits"][..., : ours.shape[-1]], ours, rtol=0, atol=1e-5)
    written = model.generate(**batch, max_new_tokens=60, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(tensors["written"], written)
    assert "panda" in answers["said"] and answers["piped"] == answers["said"]


def test_the_folder_has_everything_and_the_placeholder_is_never_written(shipped, tmp_path):
    _, processor, meta = shipped
    folder = export_llava(tmp_path / "llava", *shipped)
    there = {file.name for file in folder.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "processor_config.json"}
    assert expected | {"chat_template.jinja", "README.md"} <= there
    assert json.loads((folder / "generation_config.json").read_text())["suppress_tokens"] == [processor.image_token_id]
    names = set(load_file(folder / "model.safetensors"))
    assert sum("embed_tokens" in name for name in names) == 1 and not any("lm_head" in name for name in names)
    card = (folder / "README.md").read_text("utf-8")
    assert "license: apache-2.0" in card and meta["hashes"]["projector"][:12] in card and "256 x 192" in card
    assert [file for file in tmp_path.iterdir() if "partial" in file.name] == []
    names = set(load_file(folder / "model.safetensors"))  # the table, and not a copy
    assert sum("embed_tokens" in name for name in names) == 1 and not any("lm_head" in name for name in names)


def test_the_row_of_the_placeholder_is_zero_and_the_head_stays_tied(model):
    llava = as_llava(model)
    table = llava.get_input_embeddings().weight
    assert llava.lm_head.weight is table and torch.equal(table[-1], torch.zeros_like(table[-1]))
    assert torch.equal(table[:-1], model.get_input_embeddings().weight)


def test_a_projector_and_a_head_that_llava_cannot_hold_are_refused_with_the_reason(model, processor, tmp_path):
    model.config.text_config.tie_word_embeddings = False
    with pytest.raises(ExportError, match="not tied"):
        as_llava(model)
    model.config.text_config.tie_word_embeddings = True
    model.projector = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 24))
    with pytest.raises(ExportError, match=r"the projector is Sequential.*single linear map"):
        export_llava(tmp_path / "llava", model, processor, {})
    assert list(tmp_path.iterdir()) == []


def test_what_lies_there_is_not_overwritten(model, processor, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="exists already; it is not overwritten"):
        export_llava(tmp_path, model, processor, {})
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_nothing_is_left_half_written(model, processor, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minivlm.convert.llava.LlavaProcessor.save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        export_llava(tmp_path / "llava", model, processor, {})
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_where_the_folder_lies(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path / "llava")]) == 0
    assert "AutoModelForImageTextToText" in capsys.readouterr().out
    assert cli.main(["export", str(tmp_path / "llava")]) == 2
    assert "not overwritten" in capsys.readouterr().err


def test_a_batch_goes_on_where_its_prompts_end(model, processor, image, tmp_path):
    folder = export_llava(tmp_path / "llava", model, processor, {})
    theirs, ours = AutoProcessor.from_pretrained(folder), processor
    llava = AutoModelForImageTextToText.from_pretrained(folder)
    chats = [ask(text, image) for text in ("a red car", "What is in this picture? a small blue bird")]
    batch, own = theirs.apply_chat_template(chats, padding=True, **BATCH), ours.apply_chat_template(chats, **BATCH)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(batch[name], own[name])
    written = llava.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(written, model.generate(**own, max_new_tokens=6, do_sample=False))
    assert llava.config.image_seq_length == model.config.num_image_tokens
    assert processor.tokenizer.padding_side == "right"  # the export has its own


def test_a_projectors_bias_is_written_and_others_licences_are_named(config, processor, tmp_path):
    config.projector_bias = True
    model = MiniVLMForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.projector.bias)
    folder = export_llava(tmp_path / "llava", model.bfloat16(), processor, {"sources": ["sft.pth: minimind2"]})
    stored = load_file(folder / "model.safetensors")
    name = next(name for name in stored if name.endswith("linear_1.bias"))
    assert torch.equal(stored[name], model.projector.bias) and stored[name].dtype == torch.bfloat16
    card = (folder / "README.md").read_text("utf-8")
    assert "license: other" in card and "* sft.pth: minimind2" in card and "with a bias" in card
