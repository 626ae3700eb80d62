"""What a training step computes with: a working copy of the model, quick where the processor is quick.

In 32 bits the copy shares the model's weights. In 16 bits (bfloat16) it has its own, half as large: it multiplies with
these, and what is learnt is added up in the model's own 32 bits, since a small step is lost in 16 (Micikevicius et al.,
Mixed precision training, arXiv:1710.03740, section 3.1). The model itself is never touched: its attention, its mode and
its config stay as they were. Letters as in `config.py`; H heads of the queries, G of keys and values, d their width.
"""

import copy
import ctypes
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, eager_attention_forward, rotate_half

from minivlm.model import MiniVLMForConditionalGeneration

LEAN = "minivlm_lean"  # the name of `lean_attention` in the library's register
PRECISIONS = ("fp32", "bf16")
BF16_GAIN = 0.9  # bf16 costs digits: it must take less than this share of the time of fp32
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # what `mallopt` sets
# To what glibc lets its thresholds grow by itself in a process that frees large memory. Whoever sets one ends that
# growth for good: with the small values it begins with, everything after a training would get its memory anew.
GROWN_MMAP, GROWN_TRIM, USUAL_MMAPS = 32 * 2**20, 64 * 2**20, 65_536
# Rows times weights of the language model. Compiling takes a minute the first time; it saves 1 to 3 ms a row with the
# 3.7M weights of scenes, in the recipe's passes of 16 and 32 rows, and 25 to 40 ms with 26M. So a run must be long.
COMPILE_FROM = 1e11


class EngineError(RuntimeError):
    """The language model cannot be compiled here. The message says why, and what to do."""


class Engine:
    """A working copy of a model, for the steps of one run.

    Args:
        model: what learns; its `requires_grad` says which parts. Make a new engine when that, or the weights, were
            changed by others.
        precision: "fp32", or "bf16".
        compiled: compile the language model's layers with `torch.compile`, once for all lengths.
        encoder: whether the copy has one; where features are known it would only take memory.

    Attributes:
        model: the copy, in training mode. Its gradients are found in the model's own weights after `backward`.

    Raises:
        EngineError: compiling failed.
    """

    def __init__(
        self, model: MiniVLMForConditionalGeneration, precision: str, compiled: bool = False, encoder: bool = True
    ):
        half = precision == "bf16"
        left_out = set() if encoder else set(model.vision.parameters())
        weights = [p for p in model.parameters() if p not in left_out]
        own = {id(p): _halved(p) if half else p for p in weights} | ({} if encoder else {id(model.vision): None})
        self._learning = [(p, own[id(p)]) for p in weights if half and p.requires_grad]
        self.model = copy.deepcopy(model, own).train()  # deepcopy takes what it is told for these, and copies the rest
        language_model = self.model.language_model
        if half and model.device.type == "cpu" and not language_model.config.attention_dropout:
            language_model.set_attn_implementation(LEAN)
        _only_where_asked(language_model, compiled)
        if compiled:
            _compile(language_model)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss to those of the model's own weights, in their precision."""
        loss.backward()
        for parameter, halved in self._learning:
            if halved.grad is not None:
                gradient = halved.grad.to(parameter.dtype)
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
                halved.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what the optimizer has made of the weights."""
        for parameter, halved in self._learning:
            halved.copy_(parameter)


def _halved(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=parameter.requires_grad)


# ---- attention


def lean_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_,
) -> tuple[torch.Tensor, None]:
    """What the library's eager attention computes, with half of its memory traffic; its models call it by `LEAN`.

    Eager attention scales, masks and softens the scores one after the other, each into new memory. Here the queries
    are scaled instead, the mask is written into the scores in place, the softmax keeps its precision (it adds up in 32
    bits either way), and keys and values are not copied for the queries that share them. `torch.compile` takes it as
    it is: the loops that it makes for a softmax in 16 bits, of any length, are slower than torch's own.

    Args:
        query: (B, H, T, d).
        key, value: (B, G, S, d); H / G queries share each.
        attention_mask: (B, 1, T, S), added to the scores; None lets every query look everywhere.
        scaling: of the scores.
        dropout: 0; an `Engine` leaves a model with dropout to the library.

    Returns:
        (B, T, H, d), and None in the place of the weights.

    Raises:
        ValueError: there is dropout.
    """
    if dropout:
        raise ValueError(f"this attention has no dropout, and shall drop {dropout}; set the attention to 'sdpa'")
    return _attend(query, key, value, attention_mask, scaling)[0], None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `lean_attention` does: what was read, (B, T, H, d), and the weights, (B * G, H / G * T, S)."""
    (batch, heads, length, width), seen = query.shape, key.shape[2]
    query, key, value = _grouped(query * scaling, key), _flat(key), _flat(value)
    scores = torch.bmm(query, key.transpose(1, 2))  # (B * G, H / G * T, S)
    if mask is not None:
        scores.view(batch, heads, length, seen).add_(mask)
    weights = scores.softmax(dim=-1)  # (B * G, H / G * T, S)
    read = torch.bmm(weights, value).view(batch, heads, length, width)
    return read.transpose(1, 2).contiguous(), weights


def attend_back(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of queries, keys and values, from that of what was read, (B, T, H, d)."""
    grad = _grouped(grad.transpose(1, 2), key)  # (B * G, H / G * T, d)
    to_weights = torch.bmm(grad, _flat(value).transpose(1, 2))
    to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
    to_query = torch.bmm(to_scores, _flat(key)).mul_(scaling)
    to_key = torch.bmm(to_scores.transpose(1, 2), _grouped(query * scaling, key))
    to_value = torch.bmm(weights.transpose(1, 2), grad)
    return to_query.view(query.shape), to_key.view(key.shape), to_value.view(value.shape)


_attend = torch.library.custom_op("minivlm::attend", attend, mutates_args=())
_attend_back = torch.library.custom_op("minivlm::attend_back", attend_back, mutates_args=())


def _grouped(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Queries beside the others that share their keys: (B * G, H / G * T, d)."""
    (batch, heads, length, width), groups = query.shape, key.shape[1]
    return query.reshape(batch * groups, heads // groups * length, width)


def _flat(key: torch.Tensor) -> torch.Tensor:
    return key.reshape(-1, *key.shape[2:])  # (B * G, S, d)


@_attend.register_fake
def _(query, key, value, mask, scaling):
    (batch, heads, length, width), (_, groups, seen, _) = query.shape, key.shape
    weights = query.new_empty(batch * groups, heads // groups * length, seen)
    return query.new_empty(batch, length, heads, width), weights


@_attend_back.register_fake
def _(grad, query, key, value, weights, scaling):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx, inputs, output) -> None:
    query, key, value, _, ctx.scaling = inputs
    ctx.save_for_backward(query, key, value, output[1])
    ctx.set_materialize_grads(False)  # no zeros for the weights, which nothing learns from
    ctx.mark_non_differentiable(output[1])


def _learn(ctx, grad, _):
    if grad is None:  # nobody learns from what was read
        return (None,) * 5
    return *_attend_back(grad, *ctx.saved_tensors, ctx.scaling), None, None


_attend.register_autograd(_learn, setup_context=_keep)
AttentionInterface.register(LEAN, lean_attention)
AttentionMaskInterface.register(LEAN, eager_mask)


# ---- the last layer


class LastLayer(nn.Module):
    """A language model's last layer, which computes only the places that somebody asks for.

    Above it there is nothing but the head, and where there is no label no head looks: such a place is needed for its
    key and its value, not for its query and its multi-layer perceptron. It has the library's layer's own modules.

    Attributes:
        asked: the places whose output is wanted.
    """

    def __init__(self, layer: LlamaDecoderLayer):
        super().__init__()
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp
        self.asked = slice(None)

    def compile(self, **options) -> None:
        """Compile what is computed; what is cut out stays outside, since its length is another in every batch."""
        self._attended = torch.compile(self._attended, **options)
        self._thought_over = torch.compile(self._thought_over, **options)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_,
    ) -> torch.Tensor:
        """From (B, T, Dl) to (B, K, Dl) at the K places that are asked for."""
        if attention_mask is None:  # the library leaves out a mask that only hides what comes later
            length = hidden_states.shape[1]
            shown = torch.ones(1, 1, length, length, dtype=torch.bool, device=hidden_states.device)
            attention_mask = shown.tril()
        asked = _cut(hidden_states[:, self.asked])  # (B, K, Dl)
        where = [_cut(angles[:, self.asked]) for angles in position_embeddings]  # (B, K, d)
        mask = _cut(attention_mask[:, :, self.asked])  # (B, 1, K, T)
        return self._thought_over(self._attended(asked, hidden_states, where, position_embeddings, mask))

    def _attended(self, asked, hidden_states, where, everywhere, mask) -> torch.Tensor:
        attention, width = self.self_attn, self.self_attn.head_dim
        looking, seen = self.input_layernorm(asked), self.input_layernorm(hidden_states)
        query = _turned(_heads(attention.q_proj(looking), width), where)  # (B, H, K, d)
        key = _turned(_heads(attention.k_proj(seen), width), everywhere)  # (B, G, T, d)
        value = _heads(attention.v_proj(seen), width)  # (B, G, T, d)
        kind = attention.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)
        dropout = attention.attention_dropout if self.training else 0.0
        read, _ = attend(attention, query, key, value, mask, scaling=attention.scaling, dropout=dropout)
        return asked + attention.o_proj(read.flatten(2))

    def _thought_over(self, attended: torch.Tensor) -> torch.Tensor:
        return attended + self.mlp(self.post_attention_layernorm(attended))


def _cut(tensor: torch.Tensor) -> torch.Tensor:
    """In memory of its own, and in order, also where the whole has one row only: so is one row like many."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _heads(states: torch.Tensor, width: int) -> torch.Tensor:
    return states.unflatten(-1, (-1, width)).transpose(1, 2)


def _turned(states: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary positions (Su et al., RoFormer, arXiv:2104.09864, section 3.2.2), as the library turns both at once."""
    cosine, sine = (angle.unsqueeze(1) for angle in angles)
    return states * cosine + rotate_half(states) * sine


def _only_where_asked(language_model: nn.Module, compiled: bool) -> None:
    """Exchange the last layer in those calls that ask for a few places' logits, if it is one that we know.

    Other calls find the library's own: those that ask for all places, or count them from the end, and those that keep
    keys and values for later calls, which `LastLayer` does not.
    """
    layers = language_model.base_model.layers
    masked = language_model.config._attn_implementation in ("eager", "sdpa", LEAN)  # others have another kind of mask
    if type(layers[-1]) is not LlamaDecoderLayer or not masked:
        return
    whole, last = layers[-1], LastLayer(layers[-1])
    if compiled:
        last.compile(dynamic=True)

    def exchange(_, args, options):
        layers[-1] = whole  # a call that was interrupted put nothing back
        asked = options.get("logits_to_keep", 0)
        if not isinstance(asked, torch.Tensor) or not asked.numel() or options.get("use_cache") is not False:
            return None
        first = int(asked.min())
        if first < 0:
            return None
        last.asked, layers[-1] = slice(first, int(asked.max()) + 1), last
        return args, options | {"logits_to_keep": asked - first}

    def put_back(*_):
        layers[-1] = whole

    language_model.register_forward_pre_hook(exchange, with_kwargs=True)
    language_model.register_forward_hook(put_back, always_call=True)


# ---- compiling


def _compile(language_model: nn.Module) -> None:
    """Compile every layer for all shapes, on a shape that is always the same.

    What the compiler sees first decides how it sums up. A run that goes on from its checkpoint would else begin with
    another batch, and end with other digits.
    """
    table = language_model.get_input_embeddings().weight
    embeds = table.new_zeros(2, 64, table.shape[1], requires_grad=True)  # (B, T, Dl)
    shown, asked = torch.ones(2, 64, device=table.device), torch.arange(20, 50, device=table.device)  # (B, T), (K,)
    try:
        for layer in language_model.base_model.layers:
            layer.compile(dynamic=True)
        options = {"attention_mask": shown, "use_cache": False, "logits_to_keep": asked}
        logits = language_model(inputs_embeds=embeds, **options).logits  # (B, K, V)
        (logits.sum() * 0).backward()  # adds zeros to the gradients
    except (RuntimeError, OSError, ImportError) as error:
        raise EngineError(
            f"the language model cannot be compiled here ({_first_line(error)}); {WHAT_IT_NEEDS}"
        ) from error


WHAT_IT_NEEDS = "torch.compile needs a C++ compiler and Python's headers, or leave it out (--no-compile)"


def why_not_compiled() -> str:
    """Nothing where `torch.compile` works, else what it says, in a line; some seconds the first time."""
    try:
        torch.compile(lambda numbers: numbers * 2 + 1)(torch.ones(8))
    except (RuntimeError, OSError, ImportError) as error:
        return _first_line(error)
    return ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def choose_compiled(model: MiniVLMForConditionalGeneration, rows: int) -> bool:
    """Whether compiling will pay in a run over so many rows, and works here; if only the latter fails, says so."""
    weights = sum(p.numel() for p in model.language_model.parameters())
    if rows * weights < COMPILE_FROM:
        return False
    if reason := why_not_compiled():
        print(f"Not compiled, so a step takes up to twice as long: {reason}. {WHAT_IT_NEEDS}.")
    return not reason


def choose_precision(model: MiniVLMForConditionalGeneration, seconds: float = 1.0) -> str:
    """ "bf16" where this processor multiplies matrices of the model's shape clearly faster in 16 bits, else "fp32".

    Some processors are 4.5 times as fast in bf16, others slower, and none of them says so: it is measured, forward
    and backward through one layer's two large matrices, each way in turn, the best time of each.
    """
    config, device = model.config.text_config, model.device
    width, inner = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    best = {"fp32": math.inf, "bf16": math.inf}
    made = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        up, down = (
            torch.ones(s, device=device, dtype=dtype, requires_grad=True) for s in ((inner, width), (width, inner))
        )
        made[precision] = torch.ones(2048, width, device=device, dtype=dtype), up, down  # about what a batch holds
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or math.inf in best.values():
        for precision, (rows, up, down) in made.items():
            began = time.perf_counter()
            F.linear(F.linear(rows, up), down).sum().backward()
            up.grad[0, 0].item()  # waits for a GPU
            best[precision] = min(best[precision], time.perf_counter() - began)
    return "bf16" if best["bf16"] < BF16_GAIN * best["fp32"] else "fp32"


@contextmanager
def held_memory() -> Iterator[None]:
    """Keep freed memory for the next step, where the C library is glibc; hand it back at the end.

    glibc asks the system for every large tensor anew and returns it when it is freed. The system fills each page with
    zeros before it hands it out: a third of the time of a step of 32 long rows.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        if library is not None:
            library.mallopt(M_MMAP_MAX, USUAL_MMAPS)
            library.mallopt(M_MMAP_THRESHOLD, GROWN_MMAP)
            library.mallopt(M_TRIM_THRESHOLD, GROWN_TRIM)
        give_back_memory()


def give_back_memory() -> None:
    """Hand freed memory back to the system, where its C library does not do so by itself.

    Every batch has another length, so what a step frees seldom fits the next one; glibc keeps the pieces, and in 420
    steps they grew to half of a process's memory. Giving them back every tenth step cost no time that could be
    measured.
    """
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is the one that these calls are about."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if library is not None and hasattr(library, "gnu_get_libc_version") else None
