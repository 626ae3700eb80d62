"""Notebook 00: the map agrees with the notebooks, what is missing here is found, and distances are Mahalanobis's."""

import ast
import importlib.metadata
import json
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from familiar import save_familiar
from lessons import lesson_00
from sklearn.covariance import ShrunkCovariance

from minivlm.checkpoint import load_checkpoint
from minivlm.data.images import open_image
from minivlm.runtime.paths import data_folder
from minivlm.scenes.drawing.draw import draw
from minivlm.scenes.facts import sample_scene

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def code_of(number: str) -> str:
    (file,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    cells = json.loads(file.read_text("utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


class TestMap:
    def test_every_notebook_is_a_station(self):
        numbers = [station.number for station in lesson_00.STATIONS]
        assert [file.stem[:2] for file in sorted(NOTEBOOKS.glob("*.ipynb"))] == numbers

    @pytest.mark.parametrize("station", lesson_00.STATIONS[1:], ids=lambda station: station.number)
    def test_a_card_lights_what_its_notebook_lights(self, station):
        calls = [node for node in ast.walk(ast.parse(code_of(station.number))) if isinstance(node, ast.Call)]
        lit = [ast.literal_eval(call.args[0]) for call in calls if getattr(call.func, "attr", "") == "show_flow"]
        assert list(station.lit) in lit

    def test_minutes_are_those_measured(self):
        measured = json.loads((NOTEBOOKS / "measured.json").read_text("utf-8"))
        minutes = lesson_00.minutes_measured(NOTEBOOKS / "measured.json")
        assert minutes["03"] == pytest.approx(measured["03_projector_pretraining"]["seconds"] / 60)

    def test_the_alternative_text_names_every_station(self, monkeypatch):
        shown = []
        monkeypatch.setattr(lesson_00, "show", lambda figure, alt, summary: shown.append((alt, summary)))
        lesson_00.show_course({"01": 1.0, "03": 3.0})
        ((alt, summary),) = shown
        assert all(f"{station.number} {station.title}" in alt for station in lesson_00.STATIONS)
        assert "4 minutes" in summary


class TestEnvironment:
    def test_here_everything_is_found(self):
        findings = {finding.what: finding for finding in lesson_00.look()}
        assert {"Python", "torch", "transformers", "jupyterlab", "ipywidgets", "free memory"} <= set(findings)
        assert {f"weights in data/{name}" for name in ("base", "pretrain", "sft")} <= set(findings)
        assert "pytest" not in findings, "a reader does not need what the tests need"
        assert [finding for finding in findings.values() if not finding.enough and finding.what != "free memory"] == []

    def test_an_old_and_a_missing_package_are_named_with_what_to_do(self, monkeypatch):
        real = importlib.metadata.version

        def version(name):
            if name == "ipywidgets":
                raise importlib.metadata.PackageNotFoundError(name)
            return "1.0" if name == "torch" else real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)
        wrong = {finding.what: finding for finding in lesson_00.look() if not finding.enough}
        assert {"torch", "ipywidgets"} <= set(wrong) <= {"torch", "ipywidgets", "free memory"}
        assert wrong["ipywidgets"].here == "missing" and ">=" in wrong["torch"].advice

    def test_a_local_build_satisfies_its_version(self, monkeypatch):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0+cpu")
        assert next(finding for finding in lesson_00.look() if finding.what == "torch").enough

    def test_missing_weights_and_a_closed_folder_are_found(self, monkeypatch, tmp_path):
        def closed(**kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(lesson_00, "data_folder", lambda: tmp_path)
        monkeypatch.setattr(tempfile, "TemporaryDirectory", closed)
        wrong = {finding.what for finding in lesson_00.look() if not finding.enough} - {"free memory"}
        assert wrong == {"weights in data/base", "weights in data/pretrain", "weights in data/sft", "this folder"}

    def test_what_is_wrong_stands_first_and_open(self, monkeypatch):
        shown = []
        monkeypatch.setattr(lesson_00, "display", lambda bundle, raw: shown.append(bundle))
        lesson_00.show_environment(
            [lesson_00.Finding("Python", "3.11", True, "x"), lesson_00.Finding("torch", "<1>", False, "needs >=2.9")]
        )
        page = shown[0]["text/html"]
        assert page.index("torch") < page.index("Python") and "<details open>" in page
        assert "&lt;1&gt;" in page and shown[0]["text/plain"] == "1 of 2 things are as they should be."

    def test_a_machine_without_chinese_fonts_is_reported(self, monkeypatch):
        monkeypatch.setattr(lesson_00, "chinese_font", lambda: None)
        assert any("Chinese" in remark for remark in lesson_00.remarks())


REPORT = {"groups": {}, "scenes": [0.8, 1.0, 1.1], "photographs": {"a": 3.0, "b": 4.0}, "command": "by hand"}


@pytest.fixture
def features():
    """Of 50 images with 4 patches, uneven in their directions, (I, N, Dv)."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(50, 4, 6, generator=generator) * torch.tensor([1, 2, 3, 0.5, 1, 1]) + 5


@pytest.fixture(scope="module")
def shipped():
    """The base model, its processor, and what was measured for its encoder."""
    model, processor, _ = load_checkpoint(data_folder() / "base")
    return model, processor, lesson_00.load_familiar(model)


class TestDistance:
    def test_it_is_the_mahalanobis_distance_of_the_library(self, features):
        ours = lesson_00.fit(features)
        means = features.mean(dim=1).numpy().astype(np.float64)
        count = len(means)
        # the library divides by I, torch.cov by I - 1; with the larger covariance the distance is shorter
        theirs = ShrunkCovariance(shrinkage=lesson_00.SHRINKAGE).fit(means).mahalanobis(means) * (count - 1) / count
        np.testing.assert_allclose(ours.distances(features).numpy(), np.sqrt(theirs / 6), rtol=1e-4)

    def test_one_image_is_measured_as_among_many(self, features):
        familiar = lesson_00.fit(features)
        assert familiar.distance(features[3:4]) == pytest.approx(familiar.distances(features)[3].item(), rel=1e-6)

    def test_far_is_beyond_the_threshold_and_is_reported_with_both_numbers(self, features):
        familiar = lesson_00.fit(features, threshold=2.0)
        assert [familiar.is_far(distance) for distance in (1.9, 2.0, 2.1)] == [False, False, True]
        assert familiar.warning(2.0) == ""
        assert "2.5" in familiar.warning(2.5) and "2.0" in familiar.warning(2.5)


class TestFiles:
    def test_what_is_saved_is_loaded(self, model, features, tmp_path):
        familiar = lesson_00.fit(features, threshold=1.5)
        save_familiar(tmp_path, familiar, model, REPORT)
        loaded = lesson_00.load_familiar(model, tmp_path)
        assert torch.equal(loaded.mean, familiar.mean) and torch.equal(loaded.whiten, familiar.whiten)
        assert loaded.threshold == 1.5 and lesson_00.read_report(tmp_path)["photographs"] == REPORT["photographs"]

    def test_another_encoder_is_refused(self, make_model, features, tmp_path):
        save_familiar(tmp_path, lesson_00.fit(features, threshold=1.5), make_model(0), REPORT)
        with pytest.raises(lesson_00.FamiliarError, match=r"another encoder.*tests/benchmarks/familiar\.py"):
            lesson_00.load_familiar(make_model(1), tmp_path)

    def test_missing_files_are_named_with_their_command(self, model, tmp_path):
        with pytest.raises(lesson_00.FamiliarError, match=r"familiar\.json is missing.*tests/benchmarks/familiar\.py"):
            lesson_00.load_familiar(model, tmp_path)


def test_the_figure_says_how_many_and_marks_what_is_at_hand():
    figure = lesson_00.distance_figure(REPORT | {"threshold": 2.0}, {"yours": 3.5})
    written = [text.get_text() for text in figure.axes[0].texts]
    assert "yours" in written and "3 drawn scenes" in written and "2 photographs" in written
    assert any("2.00" in text for text in written)


class TestShipped:
    def test_scenes_are_near_and_the_photograph_is_far(self, shipped):
        model, processor, familiar = shipped
        photograph = open_image(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg")
        images = [*(draw(sample_scene("exam", i)) for i in (1, 2, 3)), photograph]
        with torch.no_grad():
            *scenes, photo = familiar.distances(model.vision(processor.pixels(images))).tolist()
        assert [familiar.is_far(distance) for distance in (*scenes, photo)] == [False, False, False, True]
        report = lesson_00.read_report()
        assert scenes == pytest.approx(report["scenes"][1:4], abs=0.01)
        assert photo == pytest.approx(report["photographs"]["matplotlib/grace_hopper.jpg"], abs=0.05)

    def test_the_counts_follow_from_the_distances(self):
        report = lesson_00.read_report()
        for group, distances in (("exam scenes", report["scenes"]), ("photographs", report["photographs"].values())):
            counted = report["groups"][group]
            assert counted["pictures"] == len(distances)
            assert counted["far"] == sum(distance > report["threshold"] for distance in distances)

    def test_few_scenes_and_most_photographs_are_far(self):
        groups = lesson_00.read_report()["groups"]
        for name in ("exam scenes", "holdout scenes", "exam scenes through JPEG"):
            assert groups[name]["far"] <= 0.03 * groups[name]["pictures"], name
        assert groups["photographs"]["pictures"] >= 25
        assert groups["photographs"]["far"] >= 0.9 * groups["photographs"]["pictures"]

    def test_it_belongs_to_the_encoder_of_every_shipped_model(self):
        for name in ("pretrain", "sft"):
            assert isinstance(lesson_00.load_familiar(load_checkpoint(data_folder() / name)[0]), lesson_00.Familiar)
