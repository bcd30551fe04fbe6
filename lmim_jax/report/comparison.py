"""Compares finished runs: metrics over seeds, conclusions, and a page with tables and curves.

Nothing here depends on the method: a metric that a run has not logged is left out.
"""

import dataclasses
import functools
import io
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from lmim_jax.report import elements
from lmim_jax.train.metric_writer import read_metrics
from lmim_jax.utils import atomic_io, buckets, html, plotting
from lmim_jax.utils.html import Html, Section


@dataclasses.dataclass(frozen=True)
class Column:
    """How a metric appears in tables: its heading, and how many decimals are shown."""

    heading: str
    decimals: int


COLUMNS = {
    "collapse_index": Column("collapse index", 2),
    "similarity_predictions": Column("sim. predictions", 2),
    "similarity_visible": Column("sim. visible", 2),
    "similarity_targets": Column("sim. targets", 2),
    "effective_rank": Column("effective rank", 1),
    "knn/nn1": Column("1-NN %", 1),
    "knn/knn20": Column("k-NN 20 %", 1),
    "logistic_regression/accuracy": Column("logistic regression %", 1),
    "linear_probe/top1": Column("linear probe %", 1),
    "attentive_probe/top1": Column("attentive probe %", 1),
    "fewshot/labels1pct": Column("1 % of labels, %", 1),
    "fewshot/labels10pct": Column("10 % of labels, %", 1),
    "detection/ap50": Column("AP50", 1),
    "detection/ap": Column("AP", 1),
    "gflop_per_image": Column("GFLOP / image", 2),
    "step_images_per_second": Column("images/s", 0),
}
PIXELS = "raw pixels"
NO_ENCODER = {"pixels": PIXELS, "histogram": "color histograms"}  # names of features: their rows
PICTURE = "*_seen_*.png"  # of patch features, by the evaluator `visualization`
MAX_PICTURE_SIDE = 800  # pixels
KNN = "knn/knn20"  # the metric that variants are ranked by
JUDGED = ("collapse_index", "effective_rank", KNN)  # the metrics that conclusions are about
LINEAR = "logistic_regression/accuracy"
ACCURACIES = (KNN, LINEAR)  # that are compared with those of baselines
NOTE = (
    "Mean over seeds ± half the range. "
    "A change is only reported where the ranges over seeds do not overlap."
)

Values = dict[str, list[float]]  # {metric: its value for each seed}
SeedFolders = Mapping[int, buckets.Pathname]  # {seed: folder of the finished run}
Reference = Literal["previous", "first", "none"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One variant of a recipe, with its metrics over seeds."""

    name: str
    description: str
    values: Values


@dataclasses.dataclass(frozen=True)
class Group:
    """Variants that are shown in one table.

    Attributes:
      title: of the table.
      reference: each variant is compared with the previous one, with the first one, or, with
        "none", all are ranked.
      names: of the variants.
    """

    title: str
    reference: Reference
    names: Sequence[str]


class Compared(NamedTuple):
    """A group with its metrics.

    Attributes:
      variants: of the group, and its baselines: the rows of its table.
      sentences: conclusions.
    """

    variants: list[Variant]
    sentences: list[str]


def last_values(folder: buckets.Pathname) -> dict[str, Any]:
    """The last value of every metric of a run."""
    values: dict[str, Any] = {}
    for line in read_metrics(folder):
        values.update(line)
    return values


def one_line_summary(folder: buckets.Pathname) -> str:
    """The main metrics of a finished run in one line."""
    values = last_values(folder)
    parts = []
    for metric in JUDGED:
        if metric in values:
            column = COLUMNS[metric]
            parts.append(f"{column.heading} {values[metric]:.{column.decimals}f}")
    return ", ".join(parts)


def collect_values(
    folders: SeedFolders,
    read: Callable[[buckets.Pathname], dict[str, Any]] = last_values,
) -> Values:
    """Metrics of one variant in the order of its seeds; only metrics that all runs have.

    Args:
      folders: {seed: folder}.
      read: gives the metrics of a folder.
    """
    runs = [read(folders[seed]) for seed in sorted(folders)]
    values: Values = {}
    for metric in COLUMNS:
        logged = [run[metric] for run in runs if metric in run]
        if logged and len(logged) == len(runs):
            values[metric] = logged
    return values


def format_cell(values: Sequence[float], decimals: int) -> str:
    """Mean and, for several seeds, half the range: "0.52 ± 0.03"; "" without values."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{decimals}f}"
    if len(values) == 1:
        return mean
    half_range = (max(values) - min(values)) / 2
    return f"{mean} ± {half_range:.{decimals}f}"


def _table_cells(
    variants: Sequence[Variant], columns: Sequence[str] = tuple(COLUMNS)
) -> tuple[list[str], list[list[str]]]:
    """The heading of each column, and the rows of cells; columns without any value are left out."""
    metrics = []
    for metric in columns:
        if any(metric in variant.values for variant in variants):
            metrics.append(metric)
    head = ["run", "description"] + [COLUMNS[metric].heading for metric in metrics]
    rows = []
    for variant in variants:
        row = [variant.name, variant.description]
        for metric in metrics:
            values = variant.values.get(metric, [])
            row.append(format_cell(values, COLUMNS[metric].decimals))
        rows.append(row)
    return head, rows


def markdown_table(variants: Sequence[Variant], columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """The variants and some metrics, of COLUMNS, as a Markdown table."""
    return _markdown(*_table_cells(variants, columns))


def accuracy_table(variants: Sequence[Variant]) -> str:
    """The ACCURACIES of trained encoders beside those of untrained ones, as a Markdown table.

    Args:
      variants: of a group with `baselines`.
    """
    known = {variant.name: variant.values for variant in variants}
    head = ["run", "description"]
    for metric in ACCURACIES:
        head += [f"{COLUMNS[metric].heading}, untrained", "trained"]
    rows = []
    for variant in variants:
        untrained = known.get(_untrained(variant.name), {})
        if not untrained and variant.name not in NO_ENCODER.values():
            continue
        row = [variant.name, variant.description]
        for metric in ACCURACIES:
            for values in (untrained, variant.values):
                row.append(format_cell(values.get(metric, []), COLUMNS[metric].decimals))
        rows.append(row)
    return _markdown(head, rows)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of two columns of words and others of numbers."""
    alignment = ["---", "---"] + ["---:"] * (len(head) - 2)
    lines = []
    for cells in [head, alignment] + rows:
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def html_table(variants: Sequence[Variant]) -> Html:
    """The variants and their metrics as an HTML table."""
    head, rows = _table_cells(variants)
    cells: list[list[object]] = []
    for name, description, *values in rows:
        note = html.tag("span", description, class_="soft")
        cells.append([html.join(name, html.tag("br"), note), *values])
    return html.table(["run", *head[2:]], cells, numbers=range(1, len(head) - 1))


def verdict(before: Sequence[float], after: Sequence[float]) -> str:
    """What can be said of a metric, from its values over seeds before and after a change.

    Returns:
      "rises" or "falls" if the two ranges do not overlap; "is within the spread of the seeds" if
      they do; "has one seed only" if either has.
    """
    if min(len(before), len(after)) < 2:
        return "has one seed only"
    if min(after) > max(before):
        return "rises"
    if max(after) < min(before):
        return "falls"
    return "is within the spread of the seeds"


def conclusions(variants: Sequence[Variant], reference: Reference) -> list[str]:
    """Sentences about the variants that have finished.

    Args:
      variants: in the order of the study.
      reference: see `Group`.
    """
    if reference == "none":
        return _ranking(variants)
    sentences = []
    for before, after in _pairs(variants, reference):
        if before.values and after.values:
            changes = _changes(before.values, after.values)
            sentences.append(f"{after.name} ({after.description}): " + "; ".join(changes))
    return sentences


def _pairs(variants: Sequence[Variant], reference: Reference) -> Iterator[tuple[Variant, Variant]]:
    """Yield each variant but the first, after the one that it is compared with."""
    if reference == "previous":
        yield from itertools.pairwise(variants)
        return
    for variant in variants[1:]:
        yield variants[0], variant


def _changes(before: Values, after: Values) -> list[str]:
    """What happened to each of the JUDGED metrics."""
    changes = []
    for metric in JUDGED:
        if metric in before and metric in after:
            column = COLUMNS[metric]
            old = format_cell(before[metric], column.decimals)
            new = format_cell(after[metric], column.decimals)
            change = verdict(before[metric], after[metric])
            changes.append(f"{column.heading} {change} ({old} to {new})")
    return changes


def _ranking(variants: Sequence[Variant]) -> list[str]:
    """A sentence for each two neighbors in the order of k-NN accuracy."""
    known = [variant for variant in variants if KNN in variant.values]
    ranked = sorted(known, key=_negative_mean_knn)
    sentences = []
    for better, worse in itertools.pairwise(ranked):
        high = better.values[KNN]
        low = worse.values[KNN]
        relation = "cannot be distinguished from"
        if verdict(low, high) == "rises":
            relation = "is above"
        sentences.append(
            f"k-NN 20: {better.name} ({format_cell(high, 1)}) {relation} "
            f"{worse.name} ({format_cell(low, 1)})"
        )
    return sentences


def baselines(names: Sequence[str], folders: Mapping[str, SeedFolders]) -> list[Variant]:
    """What the accuracies of variants are to be compared with.

    Args:
      names: of the variants.
      folders: {name: {seed: folder}}.

    Returns:
      Raw pixels and color histograms, as far as they were measured, and the encoder of each variant
      before training.
    """
    found: list[Variant] = []
    for feature, title in NO_ENCODER.items():
        values: Values = {}
        for name in names:
            read = functools.partial(_values_without_encoder, feature=feature)
            measured = {seed: folder for seed, folder in folders[name].items() if read(folder)}
            values = values or collect_values(measured, read)  # those of others are the same
        if values:
            found.append(Variant(title, "no encoder", values))
    for name in names:
        values = collect_values(folders[name], _first_values)
        if values:
            found.append(Variant(_untrained(name), "at step 0", values))
    return found


def _untrained(name: str) -> str:
    return f"{name}, untrained"


def _first_values(folder: buckets.Pathname) -> dict[str, Any]:
    """The evaluations of a run at step 0."""
    values: dict[str, Any] = {}
    for line in read_metrics(folder):
        if line["step"] == 0:
            values.update({name: value for name, value in line.items() if "/" in name})
    return values


def _values_without_encoder(folder: buckets.Pathname, feature: str) -> dict[str, Any]:
    """The evaluations of a feature of NO_ENCODER, under the names of those of the encoder."""
    values = {}
    for name, value in last_values(folder).items():
        if f"/{feature}_" in name:
            values[name.replace(f"/{feature}_", "/")] = value
    return values


def gains(variants: Sequence[Variant], compared: Sequence[Variant]) -> list[str]:
    """A sentence for each variant: its accuracies beside those of its baselines.

    Args:
      variants: trained.
      compared: see `baselines`.
    """
    known = {variant.name: variant.values for variant in compared}
    sentences = []
    for variant in variants:
        parts = []
        for name in (_untrained(variant.name), PIXELS):
            for metric in ACCURACIES:
                before = known.get(name, {}).get(metric)
                after = variant.values.get(metric)
                if before and after:
                    gain = statistics.mean(after) - statistics.mean(before)
                    parts.append(f"{gain:+.1f} {COLUMNS[metric].heading} over {name}")
        if parts:
            sentences.append(f"{variant.name}: {'; '.join(parts)}")
    return sentences


def _negative_mean_knn(variant: Variant) -> float:
    return -statistics.mean(variant.values[KNN])


def curve_panels(names: Sequence[str], folders: Mapping[str, SeedFolders]) -> list[plotting.Panel]:
    """Every metric over training steps, as the mean over seeds, with one line per variant.

    Args:
      names: of the variants.
      folders: {name: {seed: folder}}.

    Returns:
      A panel for each metric that was logged.
    """
    panels: list[plotting.Panel] = []
    for metric, column in COLUMNS.items():
        lines = {}
        for name in names:
            curve = _mean_curve(metric, folders[name])
            if curve is not None:
                lines[name] = curve
        if lines:
            panels.append((column.heading, lines, {}))
    return panels


def _curves_html(panels: Sequence[plotting.Panel]) -> Html:
    """The panels as charts with one legend above them."""
    colors = plotting.line_colors(panels[plotting.fullest_panel(panels)])
    keys = []
    for name, color in colors.items():
        swatch = html.tag("i", style=f"background:{color}")
        keys.append(html.tag("span", swatch, name))
    charts = []
    for panel in panels:
        chart = html.tag(
            "div",
            html.Html(plotting.curve_svg(panel, colors)),
            role="img",
            aria_label=f"curve: {panel[0]}",
        )
        charts.append(html.tag("figure", elements.heading(panel[0]), chart))
    return html.join(
        elements.container(keys, class_="keys"), elements.container(charts, class_="charts")
    )


def _pictures_html(variants: Sequence[Variant], folders: Mapping[str, SeedFolders]) -> Html:
    """The last picture of the patch features of each variant, of its first seed."""
    figures = []
    for variant in variants:
        for folder in list(folders.get(variant.name, {}).values())[:1]:
            paths = buckets.matching(buckets.path(folder, "pictures"), PICTURE)
            if not paths:
                continue
            with Image.open(io.BytesIO(paths[-1].read_bytes())) as file:
                pixels = np.asarray(file.convert("RGB"))
            alt = f"patch features of {variant.name}"
            caption = f"{variant.name}: {variant.description}"
            shown = html.image(pixels, alt, MAX_PICTURE_SIDE)
            figures.append(html.tag("figure", shown, html.tag("figcaption", caption)))
    if not figures:
        return html.Html("")
    cards = [html.tag("div", figure, class_="card whole") for figure in figures]
    grid = elements.container(cards, class_="cards", style="--card-width:30rem")
    return html.join(elements.heading("Patch features at the end of training"), grid)


def _mean_curve(metric: str, folders: SeedFolders) -> tuple[list[int], list[float]] | None:
    """The steps that all seeds have logged, and the means there; None if a seed has no values."""
    seeds = []
    for folder in folders.values():
        values = {line["step"]: line[metric] for line in read_metrics(folder) if metric in line}
        seeds.append(values)
    if not seeds or not all(seeds):
        return None
    steps = set(seeds[0])
    for values in seeds[1:]:
        steps &= set(values)
    common = sorted(steps)
    means = [statistics.mean(values[step] for values in seeds) for step in common]
    return common, means


def compare(
    group: Group,
    descriptions: Mapping[str, str],
    folders: Mapping[str, SeedFolders],
    costs: Mapping[str, Values],
    with_baselines: bool = False,
) -> Compared:
    """Collect the metrics of a group; see `publish` for the arguments."""
    variants = []
    for name in group.names:
        values = {**collect_values(folders[name]), **costs.get(name, {})}
        variants.append(Variant(name, descriptions[name], values))
    sentences = [f"{text}." for text in conclusions(variants, group.reference)]
    rows = list(variants)
    if with_baselines:
        compared = baselines(group.names, folders)
        sentences += [f"{text}." for text in gains(variants, compared)]
        rows += compared
    return Compared(rows, sentences)


def publish(
    out: buckets.Pathname,
    title: str,
    command: str,
    groups: Sequence[Group],
    descriptions: Mapping[str, str],
    folders: Mapping[str, SeedFolders],
    costs: Mapping[str, Values],
    with_baselines: bool = False,
) -> None:
    """Write table.md, results.json, index.html and a picture of curves for each group.

    Args:
      out: the folder to write to.
      title: of the page.
      command: that makes this study, for the page.
      groups: the tables.
      descriptions: {variant: what it is}.
      folders: {variant: {seed: folder}} of finished runs.
      costs: {variant: {metric: [value]}} of training, as far as they were measured.
      with_baselines: whether tables also have the rows of `baselines`.
    """
    out = buckets.path(out)
    out.mkdir(parents=True, exist_ok=True)
    markdown = []
    sections = []
    results = {}
    for group in groups:
        rows, sentences = compare(group, descriptions, folders, costs, with_baselines)
        markdown.append(_group_markdown(group, rows, sentences))
        sections.append(_group_section(group, rows, sentences, folders, out))
        results[group.title] = _group_results(rows, folders)
    atomic_io.write(out / "table.md", "\n\n".join(markdown + [NOTE]) + "\n")
    text = json.dumps({"command": command, "groups": results}, indent=2)
    atomic_io.write(out / "results.json", text + "\n")
    header = html.join(
        html.tag("h1", title),
        html.tag("p", elements.code(command)),
        html.tag("p", NOTE, class_="soft"),
    )
    atomic_io.write(out / "index.html", html.document(title, header, sections))


def _group_markdown(group: Group, variants: Sequence[Variant], sentences: Sequence[str]) -> str:
    """A group as Markdown: heading, table, conclusions."""
    conclusion = "\n".join(f"- {sentence}" for sentence in sentences)
    return "\n\n".join([f"## {group.title}", markdown_table(variants), conclusion])


def _group_section(
    group: Group,
    variants: Sequence[Variant],
    sentences: Sequence[str],
    folders: Mapping[str, SeedFolders],
    out: buckets.Path,
) -> Section:
    """A group as a section of the page; its curves are also written as a PNG file."""
    name = group.title.replace(" ", "_")
    content = [html_table(variants), elements.bullet_list(sentences)]
    panels = curve_panels(group.names, folders)
    if panels:
        picture = plotting.plot_curves(panels, "Mean over seeds", shared_legend=True)
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "png", optimize=True)
        atomic_io.write(out / f"{name}.png", file.getvalue())
        content.append(_curves_html(panels))
    content.append(_pictures_html(variants, folders))
    return Section(name, group.title, elements.concatenate(content))


def _group_results(
    variants: Sequence[Variant], folders: Mapping[str, SeedFolders]
) -> dict[str, dict[str, Any]]:
    """A group as plain values for results.json."""
    results = {}
    for variant in variants:
        results[variant.name] = {
            "what": variant.description,
            "seeds": sorted(folders.get(variant.name, {})),
            **variant.values,
        }
    return results
