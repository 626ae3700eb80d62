"""The tokenizer of the scenes preset: byte-level BPE learnt from the world's own English and Chinese.

Byte-level BPE (Sennrich et al., arXiv:1508.07909; bytes as in GPT-2) can write any text. Chinese has no spaces, so
the words of the drawn world serve as borders: no token crosses them, and 红色 is one token wherever it stands.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minivlm.config import IMAGE_TOKEN
from minivlm.data.chat_template import chat_template
from minivlm.scenes import vocabulary as w

PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # MiniMind2's names and ids 0, 1, 2
VOCAB_SIZE = 1024  # with the special tokens, without <image>
CORPUS_DOCUMENTS = 6000
MAX_LENGTH = 1024


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE of `vocab_size` tokens; `<image>` is added after them, with id `vocab_size`.

    The language model's vocabulary ends before `<image>`: that token is never looked up, only replaced.
    Raises ValueError where the texts are too few to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_chinese_words()), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size()) != vocab_size:
        raise ValueError(f"the texts gave {found} tokens, not {vocab_size}: pass more texts or a smaller vocab_size")
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=MAX_LENGTH,
        chat_template=chat_template(BOS, EOS),
        clean_up_tokenization_spaces=False,
    )


def _chinese_words() -> str:
    """A pattern of the world's Chinese words and function characters, the longest first."""
    tables = (w.COLOUR_WORDS, w.KIND_WORDS, w.PLACE_WORDS, w.DISTANCE_WORDS, w.VERBS, w.GROUP_WORDS)
    found = {word for table in tables for word in table["zh"].values()}
    found |= {row[2] for row in w.SETTING_WORDS["zh"].values()} | set(w.MEASURES.values())
    found |= set("的一有在和是大穿两三四零、，。：；？") | {"衣服"}
    return "|".join(sorted(found, key=lambda word: (-len(word), word)))
