"""The tests can fail: under each classic fault, the tests named for it turn red. See `faults.py`."""

import gc
import multiprocessing

import faults
import pytest
from faults import TURNS_RED
from lessons.faults import FAULTS, planted

from minivlm.vision import VisionEncoder

pytestmark = pytest.mark.slow


NAMED = {test for tests in TURNS_RED.values() for test in tests}


class StopAtFirstFailure(faults.Listener):
    """One failure of a test is enough: the rest of its parameters is skipped."""

    def pytest_runtest_setup(self, item) -> None:
        if self.outcomes.get(f"{item.path.name}::{item.originalname}") == "failed":
            pytest.skip()


def run_all() -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    gc.freeze()  # pytest collects garbage at each end; what is imported is none
    healthy = faults.outcomes(sorted(NAMED))
    gc.freeze()
    faults.Listener = StopAtFirstFailure
    return healthy, {fault: faults.outcomes_under(fault) for fault in TURNS_RED}


@pytest.fixture(scope="module")
def outcomes():
    """In a separate process, so that no fault remains in this one."""
    with multiprocessing.Pool(1) as pool:
        return pool.apply(run_all)


def test_the_classic_faults_are_there():
    assert set(FAULTS) == set(TURNS_RED) and all(TURNS_RED.values())


def test_without_a_fault_every_named_test_passes(outcomes):
    assert outcomes[0] == dict.fromkeys(NAMED, "passed")


@pytest.mark.parametrize("fault", TURNS_RED)
def test_a_fault_turns_its_tests_red(outcomes, fault):
    assert outcomes[1][fault] == dict.fromkeys(TURNS_RED[fault], "failed")


def test_a_fault_is_gone_after_its_block_whatever_happened_inside():
    healthy = VisionEncoder.forward
    with pytest.raises(KeyError), planted("class_token_counted"):
        assert VisionEncoder.forward is not healthy
        raise KeyError
    assert VisionEncoder.forward is healthy


def test_an_unknown_fault_is_refused_with_the_names_of_all():
    with pytest.raises(ValueError, match="no fault 'nothing'; choose one of class_token_counted, "), planted("nothing"):
        pass
