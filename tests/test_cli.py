"""The command line: help, the shipped model, refusals without a traceback, and a whole small run."""

import io
import json
import re
import sys
from contextlib import redirect_stdout
from functools import partial

import pytest
from PIL import Image

import minivlm.evaluation.exam
from minivlm import cli
from minivlm.checkpoint import read_meta
from minivlm.config import PROMPTS
from minivlm.data.samples import without_shorthand
from minivlm.generate import ask
from minivlm.report import COLUMNS
from minivlm.runtime.paths import data_folder
from minivlm.scenes.drawing.table import TABLE
from minivlm.scenes.language import read_facts

COMMANDS = ("run", "train", "evaluate", "caption", "chat", "data", "base", "experiment", "export")


def run_command(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, "--help"])
    assert exit_info.value.code == 0
    assert f"minivlm {command}" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["paint"])
    assert exit_info.value.code == 2 and "invalid choice: 'paint'" in capsys.readouterr().err


def test_bench_says_what_it_is_called_now(capsys):
    code, _, err = run_command(capsys, "bench", "--preset", "scenes")
    assert code == 2 and err.startswith("minivlm: ") and "python tests/benchmarks/bench.py" in err


def test_the_shipped_model_captions_the_tables_images(capsys):
    files = [str(data_folder() / "table" / f"{name}.png") for name in ("panda", "traffic")]
    code, out, _ = run_command(capsys, "caption", *files)
    assert code == 0
    panda, traffic = out.splitlines()
    assert panda.startswith(files[0]) and ("panda", None) in read_facts(panda.removeprefix(files[0])).things
    facts = read_facts(traffic.removeprefix(files[1]))
    assert {("car", "red"), ("car", "yellow")} <= set(facts.things) and facts.setting == "street"
    assert "熊猫" in run_command(capsys, "caption", files[0], "--prompt", PROMPTS["zh"])[1]


@pytest.mark.parametrize("prompt", ["What is it?", "<image>\nWhat is it?", "<image>\\nWhat is it?"])
def test_caption_takes_the_shorthand_off(prompt, capsys, monkeypatch):
    conversations = []
    monkeypatch.setattr(cli, "_model", lambda options: (None, None))
    monkeypatch.setattr("minivlm.generate.reply", lambda *args: conversations.append(args[2]) or ["a dog"])
    assert run_command(capsys, "caption", "dog.png", "--prompt", prompt)[:2] == (0, "dog.png: a dog\n")
    assert conversations == [[ask("What is it?", "dog.png")]]


@pytest.mark.parametrize(
    "text", ["<image>", "<image> What?", "\n\nWhat?", "What is <image>\n?", "What is <image>\\n?", "<image>What?"]
)
def test_other_text_is_not_the_shorthand(text):
    assert without_shorthand(text) == text
    for newline in ("\n", "\\n"):
        assert without_shorthand(f"<image>{newline}{text}") == text  # once, not again in what follows


def test_only_the_first_line_of_a_chat_may_be_shorthand(capsys, monkeypatch, model, processor, image, tmp_path):
    image.save(tmp_path / "dog.png")
    monkeypatch.setattr(cli, "_model", lambda options: (model, processor))
    conversations = []
    monkeypatch.setattr(
        "minivlm.generate.reply", lambda model, processor, messages: conversations.append(list(messages)) or ""
    )
    lines = ["<image>\\nWhat is it?", "<image>\\nAnd this?", "<image>", "Is \\n text?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert run_command(capsys, "chat", str(tmp_path / "dog.png"))[0] == 0
    messages = conversations[-1]
    ids = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)[0]
    parts = [message["content"] for message in messages if message["role"] == "user"]
    assert [part["type"] for part in parts[0]] == ["image", "text"] and parts[0][1]["text"] == "What is it?"
    assert parts[1:] == [[{"type": "text", "text": line}] for line in lines[1:]]
    assert ids.count(processor.image_token_id) == processor.num_image_tokens
    transcript = processor.tokenizer.decode([i for i in ids if i != processor.image_token_id])
    assert all(line in transcript for line in lines[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--seed", "-1"], "--seed: '-1' must be a whole number, at least 0"),
        (["run", "--seed", "one"], "--seed: 'one' must be a whole number, at least 0"),
        (["train", "sft", "--pictures", "0"], "--pictures: '0' must be a whole number, at least 1"),
        (["run", "--exam", "1"], "--exam: '1' must be a whole number, at least 2"),
        (["evaluate", "--exam", "1.5"], "--exam: '1.5' must be a whole number, at least 2"),
        (["train", "sft", "--exam", "9"], "unrecognized arguments: --exam 9"),
        *(([*start, f"--scale={value}"], f"--scale: '{value}' must be a number above 0, such as 0.5")
          for value in ("0", "-1", "nan", "inf", "half") for start in (["run"], ["train", "pretrain"])),
    ],
)  # fmt: skip
def test_an_option_out_of_range_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("through", ["arguments", "sys.argv"])
def test_what_was_typed_is_recorded_so_that_it_can_be_typed_again(through, monkeypatch):
    plans = []
    results = {"table": [], "seconds": {}}
    monkeypatch.setattr("minivlm.pipeline.run", lambda plan: plans.append(plan) or results)
    arguments = ["run", "--out", "my runs/it's", "--seed", "7"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/minivlm", *arguments] if through == "sys.argv" else ["pytest", "-q"])
    assert cli.main(None if through == "sys.argv" else arguments) == 0
    assert plans[0].command == """minivlm run --out 'my runs/it'"'"'s' --seed 7"""
    assert (plans[0].seed, plans[0].exam) == (7, 500)


def test_chat_remembers_the_image(capsys, monkeypatch):
    lines = "What kind of place is this?\nWhat colour is the flower?\n\nignored\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, out, _ = run_command(capsys, "chat", str(data_folder() / "table" / "panda.png"))
    assert code == 0
    first, second = out.splitlines()[1:]
    assert first == "A wide grassland." and second


@pytest.mark.parametrize("command", ["caption", "chat"])
def test_a_bad_file_is_one_line_and_no_traceback(command, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for file in (tmp_path / "missing.png", broken):
        code, _, err = run_command(capsys, command, str(file))
        messages = [line for line in err.splitlines() if line.startswith("minivlm: ")]
        assert code == 2 and len(messages) == 1 and file.name in messages[0] and "Traceback" not in err


def test_a_missing_checkpoint_is_refused(capsys, tmp_path):
    code, _, err = run_command(capsys, "caption", "x.png", "--model", str(tmp_path / "nothing"))
    assert code == 2 and "nothing" in err


def test_ctrl_c_ends_quietly(monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_data", interrupted)
    assert cli.main(["data", "table", "x"]) == 130


def test_data_commands(capsys, tmp_path, monkeypatch):
    code, out, _ = run_command(capsys, "data", "table", str(tmp_path / "table"))
    assert code == 0 and len(out.splitlines()) == 7
    for name in TABLE:  # what is shipped is what is drawn, to the pixel
        folders = (tmp_path / "table", data_folder() / "table")
        drawn, shipped = (Image.open(folder / f"{name}.png") for folder in folders)
        assert drawn.size == (224, 224) and drawn.tobytes() == shipped.tobytes()
    monkeypatch.setattr(cli, "SHEET", 2)
    code, out, _ = run_command(capsys, "data", "sheet", str(tmp_path / "sheet.png"))
    assert code == 0 and re.search(r"sheet\.png: 4 pictures, [1-9]\d* a second on one core\n", out)
    assert Image.open(tmp_path / "sheet.png").size == (2 * 230 + 6,) * 2


def test_base_calls_the_builder(capsys, monkeypatch, tmp_path):
    from minivlm.pretraining import build

    calls = []
    monkeypatch.setattr(build, "build_base", lambda *args, command: calls.append((*args, command)) or tmp_path)
    assert str(tmp_path) in run_command(capsys, "base", "--only", "tokenizer", "--out", "a", "--work", "b c")[1]
    line = "minivlm base --only tokenizer --out a --work 'b c'"
    assert [str(value) for value in calls[0]] == ["a", "b c", "tokenizer", line]


SMALL = ["--scale", "0.0025", "--pictures", "8", "--precision", "fp32"]  # two steps of stage 1, one of stage 2


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A small `minivlm run`: its folder, its results, and the lines that it printed."""
    out, words = tmp_path_factory.mktemp("run"), io.StringIO()
    with redirect_stdout(words), pytest.MonkeyPatch.context() as patch:
        for limit in ("LONG", "SHORT"):  # a model of so few steps would write up to it
            patch.setattr(minivlm.evaluation.exam, limit, 8)
        assert cli.main(["run", "--out", str(out), "--exam", "2", *SMALL]) == 0
    return out, json.loads((out / "results.json").read_text("utf-8")), words.getvalue().splitlines()


@pytest.mark.slow
def test_a_run_prints_the_table_and_where_the_page_lies(small_run):
    out, results, lines = small_run
    for name, row in zip(TABLE, results["table"], strict=True):
        assert row["name"] == name
        (start,) = (number for number, line in enumerate(lines) if line.startswith(f"{name}: "))
        columns = [(line[:15].strip(), line[15:]) for line in lines[start + 1 : start + 5]]
        answers = [(title, row["answers"][stage][lang]) for stage, title in COLUMNS.items() for lang in ("en", "zh")]
        assert columns == answers
    assert lines[-1] == f"The report: {out / 'index.html'}" and (out / "index.html").is_file()


@pytest.mark.slow
def test_a_run_leaves_checkpoints_results_and_its_reports(small_run):
    out, results, _ = small_run
    assert read_meta(out / "pretrain")["stage"] == "pretrain" and read_meta(out / "sft")["stage"] == "sft"
    for name in ("index.html", "report.md", "table.md", "metrics.md", "results.json"):
        assert (out / name).stat().st_size > 200
    assert results["sizes"]["exam"] == 2
    assert {stage: len(losses) for stage, losses in results["losses"].items()} == {"pretrain": 2, "sft": 1}
    assert set(results["exam"]) == {"pretrain", "sft"} and set(results["exam"]["sft"]) == {"en", "zh"}
    assert results["ledgers"]["pretrain"][0][2] == 0  # the encoder: nothing of it trains


@pytest.mark.slow
def test_one_stage_and_one_exam(tmp_path, capsys, monkeypatch):
    out = tmp_path / "stage"
    assert run_command(capsys, "train", "pretrain", "--out", str(out), *SMALL)[0] == 0
    assert read_meta(out)["steps"] == 2
    monkeypatch.setattr(minivlm.evaluation, "prepare_exam", partial(minivlm.evaluation.prepare_exam, holdout=2))
    code, text, _ = run_command(capsys, "evaluate", str(data_folder() / "pretrain"), "--exam", "2")
    assert code == 0 and set(json.loads(text)) == {"en", "zh"}
