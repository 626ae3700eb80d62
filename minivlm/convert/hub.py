"""The preset clip-26m from what others trained: published names, local folders, or random weights of the true shape.

    minivlm import jingyaogong/MiniMind2-V-PyTorch/sft_vlm_512.pth --out runs/minimind2-v

A source is a path on this machine, the name under which it is published (fetched once, then read from the library's own
cache), or `random`. The result is a checkpoint like any other: it answers, trains and exports.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from minivlm.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from minivlm.config import CLIP_B16, IMAGE_TOKEN, MINIMIND2_V, clip_26m_config
from minivlm.convert.minimind import START, load_published
from minivlm.data.chat_template import chat_template
from minivlm.model import MiniVLMForConditionalGeneration, assemble
from minivlm.processor import MiniVLMProcessor
from minivlm.runtime.paths import BASE, SFT, data_folder
from minivlm.train import text_probe

RANDOM = "random"
WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
CLIP = {"clip": CLIPModel, "clip_vision_model": CLIPVisionModel}
NETWORK = "check the spelling, the network and that its files are whole, or give a folder on this machine"


def build(
    weights: str, encoder: str = CLIP_B16, tokenizer: str = MINIMIND2_V, heads: int | None = None, seed: int = 0
) -> tuple[MiniVLMForConditionalGeneration, MiniVLMProcessor, list[str]]:
    """The 26M model (or its larger sister) in this project's form.

    Args:
        weights, heads: a language model, with or without its projector, as in `load_published`; or "random".
        encoder: a `CLIPVisionModel` or a whole `CLIPModel`; or "random".
        tokenizer: MiniMind's. With random weights the tokenizer of the drawn world stands in.
        seed: of what is random; of W too, where the weights bring no projector.

    Returns:
        The model in evaluation mode, its processor, and a line on each source: what was recognised.

    Raises CheckpointError where a source is not found or not understood, or the parts do not belong together.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision, pixels, vision_line = _encoder(encoder)
        if weights == RANDOM:
            if heads is not None or tokenizer != MINIMIND2_V:  # there is nothing that they could be right or wrong for
                raise CheckpointError(
                    f"{RANDOM} weights have the true shape and a stand-in tokenizer; leave out heads and tokenizer"
                )
            language_model, projector, system = LlamaForCausalLM(clip_26m_config().text_config), None, None
            words = load_checkpoint(data_folder() / BASE)[1].tokenizer
            words_line = f"{RANDOM}: the tokenizer of the drawn world, {words.vocab_size} tokens"
            weights_line = f"{RANDOM}: a language model of the true shape that knows nothing"
        else:
            published = load_published(find_weights(weights), heads)
            language_model, projector = published.language_model, published.projector
            weights_line = published.statement
            words, system, words_line = load_tokenizer(tokenizer, language_model.config)
            if words.bos_token != (start := START[published.generation]):
                raise CheckpointError(
                    f"{tokenizer}: turns begin with {words.bos_token!r} there, but {published.generation} was "
                    f"trained with {start!r}; give the tokenizer that {weights} was published with"
                )
    image_token_id = words.convert_tokens_to_ids(IMAGE_TOKEN)
    bias = projector is not None and "bias" in projector
    model = assemble(vision, language_model, image_token_id, seed, projector_bias=bias)
    if projector is not None:
        if (wide := projector["weight"].shape[1]) != model.config.vision_width:
            raise CheckpointError(
                f"{weights}: its projector reads patches {wide} wide, but those of {encoder} are "
                f"{model.config.vision_width} wide; give the encoder that it was trained with"
            )
        model.projector.load_state_dict(projector, strict=True)
    processor = MiniVLMProcessor(pixels, words, model.config.num_image_tokens, words.chat_template, system)
    return model, processor, [weights_line, vision_line, words_line]


def import_published(
    out: str | Path, weights: str, encoder: str = CLIP_B16, tokenizer: str = MINIMIND2_V, *, stage: str | None = None,
    heads: int | None = None, seed: int = 0, command: str = "",
) -> list[str]:  # fmt: skip
    """Build the model and write it as a checkpoint: it answers, exports, and is the parent of the stage after its own.

    Returns the lines of `build`.

    Args:
        out: the folder to write.
        stage: what the weights have been through: "base", "pretrain" or "sft". By default "sft" with a projector,
            "base" without one.
        command: what the user typed, for the record.

    Raises:
        CheckpointError: as `build`, or the stage cannot be: a trained one without a projector.
        OSError: the checkpoint cannot be written.
    """
    model, processor, lines = build(weights, encoder, tokenizer, heads, seed)
    drawn = "no projector" in lines[0] or weights == RANDOM
    stage = stage or (BASE if drawn else SFT)
    if drawn and stage != BASE:
        raise CheckpointError(f"{weights}: there is no trained projector in it, so it is of stage {BASE}, not {stage}")
    meta = {"stage": stage, "command": command, "seed": seed, "sources": lines, "metrics": {}}
    save_checkpoint(out, model, processor, meta | {"text_probe": text_probe(model, processor)})
    return lines


def find_weights(source: str) -> Path:
    """The weights' file: a path, a folder that holds one such file, or `owner/repository/file`, fetched once.

    Raises CheckpointError where there is none, or a folder holds several.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in WEIGHT_FILES)
        if len(files) != 1:
            listed = ", ".join(file.name for file in files) or f"none ({', '.join(WEIGHT_FILES)})"
            raise CheckpointError(f"{path}: holds not one file of weights, but {listed}; name the file")
        return files[0]
    owner, _, rest = source.partition("/")
    repository, _, file = rest.partition("/")
    if not file or path.is_absolute() or owner in ("", ".", ".."):
        raise CheckpointError(f"{source}: there is no such file; give a path, or owner/repository/file as published")
    try:
        beside = Path(file).with_name("config.json").as_posix()
        cached_file(f"{owner}/{repository}", beside, _raise_exceptions_for_missing_entries=False)
        return Path(cached_file(f"{owner}/{repository}", file))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: neither a file here nor to be fetched ({_line(error)}); {NETWORK}") from error


def load_tokenizer(source: str, config: Any) -> tuple[PreTrainedTokenizerFast, str | None, str]:
    """A published tokenizer with `<image>` added after its last id, and its chat template in our form.

    Returns:
        The tokenizer, what its template's default system turn says (None if there is none), and a line on both.

    Raises:
        CheckpointError: it is not found, has another vocabulary than the language model of this `config`, lacks a
            special token, or its chat template does another thing than put turns between two tokens.
    """
    try:
        words = PreTrainedTokenizerFast.from_pretrained(source)
    except Exception as error:  # the library's own, and over a damaged file whatever its readers raise
        raise CheckpointError(f"{source}: no tokenizer found ({_line(error)}); {NETWORK}") from error
    ids = set(words.get_vocab().values())
    if IMAGE_TOKEN in words.get_vocab() or ids != set(range(config.vocab_size)):
        raise CheckpointError(
            f"{source}: {len(ids)} tokens up to id {max(ids)}, where the language model knows {config.vocab_size} "
            f"and none is {IMAGE_TOKEN}; give the tokenizer that it was trained with"
        )
    special = {"bos": words.bos_token, "eos": words.eos_token, "pad": words.pad_token}
    if lacking := [name for name, token in special.items() if token is None]:
        raise CheckpointError(f"{source}: the tokenizer has no {' and no '.join(lacking)} token; take it as published")
    system = default_system(words, source)
    words.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    words.chat_template = chat_template(words.bos_token, words.eos_token, system)
    words.model_max_length = min(words.model_max_length, config.max_position_embeddings)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = (
        words.convert_tokens_to_ids(token) for token in special.values()
    )
    turn = "without a system turn" if system is None else f"with the system turn {system!r}"
    line = f"{source}: {len(ids)} tokens, {words.bos_token} … {words.eos_token}, {turn}; {IMAGE_TOKEN} added as id "
    return words, system, line + str(words.convert_tokens_to_ids(IMAGE_TOKEN))


def default_system(tokenizer: PreTrainedTokenizerFast, source: str = "the tokenizer") -> str | None:
    """What the tokenizer's chat template says in a system turn of its own accord; None if there is no such turn.

    Raises CheckpointError where it writes turns in another form than `<bos>role`, the text, `<eos>`.
    """
    if tokenizer.chat_template is None:
        return None
    start, end = tokenizer.bos_token, tokenizer.eos_token
    texts = [("user", "<one>"), ("assistant", "<two>"), ("user", "<three>")]
    messages = [{"role": role, "content": text} for role, text in texts]
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # Jinja's own errors, and whatever a template does with a message
        raise CheckpointError(f"{source}: its chat template fails on plain text ({_line(error)})") from error
    turns = "".join(f"{start}{role}\n{text}{end}\n" for role, text in texts) + f"{start}assistant\n"
    before, head, tail = prompt.removesuffix(turns), f"{start}system\n", f"{end}\n"
    if prompt == turns:
        return None
    if prompt.endswith(turns) and before.startswith(head) and before.endswith(tail):
        return before.removeprefix(head).removesuffix(tail)
    raise CheckpointError(
        f"{source}: its chat template is not understood; it is to end with {turns!r}, but gives {prompt!r}. Give the "
        "tokenizer of llama_legacy or minimind2"
    )


def _encoder(source: str) -> tuple[CLIPVisionModel, CLIPImageProcessorPil, str]:
    """The encoder, how its images are prepared, and a line on it; its load report must be empty."""
    if source == RANDOM:
        config = clip_26m_config().vision_config
        side = config.image_size
        pixels = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        return CLIPVisionModel(config).eval(), pixels, f"{RANDOM}: an encoder that sees nothing"
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type not in CLIP:
            raise CheckpointError(f"{source}: is of type {config.model_type!r}, no CLIP; give one like {CLIP_B16}")
        loaded, report = CLIP[config.model_type].from_pretrained(source, output_loading_info=True)
        vision = loaded.vision_model if isinstance(loaded, CLIPModel) else loaded
        pixels = CLIPImageProcessorPil.from_pretrained(source)
    except CheckpointError:
        raise
    except Exception as error:  # the library's own, and over a damaged file whatever its readers raise
        raise CheckpointError(f"{source}: no CLIP encoder found ({_line(error)}); {NETWORK}") from error
    if problems := {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}:
        raise CheckpointError(f"{source}: not the encoder that its config describes: {problems}; take it as published")
    if bad := [name for name, tensor in vision.state_dict().items() if not torch.isfinite(tensor).all()]:
        raise CheckpointError(f"{source}: {', '.join(bad)} has values that are not finite; fetch it again")
    side = vision.config.image_size
    if not (pixels.do_center_crop and pixels.do_resize) or len(pixels.image_mean) != 3 or pixels.crop_size is None:
        raise CheckpointError(f"{source}: images are not scaled, cut to a square and in three colours, as CLIP's are")
    if (size := (pixels.crop_size.height, pixels.crop_size.width)) != (side, side):
        raise CheckpointError(f"{source}: images are cut to {size}, but the encoder wants {side} by {side}")
    parameters = sum(p.numel() for p in vision.parameters())
    line = f"{source}: an encoder of {parameters:,} parameters, {(side // vision.config.patch_size) ** 2} patches of "
    return vision.float().eval(), pixels, line + f"width {vision.config.hidden_size}; every key fits"


def _line(error: Exception) -> str:
    """The first line of what a library says."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
