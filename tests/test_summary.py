"""The summary of a run: linear accuracy first, k-NN beside it; as dict, table and curves."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lmim_jax.train import summary
from lmim_jax.utils import box_plot, confusion_plot, names, plotting

LINES = [
    {
        "step": 0,
        "knn/nn1": 30.0,
        "knn/knn20": 32.5,
        "knn/pixels_knn20": 72.25,
        "knn/histogram_knn20": 64.5,
        "regression/accuracy": 61.0,
        "regression/held_out": 60.0,
        "regression/l2": 1e-5,
        "regression/pixels_accuracy": 68.5,
        "regression/histogram_accuracy": 53.0,
    },
    {"step": 4, "loss": 1.5, "images_per_second": 100.0, "collapse_index": 0.7},
    {
        "step": 8,
        "loss": 1.25,
        "images_per_second": 300.0,
        "collapse_index": 0.75,
        "effective_rank": 24.5,
        "knn/nn1": 50.0,
        "knn/knn20": 58.25,
        "knn/pixels_knn20": 72.25,
        "knn/histogram_knn20": 64.5,
        "regression/accuracy": 81.5,
        "regression/held_out": 80.0,
        "regression/l2": 1e-4,
        "regression/pixels_accuracy": 68.5,
        "regression/histogram_accuracy": 53.0,
        "segments/knn_miou": 40.0,  # not an accuracy of images
        "segments/linear_accuracy": 90.0,
    },
]
LINEAR = {"pixels": 68.5, "histogram": 53.0, "untrained": 61.0, "trained": 81.5}
NEIGHBORS = {"pixels": 72.25, "histogram": 64.5, "untrained": 32.5, "trained": 58.25}


def test_the_summary_has_the_linear_accuracy_beside_the_neighbors():
    found = summary.summarize(LINES, steps=8, total_steps=8, seconds=12.5)
    assert list(found)[:9] == [
        "steps",
        "total_steps",
        "images_per_second",
        "wall_seconds",
        "loss",
        "collapse_index",
        "effective_rank",
        "linear",
        "knn20",
    ]
    assert (found["steps"], found["images_per_second"], found["wall_seconds"]) == (8, 200, 12.5)
    assert (found["loss"], found["collapse_index"]) == (1.25, 0.75)
    assert found["linear"] == LINEAR
    assert found["knn20"] == NEIGHBORS
    assert found["regression/accuracy"] == 81.5
    assert [key for key, value in found.items() if isinstance(value, dict)] == ["linear", "knn20"]


def test_the_table_shows_linear_first():
    found = summary.summarize(LINES, steps=8, total_steps=8, seconds=12.5)
    lines = summary.format_summary(found, "RUN").splitlines()
    start = lines.index("Accuracy on the test images, in percent:")
    assert lines[start + 2 : start + 7] == [
        "                          linear   k-NN 20",
        "  raw pixels                68.5      72.2",
        "  color histogram           53.0      64.5",
        "  untrained encoder         61.0      32.5",
        "  trained encoder           81.5      58.2",
    ]
    assert any("linear: logistic regression" in line for line in lines)


def test_the_table_leaves_out_what_was_not_measured():
    found = {"steps": 8, "images_per_second": 200.0, "wall_seconds": 1.0}
    assert "Accuracy" not in summary.format_summary(found, "RUN")
    text = summary.format_summary(found | {"knn5": {"trained": 50.0, "untrained": 25.0}}, "RUN")
    assert "untrained encoder         25.0" in text
    assert "raw pixels" not in text
    assert "logistic regression" not in text
    only_linear = summary.format_summary(found | {"linear": LINEAR}, "RUN")
    assert "trained encoder           81.5" in only_linear
    assert "k-NN" not in only_linear


def test_curves_of_accuracies_come_first_with_their_baselines():
    panels = summary.curve_panels(LINES)
    titles = [title for title, _, _ in panels]
    assert titles[:3] == [
        "regression: linear accuracy, %",
        "knn: accuracy of nearest neighbors, %",
        "loss",
    ]
    assert titles[-1] == "segments"
    _, curves, constants = panels[0]
    assert curves == {"regression/accuracy": ([0, 8], [61.0, 81.5])}
    assert constants == {"raw pixels": 68.5, "color histogram": 53.0}
    _, curves, constants = panels[1]
    assert list(curves) == ["knn/knn20", "knn/nn1"]
    assert constants == {"raw pixels, k-NN 20": 72.25, "color histogram, k-NN 20": 64.5}


def test_curves_fill_their_rows_and_explain_lines_that_need_it():
    for count in range(1, 14):
        rows = plotting._row_lengths(count)
        assert sum(rows) == count
        assert 1 <= min(rows) <= max(rows) <= 3
    one = plotting.curve_svg(("loss", {"the only line": ([1, 2], [3.0, 4.0])}, {}))
    assert "the only line" not in one
    lines = {"loss": ([1, 2], [3.0, 4.0])}
    two = plotting.curve_svg(("loss", lines, {"raw pixels": 3.2, "color histogram": 3.6}))
    for label, (_, color) in zip(("raw", "color"), plotting.CONSTANT_STYLES, strict=False):
        assert label in two
        assert f"stroke: {color}" in two
    titles = [
        title
        for title, _, _ in summary.curve_panels(
            [{"step": 1, "learning_rate": 0.1, "grad_norm": 2.0}]
        )
    ]
    assert titles == ["learning rate", "gradient norm"]


@pytest.mark.parametrize("name", ["$5_$10_", "caf\udce9"])
def test_any_name_can_be_plotted(name):
    image = np.zeros((8, 8, 3), np.uint8)
    classes = np.array([[0, 1] * 4] * 8)
    both = [name, "$1"]
    plotting.plot_segmentation([plotting.Segmented(image, {"true": classes})], both, "title")
    confusion_plot.plot_confusion(np.eye(2, dtype=int), both, "title")
    boxes = box_plot.Boxes(np.array([[0.0, 0.0, 4.0, 4.0]]), np.array([0]), None)
    box_plot.plot_boxes([box_plot.Boxed(image, {"true": boxes})], both, "note")
    panel = (name, {name: ([1, 2], [3.0, 4.0])}, {"$1": 3.0})
    plotting.plot_curves([panel], name)
    assert f">{names.printable(name)}<" in plotting.curve_svg(panel)


def test_a_legend_lies_below_the_data():
    lines = {f"line {i}": ([1, 2], [3.0, 4.0]) for i in range(5)}
    figure = Figure(figsize=(4, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    plotting._plot_panel(axes, ("many", lines, {}), {})
    plotting._add_legend(axes, ("many", lines, {}))
    figure.canvas.draw()
    assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0
    assert axes.get_legend().get_window_extent().y0 >= 0
