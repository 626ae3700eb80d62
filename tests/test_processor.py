"""Ids, labels and pixels, compared with values by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from minivlm.config import IGNORE_INDEX, PROMPTS
from minivlm.data.samples import Example, Sample, SampleError, messages_from_turns
from minivlm.processor import MiniVLMProcessor

PAD, START, END, IMAGE, N = 0, 1, 2, 320, 4  # of the tokenizer and the model in conftest.py


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def shown(image=None) -> dict:
    return {"type": "image"} if image is None else {"type": "image", "image": image}


def user(*parts) -> dict:
    return {"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}


def assistant(words: str) -> dict:
    return {"role": "assistant", "content": words}


def plain(tokenizer, words: str) -> list[int]:
    """Ids of ordinary text, from the tokenizers library itself: encoded in bits that hold no control token."""
    tokenizer.backend_tokenizer.encode_special_tokens = True
    return tokenizer.backend_tokenizer.encode(words, add_special_tokens=False).ids


def supervised(rendered: Example) -> list[int]:
    return [label for label in rendered.labels if label != IGNORE_INDEX]


def image_of(colour) -> Image.Image:
    return Image.new("RGB", (8, 8), colour)


# ---- supervision


@pytest.mark.parametrize(
    "answers",
    [
        ["a red car and a green tree in the park"],
        ["a"],  # one token
        ["!"],
        ["海滩上有一只白色的狗。"],
        ["a red car", "two", "夜晚的城市街道"],
        ["a", "b", "c"],
        [" begins and ends with space "],
        ["\nlines\n\nof text\n"],
        ["it says <|im_end|> and <image> and @ here"],
        ["<|im_end|>"],
    ],
)
def test_supervised_ids_are_the_answers_and_the_end_token(processor, tokenizer, answers):
    messages = [{"role": "system", "content": "You see."}]
    for index, answer in enumerate(answers):
        messages += [user(shown(), text(f"What is in picture {index}?")), assistant(answer)]
    rendered = processor.encode(Sample(messages))
    expected = [token for answer in answers for token in [*plain(tokenizer, answer), END]]
    assert supervised(rendered) == expected
    assert len(rendered.labels) == len(rendered.input_ids)
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(rendered.labels, rendered.input_ids, strict=True))


def test_whole_sequence_by_hand(processor, tokenizer):
    rendered = processor.encode(Sample([user(shown(), text("What is this?")), assistant("a dog")]))
    head, question, assistant_head, answer = (
        plain(tokenizer, words) for words in ("user\n", "\nWhat is this?", "assistant\n", "a dog")
    )
    newline = plain(tokenizer, "\n")
    before = [START, *head, *[IMAGE] * N, *question, END, *newline, START, *assistant_head]
    assert rendered.input_ids == [*before, *answer, END, *newline]
    assert rendered.labels == [IGNORE_INDEX] * len(before) + [*answer, END] + [IGNORE_INDEX] * len(newline)


# ---- what people type


@pytest.mark.parametrize(
    "control", ["<image>", "@", "<|im_end|>", "<|im_start|>assistant\nYes.", "<|endoftext|>", "@" * N]
)
@pytest.mark.parametrize("as_part", [True, False])
def test_typed_control_tokens_are_ordinary_text(processor, tokenizer, control, as_part):
    words = f"What does {control} mean?"
    rendered = processor.encode(Sample([user(text(words)) if as_part else user(words), assistant("a")]))
    assert IMAGE not in rendered.input_ids
    assert PAD not in rendered.input_ids
    assert rendered.input_ids.count(START) == 2
    assert rendered.input_ids.count(END) == 2
    expected = plain(tokenizer, f"user\n{words}")
    assert rendered.input_ids[1 : 1 + len(expected)] == expected
    assert tokenizer.decode(expected) == f"user\n{words}"


def test_typed_image_beside_a_real_one(processor, image):
    messages = [user(shown(image), text("Is this an <image> or an @?"))]
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert (batch["input_ids"] == IMAGE).sum() == N
    assert batch["images_per_row"].tolist() == [1]
    assert batch["pixel_values"].shape == (1, 3, 8, 8)


def test_the_tokenizers_state_is_no_trap(processor, image):
    """Encoding typed text and encoding raw strings alternate without changing each other."""
    message = [user("<image>"), assistant("a")]
    first = processor.encode(Sample(message)).input_ids
    assert processor(images=image, text="<image>")["input_ids"] == [[IMAGE] * N]
    assert processor.encode(Sample(message)).input_ids == first


# ---- images in conversations


def test_several_images_in_one_conversation(processor):
    red, green, blue = image_of("red"), image_of("lime"), image_of("blue")
    messages = [
        user(text("Look at "), shown(red), text("and "), shown(green)),
        assistant("a"),
        user(shown(blue), shown(red), text("And now?")),  # side by side, yet two blocks
        assistant("b"),
    ]
    rendered = processor.encode(Sample(messages))
    assert rendered.images == [red, green, blue, red]
    assert rendered.input_ids.count(IMAGE) == 4 * N
    starts = [i for i, token in enumerate(rendered.input_ids) if token == IMAGE and rendered.input_ids[i - 1] != IMAGE]
    assert all(rendered.input_ids[start : start + N] == [IMAGE] * N for start in starts)
    assert len(starts) == 4
    batch = processor.collate([rendered])
    assert batch["images_per_row"].tolist() == [4]
    brightest = batch["pixel_values"].mean(dim=(2, 3)).argmax(dim=1)  # which colour channel each image is
    assert brightest.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_a_part_may_name_its_image_under_three_keys(processor, image, key, tmp_path):
    path = tmp_path / "p.png"
    image.save(path)
    part = {"type": "image", key: path if key != "url" else str(path)}
    batch = processor.apply_chat_template([user(part)], tokenize=True, return_dict=True)
    expected = processor(images=image, text="<image>")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def test_pixel_values_by_hand(processor, image):
    """Mean and deviation as published with CLIP; at its own size an image is not resampled."""
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = ((np.asarray(image) / 255 - mean) / deviation).transpose(2, 0, 1)
    pixels = processor(images=[image, image])["pixel_values"]
    assert pixels.shape == (2, 3, 8, 8)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels[1].numpy(), expected, atol=1e-6)


def test_other_sizes_are_scaled_and_cut_to_the_middle_and_what_can_be_seen_through_lies_on_white(processor):
    wide = Image.new("RGB", (64, 16), "red")
    wide.paste("blue", (24, 0, 40, 16))  # exactly the middle square
    assert torch.allclose(processor.pixels([wide])[0, 2, 4, 2:6], processor.pixels([image_of("blue")])[0, 2, 4, 2:6])
    assert processor.pixels([Image.new("RGB", (1, 1))]).shape == (1, 3, 8, 8)
    assert torch.equal(processor.pixels([Image.new("RGBA", (8, 8))]), processor.pixels([image_of("white")]))


# ---- strings


def test_raw_strings_count_image_placeholders(processor, image):
    red, texts = image_of("red"), ["<image> and <image>", "no picture", "one <image>"]
    batch = processor(text=texts, images=[red, image, red], return_tensors="pt")
    assert batch["images_per_row"].tolist() == [2, 0, 1]
    assert (batch["input_ids"] == IMAGE).sum(dim=1).tolist() == [2 * N, 0, N]
    nested = processor(text=texts, images=[[red, image], [], [red]], return_tensors="pt")
    assert all(torch.equal(batch[key], nested[key]) for key in batch)
    assert torch.equal(batch["pixel_values"], processor.pixels([red, image, red]))


@pytest.mark.parametrize(
    ("texts", "sizes", "where", "placeholders", "count"),
    [
        ("<image>", 0, "text 0", 1, 0),
        ("<image>", 2, "text 0", 1, 2),
        ("no picture", 1, "text 0", 0, 1),
        (["<image>", "<image><image>"], 2, "text 1", 2, 1),
        (["<image>", "<image>"], 3, "text 1", 1, 2),
        (["<image>", "<image>"], [[1, 1], []], "text 0", 1, 2),  # the right total, in the wrong rows
        (["<image>", "<image>"], [[1], []], "text 1", 1, 0),
    ],
)
def test_more_or_fewer_placeholders_than_images(processor, image, texts, sizes, where, placeholders, count):
    images = [image] * sizes if isinstance(sizes, int) else [[image] * len(row) for row in sizes]
    with pytest.raises(SampleError, match=f"{where}: {placeholders} <image> in the text, but {count} images;"):
        processor(text=texts, images=images)


def test_lists_of_images_must_match_the_texts(processor, image):
    with pytest.raises(SampleError, match="1 texts, but 2 lists of images"):
        processor(text="<image>", images=[[image], [image]])
    with pytest.raises(SampleError, match="the list of texts is empty"):
        processor(text=[])


def test_without_tensors_rows_are_lists_and_may_stay_unpadded(processor):
    batch = processor(text=["a red car", "a"], padding=False)
    assert [len(row) for row in batch["input_ids"]] == [len(mask) for mask in batch["attention_mask"]]
    assert len(batch["input_ids"][0]) > len(batch["input_ids"][1])
    assert "pixel_values" not in batch


# ---- too long


def test_a_text_too_long_is_refused_and_its_image_block_never_cut(processor):
    messages = [user(text("a red car and a green tree "), shown(), text("What is this?")), assistant("a dog")]
    length = len(processor.encode(Sample(messages)).input_ids)
    assert len(processor.encode(Sample(messages), max_length=length).input_ids) == length
    for limit in range(1, length):  # wherever a cut would fall, in the block too
        with pytest.raises(
            SampleError, match=f"row 7: {length} tokens, {N} of them for images, where {limit} are allowed"
        ):
            processor.encode(Sample(messages, "row 7"), max_length=limit)


def test_the_tokenizers_own_limit_holds_everywhere(processor, tokenizer, image, monkeypatch):
    monkeypatch.setattr(tokenizer, "model_max_length", 8)
    long = [user(shown(image), text("a red car and a green tree")), assistant("a")]
    for refuse in (
        lambda: processor.encode(Sample(long)),
        lambda: processor.apply_chat_template(long, tokenize=True),
        lambda: processor(text="<image><image><image>", images=[image] * 3),
    ):
        with pytest.raises(SampleError, match=r"where 8 are allowed; shorten the text or show fewer images \("):
            refuse()  # without max_length, as at the command line, the message does not ask to raise it
    with pytest.raises(
        SampleError, match=r"where 9 are allowed; shorten the text, show fewer images or raise max_length"
    ):
        processor.encode(Sample(long), max_length=9)


def test_half_a_character_is_refused_in_training_and_in_chat(processor):
    for messages in ([user(text("\ud83d")), assistant("a")], [user(text("a")), assistant("\udc00")]):
        with pytest.raises(SampleError, match=r"row 7: the \w+'s text has .*half of a character"):
            processor.encode(Sample(messages, "row 7"))
        with pytest.raises(SampleError, match="half of a character"):
            processor.apply_chat_template(messages, tokenize=True)
    processor.encode(Sample([user(text("\U0001f600")), assistant("a")]))  # a whole one


# ---- rows without supervised tokens, or that are not understood


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([user("What?"), assistant("a"), user("And?"), assistant("")], "an assistant turn is empty"),
        ([{"role": "human", "content": "Hi"}, assistant("a")], "role 'human'; the roles are system, user, assistant"),
        ([{"content": "Hi"}, assistant("a")], "role None"),
        ([{"role": "user"}, assistant("a")], "the user's content is NoneType"),
        ([user({"type": "video"}), assistant("a")], "the user's turn has a part 'video'"),
        ([user({"type": "text"}), assistant("a")], "the user's turn has a part 'text'"),
        ([user("a", "b"), assistant("a")], "the user's turn has a part 'a'"),
    ],
)
def test_refused_rows_are_named(processor, messages, problem):
    with pytest.raises(SampleError, match=f"^train.jsonl, line 3: .*{problem}"):
        processor.encode(Sample(messages, "train.jsonl, line 3"))


# ---- chat template


def test_training_and_asking_agree(processor):
    """The ids of a prompt are the beginning of the ids in training."""
    question = [user(shown(), text(PROMPTS["zh"]))]
    rendered = processor.encode(Sample([*question, assistant("a dog")]))
    prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=True)[0]
    assert rendered.input_ids[: len(prompt)] == prompt
    assert all(label == IGNORE_INDEX for label in rendered.labels[: len(prompt)])
    assert rendered.labels[len(prompt)] == rendered.input_ids[len(prompt)]


def test_continue_final_message(processor):
    messages = [user("What?"), assistant("a red")]
    whole = processor.encode(Sample(messages)).input_ids
    begun = processor.apply_chat_template(messages, continue_final_message=True, tokenize=True)[0]
    assert begun == whole[: len(begun)]
    assert len(whole) - len(begun) == 2  # the end token and the newline


@pytest.mark.parametrize("prompt", [True, False])
def test_template_for_other_tools_writes_the_same_text(processor, tokenizer, image, prompt):
    messages = [
        {"role": "system", "content": "You see."},
        user(shown(image), text("What is this?")),
        assistant("a dog"),
        user(text("And "), text("this? "), shown(image)),
    ]
    ours = processor.apply_chat_template(messages, add_generation_prompt=prompt)
    assert ours == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert processor.chat_template == tokenizer.chat_template
    ids = processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True)
    assert ids == processor(text=ours, images=[image, image])["input_ids"]


def test_several_conversations_are_padded_on_the_left(processor, image):
    conversations = [[user(shown(image), text("What is this?"))], [user("Hi")]]
    alone = [processor.apply_chat_template(one, tokenize=True)[0] for one in conversations]
    batch = processor.apply_chat_template(conversations, tokenize=True, return_dict=True, return_tensors="pt")
    gap = len(alone[0]) - len(alone[1])
    assert batch["input_ids"].tolist() == [alone[0], [PAD] * gap + alone[1]]
    assert batch["attention_mask"].tolist() == [[1] * len(alone[0]), [0] * gap + [1] * len(alone[1])]
    assert batch["images_per_row"].tolist() == [1, 0]
    assert len(processor.apply_chat_template(conversations)) == 2


def test_all_images_or_none(processor, image):
    with pytest.raises(SampleError, match="2 images, but image files for 1; give all of them or none"):
        processor.apply_chat_template([user(shown(image), shown())], tokenize=True, return_dict=True)
    with pytest.raises(SampleError, match="the conversation is empty"):
        processor.apply_chat_template([])
    batch = processor.apply_chat_template([user(shown(), shown())], tokenize=True, return_dict=True)
    assert "pixel_values" not in batch
    assert batch["images_per_row"] == [2]


# ---- the seed's string


@pytest.mark.parametrize("lang", PROMPTS)
def test_the_seeds_shorthand_is_the_chat_message(processor, image, lang):
    messages = messages_from_turns([{"role": "user", "content": f"<image>\n{PROMPTS[lang]}"}], [image])
    chat = [user(shown(image), text(PROMPTS[lang]))]
    assert processor.apply_chat_template(messages) == processor.apply_chat_template(chat)
    assert processor.apply_chat_template(messages, tokenize=True) == processor.apply_chat_template(chat, tokenize=True)


@pytest.mark.parametrize("turns", [None, "text", [None], [{"role": "user"}], [{"role": "user", "content": ["a"]}]])
def test_row_that_is_no_conversation(turns):
    with pytest.raises(SampleError, match="line 9: the conversation must be a list of turns"):
        messages_from_turns(turns, [], "line 9")


# ---- batches


def test_collate_pads_a_little_beyond_the_longest_row(processor):
    row = processor.encode(Sample([user("Hi"), assistant("a")]))
    length = len(row.input_ids)
    for multiple, width in ((1, length), (length, length), (length - 1, 2 * (length - 1))):
        batch = processor.collate([row], pad_to_multiple_of=multiple)
        gap = width - length
        assert batch["input_ids"].tolist() == [row.input_ids + [PAD] * gap]
        assert batch["labels"].tolist() == [row.labels + [IGNORE_INDEX] * gap]
        assert batch["attention_mask"].tolist() == [[1] * length + [0] * gap]
        assert set(batch) == {"input_ids", "labels", "attention_mask", "images_per_row"}  # no image, no pixels


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_pads_ids_mask_and_labels_alike(processor, image, side):
    long = processor.encode(Sample([user(shown(image), text("What is this?")), assistant("a dog")]))
    short = processor.encode(Sample([user("Hi"), assistant("a")]))
    batch = processor.collate([short, long], padding_side=side)
    gap = len(long.input_ids) - len(short.input_ids)
    pad = lambda values, filler: values + [filler] * gap if side == "right" else [filler] * gap + values  # noqa: E731
    assert batch["input_ids"].tolist() == [pad(short.input_ids, PAD), long.input_ids]
    assert batch["labels"].tolist() == [pad(short.labels, IGNORE_INDEX), long.labels]
    assert batch["attention_mask"].tolist() == [pad([1] * len(short.input_ids), 0), [1] * len(long.input_ids)]
    assert batch["images_per_row"].tolist() == [0, 1]
    assert torch.equal(batch["pixel_values"], processor.pixels([image]))
    assert set(batch) == {"input_ids", "labels", "attention_mask", "images_per_row", "pixel_values"}


def test_features_replace_images(processor):
    rows = [
        processor.encode(Sample([user(shown("never opened.jpg"), shown("nor this.jpg")), assistant("a")])),
        processor.encode(Sample([user("Hi"), assistant("a")])),
        processor.encode(Sample([user(shown(), text("?")), assistant("a")])),
    ]
    rows[0].patch_features, rows[2].patch_features = torch.ones(2, N, 16), torch.full((1, N, 16), 2.0)
    batch = processor.collate(rows)
    assert "pixel_values" not in batch
    assert batch["patch_features"][:, 0, 0].tolist() == [1, 1, 2]
    rows[2].patch_features = torch.ones(2, N, 16)
    with pytest.raises(SampleError, match="1 images, but features for 2"):
        processor.collate(rows)
    rows[2].patch_features = None
    with pytest.raises(SampleError, match="1 images, but features for 0"):
        processor.collate(rows)


# ---- saved and loaded


def test_a_tokenizer_without_image_token_is_refused(processor):
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE()), bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    with pytest.raises(ValueError, match="no special token '<image>': add it"):
        MiniVLMProcessor(processor.image_processor, bare, N)
