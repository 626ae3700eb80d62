"""Answers beside pictures, and which tokens a row teaches: tables in HTML, readable in every language and theme."""

import html
from collections.abc import Mapping, Sequence

from IPython.display import display
from PIL import Image
from transformers import PreTrainedTokenizerFast

from lessons.plots.figures import data_uri
from minivlm.config import IGNORE_INDEX, IMAGE_TOKEN
from minivlm.processor import Example

CELL = "text-align:left;vertical-align:top;padding:6px 14px;max-width:24em;white-space:normal"


def show_answers(
    pictures: Sequence[Image.Image], alts: Sequence[str], columns: Mapping[str, Sequence[str]], side: int = 120
) -> None:
    """A table of pictures and what was said about each.

    Args:
        pictures: one per row.
        alts: what there is to see in each picture, for those who do not see it.
        columns: a heading and one text per picture for each column; text is shown as it is, never as HTML.
        side: of a picture in the table, in pixels.

    Raises:
        ValueError: a picture has no alternative text, or a column has more or fewer texts than there are pictures.
    """
    if not all(alt.strip() for alt in alts):
        raise ValueError("every picture needs alternative text")
    heads = "".join(f'<th scope="col" style="{CELL}">{html.escape(name)}</th>' for name in ("picture", *columns))
    rows = []
    for picture, alt, *texts in zip(pictures, alts, *columns.values(), strict=True):
        cells = "".join(f'<td style="{CELL}">{html.escape(text)}</td>' for text in texts)
        rows.append(f'<tr><td style="{CELL}">{_image(picture, alt, side)}</td>{cells}</tr>')
    plain = "\n".join(f"{name}: {text}" for name, texts in columns.items() for text in texts)
    page = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    display({"text/html": page, "text/plain": plain}, raw=True)


def show_picture(picture: Image.Image, alt: str, side: int = 224) -> None:
    """A picture with alternative text, which is its caption, too.

    Raises:
        ValueError: `alt` is empty.
    """
    if not alt.strip():
        raise ValueError("a picture needs alternative text")
    caption = f"<figcaption>{html.escape(alt)}</figcaption>"
    figure = f'<figure style="margin:0">{_image(picture, alt, side)}{caption}</figure>'
    display({"text/html": figure, "text/plain": alt}, raw=True)


def show_supervision(row: Example, tokenizer: PreTrainedTokenizerFast) -> None:
    """A row's text; what the model learns to write is underlined and bold. A picture's placeholders are one word."""
    summary = f"{_learnt(row)} tokens are learnt (underlined)."
    page = f'<p style="line-height:1.7">{_marked(row, tokenizer)}</p><p>{summary}</p>'
    display({"text/html": page, "text/plain": summary}, raw=True)


def show_taught(
    rows: Mapping[str, Example],
    pictures: Sequence[tuple[Image.Image, str] | None],
    tokenizer: PreTrainedTokenizerFast,
    side: int = 100,
) -> None:
    """Rows below each other, each with its picture and its supervision mask, as `show_supervision` draws it.

    Args:
        rows: what kind of row it is, and the row.
        pictures: for each row its picture and alternative text, or None if it has no picture.
        side: of a picture in the table, in pixels.

    Raises:
        ValueError: there are not as many pictures as rows; a picture has no alternative text.
    """
    if not all(shown[1].strip() for shown in pictures if shown):
        raise ValueError("every picture needs alternative text")
    wide = CELL.replace("24em", "52em") + ";line-height:1.6"
    heads = "".join(f'<th scope="col" style="{CELL}">{name}</th>' for name in ("row", "picture", "underlined: learnt"))
    lines = []
    for (name, row), shown in zip(rows.items(), pictures, strict=True):
        picture = _image(*shown, side) if shown else "none"
        title = f"<b>{html.escape(name)}</b><br><small>{_learnt(row)} tokens are learnt</small>"
        cells = f'<td style="{CELL}">{title}</td><td style="{CELL}">{picture}</td>'
        lines.append(f'<tr>{cells}<td style="{wide}">{_marked(row, tokenizer)}</td></tr>')
    page = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    plain = "; ".join(f"{name}: {_learnt(row)} tokens are learnt" for name, row in rows.items())
    display({"text/html": page, "text/plain": plain}, raw=True)


def _learnt(row: Example) -> str:
    """How many tokens of a row are learnt, of how many."""
    return f"{sum(label != IGNORE_INDEX for label in row.labels)} of {len(row.labels)}"


def _marked(row: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    """A row's text as HTML, what is learnt underlined and bold."""
    runs: list[tuple[bool, list[int]]] = []
    for token_id, label in zip(row.input_ids, row.labels, strict=True):
        learnt = label != IGNORE_INDEX
        if not runs or runs[-1][0] != learnt:
            runs.append((learnt, []))
        runs[-1][1].append(token_id)
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    parts = []
    for learnt, ids in runs:
        text = tokenizer.decode([i for k, i in enumerate(ids) if i != image or ids[k - 1] != image])
        text = html.escape(text.replace(IMAGE_TOKEN, f"{IMAGE_TOKEN} × {ids.count(image)}")).replace("\n", "↵<br>")
        mark = 'style="background:#FFF0E2;color:#3B3B3B;text-decoration:underline;font-weight:bold"'
        parts.append(f"<span {mark}>{text}</span>" if learnt else f"<span>{text}</span>")
    return "".join(parts)


def _image(picture: Image.Image, alt: str, side: int) -> str:
    """An `<img>` with its bytes inside, at twice the pixels it is shown with."""
    source = data_uri(picture.resize((2 * side, 2 * side), Image.Resampling.LANCZOS))
    return f'<img src="{source}" width="{side}" height="{side}" alt="{html.escape(alt)}">'
