"""Sections of the report made from the files of a run: header, curves, evaluations, provenance.

A file that is missing leaves its part out; a damaged file is listed by name instead of its content.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

from lmim_jax.report import config_diff, elements
from lmim_jax.train import provenance as environment
from lmim_jax.train import summary
from lmim_jax.train.collapse_metrics import COLLAPSED
from lmim_jax.train.runs import Run
from lmim_jax.utils import html, plotting
from lmim_jax.utils.html import Html, Section
from lmim_jax.utils.logging import duration

MetricLog = list[dict[str, Any]]  # lines of metrics.jsonl, each with "step" and some metrics

ENVIRONMENT_FACTS = ("devices", "processes", "system", "versions")


@dataclasses.dataclass(frozen=True)
class Tile:
    """One of the large numbers at the top of the page: title, value, and an explanation."""

    title: str
    value: str
    note: str


def read_metric_log(folder: str | pathlib.Path) -> MetricLog:
    """The lines of metrics.jsonl, except for an incomplete last one; [] without such a file."""
    path = pathlib.Path(folder, "metrics.jsonl")
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
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
    tiles = _accuracy_tiles(log) + _training_tiles(log, width=run.config.method.width)
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
    last = _last_values(log)
    if "wall_seconds" in last:
        text += f" in {duration(last['wall_seconds'])}"
    return text


def _accuracy_tiles(log: MetricLog) -> list[Tile]:
    """A tile for each accuracy of logistic regression, then for each k-NN accuracy in the log."""
    last = _last_values(log)
    untrained = _untrained_values(log)
    linear_tiles: list[Tile] = []
    knn_tiles: list[Tile] = []
    for name in sorted(last):
        metric = name.partition("/")[2]
        if metric == "accuracy":
            tiles = linear_tiles
            title = "linear"
            note = "test accuracy by logistic regression on frozen features"
        elif re.fullmatch(r"knn\d+", metric):
            tiles = knn_tiles
            k = metric.removeprefix("knn")
            title = f"k-NN {k}"
            note = f"test accuracy by majority vote of the {k} nearest training images"
        else:
            continue
        if name in untrained:
            note += f"; untrained encoder: {format_number(untrained[name])} %"
        tiles.append(Tile(title, f"{format_number(last[name])} %", note))
    return linear_tiles + knn_tiles


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
        speed = f"{round(last['images_per_second']):,}"
        tiles.append(Tile("speed", speed, "images per second at the end of training"))
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


def evaluations_section(folder: str | pathlib.Path, log: MetricLog) -> Section | None:
    """Metrics of evaluators, from metrics.jsonl and evaluations/*.json; None if there are none."""
    content = _evaluations_during_training(log)
    for path in sorted(pathlib.Path(folder, "evaluations").glob("*.json")):
        content += _evaluation_file(path)
    if not content:
        return None
    look = (
        "Evaluation of the frozen features; accuracies are in percent. "
        "docs/evaluation.md explains each metric."
    )
    combined = elements.concatenate(content)
    return html.explained_section("evaluations", "Evaluations", look, "", combined)


def _evaluations_during_training(log: MetricLog) -> list[Html]:
    """A table of the evaluations that ran during training, or [] if there were none."""
    last = _last_values(log)
    untrained = _untrained_values(log)
    rows = []
    for name, value in last.items():
        if "/" in name:
            rows.append([name, format_number(untrained.get(name, "")), format_number(value)])
    if not rows:
        return []
    return [html.table(["during training", "untrained", "last"], rows, numbers=(1, 2))]


def _evaluation_file(path: pathlib.Path) -> list[Html]:
    """The metrics in a file that `lmim evaluate` wrote, or a note that they cannot be read."""
    content = _parse_json(path.read_text(errors="replace"))
    metrics = None
    if isinstance(content, dict):
        metrics = content.get("figures")
    if not isinstance(metrics, dict):
        return [elements.paragraph([elements.code(path.name), " contains no readable metrics."])]
    return [elements.heading(path.stem), _metrics_table(metrics)]


def _metrics_table(metrics: dict[str, Any]) -> Html:
    """A table of {metric: number}, or of {metric: {column: number}}."""
    nested = {name: values for name, values in metrics.items() if isinstance(values, dict)}
    if not nested:
        flat = [[name, format_number(value)] for name, value in metrics.items()]
        return html.table(["metric", "value"], flat, numbers=(1,))
    columns: list[str] = []
    for values in nested.values():
        columns += [name for name in values if name not in columns]
    rows = []
    for name, values in nested.items():
        cells = [format_number(values.get(column, "")) for column in columns]
        rows.append([name] + cells)
    for name, value in metrics.items():
        if name not in nested:
            rows.append([name, format_number(value)])
    return html.table(["metric"] + columns, rows, numbers=range(1, 1 + len(columns)))


def provenance_section(run: Run) -> Section:
    """Configuration, environment and commands of a run."""
    config = json.loads((run.folder / "config.json").read_text())
    match = config_diff.nearest_recipe(config)
    starts = environment.read_starts(run.folder)
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
    folder: pathlib.Path,
    starts: list[dict[str, Any]],
    match: config_diff.RecipeMatch | None,
) -> list[str]:
    """Shell commands that concern the run, each with a comment."""
    commands = []
    if match:
        commands.append(f"{match.command} --workdir=NEW_RUN   # reproduce the training")
    if starts and "command" in starts[0]:
        commands.append(f"{starts[0]['command']}   # the original command")
    commands.append(f"lmim checkpoints --workdir={folder} --verify   # check the weights")
    commands.append(f"lmim report --workdir={folder}   # this page")
    return commands
