"""Figures as uint8 arrays or SVG. Nothing here depends on a method or a run.

Letters: K images of a figure, H W pixels, C channels, h w grid rows and columns.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, hsv_to_rgb, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from lmim_jax.utils.names import printable

Window = tuple[int, int, int, bool]  # top, left, side in pixels; visible
Line = tuple[Sequence[float], Sequence[float]]  # steps, values
Panel = tuple[str, Mapping[str, Line], Mapping[str, float]]  # title, lines, constants by label
Picture = UInt8[np.ndarray, "H W 3"]

VISIBLE_COLOR = "#2a9d3a"
HIDDEN_COLOR = "#c8442e"
CLUSTER_COLORS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#bbbbbb",
    "#222222",
)
CONSTANT_STYLES = (("--", "#b8329c"), ("-.", "#8a6d00"), (":", "#7f7f7f"))  # of lines, in order
COLUMNS = 3  # of curves beside each other
MASK_COLORS = ListedColormap(["#222222", "#f2f2f2"])
IGNORED_COLOR = "#ffffff"  # of pixels without a class
LEGEND_LETTERS = 18  # of the name of a class in a legend
LEGEND_INCHES = 1.3  # width of such an entry
INK = "#010203"  # stands for the color of the page's text in SVG; no line has this color


class Segmented(NamedTuple):
    """An image and the class of each of its pixels, by different sources.

    Attributes:
      image: levels 0 .. 255.
      classes: by name of the source; -1: ignored.
    """

    image: UInt8[np.ndarray, "H W C"]
    classes: Mapping[str, Int[np.ndarray, "H W"]]


class _GridText(NamedTuple):
    """The text and the legend of a grid of images."""

    row_labels: list[str]
    title: str
    note: str
    legend: list[Patch]


def plain_text(name: str) -> str:
    """A name as matplotlib is to show it: all of its characters, and no formula between two "$"."""
    return printable(name).replace("$", r"\$")


def split_crop(
    crop: UInt8[np.ndarray, "H W C"], windows: Sequence[Window]
) -> tuple[UInt8[np.ndarray, "H W C"], UInt8[np.ndarray, "H W C"]]:
    """Show what either encoder receives of a crop; the rest is gray.

    Args:
      crop: pixels.
      windows: (top, left, side, visible) of every patch.

    Returns:
      (the crop with visible windows only, with hidden ones only).
    """
    visible_part = np.full_like(crop, 128)
    hidden_part = np.full_like(crop, 128)
    for top, left, side, visible in windows:
        part = visible_part if visible else hidden_part
        window = np.s_[top : top + side, left : left + side]
        part[window] = crop[window]
    return visible_part, hidden_part


def plot_masking(
    inputs: Sequence[Shaped[np.ndarray, "H W C"]],
    crops: Sequence[Shaped[np.ndarray, "H W C"]],
    windows: Sequence[Sequence[Window]],
) -> Picture:
    """Plot training inputs: image, crop with the sampled windows, visible part, hidden part.

    Args:
      inputs: K images as they are, levels 0 .. 255.
      crops: augmented crops of them, levels 0 .. 255.
      windows: of every crop, (top, left, side, visible) of every patch.
    """
    visible_count = sum(visible for *_, visible in windows[0])
    text = _GridText(
        row_labels=["image", "crop, windows", "visible", "hidden"],
        title="Model input",
        note=(
            "A random crop, one window per cell. The online encoder receives "
            f"{visible_count} of {len(windows[0])} windows ('visible');\n"
            "from them, the others ('hidden') or a target encoder's features of them are predicted."
        ),
        legend=[
            Patch(ec=VISIBLE_COLOR, fc="none", label="visible"),
            Patch(ec=HIDDEN_COLOR, fc="none", label="hidden"),
        ],
    )
    figure, axes = _image_grid(len(crops), text)
    for column, crop in enumerate(crops):
        visible_part, hidden_part = split_crop(crop, windows[column])
        _show(axes[0, column], inputs[column])
        _show(axes[1, column], crop)
        _show(axes[2, column], visible_part)
        _show(axes[3, column], hidden_part)
        for window in windows[column]:
            axes[1, column].add_patch(_window_frame(window))
    return _pixels(figure)


def plot_features(
    inputs: Shaped[np.ndarray, "K H W C"],
    colors: Float[np.ndarray, "K h w 3"],
    clusters: Int[np.ndarray, "K h w"],
    masks: Bool[np.ndarray, "K H W"] | None,
) -> Picture:
    """Plot patch features of whole images: principal components as colors, and clusters.

    Args:
      inputs: images, levels 0 .. 255.
      colors: principal components, 0 .. 1.
      clusters: cluster of every patch, counted from 0.
      masks: True where the object is; None: unknown.
    """
    count = int(clusters.max()) + 1
    palette = ListedColormap([CLUSTER_COLORS[i % len(CLUSTER_COLORS)] for i in range(count)])
    row_labels = ["image", "PCA as RGB", "clusters"]
    legend = [Patch(fc=palette(i), label=f"cluster {i + 1}") for i in range(count)]
    note = (
        "Patches of one color have similar features, after subtracting the mean over images at "
        "each position.\nPCA: one space for all images. Clusters: Ward's, for each image."
    )
    if masks is not None:
        row_labels.append("true mask")
        legend.append(Patch(fc=MASK_COLORS(1), ec="k", label="object"))
        legend.append(Patch(fc=MASK_COLORS(0), label="background"))
        note += " The true mask is never trained on."
    text = _GridText(row_labels, "Patch features", note, legend)
    figure, axes = _image_grid(len(inputs), text)
    limits = dict(vmin=-0.5, vmax=count - 0.5)
    for column in range(len(inputs)):
        _show(axes[0, column], inputs[column])
        axes[1, column].imshow(colors[column], interpolation="nearest")
        axes[2, column].imshow(clusters[column], cmap=palette, interpolation="nearest", **limits)
        if masks is not None:
            axes[3, column].imshow(
                masks[column], cmap=MASK_COLORS, vmin=0, vmax=1, interpolation="nearest"
            )
    return _pixels(figure)


def plot_segmentation(images: Sequence[Segmented], names: Sequence[str], title: str) -> Picture:
    """Plot images, each in a column above its true and its predicted classes.

    Args:
      images: with the same sources of classes.
      names: of all classes.
      title: of the figure.
    """
    sources = list(images[0].classes)
    colors = class_colors(len(names))
    present: set[int] = set()
    for image in images:
        for classes in image.classes.values():
            present |= set(np.unique(classes).tolist())
    patches = []
    for number in sorted(present - {-1}):
        patches.append(Patch(fc=colors[number], label=plain_text(names[number][:LEGEND_LETTERS])))
    if -1 in present:
        patches.append(Patch(fc=IGNORED_COLOR, ec="k", label="ignored"))
    height, width = images[0].image.shape[:2]
    cell = (2.4, 2.4 * height / width)
    columns = max(1, int(len(images) * cell[0] / LEGEND_INCHES))
    lines = -(-len(patches) // columns)
    inches = (len(images) * cell[0] + 0.3, (len(sources) + 1) * cell[1] + 0.45 + 0.17 * lines)
    figure = Figure(figsize=inches, dpi=110)
    axes = figure.subplots(len(sources) + 1, len(images), squeeze=False)
    for column, image in enumerate(images):
        _show(axes[0, column], image.image)
        for row, source in enumerate(sources, 1):
            classes = image.classes[source]
            painted = np.where((classes < 0)[..., None], to_rgb(IGNORED_COLOR), colors[classes])
            axes[row, column].imshow(painted, interpolation="nearest", aspect="auto")
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    for row, label in enumerate(["image", *sources]):
        axes[row, 0].set_ylabel(label, fontsize=8)
    figure.subplots_adjust(
        left=0.28 / inches[0],
        right=1 - 0.04 / inches[0],
        top=1 - 0.3 / inches[1],
        bottom=(0.12 + 0.17 * lines) / inches[1],
        wspace=0.03,
        hspace=0.04,
    )
    figure.suptitle(title, y=1 - 0.06 / inches[1], fontsize=10, weight="bold")
    figure.legend(
        handles=patches,
        fontsize=7,
        frameon=False,
        loc="lower center",
        ncols=columns,
        handlelength=1.2,
    )
    return _pixels(figure)


def class_colors(count: int) -> Float[np.ndarray, "C 3"]:
    """Distinct colors, 0 .. 1: those of tab20, then hues in steps of the golden ratio."""
    tab20 = matplotlib.colormaps["tab20"](range(20))[:, :3]
    colors = [*tab20[::2], *tab20[1::2]]  # the strong ones, then the pale ones
    for i in range(len(colors), count):
        hue = (i * 0.618034) % 1
        colors.append(tuple(hsv_to_rgb((hue, 0.45 + 0.15 * (i % 4), 0.95 - 0.2 * (i % 3)))))
    return np.array(colors[: max(count, 1)])


def plot_neighbors(
    rows: Sequence[Sequence[Shaped[np.ndarray, "H W C"]]], similarity: Float[np.ndarray, "R K"]
) -> Picture:
    """Plot images, each in a column above the images most like it.

    Args:
      rows: K images, then R rows of their neighbors, the nearest first; levels 0 .. 255.
      similarity: cosine similarity of each neighbor to the image of its column.
    """
    text = _GridText(
        row_labels=["image", *(f"nearest {rank}" for rank in range(1, len(rows)))],
        title="Nearest neighbors by features",
        note="Training images in the order of the cosine similarity of their features (numbers).",
        legend=[],
    )
    figure, axes = _image_grid(len(rows[0]), text)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            _show(axes[row, column], image)
            if row > 0:
                number = f"{similarity[row - 1, column]:.2f}"
                axes[row, column].set_title(
                    number,
                    fontsize=7,
                    x=0.02,
                    y=0.02,
                    loc="left",
                    color="white",
                    backgroundcolor="#222222",
                )
    return _pixels(figure)


def plot_curves(panels: Sequence[Panel], title: str, shared_legend: bool = False) -> Picture:
    """Plot curves over optimizer steps, in one panel each.

    Args:
      panels: (title, {label: (steps, values)}, {label: constant}); constants are dashed lines.
      title: of the figure.
      shared_legend: for panels with the same labels: one legend below all of them, that of the
        panel with the most lines.
    """
    rows = _row_lengths(len(panels))
    figure = Figure(figsize=(12, 3.1 * len(rows)), dpi=100, layout="constrained")
    figure.suptitle(plain_text(title), fontsize=11, fontweight="bold")
    cells = math.factorial(COLUMNS)  # of a row: every length of a row divides them
    grid = figure.add_gridspec(len(rows), cells)
    axes = []
    for row, length in enumerate(rows):
        width = cells // length
        for left in range(0, cells, width):
            axes.append(figure.add_subplot(grid[row, left : left + width]))
    fullest = fullest_panel(panels)
    colors = {}
    if shared_legend:
        colors = line_colors(panels[fullest])
    for i, panel in enumerate(panels):
        _plot_panel(axes[i], panel, colors)
        axes[i].set_title(plain_text(panel[0]), fontsize=9)
        if not shared_legend:
            _add_legend(axes[i], panel)
        elif i == fullest:
            handles, labels = axes[i].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    return _pixels(figure)


def _row_lengths(panels: int) -> list[int]:
    """How many panels each row has: at most COLUMNS, and none is empty."""
    rows = -(-panels // COLUMNS)
    shortest, longer = divmod(panels, rows)
    return [shortest + 1] * longer + [shortest] * (rows - longer)


def curve_svg(panel: Panel, colors: Mapping[str, str] | None = None) -> str:
    """Plot a panel of `plot_curves` as SVG, in the color of the text of the page around it.

    Args:
      panel: see `plot_curves`.
      colors: of each line, where the page has the legend; None: the plot has a legend.
    """
    with matplotlib.rc_context(_svg_style(panel)):
        figure = Figure(figsize=(4, 2.6), layout="constrained")
        ax = figure.subplots()
        _plot_panel(ax, panel, colors or {})
        ax.spines[["top", "right"]].set_visible(False)
        if colors is None:
            _add_legend(ax, panel)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _embeddable(buffer.getvalue())


def _svg_style(panel: Panel) -> dict[str, Any]:
    """Matplotlib settings for SVG with text as text, and the same bytes at every run."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": printable(panel[0]),
        "font.family": "sans-serif",
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "xtick.labelcolor": INK,
        "ytick.color": INK,
        "ytick.labelcolor": INK,
    }


def _embeddable(svg: str) -> str:
    """Reduce matplotlib's SVG file to what a page needs."""
    svg = svg[svg.index("<svg") :]
    # Metadata, and a style that would apply to the whole page
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"|(?<=<g) id="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    return re.sub(r"\s*\n\s*", " ", svg).replace(INK, "currentColor")


def fullest_panel(panels: Sequence[Panel]) -> int:
    """The index of the first panel with the most lines."""
    return max(range(len(panels)), key=lambda i: len(panels[i][1]))


def line_colors(panel: Panel) -> dict[str, str]:
    """A color "#rrggbb" for every label: matplotlib's ten, then shades of gray."""
    colors = {}
    for i, label in enumerate(panel[1]):
        color = f"C{i}" if i < 10 else str(0.2 + i % 7 / 10)
        colors[label] = to_hex(color)
    return colors


def _add_legend(ax: Axes, panel: Panel) -> None:
    """Explain the lines below the axes, where they hide no data; one line needs no explanation."""
    _, lines, constants = panel
    if len(lines) + len(constants) > 1:
        place = dict(loc="upper center", bbox_to_anchor=(0.5, -0.2), borderaxespad=0)
        ax.legend(fontsize=7, frameon=False, ncols=2, **place)


def _plot_panel(ax: Axes, panel: Panel, colors: Mapping[str, str]) -> None:
    """Draw lines and constants; lines without a color get matplotlib's."""
    _, lines, constants = panel
    for label, (steps, values) in lines.items():
        marker = "." if len(steps) < 12 else None
        color = colors.get(label)
        ax.plot(steps, values, label=plain_text(label), lw=1.5, marker=marker, color=color)
    for i, (label, value) in enumerate(constants.items()):
        style, color = CONSTANT_STYLES[i % len(CONSTANT_STYLES)]
        ax.axhline(value, ls=style, lw=1.2, color=color, label=plain_text(label))
    ax.set_xlabel("step", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)


def _image_grid(columns: int, text: _GridText, side: float = 1.5) -> tuple[Figure, Any]:
    """Create a grid of images, with a title above, a legend and a note below.

    Args:
      columns: images in a row.
      text: its labels give the number of rows.
      side: of an image in inches.

    Returns:
      (figure, array of axes [rows, columns]).
    """
    rows = len(text.row_labels)
    width = side * columns + 0.3
    height = side * rows + 1.15
    figure = Figure(figsize=(width, height), dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    for row, label in enumerate(text.row_labels):
        axes[row, 0].set_ylabel(label, fontsize=8)
    figure.subplots_adjust(
        left=0.28 / width,
        right=1 - 0.04 / width,
        top=1 - 0.36 / height,
        bottom=0.78 / height,
        wspace=0.04,
        hspace=0.04,
    )
    figure.suptitle(text.title, y=1 - 0.08 / height, fontsize=10, fontweight="bold")
    if text.legend:
        figure.legend(
            handles=text.legend,
            fontsize=7.5,
            frameon=False,
            borderaxespad=0,
            loc="upper center",
            bbox_to_anchor=(0.5, 0.74 / height),
            ncols=len(text.legend),
        )
    figure.text(0.5, 0.08 / height, text.note, ha="center", va="bottom", fontsize=7.5)
    return figure, axes


def _window_frame(window: Window) -> Rectangle:
    """The frame of a window: thick and green if visible, thin and red if hidden."""
    top, left, side, visible = window
    color = HIDDEN_COLOR
    line_width = 0.4
    if visible:
        color = VISIBLE_COLOR
        line_width = 1.2
    return Rectangle((left - 0.5, top - 0.5), side, side, fill=False, lw=line_width, ec=color)


def as_rgb(image: Shaped[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W 3"]:
    """An image of levels 0 .. 255 in colors; of channels other than 3, the mean in gray."""
    image = np.asarray(image)
    if image.shape[-1] != 3:
        image = np.repeat(image.mean(-1, keepdims=True), 3, axis=-1)
    return np.clip(image, 0, 255).astype(np.uint8)


def _show(ax: Axes, image: Shaped[np.ndarray, "H W C"]) -> None:
    ax.imshow(as_rgb(image), interpolation="nearest")


def _pixels(figure: Figure) -> Picture:
    """Render a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
