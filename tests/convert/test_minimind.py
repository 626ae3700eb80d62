"""Published checkpoints: each generation against a computation of its own layout, and what must be refused."""

import json
import pickle

import pytest
import torch
from minimind import FULL, NAMES, TINY, checkpoint, logits
from safetensors.torch import save_file

from minivlm.checkpoint import CheckpointError
from minivlm.convert.minimind import load_published

IDS = torch.tensor([1, 7, 250, 34, 34, 34, 99, 12, 2, 1, 5])
LAYER = {generation: names["layer"].format(1) for generation, names in NAMES.items()}


def store(folder, weights: dict, name: str = "lm_512.pth"):
    file = folder / name
    if file.suffix == ".safetensors":
        save_file({key: tensor.clone() for key, tensor in weights.items()}, file)
    else:
        torch.save(weights, file)
    return file


@pytest.mark.parametrize("generation", ["llama_legacy", "minimind2"])
@pytest.mark.parametrize("sizes", [TINY, FULL], ids=["tiny", "full"])
@pytest.mark.parametrize("name", ["lm_512.pth", "model.safetensors"])
def test_its_logits_are_those_of_the_layouts_own_computation(tmp_path, generation, sizes, name):
    weights = checkpoint(generation, sizes)
    published = load_published(store(tmp_path, weights, name))
    embeds = weights[NAMES[generation]["table"]][IDS]
    expected = logits(generation, weights, embeds)
    assert expected.std() > 0.3  # logits that could not differ would prove nothing
    with torch.no_grad():
        ours = published.language_model(IDS[None]).logits[0]
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)
    assert published.projector is None


@pytest.mark.parametrize("generation", ["llama_legacy", "minimind2"])
def test_a_long_text_too(tmp_path, generation):
    """As long as an image with its question and an answer; only the rotary angles are still rounded to 32 bits."""
    weights = checkpoint(generation, FULL)
    model = load_published(store(tmp_path, weights)).language_model.double()
    ids = torch.randint(0, 6400, (420,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
    expected = logits(generation, weights, weights[NAMES[generation]["table"]][ids])
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-5)


def test_the_other_generations_rotation_would_be_seen():
    a, b, weights, renamed = NAMES["llama_legacy"], NAMES["minimind2"], checkpoint("llama_legacy"), {}
    for layer in range(TINY["layers"]):
        for key in set(a) - {"layer", "table", "head", "norm"}:
            renamed[b["layer"].format(layer) + b[key]] = weights[a["layer"].format(layer) + a[key]]
    renamed |= {b[key]: weights[a[key]] for key in ("table", "head", "norm")}
    embeds = weights[a["table"]][IDS]
    assert (logits("llama_legacy", weights, embeds) - logits("minimind2", renamed, embeds)).abs().max() > 0.01


def test_the_26m_model_is_counted_and_named(tmp_path):
    published = load_published(store(tmp_path, checkpoint("llama_legacy", FULL, vision_width=768), "sft_vlm_512.pth"))
    assert "llama_legacy" in published.statement and "25,829,888 parameters" in published.statement
    assert "V 6400, Dl 512, 8 layers, 8 query and 2 key/value heads of 64, SwiGLU 1408" in published.statement
    assert "projector 768 to 512 with bias; every key fits" in published.statement and "\n" not in published.statement
    assert sum(p.numel() for p in published.language_model.parameters()) == 25_829_888


@pytest.mark.parametrize("generation", ["llama_legacy", "minimind2"])
def test_the_projector_comes_as_it_is(tmp_path, generation):
    weights = checkpoint(generation, vision_width=16)
    published = load_published(store(tmp_path, weights))
    assert {name: tuple(t.shape) for name, t in published.projector.items()} == {"weight": (64, 16), "bias": (64,)}
    for name, tensor in published.projector.items():
        assert torch.equal(tensor, weights[f"vision_proj.vision_proj.0.{name}"])
    without = {name: t for name, t in weights.items() if not name.endswith("0.bias")}
    assert set(load_published(store(tmp_path, without)).projector) == {"weight"}


def test_16_bits_become_32_without_a_change(tmp_path):
    weights = {name: tensor.half() for name, tensor in checkpoint("llama_legacy").items()}
    model = load_published(store(tmp_path, weights)).language_model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.get_input_embeddings().weight, weights["tok_embeddings.weight"].float())
    expected = logits("llama_legacy", weights, weights["tok_embeddings.weight"][IDS])
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[None]).logits[0].double(), expected, rtol=0, atol=1e-5)


MATRIX = "vision_proj.vision_proj.0.weight"


def renamed(weights: dict, name: str) -> None:
    weights[f"{name}s"] = weights.pop(name)


def cut(weights: dict, name: str) -> None:
    weights[name] = weights[name][:-1].clone()


def with_value(weights: dict, name: str, value: float) -> None:
    weights[name] = weights[name].clone()
    weights[name][0, 3] = value


PARTS = ("q", "k", "v", "o", "gate", "up", "down", "before", "between", "norm")
WRONG = [  # a weight, how it is changed, and the message
    *((key, renamed, "missing: {0}; not of this layout: {0}s.") for key in ("q", "down", "between")),
    *((key, dict.pop, "missing: {0}.") for key in (*PARTS, MATRIX)),
    *((key, cut, "of another shape: {0} {1} instead of") for key in ("q", "k", "gate", "before")),
    ("head", lambda w, name: with_value(w, name, 9.0), "not equal to the embeddings that it is tied to: {0}"),
    ("up", lambda w, name: with_value(w, name, float("nan")), "{0} has values that are not finite"),
    ("up", lambda w, name: with_value(w, name, float("inf")), "{0} has values that are not finite"),
    ("vision_encoder.weight", lambda w, name: w.update({name: torch.ones(2)}), "not of this layout: {0}."),
    (MATRIX, lambda w, name: w.update({name: torch.ones(65, 16)}), "{0} (65, 16) instead of (64, 16)"),
    ("norm", lambda w, name: w.update({name: torch.ones(64, dtype=torch.int8)}), "{0} holds whole numbers"),
    ("table", lambda w, name: w.update({name: torch.ones(300)}), "is to have a row for each word"),
    ("table", lambda w, name: w.update({name: torch.ones(0, 64)}), "is to have a row for each word"),
    ("norm", lambda w, name: w.update({3: torch.ones(2)}), "is no tensor with a name"),
]


def refusal(tmp_path, weights, **options) -> str:
    file = store(tmp_path, weights)
    with pytest.raises(CheckpointError) as refused:
        load_published(file, **options)
    assert str(file) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("generation", ["llama_legacy", "minimind2"])
@pytest.mark.parametrize(("key", "change", "message"), WRONG)
def test_what_does_not_fit_is_named(tmp_path, generation, key, change, message):
    weights, names = checkpoint(generation, vision_width=16), NAMES[generation]
    outside = key not in names or key in ("table", "head", "norm")
    name = names.get(key, key) if outside else LAYER[generation] + names[key]
    change(weights, name)
    shape = tuple(weights[name].shape) if name in weights else ()
    assert message.format(name, shape) in refusal(tmp_path, weights)


@pytest.mark.parametrize("generation", ["llama_legacy", "minimind2"])
def test_heads_that_cannot_be_and_no_layer_at_all(tmp_path, generation):
    for heads in (5, 64):  # no divisor of 64, and heads of an odd width
        message = refusal(tmp_path, checkpoint(generation), heads=heads)
        assert f"64 query rows and 16 key rows cannot belong to {heads} heads" in message
    names = NAMES[generation]
    weights = {names[key]: torch.ones(3, 3) for key in ("table", "head")}
    assert f"not one layer has a {names['q'].removesuffix('s')}" in refusal(tmp_path, weights)


def test_generation_c_is_recognised_and_refused_by_name(tmp_path):
    for key in ("model.layers.0.self_attn.q_norm.weight", "vision_proj.mlp.1.weight"):
        with pytest.raises(CheckpointError, match=r"minimind3v \(minimind-3v") as refusal:
            load_published(store(tmp_path, checkpoint("minimind2") | {key: torch.ones(8)}))
        assert key in str(refusal.value)


def test_anything_else_is_refused_with_its_keys(tmp_path):
    with pytest.raises(CheckpointError, match=r"no MiniMind checkpoint.*wte\.weight, h\.0\.attn\.bias"):
        load_published(store(tmp_path, {"wte.weight": torch.ones(3, 2), "h.0.attn.bias": torch.ones(2)}))


def test_a_pickle_that_could_run_code_is_not_opened(tmp_path):
    file = tmp_path / "lm_512.pth"
    file.write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(CheckpointError, match="not opened"):
        load_published(file)


def test_a_tied_head_may_be_left_out(tmp_path):
    weights = checkpoint("minimind2")
    del weights["lm_head.weight"]
    model = load_published(store(tmp_path, weights, "model.safetensors")).language_model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_config_beside_the_file_says_what_shapes_cannot(tmp_path):
    weights = checkpoint("minimind2")
    settings = {"num_attention_heads": 4, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "minimind-v", "use_moe": False, **settings}))
    config = load_published(store(tmp_path, weights)).language_model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 1, 16)
    assert config.rope_parameters["rope_theta"] == 1e4 and config.rms_norm_eps == 1e-6
    assert config.max_position_embeddings == 512
    assert load_published(tmp_path / "lm_512.pth", heads=8).language_model.config.num_key_value_heads == 2
    rope = {"rope_type": "default", "rope_theta": 2e4}
    new = {"num_attention_heads": 4, "rope_parameters": rope}  # of transformers 5
    (tmp_path / "config.json").write_text(json.dumps(new))
    assert load_published(tmp_path / "lm_512.pth").language_model.config.rope_parameters["rope_theta"] == 2e4
    for bad, message in (
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "stretched positions"),
        ({"rope_scaling": {"type": "linear"}}, "stretched positions"), ({"hidden_act": "gelu"}, "another activation"),
        ({"tie_word_embeddings": False}, "a head of its own"), ({"num_key_value_heads": 4}, "cannot belong to 8 heads"),
        ({"rope_theta": 0}, "rope_theta is 0"), ({"num_attention_heads": "eight"}, "num_attention_heads is 'eight'"),
        ({"rope_parameters": [1]}, "rope_parameters is no object"), ({"use_moe": True}, "mixture of experts"),
        ([1], "not understood"), ("{", "not understood"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(bad if isinstance(bad, str) else json.dumps(bad))
        with pytest.raises(CheckpointError, match=message):
            load_published(tmp_path / "lm_512.pth")
