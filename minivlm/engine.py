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

from minivlm.model import MiniVLMForConditionalGeneration

LEAN = "minivlm_lean"  # the name of `lean_attention` in the library's register
PRECISIONS = ("fp32", "bf16")
BF16_GAIN = 0.9  # bf16 costs digits: it must take less than this share of the time of fp32
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # what `mallopt` sets, and glibc's own values
USUAL_TRIM, USUAL_MMAPS = 128 * 1024, 65_536
COMPILE_FROM = 2e10  # rows times weights of the language model: compiling takes half a minute, so a run must be long


class EngineError(RuntimeError):
    """The language model cannot be compiled here. The message says why, and what to do."""


class Engine:
    """A working copy of a model, for the steps of one run.

    Args:
        model: what learns; its `requires_grad` says which parts. Make a new engine when that, or the weights, were
            changed by others.
        precision: "fp32", or "bf16".
        compiled: compile the language model's layers with `torch.compile`, once for all lengths.

    Attributes:
        model: the copy, in training mode. Its gradients are found in the model's own weights after `backward`.

    Raises:
        EngineError: compiling failed.
    """

    def __init__(self, model: MiniVLMForConditionalGeneration, precision: str, compiled: bool = False):
        half = precision == "bf16"
        own = {id(p): _halved(p) if half else p for p in model.parameters()}
        self._learning = [(p, own[id(p)]) for p in model.parameters() if half and p.requires_grad]
        self.model = copy.deepcopy(model, own).train()  # deepcopy takes what it is told for these, and copies the rest
        language_model = self.model.language_model
        if half and model.device.type == "cpu":
            language_model.set_attn_implementation(LEAN)
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
    bits either way), and keys and values are not copied for the queries that share them.

    Args:
        query: (B, H, T, d).
        key, value: (B, G, S, d); H / G queries share each.
        attention_mask: (B, 1, T, S), added to the scores; None lets every query look everywhere.
        scaling: of the scores.
        dropout: share of the attention weights that is dropped while `module` trains.

    Returns:
        (B, T, H, d), and None in the place of the weights.
    """
    batch, heads, length, width = query.shape
    groups, seen = key.shape[1], key.shape[2]
    shared = (query * scaling).reshape(batch, groups, heads // groups * length, width)  # (B, G, H / G * T, d)
    scores = (shared @ key.transpose(2, 3)).view(batch, heads, length, seen)  # (B, H, T, S)
    if attention_mask is not None:
        scores.add_(attention_mask)
    weights = F.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)  # (B, H, T, S)
    read = weights.view(batch, groups, heads // groups * length, seen) @ value  # (B, G, H / G * T, d)
    return read.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(LEAN, lean_attention)
AttentionMaskInterface.register(LEAN, eager_mask)


def _compile(language_model: nn.Module) -> None:
    """Compile every layer for all shapes, on a shape that is always the same.

    What the compiler sees first decides how it sums up. A run that goes on from its checkpoint would else begin with
    another batch, and end with other digits.
    """
    base, table = language_model.base_model, language_model.get_input_embeddings().weight
    embeds = table.new_zeros(2, 64, table.shape[1], requires_grad=True)  # (B, T, Dl)
    shown = torch.ones(2, 64, device=table.device)  # (B, T)
    try:
        for layer in base.layers:
            layer.compile(dynamic=True)
        hidden = base(inputs_embeds=embeds, attention_mask=shown, use_cache=False).last_hidden_state  # (B, T, Dl)
        (hidden.sum() * 0).backward()  # adds zeros to the gradients
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
            library.mallopt(M_TRIM_THRESHOLD, USUAL_TRIM)
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
