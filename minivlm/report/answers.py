"""The seven images of a report with what both stages answer about them, errors marked."""

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.facts import Scene
from minivlm.scenes.language import find_setting, find_things, in_reading_order, noun_phrase
from minivlm.scenes.vocabulary import KIND_WORDS, SETTING_WORDS

COLUMNS = {"pretrain": "Pretrain_vlm", "sft": "SFT_vlm"}
LANGS = {"en": "English", "zh": "Chinese"}


class Marked(NamedTuple):
    """A piece of an answer; `error` says what is true where the piece is not, and is empty otherwise."""

    text: str
    error: str = ""


def marked(text: str, scene: Scene) -> list[Marked]:
    """An answer in pieces; those that name a thing or a setting wrongly carry their error."""
    true = {(t.kind, t.colour) for t in scene.things}
    wrong = []
    for span, (kind, colour) in find_things(text):
        if (kind, colour) not in true:
            colours = " and ".join(sorted({t.colour for t in scene.things if t.kind == kind and t.colour}))
            noun = KIND_WORDS["en"][kind]
            wrong.append((span, f"the {noun} here is {colours}" if colours else f"there is no {noun} here"))
    setting = find_setting(text)
    if setting and setting[1] != scene.setting:
        wrong.append((setting[0], f"this is {SETTING_WORDS['en'][scene.setting][0]}"))
    pieces, position = [], 0
    for (start, end), error in sorted(wrong):
        pieces += [Marked(text[position:start]), Marked(text[start:end], error)]
        position = end
    return [piece for piece in (*pieces, Marked(text[position:])) if piece.text]


def table_rows(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row an image: name, png, truth (lines), answers (for each stage one in each language)."""
    rows = []
    for row in run["table"]:
        scene = Scene.from_dict(row["scene"])
        answers = [[_answer(row["answers"][stage][lang], scene, lang) for lang in LANGS] for stage in COLUMNS]
        png = io.BytesIO()
        draw(scene).save(png, "png", optimize=True)
        rows.append({"name": row["name"], "png": png.getvalue(), "truth": _truth(scene), "answers": answers})
    return rows


def _answer(text: str, scene: Scene, lang: str) -> dict[str, Any]:
    """An answer with its errors marked, and a line on what it does not name."""
    named = {thing for _, thing in find_things(text)}
    missed = [t for t in in_reading_order(scene) if (t.kind, t.colour) not in named]
    phrases = [noun_phrase(t.kind, t.colour, lang, article=lang == "zh") for t in missed]
    left_out = f"not named: {', '.join(phrases)}" if lang == "en" else f"没有提到：{'、'.join(phrases)}"
    return {"lang": lang, "pieces": marked(text, scene), "left_out": left_out if missed else ""}


def _truth(scene: Scene) -> list[str]:
    things = [
        noun_phrase(t.kind, t.colour, "en", t.size) + (", far away" if t.distance == "far" else "")
        for t in in_reading_order(scene)
    ]
    return ["; ".join(things), SETTING_WORDS["en"][scene.setting][0]]


def table_as_text(run: Mapping[str, Any]) -> str:
    """The seven rows for a terminal."""
    lines = []
    for row in run["table"]:
        lines.append(f"\n{row['name']}: {'; '.join(_truth(Scene.from_dict(row['scene'])))}")
        for stage, name in COLUMNS.items():
            lines += [f"  {name:<13}{row['answers'][stage][lang]}" for lang in LANGS]
    return "\n".join(lines)
