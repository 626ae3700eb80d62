"""The map of the course agrees with the notebooks, and the check of the environment finds what is missing."""

import ast
import importlib.metadata
import json
import tempfile
from pathlib import Path

import pytest
from lessons import course, environment
from lessons.course import STATIONS, course_map, minutes_measured, show_course
from lessons.environment import Finding, look, show_environment

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def code_of(number: str) -> str:
    """All code of a notebook."""
    (file,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    cells = json.loads(file.read_text("utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


class TestMap:
    def test_every_notebook_is_a_station(self):
        assert [file.stem[:2] for file in sorted(NOTEBOOKS.glob("*.ipynb"))] == [station.number for station in STATIONS]

    @pytest.mark.parametrize("station", STATIONS[1:], ids=lambda station: station.number)
    def test_a_card_lights_what_its_notebook_lights(self, station):
        calls = [node for node in ast.walk(ast.parse(code_of(station.number))) if isinstance(node, ast.Call)]
        lit = [ast.literal_eval(call.args[0]) for call in calls if getattr(call.func, "id", "") == "show_flow"]
        assert list(station.lit) in lit

    def test_minutes_are_those_measured(self):
        measured = json.loads((NOTEBOOKS / "measured.json").read_text("utf-8"))
        minutes = minutes_measured(NOTEBOOKS / "measured.json")
        assert minutes["03"] == pytest.approx(measured["03_projector_pretraining"]["seconds"] / 60)
        written = [text.get_text() for text in course_map({"01": 0.5, "03": 3.2}).axes[0].texts]
        assert "runs in 30 seconds" in written and "runs in 3 minutes" in written
        assert {station.title for station in STATIONS} <= set(written)

    def test_the_alternative_text_names_every_station(self, monkeypatch):
        shown = []
        monkeypatch.setattr(course, "show", lambda figure, alt, summary: shown.append((alt, summary)))
        show_course({"01": 1.0, "03": 3.0})
        ((alt, summary),) = shown
        assert all(f"{station.number} {station.title}" in alt for station in STATIONS)
        assert "4 minutes" in summary


class TestEnvironment:
    def test_here_everything_is_found(self):
        findings = {finding.what: finding for finding in look()}
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
        wrong = {finding.what: finding for finding in look() if not finding.enough}
        assert {"torch", "ipywidgets"} <= set(wrong) <= {"torch", "ipywidgets", "free memory"}
        assert wrong["ipywidgets"].here == "missing" and ">=" in wrong["torch"].advice

    def test_a_local_build_satisfies_its_version(self, monkeypatch):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0+cpu")
        assert next(finding for finding in look() if finding.what == "torch").enough

    def test_missing_weights_and_a_closed_folder_are_found(self, monkeypatch, tmp_path):
        def closed(**given):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(environment, "data_folder", lambda: tmp_path)
        monkeypatch.setattr(tempfile, "TemporaryDirectory", closed)
        wrong = {finding.what for finding in look() if not finding.enough} - {"free memory"}
        assert wrong == {"weights in data/base", "weights in data/pretrain", "weights in data/sft", "this folder"}

    def test_what_is_wrong_stands_first_and_open(self, monkeypatch):
        shown = []
        monkeypatch.setattr(environment, "display", lambda bundle, raw: shown.append(bundle))
        show_environment([Finding("Python", "3.11", True, "x"), Finding("torch", "<1>", False, "needs >=2.9")])
        page = shown[0]["text/html"]
        assert page.index("torch") < page.index("Python") and "<details open>" in page
        assert "&lt;1&gt;" in page and shown[0]["text/plain"] == "1 of 2 things are as they should be."

    def test_a_machine_without_chinese_letters_is_told(self, monkeypatch):
        monkeypatch.setattr(environment, "chinese_font", lambda: None)
        assert any("Chinese" in remark for remark in environment.remarks())
