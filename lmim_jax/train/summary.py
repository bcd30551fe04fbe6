"""The end of a run: one dict for programs, one table for people, one picture of curves."""

import json
import re
import statistics
from typing import Any

import numpy as np
from jaxtyping import UInt8

from lmim_jax.train.collapse_metrics import COLLAPSED
from lmim_jax.utils import buckets, commands, plotting

Line = dict[str, Any]  # of metrics.jsonl
Panel = tuple[str, dict[str, Any], dict[str, float]]  # see `plotting.plot_curves`

KNN = re.compile(r"knn\d+")
KNN_METRIC = re.compile(r"knn\d+|nn1|loo1")  # all accuracies of the k-NN
LOSS = re.compile(r".*_loss")
SIMILARITY = re.compile(r"similarity_.*")
METRICS = ("loss", "collapse_index", "effective_rank", "feature_std")
LINEAR = "linear"  # key of the accuracy of logistic regression in the summary
BASELINES = ("pixels", "histogram")  # features that need no encoder
MAJORITY = "majority"  # metric: percent of the most frequent class of the test images
ROWS = {
    MAJORITY: "most frequent class",
    "pixels": "raw pixels",
    "histogram": "color histogram",
    "untrained": "untrained encoder",
    "trained": "trained encoder",
}
NEXT_STEPS: dict[str, tuple[str, ...]] = {  # what one may want -> words of a command
    "your own images": ("train", "FOLDER"),
    "a collapse": (
        "train",
        "--config=quickstart",
        "--config.method.target=joint",
        "--config.method.loss=mse",
        "--workdir=runs/collapse",
    ),
    "an HTML report": ("report", "--workdir={run}"),
    "all evaluators": ("evaluate", "--workdir={run}", "--evaluators=all", "--baselines"),
    "use the features": ("features", "--workdir={run}", "FOLDER", "--out=features.npz"),
    "look at features": ("pca", "FOLDER", "--workdir={run}", "--out=pca.html"),
}


def read_summary(workdir: buckets.Pathname, total_steps: int) -> dict[str, Any] | None:
    """The summary of a run that has finished `total_steps` steps, or None."""
    path = buckets.path(workdir, "summary.json")
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    return summary if summary.get("steps") == total_steps else None


def is_finished(summary: dict[str, Any]) -> bool:
    """Whether a run had come to its end; one that its user stops has a summary, too."""
    steps = summary["steps"]
    return steps >= summary.get("total_steps", steps)  # earlier summaries: of finished runs


def summarize(lines: list[Line], *, steps: int, total_steps: int, seconds: float) -> dict[str, Any]:
    """Summarize a run.

    Args:
      lines: see `metric_writer.read_metrics`.
      steps: how many it has done.
      total_steps: how many it will have done in the end.
      seconds: its wall-clock time, over all restarts.

    Returns:
      {"steps", "total_steps", "images_per_second" (median over lines, if any), "wall_seconds"}; the
      last value of loss, collapse metrics and evaluations; and for logistic regression and every k
      of the k-NN, percentages {"linear" or "knn20": {"majority", "pixels", "histogram",
      "untrained", "trained"}}, as far as they were measured.
    """
    first: Line = {}  # at step 0
    last: Line = {}
    for line in lines:
        last |= line
        if line["step"] == 0:
            first |= line
    summary: dict[str, Any] = {"steps": steps, "total_steps": total_steps}
    if any("images_per_second" in line for line in lines):
        summary["images_per_second"] = median_speed(lines)
    summary["wall_seconds"] = seconds
    for name in METRICS:
        if name in last:
            summary[name] = last[name]
    summary |= _accuracies(first, last)
    for name, value in last.items():
        if "/" in name:
            summary[name] = value
    failed = _failed_evaluations(lines)
    if failed:
        summary["failed_evaluations"] = failed
    return summary


def _failed_evaluations(lines: list[Line]) -> list[dict[str, Any]]:
    """[{"step", "evaluator", "reason"}] of the evaluations that failed and were not made later."""
    failed = {}
    for line in lines:
        for title, reason in line.get("failed", {}).items():
            failed[line["step"], title] = reason
        for name in line:
            failed.pop((line["step"], name.partition("/")[0]), None)
    found = []
    for (step, title), reason in failed.items():
        found.append({"step": step, "evaluator": title, "reason": reason})
    return found


def median_speed(lines: list[Line]) -> float:
    """Images per second of training, the median over the lines that have a speed.

    Raises:
      StatisticsError: none has.
    """
    return statistics.median(
        line["images_per_second"] for line in lines if "images_per_second" in line
    )


def _accuracies(first: Line, last: Line) -> dict[str, dict[str, float]]:
    """{"linear", "knn20", ...: {row of ROWS: percent}}, of several evaluators of a kind the first.

    Args:
      first: the metrics at step 0.
      last: the last value of every metric.
    """
    found: dict[str, dict[str, float]] = {}
    for name in last:
        title, _, metric = name.partition("/")
        key = _accuracy_key(metric)
        if key is None or key in found:
            continue
        rows = {}
        if f"{title}/{MAJORITY}" in last:
            rows[MAJORITY] = last[f"{title}/{MAJORITY}"]
        for baseline in BASELINES:
            if f"{title}/{baseline}_{metric}" in last:
                rows[baseline] = last[f"{title}/{baseline}_{metric}"]
        if name in first:
            rows["untrained"] = first[name]
        rows["trained"] = last[name]
        found[key] = rows
    return _linear_first(found)


def _accuracy_key(metric: str) -> str | None:
    """The key in the summary of an evaluator's metric: "linear", "knn20", or None for others."""
    if metric == "accuracy":  # of logistic_regression
        return LINEAR
    return metric if KNN.fullmatch(metric) else None


def _linear_first(accuracies: dict[str, Any]) -> dict[str, Any]:
    if LINEAR not in accuracies:
        return accuracies
    return {LINEAR: accuracies[LINEAR], **accuracies}


def format_summary(summary: dict[str, Any], workdir: buckets.Pathname) -> str:
    """The summary for people: metrics, output files, next steps; several lines."""
    folder = buckets.path(workdir)
    files = {
        "pictures": "curves.png first; masking, and features",
        "summary.json": "these numbers",
        "metrics.jsonl": f"every logged line; also in {folder}/tensorboard",
        "checkpoints": "the weights",
    }
    lines = _accuracy_table(summary) + _collapse_lines(summary)
    for failure in summary.get("failed_evaluations", []):
        lines.append("  FAILED: {evaluator} at step {step}: {reason}".format(**failure))
    if "images_per_second" in summary:
        lines.append(f"  speed               {summary['images_per_second']:6.0f} images/s")
    lines += ["", f"In {folder}:", ""]
    for name, contents in files.items():
        lines.append(f"  {name:<18}  {contents}")
    lines += ["", "Next steps:", ""]
    for goal, words in NEXT_STEPS.items():
        command = commands.line(*[word.replace("{run}", str(folder)) for word in words])
        lines.append(f"  {goal:<18}  {command}")
    return "\n".join(lines) + "\n"


def _accuracy_table(summary: dict[str, Any]) -> list[str]:
    """A row for each of ROWS, a column for logistic regression and for each k of the k-NN."""
    accuracies = {key: rows for key, rows in summary.items() if isinstance(rows, dict)}
    accuracies = _linear_first(accuracies)
    if not accuracies:
        return [""]
    head = ""
    for key in accuracies:
        head += f"{key.replace('knn', 'k-NN '):>10}"
    lines = ["", "Accuracy on the test images, in percent:", "", f"  {'':<20}{head}"]
    for row, name in ROWS.items():
        cells = ""
        for values in accuracies.values():
            cells += f"{values[row]:10.1f}" if row in values else f"{'':>10}"
        if cells.strip():
            lines.append(f"  {name:<20}{cells}")
    lines.append("")
    if LINEAR in accuracies:
        lines.append("  linear: logistic regression on frozen features")
    if accuracies.keys() - {LINEAR}:
        lines.append("  k-NN:   vote of the nearest training images, by cosine similarity")
    lines.append("")
    return lines


def _collapse_lines(summary: dict[str, Any]) -> list[str]:
    if "collapse_index" not in summary:
        return []
    index = summary["collapse_index"]
    collapsed = index > COLLAPSED
    state = "collapsed: all images look alike" if collapsed else "not collapsed"
    rank = summary["effective_rank"]
    return [
        f"  collapse index      {index:6.2f}    ({state}; 1 is total)",
        f"  effective rank      {rank:6.1f}    (dimensions that the features use)",
    ]


def draw_curves(lines: list[Line], workdir: buckets.Pathname) -> UInt8[np.ndarray, "H W 3"]:
    """Draw curves.png from the lines of metrics.jsonl."""
    return plotting.plot_curves(curve_panels(lines), f"Run {workdir}")


def curve_panels(lines: list[Line]) -> list[Panel]:
    """The curves of a run as panels of `plotting.plot_curves`, accuracies first; none is empty."""
    series = _series(lines)
    panels = _accuracy_panels(series) + _training_panels(series) + _other_panels(series)
    return [panel for panel in panels if panel[1]]


def _series(lines: list[Line]) -> dict[str, tuple[list[int], list[float]]]:
    """{metric: (steps, values)}, sorted by name."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(line["step"])
            values.append(value)
    return dict(sorted(series.items()))


def _training_panels(series: dict[str, Any]) -> list[Panel]:
    """Loss and collapse metrics."""
    losses = ["loss", "reconstruction"] + list(filter(LOSS.fullmatch, series))
    similarities = list(filter(SIMILARITY.fullmatch, series))
    chance = {}
    if "patch_chance" in series:
        chance["chance"] = series["patch_chance"][1][-1]
    panels: list[tuple[str, list[str], dict[str, float]]] = [
        ("loss", losses, {}),
        ("learning rate", ["learning_rate"], {}),
        ("gradient norm", ["grad_norm"], {}),
        ("patch accuracy: a prediction picks its own target", ["patch_accuracy"], chance),
        ("similarity of patches within an image", similarities, {}),
        (
            "collapse index: similarity of different images",
            ["collapse_index"],
            {"collapsed above": COLLAPSED},
        ),
        ("effective rank: dimensions that features use", ["effective_rank"], {}),
        ("feature std: spread of different images", ["feature_std"], {}),
    ]
    return [(title, _select(series, names), constants) for title, names, constants in panels]


def _select(series: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: series[name] for name in names if name in series}


def _evaluations(series: dict[str, Any]) -> dict[str, list[str]]:
    """{title of an evaluator: names of its metrics}."""
    found: dict[str, list[str]] = {}
    for name in series:
        title, slash, _ = name.partition("/")
        if slash:
            found.setdefault(title, []).append(name)
    return found


def _has_accuracy(names: list[str]) -> bool:
    """Whether a "title/metric" is an accuracy of logistic regression or of the k-NN."""
    return any(_accuracy_key(name.partition("/")[2]) for name in names)


def _accuracy_panels(series: dict[str, Any]) -> list[Panel]:
    """A panel for each logistic regression, then one for each k-NN; baselines are dashed lines."""
    linear: list[Panel] = []
    neighbors: list[Panel] = []
    for title, names in _evaluations(series).items():
        if not _has_accuracy(names):
            continue
        curves = {}
        for name in names:
            metric = name.partition("/")[2]
            if KNN_METRIC.fullmatch(metric) or metric == "accuracy":
                curves[name] = series[name]
        baselines = _baseline_lines(title, series)
        if f"{title}/accuracy" in names:
            linear.append((f"{title}: linear accuracy, %", curves, baselines))
        else:
            neighbors.append((f"{title}: accuracy of nearest neighbors, %", curves, baselines))
    return linear + neighbors


def _baseline_lines(title: str, series: dict[str, Any]) -> dict[str, float]:
    """{what a baseline is: its accuracy} of an evaluator; of several k, the smallest."""
    lines = {}
    if f"{title}/{MAJORITY}" in series:
        lines[ROWS[MAJORITY]] = series[f"{title}/{MAJORITY}"][1][-1]
    for baseline in BASELINES:
        start = f"{title}/{baseline}_"
        metrics = [name.removeprefix(start) for name in series if name.startswith(start)]
        measured = [metric for metric in metrics if _accuracy_key(metric)]
        if measured:
            metric = min(measured, key=_number_in)
            lines[ROWS[baseline] + _knn_suffix(metric)] = series[start + metric][1][-1]
    return lines


def _number_in(metric: str) -> int:
    """20 of "knn20"; 0 of a metric without a number."""
    return int(re.sub(r"\D", "", metric) or 0)


def _knn_suffix(metric: str) -> str:
    """ ", k-NN 20" of "knn20"; "" of other metrics."""
    if KNN.fullmatch(metric):
        return metric.replace("knn", ", k-NN ")
    return ""


def _other_panels(series: dict[str, Any]) -> list[Panel]:
    """A panel for each other evaluator."""
    panels: list[Panel] = []
    for title, names in _evaluations(series).items():
        if not _has_accuracy(names):
            panels.append((title, _select(series, names), {}))
    return panels
