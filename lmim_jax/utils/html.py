"""Self-contained web pages: one HTML file with its style, script and images inside.

All text is escaped unless it is `Html`, which only this module and functions that draw SVG create.
"""

import base64
import html
import io
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lmim_jax.utils.names import printable

VOID_ELEMENTS = ("img", "meta", "br")
MAX_SIDE = 256  # pixels; larger images are shrunk
MAX_PNG_SIDE = 112  # pixels; larger images are stored as JPEG
# What a browser may load for the page: nothing that is not in it
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --soft: #5a6270; --paper: #fff; --card: #f5f6f8;
  --edge: #d9dde3; --accent: #2459a8; --good: #1d7a33; --bad: #b3341f }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a2abb8; --paper: #14171b; --card: #1e2228; --edge: #363c45;
    --accent: #8db8f5; --good: #6fce85; --bad: #f0917c }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 0 1rem 4rem; color: var(--ink);
  background: var(--paper);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1.6rem 0 .2rem; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .3rem; padding-top: .4rem;
  border-top: 1px solid var(--edge) }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
p { margin: .4rem 0; max-width: 50rem }
a { color: var(--accent) }
.soft, figcaption, th { color: var(--soft) }
.good { color: var(--good) }
.bad { color: var(--bad) }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .8rem 0; font-size: .9rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; margin: .8rem 0; font-size: .9rem;
  font-variant-numeric: tabular-nums }
td, th { padding: .25rem .7rem; border-bottom: 1px solid var(--edge); text-align: left;
  font-weight: 400 }
td.number, th.number { text-align: right }
td.number { white-space: nowrap }
@media (max-width: 40rem) {
  table, tbody, tr, td { display: block }
  th { display: none }
  tr { padding: .4rem 0; border-bottom: 1px solid var(--edge) }
  td, td.number { display: flex; justify-content: space-between; gap: 1rem; padding: .1rem 0;
    border: 0; text-align: right; white-space: normal; overflow-wrap: anywhere }
  td:first-child { display: block; text-align: left; font-weight: 600 }
  td:first-child span { font-weight: 400 }
  td::before { content: attr(data-column); color: var(--soft); text-align: left; flex: none }
  td:first-child::before { content: none }
  td.none { display: none }
}
code, pre { font: .85em/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  background: var(--card) }
code { padding: .1rem .3rem; overflow-wrap: anywhere }
li { margin: .2rem 0 }
pre { padding: .6rem .8rem; overflow-x: auto; border-radius: 6px }
details { margin: .8rem 0 }
summary { cursor: pointer; color: var(--accent) }
.tiles, .cards, .charts { display: grid; gap: .8rem; margin: .8rem 0 }
.tiles { grid-template-columns: repeat(auto-fill, minmax(min(100%, 12.5rem), 1fr)) }
.cards {
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--card-width, 21rem)), 1fr)) }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)) }
.tile, .card { background: var(--card); border-radius: 8px; padding: .7rem .8rem }
.tile b { display: block; font-size: 1.7rem; line-height: 1.2 }
.tile span { font-size: .85rem; color: var(--soft) }
.card { padding: .6rem }
.card > .row { display: grid; gap: .4rem; grid-template-columns: repeat(var(--columns), 1fr) }
figure { margin: 0; min-width: 0 }
figcaption { font-size: .75rem; line-height: 1.3; margin-top: .15rem; overflow-wrap: anywhere }
img, svg { display: block; max-width: 100% }
img { background: var(--edge) }
figure img, figure canvas { width: 100%; image-rendering: pixelated; border-radius: 3px }
.over { position: relative }
.over > svg, .over > canvas { position: absolute; inset: 0; width: 100%; height: 100% }
.over img { height: auto }
figure svg { width: 100%; height: auto }
.mark { fill: none; stroke: #fff; stroke-width: .25 }
.whole img { height: auto; image-rendering: auto }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .6rem 0; font-size: .85rem }
.keys i { display: inline-block; width: 1.2rem; height: .2rem; margin-right: .4rem;
  vertical-align: middle }
[data-cosines] .over { cursor: crosshair }
"""


class Html(str):
    """Text that is HTML already, and is not escaped."""

    __slots__ = ()


class Section(NamedTuple):
    """A part of a page.

    Attributes:
      name: its anchor, for links.
      title: its heading.
      content: what follows.
    """

    name: str
    title: str
    content: Html


def join(*parts: object) -> Html:
    """Concatenate parts; whatever is not Html is escaped."""
    return _concatenate(parts)


def _concatenate(parts: Iterable[object]) -> Html:
    return Html("".join(_escape(part) for part in parts))


def _escape(value: object) -> Html:
    if isinstance(value, Html):
        return value
    return Html(html.escape(str(value)))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element.

    Args:
      name: such as "p".
      *children: what it contains, Html or text.
      **attributes: "_" stands for "-", and one at the end is dropped: data_x is `data-x`, class_ is
        `class`.
    """
    start = name
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-")
        start += f' {attribute}="{html.escape(str(value))}"'
    if name in VOID_ELEMENTS:
        return Html(f"<{start}>")
    return Html(f"<{start}>{_concatenate(children)}</{name}>")


def image(picture: UInt8[np.ndarray, "H W 3"], alt: str, max_side: int = MAX_SIDE) -> Html:
    """An <img> with its pixels inside: PNG, or JPEG where it is large.

    Args:
      picture: pixels.
      alt: text for readers who cannot see it.
      max_side: in pixels; larger images are shrunk.
    """
    pil_image = Image.fromarray(np.ascontiguousarray(picture))
    pil_image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(pil_image.size) <= MAX_PNG_SIDE:
        pil_image.save(buffer, "png", optimize=True)
        return _embed("png", buffer, pil_image, alt)
    pil_image.save(buffer, "jpeg", quality=88)
    return _embed("jpeg", buffer, pil_image, alt)


def _embed(file_format: str, buffer: io.BytesIO, pil_image: Image.Image, alt: str) -> Html:
    data = base64.b64encode(buffer.getvalue()).decode()
    source = f"data:image/{file_format};base64,{data}"
    return tag("img", src=source, alt=alt, width=pil_image.width, height=pil_image.height)


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], numbers: Collection[int] = ()
) -> Html:
    """A table.

    Args:
      head: titles of the columns.
      rows: cells, Html or text.
      numbers: indices of the columns that are aligned to the right.
    """
    lines = [_table_row("th", head, head, numbers)]
    lines += [_table_row("td", row, head, numbers) for row in rows]
    return tag("div", tag("table", _concatenate(lines)), class_="scroll")


def _table_row(
    cell_name: str, cells: Sequence[object], head: Sequence[object], numbers: Collection[int]
) -> Html:
    """A row; its cells name their columns, for narrow screens."""
    made = []
    for column, cell in enumerate(cells):
        attributes: dict[str, object] = {}
        if column in numbers:
            attributes["class_"] = "number"
        if cell_name == "td" and cell == "":
            attributes["class_"] = "number none"
        elif cell_name == "td" and column > 0:
            attributes["data_column"] = head[column]
        made.append(tag(cell_name, cell, **attributes))
    return tag("tr", _concatenate(made))


def figure(
    picture: UInt8[np.ndarray, "H W C"], alt: str, caption: object, overlay: object = ""
) -> Html:
    """An image with its caption.

    Args:
      picture: pixels; of channels other than 3, the mean is shown in gray.
      alt: text for readers who cannot see it.
      caption: Html or text below it.
      overlay: Html to lay over it.
    """
    picture = np.asarray(picture)
    if picture.shape[-1] != 3:
        gray = picture.mean(-1, keepdims=True)
        picture = np.repeat(gray, 3, axis=-1).astype(np.uint8)
    shown = tag("div", image(picture, alt), overlay, class_="over")
    return tag("figure", shown, tag("figcaption", caption))


def cards(rows: Iterable[Iterable[Html]], columns: int, width: float) -> Html:
    """A card for each row of figures.

    Args:
      rows: the figures of every card.
      columns: figures side by side in a card.
      width: least width of a card in rem, where the page is wide enough.
    """
    made = []
    for row in rows:
        content = tag("div", _concatenate(row), class_="row", style=f"--columns:{columns}")
        made.append(tag("div", content, class_="card"))
    return tag("div", _concatenate(made), class_="cards", style=f"--card-width:{width}rem")


def explained_section(
    name: str, title: str, explanation: object, collapsed: object, *content: object
) -> Section:
    """A section that begins with an explanation.

    Args:
      name: its anchor, for links.
      title: its heading.
      explanation: what there is to see.
      collapsed: what one would see had the model collapsed; "": nothing to say.
      *content: what follows, Html or text.
    """
    parts = [tag("p", explanation)]
    if collapsed:
        parts.append(tag("p", tag("b", "If it collapsed: "), collapsed, class_="soft"))
    parts.append(_concatenate(content))
    return Section(name, title, _concatenate(parts))


def document(title: str, head: Html, sections: Sequence[Section], script: str = "") -> str:
    """A whole page.

    Args:
      title: of the browser's window.
      head: what comes before the sections.
      sections: with links to them where there are several.
      script: JavaScript of this package, never made from data.
    """
    page_head = join(
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        Html(f"<style>{STYLE}</style>"),
    )
    parts = [head]
    if len(sections) > 1:
        links = [tag("a", section.title, href=f"#{section.name}") for section in sections]
        parts.append(tag("nav", _concatenate(links)))
    for section in sections:
        heading = tag("h2", section.title)
        parts.append(tag("section", heading, section.content, id=section.name))
    if script:
        parts.append(Html(f"<script>{script}</script>"))
    body = _concatenate(parts)
    return printable(
        f'<!doctype html>\n<html lang="en"><head>{page_head}</head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )
