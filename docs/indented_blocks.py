"""Griffe extension: blocks indented by two spaces in docstrings are shown as code."""

from typing import Any

import griffe


class IndentedBlocks(griffe.Extension):
    """Indents such blocks by four spaces, which Markdown takes for code."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of an object."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = indent_blocks(obj.docstring.value)


def indent_blocks(docstring: str) -> str:
    """Indent the blocks of a docstring that follow an empty line and start with two spaces.

    Sections such as "Args:" have no empty line before their indented lines.
    """
    lines = []
    in_block = False
    after_empty = False
    for line in docstring.splitlines():
        if line.strip() and (after_empty or not line.startswith("  ")):
            in_block = line.startswith("  ") and not line.startswith("    ")
        lines.append("  " + line if in_block and line.strip() else line)
        after_empty = not line.strip()
    return "\n".join(lines)
