"""The precision and speed of training steps: a working copy of the model in 32 or 16 bits, compiled or not.

In 32 bits the copy shares the model's weights. In 16 bits (bfloat16) it has its own, and its gradients are summed in
the model's 32 bits, where a small step is not lost (Micikevicius et al., Mixed precision training, arXiv:1710.03740,
section 3.1). The model itself is never touched: its attention, its mode and its config stay as they were.
"""

import copy
import ctypes
import math
import sys
import time
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from minivlm.runtime.attention import LEAN

if TYPE_CHECKING:
    from minivlm.model import MiniVLMForConditionalGeneration

PRECISIONS = ("fp32", "bf16")
BF16_GAIN = 0.9  # bf16 costs digits: it must take less than this share of the time of fp32
# Rows times weights of the language model. Compiling takes a minute the first time; it saves 1 to 3 ms a row with the
# 3.7M weights of scenes, in the recipe's passes of 16 and 32 rows, and 25 to 40 ms with 26M. So a run must be long.
COMPILE_FROM = 1e11
COMPILER_NEEDED = "torch.compile needs a C++ compiler and Python's headers, or leave it out (--no-compile)"


class CompileError(RuntimeError):
    """The language model cannot be compiled here. The message says why, and what to do."""


class WorkingCopy:
    """A working copy of a model, for the training steps of one run.

    Args:
        model: what is trained; its `requires_grad` says which parts. Make a new copy when that, or the weights, were
            changed by anything but the optimizer.
        precision: "fp32", or "bf16".
        compiled: compile the language model's layers with `torch.compile`, once for all lengths.
        encoder: whether the copy has one; where features are known it would only take memory.

    Attributes:
        model: the copy, in training mode. After `backward` its gradients are in the model's own weights.

    Raises CompileError where compiling failed.
    """

    def __init__(
        self, model: "MiniVLMForConditionalGeneration", precision: str, compiled: bool = False, encoder: bool = True
    ):
        half = precision == "bf16"
        replacements = {} if encoder else {id(part): None for part in (model.vision, *model.vision.parameters())}
        weights = [p for p in model.parameters() if id(p) not in replacements]
        for weight in weights:
            halved = nn.Parameter(weight.detach().to(torch.bfloat16), weight.requires_grad) if half else weight
            replacements[id(weight)] = halved
        self._trained = [(p, replacements[id(p)]) for p in weights if half and p.requires_grad]
        self.model = copy.deepcopy(model, replacements).train()  # a memo: deepcopy takes its entries as done already
        language_model = self.model.language_model
        if half and model.device.type == "cpu" and not language_model.config.attention_dropout:
            language_model.set_attn_implementation(LEAN)
        if compiled:
            _compile(language_model)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss to those of the model's own weights, in their precision."""
        loss.backward()
        for parameter, halved in self._trained:
            if halved.grad is not None:
                gradient = halved.grad.to(parameter.dtype)
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
                halved.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the model's weights after an optimizer step."""
        for parameter, halved in self._trained:
            halved.copy_(parameter)


def _compile(language_model: nn.Module) -> None:
    """Compile every layer for all shapes, on a shape that is always the same.

    What the compiler sees first decides in which order it sums: a run that goes on from its checkpoint begins with
    another batch, and would end with other digits.
    """
    table = language_model.get_input_embeddings().weight
    embeds = table.new_zeros(2, 64, table.shape[1], requires_grad=True)  # (B, T, Dl)
    attention_mask = torch.ones(2, 64, device=table.device)  # (B, T)
    try:
        for layer in language_model.base_model.layers:
            layer.compile(dynamic=True)
        logits = language_model(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False).logits
        (logits.sum() * 0).backward()  # adds zeros to the gradients
    except (RuntimeError, OSError, ImportError) as error:
        reason = f"the language model cannot be compiled here ({_first_line(error)})"
        raise CompileError(f"{reason}; {COMPILER_NEEDED}") from error


def why_not_compiled() -> str:
    """An empty string where `torch.compile` works, else the reason in a line; takes some seconds the first time."""
    try:
        torch.compile(lambda numbers: numbers * 2 + 1)(torch.ones(8))
    except (RuntimeError, OSError, ImportError) as error:
        return _first_line(error)
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def choose_compiled(model: "MiniVLMForConditionalGeneration", rows: int) -> bool:
    """Whether compiling saves time in a run over so many rows, and works here; prints why it does not."""
    weights = sum(p.numel() for p in model.language_model.parameters())
    if rows * weights < COMPILE_FROM:
        return False
    if reason := why_not_compiled():
        print(f"Not compiled, so a step takes up to twice as long: {reason}. {COMPILER_NEEDED}.")
    return not reason


def choose_precision(model: "MiniVLMForConditionalGeneration", seconds: float = 1.0) -> str:
    """ "bf16" where this processor multiplies matrices of the model's shape clearly faster in 16 bits, else "fp32".

    Some processors are 4.5 times as fast in bf16, others slower, and none of them says so. So both are measured in
    turn, forward and backward through one layer's two large matrices; the best time of each counts.
    """
    config, device = model.config.text_config, model.device
    width, inner = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    shapes = (2048, width), (inner, width), (width, inner)  # about what a batch holds, and the two matrices
    tensors, best = {}, {"fp32": math.inf, "bf16": math.inf}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        tensors[precision] = [torch.ones(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or math.inf in best.values():
        for precision, (states, up, down) in tensors.items():
            began = time.perf_counter()
            F.linear(F.linear(states, up), down).sum().backward()
            up.grad[0, 0].item()  # waits for a GPU
            best[precision] = min(best[precision], time.perf_counter() - began)
    return "bf16" if best["bf16"] < BF16_GAIN * best["fp32"] else "fp32"


def give_back_memory() -> None:
    """Hand freed memory back to the system, where its C library does not do so by itself.

    Every batch has another length, so what a step frees seldom fits the next one; glibc keeps the pieces, and in 420
    steps they grew to half of a process's memory. Giving them back every tenth step took no measurable time.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "gnu_get_libc_version"):  # it is glibc
        library.malloc_trim(0)
