"""MiniMind of two generations, written down from its description: random checkpoints, and what they compute.

Nothing here knows of the package or of the library's Llama: it is the oracle for what converts the one to the other.
"""

import torch
from torch.nn.functional import silu, softmax

NAMES = {
    "llama_legacy": {
        "table": "tok_embeddings.weight", "head": "output.weight", "norm": "norm.weight", "layer": "layers.{}.",
        "before": "attention_norm.weight", "between": "ffn_norm.weight",
        **{key: f"attention.w{key}.weight" for key in "qkvo"},
        **{key: f"feed_forward.w{i}.weight" for key, i in {"gate": 1, "down": 2, "up": 3}.items()},
    },
    "minimind2": {
        "table": "model.embed_tokens.weight", "head": "lm_head.weight", "norm": "model.norm.weight",
        "layer": "model.layers.{}.",
        "before": "input_layernorm.weight", "between": "post_attention_layernorm.weight",
        **{key: f"self_attn.{key}_proj.weight" for key in "qkvo"},
        **{key: f"mlp.{key}_proj.weight" for key in ("gate", "down", "up")},
    },
}  # fmt: skip
TINY = {"vocabulary": 300, "width": 64, "layers": 3, "heads": 8, "shared": 2, "inner": 96}
FULL = {"vocabulary": 6400, "width": 512, "layers": 8, "heads": 8, "shared": 2, "inner": 1408}


def checkpoint(generation: str, sizes: dict = TINY, vision_width: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the generation's names; with a `vision_width`, a projector with its bias, too."""
    names, random = NAMES[generation], torch.Generator().manual_seed(seed)
    width, inner, keys = sizes["width"], sizes["inner"], sizes["width"] * sizes["shared"] // sizes["heads"]
    shapes = {
        "q": (width, width), "k": (keys, width), "v": (keys, width), "o": (width, width),
        "gate": (inner, width), "up": (inner, width), "down": (width, inner),
    }  # fmt: skip

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) / shape[-1] ** 0.5

    def norm() -> torch.Tensor:
        return 1 + 0.2 * torch.randn(width, generator=random)

    weights = {names["table"]: matrix(sizes["vocabulary"], width)}
    for layer in range(sizes["layers"]):
        prefix = names["layer"].format(layer)
        weights |= {prefix + names[key]: matrix(*shape) for key, shape in shapes.items()}
        weights |= {prefix + names[key]: norm() for key in ("before", "between")}
    weights[names["norm"]] = norm()
    weights[names["head"]] = weights[names["table"]]
    if vision_width:
        weights["vision_proj.vision_proj.0.weight"] = matrix(width, vision_width)
        weights["vision_proj.vision_proj.0.bias"] = torch.randn(width, generator=random)
    return weights


def logits(generation: str, weights: dict, embeds: torch.Tensor, heads: int = 8) -> torch.Tensor:
    """The logits (T, V) of one text's embeddings (T, Dl), in 64-bit floats."""
    names, w = NAMES[generation], {name: tensor.double() for name, tensor in weights.items()}
    turn, x, size = {"llama_legacy": turn_pairs, "minimind2": turn_halves}[generation], embeds.double(), len(embeds)
    mask = torch.full((size, size), -torch.inf, dtype=torch.float64).triu(1)
    layer = 0
    while (prefix := names["layer"].format(layer)) + names["q"] in w:
        h = rms(x, w[prefix + names["before"]])
        q, k, v = ((h @ w[prefix + names[key]].T).view(size, -1, x.shape[1] // heads) for key in "qkv")
        q, k = turn(q), turn(k)
        shared = torch.arange(heads) // (heads // k.shape[1])  # which key/value head a query head reads
        scores = torch.einsum("ihd,jhd->hij", q, k[:, shared]) / q.shape[-1] ** 0.5 + mask
        read = torch.einsum("hij,jhd->ihd", softmax(scores, dim=-1), v[:, shared]).reshape(size, -1)
        x = x + read @ w[prefix + names["o"]].T
        h = rms(x, w[prefix + names["between"]])
        x = x + (silu(h @ w[prefix + names["gate"]].T) * (h @ w[prefix + names["up"]].T)) @ w[prefix + names["down"]].T
        layer += 1
    return rms(x, w[names["norm"]]) @ w[names["head"]].T


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def angles(size: int, half: int) -> torch.Tensor:
    """Position times frequency, base one million: (T, 1, half)."""
    frequencies = 1e6 ** (-torch.arange(half, dtype=torch.float64) / half)
    return (torch.arange(size, dtype=torch.float64)[:, None] * frequencies)[:, None]


def turn_pairs(x: torch.Tensor) -> torch.Tensor:
    """`llama_legacy`: channels 2i and 2i + 1 of a head are one complex number, turned by its angle."""
    numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    turned = numbers * torch.exp(1j * angles(len(x), x.shape[-1] // 2))
    return torch.view_as_real(turned).flatten(-2)


def turn_halves(x: torch.Tensor) -> torch.Tensor:
    """`minimind2`: channels i and i + half of a head turn together."""
    first, second = x.chunk(2, dim=-1)
    angle = angles(len(x), first.shape[-1])
    return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], dim=-1)
