"""Pages that need nothing but a browser: one HTML file with its style, script and pictures inside, and no network.

All text is escaped unless it is `Html`, which only this module and those that draw SVG make.
"""

import base64
import html
import io
import typing

import numpy as np
from PIL import Image

VOID = ("img", "meta", "br")
SHARP = 112  # pixels: pictures up to this side are stored as they are, larger ones as JPEG, no side above LARGEST
LARGEST = 256
# What a browser may load for the page: nothing that is not in it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --soft: #5a6270; --paper: #fff; --card: #f5f6f8; --edge: #d9dde3;
  --accent: #2459a8; --good: #1d7a33; --bad: #b3341f }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a2abb8; --paper: #14171b; --card: #1e2228;
  --edge: #363c45; --accent: #8db8f5; --good: #6fce85; --bad: #f0917c } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 0 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1.6rem 0 .2rem; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .3rem; padding-top: .4rem; border-top: 1px solid var(--edge) }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
p { margin: .4rem 0; max-width: 50rem } a { color: var(--accent) }
.soft, figcaption, th { color: var(--soft) } .good { color: var(--good) } .bad { color: var(--bad) }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .8rem 0; font-size: .9rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; margin: .8rem 0; font-size: .9rem; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .7rem; border-bottom: 1px solid var(--edge); text-align: left; font-weight: 400 }
td.number, th.number { text-align: right }
code, pre { font: .85em/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; background: var(--card) }
code { padding: .1rem .3rem; overflow-wrap: anywhere } li { margin: .2rem 0 }
pre { padding: .6rem .8rem; overflow-x: auto; border-radius: 6px } details { margin: .8rem 0 }
summary { cursor: pointer; color: var(--accent) }
.tiles, .cards, .charts { display: grid; gap: .8rem; margin: .8rem 0 }
.tiles { grid-template-columns: repeat(auto-fill, minmax(min(100%, 12.5rem), 1fr)) }
.cards { grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--card-width, 21rem)), 1fr)) }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)) }
.tile, .card { background: var(--card); border-radius: 8px; padding: .7rem .8rem }
.tile b { display: block; font-size: 1.7rem; line-height: 1.2 } .tile span { font-size: .85rem; color: var(--soft) }
.card { padding: .6rem } .card > .row { display: grid; gap: .4rem; grid-template-columns: repeat(var(--columns), 1fr) }
figure { margin: 0; min-width: 0 } figcaption { font-size: .75rem; line-height: 1.3; margin-top: .15rem }
img, svg { display: block; max-width: 100% } img { background: var(--edge) }
figure img, figure canvas { width: 100%; image-rendering: pixelated; border-radius: 3px }
.over { position: relative } .over > svg, .over > canvas { position: absolute; inset: 0; width: 100%; height: 100% }
.over img { height: auto } figure svg { width: 100%; height: auto }
.mark { fill: none; stroke: #fff; stroke-width: .25 } [data-cosines] .over { cursor: crosshair }
"""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def join(*parts):
    """Parts one after the other, as Html; text that is not Html is escaped."""
    return Html(
        "".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts)
    )


def tag(name, /, *children, **attributes):
    """An element; `class_` and the like are attributes named as Python's keywords, `data_x` is `data-x`."""
    written = [
        f'{key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    ]
    start = f"<{' '.join([name, *written])}>"
    return Html(start if name in VOID else f"{start}{join(*children)}</{name}>")


def image(picture, alt):
    """uint8 [H, W, 3] as an <img> with its pixels inside: PNG, or JPEG where it is large."""
    drawn, buffer = Image.fromarray(np.ascontiguousarray(picture)), io.BytesIO()
    drawn.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    kind, options = (
        ("png", dict(optimize=True)) if max(drawn.size) <= SHARP else ("jpeg", dict(quality=88))
    )
    drawn.save(buffer, kind, **options)
    return _embedded(kind, buffer, drawn, alt)


def plot(picture, alt):
    """A drawn figure, uint8 [H, W, 3], as an <img>: always PNG."""
    drawn, buffer = Image.fromarray(picture), io.BytesIO()
    drawn.save(buffer, "png", optimize=True)
    return _embedded("png", buffer, drawn, alt)


def _embedded(kind, buffer, drawn, alt):
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return tag("img", src=source, alt=alt, width=drawn.width, height=drawn.height)


def table(head, rows, numbers=()):
    """A table of text; `numbers`: columns that are aligned to the right."""
    kind = lambda i: dict(class_="number") if i in numbers else {}
    line = lambda name, cells: tag(
        "tr", *(tag(name, cell, **kind(i)) for i, cell in enumerate(cells))
    )
    return tag(
        "div", tag("table", line("th", head), *(line("td", row) for row in rows)), class_="scroll"
    )


class Section(typing.NamedTuple):
    """A part of a page: its name in links, its title, and Html."""

    name: str
    title: str
    content: Html


def figure(picture, alt, caption, over=""):
    """A picture uint8 [H, W, C] with its caption; `over`: Html to lie on it."""
    picture = np.asarray(picture)
    if picture.shape[-1] != 3:
        picture = np.repeat(picture.mean(-1, keepdims=True), 3, axis=-1).astype(np.uint8)
    shown = tag("div", image(picture, alt), over, class_="over")
    return tag("figure", shown, tag("figcaption", caption))


def cards(rows, columns, width):
    """A card for each row of figures, `columns` beside each other, at least `width` rem wide where there is room."""
    made = [
        tag("div", tag("div", *row, class_="row", style=f"--columns:{columns}"), class_="card")
        for row in rows
    ]
    return tag("div", *made, class_="cards", style=f"--card-width:{width}rem")


def explained_section(name, title, look, collapsed, *content):
    """A `Section` with its two explanations; `collapsed` may be ""."""
    warning = (
        [tag("p", tag("b", "If it collapsed: "), collapsed, class_="soft")] if collapsed else []
    )
    return Section(name, title, join(tag("p", look), *warning, *content))


def document(title, head, sections, script=""):
    """The page: `head` (Html), links to the `sections` where there are several, and these.

    script: JavaScript of our own, never made of data.
    """
    links = [tag("a", section.title, href=f"#{section.name}") for section in sections]
    body = [
        tag("section", tag("h2", section.title), section.content, id=section.name)
        for section in sections
    ]
    page_head = join(
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        Html(f"<style>{STYLE}</style>"),
    )
    end = Html(f"<script>{script}</script>") if script else ""
    content = join(head, tag("nav", *links) if len(links) > 1 else "", *body, end)
    return f'<!doctype html>\n<html lang="en"><head>{page_head}</head>\n<body>\n{content}\n</body></html>\n'
