"""The drawn world: what a scene may be, how splits are drawn, images checked by their pixels, text read back.

Tolerances are stated where they are used. All streams are seeded, so nothing here passes or fails by luck.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache

import numpy as np
import pytest
from PIL import Image

from minivlm.scenes import vocabulary as w
from minivlm.scenes.drawing import gallery
from minivlm.scenes.drawing.draw import draw, layout
from minivlm.scenes.facts import (
    COLOURLESS,
    COLOURS,
    FLYERS,
    HELD_OUT_COLOURS,
    HELD_OUT_SETTINGS,
    KINDS,
    PLACES,
    SETTINGS,
    SPLITS,
    USUAL,
    Scene,
    Thing,
    random_stream,
    sample_scene,
)
from minivlm.scenes.language import caption, description, in_reading_order, noun_phrase, questions, read_facts

EXAM = 500  # images of the exam
LONG = 4000  # of a stream, where a closer look is wanted
EVERY_PAIR = [(kind, colour) for kind in KINDS for colour in (COLOURS if kind not in COLOURLESS else (None,))]


boxes_of = cache(layout)


@cache
def scenes_of(split: str, count: int) -> tuple[Scene, ...]:
    return tuple(sample_scene(split, i) for i in range(count))


def things_of(scenes) -> list[Thing]:
    return [thing for scene in scenes for thing in scene.things]


# ---- what there is


def test_the_world_is_as_large_as_promised():
    assert len(set(SETTINGS)) == len(SETTINGS) >= 8
    assert len(set(KINDS)) == len(KINDS) == 16
    assert len(set(COLOURS)) == len(COLOURS) == 8
    scenes = scenes_of("exam", EXAM)
    assert {scene.setting for scene in scenes} == set(SETTINGS)
    assert {thing.kind for thing in things_of(scenes)} == set(KINDS)
    assert {thing.colour for thing in things_of(scenes)} == {*COLOURS, None}
    assert {thing.place for thing in things_of(scenes)} == {"left", "middle", "right"}
    sizes = {("far", "small"), ("near", "medium"), ("near", "big")}
    assert {(thing.distance, thing.size) for thing in things_of(scenes)} == sizes


@pytest.mark.parametrize("split", SPLITS)
def test_the_things_of_a_scene_can_be_distinguished(split):
    """By their place and distance, and by their name; only the panda has no colour."""
    for scene in scenes_of(split, 300):
        assert len({(thing.place, thing.distance) for thing in scene.things}) == len(scene.things)
        assert len({(thing.kind, thing.colour) for thing in scene.things}) == len(scene.things)
        assert all((thing.colour is None) == (thing.kind == "panda") for thing in scene.things)
        assert sum(thing.size == "big" for thing in scene.things) <= 1


def test_a_scene_is_the_same_each_time_and_survives_json():
    for split in SPLITS:
        scene = sample_scene(split, 17)
        assert scene == sample_scene(split, 17) != sample_scene(split, 18)
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_an_unknown_split_and_an_impossible_number_are_refused():
    with pytest.raises(ValueError, match=r"unknown split 'test'; choose one of base, train"):
        sample_scene("test", 0)
    for things in (0, 5, -1):
        with pytest.raises(ValueError, match=f"1 to 4 things, not {things}"):
            sample_scene("exam", 0, things)


# ---- splits

# What chi-square exceeds once in a hundred times if all values are equally likely, by degrees of freedom
CRITICAL = {2: 9.21, 7: 18.48, 9: 21.67, 15: 30.58}


def chi_square(counts: Counter, values) -> float:
    assert set(counts) <= set(values)
    expected = sum(counts.values()) / len(values)
    return sum((counts[value] - expected) ** 2 / expected for value in values)


def is_uniform(values: list[str], among) -> bool:
    return chi_square(Counter(values), among) < CRITICAL[len(among) - 1]


def test_the_exams_numbers_kinds_colours_settings_and_places_are_uniform():
    """Each number of things is exactly a quarter; no chi-square exceeds its 1% value over the 500 images."""
    scenes = scenes_of("exam", EXAM)
    things = things_of(scenes)
    assert Counter(len(scene.things) for scene in scenes) == dict.fromkeys((1, 2, 3, 4), EXAM // 4)
    assert is_uniform([thing.kind for thing in things], KINDS)
    assert is_uniform([thing.colour for thing in things if thing.colour], COLOURS)
    assert is_uniform([scene.setting for scene in scenes], SETTINGS)
    assert is_uniform([thing.place for thing in things], PLACES)


def test_the_same_measure_finds_that_training_is_not_uniform():
    """The control of the test before: settings have usual inhabitants in training, none in the exam."""

    def usual(split):
        things = [(scene.setting, thing.kind) for scene in scenes_of(split, EXAM) for thing in scene.things]
        return sum(kind in USUAL[setting] for setting, kind in things) / len(things)

    assert not is_uniform([thing.kind for thing in things_of(scenes_of("train", EXAM))], KINDS)
    assert usual("train") == pytest.approx(0.35 + 0.65 / 4, abs=0.05)
    assert usual("exam") == pytest.approx(4 / 16, abs=0.05)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_third_of_the_things_is_far_whatever_their_number(number):
    """Within three standard errors: of the exam's things, and of a long stream's by the number of things."""
    everything = things_of(scenes_of("exam", EXAM))
    some = things_of(scene for scene in scenes_of("exam", LONG) if len(scene.things) == number)
    for things in (everything, some):
        share = sum(thing.distance == "far" for thing in things) / len(things)
        assert share == pytest.approx(1 / 3, abs=3 * (2 / 9 / len(things)) ** 0.5)


@pytest.mark.parametrize("split", ["base", "train", "dev", "exam"])
def test_held_out_pairs_are_in_no_image_of_a_split_that_learns_or_decides(split):
    scenes = scenes_of(split, LONG if split == "train" else 2000)
    assert not HELD_OUT_COLOURS & {(thing.kind, thing.colour) for thing in things_of(scenes)}
    assert not HELD_OUT_SETTINGS & {(thing.kind, scene.setting) for scene in scenes for thing in scene.things}


def test_every_image_of_the_holdout_has_a_held_out_pair_and_every_pair_comes_up():
    counts = Counter()
    for scene in scenes_of("holdout", EXAM):
        pairs = {(t.kind, t.colour) for t in scene.things} | {(t.kind, scene.setting) for t in scene.things}
        pairs &= HELD_OUT_COLOURS | HELD_OUT_SETTINGS
        assert pairs
        counts.update(pairs)
    assert set(counts) == HELD_OUT_COLOURS | HELD_OUT_SETTINGS


def test_what_is_held_out_is_made_of_parts_that_training_shows():
    """Eight pairs of kind and colour, each colour once, and six of kind and setting: new is only the pair."""
    assert sorted(colour for _, colour in HELD_OUT_COLOURS) == sorted(COLOURS)
    assert len({kind for kind, _ in HELD_OUT_COLOURS}) == 8 and len(HELD_OUT_SETTINGS) == 6
    train = scenes_of("train", LONG)
    assert {(t.kind, t.colour) for t in things_of(train)} == set(EVERY_PAIR) - HELD_OUT_COLOURS
    assert {(t.kind, t.colour) for t in things_of(scenes_of("text", 2000))} == set(EVERY_PAIR)  # text alone has them
    together = {(thing.kind, scene.setting) for scene in train for thing in scene.things}
    assert together == {(kind, setting) for kind in KINDS for setting in SETTINGS} - HELD_OUT_SETTINGS


def test_splits_are_disjoint_streams():
    """No scene of 1,000 comes twice, in its own split or in another; not even the facts agree index by index."""
    streams = {split: scenes_of(split, 1000) for split in SPLITS}
    assert len({scene for stream in streams.values() for scene in stream}) == 1000 * len(SPLITS)
    for split, stream in streams.items():
        for other in SPLITS:
            if other != split:
                pairs = zip(stream, streams[other], strict=True)
                assert sum((a.setting, a.things) == (b.setting, b.things) for a, b in pairs) < 10


# ---- where things stand


def test_far_widths_are_a_sixth_to_a_quarter_and_near_ones_a_quarter_to_a_half():
    widths = {"near": [], "far": []}
    for scene in scenes_of("exam", EXAM):
        for thing, (left, top, right, bottom) in zip(scene.things, boxes_of(scene), strict=True):
            assert right - left == pytest.approx(bottom - top)
            assert min(left, top) > 0 and max(right, bottom) < 1
            widths[thing.distance].append(right - left)
    for values, low, high in ((widths["far"], 1 / 6, 1 / 4), (widths["near"], 1 / 4, 1 / 2)):
        assert low - 1e-9 <= min(values) < low + 0.01 and high - 0.01 < max(values) <= high  # the ranges are used


def test_a_thing_stands_where_its_place_says():
    ranges = {"left": (0, 0.3), "middle": (0.4, 0.6), "right": (0.7, 1)}
    for scene in scenes_of("exam", EXAM):
        for thing, (left, _, right, _) in zip(scene.things, boxes_of(scene), strict=True):
            low, high = ranges[thing.place]
            assert low < (left + right) / 2 < high


# ---- images


# Hue in degrees of each colour word, as colour wheels give it; what is pale and bright is white.
HUES = {"red": 0, "orange": 28, "yellow": 50, "green": 130, "blue": 218, "purple": 277, "pink": 334}


def changed_pixels(scene: Scene, image: Image.Image, threshold: int = 24) -> np.ndarray:
    """Which pixels differ from the same scene without its things."""
    return np.abs(np.asarray(image, dtype=int) - np.asarray(blank(scene), dtype=int)).max(axis=-1) > threshold


def blank(scene: Scene) -> Image.Image:
    """The same scene without its things."""
    return draw(Scene(scene.setting, (), scene.seed))


def dominant_colour(image: Image.Image, where: np.ndarray) -> str | None:
    """The colour word that most of these pixels would be called by; None if there are none."""
    hue, saturation, value = np.moveaxis(np.asarray(image.convert("HSV"), dtype=float)[where], -1, 0) / 255
    distance = np.abs((hue[:, None] * 360 - np.array([*HUES.values()]) + 180) % 360 - 180)
    names = np.array([*HUES])[distance.argmin(axis=1)]
    counts = Counter(names[(saturation >= 0.3) & (value >= 0.3)].tolist())
    counts["white"] = int(((saturation < 0.2) & (value >= 0.75)).sum())
    word, count = counts.most_common(1)[0]
    return word if count else None


def box_mask(box, side: int = 224) -> np.ndarray:
    left, top, right, bottom = (round(edge * side) for edge in box)
    mask = np.zeros((side, side), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def single_thing(kind, colour, number, distance="near", setting=None):
    size = "small" if distance == "far" else "medium"
    place = PLACES[number % 3]
    return Scene(setting or SETTINGS[number % len(SETTINGS)], (Thing(kind, colour, place, distance, size),), number)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_thing_has_its_colour_in_its_box(colour):
    """Every kind, near and far in turn, in all settings and places; by pixels, not by the painter's palette.

    The control: a blank scene has no colour in the box, a thing in another colour that one.
    """
    for number, kind in enumerate(kind for kind in KINDS if kind not in COLOURLESS):
        distance = ("near", "far")[(number + COLOURS.index(colour)) % 2]
        scene = single_thing(kind, colour, 31 * COLOURS.index(colour) + number, distance)
        image, box = draw(scene), box_mask(*layout(scene))
        there = changed_pixels(scene, image) & box
        assert there.sum() > 0.2 * box.sum()
        assert dominant_colour(image, there) == colour
    assert dominant_colour(blank(scene), changed_pixels(scene, blank(scene)) & box) is None
    other = COLOURS[(COLOURS.index(colour) + 3) % len(COLOURS)]
    wrong = draw(single_thing(kind, other, scene.seed, distance))
    assert dominant_colour(wrong, changed_pixels(scene, wrong) & box) == other != colour


def test_a_panda_is_black_and_white():
    for number in range(6):
        scene = single_thing("panda", None, number)
        image = draw(scene)
        there = changed_pixels(scene, image) & box_mask(*layout(scene))
        value = np.asarray(image.convert("HSV"), dtype=float)[there][:, 2] / 255
        assert (value < 0.35).mean() > 0.1
        assert dominant_colour(image, there) == "white"


@pytest.mark.parametrize("kind", KINDS)
def test_a_thing_fills_its_box_and_stays_in_it(kind):
    """Measured in space, where nothing casts a shadow: the longer side is the box's, to three pixels."""
    for number, distance in enumerate(("near", "far")):
        scene = single_thing(kind, None if kind in COLOURLESS else "pink", number, distance, "space")
        ((left, top, right, bottom),) = layout(scene)
        rows, columns = np.nonzero(changed_pixels(scene, draw(scene), threshold=8))
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        assert extent == pytest.approx(224 * (right - left), abs=3)
        assert 224 * left - 2 <= columns.min() and columns.max() <= 224 * right + 2
        assert 224 * top - 2 <= rows.min() and rows.max() <= 224 * bottom + 2
        if kind not in FLYERS:
            assert rows.max() == pytest.approx(224 * bottom, abs=3)  # it stands


def test_near_things_cover_far_ones_and_what_stands_lower_covers_what_stands_higher(monkeypatch):
    boxes = ((0.3, 0.3, 0.6, 0.6), (0.4, 0.4, 0.8, 0.8), (0.2, 0.2, 0.5, 0.5))
    paints = {"cat": (255, 0, 0), "car": (0, 255, 0), "dog": (0, 0, 255)}
    fills = {kind: (*colour, 255) for kind, colour in paints.items()}
    monkeypatch.setattr(f"{draw.__module__}.layout", lambda scene: boxes)
    monkeypatch.setattr(
        f"{draw.__module__}.paint_thing", lambda kind, colour, rng, side: Image.new("RGBA", (side, side), fills[kind])
    )
    cat, car = Thing("cat", "red", "left", "near", "medium"), Thing("car", "red", "middle", "near", "medium")
    far = Thing("dog", "red", "middle", "far", "small")
    image = draw(Scene("space", (cat, car, far), 1), 100)
    assert image.getpixel((35, 35)) == paints["cat"]  # over the far dog
    assert image.getpixel((45, 45)) == paints["car"]  # over both
    assert image.getpixel((25, 25)) == paints["dog"]


def test_settings_can_be_distinguished_at_a_glance():
    """By the nearest of the other images, on thumbnails of 8 x 8 pixels; by chance one in ten would be right."""
    labels = [setting for setting in SETTINGS for _ in range(4)]
    empty = [Scene(setting, (), number) for number, setting in enumerate(labels)]
    pixels = np.stack([np.asarray(draw(s).resize((8, 8), Image.Resampling.BOX), dtype=float).ravel() for s in empty])
    apart = ((pixels[:, None] - pixels[None]) ** 2).sum(axis=-1)
    np.fill_diagonal(apart, np.inf)
    right = [labels[i] == labels[j] for i, j in enumerate(apart.argmin(axis=1))]
    assert np.mean(right) >= 0.9


def test_images_are_drawn_once_and_then_read(tmp_path, monkeypatch):
    file = tmp_path / "dev.npy"
    drawn = gallery.cached_pictures(file, "dev", 3, 112, workers=1)
    expected = [draw(sample_scene("dev", i)).resize((112, 112), Image.Resampling.BICUBIC) for i in range(3)]
    assert np.array_equal(drawn, np.stack(expected))
    monkeypatch.setattr(gallery, "draw", lambda scene: pytest.fail("drawn again"))
    assert np.array_equal(gallery.cached_pictures(file, "dev", 3, 112), drawn)
    with pytest.raises(ValueError, match=r"dev\.npy holds pictures of shape \(3, 112, 112, 3\), not 4 of 112 px"):
        gallery.cached_pictures(file, "dev", 4, 112)
    assert [path.name for path in tmp_path.iterdir()] == ["dev.npy"]


INTERRUPTED = """
import os, signal, threading, time
from minivlm.scenes.drawing import gallery
from minivlm.scenes.facts import sample_scene

def interrupt():
    while not gallery.multiprocessing.active_children():  # until the first worker begins to import
        time.sleep(0.01)
    time.sleep(0.2)
    os.killpg(os.getpgid(0), signal.SIGINT)  # as a terminal does

signal.signal(signal.SIGINT, signal.default_int_handler)
gallery.CHUNK, gallery.MANY = 1, 2
threading.Thread(target=interrupt).start()
try:
    gallery.draw_many([sample_scene("dev", i) for i in range(2)], 112, workers=2)
    time.sleep(60)
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.skipif(gallery.usable_cores() < 2, reason="one core draws by itself")
def test_ctrl_c_while_workers_start_ends_all_without_a_workers_traceback():
    """The terminal interrupts all processes; the parent alone answers, also while the workers import."""
    command, options = [sys.executable, "-c", INTERRUPTED], {"capture_output": True, "text": True, "timeout": 100}
    done = subprocess.run(command, start_new_session=True, **options)
    assert (done.returncode, done.stdout) == (0, "stopped\n")
    assert "Traceback" not in done.stderr and "KeyboardInterrupt" not in done.stderr


def test_a_contact_sheet_holds_the_images_in_order():
    sheet = gallery.contact_sheet("dev", first=4, across=2, gap=6)
    assert sheet.size == (2 * 230 + 6,) * 2
    for i in range(4):
        left, top = 6 + i % 2 * 230, 6 + i // 2 * 230
        cell = sheet.crop((left, top, left + 224, top + 224))
        assert cell.tobytes() == draw(sample_scene("dev", 4 + i)).tobytes()


# ---- words


def facts_of(scene: Scene) -> tuple[tuple[str, str | None], ...]:
    return tuple((thing.kind, thing.colour) for thing in in_reading_order(scene))


@pytest.mark.parametrize("lang", w.LANGUAGES)
def test_every_name_is_read_back(lang):
    """All kinds in all colours, big or not, with and without an article, in any case."""
    for kind, colour in EVERY_PAIR:
        for size in ("small", "medium", "big"):
            for article in (True, False):
                phrase = noun_phrase(kind, colour, lang, size, article)
                for text in (phrase, phrase.upper(), f"{phrase}."):
                    assert read_facts(text).things == ((kind, colour),)
        assert read_facts(noun_phrase(kind, None, lang)).things == ((kind, None),)
    for setting, forms in w.SETTING_WORDS[lang].items():
        assert {read_facts(form) for form in forms} == {read_facts(forms[0])}
        assert read_facts(forms[0]).setting == setting and read_facts(forms[0]).things == ()


@pytest.mark.parametrize(
    "text",
    ["", "Yes.", "A carpet, a scarf and a dogma in the skylight of a treehouse.", "No colour.", "没有。", "三样。"],
)
def test_nothing_is_read_into_a_text_that_names_nothing(text):
    assert read_facts(text).things == ()


def test_articles_and_measure_words_are_right():
    assert noun_phrase("astronaut", "white", "en") == "an astronaut in white"
    assert noun_phrase("bicycle", "orange", "en") == "an orange bicycle"
    assert noun_phrase("car", "red", "en", "big") == "a big red car"
    assert noun_phrase("reader", "blue", "en", "big") == "an old reader in blue"  # people are not called big
    assert noun_phrase("car", "red", "zh", "big") == "一辆红色的大汽车"
    assert noun_phrase("astronaut", "white", "zh") == "一名穿白色衣服的宇航员"
    assert noun_phrase("panda", None, "zh") == "一只熊猫"


@pytest.mark.parametrize("lang", w.LANGUAGES)
@pytest.mark.parametrize("write", [caption, description])
@pytest.mark.parametrize("split", ["exam", "train", "text"])
def test_captions_and_descriptions_are_read_back_exactly(write, lang, split):
    for number, scene in enumerate(scenes_of(split, 250)):
        facts = read_facts(write(scene, lang, random_stream("test", number)))
        assert (facts.things, facts.setting) == (facts_of(scene), scene.setting)


def sentences(text: str, lang: str) -> list[str]:
    return re.split(r"(?<=\.) ", text) if lang == "en" else [f"{part}。" for part in text.split("。") if part]


def only_key(words: dict[str, str], text: str) -> str:
    """Which one of these words is in a text; the test fails where it is none or several."""
    (match,) = (name for name, word in words.items() if word in text.lower())
    return match


@pytest.mark.parametrize("lang", w.LANGUAGES)
def test_a_description_says_of_each_thing_where_it_is_how_far_and_whether_it_is_big(lang):
    for number, scene in enumerate(scenes_of("exam", 200)):
        opening, *middle, closing = sentences(description(scene, lang, random_stream(number)), lang)
        assert read_facts(opening).setting == scene.setting
        for thing, sentence in zip(in_reading_order(scene), middle, strict=True):
            assert read_facts(sentence).things == ((thing.kind, thing.colour),)
            assert only_key(w.PLACE_WORDS[lang], sentence) == thing.place
            assert only_key(w.DISTANCE_WORDS[lang], sentence) == thing.distance
            big = re.search(r"\bbig\b|大", sentence) is not None
            assert big == (thing.size == "big" and thing.kind not in w.PEOPLE)
        if "in all" in closing or "一共" in closing:
            assert w.NUMBERS[lang][len(scene.things)] in closing


# ---- the teacher's noise


@pytest.mark.parametrize("lang", w.LANGUAGES)
def test_without_noise_nothing_is_untrue_and_with_full_noise_exactly_one_thing(lang):
    for number, scene in enumerate(scenes_of("train", 300)):
        texts = [description(scene, lang, random_stream("noise", number), noise) for noise in (0.0, 1.0)]
        clean, noisy = map(read_facts, texts)
        assert clean.things == facts_of(scene)
        assert noisy.things[:-1] == facts_of(scene) and noisy.setting == scene.setting
        kind, colour = noisy.things[-1]
        here = {thing.kind for thing in scene.things}
        assert kind not in here and (colour is None) == (kind in COLOURLESS)
        if not here >= set(USUAL[scene.setting]):
            assert kind in USUAL[scene.setting]  # plausible


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_noise_is_the_share_of_descriptions_with_something_untrue(noise):
    """Within three standard errors over 1,000 descriptions."""
    scenes = scenes_of("text", 1000)
    untrue = sum(
        len(read_facts(description(scene, "en", random_stream("share", i), noise)).things) > len(scene.things)
        for i, scene in enumerate(scenes)
    )
    assert untrue / 1000 == pytest.approx(noise, abs=3 * (noise * (1 - noise) / 1000) ** 0.5)


# ---- questions


@cache
def questions_by_type(lang: str) -> dict[str, list]:
    """type -> (scene, question), over 300 scenes of each of two splits."""
    by_type = {type_: [] for type_ in w.QUESTION_TYPES}
    for split in ("exam", "train"):
        for i, scene in enumerate(scenes_of(split, 300)):
            for question in questions(scene, lang, random_stream("asked", split, i)):
                by_type[question.type].append((scene, question))
    return by_type


TIMES_OF_DAY = {
    "en": {"beach": "evening", "street": "night", "space": "dark", "day": "day"},
    "zh": {"beach": "傍晚", "street": "夜晚", "space": "很暗", "day": "白天"},
}


def is_right(scene: Scene, type_: str, text: str, answer: str, lang: str) -> bool:
    """Whether an answer is right, worked out from the question's text and the facts alone."""
    named, stated = read_facts(text).things, read_facts(answer)
    if type_ == "what":
        place = only_key(w.PLACE_WORDS[lang], text)
        here = {(thing.kind, thing.colour) for thing in scene.things if thing.place == place}
        return set(stated.things) == here and (bool(here) or answer == w.NOTHING[lang])
    if type_ == "setting":
        return stated.setting == scene.setting
    if type_ == "time":
        return only_key(TIMES_OF_DAY[lang], answer) == (scene.setting if scene.setting in TIMES_OF_DAY[lang] else "day")
    if type_ == "total":
        return answer == _counted(len(scene.things), "样", lang)
    if type_ == "count":
        if lang == "en":  # "birds" is not read as a bird: a question names no thing that is there
            named = [(kind, None) for kind, noun in w.KIND_WORDS["en"].items() if f"many {noun}s " in text]
        ((kind, _),) = named
        assert lang == "en" or f"{w.MEASURES[kind]}{w.KIND_WORDS['zh'][kind]}" in text
        return answer == _counted(sum(thing.kind == kind for thing in scene.things), w.MEASURES[kind], lang)
    if type_ == "exists":
        ((kind, _),) = named
        return answer == (w.YES if kind in {thing.kind for thing in scene.things} else w.NO)[lang]
    meant = [_meant(scene, kind, colour) for kind, colour in named]
    if type_ == "compare":
        first = min(meant, key=lambda thing: PLACES.index(thing.place))
        return stated.things == ((first.kind, first.colour),)
    (thing,) = meant
    if type_ == "colour":
        return answer.lower().rstrip(".。") == w.COLOUR_WORDS[lang][thing.colour]
    place, distance = w.PLACE_WORDS[lang][thing.place], w.DISTANCE_WORDS[lang][thing.distance]
    expected = {"distance": (distance,), "where": (place, distance)}[type_]
    return answer.lower().rstrip(".。") == (", " if lang == "en" else "的").join(expected)


def _counted(number: int, measure: str, lang: str) -> str:
    words = ("Zero.", "One.", "Two.", "Three.", "Four.")
    return words[number] if lang == "en" else f"{'零一两三四'[number]}{measure}。"


def _meant(scene: Scene, kind: str, colour: str | None) -> Thing:
    """The one thing of its kind; the colour that a question gives it must be its own."""
    (thing,) = (thing for thing in scene.things if thing.kind == kind)
    assert colour in (None, thing.colour)
    return thing


@pytest.mark.parametrize("lang", w.LANGUAGES)
@pytest.mark.parametrize("type_", w.QUESTION_TYPES)
def test_the_answer_to_a_question_is_what_its_text_and_the_facts_give(type_, lang):
    pairs = questions_by_type(lang)[type_]
    assert len(pairs) > 300
    for scene, question in pairs:
        assert is_right(scene, type_, question.text, question.answer, lang)


@pytest.mark.parametrize("lang", w.LANGUAGES)
@pytest.mark.parametrize("type_", w.QUESTION_TYPES)
def test_any_other_answer_to_a_question_is_wrong(type_, lang):
    pairs = questions_by_type(lang)[type_][:60]
    answers = sorted({question.answer for _, question in pairs})
    assert len(answers) > 1
    for scene, question in pairs:
        for other in answers:
            same = type_ == "what" and set(read_facts(other).things) == set(read_facts(question.answer).things)
            if other != question.answer and not same:
                assert not is_right(scene, type_, question.text, other, lang)


@pytest.mark.parametrize("lang", w.LANGUAGES)
def test_what_has_no_exact_answer_is_not_asked(lang):
    """With two cars, "the car" is ambiguous. Of two things at the same place none is further left."""
    cars = (Thing("car", "red", "left", "near", "medium"), Thing("car", "blue", "right", "near", "medium"))
    panda = (Thing("panda", None, "left", "near", "medium"), Thing("dog", "red", "left", "far", "small"))
    unasked = {cars: {"where", "colour", "distance", "compare"}, panda[:1]: {"colour", "compare"}, panda: {"compare"}}
    for things, types in unasked.items():
        for number in range(20):
            actual = {question.type for question in questions(Scene("park", things, 1), lang, random_stream(number))}
            assert actual == set(w.QUESTION_TYPES) - types


@pytest.mark.parametrize("lang", w.LANGUAGES)
def test_half_of_the_yes_or_no_questions_are_to_be_answered_with_yes(lang):
    answers = [question.answer for _, question in questions_by_type(lang)["exists"]]
    assert answers.count(w.YES[lang]) / len(answers) == pytest.approx(0.5, abs=3 * (0.25 / len(answers)) ** 0.5)
