"""What the measuring scripts make of what they measured: whether a run answers as before."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent


@pytest.fixture(scope="module")
def same():
    return runpy.run_path(str(SCRIPTS / "same_results.py"))


def figure(value: float, width: float) -> dict:
    return {"value": value, "low": value - width / 2, "high": value + width / 2}


def test_a_figure_stands_beside_the_seeds_in_standard_errors_of_the_widest_interval(same):
    run = {"sft": {"questions": figure(0.6, 0.0392)}, "who": "nobody"}
    seeds = [{"sft": {"questions": figure(value, width)}} for value, width in ((0.5, 0.196), (0.4, 0.0392), (0.6, 0.1))]
    result = same["compared"](run, seeds)
    assert result.keys() == {"sft.questions"}
    assert result["sft.questions"] == {"value": 0.6, "seeds": [0.4, 0.6], "standard_errors": pytest.approx(0.1 / 0.05)}


def log(folder: Path, losses: list[float], tokens: int = 7) -> Path:
    folder.mkdir()
    lines = [json.dumps({"loss": loss, "tokens": tokens}) + "\n" for loss in losses]
    (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_losses_are_compared_step_by_step_where_the_rows_are_the_same(same, tmp_path):
    shipped = log(tmp_path / "shipped", [9.0] + [1.0, 2.0] * 50)
    result = same["losses"](log(tmp_path / "run", [0.0] + [1.5, 2.1] * 50), shipped)
    assert (result["run"], result["shipped"], result["difference"]) == pytest.approx((1.8, 1.5, 0.3))
    assert result["standard_error"] == pytest.approx(0.2 * (100 / 99) ** 0.5 / 10) and result["steps"] == 100
    with pytest.raises(ValueError, match="did not take the same rows"):
        same["losses"](log(tmp_path / "other", [0.0] + [1.5, 2.1] * 50, tokens=8), shipped)
