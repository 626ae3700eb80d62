"""The package's own source, shown in a notebook: what the reader sees is what runs."""

import ast
import inspect
import textwrap
from collections.abc import Callable

from IPython.display import Code, display

# said here, as not every page that shows a notebook sets code in its own type
LOOK = (
    "font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:13px;line-height:1.4;margin:0;"
    "padding:8px 12px;border-left:3px solid #ABABAB;background:#F7F7F7;color:#3B3B3B;overflow-x:auto"
)


def show_source(*functions: Callable, docstrings: bool = False) -> None:
    """Show the source of functions, methods or classes as they are installed, highlighted, from top to bottom.

    Args:
        docstrings: keep them; the notebook says in its own words what they say.

    Raises:
        TypeError: there is no source: the function was not written in a file or a cell.
    """
    code = "\n\n".join(source_of(function, docstrings) for function in functions)
    page = Code(data=code, language="python")._repr_html_().replace("<pre>", f'<pre style="{LOOK}">')
    display({"text/html": page, "text/plain": code}, raw=True)


def source_of(function: Callable, docstrings: bool = False) -> str:
    """The source of a function, a method or a class, moved to the left margin.

    Raises:
        TypeError: there is no source.
    """
    try:
        code = textwrap.dedent(inspect.getsource(function)).rstrip()
    except OSError as error:
        raise TypeError(f"{function!r} has no source that could be shown; write it in a file or a cell") from error
    return code if docstrings else _without_docstrings(code)


def _without_docstrings(code: str) -> str:
    """The same code without the docstrings of its functions and classes."""
    dropped: set[int] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) and len(node.body) > 1:
            dropped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = code.splitlines()
    kept = [line for number, line in enumerate(lines, 1) if number not in dropped]
    return "\n".join(line for index, line in enumerate(kept) if line.strip() or (index and kept[index - 1].strip()))
