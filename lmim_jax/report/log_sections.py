"""Sections of the report made from the files of a run: header, curves, evaluations, provenance.

A file that is missing leaves its part out; a damaged file is listed by name instead of its content.
"""

import dataclasses
import itertools
import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lmim_jax.report import config_diff, elements, eval_table
from lmim_jax.train import provenance as environment
from lmim_jax.train import summary
from lmim_jax.train.collapse_metrics import COLLAPSED
from lmim_jax.train.runs import Run
from lmim_jax.train.summary import BASELINES, ROWS
from lmim_jax.utils import buckets, commands, html, plotting
from lmim_jax.utils.html import Html, Section
from lmim_jax.utils.logging import duration

log = logging.getLogger(__name__)

# The main accuracy of an evaluator is the first of these that it has: (regular expression for the
# name of the metric, title of the tile; "": that of the evaluator)
ACCURACIES = (
    (r"accuracy", "linear"),
    (r"top1", ""),
    (r"knn(\d+)", r"k-NN \1"),
    (r"nn1", "1-NN"),
    (r"loo1", "1-NN"),
    (r"shots\d+|labels\d+pct", ""),
)

# Of the files of `lmim evaluate`, which names options that are not the default ones by a checksum
EVALUATION_NAME = re.compile(r"(?P<step>\d+)-.*?(?P<options>-[0-9a-f]{8})?\.json")

Metrics = Mapping[str, Mapping[str, Any]]  # {"title/name": {column: value}}, see `eval_table`
MetricLog = list[dict[str, Any]]  # lines of metrics.jsonl, each with "step" and some metrics

ENVIRONMENT_FACTS = ("devices", "processes", "system", "versions")


@dataclasses.dataclass(frozen=True)
class Tile:
    """One of the large numbers at the top of the page: title, value, and an explanation."""

    title: str
    value: str
    note: str


def read_metric_log(folder: buckets.Pathname) -> MetricLog:
    """The lines of metrics.jsonl, except for an incomplete last one; [] without such a file."""
    path = buckets.path(folder, "metrics.jsonl")
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        line = _parse_json(text)
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def _parse_json(text: str) -> Any:
    """The value that JSON text stands for; None if it is not valid JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _last_values(log: MetricLog) -> dict[str, Any]:
    """The last value of every metric."""
    values: dict[str, Any] = {}
    for line in log:
        values.update(line)
    return values


def _untrained_values(log: MetricLog) -> dict[str, Any]:
    """The value of every metric before the first training step."""
    return _last_values([line for line in log if line["step"] == 0])


def format_number(value: object) -> str:
    """A metric as text, with 3 or 4 significant digits, and without an exponent where possible."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 10:
        return f"{value:,.1f}"
    return f"{value:.3g}"


def page_header(run: Run, log: MetricLog) -> Html:
    """Title, a line that describes the run, and tiles with its main metrics."""
    log = [line for line in log if line["step"] <= run.step]  # a run may have gone on since
    tiles = _accuracy_tiles(_evaluations_by_relevance(run, log))
    tiles += _training_tiles(log, width=run.config.method.width)
    name = run.folder.resolve().name
    parts = [
        html.tag("h1", f"Run {name}"),
        html.tag("p", _describe_run(run, log), class_="soft"),
        elements.container([_tile_html(tile) for tile in tiles], class_="tiles"),
    ]
    return elements.concatenate(parts)


def _describe_run(run: Run, log: MetricLog) -> str:
    """Method, model size, dataset and number of steps in one line."""
    config = run.config
    method = config.method
    dataset = config.data.name or config.data.path
    if config.data.source == "shapes":
        dataset = "shapes"
    rows, columns = method.grid
    number_of_images = len(run.data.sources["train"])
    parts = [
        f"{method.name}: Vision Transformer of width {method.width} and depth {method.depth}, "
        f"{rows} x {columns} patches of {method.patch_size} pixels",
        f"{number_of_images:,} images of {dataset}",
        f"{run.step:,} steps",
    ]
    text = "; ".join(parts)
    # The last line of training comes before the evaluations of its step
    known = summary.read_summary(run.folder, run.step) or _last_values(log)
    if "wall_seconds" in known:
        text += f" in {duration(known['wall_seconds'])}, evaluations included"
    return text


def _evaluations_by_relevance(run: Run, log: MetricLog) -> list[tuple[str, Metrics]]:
    """(what a tile says of its origin, metrics) of every evaluation, the most relevant first.

    There is nothing to say of those in the log, and of those of this step with default options.
    """
    found = [("", _logged_metrics(log))]
    evaluations = _read_evaluations(run.folder)
    for name in sorted(evaluations, key=_relevance):
        metrics = evaluations[name]
        if metrics is None:
            continue
        origin = f"from {name}"
        if _relevance(name) == (False, -run.step):
            origin = ""
        found.append((origin, metrics))
    return found


def _relevance(name: str) -> tuple[bool, int]:
    """Sorts files of evaluations: the default options before others, the latest step first."""
    match = EVALUATION_NAME.fullmatch(name)
    if match is None:
        return True, 0
    return match["options"] is not None, -int(match["step"])


def _accuracy_tiles(evaluations: Iterable[tuple[str, Metrics]]) -> list[Tile]:
    """A tile for the main accuracy of each evaluator, linear ones first.

    Args:
      evaluations: see `_evaluations_by_relevance`; the first that has an accuracy counts.
    """
    found: dict[tuple[int, str], Tile] = {}
    for origin, metrics in evaluations:
        for title in dict.fromkeys(name.partition("/")[0] for name in metrics):
            own = {name: values for name, values in metrics.items() if name.startswith(f"{title}/")}
            tile = _main_tile(title, own, origin)
            if tile is not None and tile[0] not in found:
                found[tile[0]] = tile[1]
    return [found[place] for place in sorted(found)]


def _main_tile(title: str, metrics: Metrics, origin: str) -> tuple[tuple[int, str], Tile] | None:
    """The tile of an evaluator's main accuracy, and its place; None without a trained accuracy."""
    for rank, (pattern, name) in enumerate(ACCURACIES):
        for metric in sorted(metrics, key=_number_at_end):
            match = re.fullmatch(pattern, metric.partition("/")[2])
            value = metrics[metric].get("trained")
            if match is None or not isinstance(value, int | float):
                continue
            notes = [eval_table.describe(metric)]
            for column, what in ROWS.items():
                if column != "trained" and column in metrics[metric]:
                    notes.append(f"{what}: {format_number(metrics[metric][column])} %")
            if origin:
                notes.append(origin)
            name = match.expand(name) or title.replace("_", " ")
            return (rank, title), Tile(name, f"{format_number(value)} %", "; ".join(notes))
    return None


def _number_at_end(name: str) -> int:
    """20 of "knn/knn20"; 0 without a number."""
    digits = re.search(r"\d*$", name)
    assert digits is not None
    return int(digits.group() or 0)


def _training_tiles(log: MetricLog, width: int) -> list[Tile]:
    """Tiles for the collapse metrics and the training speed, as far as they were logged."""
    last = _last_values(log)
    tiles = []
    if "collapse_index" in last:
        index = last["collapse_index"]
        state = "not collapsed"
        if index > COLLAPSED:
            state = "collapsed: all images have similar features"
        tiles.append(Tile("collapse index", f"{index:.2f}", f"{state}; 1 is complete collapse"))
    if "effective_rank" in last:
        rank = format_number(last["effective_rank"])
        tiles.append(Tile("effective rank", rank, f"of {width} feature dimensions"))
    if "images_per_second" in last:
        speed = f"{round(summary.median_speed(log)):,}"
        tiles.append(Tile("speed", speed, "images per second of training, evaluations aside"))
    return tiles


def _tile_html(tile: Tile) -> Html:
    title = html.tag("span", tile.title)
    value = html.tag("b", tile.value)
    note = html.tag("span", tile.note)
    return html.tag("div", title, value, note, class_="tile")


def curves_section(log: MetricLog) -> Section | None:
    """Every metric over the training steps, as SVG; None for a run without a log."""
    if not log:
        return None
    panels = summary.curve_panels(log)
    if not panels:
        return None
    charts = []
    for panel in panels:
        title = panel[0]
        drawing = html.Html(plotting.curve_svg(panel))
        chart = html.tag("div", drawing, role="img", aria_label=f"curve: {title}")
        charts.append(html.tag("figure", elements.heading(title), chart))
    look = (
        "Metrics over training steps. A falling loss alone says little: look for a collapse index "
        "that stays well below 1 and an effective rank that does not drop to a few dimensions."
    )
    collapsed = (
        "the loss falls fast and far, the collapse index and the similarities rise to 1, "
        "and the effective rank falls."
    )
    content = elements.container(charts, class_="charts")
    return html.explained_section("curves", "Training curves", look, collapsed, content)


def evaluations_section(folder: buckets.Pathname, log: MetricLog) -> Section | None:
    """Metrics of evaluators, from metrics.jsonl and evaluations/*.json; None if there are none."""
    content = []
    logged = _logged_metrics(log)
    if logged:
        content += [elements.heading("during training"), _metrics_table(logged)]
    for name, metrics in _read_evaluations(folder).items():
        if metrics is None:
            note = [elements.code(name), " contains no readable metrics."]
            content.append(elements.paragraph(note))
        else:
            content += [elements.heading(name.removesuffix(".json")), _metrics_table(metrics)]
    if not content:
        return None
    look = (
        "Evaluation of the frozen features; accuracies are in percent. "
        "docs/evaluation.md explains each metric."
    )
    combined = elements.concatenate(content)
    return html.explained_section("evaluations", "Evaluations", look, "", combined)


def _logged_metrics(log: MetricLog) -> Metrics:
    """The evaluations that ran during training, as `lmim evaluate` would write them."""
    last = _last_values(log)
    untrained = _untrained_values(log)
    metrics: dict[str, dict[str, Any]] = {}
    for name, value in last.items():
        title, slash, metric = name.partition("/")
        if not slash:
            continue
        baseline, _, of = metric.partition("_")
        if baseline in BASELINES and f"{title}/{of}" in last:
            metrics.setdefault(f"{title}/{of}", {})[baseline] = value
            continue
        values = metrics.setdefault(name, {})
        if name in untrained:
            values["untrained"] = untrained[name]
        values["trained"] = value
    return metrics


def _read_evaluations(folder: buckets.Pathname) -> dict[str, Metrics | None]:
    """{name of a file that `lmim evaluate` wrote: its metrics, or None if it is unreadable}."""
    evaluations: dict[str, Metrics | None] = {}
    for path in buckets.matching(buckets.path(folder, "evaluations"), "*.json"):
        content = _parse_json(path.read_text(errors="replace"))
        figures = None
        if isinstance(content, dict) and isinstance(content.get("figures"), dict):
            figures = {}
            for name, values in content["figures"].items():
                # Before version 0.2, a number instead of {column: number}
                figures[name] = values if isinstance(values, dict) else {"trained": values}
        evaluations[path.name] = figures
    return evaluations


def _metrics_table(metrics: Metrics) -> Html:
    """A table of metrics, with a row for each, what it is, and a column for each encoder."""
    columns: list[str] = []
    for column in [*ROWS, *itertools.chain(*metrics.values())]:
        if column not in columns and any(column in values for values in metrics.values()):
            columns.append(column)
    rows = []
    for name in eval_table.without_spreads(metrics):
        spreads = metrics.get(name + eval_table.STD_SUFFIX, {})
        cells = []
        for column in columns:
            cell = format_number(metrics[name].get(column, ""))
            if column in spreads:
                cell += f" ± {format_number(spreads[column])}"
            cells.append(cell)
        rows.append([name, eval_table.describe(name), *cells])
    head = ["metric", "what it is"] + [ROWS.get(column, column) for column in columns]
    return html.table(head, rows, numbers=range(2, len(head)))


def provenance_section(run: Run) -> Section:
    """Configuration, environment and commands of a run."""
    config = json.loads((run.folder / "config.json").read_text())
    match = config_diff.nearest_recipe(config)
    try:
        starts = environment.read_starts(run.folder)
    except OSError as error:
        log.warning("%s cannot be read: %s", environment.NAME, error)
        starts = []
    content = [
        elements.heading("Config"),
        _config_html(config, match),
        elements.heading("Environment"),
        _environment_html(starts),
        elements.heading("Commands"),
        elements.code_block("\n".join(_commands(run.folder, starts, match))),
    ]
    look = (
        "How this run was made and how to reproduce it: "
        "the same configuration and images give the same run."
    )
    combined = elements.concatenate(content)
    return html.explained_section("provenance", "Provenance", look, "", combined)


def _config_html(config: dict[str, Any], match: config_diff.RecipeMatch | None) -> Html:
    """The nearest recipe, the keys that differ from it, and the complete configuration."""
    content = []
    if match and match.differences:
        parts = ["The recipe ", elements.code(match.name), " with these changes:"]
        content.append(elements.paragraph(parts))
        rows = []
        for key, (recipe_value, run_value) in match.differences.items():
            rows.append([elements.code(key), json.dumps(recipe_value), json.dumps(run_value)])
        content.append(html.table(["key", "recipe", "this run"], rows))
    elif match:
        parts = ["The recipe ", elements.code(match.name), " without changes."]
        content.append(elements.paragraph(parts))
    complete = elements.code_block(json.dumps(config, indent=2))
    content.append(elements.collapsible("complete config.json", complete))
    return elements.concatenate(content)


def _environment_html(starts: list[dict[str, Any]]) -> Html:
    """A table of the machines on which the run was started, and of the one that made this page."""
    rows: list[list[str]] = []
    for number, start in enumerate(starts, 1):
        facts = _environment_facts(start)
        if not rows or facts != rows[-1][2:]:  # a restart on the same machine adds no row
            rows.append([f"start {number}", start.get("time", "")] + facts)
    here = environment.describe()
    rows.append(["this page", here["time"]] + _environment_facts(here))
    content = []
    if not starts:
        note = f"The run has no {environment.NAME}: the hardware it was trained on is not known."
        content.append(html.tag("p", note))
    content.append(html.table(["", "time"] + list(ENVIRONMENT_FACTS), rows))
    return elements.concatenate(content)


def _environment_facts(start: dict[str, Any]) -> list[str]:
    return [_format_fact(start.get(key, "")) for key in ENVIRONMENT_FACTS]


def _format_fact(value: object) -> str:
    """A mapping as "name value, ..."; anything else as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return str(value)


def _commands(
    folder: buckets.Path,
    starts: list[dict[str, Any]],
    match: config_diff.RecipeMatch | None,
) -> list[str]:
    """Shell commands that concern the run, each with a comment; they run in any folder."""
    first = starts[0] if starts else {}
    found = {}
    if match:
        again = f"--workdir={folder.absolute()}_again"
        found["reproduce the training"] = commands.line("train", *match.flags, again)
        for number, flags in enumerate(match.extensions, 1):
            found[f"then its extension {number}"] = commands.line("extend", *flags, again)
    if "command" in first:
        found["the original command"] = first["command"]
    if "folder" in first:  # paths of the images can be relative to it
        for name, command in found.items():
            found[name] = commands.in_folder(first["folder"], command)
    run = f"--workdir={folder.absolute()}"
    found["check the weights"] = commands.line("checkpoints", run, "--verify")
    found["this page"] = commands.line("report", run)
    return [f"{command}   # {name}" for name, command in found.items()]
