"""Finished runs side by side: figures over seeds, what can be said of them, and a page to look at.

Nothing here knows a method: a figure that a run has not logged is left out.
"""

import itertools
import json
import pathlib
import statistics

from PIL import Image

from lmim_jax.train.metric_writer import history
from lmim_jax.utils import atomic_io, html, plotting

COLUMNS = {  # metric: (heading, decimals)
    "collapse_index": ("collapse index", 2),
    "similarity_predictions": ("sim. predictions", 2),
    "similarity_visible": ("sim. visible", 2),
    "similarity_targets": ("sim. targets", 2),
    "effective_rank": ("effective rank", 1),
    "knn/nn1": ("1-NN %", 1),
    "knn/knn20": ("k-NN 20 %", 1),
    "gflop_per_image": ("GFLOP / image", 2),
    "step_images_per_second": ("images/s", 0),
}
JUDGED = ("collapse_index", "effective_rank", "knn/knn20")  # what sentences are made of


def last(folder):
    """The last value of every metric of a run."""
    values = {}
    for row in history(folder):
        values |= row
    return values


def line(folder):
    """A finished run in one line."""
    values = last(folder)
    parts = [
        f"{COLUMNS[name][0]} {values[name]:.{COLUMNS[name][1]}f}"
        for name in JUDGED
        if name in values
    ]
    return ", ".join(parts)


def figures(folders):
    """{metric: [value of each seed]} of one variant, from {seed: folder}; metrics that every seed has."""
    rows = [last(folder) for _, folder in sorted(folders.items())]
    return {
        name: [row[name] for row in rows]
        for name in COLUMNS
        if rows and all(name in row for row in rows)
    }


def cell(values, decimals):
    """Mean and, over several seeds, half the range: "0.52 ± 0.03"."""
    if not values:
        return ""
    spread = f" ± {(max(values) - min(values)) / 2:.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{spread}"


def table(rows):
    """A Markdown table of [(name, what, {metric: values})]."""
    columns = [name for name in COLUMNS if any(name in values for *_, values in rows)]
    head = ["run", "what", *(COLUMNS[name][0] for name in columns)]
    lines = [head, ["---", "---", *["---:"] * len(columns)]]
    lines += [
        [name, what, *(cell(v.get(c), COLUMNS[c][1]) for c in columns)] for name, what, v in rows
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def verdict(before, after):
    """What two lists of values over seeds allow to say: "rises", "falls", or "is within the spread of the seeds".

    Seeds of the two must not overlap; a single seed allows nothing.
    """
    if min(len(before), len(after)) < 2:
        return "has one seed only"
    if min(after) > max(before):
        return "rises"
    return "falls" if max(after) < min(before) else "is within the spread of the seeds"


def conclusions(rows, against):
    """Sentences on [(name, what, values)]: each row against the previous or the first one (or none: ranked)."""
    rows = [row for row in rows if row[2]]
    if against == "none":
        known = [(name, values["knn/knn20"]) for name, _, values in rows if "knn/knn20" in values]
        sentences = []
        for (name, better), (other, worse) in itertools.pairwise(
            sorted(known, key=lambda row: -statistics.mean(row[1]))
        ):
            rank = "is above" if verdict(worse, better) == "rises" else "cannot be told from"
            sentences.append(
                f"k-NN 20: {name} ({cell(better, 1)}) {rank} {other} ({cell(worse, 1)})"
            )
        return sentences
    pairs = (
        itertools.pairwise(rows) if against == "previous" else ((rows[0], row) for row in rows[1:])
    )
    sentences = []
    for (_, _, before), (name, what, after) in pairs:
        said = []
        for metric in JUDGED:
            if metric in before and metric in after:
                heading, decimals = COLUMNS[metric]
                change = f"{cell(before[metric], decimals)} to {cell(after[metric], decimals)}"
                said.append(f"{heading} {verdict(before[metric], after[metric])} ({change})")
        sentences.append(f"{name} ({what}): " + "; ".join(said))
    return sentences


def curves(rows, folders):
    """A picture: every metric of the table over steps, mean over seeds, a line per variant."""
    panels = []
    for metric, (heading, _) in COLUMNS.items():
        lines = {}
        for name, *_ in rows:
            seeds = [
                [(row["step"], row[metric]) for row in history(f) if metric in row]
                for f in folders[name].values()
            ]
            if seeds and all(seeds):
                common = sorted(set.intersection(*({step for step, _ in seed} for seed in seeds)))
                means = [statistics.mean(dict(seed)[step] for seed in seeds) for step in common]
                lines[name] = common, means
        if lines:
            panels.append((heading, lines, {}))
    return plotting.plot_curves(panels, "Mean over seeds", shared_legend=True) if panels else None


def publish(out, command, groups, described, folders, costs):
    """Write OUT/table.md, OUT/results.json, OUT/index.html, and its figures as OUT/TITLE.png.

    Args:
      groups: [(title, compared with, names)]. described: {name: words}. folders: {name: {seed: folder}}, finished runs.
      costs: {name: {metric: [value]}}, of training.
    """
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    text, sections, results = [], [], {}
    for title, against, names in groups:
        rows = [
            (name, described[name], figures(folders[name]) | costs.get(name, {})) for name in names
        ]
        said = conclusions(rows, against)
        results[title] = {
            name: {"what": what, "seeds": sorted(folders[name]), **values}
            for name, what, values in rows
        }
        text += [f"## {title}", table(rows), "\n".join(f"- {sentence}." for sentence in said)]
        content = [
            _html_table(rows),
            html.tag("ul", *(html.tag("li", f"{sentence}.") for sentence in said)),
        ]
        name = title.replace(" ", "_")
        if (picture := curves(rows, folders)) is not None:
            Image.fromarray(picture).save(out / f"{name}.png", optimize=True)
            content.append(html.plot(picture, f"curves of {title}"))
        sections.append(html.Section(name, title, html.join(*content)))
    note = "Mean over seeds ± half their range. A change is called one only where the seeds of both do not overlap."
    atomic_io.write(out / "table.md", "\n\n".join([*text, note]) + "\n")
    atomic_io.write(
        out / "results.json", json.dumps({"command": command, "groups": results}, indent=2) + "\n"
    )
    head = html.join(
        html.tag("h1", out.name),
        html.tag("p", html.tag("code", command)),
        html.tag("p", note, class_="soft"),
    )
    atomic_io.write(out / "index.html", html.document(out.name, head, sections))


def _html_table(rows):
    """The Markdown table as HTML."""
    head, _, *body = [row[2:-2].split(" | ") for row in table(rows).splitlines()]
    return html.table(head, body, numbers=range(2, len(head)))
