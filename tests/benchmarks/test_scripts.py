"""What the measuring scripts make of what they measured: whether a run answers as before, and faster than before."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent


@pytest.fixture(scope="module")
def same():
    return runpy.run_path(str(SCRIPTS / "same_results.py"))


@pytest.fixture(scope="module")
def timed():
    return runpy.run_path(str(SCRIPTS / "course_time.py"))


def figure(value: float, width: float) -> dict:
    return {"value": value, "low": value - width / 2, "high": value + width / 2}


def test_a_figure_stands_beside_the_seeds_in_standard_errors_of_the_widest_interval(same):
    run = {"sft": {"questions": figure(0.6, 0.0392)}, "who": "nobody"}
    seeds = [{"sft": {"questions": figure(value, width)}} for value, width in ((0.5, 0.196), (0.4, 0.0392), (0.6, 0.1))]
    found = same["compared"](run, seeds)
    assert found.keys() == {"sft.questions"}
    assert found["sft.questions"] == {"value": 0.6, "seeds": [0.4, 0.6], "standard_errors": pytest.approx(0.1 / 0.05)}


def log(folder: Path, losses: list[float], tokens: int = 7) -> Path:
    folder.mkdir()
    lines = [json.dumps({"loss": loss, "tokens": tokens}) + "\n" for loss in losses]
    (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_losses_are_compared_step_by_step_where_the_rows_are_the_same(same, tmp_path):
    shipped = log(tmp_path / "shipped", [9.0] + [1.0, 2.0] * 50)
    found = same["losses"](log(tmp_path / "run", [0.0] + [1.5, 2.1] * 50), shipped)
    assert (found["run"], found["shipped"], found["difference"]) == pytest.approx((1.8, 1.5, 0.3))
    assert found["standard_error"] == pytest.approx(0.2 * (100 / 99) ** 0.5 / 10) and found["steps"] == 100
    with pytest.raises(ValueError, match="did not take the same rows"):
        same["losses"](log(tmp_path / "other", [0.0] + [1.5, 2.1] * 50, tokens=8), shipped)


def test_a_ratio_compares_two_trees_within_a_turn(timed):
    turns = [
        {"before": {"seconds": 6.0}, "after": {"seconds": 3.0}},
        {"before": {"seconds": 8.0}, "after": {"seconds": 8.0}},
    ]
    assert timed["compared"](turns) == {
        "seconds": {"before": [6.0, 8.0], "after": [3.0, 8.0], "ratio": 1.5, "from_to": [1.0, 2.0]}
    }


@pytest.mark.skipif(sys.platform == "win32", reason="halting a process is for Linux and macOS")
def test_two_programs_run_by_turns_and_none_while_it_is_halted(timed, tmp_path):
    """Each notes when it is awake; between two notes of one the other was not awake."""
    trees = {}
    for name in timed["TREES"]:
        trees[name] = tmp_path / name
        trees[name].mkdir()
    program = (
        "import time, pathlib, sys; notes, until = [], 0\n"
        "while len(notes) < 90: notes.append(time.time()); time.sleep(0.02)\n"
        "pathlib.Path('awake').write_text(' '.join(map(str, notes))); print('said')"
    )
    programs = timed["by_slices"](["-c", program], trees)
    notes = {name: [float(note) for note in (tree / "awake").read_text().split()] for name, tree in trees.items()}
    for name, program in programs.items():
        assert program.output() == "said\n" and 1.5 < program.seconds < 4.0
        pauses = [b - a for a, b in zip(notes[name], notes[name][1:], strict=False)]
        assert sum(pause > 0.8 * timed["SLICE"] for pause in pauses) >= 2
    with pytest.raises(RuntimeError, match="a reason"):
        failed = timed["by_slices"](["-c", "import sys; sys.exit('a reason')"], trees)
        failed["after"].output()
    assert os.environ.get("PYTHONPATH") != str(trees["after"])
