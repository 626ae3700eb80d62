"""The classic faults, planted one at a time in the real package, and the tests that must turn red.

A test that cannot fail proves nothing. `tests/test_faults.py` runs this file and checks that every test named here
passes as things are and fails under its fault. By hand:

    python tests/faults.py                  every fault
    python tests/faults.py left_padding     those whose name begins so
"""

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from minivlm import checkpoint, model, placeholders, processor, vision
from minivlm.config import IGNORE_INDEX, MiniVLMConfig

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Fault:
    """A mistake that people make, how to make it here, and the tests that notice."""

    plant: Callable[[pytest.MonkeyPatch], None]
    turns_red: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the function that plants it."""
        return self.plant.__name__


FAULTS: list[Fault] = []


def turns_red(*tests: str) -> Callable:
    """Enter the decorated function into `FAULTS`, with the tests that must notice it."""

    def enter(plant: Callable) -> Callable:
        FAULTS.append(Fault(plant, tests))
        return plant

    return enter


def everywhere(patch: pytest.MonkeyPatch, original: Callable, replacement: Callable) -> None:
    """Replace a function in every module that has imported it, tests included."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "minivlm" or name.startswith("test_"):
            for attribute, value in list(vars(module).items()):
                if value is original:
                    patch.setattr(module, attribute, replacement)


# ---- the faults


@turns_red(
    "test_model.py::test_patch_features_are_the_last_hidden_state_of_the_patches",
    "test_model.py::test_sizes_of_the_presets",
    "test_oracles.py::test_logits_equal_llava",
)
def class_token_counted(patch: pytest.MonkeyPatch) -> None:
    """The class token is taken for one more patch, 197 instead of 196; consistently, so that nothing crashes."""

    @torch.no_grad()
    def forward(self, pixel_values):
        return self.clip(pixel_values=pixel_values).last_hidden_state  # (I, 1 + N, Dv)

    patches = MiniVLMConfig.num_image_tokens.fget
    patch.setattr(vision.VisionEncoder, "forward", forward)
    patch.setattr(MiniVLMConfig, "num_image_tokens", property(lambda self: patches(self) + 1))


@turns_red(
    "test_model.py::test_patch_features_follow_the_picture_in_reading_order",
    "test_oracles.py::test_logits_equal_llava",
    "test_oracles.py::test_greedy_tokens_equal_llava",
)
def class_token_kept_last_patch_lost(patch: pytest.MonkeyPatch) -> None:
    """The class token stays and the last patch goes: the shape is right, every patch stands one place too late."""

    @torch.no_grad()
    def forward(self, pixel_values):
        return self.clip(pixel_values=pixel_values).last_hidden_state[:, :-1]  # (I, N, Dv)

    patch.setattr(vision.VisionEncoder, "forward", forward)


@turns_red(
    "test_processor.py::test_supervised_ids_are_the_answers_and_the_end_token",
    "test_processor.py::test_whole_sequence_by_hand",
)
def mask_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Supervision begins and ends one token late: the first token of an answer is never learnt."""
    encode = processor.MiniVLMProcessor._encode

    def shifted(self, pieces):
        ids, labels = encode(self, pieces)
        learnt = [False, *(label != IGNORE_INDEX for label in labels[:-1])]
        return ids, [token if yes else IGNORE_INDEX for token, yes in zip(ids, learnt, strict=True)]

    patch.setattr(processor.MiniVLMProcessor, "_encode", shifted)


@turns_red(
    "test_oracles.py::test_text_only_gives_the_base_models_own_logits_bit_for_bit",
    "test_oracles.py::test_text_only_generates_what_the_base_model_generates",
)
def interleaved_rotary_rows(patch: pytest.MonkeyPatch) -> None:
    """The rows of queries and keys stand in the other of the two rotary orders: every weight loads, no word fits."""
    assemble = model.assemble

    @torch.no_grad()
    def interleaved(*args, **kwargs):
        vlm = assemble(*args, **kwargs)
        for layer in vlm.language_model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                halves = linear.weight.unflatten(0, (-1, 2, layer.self_attn.head_dim // 2))  # (heads, 2, d/2, Dl)
                linear.weight.copy_(halves.transpose(1, 2).flatten(0, 2))  # (heads * d, Dl), pair by pair
        return vlm

    everywhere(patch, assemble, interleaved)


@turns_red(
    "test_model.py::test_exactly_the_stages_parameters_are_trainable",
    "test_model.py::test_steps_move_exactly_what_the_stage_trains",
)
def frozen_weight_moved(patch: pytest.MonkeyPatch) -> None:
    """Stage 1 says that it trains W alone, and trains the language model's last layer too."""
    set_trainable = model.set_trainable

    def careless(vlm, stage):
        set_trainable(vlm, stage)
        vlm.language_model.model.layers[-1].requires_grad_(True)

    everywhere(patch, set_trainable, careless)


@turns_red(
    "test_placeholders.py::test_one_row_cannot_swallow_anothers_picture",
    "test_placeholders.py::test_half_a_picture_is_refused_though_the_sum_is_right",
)
def counted_over_the_batch(patch: pytest.MonkeyPatch) -> None:
    """Placeholders are counted over the whole batch and not per row: a row can swallow another row's picture."""

    def replace(inputs_embeds, input_ids, image_embeds, image_token_id, images_per_row=None):
        mask = input_ids == image_token_id
        if mask.sum() != image_embeds.shape[:2].numel():
            raise placeholders.PlaceholderError("image tokens and image features do not match")
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), image_embeds)

    everywhere(patch, placeholders.replace_placeholders, replace)


@turns_red(
    "test_checkpoint.py::test_no_key_of_any_part_may_be_missing",
    "test_checkpoint.py::test_wrong_keys_shapes_and_values_are_named",
)
def non_strict_load(patch: pytest.MonkeyPatch) -> None:
    """What a file does not hold stays random, and what it holds too much is passed over, without a word."""

    def load(folder, base=None):
        meta = checkpoint.read_meta(folder)
        tokens, config = checkpoint._load_processor(folder, meta)
        vlm, state = model.MiniVLMForConditionalGeneration(config), {}
        for part in model.PARTS:
            state |= checkpoint.read_tensors(folder / f"{part}.safetensors")
        vlm.load_state_dict(state, strict=False)
        return vlm.eval(), tokens, meta

    everywhere(patch, checkpoint.load_checkpoint, load)


@turns_red(
    "test_processor.py::test_a_text_too_long_is_refused_and_its_image_block_never_cut",
    "test_processor.py::test_the_tokenizers_own_limit_holds_everywhere",
)
def image_block_cut(patch: pytest.MonkeyPatch) -> None:
    """A text that is too long is cut, and the cut may fall into a picture's placeholders."""

    def cut(self, ids, labels, pictures, where, max_length):
        limit = max_length or self.tokenizer.model_max_length
        return processor.Rendered(ids[:limit], labels[:limit], pictures, where)

    patch.setattr(processor.MiniVLMProcessor, "_rendered", cut)


@turns_red(
    "test_oracles.py::test_left_padding_changes_no_logit",
    "test_oracles.py::test_left_padding_changes_no_logit_with_absolute_positions",
    "test_model.py::test_positions_count_the_shown_tokens",
)
def left_padding_ignored(patch: pytest.MonkeyPatch) -> None:
    """Positions are counted from the edge of the batch: padding on the left shifts the text."""

    def from_the_edge(attention_mask):
        return torch.arange(attention_mask.shape[1]).expand_as(attention_mask)

    everywhere(patch, model.positions, from_the_edge)


# ---- running tests under them


class Listener:
    """A pytest plugin that notes the outcome of each test function: failed if it fails for any of its parameters."""

    def __init__(self):
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report) -> None:
        """Tell a test's own failure, "failed", from that of its preparation, "broken"."""
        name = report.nodeid.split("[")[0].split("/")[-1]
        if report.when != "call" and report.failed:
            self.outcomes[name] = "broken"
        elif report.when == "call" and self.outcomes.get(name) not in ("failed", "broken"):
            self.outcomes[name] = report.outcome


def outcomes(tests: list[str]) -> dict[str, str]:
    """Run test functions in this process and give the outcome of each."""
    listener = Listener()
    options = ["-q", "--tb=no", "-p", "no:cacheprovider", f"--rootdir={HERE.parent}"]
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*options, *(str(HERE / test) for test in tests)], plugins=[listener])
    return listener.outcomes


def outcomes_under(fault: Fault) -> dict[str, str]:
    """Plant a fault, run its tests, and take it out again."""
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)
        return outcomes(list(fault.turns_red))


def main() -> None:
    """Run the named tests as things are, then under each fault."""
    parser = argparse.ArgumentParser(description="Plant the classic faults and see which tests turn red.")
    parser.add_argument("name", nargs="?", default="", help="the beginning of a fault's name")
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if fault.name.startswith(options.name)]
    healthy = outcomes(sorted({test for fault in faults for test in fault.turns_red}))  # imports the tests, too
    found = {fault.name: outcomes_under(fault) for fault in faults}
    if options.json:
        print(json.dumps({"healthy": healthy, "faults": found}))
        return
    for fault in faults:
        print(f"\n{fault.name}: {fault.plant.__doc__}")
        for test in fault.turns_red:
            print(f"  {healthy.get(test, 'not found')} -> {found[fault.name].get(test, 'not found')}  {test}")


if __name__ == "__main__":
    main()
