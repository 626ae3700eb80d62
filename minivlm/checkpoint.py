"""Checkpoints: strict to load, whole or not there at all, and each knows what it was made from.

A checkpoint is a folder: one safetensors file for each part of the model (with an index, so that the library's own
`from_pretrained` reads the folder too), config, tokenizer and image processor, and `minivlm.json`, which names the
stage, the seed, the command, the metrics, and the hashes of every part and of the config. It may hold only what its
stage trained; then `minivlm.json` says in which folder the other parts lie, and their hashes must be the ones it was
trained with.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from textwrap import shorten
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from minivlm.config import IMAGE_TOKEN, MiniVLMConfig, Stage
from minivlm.model import PARTS, MiniVLMForConditionalGeneration
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.files import (
    former_folder,
    hash_tensors,
    hash_tokenizer,
    latest_folder,
    replace_folder,
    require_replaceable,
    require_writable,
    versions,
)
from minivlm.runtime.paths import BASE, PRETRAIN, SFT, data_folder

FORMAT = 1
META = "minivlm.json"
OWN = "put the checkpoint's own file back"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
SMALL_FILES = (CONFIG, "generation_config.json", "processor_config.json", "tokenizer_config.json", TOKENIZER)
OWN_FILES = (*SMALL_FILES, META, INDEX, "*.safetensors", "chat_template.jinja", "log.jsonl", "*.log.jsonl", "resume.pt")


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message names the file and the key, and says what to do."""


def part_hashes(model: MiniVLMForConditionalGeneration, processor: MiniVLMProcessor) -> dict[str, str]:
    """The hashes of vision, projector, language_model and tokenizer as they are now: a checkpoint's lineage."""
    hashes = {part: hash_tensors(_part_tensors(model, part)) for part in PARTS}
    return hashes | {"tokenizer": hash_tokenizer(processor.tokenizer)}


def save_checkpoint(
    folder: str | Path,
    model: MiniVLMForConditionalGeneration,
    processor: MiniVLMProcessor,
    meta: Mapping[str, Any],
    parts: Iterable[str] = PARTS,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a checkpoint under a temporary name and rename it when it is complete; returns its folder.

    A checkpoint of that name is replaced; of a link, what it points to. What else lies there stays.

    Args:
        meta: what `minivlm.json` shall say, `stage` at least; hashes and versions are added.
        parts: which parts to write. The others are then taken from `base`, the folder of a checkpoint that has them.
        dtype: store weights in this precision (the hashes are those of the stored values). None: as they are.
        extra: further files, name to bytes, that must appear and vanish together with the weights.

    Raises:
        CheckpointError: a weight is not finite, `stage` is missing, `base` is missing, or `folder` is it or holds
            other things.
        OSError: the disk is full, or the folder cannot be written. What was there before is as it was.
    """
    folder, parts = Path(folder), tuple(parts)
    if set(parts) != set(PARTS) and base is None:
        raise CheckpointError(f"{folder}: only {', '.join(parts)} would be saved; say by base= where the rest lies")
    require_place(folder, base)
    tensors = {part: _part_tensors(model, part) for part in parts}
    if dtype is not None:
        tensors = {part: {name: t.to(dtype) for name, t in named.items()} for part, named in tensors.items()}
    for part, named in tensors.items():
        _check_finite(named, f"{folder} was not saved: {part}")
    hashes = part_hashes(model, processor) | {part: hash_tensors(named) for part, named in tensors.items()}
    about = {key: value for key, value in meta.items() if key != "base"}  # meta may come from another checkpoint
    about |= {"format": FORMAT, "versions": versions(), "holds": list(parts), "hashes": hashes}
    if base is not None:
        about["base"] = Path(os.path.relpath(Path(base).resolve(), folder.resolve())).as_posix()
    _check_meta(about, folder)
    files = {f"{part}.safetensors": safetensors.torch.save(named, {"format": "pt"}) for part, named in tensors.items()}
    if set(parts) == set(PARTS):  # the library's table of which tensor lies in which file
        size = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())
        where = {name: f"{part}.safetensors" for part, named in tensors.items() for name in named}
        files[INDEX] = _json({"metadata": {"total_size": size}, "weight_map": where})
    with replace_folder(folder, OWN_FILES) as temporary:
        for name, data in (files | dict(extra or {})).items():
            (temporary / name).write_bytes(data)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        (temporary / META).write_bytes(_json({**about, "config": hash_config(temporary)}))
    return folder


def require_place(folder: str | Path, base: str | Path | None = None) -> None:
    """Refuse a folder that a checkpoint cannot be written to, before hours are spent on what it will hold.

    Raises:
        CheckpointError: it is, or holds, `base` or a checkpoint that `base` takes parts from itself.
        FolderError: it holds something else, or cannot be replaced.
        OSError: it cannot be written.
    """
    folder, source, chain = Path(folder), Path(base).resolve() if base is not None else None, []
    while source not in (None, *chain):
        if any(source.is_relative_to(path.resolve()) for path in (folder, former_folder(folder))):
            why = "is, or holds, a checkpoint that the new one builds on; it is not replaced, choose another folder"
            raise CheckpointError(f"{folder} {why}")
        chain.append(source)
        if (latest_folder(source) / META).is_file():
            source = (source / read_meta(source).get("base", ".")).resolve()
    require_replaceable(folder, META, "checkpoint")
    require_writable(folder)


def load(name: str | Path = SFT) -> tuple[MiniVLMForConditionalGeneration, MiniVLMProcessor]:
    """A shipped model, "base", "pretrain" or "sft", or that of a checkpoint's folder, with its processor.

    Raises what `load_checkpoint` and `data_folder` raise.
    """
    model, processor, _ = load_checkpoint(data_folder() / name if name in (BASE, PRETRAIN, SFT) else name)
    return model, processor


def load_checkpoint(
    folder: str | Path, base: str | Path | None = None
) -> tuple[MiniVLMForConditionalGeneration, MiniVLMProcessor, dict[str, Any]]:
    """Load a checkpoint in 32-bit floats, or refuse it: nothing may be missing, left over or of another shape.

    Args:
        folder: the checkpoint.
        base: where the parts lie that it does not hold; None takes the folder that it names itself.

    Returns the model in evaluation mode, the processor, and what `minivlm.json` says.

    Raises:
        CheckpointError: a file is missing, damaged, or not the one that was saved; a key is missing, left over,
            misshapen or not finite; the head differs from the embeddings that it is tied to; tokenizer and weights
            have different vocabularies; the base is another than the one trained with.
    """
    folder = latest_folder(Path(folder))
    meta = read_meta(folder)
    processor, config = _load_processor(folder, meta)
    unchanged = "config" in meta  # its hash was compared: what goes wrong now is no fault of the file
    with torch.random.fork_rng(devices=[]), nullcontext() if unchanged else _understood(folder / CONFIG):
        model = MiniVLMForConditionalGeneration(config).float()
    state = {}
    for part in PARTS:
        file = _find_part(part, folder, meta, base)
        tensors = _without_tied(read_tensors(file), model.all_tied_weights_keys, file)
        _check_keys(tensors, _part_tensors(model, part), file)
        if hash_tensors(tensors) != meta["hashes"][part]:
            raise CheckpointError(
                f"{file}: not the {part} that {folder / META} was written with (their hashes differ); "
                "take both from the same checkpoint"
            )
        state |= tensors
    state |= {head: state[embeddings] for head, embeddings in model.all_tied_weights_keys.items()}
    model.load_state_dict(state, strict=True)
    with _understood(folder / "generation_config.json"):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), processor, meta


def read_meta(folder: str | Path) -> dict[str, Any]:
    """What a checkpoint says about itself, without its weights; a CheckpointError where it is missing or damaged."""
    folder = latest_folder(Path(folder))
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint folder; check the path, or train it first")
    meta = _read_json(folder / META)
    _check_meta(meta, folder)
    return meta


def require_parent(meta: Mapping[str, Any], stage: Stage, folder: str | Path) -> None:
    """Raise CheckpointError where a checkpoint is not of the stage that this stage starts from."""
    if meta["stage"] != stage.parent:
        raise CheckpointError(
            f"{folder}: stage {stage.name!r} starts from a {stage.parent!r} checkpoint, but this one is of stage "
            f"{meta['stage']!r}; give the folder that stage {stage.parent!r} wrote (or, of published "
            f"weights, make one of that stage: minivlm import … --stage {stage.parent})"
        )


def read_tensors(file: str | Path) -> dict[str, torch.Tensor]:
    """The named tensors of a safetensors file, or of a torch state dict (.pt, .pth, .bin), all of them finite.

    Torch files are read with `weights_only=True`: a pickle can otherwise run code. Raises CheckpointError where the
    file is missing, cut off, of another kind, no state dict, or holds NaN or infinity.
    """
    file = Path(file)
    if not file.is_file():
        raise CheckpointError(f"{file}: the file is missing; copy the whole checkpoint again")
    if file.suffix == ".safetensors":
        try:
            tensors = safetensors.torch.load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: cut off, or no safetensors file ({error}); copy it again") from error
    else:
        tensors = _read_torch(file)
    _check_finite(tensors, file)
    return tensors


def _read_torch(file: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: no state dict, but a pickle of other Python objects, which could run code and is not opened; "
            "in the program that wrote it, save model.state_dict() with safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:  # a broken zip, or a pickle cut off
        raise CheckpointError(f"{file}: cut off, or no torch file ({error}); copy it again") from error
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, no state dict of named tensors")
    if others := [str(k) for k, v in content.items() if not isinstance(v, torch.Tensor) or type(k) is not str]:
        cure = "if the weights lie in one of these, save that one by itself"
        raise CheckpointError(f"{file}: no state dict, since {_some(others)} is no tensor with a name; {cure}")
    return dict(content)


# ---- what must be true of the parts


def _part_tensors(model: MiniVLMForConditionalGeneration, part: str) -> dict[str, torch.Tensor]:
    """A part's tensors under their full names; a head that is tied to the embeddings is counted once, as them."""
    return {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith(f"{part}.") and name not in model.all_tied_weights_keys
    }


def _check_finite(tensors: Mapping[str, torch.Tensor], where: object) -> None:
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise CheckpointError(
            f"{where}: {_some(bad)} has values that are not finite; go back to the checkpoint before, and train on "
            "with a lower learning rate or in float32"
        )


def _check_keys(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], file: Path) -> None:
    cure = "the weights belong to another model or version; use the config that they were saved with"
    if missing := sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"{file}: {_some(missing)} is missing; {cure}")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(f"{file}: {_some(extra)} is too much; {cure}")
    for name, tensor in expected.items():
        if (shape := tuple(tensors[name].shape)) != (wanted := tuple(tensor.shape)):
            raise CheckpointError(f"{file}: {name} has the shape {shape}, but its config wants {wanted}; {cure}")


def _without_tied(tensors: dict[str, torch.Tensor], tied: Mapping[str, str], file: Path) -> dict[str, torch.Tensor]:
    """Drop a head that only repeats the embeddings it is tied to; refuse one that does not."""
    for head, embeddings in tied.items():
        if head in tensors and embeddings in tensors and not torch.equal(tensors[head], tensors[embeddings]):
            raise CheckpointError(
                f"{file}: {head} differs from {embeddings}, to which the config ties it, so one of them would be lost; "
                'if the head was trained by itself, set "tie_word_embeddings": false in config.json'
            )
    return {name: tensor for name, tensor in tensors.items() if name not in tied}


def _check_vocabulary(processor: MiniVLMProcessor, config: MiniVLMConfig, folder: Path) -> None:
    """Tokenizer, image processor and model must mean the same numbers."""
    if processor.image_token_id != config.image_token_id:
        raise CheckpointError(
            f"{folder / TOKENIZER}: {IMAGE_TOKEN} is id {processor.image_token_id}, but {config.image_token_id} in "
            f"config.json: another vocabulary than the weights'; {OWN}"
        )
    ids = set(processor.tokenizer.get_vocab().values()) - {config.image_token_id}
    if max(ids) >= config.text_config.vocab_size:
        raise CheckpointError(
            f"{folder / TOKENIZER}: its ids go up to {max(ids)}, but the language model knows "
            f"{config.text_config.vocab_size}: another vocabulary than the weights'; {OWN}"
        )
    if processor.num_image_tokens != config.num_image_tokens:
        raise CheckpointError(
            f"{folder / 'processor_config.json'}: {processor.num_image_tokens} tokens per image, but the encoder of "
            f"config.json makes {config.num_image_tokens}; {OWN}"
        )


def _check_meta(meta: Any, folder: Path) -> None:
    file = folder / META
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{file}: not of format {FORMAT}; it was written by another version of minivlm")
    if not isinstance(meta.get("stage"), str):
        raise CheckpointError(f"{file}: 'stage' is missing; say which stage made the checkpoint")
    holds, hashes = meta.get("holds"), meta.get("hashes")
    if not isinstance(holds, list) or not holds or not all(part in PARTS for part in holds):
        raise CheckpointError(f"{file}: 'holds' is {holds!r}; it must name some of {', '.join(PARTS)}")
    if not isinstance(hashes, dict) or set(hashes) != {*PARTS, "tokenizer"}:
        raise CheckpointError(f"{file}: 'hashes' must name {', '.join(PARTS)} and tokenizer; copy the checkpoint again")
    if not isinstance(meta.get("base", ""), str):
        raise CheckpointError(f"{file}: 'base' is {meta['base']!r}; it must be the path of a folder, as a string")


# ---- reading


def _load_processor(folder: Path, meta: dict[str, Any]) -> tuple[MiniVLMProcessor, MiniVLMConfig]:
    small = {name: _read_json(folder / name) for name in SMALL_FILES}
    for name, content in small.items():
        if not isinstance(content, dict):
            raise CheckpointError(f"{folder / name}: holds a {type(content).__name__}, no JSON object; {OWN}")
    if hash_tokenizer((folder / TOKENIZER).read_text("utf-8")) != meta["hashes"]["tokenizer"]:
        problem = "another vocabulary than the one that the weights were trained with (their hashes differ)"
        raise CheckpointError(f"{folder / TOKENIZER}: {problem}; put the checkpoint's own tokenizer back")
    if (kind := small[CONFIG].get("model_type")) != MiniVLMConfig.model_type:
        raise CheckpointError(f"{folder / CONFIG}: model_type is {kind!r}, not {MiniVLMConfig.model_type!r}")
    if meta.get("config", hash_config(folder)) != hash_config(folder):
        raise CheckpointError(
            f"{folder / CONFIG}: not the one that the checkpoint was saved with (their hashes differ); {OWN}, or, if "
            f'you changed it on purpose, take "config" out of {META}'
        )
    with _understood(folder / CONFIG):
        config = MiniVLMConfig.from_pretrained(folder)
        if config.num_image_tokens < 1:
            raise ValueError("an image has no patch: image_size is smaller than patch_size")
    with _understood(folder / "processor_config.json", folder / "tokenizer_config.json"):
        processor = MiniVLMProcessor.from_pretrained(folder)
    _check_vocabulary(processor, config, folder)
    return processor, config


def _find_part(part: str, folder: Path, meta: dict[str, Any], base: str | Path | None) -> Path:
    """The file of a part: here, or in the base, or in the base's base."""
    chain = []
    while part not in meta["holds"]:
        chain.append(folder.resolve())
        if base is None and "base" not in meta:
            raise CheckpointError(f"{folder}: the checkpoint holds no {part} and names no base; give base=")
        source = Path(base) if base is not None else (folder.resolve() / meta["base"])
        if not latest_folder(source).is_dir() or latest_folder(source).resolve() in chain:
            raise CheckpointError(
                f"{folder} holds only {', '.join(meta['holds'])}; its {part} should lie in {source}, and does not; "
                "put that folder back or give its place by base="
            )
        folder, base = latest_folder(source), None
        meta = read_meta(folder)
    return folder / f"{part}.safetensors"


def _read_json(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"{file}: the file is missing; give a folder that minivlm wrote, or copy it again")
    try:
        return json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, or not even text
        raise CheckpointError(f"{file}: cut off or damaged ({error}); copy it again") from error


@contextmanager
def _understood(*files: Path) -> Iterator[None]:
    """Whatever the libraries raise over a file's content, and it can be anything, becomes a line that names it."""
    try:
        yield
    except Exception as error:  # StrictDataclassError, KeyError, TypeError, ZeroDivisionError, RuntimeError, …
        reason = shorten(f"{type(error).__name__}: {error}", 300, placeholder=" …")  # some list all models they know
        raise CheckpointError(f"{' or '.join(map(str, files))}: not understood ({reason}); {OWN}") from error


def hash_config(folder: Path) -> str:
    """SHA-256 of what a checkpoint's `config.json` says; its layout and the version that wrote it do not matter."""
    content = {key: value for key, value in _read_json(folder / CONFIG).items() if key != "transformers_version"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _some(names: list[str]) -> str:
    """The first names of a list."""
    return ", ".join(names[:3]) + (f" (and {len(names) - 3} more)" if len(names) > 3 else "")
