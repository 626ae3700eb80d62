"""The tests can fail: under each classic fault, the tests named for it turn red. See `faults.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from faults import TURNS_RED
from lessons.faults import FAULTS, planted

from minivlm.vision import VisionEncoder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found() -> dict:
    """What `faults.py` finds, in a process of its own, so that no fault can stay behind in this one."""
    here = Path(__file__).parents[1]
    command = [sys.executable, str(here / "faults.py"), "--json"]
    done = subprocess.run(command, cwd=here.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_classic_faults_are_there():
    assert {
        "class_token_counted",
        "mask_off_by_one",
        "interleaved_rotary_rows",
        "frozen_weight_moved",
        "counted_over_the_batch",
        "non_strict_load",
        "image_block_cut",
        "left_padding_ignored",
    } <= set(FAULTS)
    assert set(FAULTS) == set(TURNS_RED) and all(TURNS_RED.values())


def test_without_a_fault_every_named_test_passes(found):
    named = {test for tests in TURNS_RED.values() for test in tests}
    assert found["healthy"] == dict.fromkeys(named, "passed")


@pytest.mark.parametrize("fault", TURNS_RED)
def test_a_fault_turns_its_tests_red(found, fault):
    assert found["faults"][fault] == dict.fromkeys(TURNS_RED[fault], "failed")


def test_a_fault_is_gone_after_its_block_whatever_happened_inside():
    healthy = VisionEncoder.forward
    with pytest.raises(KeyError), planted("class_token_counted"):
        assert VisionEncoder.forward is not healthy
        raise KeyError
    assert VisionEncoder.forward is healthy


def test_an_unknown_fault_is_refused_with_the_names_of_all():
    with (
        pytest.raises(ValueError, match=r"no fault 'nothing'; choose one of class_token_counted, "),
        planted("nothing"),
    ):
        pass
