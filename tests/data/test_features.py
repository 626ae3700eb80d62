"""The cache of frozen features: equal to what the encoder says about the processor's pixels, and never stale."""

import numpy as np
import pytest
import torch
from PIL import Image

import minivlm.data.features
import minivlm.scenes.drawing.gallery
from minivlm.data.features import FeatureCache, FeatureError, encode, pixel_batches
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.drawing.gallery import draw_many
from minivlm.scenes.facts import sample_scene

SCENES = [sample_scene("dev", i) for i in range(3)]


@pytest.fixture
def never_draw(monkeypatch):
    """After this, whoever draws fails the test."""

    def refuse(*args):
        raise AssertionError("nothing should be drawn here")

    return lambda: monkeypatch.setattr(minivlm.scenes.drawing.gallery, "draw_many", refuse)


@pytest.fixture
def drawings(monkeypatch):
    """The list of how many scenes were drawn, time after time."""
    counts = []

    def counted(scenes, *args):
        counts.append(len(scenes))
        return draw_many(scenes, *args)

    monkeypatch.setattr(minivlm.scenes.drawing.gallery, "draw_many", counted)
    return counts


def test_pixels_are_the_image_processors_to_the_last_bit(processor):
    pictures = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)
    ours = torch.cat(list(pixel_batches(processor, pictures)))
    assert torch.equal(ours, processor.pixels([Image.fromarray(picture) for picture in pictures]))


def test_a_drawn_picture_is_shrunk_as_the_image_processor_shrinks_it(processor):
    side = processor.image_processor.crop_size["height"]
    ours = torch.cat(list(pixel_batches(processor, draw_many(SCENES, side, workers=1))))
    assert torch.equal(ours, processor.pixels([draw(scene) for scene in SCENES]))


def test_pictures_of_another_size_are_refused(processor):
    with pytest.raises(FeatureError, match=r"shape \(9, 8, 3\), but the encoder's is \(8, 8, 3\)"):
        next(pixel_batches(processor, np.zeros((1, 9, 8, 3), dtype=np.uint8)))


def test_features_are_what_the_encoder_sees(model, processor):
    cache = FeatureCache.of_scenes(model, processor, SCENES, workers=1)
    seen = model.vision(processor.pixels([draw(scene) for scene in SCENES]))  # (3, N, Dv)
    assert cache.features.shape == seen.shape and cache.features.dtype == torch.bfloat16
    assert torch.equal(cache.features, seen.bfloat16())
    assert torch.equal(cache[[2, 0]], seen[[2, 0]].bfloat16())
    assert len(cache) == 3


def test_many_batches_come_out_in_order(model, config):
    random = torch.Generator().manual_seed(1)
    batches = [torch.randn(size, 3, 8, 8, generator=random) for size in (2, 3, 1)]
    features = encode(model, iter(batches), 6)
    torch.testing.assert_close(features, model.vision(torch.cat(batches)).bfloat16())


def test_half_precision_encodes_nearly_the_same(model, processor):
    exact = FeatureCache.of_scenes(model, processor, SCENES, workers=1).features.float()
    rough = FeatureCache.of_scenes(model, processor, SCENES, precision="bf16", workers=1).features.float()
    assert not torch.equal(exact, rough)
    assert (exact - rough).norm() < 0.05 * exact.norm()


def test_pictures_of_any_kind_are_found_by_path_or_number(model, processor, picture, tmp_path):
    picture.save(tmp_path / "one.png")
    cache = FeatureCache.of_pictures(model, processor, [tmp_path / "one.png", picture])
    assert torch.equal(cache[[tmp_path / "one.png"]], cache[[1]])
    assert torch.equal(cache[[1]], model.vision(processor.pixels([picture])).bfloat16())


def test_an_unknown_picture_is_named(model, processor, picture):
    cache = FeatureCache.of_pictures(model, processor, [picture])
    with pytest.raises(FeatureError, match=r"no features of the picture 'cat\.jpg' among these 1"):
        cache[[0, "cat.jpg"]]


def test_names_must_be_one_for_each_picture():
    with pytest.raises(FeatureError, match="1 different names for 2 pictures"):
        FeatureCache(torch.zeros(2, 4, 16), ["a.jpg", "a.jpg"])
    with pytest.raises(FeatureError, match="3 different names for 2 pictures"):
        FeatureCache(torch.zeros(2, 4, 16), ["a", "b", "c"])


# ---- the file


def test_what_is_kept_is_not_drawn_again(model, processor, tmp_path, never_draw):
    file = tmp_path / "new folder" / "features.safetensors"
    first = FeatureCache.of_scenes(model, processor, SCENES, file, workers=1)
    never_draw()
    second = FeatureCache.of_scenes(model, processor, SCENES, file, workers=1)
    assert torch.equal(first.features, second.features)
    assert [path.name for path in file.parent.iterdir()] == ["features.safetensors"]


@pytest.mark.parametrize("change", ["encoder", "scenes", "precision", "drawing", "image processor", "file"])
def test_stale_features_are_made_again(change, model, make_model, processor, tmp_path, drawings, monkeypatch):
    file, scenes, precision = tmp_path / "features.safetensors", SCENES, "fp32"
    FeatureCache.of_scenes(model, processor, scenes, file, workers=1)
    if change == "encoder":
        model = make_model(seed=1)
    elif change == "scenes":
        scenes = [*SCENES[:2], sample_scene("dev", 9)]
    elif change == "precision":
        precision = "bf16"
    elif change == "drawing":
        monkeypatch.setattr(minivlm.scenes.drawing.gallery, "drawing_key", lambda: "another way to draw")
    elif change == "image processor":
        processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    else:
        file.write_bytes(file.read_bytes()[:-7])
    again = FeatureCache.of_scenes(model, processor, scenes, file, precision, workers=1)
    assert drawings == [3, 3]
    monkeypatch.setattr(minivlm.data.features, "_read", lambda *args: None)
    fresh = FeatureCache.of_scenes(model, processor, scenes, None, precision, workers=1)
    assert torch.equal(again.features, fresh.features)


def test_the_language_model_may_change_under_the_cache(model, processor, tmp_path, never_draw):
    file = tmp_path / "features.safetensors"
    FeatureCache.of_scenes(model, processor, SCENES, file, workers=1)
    model.projector.weight.data += 1
    never_draw()
    FeatureCache.of_scenes(model, processor, SCENES, file, workers=1)


def test_a_full_disk_is_told_and_leaves_nothing(model, processor, tmp_path, monkeypatch):
    file = tmp_path / "features.safetensors"

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise minivlm.data.features.safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(minivlm.data.features.safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"not kept in .*features\.safetensors.*free some space"):
        FeatureCache.of_scenes(model, processor, SCENES, file, workers=1)
    assert list(tmp_path.iterdir()) == []
