"""The frame of all exercises: a verdict begins in one of three ways, and the package's own function is no answer."""

import pytest
from lessons import exercises as checks
from lessons.exercises import checking
from lessons.exercises.checking import Wrong, called, exercise, forbidden, verdict

from minivlm import placeholders
from minivlm.placeholders import expand_placeholders

ARGUMENTS = ([5, 99], 99, 2)


@pytest.fixture(autouse=True)
def doubling(monkeypatch):
    """A small exercise: expand placeholders. It is one of the exercises while a test runs."""
    monkeypatch.setattr(checking, "EXERCISES", dict(checking.EXERCISES))

    @exercise
    def doubling(answer):
        with forbidden(expand_placeholders, answer=answer):
            if called(answer, *ARGUMENTS) != [5, 99, 99]:
                raise Wrong("99 has to stand there twice")


def stub(ids, image_token_id, num_image_tokens):
    raise NotImplementedError


def right(ids, image_token_id, num_image_tokens):
    return [i for i in ids for _ in range(num_image_tokens if i == image_token_id else 1)]


def test_three_beginnings():
    assert verdict("doubling", right) == "Right."
    assert verdict("doubling", lambda *_: []) == "Not yet: 99 has to stand there twice"
    assert verdict("doubling", stub) == "Not written yet. The cells below run all the same."


FUNCTIONS = ("count_parameters", "replace_placeholders", "build_labels", "choose_unfreezing", "chair")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_exercise_takes_its_stub_for_a_mistake(name):
    def stub(*_):
        raise NotImplementedError

    assert verdict(name, stub).startswith("Not written yet.")


def test_an_unknown_exercise_is_refused_with_the_names_of_all():
    with pytest.raises(ValueError, match=r"no exercise 'nothing'; choose one of .*doubling"):
        verdict("nothing", right)


def test_what_an_answer_raises_is_reported_in_one_line():
    def fails(*_):
        raise KeyError("one\ntwo")

    def fails_in_two_lines(*_):
        raise RuntimeError("one\ntwo")

    def fails_silently(*_):
        raise RuntimeError

    assert verdict("doubling", fails) == r"Not yet: your function raised KeyError: 'one\ntwo'"
    assert verdict("doubling", fails_in_two_lines) == "Not yet: your function raised RuntimeError: one"
    assert verdict("doubling", fails_silently) == "Not yet: your function raised RuntimeError: (no message)"


@pytest.mark.parametrize("answer", [None, [5, 99, 99]])
def test_a_result_instead_of_the_function(answer):
    assert verdict("doubling", answer).startswith("Not yet: give the function itself, without brackets behind its name")


class TestForbidden:
    OWN = "Not yet: this calls the package's own expand_placeholders; write the steps yourself"

    def test_by_name_from_its_module_and_by_another_name(self):
        assert verdict("doubling", lambda *args: expand_placeholders(*args)) == self.OWN
        assert verdict("doubling", lambda *args: placeholders.expand_placeholders(*args)) == self.OWN

        def imports_late(*args):
            from minivlm.placeholders import expand_placeholders as own

            return own(*args)

        assert verdict("doubling", imports_late) == self.OWN

    def test_the_function_itself(self):
        assert verdict("doubling", expand_placeholders) == self.OWN

    def test_catching_the_refusal_is_detected(self):
        def catches(*args):
            try:
                return expand_placeholders(*args)
            except Exception:
                return right(*args)

        assert verdict("doubling", catches) == self.OWN

    def test_afterwards_everything_is_as_it_was(self):
        verdict("doubling", lambda *args: expand_placeholders(*args))
        assert expand_placeholders(*ARGUMENTS) == placeholders.expand_placeholders(*ARGUMENTS) == [5, 99, 99]

    def test_an_error_inside_stays_itself_when_nothing_was_called(self):
        with pytest.raises(ZeroDivisionError), forbidden(expand_placeholders):
            raise ZeroDivisionError


def test_check_prints_the_verdict(capsys):
    checks.check("doubling", right)
    assert capsys.readouterr().out == "Right.\n"
