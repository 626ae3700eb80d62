"""The exercise of notebook 01: count W and the language model from a config, without building either.

Each typical mistake is a formula of its own; an answer is compared with all of them, at sizes where no two agree.
Letters as in `config.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lessons.exercises.checking import Wrong, called, exercise, forbidden
from minivlm.config import MiniVLMConfig, clip_26m_config, scenes_config
from minivlm.model import MiniVLMForConditionalGeneration, ledger


@dataclass(frozen=True)
class Formula:
    """How many parameters a Llama has, with the mistakes that one can make; as it stands it is right.

    Attributes:
        tables: embedding tables (the head is the same one again, tied).
        grouped: keys and values have fewer heads than queries.
        mlp: matrices of the gated MLP.
        norms: norms in a layer.
        final_norm: the norm behind the last layer.
        biases: every matrix has a bias.
        attention: matrices of attention are counted at all; 4 of them.
        repeated: all layers are counted.
    """

    tables: int = 1
    grouped: bool = True
    mlp: int = 3
    norms: int = 2
    final_norm: bool = True
    biases: bool = False
    attention: int = 4
    repeated: bool = True

    def __call__(self, config: MiniVLMConfig) -> int:
        """The number for the language model of a config."""
        text, width = config.text_config, config.language_width
        narrow = width * text.num_key_value_heads // text.num_attention_heads if self.grouped else width
        outputs = (width, narrow, narrow, width)[: self.attention]
        layer = width * sum(outputs) + self.mlp * width * text.intermediate_size + self.norms * width
        if self.biases:
            layer += sum(outputs) + 2 * text.intermediate_size + width
        layers = text.num_hidden_layers if self.repeated else 1
        return self.tables * text.vocab_size * width + layers * layer + self.final_norm * width


LANGUAGE_MODEL: tuple[tuple[Formula, str], ...] = (
    (
        Formula(tables=2),
        "counts the table of V × Dl numbers twice. The head that turns a vector into logits is the embedding table "
        "again (`tie_word_embeddings`): count it once",
    ),
    (Formula(tables=0), "lacks the embedding table of V × Dl numbers"),
    (
        Formula(grouped=False),
        "has keys and values as wide as queries. `num_key_value_heads` is smaller than `num_attention_heads`: their "
        "matrices are Dl × (Dl · num_key_value_heads / num_attention_heads)",
    ),
    (
        Formula(attention=3),
        "lacks the output matrix of attention: besides queries, keys and values there is one more of Dl × Dl",
    ),
    (Formula(attention=0), "lacks attention altogether: queries, keys, values and output, in every layer"),
    (
        Formula(mlp=2),
        "has two matrices in the MLP. A Llama's is gated: one matrix up, one for the gate, one down, each with "
        "Dl × intermediate_size numbers",
    ),
    (Formula(norms=0), "lacks the norms in the layers: two of Dl numbers in each"),
    (Formula(norms=1), "has one norm in a layer; there are two, one before attention and one before the MLP"),
    (Formula(final_norm=False), "lacks one norm of Dl numbers: the one behind the last layer"),
    (Formula(norms=0, final_norm=False), "lacks all norms: two of Dl numbers in each layer, one behind the last"),
    (Formula(biases=True), "has biases. No matrix of a Llama has one"),
    (Formula(repeated=False), "has one layer only; there are `num_hidden_layers` of them"),
)


@exercise
def count_parameters(answer: Callable[[MiniVLMConfig], tuple[int, int]]) -> None:
    """Check `count_parameters(config) -> (W, language model)`."""
    with forbidden(ledger, MiniVLMForConditionalGeneration, answer=answer):
        for config in (odd_config(), scenes_config(), clip_26m_config()):
            _compare(*_pair(called(answer, config)), config)


def odd_config() -> MiniVLMConfig:
    """Sizes at which no two formulas agree, and which nobody knows by heart."""
    config = scenes_config(vocab_size=1009)
    config.vision_config.hidden_size = 144
    text = config.text_config
    text.hidden_size, text.num_hidden_layers, text.intermediate_size = 320, 7, 808
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 10, 2, 32
    return config


def _pair(answer: Any) -> tuple[int, int]:
    """The two numbers of an answer, which have to be whole."""
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise Wrong(f"return two numbers, W's and the language model's, not {answer!r}")
    if any(isinstance(number, bool) or not isinstance(number, int) for number in answer):
        raise Wrong(f"{answer!r} are not two whole numbers; divide with `//` and not with `/`")
    return answer[0], answer[1]


def _compare(matrix: int, language_model: int, config: MiniVLMConfig) -> None:
    """Say which number is wrong and, where the mistake is a typical one, what it is."""
    right = config.vision_width * config.language_width, Formula()(config)
    if (matrix, language_model) == right:
        return
    if (matrix, language_model) == right[::-1]:
        raise Wrong("the two numbers stand the other way round; return W's first")
    presets = (scenes_config(), clip_26m_config())
    if (matrix, language_model) in [(c.vision_width * c.language_width, Formula()(c)) for c in presets]:
        raise Wrong("these are the numbers of one preset; take every size from `config`, so that it holds for any")
    if matrix != right[0]:
        raise Wrong(f"W has {right[0]:,} numbers here, you have {matrix:,}. {_about_w(matrix, config)}")
    for formula, message in LANGUAGE_MODEL:
        if language_model == formula(config):
            raise Wrong(f"W is right. Your language model {message}")
    raise Wrong(
        f"W is right. The language model has {right[1]:,} numbers here, you have {language_model:,}: "
        f"{abs(language_model - right[1]):,} too {'many' if language_model > right[1] else 'few'}. Print its parts "
        "with `for name, p in model.language_model.named_parameters(): print(name, tuple(p.shape))`"
    )


def _about_w(matrix: int, config: MiniVLMConfig) -> str:
    """What is wrong with W's number."""
    dv, dl = config.vision_width, config.language_width
    if matrix == dv * dl + dl:
        return "Your W has a bias, Dl numbers; this one is a matrix and nothing else"
    if matrix == config.num_image_tokens * dv * dl:
        return "You count a matrix for each patch; it is the same W for all of them, so N does not matter"
    if matrix in (dv * dv, dl * dl):
        return "Your W is square; it leads from width Dv to width Dl"
    return "It is one matrix from width Dv to width Dl: look at `config.vision_width` and `config.language_width`"
