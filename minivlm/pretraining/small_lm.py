"""The smaller language model of the ablations, trained on text alone by the recipe of the shipped one."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

from minivlm.checkpoint import load_checkpoint
from minivlm.config import MiniVLMConfig
from minivlm.model import assemble
from minivlm.pretraining import language_model, loop
from minivlm.pretraining.build import save_base, thinned
from minivlm.runtime.paths import BASE

SMALL_LM = "small_lm"  # a base checkpoint beside `base`, with a smaller language model
SMALL_SHAPE = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3}
SMALL_SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def small_config(config: MiniVLMConfig) -> MiniVLMConfig:
    """The same model with the smaller language model: Dl = 128, 3 layers."""
    config = deepcopy(config)
    for name, value in SMALL_SHAPE.items():
        setattr(config.text_config, name, value)
    return config


def make_small_lm(
    out: Path,
    work: Path,
    data: Path,
    rounds: Sequence[tuple[loop.Recipe, language_model.Curriculum]] = language_model.ROUNDS,
    exam: int = 500,
    command: str = "minivlm experiment small-lm",
) -> Path:
    """Train the smaller language model; save a base checkpoint `out` with encoder and tokenizer of `data/base`.

    Unfinished work stays in `work`, so that it can be stopped and go on. Raises ValueError where `work` holds the state
    of another recipe, and what `load_checkpoint` and `save_checkpoint` raise.
    """
    large, processor, _ = load_checkpoint(data / BASE)
    config = small_config(large.config)
    small, metrics = language_model.train(processor, config, work, rounds=rounds, exam=exam)
    model = assemble(large.vision.clip, small, config.image_token_id, rounds[0][0].seed)
    meta = {"seed": rounds[0][0].seed, "command": command, "metrics": {"language_model": metrics}}
    logs = {"language_model.log.jsonl": thinned(work)}
    return save_base(out, model, processor, meta, parts=("projector", "language_model"), base=data / BASE, extra=logs)
