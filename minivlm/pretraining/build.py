"""One command makes the base of the scenes preset: tokenizer, encoder, language model, saved as one checkpoint.

`minivlm base` can be stopped at any time; run again, it goes on where it was. What it makes on the way (drawn
pictures, resume states, full logs) stays in the work folder; the checkpoint holds the weights in 16 bits, the metrics,
a thinned log of each training, the recipes, and the hashes of the weights and of the programs that made them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from minivlm.checkpoint import save_checkpoint
from minivlm.config import preset_config
from minivlm.model import MiniVLMForConditionalGeneration, assemble
from minivlm.pretraining import encoder, language_model, loop
from minivlm.pretraining.tokenizer import CORPUS_DOCUMENTS, train_tokenizer
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.files import replace_folder, write_json
from minivlm.scenes.corpus import tokenizer_corpus
from minivlm.scenes.drawing.gallery import drawing_key, program_key
from minivlm.train import text_probe

BASE_PARTS = ("tokenizer", "encoder", "language_model")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LOG_EVERY = 20
MADE_FROM = "made_from.json"
PACKAGE = Path(__file__).parent.parent
CORPUS = tuple(
    PACKAGE / name
    for name in ("scenes/corpus.py", "pretraining/reading_tasks.py", "scenes/vocabulary.py", "scenes/language.py")
)


def build_base(
    out: Path,
    work: Path,
    only: str | None = None,
    workers: int | None = None,
    encoder_recipe: loop.Recipe = encoder.RECIPE,
    language_rounds: Sequence[tuple[loop.Recipe, language_model.Curriculum]] = language_model.ROUNDS,
    pictures: int = encoder.PICTURES,
    exam: int = 500,
    command: str = "minivlm base",
) -> Path | None:
    """Make the base models, or `only` one part of them; write the checkpoint `out` when all parts are there.

    The encoder and the language model do not need one another: two processes may make one each, side by side.
    `command` is what was typed, for the record. Returns `out`, or None where `only` one part was made. Raises
    ValueError for an unknown part, and where the work folder holds the state of another recipe.
    """
    if only is not None and only not in BASE_PARTS:
        raise ValueError(f"no part {only!r}; choose one of {', '.join(BASE_PARTS)}")
    tokenizer = _tokenizer(work / "tokenizer")
    config = preset_config("scenes", tokenizer.vocab_size)
    processor = MiniVLMProcessor.for_config(config, tokenizer)
    vision, language, made_from = None, None, {}
    if only in (None, "encoder"):
        made_from["encoder"] = _note(work / "encoder", {"drawing": drawing_key()})
        vision = encoder.train(
            config.vision_config, tokenizer, work / "encoder", recipe=encoder_recipe, pictures=pictures, workers=workers
        )
    if only in (None, "language_model"):
        programs = {"drawing": drawing_key(), "corpus": program_key(CORPUS)}
        made_from["language_model"] = _note(work / "language_model", programs)
        language = language_model.train(processor, config, work / "language_model", rounds=language_rounds, exam=exam)
    if vision is None or language is None:
        return None
    meta = {
        "seed": encoder_recipe.seed,
        "command": command,
        "made_from": made_from,
        "metrics": {"encoder": vision[1], "language_model": language[1]},
        "recipes": {
            "encoder": asdict(encoder_recipe) | {"pictures": pictures},
            "language_model": [asdict(recipe) | asdict(curriculum) for recipe, curriculum in language_rounds],
        },
    }
    model = assemble(vision[0], language[0], config.image_token_id, encoder_recipe.seed)
    logs = {f"{part}.log.jsonl": thinned(work / part) for part in BASE_PARTS[1:]}
    return save_base(out, model, processor, meta, extra=logs)


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Train the tokenizer, or read the one that was trained before."""
    if not (folder / "tokenizer.json").exists():
        tokenizer = train_tokenizer(tokenizer_corpus(CORPUS_DOCUMENTS))
        with replace_folder(folder, TOKENIZER_FILES) as temporary:  # another process may have made the same meanwhile
            tokenizer.save_pretrained(temporary)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _note(folder: Path, programs: dict[str, str]) -> list[dict[str, str]]:
    """The hashes of the programs that a part was made with, one entry unless they changed between two sittings."""
    file, entries = folder / MADE_FROM, []
    if file.exists() and any(folder.rglob("state.pt")):  # without a state, training begins anew
        entries = json.loads(file.read_text("utf-8"))
    if programs not in entries:
        entries.append(programs)
        write_json(file, entries)
    return entries


def save_base(out: Path, model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor, meta: dict, **options):
    """Save base models in 16 bits, with `options` as of `save_checkpoint`; returns `out`."""
    # the values as they are stored: what a user loads is what the probe is measured on
    model.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    meta = {"stage": "base", "threads": torch.get_num_threads(), "text_probe": text_probe(model, processor)} | meta
    return save_checkpoint(out, model, processor, meta, dtype=torch.float16, **options)


def thinned(folder: Path) -> bytes:
    """Every `LOG_EVERY`-th line of the logs in a folder (one, or one of each round), and the last of each."""
    kept = []
    for log in sorted(folder.glob("**/log.jsonl")):
        lines = log.read_text("utf-8").splitlines()
        kept += [line for i, line in enumerate(lines) if i % LOG_EVERY == 0 or i + 1 == len(lines)]
    return "".join(line + "\n" for line in kept).encode()
