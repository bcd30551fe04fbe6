"""The end of a run: one dict for programs, one table for people, one picture of curves."""

import json
import pathlib
import statistics

from lmim_jax.train.collapse_metrics import COLLAPSED
from lmim_jax.utils import plotting

GAUGES = ("loss", "collapse_index", "effective_rank", "feature_std")
ROWS = {
    "pixels": "raw pixels",
    "histogram": "colour histogram",
    "untrained": "untrained encoder",
    "trained": "trained encoder",
}
NEXT = (
    ("your own images", "./launch/local.sh --config=configs/vit_s.py --config.data.path=FOLDER"),
    (
        "make it collapse",
        "./launch/local.sh --config.method.target=joint --config.method.loss=mse --workdir=runs/collapse",
    ),
    ("a page of this run", "lmim report {run}"),
    (
        "what it is worth",
        "lmim evaluate --workdir={run} --evaluators=all --baselines",
    ),
    ("use the features", "docs/features.md"),
)


def finished(workdir, total_steps):
    """The summary of a finished run, or None."""
    path = pathlib.Path(workdir, "summary.json")
    summary = json.loads(path.read_text()) if path.exists() else {}
    return summary if summary.get("steps") == total_steps else None


def summarize(lines, *, total_steps, seconds):
    """What a run came to.

    Args:
      lines: see `history`. total_steps: its length. seconds: its wall-clock time, over all restarts.

    Returns:
      {"steps", "images_per_second" (median over lines), "wall_seconds", the last value of every gauge and evaluation},
      and for every evaluated k-NN figure, percentages
      {"knn20": {"pixels", "histogram", "untrained", "trained"}}, as far as they were measured.
    """
    untrained, last = {}, {}
    for line in lines:
        last |= line
        if line["step"] == 0:
            untrained |= line
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    summary = {
        "steps": total_steps,
        "images_per_second": statistics.median(speeds),
        "wall_seconds": seconds,
    }
    summary |= {name: last[name] for name in GAUGES if name in last}
    evaluated = {name: value for name, value in last.items() if "/" in name}
    for name in evaluated:
        title, figure = name.split("/", 1)
        if (
            figure.startswith("knn") and figure not in summary
        ):  # of several k-NN evaluators, the first
            rows = {row: last.get(f"{title}/{row}_{figure}") for row in ("pixels", "histogram")}
            rows |= {"untrained": untrained.get(name), "trained": last[name]}
            summary[figure] = {row: value for row, value in rows.items() if value is not None}
    return {**summary, **evaluated}


def table(summary, workdir):
    """The summary for people: figures, where everything lies, what to do next; a text of several lines."""
    lines = []
    for figure, rows in summary.items():
        if isinstance(rows, dict):
            k = figure.removeprefix("knn")
            lines += [
                "",
                f"Accuracy of the {k} nearest neighbours by cosine similarity (k-NN {k}), test images:",
                "",
            ]
            lines += [f"  {ROWS[row]:<20}{value:6.1f} %" for row, value in rows.items()]
    lines += [""]
    if "collapse_index" in summary:
        state = (
            "collapsed: all images look alike"
            if summary["collapse_index"] > COLLAPSED
            else "not collapsed"
        )
        lines += [
            f"  collapse index      {summary['collapse_index']:6.2f}    ({state}; 1 is total)"
        ]
        lines += [
            f"  effective rank      {summary['effective_rank']:6.1f}    (dimensions that the features use)"
        ]
    lines += [f"  speed               {summary['images_per_second']:6.0f} images/s", ""]
    folder = pathlib.Path(workdir)
    kept = (
        ("pictures", "curves.png first; what the model is given, and what its features see"),
        ("summary.json", "these figures"),
        ("metrics.jsonl", f"every logged line; also in {folder}/tensorboard"),
        ("checkpoints", "the weights"),
    )
    lines += [f"In {folder}:", ""] + [f"  {name:<18}  {what}" for name, what in kept]
    lines += ["", "What next:", ""]
    lines += [f"  {what:<18}  {command.format(run=folder)}" for what, command in NEXT] + [""]
    return "\n".join(lines)


def curves(lines, workdir):
    """Draw workdir/pictures/curves.png from the lines of `history`; the picture."""
    return plotting.plot_curves(panels(lines), f"Run {workdir}")


def panels(lines):
    """The curves of a run as panels of `pictures.curves`, from the lines of `history`; those that are not empty."""
    names = {name for line in lines for name in line}
    series = {
        name: tuple(zip(*[(x["step"], x[name]) for x in lines if name in x], strict=True))
        for name in names
    }
    of = lambda *wanted: {name: series[name] for name in wanted if name in names}
    constant = lambda label, name: {label: series[name][1][-1]} if name in names else {}
    found = [
        (
            "loss",
            of("loss", "reconstruction", *sorted(name for name in names if name.endswith("_loss"))),
            {},
        ),
        (
            "patch accuracy: a prediction picks its own target",
            of("patch_accuracy"),
            constant("chance", "patch_chance"),
        ),
        (
            "similarity of patches within an image",
            of(*sorted(x for x in names if x.startswith("similarity_"))),
            {},
        ),
        (
            "collapse index: similarity of different images",
            of("collapse_index"),
            {"collapsed above": COLLAPSED},
        ),
        ("effective rank: dimensions that features use", of("effective_rank"), {}),
        ("feature std: spread of different images", of("feature_std"), {}),
    ]
    for title in sorted({name.split("/")[0] for name in names if "/" in name}):
        figures = sorted(name for name in names if name.startswith(f"{title}/"))
        if not any("/knn" in name for name in figures):
            found.append((title, of(*figures), {}))
            continue
        fixed = [name for name in figures if "_knn" in name]
        constants = {k: v for name in fixed for k, v in constant(name.split("/")[1], name).items()}
        accuracy = of(*(name for name in figures if "_" not in name))
        found.append((f"{title}: accuracy of nearest neighbours, %", accuracy, constants))
    return [panel for panel in found if panel[1]]
