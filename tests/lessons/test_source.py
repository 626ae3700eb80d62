"""The package's own source, shown: what the reader sees is what runs."""

import ast

import pytest
from lessons.plots import source
from lessons.plots.source import show_source, source_of

from minivlm.model import positions
from minivlm.placeholders import PlaceholderError, expand_placeholders, replace_placeholders
from minivlm.vision import VisionEncoder


def without_docstrings(code: str) -> str:
    """The same code, its docstrings taken out of the syntax tree: an independent oracle."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or node.body
    return ast.dump(tree)


@pytest.mark.parametrize("function", [replace_placeholders, expand_placeholders, VisionEncoder, positions])
def test_what_is_shown_is_the_code_without_its_docstrings(function):
    shown = source_of(function)
    assert ast.dump(ast.parse(shown)) == without_docstrings(source_of(function, docstrings=True))
    assert '"""' not in shown


def test_comments_stay_and_a_method_moves_to_the_margin():
    assert "# (B, T)" in source_of(replace_placeholders)
    assert source_of(VisionEncoder.forward).startswith("@torch.no_grad()\ndef forward(")


def test_a_body_that_is_only_a_docstring_stays():
    assert source_of(PlaceholderError) == source_of(PlaceholderError, docstrings=True)


def test_several_go_out_as_highlighted_html_and_plain_text(monkeypatch):
    bundles = []
    monkeypatch.setattr(source, "display", lambda bundle, raw: bundles.append(bundle))
    show_source(expand_placeholders, replace_placeholders)
    assert bundles[0]["text/plain"] == f"{source_of(expand_placeholders)}\n\n{source_of(replace_placeholders)}"
    assert "highlight" in bundles[0]["text/html"]
    assert f'<pre style="{source.LOOK}">' in bundles[0]["text/html"] and "monospace" in source.LOOK


def test_what_has_no_file_is_refused():
    scope = {}
    exec("def nowhere():\n    return 1", scope)
    with pytest.raises(TypeError, match="has no source that could be shown"):
        source_of(scope["nowhere"])
