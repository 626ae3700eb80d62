"""Every measuring script runs, at a tiny size, and its JSON has the keys of the committed one."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import bench
import check_rows
import controls
import curves
import familiar
import forgetting
import lists
import pytest
import same_results
import steps_26m
from lessons import lesson_04
from lessons.cost import Length
from lessons.lesson_04 import WITH, WITHOUT
from matplotlib.figure import Figure
from PIL import Image
from runs import make_run
from test_bench import keys_of
from training import save_base

from minivlm.runtime.paths import data_folder

linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="measures memory as Linux tells it")


def read(file: Path) -> dict:
    return json.loads(file.read_text("utf-8"))


@pytest.fixture
def shipped() -> dict:
    """Name -> what is committed in `data/results`."""
    return {file.stem: read(file) for file in (data_folder() / "results").glob("*.json")}


@pytest.fixture
def put(monkeypatch):
    """`put(module, NAME=value)` changes names of a module until the test ends."""

    def put(module, **values) -> None:
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)

    return put


@pytest.fixture
def same_process(put, capsys):
    """`same_process(script)`: what the script starts in a process of its own runs in this one."""

    def patch(script) -> None:
        def run(command, **_):
            capsys.readouterr()
            script.main(command[2:])
            return SimpleNamespace(stdout=capsys.readouterr().out)

        put(script, subprocess=SimpleNamespace(run=run, PIPE=None))

    return patch


@linux
def test_curves_measures_and_plots(make_model, processor, shipped, same_process, tmp_path, put):
    same_process(curves)
    file, plot = tmp_path / "curves.json", curves.plot
    put(bench, LENGTHS={"sft": Length(30, 12)})
    put(check_rows, IMAGES=5)
    put(curves, TEXTS=(20,), SIDES=(8, 16), COUNTS=(64,), REPEATS=1, PADDED={"clip-26m": {"sft": 64}}, FILE=file)
    put(curves, PEAK_VARIANTS=curves.VARIANTS | {"compiled": bench.OURS[1]})  # compiling is slow
    put(curves, build=lambda *_: (make_model(), processor, {}), plot=lambda _: Figure())
    curves.main([])
    written = read(file)
    assert keys_of(written) == keys_of(shipped["curves"])
    assert [point["image_tokens"] for point in written["image"]["engine"]] == [4, 16]
    assert [point["tokens"] for point in written["text"]["old"]] == [36] and written["data"][0]["rows"] == 64
    put(curves, measure=None, plot=plot)
    curves.main(["--plot"])
    assert Image.open(file.with_suffix(".png")).width > 1000 and read(file) == written
    text, memory, *_ = curves.plot(shipped["curves"]).axes
    assert [line.get_label() for line in text.lines] == ["reference recipe, not padded, fp32", "ours, bf16"]
    points = shipped["curves"]["text"]["engine"]
    assert [*memory.lines[1].get_ydata()] == [point["kept_megabytes"] for point in points]


@linux
def test_check_rows_finds_all_bad_rows_and_no_other(processor, shipped, same_process, tmp_path, put):
    same_process(check_rows)
    put(check_rows, IMAGES=5, SAMPLES=2, FILE=tmp_path / "rows.json", load_checkpoint=lambda _: (None, processor, {}))
    check_rows.main(["--rows", "40"])
    written = read(tmp_path / "rows.json")
    assert keys_of(written) == keys_of(shipped["rows"])
    for form in check_rows.FORMS:
        assert written[form]["all_bad_rows_found_and_no_other"], written[form]
        for work in ("check", "index", "index_decoded"):
            assert written[form][work]["bad"] == shipped["rows"][form][work]["bad"]


def test_steps_26m_trains_both_stages(model, processor, shipped, tmp_path, put):
    pool = SimpleNamespace(submit=lambda function, *given: SimpleNamespace(result=lambda: function(*given)))
    put(steps_26m, IMAGES=2, ProcessPoolExecutor=lambda *_: nullcontext(pool))
    put(steps_26m, import_published=lambda folder, *_: save_base(folder, model, processor))
    steps_26m.main(["--batch", "2", "--out", str(tmp_path / "steps.json")])
    written = read(tmp_path / "steps.json")
    assert keys_of(written) == keys_of(shipped["steps_cpu"]) and written["fp32"]["sft"]["steps"] == 1
    samples = steps_26m.rows("pretrain")
    assert len(samples) == 16 and len({id(sample.images[0]) for sample in samples}) == 2, "each image is drawn once"


def test_forgetting_goes_on_where_it_was_stopped(model, processor, shipped, tmp_path, put):
    begun, meta, file = [], {"hashes": {"projector": "1f"}}, tmp_path / "forgetting.json"
    small = {name: lesson_04.Variant(("W",), text_samples=name == WITH) for name in (WITH, WITHOUT)}

    def train(variant, seed, *_):
        begun.append((variant, seed))
        if len(begun) == 2:
            raise KeyboardInterrupt
        return model, processor

    def reply(model, processor, conversations, **_):
        return ["a red car"] * len(conversations)

    put(forgetting, IMAGES=2, EXAM_IMAGES=2, choose_precision=lambda _: "fp32", reply=reply)
    put(forgetting, load_checkpoint=lambda _: (model, processor, meta))
    put(lesson_04, VARIANTS=small, RESULTS=file, train_variant=train, reply=reply)
    put(lesson_04, text_questions=lambda: {task: [("a", "b")] for task in lesson_04.TEXT_TASKS})
    with pytest.raises(KeyboardInterrupt):
        forgetting.main(["--seeds", "0"])
    assert list(read(file)["variants"]) == [WITH] and list(tmp_path.iterdir()) == [file]
    forgetting.main(["--seeds", "0"])
    results = read(file)
    assert begun == [(small[WITH], 0), (small[WITHOUT], 0), (small[WITHOUT], 0)] and results["sittings"] == 2
    assert file.read_text("utf-8") == json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    committed = shipped["forgetting"]
    assert results.keys() == committed.keys() and results["before"].keys() == committed["before"].keys()
    assert all(results["variants"][name].keys() == committed["variants"][name].keys() for name in small)


def test_familiar_fits_and_counts_both_kinds_of_error(model, processor, shipped, tmp_path, put):
    put(familiar, FIT=8, VALIDATION=4, TEST=3, JPEG=2, load_checkpoint=lambda _: (model, processor, {}))
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (9, 7)).save(tmp_path / "deep" / "one.png")
    familiar.main([str(tmp_path), "--out", str(tmp_path / "out")])
    written = read(tmp_path / "out" / "familiar.json")
    assert keys_of(written | {"photographs": None}) == keys_of(shipped["familiar"] | {"photographs": None})
    assert "deep/one.png" in written["photographs"] and len(written["photographs"]) == 4
    assert [group["pictures"] for group in written["groups"].values()] == [3, 3, 2, 4, 16]
    assert [crop.size for crop in familiar.corners(Image.new("RGB", (9, 7)))] == [(4, 4)] * 4


def test_lists_scores_both_languages(shipped, tmp_path, put):
    put(lists, FILE=tmp_path / "lists.json")
    lists.main(["--lists", "2"])
    written = read(tmp_path / "lists.json")
    assert keys_of(written) == keys_of(shipped["lists"]) and 0 < written["en"]["recall"]["denominator"] <= 8


def test_controls_counts_over_all_runs(shipped, tmp_path, put, monkeypatch):
    for seed in (1, 2):
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}" / controls.RESULTS).write_text(json.dumps(make_run(seed)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    put(controls, FILE=tmp_path / "controls.json")
    controls.main(["seed-1", "seed-2"])
    written, committed = read(tmp_path / "controls.json"), shipped["controls"]
    assert written["command"] == "python tests/benchmarks/controls.py seed-1 seed-2"
    assert list(written) == list(committed) and keys_of(written["total"]) == keys_of(committed["total"])
    for control, counts in written["total"].items():
        assert counts["of"] == sum(run["held"][control]["of"] for run in written["runs"]) > 0
    assert controls.total(committed["runs"]) == committed["total"]


def figure(value: float, width: float) -> dict:
    return {"value": value, "low": value - width / 2, "high": value + width / 2}


def test_a_figure_stands_beside_the_seeds_in_standard_errors_of_the_widest_interval():
    run = {"sft": {"questions": figure(0.6, 0.0392)}, "who": "nobody"}
    seeds = [{"sft": {"questions": figure(value, width)}} for value, width in ((0.5, 0.196), (0.4, 0.0392), (0.6, 0.1))]
    result = same_results.compared(run, seeds)
    assert result.keys() == {"sft.questions"}
    assert result["sft.questions"] == {"value": 0.6, "seeds": [0.4, 0.6], "standard_errors": pytest.approx(0.1 / 0.05)}


def log(folder: Path, losses: list[float], tokens: int = 7) -> Path:
    folder.mkdir()
    lines = [json.dumps({"loss": loss, "tokens": tokens}) + "\n" for loss in losses]
    (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_losses_are_compared_step_by_step_where_the_samples_are_the_same(tmp_path):
    shipped = log(tmp_path / "shipped", [9.0] + [1.0, 2.0] * 50)
    result = same_results.losses(log(tmp_path / "run", [0.0] + [1.5, 2.1] * 50), shipped)
    assert (result["run"], result["shipped"], result["difference"]) == pytest.approx((1.8, 1.5, 0.3))
    assert result["standard_error"] == pytest.approx(0.2 * (100 / 99) ** 0.5 / 10) and result["steps"] == 100
    with pytest.raises(ValueError, match="did not train on the same samples"):
        same_results.losses(log(tmp_path / "other", [0.0] + [1.5, 2.1] * 50, tokens=8), shipped)


def test_same_results_compares_a_run_with_the_shipped_one(tmp_path, put):
    for stage in ("pretrain", "sft"):
        (tmp_path / stage).mkdir()
        shutil.copy(data_folder() / stage / "log.jsonl", tmp_path / stage)
    (tmp_path / "results.json").write_text(json.dumps(make_run()), encoding="utf-8")
    put(same_results, FILE=tmp_path / "same.json")
    same_results.main([str(tmp_path)])
    written = read(tmp_path / "same.json")
    assert written["losses"]["sft"]["difference"] == 0 and written["run"] == "minivlm run --seed 7"
    assert written["figures"] == len(written["by_name"]) > 0
