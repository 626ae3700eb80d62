"""Tables in HTML: answers beside pictures, and which tokens of an example are supervised."""

import html
from collections.abc import Mapping, Sequence
from itertools import groupby

from IPython.display import display
from PIL import Image
from transformers import PreTrainedTokenizerFast

from lessons.plots.figures import data_uri
from minivlm.config import IGNORE_INDEX, IMAGE_TOKEN
from minivlm.data.samples import Example

CELL = "text-align:left;vertical-align:top;padding:6px 14px;max-width:24em;white-space:normal"


def table_html(
    heads: Sequence[str], rows: Sequence[Sequence[str]], widths: Mapping[int, str] | None = None, named: bool = False
) -> str:
    """A table in HTML.

    Args:
        heads: of the columns, as text.
        rows: cells as HTML.
        widths: the largest width of a column, by its number; 24em otherwise.
        named: the first column holds names of rows.
    """
    styles = {column: CELL.replace("24em", width) + ";line-height:1.6" for column, width in (widths or {}).items()}
    titles = "".join(f'<th scope="col" style="{CELL}">{html.escape(name)}</th>' for name in heads)
    body = ""
    for row in rows:
        body += "<tr>"
        for column, cell in enumerate(row):
            tag, scope = ("th", ' scope="row"') if named and column == 0 else ("td", "")
            body += f'<{tag}{scope} style="{styles.get(column, CELL)}">{cell}</{tag}>'
        body += "</tr>"
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def show_answers(
    images: Sequence[Image.Image], alts: Sequence[str], columns: Mapping[str, Sequence[str]], side: int = 120
) -> None:
    """A table of pictures and the answers about each.

    Args:
        alts: what there is to see in each picture, for those who do not see it.
        columns: a heading and one text per picture for each column; text is shown as it is, never as HTML.
        side: of a picture, in pixels.

    Raises:
        ValueError: a picture has no alternative text, or a column has more or fewer texts than there are pictures.
    """
    if not all(alt.strip() for alt in alts):
        raise ValueError("every picture needs alternative text")
    rows = [
        [image_html(image, alt, side), *map(html.escape, texts)]
        for image, alt, *texts in zip(images, alts, *columns.values(), strict=True)
    ]
    plain = "\n".join(f"{name}: {text}" for name, texts in columns.items() for text in texts)
    display({"text/html": table_html(["picture", *columns], rows), "text/plain": plain}, raw=True)


def show_image(image: Image.Image, alt: str, side: int = 224) -> None:
    """A picture with alternative text, which is its caption, too.

    Raises:
        ValueError: `alt` is empty.
    """
    if not alt.strip():
        raise ValueError("an image needs alternative text")
    caption = f"<figcaption>{html.escape(alt)}</figcaption>"
    figure = f'<figure style="margin:0">{image_html(image, alt, side)}{caption}</figure>'
    display({"text/html": figure, "text/plain": alt}, raw=True)


def show_supervision(row: Example, tokenizer: PreTrainedTokenizerFast) -> None:
    """The text of an example, its supervised tokens underlined and bold; the placeholders of a picture are one word."""
    summary = f"{_counted(row)} tokens are supervised (underlined)."
    page = f'<p style="line-height:1.7">{_marked(row, tokenizer)}</p><p>{summary}</p>'
    display({"text/html": page, "text/plain": summary}, raw=True)


def show_taught(
    rows: Mapping[str, Example],
    images: Sequence[tuple[Image.Image, str] | None],
    tokenizer: PreTrainedTokenizerFast,
    side: int = 100,
) -> None:
    """A table of named examples, each with its picture and its supervision mask, as `show_supervision` draws it.

    Args:
        images: for each example its picture and alternative text, or None if it has no picture.
        side: of a picture, in pixels.

    Raises:
        ValueError: there are not as many pictures as examples; a picture has no alternative text.
    """
    if not all(shown[1].strip() for shown in images if shown):
        raise ValueError("every picture needs alternative text")
    lines = []
    for (name, row), shown in zip(rows.items(), images, strict=True):
        title = f"<b>{html.escape(name)}</b><br><small>{_counted(row)} tokens are supervised</small>"
        lines.append([title, image_html(*shown, side) if shown else "none", _marked(row, tokenizer)])
    page = table_html(("example", "picture", "underlined: supervised"), lines, widths={2: "52em"})
    plain = "; ".join(f"{name}: {_counted(row)} tokens are supervised" for name, row in rows.items())
    display({"text/html": page, "text/plain": plain}, raw=True)


def _counted(row: Example) -> str:
    """How many tokens are supervised, of how many."""
    return f"{sum(label != IGNORE_INDEX for label in row.labels)} of {len(row.labels)}"


def _marked(row: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text as HTML, its supervised tokens underlined and bold."""
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    parts = []
    for supervised, run in groupby(zip(row.input_ids, row.labels, strict=True), lambda pair: pair[1] != IGNORE_INDEX):
        ids = [token_id for token_id, _ in run]
        text = tokenizer.decode([i for k, i in enumerate(ids) if i != image or ids[k - 1] != image])
        text = html.escape(text.replace(IMAGE_TOKEN, f"{IMAGE_TOKEN} × {ids.count(image)}")).replace("\n", "↵<br>")
        mark = 'style="background:#FFF0E2;color:#3B3B3B;text-decoration:underline;font-weight:bold"'
        parts.append(f"<span {mark}>{text}</span>" if supervised else f"<span>{text}</span>")
    return "".join(parts)


def image_html(image: Image.Image, alt: str, side: int) -> str:
    """An `<img>` with its bytes inside, at twice the pixels it is shown with."""
    source = data_uri(image.resize((2 * side, 2 * side), Image.Resampling.LANCZOS))
    return f'<img src="{source}" width="{side}" height="{side}" alt="{html.escape(alt)}">'
