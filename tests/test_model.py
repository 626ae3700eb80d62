"""The parts of the model, one by one: config, vision, projector, model, what trains, save and load."""

import copy
import dataclasses

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionModel,
    GenerationConfig,
    LlamaForCausalLM,
)

from minivlm.config import PRESETS, STAGES, MiniVLMConfig, preset_config
from minivlm.model import (
    LedgerRow,
    MiniVLMForConditionalGeneration,
    assemble,
    draw_projector,
    ledger,
    positions,
    set_trainable,
)
from minivlm.placeholders import PlaceholderError
from minivlm.projector import Projector
from minivlm.vision import VisionEncoder

PRETRAIN, SFT = STAGES["scenes"]["pretrain"], STAGES["scenes"]["sft"]

# ---- config


def test_sizes_of_the_presets():
    sizes = {}
    for name in PRESETS:
        config = preset_config(name)
        text = config.text_config
        sizes[name] = (config.num_image_tokens, config.vision_width, config.language_width, text.vocab_size)
        assert config.image_token_id == text.vocab_size
        assert (text.pad_token_id, text.bos_token_id, text.eos_token_id) == (0, 1, 2)
    assert sizes == {"scenes": (64, 192, 256, 1024), "clip-26m": (196, 768, 512, 6400)}


def test_parameters_of_clip_26m_exactly():
    with torch.device("meta"):
        model = MiniVLMForConditionalGeneration(preset_config("clip-26m"))
    set_trainable(model, STAGES["clip-26m"]["sft"])
    counts = {row.part: (row.parameters, row.trained) for row in ledger(model, STAGES["clip-26m"]["sft"]).rows}
    assert counts == {
        "vision": (85_799_424, 0),
        "projector": (393_216, 393_216),
        "language_model": (25_829_888, 25_829_888),
    }
    rotary = model.language_model.config.rope_parameters
    assert rotary["rope_theta"] == 1e6 and model.language_model.config.head_dim == 64


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: preset_config("scene"), r"no preset 'scene'; choose one of scenes, clip-26m"),
        (lambda: MiniVLMConfig(image_token_id=-1), "image_token_id is -1"),
        (lambda: dataclasses.replace(PRETRAIN, trains=("vision", "projector")), r"vision.* cannot train"),
        (lambda: dataclasses.replace(SFT, learning_rates={"projector": 1e-3}), "give a learning rate to each"),
    ],
)
def test_presets_configs_and_stages_that_cannot_be(make, problem):
    with pytest.raises(ValueError, match=problem):
        make()


def test_stages_of_every_preset():
    expected = [("pretrain", "base", ("projector",)), ("sft", "pretrain", ("projector", "language_model"))]
    for stages in STAGES.values():
        assert [(stage.name, stage.parent, stage.trains) for stage in stages.values()] == expected
        assert list(stages) == ["pretrain", "sft"] and all(s.warmup_steps < s.steps for s in stages.values())


# ---- vision


@pytest.fixture
def encoder(config) -> VisionEncoder:
    return VisionEncoder(CLIPVisionModel._from_config(config.vision_config))


def test_patch_features_are_the_last_hidden_state_of_the_patches(encoder):
    pixels = torch.randn(3, 3, 8, 8)
    features = encoder(pixels)
    assert features.shape == (3, 4, 16)
    hidden = encoder.clip.pre_layrnorm(encoder.clip.embeddings(pixels))  # (I, class token and patches, Dv)
    for layer in encoder.clip.encoder.layers:
        hidden = layer(hidden, attention_mask=None)
    torch.testing.assert_close(features, torch.stack([hidden[:, 1 + patch] for patch in range(4)], dim=1))


def test_patch_features_follow_the_picture_in_reading_order(encoder):
    """With attention and MLP silenced, a feature sees its own patch only: change one patch, find it again."""
    for layer in encoder.clip.encoder.layers:
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
    black = torch.zeros(1, 3, 8, 8)
    for row in range(2):
        for column in range(2):
            pixels = black.clone()
            pixels[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = torch.randn(3, 4, 4)
            changed = (encoder(pixels) != encoder(black)).any(-1)[0]
            assert changed.nonzero().flatten().tolist() == [2 * row + column]


def test_the_encoder_stays_frozen_and_in_evaluation_mode(model, make_batch):
    model.train()
    assert model.training and model.language_model.training
    assert not any(module.training for module in model.vision.modules())
    model.requires_grad_(True)  # even then no graph is built through it
    features = model.vision(make_batch([1])["pixel_values"].requires_grad_())
    assert not features.requires_grad


# ---- projector


def test_the_projector_is_one_matrix_without_bias():
    projector = Projector(16, 24)
    assert {name: tuple(p.shape) for name, p in projector.named_parameters()} == {"weight": (24, 16)}
    features = torch.randn(2, 4, 16)
    by_hand = torch.stack([torch.stack([projector.weight @ patch for patch in image]) for image in features])
    torch.testing.assert_close(projector(features), by_hand)
    assert not projector(torch.zeros(1, 4, 16)).any()


def test_the_projector_takes_features_from_a_16_bit_cache():
    projector = Projector(16, 24)
    features = torch.randn(2, 4, 16).half()
    assert projector(features).dtype == torch.float32
    assert torch.equal(projector(features), projector(features.float()))


# ---- forward


def test_features_computed_before_replace_pixels_bit_for_bit(model, make_batch):
    batch = make_batch([1, 2, 0])
    with torch.no_grad():
        expected = model(**batch).logits
        pixels = batch.pop("pixel_values")
        assert torch.equal(model(**batch, patch_features=model.vision(pixels)).logits, expected)
        batch.pop("images_per_row")
        assert torch.equal(model(**batch, pixel_values=pixels).logits, expected)
        embeds = model.embed(batch["input_ids"], pixels)
        inputs = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
        assert torch.equal(model(**inputs).logits, expected)


def test_autocast_keeps_text_and_images_in_one_precision(model, make_batch):
    batch = make_batch([1, 2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.embed(batch["input_ids"], batch["pixel_values"]).dtype == torch.float32
        logits = model(**batch).logits
    with torch.no_grad():
        exact = model(**batch).logits
    shown = batch["attention_mask"] == 1
    assert (logits - exact)[shown].abs().mean() < 0.1 * exact[shown].abs().mean()


def test_positions_count_the_shown_tokens():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]])
    assert positions(mask).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1], [0, 1, 0, 0]]


def test_forward_refuses_what_is_ambiguous(model, make_batch):
    batch = make_batch([1])
    features, embeds = model.vision(batch["pixel_values"]), model.embed(batch["input_ids"], batch["pixel_values"])
    with pytest.raises(ValueError, match="pixel_values or patch_features, not both"):
        model(**batch, patch_features=features)
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
        model(**batch, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
        model(pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="already hold the images"):
        model(inputs_embeds=embeds, patch_features=features)
    with pytest.raises(ValueError, match="give the prompt"):
        model.generate(pixel_values=batch["pixel_values"])


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_images_and_placeholders_must_belong_together(model, make_batch, call):
    run = getattr(model, call)
    batch = make_batch([1, 2])
    ids, mask, pixels = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
    with pytest.raises(PlaceholderError, match=r"1 \+ 2 = 3 images, but 0 were given"):
        run(input_ids=ids, attention_mask=mask)
    with pytest.raises(PlaceholderError, match=r"1 \+ 2 = 3 images, but 2 were given"):
        run(input_ids=ids, attention_mask=mask, pixel_values=pixels[:2])
    with pytest.raises(PlaceholderError, match=r"row 0 has 4 placeholders, but 2 images"):
        run(input_ids=ids, attention_mask=mask, pixel_values=pixels, images_per_row=torch.tensor([2, 1]))


# ---- generate


def test_generate_takes_its_inputs_in_every_form(model, make_batch):
    batch = make_batch([1, 2, 0])
    expected = model.generate(**batch, max_new_tokens=6)
    ids, mask, pixels = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
    six = GenerationConfig(max_new_tokens=6, pad_token_id=0, eos_token_id=2)
    assert torch.equal(model.generate(ids, six, attention_mask=mask, pixel_values=pixels), expected)
    features = model.vision(pixels)
    assert torch.equal(model.generate(ids, patch_features=features, max_new_tokens=6), expected)  # mask from padding
    output = model.generate(**batch, max_new_tokens=6, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences, expected)
    assert output.scores[0].shape == (3, 320)


def test_generate_with_processors_that_read_ids(model, make_batch):
    """A repetition penalty looks ids up in the logits, where `<image>` is out of range."""
    batch = make_batch([2, 1])
    with pytest.warns(UserWarning, match="only to newly generated tokens"):
        result = model.generate(**batch, max_new_tokens=8, repetition_penalty=1.5, no_repeat_ngram_size=2)
    assert result.shape[0] == 2


def test_generate_stops_at_the_end_token_and_pads(model, make_batch):
    """Forced to end at once, an answer is the end token; its neighbour's, forced on, is not."""
    batch = make_batch([1, 0])
    length = batch["input_ids"].shape[1]

    def end_first_row(ids, scores):
        scores = scores.clone()
        scores[0, 2] = 1e9
        scores[1, 2] = -1e9
        return scores

    new = model.generate(**batch, max_new_tokens=4, logits_processor=[end_first_row])[:, length:]
    assert new[0].tolist() == [2, 0, 0, 0]
    assert 2 not in new[1].tolist()


# ---- assemble, stages, ledger


def test_assemble_takes_the_parts_and_draws_w_from_the_seed(config):
    vision = CLIPVisionModel._from_config(config.vision_config)
    language_model = LlamaForCausalLM(config.text_config)
    before = torch.get_rng_state()
    models = [assemble(vision, language_model, 320, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (model.projector.weight for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.std().item() == pytest.approx(config.text_config.initializer_range, rel=0.1)
    draw_projector(models[2], 0)
    assert torch.equal(models[2].projector.weight, first)
    assert torch.equal(torch.get_rng_state(), before)
    assert models[0].vision.clip is vision and models[0].language_model is language_model
    assert not models[0].training
    assert models[0].config.image_token_id == 320
    assert {p.device.type for p in models[0].parameters()} == {"cpu"}
    assert models[0].generation_config.eos_token_id == 2


TRAINED_LAYER = {
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
}
TRAINED_LANGUAGE_MODEL = {
    "language_model.model.embed_tokens.weight",
    "language_model.model.norm.weight",
    *(f"language_model.model.layers.{layer}.{name}" for layer in (0, 1) for name in TRAINED_LAYER),
}
TRAINED = {"pretrain": {"projector.weight"}, "sft": {"projector.weight"} | TRAINED_LANGUAGE_MODEL}
STAGE = pytest.mark.parametrize("stage", [PRETRAIN, SFT], ids=lambda stage: stage.name)


@STAGE
@pytest.mark.parametrize("before", ["all", "none"])
def test_exactly_the_stages_parameters_are_trainable(model, stage, before):
    model.requires_grad_(before == "all")
    set_trainable(model, stage)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == TRAINED[stage.name]


@STAGE
def test_steps_move_exactly_what_the_stage_trains(model, make_batch, stage):
    """Every frozen byte stays, every trained tensor moves; with weight decay, on pixels, in training mode."""
    set_trainable(model, stage)
    model.train()
    before = copy.deepcopy(model.state_dict())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for seed in range(2):
        batch = make_batch([1, 2, 0], "right", seed=seed)
        labels = batch["input_ids"].masked_fill(batch["input_ids"] == 320, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved - {"language_model.lm_head.weight"} == TRAINED[stage.name]
    assert ("language_model.lm_head.weight" in moved) == (stage is SFT)  # tied to the embeddings


def test_the_ledger_counts_exactly(model, config):
    layer = 24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 40 + 2 * 24  # q and o, k and v, MLP, norms
    language_model = 320 * 24 + 2 * layer + 24  # the tied head is not counted again
    vision = sum(p.numel() for p in CLIPVisionModel._from_config(config.vision_config).parameters())
    for stage, norm, trained in ((PRETRAIN, False, 0), (PRETRAIN, True, 24), (SFT, True, language_model)):
        set_trainable(model, stage)
        model.language_model.model.norm.requires_grad_(norm)  # the ledger tells what is, not what was meant
        counts = ledger(model, stage)
        assert counts.rows == (
            LedgerRow("vision", vision, 0),
            LedgerRow("projector", 16 * 24, 16 * 24),
            LedgerRow("language_model", language_model, trained),
        )
        assert counts.total == ("total", vision + 384 + language_model, 384 + trained)
        assert counts.total.parameters == sum(p.numel() for p in model.parameters())
        assert len({len(line) for line in str(counts).splitlines()}) == 1  # a table


# ---- save and load with the library's methods


def test_save_and_load_give_the_same_logits(model, make_batch, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    assert saved == set(model.state_dict()) - {"language_model.lm_head.weight"}  # tied, so written once
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert {key: value for key, value in report.items() if value} == {}
    batch = make_batch([1, 2, 0])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.generate(**batch, max_new_tokens=5), model.generate(**batch, max_new_tokens=5))


def test_an_untied_head_survives_saving(config, make_batch, tmp_path):
    config.text_config.tie_word_embeddings = False
    model = MiniVLMForConditionalGeneration(config).eval()
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = MiniVLMForConditionalGeneration.from_pretrained(tmp_path)
    batch = make_batch([1])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
