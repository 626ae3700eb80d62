"""The library's own tools work on the model as it is: Trainer, streamers, sampling, 16 bits."""

import copy
import threading

import pytest
import torch
from training import some_rows
from transformers import TextIteratorStreamer, Trainer, TrainingArguments

from minivlm.config import STAGES
from minivlm.model import set_trainable
from minivlm.train import supervised_loss


def conversation(picture) -> list[dict]:
    """One question about a picture."""
    part = {"type": "image", "image": picture}
    return [{"role": "user", "content": [part, {"type": "text", "text": "What is in this picture?"}]}]


def asked(processor, picture):
    """It, ready for `generate`."""
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(conversation(picture), **options)


@pytest.fixture
def rows(processor, picture):
    """Rendered rows with their pictures: none, one, or two of them."""
    made = []
    for row in some_rows(12):
        row.images[:] = [picture] * len(row.images)
        made.append(processor.render(row.messages()))
    return made


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
    ours = supervised_loss(model, batch, "fp32").item() / int((batch["labels"] != -100).sum())
    with torch.no_grad():
        theirs = trainer.compute_loss(model, dict(batch)).item()
    assert theirs == pytest.approx(ours, rel=1e-5)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"projector.weight"}


def test_a_streamer_gives_the_answer_piece_by_piece(model, processor, picture):
    batch = asked(processor, picture)
    whole = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = dict(batch) | {"max_new_tokens": 12, "do_sample": False, "streamer": streamer}
    writer = threading.Thread(target=model.generate, kwargs=options)
    writer.start()
    pieces = list(streamer)
    writer.join()
    assert "".join(pieces) == processor.tokenizer.decode(whole, skip_special_tokens=True)


def test_sampling_is_repeated_by_its_seed_and_never_writes_a_placeholder(model, processor, picture):
    batch, written = asked(processor, picture), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        written.append(model.generate(**batch, max_new_tokens=40, min_new_tokens=40, do_sample=True, temperature=2.0))
    new = torch.cat(written)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(written[0], written[1]) and not torch.equal(written[0], written[2])
    assert not (new == processor.image_token_id).any()


def test_in_16_bits_the_logits_stay_close(make_model, processor, picture):
    batch = asked(processor, picture)
    with torch.no_grad():
        exact = make_model()(**batch).logits
        rounded = make_model(dtype=torch.bfloat16)(**batch).logits
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).norm() / exact.norm()
    assert 0 < error < 0.05
