"""Sections of the report about the patches of one image: clusters, attention, similarity.

Letters: h w rows and columns of patches, N = h w, D width.
"""

import base64

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from lmim_jax.evaluators.common import classifiers, clustering
from lmim_jax.report import elements
from lmim_jax.report.run_features import EncodedImages
from lmim_jax.utils import html, plotting
from lmim_jax.utils.html import Html, Section

CLUSTER_COUNTS = (3, 4, 5)  # clusters in each cut of the tree, see `clustering.nested`
MAX_COSINES = 1_300_000  # of all images together; each is one byte in the page
EQUAL = 1e-12  # tokens that differ by less are equal
MAX_COLUMNS = 7  # attention maps beside each other


def apply_colormap(
    values: Float[np.ndarray, "h w"], low: float, high: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Colors of the colormap viridis: dark for `low` and below, yellow for `high` and above."""
    shares = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return (matplotlib.colormaps["viridis"](shares)[..., :3] * 255).round().astype(np.uint8)


def segmentation_section(encoded: EncodedImages, count: int) -> Section:
    """Clusters of the patches of `count` images, and their t-SNE in the same colors."""
    rows = []
    for k, image in enumerate(encoded.images[:count]):
        rows.append(_segmentation_row(image, encoded.tokens[k], f"image {k + 1}"))
    look = (
        "Patches are clustered by their features alone, image by image: one tree of clusters, cut "
        "at 3, 4 and 5, so that each picture divides a segment of the one before. Below, every "
        "point is a patch, in the color of its cluster. Look for segments with the outline of "
        "objects, and for points in separate clouds."
    )
    collapsed = (
        "segments are stripes or blobs that are similar in every image, and all points form one "
        "cloud."
    )
    cards = html.cards(rows, 1 + len(CLUSTER_COUNTS), 30)
    title = "Unsupervised segmentation"
    return html.explained_section("segmentations", title, look, collapsed, cards)


def _segmentation_row(
    image: UInt8[np.ndarray, "H W C"], tokens: Float[np.ndarray, "h w D"], name: str
) -> list[Html]:
    """An image and its segments, and below them the t-SNE of its patches."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    cuts = clustering.nested_clusters(flat, CLUSTER_COUNTS)
    row = [html.figure(image, f"{name}, to be segmented", "image")]
    for clusters, labels in cuts.items():
        overlay = _color_segments(image, labels.reshape(tokens.shape[:2]))
        row.append(html.figure(overlay, f"{name} in {clusters} segments", f"K = {clusters}"))
    note = html.tag("figcaption", "t-SNE: each point is a patch; similar patches are close.")
    row.append(html.tag("figure", note))
    points = _embed(flat)
    for clusters, labels in cuts.items():
        row.append(_scatter(points, labels, f"t-SNE of the patches of {name}, K = {clusters}"))
    return row


def _embed(tokens: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N 2"]:
    """t-SNE of tokens; a single point for equal ones, by whose spread scikit-learn would divide."""
    if np.ptp(tokens, axis=0).max() < EQUAL:
        return np.zeros((len(tokens), 2), tokens.dtype)
    perplexity = min(30, (len(tokens) - 1) / 3)
    embedding = TSNE(perplexity=perplexity, max_iter=500, random_state=0)
    with threadpool_limits(1):  # so few points: threads would only wait for each other
        return embedding.fit_transform(tokens)


def _color_segments(
    image: UInt8[np.ndarray, "H W C"], labels: Int[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "H W 3"]:
    """A gray image with the colors of the clusters of its patches laid over it."""
    palette = (matplotlib.colors.to_rgba_array(plotting.CLUSTER_COLORS)[:, :3] * 255).round()
    height, width = image.shape[:2]
    rows = np.arange(height) * labels.shape[0] // height
    columns = np.arange(width) * labels.shape[1] // width
    colors = palette[labels][np.ix_(rows, columns)]
    gray = image.mean(-1, keepdims=True)
    return (0.75 * colors + 0.25 * gray).round().astype(np.uint8)


def _scatter(points: Float[np.ndarray, "N 2"], labels: Int[np.ndarray, " N"], alt: str) -> Html:
    """Points in the colors of their clusters, as SVG with one path per cluster."""
    low = points.min(0)
    high = points.max(0)
    scaled = 4 + 92 * (points - low) / np.maximum(high - low, 1e-9)
    paths = []
    for label in range(labels.max() + 1):
        dots = [f"M{x:.1f} {y:.1f}h0" for x, y in scaled[labels == label]]
        path = html.tag(
            "path",
            d="".join(dots),
            stroke=plotting.CLUSTER_COLORS[label],
            stroke_width=2.6,
            fill="none",
            stroke_linecap="round",
        )
        paths.append(path)
    drawing = html.tag(
        "svg",
        elements.concatenate(paths),
        viewBox="0 0 100 100",
        role="img",
        aria_label=alt,
    )
    return html.tag("figure", drawing)


def attention_section(encoded: EncodedImages, count: int) -> Section:
    """Attention of the last block: the mean over heads, and each head."""
    rows = []
    for k, image in enumerate(encoded.images[:count]):
        heads = encoded.attention[k]
        name = f"image {k + 1}"
        mean = _attention_map(heads.mean(0))
        row = [
            html.figure(image, f"{name}, input of the attention maps", "image"),
            html.figure(mean, f"attention, mean of all heads, {name}", "mean"),
        ]
        for i, head in enumerate(heads, 1):
            alt = f"attention of head {i}, {name}"
            row.append(html.figure(_attention_map(head), alt, f"head {i}"))
        rows.append(row)
    query = "the mean over all patches"
    if encoded.attention_from_cls:
        query = "the CLS token"
    look = (
        f"Attention of {query} in the last block: yellow is high, dark is low. Look for heads that "
        "select objects or parts, each its own. Few methods here train CLS itself, so its "
        "attention can be less clean than the features are."
    )
    collapsed = "every head attends to the same positions, whatever the image."
    columns = min(len(rows[0]), MAX_COLUMNS)
    cards = html.cards(rows, columns, 5.2 * columns)
    return html.explained_section("attention", "Attention maps", look, collapsed, cards)


def _attention_map(attention: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Attention in colors; the few highest values are cut off, as they would hide the others."""
    return apply_colormap(attention, 0, np.quantile(attention, 0.995))


def similarity_section(encoded: EncodedImages, count: int) -> Section:
    """Cosine similarity of one patch with all others; script.py lets the reader choose it."""
    h, w = encoded.tokens.shape[1:3]
    cosines_per_image = h * w * (h * w + 1) // 2
    count = max(1, min(count, MAX_COSINES // cosines_per_image, len(encoded.images)))
    cards = []
    for k in range(count):
        mask = None
        if encoded.masks is not None:
            mask = encoded.masks[k]
        chosen = _initial_patch(mask, h, w)
        name = f"image {k + 1}"
        cards.append(_similarity_card(encoded.images[k], encoded.tokens[k], chosen, name))
    look = (
        "Choose a patch (click, touch, or arrow keys): the right-hand picture shows how similar "
        "every other patch of the image is to it, from dark (cosine 0 or less) to yellow (1). "
        "Look for yellow that covers the same object, or the same kind of object, and stops at "
        "its outline."
    )
    collapsed = (
        "everything is yellow, or only the patch itself and its neighbors are, whatever they show."
    )
    content = elements.container(cards, class_="cards", style="--card-width:18rem")
    return html.explained_section("similarities", "Patch similarity", look, collapsed, content)


def _similarity_card(
    image: UInt8[np.ndarray, "H W C"], tokens: Float[np.ndarray, "h w D"], chosen: int, name: str
) -> Html:
    """An image with a frame around the chosen patch, and the cosines of all patches with it.

    The attributes of the card hold all cosines for the script; see script.py.
    """
    h, w = tokens.shape[:2]
    cosines = _cosines(tokens.reshape(h * w, -1))
    marker = _patch_marker(chosen, h, w)
    colors = apply_colormap(cosines[chosen].reshape(h, w), 0, 1)
    input_figure = html.figure(
        image, f"{name}: the framed patch is compared", "choose a patch here", marker
    )
    cosine_figure = html.figure(
        colors, f"cosine with every patch of {name}", html.tag("output"), marker
    )
    row = elements.container([input_figure, cosine_figure], class_="row", style="--columns:2")
    return elements.container(
        [row],
        class_="card",
        data_grid=f"{h},{w}",
        data_chosen=chosen,
        data_cosines=_encode_cosines(cosines),
    )


def _cosines(tokens: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N N"]:
    """Cosine similarity of all pairs."""
    unit = classifiers.l2_normalize_rows(tokens)
    return np.clip(unit @ unit.T, -1, 1)


def _encode_cosines(cosines: Float[np.ndarray, "N N"]) -> str:
    """The upper triangle, a byte each, in base64; see script.py."""
    upper = cosines[np.triu_indices(len(cosines))]
    levels = ((upper + 1) * 127.5).round().astype(np.uint8)
    return base64.b64encode(levels.tobytes()).decode()


def _patch_marker(chosen: int, h: int, w: int) -> Html:
    """An SVG with a frame around one patch, to lie on a picture of the grid."""
    frame = html.tag("rect", x=chosen % w, y=chosen // w, width=1, height=1, class_="mark")
    return html.tag(
        "svg",
        frame,
        viewBox=f"0 0 {w} {h}",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def _initial_patch(mask: Bool[np.ndarray, "H W"] | None, h: int, w: int) -> int:
    """The patch shown first: the one at the center of the object, or of an image without mask."""
    if mask is None or not mask.any():
        return h // 2 * w + w // 2
    inside = np.argwhere(mask)
    distances = np.square(inside - inside.mean(0)).sum(1)
    row, column = inside[distances.argmin()]
    return int(row * h // mask.shape[0] * w + column * w // mask.shape[1])
