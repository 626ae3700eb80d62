"""Attention for training in 16 bits on a CPU: the library's eager attention with half of its memory traffic.

Eager attention writes the scores (B, H, T, S) to new memory each time it scales, masks or normalises them, and repeats
keys and values for the queries that share them. Here the queries are scaled instead, the mask is added in place, and
queries that share their keys are multiplied together. The softmax sums in 32 bits in both. Only queries, keys, values
and attention weights are saved for backward. This takes a quarter to a third off a training step.

The two halves are custom operators, so that `torch.compile` leaves them as they are: the loops that it generates for a
16-bit softmax of any length are slower than torch's own. Letters as in `config.py`; H query heads, G heads of keys and
values, d their width, T queries, S keys.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

LEAN = "minivlm_lean"  # its name for `set_attn_implementation`


def lean_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_,
) -> tuple[Tensor, None]:
    """Attention as the library calls it.

    Args:
        module: the layer; not used.
        query: (B, H, T, d).
        key, value: (B, G, S, d); H / G queries share each.
        attention_mask: (B, 1, T, S), added to the scores; None lets every query see every key.
        scaling: of the scores.
        dropout: must be 0; `WorkingCopy` leaves a model with dropout to the library.

    Returns:
        (B, T, H, d), and None instead of the weights.

    Raises:
        ValueError: there is dropout.
    """
    if dropout:
        raise ValueError(f"this attention has no dropout, but {dropout} is asked for; set the attention to 'sdpa'")
    return _attend(query, key, value, attention_mask, scaling)[0], None


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, d) and the attention weights (B * G, H / G * T, S)."""
    (batch, heads, length, width), keys = query.shape, key.shape[2]
    scores = torch.bmm(_grouped(query * scaling, key), key.flatten(0, 1).transpose(1, 2))  # (B * G, H / G * T, S)
    if mask is not None:
        scores.view(batch, heads, length, keys).add_(mask)
    weights = scores.softmax(dim=-1)
    output = torch.bmm(weights, value.flatten(0, 1)).view(batch, heads, length, width)
    return output.transpose(1, 2).contiguous(), weights


def attend_back(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, from that of the output (B, T, H, d)."""
    grad = _grouped(grad.transpose(1, 2), key)  # (B * G, H / G * T, d)
    grad_weights = torch.bmm(grad, value.flatten(0, 1).transpose(1, 2))
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    grad_query = torch.bmm(grad_scores, key.flatten(0, 1)).mul_(scaling)
    grad_key = torch.bmm(grad_scores.transpose(1, 2), _grouped(query * scaling, key))
    grad_value = torch.bmm(weights.transpose(1, 2), grad)
    return grad_query.view(query.shape), grad_key.view(key.shape), grad_value.view(value.shape)


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """Queries (B, H, T, d) beside the others that share their keys: (B * G, H / G * T, d)."""
    (batch, heads, length, width), groups = query.shape, key.shape[1]
    return query.reshape(batch * groups, heads // groups * length, width)


# ---- what torch needs to know: shapes for the compiler, the backward pass, and the library's name


_attend = torch.library.custom_op("minivlm::attend", attend, mutates_args=())
_attend_back = torch.library.custom_op("minivlm::attend_back", attend_back, mutates_args=())


@_attend.register_fake
def _(query, key, value, mask, scaling):
    (batch, heads, length, width), (_, groups, keys, _) = query.shape, key.shape
    weights = query.new_empty(batch * groups, heads // groups * length, keys)
    return query.new_empty(batch, length, heads, width), weights


@_attend_back.register_fake
def _(grad, query, key, value, weights, scaling):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs, output) -> None:
    query, key, value, _, ctx.scaling = inputs
    ctx.save_for_backward(query, key, value, output[1])
    ctx.set_materialize_grads(False)  # no zeros for the weights, which get no gradient
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    if grad is None:  # nothing depends on the output
        return (None,) * 5
    return *_attend_back(grad, *ctx.saved_tensors, ctx.scaling), None, None


_attend.register_autograd(_backward, setup_context=_save)
AttentionInterface.register(LEAN, lean_attention)
AttentionMaskInterface.register(LEAN, eager_mask)
