"""The classic faults, planted one at a time in the real package, and the tests that must turn red.

A test that cannot fail proves nothing. `tests/lessons/test_faults.py` runs this file and checks that every test named
here passes as things are and fails under its fault (`notebooks/lessons/faults.py`). By hand:

    python tests/faults.py                  every fault
    python tests/faults.py left_padding     those whose name begins so
"""

import argparse
import contextlib
import io
import json
from pathlib import Path

import pytest
from lessons.faults import FAULTS, planted

HERE = Path(__file__).parent

TURNS_RED: dict[str, tuple[str, ...]] = {
    "class_token_counted": (
        "test_model.py::test_patch_features_are_the_last_hidden_state_of_the_patches",
        "test_model.py::test_sizes_of_the_presets",
        "test_oracles.py::test_logits_equal_llava",
    ),
    "class_token_kept_last_patch_lost": (
        "test_model.py::test_patch_features_follow_the_picture_in_reading_order",
        "test_oracles.py::test_logits_equal_llava",
        "test_oracles.py::test_greedy_tokens_equal_llava",
    ),
    "mask_off_by_one": (
        "test_processor.py::test_supervised_ids_are_the_answers_and_the_end_token",
        "test_processor.py::test_whole_sequence_by_hand",
    ),
    "template_of_another_model": (
        "test_processor.py::test_supervised_ids_are_the_answers_and_the_end_token",
        "test_processor.py::test_whole_sequence_by_hand",
    ),
    "interleaved_rotary_rows": (
        "test_oracles.py::test_text_only_gives_the_base_models_own_logits_bit_for_bit",
        "test_oracles.py::test_text_only_generates_what_the_base_model_generates",
    ),
    "frozen_weight_moved": (
        "test_model.py::test_exactly_the_stages_parameters_are_trainable",
        "test_model.py::test_steps_move_exactly_what_the_stage_trains",
    ),
    "counted_over_the_batch": (
        "test_placeholders.py::test_one_row_cannot_swallow_anothers_picture",
        "test_placeholders.py::test_half_a_picture_is_refused_though_the_sum_is_right",
    ),
    "non_strict_load": (
        "test_checkpoint.py::test_no_key_of_any_part_may_be_missing",
        "test_checkpoint.py::test_wrong_keys_shapes_and_values_are_named",
    ),
    "image_block_cut": (
        "test_processor.py::test_a_text_too_long_is_refused_and_its_image_block_never_cut",
        "test_processor.py::test_the_tokenizers_own_limit_holds_everywhere",
    ),
    "left_padding_ignored": (
        "test_oracles.py::test_left_padding_changes_no_logit",
        "test_oracles.py::test_left_padding_changes_no_logit_with_absolute_positions",
        "test_model.py::test_positions_count_the_shown_tokens",
    ),
    "at_sign_as_placeholder": (
        "test_processor.py::test_typed_control_tokens_are_ordinary_text",
        "test_processor.py::test_typed_image_beside_a_real_one",
    ),
}


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


def outcomes_under(fault: str) -> dict[str, str]:
    """Plant a fault, run its tests, and take it out again."""
    with planted(fault):
        return outcomes(list(TURNS_RED[fault]))


def main() -> None:
    """Run the named tests as things are, then under each fault."""
    parser = argparse.ArgumentParser(description="Plant the classic faults and see which tests turn red.")
    parser.add_argument("name", nargs="?", default="", help="the beginning of a fault's name")
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON")
    options = parser.parse_args()
    faults = [fault for fault in TURNS_RED if fault.startswith(options.name)]
    healthy = outcomes(sorted({test for fault in faults for test in TURNS_RED[fault]}))  # imports the tests, too
    by_fault = {fault: outcomes_under(fault) for fault in faults}
    if options.json:
        print(json.dumps({"healthy": healthy, "faults": by_fault}))
        return
    for fault in faults:
        print(f"\n{fault}: {FAULTS[fault].__doc__}")
        for test in TURNS_RED[fault]:
            print(f"  {healthy.get(test, 'not found')} -> {by_fault[fault].get(test, 'not found')}  {test}")


if __name__ == "__main__":
    main()
