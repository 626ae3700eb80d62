"""The preset clip-26m from folders, from names and from nothing: what is built is what was published."""

import json
from pathlib import Path

import pytest
import torch
from minimind import NAMES, TINY, checkpoint, logits
from PIL import Image
from rows import turns
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from training import stage
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from minivlm import cli
from minivlm.checkpoint import CheckpointError, load_checkpoint
from minivlm.convert.hub import build, default_system, find_weights, import_published, load_tokenizer
from minivlm.convert.llava import as_llava
from minivlm.data.samples import Sample, messages_from_turns
from minivlm.generate import ask
from minivlm.train import Trainer

SYSTEM = "你是 MiniMind，一个有用的助手。"
# llama_legacy: the head of the answer follows every question; minimind2: only with add_generation_prompt
TEMPLATES = {
    "llama_legacy": "{% if messages[0]['role'] == 'system' %}{{ '<s>system\\n' + messages[0]['content'] + '</s>\\n' }}"
    "{% else %}{{ '<s>system\\n" + SYSTEM + "</s>\\n' }}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<s>user\\n' + m['content'] + '</s>\\n<s>assistant\\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '</s>\\n' }}{% endif %}{% endfor %}",
    "minimind2": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}
SPECIAL = {"llama_legacy": ("<unk>", "<s>", "</s>"), "minimind2": ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}


def make_tokenizer(generation: str, vocabulary: int = TINY["vocabulary"]) -> PreTrainedTokenizerFast:
    """A tokenizer like MiniMind's: byte-level BPE, pad 0, start 1, end 2, a chat template."""
    pad, start, end = SPECIAL[generation]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[pad, start, end], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(
        ["a red car and a yellow car", SYSTEM, "这个图像中有什么内容？", "user", "assistant"], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, pad_token=pad, bos_token=start, eos_token=end, chat_template=TEMPLATES[generation]
    )


def make_clip() -> CLIPModel:
    """A whole tiny CLIP: four patches of 16 numbers, and a text tower that nobody needs."""
    text = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    vision = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2}  # fmt: skip
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).eval()


def image_processor(side: int) -> CLIPImageProcessorPil:
    """Its image processor."""
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


@pytest.fixture(params=["llama_legacy", "minimind2"])
def generation(request) -> str:
    return request.param


@pytest.fixture
def sources(tmp_path, generation) -> dict:
    """Three folders as they would be published."""
    make_clip().save_pretrained(tmp_path / "clip")
    image_processor(8).save_pretrained(tmp_path / "clip")
    make_tokenizer(generation).save_pretrained(tmp_path / "words")
    torch.save(checkpoint(generation, vision_width=16), tmp_path / "sft_vlm_512.pth")
    return {
        "weights": str(tmp_path / "sft_vlm_512.pth"),
        "encoder": str(tmp_path / "clip"),
        "tokenizer": str(tmp_path / "words"),
    }


def encoded(processor, image):
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(ask("a red car", image), **options)


def test_a_published_vlm_computes_what_its_authors_placeholders_computed(sources, generation, image):
    model, processor, _ = build(**sources)
    batch = encoded(processor, image)
    # as published: N times "@" in the text, these embeddings replaced by W times the patches plus its bias
    theirs, n = make_tokenizer(generation), model.config.num_image_tokens
    at = theirs.convert_tokens_to_ids("@")
    prompt = theirs.apply_chat_template(
        [{"role": "user", "content": "@" * n + "\na red car"}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor(theirs.encode(prompt, add_special_tokens=False))
    weights = torch.load(sources["weights"], weights_only=True)
    with torch.no_grad():
        whole = CLIPModel.from_pretrained(sources["encoder"])
        patches = whole.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state[0, 1:]
        embeds = weights[NAMES[generation]["table"]][ids]
        matrix, bias = (weights[f"vision_proj.vision_proj.0.{name}"] for name in ("weight", "bias"))
        assert (ids == at).sum() == n
        embeds[ids == at] = patches @ matrix.T + bias
        ours = model(**batch).logits[0]
    # the same ids but for the placeholder, which is a token of its own here
    assert torch.equal(torch.where(batch["input_ids"][0] == processor.image_token_id, at, batch["input_ids"][0]), ids)
    torch.testing.assert_close(ours.double(), logits(generation, weights, embeds), rtol=0, atol=1e-5)


def test_the_chat_template_comes_along_with_its_system_turn(sources, generation, image):
    _, processor, lines = build(**sources)
    expected = SYSTEM if generation == "llama_legacy" else None
    assert processor.system == expected and ("system turn" in lines[2])
    for messages in (turns("a red car"), [{"role": "system", "content": "Be brief."}, *turns("a", "b", "c")]):
        theirs = make_tokenizer(generation).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert processor.apply_chat_template(messages, add_generation_prompt=True) == theirs
        assert processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == theirs
    shown = ask("a red car", image)
    by_jinja = processor.tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
    assert by_jinja == processor.apply_chat_template(shown, add_generation_prompt=True)
    assert by_jinja.count("<image>\na red car") == 1


def test_the_answer_is_supervised_and_the_system_turn_is_not(sources, image):
    _, processor, _ = build(**sources)
    row = processor.encode(Sample([*ask("a red car", image), {"role": "assistant", "content": "a yellow car"}]))
    supervised = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != -100]
    assert processor.tokenizer.decode(supervised) == "a yellow car" + processor.tokenizer.eos_token


def test_the_checkpoint_comes_back_whole_and_exports(sources, tmp_path, image):
    lines = import_published(tmp_path / "made", **sources, command="typed")
    model, processor, meta = load_checkpoint(tmp_path / "made")
    fresh, _, _ = build(**sources)
    assert meta["stage"] == "sft" and meta["sources"] == lines and meta["command"] == "typed"
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    batch = encoded(processor, image)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, fresh(**batch).logits)
        # and on to LLaVA, bias and all: the first V logits
        vocabulary = model.config.text_config.vocab_size
        theirs = as_llava(model)(**{k: v for k, v in batch.items() if k != "images_per_row"}).logits
        torch.testing.assert_close(theirs[..., :vocabulary], model(**batch).logits, rtol=0, atol=1e-5)
    written = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert not (written[:, batch["input_ids"].shape[1] :] == processor.image_token_id).any()


def test_special_ids_and_the_longest_text_are_the_tokenizers_and_the_models(sources, generation):
    model, processor, _ = build(**sources)
    ids = [processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL[generation]]
    text = model.config.text_config
    assert [text.pad_token_id, text.bos_token_id, text.eos_token_id] == ids == [0, 1, 2]
    assert model.generation_config.eos_token_id == 2 and processor.tokenizer.model_max_length == 8192
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    load_tokenizer(sources["tokenizer"], text)
    assert [text.pad_token_id, text.bos_token_id, text.eos_token_id] == ids


def test_what_was_imported_trains_on_from_the_stage_it_is_given(sources, tmp_path, image):
    import_published(tmp_path / "made", **sources)
    messages = messages_from_turns(turns("<image>\na red car", "a yellow car"), [image])
    rows = [Sample(messages, f"row {i}") for i in range(8)]
    model, processor, _ = load_checkpoint(tmp_path / "made")
    options = {"parent": tmp_path / "made", "precision": "fp32"}
    with pytest.raises(CheckpointError, match=r"of published weights, make one of that stage: .*--stage pretrain"):
        Trainer(model, processor, rows, stage("sft"), tmp_path / "no", **options).fit()
    import_published(tmp_path / "made", **sources, stage="pretrain")
    model, processor, _ = load_checkpoint(tmp_path / "made")
    log = Trainer(model, processor, rows, stage("sft"), tmp_path / "on", **options).fit()
    assert log[-1]["loss"] < log[0]["loss"]
    after, _, _ = load_checkpoint(tmp_path / "on")
    before, _, _ = load_checkpoint(tmp_path / "made")
    assert not torch.equal(after.projector.bias, before.projector.bias)


def test_a_language_model_alone_gets_a_w_drawn_from_the_seed_and_no_bias(sources, tmp_path, generation):
    torch.save(checkpoint(generation), tmp_path / "lm_512.pth")
    sources["weights"] = str(tmp_path / "lm_512.pth")
    first, second, third = (build(**sources, seed=seed)[0].projector for seed in (1, 1, 2))
    assert first.bias is None and torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, third.weight)
    import_published(tmp_path / "made", **sources)
    assert load_checkpoint(tmp_path / "made")[2]["stage"] == "base"
    with pytest.raises(CheckpointError, match="no trained projector in it, so it is of stage base, not sft"):
        import_published(tmp_path / "again", **sources, stage="sft")
    assert not (tmp_path / "again").exists()


class TestWhatDoesNotBelongTogether:
    @pytest.mark.parametrize("what", ["vocabulary", "generation"])
    def test_another_tokenizer(self, sources, tmp_path, generation, what):
        (other,) = {*TEMPLATES} - {generation}
        tokenizer = make_tokenizer(generation, 290) if what == "vocabulary" else make_tokenizer(other)
        tokenizer.save_pretrained(tmp_path / "other")
        smaller = "290 tokens up to id 289, where the language model knows 300"
        message = smaller if what == "vocabulary" else rf"but {generation} was trained with '<"
        with pytest.raises(CheckpointError, match=message):
            build(**sources | {"tokenizer": str(tmp_path / "other")})

    def test_what_random_weights_have_no_use_for(self):
        for options in ({"heads": 5}, {"tokenizer": "words"}):
            with pytest.raises(CheckpointError, match="leave out heads and tokenizer"):
                build("random", "random", **options)

    def test_a_file_cut_off_by_a_download(self, sources):
        file = Path(sources["encoder"]) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"no CLIP encoder found.*that its files are whole"):
            build(**sources)
        (Path(sources["tokenizer"]) / "tokenizer.json").write_text("{}")
        with pytest.raises(CheckpointError, match="no tokenizer found"):
            load_tokenizer(sources["tokenizer"], None)

    def test_images_that_are_not_cut_or_to_another_size(self, sources):
        file = Path(sources["encoder"]) / "preprocessor_config.json"
        settings = json.loads(file.read_text()) | {"do_center_crop": False}
        file.write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match="not scaled, cut to a square"):
            build(**sources)
        image_processor(9).save_pretrained(sources["encoder"])
        with pytest.raises(CheckpointError, match=r"images are cut to \(9, 9\), but the encoder wants 8 by 8"):
            build(**sources)

    def test_an_encoder_of_another_width(self, sources, tmp_path, generation):
        torch.save(checkpoint(generation, vision_width=24), tmp_path / "wide.pth")
        with pytest.raises(CheckpointError, match=r"reads patches 24 wide, but those of .* are 16 wide"):
            build(**sources | {"weights": str(tmp_path / "wide.pth")})

    def test_a_template_of_another_kind(self, generation):
        tokenizer = make_tokenizer(generation)
        tokenizer.chat_template = "{% for m in messages %}[INST]{{ m['content'] }}[/INST]{% endfor %}"
        with pytest.raises(CheckpointError, match=r"not understood; it is to end with .*but gives '\[INST\]"):
            default_system(tokenizer)
        tokenizer.chat_template = "{{ raise_exception('no') }}"
        with pytest.raises(CheckpointError, match="fails on plain text"):
            default_system(tokenizer)
        tokenizer.chat_template = None
        assert default_system(tokenizer) is None

    def test_a_tokenizer_without_a_token_that_is_needed(self, sources, tmp_path, generation):
        tokenizer = make_tokenizer(generation)
        tokenizer.pad_token = None
        tokenizer.save_pretrained(tmp_path / "unpadded")
        config = build(**sources)[0].config.text_config
        with pytest.raises(CheckpointError, match="the tokenizer has no pad token"):
            load_tokenizer(str(tmp_path / "unpadded"), config)

    def test_an_encoder_with_a_weight_missing_or_not_finite(self, sources):
        folder = Path(sources["encoder"])
        whole = CLIPModel.from_pretrained(folder)
        state = whole.state_dict()
        name = "vision_model.encoder.layers.1.mlp.fc1.weight"
        whole.save_pretrained(folder, state_dict={key: value for key, value in state.items() if key != name})
        with pytest.raises(CheckpointError, match=rf"not the encoder.*missing_keys.*{name}"):
            build(**sources)
        state[name] = state[name].clone()
        state[name][0, 0] = float("nan")
        whole.save_pretrained(folder, state_dict=state)
        with pytest.raises(CheckpointError, match=r"fc1\.weight has values that are not finite"):
            build(**sources)


def test_an_encoder_alone_is_read_like_the_whole_of_clip(sources, tmp_path):
    whole = CLIPModel.from_pretrained(sources["encoder"])
    whole.vision_model.save_pretrained(tmp_path / "alone")
    CLIPImageProcessorPil.from_pretrained(sources["encoder"]).save_pretrained(tmp_path / "alone")
    one, other = build(**sources)[0], build(**sources | {"encoder": str(tmp_path / "alone")})[0]
    for name, tensor in one.vision.state_dict().items():
        assert torch.equal(tensor, other.vision.state_dict()[name]), name


def test_where_the_weights_lie(tmp_path):
    (tmp_path / "one").mkdir()
    with pytest.raises(CheckpointError, match="not one file of weights, but none"):
        find_weights(str(tmp_path / "one"))
    torch.save({}, tmp_path / "one" / "lm_512.pth")
    assert find_weights(str(tmp_path / "one")) == tmp_path / "one" / "lm_512.pth"
    torch.save({}, tmp_path / "one" / "lm_768.pth")
    with pytest.raises(CheckpointError, match=r"lm_512\.pth, lm_768\.pth; name the file"):
        find_weights(str(tmp_path / "one"))
    for wrong in ("nowhere.pth", "owner/repository", str(tmp_path / "gone" / "a" / "b.pth"), "./a/b/c.pth"):
        with pytest.raises(CheckpointError, match="there is no such file"):
            find_weights(wrong)


def put_in_cache(cache: Path, name: str, folder: Path) -> None:
    """Lay a folder into the library's cache as if it had been fetched by that name."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("0" * 40))


def test_published_names_are_read_from_what_was_fetched_before(sources, tmp_path, monkeypatch):
    cache, weights = tmp_path / "hub", tmp_path / "MiniMind2-V-PyTorch"
    weights.mkdir()
    # the published folder also has a config with code in the same folder; that code is never run
    beside = {"model_type": "minimind-v", "auto_map": {"AutoConfig": "model_vlm.VLMConfig"}}
    (Path(sources["tokenizer"]) / "config.json").write_text(json.dumps(beside))
    Path(sources["weights"]).rename(weights / "sft_vlm_512.pth")
    for name, folder in (
        ("openai/clip-vit-base-patch16", Path(sources["encoder"])),
        ("jingyaogong/MiniMind2-V", Path(sources["tokenizer"])),
        ("jingyaogong/MiniMind2-V-PyTorch", weights),
    ):
        put_in_cache(cache, name, folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    code = cli.main(["import", "jingyaogong/MiniMind2-V-PyTorch/sft_vlm_512.pth", "--out", str(tmp_path / "made")])
    assert code == 0
    model, _, meta = load_checkpoint(tmp_path / "made")
    assert model.config.projector_bias and meta["stage"] == "sft"


def test_without_a_network_the_message_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cli.main(["import", "owner/repository/lm.pth", "--encoder", "random", "--out", str(tmp_path / "out")]) == 2
    stderr = capsys.readouterr().err
    assert "owner/repository/lm.pth: neither a file here nor to be fetched" in stderr and "give a folder" in stderr
    assert not (tmp_path / "out").exists()
    for option in ("--encoder", "--tokenizer"):
        torch.save(checkpoint("llama_legacy"), tmp_path / "lm.pth")
        others = ["--encoder", "random"] if option == "--tokenizer" else []
        line = ["import", str(tmp_path / "lm.pth"), *others, option, "owner/none", "--out", str(tmp_path / "out")]
        assert cli.main(line) == 2 and "owner/none: no " in capsys.readouterr().err


@pytest.mark.slow
def test_random_weights_have_the_true_shape(tmp_path, capsys):
    assert cli.main(["import", "random", "--encoder", "random", "--out", str(tmp_path / "random"), "--seed", "3"]) == 0
    assert "knows nothing" in capsys.readouterr().out
    model, processor, meta = load_checkpoint(tmp_path / "random")
    assert meta["stage"] == "base" and processor.num_image_tokens == 196
    assert tuple(model.projector.weight.shape) == (512, 768) and model.projector.bias is None
    assert sum(p.numel() for p in model.language_model.parameters()) == 25_829_888
    assert sum(p.numel() for p in model.vision.parameters()) == 85_799_424
    with torch.no_grad():
        out = model(**encoded(processor, Image.new("RGB", (300, 200), "red"))).logits
    assert out.shape[-1] == 6400 and torch.isfinite(out).all()
    assert json.loads((tmp_path / "random" / "minivlm.json").read_text("utf-8"))["seed"] == 3
