"""Drawing: figures that a newcomer can read, as uint8 arrays [H, W, 3] or SVG. Nothing here knows of a method or a run.

Letters: K images of a picture, h w grid rows and columns, p patch size.
"""

import io
import re

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

VISIBLE_COLOR, HIDDEN_COLOR = "#2a9d3a", "#c8442e"
CLUSTER_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222222")
MASK = ListedColormap(["#222222", "#f2f2f2"])


def _grid(labels, columns, title, note, legend, side=1.5):
    """A figure of pictures, a row per label, with a title above, a legend and a note below: (figure, axes)."""
    width, height = side * columns + 0.3, side * len(labels) + 1.15
    figure = Figure(figsize=(width, height), dpi=110)
    axes = figure.subplots(len(labels), columns, squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    for ax, label in zip(axes[:, 0], labels, strict=True):
        ax.set_ylabel(label, fontsize=8)
    margins = dict(
        left=0.28 / width, right=1 - 0.04 / width, top=1 - 0.36 / height, bottom=0.78 / height
    )
    figure.subplots_adjust(**margins, wspace=0.04, hspace=0.04)
    figure.suptitle(title, y=1 - 0.08 / height, fontsize=10, fontweight="bold")
    place = dict(loc="upper center", bbox_to_anchor=(0.5, 0.74 / height), ncols=len(legend))
    figure.legend(handles=legend, fontsize=7.5, frameon=False, borderaxespad=0, **place)
    figure.text(0.5, 0.08 / height, note, ha="center", va="bottom", fontsize=7.5)
    return figure, axes


def _pixels(figure):
    """The drawn figure as an array."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _show(ax, image):
    """An image [H, W, C] of levels 0 .. 255; channels other than 1 and 3 are shown as the mean of all."""
    image = np.asarray(image)
    image = image if image.shape[-1] == 3 else np.repeat(image.mean(-1, keepdims=True), 3, axis=-1)
    ax.imshow(np.clip(image, 0, 255).astype(np.uint8), interpolation="nearest")


def split_crop(crop, windows):
    """What the two encoders get of a crop: (crop with visible windows only, with hidden ones only), the rest grey.

    windows: a list of (top, left, side, visible) in pixels.
    """
    seen, hidden = np.full_like(crop, 128), np.full_like(crop, 128)
    for top, left, side, visible in windows:
        window = np.s_[top : top + side, left : left + side]
        (seen if visible else hidden)[window] = crop[window]
    return seen, hidden


def plot_masking(inputs, crops, windows):
    """What training sees: the image, its crop with the sampled windows, and what each of the two encoders gets.

    Args:
      inputs: K images [H, W, C] as they are, levels 0 .. 255. crops: [K, H, W, C], augmented, levels 0 .. 255.
      windows: per image, a list of (top, left, side, visible) in pixels of the crop, one per patch.
    """
    seen, total = sum(visible for *_, visible in windows[0]), len(windows[0])
    figure, axes = _grid(
        ("image", "crop, windows", "visible", "hidden"),
        len(crops),
        "What the model is given",
        f"A random crop, one window per cell. The online encoder sees {seen} of {total} windows ('visible');\n"
        "from them, what is in the others ('hidden'), or what a target encoder makes of it, is predicted.",
        [Patch(ec=VISIBLE_COLOR, fc="none", label="visible"), Patch(ec=HIDDEN_COLOR, fc="none", label="hidden")],
    )
    for column, (original, crop, patches) in enumerate(zip(inputs, crops, windows, strict=True)):
        for top, left, side, visible in patches:
            color = VISIBLE_COLOR if visible else HIDDEN_COLOR
            frame = Rectangle(
                (left - 0.5, top - 0.5),
                side,
                side,
                fill=False,
                lw=1.2 if visible else 0.4,
                ec=color,
            )
            axes[1, column].add_patch(frame)
        for ax, picture in zip(axes[:, column], (original, crop, *split_crop(crop, patches)), strict=True):
            _show(ax, picture)
    return _pixels(figure)


def plot_features(inputs, colors, clusters, masks):
    """What the encoder makes of whole images: PCA of its patch features as colours, and their clusters.

    Args:
      inputs: [K, H, W, C] levels 0 .. 255. colors: [K, h, w, 3] in 0 .. 1. clusters: [K, h, w] int.
      masks: bool [K, H, W], true where the object is, or None.
    """
    count = int(clusters.max()) + 1
    palette = ListedColormap([CLUSTER_COLORS[i % len(CLUSTER_COLORS)] for i in range(count)])
    labels = ["image", "PCA as RGB", "clusters"]
    legend = [Patch(fc=palette(i), label=f"cluster {i + 1}") for i in range(count)]
    note = (
        "Patches of one colour have similar features, after the mean over images at each position is subtracted.\n"
        "PCA: one space for all images. Clusters: Ward's, image by image."
    )
    if masks is not None:
        labels += ["true mask"]
        legend += [Patch(fc=MASK(1), ec="k", label="object"), Patch(fc=MASK(0), label="background")]
        note += " The true mask is only shown, never trained on."
    figure, axes = _grid(
        labels, len(inputs), "What the encoder sees: features of patches", note, legend
    )
    for column in range(len(inputs)):
        _show(axes[0, column], inputs[column])
        axes[1, column].imshow(colors[column], interpolation="nearest")
        axes[2, column].imshow(
            clusters[column], cmap=palette, vmin=-0.5, vmax=count - 0.5, interpolation="nearest"
        )
        if masks is not None:
            axes[3, column].imshow(
                masks[column], cmap=MASK, vmin=0, vmax=1, interpolation="nearest"
            )
    return _pixels(figure)


def plot_curves(panels, title, shared_legend=False):
    """Curves over optimiser steps, a panel each.

    Args:
      panels: sequence of (title, {label: ([steps], [values])}, {label: constant}); constants are dashed lines.
      shared_legend: one legend below all panels, that of the panel with most lines, for panels with the same labels.
    """
    columns = 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 2.9 * rows), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    fullest = max((lines for _, lines, _ in panels), key=len)
    color = (
        {label: f"C{i}" if i < 10 else str(i % 7 / 8) for i, label in enumerate(fullest)}
        if shared_legend
        else {}
    )
    for (name, lines, constants), ax in zip(
        panels, axes, strict=False
    ):  # panels first, or an axis is lost
        _plot(ax, lines, constants, color)
        ax.set_title(name, fontsize=9)
        if not shared_legend:
            ax.legend(fontsize=7)
        elif lines is fullest:
            figure.legend(
                *ax.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8
            )
            fullest = None
    for ax in list(axes):
        ax.set_visible(False)
    return _pixels(figure)


def curve_svg(panel):
    """A panel of `curves` as SVG text in the ink of the page around it ("currentColor"), light or dark."""
    name, lines, constants = panel
    ink = "#010203"  # no line has this colour
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "text.color": ink,
    }
    style |= {f"{axis}tick.{what}": ink for axis in "xy" for what in ("color", "labelcolor")}
    with matplotlib.rc_context({**style, "axes.edgecolor": ink, "axes.labelcolor": ink}):
        figure = Figure(figsize=(4, 2.6), layout="constrained")
        ax = figure.subplots()
        _plot(ax, lines, constants, {})
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=7, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    # metadata, and a style that would hold for the whole page
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"|(?<=<g) id="[^"]*"', "", text).replace(
        "xlink:href", "href"
    )
    return re.sub(r"\s*\n\s*", " ", text).replace(ink, "currentColor")


def _plot(ax, lines, constants, color):
    """A panel's lines and constants."""
    for label, (steps, values) in lines.items():
        marker = "." if len(steps) < 12 else None
        ax.plot(steps, values, label=label, lw=1.5, marker=marker, color=color.get(label))
    for i, (label, value) in enumerate(constants.items()):
        ax.axhline(value, ls=(0, (4, 2 + i)), lw=1, color=str(0.45 + 0.15 * i), label=label)
    ax.set_xlabel("step", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)
