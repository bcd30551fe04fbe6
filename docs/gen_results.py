"""Writes the tables of studies into pages, from their records.

    python docs/gen_results.py

The place of a table is between two comments:

    <!-- study: benchmark results/benchmark -->
    <!-- end of study -->

The first names the recipe of the study, as for lmim study --config, and the folder of its records
(--records); after these, only=TITLE chooses a group, and names of metrics choose columns, or
`accuracies` a short table. The tests compare pages with records.
"""

import importlib
import pathlib
import re

from ml_collections import ConfigDict

from lmim_jax.cli import study
from lmim_jax.report import comparison

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLACE = re.compile(r"(<!-- study: ([^\n]*) -->\n).*?(<!-- end of study -->)", re.DOTALL)


def pages() -> list[pathlib.Path]:
    """The pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def with_tables(text: str, root: pathlib.Path = ROOT) -> str:
    """A page with the tables of today's records.

    Args:
      text: of the page.
      root: what the folders of records are relative to.
    """

    def fill(match: re.Match[str]) -> str:
        begin, words, end = match.groups()
        name, folder, *columns = words.split()
        config = _config(name)
        if columns and columns[0].startswith("only="):
            groups = {group[0]: group for group in config.groups}
            config.groups = (groups[columns.pop(0).removeprefix("only=")],)
        tables = []
        for group in study.recorded(config, root / folder):
            if columns == ["accuracies"]:
                tables.append(comparison.accuracy_table(group.variants))
                continue
            chosen = columns or tuple(comparison.COLUMNS)
            finished = [variant for variant in group.variants if variant.values]
            tables.append(comparison.markdown_table(finished, chosen))
            if not columns:
                tables.append("\n".join(f"- {sentence}" for sentence in group.sentences))
        return "\n".join([begin.rstrip(), "", "\n\n".join(tables), "", end])

    return PLACE.sub(fill, text)


def _config(name: str) -> ConfigDict:
    """The config of a study, NAME or NAME:ARGUMENT."""
    module, _, argument = name.partition(":")
    arguments = [argument] if argument else []
    return importlib.import_module(f"lmim_jax.configs.{module}").get_config(*arguments)


def main() -> None:
    """Rewrite the pages whose tables are not those of the records."""
    for page in pages():
        text = page.read_text()
        filled = with_tables(text)
        if filled != text:
            page.write_text(filled)
            print(f"{page.relative_to(ROOT)}: new tables")


if __name__ == "__main__":
    main()
