"""The tests can fail: under each classic fault, the tests named for it turn red. See `faults.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from faults import FAULTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found() -> dict:
    """What `faults.py` finds, in a process of its own, so that no fault can stay behind in this one."""
    here = Path(__file__).parent
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
    } <= {fault.name for fault in FAULTS}
    assert all(fault.turns_red for fault in FAULTS)


def test_without_a_fault_every_named_test_passes(found):
    named = {test for fault in FAULTS for test in fault.turns_red}
    assert found["healthy"] == dict.fromkeys(named, "passed")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_turns_its_tests_red(found, fault):
    assert found["faults"][fault.name] == dict.fromkeys(fault.turns_red, "failed")
