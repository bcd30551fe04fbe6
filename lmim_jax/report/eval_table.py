"""Figures of evaluators as a table for people."""

import re

from lmim_jax.train.summary import ROWS

WORDS = (  # (regex on a figure's name, what it is)
    (r"nn1", "class of the nearest training image"),
    (r"knn(\d+)", r"vote of the \1 nearest training images"),
    (r"loo1", "class of the nearest other test image"),
    (r"accuracy", "accuracy on the test images"),
    (r"held_out", "on held-out training images"),
    (r"l2", "strength of l2 chosen by these"),
    (r"shots1", "1 labelled image of each class"),
    (r"shots(\d+)", r"\1 labelled images of each class"),
    (r"labels(\d+)pct", r"\1 % of the labels"),
    (r"top1", "accuracy on the test images"),
    (r"top(\d)", r"test images whose class is among the \1 likeliest"),
    (r"miou(\d)", r"\1 clusters of patches per image, without training, against masks: mean IoU"),
    (r"(knn|linear)_miou", r"patches told apart with labels: mean IoU"),
    (r"(knn|linear)_accuracy", r"patches told apart with labels: accuracy"),
    (r"J", "objects followed through a video: overlap"),
    (r"F", "the same: contours"),
    (r"JF", "the same: mean of both"),
    (r"still_JF", "the same where nothing is followed"),
    (r"count", "number of objects"),
    (r"distance", "distance of the two nearest objects, in bins"),
    (r"\w+_chance", "the same by guessing"),
)
SPREAD = "_std"  # of the figure of the same name without it


def words(name):
    """What a figure is, as far as it is known by its name, "title/name"."""
    figure = name.partition("/")[2]
    return next(
        (re.sub(pattern, what, figure) for pattern, what in WORDS if re.fullmatch(pattern, figure)),
        "",
    )


def cell(value, spread=None):
    """A number with one decimal, or three digits where it is small; with its spread, where there is one."""
    if value is None:
        return ""
    text = f"{value:.1f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"
    return text if spread is None else f"{text} ± {spread:.1f}"


def with_spread(numbers):
    """[(name, number, its spread or None)] of {name: number}, where spreads are not rows of their own."""
    own = [
        name
        for name in numbers
        if not (name.endswith(SPREAD) and name.removesuffix(SPREAD) in numbers)
    ]
    return [(name, numbers[name], numbers.get(name + SPREAD)) for name in own]


def line(numbers):
    """{name: number} in one line."""
    return "  ".join(
        f"{name} {cell(value, spread)}" for name, value, spread in with_spread(numbers)
    )


def table(what, figures):
    """A text of several lines.

    Args:
      what: that was evaluated, see tools/evaluate.py: run, step, checkpoint, weights, images, classes.
      figures: {"title/name": {column: number}}, columns as in summary.ROWS.
    """
    columns = [name for name in ROWS if any(name in of_one for of_one in figures.values())]
    rows = [["", *(ROWS[name] for name in columns), ""]]
    for name, of_one, spread in with_spread(figures):
        rows.append(
            [name, *(cell(of_one.get(c), (spread or {}).get(c)) for c in columns), words(name)]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    align = lambda row: [
        row[0].ljust(widths[0]),
        *(x.rjust(w) for x, w in zip(row[1:-1], widths[1:-1], strict=True)),
    ]
    images = " and ".join(f"{count:,} {split}" for split, count in what["images"].items())
    chance = (
        f", {what['classes']} classes: guessing gives {100 / what['classes']:.3g} %"
        if what["classes"]
        else ""
    )
    weights = " and ".join(sorted(set(what["weights"].values())))
    head = [
        f"{what['run']}: step {what['step']}, {weights} weights, checkpoint {what['checkpoint'][:12]}",
        f"{images} images{chance}. Accuracies are in percent.",
    ]
    return "\n".join(
        ["", *head, "", *("  ".join([*align(row), row[-1]]).rstrip() for row in rows), ""]
    )
