"""Sections of the report with images: model input, reconstructions, features, neighbors.

Each has one or two sentences for a newcomer: what to look for, and what a collapse would look like.
Letters: K images, H W C rows, columns and channels of an image, h w rows and columns of patches.
"""

import numpy as np
from jaxtyping import Float, UInt8

from lmim_jax.evaluators.visualization import pca_rgb
from lmim_jax.report import elements
from lmim_jax.report.run_features import (
    EncodedImages,
    LabeledImage,
    Neighbor,
    Query,
    TrainingViews,
    Windows,
)
from lmim_jax.utils import html, plotting
from lmim_jax.utils.html import Html, Section


def input_section(views: TrainingViews) -> Section:
    """Whole image, crop with its windows, visible and hidden patches."""
    rows = []
    for k, whole in enumerate(views.whole_images):
        crop = views.crops[k]
        windows = views.windows[k]
        visible, hidden = plotting.split_crop(crop, windows)
        name = f"training view {k + 1}"
        row = [
            html.figure(whole, f"{name}: whole image", "image"),
            html.figure(crop, f"{name}: crop", "crop, windows", _window_frames(crop, windows)),
            html.figure(visible, f"{name}: visible patches", "visible"),
            html.figure(hidden, f"{name}: hidden patches", "hidden"),
        ]
        rows.append(row)
    windows = views.windows[0]
    number_visible = sum(visible for _, _, _, visible in windows)
    predicted = "their pixels"
    if views.reconstructions is None:
        predicted = "not their pixels, but the features that the target encoder computes for them"
    look = (
        f"Training takes a random crop, divided into {len(windows)} windows. The encoder is given "
        f"the {number_visible} windows framed in green and must predict the others: {predicted}."
    )
    return html.explained_section("inputs", "Model input", look, "", html.cards(rows, 4, 24))


def _window_frames(crop: UInt8[np.ndarray, "H W C"], windows: Windows) -> Html:
    """SVG frames of the windows of a crop: hidden in red, and visible in green on top of them."""
    height, width = crop.shape[:2]
    frames = []
    for is_visible in (False, True):
        for top, left, side, visible in windows:
            if bool(visible) == is_visible:
                frames.append(_frame(top, left, side, is_visible, width))
    return html.tag(
        "svg",
        elements.concatenate(frames),
        viewBox=f"0 0 {width} {height}",
        aria_hidden="true",
    )


def _frame(top: int, left: int, side: int, visible: bool, image_width: int) -> Html:
    """The SVG frame of one window."""
    color = plotting.HIDDEN_COLOR
    line_width = image_width / 200
    if visible:
        color = plotting.VISIBLE_COLOR
        line_width = 1.6 * image_width / 100
    return html.tag(
        "rect",
        x=left,
        y=top,
        width=side,
        height=side,
        fill="none",
        stroke=color,
        stroke_width=line_width,
    )


def reconstructions_section(views: TrainingViews) -> Section | None:
    """Visible patches, prediction and crop; None if the method predicts no pixels."""
    if views.reconstructions is None:
        return None
    rows = []
    for k, crop in enumerate(views.crops):
        visible, _ = plotting.split_crop(crop, views.windows[k])
        name = f"reconstruction {k + 1}"
        row = [
            html.figure(visible, f"{name}: visible patches", "visible"),
            html.figure(views.reconstructions[k], f"{name}: as predicted", "predicted"),
            html.figure(crop, f"{name}: the true crop", "truth"),
        ]
        rows.append(row)
    look = (
        "From the visible patches alone the model predicts the pixels of the hidden ones. Look for "
        "shapes that continue behind the mask; fine texture cannot be predicted. Where each patch "
        "is normalized by itself (norm_pix in MAE, BootMAE), its mean and contrast are taken from "
        "the true patch."
    )
    collapsed = (
        "all hidden patches are similar, flat gray or of one mean color, whatever is visible."
    )
    cards = html.cards(rows, 3, 20)
    return html.explained_section("reconstructions", "Reconstructions", look, collapsed, cards)


def translations_section(views: TrainingViews) -> Section | None:
    """A modality as given, another as predicted, and as it is; None if there are no such."""
    if not views.translations:
        return None
    rows = []
    for translation in views.translations:
        for k, (given, predicted, true) in enumerate(translation.images):
            name = f"{translation.predicted} from {translation.given}, scene {k + 1}"
            row = [
                html.figure(given, f"{name}: what is given", translation.given),
                html.figure(
                    predicted, f"{name}: as predicted", f"{translation.predicted}, predicted"
                ),
                html.figure(true, f"{name}: as it is", f"{translation.predicted}, true"),
            ]
            rows.append(row)
    look = (
        "One modality is visible as a whole, and nothing of the other, whose pixels the model "
        "predicts. Look for objects that are bright in the predicted modality although they are "
        "dark in the given one. Where each patch is normalized by itself (norm_pix), its mean and "
        "contrast are taken from the true patch: train with norm_pix=False to judge these, too."
    )
    collapsed = "the prediction is the same for all scenes, or a copy of the given modality."
    cards = html.cards(rows, 3, 20)
    return html.explained_section(
        "translations", "One modality from another", look, collapsed, cards
    )


def features_section(encoded: EncodedImages) -> Section:
    """Principal components of patch features as colors, trained and untrained, and true masks."""
    trained = _pca_images(encoded.tokens)
    untrained = _pca_images(encoded.untrained_tokens)
    rows = []
    for k, image in enumerate(encoded.images):
        name = f"image {k + 1}"
        row = [
            html.figure(image, name, encoded.names[k]),
            html.figure(trained[k], f"principal components of its features, {name}", "trained"),
            html.figure(untrained[k], f"the same for the untrained encoder, {name}", "untrained"),
        ]
        if encoded.masks is not None:
            mask = np.repeat(encoded.masks[k][..., None], 3, -1) * np.uint8(255)
            row.append(html.figure(mask, f"true mask of the object, {name}", "true mask"))
        rows.append(row)
    look = (
        "The first three principal components of the patch features, shown as red, green and "
        "blue, with one color space for all images. Patches of similar color have similar "
        "features: look for parts and objects that stand out in one color, within an image and "
        "from image to image. Untrained: with random weights, whose features carry little more "
        "than the colors of the pixels."
    )
    collapsed = (
        "colors depend on the position in the image, not on its content, and are the same in "
        "every image."
    )
    cards = html.cards(rows, len(rows[0]), 24)
    return html.explained_section("features", "Patch features (PCA)", look, collapsed, cards)


def _pca_images(tokens: Float[np.ndarray, "K h w D"]) -> UInt8[np.ndarray, "K h w 3"]:
    """The three principal components of all patches of all images, as colors."""
    images, height, width, dimensions = tokens.shape
    shares = pca_rgb(tokens.reshape(images, height * width, dimensions))
    colors = shares.reshape(images, height, width, 3)
    return (np.clip(colors, 0, 1) * 255).round().astype(np.uint8)


def neighbors_section(queries: list[Query], searched: int, held_out: bool) -> Section:
    """Images and their nearest training images.

    Args:
      queries: the images, with their neighbors.
      searched: number of training images that were searched.
      held_out: whether the queries are not among them.
    """
    rows = []
    for k, query in enumerate(queries, 1):
        row = [_query_figure(k, query.labeled_image)]
        for rank, neighbor in enumerate(query.neighbors, 1):
            alt = f"neighbor {rank} of query {k}, cosine {neighbor.cosine:.3f}"
            row.append(_neighbor_figure(neighbor, query.labeled_image.class_name, alt))
        rows.append(row)
    which = f"A held-out image, and the nearest of {searched:,} training images"
    if not held_out:
        which = f"An image, and the nearest ones of {searched:,} images"
    look = (
        f"{which} by the cosine similarity of their mean features. Look for neighbors that show "
        "the same thing rather than the same colors"
    )
    if queries[0].labeled_image.class_name:
        look += " (green: the same class; labels are not used in training)"
    look += "."
    collapsed = "the same few images appear for every query."
    cards = html.cards(rows, len(rows[0]), 28)
    return html.explained_section("neighbors", "Nearest neighbors", look, collapsed, cards)


def _query_figure(number: int, labeled_image: LabeledImage) -> Html:
    name = labeled_image.class_name or labeled_image.file_name
    caption = html.join("query", html.tag("br"), name)
    return html.figure(labeled_image.image, f"query {number}", caption)


def _neighbor_figure(neighbor: Neighbor, query_class: str, alt: str) -> Html:
    """A neighbor with its cosine and its class, colored by whether that is the query's."""
    name = neighbor.labeled_image.class_name
    label = html.tag("span", name or neighbor.labeled_image.file_name)
    if query_class:
        color = "good" if name == query_class else "bad"
        label = html.tag("span", name, class_=color)
    caption = html.join(f"{neighbor.cosine:.3f}", html.tag("br"), label)
    return html.figure(neighbor.labeled_image.image, alt, caption)
