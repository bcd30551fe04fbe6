"""HTML elements that several sections of the report share, on top of `lmim_jax.utils.html`."""

import csv
from collections.abc import Callable, Iterable

from lmim_jax.utils import html
from lmim_jax.utils.html import Html

DAMAGES = (OSError, ValueError, LookupError, TypeError, csv.Error)  # what reading a file may raise


def concatenate(parts: Iterable[Html | str]) -> Html:
    """Join HTML elements one after the other."""
    return html.join(*parts)


def container(children: Iterable[Html | str], **attributes: object) -> Html:
    """A <div> around `children`.

    Args:
      children: the content; text that is not `Html` is escaped.
      **attributes: as for `html.tag`, for example `class_="tiles"`.
    """
    return html.tag("div", concatenate(children), **attributes)


def bullet_list(sentences: Iterable[str]) -> Html:
    """A <ul> with one item for each sentence."""
    items = [html.tag("li", sentence) for sentence in sentences]
    return html.tag("ul", concatenate(items))


def heading(text: str) -> Html:
    """A heading inside a section."""
    return html.tag("h3", text)


def paragraph(parts: Iterable[Html | str], **attributes: object) -> Html:
    """A paragraph of text and inline elements."""
    return html.tag("p", concatenate(parts), **attributes)


def code(text: str) -> Html:
    """Text in a fixed-width font, within a line."""
    return html.tag("code", text)


def code_block(text: str) -> Html:
    """Several lines of code or of a configuration file."""
    return html.tag("pre", text)


def collapsible(summary: str, content: Html) -> Html:
    """Content that is hidden until the reader clicks on its summary."""
    return html.tag("details", html.tag("summary", summary), content)


def unless_damaged(name: str, read: Callable[[], list[Html | str]]) -> list[Html | str]:
    """What a function makes of files; where they are damaged, a line that names them.

    Args:
      name: of the files.
      read: reads them.
    """
    try:
        return read()
    except DAMAGES as error:
        return [paragraph([code(name), f" cannot be read: {error}"])]
