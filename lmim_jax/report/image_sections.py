"""Sections of a run's page that show images: what is given, rebuilt, seen, and which images are near.

Each has one or two sentences for a newcomer: what to look for, and what a collapse would look like.
"""

import numpy as np

from lmim_jax.evaluators.visualization import pca_rgb
from lmim_jax.utils import html, plotting


def given(wholes, crops, windows, rebuilt):
    """Image, crop with windows, visible and hidden part."""
    rows, seen, total = [], sum(visible for *_, visible in windows[0]), len(windows[0])
    for k, (whole, crop, of_image) in enumerate(zip(wholes, crops, windows, strict=True), 1):
        visible, hidden = plotting.split_crop(crop, of_image)
        rows.append(
            [
                html.figure(whole, f"training view {k}: whole image", "image"),
                html.figure(
                    crop, f"training view {k}: crop", "crop, windows", _frames(crop, of_image)
                ),
                html.figure(visible, f"training view {k}: visible patches", "visible"),
                html.figure(hidden, f"training view {k}: hidden patches", "hidden"),
            ]
        )
    look = (
        f"Training shows a random crop, cut into {total} windows. The encoder gets the {seen} framed in green; from "
        "them it must predict what is in the others"
        + (
            ": their pixels."
            if rebuilt is not None
            else ", not as pixels but as a second network sees them."
        )
    )
    return html.explained_section("given", "What the model is given", look, "", html.cards(rows, 4, 24))


def _frames(crop, windows):
    """SVG frames of windows, over a crop: green visible, red hidden."""
    height, width = crop.shape[:2]
    frame = lambda top, left, side, visible: html.tag(
        "rect",
        x=left,
        y=top,
        width=side,
        height=side,
        fill="none",
        stroke=plotting.VISIBLE_COLOR if visible else plotting.HIDDEN_COLOR,
        stroke_width=1.6 * width / 100 if visible else width / 200,
    )
    ordered = sorted(windows, key=lambda window: bool(window[3]))
    return html.tag(
        "svg", *(frame(*w) for w in ordered), viewBox=f"0 0 {width} {height}", aria_hidden="true"
    )


def reconstructions(crops, windows, rebuilt):
    """Visible part, image as predicted, crop."""
    rows = []
    for k, (crop, of_image, painted) in enumerate(zip(crops, windows, rebuilt, strict=True), 1):
        rows.append(
            [
                html.figure(
                    plotting.split_crop(crop, of_image)[0],
                    f"reconstruction {k}: visible patches",
                    "visible",
                ),
                html.figure(painted, f"reconstruction {k}: as predicted", "predicted"),
                html.figure(crop, f"reconstruction {k}: the true crop", "truth"),
            ]
        )
    look = (
        "From the visible patches alone the model paints the hidden ones. Look for shapes that go on behind the mask; "
        "fine texture cannot be known. Where each patch is predicted normalised to itself (MAE's norm_pix, BootMAE), "
        "its mean and contrast are taken from the truth."
    )
    collapsed = (
        "hidden patches are all alike, flat grey or of one mean colour, whatever is visible."
    )
    return html.explained_section(
        "reconstructions", "What it paints", look, collapsed, html.cards(rows, 3, 20)
    )


def features(seen):
    """Main components of patch features as colours, trained and untrained, and true masks."""
    trained, fresh = (
        pca_rgb(x.reshape(len(x), -1, x.shape[-1])).reshape(*x.shape[:3], 3)
        for x in (seen.tokens, seen.untrained)
    )
    rows = []
    for k, (image, name) in enumerate(zip(seen.images, seen.classes, strict=True)):
        row = [
            html.figure(image, f"held-out image {k + 1}", name or "image"),
            html.figure(
                _levels(trained[k]), f"main components of its features, image {k + 1}", "trained"
            ),
            html.figure(
                _levels(fresh[k]), f"the same of the untrained encoder, image {k + 1}", "untrained"
            ),
        ]
        if seen.masks is not None:
            mask = np.repeat(seen.masks[k][..., None], 3, -1) * np.uint8(255)
            row.append(html.figure(mask, f"true mask of the object, image {k + 1}", "true mask"))
        rows.append(row)
    look = (
        "Every patch has a feature of many numbers; its three main components are shown as red, green and blue, one "
        "colour space for all images. Patches of one colour mean much the same to the encoder: look for parts and "
        "objects that stand out in one colour, in one image and from image to image. Untrained: with random weights, "
        "which let little more through than the colours of the pixels."
    )
    collapsed = "colours follow the place in the image, whatever is there, the same in every image."
    return html.explained_section(
        "features", "What it sees", look, collapsed, html.cards(rows, len(rows[0]), 24)
    )


def _levels(shares):
    return (np.clip(shares, 0, 1) * 255).round().astype(np.uint8)


def neighbours(found, searched):
    """Queries and their nearest training images."""
    rows = []
    for k, (picture, name, nearest) in enumerate(found, 1):
        row = [html.figure(picture, f"query {k}", html.join("query", html.tag("br"), name))]
        for rank, (other, its_name, cosine) in enumerate(nearest, 1):
            same = dict(class_="good" if its_name == name else "bad") if name else {}
            caption = html.join(f"{cosine:.3f}", html.tag("br"), html.tag("span", its_name, **same))
            row.append(
                html.figure(other, f"neighbour {rank} of query {k}, cosine {cosine:.3f}", caption)
            )
        rows.append(row)
    look = (
        f"A held-out image, and the nearest of {searched:,} training images by the cosine of their mean features. Look "
        "for neighbours that show the same thing rather than the same colours"
    )
    look += " (green: the same class; labels are never trained on)." if found[0][1] else "."
    collapsed = (
        "the same few images turn up for every query, and their classes are as if drawn by lot."
    )
    return html.explained_section(
        "neighbours", "What is near", look, collapsed, html.cards(rows, len(rows[0]), 28)
    )
