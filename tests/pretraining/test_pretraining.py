"""The base models: tokenizer, corpus, word mosaics, the encoder's losses, and a loop that can be killed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from minivlm.checkpoint import load_checkpoint
from minivlm.config import IGNORE_INDEX, IMAGE_TOKEN
from minivlm.pretraining import build, encoder, language_model, loop
from minivlm.pretraining.reading_tasks import Lexicon, associative_recall, mosaic, ordered_listing
from minivlm.pretraining.tokenizer import train_tokenizer
from minivlm.processor import MiniVLMProcessor
from minivlm.scenes import vocabulary as w
from minivlm.scenes.corpus import (
    answered_prompts,
    listed_scene,
    listing_of,
    plain_text,
    small_talk,
    tokenizer_corpus,
    translation,
)
from minivlm.scenes.drawing import gallery
from minivlm.scenes.drawing.draw import draw, layout
from minivlm.scenes.drawing.gallery import drawing_key, program_key
from minivlm.scenes.facts import HELD_OUT_COLOURS, Scene, Thing, random_stream, sample_scene
from minivlm.scenes.language import in_reading_order, read_facts
from minivlm.train import text_probe

RED_CAR = Thing("car", "red", "left", "near", "medium")
PARK = Scene("park", (RED_CAR,), 7)


@pytest.fixture(scope="module")
def world_tokenizer():
    return train_tokenizer(tokenizer_corpus(1500), 900)


@pytest.fixture
def reader(make_model, config, world_tokenizer):
    config.text_config.vocab_size, config.image_token_id = 900, 900
    model = language_model.build(config, seed=0)
    processor = MiniVLMProcessor.for_config(config, world_tokenizer)
    recipe, lessons = language_model.ROUNDS[1]
    return language_model.LanguageModelTrainer(
        model, processor, replace(recipe, steps=4, batch_size=6), lessons, bf16=False
    )


def test_tokenizer_ids_and_words(world_tokenizer):
    tok = world_tokenizer
    assert [tok.pad_token_id, tok.bos_token_id, tok.eos_token_id] == [0, 1, 2]
    assert tok.convert_tokens_to_ids(IMAGE_TOKEN) == 900 == tok.vocab_size  # one past the model's vocabulary
    for lang, space in (("en", " "), ("zh", "")):
        for word in w.COLOUR_WORDS[lang].values():
            assert len(tok.encode(space + word, add_special_tokens=False)) == 1, word
    text = "夜晚的城市街道上有一辆红色的大汽车, naïve 🐼"
    assert tok.decode(tok.encode(text, add_special_tokens=False)) == text


def test_tokenizer_refuses_too_little_text():
    with pytest.raises(ValueError, match="pass more texts"):
        train_tokenizer(["a"], 5000)


def test_corpus_is_true_and_reproducible():
    for index in range(60):
        assert plain_text(index) == plain_text(index)
        assert read_facts(plain_text(index)).setting == sample_scene("text", index).setting
        conversation = listed_scene(index)
        assert conversation == listed_scene(index)
        listing = read_facts(conversation[0]["content"].split("\n")[0])
        assert set(listing.things) == {(t.kind, t.colour) for t in sample_scene("text", index).things}
        one, two = translation(index)
        assert read_facts(one["content"]).things == read_facts(two["content"]).things
        assert [m["role"] for m in small_talk(index)] == ["user", "assistant"]


def test_answered_prompts_are_distinct_and_answered():
    turns = answered_prompts(sample_scene("text", 3), "zh", random_stream("t"), turns=4)
    prompts = [m["content"] for m in turns[::2]]
    assert len(turns) == 8 and len(set(prompts)) == 4
    assert all(m["role"] == "assistant" and m["content"] for m in turns[1::2])


def test_mosaic_says_what_stands_where(world_tokenizer):
    lexicon = Lexicon.of(world_tokenizer)
    side, left, right = 8, 0, 0
    for seed in range(20):
        scene = replace(PARK, seed=seed)
        ids, weights = mosaic(scene, side, lexicon, random_stream("mosaic", seed))
        assert ids.shape == weights.shape == (side * side, 5)
        assert ((ids == 0) == (weights == 0)).all()
        red = {lexicon.colours[lang]["red"] for lang in w.LANGUAGES}
        says_red = np.isin(ids[:, 0], list(red)).reshape(side, side)
        left, right = left + says_red[:, :4].sum(), right + says_red[:, 5:].sum()
        parks = {lexicon.settings[lang]["park"] for lang in w.LANGUAGES}
        assert set(ids[weights[:, 4] > 0, 4]) <= parks
    assert left > 60 and right == 0


def test_associative_recall_asks_for_what_is_true_and_supervises_no_key(world_tokenizer, monkeypatch):
    monkeypatch.setattr("minivlm.pretraining.reading_tasks.KEYS", 3)
    tree = Thing("tree", "green", "right", "far", "medium")
    lexicon = Lexicon.of(world_tokenizer)
    ids, labels = associative_recall(replace(PARK, things=(RED_CAR, tree)), lexicon, "en", random_stream("drill"))
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))
    pieces: list[list[list[int]]] = []  # [key, supervised ids] of every item
    for token, label in zip(ids, labels, strict=True):
        if label == IGNORE_INDEX and (not pieces or pieces[-1][1]):
            pieces.append([[], []])
        pieces[-1][label != IGNORE_INDEX].append(token)
    pairs = [tuple(world_tokenizer.decode(part).strip() for part in piece) for piece in pieces]
    true = {
        ("car", "red left near"), ("red", "car left near"), ("left near", "red car"),
        ("tree", "green right far"), ("green", "tree right far"), ("right far", "green tree"),
    }  # fmt: skip
    no = world_tokenizer.decode([lexicon.no["en"]])
    absent = [key for key, answer in pairs if answer == no]
    assert len(pairs) == 8 and len(set(absent)) == 2 and not {"car", "tree"} & set(absent)
    assert {item for item in pairs if item[1] != no} == true


def test_an_ordered_listing_names_every_thing_once_from_left_to_right(world_tokenizer):
    lexicon = Lexicon.of(world_tokenizer)
    far_tree = Thing("tree", "green", "left", "far", "medium")
    panda = Thing("panda", None, "middle", "near", "big")
    ids = ordered_listing(replace(PARK, things=(panda, far_tree, RED_CAR)), lexicon, "en")
    want = [("places", "left"), ("distances", "near"), ("colours", "red"), ("kinds", "car")]
    want += [("places", "left"), ("distances", "far"), ("colours", "green"), ("kinds", "tree")]
    want += [("places", "middle"), ("distances", "near"), ("kinds", "panda")]
    assert ids == [getattr(lexicon, table)["en"][word] for table, word in want]


def test_lessons_choose_how_many_things_there_are(reader):
    def things(lessons, kind):
        other = language_model.LanguageModelTrainer(reader.model, reader.processor, reader.recipe, lessons, bf16=False)
        return {len(other.row(kind, index)[1].things) for index in range(40)}

    lessons = reader.curriculum
    assert things(replace(lessons, crowded=1.0), "mosaic") == {3, 4}
    assert things(replace(lessons, crowded=0.0), "mosaic") == {1, 2, 3, 4}
    assert things(replace(lessons, fewest=3), "mosaic roll call") == {3, 4}
    assert things(lessons, "list drill") == {2, 3, 4}


def test_an_ambiguous_key_takes_more_words(world_tokenizer):
    lexicon = Lexicon.of(world_tokenizer)
    scene = replace(PARK, things=(RED_CAR, replace(RED_CAR, colour="blue", place="right")))
    for seed in range(10):
        ids, labels = associative_recall(scene, lexicon, "zh", random_stream("two cars", seed))
        car, colours = lexicon.kinds["zh"]["car"], set(lexicon.colours["zh"].values())
        for i in range(1, len(ids)):
            if ids[i - 1] == car and labels[i - 1] == IGNORE_INDEX and ids[i] in colours:
                assert labels[i] == IGNORE_INDEX  # which of the two cars is not to be guessed


def test_mosaic_fills_the_block_a_image_will_fill(reader):
    for kind in ("mosaic", "mosaic drill", "mosaic roll call"):
        row, scene = reader.row(kind, 0)
        batch = reader.processor.collate([row])
        plain = reader.embed(batch, [], random_stream("m"))
        filled = reader.embed(batch, [scene], random_stream("m"))
        differs = (plain != filled).any(-1)
        assert torch.equal(differs, batch["input_ids"] == reader.processor.image_token_id)


def test_batches_take_turns_and_depend_on_the_step_alone(reader):
    first, again, other = (reader.step_loss(step)[0].item() for step in (0, 0, 2))
    assert first == again != other
    kinds = [reader.step_loss(step)[1]["kind"] for step in range(len(reader.curriculum.batches))]
    assert tuple(kinds) == reader.curriculum.batches and set(kinds) == {"mosaic", "text", *language_model.RECALL}


def test_lists_in_reading_order_and_shuffled():
    scene = sample_scene("text", 3)
    inorder = listing_of(scene, "en", random_stream("l"), shuffled=False)
    assert [t.kind for t in in_reading_order(scene)] == [kind for kind, _ in read_facts(inorder).things]
    shuffled = {listing_of(scene, "en", random_stream("l", i)) for i in range(8)}
    assert len(shuffled) > 2 and {len(text) for text in shuffled} == {len(inorder)}


def test_text_rows_supervise_everything_after_the_first_token(reader):
    row = reader._text_row(0)
    assert row.labels == [IGNORE_INDEX, *row.input_ids[1:]]
    assert row.input_ids[-1] == reader.processor.tokenizer.eos_token_id


def test_random_model_captions_score_zero(reader):
    scores = reader.captions("en", 4, "mosaic")
    assert scores["recall"] < 0.2 and scores["pairs"] == 10


def test_naming_score_is_the_soft_maximum_over_patches():
    head = encoder.NamingHead(6)
    patches = torch.randn(2, 5, 6)
    scores = head(patches)
    kinds, hues, places, distances = head.words(patches).split((16, 9, 3, 2), dim=-1)
    pair, slot = encoder.PAIRS.index(("dog", "pink")), encoder.SLOTS.index(("right", "far"))
    by_hand = (kinds[..., 1] + hues[..., 6] + places[..., 2] + distances[..., 1]).logsumexp(1)
    torch.testing.assert_close(scores[:, pair, slot], by_hand)


def test_held_out_pairs_are_in_no_class_list():
    assert not set(encoder.PAIRS) & HELD_OUT_COLOURS
    assert len(encoder.PAIRS) == 15 * 8 + 1 - len(HELD_OUT_COLOURS)


def test_training_pixels_are_the_image_processors():
    images = np.stack([np.asarray(draw(sample_scene("dev", i)).resize((112, 112), 3)) for i in range(2)])
    processor = CLIPImageProcessorPil(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112})
    expected = processor([draw(sample_scene("dev", i)) for i in range(2)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(encoder.normalised(images), expected)


def test_mirrored_facts_belong_to_the_mirrored_image():
    mirrored = encoder._mirrored(PARK)
    assert mirrored.things[0] == replace(RED_CAR, place="right")
    assert encoder._mirrored(mirrored) == PARK


def test_covered_patches_lie_in_the_box():
    scene = sample_scene("exam", 3)
    for box in layout(scene):
        for patch in encoder.covered(box, 8):
            x, y = (patch % 8 + 0.5) / 8, (patch // 8 + 0.5) / 8
            assert box[0] - 0.07 < x < box[2] + 0.07 and box[1] - 0.07 < y < box[3] + 0.07


def test_encoder_trains_probes_and_resumes(config, world_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "PROBE_FIT", 30)
    monkeypatch.setattr(encoder, "PROBE_TEST", 20)
    config.vision_config.image_size, config.vision_config.patch_size = 28, 7
    recipe = loop.Recipe(steps=4, batch_size=4, muon_lr=0.02, adam_lr=1e-3, warmup=2, save_every=2)

    def weights(folder, steps):
        trained, metrics = encoder.train(
            config.vision_config, world_tokenizer, folder, False, replace(recipe, steps=steps), pictures=16, workers=1
        )
        return trained.state_dict(), metrics

    whole, metrics = weights(tmp_path / "whole", 4)
    assert 0 <= metrics["setting"] <= 1 and "near, 1 in the picture" in metrics["kind"]
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [0, 1, 2, 3]
    real = encoder.EncoderTrainer.step_loss

    def killed(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(encoder.EncoderTrainer, "step_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "again", 4)
    monkeypatch.setattr(encoder.EncoderTrainer, "step_loss", real)
    resumed, _ = weights(tmp_path / "again", 4)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(ValueError, match="another recipe"):
        weights(tmp_path / "again", 5)


def test_the_whole_base_from_one_call(config, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "PROBE_FIT", 30)
    monkeypatch.setattr(encoder, "PROBE_TEST", 20)
    monkeypatch.setattr(build, "CORPUS_DOCUMENTS", 3000)
    monkeypatch.setattr(build, "preset_config", lambda name, vocab_size: _sized(config, vocab_size))
    recipe = loop.Recipe(steps=2, batch_size=4, muon_lr=0.02, adam_lr=1e-3, warmup=1)
    rounds = [(replace(recipe, seed=i), lessons) for i, (_, lessons) in enumerate(language_model.ROUNDS)]
    options = {"encoder_recipe": recipe, "language_rounds": rounds, "pictures": 16, "workers": 1, "exam": 2}
    out, work = tmp_path / "base", tmp_path / "work"
    assert build.build_base(out, work, only="tokenizer", **options) is None
    assert build.build_base(out, work, command="minivlm base --out 'my base'", **options) == out
    model, processor, meta = load_checkpoint(out)
    assert meta["stage"] == "base" and meta["text_probe"] == pytest.approx(text_probe(model, processor), abs=1e-6)
    assert meta["command"] == "minivlm base --out 'my base'"
    drawing, programs = {"drawing": drawing_key()}, {"corpus": program_key(build.CORPUS)}
    assert meta["made_from"] == {"encoder": [drawing], "language_model": [drawing | programs]}
    names = {file.name for file in build.CORPUS}
    assert names == {"corpus.py", "reading_tasks.py", "vocabulary.py", "language.py"}
    assert meta["recipes"]["encoder"]["pictures"] == 16 and len(meta["recipes"]["language_model"]) == len(rounds)
    assert {file.name for file in out.glob("*.log.jsonl")} == {"encoder.log.jsonl", "language_model.log.jsonl"}
    with pytest.raises(ValueError, match="choose one of"):
        build.build_base(out, work, only="eyes")


def test_a_tokenizer_is_whole_or_not_there(world_tokenizer, tmp_path, monkeypatch):
    folder, real = tmp_path / "work" / "tokenizer", PreTrainedTokenizerFast.save_pretrained
    monkeypatch.setattr(build, "train_tokenizer", lambda texts: world_tokenizer)

    def killed(self, where):
        real(self, where)
        (Path(where) / "tokenizer_config.json").unlink()  # not yet written
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        build._tokenizer(folder)
    assert not folder.exists()
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", real)
    tokenizer = build._tokenizer(folder)
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
    assert [path.name for path in folder.parent.iterdir()] == ["tokenizer"]
    monkeypatch.setattr(build, "train_tokenizer", lambda texts: pytest.fail("made again"))
    assert build._tokenizer(folder).get_vocab() == tokenizer.get_vocab()


def test_another_process_may_make_the_same_tokenizer(world_tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"

    def slow(texts):
        world_tokenizer.save_pretrained(folder)
        return world_tokenizer

    monkeypatch.setattr(build, "train_tokenizer", slow)
    assert build._tokenizer(folder).get_vocab() == world_tokenizer.get_vocab()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_programs_are_noted_as_they_were_at_each_start(tmp_path):
    part = tmp_path / "language_model"
    one, two = {"corpus": "a"}, {"corpus": "b"}
    assert build._note(part, one) == [one]
    assert build._note(part, two) == [two]  # nothing was trained with the first
    (part / "round1").mkdir()
    (part / "round1" / "state.pt").touch()
    assert build._note(part, two) == [two]
    assert build._note(part, one) == build._note(part, one) == [two, one]


@pytest.mark.parametrize("old", ["another program", "no key", "cut off"])
def test_images_of_another_program_are_drawn_again(old, tmp_path, monkeypatch):
    file = tmp_path / "dev.npy"
    drawn = np.array(gallery.cached_pictures(file, "dev", 2, 28, workers=1))
    if old == "another program":
        monkeypatch.setattr(gallery, "drawing_key", lambda: "f" * 64)
    elif old == "no key":  # as it was kept before there were keys
        np.save(file, drawn)
    else:
        file.write_bytes(file.read_bytes()[:40])
    calls = []
    monkeypatch.setattr(gallery, "draw_many", lambda *args: calls.append(args) or 255 - drawn)
    for _ in range(2):
        assert np.array_equal(gallery.cached_pictures(file, "dev", 2, 28), 255 - drawn)
    assert len(calls) == 1


def test_the_drawing_key_follows_the_programs_text(tmp_path, monkeypatch):
    (tmp_path / "drawing").mkdir()
    for name in ("facts.py", "drawing/draw.py", "drawing/ink.py"):
        (tmp_path / name).write_text(f"# {name}\n", "utf-8")
    monkeypatch.setattr(gallery, "__file__", str(tmp_path / "drawing" / "gallery.py"))
    before = gallery.drawing_key()
    assert gallery.drawing_key() == before
    (tmp_path / "drawing" / "ink.py").write_text("# another ink\n", "utf-8")
    assert gallery.drawing_key() != before


def test_the_language_model_resumes(config, world_tokenizer, tmp_path, monkeypatch):
    """Stopped between the rounds, and in the second one: from the last state on."""
    config.text_config.vocab_size, config.image_token_id = 900, 900
    processor = MiniVLMProcessor.for_config(config, world_tokenizer)
    recipe = loop.Recipe(steps=4, batch_size=3, muon_lr=0.02, adam_lr=1e-3, warmup=1, save_every=2)
    rounds = [(replace(recipe, seed=i), lessons) for i, (_, lessons) in enumerate(language_model.ROUNDS[:2])]
    real, steps, kill_at = language_model.LanguageModelTrainer.step_loss, [], None

    def noted(self, step):
        steps.append((self.recipe.seed + 1, step))
        if steps[-1] == kill_at:
            raise KeyboardInterrupt
        return real(self, step)

    def weights(folder):
        return language_model.train(processor, config, folder, bf16=False, rounds=rounds, exam=2)[0].state_dict()

    whole = weights(tmp_path / "whole")
    monkeypatch.setattr(language_model.LanguageModelTrainer, "step_loss", noted)
    for stop in (0, 3):
        folder, kill_at = tmp_path / f"stopped at {stop}", (2, stop)
        with pytest.raises(KeyboardInterrupt):
            weights(folder)
        kill_at = None
        steps.clear()
        resumed = weights(folder)
        assert steps == [(2, step) for step in range(stop // 2 * 2, 4)]
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
        for number in (1, 2):
            log = (folder / f"round{number}" / "log.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in log] == [0, 1, 2, 3]


def _sized(config, vocab_size):
    config.vision_config.image_size, config.vision_config.patch_size = 28, 7
    config.text_config.vocab_size = config.image_token_id = vocab_size
    return config


def test_cosine_by_hand():
    recipe = loop.Recipe(steps=110, batch_size=1, muon_lr=1, adam_lr=1, warmup=10, final_share=0.1)
    assert loop.cosine(0, recipe) == pytest.approx(0.1)
    assert loop.cosine(9, recipe) == pytest.approx(1.0)
    assert loop.cosine(60, recipe) == pytest.approx(0.55)


def test_muon_takes_hidden_matrices_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3)])
            self.head = nn.Linear(3, 3)

    net = Net()
    muon, adam = loop.optimizers(net, loop.Recipe(steps=1, batch_size=1, muon_lr=0.1, adam_lr=0.1))
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(net.layers[0].weight)]
    assert len([p for g in adam.param_groups for p in g["params"]]) == 3


def test_muon_is_the_librarys_but_for_the_rounding_of_its_bfloat16():
    torch.manual_seed(0)
    options = {"lr": 0.02, "weight_decay": 0.01, "momentum": 0.95}
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (24, 8), (8, 24))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = loop.Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for _ in range(3):
        for p, other in zip(ours, theirs, strict=True):
            p.grad = other.grad = torch.randn(p.shape)
        for optimizer in optimizers:
            optimizer.step()
    for p, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, other, rtol=0, atol=1e-3)  # a step moves an entry by about 0.01
