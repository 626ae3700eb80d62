"""How far a picture is from the drawn world: the distance, its two files, and what was measured with it."""

import json

import matplotlib
import numpy as np
import pytest
import torch
from lessons.familiar import (
    SHRINKAGE,
    Familiar,
    FamiliarError,
    distance_figure,
    fit,
    load_familiar,
    read_report,
    save_familiar,
)
from sklearn.covariance import ShrunkCovariance

from minivlm.checkpoint import load_checkpoint
from minivlm.data.images import open_image
from minivlm.runtime.paths import data_folder
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.facts import sample_scene

REPORT = {"groups": {}, "scenes": [0.8, 1.0, 1.1], "photographs": {"a": 3.0, "b": 4.0}, "command": "by hand"}


@pytest.fixture
def features():
    """Of 50 pictures with 4 patches, uneven in their directions, (I, N, Dv)."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(50, 4, 6, generator=generator) * torch.tensor([1, 2, 3, 0.5, 1, 1]) + 5


@pytest.fixture(scope="module")
def shipped():
    """The base model, its processor, and what was measured for its encoder."""
    model, processor, _ = load_checkpoint(data_folder() / "base")
    return model, processor, load_familiar(model)


class TestDistance:
    def test_it_is_the_mahalanobis_distance_of_the_library(self, features):
        ours = fit(features)
        seen = features.mean(dim=1).numpy().astype(np.float64)
        count = len(seen)
        # the library divides by I, torch.cov by I - 1; a distance in the wider spread is shorter
        theirs = ShrunkCovariance(shrinkage=SHRINKAGE).fit(seen).mahalanobis(seen) * (count - 1) / count
        np.testing.assert_allclose(ours.distances(features).numpy(), np.sqrt(theirs / 6), rtol=1e-4)

    def test_pictures_that_were_fitted_have_about_one(self, features):
        assert fit(features).distances(features).pow(2).mean().item() == pytest.approx(
            1, abs=0.1
        )  # shrinkage takes a little

    def test_one_picture_is_measured_as_among_many(self, features):
        familiar = fit(features)
        assert familiar.distance(features[3:4]) == pytest.approx(familiar.distances(features)[3].item(), rel=1e-6)

    def test_far_is_beyond_the_threshold_and_is_said_with_both_numbers(self, features):
        familiar = fit(features, threshold=2.0)
        assert [familiar.is_far(distance) for distance in (1.9, 2.0, 2.1)] == [False, False, True]
        assert familiar.warning(2.0) == ""
        assert "2.5" in familiar.warning(2.5) and "2.0" in familiar.warning(2.5)


class TestFiles:
    def test_what_is_saved_is_loaded(self, model, features, tmp_path):
        familiar = fit(features, threshold=1.5)
        save_familiar(tmp_path, familiar, model, REPORT)
        loaded = load_familiar(model, tmp_path)
        assert torch.equal(loaded.mean, familiar.mean) and torch.equal(loaded.whiten, familiar.whiten)
        assert loaded.threshold == 1.5 and read_report(tmp_path)["photographs"] == REPORT["photographs"]

    def test_another_encoder_is_refused(self, make_model, features, tmp_path):
        save_familiar(tmp_path, fit(features), make_model(0), REPORT)
        with pytest.raises(FamiliarError, match=r"another encoder.*scripts/familiar\.py"):
            load_familiar(make_model(1), tmp_path)

    def test_missing_files_are_named_with_their_command(self, model, tmp_path):
        with pytest.raises(FamiliarError, match=r"familiar\.json is missing.*scripts/familiar\.py"):
            load_familiar(model, tmp_path)


def test_the_figure_says_how_many_and_marks_what_is_at_hand():
    figure = distance_figure(REPORT | {"threshold": 2.0}, {"yours": 3.5})
    written = [text.get_text() for text in figure.axes[0].texts]
    assert "yours" in written and "3 drawn scenes" in written and "2 photographs" in written
    assert any("2.00" in text for text in written)


class TestShipped:
    def test_scenes_are_near_and_the_photograph_is_far(self, shipped):
        model, processor, familiar = shipped
        photograph = open_image(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg")
        pictures = [*(draw(sample_scene("exam", i)) for i in (1, 2, 3)), photograph]
        with torch.no_grad():
            *scenes, photo = familiar.distances(model.vision(processor.pixels(pictures))).tolist()
        assert [familiar.is_far(distance) for distance in (*scenes, photo)] == [False, False, False, True]
        report = read_report()
        assert scenes == pytest.approx(report["scenes"][1:4], abs=0.01)
        assert photo == pytest.approx(report["photographs"]["matplotlib/grace_hopper.jpg"], abs=0.05)

    def test_the_counts_follow_from_the_distances(self):
        report = read_report()
        for group, distances in (("exam scenes", report["scenes"]), ("photographs", report["photographs"].values())):
            counted = report["groups"][group]
            assert counted["pictures"] == len(distances)
            assert counted["far"] == sum(distance > report["threshold"] for distance in distances)

    def test_few_scenes_and_most_photographs_are_far(self):
        groups = read_report()["groups"]
        for name in ("exam scenes", "holdout scenes", "exam scenes through JPEG"):
            assert groups[name]["far"] <= 0.03 * groups[name]["pictures"], name
        assert groups["photographs"]["pictures"] >= 25
        assert groups["photographs"]["far"] >= 0.9 * groups["photographs"]["pictures"]

    def test_it_belongs_to_the_encoder_of_every_shipped_model(self):
        for name in ("pretrain", "sft"):
            assert isinstance(load_familiar(load_checkpoint(data_folder() / name)[0]), Familiar)

    def test_the_file_says_how_it_was_made(self):
        report = json.loads((data_folder() / "results" / "familiar.json").read_text("utf-8"))
        assert report["command"].startswith("python tests/benchmarks/familiar.py")
