"""The cache of frozen features: equal to what the encoder says about the processor's pixels, and never stale."""

import numpy as np
import pytest
import torch
from PIL import Image

import minivlm.scenes.features
from minivlm.data.features import FeatureError, encode, encode_images, pixel_batches
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.drawing.gallery import draw_many
from minivlm.scenes.facts import sample_scene
from minivlm.scenes.features import scene_features

SCENES = [sample_scene("dev", i) for i in range(3)]


@pytest.fixture
def drawings(monkeypatch):
    """The list of how many scenes were drawn, time after time."""
    counts = []

    def counted(scenes, *args):
        counts.append(len(scenes))
        return draw_many(scenes, *args)

    monkeypatch.setattr(minivlm.scenes.features, "draw_many", counted)
    return counts


@pytest.mark.parametrize("factor", [1 / 255, 1 / 127.5])
def test_pixels_are_the_image_processors_to_the_last_bit(processor, factor, monkeypatch):
    monkeypatch.setattr(processor.image_processor, "rescale_factor", factor)
    images = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)
    ours = torch.cat(list(pixel_batches(processor, images)))
    assert torch.equal(ours, processor.pixels([Image.fromarray(image) for image in images]))


def test_images_of_another_size_are_refused(processor):
    with pytest.raises(FeatureError, match=r"shape \(9, 8, 3\), but the encoder's is \(8, 8, 3\)"):
        next(pixel_batches(processor, np.zeros((1, 9, 8, 3), dtype=np.uint8)))


def test_features_are_what_the_encoder_sees(model, processor):
    cache = scene_features(model, processor, SCENES, workers=1)
    expected = model.vision(processor.pixels([draw(scene) for scene in SCENES]))  # (3, N, Dv)
    assert cache.dtype == torch.bfloat16 and torch.equal(cache, expected.bfloat16())


def test_many_batches_come_out_in_order(model, config):
    random = torch.Generator().manual_seed(1)
    batches = [torch.randn(size, 3, 8, 8, generator=random) for size in (2, 3, 1)]
    features = encode(model, iter(batches), 6)
    torch.testing.assert_close(features, model.vision(torch.cat(batches)).bfloat16())


def test_half_precision_encodes_nearly_the_same(model, processor):
    exact = scene_features(model, processor, SCENES, workers=1).float()
    rough = scene_features(model, processor, SCENES, precision="bf16", workers=1).float()
    assert not torch.equal(exact, rough)
    assert (exact - rough).norm() < 0.05 * exact.norm()


def test_images_of_any_kind_are_encoded_in_order(model, processor, image, tmp_path):
    image.save(tmp_path / "one.png")
    grey = Image.new("RGB", (8, 8), "grey")
    features = encode_images(model, processor, [tmp_path / "one.png", grey, image])
    assert torch.equal(features, model.vision(processor.pixels([image, grey, image])).bfloat16())


# ---- the file


def test_what_is_kept_is_not_drawn_again(model, processor, tmp_path, drawings):
    """Also after the projector has changed."""
    file = tmp_path / "new folder" / "features.safetensors"
    first = scene_features(model, processor, SCENES, file, workers=1)
    model.projector.weight.data += 1
    second = scene_features(model, processor, SCENES, file, workers=1)
    assert torch.equal(first, second) and drawings == [3]
    assert [path.name for path in file.parent.iterdir()] == ["features.safetensors"]


@pytest.mark.parametrize("change", ["encoder", "scenes", "precision", "drawing", "image processor", "file"])
def test_stale_features_are_made_again(change, model, make_model, processor, tmp_path, drawings, monkeypatch):
    file, scenes, precision = tmp_path / "features.safetensors", SCENES, "fp32"
    scene_features(model, processor, scenes, file, workers=1)
    if change == "encoder":
        model = make_model(seed=1)
    elif change == "scenes":
        scenes = [*SCENES[:2], sample_scene("dev", 9)]
    elif change == "precision":
        precision = "bf16"
    elif change == "drawing":
        monkeypatch.setattr(minivlm.scenes.features, "drawing_key", lambda: "another way to draw")
    elif change == "image processor":
        processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    else:
        file.write_bytes(file.read_bytes()[:-7])
    again = scene_features(model, processor, scenes, file, precision, workers=1)
    assert drawings == [3, 3]
    monkeypatch.setattr(minivlm.scenes.features, "_read", lambda *args: None)
    fresh = scene_features(model, processor, scenes, None, precision, workers=1)
    assert torch.equal(again, fresh)


def test_a_full_disk_is_reported_and_leaves_nothing(model, processor, tmp_path, monkeypatch):
    file = tmp_path / "features.safetensors"

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise minivlm.scenes.features.safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(minivlm.scenes.features.safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"not kept in .*features\.safetensors.*free some space"):
        scene_features(model, processor, SCENES, file, workers=1)
    assert list(tmp_path.iterdir()) == []
