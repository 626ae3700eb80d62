"""The command line: thin. Every command calls one function of the package and prints what it returns."""

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minivlm.config import CLIP_B16, IMAGE_TOKEN, MINIMIND2_V, PROMPTS
from minivlm.runtime.paths import BASE, PRETRAIN, SFT, data_folder
from minivlm.runtime.processes import launched, process_group

REFUSED = 2  # the exit code of a message for people: a bad file, a wrong checkpoint
SHEET = 8  # pictures across a contact sheet, and down
SHORTHAND = f'the string "{IMAGE_TOKEN}\\n…" is accepted as shorthand for a picture and a question'


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. What a user can mend is one line on standard error, no traceback.

    Started several times by a launcher, as `torchrun -m minivlm train …`, each process names itself in that line.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    options.typed = shlex.join(["minivlm", *given])
    try:
        if launched() > 1 and options.command is not _train:
            raise ValueError(
                "this command works in one process; start it without torchrun or accelerate. Several processes can "
                "train: minivlm train pretrain, then minivlm train sft"
            )
        with process_group():
            return options.command(options) or 0
    except (ValueError, OSError) as problem:
        number = f" (process {os.environ.get('RANK')} of {launched()})" if launched() > 1 else ""
        print(f"minivlm{number}: {problem}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minivlm", description="A vision-language model, trained end to end on two CPU cores."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, function, text: str, **more: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, **more)
        added.set_defaults(command=function)
        return added

    run = command("run", _run, "train both stages from the base weights, examine both, write the report")
    _training_options(run, "runs/seed-SEED")
    train = command("train", _train, "train one stage")
    train.add_argument("stage", choices=(PRETRAIN, SFT))
    train.add_argument("--parent", type=Path, help="the checkpoint to start from (default: the shipped one)")
    _training_options(train, "runs/STAGE")
    _own_rows_options(train)
    evaluate = command("evaluate", _evaluate, "examine a checkpoint; prints JSON")
    evaluate.add_argument("checkpoint", type=Path, nargs="?", help="default: the shipped model after stage 2")
    for added in (run, evaluate):
        added.add_argument("--exam", type=_whole(2), default=500, help="pictures of the exam (default 500)")
    _experiment_options(command("experiment", _experiment, "small experiments on hallucination (notebook 05)"))
    caption = command("caption", _caption, f"say what is in each picture; {SHORTHAND}")
    caption.add_argument("file", nargs="+", help="a picture of any common format")
    caption.add_argument("--prompt", default=PROMPTS["en"], help=f"default: {PROMPTS['en']}")
    chat = command("chat", _chat, f"talk about a picture, line by line; {SHORTHAND}")
    chat.add_argument("file", help="a picture of any common format")
    _data_options(command("data", _data, "draw pictures of the drawn world, or check a file of rows"))
    export = command("export", _export, "write a model in the form of another library")
    export.add_argument("folder", type=Path, help="the folder to write; it must not exist yet")
    export.add_argument("--to", choices=("llava",), default="llava", help="LlavaForConditionalGeneration (default)")
    for added in (caption, chat, export):
        added.add_argument("--model", type=Path, help="a checkpoint (default: the shipped one after stage 2)")
    _import_options(command("import", _import, "make a checkpoint of what others published: CLIP and MiniMind"))
    bench = command("bench", _bench, "moved: python tests/benchmarks/bench.py", prefix_chars="+")
    bench.add_argument("options", nargs="*", help="none is read here")
    base = command(
        "base", _base, "make the base models: tokenizer, encoder, language model (about 80 minutes; resumable)"
    )
    base.add_argument("--only", choices=("tokenizer", "encoder", "language_model"), help="one part alone")
    base.add_argument("--out", type=Path, default=Path("runs/base"), help="the checkpoint to write")
    base.add_argument("--work", type=Path, default=Path("runs/base-work"), help="drawn pictures, states, full logs")
    return parser


def _experiment_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="?", default="all", choices=("all", "length", "noise", "lm", "small-lm"),
        help="which experiment (default: all); small-lm: make the smaller language model that lm needs",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="the folder to write (default runs/experiments, runs/small-lm)")
    parser.add_argument("--seeds", type=_whole(1), default=3, help="runs of every variant (default 3)")


def _training_options(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--out", type=Path, help=f"the folder to write (default {out})")
    parser.add_argument("--seed", type=_whole(0), default=0, help="W at the start, rows and their order (default 0)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="default: measured")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compile the layers (default: where it pays and works)"
    )
    parser.add_argument("--pictures", type=_whole(1), help="training pictures to draw (default 5000)")
    factor = _number(float, lambda value: 0 < value < math.inf, "a number above 0, such as 0.5")
    parser.add_argument("--scale", type=factor, help="shorten or stretch both stages (default 1)")
    parser.add_argument("--anew", action="store_true", help="do not go on with what lies in --out")


def _own_rows_options(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("on your own rows")
    own.add_argument("--rows", type=Path, metavar="DATASET", help="what minivlm data check --decode --out wrote")
    own.add_argument(
        "--features", type=Path, metavar="FOLDER",
        help="keep there what the encoder makes of each image, and train from it; what is missing is encoded first",
    )  # fmt: skip
    own.add_argument("--recipe", choices=("scenes", "clip-26m"), help="learning rates (default: by the model's widths)")
    own.add_argument("--steps", type=_whole(1), help="optimizer steps (default: the recipe's)")
    own.add_argument("--batch-size", type=_whole(1), help="rows of one pass (default: the recipe's)")
    own.add_argument("--accumulation", type=_whole(1), help="passes that make a step (default: the recipe's)")


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("sheet", "table", "check"))
    parser.add_argument(
        "path", type=Path, help="sheet: the PNG to write; table: the folder; check: the rows, see below"
    )
    check = parser.add_argument_group(
        "check",
        "PATH is a file of JSON lines, a JSON array in LLaVA's form, a Parquet table, or a folder with .jsonl and "
        ".parquet files. The exit code is 2 if a row cannot be used.",
    )
    check.add_argument("--images", type=Path, help="the folder of the pictures (default: where the file lies)")
    check.add_argument("--decode", action="store_true", help="open every picture, too")
    check.add_argument(
        "--out", type=Path, metavar="DATASET",
        help="write the usable rows there, to train on (minivlm train STAGE --rows DATASET); pictures of a Parquet "
        "table are copied into it, others stay where they are",
    )  # fmt: skip
    check.add_argument("--model", type=Path, help="the checkpoint whose tokens count (default: the shipped base)")


def _import_options(parser: argparse.ArgumentParser) -> None:
    where = "a path here, the name under which it is published, or random"
    parser.add_argument("weights", help=f"a language model, with or without its projector: {where}")
    parser.add_argument("--encoder", default=CLIP_B16, help=f"CLIP, by {where} (default {CLIP_B16})")
    parser.add_argument(
        "--tokenizer", default=MINIMIND2_V, help=f"a folder or a published name (default {MINIMIND2_V})"
    )
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write")
    parser.add_argument("--stage", choices=(BASE, PRETRAIN, SFT), help="default: sft with a projector, else base")
    parser.add_argument(
        "--heads", type=_whole(1), help="query heads, where neither config.json nor MiniMind's 8 is right"
    )
    parser.add_argument("--seed", type=_whole(0), default=0, help="of what is random (default 0)")


def _whole(least: int) -> Callable[[str], int]:
    """Reads an option's value, a whole number from `least` on."""
    return _number(int, lambda value: value >= least, f"a whole number, at least {least}")


def _number(kind: type, allowed: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """Reads an option's value, a number of a kind that is allowed, or says what is wanted."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not allowed(value):  # a comparison with NaN is false
            raise argparse.ArgumentTypeError(f"{text!r} must be {wanted}")
        return value

    return read


def _refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Refuse options that would change nothing, by the names under which they were parsed."""
    for name in names:
        if getattr(options, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} {why}; leave it out")


def _plan(options: argparse.Namespace, out: str, **more):
    from minivlm.pipeline import PICTURES, Plan

    return Plan(
        out=options.out or Path(out),
        data=data_folder(),
        seed=options.seed,
        precision=options.precision,
        compiled=options.compile,
        pictures=options.pictures or PICTURES,
        steps_scale=options.scale or 1.0,
        resume=not options.anew,
        command=options.typed,
        **more,
    )


def _run(options: argparse.Namespace) -> None:
    from minivlm.pipeline import run
    from minivlm.report import table_as_text

    plan = _plan(options, f"runs/seed-{options.seed}", exam=options.exam)
    results = run(plan)
    print(table_as_text(results))
    print("\nseconds:", ", ".join(f"{phase} {value:.0f}" for phase, value in results["seconds"].items()))
    print(f"The report: {plan.out / 'index.html'}")


def _train(options: argparse.Namespace) -> None:
    from minivlm.checkpoint import load_checkpoint
    from minivlm.pipeline import recipe_for, sized_stage, train_on_dataset, train_stage
    from minivlm.runtime.processes import processes

    sizes = ("steps", "batch_size", "accumulation")
    if options.rows is None:
        _refuse(options, ("features", "recipe", *sizes), "is for training on --rows")
    else:
        _refuse(options, ("pictures", "scale"), "is for the drawn world, not for --rows")
    plan = _plan(options, f"runs/{options.stage}")
    parent = options.parent or data_folder() / (BASE if options.stage == PRETRAIN else PRETRAIN)
    model, processor, _ = load_checkpoint(parent)
    if options.rows is None:
        train_stage(plan, options.stage, model, processor, parent, plan.out)
    else:
        recipe = options.recipe or recipe_for(model.config)
        stage = sized_stage(recipe, options.stage, **{name: getattr(options, name) for name in sizes})
        train_on_dataset(
            options.rows, stage, model, processor, parent, plan.out, options.features,
            precision=None if plan.precision == "auto" else plan.precision,
            seed=plan.seed, compiled=plan.compiled, resume=plan.resume, command=plan.command,
        )  # fmt: skip
    if processes().is_main_process:
        print(f"The checkpoint: {plan.out}")


def _evaluate(options: argparse.Namespace) -> None:
    from minivlm.checkpoint import load
    from minivlm.evaluation import evaluate, prepare_exam

    model, processor = load(options.checkpoint or SFT)
    print(json.dumps(evaluate(model, processor, prepare_exam(model, processor, options.exam)), ensure_ascii=False))


def _experiment(options: argparse.Namespace) -> None:
    from minivlm.evaluation.ablations import EXPERIMENTS, AblationPlan, as_text, experiment
    from minivlm.pretraining.small_lm import make_small_lm

    if options.what == "small-lm":
        out = options.out or Path("runs/small-lm")
        work = out.with_name(f"{out.name}-work")
        print(f"The checkpoint: {make_small_lm(out, work, data_folder(), command=options.typed)}")
    else:
        out, seeds = options.out or Path("runs/experiments"), tuple(range(options.seeds))
        plan = AblationPlan(out=out, data=data_folder(), seeds=seeds, command=options.typed)
        print(as_text(experiment(plan, tuple(EXPERIMENTS) if options.what == "all" else (options.what,))))


def _caption(options: argparse.Namespace) -> None:
    from minivlm.data.samples import without_shorthand
    from minivlm.generate import ask, reply

    model, processor = _model(options)
    prompt = without_shorthand(options.prompt)
    answers = reply(model, processor, [ask(prompt, file) for file in options.file])
    for file, answer in zip(options.file, answers, strict=True):
        print(f"{file}: {answer}")


def _chat(options: argparse.Namespace) -> None:
    from minivlm.data.images import open_image
    from minivlm.data.samples import without_shorthand
    from minivlm.generate import ask, reply

    image = open_image(options.file)
    model, processor = _model(options)
    messages = []
    print("Ask about the picture; an empty line ends.")
    for line in sys.stdin:
        text = line.strip() if messages else without_shorthand(line.strip())
        if not text:
            break
        messages += ask(text, None if messages else image)
        answer = reply(model, processor, messages)
        messages.append({"role": "assistant", "content": answer})
        print(answer, flush=True)


def _model(options: argparse.Namespace):
    from minivlm.checkpoint import load

    return load(options.model or SFT)


def _data(options: argparse.Namespace) -> int:
    from minivlm.scenes.drawing.gallery import contact_sheet
    from minivlm.scenes.drawing.table import write_table

    if options.what != "check":
        _refuse(options, ("images", "decode", "out", "model"), "is for data check")
    if options.what == "sheet":
        began = time.perf_counter()
        sheet = contact_sheet(across=SHEET)
        speed = SHEET**2 / (time.perf_counter() - began)
        sheet.save(options.path, optimize=True)
        print(f"{options.path}: {SHEET**2} pictures, {speed:.0f} a second on one core")
    elif options.what == "table":
        print(*write_table(options.path), sep="\n")
    else:
        return _check(options)
    return 0


def _check(options: argparse.Namespace) -> int:
    """What the rows hold goes to standard output, every one that cannot be used to standard error."""
    from minivlm.checkpoint import load
    from minivlm.data.dataset import write_dataset
    from minivlm.data.survey import as_text, survey

    _, processor = load(options.model or BASE)
    what = (options.path, processor, options.images, options.decode)
    result = survey(*what) if options.out is None else write_dataset(options.out, *what)
    print(f"{options.path}: {as_text(result)}")
    if options.out is not None:
        print(f"The data set: {options.out}, {result.usable} rows")
    for error in result.bad:
        print(error, file=sys.stderr)
    return REFUSED if result.bad else 0


def _export(options: argparse.Namespace) -> None:
    from minivlm.checkpoint import load_checkpoint
    from minivlm.convert.llava import export_llava

    folder = export_llava(options.folder, *load_checkpoint(options.model or data_folder() / SFT))
    print(f"{folder}: AutoModelForImageTextToText and AutoProcessor read it; nothing of this project is needed there")


def _import(options: argparse.Namespace) -> None:
    from minivlm.convert.hub import import_published

    lines = import_published(
        options.out, options.weights, options.encoder, options.tokenizer,
        stage=options.stage, heads=options.heads, seed=options.seed, command=options.typed,
    )  # fmt: skip
    print(*lines, f"The checkpoint: {options.out}", sep="\n")


def _bench(_: argparse.Namespace) -> None:
    raise ValueError("the benchmark is a script of the repository now: python tests/benchmarks/bench.py")


def _base(options: argparse.Namespace) -> None:
    from minivlm.pretraining.build import build_base

    if folder := build_base(options.out, options.work, options.only, command=options.typed):
        print(f"The checkpoint: {folder}")
