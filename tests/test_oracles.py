"""Oracles: the model against other programs that must give the same numbers.

Mostly in float64, where two right programs agree to ten decimal places and a wrong one does not.
"""

import pytest
import torch
from training import loss_by_hand
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from minivlm.config import IGNORE_INDEX, STAGES, MiniVLMConfig
from minivlm.convert import llava as export
from minivlm.model import MiniVLMForConditionalGeneration, assemble, set_trainable

CLOSE = {"rtol": 0, "atol": 1e-10}
ROWS = pytest.mark.parametrize(
    "counts", [[1], [2], [0], [1, 2, 0], [0, 1], [2, 2]], ids=lambda counts: "-".join(map(str, counts))
)
SIDES = pytest.mark.parametrize("side", ["left", "right"])


@pytest.fixture
def model(make_model) -> MiniVLMForConditionalGeneration:
    return make_model(dtype=torch.float64)


def positions_by_hand(mask: torch.Tensor) -> torch.Tensor:
    """(B, T): 0, 1, 2 … along each row's own tokens, 0 at padding."""
    result = torch.zeros_like(mask)
    for row in range(mask.shape[0]):
        count = 0
        for column in range(mask.shape[1]):
            if mask[row, column]:
                result[row, column], count = count, count + 1
    return result


def as_llava(model: MiniVLMForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The library's LLaVA with the same weights. It looks `<image>` up before replacing it: that row is random."""
    llava = export.as_llava(model)
    table = llava.model.language_model.embed_tokens.weight
    with torch.no_grad():
        table[-1] = torch.randn(model.config.language_width, dtype=model.dtype)
    assert llava.lm_head.weight is table
    return llava


def for_llava(batch: dict) -> dict:
    """The same batch without the keys that LLaVA does not know."""
    return {key: value for key, value in batch.items() if key != "images_per_row"}


# ---- the base language model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mask", ["none", "right", "left"])
def test_text_only_gives_the_base_models_own_logits_bit_for_bit(config, model, make_batch, dtype, mask):
    base = LlamaForCausalLM(config.text_config).to(dtype).eval()
    batch = make_batch([0, 0, 0], side="left" if mask == "left" else "right")
    ids, shown = batch["input_ids"], batch["attention_mask"]
    inputs = {"attention_mask": shown, "position_ids": positions_by_hand(shown)} if mask != "none" else {}
    with torch.no_grad():
        expected = base(input_ids=ids, **inputs).logits  # before the base model becomes part of anything
        vlm = assemble(model.vision.clip, base, config.image_token_id, seed=0)
        options = {"attention_mask": shown} if mask != "none" else {}
        assert torch.equal(vlm(input_ids=ids, **options).logits, expected)


def test_text_only_generates_what_the_base_model_generates(config, model, make_batch):
    base = LlamaForCausalLM(config.text_config).eval()
    batch = make_batch([0, 0, 0])
    options = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "max_new_tokens": 12}
    expected = [base.generate(**options), base.generate(**options, num_beams=3)]
    vlm = assemble(model.vision.clip, base, config.image_token_id, seed=0)
    assert torch.equal(vlm.generate(**options), expected[0])
    assert torch.equal(vlm.generate(**options, num_beams=3), expected[1])


# ---- LLaVA


@ROWS
@SIDES
def test_logits_equal_llava(model, make_batch, counts, side):
    batch = make_batch(counts, side, dtype=torch.float64)
    shown = batch["attention_mask"]
    with torch.no_grad():
        ours = model(**batch).logits
        theirs = as_llava(model)(**for_llava(batch), position_ids=positions_by_hand(shown)).logits
    torch.testing.assert_close(ours[shown == 1], theirs[shown == 1][:, :-1], **CLOSE)


@ROWS
@SIDES
def test_greedy_tokens_equal_llava(model, make_batch, counts, side):
    batch = make_batch(counts, side, dtype=torch.float64)
    ours = model.generate(**batch, max_new_tokens=10)
    suppressed = {"suppress_tokens": [model.config.image_token_id]}
    theirs = as_llava(model).generate(**for_llava(batch), max_new_tokens=10, **suppressed)
    assert ours.shape[1] > batch["input_ids"].shape[1]
    assert torch.equal(ours, theirs)


def test_beams_equal_llava(model, make_batch):
    batch = make_batch([2, 1], dtype=torch.float64)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    ours = model.generate(**batch, **options)
    theirs = as_llava(model).generate(**for_llava(batch), **options, suppress_tokens=[model.config.image_token_id])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "beams", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5}]
)
def test_beams_equal_those_of_the_language_model_alone(model, make_batch, beams):
    """Rows with two images, without any and with one, padded on the left; embedded by a loop, not by the model."""
    batch = make_batch([2, 0, 1], dtype=torch.float64)
    table = model.language_model.model.embed_tokens.weight
    with torch.no_grad():
        patches = model.vision(batch["pixel_values"]).flatten(0, 1) @ model.projector.weight.T  # (I * N, Dl)
        queue = iter(patches)
        embeds = torch.stack(
            [torch.stack([next(queue) if i == 320 else table[i] for i in row]) for row in batch["input_ids"].tolist()]
        )  # (B, T, Dl)
    alone = LlamaForCausalLM(model.config.text_config).double().eval()
    alone.load_state_dict(model.language_model.state_dict())
    options = beams | {"max_new_tokens": 7, "return_dict_in_generate": True, "output_scores": True}
    theirs = alone.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **options)
    ours = model.generate(**batch, **options)
    count = beams.get("num_return_sequences", 1)
    assert len(ours.sequences) == 3 * count
    length = batch["input_ids"].shape[1]
    assert torch.equal(ours.sequences[:, :length], batch["input_ids"].repeat_interleave(count, 0))
    assert torch.equal(ours.sequences[:, length:], theirs.sequences)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, **CLOSE)


def test_enough_beams_find_the_best_of_all_answers(config, make_batch):
    """Twelve tokens, so 12 ** 3 answers of three: all are tried, each by a pass of its own without any cache."""
    torch.manual_seed(1)  # a model whose best answers do not all begin with the best token
    config.text_config.vocab_size = vocabulary = 12
    model = MiniVLMForConditionalGeneration(
        MiniVLMConfig(vision_config=config.vision_config, text_config=config.text_config, image_token_id=320)
    )
    model = model.double().eval()
    batch = make_batch([2, 0, 1], dtype=torch.float64)
    batch["input_ids"] = batch["input_ids"].where(batch["input_ids"] == 320, batch["input_ids"] % vocabulary)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)
    options = {"num_beams": vocabulary**2, "num_return_sequences": 5, "max_new_tokens": 3, "eos_token_id": None}
    output = model.generate(**batch, **options, return_dict_in_generate=True, output_scores=True)
    answers = torch.cartesian_prod(*[torch.arange(vocabulary)] * 3)  # (V ** 3, 3)
    greedy = model.generate(**batch, max_new_tokens=3, eos_token_id=None)[:, -3:]
    for i, row in enumerate(_rows_alone(batch)):
        repeated = {"input_ids": torch.cat([row["input_ids"].expand(len(answers), -1), answers], dim=1)}
        repeated["attention_mask"] = torch.ones_like(repeated["input_ids"])
        if "pixel_values" in row:
            repeated["pixel_values"] = row["pixel_values"].repeat(len(answers), 1, 1, 1)
        with torch.no_grad():
            logits = model(**repeated).logits[:, -4:-1]  # (V ** 3, 3, V)
        scores = logits.log_softmax(-1).gather(-1, answers[..., None]).sum((1, 2)) / 3  # a mean, as the library's
        best, numbers = scores.topk(5)
        assert torch.equal(output.sequences[5 * i : 5 * i + 5, -3:], answers[numbers])
        torch.testing.assert_close(output.sequences_scores[5 * i : 5 * i + 5], best.float(), rtol=0, atol=1e-6)
    assert not torch.equal(greedy, output.sequences[::5, -3:])  # greedy search does not find them


def test_the_oracles_can_tell_images_apart(model, make_batch):
    """A model that ignores images would pass above if both sides ignored them; here both must not."""
    batch = make_batch([2, 1], dtype=torch.float64)
    other = batch | {"pixel_values": batch["pixel_values"].flip(0)}
    for each, adapt in ((model, dict), (as_llava(model), for_llava)):
        with torch.no_grad():
            change = each(**adapt(batch)).logits[:, -1] - each(**adapt(other)).logits[:, -1]
        assert change.abs().amax(1).min() > 0.1
        assert not torch.equal(
            each.generate(**adapt(batch), max_new_tokens=10), each.generate(**adapt(other), max_new_tokens=10)
        )


# ---- padding, rows and the cache


def test_left_padding_changes_no_logit(model, make_batch):
    """Rotary positions are relative, so a shift shows only in the last digits: float64 sees it."""
    batch = make_batch([1, 2, 0], "left", dtype=torch.float64)
    _assert_rows_are_as_if_alone(model, batch, atol=1e-12)


def test_left_padding_changes_no_logit_with_absolute_positions(config, make_batch):
    """GPT-2 numbers its positions absolutely: a text that padding shifts would give other logits."""
    text = GPT2Config(vocab_size=320, n_positions=64, n_embd=24, n_layer=2, n_head=2, initializer_range=0.3)
    other = MiniVLMConfig(vision_config=config.vision_config, text_config=text)
    model = MiniVLMForConditionalGeneration(other).double().eval()
    assert isinstance(model.language_model, GPT2LMHeadModel)
    _assert_rows_are_as_if_alone(model, make_batch([1, 2, 0], "left", dtype=torch.float64), atol=1e-12)


def _assert_rows_are_as_if_alone(model, batch, atol) -> None:
    """A row in a padded batch has the logits that it has alone, with its own images only."""
    with torch.no_grad():
        together = model(**batch).logits
        for row, alone in enumerate(_rows_alone(batch)):
            shown = batch["attention_mask"][row] == 1
            torch.testing.assert_close(together[row, shown], model(**alone).logits[0], rtol=0, atol=atol)


def _rows_alone(batch) -> list[dict]:
    """The rows of a batch, each by itself and without padding."""
    rows, first = [], 0
    for row, count in enumerate(batch["images_per_row"].tolist()):
        alone = {"input_ids": batch["input_ids"][row : row + 1, batch["attention_mask"][row] == 1]}
        if count:
            alone["pixel_values"] = batch["pixel_values"][first : first + count]
        rows.append(alone)
        first += count
    return rows


@SIDES
def test_cached_decoding_equals_uncached(model, make_batch, side):
    """One token at a time over a growing cache, and the whole sequence anew at each step."""
    batch = make_batch([1, 2, 0], side, dtype=torch.float64)
    ids, mask, cache = batch["input_ids"], batch["attention_mask"], None
    images = {"pixel_values": batch["pixel_values"], "images_per_row": batch["images_per_row"]}
    with torch.no_grad():
        for _ in range(6):
            whole = model(input_ids=ids, attention_mask=mask, **images).logits[:, -1]
            if cache is None:
                step = model(input_ids=ids, attention_mask=mask, use_cache=True, **images)
            else:
                step = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            torch.testing.assert_close(step.logits[:, -1], whole, **CLOSE)
            ids = torch.cat([ids, whole.argmax(-1, keepdim=True)], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def test_generate_equals_a_loop_without_cache(model, make_batch):
    batch = make_batch([1, 2, 0], dtype=torch.float64)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(8):
        with torch.no_grad():
            logits = model(**batch | {"input_ids": ids, "attention_mask": mask}).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    assert torch.equal(model.generate(**batch, max_new_tokens=8, eos_token_id=None), ids)


def test_beams_of_a_batch_are_the_beams_of_its_rows(model, make_batch):
    batch = make_batch([2, 0, 1], dtype=torch.float64)
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 5, "eos_token_id": None}
    new = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    alone = [model.generate(**row, **options)[:, row["input_ids"].shape[1] :] for row in _rows_alone(batch)]
    assert new.shape == (6, 5)
    assert torch.equal(new, torch.cat(alone))


def test_samples_are_those_of_a_batch_with_every_row_repeated(model, make_batch):
    batch = make_batch([2, 1], dtype=torch.float64)
    options = {"do_sample": True, "max_new_tokens": 8, "eos_token_id": None}
    first, second, third = batch["pixel_values"]
    repeated = {
        "input_ids": batch["input_ids"].repeat_interleave(3, 0),
        "attention_mask": batch["attention_mask"].repeat_interleave(3, 0),
        "images_per_row": torch.tensor([2, 2, 2, 1, 1, 1]),
        "pixel_values": torch.stack([first, second] * 3 + [third] * 3),
    }
    torch.manual_seed(3)
    ours = model.generate(**batch, **options, num_return_sequences=3)
    torch.manual_seed(3)
    assert torch.equal(ours, model.generate(**repeated, **options))
    assert len(ours[:, batch["input_ids"].shape[1] :].unique(dim=0)) > 3  # it does sample


# ---- gradients


def test_finite_differences_of_the_gradient_that_reaches_w_through_the_frozen_lm(model, make_batch, monkeypatch):
    """Change W a little and compare the loss: two images in a row, padding, float64."""

    def norm_in_float64(self, hidden):  # the library's own rounds to float32, whatever it is given
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_float64)
    set_trainable(model, STAGES["scenes"]["pretrain"])
    batch = make_batch([1, 2], "right", dtype=torch.float64)
    supervised = (batch["attention_mask"] == 1) & (batch["input_ids"] != model.config.image_token_id)
    labels = batch["input_ids"].masked_fill(~supervised, IGNORE_INDEX)
    model(**batch, labels=labels).loss.backward()
    weight = model.projector.weight
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"projector.weight"}

    @torch.no_grad()
    def loss_at(nudged: torch.Tensor) -> float:
        weight.copy_(nudged)
        return loss_by_hand(model(**batch).logits, labels)

    start, step = weight.detach().clone(), 1e-5
    single = torch.eye(start.numel(), dtype=start.dtype)[[0, 91, -1]].reshape(3, *start.shape)  # one entry of W each
    for direction in [*torch.randn(5, *start.shape, dtype=start.dtype), *single]:
        measured = (loss_at(start + step * direction) - loss_at(start - step * direction)) / (2 * step)
        expected = (weight.grad * direction).sum().item()
        assert abs(expected) > 1e-3
        assert measured == pytest.approx(expected, rel=1e-5)  # the gradient began in a float32 loss


@SIDES
def test_the_loss_is_the_mean_over_supervised_tokens(make_model, make_batch, side):
    batch = make_batch([1, 2, 0], side)
    labels = batch["input_ids"].clone()
    labels[(batch["attention_mask"] == 0) | (labels == 320)] = IGNORE_INDEX
    labels[0] = IGNORE_INDEX  # a row without any
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        model = make_model(dtype=dtype)
        with torch.no_grad():
            output = model(**batch, labels=labels)
        assert output.loss.dtype == torch.float32
        assert output.loss.item() == pytest.approx(loss_by_hand(output.logits, labels), rel=tolerance)
