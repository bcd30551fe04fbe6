"""Sections of a run's page about patches of one image: how they group, where attention goes, which are alike."""

import base64

import matplotlib
import numpy as np
from sklearn.manifold import TSNE

from lmim_jax.evaluators.common import clustering
from lmim_jax.utils import html, plotting

COUNTS = (3, 4, 5)  # K, clusters of the nested cuts
MAX_COSINES = 1_300_000  # numbers in the page, over all images: bytes


def colored(values, low, high):
    """[h, w] -> uint8 [h, w, 3] by the colour map viridis: dark low, yellow high."""
    shares = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return (matplotlib.colormaps["viridis"](shares)[..., :3] * 255).round().astype(np.uint8)


def segmentations(seen, count):
    """Nested cuts of one tree per image, and its t-SNE in the same colours."""
    rows = []
    palette = (matplotlib.colors.to_rgba_array(plotting.CLUSTER_COLORS)[:, :3] * 255).round()
    for k, (image, tokens) in enumerate(zip(seen.images[:count], seen.tokens, strict=False), 1):
        flat = tokens.reshape(-1, tokens.shape[-1])
        cuts = clustering.nested(flat, COUNTS)
        places = TSNE(
            perplexity=min(30, (len(flat) - 1) / 3), max_iter=500, random_state=0
        ).fit_transform(flat)
        side = [np.arange(n) * m // n for n, m in zip(image.shape, tokens.shape[:2], strict=False)]
        row = [html.figure(image, f"image {k}, to be segmented", "image")]
        for number, labels in cuts.items():
            of_pixels = palette[labels.reshape(tokens.shape[:2])][np.ix_(*side)]
            grey = image.mean(-1, keepdims=True)
            mixed = (0.75 * of_pixels + 0.25 * grey).round().astype(np.uint8)
            row.append(html.figure(mixed, f"image {k} in {number} segments", f"K = {number}"))
        row.append(
            html.tag(
                "figure", html.tag("figcaption", "t-SNE: each point a patch, near those alike.")
            )
        )
        row += [
            _scatter(places, labels, f"t-SNE of the patches of image {k}, K = {n}")
            for n, labels in cuts.items()
        ]
        rows.append(row)
    look = (
        "Patches are grouped by their features alone, image by image: one tree of clusters, cut at 3, 4 and 5, so that "
        "each picture divides a part of the one before. Below, every point is a patch, in the colour of its cluster. "
        "Look for segments with the outline of things, and for points in separate clouds."
    )
    collapsed = "segments are stripes or blots that are much the same in every image, and all points are one cloud."
    return html.explained_section(
        "segmentations", "How it groups", look, collapsed, html.cards(rows, 1 + len(COUNTS), 30)
    )


def _scatter(places, labels, alt):
    """Points [N, 2] in the colours of their labels, as SVG: a path per cluster."""
    low, high = places.min(0), places.max(0)
    x = 4 + 92 * (places - low) / np.maximum(high - low, 1e-9)
    paths = []
    for label in range(labels.max() + 1):
        points = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in x[labels == label])
        paths.append(
            html.tag(
                "path",
                d=points,
                stroke=plotting.CLUSTER_COLORS[label],
                stroke_width=2.6,
                fill="none",
                stroke_linecap="round",
            )
        )
    return html.tag(
        "figure", html.tag("svg", *paths, viewBox="0 0 100 100", role="img", aria_label=alt)
    )


def attention(seen, count):
    """Attention of the last block: mean over heads, and each head."""
    rows = []
    for k, (image, heads) in enumerate(zip(seen.images[:count], seen.attention, strict=False), 1):
        show = lambda x: colored(x, 0, np.quantile(x, 0.995))
        row = [html.figure(image, f"image {k}, to be attended to", "image")]
        row.append(
            html.figure(show(heads.mean(0)), f"attention, mean of all heads, image {k}", "mean")
        )
        row += [
            html.figure(show(x), f"attention of head {i}, image {k}", f"head {i}")
            for i, x in enumerate(heads, 1)
        ]
        rows.append(row)
    who = (
        "the CLS token, which sums the image up, looks at"
        if seen.from_cls
        else "all patches look at, on average,"
    )
    look = (
        f"Where {who} in the last block: yellow much, dark little. Look for heads that pick out objects or parts, each "
        "its own. Few methods here train CLS itself, so its attention may be rougher than the features are."
    )
    collapsed = "every head looks at the same places, whatever the image."
    columns = min(len(rows[0]), 7)
    return html.explained_section(
        "attention", "Where it looks", look, collapsed, html.cards(rows, columns, 5.2 * columns)
    )


def similarities(seen, count):
    """Cosines of a chosen patch with all others; the script of tools/report_script.py lets one choose."""
    h, w = seen.tokens.shape[1:3]
    upper = np.triu_indices(h * w)
    count = max(1, min(count, MAX_COSINES // len(upper[0]), len(seen.images)))
    made = []
    for k in range(count):
        x = seen.tokens[k].reshape(h * w, -1)
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        cosines = np.clip(x @ x.T, -1, 1)
        chosen = _middle(seen.masks[k] if seen.masks is not None else None, h, w)
        stored = base64.b64encode(
            ((cosines[upper] + 1) * 127.5).round().astype(np.uint8).tobytes()
        ).decode()
        place = html.tag("rect", x=chosen % w, y=chosen // w, width=1, height=1, class_="mark")
        mark = html.tag(
            "svg", place, viewBox=f"0 0 {w} {h}", preserveAspectRatio="none", aria_hidden="true"
        )
        shown = colored(cosines[chosen].reshape(h, w), 0, 1)
        row = html.tag(
            "div",
            html.figure(
                seen.images[k],
                f"image {k + 1}: the framed patch is compared",
                "choose a patch here",
                mark,
            ),
            html.figure(
                shown, f"cosine with every patch of image {k + 1}", html.tag("output"), mark
            ),
            class_="row",
            style="--columns:2",
        )
        made.append(
            html.tag(
                "div",
                row,
                class_="card",
                data_grid=f"{h},{w}",
                data_chosen=chosen,
                data_cosines=stored,
            )
        )
    look = (
        "Choose a patch (click, touch, or arrow keys): the right-hand picture shows how similar every other patch of "
        "the image is to it, from dark (cosine 0 or less) to yellow (1). Look for yellow that fills the same thing, or "
        "the same kind of thing, and stops at its outline."
    )
    collapsed = (
        "all is yellow, or only the patch itself and its neighbours are, whatever they show."
    )
    return html.explained_section(
        "similarities",
        "What is alike",
        look,
        collapsed,
        html.tag("div", *made, class_="cards", style="--card-width:18rem"),
    )


def _middle(mask, h, w):
    """The patch to begin with: the one nearest to the centre of the object, in it; else the middle one."""
    if mask is None or not mask.any():
        return h // 2 * w + w // 2
    inside = np.argwhere(mask)
    center = inside[np.square(inside - inside.mean(0)).sum(1).argmin()]
    return int(center[0] * h // mask.shape[0] * w + center[1] * w // mask.shape[1])
