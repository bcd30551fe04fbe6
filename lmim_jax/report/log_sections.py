"""Sections of a run's page made of its files: figures, curves, evaluations, config, environment, commands.

A file that is missing, damaged or of another form leaves its part out, and is named where it was there.
"""

import json
import pathlib

from lmim_jax.report import config_diff
from lmim_jax.train import provenance as environment
from lmim_jax.train import summary
from lmim_jax.train.collapse_metrics import COLLAPSED
from lmim_jax.utils import html, plotting
from lmim_jax.utils.logging import duration


def lines(folder):
    """Lines of metrics.jsonl, without those that a kill has cut off; [] where there are none."""
    path = pathlib.Path(folder, "metrics.jsonl")
    found = [_parsed(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in found if isinstance(line, dict) and "step" in line]


def _parsed(text):
    try:
        return json.loads(text)
    except ValueError:
        return None


def _last(told):
    """The last value of every metric."""
    values = {}
    for line in told:
        values |= line
    return values


def number(value):
    """A figure as text: 3 or 4 digits that count, no exponents where they can be helped."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:,.1f}"
        if abs(value) >= 10
        else f"{value:.3g}"
    )


def head(run, told):
    """Title, one line on what this is, and tiles of the figures that count."""
    last, config = _last(told), run.config
    method = config.method
    data = config.data.name or config.data.path if config.data.source != "shapes" else "shapes"
    size = f"{method.width} wide, {method.depth} deep, {method.grid[0]} x {method.grid[1]} patches of {method.patch_size}"
    images = len(run.data.sources["train"])
    what = f"{method.name}: a Vision Transformer, {size} pixels; {images:,} images of {data}; {run.step:,} steps"
    what += f" in {duration(last['wall_seconds'])}" if "wall_seconds" in last else ""
    tiles = []
    untrained = _last([line for line in told if line["step"] == 0])
    for name in sorted(name for name in last if name.split("/")[-1].startswith("knn")):
        k = name.split("/")[-1].removeprefix("knn")
        before = (
            f"; the untrained encoder: {number(untrained[name])} %" if name in untrained else ""
        )
        tiles.append(
            (
                f"k-NN {k}",
                f"{number(last[name])} %",
                f"of test images get their class from the {k} training images nearest to them{before}",
            )
        )
    if "collapse_index" in last:
        state = (
            "collapsed: all images look alike to it"
            if last["collapse_index"] > COLLAPSED
            else "not collapsed"
        )
        tiles.append(("collapse index", f"{last['collapse_index']:.2f}", f"{state}; 1 is total"))
    if "effective_rank" in last:
        tiles.append(
            (
                "effective rank",
                number(last["effective_rank"]),
                f"of {method.width} dimensions are in use",
            )
        )
    if "images_per_second" in last:
        tiles.append(
            (
                "speed",
                f"{round(last['images_per_second']):,}",
                "images per second, at the end of training",
            )
        )
    made = [
        html.tag(
            "div",
            html.tag("span", title),
            html.tag("b", value),
            html.tag("span", words),
            class_="tile",
        )
        for title, value, words in tiles
    ]
    name = run.folder.resolve().name
    return html.join(
        html.tag("h1", f"Run {name}"),
        html.tag("p", what, class_="soft"),
        html.tag("div", *made, class_="tiles"),
    )


def curves(told):
    """Every curve over steps, as SVG; None for a run without lines."""
    panels = summary.panels(told) if told else []
    if not panels:
        return None
    charts = [
        html.tag(
            "figure",
            html.tag("h3", panel[0]),
            html.tag(
                "div", html.Html(plotting.curve_svg(panel)), role="img", aria_label=f"curve: {panel[0]}"
            ),
        )
        for panel in panels
    ]
    look = (
        "Over the steps of training. A falling loss alone says little: look for a collapse index that stays well below "
        "1 and an effective rank that does not fall to a few."
    )
    collapsed = "the loss falls fast and far, the collapse index and the similarities rise to 1, the rank falls."
    return html.explained_section(
        "curves", "How training went", look, collapsed, html.tag("div", *charts, class_="charts")
    )


def evaluations(folder, told):
    """Figures of the evaluators, from metrics.jsonl, and of RUN/evaluations/*.json; None where there are none."""
    content, last = [], _last(told)
    before = _last([line for line in told if line["step"] == 0])
    names = [name for name in last if "/" in name]
    if names:
        rows = [[name, number(before.get(name, "")), number(last[name])] for name in names]
        content.append(html.table(["while training", "untrained", "last"], rows, numbers=(1, 2)))
    for path in sorted(pathlib.Path(folder, "evaluations").glob("*.json")):
        found = _parsed(path.read_text(errors="replace"))
        figures = found.get("figures") if isinstance(found, dict) else None
        if not isinstance(figures, dict):
            content.append(
                html.tag("p", html.tag("code", path.name), " holds no figures that can be read.")
            )
            continue
        content.append(html.tag("h3", path.stem))
        content.append(_figures(figures))
    if not content:
        return None
    look = "What frozen features are worth; accuracies in per cent. What each figure is: docs/features.md."
    return html.explained_section("evaluations", "Evaluations", look, "", *content)


def _listed(value):
    """A mapping as "name value, ..."; anything else as text."""
    return (
        ", ".join(f"{name} {x}" for name, x in value.items())
        if isinstance(value, dict)
        else str(value)
    )


def _figures(figures):
    """A table of {name: number}, or of {row: {name: number}}."""
    nested = {row: values for row, values in figures.items() if isinstance(values, dict)}
    if not nested:
        return html.table(
            ["figure", "value"],
            [[name, number(value)] for name, value in figures.items()],
            numbers=(1,),
        )
    columns = list(dict.fromkeys(name for values in nested.values() for name in values))
    rows = [
        [row, *(number(values.get(name, "")) for name in columns)] for row, values in nested.items()
    ]
    rows += [[name, number(value)] for name, value in figures.items() if name not in nested]
    return html.table(["figure", *columns], rows, numbers=range(1, 1 + len(columns)))


def provenance(run, path):
    """Config, environment and commands."""
    config = json.loads((run.folder / "config.json").read_text())
    name, differing, command = config_diff.nearest(config)
    content = [html.tag("h3", "Config")]
    if name and differing:
        rows = [
            [html.tag("code", key), json.dumps(old), json.dumps(new)]
            for key, (old, new) in differing.items()
        ]
        content += [html.tag("p", "The recipe ", html.tag("code", name), " but for:")]
        content += [html.table(["key", "recipe", "this run"], rows)]
    elif name:
        content += [html.tag("p", "Exactly the recipe ", html.tag("code", name), ".")]
    whole = html.tag("pre", json.dumps(config, indent=2))
    content += [html.tag("details", html.tag("summary", "the whole config.json"), whole)]
    content += [html.tag("h3", "Environment")]
    started = environment.starts(run.folder)
    if not started:
        content.append(
            html.tag(
                "p", f"The run has no {environment.NAME}: what it was trained on was not noted."
            )
        )
    rows, facts = [], ("devices", "processes", "system", "versions")
    for title, start in [
        *((f"start {i}", start) for i, start in enumerate(started, 1)),
        ("this page", environment.describe()),
    ]:
        told = [_listed(start.get(key, "")) for key in facts]
        if (
            not rows or told != rows[-1][2:] or title == "this page"
        ):  # not every restart on the same machine
            rows.append([title, start.get("time", ""), *told])
    content.append(html.table(["", "time", *facts], rows))
    content += [html.tag("h3", "Commands")]
    shell = [f"{command} --workdir=RUN   # train the same again"] if command else []
    shell += [
        f"{start['command']}   # as it was started" for start in started[:1] if "command" in start
    ]
    shell += [f"python -m lmim_jax.cli.checkpoints {path} --verify   # are the weights good?"]
    shell += [f"python -m lmim_jax.cli.report {path}   # this page"]
    content.append(html.tag("pre", "\n".join(shell)))
    look = "What made this run, and how to make it again: the same config and images give the same run."
    return html.explained_section("provenance", "Where it comes from", look, "", *content)
