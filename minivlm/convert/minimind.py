"""Published MiniMind checkpoints in: recognised by their keys, converted exactly, or refused with what does not fit.

Three generations are in the wild, all state dicts without the vision encoder:

* `llama_legacy`, early 2025: Llama's first names (`tok_embeddings`, `attention.wq`, …), and rotary positions as complex
  numbers: neighbouring channels (0, 1), (2, 3), … of a head turn together.
* `minimind2`, April to December 2025 (MiniMind2-V): the library's names, and the two halves of a head turn together.
* `minimind3v`, 2026: Qwen3's normalised queries, a projector of two layers, another encoder. Refused by name.

In the first two the projector is one linear map with a bias. Letters as in `config.py`.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mode

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minivlm.checkpoint import CheckpointError, read_tensors

HEADS = 8  # of every published size; the shapes say only heads times their width
CONTEXT, THETA, EPS = 8192, 1e6, 1e-5
PROJECTOR = "vision_proj.vision_proj.0."
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LEGACY_NAMES = {  # the library's part of a name -> llama_legacy's
    "model.embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "model.norm": "norm",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
GENERATIONS = {
    "llama_legacy": "llama_legacy (early 2025: Llama's first names, rotary pairs side by side)",
    "minimind2": "minimind2 (MiniMind2: the library's names, rotary halves)",
}
# the token that a turn begins with: both have 6,400 tokens, and ids alike
START = {"llama_legacy": "<s>", "minimind2": "<|im_start|>"}
SETTINGS = {  # of a config.json beside the weights
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "max_position_embeddings": int,
    "rope_theta": float,
    "rms_norm_eps": float,
}
MINIMIND3V_KEYS = ("q_norm.", "k_norm.", "vision_proj.mlp.")
SHOWN = 20  # keys of a file that fits nothing


@dataclass(frozen=True)
class Published:
    """A published checkpoint, converted to float32.

    Attributes:
        projector: `weight` (Dl, Dv) and, where there is one, `bias` (Dl,); None if the checkpoint is a language model.
        generation: as `recognise` says it.
        statement: one line: what was recognised.
    """

    language_model: LlamaForCausalLM
    projector: dict[str, torch.Tensor] | None
    generation: str
    statement: str


def load_published(file: str | Path, heads: int | None = None) -> Published:
    """Read a published language model, or one with its projector, from .pth or safetensors.

    A `config.json` beside the file (the transformers form of MiniMind2) says what shapes cannot: heads, context, rotary
    base, norm epsilon. Without one they are those of all published sizes.

    Args:
        heads: query heads, where they are others than the file's `config.json` or `HEADS` say.

    Raises:
        CheckpointError: the file cannot be read, holds a value that is not finite, is of minimind3v or of none, or a
            key is missing, left over or misshapen, or the head differs from the embeddings it is tied to.
    """
    file = Path(file)
    tensors = read_tensors(file)
    if rounded := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise CheckpointError(f"{file}: {', '.join(rounded)} holds whole numbers, no weights; take one not quantised")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    generation = recognise(tensors, file)
    settings = _settings(file) if heads is None else _settings(file) | {"num_attention_heads": heads}
    if heads is not None:
        settings.pop("num_key_value_heads", None)  # it belonged to the other number
    config = _config(tensors, generation, settings, file)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    projector = {name.removeprefix(PROJECTOR): tensors[name] for name in tensors if name.startswith(PROJECTOR)}
    if report := _report(tensors, model, generation):
        raise CheckpointError(
            f"{file}: looks like {GENERATIONS[generation]}, but does not fit. {report}. Nothing was loaded: take the "
            "file as it was published, or tell its number of heads"
        )
    state = {ours: tensors[name_in(generation, ours)] for ours in model.state_dict() if ours != HEAD}
    if generation == "llama_legacy":
        state = {name: _halves(name, tensor, config.head_dim) for name, tensor in state.items()}
    state[HEAD] = state[EMBED]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # no weights: on the meta device never computed
    statement = f"{file.name}: {GENERATIONS[generation]}; {_statement(model, projector)}; every key fits"
    return Published(model.eval(), projector or None, generation, statement)


def recognise(tensors: Mapping[str, torch.Tensor], file: Path) -> str:
    """The generation by its keys, "llama_legacy" or "minimind2"; any other is a CheckpointError that lists them."""
    if alien := [name for name in tensors if any(mark in name for mark in MINIMIND3V_KEYS)]:
        raise CheckpointError(
            f"{file}: minimind3v (minimind-3v, 2026: Qwen3's query and key norms, a projector of two layers, "
            f"SigLIP2), by its keys {', '.join(alien[:3])} …; this course reads the two before, such as MiniMind2-V"
        )
    for generation in GENERATIONS:
        table = tensors.get(name := name_in(generation, EMBED))
        if table is not None and (table.ndim != 2 or not table.numel()):
            shape = tuple(table.shape)
            raise CheckpointError(f"{file}: {name} has the shape {shape}, and is to have a row for each word")
        if table is not None:
            return generation
    listed = ", ".join(list(tensors)[:SHOWN]) + (f" and {len(tensors) - SHOWN} more" if len(tensors) > SHOWN else "")
    raise CheckpointError(
        f"{file}: no MiniMind checkpoint, since there is neither {name_in('llama_legacy', EMBED)} nor {EMBED}. Its "
        f"keys fit nothing known: {listed}"
    )


def name_in(generation: str, ours: str) -> str:
    """The library's name of a tensor as the generation has it."""
    if generation == "llama_legacy":
        for part, theirs in LEGACY_NAMES.items():
            ours = ours.replace(part, theirs, 1)
    return ours


def _settings(file: Path) -> dict[str, float]:
    """What a `config.json` beside the weights says about the language model."""
    if not (beside := file.with_name("config.json")).is_file():
        return {}
    try:
        content = dict(json.loads(beside.read_text("utf-8")))
    except (ValueError, TypeError) as error:  # no JSON, or no object
        raise CheckpointError(f"{beside}: not understood ({error}); put the published file back") from error
    rotary = content.get("rope_parameters") or {}  # where transformers 5 keeps what stood beside it before
    if not isinstance(rotary, dict):
        raise CheckpointError(f"{beside}: rope_parameters is no object; put the published file back")
    not_read = {
        "a mixture of experts": content.get("use_moe"),
        "stretched positions": content.get("rope_scaling") or rotary.get("rope_type", "default") != "default",
        "another activation than silu": content.get("hidden_act", "silu") != "silu",
        "a head of its own": content.get("tie_word_embeddings") is False,
    }
    if requests := [name for name, value in not_read.items() if value]:
        raise CheckpointError(f"{beside}: asks for {', '.join(requests)}; only the plain model is read")
    values = content | {key: value for key, value in rotary.items() if value is not None}
    settings = {key: values[key] for key in SETTINGS if values.get(key) is not None}
    for key, value in settings.items():
        kind = int if SETTINGS[key] is int else (int, float)
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < math.inf:
            raise CheckpointError(f"{beside}: {key} is {value!r}; it must be a number above 0; put the right one there")
    return settings


def _config(
    tensors: Mapping[str, torch.Tensor], generation: str, settings: Mapping[str, float], file: Path
) -> LlamaConfig:
    """What the shapes say; of each kind of matrix the commonest shape counts, so that one odd matrix is found."""

    def rows(kind: str) -> int:
        ending = name_in(generation, f"{kind}.weight")
        sizes = [t.shape[0] for name, t in tensors.items() if name.endswith(f".{ending}") and t.ndim]
        if not sizes:
            raise CheckpointError(
                f"{file}: looks like {GENERATIONS[generation]}, but not one layer has a {ending}; its keys: "
                f"{', '.join(list(tensors)[:SHOWN])}"
            )
        return mode(sizes)

    heads = int(settings.get("num_attention_heads", HEADS))
    width, keys = rows("self_attn.q_proj"), rows("self_attn.k_proj")
    fit = width % heads == 0 and (width // heads) % 2 == 0 and keys % (width // heads) == 0
    shared = keys * heads // width if fit else 0
    if not shared or heads % shared or settings.get("num_key_value_heads", shared) != shared:
        raise CheckpointError(
            f"{file}: {width} query rows and {keys} key rows cannot belong to {heads} heads; give the right number, or "
            "put the published config.json beside it"
        )
    layers = {match[1] for name in tensors if (match := re.search(r"layers\.(\d+)\.", name))}
    return LlamaConfig(
        vocab_size=tensors[name_in(generation, EMBED)].shape[0],
        hidden_size=rows("input_layernorm"),
        intermediate_size=rows("mlp.gate_proj"),
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        num_key_value_heads=shared,
        head_dim=width // heads,
        max_position_embeddings=int(settings.get("max_position_embeddings", CONTEXT)),
        rope_parameters={"rope_type": "default", "rope_theta": float(settings.get("rope_theta", THETA))},
        rms_norm_eps=float(settings.get("rms_norm_eps", EPS)),
        tie_word_embeddings=True,
        pad_token_id=0,
    )


def _report(tensors: Mapping[str, torch.Tensor], model: LlamaForCausalLM, generation: str) -> str:
    """What does not fit between the file and the model that its shapes describe, under the file's names; one line.

    The head may be left out, as safetensors does when it is tied.
    """
    wanted = {name_in(generation, ours): tuple(tensor.shape) for ours, tensor in model.state_dict().items()}
    head, table = name_in(generation, HEAD), name_in(generation, EMBED)
    if any(name.startswith(PROJECTOR) for name in tensors):
        matrix = tensors.get(f"{PROJECTOR}weight")
        vision_width = matrix.shape[-1] if matrix is not None and matrix.ndim == 2 else 0
        wanted[f"{PROJECTOR}weight"] = (model.config.hidden_size, vision_width)
        if f"{PROJECTOR}bias" in tensors:
            wanted[f"{PROJECTOR}bias"] = (model.config.hidden_size,)
    shapes = {name: tuple(tensors[name].shape) for name in wanted if name in tensors}
    tied = head not in tensors or shapes[head] != shapes[table] or torch.equal(tensors[head], tensors[table])
    problems = {
        "missing": [name for name in wanted if name not in tensors and name != head],
        "not of this layout": [name for name in tensors if name not in wanted],
        "of another shape": [
            f"{n} {shape} instead of {wanted[n]}" for n, shape in shapes.items() if shape != wanted[n]
        ],
        "not equal to the embeddings that it is tied to": [] if tied else [head],
    }
    return "; ".join(f"{problem}: {', '.join(keys)}" for problem, keys in problems.items() if keys)


def _halves(name: str, weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Sort the rows of a query or key matrix from neighbouring pairs to two halves, head by head.

    `llama_legacy` turns the rows (0, 1), (2, 3), … of each head as pairs; the library turns row i with row
    i + head_dim / 2. Queries and keys sorted alike have the same products, and what is turned together stays together.
    """
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])  # (heads, pair, which, Dl)
    return pairs.transpose(1, 2).reshape(weight.shape)


def _statement(model: LlamaForCausalLM, projector: Mapping[str, torch.Tensor]) -> str:
    """The sizes, for people."""
    config, parameters = model.config, sum(p.numel() for p in model.parameters())
    line = (
        f"language model of {parameters:,} parameters (V {config.vocab_size}, Dl {config.hidden_size}, "
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} query and {config.num_key_value_heads} "
        f"key/value heads of {config.head_dim}, SwiGLU {config.intermediate_size})"
    )
    if not projector:
        return f"{line}, no projector"
    width, vision_width = projector["weight"].shape
    return f"{line}, projector {vision_width} to {width} {'with' if 'bias' in projector else 'without'} bias"
