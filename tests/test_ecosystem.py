"""The library's own tools work on the model as it is: Trainer, streamers, sampling, and PEFT's adapters."""

import copy
import threading

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from training import IMAGES, some_rows
from transformers import TextIteratorStreamer, Trainer, TrainingArguments, pipeline

from minivlm.checkpoint import save_checkpoint
from minivlm.config import STAGES
from minivlm.model import set_trainable
from minivlm.train import supervised_loss


def conversation(image) -> list[dict]:
    part = {"type": "image", "image": image}
    return [{"role": "user", "content": [part, {"type": "text", "text": "What is in this picture?"}]}]


def encoded(processor, image):
    """The conversation as inputs of `generate`."""
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(conversation(image), **options)


@pytest.fixture
def rows(processor, image):
    """Rendered rows with their images: none, one, or two of them."""
    return [processor.encode(row) for row in some_rows(12, images=[image] * IMAGES)]


def test_trainer_trains_w_alone_and_its_loss_is_ours(model, processor, rows, tmp_path):
    set_trainable(model, STAGES["scenes"]["pretrain"])
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=0.1, use_cpu=True, remove_unused_columns=False, report_to=[], save_strategy="no",
        logging_steps=1, seed=0, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=processor.collate)
    batch = processor.collate(rows[:4])
    ours = supervised_loss(model, batch).item() / int((batch["labels"] != -100).sum())
    with torch.no_grad():
        theirs = trainer.compute_loss(model, dict(batch)).item()
    assert theirs == pytest.approx(ours, rel=1e-5)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"projector.weight"}


def test_a_streamer_gives_the_answer_piece_by_piece(model, processor, image):
    batch = encoded(processor, image)
    whole = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = dict(batch) | {"max_new_tokens": 12, "do_sample": False, "streamer": streamer}
    writer = threading.Thread(target=model.generate, kwargs=options)
    writer.start()
    pieces = list(streamer)
    writer.join()
    assert "".join(pieces) == processor.tokenizer.decode(whole, skip_special_tokens=True)


# ---- PEFT


def with_lora(model, whole: bool):
    """The model with fresh adapters, by PEFT on the language model alone or on all of it; and PEFT's own object."""
    where = r"language_model\..*" if whole else ".*"  # the encoder has projections of the same names
    config = LoraConfig(r=4, lora_alpha=16, target_modules=where + "(q|v)_proj")
    adapted = get_peft_model(model if whole else model.language_model, config)
    if whole:
        return adapted, adapted
    model.language_model = adapted
    model.vision.requires_grad_(False)
    model.projector.requires_grad_(False)
    return model, adapted


def without_wrappers(name: str) -> str:
    """A weight's name as it was before PEFT came."""
    return name.replace("base_model.model.", "").replace(".base_layer", "")


@pytest.fixture(params=[False, True], ids=["the language model", "the whole model"])
def whole(request) -> bool:
    return request.param


def learn_a_little(model, batch, steps: int = 8) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def test_lora_learns_from_images_and_moves_nothing_else(model, processor, rows, whole):
    batch = processor.collate(rows)
    assert set(batch["images_per_row"].tolist()) == {0, 1, 2}
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        plain = model(**batch).logits
    adapted, _ = with_lora(model, whole)
    with torch.no_grad():
        assert torch.equal(adapted(**batch).logits, plain)  # fresh adapters change nothing
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all("lora_" in name for name in trained)  # A and B, q and v, two layers
    assert all("language_model." in name and "vision." not in name for name in trained)

    losses = learn_a_little(adapted, batch)
    assert losses[-1] < 0.95 * losses[0]
    after = {without_wrappers(name): value for name, value in adapted.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys()
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == set()
    with torch.no_grad():
        assert not torch.allclose(adapted(**batch).logits, plain, atol=0.1)


def test_merged_adapters_and_loaded_ones_answer_the_same(make_model, processor, image, rows, whole, tmp_path):
    model, batch, question = make_model(dtype=torch.float64), processor.collate(rows), encoded(processor, image)
    for inputs in (batch, question):
        inputs["pixel_values"] = inputs["pixel_values"].double()
    greedy, beams = {"max_new_tokens": 12}, {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 2}
    plain = model.generate(**question, **greedy)
    adapted, lora = with_lora(model, whole)
    assert torch.equal(adapted.generate(**question, **greedy), plain)
    learn_a_little(adapted, batch)
    with torch.no_grad():
        expected, written = adapted(**batch).logits, adapted.generate(**question, **beams)
    assert written.shape[0] == 2 and not torch.equal(adapted.generate(**question, **greedy), plain)
    lora.save_pretrained(tmp_path)
    fresh = make_model(dtype=torch.float64)
    if whole:
        loaded = PeftModel.from_pretrained(fresh, tmp_path)
    else:
        fresh.language_model = PeftModel.from_pretrained(fresh.language_model, tmp_path)
        loaded = fresh
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, expected)
    merged = lora.merge_and_unload()
    if not whole:
        model.language_model = merged
    assert type(model) is type(fresh) and not any("lora" in name for name in model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-10)
    assert torch.equal(model.generate(**question, **beams), written)


def test_our_own_folder_answers_in_a_pipeline_by_its_name(model, processor, image, tmp_path):
    folder = save_checkpoint(tmp_path / "own", model, processor, {"stage": "sft"})
    options = {"max_new_tokens": 8, "return_full_text": False, "generate_kwargs": {"do_sample": False}}
    [output] = pipeline("image-text-to-text", model=str(folder))(text=conversation(image), **options)
    batch = encoded(processor, image)
    written = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert output["generated_text"] == processor.decode(written, skip_special_tokens=True) != ""
