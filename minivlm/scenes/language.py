"""Facts to sentences in two languages, and sentences back to facts.

Things are always named from left to right, near before far, as the eye would go. A caption is one clause (like
CC3M); a description is several sentences (like LLaVA-Instruct, arXiv:2304.08485, section 3); questions have one
exact answer each. `read_facts` inverts all of it, so every metric of the course is exact.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minivlm.scenes import vocabulary as w
from minivlm.scenes.facts import COLOURLESS, COLOURS, DISTANCES, KINDS, PLACES, USUAL, Scene, Thing


@dataclass(frozen=True)
class Mentioned:
    """What a text names: (kind, colour or None) pairs in order of mention, and the setting or None."""

    things: tuple[tuple[str, str | None], ...]
    setting: str | None


@dataclass(frozen=True)
class Question:
    """A question about a scene, its type (`words.QUESTION_TYPES`) and its one right answer."""

    type: str
    text: str
    answer: str


def in_reading_order(scene: Scene) -> list[Thing]:
    """The things from left to right, near before far."""
    return sorted(scene.things, key=lambda t: (PLACES.index(t.place), DISTANCES.index(t.distance)))


def noun_phrase(kind: str, colour: str | None, lang: str, size: str = "medium", article: bool = True) -> str:
    """`a big red car`, `an astronaut in white`; 一辆红色的大汽车, 一名穿白色衣服的宇航员."""
    noun = w.KIND_WORDS[lang][kind]
    hue = w.COLOUR_WORDS[lang].get(colour, "")
    person, big = kind in w.PEOPLE, size == "big"
    if lang == "zh":
        quality = "" if not hue else f"穿{hue}衣服的" if person else f"{hue}的"
        return (f"一{w.MEASURES[kind]}" if article else "") + quality + ("大" if big and not person else "") + noun
    phrase = f"{noun} in {hue}" if person and hue else f"{hue} {noun}".strip()
    phrase = f"big {phrase}" if big and not person else phrase
    return f"{a_or_an(phrase)} {phrase}" if article else phrase


def caption(scene: Scene, lang: str, rng: np.random.Generator) -> str:
    """One clause that names every thing and the setting."""
    things = _join([noun_phrase(t.kind, t.colour, lang) for t in in_reading_order(scene)], lang)
    return pick(w.CAPTIONS[lang], rng).format(things=things, **_setting(scene.setting, lang))


def description(scene: Scene, lang: str, rng: np.random.Generator, noise: float = 0.0) -> str:
    """Several sentences: the setting, every thing with its place and distance, a closing.

    With probability `noise` a plausible sentence that is not true is added, a usual companion of the setting
    that is not there, as machine-written instruction data does.
    """
    parts = [pick(w.OPENINGS[lang], rng).format(**_setting(scene.setting, lang))]
    parts += [_sentence(thing, lang, rng) for thing in in_reading_order(scene)]
    if rng.random() < noise:
        parts.append(_untrue_sentence(scene, lang, rng))
    count = len(scene.things)
    be, noun = ("is", "thing") if count == 1 else ("are", "things")
    parts.append(pick(w.CLOSINGS[lang], rng).format(number=w.NUMBERS[lang][count], be=be, noun=noun))
    return (" " if lang == "en" else "").join(parts)


def questions(scene: Scene, lang: str, rng: np.random.Generator) -> list[Question]:
    """One question of every type that has an exact answer in this scene, in random order."""
    forms = [q for q in (_question(scene, kind, lang, rng) for kind in w.QUESTION_TYPES) if q is not None]
    return [forms[i] for i in rng.permutation(len(forms))]


def exists_question(kind: str, present: bool, lang: str, rng: np.random.Generator) -> Question:
    """`Is there a dog in the picture?`, the question POPE asks (arXiv:2305.10355)."""
    text = pick(w.QUESTIONS[lang]["exists"], rng).format(kind=noun_phrase(kind, None, lang, article=lang == "en"))
    return Question("exists", text, w.YES[lang] if present else w.NO[lang])


def read_facts(text: str) -> Mentioned:
    """Read the named things and the setting back from a text in either language."""
    things = tuple(thing for _, thing in find_things(text))
    setting = find_setting(text)
    return Mentioned(things, setting and setting[1])


def find_things(text: str) -> list[tuple[tuple[int, int], tuple[str, str | None]]]:
    """Where a text names things: ((start, end), (kind, colour or None)), in order of mention."""
    pattern, kinds, colours = _READERS[language_of(text)]
    return [
        (m.span(), (kinds[m["kind"].lower()], colours.get((m["worn"] or m["colour"] or "").lower())))
        for m in pattern.finditer(text)
    ]


def find_setting(text: str) -> tuple[tuple[int, int], str] | None:
    """Where a text first names a setting: ((start, end), setting), or None."""
    words = {setting: row[2] for setting, row in w.SETTING_WORDS[language_of(text)].items()}
    places = [(text.lower().find(word), setting) for setting, word in words.items() if word in text.lower()]
    if not places:
        return None
    start, setting = min(places)
    return (start, start + len(words[setting])), setting


def language_of(text: str) -> str:
    """ "zh" where a text has a Chinese character, else "en"."""
    return "zh" if re.search(r"[\u4e00-\u9fff]", text) else "en"


def _reader(lang: str):
    kinds = {word: kind for kind, word in w.KIND_WORDS[lang].items()}
    colours = {word: colour for colour, word in w.COLOUR_WORDS[lang].items()}
    noun = "|".join(sorted(kinds, key=len, reverse=True))  # the longest first: 熊猫 before 猫
    hue = "|".join(colours)
    if lang == "en":
        form = rf"(?:\b(?P<colour>{hue}) )?\b(?P<kind>{noun})\b(?: in (?P<worn>{hue})\b)?"
    else:
        form = rf"(?:穿(?P<worn>{hue})衣服的|(?P<colour>{hue})的?)?大?(?P<kind>{noun})"
    return re.compile(form, re.IGNORECASE), kinds, colours


_READERS = {lang: _reader(lang) for lang in w.LANGUAGES}


def _question(scene: Scene, type_: str, lang: str, rng: np.random.Generator) -> Question | None:
    """The question of one type, or None where this scene has no exact answer to it."""
    things = in_reading_order(scene)
    alone = [t for t in things if sum(o.kind == t.kind for o in things) == 1]
    if type_ == "exists":
        present = bool(rng.random() < 0.5)
        pool = sorted({t.kind for t in things}) if present else [k for k in KINDS if k not in {t.kind for t in things}]
        return exists_question(pick(pool, rng), present, lang, rng)
    slots: dict[str, str] = {}
    if type_ == "what":
        place = pick(PLACES, rng)
        slots["place"] = w.PLACE_WORDS[lang][place]
        here = [noun_phrase(t.kind, t.colour, lang) for t in things if t.place == place]
        answer = _end(_join(here, lang), lang) if here else w.NOTHING[lang]
    elif type_ == "count":
        kind = pick(KINDS if rng.random() < 0.5 else [t.kind for t in things], rng)
        noun = w.KIND_WORDS[lang][kind]
        slots |= {"kinds": f"{noun}s", "kind": noun, "measure": w.MEASURES[kind]}
        answer = _number(sum(t.kind == kind for t in things), lang, w.MEASURES[kind])
    elif type_ == "total":
        answer = _number(len(things), lang, w.TOTAL_MEASURE)
    elif type_ == "setting":
        answer = _end(w.SETTING_WORDS[lang][scene.setting][0], lang)
    elif type_ == "time":
        answer = w.TIME_ANSWERS[lang].get(scene.setting, w.TIME_ANSWERS[lang]["day"])
    else:
        return _question_about_one(alone, type_, lang, rng)
    return Question(type_, pick(w.QUESTIONS[lang][type_], rng).format(**slots), answer)


def _question_about_one(alone: list[Thing], type_: str, lang: str, rng: np.random.Generator) -> Question | None:
    """Questions about a thing that is the only one of its kind: where, colour, distance, which is further left."""
    pool = [t for t in alone if t.colour] if type_ == "colour" else alone
    if not pool:
        return None
    thing = pick(pool, rng)
    phrase = noun_phrase(thing.kind, thing.colour, lang, article=False)
    slots = {"thing": phrase, "kind": w.KIND_WORDS[lang][thing.kind]}
    place, distance = w.PLACE_WORDS[lang][thing.place], w.DISTANCE_WORDS[lang][thing.distance]
    if type_ == "colour":
        answer = w.COLOUR_WORDS[lang][thing.colour]
    elif type_ == "where":
        answer = f"{place}, {distance}" if lang == "en" else f"{place}的{distance}"
    elif type_ == "distance":
        answer = distance
    else:
        rivals = [t for t in alone if t.place != thing.place]
        if not rivals:
            return None
        other = pick(rivals, rng)
        slots["other"] = noun_phrase(other.kind, other.colour, lang, article=False)
        first = phrase if PLACES.index(thing.place) < PLACES.index(other.place) else slots["other"]
        answer = f"the {first}" if lang == "en" else first
    return Question(type_, pick(w.QUESTIONS[lang][type_], rng).format(**slots), _end(answer, lang))


def _sentence(thing: Thing, lang: str, rng: np.random.Generator) -> str:
    phrase, place = noun_phrase(thing.kind, thing.colour, lang, thing.size), w.PLACE_WORDS[lang][thing.place]
    words = {"thing": phrase, "Thing": _capital(phrase), "place": place, "Place": _capital(place)}
    words |= {"distance": w.DISTANCE_WORDS[lang][thing.distance], "verb": w.VERBS[lang][thing.kind]}
    return pick(w.SENTENCES[lang], rng).format(**words)


def _untrue_sentence(scene: Scene, lang: str, rng: np.random.Generator) -> str:
    here = {thing.kind for thing in scene.things}
    kind = pick([k for k in USUAL[scene.setting] if k not in here] or [k for k in KINDS if k not in here], rng)
    colour = None if kind in COLOURLESS else pick(COLOURS, rng)
    return pick(w.NOISE[lang], rng).format(thing=noun_phrase(kind, colour, lang))


def _setting(setting: str, lang: str) -> dict[str, str]:
    name, where, _ = w.SETTING_WORDS[lang][setting]
    return {"name": name, "where": where}


def _join(phrases: list[str], lang: str) -> str:
    comma, last = (", ", " and ") if lang == "en" else ("、", "和")
    return last.join(filter(None, (comma.join(phrases[:-1]), phrases[-1]))) if phrases else ""


def _number(count: int, lang: str, measure: str) -> str:
    """`Two.`, 两只。: Chinese counts with a measure word."""
    return _end(w.NUMBERS[lang][count] + (measure if lang == "zh" else ""), lang)


def _end(answer: str, lang: str) -> str:
    return f"{_capital(answer)}." if lang == "en" else f"{answer}。"


def a_or_an(phrase: str) -> str:
    """The indefinite article of an English phrase."""
    return "an" if phrase[0] in "aeiou" else "a"


def _capital(phrase: str) -> str:
    return phrase[0].upper() + phrase[1:]


def pick(options: Sequence, rng: np.random.Generator) -> Any:
    """One of the options at random."""
    return options[int(rng.integers(len(options)))]
