"""A report as data: headings, paragraphs, tables and figures that become one HTML page or Markdown.

The page needs nothing but itself: pictures are inside it, and there is no script. Every text is escaped here, in one
place, whoever wrote it.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

STYLE = """
:root { color-scheme: light dark; --ink: #22262b; --soft: #626a73; --line: #dfdcd4; --paper: #fbfaf7; --card: #fff;
  --accent: #1f6f78; --wrong: #a8452c; --wash: #f7e7df; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e4de; --soft: #a3a8ad; --line: #3a3d41; --paper: #17191c;
  --card: #1f2226; --accent: #7cc4c9; --wrong: #f0a184; --wash: #40281f; } }
* { box-sizing: border-box; }
html { font-size: 16px; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font-family: "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Georgia, "Noto Serif CJK SC",
    "Songti SC", SimSun, serif; }
main { max-width: 77rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
h1 { font-size: 2.3rem; font-weight: 500; line-height: 1.2; letter-spacing: -0.01em; margin: 0 0 1rem; }
h2 { font-size: 1.55rem; font-weight: 500; margin: 3.6rem 0 0.6rem; padding-top: 1.2rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.15rem; font-weight: 600; margin: 2.4rem 0 0.4rem; }
p { max-width: 46rem; margin: 0.6rem 0 1rem; }
.opening { font-size: 1.15rem; color: var(--ink); }
.note, .small, figcaption, caption { color: var(--soft); font-size: 0.82rem; line-height: 1.4; }
.note { margin: 0.5rem 0 1.6rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem; margin: 2rem 0 0; }
.tiles > div { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.2rem;
  display: flex; flex-direction: column; }
.tiles dd { margin: 0; font-size: 1.9rem; line-height: 1.2; color: var(--accent); font-variant-numeric: lining-nums; }
.tiles dt { color: var(--soft); font-size: 0.85rem; line-height: 1.35; margin-top: 0.3rem; }
.table { overflow-x: auto; margin: 1.2rem 0 0.4rem; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; padding: 0 0 0.5rem; font-style: italic; font-size: 0.95rem; }
th, td { text-align: left; vertical-align: top; padding: 0.5rem 0.8rem 0.5rem 0; border-bottom: 1px solid var(--line);
  font-weight: 400; }
thead th { color: var(--soft); font-size: 0.85rem; vertical-align: bottom; border-bottom: 1px solid var(--soft); }
tbody tr:last-child > * { border-bottom: none; }
.numbers td, .numbers thead th { font-variant-numeric: tabular-nums lining-nums; }
.numbers tbody th { white-space: nowrap; padding-right: 1.2rem; }
.numbers tbody tr > * { padding-top: 0.32rem; padding-bottom: 0.32rem; }
.numbers td .small { white-space: nowrap; }
.number, .sign { white-space: nowrap; }
.headline td, .headline th { padding-right: 0.55rem; font-size: 0.88rem; }
.headline tbody th { white-space: normal; min-width: 6.5rem; padding-right: 0.8rem; }
.headline .small { font-size: 0.72rem; }
.facts table { width: auto; }
.facts tbody th { color: var(--soft); padding-right: 2rem; white-space: nowrap; }
.pictures th[scope=row] { width: 15.5rem; padding: 1.1rem 1.4rem 1.1rem 0; }
.pictures td { padding: 1.1rem 1.4rem 1.1rem 0; width: 40%; }
.pictures td + td { padding-right: 0; }
.pictures img { display: block; width: 14rem; height: 14rem; border-radius: 10px; margin-bottom: 0.4rem; }
.pictures td > div > div + div { margin-top: 0.9rem; }
.pictures td > div > div > div + div { margin-top: 0.15rem; }
mark { background: var(--wash); color: inherit; border-radius: 3px; padding: 0 0.15em;
  text-decoration: underline wavy var(--wrong) 1.5px; text-underline-offset: 3px; }
mark .sign { color: var(--wrong); text-decoration: none; padding-left: 0.25em; }
figure { margin: 1.4rem 0; }
figure img { display: block; width: 100%; border-radius: 12px; border: 1px solid var(--line); background: #fff; }
figcaption { margin-top: 0.6rem; }
.code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.85em; overflow-wrap: anywhere; }
details { margin: 1.6rem 0; border: 1px solid var(--line); border-radius: 12px; padding: 0.8rem 1.2rem;
  background: var(--card); }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 46rem) { main { padding-top: 2rem; } .pictures table, .pictures tbody, .pictures tr, .pictures th,
  .pictures td { display: block; width: auto !important; border: none; padding: 0.3rem 0; }
  .pictures thead { display: none; }
  .pictures tr { border-bottom: 1px solid var(--line); padding: 1rem 0; } }
@media print { details > * { display: block; } .table { overflow: visible; } }
"""


@dataclass(frozen=True)
class Image:
    """A PNG with its description; in Markdown it is the file `name` beside the text."""

    png: bytes
    alt: str
    name: str

    def html(self) -> str:
        """An <img> that carries its own bytes."""
        data = base64.b64encode(self.png).decode()
        return f'<img alt="{_escaped(self.alt)}" src="data:image/png;base64,{data}">'

    def markdown(self) -> str:
        """A link to the file."""
        return f"![{self.alt}]({self.name})"


@dataclass(frozen=True)
class Span:
    """A piece of text in a style of the page: "wrong", "small", "number", "strong"; plain by default."""

    text: str
    style: str = ""
    title: str = ""

    def html(self) -> str:
        """Escaped. What is wrong is marked by a sign and an underline, not by colour alone."""
        text = _escaped(self.text)
        if self.style == "wrong":
            return f'<mark title="{_escaped(self.title)}">{text}<span class="sign">\u2060✗</span></mark>'
        if self.style == "strong":
            return f"<strong>{text}</strong>"
        title = f' title="{_escaped(self.title)}"' if self.title else ""
        return f'<span class="{self.style}"{title}>{text}</span>' if self.style else text

    def markdown(self) -> str:
        """What HTML and Markdown would obey is escaped."""
        plain = _plain(self.text)
        if not (text := plain.strip()):
            return plain
        before, after = plain.split(text)  # white space stays outside of the marks, or Markdown does not see them
        marks = {"wrong": ("~~", "~~ ✗"), "strong": ("**", "**"), "small": ("<sub>", "</sub>")}
        start, end = marks.get(self.style, ("", ""))
        return f"{before}{start}{text}{end}{after}"


@dataclass(frozen=True)
class Lines:
    """Several pieces, each on a line of its own; `lang` tells a browser which language they are in."""

    parts: Sequence["Inline"]
    lang: str = ""

    def html(self) -> str:
        """One block a line."""
        lang = f' lang="{self.lang}"' if self.lang else ""
        return f"<div{lang}>" + "".join(f"<div>{_html(part)}</div>" for part in self.parts) + "</div>"

    def markdown(self) -> str:
        """Lines inside a cell."""
        return "<br>".join(_markdown(part) for part in self.parts)


Inline = str | Image | Span | Lines | Sequence  # a sequence is written one after the other


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the page's own."""

    text: str
    level: int = 2

    def html(self) -> str:
        """An <h1> to <h4>."""
        return f"<h{self.level}>{_escaped(self.text)}</h{self.level}>"

    def markdown(self) -> str:
        """Number signs."""
        return f"{'#' * self.level} {_plain(self.text)}"


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    content: Inline
    style: str = ""

    def html(self) -> str:
        """A <p>."""
        return f'<p class="{self.style}">{_html(self.content)}</p>' if self.style else f"<p>{_html(self.content)}</p>"

    def markdown(self) -> str:
        """A paragraph."""
        return _markdown(self.content)


@dataclass(frozen=True)
class Tiles:
    """A few large numbers, each with what it is."""

    tiles: Sequence[tuple[str, str]]

    def html(self) -> str:
        """A list of terms."""
        inner = "".join(
            f"<div><dd>{_escaped(number)}</dd><dt>{_escaped(what)}</dt></div>" for number, what in self.tiles
        )
        return f'<dl class="tiles">{inner}</dl>'

    def markdown(self) -> str:
        """One line."""
        return " · ".join(f"**{_plain(number)}** {_plain(what)}" for number, what in self.tiles)


@dataclass(frozen=True)
class Figure:
    """An image with a line below that says the same in words."""

    image: Image
    summary: str

    def html(self) -> str:
        """A <figure>."""
        return f"<figure>{self.image.html()}<figcaption>{_escaped(self.summary)}</figcaption></figure>"

    def markdown(self) -> str:
        """Image and line."""
        return f"{self.image.markdown()}\n\n*{_plain(self.summary)}*"


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row is its heading.

    Attributes:
        head: column titles.
        rows: cells, as many as there are titles.
        caption: said above it.
        style: a class of the page's style sheet.
    """

    head: Sequence[Inline]
    rows: Sequence[Sequence[Inline]]
    caption: str = ""
    style: str = ""
    note: Inline = field(default="")

    def html(self) -> str:
        """A <table> that scrolls by itself if it is too wide."""
        caption = f"<caption>{_escaped(self.caption)}</caption>" if self.caption else ""
        head = "".join(f'<th scope="col">{_html(cell)}</th>' for cell in self.head)
        rows = "".join(
            f'<tr><th scope="row">{_html(row[0])}</th>'
            + "".join(f"<td>{_html(cell)}</td>" for cell in row[1:])
            + "</tr>\n"
            for row in self.rows
        )
        note = f'<p class="note">{_html(self.note)}</p>' if self.note else ""
        table = f"<table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table>"
        return f'<div class="table {self.style}" tabindex="0">{table}</div>{note}'

    def markdown(self) -> str:
        """A table with bars."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        table = "\n".join(
            f"| {' | '.join(_markdown(cell).replace('|', '&#124;') for cell in line)} |" for line in lines
        )
        return "\n\n".join(
            filter(None, (f"**{_plain(self.caption)}**" * bool(self.caption), table, _markdown(self.note)))
        )


@dataclass(frozen=True)
class Fold:
    """Blocks that a reader opens by a click."""

    title: str
    blocks: Sequence["Block"]

    def html(self) -> str:
        """A <details>."""
        return f"<details><summary>{_escaped(self.title)}</summary>{_joined(self.blocks)}</details>"

    def markdown(self) -> str:
        """Open: Markdown is read by programs too."""
        return "\n\n".join([f"**{_plain(self.title)}**", *(block.markdown() for block in self.blocks)])


Block = Heading | Paragraph | Tiles | Figure | Table | Fold


def html_page(title: str, blocks: Sequence[Block]) -> str:
    """The whole page as one file."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{_escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{_joined(blocks)}\n"
        "</main>\n</body>\n</html>\n"
    )


def markdown_page(blocks: Sequence[Block]) -> str:
    """The same as Markdown."""
    return "\n\n".join(block.markdown() for block in blocks) + "\n"


def _joined(blocks: Sequence[Block]) -> str:
    return "\n".join(block.html() for block in blocks)


def _html(content: Inline) -> str:
    if isinstance(content, str):
        return _escaped(content)
    if isinstance(content, list | tuple):
        return "".join(_html(part) for part in content)
    return content.html()


def _markdown(content: Inline) -> str:
    if isinstance(content, str):
        return _plain(content)
    if isinstance(content, list | tuple):
        return "".join(_markdown(part) for part in content)
    return content.markdown()


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line; spaces at its ends stay, for what is written before and after."""
    escaped = html.escape(text, quote=False)
    for sign in "\\`*_[]~#":
        escaped = escaped.replace(sign, f"\\{sign}")
    return re.sub(r"\s+", " ", escaped)
