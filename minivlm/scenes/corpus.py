"""The text-only corpus: what the language model reads before it ever meets a picture.

Six kinds of documents, in English and Chinese, all written from scene facts that are never drawn: plain captions
and descriptions; a listed scene followed by questions, a caption or a description; translations; small talk about
what words mean. A seventh, the word mosaic, is made of token ids (`pretraining/reading_tasks.py`).
"""

from collections.abc import Iterator

import numpy as np

from minivlm.config import PROMPTS
from minivlm.scenes import vocabulary as w
from minivlm.scenes.facts import KINDS, Scene, random_stream, sample_scene
from minivlm.scenes.language import a_or_an, caption, description, in_reading_order, noun_phrase, pick, questions

Conversation = list[dict[str, str]]

# what the reader of a mosaic or a list is asked for, and which writer answers
CAPTION_PROMPTS = {"en": (PROMPTS["en"], "Write a short caption."), "zh": (PROMPTS["zh"], "写一个简短的标题。")}
DESCRIPTION_PROMPTS = {
    "en": ("Describe it in detail.", "Tell me everything about it."),
    "zh": ("请详细描述一下。", "请告诉我所有的细节。"),
}
_MIXES = (("red", "yellow", "orange"), ("red", "blue", "purple"), ("yellow", "blue", "green"), ("red", "white", "pink"))


def plain_text(index: int) -> str:
    """Caption or description number `index` of the corpus, without a conversation around it."""
    rng = random_stream("plain", index)
    lang = w.LANGUAGES[index % 2]
    scene = sample_scene("text", index)
    return (caption if rng.random() < 0.5 else description)(scene, lang, rng)


def answered_prompts(
    scene: Scene, lang: str, rng: np.random.Generator, turns: int, captions: float = 6.0, descriptions: float = 3.0
) -> Conversation:
    """`turns` questions, caption or description prompts about one scene, each with its answer, in random order.

    A caption is asked for `captions` times, a description `descriptions` times as often as any one type of question.
    """
    pairs = [(q.text, q.answer) for q in questions(scene, lang, rng)]
    pairs.append((pick(CAPTION_PROMPTS[lang], rng), caption(scene, lang, rng)))
    pairs.append((pick(DESCRIPTION_PROMPTS[lang], rng), description(scene, lang, rng)))
    weights = np.array([1.0] * (len(pairs) - 2) + [captions, descriptions])
    chosen = rng.choice(len(pairs), size=min(turns, len(pairs)), replace=False, p=weights / weights.sum())
    return [message for i in chosen for message in _turn(*pairs[i])]


def listed_scene(
    index: int,
    turns: int = 2,
    in_order: float = 0.0,
    captions: float = 6.0,
    descriptions: float = 3.0,
    things: int | None = None,
) -> Conversation:
    """A scene listed in keywords, then `turns` questions and prompts about it.

    The keywords are shuffled; in the share `in_order` of the lists they stand in reading order.
    `things` fixes how many things there are.
    """
    rng = random_stream("listed", index)
    lang = w.LANGUAGES[index % 2]
    scene = sample_scene("text", index, things)
    conversation = answered_prompts(scene, lang, rng, turns, captions, descriptions)
    listing = listing_of(scene, lang, rng, shuffled=rng.random() >= in_order)
    conversation[0]["content"] = f"{listing}\n{conversation[0]['content']}"
    return conversation


def listing_of(scene: Scene, lang: str, rng: np.random.Generator, shuffled: bool = True) -> str:
    """The facts in shuffled keywords: `on the left, near us, red car; in the middle, far away, panda; a park`."""
    comma, semicolon = (", ", "; ") if lang == "en" else ("，", "；")
    items = []
    for t in scene.things if shuffled else in_reading_order(scene):
        phrase = noun_phrase(t.kind, t.colour, lang, t.size, article=False)
        items.append(comma.join((w.PLACE_WORDS[lang][t.place], w.DISTANCE_WORDS[lang][t.distance], phrase)))
    if shuffled:
        items = [items[i] for i in rng.permutation(len(items))]
    return semicolon.join([*items, w.SETTING_WORDS[lang][scene.setting][0]])


def translation(index: int) -> Conversation:
    """A caption put into the other language."""
    rng = random_stream("translation", index)
    scene = sample_scene("text", index)
    source, target = w.LANGUAGES if rng.random() < 0.5 else w.LANGUAGES[::-1]
    ask = "Say this in Chinese: " if target == "zh" else "请翻译成英文："
    text, reply = (
        {"en": " and ", "zh": "和"}[lang].join(noun_phrase(t.kind, t.colour, lang) for t in in_reading_order(scene)[:2])
        for lang in (source, target)
    )
    return _turn(ask + text, reply)


def small_talk(index: int) -> Conversation:
    """What words mean, with no scene at all: kinds of things, mixed colours, opposites, counting."""
    rng = random_stream("talk", index)
    lang = w.LANGUAGES[index % 2]
    topic = rng.integers(3)
    if topic == 0:
        kind, group = pick(KINDS, rng), pick(sorted(set(w.GROUPS.values())), rng)
        if rng.random() < 0.5:
            group = w.GROUPS[kind]
        noun, name = w.KIND_WORDS[lang][kind], w.GROUP_WORDS[lang][group]
        right = w.GROUPS[kind] == group
        if lang == "en":
            return _turn(f"Is {a_or_an(noun)} {noun} {a_or_an(name)} {name}?", "Yes." if right else "No.")
        return _turn(f"{noun}是{name}吗？", "是的。" if right else "不是。")
    if topic == 1:
        one, two, mixed = (w.COLOUR_WORDS[lang][c] for c in pick(_MIXES, rng))
        one, two = (one, two) if rng.random() < 0.5 else (two, one)
        if lang == "en":
            return _turn(f"What colour do you get from {one} and {two}?", f"{mixed.capitalize()}.")
        return _turn(f"{one}和{two}混合是什么颜色？", f"{mixed}。")
    first = int(rng.integers(0, 3))
    numbers = w.NUMBERS[lang]
    if lang == "en":
        return _turn(f"Count on from {numbers[first]}.", ", ".join(numbers[first + 1 :]).capitalize() + ".")
    return _turn(f"从{numbers[first]}往后数。", "、".join(numbers[first + 1 :]) + "。")


def tokenizer_corpus(documents: int) -> Iterator[str]:
    """The text from which the tokenizer is trained: every kind of document in turn, roles too."""
    writers = (listed_scene, translation, small_talk)
    for index in range(documents):
        yield plain_text(index)
        for message in writers[index % len(writers)](index):
            yield from (message["role"], message["content"])


def _turn(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
